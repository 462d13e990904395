#include "app/progress.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr double first_seconds = 1.5, between_lines = 10, between_drawings = 0.2, shortest_estimate = 3;

bool on_terminal() {
  const char* const kind = std::getenv("TERM");
  return isatty(STDERR_FILENO) != 0 && (kind == nullptr || std::strcmp(kind, "dumb") != 0);
}

bool line_is_open = false;

void write_error(std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::write(STDERR_FILENO, text.data(), text.size());
    if (count <= 0) return;  // nobody reads it any more
    text.remove_prefix(static_cast<std::size_t>(count));
  }
}

std::string erased() { return line_is_open ? "\r\x1b[K" : ""; }

std::string rounded(double seconds) { return format_seconds(seconds < 60 ? std::round(seconds) : seconds); }

}  // namespace

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Progress::Progress(std::string what, std::uint64_t total, std::string unit)
    : what_(std::move(what)), unit_(std::move(unit)), total_(total), began_(seconds_now()) {}

Progress::~Progress() {
  if (line_is_open) write_error(erased());
  line_is_open = false;
  if (spoke_ && total_ > 0 && done_ >= total_) line(described());
}

void Progress::update(std::uint64_t done, std::string_view text) {
  done_ = done;
  if (!text.empty()) text_ = text;
  const double now = seconds_now();
  static const bool terminal = on_terminal();
  if (now - began_ < first_seconds || now - told_ < (terminal ? between_drawings : between_lines)) return;
  told_ = now;
  if (terminal) {
    write_error(erased() + described().substr(0, 200));
    line_is_open = true;
  } else {
    spoke_ = true;
    line(described());
  }
}

void Progress::line(std::string_view text) {
  write_error(erased() + std::string(text) + "\n");
  line_is_open = false;
}

std::string Progress::described() const {
  std::string text = what_ + ": ";
  if (total_ > 0)
    text += grouped(done_) + " of " + grouped(total_) + " " + unit_ + ", ";
  else if (done_ > 0)
    text += grouped(done_) + " " + unit_ + ", ";
  if (!text_.empty()) text += text_ + ", ";
  const double took = seconds_now() - began_;
  text += rounded(took);
  if (total_ > done_ && done_ > first_ && took >= shortest_estimate)
    text += ", about " +
            rounded(took * static_cast<double>(total_ - done_) / static_cast<double>(done_ - first_)) +
            " left";
  return text;
}

}  // namespace edge_bcs::app
