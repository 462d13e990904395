// Pooling: maximum and average over windows, and their gradients.

#include <algorithm>
#include <array>

#include "kernels/half_rows.h"
#include "ops/lanes.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// Windows along one axis of `size` pixels: `count` of them, each of `kernel` pixels every `stride`, on an axis with pixels
// around it that hold nothing; or, adaptive, as many pixels as are due to each of them. A window may reach beyond the
// pixels behind the axis.
struct Windows {
  std::int64_t size = 1, count = 1, kernel = 1, stride = 1, before = 0, after = 0;
  bool adaptive = false;

  // Where window o begins and ends.
  std::int64_t begin(std::int64_t o) const { return adaptive ? o * size / count : o * stride - before; }
  std::int64_t end(std::int64_t o) const {
    return adaptive ? ((o + 1) * size + count - 1) / count : begin(o) + kernel;
  }
  // The same without what lies beside the axis; at least one pixel.
  std::int64_t first(std::int64_t o) const { return std::max<std::int64_t>(0, begin(o)); }
  std::int64_t last(std::int64_t o) const { return std::min(size, end(o)); }
  // Pixels that an average counts, with or without those around the axis.
  std::int64_t counted(std::int64_t o, bool around) const {
    return around ? std::min(size + after, end(o)) - begin(o) : last(o) - first(o);
  }
  // Pixels of the widest window.
  std::int64_t widest() const { return adaptive ? (size + count - 1) / count + 1 : kernel; }
  // Whether the windows lie side by side, so that no pixel is in two of them.
  bool apart() const { return !adaptive && stride == kernel && before == 0; }
  // Whether each window is the pixel at its place.
  bool copies() const { return size == count && (adaptive || (kernel == 1 && stride == 1 && before == 0)); }

  void check(const char* axis) const {
    if (adaptive) return;
    const std::int64_t room = size + before + after - kernel;
    const std::int64_t whole = room / stride + 1, cut = (room + stride - 1) / stride + 1;
    require(room >= 0 && (count == whole || count == cut) && begin(count - 1) < size, "pooling ", size,
            " by ", kernel, " every ", stride, " with padding ", before, " and ", after,
            " does not give an output ", axis, " of ", count);
  }
};

// Attributes kernel [kh, kw], strides [sh, sw] and pads [top, left, bottom, right]; artifacts of 0.1 have one number for
// each: kernel, stride, padding.
struct Pooling : Maps {
  Windows down, across;

  explicit Pooling(const Attributes& attributes) : Maps(attributes) {
    const auto kernel = numbers<2>(attributes, "kernel", "kernel", 1, 1 << 14, 1),
               strides = numbers<2>(attributes, "strides", "stride", 1, 1 << 14, 1);
    const auto pads = numbers<4>(attributes, "pads", "padding", 0, 1 << 14, 0);
    const bool adaptive = attributes.flag("adaptive", false);
    down = {in.height, out.height, kernel[0], strides[0], pads[0], pads[2], adaptive};
    across = {in.width, out.width, kernel[1], strides[1], pads[1], pads[3], adaptive};
    for (const Windows* axis : {&down, &across})
      require(axis->before < axis->kernel && axis->after < axis->kernel, "the padding ", axis->before,
              " and ", axis->after, " of a window of ", axis->kernel, " pixels is no smaller than it");
    down.check("height");
    across.check("width");
  }

  bool copies() const { return down.copies() && across.copies(); }

 private:
  // A list of numbers in [low, high], or the one number that all of them are.
  template <std::size_t count>
  static std::array<std::int64_t, count> numbers(const Attributes& attributes, const char* name,
                                                 const char* single, std::int64_t low, std::int64_t high,
                                                 std::int64_t otherwise) {
    std::array<std::int64_t, count> found;
    const auto list = attributes.integers(name, {});
    require(list.empty() || list.size() == count, "the attribute ", name, " has ", list.size(),
            " numbers, not ", count);
    found.fill(list.empty() ? attributes.integer(single, otherwise) : 0);
    std::copy_n(list.begin(), list.size(), found.begin());
    for (const std::int64_t number : found)
      require(low <= number && number <= high, "attribute ", list.empty() ? single : name, " is ", number,
              ", not in [", low, ", ", high, "]");
    return found;
  }
};

