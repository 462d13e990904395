// What operators share that work row by row: planes in parallel, additions, activations, what is kept of them, gradients of
// inputs.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "kernels/activation.h"
#include "ops/dispatch.h"
#include "ops/op.h"
#include "ops/stack.h"

namespace edge_bcs {

// Calls body(nb, c) for every channel of every batch block, in parallel.
template <class Body>
void for_planes(const Context& context, std::int64_t blocks, std::int64_t channels, const Body& body) {
  context.parallel_for(blocks * channels, [&](std::int64_t i) { body(i / channels, i % channels); });
}

// Numbers of a stack in half precision.
inline const std::uint16_t* half_numbers(const float* row) {
  return reinterpret_cast<const std::uint16_t*>(row);
}
inline std::uint16_t* half_numbers(float* row) { return reinterpret_cast<std::uint16_t*>(row); }

// Pixels [first, first + count) of a row (`Stack::row`) in half precision as floats, and a row from floats.
inline void widen_row(const Stack& stack, const float* row, std::int64_t first, std::int64_t count,
                      float* to) {
  if (!stack.vector()) return half_kernels().widen(half_numbers(row), stack.lanes, first, count, to);
  for (std::int64_t b = 0; b < stack.lanes; ++b) to[b] = from_half(half_numbers(row)[half_image_step * b]);
}
inline void narrow_row(const Stack& stack, const float* from, float* row) {
  if (!stack.vector()) return half_kernels().narrow(from, stack.lanes, stack.width, half_numbers(row));
  for (std::int64_t b = 0; b < stack.lanes; ++b) half_numbers(row)[half_image_step * b] = to_half(from[b]);
}

// A row of a stack as floats, which the kernels of rows take: where it lies or, in half precision, widened to a place of its
// own.
class WideRow {
 public:
  // `row`, of the stack; null stays null.
  const float* of(const Stack& stack, const float* row) {
    return row == nullptr ? row : part(stack, row, 0, stack.width);
  }
  // Pixels [first, first + count) of it.
  const float* part(const Stack& stack, const float* row, std::int64_t first, std::int64_t count) {
    if (!stack.half) return row + first * stack.lanes;
    widen_row(stack, row, first, count, numbers_);
    return numbers_;
  }
  // Where to write floats that `put` makes the row.
  float* to(const Stack& stack, float* row) { return stack.half && row != nullptr ? numbers_ : row; }
  void put(const Stack& stack, float* row) const {
    if (stack.half && row != nullptr) narrow_row(stack, numbers_, row);
  }

 private:
  alignas(64) float numbers_[most_half_width * 16];
};

// Calls body(row, nb, c, y) for every row of the stack `to` at `out`, which it writes as floats, and zeroes the halo; planes in
// parallel.
template <class Body>
void write_rows(const Context& context, const Stack& to, float* out, std::int64_t blocks, const Body& body) {
  for_planes(context, blocks, to.channels, [&](std::int64_t nb, std::int64_t c) {
    WideRow wide;
    for (std::int64_t y = 0; y < to.height; ++y) {
      float* const row = to.row(out, nb, c, y);
      body(wide.to(to, row), nb, c, y);
      wide.put(to, row);
    }
    to.zero_halo(to.ahead(out, nb * to.block()), c);
  });
}

// The names under which files know activations, in the order of Function.
inline constexpr const char* function_names[] = {"none",        "relu",    "relu6",    "leaky_relu",
                                                 "hardsigmoid", "sigmoid", "tanh",     "hardswish",
                                                 "silu",        "gelu",    "gelu_tanh"};

// The activation that attribute `name` names, with the slope of attribute `slope`.
inline Activation activation_from(const Attributes& attributes, const char* name, const char* slope,
                                  Function otherwise) {
  const std::string text = attributes.text(name, function_names[static_cast<std::size_t>(otherwise)]);
  for (std::size_t i = 0; i < std::size(function_names); ++i) {
    if (text != function_names[i]) continue;
    const Activation found{static_cast<Function>(i), attributes.real(slope, 0)};
    require(std::isfinite(found.slope), "attribute ", slope, " is not finite");
    return found;
  }
  fail("attribute ", name, " is \"", text, "\", which is no activation");
}

// What an operator does to its result: the attributes activation and slope. Older files have relu, 0 or 1.
inline Activation activation_from(const Attributes& attributes) {
  return activation_from(attributes, "activation", "slope",
                         attributes.flag("relu", false) ? Function::relu : Function::none);
}

// What the derivative of the activation before a gradient is made from: of nothing (there is none), of a stack (the
// activation's result or, where that does not tell, what it was applied to), or of bits. Attributes mask_kind (0, 1 or 2),
// for a stack mask_halo, and mask_activation (relu if it is not there) with mask_slope.
class Mask {
 public:
  Mask() = default;  // of nothing

