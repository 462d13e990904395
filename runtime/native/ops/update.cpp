// The optimizer: momentum SGD with decoupled weight decay, and the rewiring of Algorithm 1 (Özdenizci and
// Legenstein, ICML 2021). The rewiring gives the same bits as edge_bcs/method/rewiring.py.

#include <algorithm>
#include <bit>
#include <cstring>
#include <iterator>
#include <limits>
#include <span>
#include <vector>

#include "ops/dispatch.h"
#include "ops/finite.h"
#include "ops/fixed.h"
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

// Positions that are trained, and the connections before them that are not.
struct Span {
  std::int64_t begin, end, skip;
};

// Trained connections [first, last), counted among those alone; `skip` places further on they lie among all.
struct Run {
  std::int64_t first, last, skip;
};

// One step of Algorithm 1 on the κ connections, in place and without work memory. A step that fails changes
// nothing.
//
// Where a network is trained in part, the attribute `spans` names the positions that are trained: three numbers for each
// run of them, where it begins, where it ends, and how many connections before it are not trained. Momentum and gradient
// then are those of the trained connections alone, which move among these positions alone: the others stay what and where
// they are, so that their number before a span never changes.
struct RewireStep {
  static constexpr const char* name = "RewireStep";
  static constexpr std::array inputs{Port{"value", float32},    Port{"index", int32},
                                     Port{"momentum", float32}, Port{"gradient", float32},
                                     Port{"hyper", float32},    Port{"counter", int64}};
  static constexpr std::array outputs{
      Port{"value_out", float32, aliases(0)}, Port{"index_out", int32, aliases(1)},
      Port{"momentum_out", float32, aliases(2)}, Port{"gradient_out", float32, aliases(3)}};

  std::int64_t positions;  // N
  bool all;                // is trained
  std::vector<Span> spans;
  std::int64_t candidates = 0;  // positions in the spans

  static constexpr std::size_t most_spans = 256;
  using Runs = Fixed<Run, most_spans>;

  explicit RewireStep(const Attributes& attributes)
      : positions(attributes.integer_in("size", 1, std::numeric_limits<std::int32_t>::max())) {
    const auto flat = attributes.integers("spans", {});
    all = flat.empty();
    require(flat.size() % 3 == 0, "the attribute spans has ", flat.size(),
            " numbers, not three for each span");
    require(flat.size() / 3 <= most_spans, "there are more than ", most_spans, " spans");
    if (all) spans.push_back({0, positions, 0});
    for (std::size_t i = 0; i < flat.size(); i += 3) {
      const Span before = spans.empty() ? Span{0, 0, 0} : spans.back();
      spans.push_back({flat[i], flat[i + 1], flat[i + 2]});
      require(before.end <= flat[i] && flat[i] < flat[i + 1] && flat[i + 1] <= positions &&
                  before.skip <= flat[i + 2] && flat[i + 2] <= positions,
              "the spans do not ascend within the ", positions, " positions");
    }
    for (const Span& span : spans) candidates += span.end - span.begin;
  }

  void compute(Context& context) const {
    const Hyper hyper(context.input<float>(4));
    const auto counter = context.input<std::int64_t>(5);
    require(counter.shape() == Shape{2}, "counter is ", counter.shape().text(), ", not [2] (seed, step)");
    require(counter[1] >= 0 && counter[1] < (std::int64_t{1} << 56), "the step ", counter[1],
            " is not in [0, 2^56)");
    const auto seed = static_cast<std::uint64_t>(counter[0]);
    const auto step = static_cast<std::uint64_t>(counter[1]);
    const Philox noise(seed, step, Purpose::noise);
    const Runs runs = validate(context, hyper, noise);

    const auto value = context.in_place<float>(0, 0);
    const auto index = context.in_place<std::int32_t>(1, 1);
    const auto momentum = context.in_place<float>(2, 2);
    const auto gradient = context.in_place<float>(3, 3);
    const std::int64_t kappa = value.size(), trained = momentum.size();
    update(context, hyper, noise, runs, value.data(), momentum.data(), gradient.data(), trained);
    const std::int64_t kept = compact(runs, value.data(), index.data(), momentum.data(), kappa);
    const std::int64_t deaths = trained - kept, survivors = kappa - deaths;
    if (deaths == 0) return;
    draw(seed, step, value.data(), index.data(), momentum.data() + kept, survivors, kappa);
    // The gradient is consumed, so the births can wait there while the survivors move up.
    std::memcpy(gradient.data(), index.data() + survivors, static_cast<std::size_t>(deaths) * 4);
    merge(seed, gradient.data(), deaths, value.data(), index.data(), momentum.data(), survivors, kept);
  }

