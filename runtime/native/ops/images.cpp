// Where plain tensors meet stacks: the input, the logits, and the attack's step.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "ops/finite.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// Four floats, which every processor here has vectors for.
using Four = float __attribute__((vector_size(16)));

// to[i · to_step + b] = from[b · from_step + i] for `rows` b and `columns` i: between images side by side in a stack and one
// after the other.
void turn(const float* from, std::int64_t from_step, float* to, std::int64_t to_step, std::int64_t rows,
          std::int64_t columns) {
  std::int64_t b = 0;
  for (; b + 4 <= rows; b += 4) {
    std::int64_t i = 0;
    for (; i + 4 <= columns; i += 4) {
      Four in[4];
      for (int k = 0; k < 4; ++k) std::memcpy(&in[k], from + (b + k) * from_step + i, sizeof in[k]);
      const auto left = [](Four a, Four b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); };
      const auto right = [](Four a, Four b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); };
      const auto lower = [](Four a, Four b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); };
      const auto upper = [](Four a, Four b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); };
      const Four a = left(in[0], in[1]), c = left(in[2], in[3]), d = right(in[0], in[1]),
                 e = right(in[2], in[3]);
      const Four out[4] = {lower(a, c), upper(a, c), lower(d, e), upper(d, e)};
      for (int k = 0; k < 4; ++k) std::memcpy(to + (i + k) * to_step + b, &out[k], sizeof out[k]);
    }
    for (; i < columns; ++i)
      for (int k = 0; k < 4; ++k) to[i * to_step + b + k] = from[(b + k) * from_step + i];
  }
  for (; b < rows; ++b)
    for (std::int64_t i = 0; i < columns; ++i) to[i * to_step + b] = from[b * from_step + i];
}

// Pixels of a row that are turned at once.
constexpr std::int64_t turned_pixels = 16;
using Turned = float[most_lanes][turned_pixels];

// The geometry of a stack that holds f32 [n, C, H, W], and its number of batch blocks.
struct Batch {
  Stack stack;
  std::int64_t blocks;

  Batch(const Shape& shape, std::int64_t halo, std::int64_t lanes, bool half) {
    require(shape.rank() == 4, "the images are ", shape.text(), ", not [n, channels, height, width]");
    stack = Stack::checked(shape[1], shape[2], shape[3], halo, lanes, half);
    require(shape[0] >= 1 && shape[0] % lanes == 0, "the batch of ", shape[0], " is not a multiple of ",
            lanes, " lanes");
    blocks = shape[0] / lanes;
  }

  // Calls body(nb, c, y) for every image row of every batch block, shared among the threads in bands of rows.
  template <class Body>
  void for_rows(const Context& context, const Body& body) const {
    constexpr std::int64_t band = 8;
    const std::int64_t bands = (stack.height + band - 1) / band;
    context.parallel_for(blocks * stack.channels * bands, [&](std::int64_t task) {
      const std::int64_t plane = task / bands, first = task % bands * band;
      for (std::int64_t y = first; y < std::min(stack.height, first + band); ++y)
        body(plane / stack.channels, plane % stack.channels, y);
    });
  }

  // Offset of row y of channel c of lane b of batch block nb in the plain tensor.
  std::int64_t plain(std::int64_t nb, std::int64_t b, std::int64_t c, std::int64_t y) const {
    return (((nb * stack.lanes + b) * stack.channels + c) * stack.height + y) * stack.width;
  }
};

// f32 [n, C, H, W] as a stack, scale[c]·x + shift[c] where the network normalises its pixels.
struct PackInput {
  static constexpr const char* name = "PackInput";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"stack", float32}};

  std::int64_t lanes, halo;
  std::vector<float> scale, shift;  // one a channel, or none
  bool half;

  explicit PackInput(const Attributes& attributes)
      : lanes(attributes.integer_in("lanes", 1, most_lanes)),
        halo(attributes.integer_in("halo", 0, 256)),
        scale(attributes.reals("scale")),
        shift(attributes.reals("shift")),
        half(attributes.half()) {
    require(scale.size() == shift.size(), "attribute scale has ", scale.size(), " numbers, shift ",
            shift.size());
  }

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const Batch batch(x.shape(), halo, lanes, half);
    const Stack& stack = batch.stack;
    const bool normalise = !scale.empty();
    require(!normalise || static_cast<std::int64_t>(scale.size()) == stack.channels, "attribute scale has ",
            scale.size(), " numbers for ", stack.channels, " channels");
    const auto out = context.output<float>(0, stack.shape(batch.blocks));
    batch.for_rows(context, [&](std::int64_t nb, std::int64_t c, std::int64_t y) {
      const std::int64_t first = batch.plain(nb, 0, c, y), next = batch.plain(nb, 1, c, y) - first;
      bool finite = true;
      for (std::int64_t b = 0; b < lanes; ++b) finite &= all_finite(x.data() + first + b * next, stack.width);
      require(finite, "the input has a pixel that is not finite");
      WideRow wide;
      float* const place = stack.row(out.data(), nb, c, y);
      float* const row = wide.to(stack, place);
      turn(x.data() + first, next, row, lanes, lanes, stack.width);
      if (normalise) {
        const float factor = scale[static_cast<std::size_t>(c)], summand = shift[static_cast<std::size_t>(c)];
        for (std::int64_t i = 0; i < stack.row(); ++i) row[i] = factor * row[i] + summand;
      }
      wide.put(stack, place);
      float* const block = stack.ahead(out.data(), nb * stack.block());
      if (c == 0 && y == 0) stack.zero_front(block);
      stack.zero_after_row(block, c, y);
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
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x_adv", float32}, Port{"x", float32}, Port{"dx", float32},
                                     Port{"step_size", float32}, Port{"epsilon", float32}};
  static constexpr std::array outputs{Port{"x_adv_out", float32, aliases(0)}};

  std::int64_t lanes, halo;
  bool half;

  explicit PgdStep(const Attributes& attributes)
      : lanes(attributes.integer_in("lanes", 1, most_lanes)),
        halo(attributes.integer_in("dx_halo", 0, 256)),
        half(attributes.half()) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(1), dx = context.input<float>(2);
    const Batch batch(x.shape(), halo, lanes, half);
    const Stack& stack = batch.stack;
    const Shape adversarial = context.input<float>(0).shape();
    require(adversarial == x.shape(), "x_adv is ", adversarial.text(), ", not ", x.shape().text(), " like x");
    stack.check(dx, batch.blocks, "dx");
    const float step = scalar(context, 3), epsilon = scalar(context, 4);
    const auto x_adv = context.in_place<float>(0, 0);
    batch.for_rows(context, [&](std::int64_t nb, std::int64_t c, std::int64_t y) {
      Turned gradient;
      WideRow wide;
      const float* const row_of_dx = wide.of(stack, stack.row(dx.data(), nb, c, y));
      for (std::int64_t first = 0; first < stack.width; first += turned_pixels) {
        const std::int64_t count = std::min(turned_pixels, stack.width - first);
        const float* const pixels = row_of_dx + first * lanes;
        require(all_finite(pixels, count * lanes), "the gradient of the input is not finite");
        turn(pixels, lanes, gradient[0], turned_pixels, count, lanes);
        for (std::int64_t b = 0; b < lanes; ++b) {
          const std::int64_t row = batch.plain(nb, b, c, y) + first;
          ascend(gradient[b], x.data() + row, x_adv.data() + row, count, step, epsilon);
        }
      }
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
