#include "app/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::size_t column = 26, width = 100;

bool is_named(const OptionSpec& option, std::string_view name) {
  std::string_view names = option.name;
  for (std::size_t end = names.find('/'); end != std::string_view::npos; end = names.find('/')) {
    if (names.substr(0, end) == name) return true;
    names.remove_prefix(end + 1);
  }
  return names == name;
}

// Lines of at most `width` characters, from the second on behind `indent` spaces.
std::string filled(std::string_view text, std::size_t indent) {
  std::string made;
  std::size_t used = indent;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(' '), text.size());
    if (used + end + 1 > width && used > indent) {
      made += "\n" + std::string(indent, ' ');
      used = indent;
    } else if (used > indent) {
      made += ' ';
      ++used;
    }
    made += text.substr(0, end);
    used += end;
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return made;
}

std::optional<double> number_of(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return {};
  return value;
}

}  // namespace

Options::Options(const CommandSpec& command, std::span<const std::string> words) {
  bool options_end = false;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (options_end || word.size() < 2 || word[0] != '-') {
      arguments_.push_back(word);
      continue;
    }
    if (word == "--") {
      options_end = true;
      continue;
    }
    if (word == "--help" || word == "-h") {
      help_ = true;
      return;
    }
    const std::size_t mark = word.starts_with("--") ? word.find('=') : std::string::npos;
    const std::string name = word.substr(0, mark);
    const auto option =
        std::ranges::find_if(command.options, [&](const OptionSpec& one) { return is_named(one, name); });
    if (option == command.options.end()) {
      for (const Elsewhere& one : command.elsewhere) {
        if (one.name != name) continue;
        if (one.instead != nullptr) fail("edge-bcs-run has no ", name, ": ", one.instead);
        fail("edge-bcs-run has no ", name, "; `edge-bcs ", command.name, "` does.");
      }
      throw UsageError("No such option: " + plain(name));
    }
    Given given{&*option, {}};
    if (option->metavar == nullptr) {
      if (mark != std::string::npos) throw UsageError("Option '" + name + "' does not take a value.");
    } else if (mark != std::string::npos) {
      given.value = word.substr(mark + 1);
    } else if (option->alone != nullptr) {
      // A file follows, or one of the words that the metavar names; else it is alone.
      const std::string next = i + 1 < words.size() ? words[i + 1] : "";
      const std::string_view metavar = option->metavar;
      const bool is_word = ("|" + std::string(metavar) + "|").find("|" + next + "|") != std::string::npos;
      const bool follows = !next.empty() && (is_word || (metavar.starts_with("FILE") && next[0] != '-'));
      given.value = follows ? words[++i] : option->alone;
    } else {
      if (i + 1 == words.size()) throw UsageError("Option '" + name + "' requires an argument.");
      given.value = words[++i];
    }
    given_.push_back(std::move(given));
  }
  if (arguments_.size() < command.least)
    throw UsageError(std::string("Missing argument '") + command.arguments + "'.");
  if (arguments_.size() > command.most)
    throw UsageError("Got unexpected extra argument (" + plain(arguments_[command.most]) + ")");
}

const Options::Given* Options::find(std::string_view name) const {
  const Given* found = nullptr;
  for (const Given& given : given_)
    if (is_named(*given.option, name)) found = &given;
  return found;
}

std::optional<std::string> Options::text(std::string_view name) const {
  const Given* const given = find(name);
  return given == nullptr ? std::nullopt : std::optional(given->value);
}

std::vector<std::string> Options::texts(std::string_view name) const {
  std::vector<std::string> found;
  for (const Given& given : given_)
    if (is_named(*given.option, name)) found.push_back(given.value);
  return found;
}

std::string Options::text_or(std::string_view name, const char* otherwise) const {
  return text(name).value_or(otherwise);
}

std::optional<std::uint64_t> Options::whole(std::string_view name, std::uint64_t least,
                                            std::uint64_t most) const {
  const Given* const given = find(name);
  if (given == nullptr) return {};
  std::uint64_t value = 0;
  const char* const end = given->value.data() + given->value.size();
  const auto [stop, error] = std::from_chars(given->value.data(), end, value);
  if (error != std::errc() || stop != end || value < least || value > most)
    throw UsageError("Invalid value for '" + std::string(name) + "': " + plain(given->value) +
                     " is not a whole number of at least " + std::to_string(least) +
                     (most < std::uint64_t{1} << 62 ? " and at most " + std::to_string(most) : "") + ".");
  return value;
}

std::optional<double> Options::number(std::string_view name) const {
  const Given* const given = find(name);
  if (given == nullptr) return {};
  const std::optional<double> value = number_of(given->value);
  if (!value)
    throw UsageError("Invalid value for '" + std::string(name) + "': " + plain(given->value) +
                     " is not a number.");
  return value;
}

std::optional<std::string> Options::choice(std::string_view name,
                                           std::span<const std::string_view> words) const {
  const Given* const given = find(name);
  if (given == nullptr) return {};
  if (std::ranges::find(words, given->value) == words.end()) {
    std::string all;
    for (const std::string_view word : words) all += (all.empty() ? "'" : ", '") + std::string(word) + "'";
    throw UsageError("Invalid value for '" + std::string(name) + "': '" + plain(given->value) +
                     "' is not one of " + all + ".");
  }
  return given->value;
}

std::string help_of(const CommandSpec& command) {
  std::string text =
      std::string("Usage: edge-bcs-run ") + command.name + " [OPTIONS] " + command.arguments + "\n\n";
  std::string_view rest = command.help;
  while (!rest.empty()) {
    const std::size_t end = std::min(rest.find("\n\n"), rest.size());
    text += "  " + filled(rest.substr(0, end), 2) + "\n\n";
    rest.remove_prefix(std::min(end + 2, rest.size()));
  }
  text += "  Examples:\n";
  text += command.examples;
  text += "\nOptions:\n";
  for (const OptionSpec& option : command.options) {
    std::string name = "  " + std::string(option.name);
    if (const std::size_t mark = name.find('/'); mark != std::string::npos) name.replace(mark, 1, ", ");
    if (option.metavar != nullptr) name += std::string(" ") + option.metavar;
    if (name.size() + 2 > column)
      text += name + "\n" + std::string(column, ' ');
    else
      text += name + std::string(column - name.size(), ' ');
    text += filled(option.help, column) + "\n";
  }
  return text + "  -h, --help              Show this message and exit.\n";
}

double fraction(const std::string& text, const char* name) {
  const std::size_t mark = text.find('/');
  const std::optional<double> above = number_of(text.substr(0, mark)),
                              below = mark == std::string::npos ? 1.0 : number_of(text.substr(mark + 1));
  const double value = above && below && *below != 0 ? *above / *below : -1;
  require(value >= 0 && std::isfinite(value), name, " must be a number such as 0.031 or 8/255, not '",
          plain(text), "'.");
  return value;
}

}  // namespace edge_bcs::app
