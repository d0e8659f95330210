// Pairs of NEON vectors for attention and row operations: the eight lanes of vectors-256.h, since attention keeps six rows in one vector.
//
// The multiply-add instructions (smlal, smlal2) take the low or the high four of eight 16-bit integers. So interleave() and transpose() put
// the first halves of four pairs before their second halves.

#pragma once

#include "attention-tile.h"
#include "types.h"

#include <arm_neon.h>
#include <math.h>

namespace fast {

struct floats {
    float32x4_t v[2];
};

// Eight 32-bit integers, or 16 of 16 bits.
struct ints {
    int32x4_t v[2];
};

using sums = ints;

constexpr int LANES   = 8;
constexpr int COLUMNS = 2; // pairs of vectors of a register tile next to its six rows: 24 sums in 32 registers

// Call f on the first vectors of each operand, and on the second ones.
template <typename R, typename F, typename... T> static FAST_INLINE R each(const F & f, const T &... x) {
    return { { f(x.v[0]...), f(x.v[1]...) } };
}

static FAST_INLINE int16x8_t as_16_bits(int32x4_t x) { return vreinterpretq_s16_s32(x); }
static FAST_INLINE int32x4_t as_32_bits(int16x8_t x) { return vreinterpretq_s32_s16(x); }

// Add products of pairs: a of interleave() or transpose(), b a pair of splat().
static FAST_INLINE sums dot(sums s, ints a, ints b) {
    return each<sums>([](int32x4_t sum, int32x4_t x, int32x4_t pair) {
        sum = vmlal_laneq_s16(sum, vget_low_s16(as_16_bits(x)), as_16_bits(pair), 0);
        return vmlal_high_laneq_s16(sum, as_16_bits(x), as_16_bits(pair), 1);
    }, s, a, b);
}

static FAST_INLINE sums   zero_sums() { return { { vdupq_n_s32(0), vdupq_n_s32(0) } }; }
static FAST_INLINE floats to_floats(sums s) { return { { vcvtq_f32_s32(s.v[0]), vcvtq_f32_s32(s.v[1]) } }; }

static FAST_INLINE floats load(const float * p) { return { { vld1q_f32(p), vld1q_f32(p + 4) } }; }
static FAST_INLINE ints   load(const int16_t * p) { return { { as_32_bits(vld1q_s16(p)), as_32_bits(vld1q_s16(p + 8)) } }; }
static FAST_INLINE void   store(float * p, floats x) { vst1q_f32(p, x.v[0]); vst1q_f32(p + 4, x.v[1]); }
static FAST_INLINE void   store(int16_t * p, ints x) { vst1q_s16(p, as_16_bits(x.v[0])); vst1q_s16(p + 8, as_16_bits(x.v[1])); }
static FAST_INLINE floats splat(float x) { return { { vdupq_n_f32(x), vdupq_n_f32(x) } }; }
static FAST_INLINE ints   splat(int32_t x) { return { { vdupq_n_s32(x), vdupq_n_s32(x) } }; }

static FAST_INLINE floats add(floats a, floats b) { return { { vaddq_f32(a.v[0], b.v[0]), vaddq_f32(a.v[1], b.v[1]) } }; }
static FAST_INLINE floats sub(floats a, floats b) { return { { vsubq_f32(a.v[0], b.v[0]), vsubq_f32(a.v[1], b.v[1]) } }; }
static FAST_INLINE floats mul(floats a, floats b) { return { { vmulq_f32(a.v[0], b.v[0]), vmulq_f32(a.v[1], b.v[1]) } }; }
static FAST_INLINE floats div(floats a, floats b) { return { { vdivq_f32(a.v[0], b.v[0]), vdivq_f32(a.v[1], b.v[1]) } }; }
static FAST_INLINE floats abs(floats a) { return { { vabsq_f32(a.v[0]), vabsq_f32(a.v[1]) } }; }

// The result is NaN if an operand is NaN.
static FAST_INLINE floats max(floats a, floats b) { return { { vmaxq_f32(a.v[0], b.v[0]), vmaxq_f32(a.v[1], b.v[1]) } }; }
static FAST_INLINE floats min(floats a, floats b) { return { { vminq_f32(a.v[0], b.v[0]), vminq_f32(a.v[1], b.v[1]) } }; }

static FAST_INLINE floats fma(floats a, floats b, floats c) {
    return { { vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]) } };
}

static FAST_INLINE float max_of(floats a) { return vmaxvq_f32(vmaxq_f32(a.v[0], a.v[1])); }
static FAST_INLINE float sum_of(floats a) { return vaddvq_f32(vaddq_f32(a.v[0], a.v[1])); }

static FAST_INLINE ints round(floats x) { return { { vcvtnq_s32_f32(x.v[0]), vcvtnq_s32_f32(x.v[1]) } }; }

static FAST_INLINE floats bits_as_number(floats x) {
    return each<floats>([](float32x4_t a) { return vcvtq_f32_s32(vreinterpretq_s32_f32(a)); }, x);
}

static FAST_INLINE floats low_bits_as_exponent(floats x) {
    return each<floats>([](float32x4_t a) { return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(a), 23)); }, x);
}

// Narrow 32-bit integers to 16 bits. Each vector holds four of a, then four of b.
static FAST_INLINE ints narrow(ints a, ints b) {
    return each<ints>([](int32x4_t x, int32x4_t y) { return as_32_bits(vcombine_s16(vqmovn_s32(x), vqmovn_s32(y))); }, a, b);
}

