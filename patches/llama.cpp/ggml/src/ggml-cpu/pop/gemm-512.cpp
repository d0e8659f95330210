// Products by AVX-512 VNNI: exact codes of the weights times activations of eight bits with a scale for each 32.

#include "gemm.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "quantise-512.h"
#include "unpack-512.h"

namespace pop {

constexpr int COLS = 6;  // with two vectors of rows: 12 sums in registers, 12 of integers
constexpr int STEP = 32; // blocks that are unpacked at once

// a tile's block: codes i8 [COLS][32], then f32 scales [COLS], then two rows of words as pack() says
constexpr int TILE = COLS * (32 + 3 * 4);

struct tile_block {
    int8_t  codes[COLS][32];
    float   scales[COLS];
    int32_t words[2][COLS];
};

static_assert(sizeof(tile_block) == TILE, "a tile is packed without gaps");

// the words: with mins, what they are multiplied with: scale * sum; else where the sums of products begin: -bias * sum.
// of both halves, or the first alone is of all 32
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

// sums of 32 rows and N columns over n blocks
template <bool HALVES, bool MINS, int N> struct sums_of {
    __m512 f[N][2];

    void add(const uint8_t * panel, const tile_block * tile, int n) {
        constexpr int parts = HALVES ? 2 : 1, groups = 8 / parts;
        for (int b = 0; b < n; b++, tile++, panel += panel_block({ 0, MINS, HALVES })) {
            const float * sets = (const float *) (panel + PANEL_CODES);
            POP_UNROLL
            for (int h = 0; h < parts; h++) {
                __m512i acc[N][2];
                POP_UNROLL
                for (int c = 0; c < N; c++) {
                    acc[c][0] = acc[c][1] = MINS ? _mm512_setzero_si512() : _mm512_set1_epi32(tile->words[h][c]);
                }
                POP_UNROLL
                for (int g = h * groups; g < (h + 1) * groups; g++) {
                    const __m512i w0 = _mm512_load_si512(panel + g * PANEL_ROWS * 4);
                    const __m512i w1 = _mm512_load_si512(panel + g * PANEL_ROWS * 4 + 64);
                    POP_UNROLL
                    for (int c = 0; c < N; c++) {
                        int32_t four;
                        memcpy(&four, tile->codes[c] + 4 * g, 4);
                        acc[c][0] = _mm512_dpbusd_epi32(acc[c][0], w0, _mm512_set1_epi32(four));
                        acc[c][1] = _mm512_dpbusd_epi32(acc[c][1], w1, _mm512_set1_epi32(four));
                    }
                }
                POP_UNROLL
                for (int r = 0; r < 2; r++) {
                    const __m512 scale = _mm512_load_ps(sets + h * PANEL_ROWS + r * 16);
                    POP_UNROLL
                    for (int c = 0; c < N; c++) {
                        const __m512 s = _mm512_mul_ps(scale, _mm512_set1_ps(tile->scales[c]));
                        f[c][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[c][r]), s, f[c][r]);
                    }
                    if (MINS) {
                        const __m512 min = _mm512_load_ps(sets + (parts + h) * PANEL_ROWS + r * 16);
                        POP_UNROLL
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

// 32 rows times N columns; the sums over earlier blocks are where the result goes
template <bool HALVES, bool MINS, int N>
static void multiply_tile(const uint8_t * panel, const uint8_t * tile, int n, bool first, const gemm_share & s, int col,
        const __mmask16 rows[2]) {
    sums_of<HALVES, MINS, N> sums;
    POP_UNROLL
    for (int c = 0; c < N; c++) {
        sums.f[c][0] = sums.f[c][1] = _mm512_setzero_ps();
    }
    sums.add(panel, (const tile_block *) tile, n);
    POP_UNROLL
    for (int c = 0; c < N; c++) {
        POP_UNROLL
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
    for (int b = 0; b < s.n_blocks; b += STEP) {
        const int n = std::min(STEP, s.n_blocks - b);
        unpack<TYPE>(s.weights, s.stride, s.n_rows, b, n, s.scratch);
        for (int c = 0; c < s.n_cols; c += COLS) {
            const uint8_t * tile = s.tiles + c / COLS * s.tile + (size_t) b * TILE;
            tiles[std::min(COLS, s.n_cols - c) - 1](s.scratch, tile, n, b == 0, s, c, rows);
        }
    }
}

template <int TYPE> static const gemm * kernel() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t scratch = (size_t) STEP * panel_block(f);
    static const gemm g = { PANEL_ROWS, COLS, 6, TILE, scratch, pack<f.halves, f.mins, f.bias>, multiply<TYPE> };
    return &g;
}

const gemm * gemm_512(int type) {
    switch (type) {
#define POP_CASE(TYPE) case TYPE: return kernel<TYPE>();
        POP_EACH_TYPE(POP_CASE)
#undef POP_CASE
    }
    return nullptr;
}

} // namespace pop

#else

const pop::gemm * pop::gemm_512(int) {
    return nullptr;
}

#endif
