// The sums of a tile of a depthwise walk, in whatever numbers. Where image rows of the input follow each other as rows of the
// kernel do (no stride, no dilation), a vector that is loaded once meets every kernel row that reaches it.
//
// Numbers: Number, Vector, load(from), spread(weight), and multiply_add(sum, weight, pixels).
#pragma once

#include <cstdint>

#include "kernels/simd.h"
#include "kernels/walk.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

template <int VL>
struct Floats {
  using Number = float;
  using Vector = EDGE_BCS_KERNEL_NAMESPACE::Vector<VL>;
  static EDGE_BCS_INLINE Vector load(const float* from) { return EDGE_BCS_KERNEL_NAMESPACE::load<VL>(from); }
  static EDGE_BCS_INLINE Vector spread(float weight) { return broadcast<VL>(weight); }
  static EDGE_BCS_INLINE Vector multiply_add(Vector sum, Vector weight, Vector pixels) {
    return sum + weight * pixels;
  }
};

// Kernel rows whose input is shared, of those that the walk uses; 0 where they are none of the heights that are compiled.
inline int shared_rows(const Walk& walk) {
  constexpr int compiled[] = {3, 5, 7};
  for (const int rows : compiled) {
    if (walk.taps % rows != 0) continue;
    const int columns = walk.taps / rows;
    bool follow = true;
    for (int i = columns; i < walk.taps; ++i)
      follow &= walk.tap[walk.used[i]] == walk.tap[walk.used[i - columns]] + walk.input_row;
    if (follow) return rows;
  }
  return 0;
}

// sums += the plane's weights times its input, for a kernel of any shape.
template <class Numbers, int TY, int TV>
EDGE_BCS_INLINE void add_taps(const Walk& walk, const float* weights, float factor,
                              const typename Numbers::Number* const (&input)[TY],
                              const std::int64_t (&input_x)[TV], typename Numbers::Vector (&sums)[TY][TV]) {
  for (int i = 0; i < walk.taps; ++i) {
    const auto weight = Numbers::spread(weights[walk.used[i]] * factor);
    const std::int64_t distance = walk.tap[walk.used[i]];
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
      for (int x = 0; x < TV; ++x)
        sums[y][x] =
            Numbers::multiply_add(sums[y][x], weight, Numbers::load(input[y] + distance + input_x[x]));
  }
}

// The same for KH kernel rows that share their input.
template <class Numbers, int KH, int TY, int TV>
EDGE_BCS_INLINE void add_rows(const Walk& walk, const float* weights, float factor,
                              const typename Numbers::Number* input, const std::int64_t (&input_x)[TV],
                              typename Numbers::Vector (&sums)[TY][TV]) {
  const int columns = walk.taps / KH;
  for (int column = 0; column < columns; ++column) {
    typename Numbers::Vector weight[KH];
#pragma GCC unroll 8
    for (int k = 0; k < KH; ++k)
      weight[k] = Numbers::spread(weights[walk.used[k * columns + column]] * factor);
    const auto* from = input + walk.tap[walk.used[column]];
#pragma GCC unroll 16
    for (int row = 0; row < TY + KH - 1; ++row, from += walk.input_row)
#pragma GCC unroll 4
      for (int x = 0; x < TV; ++x) {
        const auto pixels = Numbers::load(from + input_x[x]);
#pragma GCC unroll 8
        for (int k = 0; k < KH; ++k)
          if (row - k >= 0 && row - k < TY)
            sums[row - k][x] = Numbers::multiply_add(sums[row - k][x], weight[k], pixels);
      }
  }
}

// One of them; `shared` is that of `shared_rows`.
template <class Numbers, int TY, int TV>
EDGE_BCS_INLINE void add_plane(const Walk& walk, const float* weights, float factor, int shared,
                               const typename Numbers::Number* const (&input)[TY],
                               const std::int64_t (&input_x)[TV], typename Numbers::Vector (&sums)[TY][TV]) {
  switch (shared) {
    case 3:
      return add_rows<Numbers, 3>(walk, weights, factor, input[0], input_x, sums);
    case 5:
      return add_rows<Numbers, 5>(walk, weights, factor, input[0], input_x, sums);
    case 7:
      return add_rows<Numbers, 7>(walk, weights, factor, input[0], input_x, sums);
    default:
      add_taps<Numbers>(walk, weights, factor, input, input_x, sums);
  }
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
