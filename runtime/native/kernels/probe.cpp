#include "kernels/probe.h"

#include "kernels/simd.h"
#include "kernels/table.h"

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace {

#if EDGE_BCS_SCALAR
inline constexpr int length = 1;
#else
inline constexpr int length = native_lanes;
#endif
inline constexpr int chains = 12;  // more than the multiply-adds that one core has in flight

std::int64_t multiply_adds(std::int64_t rounds) {
  Vector<length> sums[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) sums[i] = Vector<length>{} + static_cast<float>(i);
  const Vector<length> factor = Vector<length>{} + 0.5f, term = Vector<length>{} + 0.25f;
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sums[i] = sums[i] * factor + term;
  }
  Vector<length> total{};
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) total += sums[i];
  volatile float kept = total[0];
  static_cast<void>(kept);
  return 2 * rounds * chains * length;
}

float sum(const float* from, std::int64_t count) {
  Vector<length> sums[8] = {};
  std::int64_t i = 0;
  for (; i + 8 * length <= count; i += 8 * length) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) sums[k] += load<length>(from + i + k * length);
  }
  float total = 0;
  for (; i < count; ++i) total += from[i];
  for (const auto& part : sums)
    for (int lane = 0; lane < length; ++lane) total += part[lane];
  return total;
}

void copy(const float* from, float* to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + length <= count; i += length) store<length>(to + i, load<length>(from + i));
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
