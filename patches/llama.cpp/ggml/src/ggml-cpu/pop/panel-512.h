// Panels of AVX-512: 32 rows of weights whose codes are bytes, with the rows in the lanes of vectors.
//
// A panel's block, 32 along K: codes u8 [8][32 rows][4], then f32 [sets][32 rows]. The sets are the scale, or those of the two
// halves; with mins, the min or those of the two halves behind them.

#pragma once

#include "transpose-512.h"
#include "types.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace pop {

constexpr int PANEL_ROWS  = 32;
constexpr int PANEL_CODES = 32 * PANEL_ROWS; // bytes

constexpr int n_sets(format f) {
    return (f.halves ? 2 : 1) * (f.mins ? 2 : 1);
}

constexpr int panel_block(format f) {
    return PANEL_CODES + n_sets(f) * PANEL_ROWS * (int) sizeof(float);
}

static inline float from_half(ggml_half h) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

static inline __m256i load_256(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

// for bytes that are read soon: rows are too far apart for the processor to foresee it
static inline void fetch(const char * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        _mm_prefetch(p + i, _MM_HINT_T0);
    }
}

static inline __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline __m512i look_up(const uint8_t table[16], __m512i codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) table)), codes);
}

static inline __m512 floats_of_bytes(uint64_t low, uint64_t high) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_set_epi64x((long long) high, (long long) low)));
}

// eight scales and eight mins of six bits from 12 bytes
static inline void split_k4(const uint8_t * p, uint64_t & scales, uint64_t & mins) {
    uint32_t x[3];
    memcpy(x, p, 12);
    const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    scales = (x[0] & six) | (uint64_t) ((x[2] & four)        | ((x[0] >> 2) & two)) << 32;
    mins   = (x[1] & six) | (uint64_t) (((x[2] >> 4) & four) | ((x[1] >> 2) & two)) << 32;
}

// where the parts of a panel's blocks go, for 16 of its rows
template <int LAYOUT> struct panel_half {
    static constexpr format fmt = type_of<LAYOUT>::fmt;

    uint8_t * out;  // the first block of eight, at these rows

    void put_codes(int block, int group, __m512i codes) const {
        _mm512_store_si512(out + block * panel_block(fmt) + group * PANEL_ROWS * 4, codes);
    }

    void put_set(int block, int set, __m512 values) const {
        _mm512_store_ps(out + block * panel_block(fmt) + PANEL_CODES + set * PANEL_ROWS * 4, values);
    }
};

} // namespace pop
