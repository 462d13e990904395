// What the elementwise operators share: work on planes in parallel, ReLU masks, ReLU bits.
#pragma once

#include <array>
#include <cstdint>

#include "op.h"
#include "stack.h"

namespace edge_bcs {

// Calls body(nb, c) for every channel of every batch block, in parallel.
template <class Body>
void for_planes(const Context& context, std::int64_t blocks, std::int64_t channels, const Body& body) {
  context.parallel_for(blocks * channels, [&](std::int64_t i) { body(i / channels, i % channels); });
}

// bits[j / 8] bit j % 8 = row[j] > 0, for j in [0, count); the bits after the last are 0.
inline void write_bits(const float* row, std::int64_t count, std::uint8_t* bits) {
  std::int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    unsigned byte = 0;
    for (int k = 0; k < 8; ++k) byte |= static_cast<unsigned>(row[j + k] > 0) << k;
    *bits++ = static_cast<std::uint8_t>(byte);
  }
  if (j < count) {
    unsigned byte = 0;
    for (int k = 0; j + k < count; ++k) byte |= static_cast<unsigned>(row[j + k] > 0) << k;
    *bits = static_cast<std::uint8_t>(byte);
  }
}

// Where a gradient passes the ReLU before it: everywhere, or where a stack (the ReLU's output) is positive,
// or where a bit is set. Attributes mask_kind (0, 1 or 2) and, for a stack, mask_halo.
class Mask {
 public:
  // The mask as an operator's attributes describe it; `image` is the geometry of the gradient that is masked.
  class Description {
   public:
    Description(const Attributes& attributes, const Stack& image)
        : kind_(attributes.integer_in("mask_kind", 0, 2, 0)),
          stack_(image.with_halo(attributes.integer_in("mask_halo", 0, 256, 0))) {}

    // Checks input `index` of a call whose stacks have `blocks` batch blocks.
    Mask bind(const Context& context, std::size_t index, std::int64_t blocks) const {
      Mask mask(stack_);
      if (kind_ == 1) {
        const auto tensor = context.input<float>(index);
        require(static_cast<bool>(tensor), "mask_kind is 1 but there is no mask");
        stack_.check(tensor, blocks, "mask");
        mask.values_ = tensor.data();
      } else if (kind_ == 2) {
        const auto tensor = context.input<std::uint8_t>(index);
        require(static_cast<bool>(tensor), "mask_kind is 2 but there is no mask");
        require(tensor.shape() == stack_.bits_shape(blocks), "mask is ", tensor.shape().text(), ", not ",
                stack_.bits_shape(blocks).text());
        mask.bits_ = tensor.data();
      }
      return mask;
    }

   private:
    std::int64_t kind_;
    Stack stack_;
  };

  // Zeroes the elements of a row (the W·B floats of row y of channel c of batch block nb) that the mask
  // stops.
  void apply(float* row, std::int64_t nb, std::int64_t c, std::int64_t y) const {
    const std::int64_t count = stack_.row();
    if (values_ != nullptr) {
      const float* mask = values_ + stack_.at(nb, c, y);
      for (std::int64_t j = 0; j < count; ++j) row[j] = mask[j] > 0 ? row[j] : 0.0f;
    } else if (bits_ != nullptr) {
      static constexpr std::array<std::uint32_t, 8> bit{1, 2, 4, 8, 16, 32, 64, 128};
      const std::uint8_t* mask = bits_ + stack_.bits_at(nb, c, y);
      std::int64_t j = 0;
      for (; j + 8 <= count; j += 8) {
        const std::uint32_t byte = *mask++;
        for (int k = 0; k < 8; ++k) row[j + k] = (byte & bit[k]) != 0 ? row[j + k] : 0.0f;
      }
      for (int k = 0; j + k < count; ++k)
        if ((*mask & bit[k]) == 0) row[j + k] = 0.0f;
    }
  }

 private:
  explicit Mask(const Stack& stack) : stack_(stack) {}

  Stack stack_;
  const float* values_ = nullptr;
  const std::uint8_t* bits_ = nullptr;
};

// An optional stack that is added to another; absent, it adds nothing.
class Addend {
 public:
  Addend(const Tensor<const float>& tensor, const Stack& stack, std::int64_t blocks, const char* name)
      : stack_(stack), data_(tensor.data()) {
    if (tensor) stack.check(tensor, blocks, name);
  }

  // Adds row y of channel c of batch block nb.
  void add(float* row, std::int64_t nb, std::int64_t c, std::int64_t y) const {
    if (data_ == nullptr) return;
    const float* other = data_ + stack_.at(nb, c, y);
    for (std::int64_t j = 0; j < stack_.row(); ++j) row[j] += other[j];
  }

 private:
  Stack stack_;
  const float* data_;
};

// The optional output of ReLU bits; absent, nothing is written.
class Bits {
 public:
  Bits(const Context& context, std::size_t output, const Stack& stack, std::int64_t blocks)
      : stack_(stack), data_(context.output<std::uint8_t>(output, stack.bits_shape(blocks)).data()) {}

  // Writes the bits of row y of channel c of batch block nb.
  void write(const float* row, std::int64_t nb, std::int64_t c, std::int64_t y) const {
    if (data_ != nullptr) write_bits(row, stack_.row(), data_ + stack_.bits_at(nb, c, y));
  }

 private:
  Stack stack_;
  std::uint8_t* data_;
};

inline void relu(float* row, std::int64_t count) {
  for (std::int64_t j = 0; j < count; ++j) row[j] = row[j] < 0 ? 0.0f : row[j];
}

}  // namespace edge_bcs
