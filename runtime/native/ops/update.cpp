// The optimizer: momentum SGD with decoupled weight decay, and the rewiring of Algorithm 1 (Özdenizci and
// Legenstein, ICML 2021). The rewiring gives the same bits as edge_bcs/method/rewiring.py.

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <span>

#include "ops/dispatch.h"
#include "ops/finite.h"
#include "ops/op.h"
#include "ops/philox.h"

namespace edge_bcs {
namespace {

constexpr float newborn = 1e-12f;  // θ of a new connection

// Entries that one thread does at once; a multiple of the four words of a Philox block.
constexpr std::int64_t chunk = 4096;

// The checks gather an int without branching, so that the compiler uses vectors.
template <class Holds>
bool for_all(std::int64_t first, std::int64_t last, const Holds& holds) {
  int broken = 0;
  for (std::int64_t t = first; t < last; ++t) broken |= static_cast<int>(!holds(t));
  return broken == 0;
}

// Learning rate λ, weight decay λ_w (not scaled by λ), momentum μ, and noise σ of standard deviation λ·σ.
struct Hyper {
  float rate, decay, momentum, noise;

  explicit Hyper(const Tensor<const float>& tensor) {
    require(tensor.shape() == Shape{4}, "hyper is ", tensor.shape().text(), ", not [4]");
    for (float x : tensor)
      require(is_finite(x) && x >= 0, "hyper (learning rate, weight decay, momentum, noise) has ", x,
              ", not a finite number of at least 0");
    rate = tensor[0], decay = tensor[1], momentum = tensor[2], noise = tensor[3];
  }

  float velocity(float v, float g) const { return momentum * v + g; }
  float updated(float w, float v) const { return w * (1.0f - decay) - rate * v; }
};

void require_finite(std::span<const float> numbers, const char* name) {
  require(all_finite(numbers.data(), static_cast<std::int64_t>(numbers.size())), name,
          " has an element that is not finite");
}

// The standard normal draws of a step's entries, a bounded number at a time.
class Noise {
 public:
  static constexpr std::int64_t capacity = 512;  // a multiple of the four words of a Philox block

  explicit Noise(const Philox& philox) : stream_(philox.stream()) {}

  // Draws `first` (a multiple of four) and those after it, `count` of them, at most `capacity`.
  const float* draw(std::int64_t first, std::int64_t count) {
    normal_kernels().normals(stream_, static_cast<std::uint64_t>(first / 4),
                             static_cast<int>((count + 3) / 4), numbers_);
    return numbers_;
  }

 private:
  NormalStream stream_;
  float numbers_[capacity];
};

// A set of positions in memory that holds nothing else: d floats of each of two arrays are 2d slots, never
// more than half full. Words are copied in and out, because the memory belongs to floats.
class PositionSet {
 public:
  PositionSet(std::span<float> low, std::span<float> high) : low_(low), high_(high) {
    for (std::size_t slot = 0; slot < 2 * low_.size(); ++slot) put(slot, empty);
  }

  // Adds a position; false if it was there already.
  bool insert(std::uint32_t position) {
    const std::size_t slots = 2 * low_.size();
    const std::uint64_t hash = position * 0x9E3779B9u;
    for (std::size_t slot = hash * slots >> 32;; slot = slot + 1 == slots ? 0 : slot + 1) {
      const std::uint32_t there = get(slot);
      if (there == position) return false;
      if (there == empty) {
        put(slot, position);
        return true;
      }
    }
  }

 private:
  static constexpr std::uint32_t empty = 0xFFFFFFFFu;  // no position: those are below 2^31

  float* at(std::size_t slot) const {
    return slot < low_.size() ? low_.data() + slot : high_.data() + (slot - low_.size());
  }
  std::uint32_t get(std::size_t slot) const {
    std::uint32_t word;
    std::memcpy(&word, at(slot), sizeof word);
    return word;
  }
  void put(std::size_t slot, std::uint32_t word) { std::memcpy(at(slot), &word, sizeof word); }

