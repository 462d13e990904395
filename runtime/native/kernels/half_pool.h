// Maxima over 2 × 2 pixels in half precision (half.h), and their gradients, where windows lie side by side and fill the image.
// The other poolings are computed from widened rows.
#pragma once

#include <cstdint>

#include "kernels/activation.h"

namespace edge_bcs {

// Two image rows, and the row of `count` pixels that they become, the halves of whose last pair may be one pixel. Of a window,
// choices count its pixels from the left, then from the top (rows.h).
struct HalfPoolKernels {
  // `choice` may be null.
  void (*max_pool)(const std::uint16_t* upper, const std::uint16_t* lower, std::int64_t lanes,
                   std::int64_t count, Function function, std::uint16_t* y, std::uint8_t* choice);
  void (*gradient)(const std::uint16_t* dy, const std::uint8_t* choice, std::int64_t lanes,
                   std::int64_t count, std::uint16_t* upper, std::uint16_t* lower);
};

extern const HalfPoolKernels half_pool_avx512bf16;

}  // namespace edge_bcs
