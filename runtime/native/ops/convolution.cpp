// Convolutions (a linear layer is one of a single pixel): forward, gradient of the input, gradient of both. Their weights are
// connections (Conv, ConvInputGrad, ConvGrad) or numbers of dense.value, all of them there (DenseConv and so on).
//
// Where a network is trained in part, the gradient has room for what is trained alone: an attribute says where in it that of
// this layer lies.
//
// The operators check everything that they are given, describe the work as walks (kernels/walk.h) and hand it to the
// kernels of this machine's instruction set. y = act(scale · (W ∗ x) + shift + residual) with batch norm folded into scale
// and shift; its gradients follow by the chain rule.

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "kernels/walk.h"
#include "ops/conv_layer.h"
#include "ops/conv_weights.h"
#include "ops/dispatch.h"
#include "ops/half_planes.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// The part of a walk over all weights that is group `g` of `groups`.
Walk group_of(Walk walk, std::int64_t g, std::int64_t groups) {
  if (groups == 1) return walk;
  walk.rows /= groups;
  walk.channels /= groups;
  const std::int64_t row = g * walk.rows;
  walk.input = ahead(walk.input, g * walk.channels * walk.input_plane);
  walk.output = ahead(walk.output, row * walk.output_plane);
  walk.scale = ahead(walk.scale, row);
  walk.shift = ahead(walk.shift, row);
  walk.addend = ahead(walk.addend, row * walk.output_plane);
  walk.pre = ahead(walk.pre, row * walk.mask_plane);
  walk.mask = ahead(walk.mask, row * walk.mask_plane);
  walk.mask_bits = ahead(walk.mask_bits, row * walk.bits_plane);
  walk.bits = ahead(walk.bits, row * walk.bits_plane);
  return walk;
}

// Its weights, of which it has `count`, for a walk that reads `channels` planes. Connections have one group.
Weights group_of(Weights weights, std::int64_t g, std::int64_t count, std::int64_t channels) {
  weights.all = ahead(weights.all, g * count);
  weights.factor = ahead(weights.factor, g * channels);
  return weights;
}

// Calls body(group, task of the group) for `tasks` of each of the groups, in parallel.
template <class Body>
void for_groups(const Context& context, std::int64_t groups, std::int64_t tasks, const Body& body) {
  context.parallel_for(groups * tasks, [&](std::int64_t task) { body(task / tasks, task % tasks); });
}

// The gradient of a depthwise layer's weights.
struct PlaneGradient {
  const Walk& walk;
  const Weights& weights;
  const WeightGradient& wanted;

  // Adds what the sums over the places of output plane `row` and that of dy make of grad, dscale and dshift.
  void deliver(std::int64_t row, const double* sums) const {
    const double scale = wanted.scale == nullptr ? 1.0 : static_cast<double>(wanted.scale[row]);
    double dscale = 0;
    for (int i = 0; i < walk.taps; ++i) {
      const std::int64_t j = row * weights.row_step + walk.used[i];
      wanted.grad[j] += static_cast<float>(scale * sums[i]);
      dscale += static_cast<double>(weights.all[j]) * sums[i];
    }
    if (wanted.dscale == nullptr) return;
    wanted.dscale[row] += static_cast<float>(dscale);
    wanted.dshift[row] += static_cast<float>(sums[walk.taps]);
  }
};

