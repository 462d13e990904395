// Work on single image rows: scale and shift, addition, activations and their derivatives, sums, maximum pooling.
#pragma once

#include <cstdint>

#include "kernels/activation.h"

namespace edge_bcs {

// out = act'(mask) · act(scale · a + shift + addend) over `count` floats; each part is absent where its pointer is null.
struct Row {
  std::int64_t count = 0;
  const float* a = nullptr;
  float scale = 1;
  float shift = 0;
  const float* addend = nullptr;
  Activation activation{};
  float* pre = nullptr;  // written: what the activation is applied to
  // The activation that a gradient goes back through, and what its derivative is made from (see walk.h).
  Activation through{Function::relu};
  const float* mask = nullptr;
  const std::uint8_t* mask_bits = nullptr;  // that of float j is bit j % 8 of byte j / 8
  float* out = nullptr;
  std::uint8_t* bits = nullptr;  // written: those of the activation; the bits after the last are 0

  bool simple() const { return only_relu(activation, through) && pre == nullptr; }
};

// Sums over two rows a and b, in double.
struct RowSums {
  double products = 0;  // Σ a · b
  double values = 0;    // Σ a
};

// One output row of a maximum pooling. Window x begins at input pixel x · stride - padding; only its pixels in image rows
// [top, bottom) of the window and columns [0, width) of the image count.
struct PoolRow {
  std::int64_t lanes = 1, width = 0, out_width = 0;
  std::int64_t kernel = 1, stride = 1, padding = 0;
  std::int64_t top = 0, bottom = 0;
  std::int64_t row = 0;  // floats from one image row of the input to the next

  std::int64_t left(std::int64_t x) const { return x * stride < padding ? padding - x * stride : 0; }
  std::int64_t right(std::int64_t x) const {
    const std::int64_t rest = width + padding - x * stride;
    return rest < kernel ? rest : kernel;
  }
};
// What bounds a list of entries (walk.h): their largest, negative ones counting as larger than all others, and the largest of
// their kernel positions.
struct EntryBounds {
  std::uint32_t entry = 0, position = 0;
};

// The choice of a window at whose maximum the activation is flat.
inline constexpr std::int32_t no_choice = 255;

struct RowKernels {
  EntryBounds (*entry_bounds)(const std::int32_t* entry, std::int64_t count);
  void (*combine)(const Row&);
  RowSums (*sums)(const float* a, const float* b, std::int64_t count);
  // y = the maximum of each window (`input` is at image row 0 of the windows, column 0 of the image), and of that ReLU or
  // ReLU6; choice (may be null) = ky · kernel + kx of the first maximum, or no_choice where the activation is flat.
  void (*max_pool)(const PoolRow&, const float* input, Function, float* y, std::uint8_t* choice);
  // Passes dy to the chosen pixels of dx: adds it, or, where windows neither overlap nor leave gaps, stores it and zeros
  // in the other pixels of each window.
  void (*max_pool_gradient)(const PoolRow&, const float* dy, const std::uint8_t* choice, bool add, float* dx);
};

extern const RowKernels row_kernels_scalar;
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
extern const RowKernels row_kernels_neon;

}  // namespace edge_bcs