 private:
  // Checks the buffers, and that the step gives finite numbers only; returns where the trained connections lie.
  Runs validate(const Context& context, const Hyper& hyper, const Philox& noise) const {
    const auto value = context.input<float>(0);
    const auto index = context.input<std::int32_t>(1);
    const auto momentum = context.input<float>(2);
    const auto gradient = context.input<float>(3);
    const std::int64_t kappa = value.size(), trained = all ? kappa : momentum.size();
    const Shape shape{kappa}, moving{trained};
    require(value.shape() == shape && index.shape() == shape && momentum.shape() == moving &&
                gradient.shape() == moving,
            "value ", value.shape().text(), ", index ", index.shape().text(), ", momentum ",
            momentum.shape().text(), " and gradient ", gradient.shape().text(),
            all ? " are not vectors of one length" : " are not vectors, two and two of one length");
    require(kappa <= positions, "there are ", kappa, " connections for ", positions, " positions");
    const auto part = [](const float* data, std::int64_t first, std::int64_t last) {
      return std::span(data + first, static_cast<std::size_t>(last - first));
    };
    context.parallel_parts(kappa, chunk, [&](std::int64_t first, std::int64_t last) {
      require_finite(part(value.data(), first, last), "value");
      const float* const values = value.data();
      const std::int32_t* const places = index.data();
      require(for_all(first, last, [=](std::int64_t t) { return values[t] != 0; }),
              "value has a 0; active weights never are");
      require(for_all(std::max<std::int64_t>(first, 1), last,
                      [=](std::int64_t t) { return places[t - 1] < places[t]; }) &&
                  places[first] >= 0 && places[last - 1] < positions,
              "index is not strictly ascending in [0, ", positions, ")");
    });
    const Runs runs = runs_of(index.data(), kappa, trained);
    const float noise_scale = hyper.rate * hyper.noise;
    context.parallel_parts(trained, chunk, [&](std::int64_t first, std::int64_t last) {
      require_finite(part(momentum.data(), first, last), "momentum");
      require_finite(part(gradient.data(), first, last), "gradient");
      // Far from overflow the noise (below 7 standard deviations) need not be drawn to know that the sum is
      // finite.
      constexpr float far = std::numeric_limits<float>::max() / 16;
      const float *const velocities = momentum.data(), *const gradients = gradient.data();
      for_runs(runs, first, last, [&](std::int64_t begin, std::int64_t end, std::int64_t skip) {
        const float* const values = value.data() + skip;
        const bool certain = noise_scale < far / 8 && for_all(begin, end, [=](std::int64_t t) {
          const float v = hyper.velocity(velocities[t], gradients[t]);
          return static_cast<int>(std::fabs(v) < far) &
                 static_cast<int>(std::fabs(hyper.updated(values[t], v)) < far);
        });
        if (certain) return;
        for_noise(hyper, noise, begin, end, [&](std::int64_t t, auto normal) {
          const float v = hyper.velocity(velocities[t], gradients[t]);
          const float w = noisy(hyper.updated(values[t], v), noise_scale, normal);
          require(is_finite(v) && is_finite(w),
                  "the step would make a weight that is not finite; nothing was changed");
        });
      });
    });
    return runs;
  }

  // Where the trained connections lie, of which there are `trained`, among the κ positions `index`.
  Runs runs_of(const std::int32_t* index, std::int64_t kappa, std::int64_t trained) const {
    Runs runs;
    std::int64_t before = 0;
    for (const Span& span : spans) {
      const std::int64_t first = std::lower_bound(index, index + kappa, span.begin) - index;
      const std::int64_t last = std::lower_bound(index, index + kappa, span.end) - index;
      require(first - before == span.skip, "before position ", span.begin, " lie ", first - before,
              " connections that are not trained, not ", span.skip);
      runs.push_back({before, before + last - first, span.skip});
      before += last - first;
    }
    require(before == trained, "there are ", before, " connections that are trained, and momentum for ",
            trained);
    return runs;
  }

  // Calls body(begin, end, skip) for the parts of the runs that lie in the trained connections [first, last).
  template <class Body>
  static void for_runs(const Runs& runs, std::int64_t first, std::int64_t last, const Body& body) {
    for (const Run& run : runs) {
      const std::int64_t begin = std::max(first, run.first), end = std::min(last, run.last);
      if (begin < end) body(begin, end, run.skip);
    }
  }

  struct Silent {};  // instead of a draw, where there is no noise
  static float noisy(float w, float scale, float normal) { return w + scale * normal; }
  static float noisy(float w, float, Silent) { return w; }

