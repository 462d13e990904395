#include "app/value.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "app/text.h"

namespace edge_bcs::app {

namespace {

// Decimal exponents from which on Python writes one.
constexpr int least_plain = -4, most_plain = 16;

void append_escape(std::string& into, std::uint32_t code) {
  std::array<char, 8> escape{};
  std::snprintf(escape.data(), escape.size(), "\\u%04x", code & 0xffff);
  into += escape.data();
}

void append_quoted(std::string& into, std::string_view text) {
  into += '"';
  for (std::size_t place = 0; place < text.size();) {
    const std::uint32_t code = take_code_point(text, place);
    constexpr std::string_view special = "\"\\\n\r\t\b\f", letters = "\"\\nrtbf";
    const std::size_t found = code < 0x80 ? special.find(static_cast<char>(code)) : std::string_view::npos;
    if (found != std::string_view::npos) {
      into += '\\';
      into += letters[found];
    } else if (code >= 0x20 && code < 0x7f) {
      into += static_cast<char>(code);
    } else if (code < 0x10000) {
      append_escape(into, code);
    } else {
      append_escape(into, 0xd800 + ((code - 0x10000) >> 10));
      append_escape(into, 0xdc00 + ((code - 0x10000) & 0x3ff));
    }
  }
  into += '"';
}

}  // namespace

std::string written(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  std::array<char, 32> buffer{};
  // The fewest digits that mean this number: d.ddde±xx.
  const auto end =
      std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, std::chars_format::scientific).ptr;
  const std::string_view whole(buffer.data(), static_cast<std::size_t>(end - buffer.data()));
  const std::size_t mark = whole.find('e');
  const int exponent = std::atoi(std::string(whole.substr(mark + 1)).c_str());
  const bool negative = whole[0] == '-';
  std::string digits;
  for (const char letter : whole.substr(negative ? 1 : 0, mark - (negative ? 1 : 0)))
    if (letter != '.') digits += letter;
  std::string text = negative ? "-" : "";
  const auto count = static_cast<int>(digits.size());
  if (exponent < least_plain || exponent >= most_plain) {
    text += digits.substr(0, 1);
    if (count > 1) text += "." + digits.substr(1);
    text += exponent < 0 ? "e-" : "e+";
    text += (std::abs(exponent) < 10 ? "0" : "") + std::to_string(std::abs(exponent));
  } else if (exponent < 0) {
    text += "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  } else {
    const auto before = static_cast<std::size_t>(exponent) + 1;
    if (digits.size() < before) digits.resize(before, '0');
    text += digits.substr(0, before) + "." + (digits.size() > before ? digits.substr(before) : "0");
  }
  return text;
}

Value::Value(double value) : content_(Written{written(value)}) {}

Value::Value(const Json& read) {
  switch (read.kind()) {
    case Json::Kind::null:
      break;
    case Json::Kind::boolean:
      content_ = read.text() == "true";
      break;
    case Json::Kind::number:
      content_ = Written{read.text()};
      break;
    case Json::Kind::text:
      content_ = read.text();
      break;
    case Json::Kind::list: {
      List list;
      for (const Json& item : read.items()) list.emplace_back(item);
      content_ = std::move(list);
      break;
    }
    case Json::Kind::object: {
      Object object;
      for (std::size_t i = 0; i < read.items().size(); ++i)
        object.emplace_back(read.names()[i], Value(read.items()[i]));
      content_ = std::move(object);
      break;
    }
  }
}

std::string Value::dump() const { return dump(-1); }

std::string Value::dump(int indent) const {
  std::string text;
  write(text, indent, 0);
  return text;
}

void Value::write(std::string& into, int indent, int depth) const {
  const auto new_line = [&](int level) {
    if (indent < 0) return;
    into += '\n';
    into.append(static_cast<std::size_t>(indent * level), ' ');
  };
  const auto between = [&](bool first) {
    if (!first) into += indent < 0 ? ", " : ",";
    new_line(depth + 1);
  };
  if (is_null()) {
    into += "null";
  } else if (const bool* const truth = std::get_if<bool>(&content_)) {
    into += *truth ? "true" : "false";
  } else if (const Written* const number = std::get_if<Written>(&content_)) {
    into += number->digits;
  } else if (const std::string* const text = std::get_if<std::string>(&content_)) {
    append_quoted(into, *text);
  } else if (const List* const list = std::get_if<List>(&content_)) {
    into += '[';
    for (const Value& item : *list) {
      between(&item == list->data());
      item.write(into, indent, depth + 1);
    }
    if (!list->empty()) new_line(depth);
    into += ']';
  } else if (const Object* const object = std::get_if<Object>(&content_)) {
    into += '{';
    for (const auto& member : *object) {
      between(&member == object->data());
      append_quoted(into, member.first);
      into += ": ";
      member.second.write(into, indent, depth + 1);
    }
    if (!object->empty()) new_line(depth);
    into += '}';
  }
}

Value& Value::operator[](std::string_view name) {
  if (is_null()) content_ = Object{};
  Object& object = std::get<Object>(content_);
  const auto found = std::ranges::find(object, name, &Object::value_type::first);
  if (found != object.end()) return found->second;
  return object.emplace_back(std::string(name), Value()).second;
}

const Value* Value::find(std::string_view name) const {
  const Object* const object = std::get_if<Object>(&content_);
  if (object == nullptr) return nullptr;
  const auto found = std::ranges::find(*object, name, &Object::value_type::first);
  return found == object->end() ? nullptr : &found->second;
}

void Value::erase(std::string_view name) {
  if (Object* const object = std::get_if<Object>(&content_))
    std::erase_if(*object, [&](const auto& member) { return member.first == name; });
}

double Value::number() const {
  const Written* const number = std::get_if<Written>(&content_);
  return number == nullptr ? 0 : std::strtod(number->digits.c_str(), nullptr);
}

std::string Value::text() const {
  const std::string* const text = std::get_if<std::string>(&content_);
  return text == nullptr ? std::string() : *text;
}

}  // namespace edge_bcs::app
