// Images without labels in a training: robust self-training (runtime/unlabelled.py).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "app/network.h"
#include "app/validation.h"
#include "app/value.h"

namespace edge_bcs::app {

// The images of `unlabelled` whose files are not among the labelled ones, of any split; says which are left out. Null: all.
// Throws Error if none is left.
std::unique_ptr<Part> beside(Data& unlabelled, const Data& labelled);

// What a report's "unlabelled" says, as a line.
std::string described_unlabelled(const Value& used);

// The images of a data set in endless shuffled passes.
class Laps {
 public:
  // `balanced_labels`: of its images, where they are drawn so that the classes come up evenly; else null.
  Laps(Data& data, std::uint64_t seed, const std::vector<std::int64_t>* balanced_labels);

  // Pass and position of image number `number`.
  std::pair<std::uint64_t, std::uint64_t> item(std::uint64_t number);

  Data& data;
  const std::uint64_t seed;

 private:
  const std::vector<std::uint64_t>& order(std::uint64_t lap);

  const std::vector<std::int64_t>* balanced_labels_;
  // Of this pass and of one beside it, for a batch may lie in both.
  std::array<std::pair<std::uint64_t, std::vector<std::uint64_t>>, 2> orders_;
};

// Batches of labelled and unlabelled images, spread evenly over a batch and so over its micro-batches.
class Mixed {
 public:
  // `labels`: the network's, by those of the labelled data.
  Mixed(Network& network, Laps labelled, Laps unlabelled, const std::vector<std::int64_t>& labels);

  // Lets the network say what the images are, and tells how many it is sure of. `between` is called after each micro-batch;
  // what it throws ends that, and the epoch has not begun.
  void label(const edge_bcs_position& position, const std::function<void()>& between);
  // The images of the next step; refers to this.
  edge_bcs_batch next(const edge_bcs_position& position, Augmentation augmentation);
  // Throws what reading failed for, if it did.
  void rethrow() const;
  // What metrics say of that step.
  void note(const edge_bcs_position& position, Value& line) const;
  // What is known of the labels of the last epoch that began.
  Value report(const edge_bcs_position& position) const;

 private:
  struct Item {
    bool unlabelled;
    std::uint64_t lap, position;
  };

  static int read(void* user, std::uint64_t first, std::uint64_t count, float* images,
                  std::int64_t* labels) noexcept;
  void take_labels();
  std::map<std::int64_t, std::uint64_t> counts() const;
  Value summary() const;
  std::string sentence(const edge_bcs_position& position) const;

  Network& network_;
  Laps labelled_, unlabelled_;
  const std::vector<std::int64_t>& labels_;
  std::vector<std::int64_t> pseudo_labels_;
  std::vector<Item> items_;  // of the next step
  std::vector<double> weights_;
  Augmentation augmentation_ = Augmentation::none;
  std::string failed_;
};

}  // namespace edge_bcs::app
