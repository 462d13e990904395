// The kernels of single rows and the normal draws, against loops written down here as plainly as can be.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/normal.h"
#include "kernels/rows.h"
#include "layer.h"
#include "ops/philox.h"

namespace row_checks {

using edge_bcs::NormalKernels;
using edge_bcs::NormKernels;
using edge_bcs::PoolRow;
using edge_bcs::Row;
using edge_bcs::RowKernels;
using layers::Floats;
using layers::Random;
using Bytes = std::vector<std::uint8_t>;

// Floats after the last that a kernel may write: they must stay as they were.
constexpr std::size_t guard = 40;
constexpr float untouched = 123.0f;

inline Floats random_floats(Random& random, std::int64_t count) {
  Floats floats(static_cast<std::size_t>(count));
  for (float& f : floats) {
    f = random.chance(0.1) ? 0.0f : random.number();
    if (random.chance(0.01)) f = std::numeric_limits<float>::quiet_NaN();
  }
  return floats;
}

inline Bytes random_bytes(Random& random, std::int64_t count) {
  Bytes bytes(static_cast<std::size_t>(count));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.in(0, 255));
  return bytes;
}

class Tally {
 public:
  explicit Tally(const char* kernel) : kernel_(kernel) {}

  void number(float actual, float expected, float allowed, std::size_t at) {
    ++numbers_;
    const bool right = std::isnan(expected) ? std::isnan(actual) : std::fabs(actual - expected) <= allowed;
    if (!right && ++wrong_ <= 5)
      std::printf("%s: float %zu is %.9g, not %.9g\n", kernel_, at, static_cast<double>(actual),
                  static_cast<double>(expected));
  }
  void byte(unsigned actual, unsigned expected, std::size_t at) {
    ++numbers_;
    if (actual != expected && ++wrong_ <= 5)
      std::printf("%s: byte %zu is %u, not %u\n", kernel_, at, actual, expected);
  }
  long print(const char* isa, int rows) const {
    std::printf("%s %s: %d rows, %ld numbers, %ld wrong\n", isa, kernel_, rows, numbers_, wrong_);
    return numbers_ == 0 ? 1 : wrong_;
  }

 private:
  const char* kernel_;
  long numbers_ = 0, wrong_ = 0;
};

// An activation and its derivative in double, by what the standard library has.
inline double activated(const edge_bcs::Activation& activation, double x) {
  using edge_bcs::Function;
  const double inner = 1.5957691216057308 * (x + 0.044715 * x * x * x);
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  if (std::isnan(x)) return x;
  switch (activation.function) {
    case Function::relu:
      return std::max(x, 0.0);
    case Function::relu6:
      return std::min(std::max(x, 0.0), 6.0);
    case Function::leaky_relu:
      return x > 0 ? x : x * static_cast<double>(activation.slope);
    case Function::hardsigmoid:
      return std::min(std::max((x + 3) / 6, 0.0), 1.0);
    case Function::sigmoid:
      return sigmoid(x);
    case Function::tanh:
      return std::tanh(x);
    case Function::hardswish:
      return x * std::min(std::max((x + 3) / 6, 0.0), 1.0);
    case Function::silu:
      return x * sigmoid(x);
    case Function::gelu:
      return x * std::erfc(-x / std::sqrt(2.0)) / 2;
    case Function::gelu_tanh:
      return x * sigmoid(inner);
    default:
      return x;
  }
}

// From what the derivative is made from: the result, or what the function was applied to.
inline double derivative(const edge_bcs::Activation& activation, double kept) {
  using edge_bcs::Function;
  const double form = 1.5957691216057308 * (kept + 0.044715 * kept * kept * kept);
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  const auto of_product = [&](double s, double slope) { return s * (1 + kept * slope * (1 - s)); };
  if (std::isnan(kept))
    return activation.function == Function::leaky_relu ? static_cast<double>(activation.slope)
           : edge_bcs::has_slopes(activation.function) ? 0
                                                       : kept;
  switch (activation.function) {
    case Function::relu:
      return kept > 0;
    case Function::relu6:
      return kept > 0 && kept < 6;
    case Function::leaky_relu:
      return kept > 0 ? 1 : static_cast<double>(activation.slope);
    case Function::hardsigmoid:
      return kept > 0 && kept < 1 ? 1.0 / 6 : 0;
    case Function::sigmoid:
      return kept * (1 - kept);
    case Function::tanh:
      return 1 - kept * kept;
    case Function::hardswish:
      return kept <= -3 ? 0 : kept >= 3 ? 1 : kept / 3 + 0.5;
    case Function::silu:
      return of_product(sigmoid(kept), 1);
    case Function::gelu:
      return std::erfc(-kept / std::sqrt(2.0)) / 2 + kept * std::exp(-kept * kept / 2) * 0.3989422804014327;
    case Function::gelu_tanh:
      return of_product(sigmoid(form), 1.5957691216057308 * (1 + 3 * 0.044715 * kept * kept));
    default:
      return 1;
  }
}

