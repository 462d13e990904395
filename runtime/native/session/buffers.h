// The bound buffers of a program, where they lie in the arena: runtime/buffers.py says what each is for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "runner/program.h"
#include "session/manifest.h"
#include "session/state.h"

namespace edge_bcs {

struct Buffers {
  std::span<float> input, adversarial, target, logits, sample_weight;  // of a micro-batch
  std::span<std::int64_t> labels;
  std::span<float> loss, correct, step_size, epsilon, hyper;
  std::span<std::int64_t> counter;
  std::span<std::uint8_t> reset_gradients;
  std::span<float> coo_gradient, dense_gradient;
  std::span<float> mean, variance, kept_mean, kept_variance;  // the latter two with batch statistics alone
  std::array<std::span<std::byte>, state_tensors> state;

  // Throws Error if the program's buffers are not those that the manifest says.
  Buffers(const Program& program, std::byte* arena, const Manifest& manifest);

  std::span<float> floats(StateTensor tensor) const {
    return {reinterpret_cast<float*>(state[tensor].data()), state[tensor].size() / sizeof(float)};
  }
  StateBytes state_bytes() const;
};

}  // namespace edge_bcs
