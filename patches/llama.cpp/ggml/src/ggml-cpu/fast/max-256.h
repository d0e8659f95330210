#pragma once

#include <immintrin.h>

namespace fast {

using max_function = __m256 (*)(__m256, __m256);

static inline __m256 max_number(__m256 a, __m256 b) {
    return _mm256_max_ps(a, b);
}

// Return the larger of two values that are not negative. Compared as integers, NaN is the largest, so it survives.
static inline __m256 max_magnitude(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

template <max_function MAX> static inline __m256 max_of_pair(__m256 a, __m256 b) {
    return MAX(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}

template <max_function MAX> static inline __m256 max_of_quad(__m256 a, __m256 b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return MAX(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}

// Return the maximum of each of 8 vectors.
template <max_function MAX> static inline __m256 max_of_8(const __m256 v[8]) {
    const __m256 a = max_of_quad<MAX>(max_of_pair<MAX>(v[0], v[1]), max_of_pair<MAX>(v[2], v[3]));
    const __m256 b = max_of_quad<MAX>(max_of_pair<MAX>(v[4], v[5]), max_of_pair<MAX>(v[6], v[7]));
    return MAX(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

} // namespace fast
