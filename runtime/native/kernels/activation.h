// The functions that operators apply to each number that they have made, and what their gradients are made from.
#pragma once

#include <cstdint>

namespace edge_bcs {

enum class Function : std::uint8_t {
  none,
  relu,         // max(x, 0)
  relu6,        // min(max(x, 0), 6)
  leaky_relu,   // x where it is positive, slope · x elsewhere
  hardsigmoid,  // min(max((x + 3) / 6, 0), 1)
  sigmoid,      // 1 / (1 + e^−x)
  tanh,
  hardswish,  // x · hardsigmoid(x)
  silu,       // x · sigmoid(x)
  gelu,       // x · Φ(x), Φ the distribution function of the normal distribution
  gelu_tanh,  // x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2
};

struct Activation {
  Function function = Function::none;
  float slope = 0;  // of leaky_relu
};

// Whether both are ReLU or nothing.
constexpr bool only_relu(const Activation& first, const Activation& second) {
  return (static_cast<unsigned>(first.function) | static_cast<unsigned>(second.function)) <=
         static_cast<unsigned>(Function::relu);
}

// Whether the function cuts off below 0, or below 0 and above 6, or does nothing: kernels of convolutions do these where they
// stand; the others are a call.
constexpr bool clips(Function function) { return function <= Function::relu6; }

// Whether the derivative is made from what the function was applied to. Where not, the function's result is enough.
constexpr bool derived_from_input(Function function) { return function >= Function::hardswish; }

// The derivative of a function that has two slopes: `open` where its bit is set, `closed` elsewhere. The bit of x is 0 < x,
// 0 < x < 6 (relu6) or −3 < x < 3 (hardsigmoid).
struct Slopes {
  float open = 1, closed = 0;
};
constexpr bool has_slopes(Function function) {
  return function >= Function::relu && function <= Function::hardsigmoid;
}
constexpr Slopes slopes_of(const Activation& activation) {
  switch (activation.function) {
    case Function::leaky_relu:
      return {1, activation.slope};
    case Function::hardsigmoid:
      return {1.0f / 6, 0};
    default:
      return {};
  }
}

}  // namespace edge_bcs
