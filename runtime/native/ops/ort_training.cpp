// The operators of ONNX Runtime's training builds that stock builds lack, as the artifacts of its 1.19.2
// tools use them: gradients of convolution, batch norm, pooling, activations and softmax cross-entropy,
// accumulation of gradients, and the SGD and AdamW steps. Plain NCHW tensors, two spatial dimensions.
//
// Three differ from the originals, because a custom operator cannot be like them; runtime/ort/artifact.py
// rewrites the graphs accordingly. MaxPoolGrad and AveragePoolGrad take the pooled tensor as a last input
// (the originals read its shape off the graph), and the optimizers take one parameter instead of a sequence.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "ops/op.h"

namespace edge_bcs {
namespace {

template <class Op>
using RegisterTraining = Register<Op, Domain::microsoft>;

// Element by element

// dX = dY·slope(v), where v is the activation's input or output, as its gradient takes it.
template <class Slope>
struct ActivationGrad {
  static constexpr const char* name = Slope::name;
  static constexpr std::array inputs{Port{"dY", float32}, Port{"value", float32}};
  static constexpr std::array outputs{Port{"dX", float32}};
  Slope slope;
  explicit ActivationGrad(const Attributes& attributes) : slope(attributes) {}
  void compute(Context& context) const {
    const auto dy = context.input<float>(0), value = context.input<float>(1);
    require(dy.shape() == value.shape(), "dY is ", dy.shape().text(), ", not ", value.shape().text());
    const auto dx = context.output<float>(0, dy.shape());
    context.parallel_parts(dy.size(), elements_a_task, [&](std::int64_t first, std::int64_t end) {
      for (std::int64_t i = first; i < end; ++i) dx[i] = dy[i] * slope(value[i]);
    });
  }
};

struct ReluSlope {
  static constexpr const char* name = "ReluGrad";
  explicit ReluSlope(const Attributes&) {}
  float operator()(float x) const { return x > 0 ? 1.0f : 0.0f; }
};
const RegisterTraining<ActivationGrad<ReluSlope>> relu_grad;

struct LeakyReluSlope {
  static constexpr const char* name = "LeakyReluGrad";
  float alpha;
  explicit LeakyReluSlope(const Attributes& attributes) : alpha(attributes.real("alpha", 0.01f)) {}
  float operator()(float y) const { return y > 0 ? 1.0f : alpha; }
};
const RegisterTraining<ActivationGrad<LeakyReluSlope>> leaky_relu_grad;

struct SigmoidSlope {
  static constexpr const char* name = "SigmoidGrad";
  explicit SigmoidSlope(const Attributes&) {}
  float operator()(float y) const { return y * (1 - y); }
};
const RegisterTraining<ActivationGrad<SigmoidSlope>> sigmoid_grad;

struct TanhSlope {
  static constexpr const char* name = "TanhGrad";
  explicit TanhSlope(const Attributes&) {}
  float operator()(float y) const { return 1 - y * y; }
};
const RegisterTraining<ActivationGrad<TanhSlope>> tanh_grad;

// x·sigmoid(alpha·x), with alpha = 1 the SiLU.
struct QuickGeluSlope {
  static constexpr const char* name = "QuickGeluGrad";
  float alpha;
  explicit QuickGeluSlope(const Attributes& attributes) : alpha(attributes.real("alpha", 1.702f)) {}
  float operator()(float x) const {
    const float s = 1 / (1 + std::exp(-alpha * x));
    return s + alpha * x * s * (1 - s);
  }
};
const RegisterTraining<ActivationGrad<QuickGeluSlope>> quick_gelu_grad;

// Adds a gradient to its buffer, or puts it there if the flag is set. The buffer is an input that changes, as
// in ONNX Runtime: nothing else of the graph reads it.
struct InPlaceAccumulatorV2 {
  static constexpr const char* name = "InPlaceAccumulatorV2";
  static constexpr std::array inputs{Port{"buffer", float32}, Port{"gradient", float32},
                                     Port{"overwrite", boolean, optional}};
  static constexpr std::array outputs{Port{"updated", boolean},
                                      Port{"accumulated", float32, optional_aliases(0)}};
  explicit InPlaceAccumulatorV2(const Attributes&) {}
  void compute(Context& context) const {
    const auto buffer = context.input<float>(0), gradient = context.input<float>(1);
    require(buffer.shape() == gradient.shape(), "the gradient is ", gradient.shape().text(), ", not ",
            buffer.shape().text());
    const bool overwrite = context.flag(2);
    auto* const sums = const_cast<float*>(buffer.data());
    context.parallel_parts(buffer.size(), elements_a_task, [&](std::int64_t first, std::int64_t end) {
      if (overwrite)
        std::copy(gradient.data() + first, gradient.data() + end, sums + first);
      else
        for (std::int64_t i = first; i < end; ++i) sums[i] += gradient[i];
    });
    context.in_place<float>(1, 0);
    context.output<bool>(0, {1})[0] = true;
  }
};
const RegisterTraining<InPlaceAccumulatorV2> in_place_accumulator;

// Windows

// A sum of many floats: eight of them in float, which the compiler can vectorise, then in double.
class Sum {
 public:
  void add_products(const float* a, const float* b, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
      for (int j = 0; j < lanes; ++j) parts_[j] += a[i + j] * b[i + j];
    for (; i < count; ++i) total_ += a[i] * b[i];
  }
  void add(double value) { total_ += value; }
  // To be called now and then, before the float parts have summed up too many numbers.
  void settle() {
    for (float& part : parts_) total_ += part, part = 0;
  }
  double value() {
    settle();
    return total_;
  }

