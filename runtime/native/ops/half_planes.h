// Depthwise layers in half precision, where no kernel has arithmetic in it for them. There is little arithmetic to a number, so
// what counts is that each is read and written in two bytes: some image rows of a plane are widened to float32 in the
// first-level caches, convolved there by the kernels of float32, and rounded once. Weights and sums are float32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

#include "kernels/walk.h"
#include "ops/conv_layer.h"
#include "ops/dispatch.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {

// The walks of a depthwise layer, forward or to its input, between a stack `in` and a stack `out` in half precision.
class HalfPlanes {
 public:
  // Floats on the thread's stack: of the input rows, and of the output rows that are made of them. A microcontroller, which has
  // no half precision, has none.
  static constexpr std::int64_t most_in = 64 * most_half_width, most_out = 32 * most_half_width;
  static constexpr std::int64_t most_rows = 16;  // of a walk, at a time

  // Of a layer that the processor's own kernels do not take; nothing of others.
  static std::optional<HalfPlanes> forward(const ConvLayer& layer, const Stack& out) {
    if (!takes(layer)) return {};
    const Axis& down = layer.window.down;
    return HalfPlanes(layer.x, out, down.stride, 1, down.pixel(0), down.pixel(down.kernel - 1));
  }

  // From dy to dx.
  static std::optional<HalfPlanes> transposed(const ConvLayer& layer, const Stack& dy, const Stack& dx) {
    if (!takes(layer)) return {};
    const Axis& down = layer.window.down;
    return HalfPlanes(dy, dx, 1, down.stride, -floor_divide(down.pixel(down.kernel - 1), down.stride),
                      -floor_divide(down.pixel(0), down.stride));
  }

  // The input as the walks shall see it: float32, of the same halo; and the output, which has none.
  Stack in() const { return in_.in_full(); }
  Stack out() const { return out_.in_full().with_halo(0); }

  // At which row and pixel of the output a walk begins.
  struct Offset {
    std::int64_t row = 0, pixel = 0;
  };
  // Walks from `input` to `output`, made from in() and out() with no memory behind them, and what is done to their sums:
  // `finish` with the scales and shifts of the channels, if there are any.
  struct Work {
    std::span<const Walk> walks;
    std::span<const Offset> offsets;
    const Weights& weights;
    const float* input;
    const Finish& finish;
    const float *scales, *shifts;
    float* output;
  };
  void run(const Context& context, const Work& work, std::int64_t blocks) const {
    for_planes(context, blocks, out_.channels,
               [&](std::int64_t nb, std::int64_t c) { make_plane(work, nb, c); });
  }

 private:
  // With as many rows in a band as there is room for.
  HalfPlanes(const Stack& in, const Stack& out, std::int64_t in_step, std::int64_t out_step,
             std::int64_t lowest, std::int64_t highest)
      : in_(in), out_(out), in_step_(in_step), out_step_(out_step), lowest_(lowest), highest_(highest) {
    const std::int64_t planes = Planes(in_.channels, out_.channels, 0).count;
    for (band_ = most_rows; band_ > 1 && !fits(planes);) --band_;
    require(fits(planes), "rows of ", in_.width, " pixels are too long for this layer in half precision");
  }

  static bool takes(const ConvLayer& layer) {
    return layer.x.half && layer.algorithm == Algorithm::depthwise &&
           (half_kernels().depthwise == nullptr || layer.window.positions() > run_of_entries);
  }

  static std::int64_t ceil_divided(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

  // Floats of the rows of an input plane that a band needs at most.
  std::int64_t plane() const {
    return (in_.halo + ((band_ - 1) * in_step_ + highest_ - lowest_ + 1) * in().row_stride()) * in_.lanes;
  }

  bool fits(std::int64_t planes) const {
    return planes * plane() <= most_in && band_ * out_step_ * out_.row() <= most_out;
  }

  // Not inlined: only who computes in half precision shall need this much of the stack.
  __attribute__((noinline)) void make_plane(const Work& work, std::int64_t nb, std::int64_t c) const {
    alignas(64) float from[most_in], to[most_out];
    const Planes planes(in_.channels, out_.channels, c);
    Weights own = work.weights;
    own.all += planes.weights * own.row_step;
    own.factor = ahead(own.factor, planes.weights);
    const float scale = work.scales == nullptr ? 1 : work.scales[c],
                shift = work.shifts == nullptr ? 0 : work.shifts[c];
    const std::int64_t rows = ceil_divided(out_.height, out_step_);
    WideRow wide;
    for (std::int64_t first = 0; first < rows; first += band_) {
      const std::int64_t last = std::min(rows, first + band_);
      for (std::int64_t p = 0; p < planes.count; ++p)
        widen(work.input, nb, planes.first + p, first * in_step_ + lowest_,
              (last - 1) * in_step_ + highest_ + 1, from + p * plane());
      for (std::size_t i = 0; i < work.walks.size(); ++i) {
        Walk walk = work.walks[i];
        if (first >= walk.height) continue;
        walk.rows = 1;
        walk.channels = planes.count;
        walk.height = std::min(last, walk.height) - first;
        walk.input = from + (in_.halo - lowest_ * in().row_stride()) * in_.lanes;
        walk.input_plane = plane();
        walk.output = to + work.offsets[i].row * out_.row() + work.offsets[i].pixel * out_.lanes;
        conv_kernels().depthwise(walk, own, 0, 0, walk.height);
      }
      for (std::int64_t y = first * out_step_; y < std::min(out_.height, last * out_step_); ++y) {
        float* const row = out_.row(work.output, nb, c, y);
        work.finish(to + (y - first * out_step_) * out_.row(), scale, shift, wide.to(out_, row), nb, c, y);
        wide.put(out_, row);
      }
    }
    work.finish.zero_halo(out_, work.output, nb, c);
  }

  // Rows [first, last) of a plane, zeros where the image has none, and the halo in front of each.
  void widen(const float* input, std::int64_t nb, std::int64_t c, std::int64_t first, std::int64_t last,
             float* to) const {
    const std::int64_t gap = in_.halo * in_.lanes, row = in_.row();
    std::fill_n(to, gap, 0.0f);
    to += gap;
    for (std::int64_t y = first; y < last; ++y, to += row + gap) {
      if (y < 0 || y >= in_.height)
        std::fill_n(to, row, 0.0f);
      else
        widen_row(in_, in_.row(input, nb, c, y), 0, in_.width, to);
      std::fill_n(to + row, gap, 0.0f);
    }
  }

  Stack in_, out_;
  // Rows of the input from one row of a walk to the next, and of the output; the input rows around the first of a walk.
  std::int64_t in_step_, out_step_, lowest_, highest_;
  std::int64_t band_;  // rows of a walk at a time
};

}  // namespace edge_bcs
