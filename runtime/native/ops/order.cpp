// Operators that order and reset the accumulation of gradients.

#include "ops/op.h"

namespace edge_bcs {
namespace {

// Starts a chain of gradients that accumulate in place: zeroes the buffer if the flag is set.
struct ResetGradient {
  static constexpr const char* name = "ResetGradient";
  static constexpr std::array inputs{Port{"buffer", float32}, Port{"lazy_reset_grad", boolean}};
  static constexpr std::array outputs{Port{"buffer_out", float32, aliases(0)}};
  explicit ResetGradient(const Attributes&) {}
  void compute(Context& context) const {
    const bool reset = context.flag(1);
    const auto buffer = context.in_place<float>(0, 0);
    if (reset) std::fill(buffer.begin(), buffer.end(), 0.0f);
  }
};
const Register<ResetGradient> reset_gradient;

// Ends a chain: its output says that the buffer holds the gradient.
struct GradientReady {
  static constexpr const char* name = "GradientReady";
  static constexpr std::array inputs{Port{"buffer", float32}};
  static constexpr std::array outputs{Port{"ready", boolean}};
  explicit GradientReady(const Attributes&) {}
  void compute(Context& context) const {
    context.input<float>(0);
    context.output<bool>(0, {1})[0] = true;
  }
};
const Register<GradientReady> gradient_ready;

// Its first input, unchanged; makes whatever uses it wait for the second.
struct After {
  static constexpr const char* name = "After";
  static constexpr std::array inputs{Port{"x", float32}, Port{"token", any}};
  static constexpr std::array outputs{Port{"y", float32, aliases(0)}};
  explicit After(const Attributes&) {}
  void compute(Context& context) const { context.in_place<float>(0, 0); }
};
const Register<After> after;

}  // namespace
}  // namespace edge_bcs
