// A layer made up for a test, and the library's convolution kernels on it.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/normal.h"
#include "kernels/norms.h"
#include "kernels/rows.h"
#include "kernels/walk.h"

namespace layers {

using namespace edge_bcs;
using Floats = std::vector<float>;

// Numbers whose distribution is the same with every standard library.
class Random {
 public:
  explicit Random(unsigned seed) : generator_(seed) {}
  std::int64_t in(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(generator_() % static_cast<std::uint32_t>(high - low + 1));
  }
  bool chance(double probability) { return real() < probability; }
  double real() { return static_cast<double>(generator_() >> 8) * 0x1p-24; }
  // In (−2, 2), most of them not small.
  float number() { return static_cast<float>(4 * real() - 2); }
  template <class T, std::size_t n>
  T one_of(const T (&choices)[n]) {
    return choices[in(0, n - 1)];
  }

 private:
  std::mt19937 generator_;
};

// Any activation, with `chance` more often none.
inline Activation random_activation(Random& random, double chance) {
  if (random.chance(chance)) return {};
  constexpr auto first = static_cast<std::int64_t>(Function::relu),
                 last = static_cast<std::int64_t>(Function::gelu_tanh);
  Activation activation{random.chance(0.3) ? Function::relu : static_cast<Function>(random.in(first, last)),
                        0};
  if (activation.function == Function::leaky_relu)
    activation.slope = static_cast<float>(random.in(-2, 4)) / 8;
  return activation;
}

inline void make_absolute(Floats& floats) {
  for (float& f : floats) f = std::fabs(f);
}

// A stack of images (stack.h): floats from one block, plane, row to the next, and of the first pixel.
struct Geometry {
  std::int64_t channels, height, width, halo, lanes;
  std::int64_t row() const { return (width + halo) * lanes; }
  std::int64_t plane() const { return (height + halo) * row(); }
  std::int64_t origin() const { return halo * row() + halo * lanes; }
  std::int64_t block() const { return origin() + channels * plane(); }
};

// A walk with all that it points to.
struct Layer {
  Geometry in{}, out{};
  // Pixels from one output pixel of the walk to the next, on either side.
  std::int64_t step_in = 1, step_out = 1;
  std::int64_t phase_y = 0, phase_x = 0;  // where the walk begins in the output; below step_out
  Walk walk;                              // without its pointers
  bool scaled = false, added = false, writes_bits = false, writes_pre = false, factors = false,
       positions = false;
  edge_bcs::Activation activation{}, through{edge_bcs::Function::relu};
  int mask = 0;  // 0 none, 1 floats, 2 bits
  std::vector<std::int32_t> pointer{0}, entry, position;
  Floats input, value, scale, shift, addend, mask_floats, factor, dy, before;
  Floats planes;  // weights of a depthwise walk: max_taps for each plane of the side that has more
  std::vector<std::uint8_t> mask_bits;

  std::string text() const {
    return std::to_string(walk.taps) + " taps, steps " + std::to_string(step_in) + " and " +
           std::to_string(step_out) + ", " + std::to_string(walk.blocks) + " blocks of " +
           std::to_string(walk.lanes) + " lanes, " + std::to_string(walk.channels) + " to " +
           std::to_string(walk.rows) + " planes, " + std::to_string(walk.height) + " by " +
           std::to_string(walk.width) + " pixels, " + std::to_string(entry.size()) + " weights, mask " +
           std::to_string(mask) + ", functions " + std::to_string(static_cast<int>(activation.function)) +
           " and " + std::to_string(static_cast<int>(through.function));
  }

  std::int64_t bit_row() const { return (out.width * out.lanes + 7) / 8; }
  std::int64_t first_out() const { return out.origin() + phase_y * out.row() + phase_x * out.lanes; }

