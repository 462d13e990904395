// What lies between two pixels: edge_bcs/data/mixing.py's `between` and `around`, to the bit.
#pragma once

#include <algorithm>
#include <cmath>

namespace edge_bcs {

// one + weight · (other − one), each rounded by itself.
inline float between(float one, float other, float weight) {
  float change = other - one;
  change *= weight;
  return change + one;
}

// Of a place on a side: the pixels before and after it in the image, and the weight of the second.
struct Place {
  int before, after;
  float weight;
};

inline Place around(double place, int length) {
  const double before = std::floor(place), most = length - 1;
  return {static_cast<int>(std::clamp(before, 0.0, most)),
          static_cast<int>(std::clamp(before + 1, 0.0, most)), static_cast<float>(place - before)};
}

}  // namespace edge_bcs