  // Calls body(t, the entry's draw, or Silent) for the entries [first, last).
  template <class Body>
  static void for_noise(const Hyper& hyper, const Philox& philox, std::int64_t first, std::int64_t last,
                        const Body& body) {
    if (hyper.noise == 0) {
      for (std::int64_t t = first; t < last; ++t) body(t, Silent{});
      return;
    }
    Noise noise(philox);
    for (std::int64_t from = first / 4 * 4; from < last; from += Noise::capacity) {
      const std::int64_t end = std::min(last, from + Noise::capacity);
      const float* const draws = noise.draw(from, end - from);
      for (std::int64_t t = std::max(first, from); t < end; ++t) body(t, draws[t - from]);
    }
  }

  // Momentum SGD with noise; a connection that dies gets the value 0, which no survivor has.
  static void update(const Context& context, const Hyper& hyper, const Philox& noise, const Runs& runs,
                     float* all_values, float* momentum, const float* gradient, std::int64_t trained) {
    const float noise_scale = hyper.rate * hyper.noise;
    context.parallel_parts(trained, chunk, [&](std::int64_t first, std::int64_t last) {
      for_runs(runs, first, last, [&](std::int64_t begin, std::int64_t end, std::int64_t skip) {
        float* const value = all_values + skip;
        for_noise(hyper, noise, begin, end, [&](std::int64_t t, auto normal) {
          const float v = hyper.velocity(momentum[t], gradient[t]);
          const float w = noisy(hyper.updated(value[t], v), noise_scale, normal);
          const bool same_sign =
              (std::bit_cast<std::int32_t>(w) ^ std::bit_cast<std::int32_t>(value[t])) >= 0;
          value[t] = same_sign ? w : 0.0f;  // a w of ±0 is dead, too
          momentum[t] = v;
        });
      });
    });
  }

  // Moves the survivors to the front, in order, and returns how many of the trained ones there are.
  static std::int64_t compact(const Runs& runs, float* value, std::int32_t* index, float* momentum,
                              std::int64_t kappa) {
    std::int64_t kept = 0;
    for (const Run& run : runs)
      for_survivors(value, run.first + run.skip, run.last + run.skip,
                    [&](std::int64_t from, std::int64_t count) {
        move(momentum, kept, from - run.skip, count);
        kept += count;
      });
    std::int64_t end = 0;
    for_survivors(value, 0, kappa, [&](std::int64_t from, std::int64_t count) {
      move(value, end, from, count);
      move(index, end, from, count);
      end += count;
    });
    return kept;
  }

  // Calls body(from, count) for each run of entries of [first, last) whose value is not 0.
  template <class Body>
  static void for_survivors(const float* value, std::int64_t first, std::int64_t last, const Body& body) {
    for (std::int64_t from = first; from < last;) {
      const std::int64_t dead = next_dead(value, from, last);
      if (from < dead) body(from, dead - from);
      from = dead + 1;
    }
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
  template <class T>
  static void move(T* data, std::int64_t to, std::int64_t from, std::int64_t count) {
    if (to != from) std::memmove(data + to, data + from, static_cast<std::size_t>(count) * sizeof(T));
  }

  // The position that is the `place`-th of those in the spans.
  std::uint32_t position_at(std::uint32_t place) const {
    std::int64_t left = place;
    auto span = spans.begin();
    for (; left >= span->end - span->begin; ++span) left -= span->end - span->begin;
    return static_cast<std::uint32_t>(span->begin + left);
  }

  // How many connections before a position in a span are not trained.
  std::int64_t skip_before(std::int32_t position) const {
    const auto after = std::upper_bound(spans.begin(), spans.end(), position,
                                        [](std::int64_t p, const Span& span) { return p < span.begin; });
    return std::prev(after)->skip;
  }

  // Draws as many dormant positions as connections died into index[survivors, kappa), ascending. The places
  // that the dead left in value and in momentum, from `spare` on, hold the set of those drawn already.
  void draw(std::uint64_t seed, std::uint64_t step, float* value, std::int32_t* index, float* spare,
            std::int64_t survivors, std::int64_t kappa) const {
    const auto deaths = static_cast<std::size_t>(kappa - survivors);
    PositionSet drawn(std::span(value + survivors, deaths), std::span(spare, deaths));
    IntegerStream stream(Philox(seed, step, Purpose::birth), static_cast<std::uint32_t>(candidates));
    for (std::int64_t t = survivors; t < kappa;) {
      const std::uint32_t candidate = position_at(stream.next());
      const auto position = static_cast<std::int32_t>(candidate);
      if (!std::binary_search(index, index + survivors, position) && drawn.insert(candidate))
        index[t++] = position;
    }
    std::sort(index + survivors, index + kappa);
  }

  // Merges the births (positions, ascending, stored in memory of floats) into the survivors, from the back.
  void merge(std::uint64_t seed, const float* births, std::int64_t count, float* value, std::int32_t* index,
             float* momentum, std::int64_t survivors, std::int64_t kept) const {
    // Survivors [0, end) are where they were, and so are those of them that are trained, [0, moving).
    std::int64_t end = survivors, moving = kept;
    for (std::int64_t b = count - 1; b >= 0; --b) {
      std::int32_t birth;
      std::memcpy(&birth, births + b, sizeof birth);
      const std::int64_t after = std::lower_bound(index, index + end, birth) - index;
      const std::int64_t skip = skip_before(birth);
      move(value, after + b + 1, after, end - after);
      move(index, after + b + 1, after, end - after);
      move(momentum, after - skip + b + 1, after - skip, moving - (after - skip));
      end = after, moving = after - skip;
      value[end + b] = position_sign(seed, static_cast<std::uint32_t>(birth)) * newborn;
      index[end + b] = birth;
      momentum[moving + b] = 0.0f;
    }
  }
};
const Register<RewireStep> rewire_step;

// Momentum SGD with decoupled weight decay on the dense parameters. A step that fails changes nothing.
//
// Where a network is trained in part, the attribute `spans` names the numbers that are trained, two for each run of them:
// where it begins and how many there are. Momentum and gradient are those of the trained numbers alone.
struct DenseStep {
  static constexpr const char* name = "DenseStep";
  static constexpr std::array inputs{Port{"value", float32}, Port{"momentum", float32},
                                     Port{"gradient", float32}, Port{"hyper", float32}};
  static constexpr std::array outputs{Port{"value_out", float32, aliases(0)},
                                      Port{"momentum_out", float32, aliases(1)}};

