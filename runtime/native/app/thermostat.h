// Pausing while the board is too hot: runtime/board/thermostat.py.
#pragma once

#include <functional>
#include <limits>
#include <string>

namespace edge_bcs::app {

class Thermostat {
 public:
  // Lets a training run until the hottest sensor reaches `limit` °C, then only once it has cooled by 5 °C. Throws Error for a
  // limit out of range, or where no sensor can be read, then or later.
  explicit Thermostat(double limit);

  // Returns at once if it is cool enough, else when it is, or at `until`. `on_wait` is called once a second with the sentence
  // that says why; it may throw to end the waiting.
  void wait(const std::function<void(const std::string&)>& on_wait,
            double until = std::numeric_limits<double>::infinity());

  double paused_seconds() const { return paused_; }

 private:
  double limit_, next_reading_, paused_ = 0;
};

}  // namespace edge_bcs::app
