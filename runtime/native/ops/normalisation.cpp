// Batch norm with the statistics of the micro-batch (Ioffe and Szegedy, 2015). Samples of weight 0 fill up a
// micro-batch and count nowhere.

#include <algorithm>
#include <cmath>

#include "ops/epsilon.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/slots.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// Which samples count, by batch block and lane.
class Samples {
 public:
  Samples(const Tensor<const float>& weight, std::int64_t blocks, std::int64_t lanes)
      : weight_(weight), lanes_(lanes) {
    require(weight.shape() == Shape{blocks * lanes}, "sample_weight is ", weight.shape().text(), ", not [",
            blocks * lanes, "]");
    for (float w : weight) {
      require(std::isfinite(w) && w >= 0, "a sample has the weight ", w,
              ", not a finite number of at least 0");
      count_ += w > 0;
    }
    require(count_ > 0, "no sample has a weight above 0, so that there are no batch statistics");
  }
  bool counts(std::int64_t nb, std::int64_t b) const { return weight_[nb * lanes_ + b] > 0; }
  std::int64_t count() const { return count_; }
  // The first pixel of a channel in the first sample that counts; row_of(nb, y) is where a row is.
  template <class RowOf>
  double first(const RowOf& row_of) const {
    std::int64_t sample = 0;
    while (weight_[sample] == 0) ++sample;
    return row_of(sample / lanes_, 0)[sample % lanes_];
  }

 private:
  Tensor<const float> weight_;
  std::int64_t lanes_;
  std::int64_t count_ = 0;
};

// Two sums over a channel's pixels of all samples that count, in double and in a fixed order.
struct ChannelSums {
  double sum = 0, products = 0;
};

// Σ (a − a_origin) and Σ (a − a_origin)·(b − b_origin), where row 0 of the channel in batch block nb is what `a` and `b` return.
template <class A, class B>
ChannelSums channel_sums(const Stack& a_stack, const A& a, double a_origin, const Stack& b_stack, const B& b,
                         double b_origin, std::int64_t blocks, const Samples& samples) {
  ChannelSums total;
  LaneRows rows{.lanes = a_stack.lanes,
                .count = a_stack.row(),
                .rows = a_stack.height,
                .a_step = a_stack.row_stride() * a_stack.lanes,
                .a_origin = a_origin,
                .b_step = b_stack.row_stride() * b_stack.lanes,
                .b_origin = b_origin};
  for (std::int64_t nb = 0; nb < blocks; ++nb) {
    std::array<double, most_lanes> sums{}, products{};
    rows.a = a(nb);
    rows.b = b(nb);
    norm_kernels().lane_sums(rows, sums.data(), products.data());
    for (std::int64_t lane = 0; lane < rows.lanes; ++lane)
      if (samples.counts(nb, lane)) {
        total.sum += sums[lane];
        total.products += products[lane];
      }
  }
  return total;
}

// y = act(scale·(z − mean)·inv_std + shift + residual); running averages ← (1 − momentum)·running +
// momentum·batch.
struct BatchNorm {
  static constexpr const char* name = "BatchNorm";
  static constexpr std::array inputs{
      Port{"z", float32},    Port{"affine", float32},   Port{"sample_weight", float32},
      Port{"mean", float32}, Port{"variance", float32}, Port{"residual", float32, optional}};
  static constexpr std::array outputs{Port{"y", float32},
                                      Port{"saved", float32, optional},
                                      Port{"mean_out", float32, optional_aliases(3)},
                                      Port{"variance_out", float32, optional_aliases(4)},
                                      Port{"bits", uint8, optional},
                                      Port{"pre", float32, optional}};

  Stack in, out, residual_stack, pre;
  Slots slots;
  std::int64_t statistics;
  Activation activation;
  bool update;
  float momentum;
  double epsilon;

