// Unpacking of weights to panels with NEON: eight rows per group. Codes are signed: a type's bias is subtracted.
//
// One block (32 values k0 to k31 of each row) of a group. With dotprod, a vector holds four rows and four values of each:
//
//   step 0   [r0: k0-k3 ][r1: k0-k3 ][r2: k0-k3 ][r3: k0-k3 ]   [r4: k0-k3 ] ... [r7: k0-k3 ]     2 vectors
//   ...
//   step 7   [r0: k28-31] ...
//
// With i8mm, a vector holds two rows and eight values of each:
//
//   step 0   [r0: k0-k7       ][r1: k0-k7       ]   [r2][r3]   [r4][r5]   [r6][r7]                4 vectors
//   ...
//   step 3   [r0: k24-k31     ] ...
//
// Then f32 scales [r0][r1] ... [r7], and likewise the scales of the second half, the mins and the mins of the second half, as the type has
// them. A panel is GROUPS groups, each with all of its blocks.

#pragma once

#include "types.h"

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

namespace fast {
namespace {

constexpr int GROUP_ROWS = 8;
constexpr int GROUPS     = 2; // per panel
constexpr int ROWS       = GROUPS * GROUP_ROWS;

template <bool I8MM_, bool MINS_, bool HALVES_> struct panel_of {
    static constexpr bool I8MM   = I8MM_;
    static constexpr bool MINS   = MINS_;
    static constexpr int  HALVES = HALVES_ ? 2 : 1;
    static constexpr int  CODES  = 32 * GROUP_ROWS; // bytes
    static constexpr int  SCALES = HALVES * GROUP_ROWS * (int) sizeof(float);
    static constexpr int  BYTES  = CODES + (MINS ? 2 : 1) * SCALES; // per block of a group
};

// 32 codes of a row.
struct row_codes {
    int8x16_t v[2];
};

// Scales and mins of 256 values of a row.
struct row_scales {
    float scale[16], min[16];
};

inline uint32_t load_u32(const void * p) {
    uint32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

inline float to_f32(ggml_half x) {
    __fp16 h;
    memcpy(&h, &x, sizeof(h));
    return (float) h;
}

//
// codes
//

struct bytes {
    uint8x16_t v[2];
};

inline bytes load_bytes(const uint8_t * p) {
    return { { vld1q_u8(p), vld1q_u8(p + 16) } };
}

// Return N bits of each byte from bit FIRST on.
template <int FIRST, int N> inline uint8x16_t bits(uint8x16_t x) {
    if constexpr (FIRST > 0) {
        x = vshrq_n_u8(x, FIRST);
    }
    return FIRST + N == 8 ? x : vandq_u8(x, vdupq_n_u8((1 << N) - 1));
}

// The same from a bit that is known at run time only.
template <int N> inline bytes bits(bytes x, int first) {
    const int8x16_t  right = vdupq_n_s8((int8_t) -first);
    const uint8x16_t mask  = vdupq_n_u8((1 << N) - 1);
    return { { vandq_u8(vshlq_u8(x.v[0], right), mask), vandq_u8(vshlq_u8(x.v[1], right), mask) } };
}

// Put the lowest bits of `high` above the lowest N bits of `low`.
template <int N> inline bytes join(bytes low, bytes high) {
    return { { vsliq_n_u8(low.v[0], high.v[0], N), vsliq_n_u8(low.v[1], high.v[1], N) } };
}

// Return the low nibbles of 16 bytes, then the high ones.
inline bytes nibbles(const uint8_t * qs) {
    const uint8x16_t x = vld1q_u8(qs);
    return { { bits<0, 4>(x), bits<4, 4>(x) } };
}

// Move bit i of 32 to byte i: 0 or 1.
inline bytes each_bit(const uint8_t * qh) {
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t one = vdupq_n_u8(1);
    const uint8x16_t low = vcombine_u8(vdup_n_u8(qh[0]), vdup_n_u8(qh[1])), high = vcombine_u8(vdup_n_u8(qh[2]), vdup_n_u8(qh[3]));
    return { { vandq_u8(vtstq_u8(low, bit), one), vandq_u8(vtstq_u8(high, bit), one) } };
}

inline bytes look_up(const uint8_t * table, bytes x) {
    const uint8x16_t t = vld1q_u8(table);
    return { { vqtbl1q_u8(t, x.v[0]), vqtbl1q_u8(t, x.v[1]) } };
}

// Return the codes of values 32 * j to 32 * j + 31 of a block, with the bias.
inline bytes biased(const block_q4_0   & x, int) { return nibbles(x.qs); }
inline bytes biased(const block_q4_1   & x, int) { return nibbles(x.qs); }
inline bytes biased(const block_q5_0   & x, int) { return join<4>(nibbles(x.qs), each_bit(x.qh)); }
inline bytes biased(const block_q5_1   & x, int) { return join<4>(nibbles(x.qs), each_bit(x.qh)); }
inline bytes biased(const block_iq4_nl & x, int) { return look_up(iq4_codes, nibbles(x.qs)); }
inline bytes biased(const block_mxfp4  & x, int) { return look_up(mxfp4_codes, nibbles(x.qs)); }

inline bytes biased(const block_iq4_xs & x, int j) { return look_up(iq4_codes, nibbles(x.qs + 16 * j)); }

inline bytes biased(const block_q2_K & x, int j) { return bits<2>(load_bytes(x.qs + j / 4 * 32), j % 4 * 2); }

inline bytes biased(const block_q3_K & x, int j) {
    return join<2>(bits<2>(load_bytes(x.qs + j / 4 * 32), j % 4 * 2), bits<1>(load_bytes(x.hmask), j));
}

inline bytes biased(const block_q4_K & x, int j) { return bits<4>(load_bytes(x.qs + j / 2 * 32), j % 2 * 4); }

inline bytes biased(const block_q5_K & x, int j) {
    return join<4>(bits<4>(load_bytes(x.qs + j / 2 * 32), j % 2 * 4), bits<1>(load_bytes(x.qh), j));
}

inline bytes biased(const block_q6_K & x, int j) {
    const bytes low = load_bytes(x.ql + j / 4 * 64 + j % 2 * 32);
    return join<4>(bits<4>(low, j % 4 / 2 * 4), bits<2>(load_bytes(x.qh + j / 4 * 32), j % 4 * 2));
}

template <int TYPE> inline row_codes codes(const typename type_of<TYPE>::block & x, int j) {
    if constexpr (TYPE == GGML_TYPE_Q8_0) {
        return { { vld1q_s8(x.qs), vld1q_s8(x.qs + 16) } };
    } else {
        const bytes      b    = biased(x, j);
        const uint8x16_t bias = vdupq_n_u8(type_of<TYPE>::fmt.bias);
        return { { vreinterpretq_s8_u8(vsubq_u8(b.v[0], bias)), vreinterpretq_s8_u8(vsubq_u8(b.v[1], bias)) } };
    }
}

//
// scales and mins
//

inline void times_s16(float d, int16x8_t x, float * out) {
    vst1q_f32(out, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), d));
    vst1q_f32(out + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(x))), d));
}

