#include "session/course.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>
#include <span>
#include <string>

#include "ops/op.h"
#include "session/json.h"

namespace edge_bcs {

namespace {

constexpr std::array<std::string_view, 3> schedules{"steps", "cosine", "one-cycle"};
constexpr double usual_rise = 0.3;  // of the steps of one cycle
constexpr double first_part = 25,
                 last_part =
                     1e4;  // how often what λ begins with goes into its highest, and its last into that
constexpr std::uint64_t most = std::uint64_t{1} << 56;

template <std::size_t n>
std::size_t place_of(const std::array<std::string_view, n>& names, std::string_view name, const char* what) {
  const auto found = std::ranges::find(names, name);
  if (found == names.end()) {
    std::string known;
    for (const std::string_view each : names) known += (known.empty() ? "" : ", ") + std::string(each);
    fail("the ", what, " is one of ", known, ", not '", shown(name), "'");
  }
  return static_cast<std::size_t>(found - names.begin());
}

// From `one` to `other` along half a cosine, of which `way` is done.
double between(double one, double other, double way) {
  return other + (one - other) * 0.5 * (1 + std::cos(std::numbers::pi * way));
}

double one_cycle(double step, double total, double rise) {
  const double top = std::max(rise * total - 1, 0.0), last = total - 1, first = 1 / first_part;
  if (step < top) return between(first, 1.0, step / top);
  return between(1.0, first / last_part, last > top ? (step - top) / (last - top) : 0.0);
}

[[noreturn]] void damaged() { fail("the saved position of the training is damaged"); }

constexpr std::string_view base64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

// Bytes of each number with which -1 and the largest label can be written.
std::size_t bytes_of_label(std::int64_t largest) { return largest < 1 << 7 ? 1 : largest < 1 << 15 ? 2 : 4; }

// Writes labels as `packed` of runtime/course.py does: how wide they are, and their bytes in Base64.
void add_packed(Text& text, std::span<const std::int32_t> labels) {
  const std::int32_t largest = labels.empty() ? 0 : std::max<std::int32_t>(std::ranges::max(labels), 0);
  const std::size_t width = bytes_of_label(largest), bytes = width * labels.size();
  text.add("\"i");
  text.add(std::uint64_t{width});
  text.add(":");
  const auto byte = [&](std::size_t at) {
    const auto number = static_cast<std::uint32_t>(labels[at / width]);
    return number >> (8 * (at % width)) & 0xff;
  };
  for (std::size_t at = 0; at < bytes; at += 3) {
    std::uint32_t word = 0;
    for (std::size_t i = 0; i < 3; ++i) word = word << 8 | (at + i < bytes ? byte(at + i) : 0);
    std::array<char, 4> letters;
    for (std::size_t i = 0; i < 4; ++i)
      letters[i] = at + i > bytes ? '=' : base64[word >> (6 * (3 - i)) & 63];
    text.add(std::string_view(letters.data(), letters.size()));
  }
  text.add("\"");
}

// What it wrote.
std::vector<std::int32_t> unpacked(std::string_view text) {
  if (text.size() < 3 || text[0] != 'i' || text[2] != ':' || (text.size() - 3) % 4 != 0) damaged();
  const std::size_t width = static_cast<std::size_t>(text[1] - '0');
  if (width != 1 && width != 2 && width != 4 && width != 8) damaged();
  text.remove_prefix(3);
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  std::size_t padding = 0;
  for (std::size_t at = 0; at < text.size(); at += 4) {
    std::uint32_t word = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      const char letter = text[at + i];
      const bool last = at + 4 == text.size() && i > 1;
      const std::size_t value = base64.find(letter);
      if (letter == '=' && last && (i == 3 || text[at + 3] == '='))
        ++padding;
      else if (value == std::string_view::npos || padding > 0)
        damaged();
      word = word << 6 | static_cast<std::uint32_t>(letter == '=' ? 0 : value);
    }
    for (std::size_t i = 0; i < 3; ++i) bytes += static_cast<char>(word >> (8 * (2 - i)) & 0xff);
  }
  bytes.resize(bytes.size() - padding);
  if (bytes.size() % width != 0) damaged();
  std::vector<std::int32_t> labels;
  labels.reserve(bytes.size() / width);
  for (std::size_t at = 0; at < bytes.size(); at += width) {
    std::int64_t label = static_cast<signed char>(bytes[at + width - 1]);
    for (std::size_t i = width - 1; i-- > 0;) label = label * 256 + static_cast<unsigned char>(bytes[at + i]);
    if (label < -1 || label > std::numeric_limits<std::int32_t>::max()) damaged();
    labels.push_back(static_cast<std::int32_t>(label));
  }
  return labels;
}

// Python's `Unlabelled`, where its data is left out.
void check_unlabelled(const Wishes& wishes) {
  const auto check = [](const std::optional<double>& value, const char* name, bool share) {
    require(!value || (*value >= 0 && std::isfinite(*value) && (!share || *value <= 1)), name,
            " must be a number ", share ? "from 0 to 1" : "of at least 0", ", not ", value.value_or(0));
  };
  check(wishes.confidence, "confidence", true);
  check(wishes.unlabelled_share, "the share of unlabelled images", true);
  const double share = wishes.unlabelled_share.value_or(0.5);
  require(share != 0 && share != 1, "the share of unlabelled images must lie between 0 and 1, not be ",
          share);
  check(wishes.unlabelled_weight, "the weight of unlabelled images", false);
  require(wishes.unlabelled_weight != 0.0, "the weight of unlabelled images must be above 0");
}

// Throws Error unless a training goes on with the unlabelled images that it began with.
void check_same_unlabelled(const Course& course, const Wishes& wishes) {
  require(course.unlabelled == 0 || wishes.unlabelled > 0, "the saved training used ", course.unlabelled,
          " unlabelled images, too: resume it with them (--unlabelled), or start a new one");
  require(course.unlabelled == wishes.unlabelled, "the saved training used ",
          course.unlabelled == 0 ? "no" : std::to_string(course.unlabelled), " unlabelled images, not ",
          wishes.unlabelled, "; resume it with the same ones, or start a new one");
  require(wishes.unlabelled_share.value_or(course.unlabelled_share) == course.unlabelled_share,
          "the saved training filled ", course.unlabelled_share, " of a batch with unlabelled images, not ",
          wishes.unlabelled_share.value_or(0), "; resume it with the same share, or start a new one");
}

// What `Course::write` wrote of it.
Watch read_watch(const Json& content) {
  if (content.kind() != Json::Kind::object) damaged();
  Watch watch;
  for (const std::string& name : content.names()) {
    const Json& field = *content.find(name);
    if (name == "best") {
      const auto best = field.number();
      if (!best || !(*best >= 0 && *best <= 1)) damaged();
      watch.best = *best;
    } else if (name == "step" && field.kind() == Json::Kind::number && field.text() == "-1") {
      watch.step.reset();
    } else if (name == "step" || name == "fell_back") {
      if (name == "fell_back" && field.kind() == Json::Kind::null) continue;
      const auto count = field.whole();
      if (!count || *count >= most) damaged();
      (name == "step" ? watch.step : watch.fell_back) = *count;
    } else {
      damaged();
    }
  }
  return watch;
}

// How many of `images` are held out.
std::uint64_t held_out_of(std::uint64_t images, double share) {
  return static_cast<std::uint64_t>(std::nearbyint(share * static_cast<double>(images)));
}

}  // namespace

