// The command line: options by the names that `edge-bcs` has, and help that shows what to type.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ops/op.h"

namespace edge_bcs::app {

// What was typed cannot be meant; the exit status is 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

struct OptionSpec {
  const char* name;     // with its dashes; "-o/--output" has two
  const char* metavar;  // of its value; null: a flag
  const char* help;
  const char* alone = nullptr;  // what it is without a value, if it may be
};

// An option that `edge-bcs` alone has.
struct Elsewhere {
  const char* name;
  const char* instead = nullptr;  // what to do about it; null: take `edge-bcs`
};

struct CommandSpec {
  const char* name;
  const char* arguments;  // such as "ARTIFACT"
  const char* help;       // the first line says what it is for
  std::span<const OptionSpec> options;
  std::span<const Elsewhere> elsewhere;
  const char* examples;
  std::size_t least, most;  // arguments
};

class Options {
 public:
  // Throws UsageError, or Error for an option that only `edge-bcs` has.
  Options(const CommandSpec& command, std::span<const std::string> words);

  const std::vector<std::string>& arguments() const { return arguments_; }
  bool wants_help() const { return help_; }
  bool has(std::string_view name) const { return find(name) != nullptr; }
  // These throw UsageError for a value out of range.
  std::optional<std::string> text(std::string_view name) const;
  // Of an option that may be repeated.
  std::vector<std::string> texts(std::string_view name) const;
  std::string text_or(std::string_view name, const char* otherwise) const;
  std::optional<std::uint64_t> whole(std::string_view name, std::uint64_t least,
                                     std::uint64_t most = std::numeric_limits<std::int64_t>::max()) const;
  std::optional<double> number(std::string_view name) const;
  // One of a few words.
  std::optional<std::string> choice(std::string_view name, std::span<const std::string_view> words) const;

 private:
  struct Given {
    const OptionSpec* option;
    std::string value;
  };

  const Given* find(std::string_view name) const;

  std::vector<Given> given_;
  std::vector<std::string> arguments_;
  bool help_ = false;
};

std::string help_of(const CommandSpec& command);

// "0.03" or "8/255". Throws Error.
double fraction(const std::string& text, const char* name);

}  // namespace edge_bcs::app
