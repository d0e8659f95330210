// Products with few columns by 256-bit vectors: AVX-VNNI if available, else AVX2. A vector holds 32 codes of a row.

#include "gemm.h"

#include "ggml-cpu-impl.h" // defines __FMA__ and __F16C__, which MSVC does not

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "gemv.h"
#include "quantise-256.h"
#include "unpack-256.h"

namespace fast {
namespace {

// Without VNNI, 8-bit codes are multiplied as signed numbers: products of unsigned ones would overflow 16-bit sums.
template <int TYPE> constexpr bool is_signed() {
    return !VNNI && type_of<TYPE>::fmt.bias == 128;
}

// Return eight sums of four products each, in order.
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

// Return a group's scales and mins. For types with a bias, the scales take the place of the mins.
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

struct avx2_vectors {
    using floats = __m256;

    static floats zero() { return _mm256_setzero_ps(); }

    static float sum_of(const floats (&total)[2]) {
        const __m256 x = _mm256_add_ps(total[0], total[1]);
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    // Multiply a group of a row with the groups of N columns, which are n groups apart.
    template <int TYPE, int N>
    static void add(const typename type_of<TYPE>::block * w, const column_group<type_of<TYPE>::fmt.halves> * x, int n,
            floats (&total)[N][2]) {
        constexpr bool halves = type_of<TYPE>::fmt.halves;
        const row_scales s = scales_of_group<TYPE>(w);
        floats scales[N][2];
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            FAST_UNROLL
            for (int p = 0; p < (halves ? 2 : 1); p++) {
                scales[c][p] = _mm256_mul_ps(s.scale[p], _mm256_loadu_ps(x[c * n].scales + 8 * p));
                if (!is_signed<TYPE>()) {
                    total[c][0] = _mm256_fmadd_ps(s.min[p], _mm256_loadu_ps(x[c * n].sums + 8 * p), total[c][0]);
                }
            }
        }
        FAST_UNROLL
        for (int j = 0; j < GROUP; j++) {
            const __m256i q = codes_of<TYPE>(w, j);
            const int k = j % 4 * 2; // index of the first half's scale
            const __m256i lanes = halves ? _mm256_setr_epi32(k, k, k, k, k + 1, k + 1, k + 1, k + 1) : _mm256_set1_epi32(j);
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                const __m256i d    = dots<is_signed<TYPE>()>(q, load(x[c * n].codes + 32 * j));
                const floats  lane_scales = _mm256_permutevar8x32_ps(scales[c][halves ? j / 4 : 0], lanes);
                total[c][j % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), lane_scales, total[c][j % 2]);
            }
        }
    }

    // Multiply the last n blocks of a row, for types with blocks of 32: less than a group.
    template <int TYPE, int N>
    static void add_last(const typename type_of<TYPE>::block * w, int n, const column_group<false> * columns, int step, floats (&total)[N][2]) {
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            add_blocks<TYPE>(w, n, columns[c * step], total[c]);
        }
    }

    template <int TYPE>
    static void add_blocks(const typename type_of<TYPE>::block * w, int n, const column_group<false> & x, floats (&total)[2]) {
        for (int b = 0; b < n; b++) {
            const typename type_of<TYPE>::block * same[8] = { w + b, w + b, w + b, w + b, w + b, w + b, w + b, w + b };
            const floats scale = scales_of_8(same);
            floats min = scale;
            if constexpr (type_of<TYPE>::fmt.mins) {
                min = mins_of_8(same);
            }
            const __m256i d = dots<is_signed<TYPE>()>(codes(w[b], 0), load(x.codes + 32 * b));
            total[b % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d), _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[b])), total[b % 2]);
            if (!is_signed<TYPE>()) {
                const floats first = _mm256_castsi256_ps(_mm256_setr_epi32(-1, 0, 0, 0, 0, 0, 0, 0));
                total[0] = _mm256_fmadd_ps(min, _mm256_and_ps(first, _mm256_set1_ps(x.sums[b])), total[0]);
            }
        }
    }
};

} // namespace

const gemm * gemv_256(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return separate_rows_kernel<avx2_vectors, TYPE, quantise>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
#undef FAST_CASE
        default: return nullptr;
    }
}

} // namespace fast

#else

const fast::gemm * fast::gemv_256(int) {
    return nullptr;
}

#endif
