// The kernels in half precision written as plainly as can be: the scalar variant, against which the others are tested.
#include "kernels/activate.h"
#include "kernels/half.h"
#include "kernels/table.h"

#if EDGE_BCS_SCALAR

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
// A room of its own, where the names of other kernels (table.h) are hidden.
namespace half_precision {

// Where image b of a pixel lies from an even one, in numbers.
std::int64_t place(std::int64_t pixel, std::int64_t b, std::int64_t lanes) {
  return (pixel & ~std::int64_t{1}) * lanes + half_image_step * b + (pixel & 1) * half_second_pixel(lanes);
}

float read(const float* stack, std::int64_t at) {
  return from_half(reinterpret_cast<const std::uint16_t*>(stack)[at]);
}
void write(float* stack, std::int64_t at, float value) {
  reinterpret_cast<std::uint16_t*>(stack)[at] = to_half(value);
}

// The number of a stack that a weight at (channel, tap) meets for pixel (y, x) of the output in image b.
float met(const Walk& walk, std::int64_t block, std::int64_t channel, std::int64_t tap, std::int64_t y,
          std::int64_t x, std::int64_t b) {
  const std::int64_t row = block * walk.input_block + channel * walk.input_plane + y * walk.input_row;
  const std::int64_t pixel = x * (walk.input_pixel / walk.lanes) + (row + tap) / walk.lanes;
  return read(walk.input, place(pixel, b, walk.lanes));
}

float scaled(const Walk& walk, std::int64_t row, float sum) {
  if (!half_is_fp16) return sum * walk.scale[row] + walk.shift[row];
  return from_half(to_half(sum + from_half(to_half(walk.shift[row]))));
}

// One output plane from its sums: sum(block, y, x, b).
template <class Sum>
void plane(const Walk& walk, std::int64_t row, const Sum& sum) {
  const std::int64_t lanes = walk.lanes, step = walk.output_pixel / lanes;
  for (std::int64_t block = 0; block < walk.blocks; ++block)
    for (std::int64_t y = 0; y < walk.height; ++y) {
      const std::int64_t out = block * walk.output_block + row * walk.output_plane + y * walk.output_row;
      const std::int64_t kept = block * walk.mask_block + row * walk.mask_plane + y * walk.mask_row;
      const std::int64_t byte = block * walk.bits_block + row * walk.bits_plane + y * walk.bits_row;
      for (std::int64_t x = 0; x < walk.width; ++x)
        for (std::int64_t b = 0; b < lanes; ++b) {
          const std::int64_t pixel = walk.first_pixel + x * step;
          const std::int64_t at = place(out / lanes + pixel, b, lanes);
          const std::int64_t kept_at = place(kept / lanes + pixel, b, lanes);
          const std::int64_t bit = walk.bits_first + x * walk.bits_pixel + b;
          float value = sum(block, y, x, b);
          if (walk.scale != nullptr) value = scaled(walk, row, value);
          if (walk.addend != nullptr) value += read(walk.addend, at);
          if (half_is_fp16) value = from_half(to_half(value));
          if (walk.pre != nullptr) write(walk.pre, kept_at, value);
          if (walk.bits != nullptr) {
            const unsigned open = openness<1>(walk.activation.function, Vector<1>{value})[0] > 0;
            std::uint8_t& bits = walk.bits[byte + bit / 8];
            bits = static_cast<std::uint8_t>((bits & ~(1u << (bit % 8))) | open << (bit % 8));
          }
          Vector<1> result{value};
          activate<1>(walk.activation, &result, 1);
          if (walk.mask != nullptr) {
            const Vector<1> passed{read(walk.mask, kept_at)};
            pass_back<1>(walk.through, &passed, &result, 1);
          }
          if (walk.mask_bits != nullptr)
            result = pass_slopes<1>(slopes_of(walk.through), walk.mask_bits[byte + bit / 8] >> (bit % 8) & 1u,
                                    result);
          write(walk.output, at, result[0]);
        }
      const std::int64_t count = walk.tail + (y == walk.height - 1 ? walk.bottom : 0);
      for (std::int64_t i = 0; i < count / lanes; ++i)
        for (std::int64_t b = 0; b < lanes; ++b)
          write(walk.output, place((out + walk.tail_at) / lanes + i, b, lanes), 0);
    }
}

// A weight of row `row`, rounded.
std::uint16_t weight_of(const Walk& walk, std::int64_t row, float weight) {
  return to_half(half_is_fp16 && walk.scale != nullptr ? weight * walk.scale[row] : weight);
}

// A sum as half.h says it is made: products are added one after the other, and `next_run` is called where a run ends.
class Sum {
 public:
  void add(std::uint16_t weight, float number) {
    const float factor = from_half(weight);
    run_ = half_is_fp16 ? multiply_add(factor, number, run_) : run_ + factor * number;
  }
  void next_run() {
    if (!half_is_fp16) return;
    runs_ += run_;
    run_ = 0;
    several_ = true;
  }
  float total() const { return several_ ? from_half(to_half(runs_ + run_)) : run_; }

