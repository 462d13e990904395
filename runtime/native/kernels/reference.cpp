// The kernels written as plainly as can be: the scalar variant, against which the others are tested.
#include "kernels/activate.h"
#include "kernels/table.h"

#if EDGE_BCS_SCALAR

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {
namespace {

// Calls body(input pixel offset, output pixel offset, mask offset, bits offset in bytes, bit) for every float of a plane in
// image rows [begin, end) of all blocks' rows.
template <class Body>
void for_pixels(const Walk& walk, std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::int64_t block = row / walk.height, y = row % walk.height;
    for (std::int64_t x = 0; x < walk.width; ++x)
      for (std::int64_t lane = 0; lane < walk.lanes; ++lane)
        body(block * walk.input_block + y * walk.input_row + x * walk.input_pixel + lane,
             block * walk.output_block + y * walk.output_row + x * walk.output_pixel + lane,
             block * walk.mask_block + y * walk.mask_row + x * walk.mask_pixel + lane,
             block * walk.bits_block + y * walk.bits_row, walk.bits_first + x * walk.bits_pixel + lane);
  }
}

template <class Body>
void for_pixels(const Walk& walk, const Body& body) {
  for_pixels(walk, 0, walk.blocks * walk.height, body);
}

// The output from the sums of one plane in image rows [begin, end): sum(input offset) is called for every float. Zeroes the
// halo of the output where there is one.
template <class Sum>
void plane(const Walk& walk, std::int64_t row, std::int64_t begin, std::int64_t end, const Sum& sum) {
  for_pixels(walk, begin, end,
             [&](std::int64_t in, std::int64_t out, std::int64_t mask, std::int64_t byte, std::int64_t bit) {
    float value = sum(in);
    if (walk.scale != nullptr) value = value * walk.scale[row] + walk.shift[row];
    out += row * walk.output_plane;
    if (walk.addend != nullptr) value += walk.addend[out];
    mask += row * walk.mask_plane;
    byte += row * walk.bits_plane + bit / 8;
    if (walk.pre != nullptr) walk.pre[mask] = value;
    if (walk.bits != nullptr) {
      const unsigned others = bit % 8 == 0 ? 0u : walk.bits[byte];
      const bool open = openness<1>(walk.activation.function, Vector<1>{value})[0] > 0;
      walk.bits[byte] = static_cast<std::uint8_t>(others | static_cast<unsigned>(open) << (bit % 8));
    }
    Vector<1> result{value};
    activate<1>(walk.activation, &result, 1);
    if (walk.mask != nullptr) {
      const Vector<1> kept{walk.mask[mask]};
      pass_back<1>(walk.through, &kept, &result, 1);
    }
    if (walk.mask_bits != nullptr)
      result = pass_slopes<1>(slopes_of(walk.through), walk.mask_bits[byte] >> (bit % 8) & 1u, result);
    walk.output[out] = result[0];
  });
  for (std::int64_t at = begin; at < end; ++at) {
    const std::int64_t block = at / walk.height, y = at % walk.height;
    float* tail = walk.output + row * walk.output_plane + block * walk.output_block + y * walk.output_row +
                  walk.tail_at;
    const std::int64_t count = walk.tail + (y == walk.height - 1 ? walk.bottom : 0);
    for (std::int64_t i = 0; i < count; ++i) tail[i] = 0;
  }
}

template <class Sum>
void plane(const Walk& walk, std::int64_t row, const Sum& sum) {
  plane(walk, row, 0, walk.blocks * walk.height, sum);
}

std::int64_t distance(const Walk& walk, std::int32_t entry) {
  return (entry >> 8) * walk.input_plane + walk.tap[entry & 255];
}

// grad, dscale and dshift of one row, from g'(channel, tap).
template <class Gradient>
void deliver(const Walk& walk, const Weights& weights, const WeightGradient& gradient, std::int64_t row,
             const Gradient& gradient_of) {
  double dscale = 0;
  for_weights(walk, weights, row, 1,
              [&](int, std::int64_t channel, std::int64_t tap, float weight, std::int64_t j) {
    const double sum = gradient_of(channel, tap);
    gradient.grad[j] += static_cast<float>((gradient.scale == nullptr ? 1.0 : gradient.scale[row]) * sum);
    dscale += sum * weight;
  });
  if (gradient.dscale == nullptr) return;
  gradient.dscale[row] += static_cast<float>(dscale);
  double dshift = 0;
  for_pixels(walk, [&](std::int64_t, std::int64_t out, std::int64_t, std::int64_t, std::int64_t) {
    dshift += gradient.dy[row * walk.output_plane + out];
  });
  gradient.dshift[row] += static_cast<float>(dshift);
}

// Σ dy · input at the place of a weight.
double product(const Walk& walk, const WeightGradient& gradient, std::int64_t row, std::int64_t channel,
               std::int64_t tap) {
  const std::int64_t at = channel * walk.input_plane + walk.tap[walk.used[tap]];
  double sum = 0;
  for_pixels(walk, [&](std::int64_t in, std::int64_t out, std::int64_t, std::int64_t, std::int64_t) {
    sum += static_cast<double>(gradient.dy[row * walk.output_plane + out]) * walk.input[in + at];
  });
  return sum;
}

}  // namespace

