// Decoding of codes and scales from GGUF blocks by AVX-512.

#pragma once

#include "types.h"

#include <immintrin.h>

#include <cstring>

namespace fast {

static inline float from_half(ggml_half h) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
}

static inline __m128i load_32(const void * p) {
    int32_t x;
    memcpy(&x, p, 4);
    return _mm_cvtsi32_si128(x);
}

static inline __m256i load_256(const void * p) {
    return _mm256_loadu_si256((const __m256i *) p);
}

static inline __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

static inline __m512 twice(__m256 x) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(x), x, 1);
}

static inline __m512i look_up(const uint8_t table[16], __m512i codes) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) table)), codes);
}

// 256 codes of a row.
struct row_codes {
    __m512i codes[4];
    __m512  scales; // 8 scales and 8 mins, or the scales twice; for types with two scales per 32 values: 16 scales
    __m512  mins;   // 16 mins, only for types with two mins per 32 values
};

// Return the low nibbles in the 64-bit groups where `high` is 0, and the high nibbles in the others. By GFNI, one bit matrix does both.
static inline __m512i pick_nibbles(__m512i x, __mmask8 high) {
#if defined(__GFNI__)
    const __m512i low = _mm512_set1_epi64(0x0102040800000000);
    return _mm512_gf2p8affine_epi64_epi8(x, _mm512_mask_set1_epi64(low, high, 0x1020408000000000), 0);
#else
    return _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_maskz_set1_epi64(high, 4)), _mm512_set1_epi8(15));
#endif
}

// Return the low nibbles of 32 bytes, then the high ones.
static inline __m512i nibbles(const uint8_t * p) {
    return pick_nibbles(_mm512_broadcast_i64x4(load_256(p)), 0xf0);
}

// Return the low nibbles of 16 bytes, then the high ones, and the same of 16 other bytes.
static inline __m512i nibbles(const uint8_t * a, const uint8_t * b) {
    const __m512i twice = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) a));
    return pick_nibbles(_mm512_mask_broadcast_i32x4(twice, 0xff00, _mm_loadu_si128((const __m128i *) b)), 0xcc);
}

// Return eight scales, then eight mins. The 12 bytes contain them in six bits each: three dwords with the low bits of the first four scales,
// of the first four mins and of the others, whose high bits are the top bits of the first two dwords.
template <typename B> static inline __m512 scales_k4(const B & x) {
    const __m128i all  = _mm_loadu_si128((const __m128i *) x.scales); // the last four bytes are codes
    const __m128i low  = _mm_srlv_epi32(_mm_shuffle_epi32(all, 0x98), _mm_setr_epi32(0, 0, 0, 4));
    const __m128i high = _mm_srli_epi32(_mm_shuffle_epi32(all, 0x50), 2);
    const __m128i bits = _mm_or_si128(_mm_and_si128(low, _mm_setr_epi32(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f)),
        _mm_and_si128(high, _mm_setr_epi32(0, 0x30303030, 0, 0x30303030)));
    const __m128 factors = _mm_xor_ps(_mm_cvtph_ps(load_32(&x)), _mm_setr_ps(0.0f, -0.0f, 0.0f, 0.0f)); // d and -dmin
    const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bits)), _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(factors)));
}

// Add a number to the codes where a byte has the given bit.
static inline __m512i add_where(__m512i bytes, int bit, __m512i codes, char number) {
    return _mm512_mask_add_epi8(codes, _mm512_test_epi8_mask(bytes, _mm512_set1_epi8((char) bit)), codes, _mm512_set1_epi8(number));
}

static inline row_codes read(const block_q4_K & x) {
    row_codes r;
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        r.codes[i] = nibbles(x.qs + 32 * i);
    }
    r.scales = scales_k4(x);
    return r;
}

static inline row_codes read(const block_q5_K & x) {
    row_codes r;
    const __m512i high = join(load_256(x.qh), _mm256_srli_epi16(load_256(x.qh), 1)); // bit 2 i belongs to vector i of codes
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        r.codes[i] = add_where(high, 1 << (2 * i), nibbles(x.qs + 32 * i), 16);
    }
    r.scales = scales_k4(x);
    return r;
}

