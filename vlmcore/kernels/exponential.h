// e^x for one number or for a vector of them, and a faster 2^x for the vectors of AVX-512.

#pragma once

#include <immintrin.h>

// e^x of x <= 0, and 0 below -87: 2^n times Cephes' polynomial (expf) of what is left of x.
template <class Floats, class Integers>
inline Floats exp_of(Floats x) {
    const Floats turns = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the last bits are then n
    const Floats n = turns - 12582912.f;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    const Integers power = __builtin_bit_cast(Integers, turns) << 23;
    const Floats result = __builtin_bit_cast(Floats, __builtin_bit_cast(Integers, p) + power);
    return x < -87.f ? Floats{} : result;
}

// 2^x, by the minimax polynomial of what x has above its whole number: within 1.5e-7 of it.
inline __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = r * 1.86713005e-3f + 9.01703071e-3f;
    p = p * r + 5.57999127e-2f;
    p = p * r + 2.40164444e-1f;
    p = p * r + 6.93151295e-1f;
    p = p * r + 1.f;
    return _mm512_scalef_ps(p, x);
}
