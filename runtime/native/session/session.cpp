#include "session/session.h"

#include <algorithm>
#include <cmath>

namespace edge_bcs {

namespace {

constexpr std::int64_t no_label = -1, no_answer = -1;
// runtime/checks.py
constexpr double largest_gradient = 1e30, largest_update = 1e37, most_normal = 8;
constexpr const char* diverged =
    "its training has diverged; go back to the artifact or an earlier run, and train with a lower learning "
    "rate";

// The largest magnitude; NaN if there is a NaN.
double largest(std::span<const float> numbers) {
  float most = 0;
  for (const float number : numbers) {
    const float magnitude = std::fabs(number);
    if (!(magnitude <= most)) most = magnitude;
    if (std::isnan(most)) break;
  }
  return most;
}

std::size_t first_not_finite(std::span<const float> numbers) {
  return static_cast<std::size_t>(
      std::ranges::find_if(numbers, [](float number) { return !std::isfinite(number); }) - numbers.begin());
}

std::size_t place_of_largest(std::span<const float> numbers) {
  const auto order = [](float number) { return std::isnan(number) ? INFINITY : std::fabs(number); };
  return static_cast<std::size_t>(std::ranges::max_element(numbers, {}, order) - numbers.begin());
}

// The class with the largest logit, or `no_answer` where that is no finite number.
std::int64_t answer_of(std::span<const float> logits) {
  std::size_t best = 0;
  for (std::size_t k = 0; k < logits.size(); ++k) {
    if (std::isnan(logits[k])) return no_answer;
    if (logits[k] > logits[best]) best = k;
  }
  return std::isfinite(logits[best]) ? static_cast<std::int64_t>(best) : no_answer;
}

}  // namespace

Session::Session(const Files& files, const Options& options, bool all_files)
    : network_(files, options, all_files),
      steps_(network_.read_header().step),
      seed_(options.seed.value_or(network_.read_header().seed)),
      answers_(network_.manifest().attack_micro_batch),
      labels_(network_.manifest().attack_micro_batch),
      right_(network_.manifest().attack_micro_batch),
      answered_(network_.manifest().attack_micro_batch),
      unanswered_(network_.manifest().attack_micro_batch),
      left_(network_.manifest().attack_micro_batch) {
  const Manifest& manifest = network_.manifest();
  attack_kind = manifest.attack;
  rates = {manifest.learning_rate, manifest.weight_decay, manifest.momentum, manifest.noise};
}

void Session::tell(std::uint64_t done, std::uint64_t all) const {
  if (on_progress != nullptr && on_progress(progress_user, done, all) != 0) throw Stopped();
}

std::size_t Session::load(const Images& images, std::uint64_t first, bool training, bool labelled) {
  const Buffers& buffers = network_.buffers();
  const std::size_t size = buffers.labels.size(), pixels = buffers.input.size() / size;
  const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(size, images.count - first));
  const std::span<float> x = buffers.input.first(count * pixels);
  std::ranges::fill(buffers.labels, 0);
  if (images.read != nullptr) {
    if (images.read(images.user, first, count, x.data(), buffers.labels.data()) != 0) throw Stopped();
  } else {
    const std::size_t start = static_cast<std::size_t>(first) * pixels;
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = images.bytes != nullptr ? static_cast<float>(images.bytes[start + i]) / 255.0f
                                     : images.floats[start + i];
    if (labelled) std::copy_n(images.labels + first, count, buffers.labels.begin());
  }
  std::ranges::fill(buffers.input.subspan(x.size()), 0.0f);
  std::ranges::fill(buffers.labels.subspan(count), 0);
  if (images.bytes == nullptr) check_pixels(count, first);
  const std::int64_t lowest =
      training && network_.manifest().objective->learns_without_labels() ? no_label : 0;
  for (std::size_t i = 0; labelled && i < count; ++i)
    require(buffers.labels[i] >= lowest && buffers.labels[i] < network_.manifest().num_classes, "label ",
            buffers.labels[i], " is out of range (image ", first + i, " of the batch): the network has ",
            network_.manifest().num_classes, " classes");
  if (!labelled) std::ranges::fill(buffers.labels, 0);
  return count;
}

void Session::check_pixels(std::size_t count, std::uint64_t first) const {
  const Buffers& buffers = network_.buffers();
  const std::size_t pixels = buffers.input.size() / buffers.labels.size();
  const std::span<const float> x = buffers.input.first(count * pixels);
  const std::size_t wrong = first_not_finite(x);
  if (wrong < x.size())
    fail_with<NotFinite>("image ", first + wrong / pixels,
                         " of the batch has a pixel that is not a finite number; remove or repair it");
  const auto [low, high] = std::ranges::minmax(x);
  require(low >= 0 && high <= 1, "images must lie in [0, 1], but they reach ", low, " to ", high,
          "; bytes are divided by 255");
}

