// Products of a few columns, as in decoding: a row of weights at a time, so that memory is read in order.
//
// Codes and activations are those of the products of many columns. A row's result does not depend on the other columns.

#pragma once

#include "gemm.h"
#include "types.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace pop {
namespace {

constexpr int GROUP     = 8;   // blocks of 32 that are read at once, 256 along K
constexpr int GEMV_ROWS = 128; // that a thread takes at a time
constexpr int GEMV_COLS = 5;   // of a tile, one after the other

// A column's group; with halves there are two scales and sums for each 32. The sums are scale * sum of the codes, which mins are multiplied
// with. Types with a bias have -bias * scale * sum, which their scales are multiplied with.
template <bool HALVES> struct column_group {
    static constexpr int PARTS = HALVES ? 2 : 1;

    int8_t codes[GROUP * 32];
    float  scales[PARTS * GROUP], sums[PARTS * GROUP];
};

inline int n_groups(int n_blocks) {
    return (n_blocks + GROUP - 1) / GROUP;
}

// FACTOR: of the sums
template <auto QUANTISE, bool HALVES, int FACTOR> void pack_columns(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    constexpr int parts = column_group<HALVES>::PARTS;
    auto * out = (column_group<HALVES> *) tile;
    for (int c = 0; c < n; c++) {
        for (int first = 0; first < n_blocks; first += GROUP, out++) {
            const int end = std::min(GROUP, n_blocks - first);
            if (end < GROUP) {
                memset((void *) out, 0, sizeof(*out));
            }
            for (int b = 0; b < end; b++) {
                const auto q = QUANTISE(cols[c] + 32 * (first + b), out->codes + 32 * b);
                for (int h = 0; h < parts; h++) {
                    out->scales[parts * b + h] = q.scale;
                    out->sums[parts * b + h]   = q.scale * (float) (FACTOR * (HALVES ? q.sums[h] : q.sums[0] + q.sums[1]));
                }
            }
        }
    }
}

// rows follow one another: a processor alone does not read far enough ahead, least of all at the end of a page
inline void fetch_ahead(const void * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        _mm_prefetch((const char *) p + 1024 + i, _MM_HINT_T0);
        _mm_prefetch((const char *) p + 3072 + i, _MM_HINT_T1);
    }
}

// V has the vectors of an instruction set: floats, zero(), add(), add_last() and sum_of().
template <typename V, int TYPE, int N> void multiply_rows(const gemm_share & s, int col, const uint8_t * tile) {
    using type = type_of<TYPE>;
    using block = typename type::block;
    constexpr int group_blocks = 256 / type::n_values;
    const auto * columns = (const column_group<type::fmt.halves> *) tile;
    const int n = n_groups(s.n_blocks), n_whole = s.n_blocks / GROUP;
    for (int row = 0; row < s.n_rows; row++) {
        const block * x = (const block *) (s.weights + row * s.stride);
        typename V::floats total[N][2];
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            total[c][0] = total[c][1] = V::zero();
        }
        for (int g = 0; g < n_whole; g++, x += group_blocks) {
            fetch_ahead(x, sizeof(block) * group_blocks);
            V::template add<TYPE, N>(x, columns + g, n, total);
        }
        if constexpr (type::n_values == 32) {
            POP_UNROLL
            for (int c = 0; c < N; c++) {
                V::template add_last<TYPE>(x, s.n_blocks % GROUP, columns[c * n + n_whole], total[c]);
            }
        }
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            s.out[col + c][s.row + row] = V::sum_of(total[c]);
        }
    }
}

template <typename V, int TYPE> void multiply_few(const gemm_share & s) {
    static void (* const rows[GEMV_COLS])(const gemm_share &, int, const uint8_t *) = {
        multiply_rows<V, TYPE, 1>, multiply_rows<V, TYPE, 2>, multiply_rows<V, TYPE, 3>, multiply_rows<V, TYPE, 4>, multiply_rows<V, TYPE, 5>,
    };
    for (int c = 0; c < s.n_cols; c += GEMV_COLS) {
        rows[std::min(GEMV_COLS, s.n_cols - c) - 1](s, c, s.tiles + c / GEMV_COLS * s.tile);
    }
}

template <typename V, int TYPE, auto QUANTISE> const gemm * kernel_for_few() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t tile = GEMV_COLS * sizeof(column_group<f.halves>) / GROUP;
    static const gemm g = {
        GEMV_ROWS, GEMV_COLS, 0, tile, 0, pack_columns<QUANTISE, f.halves, f.mins ? 1 : -f.bias>, multiply_few<V, TYPE>,
    };
    return &g;
}

} // namespace
} // namespace pop
