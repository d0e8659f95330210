// Interface between fast.cpp and the kernels of an instruction set: products of weight panels with column tiles.
//
//            columns (activations)                result
//            +------+------+---                   +------+------+---
//          K |tile 0|tile 1|                      |      |      |
//            +------+------+---           n_rows  | += panel x tile
//   +-----------------+                           |      |      |
//   | panel (weights) | n_rows                    +------+------+---
//   +-----------------+                            n_cols
//            K
//
// A "block" is 32 values along K, the unit of scales. A packed tile is a sequence of blocks: [K / 32][block_bytes].

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

namespace fast {

// Arguments of one call: a panel's rows times the columns.
struct gemm_share {
    const char *    weights;     // the first row
    size_t          stride;      // bytes from row to row
    int             n_rows;      // up to gemm::n_rows
    int             n_blocks;    // blocks of 32 values along K
    const uint8_t * tiles;       // packed columns
    size_t          tile_stride; // bytes from tile to tile
    int             n_cols;
    float * const * out;         // [n_cols], the columns of the result
    size_t          row;         // index of the first row in each column of the result
    uint8_t *       scratch;     // gemm::scratch_bytes of this thread, 64-byte aligned
};

struct gemm {
    int    n_rows;        // rows of a panel, a multiple of 8
    int    n_cols;        // columns of a tile
    int    min_cols;      // with fewer columns, the next kernel (or upstream's) is faster
    size_t block_bytes;   // size of a tile's block; K is rounded up to 256
    size_t scratch_bytes; // per thread

    // Pack n columns (up to n_cols) of n_blocks * 32 values into one tile.
    void (*pack)(const float * const * cols, int n, int n_blocks, uint8_t * tile);
    void (*multiply)(const gemm_share & share);
};

constexpr int MAX_TILE_COLS = 16;

// Return null if the kernels do not support the type, or the processor or build lacks the instructions.
const gemm * gemm_amx(int type);
const gemm * gemm_512(int type);
const gemm * gemm_256(int type);
const gemm * gemm_float(int type); // as fast as upstream's code, hence only for GGML_POP_ROWS_ALL

// Kernels for few columns, as in decode.
const gemm * gemv_512(int type);
const gemm * gemv_256(int type);

} // namespace fast
