// Unpacking of weights to panels with 256-bit vectors: eight rows per vector.
//
// One block (32 values k0 to k31 of each row) of a panel:
//
//            row 0          row 1              row 7        | row 8     ...    row 15
//   step 0   [k0 k1 k2 k3 ][k0 k1 k2 k3 ] ... [k0 .. k3 ]   | [k0 .. k3 ] ... [k0 .. k3 ]     2 vectors of u8
//   ...
//   step 7   [k28 .. k31  ] ...                             |
//   scale    [f32]         [f32]          ... [f32]         | [f32]       ... [f32]           2 vectors of f32
//   (scale of the second half, min, min of the second half: as the type has them)
//            |<--------------- 32 bytes ----------------->|
//
// WIDE panels have 16 steps of two 16-bit codes each.

#pragma once

#include "types.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace fast {
namespace {

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
constexpr bool VNNI = true;
#else
constexpr bool VNNI = false;
#endif

constexpr int VECTORS = 2; // vectors of 8 rows per panel
constexpr int ROWS    = 8 * VECTORS;

// The layout of a type's panel and of the column tiles for it. SHIFT is the part of the bias that the integer sums subtract.
template <bool WIDE_, int SHIFT_, bool MINS_, bool HALVES_> struct panel_of {
    static constexpr bool WIDE   = WIDE_; // 16-bit weights and activations
    static constexpr int  SHIFT  = SHIFT_;
    static constexpr bool MINS   = MINS_;
    static constexpr int  HALVES = HALVES_ ? 2 : 1;
    static constexpr int  STEPS  = WIDE ? 16 : 8; // steps of 4 bytes per row
    static constexpr int  CODES  = STEPS * VECTORS * 32;
    static constexpr int  SCALES = HALVES * VECTORS * 32;
    static constexpr int  BYTES  = CODES + (MINS ? 2 : 1) * SCALES; // per block
};

// Return a type's SHIFT. Without VNNI, a 16-bit sum holds 32 products only if a code minus its shift has a magnitude up to 16.
template <int TYPE> constexpr int shift_of() {
    constexpr format fmt   = type_of<TYPE>::fmt;
    constexpr bool   is_five_bit = TYPE == GGML_TYPE_Q5_1 || TYPE == GGML_TYPE_Q5_K;
    return VNNI ? fmt.bias : fmt.bias == 128 ? 0 : is_five_bit ? 16 : fmt.bias;
}

template <int TYPE, typename T = type_of<TYPE>>
using panel_for = panel_of<!VNNI && T::fmt.bias == 128, shift_of<TYPE>(), T::fmt.mins, T::fmt.halves>;

inline __m256i load(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

inline uint32_t load_u32(const void * p) {
    uint32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

inline __m128i to_vector(uint64_t x) {
    return _mm_loadl_epi64((const __m128i *) &x);
}

inline float to_f32(ggml_half x) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x)));
}

// codes of 32 values of a row

inline __m256i low_bits(__m256i x, int first, int n) {
    return _mm256_and_si256(_mm256_srli_epi16(x, first), _mm256_set1_epi8((char) ((1 << n) - 1)));
}

// Return the low nibbles of 16 bytes, then the high ones.
inline __m256i nibbles(const uint8_t * qs) {
    const __m128i x = _mm_loadu_si128((const __m128i *) qs);
    return low_bits(_mm256_inserti128_si256(_mm256_castsi128_si256(x), _mm_srli_epi16(x, 4), 1), 0, 4);
}

// Move bit i of 32 to bit 4 of byte i.
inline __m256i fifth_bits(const uint8_t * qh) {
    const __m256i bytes = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit   = _mm256_set1_epi64x((long long) 0x8040201008040201);
    const __m256i x     = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int) load_u32(qh)), bytes), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(x, bit), _mm256_set1_epi8(16));
}

inline __m256i look_up(const uint8_t * table, __m256i x) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *) table)), x);
}

