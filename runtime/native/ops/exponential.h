// exp and log in double precision, within one unit in the last place of the exact value: of our own, because those of the C
// libraries differ in their last bits, and a loss must not depend on the machine's. Only operations that IEEE 754 rounds
// exactly, in one order; whoever includes it is compiled with -ffp-contract=off.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace edge_bcs {

namespace exponential_detail {

// ln 2 in two parts; a whole number of up to 11 bits times the first is exact.
inline constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
inline constexpr double infinity = std::numeric_limits<double>::infinity();

// 2^k of a normal number.
constexpr double power_of_two(int k) {
  return std::bit_cast<double>(static_cast<std::uint64_t>(k + 1023) << 52);
}

}  // namespace exponential_detail

// e^x; 0 and infinity beyond the range of double.
constexpr double exponential(double x) {
  using namespace exponential_detail;
  constexpr double log2_e = 0x1.71547652b82fep0;
  // 1/14!, …, 1/2!
  constexpr double series[] = {
      1 / 87178291200.0, 1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0,
      1 / 362880.0,      1 / 40320.0,      1 / 5040.0,      1 / 720.0,      1 / 120.0,
      1 / 24.0,          1 / 6.0,          1 / 2.0};
  if (!(x > -746)) return x <= -746 ? 0 : x;
  if (!(x < 710)) return infinity;
  const int k = static_cast<int>(x * log2_e + (x < 0 ? -0.5 : 0.5));
  // x = k·ln 2 + r, |r| ≤ ½ ln 2, with what r's rounding leaves.
  const double high = x - k * ln2_high, low = k * ln2_low;
  const double r = high - low, rest = (high - r) - low;
  double tail = 0;
  for (const double coefficient : series) tail = tail * r + coefficient;
  const double power = 1 + (r + (tail * r * r + rest));
  // In two steps where 2^k itself is beyond a normal number.
  if (k > 1023) return power * 2 * power_of_two(k - 1);
  if (k < -1022) return power * power_of_two(k + 64) * power_of_two(-64);
  return power * power_of_two(k);
}

// The natural logarithm; NaN below 0.
constexpr double logarithm(double x) {
  using namespace exponential_detail;
  // 2/23, 2/21, …, 2/3: of log (1 + s)/(1 − s) = 2s + s·R, R = 2s²/3 + 2s⁴/5 + …
  constexpr double series[] = {2 / 23.0, 2 / 21.0, 2 / 19.0, 2 / 17.0, 2 / 15.0, 2 / 13.0,
                               2 / 11.0, 2 / 9.0,  2 / 7.0,  2 / 5.0,  2 / 3.0};
  constexpr double least_normal = std::numeric_limits<double>::min(), root_of_half = 0x1.6a09e667f3bcdp-1;
  if (!(x > 0)) return x == 0 ? -infinity : std::numeric_limits<double>::quiet_NaN();
  if (x == infinity) return x;
  int e = 0;
  if (x < least_normal) {
    x *= 0x1p54;
    e = -54;
  }
  // x = m·2^e, m in [√½, √2).
  const auto bits = std::bit_cast<std::uint64_t>(x);
  e += static_cast<int>(bits >> 52) - 1022;
  double m = std::bit_cast<double>((bits & 0x000fffffffffffff) | 0x3fe0000000000000);
  if (m < root_of_half) {
    m *= 2;
    --e;
  }
  const double f = m - 1, s = f / (2 + f), square = s * s, half = 0.5 * f * f;
  double rest = 0;
  for (const double coefficient : series) rest = rest * square + coefficient;
  rest *= square;
  // 2s = f − f²/2 + s·f²/2, so that what is added to f is small.
  return e * ln2_high - ((half - (s * (half + rest) + e * ln2_low)) - f);
}

}  // namespace edge_bcs