  bool all;  // is trained
  std::vector<Run> runs;
  std::int64_t trained = 0, end = 0;

  explicit DenseStep(const Attributes& attributes) {
    const auto flat = attributes.integers("spans", {});
    all = flat.empty();
    require(flat.size() % 2 == 0, "the attribute spans has ", flat.size(), " numbers, not two for each span");
    for (std::size_t i = 0; i < flat.size(); i += 2) {
      constexpr std::int64_t most = std::int64_t{1} << 40;
      require(flat[i] >= end && flat[i] <= most && flat[i + 1] >= 1 && flat[i + 1] <= most,
              "the spans do not ascend");
      runs.push_back({trained, trained + flat[i + 1], flat[i] - trained});
      trained += flat[i + 1];
      end = flat[i] + flat[i + 1];
    }
  }

  void compute(Context& context) const {
    const Hyper hyper(context.input<float>(3));
    const auto gradient = context.input<float>(2);
    const auto old_value = context.input<float>(0), old_momentum = context.input<float>(1);
    const std::int64_t size = old_value.size(), count = all ? size : trained;
    const Shape shape{size}, moving{count};
    require(old_value.shape() == shape && old_momentum.shape() == moving && gradient.shape() == moving,
            "value ", old_value.shape().text(), ", momentum ", old_momentum.shape().text(), " and gradient ",
            gradient.shape().text(),
            all ? " are not vectors of one length" : " are not vectors, the latter of what is trained");
    require(end <= size, "value has ", size, " elements, and those up to ", end, " are trained");
    const auto for_runs = [&](std::int64_t first, std::int64_t last, const auto& body) {
      if (all) return body(first, last, std::int64_t{0});
      for (const Run& run : runs) {
        const std::int64_t begin = std::max(first, run.first), stop = std::min(last, run.last);
        if (begin < stop) body(begin, stop, run.skip);
      }
    };
    context.parallel_parts(count, chunk, [&](std::int64_t first, std::int64_t last) {
      for_runs(first, last, [&](std::int64_t begin, std::int64_t stop, std::int64_t skip) {
        bool finite = true;
        for (std::int64_t i = begin; i < stop; ++i) {
          const float v = hyper.velocity(old_momentum[i], gradient[i]);
          finite &= is_finite(v) && is_finite(hyper.updated(old_value[i + skip], v));
        }
        require(finite, "the step would make a parameter that is not finite; nothing was changed");
      });
    });
    const auto value = context.in_place<float>(0, 0), momentum = context.in_place<float>(1, 1);
    context.parallel_parts(count, chunk, [&](std::int64_t first, std::int64_t last) {
      for_runs(first, last, [&](std::int64_t begin, std::int64_t stop, std::int64_t skip) {
        for (std::int64_t i = begin; i < stop; ++i) {
          momentum[i] = hyper.velocity(momentum[i], gradient[i]);
          value[i + skip] = hyper.updated(value[i + skip], momentum[i]);
        }
      });
    });
  }
};
const Register<DenseStep> dense_step;

}  // namespace
}  // namespace edge_bcs
