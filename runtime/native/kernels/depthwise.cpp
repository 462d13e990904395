// Walks of depthwise convolutions, in which an output plane meets the few input planes of its channel alone.
//
// There is little arithmetic to a pixel, so what counts is memory: an output plane is made from its first row to its last, a
// tile of vectors at a time whose sums stay in registers (depthwise_sums.h), while the input around them stays in the caches.
#include "kernels/depthwise_sums.h"
#include "kernels/table.h"
#include "kernels/tiles.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

// Asks for the lines of a tile at `from`, TY rows of TV vectors, to be written (write = 1) or read.
template <int VL, int TY, int TV, bool strided, int write>
EDGE_BCS_INLINE void ask(const float* from, const std::int64_t (&rows)[max_tile_rows],
                         const std::int64_t (&vectors)[max_tile_vectors]) {
  constexpr int line = 64 / sizeof(float), step = strided || VL >= line ? 1 : smaller_int(TV, line / VL);
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; x += step) __builtin_prefetch(from + rows[y] + vectors[x], write, 2);
}

// Floats between what is computed and what is asked for, at least.
inline constexpr std::int64_t floats_ahead = 2048;

// What is the same for all tiles of an output plane.
struct Plane {
  Plane(const Walk& walk, const Weights& weights, std::int64_t row)
      : walk(walk),
        weights(weights),
        row(row),
        planes(walk, row),
        shared(shared_rows(walk)),
        step(walk.input_pixel / walk.lanes),
        asks(step > 1 || walk.output_pixel > walk.lanes ||
             larger(walk.input_plane, walk.output_plane) > floats_ahead),
        below{some(walk.input_row, walk.input_plane), some(walk.output_row, walk.output_plane),
              some(walk.mask_row, walk.mask_plane)} {
    if (walk.taps > 0) below.input += walk.tap[walk.used[walk.taps - 1]];
  }

  const Walk& walk;
  const Weights& weights;
  std::int64_t row;
  Planes planes;
  int shared;         // see shared_rows
  std::int64_t step;  // pixels that the walk steps over, along both axes as a rule
  // Whether to ask for memory: small planes, read and written without gaps, a processor foresees.
  bool asks;
  struct {
    std::int64_t input, output, mask;
  } below;  // distances in floats of what is asked for

 private:
  // Some planes, or some strips of tiles of a plane that is larger.
  std::int64_t some(std::int64_t row_floats, std::int64_t plane_floats) const {
    const std::int64_t strip = tile_shape(walk).rows * row_floats;
    const std::int64_t unit = larger(1, plane_floats <= floats_ahead ? plane_floats : strip);
    return unit * larger(1, floats_ahead / unit);
  }
};

// Asks for what a strip of tiles below will touch: planes lie one after the other in memory, and so do the rows of a plane,
// but a tile reads and writes too many of them at once for a processor to foresee.
template <int VL, int TY, int TV, bool strided>
EDGE_BCS_INLINE void ask_ahead(const Plane& plane, const Place& place) {
  const Walk& walk = plane.walk;
  const float* const next = walk.input + plane.planes.first * walk.input_plane + plane.below.input;
  for (std::int64_t y = 0; y < plane.step; ++y)
    for (std::int64_t x = 0; x < plane.step; ++x)
      ask<VL, TY, TV, strided, 0>(next - (y == 0 ? 0 : y * (walk.input_row / plane.step)) - x * walk.lanes,
                                  place.input, place.input_x);
  const std::int64_t output = plane.row * walk.output_plane + plane.below.output;
  ask<VL, TY, TV, strided, 1>(walk.output + output, place.output, place.output_x);
  if (walk.addend != nullptr) ask<VL, TY, TV, strided, 0>(walk.addend + output, place.output, place.output_x);
  if (walk.mask != nullptr)
    ask<VL, TY, TV, strided, 0>(walk.mask + plane.row * walk.mask_plane + plane.below.mask, place.mask,
                                place.mask_x);
}

template <int VL, int TY, int TV, bool strided>
__attribute__((noinline)) void depthwise_tile(const Plane& plane, const Place& place) {
  const Walk& walk = plane.walk;
  const Weights& weights = plane.weights;
  const Planes& planes = plane.planes;
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x, x);
  if (plane.asks) ask_ahead<VL, TY, TV, strided>(plane, place);
  Vector<VL> sums[TY][TV] = {};
  for (std::int64_t p = 0; p < planes.count; ++p) {
    const float* const from = walk.input + (planes.first + p) * walk.input_plane + place.input_x[0];
    const float* const own = weights.all + (planes.weights + p) * weights.row_step;
    const float factor = weights.factor == nullptr ? 1.0f : weights.factor[planes.weights + p];
    const float* input[TY];
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y) input[y] = from + place.input[y];
    add_plane<Floats<VL>>(walk, own, factor, plane.shared, input, input_x, sums);
  }
  finish<VL, TY, TV, strided>(walk, place, plane.row, sums);
}

