// Products of a few columns by AVX-512 VNNI. A vector has 64 codes of a row, and its sums are of two blocks of 32, or of four halves.

#include "gemm.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "gemv.h"
#include "quantise-512.h"
#include "rows-512.h"

namespace pop {

// for each lane of the sums of vector i which scale is its own
template <bool HALVES> static inline __m512i lanes_of(int i) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return HALVES ? _mm512_add_epi32(_mm512_srli_epi32(lane, 2), _mm512_set1_epi32(4 * i))
                  : _mm512_add_epi32(_mm512_srli_epi32(lane, 3), _mm512_set1_epi32(2 * i));
}

// a group of a row times one of a column
template <bool HALVES, bool MINS> static inline void add(const row_codes & w, const column_group<HALVES> & x, __m512 total[2]) {
    __m512 scales;
    if (HALVES) {
        scales   = _mm512_mul_ps(w.scales, _mm512_loadu_ps(x.scales));
        total[0] = _mm512_fmadd_ps(MINS ? w.mins : w.scales, _mm512_loadu_ps(x.sums), total[0]);
    } else {
        const __m512 both = MINS ? w.scales : _mm512_shuffle_f32x4(w.scales, w.scales, 0x44);
        scales   = _mm512_mul_ps(both, _mm512_loadu_ps(x.scales));
        total[0] = _mm512_mask_add_ps(total[0], 0xff00, total[0], scales);
    }
    POP_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512i dots = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.codes[i], _mm512_loadu_si512(x.codes + 64 * i));
        total[i % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_permutexvar_ps(lanes_of<HALVES>(i), scales), total[i % 2]);
    }
}

// the last n blocks of a row of types that have blocks of 32, fewer than a group
template <bool MINS, typename B> static inline void add_last(const B * w, int n, const column_group<false> & x, __m512 total[2]) {
    for (int b = 0; b < n; b += 2) {
        const int last = std::min(b + 1, n - 1); // counts for nothing where it is not there, since the column is zero
        const __m512i codes = join(codes_32(w[b]), codes_32(w[last]));
        const __m512i dots  = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_loadu_si512(x.codes + 32 * b));
        const float scales[2] = { scale_of(w[b]), scale_of(w[last]) };
        const __m512 low = _mm512_set1_ps(scales[0] * x.scales[b]), high = _mm512_set1_ps(scales[1] * x.scales[b + 1]);
        total[1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), _mm512_mask_mov_ps(low, 0xff00, high), total[1]);
        const float sum = (MINS ? min_of(w[b]) : scales[0]) * x.sums[b] + (MINS ? min_of(w[last]) : scales[1]) * x.sums[b + 1];
        total[0] = _mm512_mask_add_ps(total[0], 1, total[0], _mm512_set1_ps(sum));
    }
}

template <int TYPE, int N> static void multiply_rows(const gemm_share & s, int col, const uint8_t * tile) {
    using type = type_of<TYPE>;
    using block = typename type::block;
    constexpr format f = type::fmt;
    constexpr int group_blocks = 256 / type::n_values;
    const auto * columns = (const column_group<f.halves> *) tile;
    const int n = n_groups(s.n_blocks), n_whole = s.n_blocks / GROUP;
    for (int row = 0; row < s.n_rows; row++) {
        const block * x = (const block *) (s.weights + row * s.stride);
        __m512 total[N][2];
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            total[c][0] = total[c][1] = _mm512_setzero_ps();
        }
        for (int g = 0; g < n_whole; g++, x += group_blocks) {
            fetch_ahead(x, sizeof(block) * group_blocks);
            row_codes w;
            if constexpr (type::n_values == 256) {
                w = read(*x);
            } else {
                w = read_8(x);
            }
            POP_UNROLL
            for (int c = 0; c < N; c++) {
                add<f.halves, f.mins>(w, columns[c * n + g], total[c]);
            }
        }
        if constexpr (type::n_values == 32) {
            POP_UNROLL
            for (int c = 0; c < N; c++) {
                add_last<f.mins>(x, s.n_blocks % GROUP, columns[c * n + n_whole], total[c]);
            }
        }
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            s.out[col + c][s.row + row] = _mm512_reduce_add_ps(_mm512_add_ps(total[c][0], total[c][1]));
        }
    }
}

template <int TYPE> static void multiply(const gemm_share & s) {
    static const gemv_function rows[GEMV_COLS] = {
        multiply_rows<TYPE, 1>, multiply_rows<TYPE, 2>, multiply_rows<TYPE, 3>, multiply_rows<TYPE, 4>, multiply_rows<TYPE, 5>,
    };
    multiply_columns(s, rows);
}

template <int TYPE> static const gemm * kernel() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t tile = GEMV_COLS * sizeof(column_group<f.halves>) / GROUP;
    static const gemm g = { GEMV_ROWS, GEMV_COLS, 0, tile, 0, pack_columns<quantise, f.halves, f.mins ? 1 : -f.bias>, multiply<TYPE> };
    return &g;
}

const gemm * gemv_512(int type) {
    switch (type) {
#define POP_CASE(TYPE) case TYPE: return kernel<TYPE>();
        POP_EACH_TYPE(POP_CASE)
#undef POP_CASE
    }
    return nullptr;
}

} // namespace pop

#else

const pop::gemm * pop::gemv_512(int) {
    return nullptr;
}

#endif
