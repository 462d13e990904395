// Norms of each image by itself: over groups of channels (Wu and He, 2018) and over the channels of each pixel (Ba, Kiros
// and Hinton, 2016).

#include <cmath>

#include "ops/epsilon.h"
#include "ops/lanes.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/slots.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// The gradients of scale and shift, where they are wanted: an optional input that an optional output continues.
Slots::Bound<float> sums_in_place(const Context& context, const Slots& slots, std::size_t output,
                                  std::size_t input) {
  slots.bind_if_there(context.input<float>(input), "affine_grad");
  const auto sums = context.in_place<float>(output, input);
  require(!context.input<float>(input) || sums, "affine_grad is an input but no output");
  return slots.bind_if_there(sums, "affine_grad");
}

// Two numbers for each lane of each channel or group of each batch block, in work memory.
class Pairs {
 public:
  Pairs(const Context& context, std::int64_t blocks, std::int64_t count, std::int64_t lanes)
      : count_(count),
        lanes_(lanes),
        numbers_(context.scratch<double>(static_cast<std::size_t>(blocks * count * 2 * lanes))) {}
  double* first(std::int64_t nb, std::int64_t i) const {
    return numbers_.data() + (nb * count_ + i) * 2 * lanes_;
  }
  double* second(std::int64_t nb, std::int64_t i) const { return first(nb, i) + lanes_; }
  // Σ a and Σ a·b over a plane, of which row 0 is at `a` in one stack and at `b` in another.
  void of_products(std::int64_t nb, std::int64_t i, const Stack& a_stack, const float* a,
                   const Stack& b_stack, const float* b) const {
    std::fill_n(first(nb, i), 2 * lanes_, 0.0);
    norm_kernels().lane_sums({.lanes = lanes_,
                              .count = a_stack.row(),
                              .rows = a_stack.height,
                              .a = a,
                              .a_step = a_stack.row_stride() * lanes_,
                              .b = b,
                              .b_step = b_stack.row_stride() * lanes_},
                             first(nb, i), second(nb, i));
  }

 private:
  std::int64_t count_, lanes_;
  Scratch<double> numbers_;
};

// Channels in groups of equally many: attributes channels, groups.
struct Groups {
  Stack in;
  std::int64_t groups, size;

  explicit Groups(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        groups(attributes.integer_in("groups", 1, in.channels)),
        size(in.channels / groups) {
    require(in.channels % groups == 0, in.channels, " channels are not in ", groups, " groups of one size");
  }

  // saved f32 [NB, G, 2, B]: the means and inverse deviations.
  Shape saved_shape(std::int64_t blocks) const { return {blocks, groups, 2, in.lanes}; }
  std::int64_t saved_at(std::int64_t nb, std::int64_t c) const {
    return (nb * groups + c / size) * 2 * in.lanes;
  }
  double count() const { return static_cast<double>(size * in.height * in.width); }
};

// y = act(scale·(x − mean)·inv_std + shift), with the mean and deviation of each group of channels of each image.
struct GroupNorm {
  static constexpr const char* name = "GroupNorm";
  static constexpr std::array inputs{Port{"x", float32}, Port{"affine", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"saved", float32, optional},
                                      Port{"bits", uint8, optional}, Port{"pre", float32, optional}};

  Groups groups;
  Stack out, pre;
  Slots slots;
  Activation activation;
  double epsilon;

  explicit GroupNorm(const Attributes& attributes)
      : groups(attributes),
        out(Stack::from(attributes, "", "out_halo")),
        pre(Pre::geometry(attributes, out)),
        slots(attributes, out.channels),
        activation(activation_from(attributes)),
        epsilon(epsilon_from(attributes)) {}

