// What the kernels in half precision share, with the FP16 of ARMv8.2: a vector is one pixel of eight images; and what is done to
// the sums of a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/half.h"
#include "kernels/table.h"
#include "kernels/tiles.h"

#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
// A room of its own, where the names of other kernels (table.h) are hidden.
namespace half_precision {

using Number = __fp16;
using Eight = float16x8_t;
inline constexpr int VL = 8;  // numbers of a vector

inline const Number* numbers(const float* stack) { return reinterpret_cast<const Number*>(stack); }
inline Number* numbers(float* stack) { return reinterpret_cast<Number*>(stack); }

EDGE_BCS_INLINE Vector<4> lower(Eight value) {
  return reinterpret_cast<Vector<4>>(vcvt_f32_f16(vget_low_f16(value)));
}
EDGE_BCS_INLINE Vector<4> upper(Eight value) { return reinterpret_cast<Vector<4>>(vcvt_high_f32_f16(value)); }
EDGE_BCS_INLINE Eight rounded(Vector<4> low, Vector<4> high) {
  return vcvt_high_f16_f32(vcvt_f16_f32(reinterpret_cast<float32x4_t>(low)),
                           reinterpret_cast<float32x4_t>(high));
}

// Eight bits and one of them for each number.
EDGE_BCS_INLINE uint16x8_t each_bit() { return uint16x8_t{1, 2, 4, 8, 16, 32, 64, 128}; }
EDGE_BCS_INLINE std::uint8_t bits_of(uint16x8_t which) {
  return static_cast<std::uint8_t>(vaddvq_u16(vandq_u16(which, each_bit())));
}
EDGE_BCS_INLINE uint16x8_t of_bits(std::uint8_t bits) { return vtstq_u16(vdupq_n_u16(bits), each_bit()); }
EDGE_BCS_INLINE Eight where(uint16x8_t which, Eight value) {
  return vreinterpretq_f16_u16(vandq_u16(which, vreinterpretq_u16_f16(value)));
}
// Where what a function with a bit is applied to passes a gradient.
EDGE_BCS_INLINE uint16x8_t open(Function function, Eight value) {
  const uint16x8_t positive = vcgtzq_f16(value);
  return function == Function::relu6 ? vandq_u16(positive, vcltq_f16(value, vdupq_n_f16(6))) : positive;
}

// What is done to sums where there are activations that do more than clip: in float32, rounded once.
__attribute__((noinline)) inline void finish_activated(const Walk& walk, const Place& place, std::int64_t row,
                                                       Eight* sums, int height, int width, int down,
                                                       int right) {
  const auto each = [&](const auto& body) {
    for (int y = 0, i = 0; y < height; ++y)
      for (int x = 0; x < width; ++x, ++i) body(i, down + y, right + x);
  };
  const std::int64_t kept = row * walk.mask_plane, bits = row * walk.bits_plane;
  Vector<4> values[2 * max_accumulators], masks[2 * max_accumulators];
  each([&](int i, int y, int x) {
    const std::int64_t at = kept + place.mask[y] + place.mask_x[x];
    if (walk.pre != nullptr) vst1q_f16(numbers(walk.pre) + at, sums[i]);
    values[2 * i] = lower(sums[i]);
    values[2 * i + 1] = upper(sums[i]);
    if (walk.mask != nullptr) {
      const Eight mask = vld1q_f16(numbers(walk.mask) + at);
      masks[2 * i] = lower(mask);
      masks[2 * i + 1] = upper(mask);
    }
    if (walk.bits == nullptr) return;
    const unsigned low = positive_bits<4>(openness<4>(walk.activation.function, values[2 * i])),
                   high = positive_bits<4>(openness<4>(walk.activation.function, values[2 * i + 1]));
    walk.bits[bits + place.bits[y] + place.bit[x] / 8] = static_cast<std::uint8_t>(low | high << 4);
  });
  const int count = 2 * height * width;
  activate<4>(walk.activation, values, count);
  if (walk.mask != nullptr) pass_back<4>(walk.through, masks, values, count);
  const Slopes slopes = slopes_of(walk.through);
  each([&](int i, int y, int x) {
    if (walk.mask_bits != nullptr) {
      const unsigned byte = walk.mask_bits[bits + place.bits[y] + place.bit[x] / 8];
      values[2 * i] = pass_slopes<4>(slopes, byte & 15u, values[2 * i]);
      values[2 * i + 1] = pass_slopes<4>(slopes, byte >> 4, values[2 * i + 1]);
    }
    sums[i] = rounded(values[2 * i], values[2 * i + 1]);
  });
}

// The bits of the TV vectors of one row, of which `byte` has the first.
template <int TV, bool strided>
EDGE_BCS_INLINE void store_open_bits(Function function, const Eight (&values)[TV], std::uint8_t* byte,
                                     const std::int64_t* bit) {
  if constexpr (!strided && TV == 4) {
    uint16x8_t bits[TV];
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x) bits[x] = vandq_u16(open(function, values[x]), each_bit());
    const uint16x8_t halves = vpaddq_u16(vpaddq_u16(bits[0], bits[1]), vpaddq_u16(bits[2], bits[3]));
    const uint8x8_t bytes = vmovn_u16(vpaddq_u16(halves, halves));
    std::memcpy(byte, &bytes, TV);
  } else {
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x) byte[(bit[x] - bit[0]) / 8] = bits_of(open(function, values[x]));
  }
}

