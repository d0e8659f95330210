// Weights to panels, AVX-512: rows that upstream's buffers interleave, whose codes need no transposition.

#pragma once

#include "panel-512.h"

namespace pop {

//
// CPU_REPACK, eight rows
//

// two times eight interleaved rows, 8 bytes of each in turn: the first four of all, then the others
struct chunk_of_16 {
    __m512i bytes[2];

    chunk_of_16(const uint8_t * a, const uint8_t * b) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
        bytes[0] = _mm512_permutex2var_epi32(x, even, y);
        bytes[1] = _mm512_permutex2var_epi32(x, _mm512_add_epi32(even, _mm512_set1_epi32(1)), y);
    }
};

static inline __m512 halves_of_16(const ggml_half a[8], const ggml_half b[8]) {
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) a)),
        _mm_loadu_si128((const __m128i *) b), 1));
}

static inline __m512 bits_of_16(const uint8_t * a, const uint8_t * b) {
    uint64_t x, y;
    memcpy(&x, a, 8);
    memcpy(&y, b, 8);
    const __m512i e = _mm512_cvtepu8_epi32(_mm_set_epi64x((long long) y, (long long) x));
    const __m512i small = _mm512_sllv_epi32(_mm512_set1_epi32(0x00200000), e);
    const __m512i usual = _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(usual, _mm512_cmplt_epi32_mask(e, _mm512_set1_epi32(2)), small));
}

template <int LAYOUT, typename B> static inline void unpack_x8(const B * a, const B * b, int n, panel_half<LAYOUT> to) {
    const __m512i four = _mm512_set1_epi8(15);
    for (int i = 0; i < n; i++, a++, b++) {
        for (int c = 0; c < 2; c++) {
            const chunk_of_16 x(a->qs + 64 * c, b->qs + 64 * c);
            for (int k = 0; k < 2; k++) {
                // Q4_0 is interleaved with the top bit of each code flipped
                const __m512i q = LAYOUT == X8 + GGML_TYPE_Q4_0 ? _mm512_xor_si512(x.bytes[k], _mm512_set1_epi8((char) 0x88)) : x.bytes[k];
                __m512i low = _mm512_and_si512(q, four), high = _mm512_and_si512(_mm512_srli_epi16(q, 4), four);
                if constexpr (LAYOUT != X8 + GGML_TYPE_Q4_0) {
                    const uint8_t * table = LAYOUT == X8 + GGML_TYPE_MXFP4 ? mxfp4_codes : iq4_codes;
                    low  = look_up(table, low);
                    high = look_up(table, high);
                }
                to.put_codes(i, 2 * c + k, low);
                to.put_codes(i, 4 + 2 * c + k, high);
            }
        }
        if constexpr (LAYOUT == X8 + GGML_TYPE_MXFP4) {
            to.put_set(i, 0, bits_of_16(a->d, b->d));
        } else {
            to.put_set(i, 0, halves_of_16(a->d, b->d));
        }
    }
}

static inline void unpack_x8(const rows_q4_K_x8 * a, const rows_q4_K_x8 * b, int, panel_half<X8 + GGML_TYPE_Q4_K> to) {
    const __m512i four = _mm512_set1_epi8(15);
    for (int c = 0; c < 16; c++) {
        const chunk_of_16 x(a->qs + 64 * c, b->qs + 64 * c);
        for (int k = 0; k < 2; k++) {
            to.put_codes(c / 4 * 2,     c % 4 * 2 + k, _mm512_and_si512(x.bytes[k], four));
            to.put_codes(c / 4 * 2 + 1, c % 4 * 2 + k, _mm512_and_si512(_mm512_srli_epi16(x.bytes[k], 4), four));
        }
    }
    const __m512 d = halves_of_16(a->d, b->d), dmin = _mm512_sub_ps(_mm512_setzero_ps(), halves_of_16(a->dmin, b->dmin));
    for (int i = 0; i < 8; i++) {
        uint64_t scales[2], mins[2];
        split_k4(a->scales + 12 * i, scales[0], mins[0]);
        split_k4(b->scales + 12 * i, scales[1], mins[1]);
        to.put_set(i, 0, _mm512_mul_ps(floats_of_bytes(scales[0], scales[1]), d));
        to.put_set(i, 1, _mm512_mul_ps(floats_of_bytes(mins[0], mins[1]), dmin));
    }
}

