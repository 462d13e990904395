// The FP16 kernels of this machine against the scalar ones, which round where half.h says, on random layers:
//
//   check_half LIBRARY [LAYERS] [SEED]
//
// All that the kernels compute is rounded at the same places in both, so that every number must be equal; what goes through an
// activation that bends may differ by one rounding. Prints what was compared; exit status 1 if anything differed.

#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "half_layer.h"

namespace {

using namespace layers;

class Comparison {
 public:
  explicit Comparison(const HalfTables& tables) : tables_(tables) {}

  void layer(const Layer& layer, bool dense) {
    const HalfResult expected = half_walk_with(*tables_.scalar, layer, dense),
                     actual = half_walk_with(*tables_.fast, layer, dense);
    const bool bends = !only_clips(layer);
    for (std::size_t i = 0; i < expected.numbers.size(); ++i)
      number(layer, "number", i, expected.numbers[i], actual.numbers[i], bends);
    for (std::size_t i = 0; i < expected.pre.size(); ++i)
      number(layer, "number of pre", i, expected.pre[i], actual.pre[i], false);
    for (std::size_t i = 0; i < expected.bits.size(); ++i)
      if (expected.bits[i] != actual.bits[i])
        report(layer, "byte of bits", i, expected.bits[i], actual.bits[i]);
    ++layers_;
  }

  // Rows as floats and back.
  void rows(Random& random) {
    for (const std::int64_t lanes : {8, 16})
      for (std::int64_t count = 1; count < 9; ++count) {
        Floats floats(static_cast<std::size_t>(count * lanes));
        for (float& f : floats) f = std::ldexp(random.number(), static_cast<int>(random.in(-28, 17)));
        Numbers expected(static_cast<std::size_t>((count + 1) * lanes), 1), actual = expected;
        tables_.scalar->narrow(floats.data(), lanes, count, expected.data());
        tables_.fast->narrow(floats.data(), lanes, count, actual.data());
        if (expected != actual) std::printf("narrow of %d pixels\n", static_cast<int>(count)), ++wrong_;
        const std::int64_t first = random.in(0, count - 1);
        Floats wide(floats.size(), untouched), again = wide;
        tables_.scalar->widen(expected.data(), lanes, first, count - first, wide.data());
        tables_.fast->widen(expected.data(), lanes, first, count - first, again.data());
        if (wide != again) std::printf("widen of %d pixels\n", static_cast<int>(count)), ++wrong_;
      }
  }

  int finish() const {
    std::printf("half: %ld layers, %ld numbers, %ld wrong\n", layers_, numbers_, wrong_);
    return wrong_ == 0 && layers_ > 0 ? 0 : 1;
  }

 private:
  static bool only_clips(const Layer& layer) {
    return clips(layer.activation.function) && (layer.mask == 0 || clips(layer.through.function));
  }

  void number(const Layer& layer, const char* what, std::size_t i, std::uint16_t expected,
              std::uint16_t actual, bool bends) {
    ++numbers_;
    if (expected == actual) return;
    const auto a = static_cast<double>(from_half(expected)), b = static_cast<double>(from_half(actual));
    // Zeros of both signs are equal.
    if (!(std::fabs(a - b) <= (bends ? std::fabs(a) * 0x1p-10 + 0x1p-24 : 0))) report(layer, what, i, a, b);
  }

  void report(const Layer& layer, const char* what, std::size_t i, double expected, double actual) {
    if (++wrong_ <= 5)
      std::printf("%s %zu is %.9g, not %.9g (%s)\n", what, i, actual, expected, layer.text().c_str());
  }

  const HalfTables& tables_;
  long layers_ = 0, numbers_ = 0, wrong_ = 0;
};

// Rows of more entries than a kernel makes ready at once.
Layer long_rows(Random& random) {
  Layer layer;
  layer.walk.lanes = 8;
  layer.walk.channels = 1000;
  layer.walk.rows = 2;
  layer.walk.height = 1;
  layer.walk.width = 3;
  layer.scaled = layer.added = true;
  lay_out(layer, 3, 3, 1, 0, 1, 0, 0);
  for (std::uint8_t k = 0; k < 9; ++k) layer.walk.used[layer.walk.taps++] = k;
  fill(layer, random, layer.walk.lanes, [] { return 1.0; });
  return layer;
}

// Whether the layer is one for these kernels, and not too much for the scalar one where it is emulated.
bool suits(const Layer& layer) {
  const Walk& walk = layer.walk;
  const std::int64_t outputs = walk.rows * walk.blocks * walk.height * walk.width * walk.lanes;
  return (walk.lanes == 8 || walk.lanes == 16) && outputs * walk.channels * walk.taps < 2'000'000;
}

int check(const char* path, int layers, unsigned seed) {
  const HalfTables tables(path);
  if (!half_is_fp16 || tables.kind != 2) throw std::runtime_error("this processor has no FP16");
  Random random(seed);
  Comparison comparison(tables);
  comparison.layer(long_rows(random), false);
  for (int i = 0; i < layers;) {
    const Layer layer = random_layer(random, i % 8 == 7, false);
    if (!suits(layer)) continue;
    comparison.layer(layer, false);
    comparison.layer(layer, true);
    ++i;
  }
  comparison.rows(random);
  return comparison.finish();
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count < 2) throw std::runtime_error("use: check_half LIBRARY [LAYERS] [SEED]");
    return check(arguments[1], count > 2 ? std::atoi(arguments[2]) : 200,
                 count > 3 ? static_cast<unsigned>(std::atoi(arguments[3])) : 7);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "check_half: %s\n", error.what());
    return 2;
  }
}