// Runs the walks of a depthwise layer, whose output planes are those of its phases, with the `weights` that they meet, and
// `gradient`; one of them may be missing. All that is done to some rows of a plane is done before the next: a number that
// several of them read comes from memory once.
void run_planes(const Context& context, std::span<const Walk> walks, const Weights& weights,
                const PlaneGradient* gradient, bool half = false) {
  constexpr std::int64_t most_planes = 16, least_rows = 8;
  const ConvKernels& kernel = conv_kernels();
  const auto make = half ? half_kernels().depthwise : kernel.depthwise;
  const Walk& some = gradient == nullptr ? walks[0] : gradient->walk;
  std::int64_t height = some.height;
  for (const Walk& walk : walks) height = std::max(height, walk.height);
  const std::int64_t row_floats = some.width * some.lanes;
  const bool alone = gradient == nullptr && walks.size() == 1;
  const std::int64_t band =
      alone ? height : std::max(least_rows, elements_a_task / row_floats / least_rows * least_rows);
  const auto write = [&](std::int64_t row, std::int64_t block, std::int64_t y) {
    for (const Walk& walk : walks)
      if (y < walk.height)
        make(walk, weights, row, block * walk.height + y,
             block * walk.height + std::min(walk.height, y + band));
  };
  // A task has planes that follow each other in memory, if they are small.
  const std::int64_t planes = gradient == nullptr ? some.rows : some.channels;
  const std::int64_t part = std::clamp<std::int64_t>(elements_a_task / (height * row_floats), 1, most_planes);
  context.parallel_parts(planes, part, [&](std::int64_t begin, std::int64_t end) {
    if (gradient == nullptr) {
      for (std::int64_t block = 0; block < some.blocks; ++block)
        for (std::int64_t row = begin; row < end; ++row)
          for (std::int64_t y = 0; y < height; y += band) write(row, block, y);
      return;
    }
    const std::int64_t factor = some.rows / some.channels;
    for (std::int64_t row = begin * factor; row < end * factor; ++row) {
      double sums[max_taps + 1] = {};
      for (std::int64_t block = 0; block < some.blocks; ++block)
        for (std::int64_t y = 0; y < height; y += band) {
          if (row % factor == 0) write(row / factor, block, y);
          if (y < some.height)
            kernel.depthwise_products(some, gradient->wanted.dy, row, block * some.height + y,
                                      block * some.height + std::min(some.height, y + band), sums);
        }
      gradient->deliver(row, sums);
    }
  });
}

// Runs one walk; `packed` has room for its weights as the algorithm wants them.
void run_walk(const Context& context, const ConvLayer& layer, Walk& walk, const Weights& weights,
              float* packed) {
  const SumKernels& kernel = layer.x.half ? static_cast<const SumKernels&>(half_kernels()) : conv_kernels();
  if (layer.algorithm == Algorithm::sparse)
    return context.parallel_for(kernel.sparse_tasks(walk, weights.rows),
                                [&](std::int64_t task) { kernel.sparse(walk, weights.rows, task); });
  if (layer.algorithm == Algorithm::depthwise)
    return run_planes(context, {&walk, 1}, weights, nullptr, layer.x.half);
  walk.winograd = layer.algorithm == Algorithm::winograd;
  const std::int64_t groups = layer.groups, count = layer.weights() / groups;
  const Walk one = group_of(walk, 0, groups);
  const std::int64_t taps = walk.winograd ? walk.taps / winograd_positions * 4 : walk.taps;
  const std::int64_t room = one.rows * one.channels * taps;  // of a group
  for_groups(context, groups, kernel.pack_tasks(one), [&](std::int64_t g, std::int64_t task) {
    kernel.pack(one, group_of(weights, g, count, one.channels), packed + g * room, task);
  });
  for_groups(context, groups, kernel.dense_tasks(one), [&](std::int64_t g, std::int64_t task) {
    kernel.dense(group_of(walk, g, groups), packed + g * room, task);
  });
}

// The room that all weights are packed into.
Scratch<float> packing_room(const Context& context, const ConvLayer& layer) {
  return context.scratch<float>(static_cast<std::size_t>(layer.packed()));
}

