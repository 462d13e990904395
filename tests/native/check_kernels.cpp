// Every convolution kernel of this machine's instruction set against the scalar one, on random layers, and every kernel
// of single rows, of both variants, against plain loops (row_checks.h), on as many random rows:
//
//   check_kernels LIBRARY [LAYERS] [SEED]
//
// For each number of the two results the allowed difference follows from the rounding errors of a sum of that many
// terms of that size; the size is measured by running the scalar kernel on the absolute values of everything. So a
// number that no term reaches (a halo, a float beyond an image row, what a mask stops) must be equal, and a term that
// is missing or counted twice is seen. Bits must be those of the floats written beside them. Prints what was compared;
// exit status 1 if anything differed.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "layer.h"
#include "row_checks.h"

namespace {

using namespace layers;

// Of an activation or its derivative, relative to what it is multiplied with: a few roundings, and twice what the functions
// may differ by from the truth.
constexpr double activation_error = 2e-6;

bool bends(const Activation& activation) { return !edge_bcs::only_relu(activation, {}); }

// One kernel's comparisons.
struct Tally {
  const char* kernel;
  Result (*run)(const ConvKernels&, const Layer&, bool dense, float before);
  bool dense, gradient;
  long layers = 0, numbers = 0, wrong = 0;
  double worst = 0;  // largest difference, in units of what is allowed

  void compare(const ConvKernels& variant, const ConvKernels& scalar, const Layer& layer) {
    const Result expected = run(scalar, layer, dense, untouched),
                 actual = run(variant, layer, dense, untouched);
    const Result magnitude = run(scalar, layer.magnitudes(), dense, 0);
    Floats unmasked;
    // Winograd's products mix pixels beside each other.
    if (dense && !gradient && layer.walk.winograd) {
      Layer without = layer.magnitudes();
      without.mask = 0;
      unmasked = run(scalar, without, dense, 0).floats;
    }
    const double terms =
        gradient
            ? static_cast<double>(layer.walk.blocks * layer.walk.height * layer.walk.width * layer.walk.lanes)
            : static_cast<double>(layer.walk.channels * layer.walk.taps);
    // The slopes of activations, at most 1.5, make an error larger.
    const double relative = 1.5 * (bends(layer.activation) ? 1.5 : 1) * std::sqrt(terms + 16) * 0x1p-24;
    Floats open;  // the size of what derivatives, which may be small, are multiplied with
    if (!gradient && layer.mask == 1 && bends(layer.through)) {
      Layer without = layer.magnitudes();
      without.mask = 0;
      open = run(scalar, without, dense, 0).floats;
    }
    ++layers;
    numbers += static_cast<long>(expected.floats.size());
    for (std::size_t i = 0; i < expected.floats.size(); ++i) {
      double allowed = relative * (size_of(layer, magnitude.floats, unmasked, i) +
                                   (gradient ? std::fabs(static_cast<double>(layer.before[i])) : 0));
      if (!gradient && bends(layer.activation))
        allowed += activation_error * std::fabs(static_cast<double>(expected.floats[i]));
      if (!open.empty()) allowed += activation_error * static_cast<double>(open[i]);
      const double error =
          std::fabs(static_cast<double>(actual.floats[i]) - static_cast<double>(expected.floats[i]));
      if (error > 0) worst = std::max(worst, error / std::max(allowed, 1e-300));
      if (!(error <= allowed))
        report(layer, "float", i, static_cast<double>(expected.floats[i]),
               static_cast<double>(actual.floats[i]));
    }
    for (std::size_t i = 0; i < expected.pre.size(); ++i) {
      const double allowed = relative * size_of(layer, magnitude.floats, unmasked, i);
      if (!(std::fabs(static_cast<double>(actual.pre[i]) - static_cast<double>(expected.pre[i])) <= allowed))
        report(layer, "float of pre", i, static_cast<double>(expected.pre[i]),
               static_cast<double>(actual.pre[i]));
    }
    // From some results the bits cannot be told.
    const bool told = has_slopes(layer.activation.function) && layer.activation.slope >= 0 &&
                      layer.activation.function != edge_bcs::Function::hardsigmoid;
    for (std::size_t byte = 0; byte < expected.bits.size(); ++byte) {
      const unsigned bits =
          told && layer.writes_bits ? bits_of(layer, actual.floats, byte) : expected.bits[byte];
      if (bits != actual.bits[byte]) report(layer, "byte of bits", byte, bits, actual.bits[byte]);
    }
  }