StepFacts Session::step(const Images& images) {
  const Buffers& buffers = network_.buffers();
  std::ranges::copy(buffers.mean.first(buffers.kept_mean.size()), buffers.kept_mean.begin());
  std::ranges::copy(buffers.variance.first(buffers.kept_variance.size()), buffers.kept_variance.begin());
  StepFacts facts;
  try {
    facts = accumulate(images);
    check_update();
    const std::array<double, 4> numbers{rates.learning_rate, rates.weight_decay, rates.momentum, rates.noise};
    for (std::size_t i = 0; i < numbers.size(); ++i) buffers.hyper[i] = static_cast<float>(numbers[i]);
    buffers.counter[0] = static_cast<std::int64_t>(seed_);
    buffers.counter[1] = static_cast<std::int64_t>(steps_);
    network_.run("optimizer");
  } catch (const NotFinite& error) {
    take_back();
    fail_with<NotFinite>("in step ", steps_ + 1, ", ", error.what());
  } catch (...) {
    take_back();
    throw;
  }
  ++steps_;
  images_ += images.count;
  return facts;
}

// What the micro-batches of a step did to the running statistics.
void Session::take_back() {
  const Buffers& buffers = network_.buffers();
  std::ranges::copy(buffers.kept_mean, buffers.mean.begin());
  std::ranges::copy(buffers.kept_variance, buffers.variance.begin());
}

StepFacts Session::accumulate(const Images& images) {
  const Buffers& buffers = network_.buffers();
  StepFacts facts;
  for (std::uint64_t first = 0; first < images.count; first += buffers.labels.size()) {
    const std::size_t count = load(images, first, true, true);
    for (std::size_t i = 0; i < count; ++i) {
      const double weight = images.weights == nullptr ? 1.0 : images.weights[first + i];
      require(weight >= 0 && weight <= 1e30, "image ", first + i, " of the batch has the weight ", weight,
              ", which is not a finite number of at least 0");
      buffers.sample_weight[i] = static_cast<float>(weight / static_cast<double>(images.count));
    }
    std::ranges::fill(buffers.sample_weight.subspan(count), 0.0f);
    facts.labelled +=
        count - static_cast<std::size_t>(std::ranges::count(buffers.labels.first(count), no_label));
    std::size_t part = 0, some = count;
    try {
      craft(network_, attack_kind, count, first, images.count, {seed_, steps_, Purpose::pgd_start, first});
      const std::size_t size = network_.manifest().micro_batch;
      for (; part < count; part += size) {
        some = std::min(size, count - part);
        if (part > 0) bring_forward(part, size);
        buffers.reset_gradients[0] = first + part == 0 ? 1 : 0;
        network_.run("training");
        facts.loss += buffers.loss[0];
        if (!std::isfinite(facts.loss)) fail_with<NotFinite>("the loss is ", facts.loss);
        if (!buffers.kept_mean.empty()) check_statistics();
        for (std::size_t branch = 0; branch < buffers.correct.size(); ++branch)
          facts.correct[branch] += buffers.correct[branch];
      }
    } catch (const NotFinite& error) {
      fail_with<NotFinite>(error.what(), " (", blamed(first + part, some), "); lower the learning rate");
    }
    tell(first + count, images.count);
  }
  return facts;
}

// Lets the training graph, which takes what lies at the front, see `size` images in the buffers from `first` on.
void Session::bring_forward(std::size_t first, std::size_t size) const {
  const Buffers& buffers = network_.buffers();
  const std::size_t pixels = buffers.input.size() / buffers.labels.size();
  for (const std::span<float> images : {buffers.input, buffers.adversarial})
    std::ranges::copy(images.subspan(first * pixels, size * pixels), images.begin());
  std::ranges::copy(buffers.labels.subspan(first, size), buffers.labels.begin());
  std::ranges::copy(buffers.sample_weight.subspan(first, size), buffers.sample_weight.begin());
}