Schedule schedule_named(std::string_view name) {
  return static_cast<Schedule>(place_of(schedules, name, "schedule"));
}

Augmentation augmentation_named(std::string_view name) {
  return static_cast<Augmentation>(place_of(augmentations, name, "augmentation"));
}

const char* name_of(Augmentation augmentation) {
  return augmentations[static_cast<std::size_t>(augmentation)].data();
}

std::size_t room_of_labels(std::uint64_t images, std::uint32_t classes) {
  const std::size_t bytes = static_cast<std::size_t>(images) * bytes_of_label(std::int64_t{classes} - 1);
  return images == 0 ? 0 : (bytes + 2) / 3 * 4 + 64;
}

std::uint64_t Course::unlabelled_places() const {
  const auto wanted =
      static_cast<std::uint64_t>(std::nearbyint(unlabelled_share * static_cast<double>(batch_size)));
  return std::min(std::max<std::uint64_t>(1, std::min(wanted, batch_size - 1)), unlabelled);
}

std::uint64_t Course::steps_per_epoch() const {
  const std::uint64_t places = unlabelled_places(), labelled = batch_size - places;
  const std::uint64_t steps = (samples + labelled - 1) / labelled;
  return places == 0 ? steps : std::max(steps, (unlabelled + places - 1) / places);
}