// Whether the bit of x is set.
inline bool open(edge_bcs::Function function, float x) {
  if (function == edge_bcs::Function::relu6) return x > 0 && x < 6;
  if (function == edge_bcs::Function::hardsigmoid) return x > -3 && x < 3;
  return x > 0;
}

// out = act'(mask) · act(scale · a + shift + addend), and what is kept of that.
inline void combine(const RowKernels& kernels, Random& random, Tally& tally) {
  const std::int64_t count = random.in(1, 90), bytes = (count + 7) / 8;
  const Floats a = random_floats(random, count), addend = random_floats(random, count),
               mask = random_floats(random, count);
  const Bytes mask_bits = random_bytes(random, bytes);
  Row row;
  row.count = count;
  // Far enough that the functions bend.
  row.scale = 3 * random.number();
  row.shift = random.number();
  if (random.chance(0.5)) row.addend = addend.data();
  row.activation = layers::random_activation(random, 0.3);
  row.through = layers::random_activation(random, 0);
  if (random.chance(0.3)) row.mask = mask.data();
  if (edge_bcs::has_slopes(row.through.function) && random.chance(0.3)) row.mask_bits = mask_bits.data();
  Floats pre(static_cast<std::size_t>(count) + guard, untouched);
  if (random.chance(0.3)) row.pre = pre.data();
  Floats out(static_cast<std::size_t>(count) + guard, untouched);
  const bool in_place = random.chance(0.3);
  if (in_place) std::copy(a.begin(), a.end(), out.begin());
  row.a = in_place ? out.data() : a.data();
  row.out = out.data();
  Bytes bits(static_cast<std::size_t>(bytes) + guard, 0xA5);
  if (random.chance(0.7)) row.bits = bits.data();
  kernels.combine(row);
  const edge_bcs::Slopes slopes = edge_bcs::slopes_of(row.through);
  Floats before(a.size());  // what the activation is applied to
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (i >= a.size()) {
      tally.number(out[i], untouched, 0, i);
      tally.number(pre[i], untouched, 0, i);
      continue;
    }
    const float other = row.addend == nullptr ? 0 : addend[i];
    const auto exact = [](float x) { return static_cast<double>(x); };
    const double sum = exact(a[i]) * exact(row.scale) + exact(row.shift) + exact(other);
    // Three roundings of the kernel, one fewer where the multiplication is fused with the addition; one of ours.
    const float allowed =
        4 * 0x1p-24f * (std::fabs(a[i] * row.scale) + std::fabs(row.shift) + std::fabs(other));
    before[i] = row.pre == nullptr ? static_cast<float>(sum) : pre[i];
    if (row.pre != nullptr) tally.number(pre[i], static_cast<float>(sum), allowed, i);
    const double result = activated(row.activation, sum);
    double factor = row.mask == nullptr ? 1 : derivative(row.through, exact(mask[i]));
    if (row.mask_bits != nullptr)
      factor *= exact((mask_bits[i / 8] >> (i % 8) & 1) != 0 ? slopes.open : slopes.closed);
    if (factor == 0) {  // nothing passes, whatever it is, but where a function without slopes is multiplied
      tally.number(out[i], std::isnan(result) && !row.simple() && std::isnan(out[i]) ? out[i] : 0, 0, i);
      continue;
    }
    // Slopes are at most 1.5, derivatives at most 1.2 or 1.5; a derivative is a sum of such terms.
    const double own = row.simple() ? 0 : 2e-6 * std::fabs(result) * (row.mask == nullptr ? 1 : 2);
    tally.number(out[i], static_cast<float>(result * factor),
                 static_cast<float>(1.5 * std::fabs(factor) * exact(allowed) + own), i);
  }
  if (row.bits == nullptr) return;
  for (std::size_t byte = 0; byte < bits.size(); ++byte) {
    unsigned expected = byte < static_cast<std::size_t>(bytes) ? 0 : 0xA5, unsure = 0;
    for (std::size_t i = 8 * byte; i < std::min(8 * byte + 8, a.size()); ++i) {
      expected |= static_cast<unsigned>(open(row.activation.function, before[i])) << (i - 8 * byte);
      // Without `pre` a sum is known to rounding only.
      const float near = 1e-5f;
      if (row.pre == nullptr &&
          open(row.activation.function, before[i] - near) != open(row.activation.function, before[i] + near))
        unsure |= 1u << (i - 8 * byte);
    }
    tally.byte(bits[byte] & ~unsure, expected & ~unsure, byte);
  }
}

