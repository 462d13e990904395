// Losses and their exact gradients with respect to the logits, in double precision inside. Logits are stacks
// [NB, K, B] (sample s = nb·B + b); every loss is a sum over samples of weight · loss of the sample, and
// samples of weight 0 fill up a micro-batch: they change nothing, whatever they hold. A sample whose label is
// −1 has none: in a loss with a term that needs no label, it takes part in that term alone.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ops/exponential.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// One sample's numbers in a tensor: class k is at distance k·stride.
template <class T>
class Strided {
 public:
  Strided(T* first, std::int64_t stride) : first_(first), stride_(stride) {}
  T& operator[](std::int64_t k) const { return first_[k * stride_]; }

 private:
  T* first_;
  std::int64_t stride_;
};

// Logits of a micro-batch.
struct Logits {
  std::int64_t blocks, classes, lanes;

  Logits(const Tensor<const float>& tensor, const char* name) {
    require(tensor.shape().rank() == 3 && tensor.size() > 0, name, " is ", tensor.shape().text(),
            ", not [blocks, classes, lanes]");
    blocks = tensor.dim(0), classes = tensor.dim(1), lanes = tensor.dim(2);
  }
  std::int64_t samples() const { return blocks * lanes; }
  template <class T>
  Strided<T> of(const Tensor<T>& tensor, std::int64_t sample) const {
    return {tensor.data() + sample / lanes * classes * lanes + sample % lanes, lanes};
  }
};

// log softmax of one sample: log p_k = x_k − log Σ exp x, kept as the offset.
class LogSoftmax {
 public:
  LogSoftmax(Strided<const float> logits, std::int64_t classes) : logits_(logits), classes_(classes) {
    double largest = logits[0];
    for (std::int64_t k = 1; k < classes; ++k) largest = std::max(largest, static_cast<double>(logits[k]));
    double sum = 0;
    for (std::int64_t k = 0; k < classes; ++k) sum += exponential(logits[k] - largest);
    offset_ = largest + logarithm(sum);
    require(std::isfinite(offset_), "the logits are not finite: training has diverged");
  }
  double log(std::int64_t k) const { return logits_[k] - offset_; }
  double operator[](std::int64_t k) const { return exponential(log(k)); }
  std::int64_t classes() const { return classes_; }
  // The class of the largest logit, the first of equals.
  std::int64_t prediction() const {
    std::int64_t best = 0;
    for (std::int64_t k = 1; k < classes_; ++k)
      if (logits_[k] > logits_[best]) best = k;
    return best;
  }

 private:
  Strided<const float> logits_;
  std::int64_t classes_;
  double offset_;
};

// KL(p ‖ q) = Σ p·(log p − log q)
double divergence(const LogSoftmax& p, const LogSoftmax& q) {
  double total = 0;
  for (std::int64_t k = 0; k < p.classes(); ++k) total += p[k] * (p.log(k) - q.log(k));
  return total;
}

constexpr std::int64_t no_label = -1;

// Labels, from `lowest` on, and weights of a micro-batch.
struct Targets {
  Tensor<const std::int64_t> labels;
  Tensor<const float> weights;

  Targets(const Context& context, std::size_t first, const Logits& logits, std::int64_t lowest = 0)
      : labels(context.input<std::int64_t>(first)), weights(context.input<float>(first + 1)) {
    const Shape shape{logits.samples()};
    require(labels.shape() == shape && weights.shape() == shape, "labels ", labels.shape().text(),
            " and sample_weight ", weights.shape().text(), " are not ", shape.text());
    for (std::int64_t label : labels)
      require(label >= lowest && label < logits.classes, "a label is ", label, ", not in [", lowest, ", ",
              logits.classes, ")");
    for (float w : weights)
      require(std::isfinite(w) && w >= 0, "a sample has the weight ", w,
              ", not a finite number of at least 0");
  }
};

void set_zero(Strided<float> gradient, std::int64_t classes) {
  for (std::int64_t k = 0; k < classes; ++k) gradient[k] = 0;
}

// Σ weight·(−log p_y)
struct CrossEntropy {
  static constexpr const char* name = "CrossEntropy";
  static constexpr std::array inputs{Port{"logits", float32}, Port{"labels", int64},
                                     Port{"sample_weight", float32}};
  static constexpr std::array outputs{Port{"loss", float32}, Port{"dlogits", float32},
                                      Port{"correct", float32}};

  explicit CrossEntropy(const Attributes&) {}

