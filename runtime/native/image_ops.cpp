// Where plain tensors meet stacks: the input, the logits, and the attack's step.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "op.h"
#include "rows.h"
#include "stack.h"

namespace edge_bcs {
namespace {

bool is_finite(float x) { return std::abs(x) <= std::numeric_limits<float>::max(); }

// Whether all of `count` numbers are finite, seen in their exponents so that the compiler can use vectors.
bool all_finite(const float* numbers, std::int64_t count) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i)
    largest = std::max(largest, std::bit_cast<std::uint32_t>(numbers[i]) & 0x7fffffffu);
  return largest < 0x7f800000u;
}

// Pixels of a row that are turned at once, between images side by side in a stack and one after the other.
constexpr std::int64_t turned_pixels = 16;
using Turned = float[64][turned_pixels];

// The geometry of a stack that holds f32 [n, C, H, W], and its number of batch blocks.
struct Batch {
  Stack stack;
  std::int64_t blocks;

  Batch(const Shape& shape, std::int64_t halo, std::int64_t lanes) {
    require(shape.rank() == 4, "the images are ", shape.text(), ", not [n, channels, height, width]");
    stack = Stack::checked(shape[1], shape[2], shape[3], halo, lanes);
    require(shape[0] >= 1 && shape[0] % lanes == 0, "the batch of ", shape[0], " is not a multiple of ",
            lanes, " lanes");
    blocks = shape[0] / lanes;
  }

  // Offset of row y of channel c of lane b of batch block nb in the plain tensor.
  std::int64_t plain(std::int64_t nb, std::int64_t b, std::int64_t c, std::int64_t y) const {
    return (((nb * stack.lanes + b) * stack.channels + c) * stack.height + y) * stack.width;
  }
};

// f32 [n, C, H, W] as a stack.
struct PackInput {
  static constexpr const char* name = "PackInput";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"stack", float32}};

  std::int64_t lanes, halo;

  explicit PackInput(const Attributes& attributes)
      : lanes(attributes.integer_in("lanes", 1, 64)), halo(attributes.integer_in("halo", 0, 256)) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const Batch batch(x.shape(), halo, lanes);
    const Stack& stack = batch.stack;
    const auto out = context.output<float>(0, stack.shape(batch.blocks));
    for_planes(context, batch.blocks, stack.channels, [&](std::int64_t nb, std::int64_t c) {
      bool finite = true;
      for (std::int64_t y = 0; y < stack.height; ++y) {
        float* row = out.data() + stack.at(nb, c, y);
        for (std::int64_t b = 0; b < lanes; ++b) {
          const float* pixels = x.data() + batch.plain(nb, b, c, y);
          finite &= all_finite(pixels, stack.width);
          for (std::int64_t i = 0; i < stack.width; ++i) row[i * lanes + b] = pixels[i];
        }
      }
      require(finite, "the input has a pixel that is not finite");
      stack.zero_halo(out.data() + nb * stack.block(), c);
    });
  }
};
const Register<PackInput> pack_input;

// A stack of vectors [NB, K, B] as f32 [n, K].
struct UnpackOutput {
  static constexpr const char* name = "UnpackOutput";
  static constexpr std::array inputs{Port{"stack", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  explicit UnpackOutput(const Attributes&) {}

  void compute(Context& context) const {
    const auto stack = context.input<float>(0);
    require(stack.shape().rank() == 3, "the stack is ", stack.shape().text(),
            ", not [blocks, classes, lanes]");
    const std::int64_t blocks = stack.dim(0), classes = stack.dim(1), lanes = stack.dim(2);
    const auto y = context.output<float>(0, {blocks * lanes, classes});
    for (std::int64_t nb = 0; nb < blocks; ++nb)
      for (std::int64_t b = 0; b < lanes; ++b)
        for (std::int64_t k = 0; k < classes; ++k)
          y[(nb * lanes + b) * classes + k] = stack[(nb * classes + k) * lanes + b];
  }
};
const Register<UnpackOutput> unpack_output;

// One step of projected gradient ascent in l∞ (Madry et al., 2018): x' + step·sign(dx), within ε of x and in
// [0, 1].
struct PgdStep {
  static constexpr const char* name = "PgdStep";
  static constexpr std::array inputs{Port{"x_adv", float32}, Port{"x", float32}, Port{"dx", float32},
                                     Port{"step_size", float32}, Port{"epsilon", float32}};
  static constexpr std::array outputs{Port{"x_adv_out", float32, aliases(0)}};

  std::int64_t lanes, halo;

  explicit PgdStep(const Attributes& attributes)
      : lanes(attributes.integer_in("lanes", 1, 64)), halo(attributes.integer_in("dx_halo", 0, 256)) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(1), dx = context.input<float>(2);
    const Batch batch(x.shape(), halo, lanes);
    const Stack& stack = batch.stack;
    const Shape adversarial = context.input<float>(0).shape();
    require(adversarial == x.shape(), "x_adv is ", adversarial.text(), ", not ", x.shape().text(), " like x");
    stack.check(dx, batch.blocks, "dx");
    const float step = scalar(context, 3), epsilon = scalar(context, 4);
    const auto x_adv = context.in_place<float>(0, 0);
    for_planes(context, batch.blocks, stack.channels, [&](std::int64_t nb, std::int64_t c) {
      bool finite = true;
      Turned gradient;
      for (std::int64_t y = 0; y < stack.height; ++y)
        for (std::int64_t first = 0; first < stack.width; first += turned_pixels) {
          const std::int64_t count = std::min(turned_pixels, stack.width - first);
          const float* const pixels = dx.data() + stack.at(nb, c, y, first);
          finite &= all_finite(pixels, count * lanes);
          for (std::int64_t i = 0; i < count; ++i)
            for (std::int64_t b = 0; b < lanes; ++b) gradient[b][i] = pixels[i * lanes + b];
          for (std::int64_t b = 0; b < lanes; ++b) {
            const std::int64_t row = batch.plain(nb, b, c, y) + first;
            ascend(gradient[b], x.data() + row, x_adv.data() + row, count, step, epsilon);
          }
        }
      require(finite, "the gradient of the input is not finite");
    });
  }

 private:
  static void ascend(const float* gradient, const float* centre, float* moved, std::int64_t count, float step,
                     float epsilon) {
    for (std::int64_t i = 0; i < count; ++i) {
      const float sign = static_cast<float>(gradient[i] > 0) - static_cast<float>(gradient[i] < 0);
      const float within =
          std::min(std::max(moved[i] + step * sign, centre[i] - epsilon), centre[i] + epsilon);
      moved[i] = std::min(std::max(within, 0.0f), 1.0f);
    }
  }

  static float scalar(const Context& context, std::size_t index) {
    const auto tensor = context.input<float>(index);
    require(tensor.size() == 1 && is_finite(tensor[0]) && tensor[0] >= 0, context.input_name(index),
            " is not one finite number of at least 0");
    return tensor[0];
  }
};
const Register<PgdStep> pgd_step;

}  // namespace
}  // namespace edge_bcs
