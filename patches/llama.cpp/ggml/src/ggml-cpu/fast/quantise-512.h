// Quantization of activations to 8 bits with one scale per 32 values, by AVX-512.

#pragma once

#include "types.h"

#include <immintrin.h>

namespace fast {

// Return the largest magnitude of 32 values. Compared as integers, NaN is the largest, so it survives.
static inline float max_abs(__m512 x0, __m512 x1) {
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    const __m512i a = _mm512_and_si512(_mm512_castps_si512(x0), sign), b = _mm512_and_si512(_mm512_castps_si512(x1), sign);
    const __m512i x = _mm512_max_epi32(a, b);
    const __m256i y = _mm256_max_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i z = _mm_max_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    z = _mm_max_epi32(z, _mm_shuffle_epi32(z, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(z, _mm_shuffle_epi32(z, 0xb1))));
}

// Quantize 32 values and write their codes.
static inline quantised quantise(const float * x, int8_t * codes) {
    const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
    const float max = max_abs(x0, x1);
    const __m512 inverse = _mm512_set1_ps(max > 1e-30f ? 127.0f / max : 0.0f);
    const __m128i q0 = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse)));
    const __m128i q1 = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse)));
    _mm_storeu_si128((__m128i *) codes, q0);
    _mm_storeu_si128((__m128i *) (codes + 16), q1);

    const __m128i one = _mm_set1_epi8(1), zero = _mm_setzero_si128();
    __m128i sums = _mm_hadd_epi32(_mm_dpbusd_epi32(zero, one, q0), _mm_dpbusd_epi32(zero, one, q1));
    sums = _mm_hadd_epi32(sums, sums);
    return { max / 127.0f, { _mm_cvtsi128_si32(sums), _mm_extract_epi32(sums, 1) } };
}

} // namespace fast
