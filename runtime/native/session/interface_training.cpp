// The functions of edge_bcs.h: steps, trainings, answers and measurements. No exception leaves them.

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <optional>
#include <span>
#include <tuple>

#include "session/handle.h"
#include "session/shuffle.h"

namespace {

using namespace edge_bcs::handle;
using edge_bcs::require;

edge_bcs::Images images_of(const edge_bcs_batch* batch, bool labelled) {
  const edge_bcs_batch copy = given(batch, "batch");
  require(copy.count > 0, "the batch has no images");
  const int sources = (copy.bytes != nullptr) + (copy.floats != nullptr) + (copy.read != nullptr);
  require(sources == 1, "the batch must have one of bytes, floats and read, not ", sources);
  require(!labelled || copy.read != nullptr || copy.labels != nullptr, "the batch has no labels");
  return {copy.count, copy.bytes, copy.floats, copy.labels, copy.read, copy.user, copy.weights};
}

double share(double part, std::uint64_t all) {
  return all == 0 ? std::numeric_limits<double>::quiet_NaN() : part / static_cast<double>(all);
}

void step(edge_bcs::Session& session, const edge_bcs::Images& images, edge_bcs_step_result* result) {
  const edge_bcs::StepFacts facts = session.step(images);
  if (result == nullptr) return;
  const edge_bcs::Objective& objective = *session.network().manifest().objective;
  edge_bcs_step_result filled{};
  filled.step = session.steps();
  filled.labelled = facts.labelled;
  filled.loss = facts.loss;
  filled.accuracy = share(facts.correct[0], facts.labelled);
  filled.robust_accuracy = std::numeric_limits<double>::quiet_NaN();
  if (objective.two_branches) filled.robust_accuracy = share(facts.correct[1], facts.labelled);
  if (objective.accuracy_is_robust()) filled.robust_accuracy = filled.accuracy;
  fill(result, filled, "result");
}

template <class T>
std::optional<T> unless_zero(T value) {
  return value == T{} ? std::nullopt : std::optional<T>(value);
}

edge_bcs::Wishes wishes_of(const edge_bcs_training& training) {
  edge_bcs::Wishes wishes;
  wishes.images = training.images;
  wishes.batch_size = unless_zero(training.batch_size);
  wishes.epochs = unless_zero(training.epochs);
  wishes.steps = unless_zero(training.steps);
  wishes.learning_rate = unless_zero(training.learning_rate);
  if (training.schedule != nullptr) wishes.schedule = edge_bcs::schedule_named(training.schedule);
  if (training.augment != nullptr) wishes.augment = edge_bcs::augmentation_named(training.augment);
  if (training.has_warmup != 0) wishes.warmup = training.warmup;
  require(training.balance <= 2, "balance must be 0, 1 or 2, not ", training.balance);
  if (training.balance != 0) wishes.balance = training.balance == 1;
  if (training.has_validation != 0) wishes.validation = training.validation;
  wishes.patience = unless_zero(training.patience);
  wishes.unlabelled = training.unlabelled;
  if (training.has_confidence != 0) wishes.confidence = training.confidence;
  wishes.unlabelled_share = unless_zero(training.unlabelled_share);
  wishes.unlabelled_weight = unless_zero(training.unlabelled_weight);
  return wishes;
}

// The training under way; Error if there is none, or no step of it is left.
edge_bcs::Course& course_of(edge_bcs_network& network) {
  require(network.course.has_value(), "no training was begun: call edge_bcs_begin");
  require(!network.course->is_over(network.done()), "the training is finished");
  return *network.course;
}

// That of a step which is done or left out now.
edge_bcs::Course& stepping(edge_bcs_network& network) {
  edge_bcs::Course& course = course_of(network);
  require(!course.is_to_be_measured(network.done()),
          "an epoch has ended: measure the images that are held out, and call edge_bcs_note");
  require(!course.is_to_be_watched(network.done()),
          "the single-step attack is to be looked at: call edge_bcs_watch");
  require(!course.is_to_be_labelled(network.done()),
          "an epoch begins: let the network label the unlabelled images, by edge_bcs_label");
  return course;
}

// `beside`: how far the seed is from the handle's.
void write_order(const edge_bcs_network* network, std::uint64_t beside, std::uint64_t epoch,
                 std::uint32_t* order, std::size_t count) {
  require(network != nullptr && order != nullptr, "the handle, or the place for the order, is NULL");
  require(count > 0 && count <= std::numeric_limits<std::uint32_t>::max() && epoch < std::uint64_t{1} << 56,
          "there is no order of ", count, " images in epoch ", epoch);
  edge_bcs::shuffle({network->session.seed() + beside, epoch, edge_bcs::Purpose::shuffle}, {order, count});
}

constexpr std::uint64_t split_epoch = std::uint64_t{1} << 55;  // that no training has

void check_places(const edge_bcs_network* network, const std::uint32_t* places, std::size_t count) {
  require(network != nullptr && places != nullptr, "the handle, or the place for the places, is NULL");
  require(network->course.has_value(), "no training was begun: call edge_bcs_begin");
  const edge_bcs::Course& course = *network->course;
  require(count <= std::numeric_limits<std::uint32_t>::max() && count == course.samples + course.held_out,
          "the training has other images than ", count);
}

// The places that are trained on, ascending, and behind them those that are held out.
void split(std::span<std::uint32_t> all, std::uint64_t seed, const edge_bcs::Course& course) {
  const auto held = static_cast<std::size_t>(course.held_out);
  edge_bcs::shuffle({seed, split_epoch, edge_bcs::Purpose::shuffle}, all);
  std::ranges::rotate(all, all.begin() + static_cast<std::ptrdiff_t>(held));
  std::ranges::sort(all.first(all.size() - held));
  std::ranges::sort(all.last(held));
}

// Saves the state, which says of itself that it is the best, and keeps it as that.
void keep(edge_bcs_network& network, edge_bcs_noted& noted) {
  noted.best = 1;
  noted.saved_bytes = network.save();
  noted.copied_bytes = network.run->keep_best();
}

}  // namespace

