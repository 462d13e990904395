// Operators that look at each element by itself: scale and shift, sums, and their gradients.

#include <algorithm>

#include "ops/op.h"
#include "ops/rows.h"
#include "ops/slots.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// y = act(scale·x + shift)
struct Affine {
  static constexpr const char* name = "Affine";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}, Port{"affine", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional},
                                      Port{"pre", float32, optional}};

  Stack in, out, pre;
  Slots slots;
  Activation activation;

  explicit Affine(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        pre(Pre::geometry(attributes, out)),
        slots(attributes, in.channels),
        activation(activation_from(attributes)) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto affine = slots.bind(context.input<float>(1), "affine");
    const auto y = context.output<float>(0, out.shape(blocks));
    const Finish finish{.count = out.row(),
                        .activation = activation,
                        .bits = Bits(context, 1, out, blocks),
                        .pre = Pre(context, 2, pre, blocks)};
    finish.all(context, in, x.data(), affine.scale, affine.shift, out, y.data(), blocks);
  }
};
const Register<Affine> affine_op;

// dx = act'(mask)·(scale·dy + addend)
struct AffineInputGrad {
  static constexpr const char* name = "AffineInputGrad";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"dy", float32}, Port{"affine", float32},
                                     Port{"addend", float32, optional}, Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  InputGradient gradient;
  Slots slots;

  explicit AffineInputGrad(const Attributes& attributes)
      : gradient(attributes), slots(attributes, gradient.dy.channels) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = gradient.dy.blocks(dy, "dy");
    const auto affine = slots.bind(context.input<float>(1), "affine");
    const Finish finish = gradient.finish(context, 2, 3, blocks);
    const auto dx = context.output<float>(0, gradient.dx.shape(blocks));
    finish.all(context, gradient.dy, dy.data(), affine.scale, nullptr, gradient.dx, dx.data(), blocks);
  }
};
const Register<AffineInputGrad> affine_input_grad;

// As AffineInputGrad, and dscale += Σ dy·x, dshift += Σ dy.
struct AffineGrad {
  static constexpr const char* name = "AffineGrad";
  static constexpr std::array inputs{Port{"dy", float32},         Port{"x", float32},
                                     Port{"affine", float32},     Port{"addend", float32, optional},
                                     Port{"mask", any, optional}, Port{"affine_grad", float32}};
  static constexpr std::array outputs{Port{"dx", float32}, Port{"affine_grad_out", float32, aliases(5)}};

  InputGradient gradient;
  Slots slots;
  Stack in;

  explicit AffineGrad(const Attributes& attributes)
      : gradient(attributes),
        slots(attributes, gradient.dy.channels),
        in(Stack::from(attributes, "", "in_halo")) {}

  void compute(Context& context) const {
    const Stack &from = gradient.dy, &to = gradient.dx;
    const auto dy = context.input<float>(0), x = context.input<float>(1);
    const std::int64_t blocks = from.blocks(dy, "dy");
    in.check(x, blocks, "x");
    const auto affine = slots.bind(context.input<float>(2), "affine");
    const Finish finish = gradient.finish(context, 3, 4, blocks);
    slots.bind(context.input<float>(5), "affine_grad");
    const auto dx = context.output<float>(0, to.shape(blocks));
    const auto sums = slots.bind(context.in_place<float>(1, 5), "affine_grad");
    // A channel is one piece of work, so that its sums are made in one order.
    context.parallel_for(in.channels, [&](std::int64_t c) {
      double dscale = 0, dshift = 0;
      for (std::int64_t nb = 0; nb < blocks; ++nb) {
        for (std::int64_t y = 0; y < from.height; ++y) {
          const float* const row = dy.data() + from.at(nb, c, y);
          const RowSums of_row = row_kernels().sums(row, x.data() + in.at(nb, c, y), in.row());
          dscale += of_row.products;
          dshift += of_row.values;
          finish(row, affine.scale[c], 0, dx.data() + to.at(nb, c, y), nb, c, y);
        }
        to.zero_halo(dx.data() + nb * to.block(), c);
      }
      sums.scale[c] += static_cast<float>(dscale);
      sums.shift[c] += static_cast<float>(dshift);
    });
  }
};
const Register<AffineGrad> affine_grad;

