#include "app/saving.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <memory>

#include "app/archive.h"
#include "app/progress.h"
#include "app/text.h"
#include "ops/op.h"

namespace edge_bcs::app {

namespace {

constexpr std::size_t longest_line = 1 << 20;
constexpr double hour = 3600, default_seconds = 60;

void write_whole(int file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::write(file, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw errno;
    text.remove_prefix(static_cast<std::size_t>(count));
  }
}

// The step that a line of metrics is of.
std::optional<std::uint64_t> step_of(const std::string& line) {
  try {
    const Json record = Json::parse(line);
    const Json* const step = record.find("step");
    return step == nullptr ? std::nullopt : step->whole();
  } catch (const Error&) {
    return {};
  }
}

// The next line, without its end; false where there is none that has an end, or that is not too long.
bool take_line(std::FILE* stream, std::string& line) {
  line.clear();
  for (int letter = std::getc(stream); letter != EOF && line.size() < longest_line;
       letter = std::getc(stream)) {
    if (letter == '\n') return true;
    line += static_cast<char>(letter);
  }
  return false;
}

// Removes what comes after the last whole line of a step up to `last`.
void keep_lines(const std::string& path, std::uint64_t last) {
  struct Close {
    void operator()(std::FILE* stream) const { std::fclose(stream); }
  };
  const std::unique_ptr<std::FILE, Close> stream(std::fopen(path.c_str(), "re"));
  if (stream == nullptr) return;
  std::uint64_t end = 0, position = 0;
  bool first = true;
  // What has no end is the last line, cut off, or none of ours.
  for (std::string line; take_line(stream.get(), line);) {
    position += line.size() + 1;
    const std::optional<std::uint64_t> step = step_of(line);
    require(!first || step || line.starts_with('\0'), path,
            " holds no metrics, so it stays; choose another file for them.");
    first = false;
    if (step && *step <= last) end = position;
  }
  require(truncate(path.c_str(), static_cast<off_t>(end)) == 0, "the metrics file ", path,
          " cannot be written: ", cause_of(errno), ".");
}

}  // namespace

SaveSchedule::SaveSchedule(std::uint64_t size, std::uint64_t step, const SaveWishes& wishes)
    : size_(size), step_(step), wishes_(wishes), time_(seconds_now()) {
  if (!wishes_.steps && !wishes_.seconds) wishes_.seconds = default_seconds;
}

double SaveSchedule::shortest() const {
  if (!wishes_.max_writes) return 0;
  return static_cast<double>(size_) * hour / ((1 - metrics_share) * static_cast<double>(*wishes_.max_writes));
}

bool SaveSchedule::due(std::uint64_t step) const {
  const double elapsed = seconds_now() - time_;
  if (elapsed < shortest()) return false;
  return (wishes_.steps && step - step_ >= *wishes_.steps) ||
         (wishes_.seconds && elapsed >= *wishes_.seconds);
}

void SaveSchedule::saved(std::uint64_t step, std::uint64_t size) {
  step_ = step, size_ = size, time_ = seconds_now();
}

double SaveSchedule::bytes_per_hour(double seconds_per_step) const {
  double wait = wishes_.seconds ? *wishes_.seconds : static_cast<double>(*wishes_.steps) * seconds_per_step;
  if (wishes_.seconds && wishes_.steps)
    wait = std::min(wait, static_cast<double>(*wishes_.steps) * seconds_per_step);
  return static_cast<double>(size_) * hour / std::max({wait, shortest(), seconds_per_step, 1e-3});
}

std::string SaveSchedule::describe() const {
  std::string often = wishes_.steps ? std::to_string(*wishes_.steps) + " steps" : "";
  if (wishes_.seconds)
    often += (often.empty() ? "" : " or ") + format_seconds(std::max(*wishes_.seconds, shortest()));
  std::string text = "Saves " + format_bytes(static_cast<double>(size_)) + " every " + often;
  if (!wishes_.steps) text += ", " + format_bytes(std::nearbyint(bytes_per_hour(0))) + " an hour";
  if (wishes_.max_writes)
    text += " (--max-writes allows " + format_bytes(static_cast<double>(*wishes_.max_writes)) +
            (wishes_.steps ? " an hour)" : ")");
  return text;
}

MetricsFile::MetricsFile(std::string path, std::optional<std::uint64_t> resumed_at,
                         std::optional<std::uint64_t> max_writes)
    : path_(std::move(path)), began_(seconds_now()) {
  if (max_writes) per_hour_ = metrics_share * static_cast<double>(*max_writes);
  if (resumed_at) keep_lines(path_, *resumed_at);
  file_ = Descriptor(open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666));
  if (!file_) fail_writing(errno);
}

void MetricsFile::write(const Value& record) {
  const std::string line = record.dump() + "\n";
  if (per_hour_) {
    const double hours = 1 + (seconds_now() - began_) / hour;
    if (static_cast<double>(bytes_ + line.size()) > *per_hour_ * hours) return;
  }
  try {
    write_whole(file_.number(), line);
  } catch (const int error) {
    fail_writing(error);
  }
  bytes_ += line.size();
}

void MetricsFile::fail_writing(int error) const {
  fail("the metrics file ", plain(path_), " cannot be written: ", cause_of(error), ".");
}

void write_json(const std::string& path, const Value& content) {
  const std::string partial = path + ".partial", text = content.dump(1) + "\n";
  try {
    {
      const Descriptor file(open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
      if (!file) throw errno;
      write_whole(file.number(), text);
      if (fsync(file.number()) != 0) throw errno;
    }
    if (std::rename(partial.c_str(), path.c_str()) != 0) throw errno;
  } catch (const int error) {
    unlink(partial.c_str());
    fail(plain(path), " cannot be written: ", cause_of(error), ".");
  }
  const std::size_t end = path.rfind('/');
  const Descriptor folder(
      open(end == std::string::npos ? "." : path.substr(0, end + 1).c_str(), O_RDONLY | O_CLOEXEC));
  if (folder) fsync(folder.number());
}

Value read_json(const std::string& path, std::uint64_t most) {
  try {
    const std::string content = read_all(FileSource(path), most);
    const Json read = Json::parse(content);
    return read.kind() == Json::Kind::object ? Value(read) : Value();
  } catch (const Error&) {
    return {};
  }
}

}  // namespace edge_bcs::app