 private:
  static constexpr int lanes = 8;
  float parts_[lanes] = {};
  double total_ = 0;
};

// kernel_shape, strides, pads and dilations of a two-dimensional window.
struct Window {
  std::int64_t kernel[2], stride[2], before[2], after[2], dilation[2];

  explicit Window(const Attributes& attributes) {
    const auto shape = attributes.integers("kernel_shape");
    const auto strides = attributes.integers("strides", {1, 1}),
               pads = attributes.integers("pads", {0, 0, 0, 0});
    const auto dilations = attributes.integers("dilations", {1, 1});
    const std::string automatic = attributes.text("auto_pad", "NOTSET");
    require(automatic == "NOTSET" || automatic == "VALID", "auto_pad is ", automatic,
            ", which is not supported");
    require(attributes.integer("ceil_mode", 0) == 0, "ceil_mode is not supported");
    require(shape.size() == 2 && strides.size() == 2 && pads.size() == 4 && dilations.size() == 2,
            "the window has not two dimensions");
    for (int axis = 0; axis < 2; ++axis) {
      kernel[axis] = shape[axis], stride[axis] = strides[axis], dilation[axis] = dilations[axis];
      before[axis] = pads[axis], after[axis] = pads[axis + 2];
      for (std::int64_t value : {kernel[axis], stride[axis], dilation[axis]})
        require(value >= 1 && value <= 1 << 20, "a size, stride or dilation of the window is ", value);
      for (std::int64_t value : {before[axis], after[axis]})
        require(value >= 0 && value <= 1 << 20, "a padding of the window is ", value);
    }
  }
  std::int64_t output(int axis, std::int64_t input) const {
    return (input + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  // The outputs [first, end) whose element k of the window lies inside an input of the given size.
  void inside(int axis, std::int64_t k, std::int64_t input, std::int64_t outputs, std::int64_t& first,
              std::int64_t& end) const {
    const std::int64_t shift = k * dilation[axis] - before[axis];  // input = output·stride + shift
    first = shift < 0 ? (-shift + stride[axis] - 1) / stride[axis] : 0;
    end = input <= shift ? 0 : std::min(outputs, (input - 1 - shift) / stride[axis] + 1);
    end = std::max(end, first);
  }
  std::int64_t position(int axis, std::int64_t output, std::int64_t k) const {
    return output * stride[axis] + k * dilation[axis] - before[axis];
  }
};

// Images [N, C, H, W].
struct Images {
  std::int64_t n, channels, height, width;
  Images(const Shape& shape, const char* name) {
    require(shape.rank() == 4, name, " is ", shape.text(), ", not [N, C, H, W]");
    n = shape[0], channels = shape[1], height = shape[2], width = shape[3];
  }
  std::int64_t plane() const { return height * width; }
};

struct ConvGrad {
  static constexpr const char* name = "ConvGrad";
  static constexpr std::array inputs{Port{"dY", float32}, Port{"X", float32}, Port{"W", float32}};
  static constexpr std::array outputs{Port{"dX", float32, optional}, Port{"dW", float32, optional},
                                      Port{"dB", float32, optional}};
  Window window;
  std::int64_t groups;

  explicit ConvGrad(const Attributes& attributes)
      : window(attributes), groups(attributes.integer_in("group", 1, 1 << 23, 1)) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0), x = context.input<float>(1), w = context.input<float>(2);
    const Images out(dy.shape(), "dY"), in(x.shape(), "X");
    require(in.channels % groups == 0 && out.channels % groups == 0, "the channels do not divide by ",
            groups);
    const Shape weights{out.channels, in.channels / groups, window.kernel[0], window.kernel[1]};
    require(w.shape() == weights, "W is ", w.shape().text(), ", not ", weights.text());
    const Shape expected{in.n, out.channels, window.output(0, in.height), window.output(1, in.width)};
    require(dy.shape() == expected, "dY is ", dy.shape().text(), ", not ", expected.text());
    if (const auto dx = context.output<float>(0, x.shape())) input_gradient(context, dy, w, dx, out, in);
    if (const auto dw = context.output<float>(1, weights)) weight_gradient(context, dy, x, dw, out, in);
    if (const auto db = context.output<float>(2, {out.channels}))
      context.parallel_for(out.channels, [&](std::int64_t o) {
        double sum = 0;
        for (std::int64_t n = 0; n < out.n; ++n) {
          const float* plane = dy.data() + (n * out.channels + o) * out.plane();
          sum = std::accumulate(plane, plane + out.plane(), sum);
        }
        db[o] = static_cast<float>(sum);
      });
  }

