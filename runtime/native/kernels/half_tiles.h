// What the kernels in half precision share, with AVX-512 BF16: pairs of pixels, tiles, and what is done to their sums.
//
// A vector is the pair of two pixels, in as many images as a pixel has. Its product with the pair (w, 0) or (0, w) adds w times
// one of the pixels to a vector of sums, so that a line that is loaded once serves two sums: a tap at an even distance meets the
// pixels of an even place in the first half of their pairs, and those of an odd place in the second; at an odd distance it is
// the other way round. Where all weights are visited, two channels are interleaved first, and each product adds two weights.
#pragma once

#include <cstdint>

#include "kernels/activate.h"
#include "kernels/half.h"
#include "kernels/simd.h"
#include "kernels/table.h"
#include "kernels/tiles.h"

#if defined(__AVX512BF16__)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
// A room of its own, where the names of other kernels (table.h) are hidden.
namespace half_precision {

using Number = std::uint16_t;

template <int VL>
EDGE_BCS_INLINE Integers<VL> load_pair(const Number* from) {
  typedef std::int32_t Unaligned __attribute__((vector_size(VL * sizeof(float)), aligned(2), may_alias));
  return *reinterpret_cast<const Unaligned*>(from);
}

template <int VL>
EDGE_BCS_INLINE void store_pair(Number* to, Integers<VL> pair) {
  typedef std::int32_t Unaligned __attribute__((vector_size(VL * sizeof(float)), aligned(2), may_alias));
  *reinterpret_cast<Unaligned*>(to) = pair;
}

// sums + the products of both halves of `pair` and `weights`.
template <int VL>
EDGE_BCS_INLINE Vector<VL> dot(Vector<VL> sums, Integers<VL> pair, Integers<VL> weights) {
  if constexpr (VL == 16)
    return reinterpret_cast<Vector<VL>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums),
                                                         reinterpret_cast<__m512bh>(pair),
                                                         reinterpret_cast<__m512bh>(weights)));
  else
    return reinterpret_cast<Vector<VL>>(_mm256_dpbf16_ps(reinterpret_cast<__m256>(sums),
                                                         reinterpret_cast<__m256bh>(pair),
                                                         reinterpret_cast<__m256bh>(weights)));
}

template <int VL>
EDGE_BCS_INLINE Integers<VL> spread(std::uint32_t word) {
  if constexpr (VL == 16)
    return reinterpret_cast<Integers<VL>>(_mm512_set1_epi32(static_cast<int>(word)));
  else
    return reinterpret_cast<Integers<VL>>(_mm256_set1_epi32(static_cast<int>(word)));
}

template <int VL>
EDGE_BCS_INLINE Vector<VL> lower(Integers<VL> pair) {
  return reinterpret_cast<Vector<VL>>(pair << 16);
}
template <int VL>
EDGE_BCS_INLINE Vector<VL> upper(Integers<VL> pair) {
  return reinterpret_cast<Vector<VL>>(pair & static_cast<std::int32_t>(0xffff0000u));
}

// Floats rounded, each in the lower half of its word.
template <int VL>
EDGE_BCS_INLINE Integers<VL> rounded(Vector<VL> value) {
  if constexpr (VL == 16)
    return reinterpret_cast<Integers<VL>>(_mm512_maskz_cvtepu16_epi32(
        0xffff, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)))));
  else
    return reinterpret_cast<Integers<VL>>(_mm256_cvtepu16_epi32(
        reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(reinterpret_cast<__m256>(value)))));
}

// Both rounded, as pairs.
template <int VL>
EDGE_BCS_INLINE Integers<VL> pair_of(Vector<VL> first, Vector<VL> second) {
  if constexpr (VL == 16) {
    alignas(64) static constexpr auto in_turn = [] {
      struct Places {
        std::uint16_t at[32];
      } places{};
      for (int i = 0; i < 16; ++i) {
        places.at[2 * i] = static_cast<std::uint16_t>(i);
        places.at[2 * i + 1] = static_cast<std::uint16_t>(16 + i);
      }
      return places;
    }();
    const __m512bh both =
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    return reinterpret_cast<Integers<VL>>(_mm512_maskz_permutexvar_epi16(
        0xffffffff, _mm512_load_si512(&in_turn), reinterpret_cast<__m512i>(both)));
  } else {
    return rounded<VL>(first) | (rounded<VL>(second) << 16);
  }
}

