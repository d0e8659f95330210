// The types and layouts of weights: value = scale * (code - bias), or scale * code + min.

#pragma once

#include "ggml.h"
#include "gemm.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <stdint.h>

namespace pop {

struct format {
    int  bias;   // is subtracted from a code, where there are no mins
    bool mins;   // a min beside each scale
    bool halves; // a scale for each 16 along K, not for 32
};

// eight interleaved rows, as repack.h has them, and sixteen, as pack_B of amx/mmq.cpp makes them
template <typename D, int CODES> struct rows_32_x8 { D d[8]; uint8_t qs[8 * CODES]; };
template <int SCALES, int CODES> struct rows_256_x8 { ggml_half d[8], dmin[8]; uint8_t scales[8 * SCALES], qs[8 * CODES]; };

struct rows_q4_0_x16   { uint8_t qs[256]; ggml_half d[16]; };
struct rows_q4_1_x16   { uint8_t qs[256]; ggml_half d[16], m[16]; };
struct rows_q8_0_x16   { int8_t  qs[512]; ggml_half d[16]; int32_t sums[16]; };
struct rows_q4_K_x16   { uint8_t qs[2048], scales[128], mins[128]; ggml_half d[16], dmin[16]; };
struct rows_q5_K_x16   { uint8_t qs[2048], qh[512], scales[128], mins[128]; ggml_half d[16], dmin[16]; };
struct rows_q6_K_x16   { uint8_t qs[2048], qh[1024]; int8_t scales[256]; ggml_half d[16]; };
struct rows_iq4_xs_x16 { uint8_t qs[2048]; int8_t scales[128]; ggml_half d[16]; };

template <int LAYOUT> struct type_of;

#define POP_TYPE(LAYOUT, BLOCK, N, BIAS, MINS, HALVES)            \
    template <> struct type_of<LAYOUT> {                          \
        using block = BLOCK;                                      \
        static constexpr int    n_values = N; /* of a block */    \
        static constexpr format fmt      = { BIAS, MINS, HALVES }; \
    };

POP_TYPE(GGML_TYPE_Q4_0,   block_q4_0,    32,   8, false, false)
POP_TYPE(GGML_TYPE_Q4_1,   block_q4_1,    32,   0, true,  false)
POP_TYPE(GGML_TYPE_Q5_0,   block_q5_0,    32,  16, false, false)
POP_TYPE(GGML_TYPE_Q5_1,   block_q5_1,    32,   0, true,  false)
POP_TYPE(GGML_TYPE_Q8_0,   block_q8_0,    32, 128, false, false)
POP_TYPE(GGML_TYPE_IQ4_NL, block_iq4_nl,  32, 128, false, false)
POP_TYPE(GGML_TYPE_MXFP4,  block_mxfp4,   32,  12, false, false)
POP_TYPE(GGML_TYPE_Q2_K,   block_q2_K,   256,   0, true,  true)
POP_TYPE(GGML_TYPE_Q3_K,   block_q3_K,   256,   4, false, true)
POP_TYPE(GGML_TYPE_Q4_K,   block_q4_K,   256,   0, true,  false)
POP_TYPE(GGML_TYPE_Q5_K,   block_q5_K,   256,   0, true,  false)
POP_TYPE(GGML_TYPE_Q6_K,   block_q6_K,   256,  32, false, true)
POP_TYPE(GGML_TYPE_IQ4_XS, block_iq4_xs, 256, 128, false, false)

// no codes, and no panels of them
struct block_bf16 { ggml_bf16_t values[32]; };
POP_TYPE(GGML_TYPE_BF16, block_bf16, 32, 0, false, false)

using rows_q4_0_x8  = rows_32_x8<ggml_half, 16>;
using rows_mxfp4_x8 = rows_32_x8<uint8_t, 16>;
using rows_q2_K_x8  = rows_256_x8<16, 64>;
using rows_q4_K_x8  = rows_256_x8<12, 128>;

POP_TYPE(X8 + GGML_TYPE_Q4_0,   rows_q4_0_x8,   32,   8, false, false)
POP_TYPE(X8 + GGML_TYPE_IQ4_NL, rows_q4_0_x8,   32, 128, false, false)
POP_TYPE(X8 + GGML_TYPE_MXFP4,  rows_mxfp4_x8,  32,  12, false, false)
POP_TYPE(X8 + GGML_TYPE_Q2_K,   rows_q2_K_x8,  256,   0, true,  true)
POP_TYPE(X8 + GGML_TYPE_Q4_K,   rows_q4_K_x8,  256,   0, true,  false)

POP_TYPE(X16 + GGML_TYPE_Q4_0,   rows_q4_0_x16,   32,   8, false, false)
POP_TYPE(X16 + GGML_TYPE_Q4_1,   rows_q4_1_x16,   32,   0, true,  false)
POP_TYPE(X16 + GGML_TYPE_Q8_0,   rows_q8_0_x16,   32, 128, false, false)
POP_TYPE(X16 + GGML_TYPE_Q4_K,   rows_q4_K_x16,  256,   0, true,  false)
POP_TYPE(X16 + GGML_TYPE_Q5_K,   rows_q5_K_x16,  256,   0, true,  false)
POP_TYPE(X16 + GGML_TYPE_Q6_K,   rows_q6_K_x16,  256,  32, false, true)
POP_TYPE(X16 + GGML_TYPE_IQ4_XS, rows_iq4_xs_x16, 256, 128, false, false)

#undef POP_TYPE

// calls MACRO(layout) for each of them, those of AMX buffers apart
#define POP_EACH_LAYOUT(MACRO)                                                                                        \
    MACRO(GGML_TYPE_Q4_0) MACRO(GGML_TYPE_Q4_1) MACRO(GGML_TYPE_Q5_0) MACRO(GGML_TYPE_Q5_1) MACRO(GGML_TYPE_Q8_0)      \
    MACRO(GGML_TYPE_IQ4_NL) MACRO(GGML_TYPE_MXFP4) MACRO(GGML_TYPE_IQ4_XS)                                            \
    MACRO(GGML_TYPE_Q2_K) MACRO(GGML_TYPE_Q3_K) MACRO(GGML_TYPE_Q4_K) MACRO(GGML_TYPE_Q5_K) MACRO(GGML_TYPE_Q6_K)      \
    MACRO(X8 + GGML_TYPE_Q4_0) MACRO(X8 + GGML_TYPE_IQ4_NL) MACRO(X8 + GGML_TYPE_MXFP4)                               \
    MACRO(X8 + GGML_TYPE_Q2_K) MACRO(X8 + GGML_TYPE_Q4_K)

#define POP_EACH_X16(MACRO)                                                                     \
    MACRO(X16 + GGML_TYPE_Q4_0) MACRO(X16 + GGML_TYPE_Q4_1) MACRO(X16 + GGML_TYPE_Q8_0)         \
    MACRO(X16 + GGML_TYPE_Q4_K) MACRO(X16 + GGML_TYPE_Q5_K) MACRO(X16 + GGML_TYPE_Q6_K) MACRO(X16 + GGML_TYPE_IQ4_XS)

// bytes of a row of n values, where rows are interleaved its share of them
static inline size_t row_bytes(int layout, int64_t n) {
    switch (layout) {
#define POP_CASE(LAYOUT)                                                                         \
    case LAYOUT:                                                                                 \
        return n / type_of<LAYOUT>::n_values * sizeof(type_of<LAYOUT>::block) / (LAYOUT >= X16 ? 16 : LAYOUT >= X8 ? 8 : 1);
        POP_EACH_LAYOUT(POP_CASE)
        POP_EACH_X16(POP_CASE)
#undef POP_CASE
    }
    return 0;
}

// the values of the codes of IQ4_NL and IQ4_XS plus 128, and those of MXFP4 (doubled, its scales are halved) plus 12
alignas(16) static const uint8_t iq4_codes[16]   = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };
alignas(16) static const uint8_t mxfp4_codes[16] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };

} // namespace pop

// for loops of a fixed count
#if defined(__clang__)
#    define POP_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#    define POP_UNROLL _Pragma("GCC unroll 64")
#else
#    define POP_UNROLL
#endif
