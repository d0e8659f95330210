// Unpacking of weights to panels by AVX-512. The panel's layout is in panel-512.h.

#pragma once

#include "panel-512.h"
#include "rows-512.h"
#include "transpose-512.h"

#include <algorithm>

namespace fast {

// Prefetch n bytes. Rows are too far apart for the hardware prefetcher.
static inline void prefetch(const char * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        _mm_prefetch(p + i, _MM_HINT_T0);
    }
}

// Read n (up to eight) blocks of 32 values, padded with zeros.
template <typename B> static inline row_codes read(const B * x, int n) {
    if (n == 8) {
        return read_8(x);
    }
    B padded[8] = {};
    memcpy(padded, x, n * sizeof(B));
    return read_8(padded);
}

// Unpack n (up to eight) blocks of up to 16 rows.
template <int TYPE> static void unpack_rows(const char * weights, size_t stride, int n_rows, int block, int n, panel_half<TYPE> to) {
    using type = type_of<TYPE>;
    constexpr format f = type::fmt;
    __m512i codes[4][16], scales[16], mins[16];
    for (int j = 0; j < 16; j++) {
        // Missing rows repeat the last one. Their results are masked.
        const auto * x = (const typename type::block *) (weights + std::min(j, n_rows - 1) * stride) + block * 32 / type::n_values;
        prefetch((const char *) x + PANEL_ROWS * stride, sizeof(*x) * 256 / type::n_values);
        row_codes r;
        if constexpr (type::n_values == 256) {
            r = read(*x);
        } else {
            r = read(x, n);
        }
        FAST_UNROLL
        for (int i = 0; i < 4; i++) {
            codes[i][j] = r.codes[i];
        }
        scales[j] = _mm512_castps_si512(r.scales);
        if constexpr (f.mins && f.halves) {
            mins[j] = _mm512_castps_si512(r.mins);
        }
    }
    for (int i = 0; 2 * i < n; i++) {
        transpose_16(codes[i]);
        for (int g = 0; g < 8; g++) {
            to.store_codes(2 * i, g, codes[i][g]);
            if (2 * i + 1 < n) {
                to.store_codes(2 * i + 1, g, codes[i][8 + g]);
            }
        }
    }
    transpose_16(scales);
    if constexpr (f.mins && f.halves) {
        transpose_16(mins);
    }
    for (int i = 0; i < n; i++) {
        if constexpr (f.halves) {
            to.store_set(i, 0, _mm512_castsi512_ps(scales[2 * i]));
            to.store_set(i, 1, _mm512_castsi512_ps(scales[2 * i + 1]));
            if constexpr (f.mins) {
                to.store_set(i, 2, _mm512_castsi512_ps(mins[2 * i]));
                to.store_set(i, 3, _mm512_castsi512_ps(mins[2 * i + 1]));
            }
        } else {
            to.store_set(i, 0, _mm512_castsi512_ps(scales[i]));
            if constexpr (f.mins) {
                to.store_set(i, 1, _mm512_castsi512_ps(scales[8 + i]));
            }
        }
    }
}

// Unpack n blocks of up to 32 rows, starting at `block`, a multiple of 8.
template <int TYPE> static void unpack(const char * weights, size_t stride, int n_rows, int block, int n, uint8_t * panel) {
    constexpr int bytes = panel_block(type_of<TYPE>::fmt);
    for (int i = 0; i < n; i += 8) {
        for (int r = 0; r < n_rows; r += 16) {
            unpack_rows<TYPE>(weights + r * stride, stride, n_rows - r, block + i, std::min(8, n - i), { panel + i * bytes + r * 4 });
        }
    }
}

} // namespace fast
