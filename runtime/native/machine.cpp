// Measures what the cores can do at most; the interface of edge_bcs/bench/machine.py. Each call measures one thread, so
// several threads that call at once measure several cores at once.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels.h"

#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The most `work()` units a second of any call within `seconds`.
template <class Work>
double best_rate(double seconds, const Work& work) {
  double best = 0;
  for (const double end = seconds_now() + seconds; seconds_now() < end;) {
    const double start = seconds_now();
    const auto done = static_cast<double>(work());
    best = std::max(best, done / std::max(seconds_now() - start, 1e-9));
  }
  return best;
}

}  // namespace

// Floating-point operations a second, multiply-adds counting two.
EDGE_BCS_EXPORT double edge_bcs_peak_arithmetic(double seconds) {
  return best_rate(seconds, [] { return edge_bcs::probe_kernels().multiply_adds(200000); });
}

// Bytes a second over buffers of so many bytes: read (copy = 0), or read and written (copy = 1, both counted).
EDGE_BCS_EXPORT double edge_bcs_peak_bandwidth(double seconds, std::int64_t bytes, int copy) {
  const std::int64_t count = bytes / static_cast<std::int64_t>(sizeof(float)) / (copy ? 2 : 1);
  std::vector<float> from(static_cast<std::size_t>(count), 1.0f), to(copy ? from.size() : 0, 0.0f);
  return best_rate(seconds, [&] {
    if (copy) {
      edge_bcs::probe_kernels().copy(from.data(), to.data(), count);
    } else {
      volatile float kept = edge_bcs::probe_kernels().sum(from.data(), count);
      static_cast<void>(kept);
    }
    return count * static_cast<std::int64_t>(sizeof(float)) * (copy ? 2 : 1);
  });
}
