// The gradient of the weights that there are: one dot product over all pixels and images for each of them.
//
// A tile of dy is held in registers while all entries of its row meet it, several at a time. Each entry's sum is a vector
// that waits in memory for the next tile; its lanes are added up once for a band of tiles, whose input stays in the
// second-level cache. Tasks own output planes, so each sum is made by one thread in one order.
#include "kernels/table.h"
#include "kernels/tiles.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

// What a task gathers for one group of entries, a vector for each.
struct Sums {
  static constexpr int capacity = 2048;
  alignas(64) float entry[capacity][native_lanes];
  alignas(64) float dy[Group::max_rows][native_lanes];
};

// sums[0..N) += products of the tile of dy with the input at N distances.
template <int VL, int TY, int TV, int N>
EDGE_BCS_INLINE void products(const Vector<VL> (&dy)[TY][TV], const float* const (&input)[TY],
                              const std::int64_t (&input_x)[TV], const std::int32_t* distance,
                              float (*sums)[native_lanes]) {
  // Enough independent sums to keep the multiply-adds busy.
  constexpr int wanted = N >= 4 ? 1 : 4 / N;
  constexpr int parts = smaller_int(wanted, TY * TV);
  Vector<VL> sum[N][parts];
  std::int64_t at[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    at[n] = distance[n];
    sum[n][0] = load<VL>(sums[n]);
#pragma GCC unroll 8
    for (int part = 1; part < parts; ++part) sum[n][part] = Vector<VL>{};
  }
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[n][(y * TV + x) % parts] += dy[y][x] * load<VL>(input[y] + at[n] + input_x[x]);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
    for (int part = 1; part < parts; ++part) sum[n][0] += sum[n][part];
    store<VL>(sums[n], sum[n][0]);
  }
}

// A function of its own, as `sparse_tile` is.
template <int VL, int TY, int TV, bool strided>
__attribute__((noinline)) void gradient_tile(const Walk& walk, const Group& group,
                                             const WeightGradient& gradient, const Place& place, Sums& sums) {
  const float* input[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) input[y] = walk.input + place.input[y] + place.input_x[0];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x, x);
  const bool ahead = !strided && fetches_ahead(walk, group.entries());
  std::int64_t fetched = 0;
  for (int chunk = 0; chunk < group.chunks; ++chunk) {
    for (int r = 0; r < group.rows; ++r) {
      int j = group.begin(r, chunk);
      const int end = group.end(r, chunk);
      const bool first = group.starts(r, chunk);
      if (j == end && !first) continue;
      const float* const plane = gradient.dy + (group.first_row + r) * walk.output_plane + place.output_x[0];
      if (ahead) {
        const std::int64_t visits = group.chunks * group.rows, visit = chunk * group.rows + r + 1;
        fetch_next_input<VL, TY, TV>(walk, place, fetched, walk.channels * visit / visits);
        if (chunk == 0 && r + rows_ahead < group.rows)
          fetch<VL, TY, TV, 0, 3>(plane + rows_ahead * walk.output_plane, place.output);
      }
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
      for (; j + 8 <= end; j += 8) products<VL, TY, TV, 8>(dy, input, input_x, distance + j, sums.entry + j);
      if (j + 4 <= end) {
        products<VL, TY, TV, 4>(dy, input, input_x, distance + j, sums.entry + j);
        j += 4;
      }
      if (j + 2 <= end) {
        products<VL, TY, TV, 2>(dy, input, input_x, distance + j, sums.entry + j);
        j += 2;
      }
      if (j < end) products<VL, TY, TV, 1>(dy, input, input_x, distance + j, sums.entry + j);
    }
  }
}

// totals[i] = the sum of the first VL lanes of vectors[i].
template <int VL>
void add_lanes(const float (*vectors)[native_lanes], int count, float* totals) {
  std::memset(totals, 0, static_cast<std::size_t>(count) * sizeof(float));
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    Vector<VL> eight[8];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) eight[n] = load<VL>(vectors[i + n]);
    add_lane_sums<VL, 8>(totals + i, eight);
  }
  for (; i < count; ++i) {
    const Vector<VL> one[1] = {load<VL>(vectors[i])};
    add_lane_sums<VL, 1>(totals + i, one);
  }
}