std::pair<std::uint64_t, std::uint64_t> Course::images(std::uint64_t done) const {
  if (unlabelled > 0) {
    const std::uint64_t labelled = batch_size - unlabelled_places();
    return {number(done) * labelled, labelled};
  }
  const std::uint64_t first = done % steps_per_epoch() * batch_size;
  return {first, std::min(batch_size, samples - first)};
}

std::pair<double, double> Course::rates(std::uint64_t done, const Manifest& manifest) const {
  const double ratio = manifest.learning_rate != 0 ? learning_rate / manifest.learning_rate : 1.0;
  const auto step = static_cast<double>(done), total = static_cast<double>(total_steps);
  double share = 1;
  if (schedule == Schedule::one_cycle) {
    share = one_cycle(step, total, warmup.value_or(usual_rise));
  } else {
    const double rise = warmup.value_or(0.0) * total;
    if (rise != 0) share = std::min(1.0, (step + 1) / rise);
    if (schedule == Schedule::cosine && step > rise)
      share *= 0.5 * (1 + std::cos(std::numbers::pi * (step - rise) / (total - rise)));
  }
  double divisor = 1;
  if (schedule == Schedule::steps)
    divisor = 4 * done >= 3 * total_steps ? 100 : 2 * done >= total_steps ? 10 : 1;
  // The decay is not multiplied by the learning rate (Algorithm 1), so it must follow it here.
  return {learning_rate * share / divisor, manifest.weight_decay * ratio * share / divisor};
}

void Course::write(Text& text) const {
  // Sorted by name; what older versions do not read is left out where it is the default.
  const Course usual;
  text.add("{");
  const auto name = [&](std::string_view field) {
    if (text.view() != "{") text.add(", ");
    text.add_quoted(field);
    text.add(": ");
  };
  const auto number = [&](std::string_view field, std::uint64_t value) {
    name(field);
    text.add(value);
  };
  if (augment != Augmentation::shift) {
    name("augment");
    text.add_quoted(name_of(augment));
  }
  if (balance) {
    name("balance");
    text.add("true");
  }
  number("batch_size", batch_size);
  const auto unless = [&](std::string_view field, double value, double usual) {
    if (value == usual) return;
    name(field);
    text.add(value);
  };
  const auto unless_zero = [&](std::string_view field, std::uint64_t value) {
    if (value != 0) number(field, value);
  };
  unless("best_score", best_score, no_score);
  unless_zero("best_step", best_step);
  unless("confidence", confidence, usual.confidence);
  number("first_epoch", first_epoch);
  number("first_step", first_step);
  name("learning_rate");
  text.add(learning_rate);
  unless_zero("measured", measured);
  if (patience) number("patience", *patience);
  if (pseudo_epoch) {
    number("pseudo_epoch", *pseudo_epoch);
    name("pseudo_labels");
    add_packed(text, pseudo_labels);
  }
  if (returned) {
    name("returned");
    text.add("true");
  }
  unless_zero("risen", risen);
  number("samples", samples);
  if (schedule != Schedule::steps) {
    name("schedule");
    text.add_quoted(schedules[static_cast<std::size_t>(schedule)]);
  }
  number("skipped", skipped);
  number("total_steps", total_steps);
  unless_zero("unlabelled", unlabelled);
  unless("unlabelled_share", unlabelled_share, usual.unlabelled_share);
  unless("unlabelled_weight", unlabelled_weight, usual.unlabelled_weight);
  unless("validation", validation, usual.validation);
  if (warmup) {
    name("warmup");
    text.add(*warmup);
  }
  if (watch) {
    name("watch");
    text.add("{\"best\": ");
    text.add(watch->best);
    text.add(", \"fell_back\": ");
    watch->fell_back ? text.add(*watch->fell_back) : text.add("null");
    text.add(", \"step\": ");
    watch->step ? text.add(*watch->step) : text.add("-1");
    text.add("}");
  }
  text.add("}");
}

