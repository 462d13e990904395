// What the convolution operators share: a layer's geometry, and the walks (kernels/walk.h) that compute it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "kernels/walk.h"
#include "ops/op.h"
#include "ops/slots.h"
#include "ops/stack.h"
#include "ops/window.h"

namespace edge_bcs {

// How the products of a walk are computed: over its connections, over all of its weights, over these with Winograd's
// products, or plane by plane where each has a group of its own. Which of them pays is decided where the graph is made.
enum class Algorithm { sparse, dense, winograd, depthwise };

inline Algorithm algorithm_from(const Attributes& attributes) {
  const std::string text = attributes.text("algorithm", "sparse");
  if (text == "sparse") return Algorithm::sparse;
  if (text == "dense") return Algorithm::dense;
  if (text == "depthwise") return Algorithm::depthwise;
  require(text == "winograd", "attribute algorithm is \"", text,
          "\", none of \"sparse\", \"dense\", \"winograd\" and \"depthwise\"");
  return Algorithm::winograd;
}

// The attributes that all convolution operators share. The weights are [y.channels, x.channels / groups, positions]: group g
// of the output channels meets group g of the input channels alone.
struct ConvLayer {
  Stack x, y;  // their halos are those of the forward operator
  Window window;
  std::int64_t groups;
  Slots slots;
  Algorithm algorithm;  // of the forward walk, or of that to the input

  explicit ConvLayer(const Attributes& attributes)
      : x(Stack::checked(attributes.integer("in_channels"), attributes.integer("in_height"),
                         attributes.integer("in_width"), attributes.integer("in_halo", 0),
                         attributes.integer("lanes"), attributes.half())),
        y(Stack::checked(attributes.integer("out_channels"), attributes.integer("out_height"),
                         attributes.integer("out_width"), attributes.integer("out_halo", 0), x.lanes,
                         x.half)),
        window(Window::from(attributes)),
        groups(attributes.integer_in("groups", 1, std::numeric_limits<std::int32_t>::max(), 1)),
        slots(Slots::if_any(attributes, y.channels)),
        algorithm(algorithm_from(attributes)) {
    require(x.channels % groups == 0 && y.channels % groups == 0, x.channels, " input channels and ",
            y.channels, " output channels cannot be cut into ", groups, " groups");
    require(algorithm != Algorithm::depthwise || groups == x.channels,
            "attribute algorithm is \"depthwise\", but ", x.channels, " input channels are ", groups,
            " groups");
    const Axis &down = window.down, &across = window.across;
    require(y.height == down.windows(x.height) && y.width == across.windows(x.width), "an output of ",
            y.height, " by ", y.width, " pixels does not follow from an input of ", x.height, " by ", x.width,
            ", kernel ", down.kernel, " by ", across.kernel, ", strides ", down.stride, " and ",
            across.stride, ", pads ", down.before, ", ", across.before, ", ", down.after, " and ",
            across.after, " and dilations ", down.dilation, " and ", across.dilation);
  }

  // Checks that the walk that makes the pixels of `result` can be computed as it is asked for.
  void check_algorithm(const Stack& result) const {
    const Axis &down = window.down, &across = window.across;
    require(algorithm != Algorithm::winograd ||
                (across.kernel == winograd_positions && window.phases() == 1 && down.dilation == 1 &&
                 across.dilation == 1 && result.width % winograd_pixels == 0 &&
                 result.lanes % winograd_lanes == 0),
            "attribute algorithm is \"winograd\", which takes kernels ", winograd_positions,
            " positions wide, stride 1, dilation 1, rows of a multiple of ", winograd_pixels,
            " pixels and a multiple of ", winograd_lanes, " lanes; here these are ", across.kernel, ", ",
            std::max(down.stride, across.stride), ", ", std::max(down.dilation, across.dilation), ", ",
            result.width, " and ", result.lanes);
  }

  // Checks that the layer has a half-precision form, if that is asked for.
  void check_half() const {
    require(!x.half || groups == 1 || algorithm == Algorithm::depthwise,
            "layers with groups of several channels have no half-precision form");
  }

  std::int64_t weights() const { return y.channels * (x.channels / groups) * window.positions(); }

  // Floats that a walk over all weights packs them into: four for three in Winograd's form.
  std::int64_t packed() const {
    if (algorithm == Algorithm::sparse || algorithm == Algorithm::depthwise) return 0;
    return algorithm == Algorithm::winograd ? weights() / winograd_positions * 4 : weights();
  }
};

// `place` + `distance`; null where the geometry alone is asked for.
template <class T>
T* ahead(T* place, std::int64_t distance) {
  return place == nullptr ? nullptr : place + distance;
}

// The same of numbers of a stack.
template <class T>
T* ahead(const Stack& stack, T* place, std::int64_t numbers) {
  return place == nullptr ? nullptr : stack.ahead(place, numbers);
}

// Within a batch block the kernels' distances are i32.
inline void check_size(const Stack& stack) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max() / 2;
  require(stack.block() <= most, "a batch block of ", stack.channels, " channels of ", stack.height, " by ",
          stack.width, " pixels with ", stack.lanes, " lanes is too large: ", stack.block(),
          " numbers, at most ", most, "; take fewer lanes");
}