  std::span<float> low_, high_;
};

// One step of Algorithm 1 on the κ connections, in place and without work memory. A step that fails changes
// nothing.
struct RewireStep {
  static constexpr const char* name = "RewireStep";
  static constexpr std::array inputs{Port{"value", float32},    Port{"index", int32},
                                     Port{"momentum", float32}, Port{"gradient", float32},
                                     Port{"hyper", float32},    Port{"counter", int64}};
  static constexpr std::array outputs{
      Port{"value_out", float32, aliases(0)}, Port{"index_out", int32, aliases(1)},
      Port{"momentum_out", float32, aliases(2)}, Port{"gradient_out", float32, aliases(3)}};

  std::int64_t positions;  // N

  explicit RewireStep(const Attributes& attributes)
      : positions(attributes.integer_in("size", 1, std::numeric_limits<std::int32_t>::max())) {}

  void compute(Context& context) const {
    const Hyper hyper(context.input<float>(4));
    const auto counter = context.input<std::int64_t>(5);
    require(counter.shape() == Shape{2}, "counter is ", counter.shape().text(), ", not [2] (seed, step)");
    require(counter[1] >= 0 && counter[1] < (std::int64_t{1} << 56), "the step ", counter[1],
            " is not in [0, 2^56)");
    const auto seed = static_cast<std::uint64_t>(counter[0]);
    const auto step = static_cast<std::uint64_t>(counter[1]);
    const Philox noise(seed, step, Purpose::noise);
    validate(context, hyper, noise);

    const auto value = context.in_place<float>(0, 0);
    const auto index = context.in_place<std::int32_t>(1, 1);
    const auto momentum = context.in_place<float>(2, 2);
    const auto gradient = context.in_place<float>(3, 3);
    const std::int64_t kappa = value.size();
    update(context, hyper, noise, value.data(), momentum.data(), gradient.data(), kappa);
    const std::int64_t survivors = compact(value.data(), index.data(), momentum.data(), kappa);
    if (survivors == kappa) return;
    draw(seed, step, value.data(), index.data(), momentum.data(), survivors, kappa);
    // The gradient is consumed, so the births can wait there while the survivors move up.
    std::memcpy(gradient.data(), index.data() + survivors, static_cast<std::size_t>(kappa - survivors) * 4);
    merge(seed, gradient.data(), value.data(), index.data(), momentum.data(), survivors, kappa);
  }

 private:
  // Checks the buffers, and that the step gives finite numbers only.
  void validate(const Context& context, const Hyper& hyper, const Philox& noise) const {
    const auto value = context.input<float>(0);
    const auto index = context.input<std::int32_t>(1);
    const auto momentum = context.input<float>(2);
    const auto gradient = context.input<float>(3);
    const std::int64_t kappa = value.size();
    const Shape shape{kappa};
    require(value.shape() == shape && index.shape() == shape && momentum.shape() == shape &&
                gradient.shape() == shape,
            "value ", value.shape().text(), ", index ", index.shape().text(), ", momentum ",
            momentum.shape().text(), " and gradient ", gradient.shape().text(),
            " are not vectors of one length");
    require(kappa <= positions, "there are ", kappa, " connections for ", positions, " positions");
    const float noise_scale = hyper.rate * hyper.noise;
    context.parallel_parts(kappa, chunk, [&](std::int64_t first, std::int64_t last) {
      const auto part = [&](const float* data) {
        return std::span(data + first, static_cast<std::size_t>(last - first));
      };
      require_finite(part(value.data()), "value");
      require_finite(part(momentum.data()), "momentum");
      require_finite(part(gradient.data()), "gradient");
      const float* const values = value.data();
      const std::int32_t* const places = index.data();
      require(for_all(first, last, [=](std::int64_t t) { return values[t] != 0; }),
              "value has a 0; active weights never are");
      require(for_all(std::max<std::int64_t>(first, 1), last,
                      [=](std::int64_t t) { return places[t - 1] < places[t]; }) &&
                  places[first] >= 0 && places[last - 1] < positions,
              "index is not strictly ascending in [0, ", positions, ")");
      // Far from overflow the noise (below 7 standard deviations) need not be drawn to know that the sum is
      // finite.
      constexpr float far = std::numeric_limits<float>::max() / 16;
      const float *const velocities = momentum.data(), *const gradients = gradient.data();
      const bool certain = noise_scale < far / 8 && for_all(first, last, [=](std::int64_t t) {
        const float v = hyper.velocity(velocities[t], gradients[t]);
        return static_cast<int>(std::fabs(v) < far) &
               static_cast<int>(std::fabs(hyper.updated(values[t], v)) < far);
      });
      if (certain) return;
      for_noise(hyper, noise, first, last, [&](std::int64_t t, auto normal) {
        const float v = hyper.velocity(momentum[t], gradient[t]);
        const float w = noisy(hyper.updated(value[t], v), noise_scale, normal);
        require(is_finite(v) && is_finite(w),
                "the step would make a weight that is not finite; nothing was changed");
      });
    });
  }