void Session::check_update() const {
  const Buffers& buffers = network_.buffers();
  const auto blame = [&](StateTensor momentum, std::size_t place) {
    return owner(network_.manifest(), momentum, place, buffers.state_bytes());
  };
  struct Kind {
    std::span<const float> gradient;
    StateTensor value, momentum;
  };
  for (const Kind& kind : {Kind{buffers.coo_gradient, coo_value, coo_momentum},
                           Kind{buffers.dense_gradient, dense_value, dense_momentum}}) {
    if (kind.gradient.empty()) continue;
    const double steepest = largest(kind.gradient);
    if (!(steepest < largest_gradient)) {
      const std::size_t place = place_of_largest(kind.gradient);
      fail_with<NotFinite>("the gradient of ", blame(kind.momentum, place), " is ", kind.gradient[place],
                           "; lower the learning rate");
    }
    const double velocity = rates.momentum * largest(buffers.floats(kind.momentum)) + steepest;
    const double reach = std::fabs(1 - rates.weight_decay) * largest(buffers.floats(kind.value)) +
                         rates.learning_rate * (velocity + most_normal * rates.noise);
    if (!(std::max(velocity, reach) < largest_update))
      fail_with<NotFinite>("the update of ", blame(kind.momentum, place_of_largest(kind.gradient)),
                           " would overflow; lower the learning rate");
  }
}

void Session::check_statistics() const {
  const Buffers& buffers = network_.buffers();
  for (const StateTensor kind : {batchnorm_mean, batchnorm_variance}) {
    const std::span<const float> numbers = buffers.floats(kind);
    const std::size_t place = first_not_finite(numbers);
    if (place < numbers.size())
      fail_with<NotFinite>("the running ", kind == batchnorm_mean ? "mean" : "variance", " of ",
                           owner(network_.manifest(), kind, place, buffers.state_bytes()), " is ",
                           numbers[place]);
  }
}

// Names those of the first `count` images in the buffers whose logits are not finite; all if it is none of them. `first`: place of
// the first in the batch.
std::string Session::blamed(std::uint64_t first, std::size_t count) {
  const Buffers& buffers = network_.buffers();
  const std::size_t classes = network_.manifest().num_classes;
  std::vector<bool> faulty(count);
  for (const std::span<const float> images :
       {std::span<const float>(buffers.input), std::span<const float>(buffers.adversarial)}) {
    if (images.data() != buffers.input.data()) std::ranges::copy(images, buffers.input.begin());
    try {
      network_.run("eval");
    } catch (const Error&) {
      continue;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const std::span<const float> logits = buffers.logits.subspan(i * classes, classes);
      faulty[i] = faulty[i] || first_not_finite(logits) < logits.size();
    }
  }
  const auto some = static_cast<std::size_t>(std::ranges::count(faulty, true));
  const bool all = some == 0 || some == count;
  const auto place = all ? 0 : static_cast<std::uint64_t>(std::ranges::find(faulty, true) - faulty.begin());
  std::string text = "image " + std::to_string(first + place) + " of the batch";
  if (all && count > 1) text += " and the " + std::to_string(count - 1) + " after it";
  if (!all && some > 1) text += " and " + std::to_string(some - 1) + " more";
  return text;
}

void Session::predict(const Images& images, float* probabilities) {
  const Buffers& buffers = network_.buffers();
  const std::size_t classes = network_.manifest().num_classes;
  std::ranges::fill(buffers.sample_weight, 0.0f);
  for (std::uint64_t first = 0; first < images.count; first += buffers.labels.size()) {
    const std::size_t count = load(images, first, false, false);
    network_.run("eval");
    const std::span<const float> logits = buffers.logits.first(count * classes);
    const std::size_t wrong = first_not_finite(logits);
    if (wrong < logits.size())
      fail_with<NotFinite>("the network's answer to image ", first + wrong / classes,
                           " of the batch is not finite: ", diverged);
    softmax(logits, classes, {probabilities + first * classes, logits.size()});
    tell(first + count, images.count);
  }
}

void Session::label(const Images& images, double confidence, std::span<std::int32_t> labels) {
  const Buffers& buffers = network_.buffers();
  const std::size_t classes = network_.manifest().num_classes;
  std::ranges::fill(buffers.sample_weight, 0.0f);
  for (std::uint64_t first = 0; first < images.count; first += buffers.labels.size()) {
    const std::size_t count = load(images, first, false, false);
    network_.run("eval");
    for (std::size_t i = 0; i < count; ++i) {
      const std::span<float> row = buffers.logits.subspan(i * classes, classes);
      std::int32_t& label = labels[static_cast<std::size_t>(first) + i];
      label = no_label;
      if (first_not_finite(row) < classes) continue;
      softmax(row, classes, row);
      const auto likeliest = std::ranges::max_element(row);
      if (*likeliest >= static_cast<float>(confidence))
        label = static_cast<std::int32_t>(likeliest - row.begin());
    }
    tell(first + count, images.count);
  }
}

void Session::answer(std::size_t count) {
  const Buffers& buffers = network_.buffers();
  const std::size_t classes = network_.manifest().num_classes;
  network_.run("eval");
  for (std::size_t i = 0; i < count; ++i)
    answers_[i] = answer_of(buffers.logits.subspan(i * classes, classes));
}

