#pragma once

#include "types.h"

#include <immintrin.h>

namespace fast {

// Transpose 16 vectors of 16 dwords: dword j of vector i becomes dword i of vector j.
static inline void transpose_16(__m512i v[16]) {
    __m512i t[16];
    FAST_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    FAST_UNROLL
    for (int i = 0; i < 16; i += 4) {
        FAST_UNROLL
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j]     = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    // v[4 i + j] holds in 128-bit lane l: dword 4 l + j of rows 4 i to 4 i + 3
    FAST_UNROLL
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44), b = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee), d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
        t[j]      = _mm512_shuffle_i32x4(a, b, 0x88);
        t[4 + j]  = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[8 + j]  = _mm512_shuffle_i32x4(c, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    FAST_UNROLL
    for (int i = 0; i < 16; i++) {
        v[i] = t[i];
    }
}

} // namespace fast
