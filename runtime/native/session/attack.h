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
  double noise, radius, step_size;  // noise: of a uniform start
  std::uint32_t steps;
  Start start;
  bool increases_kl;
};

// How a training whose attack is now of that kind crafts its images: `Attack.crafting` of edge_bcs/core/settings.py.
Descent crafting(const Manifest& manifest, AttackKind kind);
// PGD as a network is measured with it: a uniform start, and steps of 2.5·ε/steps.
Descent measuring(double epsilon, std::uint32_t steps);

// Moves images of so many pixels to where an attack on them starts: pixel j of image i by draw (place + i)·pixels + j of the
// noise, uniform in ±width or 0.001·N(0, 1), and then into [0, 1]. Splitting a batch changes nothing.
void move_to_start(std::span<float> x, Start start, double width, const Noise& noise, std::size_t pixels);

// Goes from the `images` images in `input` to those in `adversarial`.
void descend(Network& network, std::size_t images, const Descent& how, const Noise& noise);

// Fills `adversarial` for the training graph: the images at [first, first + images) of a batch of `batch`.
void craft(Network& network, AttackKind kind, std::size_t images, std::uint64_t first, std::uint64_t batch,
           const Noise& noise);

// Probabilities [n, classes] of logits [n, classes], computed in double precision; they may lie in one place.
void softmax(std::span<const float> logits, std::size_t classes, std::span<float> probabilities);

}  // namespace edge_bcs
