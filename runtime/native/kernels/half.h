// Products and rows of stacks in half precision (stack.h): bfloat16 in pairs of pixels, [pair][lanes][2]. An attack needs the
// sign of a gradient only, and its products are bound by loads, of which pairs need half.
//
// Sums are float32; what is stored is rounded once, to nearest, ties to even, and what lies below float32's normal numbers
// becomes 0, as processors do it. Weights are rounded alike, after they are multiplied with a channel's scale.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/walk.h"

namespace edge_bcs {

inline std::uint16_t to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  if (magnitude < 0x00800000u) return static_cast<std::uint16_t>(sign >> 16);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_half(std::uint16_t value) {
  const std::uint32_t bits = std::uint32_t{value} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// The kernels of one instruction set. Pointers and steps of a walk are those of stacks in half precision: steps count numbers
// of two bytes, all of them even numbers of pixels but the taps, and `first_pixel` says where in a row the output begins.
// Lanes are 8 or 16. `packed` has a 32-bit word for two channels. Winograd's products are not used.
struct HalfKernels : SumKernels {
  // Pixels [first, first + count) of an image row as floats, and `count` pixels of a row from floats; the other half of the last
  // pair, if `count` is odd, becomes 0.
  void (*widen)(const std::uint16_t* row, std::int64_t lanes, std::int64_t first, std::int64_t count,
                float* to);
  void (*narrow)(const float* from, std::int64_t lanes, std::int64_t count, std::uint16_t* row);
};

extern const HalfKernels half_kernels_scalar;
extern const HalfKernels half_kernels_avx512bf16;

}  // namespace edge_bcs
