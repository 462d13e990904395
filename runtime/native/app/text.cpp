#include "app/text.h"

#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

#include "app/progress.h"

namespace edge_bcs::app {

namespace {

constexpr std::size_t most_named = 12;
constexpr double kibi = 1024;

// "%.3g" as Python writes it.
std::string three_digits(double value) {
  std::array<char, 40> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.3g", value);
  return buffer.data();
}

// Characters that act on a terminal: edge_bcs/core/text.py.
bool acts(std::uint32_t code) {
  return code < 0x20 || (code >= 0x7f && code <= 0x9f) || code == 0x61c ||
         (code >= 0x2028 && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069) ||
         (code >= 0xd800 && code <= 0xdfff);
}

std::string escaped(std::uint32_t code) {
  std::array<char, 16> buffer{};
  switch (code) {
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    default:
      std::snprintf(buffer.data(), buffer.size(), code < 0x100 ? "\\x%02x" : "\\u%04x", code);
      return buffer.data();
  }
}

struct Unit {
  std::string_view name;
  std::uint64_t bytes;
};
constexpr std::array units{Unit{"", 1},          Unit{"b", 1},          Unit{"k", 1024},
                           Unit{"kib", 1024},    Unit{"kb", 1000},      Unit{"m", 1 << 20},
                           Unit{"mib", 1 << 20}, Unit{"mb", 1000000},   Unit{"g", 1 << 30},
                           Unit{"gib", 1 << 30}, Unit{"gb", 1000000000}};
constexpr std::uint64_t largest_size = std::uint64_t{1} << 50;

std::string_view digits_of(std::string_view& text) {
  std::size_t count = 0;
  while (count < text.size() && text[count] >= '0' && text[count] <= '9') ++count;
  const std::string_view digits = text.substr(0, count);
  text.remove_prefix(count);
  return digits;
}

void skip_spaces(std::string_view& text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
}

[[noreturn]] void fail_size(std::string_view text) {
  fail("'", plain(text), "' is not a size: write it as 6MiB, 6MB, 512KiB or 6291456.");
}

}  // namespace

std::string fixed(double value, int digits) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.*f", digits, value);
  return buffer.data();
}

std::string format_bytes(double size) {
  if (std::abs(size) < kibi) return fixed(size, 0) + " B";
  for (const char* const unit : {"KiB", "MiB", "GiB"}) {
    size /= kibi;
    if (std::abs(size) < kibi || unit[0] == 'G')
      return fixed(size, std::abs(size) < 100 ? 1 : 0) + " " + unit;
  }
  return {};
}

std::string format_seconds(double seconds) {
  if (seconds >= 86400) return three_digits(seconds / 86400) + " days";
  if (seconds >= 3600) return three_digits(seconds / 3600) + " h";
  if (seconds >= 60) return three_digits(seconds / 60) + " min";
  return three_digits(seconds) + " s";
}

std::string percent(double share) { return std::isnan(share) ? "–" : fixed(100 * share, 1) + " %"; }

std::string grouped(std::uint64_t number) {
  std::string text = std::to_string(number);
  for (std::size_t place = text.size(); place > 3;) text.insert(place -= 3, ",");
  return text;
}

std::uint64_t parse_bytes(std::string_view text) {
  std::string_view rest = text;
  skip_spaces(rest);
  const std::string_view whole = digits_of(rest);
  std::string_view part;
  if (rest.starts_with('.')) {
    rest.remove_prefix(1);
    part = digits_of(rest);
    if (part.empty()) fail_size(text);
  }
  skip_spaces(rest);
  std::string name;
  while (!rest.empty() && rest.front() != ' ') {
    name += static_cast<char>(rest.front() >= 'A' && rest.front() <= 'Z' ? rest.front() + 32 : rest.front());
    rest.remove_prefix(1);
  }
  skip_spaces(rest);
  if (whole.empty() || !rest.empty() || whole.size() > 16 || part.size() > 9) fail_size(text);
  for (const Unit& unit : units) {
    if (unit.name != name) continue;
    std::uint64_t bytes = std::stoull(std::string(whole));
    if (bytes <= largest_size / unit.bytes) {
      bytes *= unit.bytes;
      std::uint64_t below = 1;
      for (std::size_t i = 0; i < part.size(); ++i) below *= 10;
      if (!part.empty()) bytes += std::stoull(std::string(part)) * unit.bytes / below;
      if (bytes > 0 && bytes <= largest_size) return bytes;
    }
    fail("a size must lie between 1 byte and 1 PiB, not ", plain(text), ".");
  }
  fail_size(text);
}

std::uint32_t take_code_point(std::string_view text, std::size_t& place) {
  const auto byte = [&](std::size_t at) { return static_cast<unsigned char>(text[at]); };
  const unsigned first = byte(place++);
  if (first < 0x80) return first;
  const int more = first >= 0xf5 ? 0 : first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : first >= 0xc2 ? 1 : 0;
  std::uint32_t code = first & (0x3fu >> more);
  for (int i = 0; i < more; ++i) {
    const std::size_t at = place + static_cast<std::size_t>(i);
    if (at >= text.size() || (byte(at) & 0xc0u) != 0x80) return 0xdc00 + first;
    code = code << 6 | (byte(at) & 0x3fu);
  }
  constexpr std::array<std::uint32_t, 4> least{0, 0x80, 0x800, 0x10000};
  const bool surrogate = code >= 0xd800 && code <= 0xdfff;
  if (more == 0 || code < least[static_cast<std::size_t>(more)] || code > 0x10ffff || surrogate)
    return 0xdc00 + first;
  place += static_cast<std::size_t>(more);
  return code;
}

bool before(std::string_view one, std::string_view other) {
  std::size_t here = 0, there = 0;
  while (here < one.size() && there < other.size()) {
    const std::uint32_t left = take_code_point(one, here), right = take_code_point(other, there);
    if (left != right) return left < right;
  }
  return here >= one.size() && there < other.size();
}

std::string plain(std::string_view text) {
  std::string made;
  for (std::size_t place = 0; place < text.size();) {
    const std::size_t begin = place;
    const std::uint32_t code = take_code_point(text, place);
    made += acts(code) ? escaped(code) : std::string(text.substr(begin, place - begin));
  }
  return made;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (std::size_t i = 0; i < names.size() && i < most_named; ++i) text += (i == 0 ? "" : ", ") + names[i];
  return names.size() <= most_named ? text : text + ", … (" + std::to_string(names.size()) + " in all)";
}

std::string shell_word(std::string_view text) {
  constexpr std::string_view safe =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_";
  const std::string word = (text.starts_with('-') ? "./" : "") + std::string(text);
  if (!word.empty() && word.find_first_not_of(safe) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char letter : word) quoted += letter == '\'' ? std::string("'\"'\"'") : std::string(1, letter);
  return quoted + "'";
}

void say(std::string_view sentence) { Progress::line(plain(sentence)); }

}  // namespace edge_bcs::app
