#include "app/training.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "app/progress.h"
#include "app/reading.h"
#include "app/self_training.h"
#include "app/signals.h"
#include "app/text.h"
#include "app/validation.h"
#include "app/watching.h"

namespace edge_bcs::app {

namespace {

constexpr const char* metrics_file = "metrics.jsonl";

// The sum in numpy's order, so that means have the same bits.
double pairwise_sum(std::span<const double> values) {
  constexpr std::size_t lanes = 8, block = 128;
  if (values.size() < lanes) {
    double sum = 0;
    for (const double value : values) sum += value;
    return sum;
  }
  if (values.size() <= block) {
    std::array<double, lanes> sums{};
    std::copy_n(values.begin(), lanes, sums.begin());
    std::size_t i = lanes;
    for (; i + lanes <= values.size(); i += lanes)
      for (std::size_t lane = 0; lane < lanes; ++lane) sums[lane] += values[i + lane];
    double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < values.size(); ++i) sum += values[i];
    return sum;
  }
  const std::size_t half = values.size() / 2 / lanes * lanes;
  return pairwise_sum(values.first(half)) + pairwise_sum(values.subspan(half));
}

Augmentation augmentation_of(std::string_view name) {
  return static_cast<Augmentation>(std::ranges::find(augmentations, name) - augmentations.begin());
}

// Tells of a step that takes long while it runs.
class Watching {
 public:
  Watching(Network& network, Progress& progress) : network_(network) {
    const auto told = [](void* user, std::uint64_t, std::uint64_t) {
      static_cast<Progress*>(user)->tick();
      return 0;
    };
    check(edge_bcs_on_progress(network.handle(), told, &progress));
  }
  ~Watching() { edge_bcs_on_progress(network_.handle(), nullptr, nullptr); }
  Watching(const Watching&) = delete;
  Watching& operator=(const Watching&) = delete;

 private:
  Network& network_;
};

// The hours are over while something is done that no step has begun with.
struct TimeIsUp {};

class Training {
 public:
  Training(Network& network, Data& data, const Match& match, const std::string& folder,
           const TrainingWishes& wishes)
      : network_(network),
        data_(&data),
        match_(match),
        folder_(folder),
        wishes_(wishes),
        schedule_(network.info().state_bytes, network.steps(), wishes.saving) {}

  Value run() {
    begin();
    first_step_ = network_.steps();
    const double paused_before = paused(), began = seconds_now();
    if (wishes_.max_hours) deadline_ = began + 3600 * *wishes_.max_hours;
    MetricsFile metrics(joined(folder_, metrics_file), first_step_, wishes_.saving.max_writes);
    {
      Progress progress("training", position_.total, "steps");
      progress.begin(position_.done);
      std::optional<Watching> watching(std::in_place, network_, progress);
      for (;;) {
        if (position_.measure != 0) {
          measure();
          watching.emplace(network_, progress);  // a measurement is told of instead
        }
        if (position_.watch != 0) {
          watch_->look(position_, between_);
          watching.emplace(network_, progress);
          changed_ = true;
          look();
        }
        if (position_.finished != 0) {
          if (validation_) {
            validation_->return_to_best();
            changed_ = true;
          }
          break;
        }
        if (wishes_.thermostat != nullptr)
          wishes_.thermostat->wait([&](const std::string& why) { pause(why); }, deadline_);
        if (seconds_now() >= deadline_) break;
        if (position_.label != 0) {
          if (!label()) break;
          watching.emplace(network_, progress);
        }
        step(metrics, progress);
        check_signals();
        if (schedule_.due(network_.steps())) save();
      }
    }
    if (changed_ || saved_at_ != network_.steps()) save();
    return report(seconds_now() - began, paused() - paused_before, metrics.bytes());
  }