// act(scale · (W ∗ x) + shift + residual)
template <class Source>
struct Forward {
  explicit Forward(const Attributes& attributes)
      : layer(attributes),
        source(attributes, layer),
        pre_stack(Pre::geometry(attributes, layer.y)),
        activation(activation_from(attributes)) {
    layer.check_algorithm(layer.y);
    layer.check_half();
    planes = HalfPlanes::forward(layer, layer.y);
  }

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = layer.x.blocks(x, "x");
    const Addend residual(context.input<float>(3), layer.y, blocks, "residual");
    const auto affine = layer.slots.bind(context.input<float>(2), "affine");
    const Weights weights = source.bind(context, layer, 1, 4).forward();
    const auto y = context.output<float>(0, layer.y.shape(blocks));
    if (planes) {
      const Walk walk = forward_walk(layer, planes->in(), nullptr, planes->out(), nullptr, 1);
      const HalfPlanes::Offset start;
      const Finish finish{.count = layer.y.row(),
                          .addend = residual,
                          .activation = activation,
                          .bits = Bits(context, 1, layer.y, blocks),
                          .pre = Pre(context, 2, pre_stack, blocks)};
      return planes->run(context,
                         {.walks = {&walk, 1},
                          .offsets = {&start, 1},
                          .weights = weights,
                          .input = x.data(),
                          .finish = finish,
                          .scales = affine.scale,
                          .shifts = affine.shift,
                          .output = y.data()},
                         blocks);
    }
    Walk walk = forward_walk(layer, layer.x, x.data(), layer.y, nullptr, blocks);
    const auto bits = context.output<std::uint8_t>(1, layer.y.bits_shape(blocks));
    const Pre pre(context, 2, pre_stack, blocks);
    walk.output = layer.y.row(y.data(), 0, 0, 0);
    walk.scale = affine.scale;
    walk.shift = affine.shift;
    walk.addend = residual.row(0, 0, 0);
    walk.activation = activation;
    walk.pre = pre.row(0, 0, 0);
    set_mask_steps(walk, pre_stack, 1, 1);
    if (bits) walk.bits = bits.data();
    walk.bits_row = layer.y.bit_row();
    walk.bits_plane = layer.y.height * walk.bits_row;
    walk.bits_block = layer.y.channels * walk.bits_plane;
    walk.bits_pixel = layer.y.lanes;
    const auto room = packing_room(context, layer);
    zero_fronts(layer.y, y.data(), blocks);
    if (pre_stack.halo > 0)
      for_planes(context, blocks, pre_stack.channels,
                 [&](std::int64_t block, std::int64_t channel) { pre.zero_halo(block, channel); });
    run_walk(context, layer, walk, weights, room.data());
  }

  ConvLayer layer;
  Source source;
  Stack pre_stack;
  Activation activation;
  std::optional<HalfPlanes> planes;
};

// The gradient of the input, dx = act'(mask) · (convᵀ(scale · dy) + addend).
InputGradient input_gradient(const ConvLayer& layer, const Attributes& attributes) {
  layer.check_algorithm(layer.x);
  layer.check_half();
  return {attributes, layer.y.with_halo(attributes.integer("dy_halo")),
          layer.x.with_halo(attributes.integer("dx_halo", 0))};
}

// Checks that every phase of the strides fits in dy's halo.
void check_phases(const ConvLayer& layer, const InputGradient& gradient) {
  check_size(gradient.dy);
  check_size(gradient.dx);
  const std::int64_t across = layer.window.across.stride;
  for (std::int64_t phase = 0; phase < layer.window.phases(); ++phase)
    transpose_walk(layer, gradient.dy, nullptr, gradient.dx, nullptr, 1, phase / across, phase % across);
}

// The walk of one phase of the strides, from dy at `from` to dx at `to`; of no rows if the phase has no pixels.
Walk phase_walk(const ConvLayer& layer, const InputGradient& gradient, const float* from,
                const Finish& finish, float* to, std::int64_t blocks, std::int64_t phase) {
  const Stack &dx = gradient.dx, &mask = finish.mask.stack();
  const std::int64_t down = layer.window.down.stride, across = layer.window.across.stride, lanes = dx.lanes;
  const std::int64_t phase_y = phase / across, phase_x = phase % across;
  Walk walk = transpose_walk(layer, gradient.dy, from, dx, to, blocks, phase_y, phase_x);
  if (walk.rows == 0) return walk;
  const std::int64_t beside = dx.half ? 0 : phase_x * lanes;
  walk.addend = ahead(finish.addend.row(0, 0, phase_y), beside);
  walk.mask = ahead(finish.mask.values(0, 0, phase_y), beside);
  walk.through = finish.mask.activation();
  set_mask_steps(walk, mask, down, across);
  walk.mask_bits = finish.mask.bits(0, 0, phase_y);
  walk.bits_row = down * dx.bit_row();
  walk.bits_plane = dx.height * dx.bit_row();
  walk.bits_block = dx.channels * walk.bits_plane;
  walk.bits_first = phase_x * lanes;
  walk.bits_pixel = across * lanes;
  return walk;
}

// Runs the walks of all phases; of a depthwise layer together with the gradient of its weights, where that is given.
// `weights` are those of phase 0.
template <class Bound>
void run_phases(const Context& context, const ConvLayer& layer, const InputGradient& gradient,
                const float* from, const Finish& finish, Weights weights, float* to, std::int64_t blocks,
                float* packed, const PlaneGradient* planes = nullptr) {
  zero_fronts(gradient.dx, to, blocks);
  std::vector<Walk> together;  // of a depthwise layer
  for (std::int64_t phase = 0; phase < layer.window.phases(); ++phase, Bound::next_phase(weights)) {
    Walk walk = phase_walk(layer, gradient, from, finish, to, blocks, phase);
    if (walk.rows == 0) continue;
    if (layer.algorithm == Algorithm::depthwise) {
      together.push_back(walk);
      continue;
    }
    if (walk.taps == 0) Bound::check_none(weights, walk.rows);
    run_walk(context, layer, walk, weights, packed);
    packed = ahead(packed, walk.rows * (walk.channels / layer.groups) * walk.taps);
  }
  if (!together.empty()) run_planes(context, together, weights, planes, layer.x.half);
}