// Writes one of a pair's pixels.
template <int VL>
EDGE_BCS_INLINE void store_pixel(Number* pair, bool second, Vector<VL> value) {
  const Integers<VL> both = rounded<VL>(value) << (second ? 16 : 0);
  const std::uint32_t which = second ? 0xaaaaaaaau : 0x55555555u;
  if constexpr (VL == 16)
    _mm512_mask_storeu_epi16(pair, which, reinterpret_cast<__m512i>(both));
  else
    _mm256_mask_storeu_epi16(pair, static_cast<__mmask16>(which), reinterpret_cast<__m256i>(both));
}

inline const Number* numbers(const float* stack) { return reinterpret_cast<const Number*>(stack); }
inline Number* numbers(float* stack) { return reinterpret_cast<Number*>(stack); }

// A tile: up to eight image rows of up to eight pixels, from an even one on.
inline constexpr int most_rows = 8, most_pixels = 8, most_sums = 16;

struct Tile {
  std::int64_t input[most_rows], output[most_rows], mask[most_rows], bits[most_rows];  // of its rows
  bool last_row[most_rows];
  std::int64_t first;  // pixel of the walk
  bool ends_row;
};

// Where the pixels of a walk's output lie.
template <int VL>
struct OutputPixels {
  OutputPixels(const Walk& walk, const Tile& tile, std::int64_t row)
      : walk(walk),
        tile(tile),
        step(walk.output_pixel / VL),
        // The planes of a vector are the pixels of pairs.
        vector(walk.output_plane == VL),
        plane(vector ? 0 : row * walk.output_plane),
        first(walk.first_pixel + tile.first * step + (vector ? row : 0)),
        bits_row(row * walk.bits_plane + walk.bits_first / 8) {}

  // Bits of a pixel are whole bytes.
  std::int64_t byte(int y, int x) const {
    return bits_row + tile.bits[y] + (tile.first + x) * (walk.bits_pixel / 8);
  }

  const Walk& walk;
  const Tile& tile;
  std::int64_t step;
  bool vector;
  std::int64_t plane, first, bits_row;
};

// The halo beside rows that end in a tile of `height` × `width` pixels, and below the last.
template <int VL>
__attribute__((noinline)) void zero_halo(const Walk& walk, const Tile& tile, Number* plane, int height) {
  for (int y = 0; y < height; ++y) {
    Number* const start = plane + tile.output[y];
    std::int64_t pixels = (walk.tail + (tile.last_row[y] ? walk.bottom : 0)) / VL;
    std::int64_t at = walk.tail_at / VL;
    if (at % 2 != 0) {
      store_pixel<VL>(start + (at - 1) * VL, true, Vector<VL>{});
      ++at;
      --pixels;
    }
    for (; pixels > 0; pixels -= 2, at += 2) store_pair<VL>(start + at * VL, Integers<VL>{});
  }
}