  void compute(Context& context) const {
    const Stack& in = groups.in;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x"), lanes = in.lanes;
    const auto affine = slots.bind(context.input<float>(1), "affine");
    const auto y = context.output<float>(0, out.shape(blocks));
    const auto saved = context.output<float>(1, groups.saved_shape(blocks));
    const Finish finish{.count = out.row(),
                        .activation = activation,
                        .bits = Bits(context, 2, out, blocks),
                        .pre = Pre(context, 3, pre, blocks)};
    const Pairs sums(context, blocks, in.channels, lanes);
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      sums.of_products(nb, c, in, x.data() + in.at(nb, c, 0), in, x.data() + in.at(nb, c, 0));
    });
    // From here on the mean and the inverse deviation, in the place of the group's first channel.
    for_planes(context, blocks, groups.groups, [&](std::int64_t nb, std::int64_t g) {
      const std::int64_t c = g * groups.size;
      double *const value = sums.first(nb, c), *const square = sums.second(nb, c);
      for (std::int64_t more = c + 1; more < c + groups.size; ++more)
        for (std::int64_t b = 0; b < 2 * lanes; ++b) value[b] += sums.first(nb, more)[b];
      for (std::int64_t b = 0; b < lanes; ++b) {
        const double mean = value[b] / groups.count();
        const double variance = std::max(0.0, square[b] / groups.count() - mean * mean);
        require(std::isfinite(square[b]), "the activations of channel ", c, " are not finite");
        value[b] = mean;
        square[b] = 1.0 / std::sqrt(variance + epsilon);
      }
      if (saved)
        for (std::int64_t b = 0; b < 2 * lanes; ++b)
          saved[groups.saved_at(nb, c) + b] = static_cast<float>(value[b]);
    });
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      const std::int64_t first = c / groups.size * groups.size;
      std::array<float, most_lanes> mean, slope;
      for (std::int64_t b = 0; b < lanes; ++b) {
        mean[b] = static_cast<float>(sums.first(nb, first)[b]);
        slope[b] = affine.scale[c] * static_cast<float>(sums.second(nb, first)[b]);
      }
      for (std::int64_t i = 0; i < in.height; ++i) {
        const float* const from = x.data() + in.at(nb, c, i);
        float* const to = y.data() + out.at(nb, c, i);
        with_lanes(lanes, [&](auto count) {
          for (std::int64_t j = 0; j < in.row(); j += count)
            for (std::int64_t b = 0; b < count; ++b) to[j + b] = (from[j + b] - mean[b]) * slope[b];
        });
        finish(to, 1, affine.shift[c], to, nb, c, i);
      }
      finish.zero_halo(out, y.data(), nb, c);
    });
  }
};
const Register<GroupNorm> group_norm;