  void compute(Context& context) const {
    const auto tensor = context.input<float>(0);
    const Logits logits(tensor, "logits");
    const Targets targets(context, 1, logits);
    const auto gradient = context.output<float>(1, tensor.shape());
    double loss = 0;
    std::int64_t correct = 0;
    for (std::int64_t s = 0; s < logits.samples(); ++s) {
      const auto d = logits.of(gradient, s);
      const std::int64_t label = targets.labels[s];
      const double weight = targets.weights[s];
      if (weight == 0) {
        set_zero(d, logits.classes);
        continue;
      }
      const LogSoftmax p(logits.of(tensor, s), logits.classes);
      loss -= weight * p.log(label);
      correct += p.prediction() == label;
      for (std::int64_t k = 0; k < logits.classes; ++k)
        d[k] = static_cast<float>(weight * (p[k] - (k == label)));
    }
    context.output<float>(0, {})[0] = static_cast<float>(loss);
    context.output<float>(2, {1})[0] = static_cast<float>(correct);
  }
};
const Register<CrossEntropy> cross_entropy;

// What TRADES and MART share: two branches, clean and adversarial. A Loss is a static function
// (p, q, label, beta, weight, dclean, dadversarial) → loss of one sample, which sets both gradients; its
// `lowest_label` says whether it takes samples without a label.
template <class Loss>
struct TwoBranches {
  static constexpr const char* name = Loss::name;
  static constexpr std::array inputs{Port{"clean", float32}, Port{"adversarial", float32},
                                     Port{"labels", int64}, Port{"sample_weight", float32}};
  static constexpr std::array outputs{Port{"loss", float32}, Port{"dclean", float32},
                                      Port{"dadversarial", float32}, Port{"correct", float32}};

  double beta;

  explicit TwoBranches(const Attributes& attributes) : beta(attributes.real("beta")) {
    require(std::isfinite(beta) && beta >= 0, "beta is ", beta, ", not a finite number of at least 0");
  }

  void compute(Context& context) const {
    const auto clean = context.input<float>(0), adversarial = context.input<float>(1);
    const Logits logits(clean, "clean");
    require(adversarial.shape() == clean.shape(), "adversarial is ", adversarial.shape().text(), ", not ",
            clean.shape().text(), " like clean");
    require(logits.classes >= 2, "there is one class only");
    const Targets targets(context, 2, logits, Loss::lowest_label);
    const auto clean_gradient = context.output<float>(1, clean.shape());
    const auto adversarial_gradient = context.output<float>(2, clean.shape());
    double loss = 0;
    std::int64_t clean_correct = 0, adversarial_correct = 0;
    for (std::int64_t s = 0; s < logits.samples(); ++s) {
      const auto dclean = logits.of(clean_gradient, s), dadversarial = logits.of(adversarial_gradient, s);
      const std::int64_t label = targets.labels[s];
      const double weight = targets.weights[s];
      if (weight == 0) {
        set_zero(dclean, logits.classes);
        set_zero(dadversarial, logits.classes);
        continue;
      }
      const LogSoftmax p(logits.of(clean, s), logits.classes), q(logits.of(adversarial, s), logits.classes);
      clean_correct += p.prediction() == label;
      adversarial_correct += q.prediction() == label;
      loss += weight * Loss::sample(p, q, label, beta, weight, dclean, dadversarial);
    }
    context.output<float>(0, {})[0] = static_cast<float>(loss);
    const auto correct = context.output<float>(3, {2});
    correct[0] = static_cast<float>(clean_correct);
    correct[1] = static_cast<float>(adversarial_correct);
  }
};

// CE(clean) + β·KL(p ‖ q) (Zhang et al., "Theoretically principled trade-off between robustness and
// accuracy", 2019); without a label, β·KL(p ‖ q).
struct TradesLoss {
  static constexpr const char* name = "Trades";
  static constexpr std::int64_t lowest_label = no_label;

  static double sample(const LogSoftmax& p, const LogSoftmax& q, std::int64_t label, double beta,
                       double weight, Strided<float> dclean, Strided<float> dadversarial) {
    const double kl = divergence(p, q);
    for (std::int64_t k = 0; k < p.classes(); ++k) {
      const double d_cross_entropy = label == no_label ? 0 : p[k] - (k == label);
      dclean[k] = static_cast<float>(weight * (d_cross_entropy + beta * p[k] * (p.log(k) - q.log(k) - kl)));
      dadversarial[k] = static_cast<float>(weight * beta * (q[k] - p[k]));
    }
    return (label == no_label ? 0 : -p.log(label)) + beta * kl;
  }
};
const Register<TwoBranches<TradesLoss>> trades;

// BCE(q) + β·KL(p ‖ q)·(1.0000001 − p_y), BCE(q) = −log q_y − log(1.0001 − max_{j≠y} q_j + 1e-12) (Wang et
// al., "Improving adversarial robustness requires revisiting misclassified examples", 2020; the constants are
// those of its code).
struct MartLoss {
  static constexpr const char* name = "Mart";
  static constexpr std::int64_t lowest_label = 0;

