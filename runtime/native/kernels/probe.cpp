#include "kernels/probe.h"

#include "kernels/simd.h"
#include "kernels/table.h"

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

}  // namespace
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const ProbeKernels EDGE_BCS_JOIN(probe_kernels_, EDGE_BCS_VARIANT) = {
    EDGE_BCS_KERNEL_NAMESPACE::multiply_adds,
    EDGE_BCS_KERNEL_NAMESPACE::sum,
    EDGE_BCS_KERNEL_NAMESPACE::copy,
};

}  // namespace edge_bcs