// dshift += Σ dy: the gradient of shifts where nothing else of their layer is trained.
struct ShiftGrad {
  static constexpr const char* name = "ShiftGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"affine_grad", float32}};
  static constexpr std::array outputs{Port{"affine_grad_out", float32, aliases(1)}};

  Stack from;
  Slots slots;

  explicit ShiftGrad(const Attributes& attributes)
      : from(Stack::from(attributes, "", "dy_halo")), slots(attributes, from.channels) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = from.blocks(dy, "dy");
    slots.bind(context.input<float>(1), "affine_grad");
    const auto sums = slots.bind(context.in_place<float>(0, 1), "affine_grad");
    // A channel is one piece of work, so that its sum is made in one order.
    context.parallel_for(from.channels, [&](std::int64_t c) {
      double sum = 0;
      for (std::int64_t nb = 0; nb < blocks; ++nb)
        for (std::int64_t y = 0; y < from.height; ++y) {
          const float* const row = dy.data() + from.at(nb, c, y);
          sum += row_kernels().sums(row, row, from.row()).values;
        }
      sums.shift[c] += static_cast<float>(sum);
    });
  }
};
const Register<ShiftGrad> shift_grad;

// y = act(x). What is kept of it is x itself, so that there is no gradient operator: dx is the gradient of y, masked.
struct Activate {
  static constexpr const char* name = "Activate";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional}};

  Stack in, out;
  Activation activation;

  explicit Activate(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        activation(activation_from(attributes)) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto y = context.output<float>(0, out.shape(blocks));
    const Finish finish{.count = out.row(), .activation = activation, .bits = Bits(context, 1, out, blocks)};
    finish.all(context, in, x.data(), nullptr, nullptr, out, y.data(), blocks);
  }
};
const Register<Activate> activate;

// y = act(a + b)
struct Add {
  static constexpr const char* name = "Add";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"a", float32}, Port{"b", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional},
                                      Port{"pre", float32, optional}};

  Stack a_stack, b_stack, out, pre;
  Activation activation;

  explicit Add(const Attributes& attributes)
      : a_stack(Stack::from(attributes, "", "a_halo")),
        b_stack(Stack::from(attributes, "", "b_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        pre(Pre::geometry(attributes, out)),
        activation(activation_from(attributes)) {}

  void compute(Context& context) const {
    const auto a = context.input<float>(0);
    const std::int64_t blocks = a_stack.blocks(a, "a");
    const Addend b(context.input<float>(1), b_stack, blocks, "b");
    const auto y = context.output<float>(0, out.shape(blocks));
    const Finish finish{.count = out.row(),
                        .addend = b,
                        .activation = activation,
                        .bits = Bits(context, 1, out, blocks),
                        .pre = Pre(context, 2, pre, blocks)};
    finish.all(context, a_stack, a.data(), nullptr, nullptr, out, y.data(), blocks);
  }
};
const Register<Add> add;

// y = act'(mask)·(a + b)
struct MaskedAdd {
  static constexpr const char* name = "MaskedAdd";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"a", float32}, Port{"b", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"y", float32}};

  Stack a_stack, b_stack, out;
  Mask::Description mask;

  explicit MaskedAdd(const Attributes& attributes)
      : a_stack(Stack::from(attributes, "", "a_halo")),
        b_stack(a_stack.with_halo(attributes.integer_in("b_halo", 0, 256, 0))),
        out(Stack::from(attributes, "", "out_halo")),
        mask(attributes, out) {}

  void compute(Context& context) const {
    const auto a = context.input<float>(0);
    const std::int64_t blocks = a_stack.blocks(a, "a");
    const Addend b(context.input<float>(1), b_stack, blocks, "b");
    const Finish finish{.count = out.row(), .addend = b, .mask = mask.bind(context, 2, blocks)};
    const auto y = context.output<float>(0, out.shape(blocks));
    finish.all(context, a_stack, a.data(), nullptr, nullptr, out, y.data(), blocks);
  }
};
const Register<MaskedAdd> masked_add;

}  // namespace
}  // namespace edge_bcs
