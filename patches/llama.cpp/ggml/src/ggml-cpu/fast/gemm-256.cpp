// Products with 256-bit vectors: AVX-VNNI if available, else AVX2.
//
// Activations are rounded to 8 bits with one scale per 32 values along K. One block of a column tile, in 4-byte words:
//
//   codes   [c0: k0-k3 ][c1: k0-k3 ][c2: k0-k3 ]   STEPS of 4 codes (i8), or of 2 codes (i16) if WIDE
//           [c0: k4-k7 ][c1: k4-k7 ][c2: k4-k7 ]
//           ...
//   SCALE   [c0][c1][c2]                           f32
//   START   [c0][c1][c2]  per half                 start of the integer sums, if codes have a SHIFT
//   SUM     [c0][c1][c2]  per half                 f32 scale * sum of the codes, if the type has mins
//
// The panel's layout is in unpack-256.h. A register tile is 16 rows (2 vectors) x 3 columns. A row's float sums follow K in the same order
// for any number of columns.

#include "gemm.h"

#include "ggml-cpu-impl.h" // defines __FMA__ and __F16C__, which MSVC does not

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "quantise-256.h"
#include "unpack-256.h"

namespace fast {
namespace {

// 2 vectors x 3 columns: 6 float sums and 6 integer sums, which leaves 4 of 16 registers for codes, scales and a column.
constexpr int COLS = 3;

// Blocks of a panel that are unpacked at once: up to 20 KiB (40 KiB with WIDE), so that a panel mostly stays in the L1 cache.
constexpr int STEP_BLOCKS = 32;

// With fewer columns, gemv-256.cpp is faster (docs/notebook/kernels-experts-and-decoding.md, "Which kernel").
constexpr int MIN_COLS = 5;

// The bits of the float 1.5 * 2^23. Adding an integer below 2^22 to the bits adds it to the float, which saves a conversion.
constexpr int MAGIC = 0x4b400000;

// Offsets of the parts of a tile's block, in 4-byte words.
template <typename P> struct tile_of {
    static constexpr int SCALE  = P::STEPS * COLS;
    static constexpr int START  = SCALE + COLS;
    static constexpr int SUM    = START + (P::SHIFT ? P::HALVES * COLS : 0);
    static constexpr int LENGTH = SUM + (P::MINS ? P::HALVES * COLS : 0);
};

inline int join_halves(int low, int high) {
    return (int) ((unsigned) low & 0xffff) | (int) ((unsigned) high << 16);
}

// Return the start of an integer sum, -SHIFT * sum of the codes: with VNNI 32 bits plus MAGIC, else a pair of 16 bits.
template <typename P> int start_of(int sums) {
    const int low = -P::SHIFT * low_half(sums), high = -P::SHIFT * high_half(sums);
    return VNNI ? MAGIC + low + high : join_halves(low, high);
}

template <typename P> void pack_32(const float * x, int32_t * out) {
    using T = tile_of<P>;
    __m256i q[2];
    const float   scale = quantise_to_16_bits(x, q);
    const __m256i bytes = bytes_of(q);

    alignas(32) int32_t words[P::STEPS];
    if constexpr (P::WIDE) {
        _mm256_store_si256((__m256i *) words, q[0]);
        _mm256_store_si256((__m256i *) words + 1, q[1]);
    } else {
        _mm256_store_si256((__m256i *) words, bytes);
    }
    FAST_UNROLL
    for (int i = 0; i < P::STEPS; i++) {
        out[i * COLS] = words[i];
    }
    memcpy(out + T::SCALE, &scale, sizeof(scale));

    if (P::SHIFT || P::MINS) {
        int sums[2];
        pair_sums(bytes, sums);
        if (P::HALVES == 1) { // the sums stay within 16 bits
            sums[0] = join_halves(low_half(sums[0]) + low_half(sums[1]), high_half(sums[0]) + high_half(sums[1]));
        }
        for (int half = 0; half < P::HALVES; half++) {
            if (P::SHIFT) {
                out[T::START + half * COLS] = start_of<P>(sums[half]);
            }
            if (P::MINS) {
                const float sum = scale * (float) (low_half(sums[half]) + high_half(sums[half]));
                memcpy(out + T::SUM + half * COLS, &sum, sizeof(sum));
            }
        }
    }
}

template <typename P> void pack(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    for (int c = 0; c < n; c++) {
        int32_t * out = (int32_t *) tile + c;
        for (int b = 0; b < n_blocks; b++, out += tile_of<P>::LENGTH) {
            pack_32<P>(cols[c] + 32 * b, out);
        }
    }
}

// Fix the order of additions: compilers choose one that needs more than 16 registers.
[[maybe_unused]] inline __m256i in_order(__m256i x) {
#if defined(__GNUC__)
    __asm__("" : "+x"(x));
#endif
    return x;
}

template <typename P> FAST_INLINE __m256i add_dots(__m256i sum, __m256i codes, __m256i col) {
    if constexpr (P::WIDE) {
        return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(codes, col)));
    } else {
#if defined(__AVXVNNI__)
        return _mm256_dpbusd_avx_epi32(sum, codes, col);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
        return _mm256_dpbusd_epi32(sum, codes, col);
#else
        return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, col)));