// The forward walk from x; its output side is a stack of geometry y at `output` (null where only its steps matter).
inline Walk forward_walk(const ConvLayer& layer, const Stack& x, const float* input, const Stack& y,
                         float* output, std::int64_t blocks) {
  check_size(x);
  check_size(y);
  const Axis &down = layer.window.down, &across = layer.window.across;
  const std::int64_t needed = std::max(down.reach(x.height, y.height), across.reach(x.width, y.width));
  require(x.halo >= needed, "x has halo ", x.halo, ", but the convolution needs ", needed);
  const std::int64_t lanes = x.lanes;
  Walk walk;
  walk.blocks = blocks;
  walk.lanes = lanes;
  walk.rows = y.channels;
  walk.channels = x.channels;
  walk.height = y.height;
  walk.width = y.width;
  walk.taps = static_cast<int>(layer.window.positions());
  for (int k = 0; k < walk.taps; ++k) {
    walk.used[k] = static_cast<std::uint8_t>(k);
    walk.tap[k] = static_cast<std::int32_t>(
        (down.pixel(k / across.kernel) * x.row_stride() + across.pixel(k % across.kernel)) * lanes);
  }
  walk.input = ahead(x, input, x.origin() * lanes);
  walk.input_block = x.block();
  walk.input_plane = x.plane_stride() * lanes;
  walk.input_row = down.stride * x.row_stride() * lanes;
  walk.input_pixel = across.stride * lanes;
  walk.output = ahead(y, output, y.origin() * lanes);
  walk.output_block = y.block();
  walk.output_plane = y.plane_stride() * lanes;
  walk.output_row = y.row_stride() * lanes;
  walk.output_pixel = lanes;
  walk.tail_at = y.row();
  walk.tail = (y.row_stride() - y.width) * lanes;
  walk.bottom = y.halo * y.row_stride() * lanes;
  return walk;
}

// The walk from dy to the pixels of dx in one phase of the strides; of no rows if there are none.
inline Walk transpose_walk(const ConvLayer& layer, const Stack& dy, const float* input, const Stack& dx,
                           float* output, std::int64_t blocks, std::int64_t phase_y, std::int64_t phase_x) {
  const Axis &down = layer.window.down, &across = layer.window.across;
  const std::int64_t lanes = dx.lanes, positions = layer.window.positions();
  Walk walk;
  if (phase_y >= dx.height || phase_x >= dx.width) return walk;
  walk.blocks = blocks;
  walk.lanes = lanes;
  walk.rows = dx.channels;
  walk.channels = dy.channels;
  walk.height = (dx.height - phase_y + down.stride - 1) / down.stride;
  walk.width = (dx.width - phase_x + across.stride - 1) / across.stride;
  std::int64_t needed = 0;
  for (std::int64_t k = 0; k < positions; ++k) {
    const std::int64_t y = down.pixel(k / across.kernel), x = across.pixel(k % across.kernel);
    const std::int64_t up = floor_divide(y, down.stride), left = floor_divide(x, across.stride);
    if (y - up * down.stride != phase_y || x - left * across.stride != phase_x) continue;
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
  walk.input = ahead(dy, input, dy.origin() * lanes);
  walk.input_block = dy.block();
  walk.input_plane = dy.plane_stride() * lanes;
  walk.input_row = dy.row_stride() * lanes;
  walk.input_pixel = lanes;
  walk.output = ahead(dx, output, (dx.origin() + phase_y * dx.row_stride()) * lanes);
  if (dx.half)
    walk.first_pixel = phase_x;
  else
    walk.output = ahead(walk.output, phase_x * lanes);
  walk.output_block = dx.block();
  walk.output_plane = dx.plane_stride() * lanes;
  walk.output_row = down.stride * dx.row_stride() * lanes;
  walk.output_pixel = across.stride * lanes;
  if (phase_x == 0) {
    walk.tail_at = dx.row();
    walk.tail = (dx.row_stride() - dx.width) * lanes;
    if ((dx.height - 1) % down.stride == phase_y) walk.bottom = dx.halo * dx.row_stride() * lanes;
  }
  return walk;
}

// The steps of the mask, or of what the activation is applied to, every `down` rows and `across` pixels of its stack.
inline void set_mask_steps(Walk& walk, const Stack& stack, std::int64_t down, std::int64_t across) {
  walk.mask_block = stack.block();
  walk.mask_plane = stack.plane_stride() * stack.lanes;
  walk.mask_row = down * stack.row_stride() * stack.lanes;
  walk.mask_pixel = across * stack.lanes;
}

inline void zero_fronts(const Stack& stack, float* data, std::int64_t blocks) {
  for (std::int64_t block = 0; block < blocks; ++block)
    stack.zero_front(stack.ahead(data, block * stack.block()));
}

}  // namespace edge_bcs
