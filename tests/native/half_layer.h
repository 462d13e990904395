// The library's kernels in half precision on a layer of layer.h, on a processor whose numbers are FP16: pixel after pixel, they
// lie where the floats do.
#pragma once

#include "kernels/half.h"
#include "layer.h"

namespace layers {

using Numbers = std::vector<std::uint16_t>;

inline Numbers halves(const Floats& floats) {
  Numbers numbers(floats.size());
  std::transform(floats.begin(), floats.end(), numbers.begin(), [](float f) { return to_half(f); });
  return numbers;
}

struct HalfResult {
  Numbers numbers, pre;
  std::vector<std::uint8_t> bits;
};

inline HalfResult half_walk_with(const HalfKernels& kernels, const Layer& layer, bool dense) {
  Result floats;
  Walk walk = writing_walk(layer, floats, untouched);
  const Numbers input = halves(layer.input), addend = halves(layer.addend), mask = halves(layer.mask_floats);
  HalfResult result{halves(floats.floats), halves(floats.pre), {}};
  const auto at = [](auto& numbers, std::int64_t place) {
    using Float =
        std::conditional_t<std::is_const_v<std::remove_reference_t<decltype(numbers)>>, const float*, float*>;
    return reinterpret_cast<Float>(numbers.data() + place);
  };
  walk.input = at(input, layer.in.origin());
  walk.output = at(result.numbers, layer.first_out());
  if (walk.addend != nullptr) walk.addend = at(addend, layer.first_out());
  if (walk.mask != nullptr) walk.mask = at(mask, layer.first_out());
  if (walk.pre != nullptr) walk.pre = at(result.pre, layer.first_out());
  const SparseRows rows = rows_of(layer, true);
  if (dense) {
    Floats packed(static_cast<std::size_t>(walk.rows * (walk.channels + 1) * walk.taps), untouched);
    for (std::int64_t i = 0, count = kernels.pack_tasks(walk); i < count; ++i)
      kernels.pack(walk, {.rows = rows}, packed.data(), i);
    for (std::int64_t i = 0, count = kernels.dense_tasks(walk); i < count; ++i)
      kernels.dense(walk, packed.data(), i);
  } else {
    for (std::int64_t i = 0, count = kernels.sparse_tasks(walk, rows); i < count; ++i)
      kernels.sparse(walk, rows, i);
  }
  result.bits = std::move(floats.bits);
  return result;
}

// The tables of a library: this machine's, and the scalar one.
struct HalfTables {
  const HalfKernels *fast, *scalar;
  int kind;  // 2: this machine has the arithmetic

  explicit HalfTables(const char* path) {
    void* const library = dlopen(path, RTLD_NOW);
    if (library == nullptr) throw std::runtime_error(dlerror());
    const auto table =
        reinterpret_cast<const HalfKernels* (*)(int)>(dlsym(library, "edge_bcs_half_kernel_table"));
    const auto what = reinterpret_cast<int (*)()>(dlsym(library, "edge_bcs_half_kernels"));
    if (table == nullptr || what == nullptr) throw std::runtime_error("the library has no half precision");
    fast = table(0);
    scalar = table(1);
    kind = what();
  }
};

}  // namespace layers
