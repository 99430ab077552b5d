// e^v of vectors.
#pragma once

#include "isa.h"

namespace qllm {
namespace {

constexpr float LEAST_EXPONENT = -87;

// e^v to two units in the last place; from LEAST_EXPONENT down it is not 0 but about 1e-38.
inline VF exp_f(VF v) {
    v = max_f(set_f(LEAST_EXPONENT), min_f(set_f(88.0f), v));
    VI power = nearest_i(mul_f(v, set_f(1.44269504f)));  // what is not a number stays none
    VF n = to_float(power);
    // v - n ln 2, ln 2 in two parts, of which the first has few bits.
    VF r = fma_f(n, set_f(-0.693359375f), v);
    r = fma_f(n, set_f(2.12194440e-4f), r);
    VF p = set_f(1.9875691500e-4f);
    p = fma_f(p, r, set_f(1.3981999507e-3f));
    p = fma_f(p, r, set_f(8.3334519073e-3f));
    p = fma_f(p, r, set_f(4.1665795894e-2f));
    p = fma_f(p, r, set_f(1.6666665459e-1f));
    p = fma_f(p, r, set_f(5.0000001201e-1f));
    p = add_f(fma_f(mul_f(r, r), p, r), set_f(1));
    return mul_f(p, as_float(shift_left<23>(add_i(power, set_i(127)))));
}

}  // namespace
}  // namespace qllm
