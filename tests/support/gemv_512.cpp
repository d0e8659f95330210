// Calls the AVX-512 kernel for few columns, which gemv_512.py compiles with chosen instructions.

#include "fast/gemm.h"

#include <algorithm>
#include <vector>

// Multiply n_rows rows of n_blocks * 32 weights with n_cols columns of x into out [n_cols][n_rows]. Return whether the kernel supports the type.
extern "C" bool multiply(int type, const char * weights, size_t stride, int n_rows, int n_blocks, const float * x, int n_cols, float * out) {
    const fast::gemm * kernel = fast::gemv_512(type);
    if (!kernel) {
        return false;
    }
    const size_t tile_bytes = kernel->block_bytes * ((n_blocks + 7) / 8 * 8);
    const int n_tiles = (n_cols + kernel->n_cols - 1) / kernel->n_cols;
    std::vector<uint8_t> tiles(tile_bytes * n_tiles);
    std::vector<const float *> columns(n_cols);
    std::vector<float *> results(n_cols);
    for (int c = 0; c < n_cols; c++) {
        columns[c] = x + (size_t) c * n_blocks * 32;
        results[c] = out + (size_t) c * n_rows;
    }
    for (int t = 0; t < n_tiles; t++) {
        const int first = t * kernel->n_cols;
        kernel->pack(columns.data() + first, std::min(kernel->n_cols, n_cols - first), n_blocks, tiles.data() + t * tile_bytes);
    }
    for (int row = 0; row < n_rows; row += kernel->n_rows) {
        const int n = std::min(kernel->n_rows, n_rows - row);
        kernel->multiply({ weights + row * stride, stride, n, n_blocks, tiles.data(), tile_bytes, n_cols, results.data(), (size_t) row, nullptr });
    }
    return true;
}
