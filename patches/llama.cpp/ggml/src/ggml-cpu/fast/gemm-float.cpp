// Products with F32, F16 and BF16 weights in f32, by AVX-512 or AVX2. They are as fast as upstream's, but a row's result does not depend
// on the number of rows. So they serve GGML_POP_ROWS_ALL only.
//
// One block (32 values along K) of a column tile, f32:       A panel's step of 256 values along K, f32:
//
//   [c0: k0 k1 ... k31][c1: k0 ... k31] ...                    k0:   [row 0][row 1] ... [row ROWS - 1]
//                                                              k1:   [row 0] ...

#include "gemm.h"

#include "ggml-cpu-impl.h" // defines __FMA__ and __F16C__, which MSVC does not

#include "types.h"
#include "vectors.h"

#ifdef FAST_VECTORS

#include <algorithm>
#include <cstring>

namespace fast {

constexpr int COLS = LANES == 16 ? 12 : 6; // with 2 vectors of rows: 24 sums in 32 registers, or 12 in 16
constexpr int ROWS = 2 * LANES;
constexpr int STEP = 256; // values along K that are unpacked at once: 32 KiB (16 KiB with AVX2) stay in the caches
constexpr int TILE = COLS * 32 * (int) sizeof(float); // bytes of a block

static void pack(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    for (int b = 0; b < n_blocks; b++, tile += TILE) {
        for (int c = 0; c < n; c++) {
            memcpy(tile + c * 128, cols[c] + 32 * b, 128);
        }
    }
}

template <ggml_type TYPE> static void unpack(const char * weights, size_t stride, int n_rows, int k, int n, float * panel) {
    for (int j = 0; j < n_rows; j++) {
        for (int i = 0; i < n; i += LANES) {
            alignas(64) float values[LANES];
            store(values, load_row<TYPE>(weights + j * stride, k + i));
            for (int l = 0; l < LANES; l++) {
                panel[(i + l) * ROWS + j] = values[l];
            }
        }
    }
}

// Multiply a panel with the first N columns of a tile over n values along K, and add the products to the sums.
template <int N> static void multiply_tile(const float * panel, const uint8_t * tile, int n, float sums[COLS][ROWS]) {
    floats f[N][2];
    FAST_UNROLL
    for (int c = 0; c < N; c++) {
        f[c][0] = load(sums[c]);
        f[c][1] = load(sums[c] + LANES);
    }
    for (int b = 0; b < n; b += 32, tile += TILE) {
        const float * x = (const float *) tile;
        for (int k = 0; k < 32; k++, x++, panel += ROWS) {
            const floats w0 = load(panel), w1 = load(panel + LANES);
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                f[c][0] = fma(w0, splat(x[c * 32]), f[c][0]);
                f[c][1] = fma(w1, splat(x[c * 32]), f[c][1]);
            }
        }
    }
    FAST_UNROLL
    for (int c = 0; c < N; c++) {
        store(sums[c], f[c][0]);
        store(sums[c] + LANES, f[c][1]);
    }
}

template <ggml_type TYPE> static void multiply(const gemm_share & s) {
    float * panel = (float *) s.scratch;
    const int n_values = 32 * s.n_blocks;
    for (int k = 0; k < n_values; k += STEP) {
        const int n = std::min(STEP, n_values - k);
        unpack<TYPE>(s.weights, s.stride, s.n_rows, k, n, panel);
        for (int c = 0; c < s.n_cols; c += COLS) {
            const uint8_t * tile = s.tiles + c / COLS * s.tile_stride + (size_t) k / 32 * TILE;
            const int n_cols = std::min(COLS, s.n_cols - c);
            alignas(64) float sums[COLS][ROWS] = {};
            for (int i = 0; k > 0 && i < n_cols; i++) {
                memcpy(sums[i], s.out[c + i] + s.row, s.n_rows * sizeof(float));
            }
            const auto run = n_cols > COLS / 2 ? multiply_tile<COLS> : n_cols > 1 ? multiply_tile<COLS / 2> : multiply_tile<1>;
            run(panel, tile, n, sums);
            for (int i = 0; i < n_cols; i++) {
                memcpy(s.out[c + i] + s.row, sums[i], s.n_rows * sizeof(float));
            }
        }
    }
}

template <ggml_type TYPE> static const gemm * kernel() {
    static const gemm g = { ROWS, COLS, 0, TILE, STEP * ROWS * sizeof(float), pack, multiply<TYPE> };
    return &g;
}

const gemm * gemm_float(int type) {
    switch (type) {
        case GGML_TYPE_F32:  return kernel<GGML_TYPE_F32>();
        case GGML_TYPE_F16:  return kernel<GGML_TYPE_F16>();
        case GGML_TYPE_BF16: return kernel<GGML_TYPE_BF16>();
        default:             return nullptr;
    }
}

} // namespace fast

#else

const fast::gemm * fast::gemm_float(int) {
    return nullptr;
}

#endif