inline void times_u8(float d, uint64_t x, float * out) {
    times_s16(d, vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(x))), out);
}

inline uint64_t join(uint32_t low, uint32_t high) {
    return low | (uint64_t) high << 32;
}

// Split 12 bytes of Q4_K and Q5_K into 8 scales and 8 mins of 6 bits.
template <typename B> inline void scales_q45_K(const B & x, row_scales & to) {
    const uint32_t a = load_u32(x.scales), b = load_u32(x.scales + 4), c = load_u32(x.scales + 8);
    times_u8(to_f32(x.d), join(a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)), to.scale);
    times_u8(-to_f32(x.dmin), join(b & 0x3f3f3f3f, (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)), to.min);
}

inline void scales_of(const block_q4_K & x, row_scales & to) { scales_q45_K(x, to); }
inline void scales_of(const block_q5_K & x, row_scales & to) { scales_q45_K(x, to); }

inline void scales_of(const block_q2_K & x, row_scales & to) {
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0f;
    uint64_t s[2];
    memcpy(s, x.scales, sizeof(s));
    for (int i = 0; i < 2; i++) {
        times_u8(to_f32(x.d), s[i] & nibble, to.scale + 8 * i);
        times_u8(-to_f32(x.dmin), s[i] >> 4 & nibble, to.min + 8 * i);
    }
}

inline void scales_of(const block_q3_K & x, row_scales & to) {
    const uint32_t  a = load_u32(x.scales), b = load_u32(x.scales + 4), c = load_u32(x.scales + 8);
    const uint32_t  nibble = 0x0f0f0f0f, two = 0x30303030;
    const uint8x8_t bias = vdup_n_u8(32);
    const uint64_t  low  = join((a & nibble) | (c << 4 & two), (b & nibble) | (c << 2 & two));
    const uint64_t  high = join((a >> 4 & nibble) | (c & two), (b >> 4 & nibble) | (c >> 2 & two));
    times_s16(to_f32(x.d), vreinterpretq_s16_u16(vsubl_u8(vcreate_u8(low), bias)), to.scale);
    times_s16(to_f32(x.d), vreinterpretq_s16_u16(vsubl_u8(vcreate_u8(high), bias)), to.scale + 8);
}

inline void scales_of(const block_q6_K & x, row_scales & to) {
    times_s16(to_f32(x.d), vmovl_s8(vld1_s8(x.scales)), to.scale);
    times_s16(to_f32(x.d), vmovl_s8(vld1_s8(x.scales + 8)), to.scale + 8);
}

inline void scales_of(const block_iq4_xs & x, row_scales & to) {
    const float d = to_f32(x.d);
    for (int j = 0; j < 8; j++) {
        const int low = x.scales_l[j / 2] >> j % 2 * 4 & 15, high = x.scales_h >> 2 * j & 3;
        to.scale[j] = d * (float) ((low | high << 4) - 32);
    }
}

template <typename B> inline float scale_of(const B & x) {
    return to_f32(x.d);
}