 private:
  // One plane of dX at a time: every weight that reads it adds a shifted copy of a plane of dY.
  void input_gradient(const Context& context, const Tensor<const float>& dy, const Tensor<const float>& w,
                      const Tensor<float>& dx, const Images& out, const Images& in) const {
    const std::int64_t in_group = in.channels / groups, out_group = out.channels / groups;
    context.parallel_for(in.n * in.channels, [&](std::int64_t job) {
      const std::int64_t n = job / in.channels, c = job % in.channels, group = c / in_group;
      float* target = dx.data() + job * in.plane();
      std::fill(target, target + in.plane(), 0.0f);
      for (std::int64_t o = group * out_group; o < (group + 1) * out_group; ++o) {
        const float* source = dy.data() + (n * out.channels + o) * out.plane();
        const float* kernel = w.data() + (o * in_group + c % in_group) * window.kernel[0] * window.kernel[1];
        for_each_row(out, in, [&](std::int64_t weight, const Row& row) {
          const float factor = kernel[weight];
          const float* from = source + row.out;
          float* to = target + row.in;
          if (row.step == 1)
            for (std::int64_t i = 0; i < row.count; ++i) to[i] += factor * from[i];
          else
            for (std::int64_t i = 0; i < row.count; ++i) to[i * row.step] += factor * from[i];
        });
      }
    });
  }

  void weight_gradient(const Context& context, const Tensor<const float>& dy, const Tensor<const float>& x,
                       const Tensor<float>& dw, const Images& out, const Images& in) const {
    const std::int64_t in_group = in.channels / groups, out_group = out.channels / groups;
    const std::int64_t size = window.kernel[0] * window.kernel[1];
    context.parallel_for(out.channels * in_group, [&](std::int64_t job) {
      const std::int64_t o = job / in_group, c = o / out_group * in_group + job % in_group;
      std::vector<Sum> sums(static_cast<std::size_t>(size));
      for (std::int64_t n = 0; n < in.n; ++n) {
        const float* gradient = dy.data() + (n * out.channels + o) * out.plane();
        const float* image = x.data() + (n * in.channels + c) * in.plane();
        for_each_row(out, in, [&](std::int64_t weight, const Row& row) {
          Sum& sum = sums[static_cast<std::size_t>(weight)];
          const float* a = gradient + row.out;
          const float* b = image + row.in;
          if (row.step == 1)
            sum.add_products(a, b, row.count);
          else
            for (std::int64_t i = 0; i < row.count; ++i) sum.add(a[i] * b[i * row.step]);
        });
        for (Sum& sum : sums) sum.settle();
      }
      for (std::int64_t i = 0; i < size; ++i)
        dw[job * size + i] = static_cast<float>(sums[static_cast<std::size_t>(i)].value());
    });
  }