// dx = act'(mask)·(inv_std·(g − mean g − x̂·mean(g·x̂)) + addend) with g = scale·dy, dscale += Σ dy·x̂, dshift += Σ dy; the
// last two only where affine_grad is there.
struct GroupNormGrad {
  static constexpr const char* name = "GroupNormGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"x", float32},
                                     Port{"affine", float32},
                                     Port{"saved", float32},
                                     Port{"addend", float32, optional},
                                     Port{"mask", any, optional},
                                     Port{"affine_grad", float32, optional}};
  static constexpr std::array outputs{Port{"dx", float32},
                                      Port{"affine_grad_out", float32, optional_aliases(6)}};

  InputGradient gradient;
  Groups groups;
  Slots slots;

  explicit GroupNormGrad(const Attributes& attributes)
      : gradient(attributes), groups(attributes), slots(attributes, groups.in.channels) {}

  void compute(Context& context) const {
    const Stack &from = gradient.dy, &to = gradient.dx, &in = groups.in;
    const auto dy = context.input<float>(0), x = context.input<float>(1), saved = context.input<float>(3);
    const std::int64_t blocks = from.blocks(dy, "dy"), lanes = in.lanes;
    in.check(x, blocks, "x");
    require(saved.shape() == groups.saved_shape(blocks), "saved is ", saved.shape().text(), ", not ",
            groups.saved_shape(blocks).text());
    const auto affine = slots.bind(context.input<float>(2), "affine");
    const Finish finish = gradient.finish(context, 4, 5, blocks);
    const auto dx = context.output<float>(0, to.shape(blocks));
    const auto wanted = sums_in_place(context, slots, 1, 6);
    // Σ dy and Σ dy·x̂ of each channel.
    const Pairs sums(context, blocks, in.channels, lanes), means(context, blocks, groups.groups, lanes);
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      double *const value = sums.first(nb, c), *const product = sums.second(nb, c);
      sums.of_products(nb, c, from, dy.data() + from.at(nb, c, 0), in, x.data() + in.at(nb, c, 0));
      const float* const mean = saved.data() + groups.saved_at(nb, c);
      for (std::int64_t b = 0; b < lanes; ++b)
        product[b] = (product[b] - mean[b] * value[b]) * mean[lanes + b];
    });
    for_planes(context, blocks, groups.groups, [&](std::int64_t nb, std::int64_t g) {
      double* const mean = means.first(nb, g);
      std::fill_n(mean, 2 * lanes, 0.0);
      for (std::int64_t c = g * groups.size; c < (g + 1) * groups.size; ++c)
        for (std::int64_t b = 0; b < 2 * lanes; ++b) mean[b] += affine.scale[c] * sums.first(nb, c)[b];
      for (std::int64_t b = 0; b < 2 * lanes; ++b) mean[b] /= groups.count();
    });
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      const float* const statistics = saved.data() + groups.saved_at(nb, c);
      const double* const of_group = means.first(nb, c / groups.size);
      std::array<float, most_lanes> mean, inverse, centre, slope;
      for (std::int64_t b = 0; b < lanes; ++b) {
        mean[b] = statistics[b];
        inverse[b] = statistics[lanes + b];
        centre[b] = static_cast<float>(of_group[b]);
        slope[b] = static_cast<float>(of_group[lanes + b]) * inverse[b];
      }
      const float scale = affine.scale[c];
      for (std::int64_t i = 0; i < in.height; ++i) {
        const float *const d = dy.data() + from.at(nb, c, i), *const source = x.data() + in.at(nb, c, i);
        float* const row = dx.data() + to.at(nb, c, i);
        with_lanes(lanes, [&](auto count) {
          for (std::int64_t j = 0; j < in.row(); j += count)
            for (std::int64_t b = 0; b < count; ++b)
              row[j + b] = inverse[b] * (scale * d[j + b] - centre[b] - slope[b] * (source[j + b] - mean[b]));
        });
        finish(row, 1, 0, row, nb, c, i);
      }
      to.zero_halo(dx.data() + nb * to.block(), c);
    });
    if (wanted.scale == nullptr) return;
    for (std::int64_t c = 0; c < in.channels; ++c) {
      double dscale = 0, dshift = 0;
      for (std::int64_t nb = 0; nb < blocks; ++nb)
        for (std::int64_t b = 0; b < lanes; ++b) {
          dshift += sums.first(nb, c)[b];
          dscale += sums.second(nb, c)[b];
        }
      wanted.scale[c] += static_cast<float>(dscale);
      wanted.shift[c] += static_cast<float>(dshift);
    }
  }
};
const Register<GroupNormGrad> group_norm_grad;

// A row of all channels is looked at in pieces of so many floats, so that a piece of each channel stays in the cache between
// the statistics and what is made with them.
inline constexpr std::int64_t piece = 256;

// Calls body(begin, count) for the pieces of a row of `floats`.
template <class Body>
void for_pieces(std::int64_t floats, const Body& body) {
  for (std::int64_t j = 0; j < floats; j += piece) body(j, std::min(piece, floats - j));
}

// Calls body(c, n) for n channels from c on, as long as there are any: few enough that their sum in float loses nothing,
// many enough that adding it in double costs little.
template <class Body>
void for_channels(std::int64_t channels, const Body& body) {
  constexpr std::int64_t together = 8;
  std::int64_t c = 0;
  for (; c + together <= channels; c += together) body(c, std::integral_constant<std::int64_t, together>{});
  for (; c < channels; ++c) body(c, std::integral_constant<std::int64_t, 1>{});
}

// to += a
void add(const float* a, std::int64_t count, double* to) {
  for (std::int64_t j = 0; j < count; ++j) to[j] += static_cast<double>(a[j]);
}

// saved f32 [NB, H, 2, W·B]: the mean and inverse deviation of each pixel.
Shape pixel_statistics(const Stack& stack, std::int64_t blocks) {
  return {blocks, stack.height, 2, stack.row()};
}

// y = scale·(x − mean)·inv_std + shift, with the mean and deviation of the channels of each pixel.
struct LayerNorm {
  static constexpr const char* name = "LayerNorm";
  static constexpr std::array inputs{Port{"x", float32}, Port{"affine", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"saved", float32, optional}};

  Stack in, out;
  Slots slots;
  double epsilon;

