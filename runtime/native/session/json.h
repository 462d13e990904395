// JSON (RFC 8259), read strictly from a file that nobody has checked: no name twice in an object, no number that is none,
// nothing but UTF-8, and bounds on depth and on how much there is.
//
// A reader of our own: it has two hundred lines, a build needs nothing more for it, and it is as strict as manifests and
// states must be, which the usual ones are not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace edge_bcs {

class Json {
 public:
  enum class Kind { null, boolean, number, text, list, object };

  // Throws Error, in one sentence without a subject ("it is …"), if `source` is no JSON.
  static Json parse(std::string_view source);

  Kind kind() const { return kind_; }
  // The value as it stands in the source.
  std::size_t begin() const { return begin_; }
  std::size_t end() const { return end_; }

  // A text; a number or a boolean as it is written.
  const std::string& text() const { return text_; }
  // Nothing if it is no whole number, or beyond the type.
  std::optional<std::uint64_t> whole() const;
  // Nothing if it is no number; infinite where it is beyond double.
  std::optional<double> number() const;

  const std::vector<Json>& items() const { return items_; }
  // Names of an object's members, in the order of `items`.
  const std::vector<std::string>& names() const { return names_; }
  // Member of an object; null if there is none of that name.
  const Json* find(std::string_view name) const;

 private:
  friend class JsonReader;

  Kind kind_ = Kind::null;
  std::size_t begin_ = 0, end_ = 0;
  std::string text_;
  std::vector<Json> items_;
  std::vector<std::string> names_;
};

// Whether two values are the same; members of objects in any order.
bool same(const Json& one, const Json& other);

// Whether UTF-8 text has a character that acts on a terminal that shows it: edge_bcs/core/text.py says which.
bool acts_on_terminals(std::string_view text);

// Whether bytes are UTF-8.
bool is_utf8(std::string_view text);

// The text with such characters, and what is no UTF-8, replaced by '?'.
std::string shown(std::string_view text, std::size_t most = 60);

}  // namespace edge_bcs
