// Chains of small changes, mixed (AugMix): edge_bcs/data/mixing.py, to the bit.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "image/augment.h"

namespace edge_bcs {

inline constexpr std::size_t mix_chains = 3, longest_chain = 3;

// Uniform draws in [0, 1) that decide how an image is changed.
using MixDraws = std::array<double, 3 + mix_chains * (1 + 2 * longest_chain)>;

// Changes `image`, f32 [C, H, W] in [0, 1], in place, in the memory of three channels more.
void mix(std::span<float> image, const ImageShape& shape, const MixDraws& draws);

}  // namespace edge_bcs
