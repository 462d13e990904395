// Products: of two stacks, of a stack and a number for each of its channels (squeeze-and-excite), and of a stack and a
// constant; and their gradients.

#include <algorithm>

#include "ops/lanes.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// The factor of a product: a stack of the same geometry, or one of a pixel, whose number of a channel and an image counts
// for the whole plane.
class Factor {
 public:
  Factor(const Tensor<const float>& tensor, const Stack& stack, std::int64_t blocks, const char* name)
      : stack_(stack), data_(tensor.data()) {
    stack.check(tensor, blocks, name);
  }

  // out = a · factor, for the `count` floats of row y of channel c of batch block nb.
  void times(const float* a, std::int64_t count, float* out, std::int64_t nb, std::int64_t c,
             std::int64_t y) const {
    if (stack_.row() == count) {
      const float* const factor = data_ + stack_.at(nb, c, stack_.height == 1 ? 0 : y);
      for (std::int64_t j = 0; j < count; ++j) out[j] = a[j] * factor[j];
      return;
    }
    with_lanes(stack_.lanes, [&](auto lanes) {
      std::array<float, most_lanes> factor;
      std::copy_n(data_ + stack_.at(nb, c, 0), lanes, factor.data());
      for (std::int64_t j = 0; j < count; j += lanes)
        for (std::int64_t b = 0; b < lanes; ++b) out[j + b] = a[j + b] * factor[b];
    });
  }

 private:
  Stack stack_;
  const float* data_;
};

// The geometry of the factor, with the halo that an attribute names.
Stack factor_stack(const Attributes& attributes, const Stack& map, bool each_channel, const char* halo) {
  const std::int64_t around = attributes.integer(halo);
  return each_channel ? Stack::checked(map.channels, 1, 1, around, map.lanes) : map.with_halo(around);
}

// y = a∘b
template <bool each_channel>
struct Product {
  static constexpr std::array inputs{Port{"a", float32}, Port{"b", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  Stack a_stack, b_stack, out;

  explicit Product(const Attributes& attributes)
      : a_stack(Stack::from(attributes, "", "a_halo")),
        b_stack(factor_stack(attributes, a_stack, each_channel, "b_halo")),
        out(Stack::from(attributes, "", "out_halo")) {}

  void compute(Context& context) const {
    const auto a = context.input<float>(0);
    const std::int64_t blocks = a_stack.blocks(a, "a");
    const Factor b(context.input<float>(1), b_stack, blocks, "b");
    const auto y = context.output<float>(0, out.shape(blocks));
    write_rows(context, out, y.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t i) {
      b.times(a.data() + a_stack.at(nb, c, i), out.row(), row, nb, c, i);
    });
  }
};

// dx = mask∘(dy∘other + addend), where `other` is what the forward pass has multiplied x with.
template <bool each_channel>
struct ProductGrad {
  static constexpr std::array inputs{Port{"dy", float32}, Port{"other", float32},
                                     Port{"addend", float32, optional}, Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  InputGradient gradient;
  Stack other_stack;

  explicit ProductGrad(const Attributes& attributes)
      : gradient(attributes),
        other_stack(factor_stack(attributes, gradient.dy, each_channel, "other_halo")) {}

  void compute(Context& context) const {
    const Stack &from = gradient.dy, &to = gradient.dx;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = from.blocks(dy, "dy");
    const Factor other(context.input<float>(1), other_stack, blocks, "other");
    const Finish finish = gradient.finish(context, 2, 3, blocks);
    const auto dx = context.output<float>(0, to.shape(blocks));
    write_rows(context, to, dx.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t y) {
      other.times(dy.data() + from.at(nb, c, y), to.row(), row, nb, c, y);
      finish(row, 1, 0, row, nb, c, y);
    });
  }
};

struct Multiply : Product<false> {
  static constexpr const char* name = "Multiply";
  using Product::Product;
};
const Register<Multiply> multiply;

struct MultiplyGrad : ProductGrad<false> {
  static constexpr const char* name = "MultiplyGrad";
  using ProductGrad::ProductGrad;
};
const Register<MultiplyGrad> multiply_grad;

struct Gate : Product<true> {
  static constexpr const char* name = "Gate";
  using Product::Product;
};
const Register<Gate> gate;

struct GateInputGrad : ProductGrad<true> {
  static constexpr const char* name = "GateInputGrad";
  using ProductGrad::ProductGrad;
};
const Register<GateInputGrad> gate_input_grad;

// dx = mask∘(Σ over the pixels of dy∘a + addend), the gradient of a gate's factor.
struct GateFactorGrad {
  static constexpr const char* name = "GateFactorGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"a", float32},
                                     Port{"addend", float32, optional}, Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Stack dy_stack, a_stack;
  InputGradient gradient;

  explicit GateFactorGrad(const Attributes& attributes)
      : dy_stack(Stack::from(attributes, "", "dy_halo")),
        a_stack(dy_stack.with_halo(attributes.integer("a_halo"))),
        gradient(attributes, dy_stack, factor_stack(attributes, dy_stack, true, "dx_halo")) {}

  void compute(Context& context) const {
    const Stack& to = gradient.dx;
    const auto dy = context.input<float>(0), a = context.input<float>(1);
    const std::int64_t blocks = dy_stack.blocks(dy, "dy");
    a_stack.check(a, blocks, "a");
    const Finish finish = gradient.finish(context, 2, 3, blocks);
    const auto dx = context.output<float>(0, to.shape(blocks));
    for_planes(context, blocks, to.channels, [&](std::int64_t nb, std::int64_t c) {
      LaneSums sums(to.lanes);
      for (std::int64_t y = 0; y < dy_stack.height; ++y)
        sums.add(dy.data() + dy_stack.at(nb, c, y), a.data() + a_stack.at(nb, c, y), dy_stack.row());
      std::array<double, most_lanes> totals;
      sums.write(totals.data());
      float* const pixel = dx.data() + to.at(nb, c, 0);
      for (std::int64_t b = 0; b < to.lanes; ++b) pixel[b] = static_cast<float>(totals[b]);
      finish(pixel, 1, 0, pixel, nb, c, 0);
      to.zero_halo(dx.data() + nb * to.block(), c);
    });
  }
};
const Register<GateFactorGrad> gate_factor_grad;

// y = factor·x + offset
struct Rescale {
  static constexpr const char* name = "Rescale";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  Stack in, out;
  float factor, offset;

  explicit Rescale(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        factor(attributes.real("factor")),
        offset(attributes.real("offset")) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto y = context.output<float>(0, out.shape(blocks));
    const Finish finish{.count = out.row()};
    write_rows(context, out, y.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t i) {
      finish(x.data() + in.at(nb, c, i), factor, offset, row, nb, c, i);
    });
  }
};
const Register<Rescale> rescale;

// dx = mask∘(factor·dy + addend)
struct RescaleGrad {
  static constexpr const char* name = "RescaleGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"addend", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  InputGradient gradient;
  float factor;

  explicit RescaleGrad(const Attributes& attributes)
      : gradient(attributes), factor(attributes.real("factor")) {}

  void compute(Context& context) const {
    const Stack &from = gradient.dy, &to = gradient.dx;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = from.blocks(dy, "dy");
    const Finish finish = gradient.finish(context, 1, 2, blocks);
    const auto dx = context.output<float>(0, to.shape(blocks));
    write_rows(context, to, dx.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t y) {
      finish(dy.data() + from.at(nb, c, y), factor, 0, row, nb, c, y);
    });
  }
};
const Register<RescaleGrad> rescale_grad;

}  // namespace
}  // namespace edge_bcs