  // A run of a row of dY (from `out`) beside the pixels of X (from `in`, `step` apart) that one weight joins.
  struct Row {
    std::int64_t out, in, count, step;
  };

  template <class Body>
  void for_each_row(const Images& out, const Images& in, const Body& body) const {
    for (std::int64_t ky = 0; ky < window.kernel[0]; ++ky) {
      std::int64_t top, bottom;
      window.inside(0, ky, in.height, out.height, top, bottom);
      for (std::int64_t kx = 0; kx < window.kernel[1]; ++kx) {
        std::int64_t left, right;
        window.inside(1, kx, in.width, out.width, left, right);
        for (std::int64_t y = top; y < bottom; ++y)
          body(ky * window.kernel[1] + kx,
               Row{y * out.width + left, window.position(0, y, ky) * in.width + window.position(1, left, kx),
                   right - left, window.stride[1]});
      }
    }
  }
};
const RegisterTraining<ConvGrad> conv_grad;

// Adds every number of dY to the place that the maximum came from.
struct MaxPoolGrad {
  static constexpr const char* name = "MaxPoolGrad";
  static constexpr std::array inputs{Port{"dY", float32}, Port{"Indices", int64}, Port{"X", float32}};
  static constexpr std::array outputs{Port{"dX", float32}};
  explicit MaxPoolGrad(const Attributes& attributes) {
    require(attributes.integer("storage_order", 0) == 0, "storage_order 1 is not supported");
  }
  void compute(Context& context) const {
    const auto dy = context.input<float>(0), x = context.input<float>(2);
    const auto indices = context.input<std::int64_t>(1);
    const Images out(dy.shape(), "dY"), in(x.shape(), "X");
    require(indices.shape() == dy.shape(), "Indices is ", indices.shape().text(), ", not ",
            dy.shape().text());
    require(out.n == in.n && out.channels == in.channels, "dY ", dy.shape().text(), " is not a pooling of X ",
            x.shape().text());
    const auto dx = context.output<float>(0, x.shape());
    context.parallel_for(in.n * in.channels, [&](std::int64_t plane) {
      float* target = dx.data() + plane * in.plane();
      std::fill(target, target + in.plane(), 0.0f);
      const std::int64_t first = plane * in.plane();
      for (std::int64_t i = plane * out.plane(); i < (plane + 1) * out.plane(); ++i) {
        require(indices[i] >= first && indices[i] < first + in.plane(), "an index leads out of its plane");
        target[indices[i] - first] += dy[i];
      }
    });
  }
};
const RegisterTraining<MaxPoolGrad> max_pool_grad;

struct AveragePoolGrad {
  static constexpr const char* name = "AveragePoolGrad";
  static constexpr std::array inputs{Port{"dY", float32}, Port{"X", float32}};
  static constexpr std::array outputs{Port{"dX", float32}};
  Window window;
  bool count_padding;

  explicit AveragePoolGrad(const Attributes& attributes)
      : window(attributes), count_padding(attributes.flag("count_include_pad", false)) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0), x = context.input<float>(1);
    const Images out(dy.shape(), "dY"), in(x.shape(), "X");
    const Shape expected{in.n, in.channels, window.output(0, in.height), window.output(1, in.width)};
    require(dy.shape() == expected, "dY is ", dy.shape().text(), ", not ", expected.text());
    const auto dx = context.output<float>(0, x.shape());
    context.parallel_for(in.n * in.channels, [&](std::int64_t plane) {
      float* target = dx.data() + plane * in.plane();
      std::fill(target, target + in.plane(), 0.0f);
      const float* source = dy.data() + plane * out.plane();
      for (std::int64_t y = 0; y < out.height; ++y)
        for (std::int64_t x_out = 0; x_out < out.width; ++x_out)
          spread(source[y * out.width + x_out], y, x_out, target, in);
    });
  }

