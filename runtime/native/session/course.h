// Where a training over a data set begins and ends: runtime/course.py, and the same text in a saved state.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

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
  std::optional<double> validation;
  std::optional<std::uint64_t> patience;
  std::uint64_t unlabelled = 0;  // images without labels
  std::optional<double> confidence, unlabelled_share, unlabelled_weight;
};

// What is known of a training with a single-step attack, whether it has collapsed: edge_bcs/core/collapse.py.
struct Watch {
  std::optional<std::uint64_t> step;  // steps that were done when it was looked at last; none: it was not
  double best = 0;                    // the largest share of images that PGD ever left right
  std::optional<std::uint64_t> fell_back;  // steps that were done when it went over to PGD

  // Whether it is to be looked at now, before the first step or after an epoch.
  bool is_due(std::uint64_t done, std::uint64_t batch_size, std::uint64_t images, bool over) const;
  // Notes the shares of images that are right under the training's own attack and under PGD; returns whether the training
  // has collapsed, and so falls back.
  bool note(std::uint64_t done, double own, double pgd, std::uint64_t images);
};

struct Course {
  std::uint64_t first_step = 0, first_epoch = 0;  // of trainings that went before
  std::uint64_t batch_size = 1, samples = 1, total_steps = 0,
                skipped = 0;  // samples: without those that are held out
  double learning_rate = 0;   // λ, which the schedule changes
  Schedule schedule = Schedule::steps;
  std::optional<double> warmup;
  Augmentation augment = Augmentation::shift;
  bool balance = false;
  double validation = 0;                  // share of the images that is held out to choose the best epoch
  std::optional<std::uint64_t> patience;  // epochs without a better one after which it ends
  std::uint64_t measured = 0,
                risen = 0;  // steps done when the held-out images were measured last, and better than ever
  std::uint64_t best_step = 0;
  double best_score = no_score;
  bool returned = false;       // it is over, and its state is the best one again
  std::optional<Watch> watch;  // of a single-step attack
  // Images without labels beside `samples`: how many, how much of a batch is theirs, their weight in the loss, and from which
  // probability on an answer of the network is the label of one.
  std::uint64_t unlabelled = 0;
  double unlabelled_share = 0.5, unlabelled_weight = 1, confidence = 0.9;
  std::vector<std::int32_t> pseudo_labels;    // what they are taken for, -1: nothing, in the epoch …
  std::optional<std::uint64_t> pseudo_epoch;  // … of this number
  std::uint64_t held_out = 0;                 // images beside `samples`; this is not saved

  static constexpr double no_score = -1;
  static constexpr std::uint64_t most_watched = 128, fewest_watched = 32;

  // How many places of a batch are for images without labels.
  std::uint64_t unlabelled_places() const;
  // Of one pass over the images, or over the labelled or the unlabelled ones, whichever takes more.
  std::uint64_t steps_per_epoch() const;
  std::uint64_t epoch(std::uint64_t done) const { return first_epoch + done / steps_per_epoch(); }
  // Number of the next step in endless passes over labelled and unlabelled images.
  std::uint64_t number(std::uint64_t done) const { return first_epoch * steps_per_epoch() + done; }
  // Whether the unlabelled images are to be labelled for the epoch that begins after so many steps.
  bool is_to_be_labelled(std::uint64_t done) const {
    return unlabelled > 0 && !is_over(done) && pseudo_epoch != epoch(done);
  }
  // Place of the next step's first image in its epoch's order, and how many it has; with unlabelled images those of the
  // labelled ones in endless passes.
  std::pair<std::uint64_t, std::uint64_t> images(std::uint64_t done) const;
  // λ and λ_w of the step after `done` steps.
  std::pair<double, double> rates(std::uint64_t done, const Manifest& manifest) const;

  // Whether no step comes after so many: all are done, or patience is over.
  bool is_over(std::uint64_t done) const { return done >= total_steps || gives_up(); }
  bool gives_up() const { return patience && measured - risen >= *patience * steps_per_epoch(); }
  // Whether an epoch has ended after so many steps, and its held-out images are not measured yet.
  bool is_to_be_measured(std::uint64_t done) const {
    return validation > 0 && (done % steps_per_epoch() == 0 || done >= total_steps) && done > measured;
  }
  // Whether the images that are held out are watched, and not some of those that are trained on.
  bool watches_held_out() const { return held_out >= fewest_watched; }
  std::uint64_t watched_images() const {
    return std::min(most_watched, watches_held_out() ? held_out : samples);
  }
  // Whether a single-step attack is to be looked at after so many steps.
  bool is_to_be_watched(std::uint64_t done) const {
    const bool over = is_over(done);
    return watch && (done % steps_per_epoch() == 0 || over) &&
           watch->is_due(done, batch_size, watched_images(), over);
  }
  // Notes their accuracy; returns whether it is the best. A level epoch is the new best one, but patience goes on.
  bool note(std::uint64_t done, double score);
  // Whether a state at `step` is the best one, and may not be kept as that yet.
  bool is_best(std::uint64_t step) const { return measured > 0 && !returned && best_step == step; }

  // Writes it as Python does.
  void write(Text& text) const;
  // Throws Error if a state that stands at `step` cannot have been saved in it, or if only Python can go on with it.
  static Course read(std::string_view text, std::uint64_t step);

  // The training that a handle at `step` begins, after `earlier`, or goes on with, if `continues`. Throws Error.
  static Course begin(const Wishes& wishes, const std::optional<Course>& earlier, bool continues,
                      const Manifest& manifest, std::uint64_t step);
};

// Images that a training had seen when it was saved at `step`, where the state does not say: runs of earlier releases.
std::uint64_t images_seen(std::string_view progress, std::uint64_t step);

// Bytes that the labels of so many images take in a saved state, at most.
std::size_t room_of_labels(std::uint64_t images, std::uint32_t classes);

// Most bytes of `write`, without those labels.
inline constexpr std::size_t most_course = 1536;

}  // namespace edge_bcs
