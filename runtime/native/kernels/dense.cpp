// Walks over all weights of a layer: for layers dense enough that skipping zeros costs more than it saves.
//
// A block of output planes shares every load of the input: the sums of `block_rows` planes times a few vectors are held in
// registers. Weights are packed by blocks of rows, [row block][channel][tap][row], so that a block reads them in order.
// Tiles are walked in chunks of input channels that fit the first-level cache, while all row blocks use them.
#include "kernels/blocks.h"
#include "kernels/table.h"
#include "kernels/tiles.h"
#include "kernels/winograd.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

static_assert(block_rows % winograd_rows == 0);
// Vectors of a register block: block_rows times these are the accumulators.
inline constexpr int block_vectors = registers == 32 ? 4 : 2;

// The number of rows of the block that begins `rows_left` rows before the end of the matrix.
int block_size(std::int64_t rows_left) {
  if (rows_left >= block_rows) return block_rows;
  return rows_left == 5 ? 3 : static_cast<int>(rows_left);
}

// The channels of one chunk.
std::int64_t chunk_channels(const Walk& walk) {
  return larger(1, smaller(walk.channels, first_cache() / tile_footprint(walk)));
}

// `finish` for a block of planes whose activations do more than clip.
template <int VL>
__attribute__((noinline)) void finish_block(const Walk& walk, const Place& place, std::int64_t row,
                                            Vector<VL>* values, int planes, int height, int width, int down,
                                            int right) {
  for (int o = 0; o < planes; ++o, ++row, values += height * width) {
    const float* const addend = walk.addend == nullptr ? nullptr : walk.addend + row * walk.output_plane;
    for (int y = 0, i = 0; y < height; ++y)
      for (int x = 0; x < width; ++x, ++i) {
        if (walk.scale != nullptr)
          values[i] = values[i] * broadcast<VL>(walk.scale[row]) + broadcast<VL>(walk.shift[row]);
        if (addend != nullptr)
          values[i] += load<VL>(addend + place.output[down + y] + place.output_x[right + x]);
      }
    finish_activated<VL>(walk, place, row, values, height, width, down, right);
    if (ends_in_halo(walk, place)) zero_halo(walk, place, row, height, down);
  }
}

// Adds channels [begin, end) to the sums of OB output planes, for TY rows and TV vectors that begin `down` and `right`
// in a tile.
template <int VL, int OB, int TY, int TV, bool strided>
__attribute__((noinline)) void dense_block(const Walk& walk, const float* weights, const Place& place,
                                           std::int64_t row, int down, int right, std::int64_t begin,
                                           std::int64_t end) {
  const float* input[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) input[y] = walk.input + place.input[down + y] + place.input_x[right];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x + right, x);
  float* const output = walk.output + row * walk.output_plane + place.output_x[right];
  Vector<VL> sums[OB][TY][TV];
#pragma GCC unroll 8
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
      for (int x = 0; x < TV; ++x)
        sums[o][y][x] = begin == 0 ? Vector<VL>{}
                                   : load<VL>(output + o * walk.output_plane + place.output[down + y] +
                                              along<VL, strided>(place.output_x + right, x));
  const float* weight = weights + begin * walk.taps * OB;
  for (std::int64_t channel = begin; channel < end; ++channel) {
    const std::int64_t plane = channel * walk.input_plane;
    for (int k = 0; k < walk.taps; ++k, weight += OB) {
      const std::int64_t distance = plane + walk.tap[walk.used[k]];
      Vector<VL> pixels[TY][TV];
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x) pixels[y][x] = load<VL>(input[y] + distance + input_x[x]);
#pragma GCC unroll 8
      for (int o = 0; o < OB; ++o) {
        const Vector<VL> factor = broadcast<VL>(weight[o]);
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < TV; ++x) sums[o][y][x] += factor * pixels[y][x];
      }
    }
  }
  if (end != walk.channels) {
#pragma GCC unroll 8
    for (int o = 0; o < OB; ++o)
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x)
          store<VL>(output + o * walk.output_plane + place.output[down + y] +
                        along<VL, strided>(place.output_x + right, x),
                    sums[o][y][x]);
    return;
  }
  if (!walk.simple()) {
    Vector<VL> values[OB * TY * TV];
#pragma GCC unroll 8
    for (int o = 0; o < OB; ++o)
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x) values[(o * TY + y) * TV + x] = sums[o][y][x];
    return finish_block<VL>(walk, place, row, values, OB, TY, TV, down, right);
  }
  // Plane after plane, each in the registers of the first: registers cannot be indexed, and what is done to the sums of a
  // plane would else stand here once for each of them.
