// How far something long is, on standard error: on a terminal one line that is written over, elsewhere a line now and then.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace edge_bcs::app {

class Progress {
 public:
  // `total`: how much there is to do, 0 where that is not known. `unit`: such as "images".
  Progress(std::string what, std::uint64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // `text`: what else is to be said.
  void update(std::uint64_t done, std::string_view text = {});
  // Tells again where it stands, for there is nothing new.
  void tick() { update(done_); }
  // What was done before, which says nothing of the pace.
  void begin(std::uint64_t done) { done_ = first_ = done; }

  // Writes a line that stays.
  static void line(std::string_view text);

 private:
  std::string described() const;

  std::string what_, unit_, text_;
  std::uint64_t total_, done_ = 0, first_ = 0;
  double began_, told_ = 0;
  bool spoke_ = false;
};

// Seconds of a clock that only goes forwards.
double seconds_now();

}  // namespace edge_bcs::app
