// What a network answered, class by class: edge_bcs/core/answers.py.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "app/value.h"

namespace edge_bcs::app {

class Network;

class Answers {
 public:
  explicit Answers(const Network& network) : network_(network) {}

  // Memory in which the answers to so many images are put: what each is taken for, -1 where that is nothing, and whether it is
  // right under attack, too.
  void begin(std::size_t count);
  std::span<std::int64_t> answers() { return answers_; }
  std::span<std::uint8_t> robust() { return robust_; }
  // Counts them; `labels` are the network's. `attacked`: whether there was an attack.
  void count(std::span<const std::int64_t> labels, bool attacked);

  // Of each class of which there were images.
  Value per_class() const;
  // What was taken for what, the most frequent first.
  Value confused() const;

 private:
  struct Class {
    std::uint64_t samples = 0, right = 0, robust = 0;
    std::vector<std::uint64_t> taken_for;
  };

  const Network& network_;
  std::vector<std::int64_t> answers_;
  std::vector<std::uint8_t> robust_;
  std::vector<Class> classes_;
  bool attacked_ = false;
};

}  // namespace edge_bcs::app