  // The mask as an operator's attributes describe it; `image` is the geometry of the gradient that is masked.
  class Description {
   public:
    Description(const Attributes& attributes, const Stack& image)
        : kind_(attributes.integer_in("mask_kind", 0, 2, 0)),
          activation_(activation_from(attributes, "mask_activation", "mask_slope", Function::relu)),
          stack_(image.with_halo(attributes.integer_in("mask_halo", 0, 256, 0))) {
      require(activation_.function != Function::none, "attribute mask_activation is \"none\"");
      require(kind_ != 2 || has_slopes(activation_.function),
              "mask_kind is 2, but bits do not tell the derivative of ",
              function_names[static_cast<std::size_t>(activation_.function)]);
    }

    // Checks input `index` of a call whose stacks have `blocks` batch blocks.
    Mask bind(const Context& context, std::size_t index, std::int64_t blocks) const {
      Mask mask;
      mask.stack_ = stack_;
      mask.activation_ = activation_;
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
    Activation activation_;
    Stack stack_;
  };

  // Row y of channel c of batch block nb of the stack and of the bits; null where there is none.
  const float* values(std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return values_ == nullptr ? nullptr : stack_.row(values_, nb, c, y);
  }
  const std::uint8_t* bits(std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return bits_ == nullptr ? nullptr : bits_ + stack_.bits_at(nb, c, y);
  }
  const Stack& stack() const { return stack_; }
  const Activation& activation() const { return activation_; }

 private:
  Stack stack_;
  Activation activation_{Function::relu};
  const float* values_ = nullptr;
  const std::uint8_t* bits_ = nullptr;
};

// An optional stack that is added to another; absent, it adds nothing.
class Addend {
 public:
  Addend() = default;
  Addend(const Tensor<const float>& tensor, const Stack& stack, std::int64_t blocks, const char* name)
      : stack_(stack), data_(tensor.data()) {
    if (tensor) stack.check(tensor, blocks, name);
  }

  // Row y of channel c of batch block nb; null where there is none.
  const float* row(std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return data_ == nullptr ? nullptr : stack_.row(data_, nb, c, y);
  }
  const Stack& stack() const { return stack_; }

 private:
  Stack stack_;
  const float* data_ = nullptr;
};

// The optional output of an activation's bits; absent, nothing is written.
class Bits {
 public:
  Bits() = default;
  Bits(const Context& context, std::size_t output, const Stack& stack, std::int64_t blocks)
      : stack_(stack), data_(context.output<std::uint8_t>(output, stack.bits_shape(blocks)).data()) {}

  // Row y of channel c of batch block nb; null where there is none.
  std::uint8_t* row(std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return data_ == nullptr ? nullptr : data_ + stack_.bits_at(nb, c, y);
  }

 private:
  Stack stack_;
  std::uint8_t* data_ = nullptr;
};

// The optional output of what an activation is applied to, a stack with the halo of attribute pre_halo; absent, nothing is
// written.
class Pre {
 public:
  Pre() = default;
  Pre(const Context& context, std::size_t output, const Stack& stack, std::int64_t blocks)
      : stack_(stack), data_(context.output<float>(output, stack.shape(blocks)).data()) {}

  // Its geometry beside the result's.
  static Stack geometry(const Attributes& attributes, const Stack& result) {
    return result.with_halo(attributes.integer_in("pre_halo", 0, 256, 0));
  }

  // Row y of channel c of batch block nb; null where there is none.
  float* row(std::int64_t nb, std::int64_t c, std::int64_t y) const {
    return data_ == nullptr ? nullptr : stack_.row(data_, nb, c, y);
  }
  void zero_halo(std::int64_t nb, std::int64_t c) const {
    if (data_ != nullptr) stack_.zero_halo(stack_.ahead(data_, nb * stack_.block()), c);
  }
  const Stack& stack() const { return stack_; }

 private:
  Stack stack_;
  float* data_ = nullptr;
};

// What an operator does to each row that it has computed.
struct Finish {
  std::int64_t count;  // floats of a row
  Addend addend{};
  Mask mask{};
  Activation activation{};
  Bits bits{};
  Pre pre{};

