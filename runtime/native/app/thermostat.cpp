#include "app/thermostat.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <optional>
#include <vector>

#include "app/archive.h"
#include "app/paths.h"
#include "app/progress.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr double hysteresis = 5, coldest = -40, hottest_of_all = 150;  // °C
constexpr unsigned seconds_between_readings = 1;  // some sensors take milliseconds to read
constexpr const char *zones = "/sys/class/thermal", *chips = "/sys/class/hwmon";
// The power management chip of a Jetson Nano always says 100 °C.
constexpr std::string_view constant_zone = "PMIC-Die";
// Chips that are not the processor's: disks, radios, batteries.
constexpr std::array<std::string_view, 8> other_chips{"nvme", "drivetemp", "iwlwifi", "ath",
                                                      "mt79", "BAT",       "ucsi",    "AC"};

struct Sensor {
  std::string name;
  double celsius;
};

std::vector<std::string> listed_in(const std::string& folder) {
  return is_folder(folder) ? names_in(folder) : std::vector<std::string>{};
}

// What a file of the system says, without white space around it; "" if nothing. Its size is not known before.
std::string text_of(const std::string& path) {
  std::array<char, 256> text;
  std::FILE* const file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return {};
  const std::size_t count = std::fread(text.data(), 1, text.size(), file);
  std::fclose(file);
  constexpr std::string_view white = " \t\r\n";
  const std::string_view read(text.data(), count);
  const std::size_t begin = read.find_first_not_of(white), end = read.find_last_not_of(white);
  return begin == std::string_view::npos ? std::string() : std::string(read.substr(begin, end + 1 - begin));
}

void add(std::vector<Sensor>& sensors, const std::string& name, const std::string& file) {
  const std::string text = text_of(file);
  long value = 0;  // millidegrees; an engine that is switched off has none
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const double celsius = static_cast<double>(value) / 1000;
  if (error == std::errc() && end == text.data() + text.size() && celsius > coldest &&
      celsius < hottest_of_all)
    sensors.push_back({name, celsius});
}

std::string or_else(std::string text, const std::string& otherwise) {
  return text.empty() ? otherwise : text;
}

std::vector<Sensor> temperatures() {
  std::vector<Sensor> sensors;
  for (const std::string& zone : listed_in(zones)) {
    const std::string folder = joined(zones, zone), name = or_else(text_of(joined(folder, "type")), zone);
    if (zone.starts_with("thermal_zone") && name != constant_zone) add(sensors, name, joined(folder, "temp"));
  }
  for (const std::string& chip : listed_in(chips)) {
    const std::string folder = joined(chips, chip), name = or_else(text_of(joined(folder, "name")), chip);
    if (!chip.starts_with("hwmon") ||
        std::ranges::any_of(other_chips, [&](std::string_view other) { return name.starts_with(other); }))
      continue;
    for (const std::string& file : listed_in(folder)) {
      constexpr std::string_view input = "_input";
      if (!file.starts_with("temp") || !file.ends_with(input)) continue;
      const std::string label =
          text_of(joined(folder, file.substr(0, file.size() - input.size()) + "_label"));
      add(sensors, label.empty() ? name : name + " " + label, joined(folder, file));
    }
  }
  return sensors;
}

Sensor hottest() {
  const std::vector<Sensor> sensors = temperatures();
  require(!sensors.empty(),
          "this machine shows no temperature in /sys/class/thermal or /sys/class/hwmon: leave --max-temp "
          "out, or load "
          "the sensor's driver.");
  return *std::ranges::max_element(sensors, {}, &Sensor::celsius);
}

}  // namespace

Thermostat::Thermostat(double limit) : limit_(limit), next_reading_(seconds_now()) {
  require(limit >= 30 && limit <= 120, "the highest temperature must lie between 30 and 120 °C, not ", limit,
          ".");
  hottest();
}

void Thermostat::wait(const std::function<void(const std::string&)>& on_wait, double until) {
  const double began = seconds_now();
  if (began < next_reading_) return;
  next_reading_ = began + seconds_between_readings;
  Sensor sensor = hottest();
  if (sensor.celsius < limit_) return;
  struct Counted {
    double began;
    double& paused;
    ~Counted() { paused += seconds_now() - began; }
  } const counted{began, paused_};
  const std::string why = "paused: " + sensor.name + " reached " + fixed(sensor.celsius, 0) +
                          " °C; goes on at " + fixed(limit_ - hysteresis, 0) + " °C";
  while (sensor.celsius > limit_ - hysteresis && seconds_now() < until) {
    on_wait(why);
    sleep(seconds_between_readings);
    sensor = hottest();
  }
}

}  // namespace edge_bcs::app