  explicit LayerNorm(const Attributes& attributes)
      : in(Stack::from(attributes, "", "in_halo")),
        out(Stack::from(attributes, "", "out_halo")),
        slots(attributes, in.channels),
        epsilon(epsilon_from(attributes)) {}

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto affine = slots.bind(context.input<float>(1), "affine");
    const auto y = context.output<float>(0, out.shape(blocks));
    const auto saved = context.output<float>(1, pixel_statistics(in, blocks));
    for_planes(context, blocks, in.height, [&](std::int64_t nb, std::int64_t i) {
      for_pieces(in.row(), [&](std::int64_t begin, std::int64_t count) {
        std::array<float, piece> mean, inverse;
        statistics(x.data() + in.at(nb, 0, i) + begin, count, mean.data(), inverse.data());
        if (saved) {
          float* const kept = saved.data() + (nb * in.height + i) * 2 * in.row() + begin;
          std::copy_n(mean.data(), count, kept);
          std::copy_n(inverse.data(), count, kept + in.row());
        }
        for (std::int64_t c = 0; c < in.channels; ++c) {
          const float* const row = x.data() + in.at(nb, c, i) + begin;
          float* const to = y.data() + out.at(nb, c, i) + begin;
          const float scale = affine.scale[c], shift = affine.shift[c];
          for (std::int64_t j = 0; j < count; ++j) to[j] = (row[j] - mean[j]) * inverse[j] * scale + shift;
        }
      });
      float* const block = y.data() + nb * out.block();
      if (i == 0) out.zero_front(block);
      for (std::int64_t c = 0; c < out.channels; ++c) out.zero_after_row(block, c, i);
    });
  }

 private:
  // The mean and inverse deviation over the channels of each of `count` floats of a row.
  void statistics(const float* x, std::int64_t count, float* mean, float* inverse) const {
    const std::int64_t plane = in.plane_stride() * in.lanes;
    const auto channels = static_cast<double>(in.channels);
    std::array<double, piece> sum, square;
    std::fill_n(sum.data(), count, 0.0);
    std::fill_n(square.data(), count, 0.0);
    // Of differences to the first channel, so that a mean far from zero takes nothing of the variance.
    for_channels(in.channels, [&](std::int64_t c, auto several) {
      std::array<float, piece> values, squares;
      for (std::int64_t j = 0; j < count; ++j) {
        float value = 0, product = 0;
        for (std::int64_t k = 0; k < several; ++k) {
          const float difference = x[(c + k) * plane + j] - x[j];
          value += difference;
          product += difference * difference;
        }
        values[j] = value;
        squares[j] = product;
      }
      add(values.data(), count, sum.data());
      add(squares.data(), count, square.data());
    });
    for (std::int64_t j = 0; j < count; ++j) {
      const double centre = sum[j] / channels;
      require(std::isfinite(square[j]), "the activations are not finite");
      const double variance = std::max(0.0, square[j] / channels - centre * centre);
      mean[j] = static_cast<float>(static_cast<double>(x[j]) + centre);
      inverse[j] = static_cast<float>(1.0 / std::sqrt(variance + epsilon));
    }
  }
};
const Register<LayerNorm> layer_norm;

// As GroupNormGrad, of LayerNorm.
struct LayerNormGrad {
  static constexpr const char* name = "LayerNormGrad";
  static constexpr std::array inputs = GroupNormGrad::inputs;
  static constexpr std::array outputs = GroupNormGrad::outputs;

  InputGradient gradient;
  Stack in;
  Slots slots;

  explicit LayerNormGrad(const Attributes& attributes)
      : gradient(attributes), in(Stack::from(attributes, "", "in_halo")), slots(attributes, in.channels) {}

