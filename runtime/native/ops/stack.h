// How an activation lies in memory.
//
// A stack is f32 [NB, P, B]: NB batch blocks of B lanes, sample s = nb·B + b. Within a block, pixel (c, y, x)
// of a C×H×W image with halo h is at h·R + h + c·S + y·R + x, with row stride R = W + h and plane stride S =
// (H + h)·R, and P = h·R + h + C·S. Every place that is no pixel is zero: the halo is shared between
// neighbouring rows and planes, so a convolution reads over a border without asking. With h = 0 the stack is
// the plain [C, H, W] array.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "ops/op.h"

namespace edge_bcs {

inline constexpr std::int64_t most_lanes = 64;  // of a stack

// The geometry of one stack; sizes in pixels, except `lanes`.
struct Stack {
  std::int64_t channels = 1;
  std::int64_t height = 1;
  std::int64_t width = 1;
  std::int64_t halo = 0;
  std::int64_t lanes = 1;

  // Reads attributes "<prefix>channels", "<prefix>height", "<prefix>width", "<prefix>halo" and "lanes".
  static Stack from(const Attributes& attributes, const std::string& prefix) {
    return from(attributes, prefix, prefix + "halo");
  }

  // The same with the halo under a name of its own.
  static Stack from(const Attributes& attributes, const std::string& prefix, const std::string& halo) {
    const auto read = [&](const std::string& name) { return attributes.integer(name.c_str()); };
    return checked(read(prefix + "channels"), read(prefix + "height"), read(prefix + "width"), read(halo),
                   read("lanes"));
  }

  // A geometry whose sizes are all in range; throws Error otherwise.
  static Stack checked(std::int64_t channels, std::int64_t height, std::int64_t width, std::int64_t halo,
                       std::int64_t lanes) {
    constexpr std::int64_t side = 1 << 14;
    require(channels >= 1 && channels < (1 << 23), "a stack has ", channels, " channels, not in [1, 2^23)");
    require(height >= 1 && height <= side && width >= 1 && width <= side, "a stack's image is ", height,
            " by ", width, " pixels, not in [1, ", side, "]");
    require(halo >= 0 && halo <= 256, "a stack's halo is ", halo, ", not in [0, 256]");
    require(lanes >= 1 && lanes <= most_lanes, "a stack has ", lanes, " lanes, not in [1, ", most_lanes, "]");
    return {channels, height, width, halo, lanes};
  }

  // The same image with another halo.
  Stack with_halo(std::int64_t other) const { return checked(channels, height, width, other, lanes); }

  std::int64_t row_stride() const { return width + halo; }                      // R, pixels
  std::int64_t plane_stride() const { return (height + halo) * row_stride(); }  // S, pixels
  std::int64_t origin() const { return halo * row_stride() + halo; }            // pixel (0, 0, 0)
  std::int64_t pixels() const { return origin() + channels * plane_stride(); }  // P
  std::int64_t block() const { return pixels() * lanes; }                       // floats of one batch block
  std::int64_t row() const { return width * lanes; }                            // floats of one image row
  std::int64_t pixel(std::int64_t c, std::int64_t y, std::int64_t x) const {
    return origin() + c * plane_stride() + y * row_stride() + x;
  }
  // Offset in floats of pixel (c, y, x) of batch block nb.
  std::int64_t at(std::int64_t nb, std::int64_t c, std::int64_t y, std::int64_t x = 0) const {
    return nb * block() + pixel(c, y, x) * lanes;
  }

  Shape shape(std::int64_t blocks) const { return {blocks, pixels(), lanes}; }

  // Checks that a tensor is a stack of this geometry and returns its number of batch blocks.
  template <class T>
  std::int64_t blocks(const Tensor<T>& tensor, const char* name) const {
    require(tensor.shape().rank() == 3 && tensor.dim(0) >= 1 && tensor.dim(1) == pixels() &&
                tensor.dim(2) == lanes,
            name, " is ", tensor.shape().text(), ", not a stack [blocks, ", pixels(), ", ", lanes, "]");
    return tensor.dim(0);
  }

  // Checks that a tensor is a stack of this geometry with the given number of batch blocks.
  template <class T>
  void check(const Tensor<T>& tensor, std::int64_t blocks, const char* name) const {
    require(tensor.shape() == shape(blocks), name, " is ", tensor.shape().text(), ", not ",
            shape(blocks).text());
  }

  // Zeroes the halo in front of the first plane of a batch block.
  void zero_front(float* block_start) const { std::fill_n(block_start, origin() * lanes, 0.0f); }

  // Zeroes the halo after row y of channel c; after the last row also the halo rows below it.
  void zero_after_row(float* block_start, std::int64_t c, std::int64_t y) const {
    const std::int64_t count = halo + (y == height - 1 ? halo * row_stride() : 0);
    if (count > 0) std::fill_n(block_start + (pixel(c, y, 0) + width) * lanes, count * lanes, 0.0f);
  }

  // Zeroes all of the halo that belongs to plane c (and, for plane 0, the halo in front of it).
  void zero_halo(float* block_start, std::int64_t c) const {
    if (c == 0) zero_front(block_start);
    for (std::int64_t y = 0; y < height; ++y) zero_after_row(block_start, c, y);
  }

  // Bits of activations: u8 [NB, C·H, bit_row()], bit j (least significant first) of a row is element j of the row's
  // W·B floats.
  std::int64_t bit_row() const { return (row() + 7) / 8; }  // bytes
  Shape bits_shape(std::int64_t blocks) const { return {blocks, channels * height, bit_row()}; }
  std::int64_t bits_at(std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return ((nb * channels + c) * height + y) * bit_row();
  }
};

// The input and the output of an operator whose maps are of different sizes; both have the same channels.
struct Maps {
  Stack in, out;

  explicit Maps(const Attributes& attributes) {
    const auto read = [&](const char* name) { return attributes.integer(name); };
    in =
        Stack::checked(read("channels"), read("in_height"), read("in_width"), read("in_halo"), read("lanes"));
    out = Stack::checked(in.channels, read("out_height"), read("out_width"), read("out_halo"), in.lanes);
  }
};

}  // namespace edge_bcs