bool Watch::is_due(std::uint64_t done, std::uint64_t batch_size, std::uint64_t images, bool over) const {
  constexpr std::uint64_t apart = 100;  // images trained on for one that is looked at
  if (fell_back || images == 0 || (step && done <= *step)) return false;
  return !step || over || (done - *step) * batch_size >= apart * images;
}

bool Watch::note(std::uint64_t done, double own, double pgd, std::uint64_t images) {
  constexpr double deviations = 3;
  const double deviation = std::sqrt(best * (1 - best) / static_cast<double>(images));
  const bool fallen = pgd < best / 2 && best - pgd > deviations * deviation;
  step = done;
  if (fallen && pgd < own / 2) fell_back = done;
  best = std::max(best, pgd);
  return fell_back.has_value();
}

Course Course::read(std::string_view text, std::uint64_t step) {
  Course course;
  try {
    const Json content = Json::parse(text);
    if (content.kind() != Json::Kind::object) damaged();
    const auto count = [&](const char* name, bool needed = true) {
      const Json* const found = content.find(name);
      if (found == nullptr && !needed) return std::uint64_t{0};
      const auto value = found == nullptr ? std::nullopt : found->whole();
      if (!value || *value >= most) damaged();
      return *value;
    };
    const auto real = [&](const char* name, double below) {
      const auto value = content.find(name)->number();
      if (!value || !(*value >= 0 && *value < below)) damaged();
      return *value;
    };
    const auto word = [&](const char* name) -> const std::string& {
      const Json* const found = content.find(name);
      if (found->kind() != Json::Kind::text) damaged();
      return found->text();
    };
    const auto flag = [&](const char* name) {
      const Json* const found = content.find(name);
      if (found == nullptr) return false;
      if (found->kind() != Json::Kind::boolean) damaged();
      return found->text() == "true";
    };
    const auto is_null = [&](const char* name) {
      const Json* const found = content.find(name);
      return found == nullptr || found->kind() == Json::Kind::null;
    };
    course.first_step = count("first_step");
    course.first_epoch = count("first_epoch");
    course.batch_size = count("batch_size");
    course.samples = count("samples");
    course.total_steps = count("total_steps");
    course.skipped = count("skipped", false);
    if (content.find("learning_rate") == nullptr) damaged();
    course.learning_rate = real("learning_rate", INFINITY);
    if (!is_null("schedule")) course.schedule = schedule_named(word("schedule"));
    if (!is_null("augment")) course.augment = augmentation_named(word("augment"));
    if (!is_null("warmup")) course.warmup = real("warmup", 1);
    course.balance = flag("balance");
    if (course.batch_size == 0 || course.samples == 0 || course.first_step > step) damaged();
    course.unlabelled = count("unlabelled", false);
    if (course.unlabelled > 0 && course.batch_size < 2) damaged();
    if (!is_null("confidence")) course.confidence = real("confidence", std::nextafter(1, 2));
    if (!is_null("unlabelled_share")) course.unlabelled_share = real("unlabelled_share", 1);
    if (!is_null("unlabelled_weight")) course.unlabelled_weight = real("unlabelled_weight", INFINITY);
    if (course.unlabelled_share == 0 || course.unlabelled_weight == 0) damaged();
    if (const Json* const epoch = content.find("pseudo_epoch"); epoch != nullptr && epoch->text() != "-1") {
      course.pseudo_epoch = count("pseudo_epoch");
      if (content.find("pseudo_labels") == nullptr) damaged();
      course.pseudo_labels = unpacked(word("pseudo_labels"));
      if (course.pseudo_labels.size() != course.unlabelled) damaged();
    }
    if (!is_null("validation")) course.validation = real("validation", 1);
    if (!is_null("patience")) course.patience = count("patience");
    if (course.patience == 0) damaged();
    course.measured = count("measured", false);
    course.risen = count("risen", false);
    course.best_step = count("best_step", false);
    course.returned = flag("returned");
    if (!is_null("best_score")) {
      const auto score = content.find("best_score")->number();
      if (!score || !std::isfinite(*score)) damaged();
      course.best_score = *score;
    }
    if (course.risen > course.measured) damaged();
    if (!is_null("watch")) course.watch = read_watch(*content.find("watch"));
  } catch (const Error&) {
    damaged();
  }
  return course;
}

