#include "ops/op.h"

namespace edge_bcs {

namespace {

const char* type_name(ElementType type) {
  switch (type) {
    case float32:
      return "float32";
    case uint8:
      return "uint8";
    case int32:
      return "int32";
    case int64:
      return "int64";
    case boolean:
      return "bool";
    default:
      return "another type";
  }
}

}  // namespace

std::string Shape::text() const {
  std::string text = "[";
  for (std::size_t axis = 0; axis < rank_; ++axis) text += (axis ? ", " : "") + std::to_string(sizes_[axis]);
  return text + "]";
}

std::int64_t Attributes::integer(const char* name) const {
  const auto found = source_.integer(name);
  require(found.has_value(), "the integer attribute ", name, " is missing");
  return *found;
}

std::int64_t Attributes::integer(const char* name, std::int64_t otherwise) const {
  return source_.integer(name).value_or(otherwise);
}

std::int64_t Attributes::integer_in(const char* name, std::int64_t low, std::int64_t high) const {
  const std::int64_t value = integer(name);
  require(low <= value && value <= high, "attribute ", name, " is ", value, ", not in [", low, ", ", high,
          "]");
  return value;
}

std::int64_t Attributes::integer_in(const char* name, std::int64_t low, std::int64_t high,
                                    std::int64_t otherwise) const {
  const std::int64_t value = integer(name, otherwise);
  require(low <= value && value <= high, "attribute ", name, " is ", value, ", not in [", low, ", ", high,
          "]");
  return value;
}

bool Attributes::flag(const char* name, bool otherwise) const {
  return integer_in(name, 0, 1, otherwise) != 0;
}

float Attributes::real(const char* name) const {
  const auto found = source_.real(name);
  require(found.has_value(), "the float attribute ", name, " is missing");
  return *found;
}

float Attributes::real(const char* name, float otherwise) const {
  return source_.real(name).value_or(otherwise);
}

std::vector<std::int64_t> Attributes::integers(const char* name) const {
  auto found = source_.integers(name);
  require(found.has_value(), "the attribute ", name, " (a list of integers) is missing");
  return *std::move(found);
}

std::vector<std::int64_t> Attributes::integers(const char* name,
                                               const std::vector<std::int64_t>& otherwise) const {
  return source_.integers(name).value_or(otherwise);
}

std::vector<float> Attributes::reals(const char* name) const {
  return source_.reals(name).value_or(std::vector<float>{});
}

std::string Attributes::text(const char* name, const std::string& otherwise) const {
  return source_.text(name).value_or(otherwise);
}

RawTensor Context::raw_input(std::size_t index, ElementType type) const {
  const RawTensor found = index < input_count() ? call_.input(index) : RawTensor{};
  const Port& port = input_port(index);
  if (!found.present) {
    require(port.use.optional, "the input ", port.name, " is missing");
    return found;
  }
  require(found.type == type, "the input ", port.name, " is ", type_name(found.type), ", not ",
          type_name(type));
  return found;
}

RawTensor Context::raw_output(std::size_t index, const Shape& shape) const {
  const RawTensor found = call_.output(index, shape);
  require(found.present || outputs_[index].use.optional, "the output ", outputs_[index].name, " is missing");
  return found;
}

namespace {

std::vector<Declaration>& registry(Domain domain) {
  static std::array<std::vector<Declaration>, 2> declarations;
  return declarations[static_cast<std::size_t>(domain)];
}

}  // namespace

void* create(const Declaration& declaration, const Attributes& attributes) {
  require(declaration.half || !attributes.half(), "it has no half-precision form");
  return declaration.create(attributes);
}

const std::vector<Declaration>& operators(Domain domain) { return registry(domain); }

void add_operator(const Declaration& declaration, Domain domain) { registry(domain).push_back(declaration); }

}  // namespace edge_bcs
