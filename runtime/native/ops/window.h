// The windows of a convolution: kernel, strides, pads and dilations, for each axis its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/walk.h"
#include "ops/op.h"

namespace edge_bcs {

inline std::int64_t floor_divide(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// The windows along one axis. Window w begins at pixel w · stride − before; its positions are `dilation` pixels apart.
struct Axis {
  static constexpr std::int64_t most_stride = 64, most_pad = 255, most_dilation = 255;

  std::int64_t kernel = 1, stride = 1, before = 0, after = 0, dilation = 1;

  // The pixel that position t of window 0 meets.
  std::int64_t pixel(std::int64_t t) const { return t * dilation - before; }
  // Windows over `size` pixels; below 1 where none fits.
  std::int64_t windows(std::int64_t size) const {
    return floor_divide(size + before + after - 1 - (kernel - 1) * dilation, stride) + 1;
  }
  // How far `windows` windows reach beyond an image of `size` pixels, on the side where it is more.
  std::int64_t reach(std::int64_t size, std::int64_t windows) const {
    return std::max(before, (windows - 1) * stride + pixel(kernel - 1) - (size - 1));
  }
  bool in_range() const {
    return kernel >= 1 && kernel <= max_taps && stride >= 1 && stride <= most_stride && before >= 0 &&
           before <= most_pad && after >= 0 && after <= most_pad && dilation >= 1 &&
           dilation <= most_dilation;
  }
};

// Kernel position k = ky · kernel width + kx.
struct Window {
  Axis down, across;

  // From the attributes kernel, strides, pads (top, left, bottom, right; both 0 to 255) and dilations; or stride and padding,
  // one number for all, in the files of earlier releases.
  static Window from(const Attributes& attributes) {
    Window window;
    const auto kernel = attributes.integers("kernel");
    require(kernel.size() == 2 && kernel[0] >= 1 && kernel[1] >= 1 && kernel[0] <= max_taps &&
                kernel[1] <= max_taps && kernel[0] * kernel[1] <= max_taps,
            "attribute kernel is not two positive sizes with at most ", max_taps, " positions");
    window.down.kernel = kernel[0];
    window.across.kernel = kernel[1];
    const auto strides = read(attributes, "strides", 2, 1, Axis::most_stride, "stride");
    const auto pads = read(attributes, "pads", 4, 0, Axis::most_pad, "padding");
    const auto dilations = read(attributes, "dilations", 2, 1, Axis::most_dilation, nullptr);
    window.down.stride = strides[0];
    window.across.stride = strides[1];
    window.down.before = pads[0];
    window.across.before = pads[1];
    window.down.after = pads[2];
    window.across.after = pads[3];
    window.down.dilation = dilations[0];
    window.across.dilation = dilations[1];
    return window;
  }

  std::int64_t positions() const { return down.kernel * across.kernel; }
  // The strides cut the image into so many interleaved ones, its phases; a kernel position touches the pixels of one.
  std::int64_t phases() const { return down.stride * across.stride; }
  std::int64_t phase(std::int64_t k) const {
    const auto of = [](const Axis& axis, std::int64_t t) {
      return axis.pixel(t) - floor_divide(axis.pixel(t), axis.stride) * axis.stride;
    };
    return of(down, k / across.kernel) * across.stride + of(across, k % across.kernel);
  }
  bool in_range() const { return down.in_range() && across.in_range() && positions() <= max_taps; }

 private:
  // `count` numbers in [low, high] from the attribute `name`; where it is absent, so many times the attribute `one`, or `low`
  // where that has no name.
  static std::vector<std::int64_t> read(const Attributes& attributes, const char* name, std::size_t count,
                                        std::int64_t low, std::int64_t high, const char* one) {
    auto numbers = attributes.integers(name, {});
    if (numbers.empty()) numbers.assign(count, one == nullptr ? low : attributes.integer_in(one, low, high));
    const bool in_range = std::all_of(numbers.begin(), numbers.end(),
                                      [&](std::int64_t number) { return number >= low && number <= high; });
    require(numbers.size() == count && in_range, "attribute ", name, " is not ", count, " numbers in [", low,
            ", ", high, "]");
    return numbers;
  }
};

}  // namespace edge_bcs
