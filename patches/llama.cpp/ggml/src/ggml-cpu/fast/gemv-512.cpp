// Products with few columns by AVX-512 VNNI. A vector holds 64 codes of a row: two blocks of 32 or four halves, each with its scale, or eight codes
// of each of eight blocks (spread-512.h).
//
// For types with spread codes, consecutive rows are read as one sequence of groups. A group may contain the end of one row and
// the start of the next. With 28 blocks per row:
//
//   row 0:                          row 1:
//   | group 0 | group 1 | group 2 | group 3 | group 4 | group 5 | group 6 |
//   b0        b8        b16       b24  b0   b4        b12       b20
//
// The tile contains one copy of the column for each row of the sequence.

#include "gemm.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "gemv.h"
#include "quantise-512.h"
#include "rows-512.h"
#include "spread-512.h"

namespace fast {
namespace {

// Return, for each lane of vector i's sums, the index of its scale.
template <bool HALVES> inline __m512i lanes_of(int i) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return HALVES ? _mm512_add_epi32(_mm512_srli_epi32(lane, 2), _mm512_set1_epi32(4 * i))
                  : _mm512_add_epi32(_mm512_srli_epi32(lane, 3), _mm512_set1_epi32(2 * i));
}

template <int TYPE> FAST_INLINE row_codes read_group(const typename type_of<TYPE>::block * x) {
    if constexpr (type_of<TYPE>::n_values == 256 && is_spread<TYPE>) {
        return read_spread(*x);
    } else if constexpr (is_spread<TYPE>) {
        return read_spread<TYPE>(x);
    } else if constexpr (type_of<TYPE>::n_values == 256) {
        return read(*x);
    } else {
        return read_8(x);
    }
}

struct avx512_vectors {
    using floats = __m512;

    static floats zero() { return _mm512_setzero_ps(); }
    static float  sum_of(const floats (&total)[2]) { return _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])); }

    // Multiply a group of a row with the groups of N columns, which are n groups apart.
    template <int TYPE, int N>
    static void add(const typename type_of<TYPE>::block * w, const column_group<type_of<TYPE>::fmt.halves> * columns, int n,
            floats (&total)[N][2]) {
        add_group<TYPE, N>(read_group<TYPE>(w), columns, n, total);
    }

    template <int TYPE, int N>
    static void add_group(const row_codes & r, const column_group<type_of<TYPE>::fmt.halves> * columns, int n, floats (&total)[N][2]) {
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            add_codes<TYPE>(r, columns[c * n], total[c]);
        }
    }

    template <int TYPE> static void add_codes(const row_codes & r, const column_group<type_of<TYPE>::fmt.halves> & x, floats (&total)[2]) {
        constexpr format f = type_of<TYPE>::fmt;
        floats scales;
        if constexpr (f.halves) {
            scales   = _mm512_mul_ps(r.scales, _mm512_loadu_ps(x.scales));
            total[0] = _mm512_fmadd_ps(f.mins ? r.mins : r.scales, _mm512_loadu_ps(x.sums), total[0]);
        } else { // one multiplication for the column's eight scales and its eight sums
            scales   = _mm512_mul_ps(r.scales, _mm512_loadu_ps(x.scales));
            total[0] = _mm512_mask_add_ps(total[0], 0xff00, total[0], scales);
        }
        if constexpr (is_spread<TYPE>) {
            __m512i dots = _mm512_setzero_si512();
            FAST_UNROLL
            for (int i = 0; i < 4; i++) {
                dots = _mm512_dpbusd_epi32(dots, r.codes[i], _mm512_loadu_si512(x.codes + 64 * i));
            }
            const __m512i blocks = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            total[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_permutexvar_ps(blocks, scales), total[1]);
        } else {
            FAST_UNROLL
            for (int i = 0; i < 4; i++) {
                const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), r.codes[i], _mm512_loadu_si512(x.codes + 64 * i));
                const floats  lane_scales = _mm512_permutexvar_ps(lanes_of<f.halves>(i), scales);
                total[i % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), lane_scales, total[i % 2]);
            }
        }
    }

    // Multiply the last n blocks of a row, for types with blocks of 32: less than a group.
    template <int TYPE, int N>
    static void add_last(const typename type_of<TYPE>::block * w, int n, const column_group<false> * columns, int step, floats (&total)[N][2]) {
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            add_pairs<TYPE>(w, n, columns[c * step], total[c]);
        }
    }

    template <int TYPE>
    static void add_pairs(const typename type_of<TYPE>::block * w, int n, const column_group<false> & x, floats (&total)[2]) {
        constexpr bool mins = type_of<TYPE>::fmt.mins;
        for (int b = 0; b < n; b += 2) {
            const int last = std::min(b + 1, n - 1); // past the end it repeats a block, multiplied with the column's zeros
            const __m512i codes = codes_64(w[b], w[last]);
            const __m512i dots  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x.codes + 32 * b));
            const float scales[2] = { scale_of(w[b]), scale_of(w[last]) };
            const floats low = _mm512_set1_ps(scales[0] * x.scales[b]), high = _mm512_set1_ps(scales[1] * x.scales[b + 1]);
            total[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mask_mov_ps(low, 0xff00, high), total[1]);
            const float sum = (mins ? min_of(w[b]) : scales[0]) * x.sums[b] + (mins ? min_of(w[last]) : scales[1]) * x.sums[b + 1];
            total[0] = _mm512_mask_add_ps(total[0], 1, total[0], _mm512_set1_ps(sum));
        }
    }
};

