// What the convolution kernels are asked to do, and the table through which one compiled variant of them is called.
//
// All kernels see a convolution as a walk: a grid of `height` × `width` output pixels in each of `rows` output planes,
// where output pixel (y, x) of plane r is the sum, over the entries of row r of a sparse matrix, of a weight times one
// input pixel. The input pixel of an entry (channel, tap) lies at a fixed distance from the output pixel's own place:
//
//     input + channel * input_plane + tap[kpos] + y * input_row + x * input_pixel        (all in floats)
//
// because activations carry a halo of zeros (see stack.h), so no entry ever needs a border case. Forward walks have
// input steps of `stride` pixels; a gradient with respect to the input is one walk for each phase of the stride, with
// output steps of `stride` pixels. Every pixel is `lanes` floats, one for each image of a batch block.
#pragma once

#include <cstdint>

#include "kernels/activation.h"

namespace edge_bcs {

// At most this many kernel positions (kh · kw); an entry's low eight bits can name one more.
inline constexpr int max_taps = 255;

// Winograd's products (kernels/winograd.cpp) ask for kernel positions three beside each other, whose distances are those of
// pixels of the input beside each other; for rows of a multiple of four pixels, beside each other on both sides; and for
// pixels of a multiple of 16 lanes.
inline constexpr std::int64_t winograd_positions = 3, winograd_pixels = 4, winograd_lanes = 16;

struct Walk {
  std::int64_t blocks = 1;    // NB
  std::int64_t lanes = 1;     // B
  std::int64_t rows = 0;      // output planes
  std::int64_t channels = 0;  // input planes
  std::int64_t height = 0;
  std::int64_t width = 0;
  std::int32_t tap[max_taps + 1] = {};   // distance of each kernel position, in floats
  int taps = 0;                          // kernel positions that the walk uses:
  std::uint8_t used[max_taps + 1] = {};  // these, in ascending order of their distances
  bool winograd = false;  // over all weights: with Winograd's products, where there are registers for them

  // Steps in floats from one block, plane, row and pixel to the next; the pointers are at pixel (0, 0) of plane 0.
  const float* input = nullptr;
  std::int64_t input_block = 0, input_plane = 0, input_row = 0, input_pixel = 0;
  float* output = nullptr;
  std::int64_t output_block = 0, output_plane = 0, output_row = 0, output_pixel = 0;

  // output = act'(mask) · act(scale · sum + shift + addend); each part is absent where its pointer is null.
  const float* scale = nullptr;   // [rows]
  const float* shift = nullptr;   // [rows], given exactly when scale is
  const float* addend = nullptr;  // steps as the output's
  Activation activation;
  float* pre = nullptr;  // written: what the activation is applied to
  // The activation that a gradient goes back through, and what its derivative is made from: its result or what it was
  // applied to (activation.h), or its bits.
  Activation through{Function::relu};
  const float* mask = nullptr;
  std::int64_t mask_block = 0, mask_plane = 0, mask_row = 0, mask_pixel = 0;  // of mask or of pre
  const std::uint8_t* mask_bits = nullptr;                    // bits_* below say where they lie
  std::uint8_t* bits = nullptr;                               // written: those of the activation
  std::int64_t bits_block = 0, bits_plane = 0, bits_row = 0;  // steps in bytes
  std::int64_t bits_first = 0, bits_pixel = 0;                // steps in bits

  // In half precision (half.h): the pixel of a row of the output at which the walk begins.
  std::int64_t first_pixel = 0;

  // Floats to zero at `tail_at` after the start of an output row: the halo beside it, and below the last row.
  std::int64_t tail_at = 0, tail = 0, bottom = 0;

  // Whether there is no activation but one that clips, on the way there and back.
  bool simple() const { return clips(activation.function) && clips(through.function) && pre == nullptr; }
};

// What output plane `row` of a depthwise walk meets: input planes [first, first + count) with rows [weights, …) of the
// weights.
struct Planes {
  Planes(std::int64_t channels, std::int64_t rows, std::int64_t row)
      : count(channels > rows ? channels / rows : 1),
        first(channels > rows ? row * count : row / (rows / channels)),
        weights(channels > rows ? first : row) {}
  Planes(const Walk& walk, std::int64_t row) : Planes(walk.channels, walk.rows, row) {}
  std::int64_t count, first, weights;
};

// A sparse matrix of one layer, compressed by rows. Row r has the entries j in [pointer[r·step], pointer[r·step + 1]);
// entry j is channel << 8 | kpos and its weight is value[j], or value[position[j]] · factor[channel].
struct SparseRows {
  const std::int32_t* pointer = nullptr;
  std::int64_t step = 1;
  const std::int32_t* entry = nullptr;
  const std::int32_t* position = nullptr;
  const float* value = nullptr;
  const float* factor = nullptr;

