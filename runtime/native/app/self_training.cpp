#include "app/self_training.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <numeric>
#include <span>

#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::int64_t no_label = -1;
constexpr std::size_t most_named = 500;  // classes in a line of metrics

std::string whole_percent(std::uint64_t part, std::uint64_t all) {
  return fixed(100 * static_cast<double>(part) / static_cast<double>(all), 0) + " %";
}

// The numbers from 0 to `one` + `other`: the first `one`, and the others, each spread evenly.
std::vector<std::size_t> spread(std::size_t one, std::size_t other) {
  // The middles of the k-th of n equal parts, times twice the product of both.
  const auto middle = [&](std::size_t i) {
    return i < one ? (2 * i + 1) * std::max<std::size_t>(other, 1)
                   : (2 * (i - one) + 1) * std::max<std::size_t>(one, 1);
  };
  std::vector<std::size_t> order(one + other);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, {}, middle);
  return order;
}

}  // namespace

std::unique_ptr<Part> beside(Data& unlabelled, const Data& labelled) {
  const std::map<std::size_t, std::string> twins = repeated(unlabelled, labelled);
  if (twins.empty()) return nullptr;
  require(twins.size() < unlabelled.size(), "all ", unlabelled.size(),
          " unlabelled images are among the labelled ones, too: give others, or leave them out.");
  const auto& [place, twin] = *twins.begin();
  const std::string several =
      twins.size() > 1 ? ", and " + std::to_string(twins.size() - 1) + " more, are" : ", is";
  say("the unlabelled " + unlabelled.name_of(place) + ", the same file as " + twin + " of the labelled data" +
      several + " left out");
  std::vector<std::uint32_t> kept;
  for (std::uint32_t i = 0; i < unlabelled.size(); ++i)
    if (!twins.contains(i)) kept.push_back(i);
  return std::make_unique<Part>(unlabelled, kept);
}

std::string described_unlabelled(const Value& used) {
  const std::uint64_t images = used.find("images")->whole();
  if (used.find("labelled") == nullptr)
    return "Unlabelled images: " + grouped(images) + ", none of which was looked at.";
  const std::uint64_t labelled = used.find("labelled")->whole();
  std::string classes;
  for (const auto& [name, count] : used.find("classes")->members())
    classes += (classes.empty() ? ": " : ", ") + name + " " + grouped(count.whole());
  return "Of " + grouped(images) + " unlabelled images the network labelled " + grouped(labelled) + " (" +
         whole_percent(labelled, images) + ") in the last epoch" + classes + ".";
}

Laps::Laps(Data& images, std::uint64_t own_seed, const std::vector<std::int64_t>* balanced_labels)
    : data(images), seed(own_seed), balanced_labels_(balanced_labels) {}

const std::vector<std::uint64_t>& Laps::order(std::uint64_t lap) {
  auto& [known, places] = orders_[lap % 2];
  if (places.empty() || known != lap) {
    known = lap;
    if (balanced_labels_ != nullptr) {
      places = balanced(*balanced_labels_, seed, lap);
    } else {
      const std::vector<std::uint32_t> shuffled_places = shuffled(data.size(), seed, lap);
      places.assign(shuffled_places.begin(), shuffled_places.end());
    }
  }
  return places;
}

std::pair<std::uint64_t, std::uint64_t> Laps::item(std::uint64_t number) {
  const std::uint64_t lap = number / data.size();
  return {lap, order(lap)[static_cast<std::size_t>(number % data.size())]};
}

Mixed::Mixed(Network& network, Laps labelled, Laps unlabelled, const std::vector<std::int64_t>& labels)
    : network_(network),
      labelled_(std::move(labelled)),
      unlabelled_(std::move(unlabelled)),
      labels_(labels),
      pseudo_labels_(unlabelled_.data.size(), no_label) {
  edge_bcs_position position = sized<edge_bcs_position>();
  check(edge_bcs_get_position(network.handle(), &position));
  if (position.labelled_epoch >= 0) take_labels();
}

void Mixed::take_labels() {
  check(edge_bcs_pseudo_labels(network_.handle(), pseudo_labels_.data(), pseudo_labels_.size()));
}

void Mixed::label(const edge_bcs_position& position, const std::function<void()>& between) {
  network_.label(unlabelled_.data, between);
  take_labels();
  say(sentence(position));
}

edge_bcs_batch Mixed::next(const edge_bcs_position& position, Augmentation augmentation) {
  augmentation_ = augmentation;
  std::vector<Item> own, others;
  for (std::uint64_t i = 0; i < position.count; ++i) {
    const auto [lap, place] = labelled_.item(position.first + i);
    own.push_back({false, lap, place});
  }
  for (std::uint64_t i = 0; i < position.unlabelled_count; ++i) {
    const auto [lap, place] = unlabelled_.item(position.unlabelled_first + i);
    if (position.keeps_all != 0 || pseudo_labels_[static_cast<std::size_t>(place)] != no_label)
      others.push_back({true, lap, place});
  }
  items_.clear();
  for (const std::size_t i : spread(own.size(), others.size()))
    items_.push_back(i < own.size() ? own[i] : others[i - own.size()]);
  edge_bcs_batch batch = sized<edge_bcs_batch>();
  batch.count = items_.size();
  batch.read = read;
  batch.user = this;
  if (position.unlabelled_weight != 1) {
    weights_.clear();
    for (const Item& item : items_) weights_.push_back(item.unlabelled ? position.unlabelled_weight : 1.0);
    batch.weights = weights_.data();
  }
  return batch;
}

