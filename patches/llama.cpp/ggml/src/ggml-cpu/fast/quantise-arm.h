// Quantization of activations to 8 bits with one scale per 32 values, by NEON.

#pragma once

#include "types.h"

#include <arm_neon.h>

#include <cstdint>

namespace fast {
namespace {

struct quantised {
    float scale;
    int   sums[2]; // sums of the first 16 codes and the last 16
};

// Round 32 values to codes and return their scale.
inline float quantise_to_8_bits(const float * x, int8x16_t (&codes)[2]) {
    float32x4_t v[8];
    int32x4_t   m = vdupq_n_s32(0); // magnitudes compared as integers: NaN is the largest, so it survives
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        v[i] = vld1q_f32(x + 4 * i);
        m    = vmaxq_s32(m, vreinterpretq_s32_f32(vabsq_f32(v[i])));
    }
    const float max   = vgetq_lane_f32(vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32(m))), 0);
    const float scale = max > 1e-30f ? 127.0f / max : 0.0f;
    int16x8_t n[4];
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i], scale)), high = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i + 1], scale));
        n[i] = vcombine_s16(vqmovn_s32(low), vqmovn_s32(high));
    }
    codes[0] = vcombine_s8(vqmovn_s16(n[0]), vqmovn_s16(n[1]));
    codes[1] = vcombine_s8(vqmovn_s16(n[2]), vqmovn_s16(n[3]));
    return max / 127.0f;
}

// Quantize 32 values and write their codes.
inline quantised quantise(const float * x, int8_t * to) {
    int8x16_t   codes[2];
    const float scale = quantise_to_8_bits(x, codes);
    vst1q_s8(to, codes[0]);
    vst1q_s8(to + 16, codes[1]);
    return { scale, { vaddlvq_s8(codes[0]), vaddlvq_s8(codes[1]) } };
}

} // namespace
} // namespace fast
