// Products with few columns, as in decode. Rows of weights are multiplied in sequence, so memory is read in order.
//
// Codes and activations are those of the panel kernels. A column's result does not depend on the other columns.
//
// A tile holds its columns one after the other, each as groups of 256 values along K (gemv-512.cpp repeats and reorders some of them):
//
//   column 0: | group 0 | group 1 | ... | last group, padded with zeros |   column 1: | group 0 | ...
//
//   a group:  codes   [k0 k1 ............................. k255]   i8
//             scales  [b0][b1] ... [b7]                            f32, two per block for types with HALVES
//             sums    [b0][b1] ... [b7]                            f32, likewise

#pragma once

#include "gemm.h"
#include "types.h"

#include <algorithm>
#include <cstring>

namespace fast {
namespace {

constexpr int GROUP     = 8;   // blocks of 32 values in a group: the length of a K-quant's block
constexpr int GEMV_ROWS = 128; // rows that a thread takes at once: an upper limit, since fast.cpp divides small matrices further
constexpr int GEMV_COLS = 5;   // the panel kernels take over from 5 or 6 columns on (MIN_COLS in gemm-*.cpp)

// A group of a column. A sum is scale * sum of the codes, to be multiplied with the weights' mins. For types with a bias it is
// -bias * scale * sum, to be multiplied with the weights' scales.
template <bool HALVES> struct column_group {
    static constexpr int PARTS = HALVES ? 2 : 1;

    int8_t codes[GROUP * 32];
    float  scales[PARTS * GROUP], sums[PARTS * GROUP];
};

inline int n_groups(int n_blocks) {
    return (n_blocks + GROUP - 1) / GROUP;
}

// Quantize block b of a column. The sums are multiplied by FACTOR, which is 1 or -bias.
template <auto QUANTISE, bool HALVES, int FACTOR> inline void pack_block(const float * col, int b, column_group<HALVES> * groups) {
    constexpr int parts = column_group<HALVES>::PARTS;
    column_group<HALVES> & group = groups[b / GROUP];
    const int i = b % GROUP;
    const auto q = QUANTISE(col + 32 * b, group.codes + 32 * i);
    for (int h = 0; h < parts; h++) {
        group.scales[parts * i + h] = q.scale;
        group.sums[parts * i + h]   = q.scale * (float) (FACTOR * (HALVES ? q.sums[h] : q.sums[0] + q.sums[1]));
    }
}

template <auto QUANTISE, bool HALVES, int FACTOR> void pack_columns(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    auto * groups = (column_group<HALVES> *) tile;
    for (int c = 0; c < n; c++, groups += n_groups(n_blocks)) {
        memset((void *) &groups[(n_blocks - 1) / GROUP], 0, sizeof(*groups));
        for (int b = 0; b < n_blocks; b++) {
            pack_block<QUANTISE, HALVES, FACTOR>(cols[c], b, groups);
        }
    }
}

// Prefetch weights. The hardware prefetcher does not read far enough ahead and stops at page boundaries. The 8 KiB were measured on Zen 4 only
// (docs/notebook/kernels-experts-and-decoding.md).
inline void prefetch_ahead(const void * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        FAST_PREFETCH_L1((const char *) p + 1024 + i);
        FAST_PREFETCH_L2((const char *) p + 8192 + i);
    }
}

// Multiplies each row separately. V provides an instruction set's vectors: floats, zero(), add(), add_last() and sum_of().
template <typename V, int TYPE> struct separate_rows {
    template <int N> static void multiply(const gemm_share & s, int col, const uint8_t * tile) {
        using type = type_of<TYPE>;
        using block = typename type::block;
        constexpr int group_blocks = 256 / type::n_values;
        const auto * columns = (const column_group<type::fmt.halves> *) tile;
        const int n = n_groups(s.n_blocks), n_whole = s.n_blocks / GROUP, n_last = s.n_blocks % GROUP;
        for (int row = 0; row < s.n_rows; row++) {
            typename V::floats total[N][2];
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                total[c][0] = total[c][1] = V::zero();
            }
            const block * x = (const block *) (s.weights + row * s.stride);
            for (int g = 0; g < n_whole; g++, x += group_blocks) {
                prefetch_ahead(x, sizeof(block) * group_blocks);
                V::template add<TYPE, N>(x, columns + g, n, total);
            }
            if constexpr (type::n_values == 32) {
                if (n_last > 0) {
                    prefetch_ahead(x, sizeof(block) * n_last);
                    V::template add_last<TYPE, N>(x, n_last, columns + n_whole, n, total);
                }
            }
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                s.out[col + c][s.row + row] = V::sum_of(total[c]);
            }
        }
    }
};

template <typename ROWS> void multiply_columns(const gemm_share & s) {
    static void (* const rows[GEMV_COLS])(const gemm_share &, int, const uint8_t *) = {
        ROWS::template multiply<1>, ROWS::template multiply<2>, ROWS::template multiply<3>, ROWS::template multiply<4>, ROWS::template multiply<5>,
    };
    for (int c = 0; c < s.n_cols; c += GEMV_COLS) {
        rows[std::min(GEMV_COLS, s.n_cols - c) - 1](s, c, s.tiles + c / GEMV_COLS * s.tile_stride);
    }
}

template <int TYPE> constexpr int sum_factor = type_of<TYPE>::fmt.mins ? 1 : -type_of<TYPE>::fmt.bias;

// PACK writes up to COPIES copies of each column. The copies make tiles larger, so has_packed_columns() can distinguish the layouts.
template <int TYPE, auto PACK, typename ROWS, int COPIES = 1> const gemm * gemv_kernel() {
    constexpr size_t tile = COPIES * GEMV_COLS * sizeof(column_group<type_of<TYPE>::fmt.halves>) / GROUP;
    static const gemm g = { GEMV_ROWS, GEMV_COLS, 0, tile, 0, PACK, multiply_columns<ROWS> };
    return &g;
}

template <typename V, int TYPE, auto QUANTISE> const gemm * separate_rows_kernel() {
    return gemv_kernel<TYPE, pack_columns<QUANTISE, type_of<TYPE>::fmt.halves, sum_factor<TYPE>>, separate_rows<V, TYPE>>();
}

} // namespace
} // namespace fast
