// How an activation lies in memory.
//
// A stack is f32 [NB, P, B]: NB batch blocks of B lanes, sample s = nb·B + b. Within a block, pixel (c, y, x)
// of a C×H×W image with halo h is at h·R + h + c·S + y·R + x, with row stride R = W + h and plane stride S =
// (H + h)·R, and P = h·R + h + C·S. Every place that is no pixel is zero: the halo is shared between
// neighbouring rows and planes, so a convolution reads over a border without asking. With h = 0 the stack is
// the plain [C, H, W] array.
//
// In half precision (kernels/half.h) the same tensor holds bfloat16 in pairs of pixels, [pair][B][2], or on ARM FP16 pixel
// after pixel, and uses about half of its memory: rows begin at an even pixel (R and the first pixel are rounded up to even
// numbers), so that the pixels 2i and 2i + 1 of a row are a pair. A place that is no pixel is zero there, too. Offsets then count numbers of two bytes. Of one pixel without halo, a
// vector, the pairs are of channels: as with a plain [C, H, W] array whose rows are of an even width, the flattened form of a
// map is the map itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "kernels/half.h"
#include "ops/op.h"

namespace edge_bcs {

inline constexpr std::int64_t most_lanes = 64;  // of a stack

// Pixels of a row of a stack in half precision, at most. Rows are widened on the thread's stack, so that a microcontroller,
// which has no half precision, asks for none.
#ifndef EDGE_BCS_MOST_HALF_WIDTH
#define EDGE_BCS_MOST_HALF_WIDTH 512
#endif
inline constexpr std::int64_t most_half_width = EDGE_BCS_MOST_HALF_WIDTH;

// The geometry of one stack; sizes in pixels, except `lanes`.
struct Stack {
  std::int64_t channels = 1;
  std::int64_t height = 1;
  std::int64_t width = 1;
  std::int64_t halo = 0;
  std::int64_t lanes = 1;
  bool half = false;  // see above

  // Reads attributes "<prefix>channels", "<prefix>height", "<prefix>width", "<prefix>halo" and "lanes".
  static Stack from(const Attributes& attributes, const std::string& prefix) {
    return from(attributes, prefix, prefix + "halo");
  }

  // The same with the halo under a name of its own.
  static Stack from(const Attributes& attributes, const std::string& prefix, const std::string& halo) {
    const auto read = [&](const std::string& name) { return attributes.integer(name.c_str()); };
    return checked(read(prefix + "channels"), read(prefix + "height"), read(prefix + "width"), read(halo),
                   read("lanes"), attributes.half());
  }

  // A geometry whose sizes are all in range; throws Error otherwise.
  static Stack checked(std::int64_t channels, std::int64_t height, std::int64_t width, std::int64_t halo,
                       std::int64_t lanes, bool half = false) {
    constexpr std::int64_t side = 1 << 14;
    require(channels >= 1 && channels < (1 << 23), "a stack has ", channels, " channels, not in [1, 2^23)");
    require(height >= 1 && height <= side && width >= 1 && width <= side, "a stack's image is ", height,
            " by ", width, " pixels, not in [1, ", side, "]");
    require(halo >= 0 && halo <= 256, "a stack's halo is ", halo, ", not in [0, 256]");
    require(lanes >= 1 && lanes <= most_lanes, "a stack has ", lanes, " lanes, not in [1, ", most_lanes, "]");
    require(!half || ((lanes == 8 || lanes == 16) && width <= most_half_width),
            "half precision takes 8 or 16 lanes and rows of at most ", most_half_width, " pixels, not ",
            lanes, " and ", width);
    return {channels, height, width, halo, lanes, half};
  }

  // The same image with another halo.
  Stack with_halo(std::int64_t other) const { return checked(channels, height, width, other, lanes, half); }
  // The same image as float32.
  Stack in_full() const { return {channels, height, width, halo, lanes, false}; }

  // Whether pairs are of channels.
  bool vector() const { return half && halo == 0 && height == 1 && width == 1; }

