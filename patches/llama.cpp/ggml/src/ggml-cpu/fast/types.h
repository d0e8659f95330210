// Quantized weight types: value = scale * (code - bias), or scale * code + min.

#pragma once

#include "ggml.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#    include <immintrin.h>
#    define FAST_PREFETCH_L1(p) _mm_prefetch((const char *) (p), _MM_HINT_T0)
#    define FAST_PREFETCH_L2(p) _mm_prefetch((const char *) (p), _MM_HINT_T1)
#endif

namespace fast {

struct format {
    int  bias;   // subtracted from each code; 0 for types with mins
    bool mins;   // each scale has a min
    bool halves; // one scale per 16 values along K instead of 32
};

template <int TYPE> struct type_of;

#define FAST_TYPE(TYPE, BLOCK, N, BIAS, MINS, HALVES)              \
    template <> struct type_of<TYPE> {                            \
        using block = BLOCK;                                      \
        static constexpr int    n_values = N; /* per block */     \
        static constexpr format fmt      = { BIAS, MINS, HALVES }; \
    };

FAST_TYPE(GGML_TYPE_Q4_0,   block_q4_0,    32,   8, false, false)
FAST_TYPE(GGML_TYPE_Q4_1,   block_q4_1,    32,   0, true,  false)
FAST_TYPE(GGML_TYPE_Q5_0,   block_q5_0,    32,  16, false, false)
FAST_TYPE(GGML_TYPE_Q5_1,   block_q5_1,    32,   0, true,  false)
FAST_TYPE(GGML_TYPE_Q8_0,   block_q8_0,    32, 128, false, false)
FAST_TYPE(GGML_TYPE_IQ4_NL, block_iq4_nl,  32, 128, false, false)
FAST_TYPE(GGML_TYPE_MXFP4,  block_mxfp4,   32,  12, false, false)
FAST_TYPE(GGML_TYPE_Q2_K,   block_q2_K,   256,   0, true,  true)
FAST_TYPE(GGML_TYPE_Q3_K,   block_q3_K,   256,   4, false, true)
FAST_TYPE(GGML_TYPE_Q4_K,   block_q4_K,   256,   0, true,  false)
FAST_TYPE(GGML_TYPE_Q5_K,   block_q5_K,   256,   0, true,  false)
FAST_TYPE(GGML_TYPE_Q6_K,   block_q6_K,   256,  32, false, true)
FAST_TYPE(GGML_TYPE_IQ4_XS, block_iq4_xs, 256, 128, false, false)

// BF16 has no codes: only gemm-amx.cpp reads it, and without panels.
struct block_bf16 { ggml_bf16_t values[32]; };
FAST_TYPE(GGML_TYPE_BF16, block_bf16, 32, 0, false, false)

#undef FAST_TYPE

// Call MACRO(type) for each type with codes. With AVX-512, llama.cpp decodes Q2_K 5 to 6 % faster than these kernels do.
#define FAST_FOR_EACH_TYPE(MACRO) FAST_FOR_EACH_TYPE_BUT_Q2_K(MACRO) MACRO(GGML_TYPE_Q2_K)
#define FAST_FOR_EACH_TYPE_BUT_Q2_K(MACRO)                                                                             \
    MACRO(GGML_TYPE_Q4_0) MACRO(GGML_TYPE_Q4_1) MACRO(GGML_TYPE_Q5_0) MACRO(GGML_TYPE_Q5_1) MACRO(GGML_TYPE_Q8_0)      \
    MACRO(GGML_TYPE_IQ4_NL) MACRO(GGML_TYPE_MXFP4) MACRO(GGML_TYPE_IQ4_XS)                                            \
    MACRO(GGML_TYPE_Q3_K) MACRO(GGML_TYPE_Q4_K) MACRO(GGML_TYPE_Q5_K) MACRO(GGML_TYPE_Q6_K)

// Code values with the bias added: IQ4_NL and IQ4_XS plus 128; MXFP4 doubled (its scales are halved) plus 12.
alignas(16) static const uint8_t iq4_codes[16]   = { 1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241 };
alignas(16) static const uint8_t mxfp4_codes[16] = { 12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0 };

// A block of 32 activations that was rounded to 8 bits.
struct quantised {
    float   scale;
    int32_t sums[2]; // sums of the first 16 codes and the last 16
};

} // namespace fast

// Loops of a constant count must unroll: their accumulators are arrays that only then live in registers.
#if defined(__clang__)
#    define FAST_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#    define FAST_UNROLL _Pragma("GCC unroll 64")
#else
#    define FAST_UNROLL
#endif

// A call would spill sums or codes from registers to memory.
#if defined(_MSC_VER)
#    define FAST_INLINE __forceinline
#else
#    define FAST_INLINE inline __attribute__((always_inline))
#endif