// Weights whose gradients are summed in registers together.
inline constexpr int most_sums = registers == 32 ? 25 : 9;
// Vectors that are added up in float before the sums go on in double.
inline constexpr std::int64_t vectors_in_float = 128;

// Adds to `sums` the dot products of image rows [begin, end) of a block of dy with the input at the first N of the kernel
// positions `taps`, and to `total` the sum of those rows.
template <int VL, bool strided, int N>
void add_products(const Walk& walk, const float* dy, const float* input, const std::uint8_t* taps,
                  std::int64_t begin, std::int64_t end, double* sums, double& total) {
  static_assert(N % 8 == 1);
  const std::int64_t vectors = walk.width * walk.lanes / VL, parts = walk.lanes / VL;
  const float* from[N];
#pragma GCC unroll 32
  for (int i = 0; i < N; ++i) from[i] = input + walk.tap[taps[i]];
  // Those of the positions, and the sum of dy.
  Vector<VL> products[N + 1] = {};
  for (std::int64_t y = begin; y < end; ++y) {
    const float* const row = dy + y * walk.output_row;
    std::int64_t at = y * walk.input_row, part = 0;
    for (std::int64_t v = 0; v < vectors; ++v, at += VL) {
      const Vector<VL> gradient = load<VL>(row + v * VL);
      __builtin_prefetch(row + v * VL + floats_ahead, 0, 2);
      __builtin_prefetch(from[N - 1] + at + floats_ahead, 0, 2);
      products[N] += gradient;
#pragma GCC unroll 32
      for (int i = 0; i < N; ++i) products[i] += gradient * load<VL>(from[i] + at);
      if constexpr (strided) {
        if (++part == parts) {
          part = 0;
          at += walk.input_pixel - walk.lanes;
        }
      }
    }
  }
  float lanes[N + 1] = {};
#pragma GCC unroll 4
  for (int i = 0; i + 8 < N; i += 8) {
    const Vector<VL> some[8] = {products[i],     products[i + 1], products[i + 2], products[i + 3],
                                products[i + 4], products[i + 5], products[i + 6], products[i + 7]};
    add_lane_sums<VL, 8>(lanes + i, some);
  }
  const Vector<VL> last[2] = {products[N - 1], products[N]};
  add_lane_sums<VL, 2>(lanes + N - 1, last);
  for (int i = 0; i < N; ++i) sums[i] += static_cast<double>(lanes[i]);
  total += static_cast<double>(lanes[N]);
}

// The same for all kernel positions.
template <int VL, bool strided>
void plane_products(const Walk& walk, const float* dy, const float* input, std::int64_t begin,
                    std::int64_t end, double* sums) {
  for (int tap = 0; tap < walk.taps;) {
    // Places beyond the kernel's are its last one again, their sums unused.
    const int left = walk.taps - tap;
    std::uint8_t taps[most_sums];
    for (int i = 0; i < most_sums; ++i) taps[i] = walk.used[tap + static_cast<int>(smaller(i, left - 1))];
    double found[most_sums] = {}, total = 0;
    int count = 9;
    if (left <= 9 || most_sums == 9) {
      add_products<VL, strided, 9>(walk, dy, input, taps, begin, end, found, total);
    } else {
      add_products<VL, strided, most_sums>(walk, dy, input, taps, begin, end, found, total);
      count = most_sums;
    }
    if (tap == 0) sums[walk.taps] += total;
    for (int i = 0; i < smaller(count, left); ++i) sums[tap + i] += found[i];
    tap += count;
  }
}

}  // namespace

void depthwise(const Walk& walk, const Weights& weights, std::int64_t row, std::int64_t begin,
               std::int64_t end) {
  const Plane plane(walk, weights, row);
  with_vectors(walk, [&]<int VL, bool strided>() {
    for_tiles<VL>(walk, begin, end, [&]<int TY, int TV>(const Place& place) {
      depthwise_tile<VL, TY, TV, strided && (TV > 1)>(plane, place);
    });
  });
}

void depthwise_products(const Walk& walk, const float* dy, std::int64_t row, std::int64_t begin,
                        std::int64_t end, double* sums) {
  const std::int64_t block = begin / walk.height, first = begin % walk.height;
  const float* const plane = dy + block * walk.output_block + row * walk.output_plane;
  const float* const input =
      walk.input + block * walk.input_block + Planes(walk, row).first * walk.input_plane;
  with_vectors(walk, [&]<int VL, bool strided>() {
    const std::int64_t rows = larger(1, vectors_in_float / (walk.width * walk.lanes / VL));
    for (std::int64_t y = first, last = first + (end - begin); y < last; y += rows)
      plane_products<VL, strided>(walk, plane, input, y, smaller(last, y + rows), sums);
  });
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
