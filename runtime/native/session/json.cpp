#include "session/json.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "ops/op.h"

namespace edge_bcs {

namespace {

constexpr int deepest = 64;
constexpr std::size_t most_values = std::size_t{1} << 18;

// Reads the character at the beginning of `text` and takes it away; nothing if that is no UTF-8.
std::optional<char32_t> take_character(std::string_view& text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  std::size_t length = 1;
  char32_t code = first, least = 0;
  if (first >= 0x80) {
    if (first >= 0xf0 && first < 0xf5)
      length = 4, code = first & 0x07, least = 0x10000;
    else if (first >= 0xe0 && first < 0xf0)
      length = 3, code = first & 0x0f, least = 0x800;
    else if (first >= 0xc2 && first < 0xe0)
      length = 2, code = first & 0x1f, least = 0x80;
    else
      return {};
    if (text.size() < length) return {};
    for (std::size_t i = 1; i < length; ++i) {
      if ((byte(i) & 0xc0) != 0x80) return {};
      code = code << 6 | (byte(i) & 0x3f);
    }
    if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return {};
  }
  text.remove_prefix(length);
  return code;
}

void append_character(std::string& text, char32_t code) {
  const auto put = [&](char32_t bits) { text.push_back(static_cast<char>(bits)); };
  if (code < 0x80) return put(code);
  if (code < 0x800) return put(0xc0 | code >> 6), put(0x80 | (code & 0x3f));
  if (code < 0x10000)
    put(0xe0 | code >> 12);
  else
    put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f));
  put(0x80 | (code >> 6 & 0x3f));
  put(0x80 | (code & 0x3f));
}

bool acts(char32_t code) {
  return code < 0x20 || (code >= 0x7f && code <= 0x9f) || code == 0x061c ||
         (code >= 0x2028 && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
}

bool is_digit(char letter) { return letter >= '0' && letter <= '9'; }

}  // namespace

class JsonReader {
 public:
  explicit JsonReader(std::string_view source) : source_(source) {}

  Json all() {
    Json value = read(0);
    skip_space();
    require(at_ == source_.size(), "it goes on behind its end");
    return value;
  }

 private:
  char peek() const { return at_ < source_.size() ? source_[at_] : '\0'; }

  bool take(char wanted) {
    if (peek() != wanted || at_ == source_.size()) return false;
    ++at_;
    return true;
  }

  void skip_space() {
    while (at_ < source_.size() &&
           (source_[at_] == ' ' || source_[at_] == '\t' || source_[at_] == '\n' || source_[at_] == '\r'))
      ++at_;
  }

  Json read(int depth) {
    require(depth < deepest, "it is nested too deeply");
    require(++values_ <= most_values, "it holds too much");
    skip_space();
    Json value;
    value.begin_ = at_;
    switch (peek()) {
      case '{':
        read_object(value, depth);
        break;
      case '[':
        read_list(value, depth);
        break;
      case '"':
        value.kind_ = Json::Kind::text;
        value.text_ = read_text();
        break;
      default:
        read_word(value);
    }
    value.end_ = at_;
    return value;
  }

  void read_object(Json& value, int depth) {
    value.kind_ = Json::Kind::object;
    ++at_;
    skip_space();
    if (take('}')) return;
    do {
      skip_space();
      require(peek() == '"', "it is not valid JSON");
      value.names_.push_back(read_text());
      skip_space();
      require(take(':'), "it is not valid JSON");
      value.items_.push_back(read(depth + 1));
      skip_space();
    } while (take(','));
    require(take('}'), "it is not valid JSON");
    std::vector<std::string_view> sorted(value.names_.begin(), value.names_.end());
    std::ranges::sort(sorted);
    require(std::ranges::adjacent_find(sorted) == sorted.end(), "a name occurs twice in one object");
  }

  void read_list(Json& value, int depth) {
    value.kind_ = Json::Kind::list;
    ++at_;
    skip_space();
    if (take(']')) return;
    do {
      value.items_.push_back(read(depth + 1));
      skip_space();
    } while (take(','));
    require(take(']'), "it is not valid JSON");
  }

  std::string read_text() {
    std::string text;
    ++at_;
    for (;;) {
      require(at_ < source_.size(), "it is not valid JSON");
      if (take('"')) return text;
      if (take('\\')) {
        append_character(text, read_escape());
        continue;
      }
      std::string_view rest = source_.substr(at_);
      const auto code = take_character(rest);
      require(code && *code >= 0x20, "it is not valid JSON");
      const std::size_t end = source_.size() - rest.size();
      text.append(source_.substr(at_, end - at_));
      at_ = end;
    }
  }

