#include "session/course.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "ops/op.h"
#include "session/json.h"

namespace edge_bcs {

namespace {

constexpr std::array schedules{"steps", "cosine", "one-cycle"};
constexpr std::array augmentations{"none", "shift", "photo", "zoom"};
constexpr double usual_rise = 0.3;  // of the steps of one cycle
constexpr double first_part = 25,
                 last_part =
                     1e4;  // how often what λ begins with goes into its highest, and its last into that
constexpr std::uint64_t most = std::uint64_t{1} << 56;

template <std::size_t n>
std::size_t place_of(const std::array<const char*, n>& names, std::string_view name, const char* what) {
  const auto found = std::ranges::find(names, name);
  if (found == names.end()) {
    std::string known;
    for (const char* const each : names) known += (known.empty() ? "" : ", ") + std::string(each);
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

void refuse_unless(bool supported, const char* what) {
  require(supported, "the saved training has ", what,
          ", which only Python goes on with: edge-bcs finetune --resume");
}

}  // namespace

Schedule schedule_named(std::string_view name) {
  return static_cast<Schedule>(place_of(schedules, name, "schedule"));
}

Augmentation augmentation_named(std::string_view name) {
  return static_cast<Augmentation>(place_of(augmentations, name, "augmentation"));
}

const char* name_of(Augmentation augmentation) {
  return augmentations[static_cast<std::size_t>(augmentation)];
}

std::pair<std::uint64_t, std::uint64_t> Course::images(std::uint64_t done) const {
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
  number("first_epoch", first_epoch);
  number("first_step", first_step);
  name("learning_rate");
  text.add(learning_rate);
  number("samples", samples);
  if (schedule != Schedule::steps) {
    name("schedule");
    text.add_quoted(schedules[static_cast<std::size_t>(schedule)]);
  }
  number("skipped", skipped);
  number("total_steps", total_steps);
  if (warmup) {
    name("warmup");
    text.add(*warmup);
  }
  text.add("}");
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
    refuse_unless(count("unlabelled", false) == 0, "images without labels");
    refuse_unless(is_null("validation") || real("validation", 1) == 0, "images that are held out");
    refuse_unless(is_null("patience"), "patience");
  } catch (const Error& error) {
    if (std::string_view(error.what()).starts_with("the saved training has")) throw;
    damaged();
  }
  return course;
}

Course Course::begin(const Wishes& wishes, const std::optional<Course>& earlier, bool continues,
                     const Manifest& manifest, std::uint64_t step) {
  require(wishes.images > 0 && wishes.images < most, "the data set is empty");
  require(!wishes.epochs || !wishes.steps, "give the length in epochs or in steps, not both");
  Course course;
  if (continues && earlier) {
    course = *earlier;
    require(
        course.samples == wishes.images && wishes.batch_size.value_or(course.batch_size) == course.batch_size,
        "the saved training used ", course.samples, " images in batches of ", course.batch_size,
        "; resume it with the same data and batch size, or start a new one");
  } else {
    course.first_step = step;
    if (earlier) {
      const std::uint64_t each = earlier->steps_per_epoch();
      course.first_epoch = earlier->first_epoch + (step - earlier->first_step + each - 1) / each;
    }
    course.batch_size = wishes.batch_size.value_or(manifest.batch_size);
    course.samples = wishes.images;
    course.learning_rate = manifest.learning_rate;
    course.total_steps = course.steps_per_epoch();
  }
  if (wishes.learning_rate) course.learning_rate = *wishes.learning_rate;
  if (wishes.schedule) course.schedule = *wishes.schedule;
  if (wishes.warmup) course.warmup = wishes.warmup;
  if (wishes.augment) course.augment = *wishes.augment;
  if (wishes.balance) course.balance = *wishes.balance;
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
