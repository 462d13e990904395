// Walks over all weights of a layer whose kernel is three positions wide, with a third fewer multiplications.
//
// Two neighbouring output pixels and three weights g beside each other are, by Winograd's F(2, 3) (Lavin and Gray 2016, "Fast
// Algorithms for Convolutional Neural Networks", section 4.1), four products instead of six:
//
//     m0 = (d0 − d2) · g0                      y0 = m0 + m1 + m2
//     m1 = (d1 + d2) · (g0 + g1 + g2) / 2      y1 = m1 − m2 − m3
//     m2 = (d2 − d1) · (g0 − g1 + g2) / 2
//     m3 = (d1 − d3) · g2
//
// The products of three planes and two such pairs of pixels are summed in registers over channels and kernel rows: each weight
// that is loaded meets two vectors. The weights are packed in their second form, [row block][channel][kernel row][row][4]; each
// row block brings the input into its form anew, eight additions to 24 multiply-adds, so that nothing but the weights is kept.
#include "kernels/winograd.h"

#include "kernels/tiles.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

inline constexpr int pixels_across = winograd_pixels;  // of a register block: two pairs
inline constexpr int tile_down = 2;  // image rows of a tile, which is as wide as a register block
inline constexpr int products = 4;   // of a pair
inline constexpr int across = winograd_positions;

// The channels whose input around a tile stays in the first-level cache while all row blocks use it.
std::int64_t chunk_channels(const Walk& walk) {
  const std::int64_t pixels = (tile_down + walk.taps / across - 1) * (pixels_across + across - 1);
  const std::int64_t bytes = pixels * winograd_lanes * static_cast<std::int64_t>(sizeof(float));
  return larger(1, smaller(walk.channels, first_cache() / bytes));
}

// The kernel's rows: the distances of their leftmost positions.
struct KernelRows {
  explicit KernelRows(const Walk& walk) : count(walk.taps / across) {
    for (int k = 0; k < count; ++k) distance[k] = walk.tap[walk.used[across * k]];
  }
  int count;
  std::int32_t distance[max_taps / across];
};

// Adds channels [begin, end) to the sums of OB output planes in four neighbouring pixels.
template <int VL, int OB>
__attribute__((noinline)) void winograd_block(const Walk& walk, const float* weights,
                                              const KernelRows& kernel, const Place& place, std::int64_t row,
                                              int down, std::int64_t begin, std::int64_t end) {
  const std::int64_t pixel = walk.input_pixel;
  float* const output = walk.output + row * walk.output_plane + place.output[down];
  Vector<VL> sums[OB][2][products];
#pragma GCC unroll 8
  for (int o = 0; o < OB; ++o)
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      sums[o][pair][1] = sums[o][pair][2] = Vector<VL>{};
      if (begin == 0) {
        sums[o][pair][0] = sums[o][pair][3] = Vector<VL>{};
      } else {
        // The products of which the pixels so far are the result.
        sums[o][pair][0] = load<VL>(output + o * walk.output_plane + place.output_x[2 * pair]);
        sums[o][pair][3] = -load<VL>(output + o * walk.output_plane + place.output_x[2 * pair + 1]);
      }
    }
  const float* weight = weights + begin * kernel.count * products * OB;
  const float* plane = walk.input + place.input[down] + place.input_x[0] + begin * walk.input_plane;
  for (std::int64_t channel = begin; channel < end; ++channel, plane += walk.input_plane)
    for (int k = 0; k < kernel.count; ++k, weight += products * OB) {
      const float* const from = plane + kernel.distance[k];
      Vector<VL> d[pixels_across + across - 1];
#pragma GCC unroll 8
      for (int i = 0; i < pixels_across + across - 1; ++i) d[i] = load<VL>(from + i * pixel);
      const auto add = [&](int product, Vector<VL> left, Vector<VL> right) {
#pragma GCC unroll 8
        for (int o = 0; o < OB; ++o) {
          const Vector<VL> factor = broadcast<VL>(weight[products * o + product]);
          sums[o][0][product] += factor * left;
          sums[o][1][product] += factor * right;
        }
      };
      // In the order in which registers of d become free.
      add(0, d[0] - d[2], d[2] - d[4]);
      add(3, d[1] - d[3], d[3] - d[5]);
      add(1, d[1] + d[2], d[3] + d[4]);
      add(2, d[2] - d[1], d[4] - d[3]);
    }
