// Codes of a row in another order: each vector holds eight codes of each of eight blocks instead of two whole blocks. All vectors of a group then
// share one sum for each block, which needs one conversion and one multiplication instead of four.

#pragma once

#include "rows-512.h"

#include <cstddef>

namespace fast {

// Bytes picked from 192 by permutations.
#if defined(__AVX512VBMI__)
#    define FAST_PICKS 1
#else
#    define FAST_PICKS 0
#endif

template <int TYPE> constexpr bool has_nibbles = TYPE == GGML_TYPE_Q4_0 || TYPE == GGML_TYPE_Q4_1 || TYPE == GGML_TYPE_Q5_0 ||
    TYPE == GGML_TYPE_Q5_1 || TYPE == GGML_TYPE_IQ4_NL || TYPE == GGML_TYPE_MXFP4;
template <int TYPE> constexpr bool is_spread = TYPE == GGML_TYPE_Q4_K || TYPE == GGML_TYPE_Q5_K || TYPE == GGML_TYPE_IQ4_XS ||
    (FAST_PICKS && has_nibbles<TYPE>);

// Split 128 bytes with codes of four bits, of which each 32 bytes belong to two blocks.
inline void spread_nibbles(const uint8_t * p, __m512i codes[4]) {
    const __m512i low = _mm512_loadu_si512(p), high = _mm512_loadu_si512(p + 64);
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        const __m512i parts = _mm512_setr_epi64(i, i, 4 + i, 4 + i, 8 + i, 8 + i, 12 + i, 12 + i);
        codes[i] = pick_nibbles(_mm512_permutex2var_epi64(low, parts, high), 0xaa);
    }
}

FAST_INLINE row_codes read_spread(const block_q4_K & x) {
    row_codes r;
    spread_nibbles(x.qs, r.codes);
    r.scales = scales_k4(x);
    return r;
}

FAST_INLINE row_codes read_spread(const block_q5_K & x) {
    row_codes r;
    spread_nibbles(x.qs, r.codes);
    FAST_UNROLL
    for (int i = 0; i < 4; i++) {
        int64_t bits; // bit b of a byte belongs to block b
        memcpy(&bits, x.qh + 8 * i, 8);
        const __m512i   block = _mm512_setr_epi64(0x0101010101010101, 0x0202020202020202, 0x0404040404040404, 0x0808080808080808,
              0x1010101010101010, 0x2020202020202020, 0x4040404040404040, (int64_t) 0x8080808080808080);
        const __mmask64 high  = _mm512_test_epi8_mask(_mm512_set1_epi64(bits), block);
        r.codes[i] = _mm512_mask_add_epi8(r.codes[i], high, r.codes[i], _mm512_set1_epi8(16));
    }
    r.scales = scales_k4(x);
    return r;
}

FAST_INLINE row_codes read_spread(const block_iq4_xs & x) {
    row_codes r;
    const __m512i low = _mm512_loadu_si512(x.qs), high = _mm512_loadu_si512(x.qs + 64);
    FAST_UNROLL
    for (int i = 0; i < 2; i++) {
        const __m512i parts = _mm512_setr_epi64(i, 2 + i, 4 + i, 6 + i, 8 + i, 10 + i, 12 + i, 14 + i);
        const __m512i bytes = _mm512_permutex2var_epi64(low, parts, high);
        r.codes[i]     = look_up(iq4_codes, pick_nibbles(bytes, 0));
        r.codes[2 + i] = look_up(iq4_codes, pick_nibbles(bytes, 0xff));
    }
    r.scales = scales_of(x);
    return r;
}

// Read eight blocks of 32 values.
template <int TYPE> row_codes read_spread(const typename type_of<TYPE>::block * x);

#if FAST_PICKS

// For each byte of a vector, its offset in a group of eight blocks. Offsets from 128 on are in a third vector.
struct picked_bytes {
    alignas(64) uint8_t offsets[64];
    uint64_t third;
};