// Where the choices of output row (c, oy) begin.
std::int64_t choice_at(const Stack& out, std::int64_t nb, std::int64_t c, std::int64_t oy) {
  return ((nb * out.channels + c) * out.height + oy) * out.row();
}

// Output row oy of a pooling as the kernels see it.
PoolRow pool_row(const Pooling& pooling, std::int64_t oy) {
  return {.lanes = pooling.in.lanes,
          .width = pooling.in.width,
          .out_width = pooling.out.width,
          .kernel = pooling.across.kernel,
          .stride = pooling.across.stride,
          .padding = pooling.across.before,
          .top = pooling.down.first(oy) - pooling.down.begin(oy),
          .bottom = pooling.down.last(oy) - pooling.down.begin(oy),
          .row = pooling.in.row_stride() * pooling.in.lanes};
}

// Image rows of a window in half precision, as floats one after the other.
struct WideRows {
  static constexpr std::int64_t most = 2 * most_half_width * 16;
  alignas(64) float numbers[most];
};

// A pooling whose choices fit into a byte.
struct MaxPooling : Pooling {
  explicit MaxPooling(const Attributes& attributes) : Pooling(attributes) {
    require(down.kernel * across.kernel <= 255, "a maximum over ", down.kernel, " by ", across.kernel,
            " pixels is over more than 255");
    require(!down.adaptive, "a maximum has no windows that differ");
    require(!in.half || down.kernel * in.row() <= WideRows::most, "a maximum over ", down.kernel, " rows of ",
            in.row(), " numbers has no half-precision form");
  }

  // The kernels of its windows, where they are 2 × 2 pixels, lie side by side and fill the image.
  const HalfRowKernels* twos() const {
    const auto fills = [](const Windows& axis, std::int64_t in, std::int64_t out) {
      return axis.kernel == 2 && axis.stride == 2 && axis.before == 0 && in == 2 * out;
    };
    const bool all =
        in.half && !out.vector() && fills(down, in.height, out.height) && fills(across, in.width, out.width);
    return all ? half_rows() : nullptr;
  }
};

struct MaxPool {
  static constexpr const char* name = "MaxPool";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"choice", uint8, optional}};

  MaxPooling pooling;
  Function function;  // of the maximum

  explicit MaxPool(const Attributes& attributes)
      : pooling(attributes), function(activation_from(attributes).function) {
    require(function == Function::none || function == Function::relu || function == Function::relu6,
            "attribute activation of a maximum is none of \"none\", \"relu\" and \"relu6\"");
  }

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x"), lanes = in.lanes;
    const auto y = context.output<float>(0, out.shape(blocks));
    const auto choice =
        context.output<std::uint8_t>(1, {blocks, out.channels * out.height * out.width, lanes});
    if (const HalfRowKernels* const kernels = pooling.twos())
      return for_planes(context, blocks, out.channels, [&](std::int64_t nb, std::int64_t c) {
        for (std::int64_t oy = 0; oy < out.height; ++oy)
          kernels->max_pool(half_numbers(in.row(x.data(), nb, c, 2 * oy)),
                            half_numbers(in.row(x.data(), nb, c, 2 * oy + 1)), lanes, out.width, function,
                            half_numbers(out.row(y.data(), nb, c, oy)),
                            choice ? choice.data() + choice_at(out, nb, c, oy) : nullptr);
        out.zero_halo(out.ahead(y.data(), nb * out.block()), c);
      });
    write_rows(context, out, y.data(), blocks,
               [&](float* to, std::int64_t nb, std::int64_t c, std::int64_t oy) {
      const PoolRow row = pool_row(pooling, oy);
      std::uint8_t* const chosen = choice ? choice.data() + choice_at(out, nb, c, oy) : nullptr;
      if (in.half) return in_half(row, in.row(x.data(), nb, c, pooling.down.first(oy)), to, chosen);
      const float* window = x.data() + in.at(nb, c, 0) + pooling.down.begin(oy) * row.row;
      row_kernels().max_pool(row, window, function, to, chosen);
    });
  }

 private:
  // The same from a stack in half precision; `top` is the first row of the image that counts.
  [[gnu::noinline]] void in_half(PoolRow row, const float* top, float* to, std::uint8_t* chosen) const {
    const Stack& in = pooling.in;
    WideRows wide;
    for (std::int64_t i = 0; i < row.bottom - row.top; ++i)
      widen_row(in, in.ahead(top, i * row.row), 0, in.width, wide.numbers + i * in.row());
    row.row = in.row();
    row_kernels().max_pool(row, wide.numbers - row.top * row.row, function, to, chosen);
  }
};
const Register<MaxPool> max_pool;