  // out = act'(mask) · act(scale · a + shift + addend), and what is kept of it, for row y of channel c of batch block nb; `a`
  // may be `out`. Both are floats, whatever the stacks are.
  void operator()(const float* a, float scale, float shift, float* out, std::int64_t nb, std::int64_t c,
                  std::int64_t y) const {
    const Row row = row_of(a, scale, shift, out, nb, c, y);
    if (addend.stack().half || mask.stack().half || pre.stack().half) return in_half(row);
    row_kernels().combine(row);
  }

  // Whether it does anything to a row of scale 1 and shift 0.
  bool changes() const {
    return addend.row(0, 0, 0) != nullptr || mask.values(0, 0, 0) != nullptr ||
           mask.bits(0, 0, 0) != nullptr || activation.function != Function::none ||
           bits.row(0, 0, 0) != nullptr || pre.row(0, 0, 0) != nullptr;
  }

  // Zeroes the halos of plane c of batch block nb of the stack `to` at `out` and of `pre`.
  void zero_halo(const Stack& to, float* out, std::int64_t nb, std::int64_t c) const {
    to.zero_halo(to.ahead(out, nb * to.block()), c);
    pre.zero_halo(nb, c);
  }

  // The same for every row of every batch block, from the stack `in` at `a` to the stack `to` at `out`, and zeros in its
  // halo. Scales and shifts are those of the channels; null: 1 and 0.
  void all(const Context& context, const Stack& in, const float* a, const float* scales, const float* shifts,
           const Stack& to, float* out, std::int64_t blocks) const {
    const bool simple = only_relu(activation, mask.activation()) && pre.row(0, 0, 0) == nullptr;
    const HalfRowKernels* const where_it_lies = to.half && !to.vector() && simple ? half_rows() : nullptr;
    for_planes(context, blocks, to.channels, [&](std::int64_t nb, std::int64_t c) {
      const float scale = scales == nullptr ? 1 : scales[c], shift = shifts == nullptr ? 0 : shifts[c];
      WideRow from, result;
      for (std::int64_t y = 0; y < to.height; ++y) {
        float* const row = to.row(out, nb, c, y);
        if (where_it_lies != nullptr) {
          where_it_lies->combine(row_of(in.row(a, nb, c, y), scale, shift, row, nb, c, y), to.lanes,
                                 to.width);
          continue;
        }
        (*this)(from.of(in, in.row(a, nb, c, y)), scale, shift, result.to(to, row), nb, c, y);
        result.put(to, row);
      }
      zero_halo(to, out, nb, c);
    });
  }

 private:
  Row row_of(const float* a, float scale, float shift, float* out, std::int64_t nb, std::int64_t c,
             std::int64_t y) const {
    return {.count = count,
            .a = a,
            .scale = scale,
            .shift = shift,
            .addend = addend.row(nb, c, y),
            .activation = activation,
            .pre = pre.row(nb, c, y),
            .through = mask.activation(),
            .mask = mask.values(nb, c, y),
            .mask_bits = mask.bits(nb, c, y),
            .out = out,
            .bits = bits.row(nb, c, y)};
  }

  // `row` with an addend, a mask or a `pre` in half precision.
  void in_half(Row row) const {
    WideRow added, masked, kept;
    float* const before = row.pre;
    row.addend = added.of(addend.stack(), row.addend);
    row.mask = masked.of(mask.stack(), row.mask);
    row.pre = kept.to(pre.stack(), before);
    row_kernels().combine(row);
    kept.put(pre.stack(), before);
  }
};

// How an operator passes a gradient to its input: dx = act'(mask) · (what it makes of dy, + addend).
struct InputGradient {
  Stack dy, dx;
  Mask::Description mask;

  InputGradient(const Attributes& attributes, const Stack& dy, const Stack& dx)
      : dy(dy), dx(dx), mask(attributes, dx) {}

  // Of an operator whose input and output have one geometry: attributes dy_halo and dx_halo.
  explicit InputGradient(const Attributes& attributes)
      : InputGradient(attributes, Stack::from(attributes, "", "dy_halo"),
                      Stack::from(attributes, "", "dx_halo")) {}

  // What is done to the rows of dx, from the optional inputs `addend_index` and `mask_index`.
  Finish finish(const Context& context, std::size_t addend_index, std::size_t mask_index,
                std::int64_t blocks) const {
    return {.count = dx.row(),
            .addend = Addend(context.input<float>(addend_index), dx, blocks, "addend"),
            .mask = mask.bind(context, mask_index, blocks)};
  }
};

}  // namespace edge_bcs