// The same of a depthwise layer in half precision.
void run_half_phases(const Context& context, const ConvLayer& layer, const HalfPlanes& planes,
                     const float* from, const Finish& finish, const Weights& weights, float* to,
                     std::int64_t blocks) {
  const std::int64_t across = layer.window.across.stride;
  std::vector<Walk> walks;
  std::vector<HalfPlanes::Offset> offsets;
  for (std::int64_t phase = 0; phase < layer.window.phases(); ++phase) {
    const HalfPlanes::Offset offset{phase / across, phase % across};
    const Walk walk =
        transpose_walk(layer, planes.in(), nullptr, planes.out(), nullptr, 1, offset.row, offset.pixel);
    if (walk.rows == 0) continue;
    walks.push_back(walk);
    offsets.push_back(offset);
  }
  planes.run(context,
             {.walks = walks,
              .offsets = offsets,
              .weights = weights,
              .input = from,
              .finish = finish,
              .scales = nullptr,
              .shifts = nullptr,
              .output = to},
             blocks);
}

template <class Source>
struct Transposed {
  explicit Transposed(const Attributes& attributes)
      : layer(attributes), source(attributes, layer), gradient(input_gradient(layer, attributes)) {
    check_phases(layer, gradient);
    planes = HalfPlanes::transposed(layer, gradient.dy, gradient.dx);
  }

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = gradient.dy.blocks(dy, "dy");
    const auto affine = layer.slots.bind(context.input<float>(2), "affine");
    const Finish finish = gradient.finish(context, 3, 4, blocks);
    const Weights weights = source.bind(context, layer, 1, 5).transpose(affine.scale);
    const auto dx = context.output<float>(0, gradient.dx.shape(blocks));
    if (planes)
      return run_half_phases(context, layer, *planes, dy.data(), finish, weights, dx.data(), blocks);
    const auto room = packing_room(context, layer);
    run_phases<typename Source::Bound>(context, layer, gradient, dy.data(), finish, weights, dx.data(),
                                       blocks, room.data());
  }

  ConvLayer layer;
  Source source;
  InputGradient gradient;
  std::optional<HalfPlanes> planes;
};

template <class Source>
struct Gradient {
  explicit Gradient(const Attributes& attributes)
      : layer(attributes), source(attributes, layer), gradient(input_gradient(layer, attributes)) {
    forward_walk(layer, layer.x, nullptr, gradient.dy, nullptr, 1);
  }

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const auto x = context.input<float>(1);
    const std::int64_t blocks = gradient.dy.blocks(dy, "dy");
    layer.x.check(x, blocks, "x");
    const auto affine = layer.slots.bind(context.input<float>(3), "affine");
    const Finish finish = gradient.finish(context, 4, 5, blocks);
    const auto bound = source.bind(context, layer, 2, 8);
    const Weights forward = bound.forward();
    bound.check_gradient(context.input_name(6), context.input<float>(6).size(), context.input_name(2));
    layer.slots.bind_if_there(context.input<float>(7), "affine_grad");