// Σ a · b and Σ a, in double.
inline void sums(const RowKernels& kernels, Random& random, Tally& tally) {
  const std::int64_t count = random.in(0, 150);
  Floats a(static_cast<std::size_t>(count)), b(a.size());
  for (Floats* floats : {&a, &b})
    for (float& f : *floats) f = random.number();
  const edge_bcs::RowSums made = kernels.sums(a.data(), b.data(), count);
  long double products = 0, values = 0, largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    products += static_cast<long double>(a[i]) * b[i];
    values += a[i];
    largest += std::fabs(static_cast<long double>(a[i]) * b[i]) + std::fabs(static_cast<long double>(a[i]));
  }
  // What is left over is an error of double precision, far below one of float's.
  const auto allowed = static_cast<float>(1e-14L * largest);
  tally.number(static_cast<float>(made.products - static_cast<double>(products)), 0, allowed, 0);
  tally.number(static_cast<float>(made.values - static_cast<double>(values)), 0, allowed, 1);
}

// For each lane Σ (a − α) and Σ (a − α) · (b − β), added to what there was, in double.
inline void lane_sums(const NormKernels& kernels, Random& random, Tally& tally) {
  constexpr std::int64_t some[]{1, 3, 4, 8, 12, 16, 32, 64};
  const std::int64_t lanes = some[random.in(0, 7)], width = random.in(1, 6), rows = random.in(1, 5);
  const std::int64_t a_step = (width + random.in(0, 2)) * lanes, b_step = (width + random.in(0, 2)) * lanes;
  Floats a(static_cast<std::size_t>(rows * a_step)), b(static_cast<std::size_t>(rows * b_step));
  for (Floats* floats : {&a, &b})
    for (float& f : *floats) f = random.number();
  const double alpha = random.number(), beta = random.number();
  std::vector<double> sums(lanes + 1, 2.0), products(lanes + 1, 3.0);
  kernels.lane_sums({.lanes = lanes,
                     .count = width * lanes,
                     .rows = rows,
                     .a = a.data(),
                     .a_step = a_step,
                     .a_origin = alpha,
                     .b = b.data(),
                     .b_step = b_step,
                     .b_origin = beta},
                    sums.data(), products.data());
  for (std::int64_t lane = 0; lane < lanes; ++lane) {
    long double sum = 2, product = 3, largest = 5;
    for (std::int64_t y = 0; y < rows; ++y)
      for (std::int64_t x = 0; x < width; ++x) {
        const long double u =
            a[static_cast<std::size_t>(y * a_step + x * lanes + lane)] - static_cast<long double>(alpha);
        const long double v =
            b[static_cast<std::size_t>(y * b_step + x * lanes + lane)] - static_cast<long double>(beta);
        sum += u;
        product += u * v;
        largest += std::fabs(u) + std::fabs(u * v);
      }
    const auto allowed = static_cast<float>(1e-14L * largest);
    tally.number(static_cast<float>(sums[lane] - static_cast<double>(sum)), 0, allowed, lane);
    tally.number(static_cast<float>(products[lane] - static_cast<double>(product)), 0, allowed, lane);
  }
  tally.number(static_cast<float>(sums[lanes]), 2, 0, lanes);
  tally.number(static_cast<float>(products[lanes]), 3, 0, lanes);
}

