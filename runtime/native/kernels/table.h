// The functions behind one variant's ConvKernels.
#pragma once

#include "kernels/group.h"
#include "kernels/simd.h"
#include "kernels/walk.h"

// 1 in the scalar variant, whose kernels are the plain loops of reference.cpp.
#define EDGE_BCS_IS_scalar 1
#define EDGE_BCS_SCALAR EDGE_BCS_JOIN(EDGE_BCS_IS_, EDGE_BCS_VARIANT)

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// The longest vectors of code that the scalar variant shares: there a float at a time.
#if EDGE_BCS_SCALAR
inline constexpr int longest = 1;
#else
inline constexpr int longest = native_lanes;
#endif

// The number of each kernel position among those that the walk uses; 0 for the others.
struct TapNumbers {
  explicit TapNumbers(const Walk& walk) {
    for (int i = 0; i < walk.taps; ++i) of[walk.used[i]] = static_cast<std::uint8_t>(i);
  }
  std::uint8_t of[max_taps + 1] = {};
};

// Calls body(o, channel, tap, weight, j) for every weight of row `first` + o of a walk, for o < `count`; j is its place in
// the gradient.
template <class Body>
void for_weights(const Walk& walk, const Weights& weights, std::int64_t first, int count, const Body& body) {
  if (weights.all != nullptr) {
    for (int o = 0; o < count; ++o)
      for (std::int64_t channel = 0; channel < walk.channels; ++channel) {
        const std::int64_t at = (first + o) * weights.row_step + channel * weights.channel_step;
        const float factor = weights.factor == nullptr ? 1.0f : weights.factor[channel];
        for (int tap = 0; tap < walk.taps; ++tap) {
          const std::int64_t j = at + walk.used[tap];
          body(o, channel, static_cast<std::int64_t>(tap), weights.all[j] * factor, j);
        }
      }
    return;
  }
  const TapNumbers number(walk);
  const SparseRows& rows = weights.rows;
  for (int o = 0; o < count; ++o)
    for (std::int64_t j = rows.begin(first + o); j < rows.end(first + o); ++j)
      body(o, static_cast<std::int64_t>(rows.entry[j] >> 8),
           static_cast<std::int64_t>(number.of[rows.entry[j] & 255]), rows.weight(j), j);
}

std::int64_t sparse_tasks(const Walk&, const SparseRows&);
void sparse(const Walk&, const SparseRows&, std::int64_t task);
std::int64_t pack_tasks(const Walk&);
void pack(const Walk&, const Weights&, float* packed, std::int64_t task);
std::int64_t dense_tasks(const Walk&);
void dense(const Walk&, const float* packed, std::int64_t task);
std::int64_t gradient_tasks(const Walk&, const SparseRows&);
void gradient(const Walk&, const SparseRows&, const WeightGradient&, std::int64_t task);
std::int64_t dense_gradient_tasks(const Walk&);
void dense_gradient(const Walk&, const Weights&, const WeightGradient&, float* work, std::int64_t task);
void depthwise(const Walk&, const Weights&, std::int64_t row, std::int64_t begin, std::int64_t end);
void depthwise_products(const Walk&, const float* dy, std::int64_t row, std::int64_t begin, std::int64_t end,
                        double* sums);

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