#pragma GCC unroll 8
  for (int o = 0; o < OB; ++o) {
    Vector<VL> pixels[1][pixels_across];
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair) {
      const Vector<VL>(&m)[products] = sums[o][pair];
      pixels[0][2 * pair] = m[0] + m[1] + m[2];
      pixels[0][2 * pair + 1] = m[1] - m[2] - m[3];
    }
    if (end == walk.channels) {
      finish<VL, 1, pixels_across, true>(walk, place, row + o, pixels, down);
    } else {
#pragma GCC unroll 4
      for (int x = 0; x < pixels_across; ++x)
        store<VL>(output + o * walk.output_plane + place.output_x[x], pixels[0][x]);
    }
  }
}

// Where four pixels lie, in one vector of their lanes.
void place_pixels(Place& place, const Walk& walk, std::int64_t first, std::int64_t lane, bool last_lanes) {
  for (int t = 0; t < pixels_across; ++t) {
    place.input_x[t] = (first + t) * walk.input_pixel + lane;
    place.output_x[t] = (first + t) * walk.output_pixel + lane;
    place.mask_x[t] = (first + t) * walk.mask_pixel + lane;
    place.bit[t] = walk.bits_first + (first + t) * walk.bits_pixel + lane;
  }
  place.ends_row = last_lanes && first + pixels_across == walk.width;
}

int block_size(std::int64_t rows_left) { return static_cast<int>(smaller(winograd_rows, rows_left)); }

template <int VL>
void winograd_walk(const Walk& walk, const float* packed, std::int64_t begin_row, std::int64_t end_row,
                   std::int64_t first, std::int64_t last) {
  const std::int64_t channels = chunk_channels(walk), group = winograd_lanes;
  const KernelRows kernel(walk);
  Place place;
  for (std::int64_t image_row = begin_row; image_row < end_row; image_row += tile_down) {
    const int down = static_cast<int>(smaller(tile_down, end_row - image_row));
    place_rows(place, walk, image_row, down);
    for (std::int64_t x = 0; x < walk.width; x += pixels_across)
      for (std::int64_t lanes = 0; lanes < walk.lanes; lanes += group)
        for (std::int64_t begin = 0; begin < walk.channels; begin += channels) {
          const std::int64_t end = smaller(walk.channels, begin + channels);
          for (std::int64_t row = first; row < last; row += winograd_rows) {
            const float* const weights = packed + row * walk.channels * kernel.count * products;
            for (std::int64_t lane = lanes; lane < lanes + group; lane += VL) {
              place_pixels(place, walk, x, lane, lane + VL == walk.lanes);
              for (int y = 0; y < down; ++y) {
                switch (block_size(last - row)) {
                  case winograd_rows:
                    winograd_block<VL, winograd_rows>(walk, weights, kernel, place, row, y, begin, end);
                    break;
                  case 2:
                    winograd_block<VL, 2>(walk, weights, kernel, place, row, y, begin, end);
                    break;
                  default:
                    winograd_block<VL, 1>(walk, weights, kernel, place, row, y, begin, end);
                }
              }
            }
          }
        }
  }
}

}  // namespace

void pack_winograd(const Walk& walk, const Weights& weights, float* packed, std::int64_t begin,
                   std::int64_t end) {
  const KernelRows kernel(walk);
  const std::int64_t columns = walk.channels * kernel.count * products;
  for (std::int64_t row = begin; row < end; row += winograd_rows) {
    const int size = block_size(walk.rows - row);
    float* const block = packed + row * columns;
    std::memset(block, 0, static_cast<std::size_t>(size * columns) * sizeof(float));
    for_weights(walk, weights, row, size,
                [&](int o, std::int64_t channel, std::int64_t tap, float weight, std::int64_t) {
      float* const to = block + ((channel * kernel.count + tap / across) * size + o) * products;
      const std::int64_t place = tap % across;
      to[1] += weight / 2;
      to[2] += place == 1 ? -weight / 2 : weight / 2;
      if (place == 0) to[0] = weight;
      if (place == 2) to[3] = weight;
    });
  }
}

void winograd(const Walk& walk, const float* packed, std::int64_t begin, std::int64_t end, std::int64_t first,
              std::int64_t last) {
  winograd_walk<native_lanes>(walk, packed, begin, end, first, last);
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
