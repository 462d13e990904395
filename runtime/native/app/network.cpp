#include "app/network.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>

#include "app/progress.h"
#include "app/signals.h"
#include "app/text.h"
#include "session/files.h"

namespace edge_bcs::app {

namespace {

constexpr const char* diverged =
    "its training has diverged. Go back to the artifact or an earlier run, and train with a lower learning "
    "rate.";

// How far a measurement is, for edge_bcs_on_progress.
struct Followed {
  Progress& progress;
  const std::function<void()>& between;
  std::exception_ptr thrown = nullptr;

  static int told(void* user, std::uint64_t done, std::uint64_t) noexcept {
    auto& self = *static_cast<Followed*>(user);
    try {
      self.progress.update(done);
      if (self.between) self.between();
    } catch (...) {
      self.thrown = std::current_exception();
      return 1;
    }
    return signal_arrived() ? 1 : 0;
  }
};

std::optional<double> crop_of(std::string_view resize) {
  constexpr std::string_view crop = "crop";
  if (!resize.starts_with(crop)) return {};
  double share = 1;
  if (resize.size() > crop.size() + 1)
    std::from_chars(resize.data() + crop.size() + 1, resize.data() + resize.size(), share);
  return share;
}

}  // namespace

void check(edge_bcs_status status) {
  if (status == EDGE_BCS_OK) return;
  if (status == EDGE_BCS_STOPPED) check_signals();
  if (status == EDGE_BCS_NOT_FINITE) throw NotFiniteBatch(edge_bcs_last_error());
  throw Error(edge_bcs_last_error());
}

Images::Images(Data& data, const std::vector<std::int64_t>& labels, std::span<const std::uint64_t> places)
    : data_(data), labels_(labels), places_(places) {}

edge_bcs_batch Images::batch() {
  edge_bcs_batch batch = sized<edge_bcs_batch>();
  batch.count = places_.size();
  batch.read = read;
  batch.user = this;
  return batch;
}

void Images::rethrow() const {
  if (!failed_.empty()) throw Error(failed_);
}

int Images::read(void* user, std::uint64_t first, std::uint64_t count, float* images,
                 std::int64_t* labels) noexcept {
  auto& self = *static_cast<Images*>(user);
  try {
    const std::size_t size = self.data_.shape.size(), known = self.data_.size();
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t position = self.places_[static_cast<std::size_t>(first) + i];
      const auto place = static_cast<std::size_t>(position % known);
      self.draw_.position = position;
      self.data_.drawn(place, self.draw_, {images + i * size, size});
      labels[i] = self.labels_[static_cast<std::size_t>(self.data_.labels[place])];
    }
    return 0;
  } catch (const std::exception& error) {
    self.failed_ = error.what();
    return 1;
  }
}

Network::Network(const std::string& folder, const MachineWishes& wishes) {
  edge_bcs_options options = sized<edge_bcs_options>();
  options.threads = wishes.threads;
  options.arena_bytes = wishes.memory.value_or(0);
  options.seeded = wishes.seed ? 1 : 0;
  options.seed = wishes.seed.value_or(0);
  options.trusted_keys = wishes.trusted.keys.data();
  options.trusted_count = wishes.trusted.keys.size() / key_bytes;
  options.min_release = wishes.trusted.min_release;
  options.attack_precision = wishes.attack_precision ? wishes.attack_precision->c_str() : nullptr;
  edge_bcs_network* opened = nullptr;
  check(edge_bcs_open(folder.c_str(), &options, &opened));
  handle_.reset(opened);
  check(edge_bcs_get_info(opened, &info_));
  for (std::uint32_t label = 0; info_.named != 0 && label < info_.classes; ++label)
    classes_.emplace_back(edge_bcs_class_name(opened, label));
  if (const std::string warning = edge_bcs_warning(opened); !warning.empty()) say(warning);
}

ImageShape Network::shape() const {
  return {static_cast<int>(info_.channels), static_cast<int>(info_.height), static_cast<int>(info_.width)};
}

std::string Network::class_name(std::size_t label) const {
  return label < classes_.size() ? classes_[label] : std::to_string(label);
}

void Network::name(const Names& names) {
  if (names == classes_) return;
  std::vector<const char*> texts;
  for (const std::string& one : names) texts.push_back(one.c_str());
  check(edge_bcs_name_classes(handle(), texts.data(), texts.size()));
  classes_ = names;
}

Opening Network::opening(const Handling& handling) const {
  Opening opening;
  opening.shape = shape();
  opening.crop = crop_of(info_.resize);
  opening.handling = handling;
  void* memory = nullptr;
  std::uint64_t bytes = 0;
  check(edge_bcs_scratch(handle(), &memory, &bytes));
  if (bytes >= least_workspace) {
    opening.workspace = {static_cast<std::byte*>(memory), static_cast<std::size_t>(bytes)};
  } else {
    // Pages that no image needs are never touched, so they are not resident.
    if (workspace_ == nullptr) workspace_.reset(new std::byte[least_workspace]);
    opening.workspace = {workspace_.get(), least_workspace};
  }
  return opening;
}

