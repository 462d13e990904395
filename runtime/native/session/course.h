// Where a training over a data set begins and ends: runtime/course.py, and the same text in a saved state.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "image/augment.h"
#include "session/manifest.h"
#include "session/state.h"

namespace edge_bcs {

enum class Schedule { steps, cosine, one_cycle };

// Throws Error if there is none of that name.
Schedule schedule_named(std::string_view name);
Augmentation augmentation_named(std::string_view name);
const char* name_of(Augmentation augmentation);

// What a caller says of a training; nothing: what the saved one had, or the default.
struct Wishes {
  std::uint64_t images = 0;
  std::optional<std::uint64_t> batch_size, epochs, steps;
  std::optional<double> learning_rate, warmup;
  std::optional<Schedule> schedule;
  std::optional<Augmentation> augment;
  std::optional<bool> balance;
};

struct Course {
  std::uint64_t first_step = 0, first_epoch = 0;  // of trainings that went before
  std::uint64_t batch_size = 1, samples = 1, total_steps = 0, skipped = 0;
  double learning_rate = 0;  // λ, which the schedule changes
  Schedule schedule = Schedule::steps;
  std::optional<double> warmup;
  Augmentation augment = Augmentation::shift;
  bool balance = false;

  std::uint64_t steps_per_epoch() const { return (samples + batch_size - 1) / batch_size; }
  std::uint64_t epoch(std::uint64_t done) const { return first_epoch + done / steps_per_epoch(); }
  // Place of the next step's first image in its epoch's order, and how many it has.
  std::pair<std::uint64_t, std::uint64_t> images(std::uint64_t done) const;
  // λ and λ_w of the step after `done` steps.
  std::pair<double, double> rates(std::uint64_t done, const Manifest& manifest) const;

  // Writes it as Python does.
  void write(Text& text) const;
  // Throws Error if a state that stands at `step` cannot have been saved in it, or if only Python can go on with it.
  static Course read(std::string_view text, std::uint64_t step);

  // The training that a handle at `step` begins, after `earlier`, or goes on with, if `continues`. Throws Error.
  static Course begin(const Wishes& wishes, const std::optional<Course>& earlier, bool continues,
                      const Manifest& manifest, std::uint64_t step);
};

// Most bytes of `write`.
inline constexpr std::size_t most_course = 1024;

}  // namespace edge_bcs