// `finish`, whatever the walk asks for, a pixel at a time: its code stands here once.
template <int VL>
__attribute__((noinline)) void finish_pixels(const Walk& walk, const Tile& tile, std::int64_t row,
                                             Vector<VL>* sums, int height, int width) {
  const OutputPixels<VL> to(walk, tile, row);
  const bool kept_vector = walk.mask_plane == VL;
  const std::int64_t kept_plane = kept_vector ? 0 : row * walk.mask_plane;
  const std::int64_t kept_first = walk.first_pixel + tile.first * to.step + (kept_vector ? row : 0);
  // Pixel x of the tile, counted from an even one: where its pair is, and whether it is the second of it.
  const auto pair_of_pixel = [](std::int64_t pixel) { return (pixel & ~std::int64_t{1}) * VL; };
  const auto pixel_of = [&](const Number* from, std::int64_t pixel) {
    const Integers<VL> pair = load_pair<VL>(from + pair_of_pixel(pixel));
    return (pixel & 1) != 0 ? upper<VL>(pair) : lower<VL>(pair);
  };
  const auto put_pixel = [&](Number* from, std::int64_t pixel, Vector<VL> value) {
    store_pixel<VL>(from + pair_of_pixel(pixel), (pixel & 1) != 0, value);
  };
  const auto each = [&](const auto& body) {
    for (int y = 0, i = 0; y < height; ++y)
      for (int x = 0; x < width; ++x, ++i) body(sums[i], y, x);
  };
  const auto kept = [&](int y, int x) {
    return pixel_of(numbers(walk.mask) + kept_plane + tile.mask[y], kept_first + x * to.step);
  };
  each([&](Vector<VL>& value, int y, int x) {
    if (walk.scale != nullptr)
      value = value * broadcast<VL>(walk.scale[row]) + broadcast<VL>(walk.shift[row]);
    if (walk.addend != nullptr)
      value += pixel_of(numbers(walk.addend) + to.plane + tile.output[y], to.first + x * to.step);
    if (walk.pre != nullptr)
      put_pixel(numbers(walk.pre) + kept_plane + tile.mask[y], kept_first + x * to.step, value);
    if (walk.bits != nullptr)
      store_bits<VL>(walk.bits + to.byte(y, x), 0,
                     positive_bits<VL>(openness<VL>(walk.activation.function, value)));
  });
  activate<VL>(walk.activation, sums, height * width);
  if (walk.mask != nullptr) {
    Vector<VL> masks[most_sums];
    int next = 0;
    each([&](Vector<VL>, int y, int x) { masks[next++] = kept(y, x); });
    pass_back<VL>(walk.through, masks, sums, height * width);
  }
  if (walk.mask_bits != nullptr) {
    const Slopes slopes = slopes_of(walk.through);
    each([&](Vector<VL>& value, int y, int x) {
      value = pass_slopes<VL>(slopes, load_bits<VL>(walk.mask_bits + to.byte(y, x), 0), value);
    });
  }
  Number* const output = numbers(walk.output) + to.plane;
  each([&](Vector<VL> value, int y, int x) {
    put_pixel(output + tile.output[y], to.first + x * to.step, value);
  });
}

// What is done to the sums of a tile, of one output plane after the other: out = act'(mask) · act(scale · sums + shift + addend),
// with the bits and the halo. What does not change from plane to plane is looked up once.
template <int VL, int TY, int TX>
class Finish {
 public:
  Finish(const Walk& walk, const Tile& tile)
      : walk_(walk),
        tile_(tile),
        pixels_(walk, tile, 0),
        beside_(pixels_.step == 1),
        plain_((beside_ ? TX % 2 == 0 : pixels_.step % 2 == 0) && !pixels_.vector && walk.simple() &&
               walk.mask == nullptr),
        second_(!beside_ && pixels_.first % 2 != 0),
        halo_(tile.ends_row && tile.first + TX == walk.width && walk.tail + walk.bottom > 0),
        function_(walk.activation.function),
        output_(numbers(walk.output) + (pixels_.first - second_) * VL),
        addend_(walk.addend == nullptr ? nullptr : numbers(walk.addend) + (pixels_.first - second_) * VL),
        scale_(walk.scale),
        shift_(walk.shift),
        bits_(walk.bits),
        mask_bits_(walk.mask_bits) {}

