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

// Reorder a group's codes: the first eight of each block, then the second eight of each block, and so on. Up to four blocks are repeated for a
// second row.
template <typename G> void spread(G & group, int n_blocks) {
    if (n_blocks <= GROUP / 2) {
        memcpy(group.codes + 32 * (GROUP / 2), group.codes, 32 * n_blocks);
        memcpy(group.scales + GROUP / 2, group.scales, n_blocks * sizeof(float));
        memcpy(group.sums + GROUP / 2, group.sums, n_blocks * sizeof(float));
    }
    int8_t in_order[GROUP * 32];
    memcpy(in_order, group.codes, sizeof(in_order));
    for (int b = 0; b < GROUP; b++) {
        for (int i = 0; i < 4; i++) {
            memcpy(group.codes + 8 * (GROUP * i + b), in_order + 8 * (4 * b + i), 8);
        }
    }
}

// FACTOR multiplies the sums: 1, or -bias.
template <auto QUANTISE, bool HALVES, int FACTOR, bool SPREAD> void pack_columns(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
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
            if constexpr (SPREAD) {
                spread(*out, end);
            }
        }
    }
}

// Prefetch weights. The hardware prefetcher does not read far enough ahead and stops at page boundaries. The 8 KiB were measured on Zen 4 only
// (docs/notebook/archive/decoding-details.md).
inline void prefetch_ahead(const void * p, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        FAST_PREFETCH_L1((const char *) p + 1024 + i);
        FAST_PREFETCH_L2((const char *) p + 8192 + i);
    }
}

// Multiply N columns with all rows. V provides an instruction set's vectors: floats, zero(), add(), add_last() and sum_of(), and the number of
// rows whose last blocks it multiplies at once, which share a task because tasks start at multiples of 32 rows.
template <typename V, int TYPE, int N> void multiply_rows(const gemm_share & s, int col, const uint8_t * tile) {
    using type = type_of<TYPE>;
    using block = typename type::block;
    constexpr int group_blocks = 256 / type::n_values, R = V::template n_rows<TYPE>;
    const auto * columns = (const column_group<type::fmt.halves> *) tile;
    const int n = n_groups(s.n_blocks), n_whole = s.n_blocks / GROUP, n_last = s.n_blocks % GROUP;
    for (int row = 0; row < s.n_rows; row += R) {
        typename V::floats total[R][N][2];
        const block * ends[R];
        FAST_UNROLL
        for (int r = 0; r < R; r++) {
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                total[r][c][0] = total[r][c][1] = V::zero();
            }
            // The last row takes the place of a missing one.
            const block * x = (const block *) (s.weights + std::min(row + r, s.n_rows - 1) * s.stride);
            for (int g = 0; g < n_whole; g++, x += group_blocks) {
                prefetch_ahead(x, sizeof(block) * group_blocks);
                V::template add<TYPE, N>(x, columns + g, n, total[r]);
            }
            ends[r] = x;
        }
        if constexpr (type::n_values == 32) {
            if (n_last > 0) {
                FAST_UNROLL
                for (int r = 0; r < R; r++) {
                    prefetch_ahead(ends[r], sizeof(block) * n_last);
                }
                V::template add_last<TYPE, R, N>(ends, n_last, columns + n_whole, n, total);
            }
        }
        FAST_UNROLL
        for (int r = 0; r < R; r++) {
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                s.out[col + c][s.row + std::min(row + r, s.n_rows - 1)] = V::sum_of(total[r][c]);
            }
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

template <typename V, int TYPE, auto QUANTISE, bool SPREAD = false> const gemm * gemv_kernel() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t tile = GEMV_COLS * sizeof(column_group<f.halves>) / GROUP;
    static const gemm g = {
        GEMV_ROWS, GEMV_COLS, 0, tile, 0, pack_columns<QUANTISE, f.halves, f.mins ? 1 : -f.bias, SPREAD>, multiply_columns<V, TYPE>,
    };
    return &g;
}

} // namespace
} // namespace fast
