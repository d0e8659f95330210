#pragma once

#include "types.h"

#include <immintrin.h>

namespace pop {

// a vector for each of 16 rows to one for each of 16 dwords
static inline void transpose_16(__m512i v[16]) {
    __m512i t[16];
    POP_UNROLL
    for (int i = 0; i < 16; i += 2) {
        t[i]     = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    POP_UNROLL
    for (int i = 0; i < 16; i += 4) {
        POP_UNROLL
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j]     = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    }
    // v[4 i + j]: in 128-bit lane l, dword 4 l + j of rows 4 i to 4 i + 3
    POP_UNROLL
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44), b = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee), d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
        t[j]      = _mm512_shuffle_i32x4(a, b, 0x88);
        t[4 + j]  = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[8 + j]  = _mm512_shuffle_i32x4(c, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    POP_UNROLL
    for (int i = 0; i < 16; i++) {
        v[i] = t[i];
    }
}

} // namespace pop