  struct Silent {};  // instead of a draw, where there is no noise
  static float noisy(float w, float scale, float normal) { return w + scale * normal; }
  static float noisy(float w, float, Silent) { return w; }

  // Calls body(t, the entry's draw, or Silent) for the entries [first, last); `first` is a multiple of four.
  template <class Body>
  static void for_noise(const Hyper& hyper, const Philox& philox, std::int64_t first, std::int64_t last,
                        const Body& body) {
    if (hyper.noise == 0) {
      for (std::int64_t t = first; t < last; ++t) body(t, Silent{});
      return;
    }
    Noise noise(philox);
    for (std::int64_t from = first; from < last; from += Noise::capacity) {
      const std::int64_t end = std::min(last, from + Noise::capacity);
      const float* const draws = noise.draw(from, end - from);
      for (std::int64_t t = from; t < end; ++t) body(t, draws[t - from]);
    }
  }

  // Momentum SGD with noise; a connection that dies gets the value 0, which no survivor has.
  static void update(const Context& context, const Hyper& hyper, const Philox& noise, float* value,
                     float* momentum, const float* gradient, std::int64_t kappa) {
    const float noise_scale = hyper.rate * hyper.noise;
    context.parallel_parts(kappa, chunk, [&](std::int64_t first, std::int64_t last) {
      for_noise(hyper, noise, first, last, [&](std::int64_t t, auto normal) {
        const float v = hyper.velocity(momentum[t], gradient[t]);
        const float w = noisy(hyper.updated(value[t], v), noise_scale, normal);
        const bool same_sign = (std::bit_cast<std::int32_t>(w) ^ std::bit_cast<std::int32_t>(value[t])) >= 0;
        value[t] = same_sign ? w : 0.0f;  // a w of ±0 is dead, too
        momentum[t] = v;
      });
    });
  }

  // Moves the survivors to the front, in order, and returns how many there are.
  static std::int64_t compact(float* value, std::int32_t* index, float* momentum, std::int64_t kappa) {
    std::int64_t kept = next_dead(value, 0, kappa);
    for (std::int64_t dead = kept; dead < kappa;) {
      const std::int64_t from = dead + 1;
      dead = next_dead(value, from, kappa);
      move(value, index, momentum, kept, from, dead - from);
      kept += dead - from;
    }
    return kept;
  }

  // The first entry of [from, kappa) whose value is 0, or kappa.
  static std::int64_t next_dead(const float* value, std::int64_t from, std::int64_t kappa) {
    constexpr std::int64_t block = 64;
    while (from + block <= kappa &&
           for_all(from, from + block, [=](std::int64_t t) { return value[t] != 0; }))
      from += block;
    while (from < kappa && value[from] != 0) ++from;
    return from;
  }

