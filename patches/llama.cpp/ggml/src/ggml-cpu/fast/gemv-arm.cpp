// Products with few columns on ARM64, by NEON's dot products: a vector holds 16 codes of a row.

#include "gemm.h"

#if defined(__ARM_FEATURE_DOTPROD) && defined(__aarch64__)

#include "gemv.h"
#include "quantise-arm.h"
#include "unpack-arm.h"

namespace fast {
namespace {

struct dotprod_vectors {
    using floats = float32x4_t;

    static floats zero() { return vdupq_n_f32(0.0f); }

    static float sum_of(const floats (&total)[2]) { return vaddvq_f32(vaddq_f32(total[0], total[1])); }

    // Multiply block j of a group with the same block of a column.
    template <int TYPE>
    static FAST_INLINE void add_codes(const row_codes & w, const int8_t * x, const float * scales, floats & total) {
        const int8x16_t low = vld1q_s8(x), high = vld1q_s8(x + 16);
        const int32x4_t none = vdupq_n_s32(0);
        if constexpr (type_of<TYPE>::fmt.halves) {
            total = vfmaq_n_f32(total, vcvtq_f32_s32(vdotq_s32(none, w.v[0], low)), scales[0]);
            total = vfmaq_n_f32(total, vcvtq_f32_s32(vdotq_s32(none, w.v[1], high)), scales[1]);
        } else {
            total = vfmaq_n_f32(total, vcvtq_f32_s32(vdotq_s32(vdotq_s32(none, w.v[0], low), w.v[1], high)), scales[0]);
        }
    }

    // Multiply a group of a row with the groups of N columns, which are n groups apart.
    template <int TYPE, int N>
    static void add(const typename type_of<TYPE>::block * w, const column_group<type_of<TYPE>::fmt.halves> * x, int n,
            floats (&total)[N][2]) {
        using T = type_of<TYPE>;
        constexpr int parts = T::fmt.halves ? 2 : 1;
        row_scales s;
        if constexpr (T::n_values == 256) {
            scales_of(*w, s);
        } else {
            for (int j = 0; j < GROUP; j++) {
                s.scale[j] = scale_of(w[j]);
                if constexpr (T::fmt.mins) {
                    s.min[j] = to_f32(w[j].m);
                }
            }
        }
        float scales[N][parts * GROUP];
        FAST_UNROLL
        for (int c = 0; c < N; c++) {
            FAST_UNROLL
            for (int i = 0; i < parts * GROUP; i += 4) {
                vst1q_f32(scales[c] + i, vmulq_f32(vld1q_f32(s.scale + i), vld1q_f32(x[c * n].scales + i)));
                if constexpr (T::fmt.mins) {
                    total[c][0] = vfmaq_f32(total[c][0], vld1q_f32(s.min + i), vld1q_f32(x[c * n].sums + i));
                }
            }
        }
        FAST_UNROLL
        for (int j = 0; j < GROUP; j++) {
            const row_codes q = T::n_values == 256 ? codes<TYPE>(w[0], j) : codes<TYPE>(w[T::n_values == 256 ? 0 : j], 0);
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                add_codes<TYPE>(q, x[c * n].codes + 32 * j, scales[c] + parts * j, total[c][j % 2]);
            }
        }
    }

    // Multiply the last n blocks of a row, for types with blocks of 32: less than a group.
    template <int TYPE, int N>
    static void add_last(const typename type_of<TYPE>::block * w, int n, const column_group<false> * columns, int step, floats (&total)[N][2]) {
        for (int b = 0; b < n; b++) {
            const row_codes q     = codes<TYPE>(w[b], 0);
            const float     scale = scale_of(w[b]);
            FAST_UNROLL
            for (int c = 0; c < N; c++) {
                const column_group<false> & x = columns[c * step];
                const float product = scale * x.scales[b];
                add_codes<TYPE>(q, x.codes + 32 * b, &product, total[c][b % 2]);
                if constexpr (type_of<TYPE>::fmt.mins) {
                    total[c][0] = vfmaq_f32(total[c][0], vsetq_lane_f32(to_f32(w[b].m), zero(), 0), vdupq_n_f32(x.sums[b]));
                }
            }
        }
    }
};

} // namespace

const gemm * gemv_dotprod(int type) {
    switch (type) {
#define FAST_CASE(TYPE) case TYPE: return separate_rows_kernel<dotprod_vectors, TYPE, quantise>();
        FAST_FOR_EACH_TYPE(FAST_CASE)
#undef FAST_CASE
        default: return nullptr;
    }
}

} // namespace fast

#else

const fast::gemm * fast::gemv_dotprod(int) {
    return nullptr;
}

#endif