struct MaxPoolGrad {
  static constexpr const char* name = "MaxPoolGrad";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"dy", float32}, Port{"choice", uint8}};
  static constexpr std::array outputs{Port{"dx", float32}};

  MaxPooling pooling;

  explicit MaxPoolGrad(const Attributes& attributes) : pooling(attributes) {}

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto dy = context.input<float>(0);
    const auto choice = context.input<std::uint8_t>(1);
    const std::int64_t blocks = out.blocks(dy, "dy"), lanes = in.lanes;
    const Shape choices{blocks, out.channels * out.height * out.width, lanes};
    require(choice.shape() == choices, "choice is ", choice.shape().text(), ", not ", choices.text());
    const auto dx = context.output<float>(0, in.shape(blocks));
    if (const HalfRowKernels* const kernels = pooling.twos())
      return for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
        for (std::int64_t oy = 0; oy < out.height; ++oy)
          kernels->gradient(half_numbers(out.row(dy.data(), nb, c, oy)),
                            choice.data() + choice_at(out, nb, c, oy), lanes, out.width,
                            half_numbers(in.row(dx.data(), nb, c, 2 * oy)),
                            half_numbers(in.row(dx.data(), nb, c, 2 * oy + 1)));
        in.zero_halo(in.ahead(dx.data(), nb * in.block()), c);
      });
    // Windows that lie side by side write every pixel that they have; the others start from zeros.
    const bool tiled = pooling.down.apart() && pooling.across.apart();
    const std::int64_t covered = tiled ? pooling.down.last(out.height - 1) : 0,
                       across = tiled ? pooling.across.last(out.width - 1) : 0;
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      if (in.half) return plane_in_half(dy.data(), choice.data(), dx.data(), nb, c);
      for (std::int64_t y = 0; y < in.height; ++y) {
        const std::int64_t written = y < covered ? across : 0;
        std::fill_n(dx.data() + in.at(nb, c, y, written), (in.width - written) * lanes, 0.0f);
      }
      in.zero_halo(dx.data() + nb * in.block(), c);
      for (std::int64_t oy = 0; oy < out.height; ++oy) {
        const PoolRow row = pool_row(pooling, oy);
        float* window = dx.data() + in.at(nb, c, 0) + pooling.down.begin(oy) * row.row;
        row_kernels().max_pool_gradient(row, dy.data() + out.at(nb, c, oy),
                                        choice.data() + choice_at(out, nb, c, oy), !tiled, window);
      }
    });
  }

 private:
  // A plane in half precision. A row of dx is rounded when all windows that reach it have been there: the rows of a window
  // wait as floats.
  [[gnu::noinline]] void plane_in_half(const float* dy, const std::uint8_t* choice, float* dx,
                                       std::int64_t nb, std::int64_t c) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const std::int64_t floats = in.row(), rows = pooling.down.kernel;
    WideRow gradient;
    WideRows wide;
    std::fill_n(wide.numbers, rows * floats, 0.0f);
    std::int64_t first = 0;  // the image row that waits first
    const auto finish_until = [&](std::int64_t end) {
      for (; first < end; ++first) {
        narrow_row(in, wide.numbers, in.row(dx, nb, c, first));
        std::copy_n(wide.numbers + floats, (rows - 1) * floats, wide.numbers);
        std::fill_n(wide.numbers + (rows - 1) * floats, floats, 0.0f);
      }
    };
    for (std::int64_t oy = 0; oy < out.height; ++oy) {
      finish_until(pooling.down.first(oy));
      PoolRow row = pool_row(pooling, oy);
      row.row = floats;
      row_kernels().max_pool_gradient(row, gradient.of(out, out.row(dy, nb, c, oy)),
                                      choice + choice_at(out, nb, c, oy), true,
                                      wide.numbers - row.top * floats);
    }
    finish_until(in.height);
    in.zero_halo(in.ahead(dx, nb * in.block()), c);
  }
};
const Register<MaxPoolGrad> max_pool_grad;