 private:
  void begin() {
    Data* unlabelled = wishes_.unlabelled;
    if (unlabelled != nullptr) {
      unlabelled_ = beside(*unlabelled, *data_);
      if (unlabelled_ != nullptr) unlabelled = unlabelled_.get();
    }
    edge_bcs_training training = sized<edge_bcs_training>();
    training.images = data_->size();
    training.epochs = wishes_.epochs.value_or(0);
    training.steps = wishes_.steps.value_or(0);
    training.batch_size = wishes_.batch_size.value_or(0);
    training.learning_rate = wishes_.learning_rate.value_or(0);
    training.schedule = wishes_.schedule ? wishes_.schedule->c_str() : nullptr;
    training.augment = wishes_.augment ? wishes_.augment->c_str() : nullptr;
    training.warmup = wishes_.warmup.value_or(0);
    training.has_warmup = wishes_.warmup ? 1 : 0;
    training.balance = wishes_.balance ? 1 : 0;
    training.resume = !wishes_.resume ? 0 : wishes_.anew ? 2 : 1;
    training.validation = wishes_.validation.value_or(0);
    training.has_validation = wishes_.validation ? 1 : 0;
    training.patience = wishes_.patience.value_or(0);
    training.unlabelled = unlabelled == nullptr ? 0 : unlabelled->size();
    training.confidence = wishes_.confidence.value_or(0);
    training.has_confidence = wishes_.confidence ? 1 : 0;
    training.unlabelled_share = wishes_.unlabelled_share.value_or(0);
    training.unlabelled_weight = wishes_.unlabelled_weight.value_or(0);
    check(edge_bcs_begin(network_.handle(), &training));
    look();
    if (position_.watched > 0) watch_.emplace(network_, *data_, match_);
    if (position_.validation > 0) {
      validation_.emplace(network_, *data_, match_, position_,
                          [&](std::uint64_t state, std::uint64_t copied) { note_save(state, copied); });
      data_ = &validation_->kept();
    }
    for (const std::int32_t label : data_->labels)
      labels_.push_back(match_.labels[static_cast<std::size_t>(label)]);
    const auto name = [&](std::size_t label) { return network_.class_name(label); };
    if (const std::string counts = imbalance(labels_, name); !counts.empty())
      say("the classes come up unevenly, " + counts +
          (position_.balance != 0 ? "; they are drawn evenly" : "; balance (--balance) draws them evenly"));
    if (unlabelled != nullptr)
      mixed_.emplace(network_,
                     Laps(*data_, network_.info().seed, position_.balance != 0 ? &labels_ : nullptr),
                     Laps(*unlabelled, network_.info().seed + 1, nullptr), match_.labels);
  }

  double paused() const { return wishes_.thermostat == nullptr ? 0 : wishes_.thermostat->paused_seconds(); }

  void pause(const std::string& why) {
    check_signals();
    if (why != paused_for_) say(why);
    paused_for_ = why;
  }

  void look() { check(edge_bcs_get_position(network_.handle(), &position_)); }

  // The places of the next step's images in the data.
  std::span<const std::uint64_t> next_places() {
    if (order_.empty() || order_epoch_ != position_.epoch) {
      const std::uint64_t seed = network_.info().seed;
      if (position_.balance != 0) {
        order_ = balanced(labels_, seed, position_.epoch);
      } else {
        const std::vector<std::uint32_t> order = shuffled(data_->size(), seed, position_.epoch);
        order_.assign(order.begin(), order.end());
      }
      order_epoch_ = position_.epoch;
    }
    return std::span(order_).subspan(static_cast<std::size_t>(position_.first),
                                     static_cast<std::size_t>(position_.count));
  }

  // Labels the unlabelled images; false: the hours are over.
  bool label() {
    try {
      mixed_->label(position_, [this] {
        between_();
        if (seconds_now() >= deadline_) throw TimeIsUp();
      });
    } catch (const TimeIsUp&) {
      return false;
    }
    look();
    return true;
  }

