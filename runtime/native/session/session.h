// Steps, answers and measurements of an open network: runtime/step.py, predictor.py and evaluation.py, to the bit.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "session/attack.h"
#include "session/network.h"

namespace edge_bcs {

// A callback asked to stop.
class Stopped : public Error {
 public:
  Stopped() : Error("stopped by a callback") {}
};

// Where images come from: one of `bytes`, `floats` and `read` is not null.
struct Images {
  std::uint64_t count = 0;
  const std::uint8_t* bytes = nullptr;
  const float* floats = nullptr;
  const std::int64_t* labels = nullptr;
  int (*read)(void*, std::uint64_t, std::uint64_t, float*, std::int64_t*) = nullptr;
  void* user = nullptr;
  const double* weights = nullptr;
};

struct Rates {
  double learning_rate, weight_decay, momentum, noise;
};

struct StepFacts {
  double loss = 0;
  std::array<double, 2> correct{};  // clean and robust, or as the loss saw the images
  std::uint64_t labelled = 0;
};

struct Measure {
  std::uint32_t attack_steps, restarts;
  bool fgsm;
  double epsilon;
  std::int64_t* answers = nullptr;  // of each image, as it is
  std::uint8_t* robust = nullptr;   // whether each is right, under attack, too
};

struct Measured {
  std::uint64_t right = 0, robust_right = 0, unanswered = 0;
};

// Images that are right under the training's own attack, and under the PGD that it is watched with.
struct Watched {
  std::uint64_t own = 0, pgd = 0;
};

class Session {
 public:
  Session(const Files& files, const Options& options, bool all_files);

  Network& network() { return network_; }
  const Network& network() const { return network_; }
  std::uint64_t steps() const { return steps_; }
  std::uint64_t seed() const { return seed_; }
  // Images that the steps saw, and those of a training that they go on with.
  std::uint64_t images() const { return images_; }
  void count_images(std::uint64_t more) { images_ += more; }
  void count_step() { ++steps_; }
  // Of a state that was read; `seed` takes the place of its own.
  void set_counters(const StateHeader& header, std::optional<std::uint64_t> seed = {}) {
    steps_ = header.step, seed_ = seed.value_or(header.seed), images_ = 0;
  }

  Rates rates;
  // With what steps attack: at first what the artifact says.
  AttackKind attack_kind;
  // Called with images done and all; not 0 to stop.
  int (*on_progress)(void*, std::uint64_t, std::uint64_t) = nullptr;
  void* progress_user = nullptr;

  // One step, done whole or not at all.
  StepFacts step(const Images& images);
  // float [count, classes]
  void predict(const Images& images, float* probabilities);
  Measured evaluate(const Images& images, const Measure& how);
  Watched watch(const Images& images);
  // What the network takes each image for, where it is at least so sure; else -1.
  void label(const Images& images, double confidence, std::span<std::int32_t> labels);

 private:
  // Puts the images from `first` on into the buffers; returns how many.
  std::size_t load(const Images& images, std::uint64_t first, bool training, bool labelled);
  void check_pixels(std::size_t count, std::uint64_t first) const;
  StepFacts accumulate(const Images& images);
  void take_back();
  void check_update() const;
  void check_statistics() const;
  void bring_forward(std::size_t first, std::size_t size) const;
  std::string blamed(std::uint64_t first, std::size_t count);
  void tell(std::uint64_t done, std::uint64_t all) const;
  Measured measure(const Images& images, const Measure& how, const Descent& descent);
  void attack(const Images& images, std::uint64_t first, std::size_t count, const Descent& descent,
              std::uint32_t restart);
  void fill_gaps(std::span<const std::uint8_t> left);
  void answer(std::size_t count);

  Network network_;
  std::uint64_t steps_, seed_, images_ = 0;
  // Of a micro-batch: what its images are taken for, and which of them are right, have an answer as they are, have none at
  // some time, and are attacked.
  std::vector<std::int64_t> answers_, labels_;
  std::vector<std::uint8_t> right_, answered_, unanswered_, left_;
};

}  // namespace edge_bcs