bool Course::note(std::uint64_t done, double score) {
  measured = done;
  const bool best = score >= best_score;
  if (score > best_score) risen = done;
  if (best) best_step = first_step + done, best_score = score;
  return best;
}

std::uint64_t images_seen(std::string_view progress, std::uint64_t step) {
  try {
    const Course course = Course::read(progress, step);
    return (step - course.first_step) * course.batch_size;
  } catch (const Error&) {
    return 0;
  }
}

Course Course::begin(const Wishes& wishes, const std::optional<Course>& earlier, bool continues,
                     const Manifest& manifest, std::uint64_t step) {
  require(wishes.images > 0 && wishes.images < most, "the data set is empty");
  require(wishes.unlabelled < most, "there are more unlabelled images than can be counted");
  check_unlabelled(wishes);
  require(!wishes.epochs || !wishes.steps, "give the length in epochs or in steps, not both");
  Course course;
  const bool finishes = continues && earlier;
  if (finishes && wishes.validation)
    require(*wishes.validation == earlier->validation, "the saved training holds ", earlier->validation,
            " of its images out, not ", *wishes.validation,
            "; resume it with the same share, or start a new one");
  const double validation = finishes ? earlier->validation : wishes.validation.value_or(0.0);
  require(validation >= 0 && validation < 1, "the held-out fraction must be at least 0 and below 1, not ",
          validation);
  const std::uint64_t samples = wishes.images - held_out_of(wishes.images, validation);
  require(samples > 0 && (validation == 0 || samples < wishes.images), wishes.images,
          " images are too few to hold ", validation, " of them out");
  if (finishes) {
    course = *earlier;
    require(course.samples == samples && wishes.batch_size.value_or(course.batch_size) == course.batch_size,
            "the saved training used ", course.samples, " images in batches of ", course.batch_size,
            "; resume it with the same data and batch size, or start a new one");
    check_same_unlabelled(course, wishes);
    for (const std::int32_t label : course.pseudo_labels)
      if (label >= static_cast<std::int64_t>(manifest.num_classes)) damaged();
  } else {
    course.first_step = step;
    if (earlier) {
      const std::uint64_t each = earlier->steps_per_epoch();
      course.first_epoch = earlier->first_epoch + (step - earlier->first_step + each - 1) / each;
    }
    course.batch_size = wishes.batch_size.value_or(manifest.batch_size);
    course.samples = samples;
    course.validation = validation;
    course.learning_rate = manifest.learning_rate;
    course.unlabelled = wishes.unlabelled;
    course.unlabelled_share = wishes.unlabelled_share.value_or(course.unlabelled_share);
    require(course.unlabelled == 0 || course.batch_size > 1,
            "a batch of 1 image has no place for an unlabelled one: take larger batches");
    course.total_steps = course.steps_per_epoch();
  }
  course.held_out = wishes.images - samples;
  if (manifest.attack != AttackKind::pgd && !course.watch) course.watch.emplace();
  if (wishes.learning_rate) course.learning_rate = *wishes.learning_rate;
  if (wishes.schedule) course.schedule = *wishes.schedule;
  if (wishes.warmup) course.warmup = wishes.warmup;
  if (wishes.augment) course.augment = *wishes.augment;
  if (wishes.balance) course.balance = *wishes.balance;
  if (wishes.patience) course.patience = wishes.patience;
  if (wishes.confidence) course.confidence = *wishes.confidence;
  if (wishes.unlabelled_weight) course.unlabelled_weight = *wishes.unlabelled_weight;
  require(!course.patience || course.validation > 0,
          "patience needs images that are held out: give validation a share of them");
  require(course.learning_rate >= 0 && std::isfinite(course.learning_rate),
          "the learning rate must be a positive number, not ", course.learning_rate);
  require(!course.warmup || (*course.warmup >= 0 && *course.warmup < 1),
          "warmup must be a share of at least 0 and below 1");
  require(!wishes.epochs || *wishes.epochs < most / course.steps_per_epoch(),
          "the training is longer than can be counted");
  if (wishes.epochs) course.total_steps = *wishes.epochs * course.steps_per_epoch();
  if (wishes.steps) course.total_steps = *wishes.steps;
  require(course.total_steps < most, "the training is longer than can be counted");
  return course;
}

}  // namespace edge_bcs