  // Trains on the images of the next step.
  edge_bcs_status train_on_next(edge_bcs_step_result& result) {
    const Augmentation augmentation = augmentation_of(position_.augment);
    if (mixed_) {
      const edge_bcs_batch batch = mixed_->next(position_, augmentation);
      const edge_bcs_status status = edge_bcs_train(network_.handle(), &batch, &result);
      mixed_->rethrow();
      return status;
    }
    Images images(*data_, match_.labels, next_places());
    images.draw({augmentation, network_.info().seed, position_.epoch, 0});
    const edge_bcs_batch batch = images.batch();
    const edge_bcs_status status = edge_bcs_train(network_.handle(), &batch, &result);
    images.rethrow();
    return status;
  }

  void step(MetricsFile& metrics, Progress& progress) {
    edge_bcs_step_result result = sized<edge_bcs_step_result>();
    const double began = seconds_now();
    const edge_bcs_status status = train_on_next(result);
    Value record;
    if (status == EDGE_BCS_NOT_FINITE) {
      const std::string why = edge_bcs_last_error();
      if (!wishes_.skips) fail_saved(why);
      if (edge_bcs_skip(network_.handle()) != EDGE_BCS_OK) fail_saved(edge_bcs_last_error());
      record["skipped"] = why;
    } else {
      check(status);
      record["loss"] = result.loss;
      if (!std::isnan(result.accuracy)) record["accuracy"] = result.accuracy;
      if (!std::isnan(result.robust_accuracy)) record["robust_accuracy"] = result.robust_accuracy;
    }
    const double milliseconds = 1e3 * (seconds_now() - began);
    const edge_bcs_position before = position_;
    look();
    Value line;
    line["step"] = network_.steps();
    line["epoch"] = before.epoch;
    line["done"] = before.done + 1;
    line["total"] = before.total;
    for (const auto& [name, value] : record.members()) line[name] = value;
    if (mixed_) mixed_->note(before, line);
    line["learning_rate"] = before.learning_rate;
    if (watch_) line["attack"] = before.attack;
    line["milliseconds"] = milliseconds;
    line["peak_bytes"] = network_.info().arena_bytes;
    metrics.write(line);
    if (const Value* const skipped = line.find("skipped")) {
      say("step " + std::to_string(before.done + 1) + "/" + std::to_string(before.total) +
          "  skipped: " + skipped->text());
      progress.update(before.done + 1);
      return;
    }
    keep(result, milliseconds);
    progress.update(before.done + 1, described(result, milliseconds));
  }

  [[noreturn]] void fail_saved(const std::string& why) {
    save();
    throw NotFiniteBatch(why);
  }

  // Keeps the last epoch's worth of steps for the report.
  void keep(const edge_bcs_step_result& result, double milliseconds) {
    const auto most = static_cast<std::size_t>(std::max<std::uint64_t>(position_.steps_per_epoch, 1));
    const std::array values{result.loss, result.accuracy, result.robust_accuracy, milliseconds};
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (std::isnan(values[i])) continue;
      history_[i].push_back(values[i]);
      if (history_[i].size() > most) history_[i].erase(history_[i].begin());
    }
  }

  std::string described(const edge_bcs_step_result& result, double milliseconds) const {
    std::string text = "loss " + fixed(result.loss, 3);
    if (!std::isnan(result.accuracy) && result.accuracy != result.robust_accuracy)
      text += ", accuracy " + percent(result.accuracy);
    if (!std::isnan(result.robust_accuracy)) text += ", robust " + percent(result.robust_accuracy);
    return text + ", " + fixed(milliseconds, 0) + " ms a step, peak " +
           format_bytes(static_cast<double>(network_.info().arena_bytes));
  }

  void save() {
    std::uint64_t bytes = 0;
    check(edge_bcs_save(network_.handle(), &bytes));
    note_save(bytes, 0);
  }

