// Walks over all weights of a layer in half precision: see dense.cpp. Two channels are interleaved first, so that each product
// adds two weights.
#include "kernels/blocks.h"
#include "kernels/half_tiles.h"

#if defined(__AVX512BF16__)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace half_precision {
namespace {

inline constexpr int dense_across = 4, dense_sums = 4;

template <int VL, int TY, int TX>
__attribute__((noinline)) void finish_dense(const Walk& walk, const Tile& tile, std::int64_t row,
                                            const Vector<VL>* values) {
  Vector<VL> sums[TY][TX];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
    for (int x = 0; x < TX; ++x) sums[y][x] = values[y * TX + x];
  finish<VL, TY, TX>(walk, tile, row, sums);
}

// One of two pixels of a pair, of two channels, as a pair of channels. `down` and `up`: 0 and 16 bits for the first pixel, 16 and
// 0 for the second.
template <int VL>
EDGE_BCS_INLINE Integers<VL> channels_of(Integers<VL> first, Integers<VL> second, __m128i down, __m128i up) {
  if constexpr (VL == 16)
    return reinterpret_cast<Integers<VL>>(_mm512_mask_blend_epi16(
        0xaaaaaaaa, _mm512_maskz_srl_epi32(0xffff, reinterpret_cast<__m512i>(first), down),
        _mm512_maskz_sll_epi32(0xffff, reinterpret_cast<__m512i>(second), up)));
  else
    return reinterpret_cast<Integers<VL>>(
        _mm256_mask_blend_epi16(0xaaaa, _mm256_srl_epi32(reinterpret_cast<__m256i>(first), down),
                                _mm256_sll_epi32(reinterpret_cast<__m256i>(second), up)));
}

// OB output planes of a tile.
template <int VL, int OB, int TY, int TX>
__attribute__((noinline)) void dense_block(const Walk& walk, const std::uint32_t* weights, const Tile& tile,
                                           std::int64_t row) {
  const Across<VL, TX> across(walk, tile.first);
  const Number* rows[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) rows[y] = numbers(walk.input) + tile.input[y] + across.base;
  const bool even_step = across.step % 2 == 0;
  const bool vector = walk.input_plane == VL;  // whose pairs are of channels already
  Vector<VL> sums[OB][TY][TX] = {};
  const __m128i none = _mm_setzero_si128(), half = _mm_cvtsi32_si128(16);
  for (std::int64_t channel = 0; channel < walk.channels; channel += 2) {
    const std::int64_t first = channel * walk.input_plane;
    // The last channel of an odd number meets a weight of 0 as well.
    const std::int64_t next = channel + 1 < walk.channels ? walk.input_plane : 0;
    for (int k = 0; k < walk.taps; ++k, weights += OB) {
      const std::int64_t distance = walk.tap[walk.used[k]], odd = distance & VL;
      const std::int64_t even_at = first + distance - odd, odd_at = even_step ? even_at : even_at + 2 * odd;
      const __m128i down = odd != 0 ? half : none, up = odd != 0 ? none : half;
      const __m128i other_down = even_step ? down : up, other_up = even_step ? up : down;
      Integers<VL> pixels[TY][TX];
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
        for (int x = 0; x < TX; ++x) {
          const Number* const from = rows[y] + (x % 2 == 0 ? even_at : odd_at) + across.at[x];
          if (vector)
            pixels[y][x] = load_pair<VL>(from);
          else
            pixels[y][x] = channels_of<VL>(load_pair<VL>(from), load_pair<VL>(from + next),
                                           x % 2 == 0 ? down : other_down, x % 2 == 0 ? up : other_up);
        }
#pragma GCC unroll 8
      for (int o = 0; o < OB; ++o) {
        const Integers<VL> weight = spread<VL>(weights[o]);
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
          for (int x = 0; x < TX; ++x) sums[o][y][x] = dot<VL>(sums[o][y][x], pixels[y][x], weight);
      }
    }
  }
  Vector<VL> values[TY * TX];
#pragma GCC unroll 8
  for (int o = 0; o < OB; ++o) {
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < TX; ++x) values[y * TX + x] = sums[o][y][x];
    finish_dense<VL, TY, TX>(walk, tile, row + o, values);
  }
}

std::int64_t words_of_row(const Walk& walk) { return (walk.channels + 1) / 2 * walk.taps; }

Tasks dense_cut(const Walk& walk) {
  static_assert(18 % block_rows == 0);
  return tasks_of(walk, dense_across, dense_sums, 18, 1);
}

template <int VL>
void dense_walk(const Walk& walk, const std::uint32_t* packed, std::int64_t task) {
  const Tasks tasks = dense_cut(walk);
  const std::int64_t image_rows = walk.blocks * walk.height;
  const std::int64_t band = task / tasks.groups * tasks.band;
  const std::int64_t first = task % tasks.groups * tasks.group,
                     last = smaller(walk.rows, first + tasks.group);
  for_tiles<dense_across, dense_sums>(walk, band, smaller(image_rows, band + tasks.band),
                                      [&]<int TY, int TX>(const Tile& tile) {
    for (std::int64_t row = first; row < last;) {
      const std::uint32_t* const weights = packed + row * words_of_row(walk);
      const int size = half_block(last - row);
      switch (size) {
        case block_rows:
          dense_block<VL, block_rows, TY, TX>(walk, weights, tile, row);
          break;
        case 4:
          dense_block<VL, 4, TY, TX>(walk, weights, tile, row);
          break;
        case 2:
          dense_block<VL, 2, TY, TX>(walk, weights, tile, row);
          break;
        default:
          dense_block<VL, 1, TY, TX>(walk, weights, tile, row);
      }
      row += size;
    }
  });
}

}  // namespace

std::int64_t pack_tasks(const Walk& walk) { return packing_tasks(walk); }

void pack(const Walk& walk, const Weights& weights, float* packed, std::int64_t task) {
  pack_blocks(walk, weights, packed_rows(walk, task), reinterpret_cast<std::uint32_t*>(packed),
              words_of_row(walk), half_block,
              [&](std::uint32_t* to, int size, int o, std::int64_t, std::int64_t channel, std::int64_t tap,
                  float weight) {
    to[(channel / 2 * walk.taps + tap) * size + o] |= std::uint32_t{to_half(weight)} << (channel % 2 * 16);
  });
}

std::int64_t dense_tasks(const Walk& walk) {
  const Tasks tasks = dense_cut(walk);
  return tasks.bands * tasks.groups;
}

void dense(const Walk& walk, const float* packed, std::int64_t task) {
  const auto* const words = reinterpret_cast<const std::uint32_t*>(packed);
  walk.lanes == 16 ? dense_walk<16>(walk, words, task) : dense_walk<8>(walk, words, task);
}

}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE
}  // namespace edge_bcs

#endif
