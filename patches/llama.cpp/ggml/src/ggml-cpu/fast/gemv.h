// Products with few columns, as in decode: one row of weights at a time, so memory is read in order.
//
// Codes and activations are those of the panel kernels. A column's result does not depend on the other columns.
//
// A tile holds its columns one after the other, each as groups of 256 values along K:
//
//   column 0: | group 0 | group 1 | ... | last group, padded with zeros |   column 1: | group 0 | ...
//
//   a group:  codes   [k0 k1 ............................. k255]   i8
//             scales  [b0][b1] ... [b7]                            f32, two per block for types with HALVES
//             sums    [b0][b1] ... [b7]                            f32, likewise

#pragma once

#include "gemm.h"
#include "types.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace fast {
namespace {

constexpr int GROUP     = 8;   // blocks of 32 values in a group: the length of a K-quant's block
constexpr int GEMV_ROWS = 128; // rows that a thread takes at once: an upper limit, since fast.cpp divides small matrices further
constexpr int GEMV_COLS = 5;   // the panel kernels take over from 5 or 6 columns on (MIN_COLS in gemm-256.cpp and gemm-512.cpp)

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

// FACTOR multiplies the sums: 1, or -bias.
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

// Prefetch weights. The hardware prefetcher does not read far enough ahead and stops at page boundaries. With 1 KiB for L1 and 3 KiB for L2,
// 200 MB of Q4_K are read at 10.8 GB/s, with one distance at 9, without at 6.4 (docs/notebook/kernels-experts-and-decoding.md).
inline void prefetch_ahead(const void * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        _mm_prefetch((const char *) p + 1024 + i, _MM_HINT_T0);
        _mm_prefetch((const char *) p + 3072 + i, _MM_HINT_T1);
    }
}

// Multiply N columns with all rows. V provides an instruction set's vectors: floats, zero(), add(), add_last() and sum_of().
template <typename V, int TYPE, int N> void multiply_rows(const gemm_share & s, int col, const uint8_t * tile) {
    using type = type_of<TYPE>;
    using block = typename type::block;
    constexpr int group_blocks = 256 / type::n_values;
    const auto * columns = (const column_group<type::fmt.halves> *) tile;
    const int n = n_groups(s.n_blocks), n_whole = s.n_blocks / GROUP;
    for (int row = 0; row < s.n_rows; row++) {
        const block * x = (const block *) (s.weights + row * s.stride);
        typename V::floats total[N][2];
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            total[c][0] = total[c][1] = V::zero();
        }
        for (int g = 0; g < n_whole; g++, x += group_blocks) {
            prefetch_ahead(x, sizeof(block) * group_blocks);
            V::template add<TYPE, N>(x, columns + g, n, total);
        }
        if constexpr (type::n_values == 32) {
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                V::template add_last<TYPE>(x, s.n_blocks % GROUP, columns[c * n + n_whole], total[c]);
            }
        }
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            s.out[col + c][s.row + row] = V::sum_of(total[c]);
        }
    }
}

template <typename V, int TYPE> void multiply_columns(const gemm_share & s) {
    static void (* const rows[GEMV_COLS])(const gemm_share &, int, const uint8_t *) = {
        multiply_rows<V, TYPE, 1>, multiply_rows<V, TYPE, 2>, multiply_rows<V, TYPE, 3>, multiply_rows<V, TYPE, 4>, multiply_rows<V, TYPE, 5>,
    };
    for (int c = 0; c < s.n_cols; c += GEMV_COLS) {
        rows[std::min(GEMV_COLS, s.n_cols - c) - 1](s, c, s.tiles + c / GEMV_COLS * s.tile_stride);
    }
}

template <typename V, int TYPE, auto QUANTISE> const gemm * gemv_kernel() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t tile = GEMV_COLS * sizeof(column_group<f.halves>) / GROUP;
    static const gemm g = {
        GEMV_ROWS, GEMV_COLS, 0, tile, 0, pack_columns<QUANTISE, f.halves, f.mins ? 1 : -f.bias>, multiply_columns<V, TYPE>,
    };
    return &g;
}

} // namespace
} // namespace fast