std::int64_t sparse_tasks(const Walk& walk, const SparseRows&) { return walk.rows; }

void sparse(const Walk& walk, const SparseRows& rows, std::int64_t row) {
  plane(walk, row, [&](std::int64_t in) {
    float sum = 0;
    for (std::int64_t j = rows.begin(row); j < rows.end(row); ++j)
      sum += rows.weight(j) * walk.input[in + distance(walk, rows.entry[j])];
    return sum;
  });
}

std::int64_t pack_tasks(const Walk& walk) { return walk.rows; }

void pack(const Walk& walk, const Weights& weights, float* packed, std::int64_t row) {
  float* const to = packed + row * walk.channels * walk.taps;
  for (std::int64_t i = 0; i < walk.channels * walk.taps; ++i) to[i] = 0;
  for_weights(walk, weights, row, 1,
              [&](int, std::int64_t channel, std::int64_t tap, float weight, std::int64_t) {
    to[channel * walk.taps + tap] = weight;
  });
}

std::int64_t dense_tasks(const Walk& walk) { return walk.rows; }

void dense(const Walk& walk, const float* packed, std::int64_t row) {
  const float* const weights = packed + row * walk.channels * walk.taps;
  plane(walk, row, [&](std::int64_t in) {
    float sum = 0;
    for (std::int64_t channel = 0; channel < walk.channels; ++channel)
      for (int k = 0; k < walk.taps; ++k)
        sum += weights[channel * walk.taps + k] *
               walk.input[in + channel * walk.input_plane + walk.tap[walk.used[k]]];
    return sum;
  });
}

std::int64_t gradient_tasks(const Walk& walk, const SparseRows&) { return walk.rows; }

void gradient(const Walk& walk, const SparseRows& rows, const WeightGradient& gradient, std::int64_t row) {
  deliver(walk, {.rows = rows}, gradient, row,
          [&](std::int64_t channel, std::int64_t tap) { return product(walk, gradient, row, channel, tap); });
}

std::int64_t dense_gradient_tasks(const Walk& walk) { return walk.rows; }

void dense_gradient(const Walk& walk, const Weights& weights, const WeightGradient& gradient, float* work,
                    std::int64_t row) {
  float* const sums = work + row * walk.channels * walk.taps;
  for (std::int64_t channel = 0; channel < walk.channels; ++channel)
    for (int k = 0; k < walk.taps; ++k)
      sums[channel * walk.taps + k] = static_cast<float>(product(walk, gradient, row, channel, k));
  deliver(walk, weights, gradient, row, [&](std::int64_t channel, std::int64_t tap) {
    return static_cast<double>(sums[channel * walk.taps + tap]);
  });
}

void depthwise(const Walk& walk, const Weights& weights, std::int64_t row, std::int64_t begin,
               std::int64_t end) {
  const Planes planes(walk, row);
  plane(walk, row, begin, end, [&](std::int64_t in) {
    float sum = 0;
    for (std::int64_t p = 0; p < planes.count; ++p) {
      const float* const own = weights.all + (planes.weights + p) * weights.row_step;
      const float factor = weights.factor == nullptr ? 1.0f : weights.factor[planes.weights + p];
      for (int k = 0; k < walk.taps; ++k)
        sum += own[walk.used[k]] * factor *
               walk.input[in + (planes.first + p) * walk.input_plane + walk.tap[walk.used[k]]];
    }
    return sum;
  });
}

void depthwise_products(const Walk& walk, const float* dy, std::int64_t row, std::int64_t begin,
                        std::int64_t end, double* sums) {
  const std::int64_t plane = Planes(walk, row).first * walk.input_plane;
  for_pixels(walk, begin, end,
             [&](std::int64_t in, std::int64_t out, std::int64_t, std::int64_t, std::int64_t) {
    const double gradient = static_cast<double>(dy[row * walk.output_plane + out]);
    for (int i = 0; i < walk.taps; ++i)
      sums[i] += gradient * static_cast<double>(walk.input[in + plane + walk.tap[walk.used[i]]]);
    sums[walk.taps] += gradient;
  });
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE

#endif