  // The same layer with the absolute value of every number.
  Layer magnitudes() const {
    Layer layer = *this;
    for (Floats* floats : {&layer.input, &layer.value, &layer.scale, &layer.shift, &layer.addend,
                           &layer.factor, &layer.dy, &layer.planes})
      make_absolute(*floats);
    std::fill(layer.before.begin(), layer.before.end(), 0.0f);
    layer.activation = {};
    return layer;
  }
};

// Where everything lies, from the walk's lanes, blocks, channels, rows, height and width, the steps and the phase; `extra`
// pixels of the output's right and lower side belong to other phases.
inline void lay_out(Layer& layer, std::int64_t kernel_height, std::int64_t kernel_width, std::int64_t padding,
                    std::int64_t in_extra_halo, std::int64_t out_halo, std::int64_t extra_y,
                    std::int64_t extra_x) {
  Walk& walk = layer.walk;
  layer.out = {walk.rows, (walk.height - 1) * layer.step_out + layer.phase_y + 1 + extra_y,
               (walk.width - 1) * layer.step_out + layer.phase_x + 1 + extra_x, out_halo, walk.lanes};
  const auto size = [&](std::int64_t out, std::int64_t kernel) {
    return std::max<std::int64_t>(1, (out - 1) * layer.step_in + kernel - 2 * padding);
  };
  const auto beyond = [&](std::int64_t out, std::int64_t kernel) {
    return (out - 1) * layer.step_in + kernel - 1 - padding - (size(out, kernel) - 1);
  };
  layer.in = {walk.channels, size(walk.height, kernel_height), size(walk.width, kernel_width), in_extra_halo,
              walk.lanes};
  layer.in.halo += std::max({padding, beyond(walk.height, kernel_height), beyond(walk.width, kernel_width)});
  for (std::int64_t k = 0; k < kernel_height * kernel_width; ++k)
    walk.tap[k] = static_cast<std::int32_t>((k / kernel_width - padding) * layer.in.row() +
                                            (k % kernel_width - padding) * walk.lanes);
  walk.input_block = layer.in.block();
  walk.input_plane = layer.in.plane();
  walk.input_row = layer.step_in * layer.in.row();
  walk.input_pixel = layer.step_in * walk.lanes;
  walk.output_block = layer.out.block();
  walk.output_plane = layer.out.plane();
  walk.output_row = layer.step_out * layer.out.row();
  walk.output_pixel = layer.step_out * walk.lanes;
  if (layer.phase_x == 0) {
    walk.tail_at = layer.out.width * walk.lanes;
    walk.tail = layer.out.halo * walk.lanes;
    if ((layer.out.height - 1) % layer.step_out == layer.phase_y)
      walk.bottom = layer.out.halo * layer.out.row();
  }
  // Bits that are written have the layout of the walk; bits that are read that of the whole output.
  walk.bits_row = layer.bit_row() * layer.step_out;
  walk.bits_plane = layer.out.height * layer.bit_row();
  walk.bits_block = walk.rows * walk.bits_plane;
  walk.bits_first = layer.phase_x * walk.lanes;
  walk.bits_pixel = layer.step_out * walk.lanes;
}

// Numbers everywhere. Each row of the matrix gets the next of `densities()`; the last block of images has `filled` lanes
// that are not zero.
template <class Densities>
void fill(Layer& layer, Random& random, std::int64_t filled, const Densities& densities) {
  Walk& walk = layer.walk;
  for (std::int64_t row = 0; row < walk.rows; ++row) {
    const double density = densities();
    for (std::int64_t channel = 0; channel < walk.channels; ++channel)
      for (int tap = 0; tap < walk.taps; ++tap)
        if (random.chance(density)) {
          layer.entry.push_back(static_cast<std::int32_t>(channel << 8 | walk.used[tap]));
          layer.value.push_back(random.number());
        }
    layer.pointer.push_back(static_cast<std::int32_t>(layer.entry.size()));
  }
  layer.position.resize(layer.entry.size());
  for (std::size_t j = 0; j < layer.position.size(); ++j) layer.position[j] = static_cast<std::int32_t>(j);
  for (std::size_t j = layer.position.size(); j > 1; --j)
    std::swap(layer.position[j - 1],
              layer.position[static_cast<std::size_t>(random.in(0, static_cast<std::int64_t>(j) - 1))]);

  layer.input.assign(static_cast<std::size_t>(walk.blocks * layer.in.block()), 0.0f);
  for (std::int64_t block = 0; block < walk.blocks; ++block)
    for (std::int64_t channel = 0; channel < walk.channels; ++channel)
      for (std::int64_t y = 0; y < layer.in.height; ++y)
        for (std::int64_t x = 0; x < layer.in.width; ++x)
          for (std::int64_t lane = 0; lane < (block + 1 == walk.blocks ? filled : walk.lanes); ++lane)
            layer.input[static_cast<std::size_t>(block * layer.in.block() + layer.in.origin() +
                                                 channel * layer.in.plane() + y * layer.in.row() +
                                                 x * walk.lanes + lane)] = random.number();
  const auto sized = [&](Floats& floats, std::int64_t size) {
    floats.resize(static_cast<std::size_t>(size));
    for (float& f : floats) f = random.number();
  };
  for (Floats* floats : {&layer.addend, &layer.mask_floats, &layer.dy})
    sized(*floats, walk.blocks * layer.out.block());
  for (Floats* floats : {&layer.scale, &layer.shift}) sized(*floats, walk.rows);
  sized(layer.factor, walk.channels);
  Random own(static_cast<unsigned>(walk.rows));  // what the layers are does not depend on these
  layer.planes.resize(static_cast<std::size_t>(std::max(walk.channels, walk.rows) * max_taps));
  for (float& f : layer.planes) f = own.number();
  sized(layer.before, static_cast<std::int64_t>(layer.value.size()) + 2 * walk.rows);
  // Room for depthwise_products'.
  layer.before.resize(std::max(layer.before.size(), static_cast<std::size_t>(walk.rows * (walk.taps + 1))),
                      1);
  layer.mask_bits.resize(static_cast<std::size_t>(walk.blocks * walk.bits_block));
  for (auto& byte : layer.mask_bits) byte = static_cast<std::uint8_t>(random.in(0, 255));
}

// `big`: long rows of weights, walked in chunks and groups. `winograd`: a walk that the compiler may want Winograd's
// products for, and some that it would not, because they are narrow or have few planes.
inline Layer random_layer(Random& random, bool big, bool winograd) {
  Layer layer;
  Walk& walk = layer.walk;
  const std::int64_t kernel_height = random.one_of({1, 3, 3, 5, 2});
  const std::int64_t kernel_width = winograd ? 3 : random.one_of({1, 3, 3, 5, 4});
  walk.lanes = winograd ? random.one_of({16, 32, 48}) : random.one_of({1, 2, 3, 4, 5, 8, 8, 12, 16, 16, 32});
  walk.blocks = random.in(1, 3);
  walk.channels = big ? random.in(40, 160) : winograd ? random.in(1, 20) : random.in(1, 12);
  walk.rows = big ? random.in(10, 140) : random.in(1, 14);
  walk.height = random.in(1, big ? 6 : 10);
  walk.width = winograd ? 4 * random.in(1, 4) : random.in(1, big ? 6 : 11);
  walk.winograd = winograd;
  // A forward walk takes steps in its input; one phase of a gradient with respect to the input takes them in its
  // output, and uses some of the kernel's positions only.
  if (!winograd) layer.step_in = random.one_of({1, 1, 1, 2, 2, 3});
  if (layer.step_in == 1 && !winograd) layer.step_out = random.one_of({1, 1, 2, 3});
  layer.phase_y = random.in(0, layer.step_out - 1);
  layer.phase_x = random.in(0, layer.step_out - 1);
  const std::int64_t padding = random.in(0, std::max(kernel_height, kernel_width) / 2);
  lay_out(layer, kernel_height, kernel_width, padding, random.in(0, 1), random.in(0, 2),
          random.in(0, layer.step_out - 1 - layer.phase_y), random.in(0, layer.step_out - 1 - layer.phase_x));
  for (std::int64_t k = 0; k < kernel_height * kernel_width; ++k)
    if (layer.step_out == 1 || random.chance(0.5)) walk.used[walk.taps++] = static_cast<std::uint8_t>(k);
  if (walk.taps == 0) walk.used[walk.taps++] = 0;
  // Each row empty, full, or in between; sometimes a batch that does not fill its last block.
  const double density = random.one_of({0.02, 0.2, 0.6, 1.0});
  fill(layer, random, random.chance(0.3) ? random.in(1, walk.lanes) : walk.lanes,
       [&] { return random.one_of({density, density, density, density, 0.0, 1.0}); });
  layer.scaled = random.chance(0.5);
  layer.added = random.chance(0.5);
  layer.positions = random.chance(0.5);
  layer.factors = layer.positions && random.chance(0.5);
  layer.mask = static_cast<int>(random.in(0, 2));
  // No operator has both an activation that bends and a mask.
  if (layer.mask == 0)
    layer.activation = random_activation(random, 0.3);
  else if (random.chance(0.5))
    layer.activation = {Function::relu};
  do layer.through = random_activation(random, 0);
  while (layer.mask == 2 && !has_slopes(layer.through.function));
  layer.writes_bits = layer.mask == 0 && layer.step_out == 1 && random.chance(0.7);
  layer.writes_pre = layer.mask == 0 && random.chance(0.3);
  return layer;
}

inline constexpr float untouched = 1234.5f;  // what the output holds before

struct Result {
  Floats floats, pre;
  std::vector<std::uint8_t> bits;
};

inline SparseRows rows_of(const Layer& layer, bool indirect) {
  SparseRows rows;
  rows.pointer = layer.pointer.data();
  rows.entry = layer.entry.data();
  rows.value = layer.value.data();
  if (indirect && layer.positions) rows.position = layer.position.data();
  if (indirect && layer.factors) rows.factor = layer.factor.data();
  return rows;
}

// The layer's walk with everything that it reads, into a result that it writes.
inline Walk writing_walk(const Layer& layer, Result& result, float before) {
  Walk walk = layer.walk;
  result.floats.assign(static_cast<std::size_t>(walk.blocks * layer.out.block()), before);
  result.bits.assign(layer.mask_bits.size(), 0xA5);
  walk.input = layer.input.data() + layer.in.origin();
  walk.output = result.floats.data() + layer.first_out();
  if (layer.scaled) walk.scale = layer.scale.data(), walk.shift = layer.shift.data();
  if (layer.added) walk.addend = layer.addend.data() + layer.first_out();
  walk.activation = layer.activation;
  walk.through = layer.through;
  walk.mask_block = walk.output_block;
  walk.mask_plane = walk.output_plane;
  walk.mask_row = walk.output_row;
  walk.mask_pixel = walk.output_pixel;
  if (layer.mask == 1) walk.mask = layer.mask_floats.data() + layer.first_out();
  if (layer.writes_pre) {
    result.pre = result.floats;
    walk.pre = result.pre.data() + layer.first_out();
  }
  if (layer.mask == 2) walk.mask_bits = layer.mask_bits.data() + layer.phase_y * layer.bit_row();
  if (layer.writes_bits) walk.bits = result.bits.data();
  return walk;
}

inline Result walk_with(const ConvKernels& kernels, const Layer& layer, bool dense, float before) {
  Result result;
  const Walk walk = writing_walk(layer, result, before);
  const SparseRows rows = rows_of(layer, true);
  if (!dense) {
    for (std::int64_t i = 0, count = kernels.sparse_tasks(walk, rows); i < count; ++i)
      kernels.sparse(walk, rows, i);
    return result;
  }
  const std::int64_t columns = walk.channels * (walk.winograd ? walk.taps / 3 * 4 : walk.taps);
  Floats packed(static_cast<std::size_t>(walk.rows * columns), untouched);
  for (std::int64_t i = 0, count = kernels.pack_tasks(walk); i < count; ++i)
    kernels.pack(walk, {.rows = rows}, packed.data(), i);
  for (std::int64_t i = 0, count = kernels.dense_tasks(walk); i < count; ++i)
    kernels.dense(walk, packed.data(), i);
  return result;
}

// Image rows of a band in which depthwise kernels are called here, so that they begin and end anywhere.
inline constexpr std::int64_t band_rows = 3;

// Calls body(row, begin, end) for the bands of all output planes in every block.
template <class Body>
void for_bands(const Walk& walk, const Body& body) {
  for (std::int64_t row = 0; row < walk.rows; ++row)
    for (std::int64_t block = 0; block < walk.blocks; ++block)
      for (std::int64_t y = 0; y < walk.height; y += band_rows)
        body(row, block * walk.height + y, block * walk.height + std::min(walk.height, y + band_rows));
}

// The walk as a depthwise one; the planes of one side must be a multiple of the other's.
inline Result depthwise_with(const ConvKernels& kernels, const Layer& layer, bool, float before) {
  Result result;
  const Walk walk = writing_walk(layer, result, before);
  Weights weights;
  weights.all = layer.planes.data();
  weights.row_step = max_taps;
  if (layer.factors && walk.channels >= walk.rows) weights.factor = layer.factor.data();
  for_bands(walk, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    kernels.depthwise(walk, weights, row, begin, end);
  });
  return result;
}