// Pair the low 16 bits of a and of b.
static FAST_INLINE ints interleave(ints a, ints b) {
    return each<ints>([](int32x4_t x, int32x4_t y) { return as_32_bits(vcombine_s16(vmovn_s32(x), vmovn_s32(y))); }, a, b);
}

// Return x, or -infinity where the mask is -infinity, even if x is NaN.
static FAST_INLINE floats hide(floats x, floats mask) {
    return each<floats>([](float32x4_t a, float32x4_t m) {
        const float32x4_t hidden = vdupq_n_f32(-INFINITY);
        return vbslq_f32(vceqq_f32(m, hidden), hidden, a);
    }, x, mask);
}

static FAST_INLINE floats load_halves(const uint16_t * p) {
    const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16(p));
    return { { vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x) } };
}

// Load 8 values of a row from dim d on.
template <ggml_type TYPE> static FAST_INLINE floats load_row(const char * row, int d) {
    if constexpr (TYPE == GGML_TYPE_F32) {
        return load((const float *) row + d);
    } else if constexpr (TYPE == GGML_TYPE_F16) {
        return load_halves((const uint16_t *) row + d);
    } else if constexpr (TYPE == GGML_TYPE_BF16) {
        const uint16x8_t x = vld1q_u16((const uint16_t *) row + d);
        return { { vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(x), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(x, 16)) } };
    } else {
        const block_q8_0 & b = ((const block_q8_0 *) row)[d / QK8_0];
        const int16x8_t    x = vmovl_s8(vld1_s8(b.qs + d % QK8_0));
        const float        scale = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(b.d))), 0);
        return { { vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), scale), vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(x)), scale) } };
    }
}

// Transpose four vectors of four dwords from v[at] on.
static FAST_INLINE void transpose_four(const ints v[8], int at, int half, int32x4_t to[4]) {
    const int32x4_t a = v[at].v[half], b = v[at + 1].v[half], c = v[at + 2].v[half], d = v[at + 3].v[half];
    const int64x2_t even = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), odd = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t even_2 = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), odd_2 = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    to[0] = vreinterpretq_s32_s64(vtrn1q_s64(even, even_2));
    to[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd, odd_2));
    to[2] = vreinterpretq_s32_s64(vtrn2q_s64(even, even_2));
    to[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd, odd_2));
}

// Put the low halves of four dwords before their high halves.
static FAST_INLINE int32x4_t split_pairs(int32x4_t x) {
    static const uint8_t order[16] = { 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15 };
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(x), vld1q_u8(order)));
}

// Transpose 8 vectors of 8 dwords, each a pair of 16-bit integers.
static FAST_INLINE void transpose(ints v[8]) {
    int32x4_t to[2][2][4]; // [first or last four inputs][first or last four outputs]
    FAST_UNROLL
    for (int at = 0; at < 2; at++) {
        FAST_UNROLL
        for (int half = 0; half < 2; half++) {
            transpose_four(v, 4 * at, half, to[at][half]);
        }
    }
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        v[i] = { { split_pairs(to[0][i / 4][i % 4]), split_pairs(to[1][i / 4][i % 4]) } };
    }
}

// Return the larger of two values that are not negative. Compared as integers, NaN is the largest, so it survives.
static FAST_INLINE floats max_magnitude(floats a, floats b) {
    return each<floats>([](float32x4_t x, float32x4_t y) {
        return vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(x), vreinterpretq_s32_f32(y)));
    }, a, b);
}

// Return the maximum of each of LANES vectors of magnitudes. NaN is the largest.
static FAST_INLINE floats max_of_each(const floats v[LANES]) {
    int32x4_t m[LANES];
    FAST_UNROLL
    for (int i = 0; i < LANES; i++) {
        m[i] = vmaxq_s32(vreinterpretq_s32_f32(v[i].v[0]), vreinterpretq_s32_f32(v[i].v[1]));
    }
    const int32x4_t first = vpmaxq_s32(vpmaxq_s32(m[0], m[1]), vpmaxq_s32(m[2], m[3]));
    const int32x4_t last  = vpmaxq_s32(vpmaxq_s32(m[4], m[5]), vpmaxq_s32(m[6], m[7]));
    return { { vreinterpretq_f32_s32(first), vreinterpretq_f32_s32(last) } };
}

// Return the maxima of six vectors in the first six lanes. The other lanes repeat some of them.
static FAST_INLINE floats max_of_rows(const floats v[TILE_ROWS]) {
    float32x4_t m[TILE_ROWS];
    FAST_UNROLL
    for (int i = 0; i < TILE_ROWS; i++) {
        m[i] = vmaxq_f32(v[i].v[0], v[i].v[1]);
    }
    const float32x4_t last = vpmaxq_f32(m[4], m[5]);
    return { { vpmaxq_f32(vpmaxq_f32(m[0], m[1]), vpmaxq_f32(m[2], m[3])), vpmaxq_f32(last, last) } };
}

// Classify the mask of 64 cells.
static inline mask_state state_of_mask(const uint16_t * mask) {
    uint16x8_t any = vdupq_n_u16(0), all = vdupq_n_u16(0xffff);
    FAST_UNROLL
    for (int i = 0; i < TILE_CELLS; i += 8) {
        const uint16x8_t x = vld1q_u16(mask + i);
        any                = vorrq_u16(any, x);
        all                = vandq_u16(all, vceqq_u16(x, vdupq_n_u16(0xfc00)));
    }
    return vmaxvq_u16(any) == 0 ? MASK_NONE : vminvq_u16(all) == 0xffff ? MASK_ALL : MASK_SOME;
}

} // namespace fast