  // R, and pixel (0, 0, 0)
  std::int64_t row_stride() const { return vector() ? 1 : even(width + halo); }
  std::int64_t origin() const { return even(halo * row_stride() + halo); }
  std::int64_t plane_stride() const { return (height + halo) * row_stride(); }        // S, pixels
  std::int64_t pixels() const { return even(origin() + channels * plane_stride()); }  // P
  std::int64_t block() const { return pixels() * lanes; }  // numbers of one batch block
  std::int64_t row() const { return width * lanes; }       // numbers of one image row
  std::int64_t pixel(std::int64_t c, std::int64_t y, std::int64_t x) const {
    return origin() + c * plane_stride() + y * row_stride() + x;
  }
  // Offset in numbers of pixel (c, y, x) of batch block nb; in half precision x is even.
  std::int64_t at(std::int64_t nb, std::int64_t c, std::int64_t y, std::int64_t x = 0) const {
    return nb * block() + pixel(c, y, x) * lanes;
  }

  // `place` and so many numbers.
  template <class T>
  T* ahead(T* place, std::int64_t numbers) const {
    if (!half) return place + numbers;
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(place) + 2 * numbers);
  }
  // Row y of channel c of batch block nb: where its first number is. Of a vector, the others are half_image_step apart.
  template <class T>
  T* row(T* data, std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return ahead(data, vector() ? at(nb, c - c % 2, 0) + c % 2 * half_second_pixel(lanes) : at(nb, c, y));
  }

  // Of the tensor, whichever precision it is in.
  Shape shape(std::int64_t blocks) const { return {blocks, in_full().pixels(), lanes}; }

  // Checks that a tensor is a stack of this geometry and returns its number of batch blocks.
  template <class T>
  std::int64_t blocks(const Tensor<T>& tensor, const char* name) const {
    const std::int64_t count = in_full().pixels();
    require(
        tensor.shape().rank() == 3 && tensor.dim(0) >= 1 && tensor.dim(1) == count && tensor.dim(2) == lanes,
        name, " is ", tensor.shape().text(), ", not a stack [blocks, ", count, ", ", lanes, "]");
    return tensor.dim(0);
  }

  // Checks that a tensor is a stack of this geometry with the given number of batch blocks.
  template <class T>
  void check(const Tensor<T>& tensor, std::int64_t blocks, const char* name) const {
    require(tensor.shape() == shape(blocks), name, " is ", tensor.shape().text(), ", not ",
            shape(blocks).text());
  }

  // Zeroes the halo in front of the first plane of a batch block; of a vector, what its last channel has no partner in.
  void zero_front(float* block_start) const {
    zero(block_start, origin() * lanes);
    if (vector() && channels % 2 != 0) zero_seconds(ahead(block_start, (channels - 1) * lanes));
  }

  // Zeroes the halo after row y of channel c; after the last row also the halo rows below it.
  void zero_after_row(float* block_start, std::int64_t c, std::int64_t y) const {
    if (vector()) return;
    std::int64_t first = width, count = row_stride() - width + (y == height - 1 ? halo * row_stride() : 0);
    if (half && width % 2 != 0) {
      // The other half of the last pixel's pair.
      zero_seconds(ahead(block_start, (pixel(c, y, 0) + width - 1) * lanes));
      ++first;
      --count;
    }
    if (count > 0) zero(ahead(block_start, (pixel(c, y, 0) + first) * lanes), count * lanes);
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

 private:
  std::int64_t even(std::int64_t pixels) const { return half ? pixels + pixels % 2 : pixels; }
  // Zeroes the second halves of a pair.
  void zero_seconds(float* pair) const {
    auto* const numbers = reinterpret_cast<std::uint16_t*>(pair);
    for (std::int64_t b = 0; b < lanes; ++b) numbers[half_second_pixel(lanes) + half_image_step * b] = 0;
  }
  void zero(float* from, std::int64_t numbers) const {
    std::memset(from, 0, static_cast<std::size_t>(numbers) * (half ? 2 : sizeof(float)));
  }
};

// The input and the output of an operator whose maps are of different sizes; both have the same channels.
struct Maps {
  Stack in, out;

  explicit Maps(const Attributes& attributes) {
    const auto read = [&](const char* name) { return attributes.integer(name); };
    in = Stack::checked(read("channels"), read("in_height"), read("in_width"), read("in_halo"), read("lanes"),
                        attributes.half());
    out = Stack::checked(in.channels, read("out_height"), read("out_width"), read("out_halo"), in.lanes,
                         in.half);
  }
};

}  // namespace edge_bcs
