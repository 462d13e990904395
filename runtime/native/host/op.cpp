#include "ops/op.h"

#include <algorithm>
#include <exception>

namespace edge_bcs {

namespace {

// A status in which the caller only wants to know whether it is an error.
bool succeeded(ort::Status* status) {
  if (status == nullptr) return true;
  ort::api.release_status(status);
  return false;
}

const char* type_name(ort::ElementType type) {
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
  std::ostringstream out;
  out << '[';
  for (std::size_t axis = 0; axis < rank_; ++axis) out << (axis ? ", " : "") << sizes_[axis];
  out << ']';
  return out.str();
}

std::int64_t Attributes::integer(const char* name) const {
  std::int64_t value = 0;
  require(succeeded(ort::api.attribute_int(info_, name, &value)), "the integer attribute ", name,
          " is missing");
  return value;
}

std::int64_t Attributes::integer(const char* name, std::int64_t otherwise) const {
  std::int64_t value = 0;
  return succeeded(ort::api.attribute_int(info_, name, &value)) ? value : otherwise;
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
  float value = 0;
  require(succeeded(ort::api.attribute_float(info_, name, &value)), "the float attribute ", name,
          " is missing");
  return value;
}

float Attributes::real(const char* name, float otherwise) const {
  float value = 0;
  return succeeded(ort::api.attribute_float(info_, name, &value)) ? value : otherwise;
}

std::vector<std::int64_t> Attributes::integers(const char* name) const {
  std::size_t size = 0;
  require(succeeded(ort::api.attribute_ints(info_, name, nullptr, &size)), "the attribute ", name,
          " (a list of integers) is missing");
  std::vector<std::int64_t> values(size);
  if (size > 0) detail::check(ort::api.attribute_ints(info_, name, values.data(), &size));
  return values;
}

std::vector<std::int64_t> Attributes::integers(const char* name,
                                               const std::vector<std::int64_t>& otherwise) const {
  std::size_t size = 0;
  return succeeded(ort::api.attribute_ints(info_, name, nullptr, &size)) ? integers(name) : otherwise;
}

std::vector<float> Attributes::reals(const char* name) const {
  std::size_t size = 0;
  if (!succeeded(ort::api.attribute_floats(info_, name, nullptr, &size))) return {};
  std::vector<float> values(size);
  if (size > 0) detail::check(ort::api.attribute_floats(info_, name, values.data(), &size));
  return values;
}

std::string Attributes::text(const char* name, const std::string& otherwise) const {
  std::size_t size = 0;
  if (!succeeded(ort::api.attribute_string(info_, name, nullptr, &size)) || size == 0) return otherwise;
  std::string value(size, '\0');
  detail::check(ort::api.attribute_string(info_, name, value.data(), &size));
  value.resize(size - 1);  // the size counts the terminating zero
  return value;
}

std::size_t Context::input_count() const {
  std::size_t count = 0;
  detail::check(ort::api.input_count(context_, &count));
  return count;
}

Context::Raw Context::raw_input(std::size_t index, ort::ElementType type) const {
  const ort::Value* value = nullptr;
  if (index < input_count()) detail::check(ort::api.get_input(context_, index, &value));
  const Port& port = input_port(index);
  if (value == nullptr) {
    require(port.use.optional, "the input ", port.name, " is missing");
    return {};
  }
  ort::ShapeInfo* made = nullptr;
  detail::check(ort::api.get_type_and_shape(value, &made));
  const std::unique_ptr<ort::ShapeInfo, void (*)(ort::ShapeInfo*)> info(made, ort::api.release_shape_info);
  ort::ElementType actual{};
  detail::check(ort::api.get_element_type(info.get(), &actual));
  require(actual == type, "the input ", port.name, " is ", type_name(actual), ", not ", type_name(type));
  std::size_t rank = 0;
  detail::check(ort::api.get_rank(info.get(), &rank));
  std::array<std::int64_t, 8> sizes{};
  require(rank <= sizes.size(), "the input ", port.name, " has ", rank, " dimensions");
  detail::check(ort::api.get_dimensions(info.get(), sizes.data(), rank));
  Raw raw;
  for (std::size_t axis = 0; axis < rank; ++axis) raw.shape.append(sizes[axis]);
  // The interface gives data as mutable only; input() makes it const again.
  detail::check(ort::api.get_tensor_data(const_cast<ort::Value*>(value), &raw.data));
  raw.present = true;
  return raw;
}

Context::Raw Context::raw_output(std::size_t index, const Shape& shape) const {
  std::size_t count = 0;
  detail::check(ort::api.output_count(context_, &count));
  ort::Value* value = nullptr;
  if (index < count) detail::check(ort::api.get_output(context_, index, shape.data(), shape.rank(), &value));
  const Port& port = outputs_[index];
  if (value == nullptr) {
    require(port.use.optional, "the output ", port.name, " is missing");
    return {};
  }
  Raw raw;
  detail::check(ort::api.get_tensor_data(value, &raw.data));
  raw.shape = shape;
  raw.present = true;
  return raw;
}

void Context::run_parallel(void (*run)(void*, std::size_t), std::size_t count, void* data) const {
  // Few enough batches that handing them out costs little, enough of them that uneven work evens out.
  constexpr std::size_t batches = 64;
  detail::check(ort::api.parallel_for(context_, run, count, std::min(count, batches), data));
}

namespace detail {

void check(ort::Status* status) {
  if (status == nullptr) return;
  const std::unique_ptr<ort::Status, void (*)(ort::Status*)> owned(status, ort::api.release_status);
  throw Error(ort::api.get_error_message(status));
}

ort::Status* error_status(const char* name, const char* message) {
  return ort::api.create_status(ort::ErrorCode::fail, (std::string(name) + ": " + message).c_str());
}

}  // namespace detail

}  // namespace edge_bcs