edge_bcs_status edge_bcs_step(edge_bcs_network* network, const edge_bcs_batch* batch,
                              edge_bcs_step_result* result) {
  return exclusive(network, [&] { step(network->session, images_of(batch, true), result); });
}

edge_bcs_status edge_bcs_get_rates(const edge_bcs_network* network, edge_bcs_rates* rates) {
  return guarded([&] {
    require(network != nullptr, "the handle is NULL");
    const edge_bcs::Rates& now = network->session.rates;
    fill(rates, {0, 0, now.learning_rate, now.weight_decay, now.momentum, now.noise}, "rates");
  });
}

edge_bcs_status edge_bcs_set_rates(edge_bcs_network* network, const edge_bcs_rates* rates) {
  return exclusive(network, [&] {
    const edge_bcs_rates wanted = given(rates, "rates");
    for (const double number : {wanted.learning_rate, wanted.weight_decay, wanted.momentum, wanted.noise})
      require(number >= 0 && number <= std::numeric_limits<float>::max(),
              "a rate must be a finite number of at least 0, not ", number);
    network->session.rates = {wanted.learning_rate, wanted.weight_decay, wanted.momentum, wanted.noise};
  });
}

uint64_t edge_bcs_steps(const edge_bcs_network* network) {
  return network == nullptr ? 0 : network->session.steps();
}

