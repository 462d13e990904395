// Loops over the images that lie innermost in a stack.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#include "ops/stack.h"

namespace edge_bcs {

// Calls body(lanes), where the number is a usual one as a constant, so that the compiler makes vectors of a loop over lanes.
template <class Body>
void with_lanes(std::int64_t lanes, const Body& body) {
  switch (lanes) {
    case 16:
      return body(std::integral_constant<std::int64_t, 16>{});
    case 8:
      return body(std::integral_constant<std::int64_t, 8>{});
    case 4:
      return body(std::integral_constant<std::int64_t, 4>{});
    default:
      return body(lanes);
  }
}

// Sums over runs of whole pixels, a sum for each lane, in double. The order depends on the number of lanes and on the runs
// alone.
class LaneSums {
 public:
  explicit LaneSums(std::int64_t lanes) : lanes_(lanes), period_(step % lanes == 0 ? step : lanes) {
    std::fill_n(parts_.data(), period_, 0.0);
  }

  // Adds the `count` floats from a on.
  void add(const float* a, std::int64_t count) {
    take(count, [a](std::int64_t j) { return static_cast<double>(a[j]); });
  }

  // Adds the products of a and b.
  void add(const float* a, const float* b, std::int64_t count) {
    take(count, [a, b](std::int64_t j) { return static_cast<double>(a[j]) * static_cast<double>(b[j]); });
  }

  // Writes the sums to totals[0 … lanes).
  void write(double* totals) const {
    std::copy_n(parts_.data(), lanes_, totals);
    for (std::int64_t j = lanes_; j < period_; ++j) totals[j % lanes_] += parts_[j];
  }

 private:
  static constexpr std::int64_t step = 16;  // numbers that do not wait for each other

  template <class Term>
  void take(std::int64_t count, const Term& term) {
    std::int64_t j = 0;
    if (period_ == step)
      for (; j + step <= count; j += step)
        for (std::int64_t i = 0; i < step; ++i) parts_[i] += term(j + i);
    else
      for (; j + period_ <= count; j += period_)
        for (std::int64_t i = 0; i < period_; ++i) parts_[i] += term(j + i);
    for (std::int64_t i = 0; j + i < count; ++i) parts_[i] += term(j + i);
  }

  std::int64_t lanes_, period_;
  std::array<double, most_lanes> parts_;
};

}  // namespace edge_bcs
