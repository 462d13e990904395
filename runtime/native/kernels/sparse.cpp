// Walks over the entries of a sparse matrix: forward convolution and input gradient.
//
// A tile of the output plane is held in registers while the entries of its row are added to it: each entry is one
// broadcast weight and one run of fused multiply-adds from memory, without a branch. Entries are first turned into
// distances (in floats) from the output pixel, a bounded group at a time, and used for all tiles of a task. Where rows are
// long, the group is walked in chunks of input channels, so that the input around the tile stays in the first-level cache
// while all rows of the group use it; the sums wait in the output meanwhile.
#include "kernels/table.h"
#include "kernels/tiles.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

// sums += Σ weight · input at its distance, for `count` entries.
template <int VL, int TY, int TV>
EDGE_BCS_INLINE void accumulate(Vector<VL> (&sums)[TY][TV], const float* const (&input)[TY],
                                const std::int64_t (&input_x)[TV], const float* weights,
                                const std::int32_t* distances, int count) {
  // Changes nothing, but without it the compiler reloads these from the stack for every entry.
  const float* rows[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) {
    rows[y] = input[y];
    asm volatile("" : "+r"(rows[y]));
  }
  const float* const stop = weights + count;
  for (; weights != stop; ++weights, ++distances) {
    const Vector<VL> weight = broadcast<VL>(*weights);
    const std::int64_t distance = *distances;
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
      for (int x = 0; x < TV; ++x) sums[y][x] += weight * load<VL>(rows[y] + distance + input_x[x]);
  }
}

// Asks for what `finish` will touch of output plane `row` in the tile to the right. A tile takes a short piece of each of many
// planes, which no prefetcher of a processor foresees, and with few entries a row there is no arithmetic to wait behind.
template <int VL, int TY, int TV>
EDGE_BCS_INLINE void fetch_next_output(const Walk& walk, const Place& place, std::int64_t row) {
  constexpr int cache_line = 64 / sizeof(float),
                step = smaller_int(TV, cache_line > VL ? cache_line / VL : 1);
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; x += step) {
      const std::int64_t at = row * walk.output_plane + place.output[y] + place.output_x[0] + (TV + x) * VL;
      __builtin_prefetch(walk.output + at, 1, 2);
      if (walk.addend != nullptr) __builtin_prefetch(walk.addend + at, 0, 2);
    }
}

// A function of its own: inlined into its caller, its inner loop runs out of registers.
template <int VL, int TY, int TV, bool strided>
__attribute__((noinline)) void sparse_tile(const Walk& walk, const Group& group, const Place& place) {
  const float* input[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) input[y] = walk.input + place.input[y] + place.input_x[0];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x, x);
  float* const output = walk.output + place.output_x[0];
  const bool ahead = !strided && fetches_ahead(walk, group.entries());
  std::int64_t fetched = 0;
  for (int chunk = 0; chunk < group.chunks; ++chunk) {
    for (int r = 0; r < group.rows; ++r) {
      const int begin = group.begin(r, chunk), end = group.end(r, chunk);
      const bool first = group.starts(r, chunk), last = group.completes(r, chunk);
      if (begin == end && !first && !last) continue;
      const std::int64_t row = group.first_row + r;
      float* const plane = output + row * walk.output_plane;
      if (ahead) {
        // The next tile's input, a few planes with each row.
        const std::int64_t visits = group.chunks * group.rows, visit = chunk * group.rows + r + 1;
        fetch_next_input<VL, TY, TV>(walk, place, fetched, walk.channels * visit / visits);
      }
      if constexpr (!strided) {
        if (last && !place.ends_row) fetch_next_output<VL, TY, TV>(walk, place, row);
      }
      Vector<VL> sums[TY][TV];
      if (first) {
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < TV; ++x) sums[y][x] = Vector<VL>{};
      } else {
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < TV; ++x)
            sums[y][x] = load<VL>(plane + place.output[y] + along<VL, strided>(place.output_x, x));
      }
      accumulate<VL, TY, TV>(sums, input, input_x, group.weights + begin, group.distance + begin,
                             end - begin);
      if (last) {
        finish<VL, TY, TV, strided>(walk, place, row, sums);
      } else {
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < TV; ++x)
            store<VL>(plane + place.output[y] + along<VL, strided>(place.output_x, x), sums[y][x]);
      }
    }
  }
}

template <int VL, bool strided>
void sparse_walk(const Walk& walk, const SparseRows& rows, std::int64_t task) {
  const Tasks tasks = cut(walk, 16);
  const std::int64_t band = task / tasks.groups * tasks.band, image_rows = walk.blocks * walk.height;
  const std::int64_t first = task % tasks.groups * tasks.group;
  Group group;
  for (Cursor cursor(rows, first, smaller(walk.rows, first + tasks.group)); group.fill(walk, rows, cursor);) {
    for_tiles<VL>(walk, band, smaller(image_rows, band + tasks.band),
                  [&]<int TY, int TV>(const Place& place) {
      sparse_tile<VL, TY, TV, strided && (TV > 1)>(walk, group, place);
    });
  }
}

}  // namespace

std::int64_t sparse_tasks(const Walk& walk, const SparseRows&) {
  const Tasks tasks = cut(walk, 16);
  return tasks.bands * tasks.groups;
}

void sparse(const Walk& walk, const SparseRows& rows, std::int64_t task) {
  with_vectors(walk, [&]<int VL, bool strided>() { sparse_walk<VL, strided>(walk, rows, task); });
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
