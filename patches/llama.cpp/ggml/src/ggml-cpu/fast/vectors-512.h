// Vectors of AVX-512 for attention and row operations.

#pragma once

#include "attention-tile.h"
#include "max-256.h"
#include "transpose-512.h"
#include "types.h"

#include <immintrin.h>
#include <math.h>

namespace fast {

using floats = __m512;
using ints   = __m512i;

constexpr int LANES   = 16;
constexpr int COLUMNS = 4; // vectors of a register tile next to its six rows: 24 sums in 32 registers

// The operand type of the builtin: with __m512i, GCC copies each sum before the addition.
#if defined(__GNUC__)
typedef int sums __attribute__((vector_size(64), may_alias));
#else
using sums = __m512i;
#endif

static inline sums dot(sums s, ints a, ints b) {
#if defined(__AVX512VNNI__)
    return (sums) _mm512_dpwssd_epi32((ints) s, a, b);
#else
    return (sums) _mm512_add_epi32((ints) s, _mm512_madd_epi16(a, b));
#endif
}

static inline sums   zero_sums() { return (sums) _mm512_setzero_si512(); }
static inline floats to_floats(sums s) { return _mm512_cvtepi32_ps((ints) s); }

static inline floats load(const float * p) { return _mm512_loadu_ps(p); }
static inline ints   load(const int16_t * p) { return _mm512_load_si512(p); }
static inline void   store(float * p, floats x) { _mm512_storeu_ps(p, x); }
static inline void   store(int16_t * p, ints x) { _mm512_store_si512(p, x); }
static inline floats splat(float x) { return _mm512_set1_ps(x); }
static inline ints   splat(int32_t x) { return _mm512_set1_epi32(x); }

static inline floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
static inline floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
static inline floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
static inline floats div(floats a, floats b) { return _mm512_div_ps(a, b); }
static inline floats max(floats a, floats b) { return _mm512_max_ps(a, b); }
static inline floats min(floats a, floats b) { return _mm512_min_ps(a, b); }
static inline floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline floats abs(floats a) { return _mm512_abs_ps(a); }
static inline float  max_of(floats a) { return _mm512_reduce_max_ps(a); }
static inline float  sum_of(floats a) { return _mm512_reduce_add_ps(a); }

static inline ints   round(floats x) { return _mm512_cvtps_epi32(x); }
static inline floats bits_as_number(floats x) { return _mm512_cvtepi32_ps(_mm512_castps_si512(x)); }
static inline floats low_bits_as_exponent(floats x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }

// Narrow 32-bit integers to 16 bits. Each 128-bit lane holds four of a, then four of b.
static inline ints narrow(ints a, ints b) { return _mm512_packs_epi32(a, b); }
// Interleave the low 16 bits of a and of b.
static inline ints interleave(ints a, ints b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)); }

// Return x, or -infinity where the mask is -infinity, even if x is NaN.
static inline floats hide(floats x, floats mask) {
    const floats hidden = _mm512_set1_ps(-INFINITY);
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(mask, hidden, _CMP_EQ_OQ), hidden);
}

static inline floats load_halves(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }

// Load 16 values of a row from dim d on.
template <ggml_type TYPE> static inline floats load_row(const char * row, int d) {
    if constexpr (TYPE == GGML_TYPE_F32) {
        return _mm512_loadu_ps((const float *) row + d);
    } else if constexpr (TYPE == GGML_TYPE_F16) {
        return load_halves((const uint16_t *) row + d);
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        const __m256i x = _mm256_loadu_si256((const __m256i *) ((const uint16_t *) row + d));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    } else {
        const block_q8_0 & b = ((const block_q8_0 *) row)[d / QK8_0];
        const __m128i      x = _mm_loadu_si128((const __m128i *) (b.qs + d % QK8_0));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)), _mm512_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(b.d)))));
    }
}

static inline void transpose(ints v[16]) { transpose_16(v); }

static inline floats max_magnitude(floats a, floats b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}

template <max_function MAX> static inline __m256 max_of_halves(floats x) {
    return MAX(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

// Return the maximum of each of LANES vectors of magnitudes. NaN is the largest.
static inline floats max_of_each(const floats v[LANES]) {
    __m256 h[LANES];
    FAST_UNROLL
    for (int i = 0; i < LANES; i++) {
        h[i] = max_of_halves<max_magnitude>(v[i]);
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(max_of_8<max_magnitude>(h)), max_of_8<max_magnitude>(h + 8), 1);
}

// Return the maxima of six vectors in the first six lanes. The other lanes repeat some of them.
static inline floats max_of_rows(const floats v[TILE_ROWS]) {
    __m256 h[8];
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        h[i] = max_of_halves<max_number>(v[i < TILE_ROWS ? i : i - 2]);
    }
    return _mm512_castps256_ps512(max_of_8<max_number>(h));
}

// Classify the mask of 64 cells.
static inline mask_state state_of_mask(const uint16_t * mask) {
    const ints a = _mm512_loadu_si512(mask), b = _mm512_loadu_si512(mask + 32), any = _mm512_or_si512(a, b);
    const ints masked = _mm512_set1_epi16((short) 0xfc00);
    const uint32_t seen_a = _mm512_cmpneq_epi16_mask(a, masked), seen_b = _mm512_cmpneq_epi16_mask(b, masked);
    return _mm512_test_epi16_mask(any, any) == 0 ? MASK_NONE : (seen_a | seen_b) == 0 ? MASK_ALL : MASK_SOME;
}

} // namespace fast
