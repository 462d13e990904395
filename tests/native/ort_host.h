// The little of ONNX Runtime that the operators of the library need: a table of functions behind its C ABI, tensors, and
// calls. With it operators run where there is no ONNX Runtime (tests/native, also for another processor under an
// emulator) and under a fuzzer (tests/fuzz), where each tensor must be a heap block of exactly its size and outputs have
// a budget.
//
//   ort_host::Library library("libedge_bcs_ops.so");
//   ort_host::Operator step(library.find("edge_bcs", "RewireStep"), {{{"size", std::int64_t{1000}}}});
//   step.run(call);   // throws ort_host::Failure with the operator's message
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "host/ort_abi.h"

// The library knows these only by pointer; here they are what this host makes of them.
namespace edge_bcs::ort {

struct Status {
  std::string message;
};

// A tensor.
struct Value {
  ElementType type = ElementType::float32;
  std::vector<std::int64_t> sizes;
  std::shared_ptr<std::byte[]> memory;  // that of an input, where an output continues it; null: not made yet

  Value() = default;
  Value(ElementType type, std::vector<std::int64_t> sizes) : type(type), sizes(std::move(sizes)) {}

  // Its size; none where that is more than `most` or a dimension is negative.
  std::optional<std::size_t> bytes_within(std::size_t most) const {
    std::size_t count = element_bytes(type);
    for (std::int64_t size : sizes) {
      if (size < 0 || (size > 0 && count > most / static_cast<std::size_t>(size))) return std::nullopt;
      count *= static_cast<std::size_t>(size);
    }
    return count;
  }
  std::size_t bytes() const { return bytes_within(std::numeric_limits<std::size_t>::max()).value(); }
  // A block of the heap of exactly its size, zeros or whatever is there.
  void allocate(bool zeros = true) {
    const std::size_t count = bytes();
    memory =
        zeros ? std::make_unique<std::byte[]>(count) : std::make_unique_for_overwrite<std::byte[]>(count);
  }
  std::byte* data() const { return memory.get(); }

  static std::size_t element_bytes(ElementType type) {
    switch (type) {
      case ElementType::uint8:
      case ElementType::boolean:
        return 1;
      case ElementType::uint16:
        return 2;
      case ElementType::int64:
        return 8;
      default:
        return 4;
    }
  }
};

struct ShapeInfo {
  const Value* value;
};

struct Env {};
struct MemoryInfo {};

struct CustomOpDomain {
  std::string name;
  std::vector<const CustomOp*> operators;
};

struct SessionOptions {
  std::vector<const CustomOpDomain*> domains;
};

struct KernelInfo {
  using Attribute =
      std::variant<std::int64_t, float, std::string, std::vector<std::int64_t>, std::vector<float>>;
  std::map<std::string, Attribute> attributes;
};

// One call of an operator.
struct KernelContext {
  std::vector<Value*> inputs;   // null: absent
  std::vector<Value*> outputs;  // null: not wanted; the others are made by the operator
  int threads = 1;
  bool in_place = true;  // whether an output that continues an input gets its memory
  std::size_t budget = std::numeric_limits<std::size_t>::max();  // bytes that outputs may still take
  const CustomOp* op = nullptr;                                  // set by Operator::run
};

}  // namespace edge_bcs::ort