  static double sample(const LogSoftmax& p, const LogSoftmax& q, std::int64_t label, double beta,
                       double weight, Strided<float> dclean, Strided<float> dadversarial) {
    std::int64_t rival = label == 0 ? 1 : 0;
    for (std::int64_t k = 0; k < q.classes(); ++k)
      if (k != label && q.log(k) > q.log(rival)) rival = k;
    const double kl = divergence(p, q), unsure = 1.0000001 - p[label], margin = 1.0001 - q[rival] + 1e-12;
    for (std::int64_t k = 0; k < p.classes(); ++k) {
      const double d_kl = p[k] * (p.log(k) - q.log(k) - kl);      // ∂KL/∂clean
      const double d_unsure = -p[label] * ((k == label) - p[k]);  // ∂(1 − p_y)/∂clean
      const double d_rival = q[rival] * ((k == rival) - q[k]);    // ∂q_rival/∂adversarial
      dclean[k] = static_cast<float>(weight * beta * (unsure * d_kl + kl * d_unsure));
      dadversarial[k] = static_cast<float>(
          weight * (q[k] - (k == label) + d_rival / margin + beta * unsure * (q[k] - p[k])));
    }
    return -q.log(label) - logarithm(margin) + beta * kl * unsure;
  }
};
const Register<TwoBranches<MartLoss>> mart;

// softmax(logits) − target: the gradient that seeds an attack on CE (target one-hot) or on KL (target = p of
// the clean image).
struct SoftmaxDifference {
  static constexpr const char* name = "SoftmaxDifference";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"logits", float32}, Port{"target", float32}};
  static constexpr std::array outputs{Port{"dlogits", float32}};

  bool half;

  explicit SoftmaxDifference(const Attributes& attributes) : half(attributes.half()) {}

  void compute(Context& context) const {
    const auto tensor = context.input<float>(0), target = context.input<float>(1);
    const Logits logits(tensor, "logits");
    const Shape shape{logits.samples(), logits.classes};
    require(target.shape() == shape, "target is ", target.shape().text(), ", not ", shape.text());
    const auto gradient = context.output<float>(0, tensor.shape());
    const auto numbers = half ? widened(tensor, gradient) : tensor;
    for (std::int64_t s = 0; s < logits.samples(); ++s) {
      const LogSoftmax p(logits.of(numbers, s), logits.classes);
      const auto d = logits.of(gradient, s);
      for (std::int64_t k = 0; k < logits.classes; ++k)
        d[k] = static_cast<float>(p[k] - target[s * logits.classes + k]);
      if (half && half_is_fp16) away_from_the_ends(d, logits.classes);
    }
    if (half) narrow(gradient);
  }

 private:
  // Multiplies an image's gradient with the power of two that half.h wants: no sign of what follows from it changes.
  static void away_from_the_ends(Strided<float> gradient, std::int64_t classes) {
    float largest = 0;
    for (std::int64_t k = 0; k < classes; ++k) largest = std::max(largest, std::fabs(gradient[k]));
    if (!(largest > 0) || !std::isfinite(largest)) return;
    int exponent = 0;
    std::frexp(largest, &exponent);
    for (std::int64_t k = 0; k < classes; ++k)
      gradient[k] = std::ldexp(gradient[k], half_gradient_exponent - exponent);
  }

  // The stack of a tensor [blocks, classes, lanes] in half precision.
  static Stack vector(const Shape& shape) { return Stack::checked(shape[1], 1, 1, 0, shape[2], true); }

  static Tensor<const float> widened(const Tensor<const float>& from, const Tensor<float>& to) {
    const Stack stack = vector(from.shape());
    for (std::int64_t nb = 0; nb < from.dim(0); ++nb)
      for (std::int64_t k = 0; k < stack.channels; ++k)
        widen_row(stack, stack.row(from.data(), nb, k, 0), 0, 1,
                  &to[(nb * stack.channels + k) * stack.lanes]);
    return {to.data(), to.shape()};
  }

  // Rounds a tensor of floats where it lies: from its beginning, what is written ends before what is still to be read.
  static void narrow(const Tensor<float>& tensor) {
    const Stack stack = vector(tensor.shape());
    float numbers[2 * most_lanes];
    for (std::int64_t nb = 0; nb < tensor.dim(0); ++nb) {
      for (std::int64_t k = 0; k < stack.channels; k += 2) {
        const std::int64_t classes = std::min<std::int64_t>(2, stack.channels - k);
        std::copy_n(&tensor[(nb * stack.channels + k) * stack.lanes], classes * stack.lanes, numbers);
        for (std::int64_t i = 0; i < classes; ++i)
          narrow_row(stack, numbers + i * stack.lanes, stack.row(tensor.data(), nb, k + i, 0));
      }
      stack.zero_front(stack.ahead(tensor.data(), nb * stack.block()));
    }
  }
};
const Register<SoftmaxDifference> softmax_difference;

}  // namespace
}  // namespace edge_bcs