// Return the sums of 16 vectors' values. Each sum is computed in the order of _mm512_reduce_add_ps().
inline __m512 sums_of_16(const float (*v)[16]) {
    __m512 half[8], quarter[4], pair[2];
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        const __m512 a = _mm512_load_ps(v[2 * i]), b = _mm512_load_ps(v[2 * i + 1]);
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512 a = half[2 * i], b = half[2 * i + 1];
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    FAST_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m512d a = _mm512_castps_pd(quarter[2 * i]), b = _mm512_castps_pd(quarter[2 * i + 1]);
        pair[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(in_order, sums);
}

constexpr int MAX_JOINED = 4;

// Return the number of consecutive rows whose blocks fill whole groups, or 1 if more than MAX_JOINED rows are needed or a row has fewer
// than four blocks, because three such rows could share a group.
inline int n_joined(int n_blocks) {
    const int n = n_blocks % 8 == 0 ? 1 : n_blocks % 4 == 0 ? 2 : MAX_JOINED;
    return n_blocks < 4 || n_blocks % 2 ? 1 : n;
}

// Reorder a group's codes: the first eight of each block, then the second eight of each block, and so on.
template <typename G> void spread(G & group) {
    int8_t in_order[GROUP * 32];
    memcpy(in_order, group.codes, sizeof(in_order));
    for (int b = 0; b < GROUP; b++) {
        for (int i = 0; i < 4; i++) {
            memcpy(group.codes + 8 * (GROUP * i + b), in_order + 8 * (4 * b + i), 8);
        }
    }
}

template <int FACTOR> void pack_spread(const float * const * cols, int n, int n_blocks, uint8_t * tile) {
    const int joined = n_joined(n_blocks), n_group = n_groups(joined * n_blocks);
    auto * groups = (column_group<false> *) tile;
    for (int c = 0; c < n; c++, groups += n_group) {
        memset((void *) &groups[n_group - 1], 0, sizeof(*groups));
        for (int b = 0; b < n_blocks; b++) {
            pack_block<quantise, false, FACTOR>(cols[c], b, groups);
        }
        for (int to = n_blocks; to < joined * n_blocks; to++) {
            const auto & source = groups[to % n_blocks / GROUP];
            auto &       target = groups[to / GROUP];
            const int i = to % n_blocks % GROUP, j = to % GROUP;
            memcpy(target.codes + 32 * j, source.codes + 32 * i, 32);
            target.scales[j] = source.scales[i];
            target.sums[j]   = source.sums[i];
        }
        for (int g = 0; g < n_group; g++) {
            spread(groups[g]);
        }
    }
}

// Multiplies N columns with rows of a type with spread codes.
template <int TYPE, int N> class joined_rows {
    using V     = avx512_vectors;
    using block = typename type_of<TYPE>::block;

    static constexpr int group_blocks = 256 / type_of<TYPE>::n_values;
    static constexpr int STEP = 32; // number of rows whose sums are computed together, because one row's sum is a chain of dependent operations

    const gemm_share &          share;
    const column_group<false> * columns;
    const int                   joined = type_of<TYPE>::n_values == 256 ? 1 : n_joined(share.n_blocks);
    const int                   n      = n_groups(joined * share.n_blocks); // groups of a column

    alignas(64) float totals[N][STEP][16];

public:
    joined_rows(const gemm_share & s, const uint8_t * tile) : share(s), columns((const column_group<false> *) tile) {}

    void multiply(int col) {
        const size_t row_bytes = (size_t) share.n_blocks * 32 / type_of<TYPE>::n_values * sizeof(block);
        const bool   is_sequence = share.stride == row_bytes && joined * share.n_blocks % GROUP == 0;
        const int    n_joined_rows = is_sequence ? share.n_rows / joined * joined : 0;
        for (int first = 0; first < share.n_rows; first += STEP) {
            const int end = std::min(first + STEP, share.n_rows), end_joined = std::min(end, n_joined_rows);
            if (first < end_joined) {
                multiply_sequence(first, end_joined - first, group_at(n_joined_rows) - group_blocks);
            }
            for (int row = std::max(first, end_joined); row < end; row++) {
                multiply_row(group_at(row), row - first);
            }
            for (int c = 0; c < N; c++) {
                for (int row = first; row < end; row += 16) {
                    const __mmask16 rows = (__mmask16) ((1 << std::min(end - row, 16)) - 1);
                    _mm512_mask_storeu_ps(share.out[col + c] + share.row + row, rows, sums_of_16(totals[c] + (row - first)));
                }
            }
        }
    }

private:
    const block * group_at(int row) const { return (const block *) (share.weights + row * share.stride); }

    // Read each group before multiplying the previous one, so that the processor can overlap both.
    void multiply_sequence(int first_row, int n_rows, const block * last) {
        const block * x      = group_at(first_row);
        const auto *  column = columns;
        const int n_blocks = share.n_blocks;
        __m512 total[N][2];
        clear(total);
        row_codes codes = read_group<TYPE>(x);
        const auto read_next = [&] {
            x = x < last ? x + group_blocks : last;
            prefetch_ahead(x, sizeof(block) * group_blocks);
            return read_group<TYPE>(x);
        };
        int left = n_blocks; // the row's blocks that are not yet multiplied
        for (int row = 0; row < n_rows; row++) {
            for (; left >= GROUP; left -= GROUP, column++) {
                const row_codes next = read_next();
                V::add_group<TYPE, N>(codes, column, n, total);
                codes = next;
            }
            if (type_of<TYPE>::n_values == 256 || left == 0) {
                store(total, row);
                clear(total);
                left = n_blocks;
            } else { // the group contains the row's end
                const row_codes next = read_next();
                V::add_group<TYPE, N>(only(codes, 0, left), column, n, total);
                store(total, row);
                clear(total);
                V::add_group<TYPE, N>(only(codes, left, GROUP), column, n, total);
                left += n_blocks - GROUP;
                codes = next;
                column++;
            }
            if ((row + 1) % joined == 0) {
                column = columns;
            }
        }
    }

    void multiply_row(const block * x, int row) {
        const auto * column = columns;
        __m512 total[N][2];
        clear(total);
        int left = share.n_blocks;
        for (; left >= GROUP; left -= GROUP, x += group_blocks, column++) {
            prefetch_ahead(x, sizeof(block) * group_blocks);
            V::add<TYPE, N>(x, column, n, total);
        }
        if constexpr (type_of<TYPE>::n_values == 32) {
            if (left > 0) {
                block copy[GROUP];
                if (x + GROUP > group_at(share.n_rows - 1) + share.n_blocks) { // a whole group would exceed the share's weights
                    memset((void *) copy, 0, sizeof(copy));
                    memcpy((void *) copy, x, left * sizeof(block));
                    x = copy;
                }
                V::add_group<TYPE, N>(only(read_group<TYPE>(x), 0, left), column, n, total);
            }
        }
        store(total, row);
    }

    FAST_INLINE void store(const __m512 (&total)[N][2], int row) {
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            _mm512_store_ps(totals[c][row], _mm512_add_ps(total[c][0], total[c][1]));
        }
    }

    FAST_INLINE static void clear(__m512 (&total)[N][2]) {
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            total[c][0] = total[c][1] = V::zero();
        }
    }

    // Return the codes with the scales and mins of the blocks from `begin` up to, but not including, `end`. The others' values are 0.
    static row_codes only(row_codes codes, int begin, int end) {
        const int blocks = (1 << end) - (1 << begin);
        codes.scales = _mm512_maskz_mov_ps((__mmask16) (blocks | blocks << GROUP), codes.scales);
        return codes;
    }
};

template <int TYPE> struct spread_rows {
    template <int N> static void multiply(const gemm_share & s, int col, const uint8_t * tile) {
        joined_rows<TYPE, N>(s, tile).multiply(col);
    }
};

template <int TYPE> const gemm * kernel() {
    if constexpr (is_spread<TYPE>) {
        return gemv_kernel<TYPE, pack_spread<sum_factor<TYPE>>, spread_rows<TYPE>, type_of<TYPE>::n_values == 32 ? MAX_JOINED : 1>();
    } else {
        return separate_rows_kernel<avx512_vectors, TYPE, quantise>();
    }
}

} // namespace

const gemm * gemv_512(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return kernel<TYPE>();
        FAST_FOR_EACH_TYPE_BUT_Q2_K(FAST_CASE)
#undef FAST_CASE
    }
    return nullptr;
}

} // namespace fast

#else

const fast::gemm * fast::gemv_512(int) {
    return nullptr;
}

#endif