namespace ort_host {

using namespace edge_bcs::ort;

// What an operator refused, in its words.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The library gives statuses back by `release_status`.
inline Status* error(const std::string& message) {
  return std::make_unique<Status>(Status{message}).release();
}

inline void check(Status* status) {
  const std::unique_ptr<Status> owned(status);
  if (owned != nullptr) throw Failure(owned->message);
}

// An attribute of type T, or null.
template <class T>
const T* attribute(const KernelInfo* info, const char* name) {
  const auto found = info->attributes.find(name);
  return found == info->attributes.end() ? nullptr : std::get_if<T>(&found->second);
}

template <class T>
Status* copy_attribute(const KernelInfo* info, const char* name, T* value) {
  const T* found = attribute<T>(info, name);
  if (found == nullptr) return error(std::string("no attribute ") + name);
  *value = *found;
  return nullptr;
}

// Text or a list, `count` elements of it: the first call, with no place to copy it to, asks for the size.
template <class T, class Element>
Status* copy_elements(const KernelInfo* info, const char* name, Element* to, std::size_t* size,
                      std::size_t more) {
  const T* found = attribute<T>(info, name);
  if (found == nullptr) return error(std::string("no attribute ") + name);
  const std::size_t count = found->size() + more;
  if (to != nullptr && *size < count) return error(std::string("too little room for ") + name);
  if (to != nullptr) std::copy_n(found->data(), count, to);
  *size = count;
  return nullptr;
}

// Which input an output continues, or null.
inline const Value* continued(const KernelContext& call, std::size_t output) {
  int *from = nullptr, *to = nullptr;
  const std::size_t count = call.op->get_alias_map(&from, &to);
  for (std::size_t i = 0; i < count; ++i)
    if (to[i] == static_cast<int>(output) && static_cast<std::size_t>(from[i]) < call.inputs.size())
      return call.inputs[static_cast<std::size_t>(from[i])];
  return nullptr;
}

// Makes an output, once, in the memory of the input that it continues or in its own.
inline Status* make_output(KernelContext& call, std::size_t index, std::vector<std::int64_t> sizes,
                           Value** made) {
  *made = call.outputs.at(index);
  if (*made == nullptr) return nullptr;
  Value& value = **made;
  if (value.memory != nullptr) return value.sizes == sizes ? nullptr : error("an output has two shapes");
  value.type = call.op->get_output_type(call.op, index);
  value.sizes = std::move(sizes);
  const Value* const source = continued(call, index);
  if (call.in_place && source != nullptr && source->sizes == value.sizes && source->type == value.type) {
    value.memory = source->memory;
    return nullptr;
  }
  const auto bytes = value.bytes_within(call.budget);
  if (!bytes || *bytes > call.budget) return error("the outputs are over the budget");
  call.budget -= *bytes;
  value.allocate(false);
  return nullptr;
}

// One thread goes backwards: the result must not depend on the order.
inline void run_parallel(int threads, void (*body)(void*, std::size_t), std::size_t total, void* data) {
  if (threads <= 1) {
    for (std::size_t i = total; i > 0; --i) body(data, i - 1);
    return;
  }
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t i = next++; i < total; i = next++) body(data, i);
  };
  std::vector<std::jthread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
}

