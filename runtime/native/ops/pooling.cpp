// Pooling: maximum and average over square windows, and their gradients.

#include <algorithm>

#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// A window of kernel × kernel pixels every `stride`, on images with `padding` pixels around them that do not
// count.
struct Pooling {
  Stack in, out;
  std::int64_t kernel, stride, padding;

  explicit Pooling(const Attributes& attributes)
      : kernel(attributes.integer_in("kernel", 1, 1 << 14)),
        stride(attributes.integer_in("stride", 1, 1 << 14)),
        padding(attributes.integer_in("padding", 0, kernel / 2, 0)) {
    const auto read = [&](const char* name) { return attributes.integer(name); };
    in =
        Stack::checked(read("channels"), read("in_height"), read("in_width"), read("in_halo"), read("lanes"));
    out = Stack::checked(in.channels, read("out_height"), read("out_width"), read("out_halo"), in.lanes);
    check(in.height, out.height, "height");
    check(in.width, out.width, "width");
  }

  // Where the windows of output row or column `o` begin and end, relative to the window, so that they stay in
  // the image.
  std::int64_t first(std::int64_t o) const { return std::max<std::int64_t>(0, padding - o * stride); }
  std::int64_t last(std::int64_t o, std::int64_t size) const {
    return std::min(kernel, size + padding - o * stride);
  }
  std::int64_t input(std::int64_t o, std::int64_t k) const { return o * stride - padding + k; }
  // Whether each window is one pixel, so that an average changes nothing but the place of the numbers.
  bool copies() const { return kernel == 1 && stride == 1 && padding == 0; }

 private:
  void check(std::int64_t from, std::int64_t to, const char* axis) const {
    require(from + 2 * padding >= kernel && to == (from + 2 * padding - kernel) / stride + 1, "pooling ",
            from, " by ", kernel, " every ", stride, " with padding ", padding, " does not give an output ",
            axis, " of ", to);
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
          .kernel = pooling.kernel,
          .stride = pooling.stride,
          .padding = pooling.padding,
          .top = pooling.first(oy),
          .bottom = pooling.last(oy, pooling.in.height),
          .row = pooling.in.row_stride() * pooling.in.lanes};
}

struct MaxPool {
  static constexpr const char* name = "MaxPool";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}, Port{"choice", uint8, optional}};

  Pooling pooling;
  Function function;  // of the maximum

  explicit MaxPool(const Attributes& attributes)
      : pooling(attributes), function(activation_from(attributes).function) {
    require(function == Function::none || function == Function::relu || function == Function::relu6,
            "attribute activation of a maximum is none of \"none\", \"relu\" and \"relu6\"");
    require(pooling.kernel <= 15, "the kernel ", pooling.kernel, " of a maximum is larger than 15");
  }

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x"), lanes = in.lanes;
    const auto y = context.output<float>(0, out.shape(blocks));
    const auto choice =
        context.output<std::uint8_t>(1, {blocks, out.channels * out.height * out.width, lanes});
    for_planes(context, blocks, out.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t oy = 0; oy < out.height; ++oy) {
        const PoolRow row = pool_row(pooling, oy);
        const float* window = x.data() + in.at(nb, c, 0) + pooling.input(oy, 0) * row.row;
        row_kernels().max_pool(row, window, function, y.data() + out.at(nb, c, oy),
                               choice ? choice.data() + choice_at(out, nb, c, oy) : nullptr);
      }
      out.zero_halo(y.data() + nb * out.block(), c);
    });
  }
};
const Register<MaxPool> max_pool;

struct MaxPoolGrad {
  static constexpr const char* name = "MaxPoolGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"choice", uint8}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Pooling pooling;

  explicit MaxPoolGrad(const Attributes& attributes) : pooling(attributes) {
    require(pooling.kernel <= 15, "the kernel ", pooling.kernel, " of a maximum is larger than 15");
  }

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto dy = context.input<float>(0);
    const auto choice = context.input<std::uint8_t>(1);
    const std::int64_t blocks = out.blocks(dy, "dy"), lanes = in.lanes;
    const Shape choices{blocks, out.channels * out.height * out.width, lanes};
    require(choice.shape() == choices, "choice is ", choice.shape().text(), ", not ", choices.text());
    const auto dx = context.output<float>(0, in.shape(blocks));
    // Windows that lie side by side write every pixel that they have; the others start from zeros.
    const bool tiled = pooling.stride == pooling.kernel && pooling.padding == 0;
    const std::int64_t covered = tiled ? out.height * pooling.kernel : 0,
                       across = tiled ? out.width * pooling.kernel : 0;
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t y = 0; y < in.height; ++y) {
        const std::int64_t written = y < covered ? across : 0;
        std::fill_n(dx.data() + in.at(nb, c, y, written), (in.width - written) * lanes, 0.0f);
      }
      in.zero_halo(dx.data() + nb * in.block(), c);
      for (std::int64_t oy = 0; oy < out.height; ++oy) {
        const PoolRow row = pool_row(pooling, oy);
        float* window = dx.data() + in.at(nb, c, 0) + pooling.input(oy, 0) * row.row;
        row_kernels().max_pool_gradient(row, dy.data() + out.at(nb, c, oy),
                                        choice.data() + choice_at(out, nb, c, oy), !tiled, window);
      }
    });
  }
};
const Register<MaxPoolGrad> max_pool_grad;