 private:
  // a · b + c in FP16, rounded once. The product is exact in a double. Where the sum is not, its last bit says so, and it is
  // rounded as the true one would be.
  static float multiply_add(float a, float b, float c) {
    const double product = static_cast<double>(a) * static_cast<double>(b), addend = static_cast<double>(c);
    double sum = product + addend;
    const double other = sum - product, error = (product - (sum - other)) + (addend - other);
    std::int64_t bits;
    std::memcpy(&bits, &sum, sizeof bits);
    if (error != 0 && (bits & 1) == 0) {
      bits += (error > 0) == (sum > 0) ? 1 : -1;
      std::memcpy(&sum, &bits, sizeof sum);
    }
    return half_of(sum);
  }
  static float half_of(double value) { return from_half(to_half(value)); }

  float run_ = 0, runs_ = 0;
  bool several_ = false;
};

std::int64_t sparse_tasks(const Walk& walk, const SparseRows&) { return walk.rows; }

void sparse(const Walk& walk, const SparseRows& rows, std::int64_t row) {
  plane(walk, row, [&](std::int64_t block, std::int64_t y, std::int64_t x, std::int64_t b) {
    Sum sum;
    for (std::int64_t j = rows.begin(row); j < rows.end(row); ++j) {
      if (j > rows.begin(row) && (j - rows.begin(row)) % run_of_entries == 0) sum.next_run();
      sum.add(weight_of(walk, row, rows.weight(j)),
              met(walk, block, rows.entry[j] >> 8, walk.tap[rows.entry[j] & 255], y, x, b));
    }
    return sum.total();
  });
}

// [row][channel][tap], a word each half of which would be a weight; here one is.
std::int64_t pack_tasks(const Walk&) { return 1; }

void pack(const Walk& walk, const Weights& weights, float* packed, std::int64_t) {
  auto* const words = reinterpret_cast<std::uint16_t*>(packed);
  const std::int64_t channels = (walk.channels + 1) / 2 * 2;
  std::memset(words, 0, static_cast<std::size_t>(walk.rows * channels * walk.taps) * sizeof *words);
  for_weights(walk, weights, 0, static_cast<int>(walk.rows),
              [&](int o, std::int64_t channel, std::int64_t tap, float weight, std::int64_t) {
    words[(o * channels + channel) * walk.taps + tap] = weight_of(walk, o, weight);
  });
}

std::int64_t dense_tasks(const Walk& walk) { return walk.rows; }

void dense(const Walk& walk, const float* packed, std::int64_t row) {
  const auto* const words = reinterpret_cast<const std::uint16_t*>(packed);
  const std::int64_t channels = (walk.channels + 1) / 2 * 2;
  plane(walk, row, [&](std::int64_t block, std::int64_t y, std::int64_t x, std::int64_t b) {
    Sum sum;
    for (std::int64_t channel = 0; channel < walk.channels; ++channel) {
      if (channel > 0 && channel % channels_of_run(walk.taps) == 0) sum.next_run();
      for (int tap = 0; tap < walk.taps; ++tap)
        sum.add(words[(row * channels + channel) * walk.taps + tap],
                met(walk, block, channel, walk.tap[walk.used[tap]], y, x, b));
    }
    return sum.total();
  });
}

void widen(const std::uint16_t* row, std::int64_t lanes, std::int64_t first, std::int64_t count, float* to) {
  for (std::int64_t x = 0; x < count; ++x)
    for (std::int64_t b = 0; b < lanes; ++b) to[x * lanes + b] = from_half(row[place(first + x, b, lanes)]);
}

void narrow(const float* from, std::int64_t lanes, std::int64_t count, std::uint16_t* row) {
  for (std::int64_t x = 0; x < count; ++x)
    for (std::int64_t b = 0; b < lanes; ++b) row[place(x, b, lanes)] = to_half(from[x * lanes + b]);
  if (count % 2 != 0)
    for (std::int64_t b = 0; b < lanes; ++b) row[place(count, b, lanes)] = 0;
}

}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

namespace variant = EDGE_BCS_KERNEL_NAMESPACE::half_precision;

const HalfKernels half_kernels_scalar = {
    {variant::sparse_tasks, variant::sparse, variant::pack_tasks, variant::pack, variant::dense_tasks,
     variant::dense},
    nullptr,
    variant::widen,
    variant::narrow,
};

}  // namespace edge_bcs

#endif