// The table of functions that the library reads, by slot number (host/ort_abi.h).
inline const void* const* api_table() {
  static std::array<const void*, 320> table{};
  const auto set = [](std::size_t slot, auto* function) {
    table[slot] = reinterpret_cast<const void*>(function);
  };
  set(0, +[](ErrorCode, const char* message) { return error(message); });
  set(2, +[](const Status* status) { return status->message.c_str(); });
  set(3, +[](LoggingLevel, const char*, Env** env) -> Status* {
    static Env one;
    *env = &one;
    return nullptr;
  });
  set(26, +[](const char* name, CustomOpDomain** domain) -> Status* {
    static std::deque<CustomOpDomain> all;  // the library uses them for good
    *domain = &all.emplace_back(CustomOpDomain{name, {}});
    return nullptr;
  });
  set(27, +[](CustomOpDomain* domain, const CustomOp* op) -> Status* {
    domain->operators.push_back(op);
    return nullptr;
  });
  set(28, +[](SessionOptions* options, CustomOpDomain* domain) -> Status* {
    options->domains.push_back(domain);
    return nullptr;
  });
  set(51, +[](Value* value, void** data) -> Status* {
    *data = value->data();
    return nullptr;
  });
  set(60, +[](const ShapeInfo* info, ElementType* type) -> Status* {
    *type = info->value->type;
    return nullptr;
  });
  set(61, +[](const ShapeInfo* info, std::size_t* rank) -> Status* {
    *rank = info->value->sizes.size();
    return nullptr;
  });
  set(62, +[](const ShapeInfo* info, std::int64_t* sizes, std::size_t rank) -> Status* {
    std::copy_n(info->value->sizes.begin(), std::min(rank, info->value->sizes.size()), sizes);
    return nullptr;
  });
  set(65, +[](const Value* value, ShapeInfo** info) -> Status* {
    *info = std::make_unique<ShapeInfo>(ShapeInfo{value}).release();
    return nullptr;
  });
  set(69, +[](AllocatorType, MemoryType, MemoryInfo** info) -> Status* {
    static MemoryInfo one;
    *info = &one;
    return nullptr;
  });
  set(85, +copy_attribute<float>);
  set(86, +copy_attribute<std::int64_t>);
  set(87, +[](const KernelInfo* info, const char* name, char* text, std::size_t* size) {
    return copy_elements<std::string>(info, name, text, size, 1);  // and the zero at its end
  });
  set(88, +[](const KernelContext* call, std::size_t* count) -> Status* {
    *count = call->inputs.size();
    return nullptr;
  });
  set(89, +[](const KernelContext* call, std::size_t* count) -> Status* {
    *count = call->outputs.size();
    return nullptr;
  });
  set(90, +[](const KernelContext* call, std::size_t index, const Value** value) -> Status* {
    *value = call->inputs.at(index);
    return nullptr;
  });
  set(91, +[](KernelContext* call, std::size_t index, const std::int64_t* sizes, std::size_t rank,
              Value** value) { return make_output(*call, index, {sizes, sizes + rank}, value); });
  set(93, +[](Status* status) { std::unique_ptr<Status>(status).reset(); });
  set(99, +[](ShapeInfo* info) { std::unique_ptr<ShapeInfo>(info).reset(); });
  set(162, +[](const KernelInfo* info, const char* name, float* values, std::size_t* size) {
    return copy_elements<std::vector<float>>(info, name, values, size, 0);
  });
  set(163, +[](const KernelInfo* info, const char* name, std::int64_t* values, std::size_t* size) {
    return copy_elements<std::vector<std::int64_t>>(info, name, values, size, 0);
  });
  set(176, +[](Env*, Allocator*) -> Status* { return nullptr; });
  set(274,
      +[](const KernelContext* call, void (*body)(void*, std::size_t), std::size_t total, std::size_t,
          void* data) -> Status* {
    run_parallel(call->threads, body, total, data);
    return nullptr;
  });
  return table.data();
}

// The operators that a library registers.
class Operators {
 public:
  explicit Operators(Status* (*register_custom_ops)(SessionOptions*, const ApiBase*)) {
    static const ApiBase base{[](std::uint32_t) -> const void* { return api_table(); },
                              [] { return "none"; }};
    check(register_custom_ops(&options_, &base));
  }

  // Null if there is none of this name.
  const CustomOp* find(const std::string& domain, const std::string& name) const {
    for (const CustomOpDomain* one : options_.domains)
      for (const CustomOp* op : one->operators)
        if (one->name == domain && op->get_name(op) == name) return op;
    return nullptr;
  }

 private:
  SessionOptions options_;
};

// The operator library, loaded from a file.
class Library {
 public:
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    function<void(int)>("edge_bcs_provide_training_operators")(1);
    operators_.emplace(function<Status*(SessionOptions*, const ApiBase*)>("RegisterCustomOps"));
  }

  template <class Function>
  Function* function(const char* name) const {
    void* const found = dlsym(handle_, name);
    if (found == nullptr) throw std::runtime_error(std::string("the library has no ") + name);
    return reinterpret_cast<Function*>(found);
  }

  const CustomOp* find(const std::string& domain, const std::string& name) const {
    const CustomOp* const found = operators_->find(domain, name);
    if (found == nullptr) throw std::runtime_error("the library has no " + domain + "::" + name);
    return found;
  }

 private:
  void* handle_;
  std::optional<Operators> operators_;
};

// An operator with its attributes.
class Operator {
 public:
  Operator(const CustomOp* op, const KernelInfo& attributes) : op_(op) {
    check(op->create_kernel_v2(op, api_table(), &attributes, &kernel_));
  }
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;
  ~Operator() { op_->destroy(kernel_); }

  void run(KernelContext call) const {
    call.op = op_;
    check(op_->compute_v2(kernel_, &call));
  }

 private:
  const CustomOp* op_;
  void* kernel_ = nullptr;
};

}  // namespace ort_host
