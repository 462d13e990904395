// What is told to people: numbers as they read them, and sentences on standard error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ops/op.h"

namespace edge_bcs::app {

// "11.3 MiB"
std::string format_bytes(double size);
// "9.3 min"
std::string format_seconds(double seconds);
// 0.5 as "50.0 %"
std::string percent(double share);
// 1234 as "1,234"
std::string grouped(std::uint64_t number);
// With so many digits behind the point.
std::string fixed(double value, int digits);

// Bytes that "6MiB", "6MB" or "6291456" names. Throws Error.
std::uint64_t parse_bytes(std::string_view text);

// A text as one line that does not act on a terminal.
std::string plain(std::string_view text);
// The names in one sentence; of many the first.
std::string listed(const std::vector<std::string>& names);
// A word as a shell takes it.
std::string shell_word(std::string_view text);

// Writes a line to standard error, in the place of a progress line.
void say(std::string_view sentence);

// The code point at `place` of UTF-8, which moves behind it; a byte that is none is half of a surrogate pair, as in Python.
std::uint32_t take_code_point(std::string_view text, std::size_t& place);
// Compares names as Python compares text: by code point, and bytes that are no UTF-8 as halves of surrogate pairs.
bool before(std::string_view one, std::string_view other);

}  // namespace edge_bcs::app