 private:
  // What rounding is relative to: the sum of the absolute products, or, where pixels are mixed, the largest of such sums
  // beside each other, `unmasked`; what is masked is nothing at all.
  static double size_of(const Layer& layer, const Floats& own, const Floats& unmasked, std::size_t i) {
    const auto size = [](const Floats& floats, std::size_t at) {
      return std::fabs(static_cast<double>(floats[at]));
    };
    if (unmasked.empty() || (own[i] == 0 && unmasked[i] != 0)) return size(own, i);
    const auto at = static_cast<std::int64_t>(i), end = static_cast<std::int64_t>(unmasked.size());
    double largest = 0;
    for (std::int64_t other = at - 3 * layer.walk.lanes; other <= at + 3 * layer.walk.lanes;
         other += layer.walk.lanes)
      if (other >= 0 && other < end)
        largest = std::max(largest, size(unmasked, static_cast<std::size_t>(other)));
    return largest;
  }

  // The bits that belong beside the variant's own output: which of eight floats are positive and no limit.
  static unsigned bits_of(const Layer& layer, const Floats& floats, std::size_t byte) {
    const auto at = static_cast<std::int64_t>(byte);
    const std::int64_t block = at / layer.walk.bits_block,
                       row = at % layer.walk.bits_block / layer.walk.bits_plane;
    const std::int64_t y = at % layer.walk.bits_plane / layer.bit_row(), first = at % layer.bit_row() * 8;
    const std::int64_t from =
        block * layer.out.block() + layer.out.origin() + row * layer.out.plane() + y * layer.out.row();
    const float most = layer.activation.function == edge_bcs::Function::relu6
                           ? 6.0f
                           : std::numeric_limits<float>::infinity();
    unsigned bits = 0;
    for (std::int64_t x = first; x < std::min(first + 8, layer.out.width * layer.out.lanes); ++x)
      bits |= static_cast<unsigned>(floats[static_cast<std::size_t>(from + x)] > 0 &&
                                    floats[static_cast<std::size_t>(from + x)] < most)
              << (x - first);
    return bits;
  }

  void report(const Layer& layer, const char* what, std::size_t i, double expected, double actual) {
    if (++wrong <= 5)
      std::printf("%s: %s %zu is %.9g, not %.9g (%s)\n", kernel, what, i, actual, expected,
                  layer.text().c_str());
  }
};

int check(const char* path, int layers, unsigned seed) {
  const Kernels kernels(path);
  Random random(seed);
  std::array<Tally, 6> tallies{{{"sparse", walk_with, false, false},
                                {"dense", walk_with, true, false},
                                {"gradient", gradient_with, false, true},
                                {"dense_gradient", gradient_with, true, true},
                                {"depthwise", depthwise_with, false, false},
                                {"depthwise_products", products_with, false, true}}};
  for (int i = 0; i < layers; ++i) {
    const Layer layer = random_layer(random, i % 16 == 15, i % 4 == 1 || i % 32 == 31);
    const std::int64_t rows = layer.walk.rows, channels = layer.walk.channels;
    for (Tally& tally : tallies) {
      // dy has no steps between its pixels.
      if (tally.gradient && layer.step_out != 1) continue;
      // The gradient is one of forward walks, which have no more planes on the side of their input.
      if (tally.run == products_with && rows % channels != 0) continue;
      if (tally.run == depthwise_with && rows % channels != 0 && channels % rows != 0) continue;
      tally.compare(*kernels.fast, *kernels.scalar, layer);
    }
  }
  long wrong = 0;
  for (const Tally& tally : tallies) {
    std::printf(
        "%s %s: %ld layers, %ld numbers, largest difference %.3g of what rounding allows, %ld wrong\n",
        kernels.isa, tally.kernel, tally.layers, tally.numbers, tally.worst, tally.wrong);
    wrong += tally.wrong;
    if (tally.layers == 0) throw std::runtime_error("a kernel was not checked");
  }
  wrong += row_checks::check(kernels, layers, seed);
  return wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count < 2) throw std::runtime_error("use: check_kernels LIBRARY [LAYERS] [SEED]");
    return check(arguments[1], count > 2 ? std::atoi(arguments[2]) : 400,
                 count > 3 ? static_cast<unsigned>(std::atoi(arguments[3])) : 7);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "check_kernels: %s\n", error.what());
    return 2;
  }
}