// scale · ((d − mean_d) − slope · (x − mean)), which may lie where d does.
inline void norm_gradient(const NormKernels& kernels, Random& random, Tally& tally) {
  constexpr std::int64_t some[]{1, 3, 4, 8, 12, 16, 32, 64};
  const std::int64_t lanes = some[random.in(0, 7)], count = random.in(1, 6) * lanes;
  Floats scale(static_cast<std::size_t>(lanes)), d(static_cast<std::size_t>(count)), x(d.size());
  for (Floats* floats : {&scale, &d, &x})
    for (float& f : *floats) f = random.number();
  const float mean_d = random.number(), mean = random.number(), slope = random.number();
  Floats out = d;
  out.resize(out.size() + guard, untouched);
  const bool in_place = random.in(0, 1) == 1;
  kernels.gradient({.lanes = lanes,
                    .count = count,
                    .scale = scale.data(),
                    .d = in_place ? out.data() : d.data(),
                    .mean_d = mean_d,
                    .x = x.data(),
                    .mean = mean,
                    .slope = slope,
                    .out = out.data()});
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (i >= d.size()) {
      tally.number(out[i], untouched, 0, i);
      continue;
    }
    const double of_lane = scale[i % static_cast<std::size_t>(lanes)],
                 centred = static_cast<double>(x[i]) - mean;
    const double expected = of_lane * (static_cast<double>(d[i]) - mean_d - slope * centred);
    const double largest = std::fabs(of_lane) * (std::fabs(d[i]) + std::fabs(mean_d) +
                                                 std::fabs(slope) * (std::fabs(x[i]) + std::fabs(mean)));
    tally.number(out[i], static_cast<float>(expected), static_cast<float>(1e-6 * largest), i);
  }
}

inline PoolRow random_pool(Random& random) {
  PoolRow pool;
  pool.lanes = random.one_of({1, 2, 3, 4, 5, 8, 12, 16, 24, 32});
  pool.kernel = random.in(1, 4);
  pool.stride = random.in(1, 4);
  pool.padding = random.in(0, pool.kernel / 2);
  pool.width = random.in(pool.kernel, 12);
  if (random.chance(0.5)) {  // windows of two by two pixels, for which there are kernels of their own
    pool.kernel = pool.stride = 2;
    pool.padding = 0;
    pool.width = random.in(2, 33);
  }
  pool.out_width = (pool.width + 2 * pool.padding - pool.kernel) / pool.stride + 1;
  pool.top = random.in(0, pool.kernel - 1);
  pool.bottom = random.in(pool.top + 1, pool.kernel);
  pool.row = (pool.width + random.in(0, 2)) * pool.lanes;
  return pool;
}

// Calls body(offset of the pixel, its number in the window) for the pixels of window x that count.
template <class Body>
void for_window(const PoolRow& pool, std::int64_t x, std::int64_t lane, const Body& body) {
  for (std::int64_t ky = pool.top; ky < pool.bottom; ++ky)
    for (std::int64_t kx = 0; kx < pool.kernel; ++kx) {
      const std::int64_t column = x * pool.stride - pool.padding + kx;
      if (column < 0 || column >= pool.width) continue;
      body(static_cast<std::size_t>(ky * pool.row + column * pool.lanes + lane), ky * pool.kernel + kx);
    }
}

inline void max_pool(const RowKernels& kernels, Random& random, Tally& tally) {
  const PoolRow pool = random_pool(random);
  Floats input = random_floats(random, pool.kernel * pool.row);
  for (float& f : input) f *= random.one_of({1.0f, 4.0f});
  using edge_bcs::Function;
  const Function function = random.one_of({Function::none, Function::relu, Function::relu6});
  const bool chooses = random.chance(0.7);
  const auto count = static_cast<std::size_t>(pool.out_width * pool.lanes);
  Floats y(count + guard, untouched);
  Bytes choice(count + guard, 0xA5);
  kernels.max_pool(pool, input.data(), function, y.data(), chooses ? choice.data() : nullptr);
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (i >= count) {
      tally.number(y[i], untouched, 0, i);
      tally.byte(choice[i], 0xA5, i);
      continue;
    }
    const auto at = static_cast<std::int64_t>(i);
    float best = -std::numeric_limits<float>::infinity();
    std::int64_t where = 0;
    bool nan = false, chosen_nan = false;
    for_window(pool, at / pool.lanes, at % pool.lanes, [&](std::size_t pixel, std::int64_t position) {
      nan |= std::isnan(input[pixel]);
      chosen_nan |= std::isnan(input[pixel]) && choice[i] == position;
      if (input[pixel] > best) best = input[pixel], where = position;
    });
    if (nan) {  // is seen, and any of those that there are may be chosen
      tally.number(y[i], std::numeric_limits<float>::quiet_NaN(), 0, i);
      if (chooses) tally.byte(chosen_nan, 1, i);
      continue;
    }
    if (function != Function::none && best <= 0) best = 0, where = edge_bcs::no_choice;
    if (function == Function::relu6 && best >= 6) best = 6, where = edge_bcs::no_choice;
    tally.number(y[i], best, 0, i);
    tally.byte(choice[i], chooses ? static_cast<unsigned>(where) : 0xA5, i);
  }
}

