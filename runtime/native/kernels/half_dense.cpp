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
// Rows of the matrix whose sums wait for other channels: half of a first-level cache of 32 KiB.
inline constexpr int most_of_rows = 12 * block_rows;

template <int VL, int TY, int TX>
__attribute__((noinline)) void finish_dense(const Finish<VL, TY, TX>& finish, std::int64_t row,
                                            const Vector<VL>* values) {
  Vector<VL> sums[TY][TX];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
    for (int x = 0; x < TX; ++x) sums[y][x] = values[y * TX + x];
  finish(row, sums);
}

// The lower halves of some words with the upper halves of others.
template <int VL>
EDGE_BCS_INLINE Integers<VL> halves_of(Integers<VL> lower, Integers<VL> upper) {
  if constexpr (VL == 16)
    return reinterpret_cast<Integers<VL>>(_mm512_mask_blend_epi16(
        0xaaaaaaaa, reinterpret_cast<__m512i>(lower), reinterpret_cast<__m512i>(upper)));
  else
    return reinterpret_cast<Integers<VL>>(
        _mm256_mask_blend_epi16(0xaaaa, reinterpret_cast<__m256i>(lower), reinterpret_cast<__m256i>(upper)));
}

// The first pixel of a pair, and the second, of two channels: as a pair of channels.
template <int VL>
EDGE_BCS_INLINE Integers<VL> first_of(Integers<VL> one, Integers<VL> other) {
  return halves_of<VL>(one, other << 16);
}
template <int VL>
EDGE_BCS_INLINE Integers<VL> second_of(Integers<VL> one, Integers<VL> other) {
  return halves_of<VL>(one >> 16, other);
}

// The pixels that a tile's walk meets, each once, as the kernel wants them: vectors of pairs of channels, for all rows of the
// matrix to read.
struct Patch {
  static constexpr int most = max_taps * dense_sums;  // vectors of one pair of channels

  // For tiles of TY × TX pixels.
  template <int VL, int TY, int TX>
  void find(const Walk& walk) {
    const std::int64_t step = walk.input_pixel / VL;
    count = 0;
    std::int64_t next = 0;  // the pixel behind the last one of a run
    for (int k = 0; k < walk.taps; ++k) {
      const std::int64_t first = walk.tap[walk.used[k]] / VL;
      // Where taps are a pixel apart, they meet the same pixels but one.
      const bool same = step == 1 && count > 0 && first <= next;
      start[k] = same ? count - static_cast<int>(next - first) : count;
      for (int x = same ? static_cast<int>(next - first) : 0; x < TX; ++x)
        pixel[count++] = static_cast<std::int32_t>(first + x * step);
      next = first + TX;
    }
    const std::int64_t vectors = larger(1, TY * count);  // a phase of a stride may meet none
    pairs = static_cast<int>(smaller(larger(1, first_cache() / (4 * VL * vectors)), most / vectors));
  }

  int count = 0;  // pixels of a row of the tile
  int pairs = 0;  // of channels, at a time
  std::int32_t pixel[max_taps * dense_across], start[max_taps];
};

// Writes the pixels of `pairs` pairs of channels, from `channel` on.
template <int VL, int TY, int TX>
__attribute__((noinline)) void interleave(const Walk& walk, const Patch& patch, const Tile& tile,
                                          std::int64_t channel, int pairs, Number* to) {
  const bool vector = walk.input_plane == VL;  // whose pairs are of channels already
  const std::int64_t begin = tile.first * (walk.input_pixel / VL);
  for (int p = 0; p < pairs; ++p, channel += 2) {
    // The last channel of an odd number meets a weight of 0 as well.
    const std::int64_t next = channel + 1 < walk.channels ? walk.input_plane : 0;
    for (int y = 0; y < TY; ++y) {
      const Number* const row = numbers(walk.input) + channel * walk.input_plane + tile.input[y];
      for (int j = 0; j < patch.count; ++j, to += 2 * VL) {
        const std::int64_t pixel = begin + patch.pixel[j];
        const Number* const from = row + (pixel & ~std::int64_t{1}) * VL;
        const Integers<VL> one = load_pair<VL>(from);
        if (vector) {
          store_pair<VL>(to, one);
          continue;
        }
        const Integers<VL> other = load_pair<VL>(from + next);
        if ((pixel & 1) != 0) {
          store_pair<VL>(to, second_of<VL>(one, other));
          continue;
        }
        store_pair<VL>(to, first_of<VL>(one, other));
        if (j + 1 < patch.count && patch.pixel[j + 1] == patch.pixel[j] + 1) {
          ++j, to += 2 * VL;
          store_pair<VL>(to, second_of<VL>(one, other));
        }
      }
    }
  }
}

