// Projected gradient descent by a network's graphs: runtime/attack.py, to the bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "ops/philox.h"
#include "session/network.h"

namespace edge_bcs {

// What the random start of an attack is drawn from.
struct Noise {
  std::uint64_t seed, step;
  Purpose purpose;
  std::uint64_t place;  // of the micro-batch's first image in its batch
};

enum class Start { uniform, gaussian, none };

struct Descent {
  double epsilon, step_size;
  std::uint32_t steps;
  Start start;
  bool increases_kl;
};

// Goes from the `images` images in `input` to those in `adversarial`.
void descend(Network& network, std::size_t images, const Descent& how, const Noise& noise);

// Fills `adversarial` for the training graph: the images at [first, first + images) of a batch of `batch`.
void craft(Network& network, std::size_t images, std::uint64_t first, std::uint64_t batch,
           const Noise& noise);

// Probabilities [n, classes] of logits [n, classes], computed in double precision; they may lie in one place.
void softmax(std::span<const float> logits, std::size_t classes, std::span<float> probabilities);

}  // namespace edge_bcs