    const auto dx = context.output<float>(0, gradient.dx.shape(blocks));
    const auto value_grad = context.in_place<float>(1, 6);
    const auto sums = layer.slots.bind_if_there(context.in_place<float>(2, 7), "affine_grad");
    const Walk walk = forward_walk(layer, layer.x, x.data(), gradient.dy, nullptr, blocks);
    WeightGradient wanted;
    wanted.dy = dy.data() + gradient.dy.at(0, 0, 0);
    wanted.scale = affine.scale;
    wanted.grad = bound.gradient(value_grad);
    wanted.dscale = sums.scale;
    wanted.dshift = sums.shift;
    const PlaneGradient planes{walk, forward, wanted};
    const auto room = packing_room(context, layer);
    if (dx) {
      check_phases(layer, gradient);
      run_phases<typename Source::Bound>(context, layer, gradient, dy.data(), finish,
                                         bound.transpose(affine.scale), dx.data(), blocks, room.data(),
                                         &planes);
    }
    const ConvKernels& kernel = conv_kernels();
    if (layer.algorithm == Algorithm::sparse)
      return context.parallel_for(kernel.gradient_tasks(walk, forward.rows), [&](std::int64_t task) {
        kernel.gradient(walk, forward.rows, wanted, task);
      });
    if (layer.algorithm == Algorithm::depthwise) {
      if (!dx) run_planes(context, {}, {}, &planes);
      return;
    }
    // Winograd's products are the other walk's; here all weights are visited in one way.
    const std::int64_t groups = layer.groups, count = layer.weights() / groups;
    const Walk one = group_of(walk, 0, groups);
    for_groups(context, groups, kernel.dense_gradient_tasks(one), [&](std::int64_t g, std::int64_t task) {
      WeightGradient part = wanted;
      const std::int64_t row = g * one.rows;
      part.dy += row * walk.output_plane;
      part.scale = ahead(part.scale, row);
      part.grad += g * count;
      part.dscale = ahead(part.dscale, row);
      part.dshift = ahead(part.dshift, row);
      kernel.dense_gradient(group_of(walk, g, groups), group_of(forward, g, count, one.channels), part,
                            room.data() + g * count, task);
    });
  }

  ConvLayer layer;
  Source source;
  InputGradient gradient;
};

struct Conv : Forward<Connections> {
  static constexpr const char* name = "Conv";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}, Port{"value", float32},
                                     Port{"affine", float32, optional}, Port{"residual", float32, optional},
                                     Port{"lists", int32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional},
                                      Port{"pre", float32, optional}};
  using Forward::Forward;
};
const Register<Conv> conv;

struct ConvInputGrad : Transposed<Connections> {
  static constexpr const char* name = "ConvInputGrad";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"value", float32},
                                     Port{"affine", float32, optional},
                                     Port{"addend", float32, optional},
                                     Port{"mask", any, optional},
                                     Port{"lists", int32}};
  static constexpr std::array outputs{Port{"dx", float32}};
  using Transposed::Transposed;
};
const Register<ConvInputGrad> conv_input_grad;

struct ConvGrad : Gradient<Connections> {
  static constexpr const char* name = "ConvGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"x", float32},
                                     Port{"value", float32},
                                     Port{"affine", float32, optional},
                                     Port{"addend", float32, optional},
                                     Port{"mask", any, optional},
                                     Port{"coo_grad", float32},
                                     Port{"affine_grad", float32, optional},
                                     Port{"lists", int32}};
  static constexpr std::array outputs{Port{"dx", float32, optional},
                                      Port{"coo_grad_out", float32, aliases(6)},
                                      Port{"affine_grad_out", float32, optional_aliases(7)}};
  using Gradient::Gradient;
};
const Register<ConvGrad> conv_grad;

struct DenseConv : Forward<DenseWeights> {
  static constexpr const char* name = "DenseConv";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}, Port{"dense", float32},
                                     Port{"affine", float32, optional}, Port{"residual", float32, optional}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional},
                                      Port{"pre", float32, optional}};
  using Forward::Forward;
};
const Register<DenseConv> dense_conv;

struct DenseConvInputGrad : Transposed<DenseWeights> {
  static constexpr const char* name = "DenseConvInputGrad";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"dy", float32}, Port{"dense", float32},
                                     Port{"affine", float32, optional}, Port{"addend", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};
  using Transposed::Transposed;
};
const Register<DenseConvInputGrad> dense_conv_input_grad;

struct DenseConvGrad : Gradient<DenseWeights> {
  static constexpr const char* name = "DenseConvGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"x", float32},
                                     Port{"dense", float32},
                                     Port{"affine", float32, optional},
                                     Port{"addend", float32, optional},
                                     Port{"mask", any, optional},
                                     Port{"dense_grad", float32},
                                     Port{"affine_grad", float32, optional}};
  static constexpr std::array outputs{Port{"dx", float32, optional},
                                      Port{"dense_grad_out", float32, aliases(6)},
                                      Port{"affine_grad_out", float32, optional_aliases(7)}};
  using Gradient::Gradient;
};
const Register<DenseConvGrad> dense_conv_grad;

}  // namespace
}  // namespace edge_bcs
