#pragma once

#include <immintrin.h>

namespace fast {

static inline __m256 max_of_pair(__m256 a, __m256 b) {
    return _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
}

static inline __m256 max_of_quad(__m256 a, __m256 b) {
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_max_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}

// Return the maximum of each of 8 vectors.
static inline __m256 max_of_8(const __m256 v[8]) {
    const __m256 a = max_of_quad(max_of_pair(v[0], v[1]), max_of_pair(v[2], v[3]));
    const __m256 b = max_of_quad(max_of_pair(v[4], v[5]), max_of_pair(v[6], v[7]));
    return _mm256_max_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

} // namespace fast