edge_bcs_status edge_bcs_begin(edge_bcs_network* network, const edge_bcs_training* training) {
  return exclusive(network, [&] {
    const edge_bcs_training wanted = given(training, "training");
    const edge_bcs::Wishes wishes = wishes_of(wanted);
    edge_bcs::Session& session = network->session;
    const bool finishes = wanted.resume != 0 && wanted.resume != 2;
    std::optional<edge_bcs::Course> earlier = network->course;
    std::uint64_t seen = 0;
    if (wanted.resume != 0 && !earlier) {
      const edge_bcs::StateHeader& header = session.network().read_header();
      const std::string* const saved = header.find("progress");
      if (saved != nullptr) earlier = edge_bcs::Course::read(*saved, header.step);
      if (finishes) seen = network->kept_images;
    }
    edge_bcs::Course begun =
        edge_bcs::Course::begin(wishes, earlier, finishes, session.network().manifest(), session.steps());
    require(begun.validation == 0 || network->run != nullptr,
            "validation needs a run folder, in which the best state is kept: call edge_bcs_save_into first");
    network->course = std::move(begun);
    network->fresh_labels.assign(static_cast<std::size_t>(network->course->unlabelled), 0);
    network->course->pseudo_labels.resize(network->fresh_labels.size(), 0);
    network->kept_progress.clear();
    network->make_room();
    const bool fell_back = network->course->watch && network->course->watch->fell_back;
    session.attack_kind = fell_back ? edge_bcs::AttackKind::pgd : session.network().manifest().attack;
    session.count_images(seen);
    network->skipped_in_a_row = 0;
    // Cut off before the best state was kept as that.
    if (edge_bcs_noted noted{}; network->course->is_best(session.steps())) keep(*network, noted);
  });
}

edge_bcs_status edge_bcs_get_position(const edge_bcs_network* network, edge_bcs_position* position) {
  return guarded([&] {
    require(network != nullptr, "the handle is NULL");
    require(network->course.has_value(), "no training was begun: call edge_bcs_begin");
    const edge_bcs::Course& course = *network->course;
    edge_bcs_position filled{};
    filled.done = network->done();
    filled.total = course.total_steps;
    filled.finished = course.is_over(filled.done) ? 1 : 0;
    filled.measure = course.is_to_be_measured(filled.done) ? 1 : 0;
    filled.samples = course.samples;
    filled.validation = course.validation;
    filled.best_step = course.best_step;
    filled.best_score = course.best_score;
    filled.epoch = course.epoch(filled.done);
    std::tie(filled.first, filled.count) = course.images(filled.done);
    filled.skipped = course.skipped;
    filled.learning_rate = course.rates(filled.done, network->session.network().manifest()).first;
    filled.augment = edge_bcs::name_of(course.augment);
    filled.balance = course.balance ? 1 : 0;
    filled.steps_per_epoch = course.steps_per_epoch();
    const edge_bcs::Manifest& manifest = network->session.network().manifest();
    filled.label = course.is_to_be_labelled(filled.done) ? 1 : 0;
    filled.unlabelled = course.unlabelled;
    filled.unlabelled_count = course.unlabelled_places();
    filled.unlabelled_first = course.number(filled.done) * filled.unlabelled_count;
    filled.unlabelled_weight = course.unlabelled_weight;
    filled.confidence = course.confidence;
    filled.labelled_epoch = course.pseudo_epoch ? static_cast<std::int64_t>(*course.pseudo_epoch) : -1;
    filled.keeps_all = manifest.objective->learns_without_labels() && manifest.beta > 0 ? 1 : 0;
    filled.attack = edge_bcs::name_of(network->session.attack_kind);
    filled.watch = course.is_to_be_watched(filled.done) ? 1 : 0;
    filled.watched = course.watch ? static_cast<std::uint32_t>(course.watched_images()) : 0;
    filled.fell_back =
        course.watch && course.watch->fell_back ? static_cast<std::int64_t>(*course.watch->fell_back) : -1;
    fill(position, filled, "position");
  });
}

edge_bcs_status edge_bcs_order(const edge_bcs_network* network, uint64_t epoch, uint32_t* order,
                               size_t count) {
  return guarded([&] { write_order(network, 0, epoch, order, count); });
}

edge_bcs_status edge_bcs_unlabelled_order(const edge_bcs_network* network, uint64_t pass, uint32_t* order,
                                          size_t count) {
  return guarded([&] { write_order(network, 1, pass, order, count); });
}

