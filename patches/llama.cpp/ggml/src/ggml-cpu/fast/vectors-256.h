// Vectors of AVX2 and AVX-VNNI for attention and row operations.

#pragma once

#include "attention-tile.h"
#include "max-256.h"
#include "types.h"

#include <immintrin.h>
#include <math.h>

namespace fast {

using floats = __m256;
using ints   = __m256i;

constexpr int LANES   = 8;
constexpr int COLUMNS = 2; // vectors of a register tile next to its six rows: 12 sums in 16 registers

// The operand type of the builtin: with __m256i, GCC copies each sum before the addition.
#if defined(__GNUC__)
typedef int sums __attribute__((vector_size(32), may_alias));
#else
using sums = __m256i;
#endif

static inline sums dot(sums s, ints a, ints b) {
#if defined(__AVXVNNI__)
    return (sums) _mm256_dpwssd_avx_epi32((ints) s, a, b);
#else
    return (sums) _mm256_add_epi32((ints) s, _mm256_madd_epi16(a, b));
#endif
}

static inline sums   zero_sums() { return (sums) _mm256_setzero_si256(); }
static inline floats to_floats(sums s) { return _mm256_cvtepi32_ps((ints) s); }

static inline floats load(const float * p) { return _mm256_loadu_ps(p); }
static inline ints   load(const int16_t * p) { return _mm256_load_si256((const __m256i *) p); }
static inline void   store(float * p, floats x) { _mm256_storeu_ps(p, x); }
static inline void   store(int16_t * p, ints x) { _mm256_store_si256((__m256i *) p, x); }
static inline floats splat(float x) { return _mm256_set1_ps(x); }
static inline ints   splat(int32_t x) { return _mm256_set1_epi32(x); }

static inline floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
static inline floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
static inline floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
static inline floats div(floats a, floats b) { return _mm256_div_ps(a, b); }
static inline floats max(floats a, floats b) { return _mm256_max_ps(a, b); }
static inline floats min(floats a, floats b) { return _mm256_min_ps(a, b); }
static inline floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline floats abs(floats a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

static inline float max_of(floats a) {
    const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), y = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

static inline float sum_of(floats a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

static inline ints   round(floats x) { return _mm256_cvtps_epi32(x); }
static inline floats bits_as_number(floats x) { return _mm256_cvtepi32_ps(_mm256_castps_si256(x)); }
static inline floats low_bits_as_exponent(floats x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }

// Narrow 32-bit integers to 16 bits. Each 128-bit lane holds four of a, then four of b.
static inline ints narrow(ints a, ints b) { return _mm256_packs_epi32(a, b); }
// Interleave the low 16 bits of a and of b.
static inline ints interleave(ints a, ints b) { return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa); }

// Return x, or -infinity where the mask is -infinity, even if x is NaN.
static inline floats hide(floats x, floats mask) {
    const floats hidden = _mm256_set1_ps(-INFINITY);
    return _mm256_blendv_ps(x, hidden, _mm256_cmp_ps(mask, hidden, _CMP_EQ_OQ));
}

static inline floats load_halves(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }

// Load 8 values of a row from dim d on.
template <ggml_type TYPE> static inline floats load_row(const char * row, int d) {
    if constexpr (TYPE == GGML_TYPE_F32) {
        return _mm256_loadu_ps((const float *) row + d);
    } else if constexpr (TYPE == GGML_TYPE_F16) {
        return load_halves((const uint16_t *) row + d);
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        const __m128i x = _mm_loadu_si128((const __m128i *) ((const uint16_t *) row + d));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    } else {
        const block_q8_0 & b = ((const block_q8_0 *) row)[d / QK8_0];
        const __m128i      x = _mm_loadl_epi64((const __m128i *) (b.qs + d % QK8_0));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)), _mm256_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(b.d)))));
    }
}

// Transpose 8 vectors of 8 dwords.
static inline void transpose(ints v[8]) {
    ints t[8], u[8];
    FAST_UNROLL
    for (int i = 0; i < 8; i += 2) {
        t[i]     = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    FAST_UNROLL
    for (int i = 0; i < 8; i += 4) {
        u[i]     = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    FAST_UNROLL
    for (int j = 0; j < 4; j++) {
        v[j]     = _mm256_permute2x128_si256(u[j], u[4 + j], 0x20);
        v[4 + j] = _mm256_permute2x128_si256(u[j], u[4 + j], 0x31);
    }
}

// Return the maximum of each of LANES vectors of magnitudes. NaN is the largest.
static inline floats max_of_each(const floats v[LANES]) {
    return max_of_8<max_magnitude>(v);
}

// Return the maxima of six vectors in the first six lanes. The other lanes repeat some of them.
static inline floats max_of_rows(const floats v[TILE_ROWS]) {
    const floats h[8] = { v[0], v[1], v[2], v[3], v[4], v[5], v[4], v[5] };
    return max_of_8<max_number>(h);
}

// Classify the mask of 64 cells.
static inline mask_state state_of_mask(const uint16_t * mask) {
    const ints masked = _mm256_set1_epi16((short) 0xfc00);
    ints       any = _mm256_setzero_si256(), all = _mm256_set1_epi16(-1);
    FAST_UNROLL
    for (int i = 0; i < TILE_CELLS; i += 16) {
        const ints x = _mm256_loadu_si256((const __m256i *) (mask + i));
        any          = _mm256_or_si256(any, x);
        all          = _mm256_and_si256(all, _mm256_cmpeq_epi16(x, masked));
    }
    return _mm256_testz_si256(any, any) ? MASK_NONE : _mm256_movemask_epi8(all) == -1 ? MASK_ALL : MASK_SOME;
}

} // namespace fast