// out = act'(mask) · act(sums + shift + addend) for TY rows and TV vectors that begin `down` and `right` in a tile.
template <int TY, int TV, bool strided>
EDGE_BCS_INLINE void finish(const Walk& walk, const Place& place, std::int64_t row, Eight (&sums)[TY][TV],
                            int down = 0, int right = 0) {
#define EDGE_BCS_EACH_ROW _Pragma("GCC unroll 8") for (int y = 0; y < TY; ++y)
#define EDGE_BCS_EACH EDGE_BCS_EACH_ROW _Pragma("GCC unroll 4") for (int x = 0; x < TV; ++x)
  const std::int64_t plane = row * walk.output_plane + place.output_x[right];
  std::int64_t output_x[TV], mask_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) {
    output_x[x] = along<VL, strided>(place.output_x + right, x);
    mask_x[x] = along<VL, strided>(place.mask_x + right, x);
  }
  if (walk.shift != nullptr) {
    const Eight shift = vdupq_n_f16(static_cast<Number>(walk.shift[row]));
    EDGE_BCS_EACH sums[y][x] = vaddq_f16(sums[y][x], shift);
  }
  if (walk.addend != nullptr) {
    const Number* const addend = numbers(walk.addend) + plane;
    EDGE_BCS_EACH sums[y][x] =
        vaddq_f16(sums[y][x], vld1q_f16(addend + place.output[down + y] + output_x[x]));
  }
  if (!walk.simple()) {
    // A copy, since sums whose address is given away would be stored after every product.
    Eight values[TY * TV];
    EDGE_BCS_EACH values[y * TV + x] = sums[y][x];
    finish_activated(walk, place, row, values, TY, TV, down, right);
    EDGE_BCS_EACH sums[y][x] = values[y * TV + x];
  } else {
    const std::int64_t bits = row * walk.bits_plane + place.bit[right] / 8;
    if (walk.bits != nullptr) {
      EDGE_BCS_EACH_ROW store_open_bits<TV, strided>(
          walk.activation.function, sums[y], walk.bits + bits + place.bits[down + y], place.bit + right);
    }
    if (walk.activation.function != Function::none) {
      EDGE_BCS_EACH sums[y][x] = vmaxq_f16(sums[y][x], vdupq_n_f16(0));
    }
    if (walk.activation.function == Function::relu6) {
      EDGE_BCS_EACH sums[y][x] = vminq_f16(sums[y][x], vdupq_n_f16(6));
    }
    if (walk.mask != nullptr) {
      const Number* const mask = numbers(walk.mask) + row * walk.mask_plane + place.mask_x[right];
      EDGE_BCS_EACH sums[y][x] =
          where(open(walk.through.function, vld1q_f16(mask + place.mask[down + y] + mask_x[x])), sums[y][x]);
    }
    if (walk.mask_bits != nullptr) {
      std::int64_t byte[TV];
#pragma GCC unroll 4
      for (int x = 0; x < TV; ++x) byte[x] = strided ? (place.bit[right + x] - place.bit[right]) / 8 : x;
      EDGE_BCS_EACH sums[y][x] =
          where(of_bits(walk.mask_bits[bits + place.bits[down + y] + byte[x]]), sums[y][x]);
    }
  }
  Number* const output = numbers(walk.output) + plane;
  EDGE_BCS_EACH_ROW {
    Number* const to = output + place.output[down + y];
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x) vst1q_f16(to + output_x[x], sums[y][x]);
  }
#undef EDGE_BCS_EACH
#undef EDGE_BCS_EACH_ROW
  if (place.ends_row && walk.tail + walk.bottom > 0) {
    for (int y = 0; y < TY; ++y) {
      const std::int64_t count = walk.tail + (place.last_row[down + y] ? walk.bottom : 0);
      Number* const from =
          numbers(walk.output) + row * walk.output_plane + place.output[down + y] + walk.tail_at;
      std::memset(from, 0, static_cast<std::size_t>(count) * sizeof *from);
    }
  }
}

}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE
}  // namespace edge_bcs

#endif
