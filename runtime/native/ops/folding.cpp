// Folding batch norm and biases into a scale and a shift for each channel, and its gradient.

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/epsilon.h"
#include "ops/op.h"

namespace edge_bcs {
namespace {

// One range of channels of the affine tensor: which parameters it is made of (offsets, −1 where there is
// none).
struct Entry {
  // The last is a scale of its own behind a bias.
  enum Kind : std::int64_t { bias_only = 0, frozen = 1, batch = 2, scaled = 3 };
  std::int64_t kind, channels, bias, gamma, beta, statistics;
};

struct Entries {
  std::vector<Entry> list;
  std::int64_t slots = 0;  // A
  double epsilon;

  explicit Entries(const Attributes& attributes) : epsilon(epsilon_from(attributes)) {
    const auto flat = attributes.integers("entries");
    require(!flat.empty() && flat.size() % 6 == 0, "the attribute entries has ", flat.size(),
            " numbers, not six for each entry");
    for (std::size_t i = 0; i < flat.size(); i += 6) {
      const Entry entry{flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4], flat[i + 5]};
      require(entry.kind >= Entry::bias_only && entry.kind <= Entry::scaled && entry.channels >= 1 &&
                  entry.channels < (1 << 23),
              "entry ", list.size(), " is out of range");
      constexpr std::int64_t most = std::int64_t{1} << 40;
      for (std::int64_t offset : {entry.bias, entry.gamma, entry.beta, entry.statistics})
        require(offset >= -1 && offset <= most, "entry ", list.size(), " has an offset of ", offset);
      require(entry.kind != Entry::frozen || entry.statistics >= 0, "entry ", list.size(),
              " has no statistics");
      slots += entry.channels;
      list.push_back(entry);
    }
  }

  // Checks that every offset stays within the parameters and the statistics.
  void check(const Tensor<const float>& dense, const Tensor<const float>& mean,
             const Tensor<const float>& variance) const {
    require(mean.shape() == Shape{mean.size()} && variance.shape() == mean.shape(), "mean ",
            mean.shape().text(), " and variance ", variance.shape().text(), " are not vectors of one length");
    for (const Entry& entry : list) {
      for (std::int64_t offset : {entry.bias, entry.gamma, entry.beta})
        require(offset < 0 || offset + entry.channels <= dense.size(), "an entry reads parameters ", offset,
                " to ", offset + entry.channels, " of ", dense.size());
      require(entry.statistics < 0 || entry.statistics + entry.channels <= mean.size(),
              "an entry reads statistics ", entry.statistics, " to ", entry.statistics + entry.channels,
              " of ", mean.size());
    }
  }

  float inverse_deviation(float variance) const {
    require(variance >= 0 && std::isfinite(variance), "a running variance is ", variance,
            ", not a finite number of at least 0");
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(variance) + epsilon));
  }
};

float at(const Tensor<const float>& values, std::int64_t offset, std::int64_t c, float otherwise) {
  return offset < 0 ? otherwise : values[offset + c];
}

struct FoldAffine {
  static constexpr const char* name = "FoldAffine";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"dense", float32}, Port{"mean", float32},
                                     Port{"variance", float32}};
  static constexpr std::array outputs{Port{"affine", float32}};

  Entries entries;

  explicit FoldAffine(const Attributes& attributes) : entries(attributes) {}

  void compute(Context& context) const {
    const auto dense = context.input<float>(0), mean = context.input<float>(1),
               variance = context.input<float>(2);
    entries.check(dense, mean, variance);
    const auto affine = context.output<float>(0, {2 * entries.slots});
    float* scale = affine.data();
    float* shift = affine.data() + entries.slots;
    for (const Entry& e : entries.list)
      for (std::int64_t c = 0; c < e.channels; ++c, ++scale, ++shift) {
        const float bias = at(dense, e.bias, c, 0), gamma = at(dense, e.gamma, c, 1),
                    beta = at(dense, e.beta, c, 0);
        if (e.kind == Entry::bias_only) {
          *scale = 1;
          *shift = bias;
        } else if (e.kind == Entry::frozen) {
          *scale = gamma * entries.inverse_deviation(variance[e.statistics + c]);
          *shift = beta + (bias - mean[e.statistics + c]) * *scale;
        } else {
          *scale = gamma;
          *shift = e.kind == Entry::scaled ? beta + bias * gamma : beta;
        }
      }
  }
};
const Register<FoldAffine> fold_affine;

