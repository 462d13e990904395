#include "app/answers.h"

#include <algorithm>
#include <tuple>

#include "app/network.h"

namespace edge_bcs::app {

namespace {

double share(std::uint64_t part, std::uint64_t all) {
  return static_cast<double>(part) / static_cast<double>(all);
}

}  // namespace

void Answers::begin(std::size_t count) {
  answers_.assign(count, 0);
  robust_.assign(count, 0);
}

void Answers::count(std::span<const std::int64_t> labels, bool attacked) {
  const std::size_t outputs = network_.info().classes;
  attacked_ = attacked;
  classes_.assign(outputs, {0, 0, 0, std::vector<std::uint64_t>(outputs)});
  for (std::size_t i = 0; i < labels.size(); ++i) {
    Class& own = classes_[static_cast<std::size_t>(labels[i])];
    ++own.samples;
    own.robust += robust_[i];
    if (answers_[i] == labels[i])
      ++own.right;
    else if (answers_[i] >= 0)
      ++own.taken_for[static_cast<std::size_t>(answers_[i])];
  }
}

Value Answers::per_class() const {
  Value::List found;
  for (std::size_t label = 0; label < classes_.size(); ++label) {
    const Class& own = classes_[label];
    if (own.samples == 0) continue;
    Value entry;
    entry["class"] = network_.class_name(label);
    entry["samples"] = own.samples;
    entry["accuracy"] = share(own.right, own.samples);
    if (attacked_) entry["robust_accuracy"] = share(own.robust, own.samples);
    found.push_back(std::move(entry));
  }
  return found;
}

Value Answers::confused() const {
  struct Pair {
    std::size_t label, answer;
    std::uint64_t images;
  };
  std::vector<Pair> pairs;
  for (std::size_t label = 0; label < classes_.size(); ++label)
    for (std::size_t answer = 0; answer < classes_.size(); ++answer)
      if (const std::uint64_t images = classes_[label].taken_for[answer]; images > 0)
        pairs.push_back({label, answer, images});
  std::ranges::stable_sort(pairs, std::ranges::greater{}, &Pair::images);
  Value::List found;
  for (const Pair& pair : pairs) {
    Value entry;
    entry["class"] = network_.class_name(pair.label);
    entry["taken_for"] = network_.class_name(pair.answer);
    entry["images"] = pair.images;
    found.push_back(std::move(entry));
  }
  return found;
}

}  // namespace edge_bcs::app