  explicit BatchNorm(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        residual_stack(in.with_halo(attributes.integer_in("residual_halo", 0, 256, 0))),
        pre(Pre::geometry(attributes, out)),
        slots(attributes, in.channels),
        statistics(attributes.integer_in("statistics", 0, std::int64_t{1} << 40)),
        activation(activation_from(attributes)),
        update(attributes.flag("update", true)),
        momentum(attributes.real("momentum", 0.1f)),
        epsilon(epsilon_from(attributes)) {
    require(momentum >= 0 && momentum <= 1, "momentum is ", momentum, ", not in [0, 1]");
  }

  void compute(Context& context) const {
    const auto z = context.input<float>(0);
    const std::int64_t blocks = in.blocks(z, "z");
    const auto affine = slots.bind(context.input<float>(1), "affine");
    const Samples samples(context.input<float>(2), blocks, in.lanes);
    for (std::size_t index : {3, 4}) {
      const Shape shape = context.input<float>(index).shape();
      require(shape.rank() == 1 && statistics + in.channels <= shape[0], context.input_name(index), " is ",
              shape.text(), " and has no elements ", statistics, " to ", statistics + in.channels);
    }
    const auto y = context.output<float>(0, out.shape(blocks));
    const auto saved = context.output<float>(1, {2 * in.channels});
    const auto running_mean = context.in_place<float>(2, 3), running_variance = context.in_place<float>(3, 4);
    require(!update || (running_mean && running_variance),
            "update is 1 but the running averages are no outputs");
    const Finish finish{.count = out.row(),
                        .addend = Addend(context.input<float>(5), residual_stack, blocks, "residual"),
                        .activation = activation,
                        .bits = Bits(context, 4, out, blocks),
                        .pre = Pre(context, 5, pre, blocks)};
    const auto count = static_cast<double>(samples.count() * in.height * in.width);

    context.parallel_for(in.channels, [&](std::int64_t c) {
      const auto row_of = [&](std::int64_t nb, std::int64_t y_index) {
        return z.data() + in.at(nb, c, y_index);
      };
      // Around a value of the channel itself the squares do not swallow the variance, however far its mean is from 0.
      const double origin = samples.first(row_of);
      const auto plane = [&](std::int64_t nb) { return row_of(nb, 0); };
      const ChannelSums found = channel_sums(in, plane, origin, in, plane, origin, blocks, samples);
      const double distance = found.sum / count, mean = origin + distance;
      const double variance = std::max(0.0, found.products / count - distance * distance);
      require(std::isfinite(found.products), "the activations of channel ", c, " are not finite");
      const auto centre = static_cast<float>(mean);
      const auto inverse = static_cast<float>(1.0 / std::sqrt(variance + epsilon));
      if (saved) {
        saved[c] = centre;
        saved[in.channels + c] = inverse;
      }
      if (update) {
        average(running_mean[statistics + c], mean);
        average(running_variance[statistics + c], variance);
      }
      const float scale = affine.scale[c] * inverse, shift = affine.shift[c];
      for (std::int64_t nb = 0; nb < blocks; ++nb) {
        for (std::int64_t i = 0; i < in.height; ++i) {
          const float* from = row_of(nb, i);
          float* to = y.data() + out.at(nb, c, i);
          for (std::int64_t j = 0; j < in.row(); ++j) to[j] = from[j] - centre;
          finish(to, scale, shift, to, nb, c, i);
        }
        finish.zero_halo(out, y.data(), nb, c);
      }
    });
  }

 private:
  void average(float& running, double batch) const {
    running = (1.0f - momentum) * running + momentum * static_cast<float>(batch);
  }
};
const Register<BatchNorm> batch_norm;

// dz = act'(mask)·(scale·inv_std·(dy − mean dy − x̂·mean(dy·x̂)) + addend), dscale += Σ dy·x̂, dshift += Σ dy, with
// the means over the samples that count; the first term is 0 for the others. dy is the gradient after the
// activation's mask.
struct BatchNormGrad {
  static constexpr const char* name = "BatchNormGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"z", float32},
                                     Port{"affine", float32},
                                     Port{"saved", float32},
                                     Port{"sample_weight", float32},
                                     Port{"addend", float32, optional},
                                     Port{"mask", any, optional},
                                     Port{"affine_grad", float32}};
  static constexpr std::array outputs{Port{"dz", float32}, Port{"affine_grad_out", float32, aliases(7)}};

  InputGradient gradient;
  Stack in;
  Slots slots;

  explicit BatchNormGrad(const Attributes& attributes)
      : gradient(attributes), in(Stack::from(attributes, "", "in_halo")), slots(attributes, in.channels) {}

  void compute(Context& context) const {
    const Stack &dy_stack = gradient.dy, &dz_stack = gradient.dx;
    const auto dy = context.input<float>(0), z = context.input<float>(1), saved = context.input<float>(3);
    const std::int64_t blocks = dy_stack.blocks(dy, "dy");
    in.check(z, blocks, "z");
    const auto affine = slots.bind(context.input<float>(2), "affine");
    require(saved.shape() == Shape{2 * in.channels}, "saved is ", saved.shape().text(), ", not [",
            2 * in.channels, "]");
    const Samples samples(context.input<float>(4), blocks, in.lanes);
    const Finish finish = gradient.finish(context, 5, 6, blocks);
    slots.bind(context.input<float>(7), "affine_grad");
    const auto dz = context.output<float>(0, dz_stack.shape(blocks));
    const auto sums = slots.bind(context.in_place<float>(1, 7), "affine_grad");
    const auto count = static_cast<double>(samples.count() * in.height * in.width);

    context.parallel_for(in.channels, [&](std::int64_t c) {
      const float mean = saved[c], inverse = saved[in.channels + c];
      const ChannelSums found = channel_sums(dy_stack, [&](std::int64_t nb) {
        return dy.data() + dy_stack.at(nb, c, 0);
      }, 0.0, in, [&](std::int64_t nb) { return z.data() + in.at(nb, c, 0); }, mean, blocks, samples);
      const double dshift = found.sum, dscale = found.products * inverse;
      sums.scale[c] += static_cast<float>(dscale);
      sums.shift[c] += static_cast<float>(dshift);

      const auto mean_dy = static_cast<float>(dshift / count);
      const auto slope = static_cast<float>(dscale / count) * inverse;
      const float scale = affine.scale[c] * inverse;
      for (std::int64_t nb = 0; nb < blocks; ++nb) {
        std::array<float, most_lanes> lane_scale;
        for (std::int64_t b = 0; b < in.lanes; ++b) lane_scale[b] = samples.counts(nb, b) ? scale : 0.0f;
        for (std::int64_t i = 0; i < in.height; ++i) {
          float* const row = dz.data() + dz_stack.at(nb, c, i);
          norm_kernels().gradient({.lanes = in.lanes,
                                   .count = in.row(),
                                   .scale = lane_scale.data(),
                                   .d = dy.data() + dy_stack.at(nb, c, i),
                                   .mean_d = mean_dy,
                                   .x = z.data() + in.at(nb, c, i),
                                   .mean = mean,
                                   .slope = slope,
                                   .out = row});
          finish(row, 1, 0, row, nb, c, i);
        }
        dz_stack.zero_halo(dz.data() + nb * dz_stack.block(), c);
      }
    });
  }
};
const Register<BatchNormGrad> batch_norm_grad;

}  // namespace
}  // namespace edge_bcs
