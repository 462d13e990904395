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
  static constexpr std::array inputs{Port{"dy", float32}, Port{"affine", float32},
                                     Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional}};
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
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"x", float32},
                                     Port{"affine", float32},
                                     Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional},
                                     Port{"affine_grad", float32}};
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

// y = act(x). What is kept of it is x itself, so that there is no gradient operator: dx is the gradient of y, masked.
struct Activate {
  static constexpr const char* name = "Activate";
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

// y = x where it is positive, slope·x elsewhere; a bit for each element says which.
struct LeakyReLU {
  static constexpr const char* name = "LeakyReLU";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"signs", uint8, optional}};

  Stack in, out;
  float slope;

  explicit LeakyReLU(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        slope(attributes.real("slope")) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x"), count = in.row();
    const auto y = context.output<float>(0, out.shape(blocks));
    const Bits signs(context, 1, out, blocks);
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t row = 0; row < in.height; ++row) {
        const float* const from = x.data() + in.at(nb, c, row);
        float* const to = y.data() + out.at(nb, c, row);
        for (std::int64_t i = 0; i < count; ++i) to[i] = from[i] > 0 ? from[i] : slope * from[i];
        if (std::uint8_t* const bits = signs.row(nb, c, row)) {
          std::fill_n(bits, out.bit_row(), std::uint8_t{0});
          for (std::int64_t i = 0; i < count; ++i)
            bits[i / 8] |= static_cast<std::uint8_t>((from[i] > 0 ? 1u : 0u) << (i % 8));
        }
      }
      out.zero_halo(y.data() + nb * out.block(), c);
    });
  }
};
const Register<LeakyReLU> leaky_relu;

// dx = dy where the bit is set, slope·dy elsewhere.
struct LeakyReLUGrad {
  static constexpr const char* name = "LeakyReLUGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"signs", uint8}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Stack dy_stack, dx_stack;
  float slope;

  explicit LeakyReLUGrad(const Attributes& attributes)
      : dy_stack(Stack::from(attributes, "", "dy_halo")),
        dx_stack(Stack::from(attributes, "", "dx_halo")),
        slope(attributes.real("slope")) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const auto signs = context.input<std::uint8_t>(1);
    const std::int64_t blocks = dy_stack.blocks(dy, "dy");
    require(signs.shape() == dy_stack.bits_shape(blocks), "signs is ", signs.shape().text(), ", not ",
            dy_stack.bits_shape(blocks).text());
    const auto dx = context.output<float>(0, dx_stack.shape(blocks));
    for_planes(context, blocks, dy_stack.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t row = 0; row < dy_stack.height; ++row) {
        const float* const from = dy.data() + dy_stack.at(nb, c, row);
        const std::uint8_t* const bits = signs.data() + dy_stack.bits_at(nb, c, row);
        float* const to = dx.data() + dx_stack.at(nb, c, row);
        for (std::int64_t i = 0; i < dy_stack.row(); ++i)
          to[i] = (bits[i / 8] >> (i % 8)) & 1u ? from[i] : slope * from[i];
      }
      dx_stack.zero_halo(dx.data() + nb * dx_stack.block(), c);
    });
  }
};
const Register<LeakyReLUGrad> leaky_relu_grad;

// y = act(a + b)
struct Add {
  static constexpr const char* name = "Add";
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
    finish.all(context, a_stack, a.data(), nullptr, nullptr, out, y.data(), blocks);
  }
};
const Register<MaskedAdd> masked_add;

}  // namespace
}  // namespace edge_bcs