static inline void unpack_x8(const rows_q2_K_x8 * a, const rows_q2_K_x8 * b, int, panel_half<X8 + GGML_TYPE_Q2_K> to) {
    const __m512i two = _mm512_set1_epi8(3);
    for (int c = 0; c < 8; c++) {
        const chunk_of_16 x(a->qs + 64 * c, b->qs + 64 * c);
        for (int k = 0; k < 2; k++) {
            for (int i = 0; i < 4; i++) {
                to.put_codes(c / 4 * 4 + i, c % 4 * 2 + k, _mm512_and_si512(_mm512_srli_epi16(x.bytes[k], 2 * i), two));
            }
        }
    }
    const __m512 d = halves_of_16(a->d, b->d), dmin = _mm512_sub_ps(_mm512_setzero_ps(), halves_of_16(a->dmin, b->dmin));
    for (int i = 0; i < 8; i++) {
        // of each row the bytes of both halves, in their low nibbles the scales
        const __m256i s = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (a->scales + 16 * i))),
            _mm_loadu_si128((const __m128i *) (b->scales + 16 * i)), 1);
        const __m512i w = _mm512_cvtepu16_epi32(s);
        for (int h = 0; h < 2; h++) {
            const __m512i scale = _mm512_and_si512(_mm512_srli_epi32(w, 8 * h), _mm512_set1_epi32(15));
            const __m512i min   = _mm512_and_si512(_mm512_srli_epi32(w, 8 * h + 4), _mm512_set1_epi32(15));
            to.put_set(i, h, _mm512_mul_ps(_mm512_cvtepi32_ps(scale), d));
            to.put_set(i, 2 + h, _mm512_mul_ps(_mm512_cvtepi32_ps(min), dmin));
        }
    }
}

//
// AMX, sixteen rows: four bytes of each in turn, of codes of four bits the first four in the low nibbles, the next in the high ones
//

static inline __m512 halves_of_16(const ggml_half d[16]) {
    return _mm512_cvtph_ps(load_256(d));
}