struct AveragePool {
  static constexpr const char* name = "AveragePool";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  Pooling pooling;

  explicit AveragePool(const Attributes& attributes) : pooling(attributes) {
    require(pooling.padding == 0, "the padding ", pooling.padding, " of an average is not 0");
  }

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto y = context.output<float>(0, out.shape(blocks));
    const float weight = 1.0f / static_cast<float>(pooling.kernel * pooling.kernel);
    for_planes(context, blocks, out.channels, [&](std::int64_t nb, std::int64_t c) {
      if (pooling.copies()) {
        for (std::int64_t row = 0; row < out.height; ++row)
          std::copy_n(x.data() + in.at(nb, c, row), in.row(), y.data() + out.at(nb, c, row));
        return out.zero_halo(y.data() + nb * out.block(), c);
      }
      std::array<double, 64> sum;
      for (std::int64_t oy = 0; oy < out.height; ++oy)
        for (std::int64_t ox = 0; ox < out.width; ++ox) {
          sum.fill(0);
          for (std::int64_t ky = 0; ky < pooling.kernel; ++ky) {
            const float* row = x.data() + in.at(nb, c, pooling.input(oy, ky), pooling.input(ox, 0));
            for (std::int64_t kx = 0; kx < pooling.kernel; ++kx)
              for (std::int64_t b = 0; b < in.lanes; ++b) sum[b] += row[kx * in.lanes + b];
          }
          float* mean = y.data() + out.at(nb, c, oy, ox);
          for (std::int64_t b = 0; b < in.lanes; ++b) mean[b] = static_cast<float>(sum[b] * weight);
        }
      out.zero_halo(y.data() + nb * out.block(), c);
    });
  }
};
const Register<AveragePool> average_pool;

struct AveragePoolGrad {
  static constexpr const char* name = "AveragePoolGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"addend", float32, optional},
                                     Port{"mask", ort::ElementType::any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Pooling pooling;
  InputGradient gradient;

  explicit AveragePoolGrad(const Attributes& attributes)
      : pooling(attributes), gradient(attributes, pooling.out, pooling.in) {
    require(pooling.padding == 0, "the padding ", pooling.padding, " of an average is not 0");
  }

  void compute(Context& context) const {
    const Stack &in = pooling.in, &out = pooling.out;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = out.blocks(dy, "dy"), lanes = in.lanes;
    const Finish finish = gradient.finish(context, 1, 2, blocks);
    const auto dx = context.output<float>(0, in.shape(blocks));
    const float weight = 1.0f / static_cast<float>(pooling.kernel * pooling.kernel);
    for_planes(context, blocks, in.channels, [&](std::int64_t nb, std::int64_t c) {
      for (std::int64_t y = 0; y < in.height; ++y) {
        float* row = dx.data() + in.at(nb, c, y);
        if (pooling.copies()) {
          std::copy_n(dy.data() + out.at(nb, c, y), in.row(), row);
          finish(row, 1, 0, row, nb, c, y);
          continue;
        }
        std::fill_n(row, in.row(), 0.0f);
        // The output rows whose windows contain row y.
        const std::int64_t first = y < pooling.kernel ? 0 : (y - pooling.kernel) / pooling.stride + 1;
        for (std::int64_t oy = first; oy < out.height && oy * pooling.stride <= y; ++oy)
          for (std::int64_t ox = 0; ox < out.width; ++ox) {
            const float* from = dy.data() + out.at(nb, c, oy, ox);
            for (std::int64_t kx = 0; kx < pooling.kernel; ++kx) {
              float* pixel = row + pooling.input(ox, kx) * lanes;
              for (std::int64_t b = 0; b < lanes; ++b) pixel[b] += from[b] * weight;
            }
          }
        finish(row, 1, 0, row, nb, c, y);
      }
      in.zero_halo(dx.data() + nb * in.block(), c);
    });
  }
};
const Register<AveragePoolGrad> average_pool_grad;

}  // namespace
}  // namespace edge_bcs
