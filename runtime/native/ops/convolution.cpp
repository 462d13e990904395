// Sparse convolutions (a linear layer is one of a single pixel): forward, gradient of the input, gradient of both.
//
// The operators check everything that they are given, describe the work as walks (kernels/walk.h) and hand it to the
// kernels of this machine's instruction set. y = act(scale · (W ∗ x) + shift + residual) with batch norm folded into scale
// and shift; its gradients follow by the chain rule.

#include <limits>
#include <string>

#include "kernels/walk.h"
#include "ops/dispatch.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/slots.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

std::int64_t floor_divide(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// How the products of a walk are computed: over its connections, over all of its weights, or over these with Winograd's
// products. Which of them pays is decided where the graph is made.
enum class Algorithm { sparse, dense, winograd };

Algorithm algorithm_from(const Attributes& attributes) {
  const std::string text = attributes.text("algorithm", "sparse");
  if (text == "sparse") return Algorithm::sparse;
  if (text == "dense") return Algorithm::dense;
  require(text == "winograd", "attribute algorithm is \"", text,
          "\", none of \"sparse\", \"dense\" and \"winograd\"");
  return Algorithm::winograd;
}

// The attributes that all three operators share.
struct ConvLayer {
  Stack x, y;  // their halos are those of the forward operator
  std::int64_t kernel_height, kernel_width, stride, padding;
  std::int64_t forward_pointer, transpose_pointer;
  Slots slots;
  Algorithm algorithm;  // of the forward walk, or of that to the input

  explicit ConvLayer(const Attributes& attributes)
      : x(Stack::checked(attributes.integer("in_channels"), attributes.integer("in_height"),
                         attributes.integer("in_width"), attributes.integer("in_halo", 0),
                         attributes.integer("lanes"))),
        y(Stack::checked(attributes.integer("out_channels"), attributes.integer("out_height"),
                         attributes.integer("out_width"), attributes.integer("out_halo", 0), x.lanes)),
        stride(attributes.integer_in("stride", 1, 64)),
        padding(attributes.integer_in("padding", 0, 255)),
        forward_pointer(
            attributes.integer_in("forward_pointer", 0, std::numeric_limits<std::int32_t>::max())),
        transpose_pointer(
            attributes.integer_in("transpose_pointer", 0, std::numeric_limits<std::int32_t>::max())),
        slots(Slots::if_any(attributes, y.channels)),
        algorithm(algorithm_from(attributes)) {
    const auto kernel = attributes.integers("kernel");
    require(kernel.size() == 2 && kernel[0] >= 1 && kernel[1] >= 1 && kernel[0] <= max_taps &&
                kernel[1] <= max_taps && kernel[0] * kernel[1] <= max_taps,
            "attribute kernel is not two positive sizes with at most ", max_taps, " positions");
    kernel_height = kernel[0];
    kernel_width = kernel[1];
    const auto output = [&](std::int64_t size, std::int64_t kernel_size) {
      return floor_divide(size + 2 * padding - kernel_size, stride) + 1;
    };
    require(y.height == output(x.height, kernel_height) && y.width == output(x.width, kernel_width),
            "an output of ", y.height, " by ", y.width, " pixels does not follow from an input of ", x.height,
            " by ", x.width, ", kernel ", kernel_height, " by ", kernel_width, ", stride ", stride,
            " and padding ", padding);
  }

  // Checks that the walk that makes the pixels of `result` can be computed as it is asked for.
  void check_algorithm(const Stack& result) const {
    require(algorithm != Algorithm::winograd ||
                (kernel_width == winograd_positions && stride == 1 && result.width % winograd_pixels == 0 &&
                 result.lanes % winograd_lanes == 0),
            "attribute algorithm is \"winograd\", which takes kernels ", winograd_positions,
            " positions wide, stride 1, rows of a multiple of ", winograd_pixels,
            " pixels and a multiple of ", winograd_lanes, " lanes; here these are ", kernel_width, ", ",
            stride, ", ", result.width, " and ", result.lanes);
  }

  std::int64_t positions() const { return kernel_height * kernel_width; }
  std::int64_t weights() const { return y.channels * x.channels * positions(); }
};

// Checks entries [begin, end): channel << 8 | kernel position, both in range.
void check_entries(const std::int32_t* entry, std::int64_t begin, std::int64_t end, std::int64_t channels,
                   std::int64_t positions, const char* name) {
  const EntryBounds largest = row_kernels().entry_bounds(entry + begin, end - begin);
  require((largest.entry >> 8) < channels && largest.position < positions, "lists: an entry of ", name,
          " is out of range for ", channels, " channels and ", positions, " kernel positions");
}

// Checks that `count` + 1 pointers ascend within [0, kappa].
void check_pointers(const std::int32_t* pointer, std::int64_t count, std::int64_t kappa, const char* name) {
  bool ascending = pointer[0] >= 0 && pointer[count] <= kappa;
  for (std::int64_t i = 0; i < count; ++i) ascending &= pointer[i] <= pointer[i + 1];
  require(ascending, "lists: the ", name, " pointers do not ascend within [0, ", kappa, "]");
}

// The parts of coo.lists that a layer uses, checked.
class Lists {
 public:
  Lists(const ConvLayer& layer, const Tensor<const std::int32_t>& lists, const Tensor<const float>& value)
      : layer_(layer), value_(value.data()), kappa_(value.size()), data_(lists.data()) {
    require(kappa_ <= std::numeric_limits<std::int32_t>::max() / 3 && 3 * kappa_ <= lists.size() &&
                layer.forward_pointer + layer.y.channels + 1 <= lists.size() &&
                layer.transpose_pointer + layer.x.channels * layer.stride * layer.stride + 1 <= lists.size(),
            "lists has ", lists.size(), " elements, too few for ", kappa_,
            " values and this layer's pointers");
  }

  // By output channel, in the order of the arrays.
  SparseRows forward() const {
    SparseRows rows;
    rows.pointer = data_ + layer_.forward_pointer;
    rows.entry = data_;
    rows.value = value_;
    check_pointers(rows.pointer, layer_.y.channels, kappa_, "forward");
    check_entries(rows.entry, rows.pointer[0], rows.pointer[layer_.y.channels], layer_.x.channels,
                  layer_.positions(), "forward_column");
    return rows;
  }

  // By input channel and phase; pointers of phase 0.
  SparseRows transpose(const float* scale) const {
    const std::int64_t count = layer_.x.channels * layer_.stride * layer_.stride;
    SparseRows rows;
    rows.pointer = data_ + layer_.transpose_pointer;
    rows.step = layer_.stride * layer_.stride;
    rows.entry = data_ + kappa_;
    rows.position = data_ + 2 * kappa_;
    rows.value = value_;
    rows.factor = scale;
    check_pointers(rows.pointer, count, kappa_, "transpose");
    check_entries(rows.entry, rows.pointer[0], rows.pointer[count], layer_.y.channels, layer_.positions(),
                  "transpose_row");
    const EntryBounds largest =
        row_kernels().entry_bounds(rows.position + rows.pointer[0], rows.pointer[count] - rows.pointer[0]);
    require(largest.entry < kappa_ || rows.pointer[0] == rows.pointer[count],
            "lists: a transpose_position is not in [0, ", kappa_, ")");
    return rows;
  }

 private:
  const ConvLayer& layer_;
  const float* value_;
  std::int64_t kappa_;
  const std::int32_t* data_;
};

// `place` + `distance`; null where the geometry alone is asked for.
template <class T>
T* ahead(T* place, std::int64_t distance) {
  return place == nullptr ? nullptr : place + distance;
}

// Distances must fit an i32.
void check_size(const Stack& stack) {
  require(stack.block() <= std::numeric_limits<std::int32_t>::max() / 2, "a batch block of ", stack.pixels(),
          " pixels is too large");
}

void use_all_taps(Walk& walk, std::int64_t positions) {
  walk.taps = static_cast<int>(positions);
  for (int k = 0; k < walk.taps; ++k) walk.used[k] = static_cast<std::uint8_t>(k);
}

// The forward walk from x; its output side is a stack of geometry y at `output` (null where only its steps matter).
Walk forward_walk(const ConvLayer& layer, const Stack& x, const float* input, const Stack& y, float* output,
                  std::int64_t blocks) {
  check_size(x);
  check_size(y);
  const auto high = [&](std::int64_t out, std::int64_t size, std::int64_t kernel) {
    return (out - 1) * layer.stride + kernel - 1 - layer.padding - (size - 1);
  };
  const std::int64_t needed = std::max({layer.padding, high(y.height, x.height, layer.kernel_height),
                                        high(y.width, x.width, layer.kernel_width)});
  require(x.halo >= needed, "x has halo ", x.halo, ", but the convolution needs ", needed);
  const std::int64_t lanes = x.lanes;
  Walk walk;
  walk.blocks = blocks;
  walk.lanes = lanes;
  walk.rows = y.channels;
  walk.channels = x.channels;
  walk.height = y.height;
  walk.width = y.width;
  use_all_taps(walk, layer.positions());
  for (std::int64_t k = 0; k < layer.positions(); ++k)
    walk.tap[k] = static_cast<std::int32_t>(((k / layer.kernel_width - layer.padding) * x.row_stride() +
                                             (k % layer.kernel_width - layer.padding)) *
                                            lanes);
  walk.input = ahead(input, x.origin() * lanes);
  walk.input_block = x.block();
  walk.input_plane = x.plane_stride() * lanes;
  walk.input_row = layer.stride * x.row_stride() * lanes;
  walk.input_pixel = layer.stride * lanes;
  walk.output = ahead(output, y.origin() * lanes);
  walk.output_block = y.block();
  walk.output_plane = y.plane_stride() * lanes;
  walk.output_row = y.row_stride() * lanes;
  walk.output_pixel = lanes;
  walk.tail_at = y.row();
  walk.tail = y.halo * lanes;
  walk.bottom = y.halo * y.row_stride() * lanes;
  return walk;
}

// The walk from dy to the pixels of dx in one phase of the stride; of no rows if there are none.
Walk transpose_walk(const ConvLayer& layer, const Stack& dy, const float* input, const Stack& dx,
                    float* output, std::int64_t blocks, std::int64_t phase_y, std::int64_t phase_x) {
  const std::int64_t lanes = dx.lanes, stride = layer.stride;
  Walk walk;
  if (phase_y >= dx.height || phase_x >= dx.width) return walk;
  walk.blocks = blocks;
  walk.lanes = lanes;
  walk.rows = dx.channels;
  walk.channels = dy.channels;
  walk.height = (dx.height - phase_y + stride - 1) / stride;
  walk.width = (dx.width - phase_x + stride - 1) / stride;
  std::int64_t needed = 0;
  for (std::int64_t k = 0; k < layer.positions(); ++k) {
    const std::int64_t y = k / layer.kernel_width - layer.padding, x = k % layer.kernel_width - layer.padding;
    const std::int64_t up = floor_divide(y, stride), left = floor_divide(x, stride);
    if (y - up * stride != phase_y || x - left * stride != phase_x) continue;
    walk.used[walk.taps++] = static_cast<std::uint8_t>(k);
    walk.tap[k] = static_cast<std::int32_t>(-(up * dy.row_stride() + left) * lanes);
    needed = std::max(
        {needed, up, left, walk.height - 1 - up - (dy.height - 1), walk.width - 1 - left - (dy.width - 1)});
  }
  require(dy.halo >= needed, "dy has halo ", dy.halo, ", but the gradient of the input needs ", needed);
  // A list that names a kernel position of another phase is wrong, but must not lead out of the stack.
  for (std::int64_t k = 0, next = 0; walk.taps > 0 && k <= max_taps; ++k) {
    if (next < walk.taps && walk.used[next] == k)
      ++next;
    else
      walk.tap[k] = walk.tap[walk.used[0]];
  }
  // Towards higher addresses, which processors foresee better: a quarter of a dense layer's time.
  std::reverse(walk.used, walk.used + walk.taps);
  walk.input = ahead(input, dy.origin() * lanes);
  walk.input_block = dy.block();
  walk.input_plane = dy.plane_stride() * lanes;
  walk.input_row = dy.row_stride() * lanes;
  walk.input_pixel = lanes;
  walk.output = ahead(output, (dx.origin() + phase_y * dx.row_stride() + phase_x) * lanes);
  walk.output_block = dx.block();
  walk.output_plane = dx.plane_stride() * lanes;
  walk.output_row = stride * dx.row_stride() * lanes;
  walk.output_pixel = stride * lanes;
  if (phase_x == 0) {
    walk.tail_at = dx.row();
    walk.tail = dx.halo * lanes;
    if ((dx.height - 1) % stride == phase_y) walk.bottom = dx.halo * dx.row_stride() * lanes;
  }
  return walk;
}

// Runs one walk; `packed` has room for its weights as the algorithm wants them.
void run_walk(const Context& context, Algorithm algorithm, Walk& walk, const SparseRows& rows,
              float* packed) {
  const ConvKernels& kernel = conv_kernels();
  walk.winograd = algorithm == Algorithm::winograd;
  if (algorithm != Algorithm::sparse && walk.taps > 0) {
    context.parallel_for(kernel.pack_tasks(walk),
                         [&](std::int64_t task) { kernel.pack(walk, rows, packed, task); });
    context.parallel_for(kernel.dense_tasks(walk),
                         [&](std::int64_t task) { kernel.dense(walk, packed, task); });
  } else {
    context.parallel_for(kernel.sparse_tasks(walk, rows),
                         [&](std::int64_t task) { kernel.sparse(walk, rows, task); });
  }
}

void zero_fronts(const Stack& stack, float* data, std::int64_t blocks) {
  for (std::int64_t block = 0; block < blocks; ++block) stack.zero_front(data + block * stack.block());
}

// The steps of the mask, or of what the activation is applied to, every `stride` pixels of its stack.
void set_mask_steps(Walk& walk, const Stack& stack, std::int64_t stride) {
  walk.mask_block = stack.block();
  walk.mask_plane = stack.plane_stride() * stack.lanes;
  walk.mask_row = stride * stack.row_stride() * stack.lanes;
  walk.mask_pixel = stride * stack.lanes;
}

// The room that all weights are packed into: four numbers for three in Winograd's form.
Scratch<float> packing_room(const ConvLayer& layer) {
  if (layer.algorithm == Algorithm::sparse) return Scratch<float>();
  const std::int64_t weights = layer.weights();
  return Scratch<float>(static_cast<std::size_t>(
      layer.algorithm == Algorithm::winograd ? weights / winograd_positions * 4 : weights));
}

struct Conv {
  static constexpr const char* name = "Conv";
  static constexpr std::array inputs{Port{"x", float32}, Port{"value", float32},
                                     Port{"affine", float32, optional}, Port{"residual", float32, optional},
                                     Port{"lists", int32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"bits", uint8, optional},
                                      Port{"pre", float32, optional}};

  explicit Conv(const Attributes& attributes)
      : layer(attributes),
        pre_stack(Pre::geometry(attributes, layer.y)),
        activation(activation_from(attributes)) {
    layer.check_algorithm(layer.y);
  }

  void compute(Context& context) const {
    const auto x = context.input<float>(0);
    const std::int64_t blocks = layer.x.blocks(x, "x");
    const Addend residual(context.input<float>(3), layer.y, blocks, "residual");
    const auto affine = layer.slots.bind(context.input<float>(2), "affine");
    const SparseRows rows = Lists(layer, context.input<std::int32_t>(4), context.input<float>(1)).forward();
    Walk walk = forward_walk(layer, layer.x, x.data(), layer.y, nullptr, blocks);

    const auto y = context.output<float>(0, layer.y.shape(blocks));
    const auto bits = context.output<std::uint8_t>(1, layer.y.bits_shape(blocks));
    const Pre pre(context, 2, pre_stack, blocks);
    walk.output = y.data() + layer.y.at(0, 0, 0);
    walk.scale = affine.scale;
    walk.shift = affine.shift;
    walk.addend = residual.row(0, 0, 0);
    walk.activation = activation;
    walk.pre = pre.row(0, 0, 0);
    set_mask_steps(walk, pre_stack, 1);
    if (bits) walk.bits = bits.data();
    walk.bits_row = layer.y.bit_row();
    walk.bits_plane = layer.y.height * walk.bits_row;
    walk.bits_block = layer.y.channels * walk.bits_plane;
    walk.bits_pixel = layer.y.lanes;
    const auto room = packing_room(layer);
    zero_fronts(layer.y, y.data(), blocks);
    if (pre_stack.halo > 0)
      for_planes(context, blocks, pre_stack.channels,
                 [&](std::int64_t block, std::int64_t channel) { pre.zero_halo(block, channel); });
    run_walk(context, layer.algorithm, walk, rows, room.data());
  }

  ConvLayer layer;
  Stack pre_stack;
  Activation activation;
};
const Register<Conv> conv;

// The gradient of the input, dx = act'(mask) · (convᵀ(scale · dy) + addend).
InputGradient input_gradient(const ConvLayer& layer, const Attributes& attributes) {
  layer.check_algorithm(layer.x);
  return {attributes, layer.y.with_halo(attributes.integer("dy_halo")),
          layer.x.with_halo(attributes.integer("dx_halo", 0))};
}

// Checks that every phase of the stride fits in dy's halo.
void check_phases(const ConvLayer& layer, const InputGradient& gradient) {
  check_size(gradient.dy);
  check_size(gradient.dx);
  for (std::int64_t phase = 0; phase < layer.stride * layer.stride; ++phase)
    transpose_walk(layer, gradient.dy, nullptr, gradient.dx, nullptr, 1, phase / layer.stride,
                   phase % layer.stride);
}

// Runs the walks of all phases, from dy at `from` to dx at `to`; `rows` are those of phase 0.
void run_phases(const Context& context, const ConvLayer& layer, const InputGradient& gradient,
                const float* from, const Finish& finish, SparseRows rows, float* to, std::int64_t blocks,
                float* packed) {
  const Stack &dx = gradient.dx, &mask = finish.mask.stack();
  zero_fronts(dx, to, blocks);
  const std::int64_t stride = layer.stride, lanes = dx.lanes;
  for (std::int64_t phase = 0; phase < stride * stride; ++phase, ++rows.pointer) {
    const std::int64_t phase_y = phase / stride, phase_x = phase % stride;
    Walk walk = transpose_walk(layer, gradient.dy, from, dx, to, blocks, phase_y, phase_x);
    if (walk.rows == 0) continue;
    walk.addend = ahead(finish.addend.row(0, 0, phase_y), phase_x * lanes);
    walk.mask = ahead(finish.mask.values(0, 0, phase_y), phase_x * lanes);
    walk.through = finish.mask.activation();
    set_mask_steps(walk, mask, stride);
    walk.mask_bits = finish.mask.bits(0, 0, phase_y);
    walk.bits_row = stride * dx.bit_row();
    walk.bits_plane = dx.height * dx.bit_row();
    walk.bits_block = dx.channels * walk.bits_plane;
    walk.bits_first = phase_x * lanes;
    walk.bits_pixel = stride * lanes;
    if (walk.taps == 0) {
      // No kernel position reaches these pixels: an entry here would be a fault of the lists.
      for (std::int64_t row = 0; row < walk.rows; ++row)
        require(rows.begin(row) == rows.end(row),
                "lists: an entry lies in a phase that no kernel position reaches");
    }
    run_walk(context, layer.algorithm, walk, rows, packed);
    packed = ahead(packed, walk.rows * walk.channels * walk.taps);
  }
}

struct ConvInputGrad {
  static constexpr const char* name = "ConvInputGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"value", float32},
                                     Port{"affine", float32, optional},
                                     Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional},
                                     Port{"lists", int32}};
  static constexpr std::array outputs{Port{"dx", float32}};

  explicit ConvInputGrad(const Attributes& attributes)
      : layer(attributes), gradient(input_gradient(layer, attributes)) {
    check_phases(layer, gradient);
  }

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = gradient.dy.blocks(dy, "dy");
    const auto affine = layer.slots.bind(context.input<float>(2), "affine");
    const Finish finish = gradient.finish(context, 3, 4, blocks);
    const SparseRows rows =
        Lists(layer, context.input<std::int32_t>(5), context.input<float>(1)).transpose(affine.scale);
    const auto dx = context.output<float>(0, gradient.dx.shape(blocks));
    const auto room = packing_room(layer);
    run_phases(context, layer, gradient, dy.data(), finish, rows, dx.data(), blocks, room.data());
  }

  ConvLayer layer;
  InputGradient gradient;
};
const Register<ConvInputGrad> conv_input_grad;

