// The gradient of the weights that there are: one dot product over all pixels and images for each of them.
//
// A tile of dy is held in registers while all entries of its row meet it, several at a time; their vector sums are added
// up by pairs, so that the entries' sums leave the registers side by side. Tasks own output planes, so each sum is made by
// one thread in one order.
#include "kernels/table.h"
#include "kernels/tiles.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

// What a task gathers for one group of entries.
struct Sums {
  alignas(64) float entry[Group::capacity];
  alignas(64) float dy[Group::max_rows][native_lanes];
};

// sums[0..N) += dot products of the tile of dy with the input at N distances.
template <int VL, int TY, int TV, int N>
EDGE_BCS_INLINE void dot_products(const Vector<VL> (&dy)[TY][TV], const float* const (&input)[TY],
                                  const std::int64_t (&input_x)[TV], const std::int32_t* distance, float* sums) {
  // Enough independent sums to keep the multiply-adds busy.
  constexpr int wanted = 8 / N;
  constexpr int parts = wanted < TY * TV ? wanted : TY * TV;
  Vector<VL> sum[N][parts];
  std::int64_t at[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    at[n] = distance[n];
#pragma GCC unroll 8
    for (int part = 0; part < parts; ++part) sum[n][part] = Vector<VL>{};
  }
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[n][(y * TV + x) % parts] += dy[y][x] * load<VL>(input[y] + at[n] + input_x[x]);
  Vector<VL> total[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    total[n] = sum[n][0];
#pragma GCC unroll 8
    for (int part = 1; part < parts; ++part) total[n] += sum[n][part];
  }
  add_lane_sums<VL, N>(sums, total);
}

template <int VL, int TY, int TV, bool strided>
void gradient_tile(const Walk& walk, const Group& group, const WeightGradient& gradient, const Place& place,
                   Sums& sums) {
  const float* input[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) input[y] = walk.input + place.input[y] + place.input_x[0];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x, x);
  for (int chunk = 0; chunk < group.chunks; ++chunk) {
    for (int r = 0; r < group.rows; ++r) {
      int j = group.begin(r, chunk);
      const int end = group.end(r, chunk);
      const bool first = group.starts(r, chunk);
      if (j == end && !first) continue;
      const float* const plane = gradient.dy + (group.first_row + r) * walk.output_plane + place.output_x[0];
      Vector<VL> dy[TY][TV];
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x) dy[y][x] = load<VL>(plane + place.output[y] + x * VL);
      if (first) {
        Vector<VL> sum = load<VL>(sums.dy[r]);
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < TV; ++x) sum += dy[y][x];
        store<VL>(sums.dy[r], sum);
      }
      const std::int32_t* const distance = group.distance;
      for (; j + 8 <= end; j += 8)
        dot_products<VL, TY, TV, 8>(dy, input, input_x, distance + j, sums.entry + j);
      if (j + 4 <= end) {
        dot_products<VL, TY, TV, 4>(dy, input, input_x, distance + j, sums.entry + j);
        j += 4;
      }
      if (j + 2 <= end) {
        dot_products<VL, TY, TV, 2>(dy, input, input_x, distance + j, sums.entry + j);
        j += 2;
      }
      if (j < end) dot_products<VL, TY, TV, 1>(dy, input, input_x, distance + j, sums.entry + j);
    }
  }
}

// Adds the sums of a group to the results.
void deliver(const SparseRows& rows, const Group& group, const WeightGradient& gradient, const Sums& sums) {
  for (int r = 0; r < group.rows; ++r) {
    const std::int64_t row = group.first_row + r;
    const float scale = gradient.scale == nullptr ? 1.0f : gradient.scale[row];
    double dscale = 0;
    for (int j = group.begin(r, 0); j < group.end(r, group.chunks - 1); ++j) {
      gradient.grad[group.first_entry + j] += scale * sums.entry[j];
      dscale += static_cast<double>(rows.value[group.first_entry + j]) * static_cast<double>(sums.entry[j]);
    }
    if (gradient.dscale == nullptr) continue;
    gradient.dscale[row] += static_cast<float>(dscale);
    if (group.starts(r, 0)) {
      double dshift = 0;
      for (float lane : sums.dy[r]) dshift += static_cast<double>(lane);
      gradient.dshift[row] += static_cast<float>(dshift);
    }
  }
}

// The first row of task `task` of `tasks`, which share entries and rows evenly.
std::int64_t first_row(const Walk& walk, const SparseRows& rows, std::int64_t task, std::int64_t tasks) {
  if (task >= tasks) return walk.rows;
  const std::int64_t start = rows.begin(0);
  const auto cost = [&](std::int64_t row) { return rows.begin(row) - start + 2 * row; };
  const std::int64_t share = (rows.end(walk.rows - 1) - start + 2 * walk.rows) * task / tasks;
  std::int64_t low = 0, high = walk.rows;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (cost(middle) < share) low = middle + 1;
    else high = middle;
  }
  return low;
}

template <int VL, bool strided>
void gradient_walk(const Walk& walk, const SparseRows& rows, const WeightGradient& gradient, std::int64_t task) {
  const std::int64_t tasks = gradient_tasks(walk, rows);
  Group group;
  Sums sums;
  Cursor cursor(rows, first_row(walk, rows, task, tasks), first_row(walk, rows, task + 1, tasks));
  while (group.fill(walk, rows, cursor)) {
    const int entries = group.end(group.rows - 1, group.chunks - 1);
    std::memset(sums.entry, 0, static_cast<std::size_t>(entries) * sizeof(float));
    std::memset(sums.dy, 0, static_cast<std::size_t>(group.rows) * sizeof(sums.dy[0]));
    for_tiles<VL>(walk, 0, walk.blocks * walk.height, [&]<int TY, int TV>(const Place& place) {
      gradient_tile<VL, TY, TV, strided>(walk, group, gradient, place, sums);
    });
    deliver(rows, group, gradient, sums);
  }
}

}  // namespace

// Each task reads all of its inputs' planes once more, so a task should use each of them at least twice.
std::int64_t gradient_tasks(const Walk& walk, const SparseRows& rows) {
  const std::int64_t entries = rows.end(walk.rows - 1) - rows.begin(0);
  const std::int64_t worthwhile = entries / (2 * walk.channels);
  return larger(1, smaller(walk.rows, larger(4, smaller(16, worthwhile))));
}

void gradient(const Walk& walk, const SparseRows& rows, const WeightGradient& gradient, std::int64_t task) {
  with_vectors(walk, [&]<int VL, bool strided>() { gradient_walk<VL, strided>(walk, rows, gradient, task); });
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