static inline row_codes read(const block_q6_K & x) {
    row_codes r;
    FAST_UNROLL
    for (int h = 0; h < 2; h++) {
        const __m512i low  = _mm512_loadu_si512(x.ql + 64 * h);
        const __m256i top  = load_256(x.qh + 32 * h);
        const __m512i tops = join(top, _mm256_srli_epi16(top, 2)); // low two bits: codes 0 to 63; four bits higher: 64 to 127
        const __m512i four = _mm512_set1_epi8(15), two = _mm512_set1_epi8(3);
        r.codes[2 * h]     = _mm512_or_si512(_mm512_and_si512(low, four), _mm512_slli_epi16(_mm512_and_si512(tops, two), 4));
        r.codes[2 * h + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(low, 4), four),
            _mm512_slli_epi16(_mm512_and_si512(_mm512_srli_epi16(tops, 4), two), 4));
    }
    const __m512i scales = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x.scales));
    r.scales = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), _mm512_set1_ps(from_half(x.d)));
    return r;
}

// Split 32 bytes into 128 codes of two bits.
static inline void read_pairs(const uint8_t * p, __m512i codes[2]) {
    const __m512i x = join(load_256(p), _mm256_srli_epi16(load_256(p), 2));
    codes[0] = _mm512_and_si512(x, _mm512_set1_epi8(3));
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(3));
}

static inline row_codes read(const block_q2_K & x) {
    row_codes r;
    read_pairs(x.qs, r.codes);
    read_pairs(x.qs + 32, r.codes + 2);
    const __m128i s    = _mm_loadu_si128((const __m128i *) x.scales);
    const __m128i four = _mm_set1_epi8(15);
    const __m512i scales = _mm512_cvtepu8_epi32(_mm_and_si128(s, four));
    const __m512i mins   = _mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(s, 4), four));
    r.scales = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), _mm512_set1_ps(from_half(x.d)));
    r.mins   = _mm512_mul_ps(_mm512_cvtepi32_ps(mins), _mm512_set1_ps(-from_half(x.dmin)));
    return r;
}

static inline row_codes read(const block_q3_K & x) {
    row_codes r;
    read_pairs(x.qs, r.codes);
    read_pairs(x.qs + 32, r.codes + 2);
    const __m512i high = join(load_256(x.hmask), _mm256_srli_epi16(load_256(x.hmask), 1));
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        r.codes[i] = add_where(high, 1 << (2 * i), r.codes[i], 4);
    }
    const __m128i four = _mm_loadl_epi64((const __m128i *) x.scales), two = _mm_broadcastd_epi32(load_32(x.scales + 8));
    const __m128i fours = _mm_and_si128(_mm_srlv_epi32(_mm_unpacklo_epi64(four, four), _mm_setr_epi32(0, 0, 4, 4)), _mm_set1_epi8(15));
    const __m128i twos = _mm_and_si128(_mm_srlv_epi32(two, _mm_setr_epi32(0, 2, 4, 6)), _mm_set1_epi8(3));
    const __m512i scales = _mm512_cvtepu8_epi32(_mm_or_si128(fours, _mm_slli_epi16(twos, 4)));
    r.scales = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(scales, _mm512_set1_epi32(32))), _mm512_set1_ps(from_half(x.d)));
    return r;
}

static inline __m512 scales_of(const block_iq4_xs & x) {
    const __m256i by_block = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    uint32_t low;
    memcpy(&low, x.scales_l, 4);
    const __m256i l = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int) low), _mm256_slli_epi32(by_block, 2)), _mm256_set1_epi32(15));
    const __m256i h = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(x.scales_h), _mm256_slli_epi32(by_block, 1)), _mm256_set1_epi32(3));
    const __m256i s = _mm256_sub_epi32(_mm256_or_si256(l, _mm256_slli_epi32(h, 4)), _mm256_set1_epi32(32));
    return twice(_mm256_mul_ps(_mm256_cvtepi32_ps(s), _mm256_set1_ps(from_half(x.d))));
}

static inline row_codes read(const block_iq4_xs & x) {
    row_codes r;
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        r.codes[i] = look_up(iq4_codes, nibbles(x.qs + 32 * i, x.qs + 32 * i + 16));
    }
    r.scales = scales_of(x);
    return r;
}

