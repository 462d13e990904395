// Half-size storage: float32 to bfloat16 (the upper 16 bits of a float32) and back.

#include <algorithm>
#include <cstring>

#include "ops/op.h"

namespace edge_bcs {
namespace {

// Rounded to nearest, ties to even. What is not a number stays so, and what is not zero does not become zero
// (it becomes the smallest bfloat16 of its sign), so that a ReLU mask taken of the result is exact.
std::uint16_t narrow(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  if (magnitude > 0x7f800000u) rounded = (bits >> 16) | 0x40u;
  rounded |= static_cast<std::uint32_t>(magnitude != 0 && (rounded & 0x7fffu) == 0);
  return static_cast<std::uint16_t>(rounded);
}

struct Narrow {
  static constexpr const char* name = "Narrow";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", uint16}};
  explicit Narrow(const Attributes&) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const auto y = context.output<std::uint16_t>(0, x.shape());
    context.parallel_parts(x.size(), elements_a_task, [&](std::int64_t begin, std::int64_t end) {
      std::transform(x.begin() + begin, x.begin() + end, y.begin() + begin, narrow);
    });
  }
};
const Register<Narrow> narrow_op;

struct Widen {
  static constexpr const char* name = "Widen";
  static constexpr std::array inputs{Port{"x", uint16}, Port{"token", any, optional}};
  static constexpr std::array outputs{Port{"y", float32}};
  explicit Widen(const Attributes&) {}

  void compute(Context& context) const {
    const auto x = context.input<std::uint16_t>(0);
    const auto y = context.output<float>(0, x.shape());
    context.parallel_parts(x.size(), elements_a_task, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::uint32_t bits = static_cast<std::uint32_t>(x[i]) << 16;
        std::memcpy(&y[i], &bits, sizeof bits);
      }
    });
  }
};
const Register<Widen> widen_op;

}  // namespace
}  // namespace edge_bcs