// Adds the sums of a group to the results.
template <int VL>
void deliver(const SparseRows& rows, const Group& group, const WeightGradient& gradient, const Sums& sums) {
  float totals[Sums::capacity], dy[Group::max_rows];
  add_lanes<VL>(sums.entry, group.entries(), totals);
  add_lanes<VL>(sums.dy, group.rows, dy);
  for (int r = 0; r < group.rows; ++r) {
    const std::int64_t row = group.first_row + r;
    const float scale = gradient.scale == nullptr ? 1.0f : gradient.scale[row];
    const int begin = group.begin(r, 0), end = group.end(r, group.chunks - 1);
    float* const grad = gradient.grad + group.first_entry;
    const float* const value = rows.value + group.first_entry;
    Vector<4> products{};
    int j = begin;
    for (; j + 4 <= end; j += 4) {
      const Vector<4> four = load<4>(totals + j);
      store<4>(grad + j, load<4>(grad + j) + scale * four);
      products += load<4>(value + j) * four;
    }
    float dscale = (products[0] + products[1]) + (products[2] + products[3]);
    for (; j < end; ++j) {
      grad[j] += scale * totals[j];
      dscale += value[j] * totals[j];
    }
    if (gradient.dscale == nullptr) continue;
    gradient.dscale[row] += dscale;
    if (group.starts(r, 0)) gradient.dshift[row] += dy[r];
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
    if (cost(middle) < share)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Image rows of a band: what fits the second-level cache, but enough tiles to pay for the adding up of lanes.
std::int64_t band_rows(const Walk& walk) {
  const TileShape shape = tile_shape(walk);
  const std::int64_t row_bytes = walk.channels * walk.input_row * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t tiles = ceil_divide(walk.width * walk.lanes, vector_length(walk) * shape.vectors);
  const std::int64_t strips = larger(second_cache / row_bytes / shape.rows, ceil_divide(2, tiles));
  return larger(1, strips) * shape.rows;
}

template <int VL, bool strided>
void gradient_walk(const Walk& walk, const SparseRows& rows, const WeightGradient& gradient,
                   std::int64_t task) {
  const std::int64_t tasks = gradient_tasks(walk, rows), image_rows = walk.blocks * walk.height;
  const std::int64_t first = first_row(walk, rows, task, tasks),
                     last = first_row(walk, rows, task + 1, tasks);
  const std::int64_t band = band_rows(walk);
  Group group;
  Sums sums;
  for (std::int64_t start = 0; start < image_rows; start += band) {
    Cursor cursor(rows, first, last);
    while (group.fill(walk, rows, cursor, Sums::capacity)) {
      std::memset(sums.entry, 0, static_cast<std::size_t>(group.entries()) * sizeof(sums.entry[0]));
      std::memset(sums.dy, 0, static_cast<std::size_t>(group.rows) * sizeof(sums.dy[0]));
      for_tiles<VL>(walk, start, smaller(image_rows, start + band), [&]<int TY, int TV>(const Place& place) {
        gradient_tile<VL, TY, TV, strided && (TV > 1)>(walk, group, gradient, place, sums);
      });
      deliver<VL>(rows, group, gradient, sums);
    }
  }
}

}  // namespace

// Each task reads all input planes once more, from beyond the second-level cache: so many entries should use each of them
// that this does not decide the time. With fewer, a board's cores still share the work.
std::int64_t gradient_tasks(const Walk& walk, const SparseRows& rows) {
  constexpr std::int64_t uses = 24, least = 6;
  const std::int64_t entries = rows.end(walk.rows - 1) - rows.begin(0);
  return smaller(walk.rows, larger(least, smaller(enough_tasks, entries / (uses * walk.channels))));
}

void gradient(const Walk& walk, const SparseRows& rows, const WeightGradient& gradient, std::int64_t task) {
  with_vectors(walk, [&]<int VL, bool strided>() { gradient_walk<VL, strided>(walk, rows, gradient, task); });
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
