// The parts of sentences.

#include <array>
#include <cstdio>

#include "ops/op.h"

namespace edge_bcs {

void append(std::string& text, std::string_view part) { text += part; }
void append(std::string& text, char part) { text += part; }
void append_whole(std::string& text, std::int64_t part) { text += std::to_string(part); }
void append_whole(std::string& text, std::uint64_t part) { text += std::to_string(part); }
void append(std::string& text, double part) {
  std::array<char, 32> digits{};
  std::snprintf(digits.data(), digits.size(), "%g", part);
  text += digits.data();
}

}  // namespace edge_bcs
