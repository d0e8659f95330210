// Products of panels of weights with tiles of columns: what the driver asks of an instruction set's kernels.

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

namespace pop {

// How weights are laid out in memory: a ggml_type, or one of these and a ggml_type.
constexpr int X8  = 1024; // eight rows interleaved, in CPU_REPACK's buffers
constexpr int X16 = 2048; // sixteen, in the buffers for AMX

// The share of a product that one call computes: some rows of weights times all columns.
struct gemm_share {
    const char *    weights;  // the first row
    size_t          stride;   // bytes from row to row, where rows are interleaved their share
    int             n_rows;   // at most gemm::n_rows
    int             n_blocks; // of 32 along K
    const uint8_t * tiles;    // packed columns, tile after tile
    int             n_cols;
    float * const * out;      // [n_cols], the columns of the result
    size_t          row;      // where in them the product with the first row goes
    uint8_t *       scratch;  // gemm::scratch bytes of this thread, 64-byte aligned
};

struct gemm {
    int    n_rows;    // of a panel, a multiple of 8
    int    n_cols;    // of a tile
    int    min_cols;  // from how many columns on this beats upstream's code
    size_t tile;      // bytes of a packed tile for 32 along K
    size_t scratch;   // bytes

    // n columns of n_blocks * 32 values to one tile, n at most n_cols
    void (*pack)(const float * const * cols, int n, int n_blocks, uint8_t * tile);
    void (*multiply)(const gemm_share & share);
};

constexpr int MAX_TILE_COLS = 16;
constexpr int NEVER_FASTER  = 1 << 30; // a min_cols

// null: these kernels do not read the layout, or the processor or the build lacks the instructions
const gemm * gemm_amx(int layout);
const gemm * gemm_512(int layout);
const gemm * gemm_256(int layout);
const gemm * gemm_float(int layout);

} // namespace pop