struct FoldAffineGrad {
  static constexpr const char* name = "FoldAffineGrad";
  static constexpr std::array inputs{Port{"affine_grad", float32}, Port{"dense", float32},
                                     Port{"mean", float32}, Port{"variance", float32},
                                     Port{"dense_grad", float32}};
  static constexpr std::array outputs{Port{"dense_grad_out", float32, aliases(4)}};

  Entries entries;
  // Where in dense_grad the gradients of an entry's bias, gamma and beta lie, −1 for those that are not wanted: three numbers an
  // entry. Without the attribute they lie as the parameters themselves do.
  std::vector<std::int64_t> places;

  explicit FoldAffineGrad(const Attributes& attributes)
      : entries(attributes), places(attributes.integers("gradients", {})) {
    require(places.empty() || places.size() == 3 * entries.list.size(), "the attribute gradients has ",
            places.size(), " numbers, not three for each entry");
    for (std::int64_t place : places)
      require(place >= -1 && place <= (std::int64_t{1} << 40), "the attribute gradients has an offset of ",
              place);
  }

  void compute(Context& context) const {
    const auto affine_grad = context.input<float>(0), dense = context.input<float>(1);
    const auto mean = context.input<float>(2), variance = context.input<float>(3);
    entries.check(dense, mean, variance);
    require(affine_grad.shape() == Shape{2 * entries.slots}, "affine_grad is ", affine_grad.shape().text(),
            ", not [", 2 * entries.slots, "]");
    const Shape gradients = context.input<float>(4).shape();
    const std::int64_t count = context.input<float>(4).size();
    require(places.empty() ? gradients == dense.shape() : gradients == Shape{count}, "dense_grad is ",
            gradients.text(), ", not ", places.empty() ? dense.shape().text() : "a vector");
    for (std::size_t i = 0; i < places.size(); ++i)
      require(places[i] < 0 || places[i] + entries.list[i / 3].channels <= count,
              "an entry has its gradient from ", places[i], " to ", places[i] + entries.list[i / 3].channels,
              " of ", count);
    const auto gradient = context.in_place<float>(0, 4);
    const auto add = [&](std::int64_t offset, std::int64_t c, float amount) {
      if (offset >= 0) gradient[offset + c] += amount;
    };
    std::int64_t slot = 0;
    for (std::size_t i = 0; i < entries.list.size(); ++i) {
      const Entry& e = entries.list[i];
      const std::int64_t bias = places.empty() ? e.bias : places[3 * i];
      const std::int64_t gamma = places.empty() ? e.gamma : places[3 * i + 1];
      const std::int64_t beta = places.empty() ? e.beta : places[3 * i + 2];
      for (std::int64_t c = 0; c < e.channels; ++c, ++slot) {
        const float dscale = affine_grad[slot], dshift = affine_grad[entries.slots + slot];
        if (e.kind == Entry::bias_only) {
          add(bias, c, dshift);
        } else if (e.kind == Entry::frozen) {
          const float inverse = entries.inverse_deviation(variance[e.statistics + c]);
          const float centred = at(dense, e.bias, c, 0) - mean[e.statistics + c];
          add(gamma, c, inverse * (dscale + centred * dshift));
          add(beta, c, dshift);
          add(bias, c, at(dense, e.gamma, c, 1) * inverse * dshift);
        } else if (e.kind == Entry::scaled) {
          add(gamma, c, dscale + at(dense, e.bias, c, 0) * dshift);
          add(beta, c, dshift);
          add(bias, c, at(dense, e.gamma, c, 1) * dshift);
        } else {
          add(gamma, c, dscale);
          add(beta, c, dshift);
        }
      }
    }
  }
};
const Register<FoldAffineGrad> fold_affine_grad;

// Zeros of the size of its input: where the gradient of the affine tensor starts.
struct ZeroAffine {
  static constexpr const char* name = "ZeroAffine";
  static constexpr std::array inputs{Port{"affine", float32}};
  static constexpr std::array outputs{Port{"affine_grad", float32}};
  explicit ZeroAffine(const Attributes&) {}
  void compute(Context& context) const {
    const auto zeros = context.output<float>(0, context.input<float>(0).shape());
    std::fill(zeros.begin(), zeros.end(), 0.0f);
  }
};
const Register<ZeroAffine> zero_affine;

}  // namespace
}  // namespace edge_bcs