inline __m256i codes(const block_q4_0   & x, int) { return nibbles(x.qs); }
inline __m256i codes(const block_q4_1   & x, int) { return nibbles(x.qs); }
inline __m256i codes(const block_q5_0   & x, int) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
inline __m256i codes(const block_q5_1   & x, int) { return _mm256_or_si256(nibbles(x.qs), fifth_bits(x.qh)); }
inline __m256i codes(const block_q8_0   & x, int) { return _mm256_xor_si256(load(x.qs), _mm256_set1_epi8((char) 128)); }
inline __m256i codes(const block_iq4_nl & x, int) { return look_up(iq4_codes, nibbles(x.qs)); }
inline __m256i codes(const block_mxfp4  & x, int) { return look_up(mxfp4_codes, nibbles(x.qs)); }

inline __m256i codes(const block_iq4_xs & x, int j) { return look_up(iq4_codes, nibbles(x.qs + 16 * j)); }

inline __m256i codes(const block_q2_K & x, int j) { return low_bits(load(x.qs + j / 4 * 32), j % 4 * 2, 2); }

inline __m256i codes(const block_q3_K & x, int j) {
    const __m256i high = low_bits(load(x.hmask), j, 1);
    return _mm256_or_si256(low_bits(load(x.qs + j / 4 * 32), j % 4 * 2, 2), _mm256_slli_epi16(high, 2));
}

inline __m256i codes(const block_q4_K & x, int j) { return low_bits(load(x.qs + j / 2 * 32), j % 2 * 4, 4); }

inline __m256i codes(const block_q5_K & x, int j) {
    const __m256i high = low_bits(load(x.qh), j, 1);
    return _mm256_or_si256(low_bits(load(x.qs + j / 2 * 32), j % 2 * 4, 4), _mm256_slli_epi16(high, 4));
}

inline __m256i codes(const block_q6_K & x, int j) {
    const __m256i high = low_bits(load(x.qh + j / 4 * 32), j % 4 * 2, 2);
    const __m256i low  = load(x.ql + j / 4 * 64 + j % 2 * 32);
    return _mm256_or_si256(low_bits(low, j % 4 / 2 * 4, 4), _mm256_slli_epi16(high, 4));
}

// scales and mins of 256 values of a row, 8 per vector

struct row_scales {
    __m256 scale[2], min[2];
};

inline __m256 times_u8(float d, uint64_t x) {
    const __m256i wide = _mm256_cvtepu8_epi32(to_vector(x));
    return _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtepi32_ps(wide));
}

inline __m256 times_i8(float d, uint64_t x) {
    const __m256i wide = _mm256_cvtepi8_epi32(to_vector(x));
    return _mm256_mul_ps(_mm256_set1_ps(d), _mm256_cvtepi32_ps(wide));
}

inline uint64_t join(uint32_t low, uint32_t high) {
    return low | (uint64_t) high << 32;
}

// Split 12 bytes of Q4_K and Q5_K into 8 scales and 8 mins of 6 bits.
inline void scales_6(const uint8_t * x, uint64_t & scales, uint64_t & mins) {
    const uint32_t a = load_u32(x), b = load_u32(x + 4), c = load_u32(x + 8);
    scales = join(a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030));
    mins   = join(b & 0x3f3f3f3f, (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030));
}

template <typename B> row_scales scales_q45_K(const B & x) {
    uint64_t scales, mins;
    scales_6(x.scales, scales, mins);
    return { { times_u8(to_f32(x.d), scales) }, { times_u8(-to_f32(x.dmin), mins) } };
}

inline row_scales scales_of(const block_q4_K & x) { return scales_q45_K(x); }
inline row_scales scales_of(const block_q5_K & x) { return scales_q45_K(x); }

inline row_scales scales_of(const block_q2_K & x) {
    const uint64_t nibble = 0x0f0f0f0f0f0f0f0f;
    const float    d = to_f32(x.d), dmin = -to_f32(x.dmin);
    uint64_t s[2];
    memcpy(s, x.scales, sizeof(s));
    return { { times_u8(d, s[0] & nibble), times_u8(d, s[1] & nibble) },
             { times_u8(dmin, s[0] >> 4 & nibble), times_u8(dmin, s[1] >> 4 & nibble) } };
}