edge_bcs_status edge_bcs_train(edge_bcs_network* network, const edge_bcs_batch* batch,
                               edge_bcs_step_result* result) {
  return exclusive(network, [&] {
    edge_bcs::Course& course = stepping(*network);
    const edge_bcs::Images images = images_of(batch, true);
    const std::uint64_t labelled = course.images(network->done()).second,
                        expected = labelled + course.unlabelled_places();
    require(images.count >= labelled && images.count <= expected, "the next step has ", expected,
            " images, not ", images.count);
    edge_bcs::Session& session = network->session;
    std::tie(session.rates.learning_rate, session.rates.weight_decay) =
        course.rates(network->done(), session.network().manifest());
    step(session, images, result);
    course.returned = false;
    network->skipped_in_a_row = 0;
  });
}

edge_bcs_status edge_bcs_skip(edge_bcs_network* network) {
  return exclusive(network, [&] {
    edge_bcs::Course& course = stepping(*network);
    if (network->skipped_in_a_row + 1 >= course.steps_per_epoch())
      edge_bcs::fail_with<edge_bcs::NotFinite>("every batch of an epoch was skipped");
    ++network->skipped_in_a_row;
    ++course.skipped;
    course.returned = false;
    network->session.count_step();
  });
}

edge_bcs_status edge_bcs_predict(edge_bcs_network* network, const edge_bcs_batch* batch,
                                 float* probabilities) {
  return exclusive(network, [&] {
    require(probabilities != nullptr, "the place for the probabilities is NULL");
    network->session.predict(images_of(batch, false), probabilities);
  });
}

edge_bcs_status edge_bcs_evaluate(edge_bcs_network* network, const edge_bcs_batch* batch,
                                  const edge_bcs_measure* how, edge_bcs_measured* measured) {
  return exclusive(network, [&] {
    const edge_bcs_measure wanted = given(how, "measure");
    const edge_bcs::Images images = images_of(batch, true);
    const double epsilon =
        wanted.epsilon < 0 ? network->session.network().manifest().epsilon : wanted.epsilon;
    require(epsilon >= 0 && epsilon <= 1, "epsilon must lie in [0, 1], not be ", epsilon);
    const bool fgsm = wanted.fgsm != 0;
    const edge_bcs::Measured found = network->session.evaluate(
        images, {fgsm ? std::min<std::uint32_t>(wanted.attack_steps, 1) : wanted.attack_steps,
                 fgsm ? 1 : std::max<std::uint32_t>(wanted.restarts, 1), fgsm, epsilon, wanted.answers,
                 wanted.robust});
    fill(measured, {0, 0, images.count, found.right, found.robust_right, found.unanswered}, "measured");
  });
}

edge_bcs_status edge_bcs_split(const edge_bcs_network* network, uint32_t* places, size_t count) {
  return guarded([&] {
    check_places(network, places, count);
    split({places, count}, network->session.seed(), *network->course);
  });
}

edge_bcs_status edge_bcs_watched_places(const edge_bcs_network* network, uint32_t* places, size_t count) {
  return guarded([&] {
    check_places(network, places, count);
    const edge_bcs::Course& course = *network->course;
    require(course.watch.has_value(), "the training has no single-step attack that is watched");
    const std::span all(places, count);
    const auto samples = static_cast<std::size_t>(course.samples);
    const bool held_out = course.watches_held_out();
    // The first in an order of the part, which needs the place that the split takes then.
    std::array<std::uint32_t, edge_bcs::Course::most_watched> chosen{};
    const std::span some = std::span(chosen).first(static_cast<std::size_t>(course.watched_images()));
    const std::span part = all.first(held_out ? count - samples : samples);
    edge_bcs::shuffle({network->session.seed(), split_epoch, edge_bcs::Purpose::shuffle}, part);
    std::ranges::copy(part.first(some.size()), some.begin());
    std::ranges::sort(some);
    split(all, network->session.seed(), course);
    for (std::uint32_t& place : some) place = all[(held_out ? samples : 0) + place];
    std::ranges::copy(some, all.begin());
  });
}