// Return 2^(e - 128). Below e = 2 the result is subnormal.
inline float scale_of(const block_mxfp4 & x) {
    const uint32_t bits = x.e < 2 ? 0x00200000u << x.e : (uint32_t) (x.e - 1) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

//
// panels
//

// Transpose 4 vectors of 4 dwords.
inline void transpose(int32x4_t (&v)[4]) {
    const int32x4_t a = vtrn1q_s32(v[0], v[1]), b = vtrn2q_s32(v[0], v[1]), c = vtrn1q_s32(v[2], v[3]), d = vtrn2q_s32(v[2], v[3]);
    const auto first  = [](int32x4_t x, int32x4_t y) { return vreinterpretq_s32_s64(vtrn1q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y))); };
    const auto second = [](int32x4_t x, int32x4_t y) { return vreinterpretq_s32_s64(vtrn2q_s64(vreinterpretq_s64_s32(x), vreinterpretq_s64_s32(y))); };
    v[0] = first(a, c);
    v[1] = first(b, d);
    v[2] = second(a, c);
    v[3] = second(b, d);
}

// Store 16 codes, half of a block, of each of a group's rows.
template <typename P> inline void store_half(int8_t * group, int half, const row_codes (&x)[GROUP_ROWS]) {
    if constexpr (P::I8MM) {
        FAST_UNROLL
        for (int r = 0; r < GROUP_ROWS; r += 2) {
            const int64x2_t a = vreinterpretq_s64_s8(x[r].v[half]), b = vreinterpretq_s64_s8(x[r + 1].v[half]);
            vst1q_s8(group + (2 * half + 0) * 64 + r * 8, vreinterpretq_s8_s64(vzip1q_s64(a, b)));
            vst1q_s8(group + (2 * half + 1) * 64 + r * 8, vreinterpretq_s8_s64(vzip2q_s64(a, b)));
        }
    } else {
        FAST_UNROLL
        for (int r = 0; r < GROUP_ROWS; r += 4) {
            int32x4_t v[4];
            FAST_UNROLL
            for (int i = 0; i < 4; i++) {
                v[i] = vreinterpretq_s32_s8(x[r + i].v[half]);
            }
            transpose(v);
            FAST_UNROLL
            for (int i = 0; i < 4; i++) {
                vst1q_s8(group + (4 * half + i) * 32 + r * 4, vreinterpretq_s8_s32(v[i]));
            }
        }
    }
}

template <int TYPE, typename P> inline void store_codes(uint8_t * group, const typename type_of<TYPE>::block * const * x, int j) {
    row_codes c[GROUP_ROWS];
    FAST_UNROLL
    for (int r = 0; r < GROUP_ROWS; r++) {
        c[r] = codes<TYPE>(*x[r], j);
    }
    store_half<P>((int8_t *) group, 0, c);
    store_half<P>((int8_t *) group, 1, c);
}

// Unpack one block of the file of each of a group's rows.
template <int TYPE, typename P> void unpack_rows(uint8_t * group, const typename type_of<TYPE>::block * const * x) {
    constexpr int n = type_of<TYPE>::n_values / 32; // blocks of 32 values
    for (int j = 0; j < n; j++) {
        store_codes<TYPE, P>(group + j * P::BYTES, x, j);
    }
    for (int r = 0; r < GROUP_ROWS; r++) {
        row_scales s;
        if constexpr (n == 1) {
            s.scale[0] = scale_of(*x[r]);
            if constexpr (P::MINS) {
                s.min[0] = to_f32(x[r]->m);
            }
        } else {
            scales_of(*x[r], s);
        }
        for (int i = 0; i < n * P::HALVES; i++) {
            float * to = (float *) (group + i / P::HALVES * P::BYTES + P::CODES) + i % P::HALVES * GROUP_ROWS + r;
            to[0] = s.scale[i];
            if constexpr (P::MINS) {
                to[P::HALVES * GROUP_ROWS] = s.min[i];
            }
        }
    }
}

// Unpack n_blocks blocks of n_rows rows, starting at block `first`, to groups that are `stride_to` bytes apart. The last row replaces missing
// rows.
template <int TYPE, typename P>
void unpack(const char * weights, size_t stride, int n_rows, int first, int n_blocks, uint8_t * panel, size_t stride_to) {
    using B = typename type_of<TYPE>::block;
    constexpr int step = type_of<TYPE>::n_values / 32;

    for (int g = 0; g * GROUP_ROWS < n_rows; g++) {
        uint8_t * out = panel + g * stride_to;
        const B * x[GROUP_ROWS];
        for (int r = 0; r < GROUP_ROWS; r++) {
            x[r] = (const B *) (weights + std::min(g * GROUP_ROWS + r, n_rows - 1) * stride) + first / step;
        }
        for (int b = 0; b < n_blocks; b += step, out += step * P::BYTES) {
            unpack_rows<TYPE, P>(out, x);
            for (int r = 0; r < GROUP_ROWS; r++) {
                x[r]++;
            }
        }
    }
}

} // namespace
} // namespace fast
