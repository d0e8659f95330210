// Products of panels of weights with tiles of columns: what the driver asks of an instruction set's kernels.

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

namespace pop {

// The share of a product that one call computes: some rows of weights times all columns.
struct gemm_share {
    const char *    weights;  // the first row
    size_t          stride;   // bytes from row to row
    int             n_rows;   // at most gemm::n_rows
    int             n_blocks; // of 32 along K
    const uint8_t * tiles;    // packed columns
    size_t          tile;     // bytes from one tile to the next
    int             n_cols;
    float * const * out;      // [n_cols], the columns of the result
    size_t          row;      // where in them the product with the first row goes
    uint8_t *       scratch;  // gemm::scratch bytes of this thread, 64-byte aligned
};

struct gemm {
    int    n_rows;    // of a panel, a multiple of 8
    int    n_cols;    // of a tile
    int    min_cols;  // from how many columns on this beats the kernels for fewer, or upstream's code
    size_t tile;      // bytes of a packed tile for 32 along K, which is rounded up to 256
    size_t scratch;   // bytes

    // n columns of n_blocks * 32 values to one tile, n at most n_cols
    void (*pack)(const float * const * cols, int n, int n_blocks, uint8_t * tile);
    void (*multiply)(const gemm_share & share);
};

constexpr int MAX_TILE_COLS = 16;

// null: these kernels do not read the type, or the processor or the build lacks the instructions
const gemm * gemm_amx(int type);
const gemm * gemm_512(int type);
const gemm * gemm_256(int type);
const gemm * gemm_float(int type); // no faster than upstream's code

// for few columns
const gemm * gemv_512(int type);
const gemm * gemv_256(int type);

} // namespace pop
