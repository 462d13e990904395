// Measures what the cores can do at most; the interface of edge_bcs/bench/machine.py. But for the bandwidth, which cores
// share, each call measures one thread, so several threads that call at once measure several cores at once.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "ops/dispatch.h"

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

// Bytes a second that so many threads together move within so many bytes each: read (copy = 0), or read and written (copy = 1,
// both counted). They begin and end every round together, and the best round counts: each by itself would take its best moment
// while others wait.
EDGE_BCS_EXPORT double edge_bcs_peak_bandwidth(double seconds, std::int64_t bytes, int copy, int threads) {
  constexpr std::int64_t at_least = 256 << 20;  // bytes of a round, so that meeting costs little
  const std::int64_t sides = copy != 0 ? 2 : 1,
                     count = bytes / static_cast<std::int64_t>(sizeof(float)) / sides;
  const std::int64_t passes = std::max<std::int64_t>(1, at_least / bytes);
  const auto moved = static_cast<double>(threads * passes * count * sides) * sizeof(float);
  double best = 0, began = 0, end = 0;
  bool over = false;
  std::barrier meeting(threads, [&]() noexcept {
    const double now = seconds_now();
    if (end == 0)
      end = now + seconds;
    else
      best = std::max(best, moved / std::max(now - began, 1e-9));
    began = now;
    over = best > 0 && now >= end;
  });
  const auto work = [&](float* from, float* to) {
    std::fill_n(from, count, 1.0f);
    if (to != nullptr) std::fill_n(to, count, 0.0f);
    for (meeting.arrive_and_wait(); !over; meeting.arrive_and_wait())
      for (std::int64_t pass = 0; pass < passes; ++pass) {
        if (to != nullptr) {
          edge_bcs::probe_kernels().copy(from, to, count);
        } else {
          volatile float kept = edge_bcs::probe_kernels().sum(from, count);
          static_cast<void>(kept);
        }
      }
  };
  // Each thread touches its memory first.
  std::vector<std::unique_ptr<float[]>> memory;
  for (std::int64_t i = 0; i < threads * sides; ++i)
    memory.push_back(std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(count)));
  const auto of = [&](int thread) {
    const auto first = static_cast<std::size_t>(thread * sides);
    work(memory[first].get(), copy != 0 ? memory[first + 1].get() : nullptr);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(of, thread);
  of(0);
  for (std::thread& other : others) other.join();
  return best;
}

// Multiply-adds of vectors a second that each load their vector from a working set of so many bytes, in the order in which
// a sparse kernel meets them: a row of the matrix has an entry in every hundredth column or so, and a column is one of
// nine positions in one input plane.
EDGE_BCS_EXPORT double edge_bcs_peak_loads(double seconds, std::int64_t bytes) {
  constexpr std::int64_t gap = 100, at_least = 1 << 18;
  const edge_bcs::ProbeKernels& probe = edge_bcs::probe_kernels();
  const edge_bcs::ProbeTile& tile = probe.tile;
  const std::int64_t planes =
      std::max<std::int64_t>(1, bytes / (tile.plane() * static_cast<std::int64_t>(sizeof(float))));
  constexpr std::int64_t positions = edge_bcs::ProbeTile::positions;
  const std::int64_t columns = planes * positions * positions;
  // Enough entries that their tiles cover all planes more than once.
  const std::int64_t entries = std::max<std::int64_t>(1024, 4 * planes),
                     rounds = 1 + at_least / (entries * tile.vectors());
  std::vector<std::int32_t> distance;
  std::minstd_rand random(1);
  std::uniform_int_distribution<std::int64_t> step(1, 2 * gap - 1);
  for (std::int64_t column = 0; static_cast<std::int64_t>(distance.size()) < entries;
       column = (column + step(random)) % columns) {
    const std::int64_t plane = column / (positions * positions), position = column % (positions * positions);
    distance.push_back(static_cast<std::int32_t>(
        plane * tile.plane() + position / positions * tile.plane_row() + position % positions * tile.lanes));
  }
  const std::vector<float> weight(distance.size(), 0.5f);
  // On a line of the cache, as the stacks of whole vectors are.
  constexpr std::int64_t line = 64 / sizeof(float);
  std::vector<float> memory(static_cast<std::size_t>(planes * tile.plane() + line), 1.0f);
  void* first = memory.data();
  std::size_t room = memory.size() * sizeof(float);
  const auto* const input = static_cast<const float*>(std::align(64, 4, first, room));
  return best_rate(seconds, [&] {
    for (std::int64_t round = 0; round < rounds; ++round) {
      volatile float kept = probe.load_multiply_adds(input, distance.data(), weight.data(), entries);
      static_cast<void>(kept);
    }
    return rounds * entries * tile.vectors();
  });
}