 private:
  void spread(float gradient, std::int64_t y, std::int64_t x, float* target, const Images& in) const {
    const std::int64_t top = std::max<std::int64_t>(window.position(0, y, 0), 0);
    const std::int64_t bottom = std::min(window.position(0, y, 0) + window.kernel[0], in.height);
    const std::int64_t left = std::max<std::int64_t>(window.position(1, x, 0), 0);
    const std::int64_t right = std::min(window.position(1, x, 0) + window.kernel[1], in.width);
    const std::int64_t inside = (bottom - top) * (right - left);
    if (bottom <= top || right <= left) return;
    const std::int64_t count = count_padding ? window.kernel[0] * window.kernel[1] : inside;
    for (std::int64_t row = top; row < bottom; ++row)
      for (std::int64_t column = left; column < right; ++column)
        target[row * in.width + column] += gradient / static_cast<float>(count);
  }
};
const RegisterTraining<AveragePoolGrad> average_pool_grad;

// Batch norm

// [N, C, …] as N runs of `inner` numbers for each channel.
struct Channels {
  std::int64_t n, channels, inner;
  explicit Channels(const Shape& shape) {
    require(shape.rank() >= 2, "X is ", shape.text(), ", not [N, C, …]");
    n = shape[0], channels = shape[1], inner = 1;
    if (shape.count() == 0) inner = 0;  // the other sizes may then be any, and their product too large
    for (std::size_t axis = 2; axis < shape.rank() && inner > 0; ++axis) inner *= shape[axis];
  }
  std::int64_t count() const { return n * inner; }
  template <class Body>
  void of(std::int64_t c, const Body& body) const {
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0, first = (i * channels + c) * inner; j < inner; ++j) body(first + j);
  }
};

void require_channels(const Tensor<const float>& tensor, std::int64_t channels, const char* name) {
  require(tensor.shape() == Shape{channels}, name, " is ", tensor.shape().text(), ", not [", channels, "]");
}

// Normalises by the batch's own statistics and moves the running ones, in place.
struct BatchNormInternal {
  static constexpr const char* name = "BatchNormInternal";
  static constexpr std::array inputs{Port{"X", float32}, Port{"scale", float32}, Port{"B", float32},
                                     Port{"input_mean", float32}, Port{"input_var", float32}};
  static constexpr std::array outputs{Port{"Y", float32}, Port{"running_mean", float32, optional_aliases(3)},
                                      Port{"running_var", float32, optional_aliases(4)},
                                      Port{"saved_mean", float32, optional},
                                      Port{"saved_inv_std", float32, optional}};
  float epsilon, momentum;

  explicit BatchNormInternal(const Attributes& attributes)
      : epsilon(attributes.real("epsilon", 1e-5f)), momentum(attributes.real("momentum", 0.9f)) {
    require(attributes.integer("training_mode", 0) == 1, "training_mode 0 is not supported");
  }

  void compute(Context& context) const {
    const auto x = context.input<float>(0), scale = context.input<float>(1), shift = context.input<float>(2);
    const Channels channels(x.shape());
    require(channels.count() > 0, "X is empty");
    for (std::size_t i = 1; i < 5; ++i)
      require_channels(context.input<float>(i), channels.channels, context.input_name(i));
    const auto y = context.output<float>(0, x.shape());
    const auto running_mean = context.in_place<float>(1, 3), running_variance = context.in_place<float>(2, 4);
    const auto saved_mean = context.output<float>(3, {channels.channels});
    const auto saved_deviation = context.output<float>(4, {channels.channels});
    context.parallel_for(channels.channels, [&](std::int64_t c) {
      double sum = 0, squares = 0;
      channels.of(c, [&](std::int64_t i) { sum += x[i]; });
      const double mean = sum / static_cast<double>(channels.count());
      channels.of(c, [&](std::int64_t i) { squares += (x[i] - mean) * (x[i] - mean); });
      const double variance = squares / static_cast<double>(channels.count());
      const double inverse = 1 / std::sqrt(variance + epsilon);
      const auto factor = static_cast<float>(scale[c] * inverse);
      const auto offset = static_cast<float>(shift[c] - mean * scale[c] * inverse);
      channels.of(c, [&](std::int64_t i) { y[i] = x[i] * factor + offset; });
      if (running_mean)
        running_mean[c] = static_cast<float>(running_mean[c] * momentum + mean * (1 - momentum));
      if (running_variance)
        running_variance[c] = static_cast<float>(running_variance[c] * momentum + variance * (1 - momentum));
      if (saved_mean) saved_mean[c] = static_cast<float>(mean);
      if (saved_deviation) saved_deviation[c] = static_cast<float>(inverse);
    });
  }
};
const RegisterTraining<BatchNormInternal> batch_norm_internal;