edge_bcs_status edge_bcs_watch(edge_bcs_network* network, const edge_bcs_batch* batch,
                               edge_bcs_watched* watched) {
  return exclusive(network, [&] {
    require(network->course && network->course->is_to_be_watched(network->done()),
            "nothing is to be looked at now: edge_bcs_get_position says when");
    edge_bcs::Course& course = *network->course;
    const edge_bcs::Images images = images_of(batch, true);
    require(images.count == course.watched_images(), "a look takes ", course.watched_images(),
            " images, not ", images.count);
    const edge_bcs::Watched found = network->session.watch(images);
    const double own = share(static_cast<double>(found.own), images.count),
                 pgd = share(static_cast<double>(found.pgd), images.count);
    const bool collapsed = course.watch->note(network->done(), own, pgd, images.count);
    if (collapsed) network->session.attack_kind = edge_bcs::AttackKind::pgd;
    if (watched != nullptr) fill(watched, {0, collapsed ? 1u : 0u, own, pgd}, "watched");
  });
}

edge_bcs_status edge_bcs_label(edge_bcs_network* network, const edge_bcs_batch* batch) {
  return exclusive(network, [&] {
    require(network->course && network->course->is_to_be_labelled(network->done()),
            "nothing is to be labelled now: edge_bcs_get_position says when");
    edge_bcs::Course& course = *network->course;
    const edge_bcs::Images images = images_of(batch, false);
    require(images.count == course.unlabelled, "the training has ", course.unlabelled,
            " unlabelled images, not ", images.count);
    network->session.label(images, course.confidence, network->fresh_labels);
    course.pseudo_labels.swap(network->fresh_labels);
    course.pseudo_epoch = course.epoch(network->done());
  });
}

edge_bcs_status edge_bcs_pseudo_labels(const edge_bcs_network* network, int64_t* labels, size_t count) {
  return guarded([&] {
    require(network != nullptr && labels != nullptr, "the handle, or the place for the labels, is NULL");
    require(network->course && network->course->pseudo_epoch, "no image was labelled: call edge_bcs_label");
    const auto& known = network->course->pseudo_labels;
    require(count == known.size(), "the training has ", known.size(), " unlabelled images, not ", count);
    std::ranges::copy(known, labels);
  });
}

edge_bcs_status edge_bcs_note(edge_bcs_network* network, double accuracy, edge_bcs_noted* noted) {
  return exclusive(network, [&] {
    require(network->course && network->course->is_to_be_measured(network->done()),
            "nothing is to be measured now: edge_bcs_get_position says when");
    require(network->run != nullptr, "no folder was named: call edge_bcs_save_into");
    require(accuracy >= 0 && accuracy <= 1, "an accuracy must lie in [0, 1], not be ", accuracy);
    edge_bcs_noted filled{};
    if (network->course->note(network->done(), accuracy)) keep(*network, filled);
    if (noted != nullptr) fill(noted, filled, "noted");
  });
}

edge_bcs_status edge_bcs_return_to_best(edge_bcs_network* network, edge_bcs_noted* noted) {
  return exclusive(network, [&] {
    require(network->course && network->course->is_over(network->done()), "the training is not finished");
    require(network->run != nullptr, "no folder was named: call edge_bcs_save_into");
    edge_bcs::Course& course = *network->course;
    edge_bcs_noted filled{};
    filled.best = 1;
    if (!course.returned && course.validation > 0) {
      if (course.best_step != network->session.steps()) {
        filled.saved_bytes = network->save();
        network->warning = network->session.network().return_to_best(network->run->files(), course.best_step);
        filled.best = network->warning.empty() ? 1 : 0;
      }
      course.returned = true;
    }
    if (noted != nullptr) fill(noted, filled, "noted");
  });
}