inline void max_pool_gradient(const RowKernels& kernels, Random& random, Tally& tally) {
  PoolRow pool = random_pool(random);
  const bool add = pool.kernel != pool.stride || random.chance(0.5);
  const Floats dy = random_floats(random, pool.out_width * pool.lanes);
  Floats dx = random_floats(random, pool.kernel * pool.row + static_cast<std::int64_t>(guard)), expected = dx;
  Bytes choice(dy.size());
  for (std::size_t i = 0; i < dy.size(); ++i) {
    choice[i] = static_cast<std::uint8_t>(random.chance(0.1) ? edge_bcs::no_choice
                                                             : random.in(0, pool.kernel * pool.kernel - 1));
    const auto at = static_cast<std::int64_t>(i);
    for_window(pool, at / pool.lanes, at % pool.lanes, [&](std::size_t pixel, std::int64_t position) {
      const float passed = choice[i] == position ? dy[i] : 0;
      expected[pixel] = add ? expected[pixel] + passed : passed;
    });
  }
  kernels.max_pool_gradient(pool, dy.data(), choice.data(), add, dx.data());
  for (std::size_t i = 0; i < dx.size(); ++i) tally.number(dx[i], expected[i], 0, i);
}

// To the bit: what philox.h gives one at a time.
inline void normals(const NormalKernels& kernels, Random& random, Tally& tally) {
  const auto word = [&] { return static_cast<std::uint64_t>(random.in(0, 0x7FFFFFFF)) << random.in(0, 24); };
  const edge_bcs::Philox philox(word() << 8, word(), edge_bcs::Purpose::noise);
  const std::uint64_t first = word();
  const int blocks = static_cast<int>(random.in(1, 40));
  Floats numbers(static_cast<std::size_t>(4 * blocks) + guard, untouched);
  kernels.normals(philox.stream(), first, blocks, numbers.data());
  for (std::size_t i = 0; i < numbers.size(); ++i)
    tally.number(numbers[i],
                 i < numbers.size() - guard ? edge_bcs::normal_from_word(philox.block(first + i / 4)[i % 4])
                                            : untouched,
                 0, i);
}

// Checks this machine's variant and the scalar one on random rows; returns how many numbers were wrong.
inline long check(const layers::Kernels& kernels, int rows, unsigned seed) {
  Random random(seed);
  Tally tallies[]{Tally("combine"), Tally("sums"),      Tally("max_pool"),     Tally("max_pool_gradient"),
                  Tally("normals"), Tally("lane_sums"), Tally("norm gradient")};
  for (int i = 0; i < rows; ++i)
    for (const bool scalar : {false, true}) {
      const RowKernels& row = scalar ? *kernels.scalar_rows : *kernels.fast_rows;
      combine(row, random, tallies[0]);
      sums(row, random, tallies[1]);
      max_pool(row, random, tallies[2]);
      max_pool_gradient(row, random, tallies[3]);
      normals(scalar ? *kernels.scalar_normals : *kernels.fast_normals, random, tallies[4]);
      const NormKernels& norms = scalar ? *kernels.scalar_norms : *kernels.fast_norms;
      lane_sums(norms, random, tallies[5]);
      norm_gradient(norms, random, tallies[6]);
    }
  long wrong = 0;
  for (const Tally& tally : tallies) wrong += tally.print(kernels.isa, rows);
  return wrong;
}

}  // namespace row_checks