  void compute(Context& context) const {
    const Stack &from = gradient.dy, &to = gradient.dx;
    const auto dy = context.input<float>(0), x = context.input<float>(1), saved = context.input<float>(3);
    const std::int64_t blocks = from.blocks(dy, "dy");
    in.check(x, blocks, "x");
    require(saved.shape() == pixel_statistics(in, blocks), "saved is ", saved.shape().text(), ", not ",
            pixel_statistics(in, blocks).text());
    const auto affine = slots.bind(context.input<float>(2), "affine");
    const Finish finish = gradient.finish(context, 4, 5, blocks);
    const auto dx = context.output<float>(0, to.shape(blocks));
    const auto wanted = sums_in_place(context, slots, 1, 6);
    // The sums of scale and shift are made in parts of some rows each, whose number depends on nothing but the shapes.
    const std::int64_t rows = blocks * in.height, parts = std::min<std::int64_t>(most_parts, rows);
    const auto sums = context.scratch<double>(
        static_cast<std::size_t>(wanted.scale != nullptr ? parts * in.channels * 2 : 0));
    std::fill_n(sums.data(), sums.size(), 0.0);
    context.parallel_for(parts, [&](std::int64_t part) {
      double* const own = sums.size() > 0 ? sums.data() + part * in.channels * 2 : nullptr;
      for (std::int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r) {
        const std::int64_t nb = r / in.height, i = r % in.height;
        for_pieces(in.row(), [&](std::int64_t begin, std::int64_t count) {
          const float* const mean = saved.data() + r * 2 * in.row() + begin;
          differentiate(dy.data() + from.at(nb, 0, i) + begin, x.data() + in.at(nb, 0, i) + begin, mean,
                        count, affine.scale, dx.data() + to.at(nb, 0, i) + begin, own);
        });
        for (std::int64_t c = 0; c < to.channels; ++c) {
          float* const row = dx.data() + to.at(nb, c, i);
          if (finish.changes()) finish(row, 1, 0, row, nb, c, i);
        }
        float* const block = dx.data() + nb * to.block();
        if (i == 0) to.zero_front(block);
        for (std::int64_t c = 0; c < to.channels; ++c) to.zero_after_row(block, c, i);
      }
    });
    if (wanted.scale == nullptr) return;
    for (std::int64_t c = 0; c < in.channels; ++c) {
      double dscale = 0, dshift = 0;
      for (std::int64_t part = 0; part < parts; ++part) {
        dscale += sums[static_cast<std::size_t>((part * in.channels + c) * 2)];
        dshift += sums[static_cast<std::size_t>((part * in.channels + c) * 2 + 1)];
      }
      wanted.scale[c] += static_cast<float>(dscale);
      wanted.shift[c] += static_cast<float>(dshift);
    }
  }

 private:
  static constexpr std::int64_t most_parts = 16;

  // One piece of a row, of all channels: dx from dy and x; (dscale, dshift) of each channel are added to `sums`, if it is not
  // null.
  void differentiate(const float* dy, const float* x, const float* mean, std::int64_t count,
                     const float* scale, float* dx, double* sums) const {
    const auto plane = [&](const Stack& stack) { return stack.plane_stride() * stack.lanes; };
    const std::int64_t of_dy = plane(gradient.dy), of_x = plane(in), of_dx = plane(gradient.dx);
    const float* const inverse = mean + in.row();
    std::array<double, piece> values, products;
    std::fill_n(values.data(), count, 0.0);
    std::fill_n(products.data(), count, 0.0);
    std::array<float, piece> centre, slope, normalised;
    for_channels(in.channels, [&](std::int64_t c, auto several) {
      for (std::int64_t j = 0; j < count; ++j) {
        float value = 0, product = 0;
        for (std::int64_t k = c; k < c + several; ++k) {
          const float g = scale[k] * dy[k * of_dy + j];
          value += g;
          product += g * (x[k * of_x + j] - mean[j]);
        }
        centre[j] = value;
        slope[j] = product;
      }
      add(centre.data(), count, values.data());
      add(slope.data(), count, products.data());
    });
    for (std::int64_t j = 0; j < count; ++j) {
      centre[j] = static_cast<float>(values[j] / static_cast<double>(in.channels));
      slope[j] = static_cast<float>(products[j] / static_cast<double>(in.channels)) * inverse[j];
    }
    for (std::int64_t c = 0; c < in.channels; ++c) {
      const float *const d = dy + c * of_dy, *const source = x + c * of_x;
      for (std::int64_t j = 0; j < count; ++j) normalised[j] = (source[j] - mean[j]) * inverse[j];
      for (std::int64_t j = 0; j < count; ++j)
        dx[c * of_dx + j] = inverse[j] * (scale[c] * d[j] - centre[j] - slope[j] * normalised[j]);
      if (sums != nullptr) {
        const RowSums found = row_kernels().sums(d, normalised.data(), count);
        sums[2 * c] += found.products;
        sums[2 * c + 1] += found.values;
      }
    }
  }
};
const Register<LayerNormGrad> layer_norm_grad;

}  // namespace
}  // namespace edge_bcs