#pragma GCC unroll 1
  for (int o = 0; o < OB; ++o) {
    scale_and_add<VL, TY, TV, strided>(walk, place, row + o, sums[0], down, right);
    finish_clipped<VL, TY, TV, strided>(walk, place, row + o, sums[0], down, right);
#pragma GCC unroll 8
    for (int next = 1; next < OB; ++next)
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x) sums[next - 1][y][x] = sums[next][y][x];
  }
  if (ends_in_halo(walk, place))
    for (int o = 0; o < OB; ++o) zero_halo(walk, place, row + o, TY, down);
}

template <int VL, int TY, int TV, bool strided>
void dense_tile(const Walk& walk, const float* packed, const Place& place, std::int64_t first,
                std::int64_t last) {
  // Image rows of a register block.
  constexpr int down = smaller_int(TY, block_vectors > TV ? block_vectors / TV : 1);
  constexpr int across = smaller_int(TV, block_vectors);
  static_assert(TV % across == 0);
  constexpr bool apart = strided && across > 1;
  const std::int64_t channels = chunk_channels(walk);
  for (std::int64_t begin = 0; begin < walk.channels; begin += channels) {
    const std::int64_t end = smaller(walk.channels, begin + channels);
    for (std::int64_t row = first; row < last;) {
      const float* const weights = packed + row * walk.channels * walk.taps;
      const int size = block_size(last - row);
      for (int y = 0; y < TY; y += down)
        for (int x = 0; x < TV; x += across) {
          switch (size) {
            case block_rows:
              dense_block<VL, block_rows, down, across, apart>(walk, weights, place, row, y, x, begin, end);
              break;
            case 4:
              dense_block<VL, 4, down, across, apart>(walk, weights, place, row, y, x, begin, end);
              break;
            case 3:
              dense_block<VL, 3, down, across, apart>(walk, weights, place, row, y, x, begin, end);
              break;
            case 2:
              dense_block<VL, 2, down, across, apart>(walk, weights, place, row, y, x, begin, end);
              break;
            default:
              dense_block<VL, 1, down, across, apart>(walk, weights, place, row, y, x, begin, end);
          }
        }
      row += size;
    }
  }
}

}  // namespace

std::int64_t pack_tasks(const Walk& walk) { return packing_tasks(walk); }

void pack(const Walk& walk, const Weights& weights, float* packed, std::int64_t task) {
  const PackedRows rows = packed_rows(walk, task);
  if (uses_winograd(walk)) return pack_winograd(walk, weights, packed, rows.first, rows.last);
  pack_blocks(walk, weights, rows, packed, walk.channels * walk.taps, block_size,
              [&](float* to, int size, int o, std::int64_t, std::int64_t channel, std::int64_t tap,
                  float weight) { to[(channel * walk.taps + tap) * size + o] = weight; });
}

std::int64_t dense_tasks(const Walk& walk) {
  const Tasks tasks = cut_blocks(walk);
  return tasks.bands * tasks.groups;
}

void dense(const Walk& walk, const float* packed, std::int64_t task) {
  const Tasks tasks = cut_blocks(walk);
  const std::int64_t band = task / tasks.groups * tasks.band, image_rows = walk.blocks * walk.height;
  const std::int64_t first = task % tasks.groups * tasks.group,
                     last = smaller(walk.rows, first + tasks.group);
  if (uses_winograd(walk))
    return winograd(walk, packed, band, smaller(image_rows, band + tasks.band), first, last);
  with_vectors(walk, [&]<int VL, bool strided>() {
    for_tiles<VL>(walk, band, smaller(image_rows, band + tasks.band),
                  [&]<int TY, int TV>(const Place& place) {
      dense_tile<VL, TY, TV, strided>(walk, packed, place, first, last);
    });
  });
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
