// Panels of AVX-512: 32 rows of weights whose codes are bytes, with the rows in the lanes of vectors.
//
// A panel's block, 32 along K: codes u8 [8][32 rows][4], then f32 [sets][32 rows]. The sets are the scale, or those of the two
// halves; with mins, the min or those of the two halves behind them.

#pragma once

#include "types.h"

#include <immintrin.h>

namespace pop {

constexpr int PANEL_ROWS  = 32;
constexpr int PANEL_CODES = 32 * PANEL_ROWS; // bytes

constexpr int n_sets(format f) {
    return (f.halves ? 2 : 1) * (f.mins ? 2 : 1);
}

constexpr int panel_block(format f) {
    return PANEL_CODES + n_sets(f) * PANEL_ROWS * (int) sizeof(float);
}

// where the parts of a panel's blocks go, for 16 of its rows
template <int TYPE> struct panel_half {
    static constexpr format fmt = type_of<TYPE>::fmt;

    uint8_t * out;  // the first block of eight, at these rows

    void put_codes(int block, int group, __m512i codes) const {
        _mm512_store_si512(out + block * panel_block(fmt) + group * PANEL_ROWS * 4, codes);
    }

    void put_set(int block, int set, __m512 values) const {
        _mm512_store_ps(out + block * panel_block(fmt) + PANEL_CODES + set * PANEL_ROWS * 4, values);
    }
};

} // namespace pop