  char32_t read_escape() {
    constexpr std::string_view letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
    require(at_ < source_.size(), "it is not valid JSON");
    const char letter = source_[at_++];
    if (letter != 'u') {
      const std::size_t found = letters.find(letter);
      require(found != std::string_view::npos, "it is not valid JSON");
      return static_cast<unsigned char>(meant[found]);
    }
    const char32_t high = read_code();
    if (high < 0xd800 || high >= 0xe000) return high;
    require(high < 0xdc00 && take('\\') && take('u'), "it holds half of a surrogate pair");
    const char32_t low = read_code();
    require(low >= 0xdc00 && low < 0xe000, "it holds half of a surrogate pair");
    return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
  }

  char32_t read_code() {
    require(source_.size() - at_ >= 4, "it is not valid JSON");
    std::uint16_t code = 0;
    const char* const first = source_.data() + at_;
    require(std::from_chars(first, first + 4, code, 16).ptr == first + 4, "it is not valid JSON");
    at_ += 4;
    return code;
  }

  // true, false, null or a number.
  void read_word(Json& value) {
    const std::size_t first = at_;
    constexpr std::string_view ends = " \t\n\r,:]}";
    while (at_ < source_.size() && ends.find(source_[at_]) == std::string_view::npos) ++at_;
    const std::string_view word = source_.substr(first, at_ - first);
    value.kind_ = word == "null"                      ? Json::Kind::null
                  : word == "true" || word == "false" ? Json::Kind::boolean
                                                      : Json::Kind::number;
    require(value.kind_ != Json::Kind::number || is_number(word), "it is not valid JSON");
    value.text_ = word;
  }

  static bool is_number(std::string_view word) {
    const auto digits = [&] {
      std::size_t count = 0;
      while (count < word.size() && is_digit(word[count])) ++count;
      const bool zero = count > 0 && word[0] == '0';
      word.remove_prefix(count);
      return std::pair(count, zero);
    };
    if (word.starts_with('-')) word.remove_prefix(1);
    const auto [count, zero] = digits();
    if (count == 0 || (zero && count > 1)) return false;
    if (word.starts_with('.')) {
      word.remove_prefix(1);
      if (digits().first == 0) return false;
    }
    if (word.starts_with('e') || word.starts_with('E')) {
      word.remove_prefix(1);
      if (word.starts_with('+') || word.starts_with('-')) word.remove_prefix(1);
      if (digits().first == 0) return false;
    }
    return word.empty();
  }

  std::string_view source_;
  std::size_t at_ = 0, values_ = 0;
};

Json Json::parse(std::string_view source) { return JsonReader(source).all(); }

std::optional<std::uint64_t> Json::whole() const {
  std::uint64_t value = 0;
  if (kind_ != Kind::number) return {};
  const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
  if (error != std::errc() || end != text_.data() + text_.size()) return {};
  return value;
}

std::optional<double> Json::number() const {
  double value = 0;
  if (kind_ != Kind::number) return {};
  const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
  if (error == std::errc::result_out_of_range)  // of numbers near 0, too, which nobody writes
    return std::numeric_limits<double>::infinity();
  return value;
}

const Json* Json::find(std::string_view name) const {
  for (std::size_t i = 0; i < names_.size(); ++i)
    if (names_[i] == name) return &items_[i];
  return nullptr;
}

bool same(const Json& one, const Json& other) {
  if (one.kind() != other.kind() || one.items().size() != other.items().size()) return false;
  if (one.kind() == Json::Kind::number) return one.whole() == other.whole() && one.number() == other.number();
  if (one.text() != other.text()) return false;
  for (std::size_t i = 0; i < one.items().size(); ++i) {
    const Json* const counterpart =
        one.kind() == Json::Kind::object ? other.find(one.names()[i]) : &other.items()[i];
    if (counterpart == nullptr || !same(one.items()[i], *counterpart)) return false;
  }
  return true;
}

bool acts_on_terminals(std::string_view text) {
  while (!text.empty()) {
    const auto code = take_character(text);
    if (!code || acts(*code)) return true;
  }
  return false;
}

bool is_utf8(std::string_view text) {
  while (!text.empty())
    if (!take_character(text)) return false;
  return true;
}

std::string shown(std::string_view text, std::size_t most) {
  std::string made;
  for (std::size_t count = 0; !text.empty(); ++count) {
    if (count == most) return made + "...";
    std::string_view rest = text;
    const auto code = take_character(rest);
    if (!code) rest = text.substr(1);
    if (!code || acts(*code))
      made.push_back('?');
    else
      made.append(text.substr(0, text.size() - rest.size()));
    text = rest;
  }
  return made;
}

}  // namespace edge_bcs
