// Rows in half precision (half.h), computed where they lie: what is done number by number with ReLU or nothing, and maxima over
// 2 × 2 pixels that lie side by side and fill the image. The others are computed from widened rows.
#pragma once

#include <cstdint>

#include "kernels/activation.h"
#include "kernels/rows.h"

namespace edge_bcs {

struct HalfRowKernels {
  // RowKernels::combine of a row that is simple, of `count` pixels; its stacks are in half precision, whatever their type is.
  void (*combine)(const Row& row, std::int64_t lanes, std::int64_t count);

  // Two image rows, and the row of `count` pixels that they become. Of a window, choices count its pixels from the left, then
  // from the top (rows.h).
  // `choice` may be null.
  void (*max_pool)(const std::uint16_t* upper, const std::uint16_t* lower, std::int64_t lanes,
                   std::int64_t count, Function function, std::uint16_t* y, std::uint8_t* choice);
  void (*gradient)(const std::uint16_t* dy, const std::uint8_t* choice, std::int64_t lanes,
                   std::int64_t count, std::uint16_t* upper, std::uint16_t* lower);
};

extern const HalfRowKernels half_rows_avx512bf16;

}  // namespace edge_bcs