struct BatchNormalizationGrad {
  static constexpr const char* name = "BatchNormalizationGrad";
  static constexpr std::array inputs{Port{"dY", float32}, Port{"X", float32}, Port{"scale", float32},
                                     Port{"saved_mean", float32}, Port{"saved_inv_std", float32}};
  static constexpr std::array outputs{Port{"dX", float32, optional}, Port{"dScale", float32},
                                      Port{"dBias", float32}};
  explicit BatchNormalizationGrad(const Attributes&) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0), x = context.input<float>(1), scale = context.input<float>(2);
    const auto mean = context.input<float>(3), inverse = context.input<float>(4);
    const Channels channels(x.shape());
    require(dy.shape() == x.shape(), "dY is ", dy.shape().text(), ", not ", x.shape().text());
    for (std::size_t i = 2; i < 5; ++i)
      require_channels(context.input<float>(i), channels.channels, context.input_name(i));
    const auto dx = context.output<float>(0, x.shape());
    const auto dscale = context.output<float>(1, {channels.channels}),
               dshift = context.output<float>(2, {channels.channels});
    context.parallel_for(channels.channels, [&](std::int64_t c) {
      double sum = 0, products = 0;
      channels.of(c, [&](std::int64_t i) {
        sum += dy[i];
        products += dy[i] * (static_cast<double>(x[i]) - mean[c]) * inverse[c];
      });
      dscale[c] = static_cast<float>(products);
      dshift[c] = static_cast<float>(sum);
      if (!dx) return;
      const auto count = static_cast<double>(channels.count());
      const double factor = static_cast<double>(scale[c]) * inverse[c];
      channels.of(c, [&](std::int64_t i) {
        const double normalised = (static_cast<double>(x[i]) - mean[c]) * inverse[c];
        dx[i] = static_cast<float>(factor * (dy[i] - sum / count - normalised * products / count));
      });
    });
  }
};
const RegisterTraining<BatchNormalizationGrad> batch_normalization_grad;

// Softmax cross-entropy

// Classes along axis 1 of [N, C, …], labels [N, …], and what each sample counts.
struct Samples {
  std::int64_t n, classes, inner;
  Tensor<const std::int64_t> labels;
  Tensor<const float> weights;  // of classes, may be absent
  std::int64_t ignored;

  Samples(const Context& context, const Shape& shape, std::size_t first, std::int64_t ignore_index)
      : labels(context.input<std::int64_t>(first)), weights(context.input<float>(first + 1)) {
    const Channels channels(shape);
    n = channels.n, classes = channels.channels, inner = channels.inner;
    require(classes >= 1, "the scores are ", shape.text(), ", of no class");
    const auto given = context.input<std::int64_t>(first + 2);
    require(!given || given.size() == 1, "ignore_index has ", given.size(), " elements, not 1");
    ignored = given ? given[0] : ignore_index;
    Shape expected{n};
    for (std::size_t axis = 2; axis < shape.rank(); ++axis) expected.append(shape[axis]);
    require(labels.shape() == expected, "the labels are ", labels.shape().text(), ", not ", expected.text());
    if (weights) require_channels(weights, classes, "the weights");
    for (std::int64_t label : labels)
      require(label == ignored || (label >= 0 && label < classes), "a label is ", label, ", not in [0, ",
              classes, ")");
  }
  std::int64_t count() const { return n * inner; }
  std::int64_t place(std::int64_t sample, std::int64_t k) const {
    return (sample / inner * classes + k) * inner + sample % inner;
  }
  float weight(std::int64_t sample) const {
    if (labels[sample] == ignored) return 0;
    return weights ? weights[labels[sample]] : 1;
  }
  double total_weight() const {
    double total = 0;
    for (std::int64_t s = 0; s < count(); ++s) total += weight(s);
    return total;
  }
};

struct Reduction {
  enum Kind { none, sum, mean } kind;
  std::int64_t ignore_index;
  explicit Reduction(const Attributes& attributes)
      // Without the attribute no label is ignored.
      : ignore_index(attributes.integer("ignore_index", std::numeric_limits<std::int64_t>::min())) {
    const std::string text = attributes.text("reduction", "mean");
    require(text == "none" || text == "sum" || text == "mean", "reduction is ", text);
    kind = text == "none" ? none : text == "sum" ? sum : mean;
  }
};

