// The widest float vectors of the build and their exponential function. FAST_VECTORS is defined if the build has any.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#    include "vectors-512.h"
#    define FAST_VECTORS
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#    include "vectors-256.h"
#    define FAST_VECTORS
#endif

#ifdef FAST_VECTORS

namespace fast {

// Return SCALE * 2^x with a relative error of 3e-6, exact at x = 0, for x up to 100. Results with an exponent below -126 are 0.
// NaN stays NaN: max returns its second operand.
// EXPONENT moves the range: 2^(x + EXPONENT) is computed and then scaled by SCALE / 2^EXPONENT.
template <int EXPONENT, int SCALE> static inline floats exp2_scaled(floats x) {
    constexpr float mantissa = (float) SCALE / (1 << EXPONENT);
    const floats    magic    = splat(12583039.0f + EXPONENT); // 1.5 * 2^23 + 127: the low bits of the sum are the biased exponent
    x                        = max(splat(-127.0f - EXPONENT), x);
    const floats t           = add(x, magic);
    const floats r           = sub(x, sub(t, magic));
    floats       p           = fma(r, splat(0.009582853f * mantissa), splat(0.055906426f * mantissa));
    p                        = fma(p, r, splat(0.24024099f * mantissa));
    p                        = fma(p, r, splat(0.6931242f * mantissa));
    p                        = fma(p, r, splat(mantissa));
    return mul(p, low_bits_as_exponent(t));
}

static inline floats exp2_of(floats x) {
    return exp2_scaled<0, 1>(x);
}

} // namespace fast

#endif