  EDGE_BCS_INLINE void operator()(std::int64_t row, Vector<VL> (&sums)[TY][TX]) const {
#define EDGE_BCS_EACH \
  _Pragma("GCC unroll 8") for (int y = 0; y < TY; ++y) _Pragma("GCC unroll 8") for (int x = 0; x < TX; ++x)
#define EDGE_BCS_EACH_PAIR                             \
  _Pragma("GCC unroll 8") for (int y = 0; y < TY; ++y) \
      _Pragma("GCC unroll 8") for (int x = 0; x + 1 < TX; x += 2)
    if (!plain_) {
      // A copy, because sums whose address is known cannot stay in registers.
      Vector<VL> values[TY * TX];
      EDGE_BCS_EACH values[y * TX + x] = sums[y][x];
      finish_pixels<VL>(walk_, tile_, row, values, TY, TX);
    } else {
      const std::int64_t plane = row * walk_.output_plane;
      const std::int64_t bits_row = row * walk_.bits_plane + walk_.bits_first / 8;
      const std::int64_t bits_pixel = walk_.bits_pixel / 8, first_bits = bits_row + tile_.first * bits_pixel;
      if (scale_ != nullptr) {
        const Vector<VL> scale = broadcast<VL>(scale_[row]), shift = broadcast<VL>(shift_[row]);
        EDGE_BCS_EACH sums[y][x] = sums[y][x] * scale + shift;
      }
      if (addend_ != nullptr && !beside_) {
        EDGE_BCS_EACH {
          const Integers<VL> pair = load_pair<VL>(addend_ + plane + tile_.output[y] + x * pixels_.step * VL);
          sums[y][x] += second_ ? upper<VL>(pair) : lower<VL>(pair);
        }
      } else if (addend_ != nullptr) {
        EDGE_BCS_EACH_PAIR {
          const Integers<VL> pair = load_pair<VL>(addend_ + plane + tile_.output[y] + x * VL);
          sums[y][x] += lower<VL>(pair);
          sums[y][x + 1] += upper<VL>(pair);
        }
      }
      if (bits_ != nullptr) {
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y) {
          Vector<VL> open[TX];
#pragma GCC unroll 8
          for (int x = 0; x < TX; ++x)
            open[x] = function_ == Function::relu6 ? openness<VL>(Function::relu6, sums[y][x]) : sums[y][x];
          std::uint8_t* const to = bits_ + first_bits + tile_.bits[y];
          if (bits_pixel * 8 == VL) {
            store_positive_bits<VL, TX>(to, 0, open);
          } else {
#pragma GCC unroll 8
            for (int x = 0; x < TX; ++x) store_bits<VL>(to + x * bits_pixel, 0, positive_bits<VL>(open[x]));
          }
        }
      }
      if (function_ == Function::relu) {
        EDGE_BCS_EACH sums[y][x] = relu<VL>(sums[y][x]);
      } else if (function_ == Function::relu6) {
        EDGE_BCS_EACH sums[y][x] = relu6_of<VL>(sums[y][x]);
      }
      if (mask_bits_ != nullptr) {
        EDGE_BCS_EACH sums[y][x] = where_bits<VL>(
            load_bits<VL>(mask_bits_ + first_bits + tile_.bits[y] + x * bits_pixel, 0), sums[y][x]);
      }
      Number* const output = output_ + plane;
      if (beside_) {
        EDGE_BCS_EACH_PAIR store_pair<VL>(output + tile_.output[y] + x * VL,
                                          pair_of<VL>(sums[y][x], sums[y][x + 1]));
      } else {
        EDGE_BCS_EACH store_pixel<VL>(output + tile_.output[y] + x * pixels_.step * VL, second_, sums[y][x]);
      }
    }
#undef EDGE_BCS_EACH_PAIR
#undef EDGE_BCS_EACH
    if (halo_)
      zero_halo<VL>(walk_, tile_, numbers(walk_.output) + OutputPixels<VL>(walk_, tile_, row).plane, TY);
  }

 private:
  const Walk& walk_;
  const Tile& tile_;
  OutputPixels<VL> pixels_;
  bool beside_;
  // Whether this class does it: pixels lie side by side in whole pairs, or an even number apart, all in the same place of theirs.
  bool plain_;
  bool second_, halo_;
  Function function_;
  Number* output_;
  const Number* addend_;
  const float *scale_, *shift_;
  std::uint8_t* bits_;
  const std::uint8_t* mask_bits_;
};