  std::int64_t begin(std::int64_t row) const { return pointer[row * step]; }
  std::int64_t end(std::int64_t row) const { return pointer[row * step + 1]; }
  float weight(std::int64_t j) const {
    const float number = value[position == nullptr ? j : position[j]];
    return factor == nullptr ? number : number * factor[entry[j] >> 8];
  }
  // The first of a row's entries [first, last), whose channels ascend, with a channel of at least `channel`.
  std::int64_t first_at_least(std::int64_t first, std::int64_t last, std::int64_t channel) const {
    while (first < last) {
      const std::int64_t middle = first + (last - first) / 2;
      if ((entry[middle] >> 8) < channel)
        first = middle + 1;
      else
        last = middle;
    }
    return first;
  }
};

// The weights of a walk over all of them: what a sparse matrix has, and zeros where it has nothing; or, where `all` is not
// null, a full one, whose weight (row, channel, kpos) is all[row · row_step + channel · channel_step + kpos] · factor[channel].
struct Weights {
  SparseRows rows;
  const float* all = nullptr;
  std::int64_t row_step = 0, channel_step = 0;
  const float* factor = nullptr;  // null: 1
};

// The gradient with respect to the weights of a forward walk whose output steps are those of dy: for each entry j of row
// o, g'_j = Σ over blocks and pixels of dy · input pixel, and then
// grad[j] += scale[o] · g'_j,  dscale[o] += Σ_j value[j] · g'_j,  dshift[o] += Σ dy.
struct WeightGradient {
  const float* dy = nullptr;     // at pixel (0, 0) of plane 0
  const float* scale = nullptr;  // null: 1
  float* grad = nullptr;         // indexed by j, or as a full matrix is
  float* dscale = nullptr;       // null: not wanted (then dshift is null too)
  float* dshift = nullptr;
};

// Sums along a walk, of one instruction set. Work is cut into `*_tasks` parts that depend on the sizes and the lists only, never
// on the number of threads; each part is independent of the others.
struct SumKernels {
  // Walk over the entries that there are.
  std::int64_t (*sparse_tasks)(const Walk&, const SparseRows&);
  void (*sparse)(const Walk&, const SparseRows&, std::int64_t task);

  // Walk over all weights, packed by `pack` first into `packed`: rows · channels · taps floats, or 4/3 of that for one with
  // Winograd's products.
  std::int64_t (*pack_tasks)(const Walk&);
  void (*pack)(const Walk&, const Weights&, float* packed, std::int64_t task);
  std::int64_t (*dense_tasks)(const Walk&);
  void (*dense)(const Walk&, const float* packed, std::int64_t task);
};

// All kernels in float32; `conv_kernels_NAME` are those of variant NAME.
struct ConvKernels : SumKernels {
  // Gradient of the weights that there are.
  std::int64_t (*gradient_tasks)(const Walk&, const SparseRows&);
  void (*gradient)(const Walk&, const SparseRows&, const WeightGradient&, std::int64_t task);

  // Gradient of all weights in `work` (rows · channels · taps floats), of which those that there are get used.
  std::int64_t (*dense_gradient_tasks)(const Walk&);
  void (*dense_gradient)(const Walk&, const Weights&, const WeightGradient&, float* work, std::int64_t task);

  // Depthwise walks, whose planes fall into groups of one channel: output plane `row` in image rows [begin, end) of one batch
  // block. The weights are a full matrix of a row for each plane of the side that has more of them.
  void (*depthwise)(const Walk&, const Weights&, std::int64_t row, std::int64_t begin, std::int64_t end);
  // The gradient of their weights, of a forward walk whose output steps are those of dy: adds to sums[i] the products of plane
  // `row` of dy with the input at kernel position used[i], and to sums[taps] the plane's own sum, over such image rows.
  void (*depthwise_products)(const Walk&, const float* dy, std::int64_t row, std::int64_t begin,
                             std::int64_t end, double* sums);
};

extern const ConvKernels conv_kernels_scalar;
extern const ConvKernels conv_kernels_avx2;
extern const ConvKernels conv_kernels_avx512;
extern const ConvKernels conv_kernels_neon;

}  // namespace edge_bcs