inline row_scales scales_of(const block_q3_K & x) {
    const uint32_t a = load_u32(x.scales), b = load_u32(x.scales + 4), c = load_u32(x.scales + 8);
    const uint32_t nibble = 0x0f0f0f0f, two = 0x30303030;
    const uint64_t low    = join((a & nibble) | (c << 4 & two), (b & nibble) | (c << 2 & two));
    const uint64_t high   = join((a >> 4 & nibble) | (c & two), (b >> 4 & nibble) | (c >> 2 & two));
    const float    d      = to_f32(x.d);
    const __m256   bias   = _mm256_set1_ps(32.0f * d);
    return { { _mm256_sub_ps(times_u8(d, low), bias), _mm256_sub_ps(times_u8(d, high), bias) }, {} };
}

inline row_scales scales_of(const block_q6_K & x) {
    const float d = to_f32(x.d);
    uint64_t s[2];
    memcpy(s, x.scales, sizeof(s));
    return { { times_i8(d, s[0]), times_i8(d, s[1]) }, {} };
}

inline row_scales scales_of(const block_iq4_xs & x) {
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i low  = _mm256_srlv_epi32(_mm256_set1_epi32((int) load_u32(x.scales_l)), _mm256_slli_epi32(even, 1));
    const __m256i high = _mm256_srlv_epi32(_mm256_set1_epi32(x.scales_h), even);
    const __m256i s    = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                         _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4));
    const __m256  real = _mm256_cvtepi32_ps(_mm256_sub_epi32(s, _mm256_set1_epi32(32)));
    return { { _mm256_mul_ps(_mm256_set1_ps(to_f32(x.d)), real) }, {} };
}

// scales and mins of 32 values of eight rows

template <typename F> __m256 eight_halves(F half) {
    return _mm256_cvtph_ps(_mm_setr_epi16((short) half(0), (short) half(1), (short) half(2), (short) half(3),
                                          (short) half(4), (short) half(5), (short) half(6), (short) half(7)));
}

// Return 2^(x - 128), for MXFP4. Below x = 2 the result is subnormal.
inline __m256 eight_powers(uint64_t x) {
    const __m256i e     = _mm256_cvtepu8_epi32(to_vector(x));
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const __m256i large = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    return _mm256_castsi256_ps(_mm256_blendv_epi8(large, small, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
}

template <typename B> __m256 scales_of_8(const B * const * x) {
    return eight_halves([x](int i) { return x[i]->d; });
}

inline __m256 scales_of_8(const block_mxfp4 * const * x) {
    uint64_t e = 0;
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        e |= (uint64_t) x[i]->e << 8 * i;
    }
    return eight_powers(e);
}

template <typename B> __m256 mins_of_8(const B * const * x) {
    return eight_halves([x](int i) { return x[i]->m; });
}

// storing to the panel

// Transpose 8 vectors of 8 dwords: lane j of vector i becomes lane i of vector j.
inline void transpose(__m256i (&v)[8]) {
    __m256i a[8], b[8];
    FAST_UNROLL
    for (int i = 0; i < 8; i += 2) {
        a[i]     = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    FAST_UNROLL
    for (int i = 0; i < 8; i += 4) {
        b[i]     = _mm256_unpacklo_epi64(a[i],     a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i],     a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        v[i]     = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

// Store 4 codes along K of eight rows.
template <typename P> void store_codes(uint8_t * panel, int vector, int k4, __m256i v) {
    __m256i * out = (__m256i *) panel + vector;
    if (!P::WIDE) {
        _mm256_store_si256(out + k4 * VECTORS, v);
        return;
    }
    const char    zero_byte   = (char) 128;
    const __m256i first  = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, zero_byte, 1, zero_byte, 4, zero_byte, 5, zero_byte, 8, zero_byte, 9, zero_byte, 12, zero_byte, 13, zero_byte));
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi16(2));
    const __m256i bias   = _mm256_set1_epi16(128);
    _mm256_store_si256(out + (2 * k4 + 0) * VECTORS, _mm256_sub_epi16(_mm256_shuffle_epi8(v, first), bias));
    _mm256_store_si256(out + (2 * k4 + 1) * VECTORS, _mm256_sub_epi16(_mm256_shuffle_epi8(v, second), bias));
}

template <typename P> void store_scales(uint8_t * panel, int vector, int half, __m256 scale) {
    _mm256_store_ps((float *) (panel + P::CODES) + (half * VECTORS + vector) * 8, scale);
}

template <typename P> void store_mins(uint8_t * panel, int vector, int half, __m256 scale, __m256 min) {
    if (P::SHIFT) {
        min = _mm256_fmadd_ps(scale, _mm256_set1_ps(P::SHIFT), min);
    }
    _mm256_store_ps((float *) (panel + P::CODES + P::SCALES) + (half * VECTORS + vector) * 8, min);
}

template <typename P, typename B> void store_row_codes(uint8_t * panel, int vector, const B * const * x, int j) {
    __m256i v[8];
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        v[i] = codes(*x[i], j);
    }
    transpose(v);
    FAST_UNROLL
    for (int k4 = 0; k4 < 8; k4++) {
        store_codes<P>(panel, vector, k4, v[k4]);
    }
}

