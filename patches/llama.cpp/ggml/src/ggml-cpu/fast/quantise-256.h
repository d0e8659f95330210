// Quantization of activations to 8 bits with one scale per 32 values, by AVX2.

#pragma once

#include "types.h"

#include <immintrin.h>

#include <cstdint>

namespace fast {
namespace {

inline float max_of(__m256i x) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}

// Round 32 values to 16-bit integers, the first 16 in q[0], and return their scale.
inline float quantise_to_16_bits(const float * x, __m256i (&q)[2]) {
    const __m256i sign = _mm256_set1_epi32(0x7fffffff);
    __m256  v[4];
    __m256i m = _mm256_setzero_si256(); // magnitudes compared as integers: NaN is the largest, so it survives
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_loadu_ps(x + 8 * i);
        m    = _mm256_max_epi32(m, _mm256_and_si256(_mm256_castps_si256(v[i]), sign));
    }
    const float  max   = max_of(m);
    const __m256 scale = _mm256_set1_ps(max > 1e-30f ? 127.0f / max : 0.0f);
    __m256i n[4];
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], scale));
    }
    q[0] = _mm256_permute4x64_epi64(_mm256_packs_epi32(n[0], n[1]), 0xd8);
    q[1] = _mm256_permute4x64_epi64(_mm256_packs_epi32(n[2], n[3]), 0xd8);
    return max / 127.0f;
}

inline __m256i bytes_of(const __m256i (&q)[2]) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(q[0], q[1]), 0xd8);
}

// Sum the first 16 bytes and the last 16. Each sum has two parts: even pairs in the low 16 bits, odd pairs in the high 16 bits.
inline void pair_sums(__m256i bytes, int (&sums)[2]) {
    __m256i s = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
    s = _mm256_add_epi16(s, _mm256_shuffle_epi32(s, 0x4e));
    s = _mm256_add_epi16(s, _mm256_shuffle_epi32(s, 0xb1));
    sums[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(s));
    sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(s, 1));
}

inline int low_half(int x)  { return (int16_t) x; }
inline int high_half(int x) { return (int16_t) ((unsigned) x >> 16); }

// Quantize 32 values and write their codes.
inline quantised quantise(const float * x, int8_t * codes) {
    __m256i q[2];
    quantised r = { quantise_to_16_bits(x, q), {} };
    const __m256i bytes = bytes_of(q);
    _mm256_storeu_si256((__m256i *) codes, bytes);
    pair_sums(bytes, r.sums);
    r.sums[0] = low_half(r.sums[0]) + high_half(r.sums[0]);
    r.sums[1] = low_half(r.sums[1]) + high_half(r.sums[1]);
    return r;
}

} // namespace
} // namespace fast
