// The dense walk with Winograd's products; see winograd.cpp.
#pragma once

#include "kernels/table.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// Rows of the matrix that share a transformed input; groups of rows begin at multiples of it.
inline constexpr int winograd_rows = 3;

// Whether a walk over all weights is done this way: it asks for it, and there are registers for the sums.
inline bool uses_winograd(const Walk& walk) { return walk.winograd && registers >= 32; }

// Packs the weights of rows [begin, end), `begin` a multiple of winograd_rows, into their part of rows · channels · taps · 4/3
// floats at `packed`.
void pack_winograd(const Walk& walk, const Weights& weights, float* packed, std::int64_t begin,
                   std::int64_t end);

// Output planes [first, last), `first` a multiple of winograd_rows, in image rows [begin, end).
void winograd(const Walk& walk, const float* packed, std::int64_t begin, std::int64_t end, std::int64_t first,
              std::int64_t last);

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
