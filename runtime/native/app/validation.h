// Images that a training does not see: measured after each epoch, so that the best state is kept (runtime/validation.py).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "app/network.h"

namespace edge_bcs::app {

// Some images of other data.
class Part final : public Data {
 public:
  Part(Data& data, std::span<const std::uint32_t> places);
  void image(std::size_t position, std::span<float> into) override { data_.image(places_[position], into); }
  std::string name_of(std::size_t position) const override { return data_.name_of(places_[position]); }

 private:
  Data& data_;
  std::vector<std::uint32_t> places_;
};

// What of a training's data is trained on, and what is held out, once it has begun.
class Validation {
 public:
  // What saves took: bytes of a state, and of copies of it.
  using Saved = std::function<void(std::uint64_t state, std::uint64_t copied)>;

  Validation(Network& network, Data& data, const Match& match, const edge_bcs_position& position,
             Saved saved);

  Data& kept() { return kept_; }
  // Measures the held-out images, and keeps the state if it is the best. `between` is called after each micro-batch.
  void measure(const edge_bcs_position& position, const std::function<void()>& between);
  // Lets the training, which is finished, end with its best state.
  void return_to_best();

 private:
  static std::vector<std::uint32_t> split(const Network& network, std::size_t images);

  Network& network_;
  const Match& match_;
  Saved saved_;
  std::vector<std::uint32_t> places_;
  Part kept_, held_out_;
};

}  // namespace edge_bcs::app