// How many pixels side by side tiles of the walk have, where as many are left.
inline int pixels_across(const Walk& walk, int most) {
  int pixels = most;
  while (pixels > 1 && pixels > walk.width) pixels /= 2;
  return pixels;
}

template <int rows, int pixels, int sums, class Body>
EDGE_BCS_INLINE void with_size(int height, int width, const Body& body) {
  if constexpr (pixels > 1) {
    if (width < pixels) return with_size<rows, pixels / 2, sums>(height, width, body);
  }
  if constexpr (rows > 1) {
    if (height < rows) return with_size<rows / 2, pixels, sums>(height, width, body);
  }
  if constexpr (rows * pixels <= sums) body.template operator()<rows, pixels>();
}

// Calls body.template operator()<rows, pixels>(tile) for all tiles of image rows [begin, end), of at most `sums` pixels.
template <int most_across, int sums, class Body>
EDGE_BCS_INLINE void for_tiles(const Walk& walk, std::int64_t begin, std::int64_t end, const Body& body) {
  const int across = pixels_across(walk, most_across);
  const int down = smaller_int(most_rows, sums / across);
  Tile tile;
  for (std::int64_t row = begin; row < end;) {
    int rows = down;
    while (rows > end - row) rows /= 2;
    place_rows(tile, walk, row, rows);
    for (std::int64_t x = 0; x < walk.width;) {
      int pixels = across;
      while (pixels > walk.width - x) pixels /= 2;
      tile.first = x;
      tile.ends_row = x + pixels == walk.width;
      with_size<most_rows, most_across, sums>(
          rows, pixels, [&]<int TY, int TX>() { body.template operator()<TY, TX>(tile); });
      x += pixels;
    }
    row += rows;
  }
}

// Bands of at least `least_tiles` tiles, where there are output planes enough for groups of `least_group`.
inline Tasks tasks_of(const Walk& walk, int most_across, int sums, std::int64_t least_group,
                      std::int64_t least_tiles) {
  const std::int64_t image_rows = walk.blocks * walk.height;
  const int down = smaller_int(most_rows, sums / pixels_across(walk, most_across));
  Tasks tasks;
  const std::int64_t strips = ceil_divide(image_rows, down);
  const std::int64_t tiles = strips * ceil_divide(walk.width, pixels_across(walk, most_across));
  const std::int64_t bands =
      larger(1, smaller(smaller(enough_tasks, strips),
                        larger(tiles / least_tiles, enough_tasks / larger(1, walk.rows / least_group))));
  tasks.band = ceil_divide(strips, bands) * down;
  tasks.bands = ceil_divide(image_rows, tasks.band);
  const std::int64_t groups =
      larger(1, smaller(ceil_divide(enough_tasks, tasks.bands), walk.rows / larger(1, least_group)));
  tasks.group = ceil_divide(ceil_divide(walk.rows, groups), least_group) * least_group;
  tasks.groups = ceil_divide(walk.rows, tasks.group);
  return tasks;
}

// Where the pixels of a tile lie in the input, from their rows on: those that meet a tap at an even distance, or at one before
// an odd one, in their own pair's place.
template <int VL, int TX>
struct Across {
  // `first`: pixel of the walk.
  Across(const Walk& walk, std::int64_t first) : step(walk.input_pixel / VL) {
    base = ((first * step) & ~std::int64_t{1}) * VL;
    for (int x = 0; x < TX; ++x) at[x] = ((((first + x) * step) & ~std::int64_t{1}) * VL) - base;
  }
  std::int64_t step, base, at[TX];
};

// The kernels, see half.h.
std::int64_t sparse_tasks(const Walk&, const SparseRows&);
void sparse(const Walk&, const SparseRows&, std::int64_t task);
std::int64_t pack_tasks(const Walk&);
void pack(const Walk&, const Weights&, float* packed, std::int64_t task);
std::int64_t dense_tasks(const Walk&);
void dense(const Walk&, const float* packed, std::int64_t task);

}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE
}  // namespace edge_bcs

#endif
