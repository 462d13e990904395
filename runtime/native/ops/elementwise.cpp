// Operators that look at each element by itself: scale and shift, sums, and their gradients.

#include "ops/op.h"
#include "ops/slots.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// y = act(scale·x + shift)
struct Affine {
  static constexpr const char* name = "Affine";
  static constexpr std::array inputs{Port{"x", float32}, Port{"affine", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional}};

  Stack in, out;
  Slots slots;
  bool rectify;

  explicit Affine(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        slots(attributes, in.channels),
        rectify(attributes.flag("relu", false)) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto affine = slots.bind(context.input<float>(1));
    const auto y = context.output<float>(0, out.shape(blocks));
    const Finish finish{.count = out.row(), .relu = rectify, .bits = Bits(context, 1, out, blocks)};
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t row = 0; row < in.height; ++row)
        finish(x.data() + in.at(nb, c, row), affine.scale[c], affine.shift[c], y.data() + out.at(nb, c, row), nb, c,
               row);
      out.zero_halo(y.data() + nb * out.block(), c);
    });
  }
};
const Register<Affine> affine_op;

// The input gradient that both gradient operators give: dx = mask∘(scale·dy + addend).
struct InputGradient {
  Stack dy, dx;
  Slots slots;
  Mask::Description mask;

  explicit InputGradient(const Attributes& attributes)
      : dy(Stack::from(attributes, "", "dy_halo")),
        dx(Stack::from(attributes, "", "dx_halo")),
        slots(attributes, dy.channels),
        mask(attributes, dx) {}

  // `before`(y, dy's row y) is called before that row is used.
  template <class Before>
  void plane(const float* from, float* to, float scale, const Finish& finish, std::int64_t nb, std::int64_t c,
             const Before& before) const {
    for (std::int64_t y = 0; y < dy.height; ++y) {
      const float* row = from + dy.at(nb, c, y);
      before(y, row);
      finish(row, scale, 0, to + dx.at(nb, c, y), nb, c, y);
    }
    dx.zero_halo(to + nb * dx.block(), c);
  }
};

struct AffineInputGrad {
  static constexpr const char* name = "AffineInputGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"affine", float32},
                                     Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  InputGradient rule;

  explicit AffineInputGrad(const Attributes& attributes) : rule(attributes) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = rule.dy.blocks(dy, "dy");
    const auto affine = rule.slots.bind(context.input<float>(1));
    const Finish finish{.count = rule.dx.row(),
                        .addend = Addend(context.input<float>(2), rule.dx, blocks, "addend"),
                        .mask = rule.mask.bind(context, 3, blocks)};
    const auto dx = context.output<float>(0, rule.dx.shape(blocks));
    for_planes(context, blocks, rule.dy.channels, [&](std::int64_t nb, std::int64_t c) {
      rule.plane(dy.data(), dx.data(), affine.scale[c], finish, nb, c, [](std::int64_t, const float*) {});
    });
  }
};
const Register<AffineInputGrad> affine_input_grad;

// As AffineInputGrad, and dscale += Σ dy·x, dshift += Σ dy.
struct AffineGrad {
  static constexpr const char* name = "AffineGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"x", float32},
                                     Port{"affine", float32},
                                     Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional},
                                     Port{"affine_grad", float32}};
  static constexpr std::array outputs{Port{"dx", float32}, Port{"affine_grad_out", float32, aliases(5)}};

  InputGradient rule;
  Stack in;

  explicit AffineGrad(const Attributes& attributes)
      : rule(attributes), in(Stack::from(attributes, "", "in_halo")) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0), x = context.input<float>(1);
    const std::int64_t blocks = rule.dy.blocks(dy, "dy");
    in.check(x, blocks, "x");
    const auto affine = rule.slots.bind(context.input<float>(2));
    const Finish finish{.count = rule.dx.row(),
                        .addend = Addend(context.input<float>(3), rule.dx, blocks, "addend"),
                        .mask = rule.mask.bind(context, 4, blocks)};
    const Shape gradients = context.input<float>(5).shape();
    require(gradients == Shape{2 * affine.count}, "affine_grad is ", gradients.text(), ", not [",
            2 * affine.count, "]");
    const auto dx = context.output<float>(0, rule.dx.shape(blocks));
    const auto gradient = rule.slots.bind(context.in_place<float>(1, 5));
    // A channel is one piece of work, so that its sums are made in one order.
    context.parallel_for(in.channels, [&](std::int64_t c) {
      double dscale = 0, dshift = 0;
      for (std::int64_t nb = 0; nb < blocks; ++nb)
        rule.plane(dy.data(), dx.data(), affine.scale[c], finish, nb, c, [&](std::int64_t y, const float* row) {
          const RowSums sums = row_kernels().sums(row, x.data() + in.at(nb, c, y), in.row());
          dscale += sums.products;
          dshift += sums.values;
        });
      gradient.scale[c] += static_cast<float>(dscale);
      gradient.shift[c] += static_cast<float>(dshift);
    });
  }
};
const Register<AffineGrad> affine_grad;

// y = act(a + b)
struct Add {
  static constexpr const char* name = "Add";
  static constexpr std::array inputs{Port{"a", float32}, Port{"b", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional}};

  Stack a_stack, b_stack, out;
  bool rectify;

  explicit Add(const Attributes& attributes)
      : a_stack(Stack::from(attributes, "", "a_halo")),
        b_stack(Stack::from(attributes, "", "b_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        rectify(attributes.flag("relu", false)) {}

  void compute(Context& context) const {
    const auto a = context.input<float>(0);
    const std::int64_t blocks = a_stack.blocks(a, "a");
    const Addend b(context.input<float>(1), b_stack, blocks, "b");
    const auto y = context.output<float>(0, out.shape(blocks));
    const Finish finish{.count = out.row(), .addend = b, .relu = rectify, .bits = Bits(context, 1, out, blocks)};
    for_planes(context, blocks, out.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t i = 0; i < out.height; ++i)
        finish(a.data() + a_stack.at(nb, c, i), 1, 0, y.data() + out.at(nb, c, i), nb, c, i);
      out.zero_halo(y.data() + nb * out.block(), c);
    });
  }
};
const Register<Add> add;

// y = mask∘(a + b)
struct MaskedAdd {
  static constexpr const char* name = "MaskedAdd";
  static constexpr std::array inputs{Port{"a", float32}, Port{"b", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional}};
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
    for_planes(context, blocks, out.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t i = 0; i < out.height; ++i)
        finish(a.data() + a_stack.at(nb, c, i), 1, 0, y.data() + out.at(nb, c, i), nb, c, i);
      out.zero_halo(y.data() + nb * out.block(), c);
    });
  }
};
const Register<MaskedAdd> masked_add;

}  // namespace
}  // namespace edge_bcs