// The sums of which a depthwise layer's gradients are made, taps + 1 for each row, added to what there was.
inline Result products_with(const ConvKernels& kernels, const Layer& layer, bool, float before) {
  Walk walk = layer.walk;
  walk.input = layer.input.data() + layer.in.origin();
  Result result{layer.before, {}, {}};
  if (before == 0) std::fill(result.floats.begin(), result.floats.end(), 0.0f);
  const std::int64_t each = walk.taps + 1;
  std::vector<double> sums(result.floats.begin(), result.floats.begin() + walk.rows * each);
  for_bands(walk, [&](std::int64_t row, std::int64_t begin, std::int64_t end) {
    kernels.depthwise_products(walk, layer.dy.data() + layer.first_out(), row, begin, end,
                               sums.data() + row * each);
  });
  std::transform(sums.begin(), sums.end(), result.floats.begin(),
                 [](double sum) { return static_cast<float>(sum); });
  return result;
}

inline Result gradient_with(const ConvKernels& kernels, const Layer& layer, bool dense, float before) {
  Walk walk = layer.walk;
  const SparseRows rows = rows_of(layer, false);
  Result result{layer.before, {}, {}};
  if (before == 0) std::fill(result.floats.begin(), result.floats.end(), 0.0f);
  walk.input = layer.input.data() + layer.in.origin();
  WeightGradient gradient;
  gradient.dy = layer.dy.data() + layer.first_out();
  if (layer.scaled) gradient.scale = layer.scale.data();
  gradient.grad = result.floats.data();
  if (layer.added) {
    gradient.dscale = result.floats.data() + layer.value.size();
    gradient.dshift = gradient.dscale + walk.rows;
  }
  if (!dense) {
    for (std::int64_t i = 0, count = kernels.gradient_tasks(walk, rows); i < count; ++i)
      kernels.gradient(walk, rows, gradient, i);
    return result;
  }
  Floats work(static_cast<std::size_t>(walk.rows * walk.channels * walk.taps), untouched);
  for (std::int64_t i = 0, count = kernels.dense_gradient_tasks(walk); i < count; ++i)
    kernels.dense_gradient(walk, {.rows = rows}, gradient, work.data(), i);
  return result;
}