  // Moves `count` entries that begin at `from`.
  static void move(float* value, std::int32_t* index, float* momentum, std::int64_t to, std::int64_t from,
                   std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count) * 4;
    std::memmove(value + to, value + from, bytes);
    std::memmove(index + to, index + from, bytes);
    std::memmove(momentum + to, momentum + from, bytes);
  }

  // Draws as many dormant positions as connections died into index[survivors, kappa), ascending. The places
  // that the dead left in value and momentum hold the set of those drawn already.
  void draw(std::uint64_t seed, std::uint64_t step, float* value, std::int32_t* index, float* momentum,
            std::int64_t survivors, std::int64_t kappa) const {
    const auto deaths = static_cast<std::size_t>(kappa - survivors);
    PositionSet drawn(std::span(value + survivors, deaths), std::span(momentum + survivors, deaths));
    IntegerStream candidates(Philox(seed, step, Purpose::birth), static_cast<std::uint32_t>(positions));
    for (std::int64_t t = survivors; t < kappa;) {
      const std::uint32_t candidate = candidates.next();
      const auto position = static_cast<std::int32_t>(candidate);
      if (!std::binary_search(index, index + survivors, position) && drawn.insert(candidate))
        index[t++] = position;
    }
    std::sort(index + survivors, index + kappa);
  }

  // Merges the births (positions, ascending, stored in memory of floats) into the survivors, from the back.
  static void merge(std::uint64_t seed, const float* births, float* value, std::int32_t* index,
                    float* momentum, std::int64_t survivors, std::int64_t kappa) {
    std::int64_t end = survivors;  // survivors [0, end) are where they were
    for (std::int64_t b = kappa - survivors - 1; b >= 0; --b) {
      std::int32_t birth;
      std::memcpy(&birth, births + b, sizeof birth);
      const std::int64_t after = std::lower_bound(index, index + end, birth) - index;
      move(value, index, momentum, after + b + 1, after, end - after);
      end = after;
      value[end + b] = position_sign(seed, static_cast<std::uint32_t>(birth)) * newborn;
      index[end + b] = birth;
      momentum[end + b] = 0.0f;
    }
  }
};
const Register<RewireStep> rewire_step;

// Momentum SGD with decoupled weight decay on the dense parameters. A step that fails changes nothing.
struct DenseStep {
  static constexpr const char* name = "DenseStep";
  static constexpr std::array inputs{Port{"value", float32}, Port{"momentum", float32},
                                     Port{"gradient", float32}, Port{"hyper", float32}};
  static constexpr std::array outputs{Port{"value_out", float32, aliases(0)},
                                      Port{"momentum_out", float32, aliases(1)}};

  explicit DenseStep(const Attributes&) {}

  void compute(Context& context) const {
    const Hyper hyper(context.input<float>(3));
    const auto gradient = context.input<float>(2);
    const auto old_value = context.input<float>(0), old_momentum = context.input<float>(1);
    const Shape shape{old_value.size()};
    require(old_value.shape() == shape && old_momentum.shape() == shape && gradient.shape() == shape,
            "value ", old_value.shape().text(), ", momentum ", old_momentum.shape().text(), " and gradient ",
            gradient.shape().text(), " are not vectors of one length");
    context.parallel_parts(old_value.size(), chunk, [&](std::int64_t first, std::int64_t last) {
      bool finite = true;
      for (std::int64_t i = first; i < last; ++i) {
        const float v = hyper.velocity(old_momentum[i], gradient[i]);
        finite &= is_finite(v) && is_finite(hyper.updated(old_value[i], v));
      }
      require(finite, "the step would make a parameter that is not finite; nothing was changed");
    });
    const auto value = context.in_place<float>(0, 0), momentum = context.in_place<float>(1, 1);
    context.parallel_parts(value.size(), chunk, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) {
        momentum[i] = hyper.velocity(momentum[i], gradient[i]);
        value[i] = hyper.updated(value[i], momentum[i]);
      }
    });
  }
};
const Register<DenseStep> dense_step;

}  // namespace
}  // namespace edge_bcs
