// Runs one kernel on one layer a number of times, for an emulator to count its instructions:
//
//   kernel_work LIBRARY KERNEL CHANNELS ROWS SIZE POSITIONS STRIDE DENSITY LANES TIMES
//
// KERNEL: sparse, transposed, dense, gradient, dense_gradient, or half_ and one of the first three; the layer has SIZE × SIZE output pixels and square
// kernels of POSITIONS × POSITIONS. Prints the floating-point operations of one run, two for each weight that there is
// and each pixel of each image, and the address at which the library lies. tests/arm/count_instructions.py reads it.

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "half_layer.h"

namespace {

using namespace layers;

const HalfKernels& half_kernels(const char* path) {
  const HalfTables tables(path);
  if (!half_is_fp16 || tables.kind != 2) throw std::runtime_error("this processor has no FP16");
  return *tables.fast;
}

int run(char** arguments) {
  const Kernels kernels(arguments[1]);
  std::string kernel = arguments[2];
  const bool half = kernel.starts_with("half_");
  if (half) kernel.erase(0, 5);
  const auto number = [&](int i) { return static_cast<std::int64_t>(std::atoll(arguments[i])); };
  Layer layer;
  Walk& walk = layer.walk;
  walk.channels = number(3);
  walk.rows = number(4);
  walk.height = walk.width = number(5);
  walk.lanes = number(9);
  layer.step_in = number(7);
  lay_out(layer, number(6), number(6), number(6) / 2, 0, number(6) / 2, 0, 0);
  for (std::int64_t k = 0; k < number(6) * number(6); ++k)
    walk.used[walk.taps++] = static_cast<std::uint8_t>(k);
  Random random(1);
  const double density = std::atof(arguments[8]);
  fill(layer, random, walk.lanes, [&] { return density; });
  layer.scaled = true;
  layer.activation = {edge_bcs::Function::relu};
  layer.writes_bits = kernel != "transposed";
  layer.positions = layer.factors = kernel == "transposed";
  const bool dense = kernel == "dense" || kernel == "dense_gradient";
  for (std::int64_t i = 0; i < number(10); ++i) {
    if (half)
      half_walk_with(half_kernels(arguments[1]), layer, dense);
    else if (kernel == "gradient" || kernel == "dense_gradient")
      gradient_with(*kernels.fast, layer, dense, 0);
    else if (kernel == "sparse" || kernel == "transposed" || kernel == "dense")
      walk_with(*kernels.fast, layer, dense, 0);
    else
      throw std::runtime_error("there is no kernel " + kernel);
  }
  Dl_info place{};
  if (dladdr(kernels.fast, &place) == 0) throw std::runtime_error("the kernels lie in no library");
  const std::int64_t pixels = walk.height * walk.width * walk.lanes * walk.blocks;
  std::printf("%" PRId64 " %" PRIuPTR "\n", 2 * static_cast<std::int64_t>(layer.entry.size()) * pixels,
              reinterpret_cast<std::uintptr_t>(place.dli_fbase));
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 11) throw std::runtime_error("it takes ten arguments");
    return run(arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_work: %s\n", error.what());
    return 2;
  }
}