struct SoftmaxCrossEntropyLossInternal {
  static constexpr const char* name = "SoftmaxCrossEntropyLossInternal";
  static constexpr std::array inputs{Port{"scores", float32}, Port{"labels", int64},
                                     Port{"weights", float32, optional},
                                     Port{"ignore_index", int64, optional}};
  static constexpr std::array outputs{Port{"loss", float32}, Port{"log_prob", float32, optional}};
  Reduction reduction;
  explicit SoftmaxCrossEntropyLossInternal(const Attributes& attributes) : reduction(attributes) {}

  void compute(Context& context) const {
    const auto scores = context.input<float>(0);
    const Samples samples(context, scores.shape(), 1, reduction.ignore_index);
    const bool one = reduction.kind != Reduction::none;
    const auto loss = context.output<float>(0, one ? Shape{} : samples.labels.shape());
    const auto logarithms = context.output<float>(1, scores.shape());
    double total = 0;
    for (std::int64_t s = 0; s < samples.count(); ++s) {
      double largest = scores[samples.place(s, 0)], sum = 0;
      for (std::int64_t k = 1; k < samples.classes; ++k)
        largest = std::max<double>(largest, scores[samples.place(s, k)]);
      for (std::int64_t k = 0; k < samples.classes; ++k)
        sum += std::exp(scores[samples.place(s, k)] - largest);
      const double offset = largest + std::log(sum);
      if (logarithms)
        for (std::int64_t k = 0; k < samples.classes; ++k)
          logarithms[samples.place(s, k)] = static_cast<float>(scores[samples.place(s, k)] - offset);
      const float weight = samples.weight(s);
      const double own = weight == 0 ? 0 : weight * (offset - scores[samples.place(s, samples.labels[s])]);
      total += own;
      if (!one) loss[s] = static_cast<float>(own);
    }
    if (one)
      loss[0] =
          static_cast<float>(reduction.kind == Reduction::mean ? total / samples.total_weight() : total);
  }
};
const RegisterTraining<SoftmaxCrossEntropyLossInternal> softmax_cross_entropy_internal;

// dY·(softmax − one-hot), with log_prob from the forward pass.
template <bool internal>
struct SoftmaxCrossEntropyGrad {
  static constexpr const char* name =
      internal ? "SoftmaxCrossEntropyLossInternalGrad" : "SoftmaxCrossEntropyLossGrad";
  static constexpr std::array inputs{Port{"dY", float32}, Port{"log_prob", float32}, Port{"labels", int64},
                                     Port{"weights", float32, optional},
                                     Port{"ignore_index", int64, optional}};
  static constexpr std::array outputs{Port{"d_scores", float32}};
  Reduction reduction;
  explicit SoftmaxCrossEntropyGrad(const Attributes& attributes) : reduction(attributes) {}

  void compute(Context& context) const {
    const auto dy = context.input<float>(0), logarithms = context.input<float>(1);
    const Samples samples(context, logarithms.shape(), 2, reduction.ignore_index);
    require(dy.size() == (reduction.kind == Reduction::none ? samples.count() : 1), "dY has ", dy.size(),
            " elements");
    const auto gradient = context.output<float>(0, logarithms.shape());
    const double divisor = reduction.kind == Reduction::mean ? samples.total_weight() : 1;
    context.parallel_for(samples.count(), [&](std::int64_t s) {
      const float weight = samples.weight(s);
      const double factor =
          weight == 0 ? 0 : dy[reduction.kind == Reduction::none ? s : 0] * weight / divisor;
      for (std::int64_t k = 0; k < samples.classes; ++k) {
        const double probability = std::exp(static_cast<double>(logarithms[samples.place(s, k)]));
        gradient[samples.place(s, k)] = static_cast<float>(factor * (probability - (k == samples.labels[s])));
      }
    });
  }
};
const RegisterTraining<SoftmaxCrossEntropyGrad<false>> softmax_cross_entropy_grad;
const RegisterTraining<SoftmaxCrossEntropyGrad<true>> softmax_cross_entropy_internal_grad;

