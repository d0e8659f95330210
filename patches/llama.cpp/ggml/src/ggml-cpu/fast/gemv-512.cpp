// Products with few columns by AVX-512 VNNI. A vector holds 64 codes of a row: two blocks of 32 or four halves, each with its scale, or eight codes
// of each of eight blocks (spread-512.h).

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

template <int TYPE> inline row_codes read_group(const typename type_of<TYPE>::block * x) {
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

    template <int TYPE> static constexpr int n_rows = is_spread<TYPE> && type_of<TYPE>::n_values == 32 ? 2 : 1;

    static floats zero() { return _mm512_setzero_ps(); }
    static float  sum_of(const floats (&total)[2]) { return _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])); }

    // Multiply a group of a row with the groups of N columns, which are n groups apart.
    template <int TYPE, int N>
    static void add(const typename type_of<TYPE>::block * w, const column_group<type_of<TYPE>::fmt.halves> * columns, int n,
            floats (&total)[N][2]) {
        const row_codes r = read_group<TYPE>(w);
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

    // Multiply the last n blocks of R rows, for types with blocks of 32: less than a group.
    template <int TYPE, int R, int N>
    static void add_last(const typename type_of<TYPE>::block * const (&w)[R], int n, const column_group<false> * columns, int step,
            floats (&total)[R][N][2]) {
        if constexpr (!is_spread<TYPE>) {
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                add_pairs<TYPE>(w[0], n, columns[c * step], total[0][c]);
            }
        } else if (n > GROUP / 2) {
            FAST_UNROLL
            for (int r = 0; r < R; r++) {
                const row_codes codes = read_ends<TYPE>(w[r], n, w[r], 0);
                FAST_UNROLL
                for (int c = 0; c < N; c++) {
                    add_codes<TYPE>(codes, columns[c * step], total[r][c]);
                }
            }
        } else { // the blocks of both rows in one group
            const row_codes codes = read_ends<TYPE>(w[0], n, w[1], n);
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                floats both[2] = { zero(), zero() };
                add_codes<TYPE>(codes, columns[c * step], both);
                total[0][c][0] = _mm512_mask_add_ps(total[0][c][0], 0x0f00, total[0][c][0], both[0]);
                total[1][c][0] = _mm512_mask_add_ps(total[1][c][0], 0xf000, total[1][c][0], both[0]);
                total[0][c][1] = _mm512_mask_add_ps(total[0][c][1], 0x00ff, total[0][c][1], both[1]);
                total[1][c][1] = _mm512_mask_add_ps(total[1][c][1], 0xff00, total[1][c][1], both[1]);
            }
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

} // namespace

const gemm * gemv_512(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return gemv_kernel<avx512_vectors, TYPE, quantise, is_spread<TYPE>>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
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