// What an average divides its windows by: pixels around the image count if the attribute count_include_pad says so.
struct Average : Pooling {
  bool around;

  explicit Average(const Attributes& attributes)
      : Pooling(attributes), around(attributes.flag("count_include_pad", true)) {}

  float weight(std::int64_t oy, std::int64_t ox) const {
    return 1.0f / static_cast<float>(down.counted(oy, around) * across.counted(ox, around));
  }
};

struct AveragePool {
  static constexpr const char* name = "AveragePool";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  Average pooling;

  explicit AveragePool(const Attributes& attributes) : pooling(attributes) {}

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto y = context.output<float>(0, out.shape(blocks));
    write_rows(context, out, y.data(), blocks,
               [&](float* to, std::int64_t nb, std::int64_t c, std::int64_t oy) {
      const float* const top = in.row(x.data(), nb, c, pooling.down.first(oy));
      if (pooling.copies())
        copy(top, to);
      else if (pooling.across.widest() * in.lanes > piece / 2)
        for (std::int64_t ox = 0; ox < out.width; ++ox) wide(top, oy, ox, to + ox * in.lanes);
      else
        for (std::int64_t ox = 0; ox < out.width;) ox = narrow(top, oy, ox, to);
    });
  }

 private:
  static constexpr std::int64_t piece = 512;  // floats of a row

  void copy(const float* row, float* to) const {
    WideRow wide;
    std::copy_n(wide.of(pooling.in, row), pooling.in.row(), to);
  }

  // The mean of one window; `top` is its first row of the image, column 0.
  void wide(const float* top, std::int64_t oy, std::int64_t ox, float* mean) const {
    const Stack& in = pooling.in;
    const std::int64_t left = pooling.across.first(ox), count = pooling.across.last(ox) - left;
    LaneSums sums(in.lanes);
    WideRow wide;
    for (std::int64_t iy = 0; iy < pooling.down.last(oy) - pooling.down.first(oy); ++iy) {
      const float* const row = in.ahead(top, iy * in.row_stride() * in.lanes);
      sums.add(wide.part(in, row, left, count), count * in.lanes);
    }
    std::array<double, most_lanes> totals;
    sums.write(totals.data());
    const float weight = pooling.weight(oy, ox);
    for (std::int64_t b = 0; b < in.lanes; ++b) mean[b] = static_cast<float>(totals[b] * weight);
  }

  // The means of the windows from ox on that a piece of the rows holds: the sums of its columns, then those of the columns
  // of each window. Returns the window behind the last.
  std::int64_t narrow(const float* top, std::int64_t oy, std::int64_t ox, float* to) const {
    const Stack& in = pooling.in;
    const std::int64_t left = pooling.across.first(ox);
    const std::int64_t right = std::min(in.width, left + piece / in.lanes);
    std::array<double, piece> columns;
    const std::int64_t count = (right - left) * in.lanes;
    std::fill_n(columns.data(), count, 0.0);
    WideRow wide;
    for (std::int64_t iy = 0; iy < pooling.down.last(oy) - pooling.down.first(oy); ++iy) {
      const float* const row =
          wide.part(in, in.ahead(top, iy * in.row_stride() * in.lanes), left, right - left);
      for (std::int64_t j = 0; j < count; ++j) columns[j] += static_cast<double>(row[j]);
    }
    for (; ox < pooling.out.width && pooling.across.last(ox) <= right; ++ox) {
      const double weight = pooling.weight(oy, ox);
      const double* const window = columns.data() + (pooling.across.first(ox) - left) * in.lanes;
      const std::int64_t width = pooling.across.last(ox) - pooling.across.first(ox);
      with_lanes(in.lanes, [&](auto lanes) {
        std::array<double, most_lanes> sum;
        std::copy_n(window, lanes, sum.data());
        for (std::int64_t kx = 1; kx < width; ++kx)
          for (std::int64_t b = 0; b < lanes; ++b) sum[b] += window[kx * lanes + b];
        for (std::int64_t b = 0; b < lanes; ++b) to[ox * lanes + b] = static_cast<float>(sum[b] * weight);
      });
    }
    return ox;
  }
};
const Register<AveragePool> average_pool;