#endif
    }
}

// Compute the integer dot products of half a block or a whole one, as floats.
template <typename P, int C>
FAST_INLINE void dots(const uint8_t * panel, const int32_t * tile, int half, __m256 (&out)[C][VECTORS]) {
    constexpr int n = P::STEPS / P::HALVES;
    const int32_t * start = tile + tile_of<P>::START + half * COLS;
    __m256i sum[C][VECTORS];

    FAST_UNROLL
    for (int c = 0; c < C; c++) {
        FAST_UNROLL
        for (int r = 0; r < VECTORS; r++) {
            sum[c][r] = _mm256_set1_epi32(P::SHIFT ? start[c] : VNNI ? MAGIC : 0);
        }
    }
    FAST_UNROLL
    for (int k = half * n; k < (half + 1) * n; k++) {
        __m256i codes[VECTORS];
        FAST_UNROLL
        for (int r = 0; r < VECTORS; r++) {
            codes[r] = _mm256_load_si256((const __m256i *) panel + k * VECTORS + r);
        }
        FAST_UNROLL
        for (int c = 0; c < C; c++) {
            const __m256i col = _mm256_set1_epi32(tile[k * COLS + c]);
            FAST_UNROLL
            for (int r = 0; r < VECTORS; r++) {
                sum[c][r] = add_dots<P>(sum[c][r], codes[r], col);
            }
        }
    }
    FAST_UNROLL
    for (int c = 0; c < C; c++) {
        FAST_UNROLL
        for (int r = 0; r < VECTORS; r++) {
            if (VNNI) {
                out[c][r] = _mm256_sub_ps(_mm256_castsi256_ps(sum[c][r]), _mm256_castsi256_ps(_mm256_set1_epi32(MAGIC)));
            } else {
                out[c][r] = _mm256_cvtepi32_ps(P::WIDE ? sum[c][r] : _mm256_madd_epi16(sum[c][r], _mm256_set1_epi16(1)));
            }
        }
    }
}

