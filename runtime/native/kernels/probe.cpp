#include "kernels/probe.h"

#include "kernels/simd.h"
#include "kernels/table.h"
#include "kernels/tiles.h"

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace {

inline constexpr int chains = 12;  // more than the multiply-adds that one core has in flight

std::int64_t multiply_adds(std::int64_t rounds) {
  Vector<longest> sums[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) sums[i] = Vector<longest>{} + static_cast<float>(i);
  const Vector<longest> factor = Vector<longest>{} + 0.5f, term = Vector<longest>{} + 0.25f;
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + term;
  }
  Vector<longest> total{};
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) total += sums[i];
  volatile float kept = total[0];
  static_cast<void>(kept);
  return 2 * rounds * chains * longest;
}

float sum(const float* from, std::int64_t count) {
  Vector<longest> sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 * longest <= count; i += 8 * longest) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) sums[k] += load<longest>(from + i + k * longest);
  }
  float total = 0;
  for (; i < count; ++i) total += from[i];
  for (const auto& part : sums)
    for (int lane = 0; lane < longest; ++lane) total += part[lane];
  return total;
}

void copy(const float* from, float* to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + longest <= count; i += longest) store<longest>(to + i, load<longest>(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

inline constexpr ProbeTile tile{longest, max_accumulators / max_tile_vectors, max_tile_vectors};

float load_multiply_adds(const float* planes, const std::int32_t* distance, const float* weight,
                         std::int64_t entries) {
  Vector<longest> sums[tile.rows][tile.across] = {};
  for (std::int64_t j = 0; j < entries; ++j) {
    const Vector<longest> factor = broadcast<longest>(weight[j]);
    const float* const input = planes + distance[j];
#pragma GCC unroll 8
    for (int y = 0; y < tile.rows; ++y)
#pragma GCC unroll 4
      for (int x = 0; x < tile.across; ++x)
        sums[y][x] += factor * load<longest>(input + y * tile.plane_row() + x * longest);
  }
  float total = 0;
  for (const auto& row : sums)
    for (const auto& part : row)
      for (int lane = 0; lane < longest; ++lane) total += part[lane];
  return total;
}

}  // namespace
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const ProbeKernels EDGE_BCS_JOIN(probe_kernels_, EDGE_BCS_VARIANT) = {
    EDGE_BCS_KERNEL_NAMESPACE::multiply_adds,
    EDGE_BCS_KERNEL_NAMESPACE::sum,
    EDGE_BCS_KERNEL_NAMESPACE::copy,
    EDGE_BCS_KERNEL_NAMESPACE::tile,
    EDGE_BCS_KERNEL_NAMESPACE::load_multiply_adds,
};

}  // namespace edge_bcs