  void note_save(std::uint64_t state, std::uint64_t copied) {
    schedule_.saved(network_.steps(), state);
    ++saves_;
    saved_bytes_ += state + copied;
    saved_at_ = network_.steps();
    changed_ = false;
  }

  void measure() {
    changed_ = true;  // but for a state that is saved as the best one
    validation_->measure(position_, between_);
    look();
  }

  Value report(double seconds, double paused, std::uint64_t metrics) const {
    Value report;
    constexpr std::array names{"loss", "accuracy", "robust_accuracy"};
    const auto mean = [&](std::size_t i) {
      return pairwise_sum(history_[i]) / static_cast<double>(history_[i].size());
    };
    for (std::size_t i = 0; i < names.size(); ++i)
      if (!history_[i].empty()) report[names[i]] = mean(i);
    const std::uint64_t steps = network_.steps() - first_step_;
    report["step"] = network_.steps();
    report["steps"] = steps;
    report["done"] = position_.done;
    report["finished"] = position_.finished != 0;
    report["skipped"] = position_.skipped;
    report["seconds"] = seconds;
    report["paused_seconds"] = paused;
    report["milliseconds_per_step"] = history_[3].empty() ? 0.0 : mean(3);
    report["peak_bytes"] = network_.info().arena_bytes;
    if (mixed_) report["unlabelled"] = mixed_->report(position_);
    if (position_.validation > 0) {
      report["early"] = position_.finished != 0 && position_.done < position_.total;
      Value best;
      best["step"] = position_.best_step;
      best["accuracy"] = position_.best_score;
      report["best"] = std::move(best);
    }
    if (watch_) report["fell_back"] = position_.fell_back < 0 ? Value() : Value(position_.fell_back);
    const std::optional<std::uint64_t> most = wishes_.saving.max_writes;
    double per_hour = 3600 * static_cast<double>(metrics) / std::max(seconds, 1e-3);
    if (most) per_hour = std::min(per_hour, metrics_share * static_cast<double>(*most));
    per_hour += schedule_.bytes_per_hour(seconds / static_cast<double>(std::max<std::uint64_t>(steps, 1)));
    Value writes;
    writes["bytes"] = saved_bytes_ + metrics;
    writes["saves"] = saves_;
    writes["bytes_per_save"] = schedule_.size();
    writes["bytes_per_hour"] = static_cast<std::uint64_t>(std::nearbyint(per_hour));
    writes["max_bytes_per_hour"] = most ? Value(*most) : Value();
    report["writes"] = std::move(writes);
    return report;
  }

  Network& network_;
  Data* data_;  // that is trained on
  const Match& match_;
  std::optional<Validation> validation_;
  std::optional<AttackWatch> watch_;
  std::unique_ptr<Part> unlabelled_;  // those that are not labelled, too; null: all
  std::optional<Mixed> mixed_;
  // Between micro-batches that are not trained on.
  const std::function<void()> between_ = [this] {
    check_signals();
    if (wishes_.thermostat != nullptr) wishes_.thermostat->wait([&](const std::string& why) { pause(why); });
  };
  const std::string& folder_;
  const TrainingWishes& wishes_;
  std::string paused_for_;
  double deadline_ = std::numeric_limits<double>::infinity();
  SaveSchedule schedule_;
  std::vector<std::int64_t> labels_;
  std::vector<std::uint64_t> order_;
  std::optional<std::uint64_t> saved_at_;
  bool changed_ = false;  // where the training stands, since the last save, though no step was done
  std::uint64_t order_epoch_ = 0, first_step_ = 0, saves_ = 0, saved_bytes_ = 0;
  edge_bcs_position position_ = sized<edge_bcs_position>();
  std::array<std::vector<double>, 4> history_;  // loss, accuracies, milliseconds
};

}  // namespace

Value train(Network& network, Data& data, const Match& match, const std::string& folder,
            const TrainingWishes& wishes) {
  return Training(network, data, match, folder, wishes).run();
}

}  // namespace edge_bcs::app