struct ConvGrad {
  static constexpr const char* name = "ConvGrad";
  static constexpr std::array inputs{Port{"dy", float32},
                                     Port{"x", float32},
                                     Port{"value", float32},
                                     Port{"affine", float32, optional},
                                     Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional},
                                     Port{"coo_grad", float32},
                                     Port{"affine_grad", float32, optional},
                                     Port{"lists", int32}};
  static constexpr std::array outputs{Port{"dx", float32, optional},
                                      Port{"coo_grad_out", float32, aliases(6)},
                                      Port{"affine_grad_out", float32, optional_aliases(7)}};

  explicit ConvGrad(const Attributes& attributes)
      : layer(attributes), gradient(input_gradient(layer, attributes)) {
    forward_walk(layer, layer.x, nullptr, gradient.dy, nullptr, 1);
  }

  void compute(Context& context) const {
    const auto dy = context.input<float>(0);
    const auto x = context.input<float>(1);
    const auto value = context.input<float>(2);
    const std::int64_t blocks = gradient.dy.blocks(dy, "dy");
    layer.x.check(x, blocks, "x");
    const auto affine = layer.slots.bind(context.input<float>(3), "affine");
    const Finish finish = gradient.finish(context, 4, 5, blocks);
    const Lists lists(layer, context.input<std::int32_t>(8), value);
    const SparseRows rows = lists.forward();
    require(context.input<float>(6).size() == value.size(), "coo_grad has ", context.input<float>(6).size(),
            " elements, value has ", value.size());
    layer.slots.bind_if_there(context.input<float>(7), "affine_grad");

    const auto dx = context.output<float>(0, gradient.dx.shape(blocks));
    const auto room = packing_room(layer);
    if (dx) {
      check_phases(layer, gradient);
      run_phases(context, layer, gradient, dy.data(), finish, lists.transpose(affine.scale), dx.data(),
                 blocks, room.data());
    }
    const auto coo_grad = context.in_place<float>(1, 6);
    const auto sums = layer.slots.bind_if_there(context.in_place<float>(2, 7), "affine_grad");
    const Walk walk = forward_walk(layer, layer.x, x.data(), gradient.dy, nullptr, blocks);
    WeightGradient weights;
    weights.dy = dy.data() + gradient.dy.at(0, 0, 0);
    weights.scale = affine.scale;
    weights.grad = coo_grad.data();
    weights.dscale = sums.scale;
    weights.dshift = sums.shift;
    const ConvKernels& kernel = conv_kernels();
    // Winograd's products are the other walk's; here all weights are visited in one way.
    if (layer.algorithm != Algorithm::sparse)
      context.parallel_for(kernel.dense_gradient_tasks(walk), [&](std::int64_t task) {
        kernel.dense_gradient(walk, rows, weights, room.data(), task);
      });
    else
      context.parallel_for(kernel.gradient_tasks(walk, rows),
                           [&](std::int64_t task) { kernel.gradient(walk, rows, weights, task); });
  }

  ConvLayer layer;
  InputGradient gradient;
};
const Register<ConvGrad> conv_grad;

}  // namespace
}  // namespace edge_bcs
