// Products and rows of stacks in half precision (stack.h). An attack needs the sign of a gradient only, and its products are bound
// by loads, of which numbers of two bytes need half. There are two forms, one a processor:
//
// - bfloat16 (x86): pairs of pixels, [pair][lanes][2]. Sums are float32; what is stored is rounded once, and what lies below
//   float32's normal numbers becomes 0, as processors do it.
// - FP16 (aarch64): pixel after pixel, [pixel][lanes]. Products are added in FP16, each sum rounded, in runs of at most
//   `run_of_entries` of a row's entries in their order, or of `channels_of_run` channels where all weights are visited. Runs are
//   added as float32 and rounded once, then the row's shift and the addend are added in FP16. A row's scale is multiplied into
//   its weights. Activations beyond those that clip are float32, rounded once. The gradient that enters the network is multiplied
//   with a power of two for each image, so that it stays far from either end of FP16's range.
//
// All rounding is to nearest, ties to even. Weights are rounded alike, after they are multiplied with a channel's scale.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/walk.h"

namespace edge_bcs {

#if defined(__aarch64__)

inline constexpr bool half_is_fp16 = true;

inline std::uint16_t to_half(double value) {
  const auto rounded = static_cast<__fp16>(value);
  std::uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}

inline float from_half(std::uint16_t bits) {
  __fp16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

// Distances in numbers from image to image of a pixel, and to the second pixel of a pair.
inline constexpr std::int64_t half_image_step = 1;
inline constexpr std::int64_t half_second_pixel(std::int64_t lanes) { return lanes; }

#else

inline constexpr bool half_is_fp16 = false;

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

inline constexpr std::int64_t half_image_step = 2;
inline constexpr std::int64_t half_second_pixel(std::int64_t) { return 1; }

#endif

// FP16: terms of a sum that are added before it is widened. Errors of a sum grow with its terms: those of 64 are below the
// rounding of a bfloat16.
inline constexpr int run_of_entries = 64;
constexpr std::int64_t channels_of_run(int taps) {
  return taps == 0 || taps > run_of_entries ? 1 : run_of_entries / taps;
}

// FP16: the largest part of each image's gradient at the logits is at least half of this, and below it.
inline constexpr int half_gradient_exponent = 6;

// The kernels of one instruction set. Pointers and steps of a walk are those of stacks in half precision: steps count numbers
// of two bytes, all of them even numbers of pixels but the taps, and `first_pixel` says where in a row the output begins.
// Lanes are 8 or 16. `packed` has a 32-bit word for two channels. Winograd's products are not used.
struct HalfKernels : SumKernels {
  // As ConvKernels::depthwise, of kernels of at most `run_of_entries` positions; null where they are computed in float32
  // (ops/half_planes.h).
  void (*depthwise)(const Walk&, const Weights&, std::int64_t row, std::int64_t begin, std::int64_t end);

  // Pixels [first, first + count) of an image row as floats, and `count` pixels of a row from floats; the other half of the last
  // pair, if `count` is odd, becomes 0.
  void (*widen)(const std::uint16_t* row, std::int64_t lanes, std::int64_t first, std::int64_t count,
                float* to);
  void (*narrow)(const float* from, std::int64_t lanes, std::int64_t count, std::uint16_t* row);
};

extern const HalfKernels half_kernels_scalar;
extern const HalfKernels half_kernels_avx512bf16;
extern const HalfKernels half_kernels_neonfp16;

}  // namespace edge_bcs
