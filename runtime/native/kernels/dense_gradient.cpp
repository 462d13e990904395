// The gradient of all weights of a layer, for layers dense enough; those that there are take theirs from it.
//
// A block of dy planes times a block of (channel, tap) columns is a block of dot products in registers: every load of
// either side feeds several multiply-adds. Image rows are taken in bands for which the dy block stays in the first-level
// cache while all columns meet it.
#include "kernels/table.h"
#include "kernels/tiles.h"

#if !EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

inline constexpr int block_rows = registers == 32 ? 4 : 3;
inline constexpr int block_columns = registers == 32 ? 6 : 4;
inline constexpr int max_band = 64;
// Bytes of the dy block.
inline constexpr std::int64_t band_bytes = native_lanes == 16 ? 16 << 10 : 8 << 10;

// A band of image rows: distances in floats from pixel (0, 0) of plane 0.
struct Band {
  int rows = 0;
  std::int64_t input[max_band], dy[max_band];
};

// sums[o][i] += the dot products of dy plane `row`[o] with the input at distance `at`[i], over a band.
template <int VL, bool strided>
void block_products(const Walk& walk, const float* const (&dy)[block_rows],
                    const float* const (&input)[block_columns], const Band& band,
                    float (&sums)[block_rows][block_columns]) {
  constexpr int count = block_rows * block_columns;
  static_assert(count % 4 == 0);
  Vector<VL> products[count];
#pragma GCC unroll 24
  for (int i = 0; i < count; ++i) products[i] = Vector<VL>{};
  const std::int64_t vectors = walk.width * walk.lanes / VL, parts = walk.lanes / VL;
  for (int y = 0; y < band.rows; ++y) {
    std::int64_t from = band.dy[y], at = band.input[y];
    std::int64_t part = 0;
    for (std::int64_t v = 0; v < vectors; ++v) {
      Vector<VL> gradients[block_rows];
#pragma GCC unroll 8
      for (int o = 0; o < block_rows; ++o) gradients[o] = load<VL>(dy[o] + from);
#pragma GCC unroll 8
      for (int i = 0; i < block_columns; ++i) {
        const Vector<VL> pixels = load<VL>(input[i] + at);
#pragma GCC unroll 8
        for (int o = 0; o < block_rows; ++o) products[o * block_columns + i] += gradients[o] * pixels;
      }
      from += VL;
      at += VL;
      if constexpr (strided) {
        if (++part == parts) {
          part = 0;
          at += walk.input_pixel - walk.lanes;
        }
      }
    }
  }
  alignas(64) float totals[count] = {};
#pragma GCC unroll 8
  for (int i = 0; i < count; i += 4) {
    const Vector<VL> four[4] = {products[i], products[i + 1], products[i + 2], products[i + 3]};
    add_lane_sums<VL, 4>(totals + i, four);
  }
  for (int o = 0; o < block_rows; ++o)
    for (int i = 0; i < block_columns; ++i) sums[o][i] += totals[o * block_columns + i];
}

template <int VL, bool strided>
void gradient_rows(const Walk& walk, const WeightGradient& gradient, float* work, std::int64_t first,
                   std::int64_t last) {
  const std::int64_t columns = walk.channels * walk.taps, image_rows = walk.blocks * walk.height;
  const std::int64_t row_bytes = walk.width * walk.lanes * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t band_rows = larger(1, smaller(max_band, band_bytes / (block_rows * row_bytes)));
  for (std::int64_t start = 0; start < image_rows; start += band_rows) {
    Band band;
    for (std::int64_t row = start; row < smaller(image_rows, start + band_rows); ++row) {
      const std::int64_t block = row / walk.height, y = row % walk.height;
      band.input[band.rows] = block * walk.input_block + y * walk.input_row;
      band.dy[band.rows++] = block * walk.output_block + y * walk.output_row;
    }
    for (std::int64_t row = first; row < last; row += block_rows) {
      const float* dy[block_rows];
      for (int o = 0; o < block_rows; ++o)
        dy[o] = gradient.dy + smaller(row + o, last - 1) * walk.output_plane;
      std::int64_t channel = 0;
      int tap = 0;
      for (std::int64_t column = 0; column < columns; column += block_columns) {
        const float* input[block_columns];
        for (int i = 0; i < block_columns; ++i) {
          input[i] = walk.input + channel * walk.input_plane + walk.tap[walk.used[tap]];
          // Past the last column: that column again, its product unused.
          if (column + i + 1 < columns && ++tap == walk.taps) {
            tap = 0;
            ++channel;
          }
        }
        float sums[block_rows][block_columns] = {};
        block_products<VL, strided>(walk, dy, input, band, sums);
        for (int o = 0; o < smaller(block_rows, last - row); ++o)
          for (int i = 0; i < smaller(block_columns, columns - column); ++i)
            work[(row + o) * columns + column + i] += sums[o][i];
      }
    }
  }
}

// Σ dy of one plane.
double plane_sum(const Walk& walk, const float* dy) {
  double sum = 0;
  for (std::int64_t block = 0; block < walk.blocks; ++block)
    for (std::int64_t y = 0; y < walk.height; ++y) {
      const float* const from = dy + block * walk.output_block + y * walk.output_row;
      const std::int64_t count = walk.width * walk.lanes;
      float parts[16] = {};
      std::int64_t i = 0;
      for (; i + 16 <= count; i += 16)
        for (int part = 0; part < 16; ++part) parts[part] += from[i + part];
      for (; i < count; ++i) parts[0] += from[i];
      for (float part : parts) sum += static_cast<double>(part);
    }
  return sum;
}

}  // namespace

std::int64_t dense_gradient_tasks(const Walk& walk) {
  return smaller(16, ceil_divide(walk.rows, block_rows));
}

void dense_gradient(const Walk& walk, const Weights& weights, const WeightGradient& gradient, float* work,
                    std::int64_t task) {
  const std::int64_t blocks = ceil_divide(walk.rows, block_rows), tasks = dense_gradient_tasks(walk);
  const std::int64_t first = blocks * task / tasks * block_rows;
  const std::int64_t last = smaller(walk.rows, blocks * (task + 1) / tasks * block_rows);
  const std::int64_t columns = walk.channels * walk.taps;
  std::memset(work + first * columns, 0, static_cast<std::size_t>((last - first) * columns) * sizeof(float));
  with_vectors(
      walk, [&]<int VL, bool strided>() { gradient_rows<VL, strided>(walk, gradient, work, first, last); });
  for (std::int64_t row = first; row < last; ++row) {
    const float scale = gradient.scale == nullptr ? 1.0f : gradient.scale[row];
    double dscale = 0;
    for_weights(walk, weights, row, 1,
                [&](int, std::int64_t channel, std::int64_t tap, float weight, std::int64_t j) {
      const float sum = work[row * columns + channel * walk.taps + tap];
      gradient.grad[j] += scale * sum;
      dscale += static_cast<double>(weight) * static_cast<double>(sum);
    });
    if (gradient.dscale == nullptr) continue;
    gradient.dscale[row] += static_cast<float>(dscale);
    gradient.dshift[row] += static_cast<float>(plane_sum(walk, gradient.dy + row * walk.output_plane));
  }
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