// Return the codes of two blocks.
static inline __m512i codes_64(const block_q4_0 & a, const block_q4_0 & b) { return nibbles(a.qs, b.qs); }
static inline __m512i codes_64(const block_q4_1 & a, const block_q4_1 & b) { return nibbles(a.qs, b.qs); }
static inline __m512i codes_64(const block_iq4_nl & a, const block_iq4_nl & b) { return look_up(iq4_codes, nibbles(a.qs, b.qs)); }
static inline __m512i codes_64(const block_mxfp4 & a, const block_mxfp4 & b) { return look_up(mxfp4_codes, nibbles(a.qs, b.qs)); }

static inline __m512i codes_64(const block_q8_0 & a, const block_q8_0 & b) {
    return _mm512_xor_si512(join(load_256(a.qs), load_256(b.qs)), _mm512_set1_epi8((char) 0x80));
}

template <typename B> static inline __m512i codes_of_five_bits(const B & a, const B & b) {
    uint32_t low, high;
    memcpy(&low, a.qh, 4);
    memcpy(&high, b.qh, 4);
    const __m512i four = nibbles(a.qs, b.qs);
    return _mm512_mask_add_epi8(four, low | (uint64_t) high << 32, four, _mm512_set1_epi8(16));
}

static inline __m512i codes_64(const block_q5_0 & a, const block_q5_0 & b) { return codes_of_five_bits(a, b); }
static inline __m512i codes_64(const block_q5_1 & a, const block_q5_1 & b) { return codes_of_five_bits(a, b); }

// Return 2^(e - 128): MXFP4's scales, halved since its code values are doubled. Below e = 2 the result is subnormal.
static inline __m256 eight_powers(uint64_t exponents) {
    const __m256i e     = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long) exponents));
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
    const __m256i usual = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
    return _mm256_castsi256_ps(_mm256_mask_mov_epi32(usual, _mm256_cmplt_epi32_mask(e, _mm256_set1_epi32(2)), small));
}

template <typename B> static inline float scale_of(const B & x) { return from_half(x.d); }
static inline float scale_of(const block_mxfp4 & x) { return _mm256_cvtss_f32(eight_powers(x.e)); }

template <typename B> static inline float min_of(const B &) { return 0.0f; }
static inline float min_of(const block_q4_1 & x) { return from_half(x.m); }
static inline float min_of(const block_q5_1 & x) { return from_half(x.m); }

// Convert half(0) to half(7) to floats.
template <typename F> static inline __m256 eight_halves(F half) {
    return _mm256_cvtph_ps(_mm_setr_epi16((short) half(0), (short) half(1), (short) half(2), (short) half(3),
        (short) half(4), (short) half(5), (short) half(6), (short) half(7)));
}

// Return the scales of eight blocks, then their mins if the type has them.
template <typename B> static inline __m512 scales_of(const B * x) {
    return twice(eight_halves([x](int i) { return x[i].d; }));
}

static inline __m512 scales_of(const block_mxfp4 * x) {
    uint64_t e = 0;
    FAST_UNROLL
    for (int i = 0; i < 8; i++) {
        e |= (uint64_t) x[i].e << 8 * i;
    }
    return twice(eight_powers(e));
}

// Load the first four bytes of four blocks. From an array, GCC builds the vector in memory, where the loads wait for the stores.
template <typename B> static inline __m128i four_heads(const B * x) {
    const auto head = [x](int i) { return load_32(&x[i]); };
    return _mm_unpacklo_epi64(_mm_unpacklo_epi32(head(0), head(1)), _mm_unpacklo_epi32(head(2), head(3)));
}

// The same for blocks that start with a scale and a min.
template <typename B> static inline __m512 pairs_of(const B * x) {
    const __m256i all   = _mm256_inserti128_si256(_mm256_castsi128_si256(four_heads(x)), four_heads(x + 4), 1);
    const __m512i apart = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    return _mm512_permutexvar_ps(apart, _mm512_cvtph_ps(all));
}

static inline __m512 scales_of(const block_q4_1 * x) { return pairs_of(x); }
static inline __m512 scales_of(const block_q5_1 * x) { return pairs_of(x); }

// Read eight blocks of 32 values.
template <typename B> static inline row_codes read_8(const B * x) {
    row_codes r;
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        r.codes[i] = codes_64(x[2 * i], x[2 * i + 1]);
    }
    r.scales = scales_of(x);
    return r;
}

} // namespace fast
