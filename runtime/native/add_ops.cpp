// Sums of two stacks: residual connections, and joins of gradients.

#include "op.h"
#include "rows.h"
#include "stack.h"

namespace edge_bcs {
namespace {

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
