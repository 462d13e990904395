// The activations and their derivatives (activation.h) over vectors. Relative errors are below 2^−21 (GELU: 2^−20; its
// tanh form: that times the exponent of e^x within); what is no number stays none, and an infinity gives the limit.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/simd.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// values[i] = the function of values[i], for `count` vectors.
template <int VL>
void activate(const Activation& activation, Vector<VL>* values, int count);

// gradients[i] ·= the derivative, from `kept`: what the function was applied to, or its result (derived_from_input).
template <int VL>
void pass_back(const Activation& activation, const Vector<VL>* kept, Vector<VL>* gradients, int count);

// A number that is positive where the bit of x is set (see Slopes).
template <int VL>
EDGE_BCS_INLINE Vector<VL> openness(Function function, Vector<VL> x) {
  if (function == Function::relu6) return x < broadcast<VL>(6) ? x : Vector<VL>{};
  if (function == Function::hardsigmoid)
    return x < Vector<VL>{} ? x + broadcast<VL>(3) : broadcast<VL>(3) - x;
  return x;
}

// The gradient through a function with two slopes, from its bits.
template <int VL>
EDGE_BCS_INLINE Vector<VL> pass_slopes(Slopes slopes, unsigned bits, Vector<VL> gradient) {
  const Vector<VL> open = where_bits<VL>(bits, gradient);
  return slopes.closed == 0 ? open * slopes.open
                            : open * slopes.open + where_bits<VL>(~bits, gradient) * slopes.closed;
}

// How each is computed

template <int VL>
EDGE_BCS_INLINE Vector<VL> magnitude(Vector<VL> x) {
  return reinterpret_cast<Vector<VL>>(reinterpret_cast<Integers<VL>>(x) & 0x7fffffff);
}

// e^(u + v) for u ≤ 0 and a v that is small beside 1; 0 below the smallest normal number. e^x = 2^n · e^r with
// |r| ≤ ln 2 / 2, and e^r by the polynomial of degree 6 whose largest relative error, 3.3e-9, is least.
template <int VL>
EDGE_BCS_INLINE Vector<VL> exp_of_negative(Vector<VL> u, Vector<VL> v) {
  const Vector<VL> least = broadcast<VL>(-87.3365f);  // 2^−126
  // Added to a number below 2^22, this leaves its integer part in the lowest bits.
  constexpr float rounder = 0x1.8p23f;
  constexpr std::int32_t rounder_bits = 0x4B400000, bias = 127, mantissa = 23;
  const Vector<VL> x = u < least ? least : u;
  const Vector<VL> rounded = x * 1.44269504f + rounder, n = rounded - rounder;
  // ln 2 in two parts, of which n times the first is exact.
  const Vector<VL> r = ((x - n * 0.693359375f) + n * 2.12194440e-4f) + v;
  Vector<VL> q = r * 1.38131448e-3f + 8.36941879e-3f;
  q = q * r + 4.1668456e-2f;
  q = q * r + 0.166665152f;
  q = q * r + 0.49999994f;
  const Vector<VL> power = (r * r * q + r) + 1.0f;
  const Integers<VL> exponent = (reinterpret_cast<Integers<VL>>(rounded) - (rounder_bits - bias)) << mantissa;
  return u < least ? Vector<VL>{} : power * reinterpret_cast<Vector<VL>>(exponent);
}

// sigmoid(x) and sigmoid(−x), each with its own relative accuracy.
template <int VL>
struct Sigmoids {
  Vector<VL> of, of_negative;
  EDGE_BCS_INLINE explicit Sigmoids(Vector<VL> x) {
    const Vector<VL> e = exp_of_negative<VL>(-magnitude<VL>(x), Vector<VL>{});
    const Vector<VL> larger = 1.0f / (1.0f + e), smaller = e / (1.0f + e);
    of = x < Vector<VL>{} ? smaller : larger;
    of_negative = x < Vector<VL>{} ? larger : smaller;
  }
};