Measured Session::evaluate(const Images& images, const Measure& how) {
  Descent descent = measuring(how.epsilon, how.attack_steps);
  if (how.fgsm) descent.step_size = how.epsilon, descent.start = Start::none;
  return measure(images, how, descent);
}

Watched Session::watch(const Images& images) {
  constexpr std::uint32_t pgd_steps = 20;  // edge_bcs/core/collapse.py
  const Manifest& manifest = network_.manifest();
  const Measure how{1, 1, false, manifest.epsilon};
  const std::uint64_t own = measure(images, how, crafting(manifest, attack_kind)).robust_right;
  return {own, measure(images, how, measuring(manifest.epsilon, pgd_steps)).robust_right};
}

Measured Session::measure(const Images& images, const Measure& how, const Descent& descent) {
  const Buffers& buffers = network_.buffers();
  Measured measured;
  std::ranges::fill(buffers.sample_weight, 0.0f);
  for (std::uint64_t first = 0; first < images.count; first += buffers.labels.size()) {
    const std::size_t count = load(images, first, false, true);
    std::ranges::copy(buffers.labels, labels_.begin());
    answer(count);
    for (std::size_t i = 0; i < count; ++i) {
      right_[i] = answers_[i] == labels_[i];
      answered_[i] = answers_[i] != no_answer;
      unanswered_[i] = !answered_[i];
      measured.right += right_[i];
    }
    if (how.answers != nullptr) std::copy_n(answers_.begin(), count, how.answers + first);
    for (std::uint32_t restart = 0; how.attack_steps > 0 && restart < how.restarts; ++restart) {
      attack(images, first, count, descent, restart);
      for (std::size_t i = 0; i < count; ++i) {
        right_[i] = right_[i] != 0 && answers_[i] == labels_[i];
        unanswered_[i] = unanswered_[i] != 0 || answers_[i] == no_answer;
      }
    }
    for (std::size_t i = 0; i < count; ++i) {
      measured.robust_right += right_[i];
      measured.unanswered += unanswered_[i];
    }
    if (how.robust != nullptr) std::copy_n(right_.begin(), count, how.robust + first);
    tell(first + count, images.count);
  }
  return measured;
}

// Leaves what the images of a micro-batch are taken for under attack: `no_answer` for those that have none as they are, and
// for those to which the network loses its answer on the way. The operators refuse a micro-batch with such an image; another
// image takes its place, and that of images that the micro-batch lacks.
void Session::attack(const Images& images, std::uint64_t first, std::size_t count, const Descent& descent,
                     std::uint32_t restart) {
  const Buffers& buffers = network_.buffers();
  std::copy_n(answered_.begin(), count, left_.begin());
  const auto left = [&] { return std::span(left_).first(count); };
  bool refused = std::ranges::find(left(), 0) != left().end();
  for (;;) {
    const auto kept = static_cast<std::size_t>(std::ranges::count(left(), 1));
    if (kept == 0) break;
    load(images, first, false, true);
    if (refused) fill_gaps(left());
    bool failed = false;
    try {
      descend(network_, refused ? buffers.labels.size() : count, descent,
              {seed_, restart, Purpose::evaluation, first});
    } catch (const NotFinite&) {
      failed = true;
    }
    std::ranges::copy(buffers.adversarial, buffers.input.begin());
    answer(count);
    for (std::size_t i = 0; i < count; ++i) {
      if (left_[i] == 0) answers_[i] = no_answer;
      if (answers_[i] == no_answer) left_[i] = 0;
    }
    if (!failed) return;
    if (refused && static_cast<std::size_t>(std::ranges::count(left(), 1)) == kept)
      fail_with<NotFinite>("the attack on image ", first,
                           " of the batch and those after it is not finite: ", diverged);
    refused = true;
  }
  std::ranges::fill(answers_, no_answer);
}

// Puts the first image that is left into every place of the micro-batch that has none.
void Session::fill_gaps(std::span<const std::uint8_t> left) {
  const Buffers& buffers = network_.buffers();
  const std::size_t pixels = buffers.input.size() / buffers.labels.size();
  const auto source = static_cast<std::size_t>(std::ranges::find(left, 1) - left.begin());
  for (std::size_t i = 0; i < buffers.labels.size(); ++i) {
    if (i < left.size() && left[i] != 0) continue;
    std::ranges::copy(buffers.input.subspan(source * pixels, pixels),
                      buffers.input.subspan(i * pixels, pixels).begin());
    buffers.labels[i] = buffers.labels[source];
  }
}

}  // namespace edge_bcs