// OB output planes of a tile, so many pairs of channels more; of the last ones the sums are finished, of others they wait.
template <int VL, int OB, int TY, int TX>
__attribute__((noinline)) void dense_block(const Walk& walk, const Patch& patch, const Number* pixels,
                                           int pairs, const std::uint32_t* weights, float* waiting,
                                           bool first, bool last, const Finish<VL, TY, TX>& finish,
                                           std::int64_t row) {
  Vector<VL> sums[OB][TY][TX];
#define EDGE_BCS_EACH_SUM                                                                                   \
  _Pragma("GCC unroll 8") for (int o = 0; o < OB; ++o) _Pragma("GCC unroll 8") for (int y = 0; y < TY; ++y) \
      _Pragma("GCC unroll 8") for (int x = 0; x < TX; ++x)
  EDGE_BCS_EACH_SUM sums[o][y][x] = first ? Vector<VL>{} : load<VL>(waiting + ((o * TY + y) * TX + x) * VL);
  const std::int64_t count = patch.count;
  for (int p = 0; p < pairs; ++p, pixels += TY * count * 2 * VL) {
    for (int k = 0; k < walk.taps; ++k, weights += OB) {
      const Number* const from = pixels + patch.start[k] * 2 * VL;
      Integers<VL> pixel[TY][TX];
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
        for (int x = 0; x < TX; ++x) pixel[y][x] = load_pair<VL>(from + (y * count + x) * 2 * VL);
#pragma GCC unroll 8
      for (int o = 0; o < OB; ++o) {
        const Integers<VL> weight = spread<VL>(weights[o]);
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
          for (int x = 0; x < TX; ++x) sums[o][y][x] = dot<VL>(sums[o][y][x], pixel[y][x], weight);
      }
    }
  }
  if (!last) {
    EDGE_BCS_EACH_SUM store<VL>(waiting + ((o * TY + y) * TX + x) * VL, sums[o][y][x]);
    return;
  }
#undef EDGE_BCS_EACH_SUM
  Vector<VL> values[TY * TX];
#pragma GCC unroll 8
  for (int o = 0; o < OB; ++o) {
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
      for (int x = 0; x < TX; ++x) values[y * TX + x] = sums[o][y][x];
    finish_dense<VL, TY, TX>(finish, row + o, values);
  }
}

// The number of rows of the block that begins `left` rows before the end of the matrix: three are the gradient of an RGB image.
int rows_of_block(std::int64_t left) {
  if (left >= block_rows) return block_rows;
  return left == 5 ? 3 : static_cast<int>(left);
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
  const std::int64_t begin = task % tasks.groups * tasks.group, end = smaller(walk.rows, begin + tasks.group);
  const auto all_pairs = static_cast<int>((walk.channels + 1) / 2);
  alignas(64) Number pixels[Patch::most * 2 * VL];
  alignas(64) float waiting[most_of_rows * dense_sums * VL];
  Patch patch;
  int patch_height = 0, patch_width = 0;
  for_tiles<dense_across, dense_sums>(walk, band, smaller(image_rows, band + tasks.band),
                                      [&]<int TY, int TX>(const Tile& tile) {
    if (patch_height != TY || patch_width != TX) {
      patch.find<VL, TY, TX>(walk);
      patch_height = TY, patch_width = TX;
    }
    const Finish<VL, TY, TX> finish(walk, tile);
    for (std::int64_t some = begin; some < end; some += most_of_rows) {
      const std::int64_t some_end = smaller(end, some + most_of_rows);
      for (int pair = 0; pair < all_pairs; pair += patch.pairs) {
        const int pairs = smaller_int(patch.pairs, all_pairs - pair);
        const bool first = pair == 0, last = pair + pairs == all_pairs;
        interleave<VL, TY, TX>(walk, patch, tile, std::int64_t{2} * pair, pairs, pixels);
        for (std::int64_t row = some; row < some_end;) {
          const int size = rows_of_block(some_end - row);
          const std::uint32_t* const weights =
              packed + row * words_of_row(walk) + std::int64_t{pair} * walk.taps * size;
          float* const sums = waiting + (row - some) * dense_sums * VL;
          switch (size) {
            case block_rows:
              dense_block<VL, block_rows, TY, TX>(walk, patch, pixels, pairs, weights, sums, first, last,
                                                  finish, row);
              break;
            case 4:
              dense_block<VL, 4, TY, TX>(walk, patch, pixels, pairs, weights, sums, first, last, finish, row);
              break;
            case 3:
              dense_block<VL, 3, TY, TX>(walk, patch, pixels, pairs, weights, sums, first, last, finish, row);
              break;
            case 2:
              dense_block<VL, 2, TY, TX>(walk, patch, pixels, pairs, weights, sums, first, last, finish, row);
              break;
            default:
              dense_block<VL, 1, TY, TX>(walk, patch, pixels, pairs, weights, sums, first, last, finish, row);
          }
          row += size;
        }
      }
    }
  });
}

}  // namespace

std::int64_t pack_tasks(const Walk& walk) { return packing_tasks(walk); }

void pack(const Walk& walk, const Weights& weights, float* packed, std::int64_t task) {
  pack_blocks(walk, weights, packed_rows(walk, task), reinterpret_cast<std::uint32_t*>(packed),
              words_of_row(walk), rows_of_block,
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
