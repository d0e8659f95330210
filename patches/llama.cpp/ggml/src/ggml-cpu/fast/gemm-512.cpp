// Products by AVX-512 VNNI: unchanged weight codes times 8-bit activations with one scale per 32 values.
//
// One block (32 values along K) of a column tile, where cN is a column:
//
//   codes   [c0: k0 k1 ... k31][c1: k0 ... k31] ... [c5: k0 ... k31]   i8
//   scales  [c0][c1][c2][c3][c4][c5]                                   f32
//   words   [c0][c1][c2][c3][c4][c5]   first half, or all 32 values    f32 scale * sum (types with mins)
//           [c0][c1][c2][c3][c4][c5]   second half                     or i32 -bias * sum (types with a bias)
//
// sum is the sum of a column's codes. A min multiplies scale * sum; -bias * sum is where the integer sum starts.
// The panel's layout is in panel-512.h. A register tile is 32 rows (2 vectors) x 6 columns.

#include "gemm.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "quantise-512.h"
#include "unpack-512.h"

namespace fast {

// 2 vectors x 6 columns: 12 float sums and 12 integer sums, which leaves 8 of 32 registers for codes and scales.
constexpr int COLS = 6;

// Blocks of a panel that are unpacked at once: 32 KiB of codes stay in the L1 and L2 caches for all columns. Longer steps store and load
// the sums less often. Other values were not measured with AVX-512 VNNI.
constexpr int STEP_BLOCKS = 32;

// With fewer columns, gemv-512.cpp is faster (23.4 ns for 6 columns by rows, 21.8 ns by panels; 15.8 and 19.7 ns for 4:
// docs/notebook/kernels-experts-and-decoding.md).
constexpr int MIN_COLS = 6;

constexpr int TILE = COLS * (32 + 3 * 4); // bytes of a block

struct tile_block {
    int8_t  codes[COLS][32];
    float   scales[COLS];
    int32_t words[2][COLS];
};

static_assert(sizeof(tile_block) == TILE, "a tile has no padding");

template <bool HALVES, bool MINS, int BIAS> static void pack(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    tile_block * out = (tile_block *) tile;
    for (int b = 0; b < n_blocks; b++, out++) {
        for (int c = 0; c < n; c++) {
            const quantised q = quantise(cols[c] + 32 * b, out->codes[c]);
            out->scales[c] = q.scale;
            for (int h = 0; h < (HALVES ? 2 : 1); h++) {
                const int32_t sum = HALVES ? q.sums[h] : q.sums[0] + q.sums[1];
                if (MINS) {
                    const float f = q.scale * (float) sum;
                    memcpy(&out->words[h][c], &f, 4);
                } else {
                    out->words[h][c] = -BIAS * sum;
                }
            }
        }
    }
}

// Sums of 32 rows and N columns over n blocks.
template <bool HALVES, bool MINS, int N> struct sums_of {
    __m512 f[N][2];

    void add(const uint8_t * panel, const tile_block * tile, int n) {
        constexpr int parts = HALVES ? 2 : 1, groups = 8 / parts;
        for (int b = 0; b < n; b++, tile++, panel += panel_block({ 0, MINS, HALVES })) {
            const float * sets = (const float *) (panel + PANEL_CODES);
            FAST_UNROLL
            for (int h = 0; h < parts; h++) {
                __m512i acc[N][2];
                FAST_UNROLL
                for (int c = 0; c < N; c++) {
                    acc[c][0] = acc[c][1] = MINS ? _mm512_setzero_si512() : _mm512_set1_epi32(tile->words[h][c]);
                }
                FAST_UNROLL
                for (int g = h * groups; g < (h + 1) * groups; g++) {
                    const __m512i w0 = _mm512_load_si512(panel + g * PANEL_ROWS * 4);
                    const __m512i w1 = _mm512_load_si512(panel + g * PANEL_ROWS * 4 + 64);
                    FAST_UNROLL
                    for (int c = 0; c < N; c++) {
                        int32_t four;
                        memcpy(&four, tile->codes[c] + 4 * g, 4);
                        acc[c][0] = _mm512_dpbusd_epi32(acc[c][0], w0, _mm512_set1_epi32(four));
                        acc[c][1] = _mm512_dpbusd_epi32(acc[c][1], w1, _mm512_set1_epi32(four));
                    }
                }
                FAST_UNROLL
                for (int r = 0; r < 2; r++) {
                    const __m512 scale = _mm512_load_ps(sets + h * PANEL_ROWS + r * 16);
                    FAST_UNROLL
                    for (int c = 0; c < N; c++) {
                        const __m512 s = _mm512_mul_ps(scale, _mm512_set1_ps(tile->scales[c]));
                        f[c][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[c][r]), s, f[c][r]);
                    }
                    if (MINS) {
                        const __m512 min = _mm512_load_ps(sets + (parts + h) * PANEL_ROWS + r * 16);
                        FAST_UNROLL
                        for (int c = 0; c < N; c++) {
                            float sum;
                            memcpy(&sum, &tile->words[h][c], 4);
                            f[c][r] = _mm512_fmadd_ps(min, _mm512_set1_ps(sum), f[c][r]);
                        }
                    }
                }
            }
        }
    }
};