static inline __m512 floats_of_codes(const uint8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

static inline __m512 floats_of_codes(const int8_t * p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
}

// a block's codes of four bits, each then changed by map(codes, group)
template <int LAYOUT, typename F> static inline void put_nibbles(const uint8_t * qs, int block, panel_half<LAYOUT> to, F map) {
    const __m512i four = _mm512_set1_epi8(15);
    POP_UNROLL
    for (int g = 0; g < 8; g += 2) {
        const __m512i x = _mm512_loadu_si512(qs + g * 32);
        to.put_codes(block, g,     map(_mm512_and_si512(x, four), g));
        to.put_codes(block, g + 1, map(_mm512_and_si512(_mm512_srli_epi16(x, 4), four), g + 1));
    }
}

static inline __m512i as_it_is(__m512i codes, int) {
    return codes;
}

static inline void unpack_x16(const rows_q4_0_x16 * x, int n, panel_half<X16 + GGML_TYPE_Q4_0> to) {
    for (int i = 0; i < n; i++) {
        put_nibbles(x[i].qs, i, to, as_it_is);
        to.put_set(i, 0, halves_of_16(x[i].d));
    }
}

static inline void unpack_x16(const rows_q4_1_x16 * x, int n, panel_half<X16 + GGML_TYPE_Q4_1> to) {
    for (int i = 0; i < n; i++) {
        put_nibbles(x[i].qs, i, to, as_it_is);
        to.put_set(i, 0, halves_of_16(x[i].d));
        to.put_set(i, 1, halves_of_16(x[i].m));
    }
}

static inline void unpack_x16(const rows_q8_0_x16 * x, int n, panel_half<X16 + GGML_TYPE_Q8_0> to) {
    for (int i = 0; i < n; i++) {
        for (int g = 0; g < 8; g++) {
            to.put_codes(i, g, _mm512_xor_si512(_mm512_loadu_si512(x[i].qs + 64 * g), _mm512_set1_epi8((char) 0x80)));
        }
        to.put_set(i, 0, halves_of_16(x[i].d));
    }
}

// mins come in pairs of blocks
template <int LAYOUT, typename B> static inline void put_scales_k4(const B & x, panel_half<LAYOUT> to) {
    const __m512 d = halves_of_16(x.d), dmin = _mm512_sub_ps(_mm512_setzero_ps(), halves_of_16(x.dmin));
    for (int i = 0; i < 8; i++) {
        const __m512i pair = _mm512_cvtepu16_epi32(load_256(x.mins + i / 2 * 32));
        const __m512i min  = _mm512_and_si512(_mm512_srli_epi32(pair, i % 2 * 8), _mm512_set1_epi32(255));
        to.put_set(i, 0, _mm512_mul_ps(floats_of_codes(x.scales + 16 * i), d));
        to.put_set(i, 1, _mm512_mul_ps(_mm512_cvtepi32_ps(min), dmin));
    }
}

static inline void unpack_x16(const rows_q4_K_x16 * x, int, panel_half<X16 + GGML_TYPE_Q4_K> to) {
    for (int i = 0; i < 8; i++) {
        put_nibbles(x->qs + 256 * i, i, to, as_it_is);
    }
    put_scales_k4(*x, to);
}

static inline void unpack_x16(const rows_q5_K_x16 * x, int, panel_half<X16 + GGML_TYPE_Q5_K> to) {
    for (int i = 0; i < 8; i++) {
        const __m512i high = _mm512_loadu_si512(x->qh + 64 * i); // bit g is of group g
        put_nibbles(x->qs + 256 * i, i, to, [&](__m512i codes, int g) {
            const __m512i bit = _mm512_and_si512(_mm512_srl_epi16(high, _mm_cvtsi32_si128(g)), _mm512_set1_epi8(1));
            return _mm512_or_si512(codes, _mm512_slli_epi16(bit, 4));
        });
    }
    put_scales_k4(*x, to);
}

static inline void unpack_x16(const rows_q6_K_x16 * x, int, panel_half<X16 + GGML_TYPE_Q6_K> to) {
    const __m512 d = halves_of_16(x->d);
    for (int i = 0; i < 8; i++) {
        const __m512i high[2] = { _mm512_loadu_si512(x->qh + 128 * i), _mm512_loadu_si512(x->qh + 128 * i + 64) }; // of four groups each
        put_nibbles(x->qs + 256 * i, i, to, [&](__m512i codes, int g) {
            const __m512i bits = _mm512_and_si512(_mm512_srl_epi16(high[g / 4], _mm_cvtsi32_si128(g % 4 * 2)), _mm512_set1_epi8(3));
            return _mm512_or_si512(codes, _mm512_slli_epi16(bits, 4));
        });
        for (int h = 0; h < 2; h++) {
            to.put_set(i, h, _mm512_mul_ps(floats_of_codes(x->scales + 32 * i + 16 * h), d));
        }
    }
}

static inline void unpack_x16(const rows_iq4_xs_x16 * x, int, panel_half<X16 + GGML_TYPE_IQ4_XS> to) {
    for (int i = 0; i < 8; i++) {
        put_nibbles(x->qs + 256 * i, i, to, [](__m512i codes, int) { return look_up(iq4_codes, codes); });
        to.put_set(i, 0, _mm512_mul_ps(floats_of_codes(x->scales + 16 * i), halves_of_16(x->d)));
    }
}

} // namespace pop