// Optimizers, for one parameter; parameter and moments are inputs that change.

float scalar(const Context& context, std::size_t index) {
  const auto value = context.input<float>(index);
  require(value.size() == 1, "the input ", context.input_name(index), " has ", value.size(),
          " elements, not 1");
  return value[0];
}

struct SGDOptimizerV2 {
  static constexpr const char* name = "SGDOptimizerV2";
  static constexpr std::array inputs{Port{"lr", float32}, Port{"weights", float32},
                                     Port{"gradients", float32}};
  static constexpr std::array outputs{Port{"update_completed", boolean}};
  explicit SGDOptimizerV2(const Attributes&) {}
  void compute(Context& context) const {
    const float rate = scalar(context, 0);
    const auto weights = context.input<float>(1), gradients = context.input<float>(2);
    require(weights.shape() == gradients.shape(), "the gradient is ", gradients.shape().text(), ", not ",
            weights.shape().text());
    auto* const target = const_cast<float*>(weights.data());
    context.parallel_parts(weights.size(), elements_a_task, [&](std::int64_t first, std::int64_t end) {
      for (std::int64_t i = first; i < end; ++i) target[i] -= rate * gradients[i];
    });
    context.output<bool>(0, {1})[0] = true;
  }
};
const RegisterTraining<SGDOptimizerV2> sgd;

// adam_mode 0 is torch's AdamW (decay first, epsilon beside the corrected deviation), 1 that of Hugging
// Face's transformers (epsilon beside the uncorrected one, decay last).
struct AdamWOptimizer {
  static constexpr const char* name = "AdamWOptimizer";
  static constexpr std::array inputs{Port{"lr", float32},          Port{"step", int64},
                                     Port{"weights", float32},     Port{"gradients", float32},
                                     Port{"momentums_1", float32}, Port{"momentums_2", float32}};
  static constexpr std::array outputs{Port{"updated_flag", boolean}};
  float alpha, beta, epsilon, decay;
  bool transformers, correct;

  explicit AdamWOptimizer(const Attributes& attributes)
      : alpha(attributes.real("alpha", 0.9f)),
        beta(attributes.real("beta", 0.999f)),
        epsilon(attributes.real("epsilon", 1e-8f)),
        decay(attributes.real("weight_decay", 0.0f)),
        transformers(attributes.flag("adam_mode", false)),
        correct(attributes.flag("correct_bias", true)) {}

  void compute(Context& context) const {
    const float rate = scalar(context, 0);
    const auto steps = context.input<std::int64_t>(1);
    require(steps.size() == 1 && steps[0] >= 1, "the step is not one number of at least 1");
    const auto weights = context.input<float>(2), gradients = context.input<float>(3);
    for (std::size_t i = 3; i < 6; ++i)
      require(context.input<float>(i).shape() == weights.shape(), "the input ", context.input_name(i), " is ",
              context.input<float>(i).shape().text(), ", not ", weights.shape().text());
    auto* const w = const_cast<float*>(weights.data());
    auto* const first_moment = const_cast<float*>(context.input<float>(4).data());
    auto* const second_moment = const_cast<float*>(context.input<float>(5).data());
    const auto step = static_cast<float>(steps[0]);
    const float first_correction = correct ? 1 - std::pow(alpha, step) : 1;
    const float second_correction = correct ? 1 - std::pow(beta, step) : 1;
    context.parallel_parts(weights.size(), elements_a_task, [&](std::int64_t first, std::int64_t end) {
      for (std::int64_t i = first; i < end; ++i) {
        const float g = gradients[i];
        const float m = first_moment[i] = alpha * first_moment[i] + (1 - alpha) * g;
        const float v = second_moment[i] = beta * second_moment[i] + (1 - beta) * g * g;
        if (transformers) {
          w[i] -= rate * std::sqrt(second_correction) / first_correction * m / (std::sqrt(v) + epsilon);
          w[i] -= rate * decay * w[i];
        } else {
          w[i] -= rate * decay * w[i];
          w[i] -= rate * (m / first_correction) / (std::sqrt(v) / std::sqrt(second_correction) + epsilon);
        }
      }
    });
    context.output<bool>(0, {1})[0] = true;
  }
};
const RegisterTraining<AdamWOptimizer> adamw;

}  // namespace
}  // namespace edge_bcs
