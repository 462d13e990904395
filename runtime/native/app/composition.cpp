#include "app/composition.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "app/composition_tables.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

using Code = std::uint32_t;

// Syllables of Hangul, by rule.
constexpr Code syllables = 0xac00, leads = 0x1100, vowels = 0x1161, tails = 0x11a7, lead_count = 19,
               vowel_count = 21, tail_count = 28, syllable_count = lead_count * vowel_count * tail_count;

struct Letter {
  Code code;
  Code order;  // of marks that combine; 0: it begins anew
};

Code order_of(Code code) {
  const std::span table(classes_table);
  for (std::size_t i = 0; i < table.size(); i += 3)
    if (code >= table[i] && code <= table[i + 1]) return table[i + 2];
  return 0;
}

// The place of what a code point is decomposed into; null if it is not.
const Code* entry_of(Code code) {
  std::size_t low = 0, high = std::size(decomposed_table) / 3;
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (decomposed_table[3 * middle] < code)
      low = middle + 1;
    else
      high = middle;
  }
  return 3 * low < std::size(decomposed_table) && decomposed_table[3 * low] == code
             ? &decomposed_table[3 * low]
             : nullptr;
}

void decompose(Code code, std::vector<Letter>& into) {
  if (code - syllables < syllable_count) {
    const Code place = code - syllables;
    into.push_back({leads + place / (vowel_count * tail_count), 0});
    into.push_back({vowels + place / tail_count % vowel_count, 0});
    if (place % tail_count != 0) into.push_back({tails + place % tail_count, 0});
  } else if (const Code* const entry = entry_of(code)) {
    decompose(entry[1], into);
    if (entry[2] != 0) decompose(entry[2], into);
  } else {
    into.push_back({code, order_of(code)});
  }
}

// What two are composed to; 0 if to nothing.
Code together(Code first, Code second) {
  if (first - leads < lead_count && second - vowels < vowel_count)
    return syllables + ((first - leads) * vowel_count + second - vowels) * tail_count;
  if (first - syllables < syllable_count && (first - syllables) % tail_count == 0 &&
      second - tails - 1 < tail_count - 1)
    return first + second - tails;
  static const std::map<std::pair<Code, Code>, Code> pairs = [] {
    std::map<std::pair<Code, Code>, Code> made;
    for (const Code code : composed_table) {
      const Code* const entry = entry_of(code);
      made.emplace(std::pair(entry[1], entry[2]), code);
    }
    return made;
  }();
  const auto found = pairs.find({first, second});
  return found == pairs.end() ? 0 : found->second;
}

void add(std::string& text, Code code) {
  const auto byte = [&](Code bits) { text += static_cast<char>(bits); };
  if (code < 0x80) return byte(code);
  if (code < 0x800) {
    byte(0xc0 | code >> 6);
  } else {
    if (code < 0x10000) {
      byte(0xe0 | code >> 12);
    } else {
      byte(0xf0 | code >> 18);
      byte(0x80 | (code >> 12 & 0x3f));
    }
    byte(0x80 | (code >> 6 & 0x3f));
  }
  byte(0x80 | (code & 0x3f));
}

}  // namespace

std::string composed(std::string_view text) {
  if (std::ranges::all_of(text, [](char letter) { return static_cast<unsigned char>(letter) < 0x80; }))
    return std::string(text);
  std::vector<Letter> letters;
  for (std::size_t at = 0; at < text.size();) decompose(take_code_point(text, at), letters);
  for (auto begin = letters.begin(); begin != letters.end();) {
    auto end = begin + 1;
    while (end != letters.end() && end->order != 0) ++end;
    std::ranges::stable_sort(begin->order == 0 ? begin + 1 : begin, end, {}, &Letter::order);
    begin = end;
  }
  std::vector<Letter> made;
  std::size_t start = 0;  // of the letter that marks are composed with
  bool started = false;
  for (const Letter& letter : letters) {
    const bool adjacent = made.size() == start + 1;
    const bool open =
        started && (adjacent || made.back().order < letter.order) && (adjacent || letter.order != 0);
    if (const Code whole = open ? together(made[start].code, letter.code) : 0; whole != 0) {
      made[start].code = whole;
      continue;
    }
    made.push_back(letter);
    if (letter.order == 0) start = made.size() - 1, started = true;
  }
  std::string result;
  for (const Letter& letter : made) add(result, letter.code);
  return result;
}

}  // namespace edge_bcs::app
