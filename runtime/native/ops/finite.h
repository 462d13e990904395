// Whether numbers are finite, in forms that compilers make vectors of.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace edge_bcs {

inline bool is_finite(float x) { return std::fabs(x) <= std::numeric_limits<float>::max(); }

// Whether all of `count` numbers are: seen in their exponents.
inline bool all_finite(const float* numbers, std::int64_t count) {
  std::uint32_t endless = 0;
  for (std::int64_t i = 0; i < count; ++i)
    endless |=
        static_cast<std::uint32_t>((std::bit_cast<std::uint32_t>(numbers[i]) & 0x7f800000u) == 0x7f800000u);
  return endless == 0;
}

}  // namespace edge_bcs