template <typename P, typename B> void store_row_scales(uint8_t * panel, int vector, const B * const * x) {
    row_scales s[8];
    for (int i = 0; i < 8; i++) {
        s[i] = scales_of(*x[i]);
    }
    for (int part = 0; part < P::HALVES; part++) {
        __m256i scale[8], min[8];
        FAST_UNROLL
        for (int i = 0; i < 8; i++) {
            scale[i] = _mm256_castps_si256(s[i].scale[part]);
            min[i]   = _mm256_castps_si256(s[i].min[part]);
        }
        transpose(scale);
        if (P::MINS) {
            transpose(min);
        }
        FAST_UNROLL
        for (int i = 0; i < 8; i++) {
            const int at   = 8 * part + i;
            const int half = at % P::HALVES;
            uint8_t * to   = panel + at / P::HALVES * P::BYTES;
            store_scales<P>(to, vector, half, _mm256_castsi256_ps(scale[i]));
            if (P::MINS) {
                store_mins<P>(to, vector, half, _mm256_castsi256_ps(scale[i]), _mm256_castsi256_ps(min[i]));
            }
        }
    }
}

// Unpack one block of each of eight rows.
template <int TYPE, typename P>
void unpack_rows(uint8_t * panel, int vector, const typename type_of<TYPE>::block * const * x) {
    if constexpr (type_of<TYPE>::n_values == 256) {
        store_row_scales<P>(panel, vector, x);
        for (int j = 0; j < 8; j++) {
            store_row_codes<P>(panel + j * P::BYTES, vector, x, j);
        }
    } else {
        const __m256 scale = scales_of_8(x);
        store_scales<P>(panel, vector, 0, scale);
        if constexpr (P::MINS) {
            store_mins<P>(panel, vector, 0, scale, mins_of_8(x));
        }
        store_row_codes<P>(panel, vector, x, 0);
    }
}

// Unpack n_blocks blocks of n_rows rows, starting at block `first`. The last row replaces missing rows.
template <int TYPE, typename P>
void unpack(const char * weights, size_t stride, int n_rows, int first, int n_blocks, uint8_t * panel) {
    using B = typename type_of<TYPE>::block;
    constexpr int step = type_of<TYPE>::n_values / 32;

    for (int vector = 0; vector < VECTORS; vector++) {
        uint8_t * out = panel;
        const B * x[8];
        for (int i = 0; i < 8; i++) {
            x[i] = (const B *) (weights + std::min(8 * vector + i, n_rows - 1) * stride) + first / step;
        }
        for (int b = 0; b < n_blocks; b += step, out += step * P::BYTES) {
            unpack_rows<TYPE, P>(out, vector, x);
            for (int i = 0; i < 8; i++) {
                x[i]++;
            }
        }
    }
}

} // namespace
} // namespace fast
