// The dense walk with Winograd's products; see winograd.cpp.
#pragma once

#include "kernels/table.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// Rows of the matrix that share a transformed input; groups of rows begin at multiples of it.
inline constexpr int winograd_rows = 3;

// Whether a dense walk can be done this way: its kernel positions lie three beside each other, its pixels four, each a whole
// number of vectors, there are registers for the sums, and enough input planes and pixels in a row.
bool suits_winograd(const Walk& walk);

// Packs the weights of rows [begin, end), `begin` a multiple of winograd_rows, into their part of rows · channels · taps · 4/3
// floats at `packed`.
void pack_winograd(const Walk& walk, const SparseRows& rows, float* packed, std::int64_t begin, std::int64_t end);

// Output planes [first, last), `first` a multiple of winograd_rows, in image rows [begin, end).
void winograd(const Walk& walk, const float* packed, std::int64_t begin, std::int64_t end, std::int64_t first,
              std::int64_t last);

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