template <typename F> constexpr picked_bytes picked(F offset) {
    picked_bytes p = {};
    for (int i = 0; i < 64; i++) {
        const int o = offset(i);
        p.offsets[i] = (uint8_t) (o % 128);
        p.third |= (uint64_t) (o >= 128) << i;
    }
    return p;
}

// The bytes of eight blocks.
struct group_bytes {
    __m512i part[3];

    __m512i pick(const picked_bytes & p) const {
        const __m512i offsets = _mm512_load_si512(p.offsets);
        return _mm512_mask_permutexvar_epi8(_mm512_permutex2var_epi8(part[0], offsets, part[1]), p.third, offsets, part[2]);
    }
};

template <int TYPE> FAST_INLINE row_codes unpack(const group_bytes & group) {
    using B = typename type_of<TYPE>::block;
    constexpr bool five = TYPE == GGML_TYPE_Q5_0 || TYPE == GGML_TYPE_Q5_1, mins = type_of<TYPE>::fmt.mins;
    constexpr int size = sizeof(B), codes = offsetof(B, qs), high = five ? codes - 4 : 0;
    static constexpr picked_bytes firsts  = picked([](int i) { return size * (i / 8) + codes + i % 8; });
    static constexpr picked_bytes seconds = picked([](int i) { return size * (i / 8) + codes + 8 + i % 8; });
    static constexpr picked_bytes fifths  = picked([](int i) { return size * (i / 8) + high + i % 4; });
    // Eight scales, and eight mins or the scales again.
    static constexpr picked_bytes heads   = picked([](int i) { return size * (i / 2 % 8) + (mins && i / 16 % 2 ? 2 : 0) + i % 2; });

    const __m512i bytes[2] = { group.pick(firsts), group.pick(seconds) };
    const __m512i four = _mm512_set1_epi8(15);
    row_codes r;
    FAST_UNROLL
    for (int i = 0; i < 2; i++) {
        r.codes[i]     = _mm512_and_si512(bytes[i], four);
        r.codes[2 + i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), four);
    }
    if constexpr (five) {
        const __m512i bits = group.pick(fifths);
        FAST_UNROLL
        for (int i = 0; i < 4; i++) {
            // Shift each byte's bit to bit 4: bytes are rotated out of the block's 32 bits, which are there twice.
            const __m512i shifts = _mm512_set1_epi64(0x0706050403020100 + 0x0101010101010101 * (60 + 8 * i));
            const __m512i fifth  = _mm512_multishift_epi64_epi8(shifts, bits);
            r.codes[i] = _mm512_ternarylogic_epi64(r.codes[i], fifth, _mm512_set1_epi8(16), 0xf8); // codes | (fifth & 16)
        }
    }
    if constexpr (TYPE == GGML_TYPE_IQ4_NL || TYPE == GGML_TYPE_MXFP4) {
        FAST_UNROLL
        for (int i = 0; i < 4; i++) {
            r.codes[i] = look_up(TYPE == GGML_TYPE_MXFP4 ? mxfp4_codes : iq4_codes, r.codes[i]);
        }
    }
    if constexpr (TYPE == GGML_TYPE_MXFP4) {
        static constexpr picked_bytes exponents = picked([](int i) { return size * (i % 8); });
        r.scales = twice(eight_powers((uint64_t) _mm_cvtsi128_si64(_mm512_castsi512_si128(group.pick(exponents)))));
    } else {
        r.scales = _mm512_cvtph_ps(_mm512_castsi512_si256(group.pick(heads)));
    }
    return r;
}

template <int TYPE> FAST_INLINE row_codes read_spread(const typename type_of<TYPE>::block * x) {
    const char * p = (const char *) x;
    const __mmask64 third = ~0ULL >> (192 - 8 * sizeof(*x));
    group_bytes group = { { _mm512_loadu_si512(p), _mm512_loadu_si512(p + 64), _mm512_maskz_loadu_epi8(third, p + 128) } };
#if defined(__GNUC__)
    asm("" : "+v"(group.part[1])); // without this, GCC 12 loads the part again for each permutation, which takes 7 to 14 % longer
#endif
    return unpack<TYPE>(group);
}

#endif

} // namespace fast