Match Network::match(const Data& data, bool naming, bool resumed) {
  Match found = app::match(data, {classes_, info_.classes, naming, steps() > 0, resumed});
  for (const std::string& note : found.notes) say(note);
  if (!found.classes.empty()) name(found.classes);
  return found;
}

void Network::follow(const std::string& what, Images& images, std::size_t count,
                     const std::function<void()>& between, const std::function<edge_bcs_status()>& call) {
  Progress progress(what, count, "images");
  Followed followed{progress, between};
  check(edge_bcs_on_progress(handle(), Followed::told, &followed));
  const edge_bcs_status status = call();
  edge_bcs_on_progress(handle(), nullptr, nullptr);
  if (followed.thrown) std::rethrow_exception(followed.thrown);
  images.rethrow();
  check(status);
}

edge_bcs_watched Network::watch(Data& data, const Match& match, const std::function<void()>& between) {
  std::vector<std::uint64_t> places(data.size());
  std::iota(places.begin(), places.end(), std::uint64_t{0});
  Images images(data, match.labels, places);
  const edge_bcs_batch batch = images.batch();
  edge_bcs_watched found = sized<edge_bcs_watched>();
  follow("watching the attack", images, places.size(), between,
         [&] { return edge_bcs_watch(handle(), &batch, &found); });
  return found;
}

void Network::label(Data& data, const std::function<void()>& between) {
  std::vector<std::uint64_t> places(data.size());
  std::iota(places.begin(), places.end(), std::uint64_t{0});
  const std::vector<std::int64_t> labels(data.classes.size(), 0);
  Images images(data, labels, places);
  const edge_bcs_batch batch = images.batch();
  follow("labelling " + grouped(places.size()) + " images", images, places.size(), between,
         [&] { return edge_bcs_label(handle(), &batch); });
}

Value Network::evaluate(Data& data, const Match& match, const Measure& measure, const std::string& what) {
  std::vector<std::uint64_t> places(data.size());
  std::iota(places.begin(), places.end(), std::uint64_t{0});
  if (measure.limit) {
    const std::vector<std::uint32_t> order = shuffled(data.size(), 0, 0);
    places.assign(order.begin(), order.end());
    places.resize(static_cast<std::size_t>(std::min<std::uint64_t>(places.size(), *measure.limit)));
  }
  Images images(data, match.labels, places);
  const edge_bcs_batch batch = images.batch();
  edge_bcs_measure how = measure.how;
  if (measure.answers != nullptr) {
    measure.answers->begin(places.size());
    how.answers = measure.answers->answers().data();
    how.robust = measure.answers->robust().data();
  }
  edge_bcs_measured measured = sized<edge_bcs_measured>();
  follow(what, images, places.size(), measure.between,
         [&] { return edge_bcs_evaluate(handle(), &batch, &how, &measured); });
  if (measure.answers != nullptr) {
    std::vector<std::int64_t> labels;
    for (const std::uint64_t place : places)
      labels.push_back(match.labels[static_cast<std::size_t>(data.labels[static_cast<std::size_t>(place)])]);
    measure.answers->count(labels, how.attack_steps > 0);
  }
  const auto share = [&](std::uint64_t right) {
    return static_cast<double>(right) / static_cast<double>(places.size());
  };
  Value report;
  report["accuracy"] = share(measured.right);
  report["samples"] = places.size();
  if (measure.how.attack_steps > 0) {
    report["robust_accuracy"] = share(measured.robust_right);
    report["attack_steps"] = measure.how.attack_steps;
    report["restarts"] = std::max(measure.how.restarts, 1u);
  }
  if (measured.unanswered > 0)
    report["warnings"] =
        Value::List{"the network's answers to " + grouped(measured.unanswered) + " of " +
                    grouped(places.size()) + " images are not finite and count as wrong: " + diverged};
  return report;
}

std::optional<std::uint64_t> Network::cap(const MachineWishes& wishes) const {
  if (wishes.memory) return wishes.memory;
  return info_.budget_bytes == 0 ? std::nullopt : std::optional(info_.budget_bytes);
}

Value Network::memory(std::optional<std::uint64_t> cap) const {
  Value memory;
  memory["bound_bytes"] = info_.bound_bytes;
  for (const char* const name : {"current_bytes", "peak_bytes", "placed_bytes", "placed_peak_bytes"})
    memory[name] = info_.arena_bytes;
  memory["cap_bytes"] = cap ? Value(*cap) : Value();
  memory["exact"] = true;
  memory["rss_bytes"] = resident_peak();
  return memory;
}

std::uint64_t resident_peak() {
  const Descriptor file(open("/proc/self/status", O_RDONLY | O_CLOEXEC));
  std::array<char, 4096> text{};
  if (!file || read(file.number(), text.data(), text.size() - 1) <= 0) return 0;
  const char* const found = std::strstr(text.data(), "VmHWM:");
  return found == nullptr ? 0 : 1024 * std::strtoull(found + 6, nullptr, 10);
}

}  // namespace edge_bcs::app