// Multiply C columns of a tile with a panel. Sums over earlier blocks are in the result and are added to.
template <typename P, int C>
void multiply_tile(const uint8_t * panel, const int32_t * tile, int n_blocks, bool first, float * const * to) {
    __m256 total[C][VECTORS];
    FAST_UNROLL
    for (int c = 0; c < C; c++) {
        FAST_UNROLL
        for (int r = 0; r < VECTORS; r++) {
            total[c][r] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(to[c] + 8 * r);
        }
    }
    for (int b = 0; b < n_blocks; b++, panel += P::BYTES, tile += tile_of<P>::LENGTH) {
        const float * values = (const float *) tile;
        FAST_UNROLL
        for (int half = 0; half < P::HALVES; half++) {
            const float * scales = (const float *) (panel + P::CODES) + half * ROWS;
            const float * mins   = scales + P::HALVES * ROWS;
            __m256 sum[C][VECTORS];
            dots<P, C>(panel, tile, half, sum);
            FAST_UNROLL
            for (int c = 0; c < C; c++) {
                const __m256 scale = _mm256_broadcast_ss(values + tile_of<P>::SCALE + c);
                FAST_UNROLL
                for (int r = 0; r < VECTORS; r++) {
                    const __m256 both = _mm256_mul_ps(scale, _mm256_load_ps(scales + 8 * r));
                    total[c][r] = _mm256_fmadd_ps(sum[c][r], both, total[c][r]);
                }
                if (P::MINS) {
                    const __m256 s = _mm256_broadcast_ss(values + tile_of<P>::SUM + half * COLS + c);
                    FAST_UNROLL
                    for (int r = 0; r < VECTORS; r++) {
                        total[c][r] = _mm256_fmadd_ps(s, _mm256_load_ps(mins + 8 * r), total[c][r]);
                    }
                }
            }
        }
    }
    FAST_UNROLL
    for (int c = 0; c < C; c++) {
        FAST_UNROLL
        for (int r = 0; r < VECTORS; r++) {
            _mm256_storeu_ps(to[c] + 8 * r, total[c][r]);
        }
    }
}

template <typename P>
void multiply_cols(const uint8_t * panel, const int32_t * tile, int n_blocks, bool first, int n_cols, float * const * to) {
    switch (n_cols) {
        case 1:  multiply_tile<P, 1>(panel, tile, n_blocks, first, to); break;
        case 2:  multiply_tile<P, 2>(panel, tile, n_blocks, first, to); break;
        default: multiply_tile<P, 3>(panel, tile, n_blocks, first, to);
    }
}

// The same for a panel of fewer than 16 rows.
template <typename P>
void multiply_few_rows(const uint8_t * panel, const int32_t * tile, int n_blocks, bool first, int n_cols, float * const * to,
                       int n_rows) {
    float   rows[COLS][ROWS] = {};
    float * cols[COLS]       = { rows[0], rows[1], rows[2] };
    for (int c = 0; c < n_cols && !first; c++) {
        std::copy_n(to[c], n_rows, rows[c]);
    }
    multiply_cols<P>(panel, tile, n_blocks, first, n_cols, cols);
    for (int c = 0; c < n_cols; c++) {
        std::copy_n(rows[c], n_rows, to[c]);
    }
}

template <int TYPE> void multiply(const gemm_share & s) {
    using P = panel_for<TYPE>;
    constexpr int length = tile_of<P>::LENGTH;

    for (int b = 0; b < s.n_blocks; b += STEP_BLOCKS) {
        const int n = std::min(STEP_BLOCKS, s.n_blocks - b);
        unpack<TYPE, P>(s.weights, s.stride, s.n_rows, b, n, s.scratch);

        const int32_t * tile = (const int32_t *) s.tiles + (size_t) b * length;
        for (int c = 0; c < s.n_cols; c += COLS, tile += s.tile_stride / sizeof(int32_t)) {
            const int n_cols = std::min(COLS, s.n_cols - c);
            float * to[COLS];
            for (int i = 0; i < n_cols; i++) {
                to[i] = s.out[c + i] + s.row;
            }
            if (s.n_rows == ROWS) {
                multiply_cols<P>(s.scratch, tile, n, b == 0, n_cols, to);
            } else {
                multiply_few_rows<P>(s.scratch, tile, n, b == 0, n_cols, to, s.n_rows);
            }
        }
    }
}

template <int TYPE> const gemm * kernels_of() {
    using P = panel_for<TYPE>;
    static constexpr gemm kernels = {
        ROWS, COLS, MIN_COLS, tile_of<P>::LENGTH * sizeof(int32_t), (size_t) STEP_BLOCKS * P::BYTES, pack<P>, multiply<TYPE>,
    };
    return &kernels;
}

} // namespace

const gemm * gemm_256(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return kernels_of<TYPE>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
#undef FAST_CASE
        default: return nullptr;
    }
}

} // namespace fast

#else

const fast::gemm * fast::gemm_256(int) {
    return nullptr;
}

#endif
