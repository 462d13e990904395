// The little of ONNX Runtime that one operator of the library needs, so that it runs where there is none: in a
// program for another processor, under an emulator.
//
//   ort_host::Library library("libedge_bcs_ops.so");
//   ort_host::Operator step(library, "RewireStep", {{"size", std::int64_t{1000}}});
//   step.run(inputs, outputs);   // throws ort_host::Failure with the operator's message
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "host/ort_abi.h"

// The library knows these only by pointer; here they are what this host makes of them.
namespace edge_bcs::ort {

struct Status {
  std::string message;
};

struct Value {
  ElementType type = ElementType::float32;
  std::vector<std::int64_t> sizes;
  std::byte* data = nullptr;  // in `memory`, or in that of an input that the output continues
  std::vector<std::byte> memory;

  std::size_t bytes() const {
    std::size_t count = element_bytes(type);
    for (std::int64_t size : sizes) count *= static_cast<std::size_t>(size);
    return count;
  }
  void allocate() {
    memory.resize(std::max<std::size_t>(1, bytes()));
    data = memory.data();
  }
  static std::size_t element_bytes(ElementType type) {
    switch (type) {
      case ElementType::float32:
      case ElementType::int32:
        return 4;
      case ElementType::uint16:
        return 2;
      case ElementType::int64:
        return 8;
      default:
        return 1;
    }
  }
};

struct ShapeInfo {
  const Value* value;
};

struct CustomOpDomain {
  std::string name;
  std::vector<const CustomOp*> operators;
};

struct SessionOptions {
  std::vector<const CustomOpDomain*> domains;
};

struct KernelInfo {
  using Attribute = std::variant<std::int64_t, float, std::string, std::vector<std::int64_t>>;
  std::map<std::string, Attribute> attributes;
};

struct KernelContext {
  const CustomOp* op;
  std::vector<Value*> inputs;   // null: absent
  std::vector<Value*> outputs;  // null: not wanted
  int threads;
};

}  // namespace edge_bcs::ort

namespace ort_host {

using namespace edge_bcs::ort;

// What an operator refused, in its words.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline Status* error(const std::string& message) { return std::make_unique<Status>(Status{message}).release(); }

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

// Which input an output continues, or -1.
inline int alias_of(const CustomOp* op, std::size_t output) {
  int *from = nullptr, *to = nullptr;
  const std::size_t count = op->get_alias_map(&from, &to);
  for (std::size_t i = 0; i < count; ++i)
    if (to[i] == static_cast<int>(output)) return from[i];
  return -1;
}

// The table of functions that the library reads, by slot number.
inline const void* const* api_table() {
  static std::array<const void*, 320> table{};
  const auto set = [](std::size_t slot, auto* function) { table[slot] = reinterpret_cast<const void*>(function); };
  set(0, +[](ErrorCode, const char* message) { return error(message); });
  set(2, +[](const Status* status) { return status->message.c_str(); });
  // As in ONNX Runtime up to 1.22: no environment for the library's allocator.
  set(3, +[](LoggingLevel, const char*, Env**) { return error("no environment"); });
  set(26, +[](const char* name, CustomOpDomain** domain) -> Status* {
    *domain = std::make_unique<CustomOpDomain>(CustomOpDomain{name, {}}).release();
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
    *data = value->data;
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
    std::copy_n(info->value->sizes.begin(), rank, sizes);
    return nullptr;
  });
  set(65, +[](const Value* value, ShapeInfo** info) -> Status* {
    *info = std::make_unique<ShapeInfo>(ShapeInfo{value}).release();
    return nullptr;
  });
  set(85, +copy_attribute<float>);
  set(86, +copy_attribute<std::int64_t>);
  set(87, +[](const KernelInfo* info, const char* name, char* text, std::size_t* size) -> Status* {
    const auto* found = attribute<std::string>(info, name);
    if (found == nullptr) return error(std::string("no attribute ") + name);
    if (text != nullptr) std::memcpy(text, found->c_str(), found->size() + 1);
    *size = found->size() + 1;
    return nullptr;
  });
  set(88, +[](const KernelContext* context, std::size_t* count) -> Status* {
    *count = context->inputs.size();
    return nullptr;
  });
  set(89, +[](const KernelContext* context, std::size_t* count) -> Status* {
    *count = context->outputs.size();
    return nullptr;
  });
  set(90, +[](const KernelContext* context, std::size_t index, const Value** value) -> Status* {
    *value = context->inputs[index];
    return nullptr;
  });
  set(91, +[](KernelContext* context, std::size_t index, const std::int64_t* sizes, std::size_t rank,
              Value** value) -> Status* {
    Value* const made = context->outputs[index];
    *value = made;
    if (made == nullptr) return nullptr;
    made->type = context->op->get_output_type(context->op, index);
    made->sizes.assign(sizes, sizes + rank);
    const int from = alias_of(context->op, index);
    if (from >= 0 && context->inputs[static_cast<std::size_t>(from)] != nullptr)
      made->data = context->inputs[static_cast<std::size_t>(from)]->data;
    else if (made->data == nullptr)
      made->allocate();
    return nullptr;
  });
  set(93, +[](Status* status) { std::unique_ptr<Status>(status).reset(); });
  set(99, +[](ShapeInfo* info) { std::unique_ptr<ShapeInfo>(info).reset(); });
  set(163, +[](const KernelInfo* info, const char* name, std::int64_t* values, std::size_t* size) -> Status* {
    const auto* found = attribute<std::vector<std::int64_t>>(info, name);
    if (found == nullptr) return error(std::string("no attribute ") + name);
    if (values != nullptr) std::copy(found->begin(), found->end(), values);
    *size = found->size();
    return nullptr;
  });
  set(274, +[](const KernelContext* context, void (*body)(void*, std::size_t), std::size_t total, std::size_t,
               void* data) -> Status* {
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
      for (std::size_t i = next++; i < total; i = next++) body(data, i);
    };
    std::vector<std::jthread> others;
    for (int i = 1; i < context->threads; ++i) others.emplace_back(work);
    work();
    return nullptr;
  });
  return table.data();
}

// The operator library, loaded.
class Library {
 public:
  explicit Library(const char* path) : handle_(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    function<void(int)>("edge_bcs_provide_training_operators")(1);
    static const ApiBase base{[](std::uint32_t) -> const void* { return api_table(); }, [] { return "none"; }};
    check(function<Status*(SessionOptions*, const ApiBase*)>("RegisterCustomOps")(&options_, &base));
  }

  template <class Function>
  Function* function(const char* name) const {
    void* const found = dlsym(handle_, name);
    if (found == nullptr) throw std::runtime_error(std::string("the library has no ") + name);
    return reinterpret_cast<Function*>(found);
  }

  const CustomOp* find(const std::string& domain, const std::string& name) const {
    for (const CustomOpDomain* one : options_.domains)
      for (const CustomOp* op : one->operators)
        if (one->name == domain && op->get_name(op) == name) return op;
    throw std::runtime_error("the library has no " + domain + "::" + name);
  }

 private:
  void* handle_;
  SessionOptions options_;
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

  // Null: absent. An output that continues an input gets that input's memory.
  void run(const std::vector<Value*>& inputs, const std::vector<Value*>& outputs, int threads = 1) const {
    KernelContext context{op_, inputs, outputs, threads};
    check(op_->compute_v2(kernel_, &context));
  }

 private:
  const CustomOp* op_;
  void* kernel_ = nullptr;
};

}  // namespace ort_host