struct AveragePoolGrad {
  static constexpr const char* name = "AveragePoolGrad";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"dy", float32}, Port{"addend", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Average pooling;
  InputGradient gradient;

  explicit AveragePoolGrad(const Attributes& attributes)
      : pooling(attributes), gradient(attributes, pooling.out, pooling.in) {}

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = out.blocks(dy, "dy");
    const Finish finish = gradient.finish(context, 1, 2, blocks);
    const auto dx = context.output<float>(0, in.shape(blocks));
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      std::int64_t above = 0;  // the first output row whose windows do not end above row y
      WideRow from, result;
      const auto row_of = [&](std::int64_t oy) { return from.of(out, out.row(dy.data(), nb, c, oy)); };
      for (std::int64_t y = 0; y < in.height; ++y) {
        float* const place = in.row(dx.data(), nb, c, y);
        float* const row = result.to(in, place);
        if (pooling.copies()) {
          std::copy_n(row_of(y), in.row(), row);
        } else if (pooling.down.apart() && pooling.across.apart()) {
          const std::int64_t oy = y / pooling.down.kernel;
          if (oy < out.height)
            tile(row_of(oy), oy, row);
          else
            std::fill_n(row, in.row(), 0.0f);
        } else {
          std::fill_n(row, in.row(), 0.0f);
          while (above < out.height && pooling.down.end(above) <= y) ++above;
          for (std::int64_t oy = above; oy < out.height && pooling.down.begin(oy) <= y; ++oy)
            spread(row_of(oy), oy, row);
        }
        finish(row, 1, 0, row, nb, c, y);
        result.put(in, place);
      }
      in.zero_halo(in.ahead(dx.data(), nb * in.block()), c);
    });
  }

 private:
  // Writes output row oy, at `from`, to an input row that is its windows', which lie side by side.
  void tile(const float* from, std::int64_t oy, float* row) const {
    with_lanes(pooling.in.lanes, [&](auto lanes) {
      float* to = row;
      for (std::int64_t ox = 0; ox < pooling.out.width; ++ox) {
        const float weight = pooling.weight(oy, ox);
        std::array<float, most_lanes> share;
        for (std::int64_t b = 0; b < lanes; ++b) share[b] = from[ox * lanes + b] * weight;
        for (std::int64_t ix = pooling.across.first(ox); ix < pooling.across.last(ox); ++ix, to += lanes)
          for (std::int64_t b = 0; b < lanes; ++b) to[b] = share[b];
      }
      std::fill(to, row + pooling.in.row(), 0.0f);
    });
  }

  // Adds output row oy, at `from`, to an input row that its windows contain.
  void spread(const float* from, std::int64_t oy, float* row) const {
    with_lanes(pooling.in.lanes, [&](auto lanes) {
      for (std::int64_t ox = 0; ox < pooling.out.width; ++ox) {
        const float weight = pooling.weight(oy, ox);
        std::array<float, most_lanes> share;
        for (std::int64_t b = 0; b < lanes; ++b) share[b] = from[ox * lanes + b] * weight;
        for (std::int64_t ix = pooling.across.first(ox); ix < pooling.across.last(ox); ++ix)
          for (std::int64_t b = 0; b < lanes; ++b) row[ix * lanes + b] += share[b];
      }
    });
  }
};
const Register<AveragePoolGrad> average_pool_grad;

}  // namespace
}  // namespace edge_bcs
