// Panels of AVX-512: 32 rows of weights, codes as bytes, rows in the lanes of vectors.
//
// One block (32 values k0 to k31 of each row) of a panel:
//
//            row 0          row 1               row 15      | row 16          ...      row 31
//   group 0  [k0 k1 k2 k3 ][k0 k1 k2 k3 ] ... [k0 .. k3 ]   | [k0 .. k3 ]     ...   [k0 .. k3 ]     2 vectors of u8
//   group 1  [k4 k5 k6 k7 ] ...                             |
//   ...                                                     |
//   group 7  [k28 .. k31 ]  ...                             |
//   scale    [f32]         [f32]          ...  [f32]        | [f32]           ...   [f32]           2 vectors of f32
//   (scale of the second half, min, min of the second half: as the type has them)
//            |<---------------- 64 bytes ----------------->|
//
// vpdpbusd multiplies four adjacent bytes, so a group is four values along K.

#pragma once

#include "types.h"

#include <immintrin.h>

namespace fast {

constexpr int PANEL_ROWS  = 32;
constexpr int PANEL_CODES = 32 * PANEL_ROWS; // bytes

constexpr int n_sets(format f) {
    return (f.halves ? 2 : 1) * (f.mins ? 2 : 1);
}

constexpr int panel_block(format f) {
    return PANEL_CODES + n_sets(f) * PANEL_ROWS * (int) sizeof(float);
}

// Writes the parts of a panel's blocks for 16 of its rows.
template <int TYPE> struct panel_half {
    static constexpr format fmt = type_of<TYPE>::fmt;

    uint8_t * out; // the first of eight blocks, at these rows

    void store_codes(int block, int group, __m512i codes) const {
        _mm512_store_si512(out + block * panel_block(fmt) + group * PANEL_ROWS * 4, codes);
    }

    void store_set(int block, int set, __m512 values) const {
        _mm512_store_ps(out + block * panel_block(fmt) + PANEL_CODES + set * PANEL_ROWS * 4, values);
    }
};

} // namespace fast