// The kernels of a library: this machine's, and the scalar ones.
struct Kernels {
  const char* isa;
  const ConvKernels *fast, *scalar;
  const edge_bcs::RowKernels *fast_rows, *scalar_rows;
  const edge_bcs::NormKernels *fast_norms, *scalar_norms;
  const edge_bcs::NormalKernels *fast_normals, *scalar_normals;

  explicit Kernels(const char* path) {
    void* const library = dlopen(path, RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(dlerror());
    const auto function = [&](const char* name) {
      void* const found = dlsym(library, name);
      if (found == nullptr) throw std::runtime_error(std::string("the library has no ") + name);
      return found;
    };
    const auto kernels = reinterpret_cast<const ConvKernels* (*)(int)>(function("edge_bcs_conv_kernels"));
    isa = reinterpret_cast<const char* (*)()>(function("edge_bcs_isa"))();
    fast = kernels(0);
    scalar = kernels(1);
    const auto rows =
        reinterpret_cast<const edge_bcs::RowKernels* (*)(int)>(function("edge_bcs_row_kernels"));
    fast_rows = rows(0);
    scalar_rows = rows(1);
    const auto norms =
        reinterpret_cast<const edge_bcs::NormKernels* (*)(int)>(function("edge_bcs_norm_kernels"));
    fast_norms = norms(0);
    scalar_norms = norms(1);
    const auto normals =
        reinterpret_cast<const edge_bcs::NormalKernels* (*)(int)>(function("edge_bcs_normal_kernels"));
    fast_normals = normals(0);
    scalar_normals = normals(1);
  }
};

}  // namespace layers
