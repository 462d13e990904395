// Sums in double precision. Eight running parts, added in a fixed order at the end: a compiler can use
// vectors without changing a bit.
#pragma once

#include <array>
#include <cstdint>

namespace edge_bcs {

// Σ term(j) for j in [0, count).
template <class Term>
double sum_of(std::int64_t count, const Term& term) {
  std::array<double, 8> parts{};
  std::int64_t j = 0;
  for (; j + 8 <= count; j += 8)
    for (int k = 0; k < 8; ++k) parts[k] += term(j + k);
  for (int k = 0; j + k < count; ++k) parts[k] += term(j + k);
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

inline double sum(const float* a, std::int64_t count) {
  return sum_of(count, [=](std::int64_t j) { return static_cast<double>(a[j]); });
}

inline double dot(const float* a, const float* b, std::int64_t count) {
  return sum_of(count, [=](std::int64_t j) { return static_cast<double>(a[j]) * b[j]; });
}

}  // namespace edge_bcs