// Multiply 32 rows with N columns. Sums over earlier blocks are in the result and are added to.
template <bool HALVES, bool MINS, int N>
static void multiply_tile(const uint8_t * panel, const uint8_t * tile, int n, bool first, const gemm_share & s, int col,
        const __mmask16 rows[2]) {
    sums_of<HALVES, MINS, N> sums;
    FAST_UNROLL
    for (int c = 0; c < N; c++) {
        sums.f[c][0] = sums.f[c][1] = _mm512_setzero_ps();
    }
    sums.add(panel, (const tile_block *) tile, n);
    FAST_UNROLL
    for (int c = 0; c < N; c++) {
        FAST_UNROLL
        for (int r = 0; r < 2; r++) {
            float * o = s.out[col + c] + s.row + 16 * r;
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(rows[r], o);
            _mm512_mask_storeu_ps(o, rows[r], _mm512_add_ps(sums.f[c][r], before));
        }
    }
}

using tile_function = void (*)(const uint8_t *, const uint8_t *, int, bool, const gemm_share &, int, const __mmask16[2]);

template <int TYPE> static void multiply(const gemm_share & s) {
    constexpr format f = type_of<TYPE>::fmt;
    static const tile_function tiles[COLS] = {
        multiply_tile<f.halves, f.mins, 1>, multiply_tile<f.halves, f.mins, 2>, multiply_tile<f.halves, f.mins, 3>,
        multiply_tile<f.halves, f.mins, 4>, multiply_tile<f.halves, f.mins, 5>, multiply_tile<f.halves, f.mins, 6>,
    };
    const __mmask16 rows[2] = {
        (__mmask16) (s.n_rows >= 16 ? 0xffff : (1 << s.n_rows) - 1),
        (__mmask16) (s.n_rows >= 32 ? 0xffff : s.n_rows > 16 ? (1 << (s.n_rows - 16)) - 1 : 0),
    };
    for (int b = 0; b < s.n_blocks; b += STEP_BLOCKS) {
        const int n = std::min(STEP_BLOCKS, s.n_blocks - b);
        unpack<TYPE>(s.weights, s.stride, s.n_rows, b, n, s.scratch);
        for (int c = 0; c < s.n_cols; c += COLS) {
            const uint8_t * tile = s.tiles + c / COLS * s.tile_stride + (size_t) b * TILE;
            tiles[std::min(COLS, s.n_cols - c) - 1](s.scratch, tile, n, b == 0, s, c, rows);
        }
    }
}

template <int TYPE> static const gemm * kernel() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t scratch = (size_t) STEP_BLOCKS * panel_block(f);
    static const gemm g = { PANEL_ROWS, COLS, MIN_COLS, TILE, scratch, pack<f.halves, f.mins, f.bias>, multiply<TYPE> };
    return &g;
}

const gemm * gemm_512(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return kernel<TYPE>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
#undef FAST_CASE
    }
    return nullptr;
}

} // namespace fast

#else

const fast::gemm * fast::gemm_512(int) {
    return nullptr;
}

#endif
