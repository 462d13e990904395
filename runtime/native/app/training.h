// A whole training, step after step: runtime/fit.py.
#pragma once

#include <optional>
#include <string>

#include "app/network.h"
#include "app/saving.h"
#include "app/thermostat.h"

namespace edge_bcs::app {

struct TrainingWishes {
  std::optional<std::uint64_t> epochs, steps, batch_size;
  std::optional<double> learning_rate, warmup, max_hours, validation;
  std::optional<std::uint64_t> patience;
  std::optional<std::string> schedule, augment;
  Data* unlabelled = nullptr;  // images without labels, which stays
  std::optional<double> confidence, unlabelled_share, unlabelled_weight;
  Thermostat* thermostat = nullptr;
  bool balance = false, skips = false, resume = false;
  bool anew = false;  // with resume: what was saved is over, and another training comes after it
  SaveWishes saving;
};

// Trains to the end, or to the end of the hours; saves into `folder`, where the network's state already is. Returns what
// reports say of it. Throws Interrupted between two steps, NotFiniteBatch after saving the state before it.
Value train(Network& network, Data& data, const Match& match, const std::string& folder,
            const TrainingWishes& wishes);

}  // namespace edge_bcs::app