// a · b, which is 0 where b is, whatever a is.
template <int VL>
EDGE_BCS_INLINE Vector<VL> times(Vector<VL> a, Vector<VL> b) {
  return b == Vector<VL>{} ? Vector<VL>{} : a * b;
}

// Φ(x), and e^(−x²/2). Φ(−t) = e^(−t²/2) · M(t) with Mills' ratio M over √(2π), here a polynomial of 1 / (1 + 0.35 t) whose
// largest relative error, 3.2e-8, is least.
template <int VL>
struct Normal {
  Vector<VL> distribution, exponential;
  EDGE_BCS_INLINE explicit Normal(Vector<VL> x) {
    // The square's rounding error would be multiplied by the square: so x is a number of 12 bits, whose square is exact,
    // and the rest.
    const Vector<VL> coarse =
        reinterpret_cast<Vector<VL>>(reinterpret_cast<Integers<VL>>(x) & ~std::int32_t{0xFFF});
    const Vector<VL> rest = (x - coarse) * (x + coarse);
    exponential = exp_of_negative<VL>(coarse * coarse * -0.5f, rest * -0.5f);
    const Vector<VL> s = 1.0f / (magnitude<VL>(x) * 0.35f + 1.0f);
    Vector<VL> p = s * -0.0291150231f + 0.143818453f;
    p = p * s + -0.255391061f;
    p = p * s + 0.158796638f;
    p = p * s + -0.0228434708f;
    p = p * s + 0.105392165f;
    p = p * s + 0.119863085f;
    p = p * s + 0.13985756f;
    p = p * s + 0.13962166f;
    const Vector<VL> tail = exponential * (p * s);
    distribution = x > Vector<VL>{} ? 1.0f - tail : tail;
  }
};

// What GELU's tanh form takes the sigmoid of: (1 + tanh(u)) / 2 = sigmoid(2u); and its derivative.
template <int VL>
struct TanhForm {
  Vector<VL> inner, slope;
  EDGE_BCS_INLINE explicit TanhForm(Vector<VL> x) {
    constexpr float first = 1.59576912f, third = first * 0.044715f;
    const Vector<VL> square = x * x;
    inner = x * (square * third + first);
    slope = square * (3 * third) + first;
  }
};

template <int VL>
EDGE_BCS_INLINE Vector<VL> relu6_of(Vector<VL> x) {
  const Vector<VL> rectified = relu<VL>(x), most = broadcast<VL>(6);
  return rectified > most ? most : rectified;
}

template <int VL>
EDGE_BCS_INLINE Vector<VL> hardsigmoid_of(Vector<VL> x) {
  const Vector<VL> three = broadcast<VL>(3), between = (x + three) * (1.0f / 6);
  return x <= -three ? Vector<VL>{} : (x >= three ? broadcast<VL>(1) : between);
}

template <int VL>
EDGE_BCS_INLINE Vector<VL> hardswish_of(Vector<VL> x) {
  const Vector<VL> three = broadcast<VL>(3), between = x * ((x + three) * (1.0f / 6));
  return x <= -three ? Vector<VL>{} : (x >= three ? x : between);
}

// Near 0 by the odd polynomial whose largest relative error, 4.4e-9, is least; elsewhere 1 − 2 / (1 + e^2x).
template <int VL>
EDGE_BCS_INLINE Vector<VL> tanh_of(Vector<VL> x) {
  const Vector<VL> size = magnitude<VL>(x), square = x * x;
  Vector<VL> p = square * -5.70498733e-3f + 2.0639088e-2f;
  p = p * square + -5.37397154e-2f;
  p = p * square + 0.133314416f;
  p = p * square + -0.333332807f;
  const Vector<VL> near = x + x * (square * p);
  const Vector<VL> e = exp_of_negative<VL>(size * -2.0f, Vector<VL>{});
  const Vector<VL> far = 1.0f - 2.0f * e / (1.0f + e);
  return size < broadcast<VL>(0.625f) ? near : (x < Vector<VL>{} ? -far : far);
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
