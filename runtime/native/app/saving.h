// When a training is saved, what it writes beside its state, and what that wears the medium: runtime/board/saving.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "app/value.h"
#include "session/files.h"

namespace edge_bcs::app {

inline constexpr double metrics_share = 0.1;  // of the bytes an hour that may be written

struct SaveWishes {
  std::optional<std::uint64_t> steps;
  std::optional<double> seconds;
  std::optional<std::uint64_t> max_writes;  // bytes an hour
};

class SaveSchedule {
 public:
  SaveSchedule(std::uint64_t size, std::uint64_t step, const SaveWishes& wishes);

  // Whether the state after `step` should be saved now.
  bool due(std::uint64_t step) const;
  void saved(std::uint64_t step, std::uint64_t size);
  double bytes_per_hour(double seconds_per_step) const;
  std::string describe() const;
  std::uint64_t size() const { return size_; }

 private:
  double shortest() const;

  std::uint64_t size_, step_;
  SaveWishes wishes_;
  double time_;
};

// JSON objects, one a line; lines beyond their share of the bytes an hour are left out.
class MetricsFile {
 public:
  // `resumed_at`: where an interrupted training goes on, so that later lines, and one that was cut off, are removed.
  MetricsFile(std::string path, std::optional<std::uint64_t> resumed_at,
              std::optional<std::uint64_t> max_writes);
  void write(const Value& record);
  std::uint64_t bytes() const { return bytes_; }

 private:
  [[noreturn]] void fail_writing(int error) const;

  std::string path_;
  Descriptor file_;
  std::optional<double> per_hour_;
  double began_;
  std::uint64_t bytes_ = 0;
};

// Replaces a file by JSON, atomically and durably. Throws Error.
void write_json(const std::string& path, const Value& content);
// The object in a small file of JSON; null if there is none that is whole.
Value read_json(const std::string& path, std::uint64_t most);

}  // namespace edge_bcs::app
