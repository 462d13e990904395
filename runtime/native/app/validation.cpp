#include "app/validation.h"

#include <algorithm>

#include "app/text.h"

namespace edge_bcs::app {

Part::Part(Data& data, std::span<const std::uint32_t> places)
    : data_(data), places_(places.begin(), places.end()) {
  classes = data.classes;
  shape = data.shape;
  named = true;
  for (const std::uint32_t place : places) labels.push_back(data.labels[place]);
}

Validation::Validation(Network& network, Data& data, const Match& match, const edge_bcs_position& position,
                       Saved saved)
    : network_(network),
      match_(match),
      saved_(std::move(saved)),
      places_(split(network, data.size())),
      kept_(data, std::span(places_).first(static_cast<std::size_t>(position.samples))),
      held_out_(data, std::span(places_).subspan(static_cast<std::size_t>(position.samples))) {}

std::vector<std::uint32_t> Validation::split(const Network& network, std::size_t images) {
  std::vector<std::uint32_t> places(images);
  check(edge_bcs_split(network.handle(), places.data(), places.size()));
  return places;
}

void Validation::measure(const edge_bcs_position& position, const std::function<void()>& between) {
  const edge_bcs_info& info = network_.info();
  const bool attacked = std::string_view(info.objective) != "natural";
  edge_bcs_measure how = sized<edge_bcs_measure>();
  how.attack_steps = attacked ? std::max(info.attack_steps, 1u) : 0;
  how.epsilon = -1;
  const Value report = network_.evaluate(held_out_, match_, {how, {}, nullptr, between}, "measuring");
  const double accuracy = report.find(attacked ? "robust_accuracy" : "accuracy")->number();
  edge_bcs_noted noted = sized<edge_bcs_noted>();
  check(edge_bcs_note(network_.handle(), accuracy, &noted));
  if (noted.best != 0) saved_(noted.saved_bytes, noted.copied_bytes);
  const std::uint64_t epoch = (position.done - 1) / position.steps_per_epoch;
  say("epoch " + std::to_string(position.epoch - position.done / position.steps_per_epoch + epoch + 1) +
      ": " + (attacked ? "robust accuracy " : "accuracy ") + percent(accuracy) + " on " +
      std::to_string(held_out_.size()) + " held-out images" + (noted.best != 0 ? ", the best so far" : ""));
}

void Validation::return_to_best() {
  edge_bcs_noted noted = sized<edge_bcs_noted>();
  check(edge_bcs_return_to_best(network_.handle(), &noted));
  if (noted.saved_bytes > 0) saved_(noted.saved_bytes, 0);
  if (noted.best == 0)
    say(std::string("the best state cannot be used (") + edge_bcs_warning(network_.handle()) +
        "); the newest one stays");
}

}  // namespace edge_bcs::app
