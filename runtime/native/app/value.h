// JSON that is written: the same text as Python's json.dumps gives, numbers included.
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "session/json.h"

namespace edge_bcs::app {

class Value {
 public:
  using List = std::vector<Value>;
  // In the order in which they were added.
  using Object = std::vector<std::pair<std::string, Value>>;

  Value() = default;
  Value(bool value) : content_(value) {}
  template <std::integral Number>
    requires(!std::same_as<Number, bool>)
  Value(Number value) : content_(Written{std::to_string(value)}) {}
  Value(double value);
  Value(std::string text) : content_(std::move(text)) {}
  Value(std::string_view text) : content_(std::string(text)) {}
  Value(const char* text) : content_(std::string(text)) {}
  Value(List list) : content_(std::move(list)) {}
  Value(Object object) : content_(std::move(object)) {}
  // What a file holds, numbers as they are written there.
  explicit Value(const Json& read);

  // On one line, or with `indent` spaces a level.
  std::string dump() const;
  std::string dump(int indent) const;

  // Of an object: the member of that name, which is made if need be; null if there is none.
  Value& operator[](std::string_view name);
  const Value* find(std::string_view name) const;
  void erase(std::string_view name);
  const Object& members() const { return std::get<Object>(content_); }
  const List& items() const { return std::get<List>(content_); }

  bool is_object() const { return std::holds_alternative<Object>(content_); }
  bool is_list() const { return std::holds_alternative<List>(content_); }
  bool is_text() const { return std::holds_alternative<std::string>(content_); }
  bool is_number() const { return std::holds_alternative<Written>(content_); }
  bool is_null() const { return std::holds_alternative<std::monostate>(content_); }
  // Of a number; 0 of anything else.
  double number() const;
  std::uint64_t whole() const { return static_cast<std::uint64_t>(number()); }
  bool truth() const { return std::holds_alternative<bool>(content_) && std::get<bool>(content_); }
  // Of a text; empty of anything else.
  std::string text() const;

 private:
  struct Written {
    std::string digits;
  };

  void write(std::string& into, int indent, int depth) const;

  std::variant<std::monostate, bool, Written, std::string, List, Object> content_;
};

// A double as Python writes it: "0.001", "1e-05", "2.0", "NaN".
std::string written(double value);

}  // namespace edge_bcs::app
