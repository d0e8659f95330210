// Products of a few columns with 256-bit vectors: AVX-VNNI where there is, else AVX2. A vector has 32 codes of a row.

#include "gemm.h"

#include "ggml-cpu-impl.h" // defines __FMA__ and __F16C__, which MSVC does not

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "gemv.h"
#include "quantise-256.h"
#include "unpack-256.h"

namespace pop {
namespace {

// Without VNNI, codes of eight bits lose their bias: sums of 16 bits hold no more.
template <int TYPE> constexpr bool is_signed() {
    return !VNNI && type_of<TYPE>::fmt.bias == 128;
}

// eight sums of four products each, in order
template <bool SIGNED> inline __m256i dots(__m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), codes, x);
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, x);
#else
    if (SIGNED) {
        const __m256i w = _mm256_xor_si256(codes, _mm256_set1_epi8((char) 128));
        x     = _mm256_sign_epi8(x, w);
        codes = _mm256_abs_epi8(w);
    }
    return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1));
#endif
}

// a group's scales and mins; of types with a bias, the scales stand for mins
template <int TYPE> inline row_scales scales_of_group(const typename type_of<TYPE>::block * x) {
    row_scales s = {};
    if constexpr (type_of<TYPE>::n_values == 256) {
        s = scales_of(*x);
    } else {
        const typename type_of<TYPE>::block * blocks[8] = { x, x + 1, x + 2, x + 3, x + 4, x + 5, x + 6, x + 7 };
        s.scale[0] = scales_of_8(blocks);
        if constexpr (type_of<TYPE>::fmt.mins) {
            s.min[0] = mins_of_8(blocks);
        }
    }
    if (!type_of<TYPE>::fmt.mins) {
        s.min[0] = s.scale[0];
        s.min[1] = s.scale[1];
    }
    return s;
}

template <int TYPE> inline __m256i codes_of(const typename type_of<TYPE>::block * x, int j) {
    if constexpr (type_of<TYPE>::n_values == 256) {
        return codes(*x, j);
    } else {
        return codes(x[j], 0);
    }
}

// a group of a row times one of N columns, n groups apart
template <int TYPE, int N>
inline void add(const typename type_of<TYPE>::block * w, const column_group<type_of<TYPE>::fmt.halves> * x, int n,
        __m256 (&total)[N][2]) {
    constexpr bool halves = type_of<TYPE>::fmt.halves;
    const row_scales s = scales_of_group<TYPE>(w);
    __m256 scales[N][2];
    POP_UNROLL
    for (int c = 0; c < N; c++) {
        POP_UNROLL
        for (int p = 0; p < (halves ? 2 : 1); p++) {
            scales[c][p] = _mm256_mul_ps(s.scale[p], _mm256_loadu_ps(x[c * n].scales + 8 * p));
            if (!is_signed<TYPE>()) {
                total[c][0] = _mm256_fmadd_ps(s.min[p], _mm256_loadu_ps(x[c * n].sums + 8 * p), total[c][0]);
            }
        }
    }
    POP_UNROLL
    for (int j = 0; j < GROUP; j++) {
        const __m256i q = codes_of<TYPE>(w, j);
        const __m256i lanes = halves ? _mm256_setr_epi32(j % 4 * 2, j % 4 * 2, j % 4 * 2, j % 4 * 2, j % 4 * 2 + 1, j % 4 * 2 + 1,
                                           j % 4 * 2 + 1, j % 4 * 2 + 1)
                                     : _mm256_set1_epi32(j);
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            const __m256i d = dots<is_signed<TYPE>()>(q, load(x[c * n].codes + 32 * j));
            const __m256  scale = _mm256_permutevar8x32_ps(scales[c][halves ? j / 4 : 0], lanes);
            total[c][j % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), scale, total[c][j % 2]);
        }
    }
}

// the last n blocks of a row of types that have blocks of 32, fewer than a group
template <int TYPE>
inline void add_last(const typename type_of<TYPE>::block * w, int n, const column_group<false> & x, __m256 (&total)[2]) {
    for (int b = 0; b < n; b++) {
        const typename type_of<TYPE>::block * same[8] = { w + b, w + b, w + b, w + b, w + b, w + b, w + b, w + b };
        const __m256 scale = scales_of_8(same);
        __m256 min = scale;
        if constexpr (type_of<TYPE>::fmt.mins) {
            min = mins_of_8(same);
        }
        const __m256i d = dots<is_signed<TYPE>()>(codes(w[b], 0), load(x.codes + 32 * b));
        total[b % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[b])), total[b % 2]);
        if (!is_signed<TYPE>()) {
            const __m256 first = _mm256_castsi256_ps(_mm256_setr_epi32(-1, 0, 0, 0, 0, 0, 0, 0));
            total[0] = _mm256_fmadd_ps(min, _mm256_and_ps(first, _mm256_set1_ps(x.sums[b])), total[0]);
        }
    }
}

inline float sum_of(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <int TYPE, int N> void multiply_rows(const gemm_share & s, int col, const uint8_t * tile) {
    using block = typename type_of<TYPE>::block;
    constexpr int group_blocks = 256 / type_of<TYPE>::n_values;
    const auto * columns = (const column_group<type_of<TYPE>::fmt.halves> *) tile;
    const int n = n_groups(s.n_blocks), n_whole = s.n_blocks / GROUP;
    for (int row = 0; row < s.n_rows; row++) {
        const block * x = (const block *) (s.weights + row * s.stride);
        __m256 total[N][2];
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            total[c][0] = total[c][1] = _mm256_setzero_ps();
        }
        for (int g = 0; g < n_whole; g++, x += group_blocks) {
            fetch_ahead(x, sizeof(block) * group_blocks);
            add<TYPE, N>(x, columns + g, n, total);
        }
        if constexpr (type_of<TYPE>::n_values == 32) {
            POP_UNROLL
            for (int c = 0; c < N; c++) {
                add_last<TYPE>(x, s.n_blocks % GROUP, columns[c * n + n_whole], total[c]);
            }
        }
        POP_UNROLL
        for (int c = 0; c < N; c++) {
            s.out[col + c][s.row + row] = sum_of(_mm256_add_ps(total[c][0], total[c][1]));
        }
    }
}

template <int TYPE> void multiply(const gemm_share & s) {
    static const gemv_function rows[GEMV_COLS] = {
        multiply_rows<TYPE, 1>, multiply_rows<TYPE, 2>, multiply_rows<TYPE, 3>, multiply_rows<TYPE, 4>, multiply_rows<TYPE, 5>,
    };
    multiply_columns(s, rows);
}

template <int TYPE> const gemm * kernel() {
    constexpr format f = type_of<TYPE>::fmt;
    constexpr size_t tile = GEMV_COLS * sizeof(column_group<f.halves>) / GROUP;
    static const gemm g = { GEMV_ROWS, GEMV_COLS, 0, tile, 0, pack_columns<quantise, f.halves, f.mins ? 1 : -f.bias>, multiply<TYPE> };
    return &g;
}

} // namespace

const gemm * gemv_256(int type) {
    switch (type) {
#define POP_CASE(TYPE) case TYPE: return kernel<TYPE>();
        POP_EACH_TYPE(POP_CASE)
#undef POP_CASE
        default: return nullptr;
    }
}

} // namespace pop

#else

const pop::gemm * pop::gemv_256(int) {
    return nullptr;
}

#endif
