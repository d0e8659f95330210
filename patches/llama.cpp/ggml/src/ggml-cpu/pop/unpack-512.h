// Weights to panels, AVX-512.

#pragma once

#include "interleaved-512.h"
#include "rows-512.h"

namespace pop {

// n blocks of 32 from a block on, itself a multiple of 8, of up to 32 rows
template <int LAYOUT> static void unpack(const char * weights, size_t stride, int n_rows, int block, int n, uint8_t * panel) {
    using type = type_of<LAYOUT>;
    for (int i = 0; i < n; i += 8) {
        for (int r = 0; r < n_rows; r += 16) {
            const panel_half<LAYOUT> to = { panel + i * panel_block(type::fmt) + r * 4 };
            const int m = std::min(8, n - i);
            const auto at = [&](int row) {
                return (const typename type::block *) (weights + row * stride) + (block + i) * 32 / type::n_values;
            };
            if constexpr (LAYOUT >= X16) {
                unpack_x16(at(r), m, to);
            } else if constexpr (LAYOUT >= X8) {
                for (int h = 0; h < 16; h += 8) {
                    fetch((const char *) at(r + h) + PANEL_ROWS * stride, sizeof(typename type::block) * 256 / type::n_values);
                }
                unpack_x8(at(r), at(r + 8 < n_rows ? r + 8 : r), m, to);
            } else {
                unpack_rows<LAYOUT>(weights + r * stride, stride, n_rows - r, block + i, m, to);
            }
        }
    }
}

} // namespace pop