void Mixed::rethrow() const {
  if (!failed_.empty()) throw Error(failed_);
}

int Mixed::read(void* user, std::uint64_t first, std::uint64_t count, float* images,
                std::int64_t* labels) noexcept {
  auto& self = *static_cast<Mixed*>(user);
  try {
    for (std::uint64_t i = 0; i < count; ++i) {
      const Item& item = self.items_[static_cast<std::size_t>(first + i)];
      Laps& laps = item.unlabelled ? self.unlabelled_ : self.labelled_;
      const auto place = static_cast<std::size_t>(item.position % laps.data.size());
      const std::size_t size = laps.data.shape.size();
      laps.data.drawn(place, {self.augmentation_, laps.seed, item.lap, item.position},
                      {images + i * size, size});
      labels[i] = item.unlabelled ? self.pseudo_labels_[place]
                                  : self.labels_[static_cast<std::size_t>(laps.data.labels[place])];
    }
    return 0;
  } catch (const std::exception& error) {
    self.failed_ = error.what();
    return 1;
  }
}

void Mixed::note(const edge_bcs_position& position, Value& line) const {
  const auto is_labelled = [&](const Item& item) {
    return pseudo_labels_[static_cast<std::size_t>(item.position)] != no_label;
  };
  std::uint64_t unlabelled = 0, labelled = 0;
  for (const Item& item : items_)
    if (item.unlabelled) ++unlabelled, labelled += is_labelled(item) ? 1 : 0;
  line["unlabelled"] = unlabelled;
  line["pseudo_labelled"] = labelled;
  if (position.done % position.steps_per_epoch == 0) line["pseudo_labels"] = summary();
}

Value Mixed::report(const edge_bcs_position& position) const {
  Value report;
  if (position.labelled_epoch < 0) {
    report["images"] = pseudo_labels_.size();
    return report;
  }
  report = summary();
  report["epoch"] = position.labelled_epoch;
  return report;
}

// Label → how many images have it.
std::map<std::int64_t, std::uint64_t> Mixed::counts() const {
  std::map<std::int64_t, std::uint64_t> counts;
  for (const std::int64_t label : pseudo_labels_)
    if (label != no_label) ++counts[label];
  return counts;
}

// How many images have a label, and of which classes; of very many those with the most.
Value Mixed::summary() const {
  const std::map<std::int64_t, std::uint64_t> found = counts();
  std::uint64_t labelled = 0;
  for (const auto& [label, count] : found) labelled += count;
  std::vector<std::pair<std::int64_t, std::uint64_t>> most(found.begin(), found.end());
  std::ranges::stable_sort(most, std::ranges::greater(), &std::pair<std::int64_t, std::uint64_t>::second);
  most.resize(std::min(most.size(), most_named));
  std::ranges::sort(most);
  Value classes = Value::Object{};
  for (const auto& [label, count] : most)
    classes[network_.class_name(static_cast<std::size_t>(label))] = count;
  Value summary;
  summary["images"] = pseudo_labels_.size();
  summary["labelled"] = labelled;
  summary["classes"] = std::move(classes);
  return summary;
}

std::string Mixed::sentence(const edge_bcs_position& position) const {
  std::vector<std::int64_t> labels;
  for (const std::int64_t label : pseudo_labels_)
    if (label != no_label) labels.push_back(label);
  std::array<char, 32> confidence;
  std::snprintf(confidence.data(), confidence.size(), "%g", position.confidence);
  std::string text = "unlabelled images: " + grouped(labels.size()) + " of " +
                     grouped(pseudo_labels_.size()) + " (" +
                     whole_percent(labels.size(), pseudo_labels_.size()) + ") have a label, at " +
                     confidence.data() + " or above";
  if (labels.empty())
    return text + "; all " +
           (position.keeps_all != 0 ? "take part without one" : "are left out of this epoch");
  const auto name = [&](std::size_t label) { return network_.class_name(label); };
  if (const std::string uneven = imbalance(labels, name); !uneven.empty()) text += "; unevenly: " + uneven;
  const std::map<std::int64_t, std::uint64_t> found = counts();
  Names missing;
  for (std::size_t label = 0; label < network_.info().classes; ++label)
    if (!found.contains(static_cast<std::int64_t>(label))) missing.push_back(name(label));
  if (!missing.empty()) text += "; none is " + listed(missing);
  return text;
}

}  // namespace edge_bcs::app
