// libFuzzer target: every operator of the library, through the interface that ONNX Runtime calls it by.
//
// A stand-in for ONNX Runtime's table of functions loads the library by RegisterCustomOps, makes one operator with
// the attributes of the test case, and runs it on the case's tensors, each of which is a heap block of exactly its
// size. A finding is whatever AddressSanitizer, UndefinedBehaviorSanitizer or libFuzzer's limits of time and memory
// report; an error status is a good answer. Cases are changed as what they are (an attribute, a dimension, an
// element), so that many of them pass the operators' checks; record_operators.py writes those that the native tests
// use, to begin with.
//
// A case: operator and domain; attributes; inputs; which outputs are wanted; all in the order of `encode`.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "host/ort_abi.h"

using namespace edge_bcs;

extern "C" ort::Status* RegisterCustomOps(ort::SessionOptions*, const ort::ApiBase*);
extern "C" void edge_bcs_provide_training_operators(int);
extern "C" std::int64_t edge_bcs_budget_begin(std::int64_t);
extern "C" std::int64_t edge_bcs_budget_current();
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t*, std::size_t, std::size_t);

namespace edge_bcs::ort {
struct Status {
  std::string text;
};
}  // namespace edge_bcs::ort

namespace {

constexpr std::int64_t budget_bytes = 32 << 20;    // of outputs and of work memory, each
constexpr std::int64_t largest_tensor = 1 << 16;   // elements of an input
constexpr std::size_t largest_rank = 9;            // one more than the operators take

struct Attribute {
  std::string name;
  std::uint8_t kind = 0;  // 0 integer, 1 float, 2 text, 3 integers
  std::vector<std::int64_t> integers;
  float real = 0;
  std::string text;
};

struct Input {
  std::uint8_t type = 0;  // of ONNX; 0: absent; 255: the same memory as input `shared`
  std::uint8_t shared = 0;
  std::vector<std::int32_t> dims;
  std::string data;  // repeated to the tensor's size
};

struct Case {
  std::string domain, name;
  std::vector<Attribute> attributes;
  std::vector<Input> inputs;
  std::uint8_t in_place = 1;  // whether an output that continues an input gets its memory
  std::uint32_t outputs = 0xffffffff;
};

// Reading and writing cases

class Reader {
 public:
  Reader(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  template <class T>
  T number() {
    T value{};
    const std::size_t taken = std::min(sizeof value, left_);
    std::memcpy(&value, data_, taken);
    skip(taken);
    return value;
  }
  std::string bytes(std::size_t size) {
    const std::size_t taken = std::min(size, left_);
    std::string value(reinterpret_cast<const char*>(data_), taken);
    skip(taken);
    return value;
  }
  std::string name() { return bytes(number<std::uint8_t>()); }

 private:
  void skip(std::size_t size) { data_ += size, left_ -= size; }
  const std::uint8_t* data_;
  std::size_t left_;
};

Case decode(const std::uint8_t* data, std::size_t size) {
  Reader in(data, size);
  Case made;
  made.domain = in.name();
  made.name = in.name();
  for (int count = in.number<std::uint8_t>() % 64; count > 0; --count) {
    Attribute attribute;
    attribute.name = in.name();
    attribute.kind = in.number<std::uint8_t>() % 4;
    if (attribute.kind == 1) attribute.real = in.number<float>();
    if (attribute.kind == 2) attribute.text = in.name();
    const int length = attribute.kind == 0 ? 1 : attribute.kind == 3 ? in.number<std::uint8_t>() : 0;
    for (int i = 0; i < length; ++i) attribute.integers.push_back(in.number<std::int64_t>());
    made.attributes.push_back(std::move(attribute));
  }
  for (int count = in.number<std::uint8_t>() % 16; count > 0; --count) {
    Input input;
    input.type = in.number<std::uint8_t>();
    if (input.type == 255) input.shared = in.number<std::uint8_t>();
    if (input.type != 0 && input.type != 255) {
      for (std::size_t rank = in.number<std::uint8_t>() % (largest_rank + 1); rank > 0; --rank)
        input.dims.push_back(in.number<std::int32_t>());
      input.data = in.bytes(in.number<std::uint32_t>());
    }
    made.inputs.push_back(std::move(input));
  }
  made.in_place = in.number<std::uint8_t>();
  made.outputs = in.number<std::uint32_t>();
  return made;
}

class Writer {
 public:
  template <class T>
  void number(T value) {
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void name(const std::string& text) {
    number(static_cast<std::uint8_t>(std::min<std::size_t>(text.size(), 255)));
    out_.append(text, 0, 255);
  }
  void bytes(const std::string& data) { out_ += data; }
  const std::string& content() const { return out_; }

 private:
  std::string out_;
};

std::string encode(const Case& made) {
  Writer out;
  out.name(made.domain);
  out.name(made.name);
  out.number(static_cast<std::uint8_t>(made.attributes.size()));
  for (const Attribute& attribute : made.attributes) {
    out.name(attribute.name);
    out.number(attribute.kind);
    if (attribute.kind == 1) out.number(attribute.real);
    if (attribute.kind == 2) out.name(attribute.text);
    if (attribute.kind == 3) out.number(static_cast<std::uint8_t>(attribute.integers.size()));
    if (attribute.kind == 0 || attribute.kind == 3)
      for (std::int64_t value : attribute.integers) out.number(value);
  }
  out.number(static_cast<std::uint8_t>(made.inputs.size()));
  for (const Input& input : made.inputs) {
    out.number(input.type);
    if (input.type == 255) out.number(input.shared);
    if (input.type == 0 || input.type == 255) continue;
    out.number(static_cast<std::uint8_t>(input.dims.size()));
    for (std::int32_t size : input.dims) out.number(size);
    out.number(static_cast<std::uint32_t>(input.data.size()));
    out.bytes(input.data);
  }
  out.number(made.in_place);
  out.number(made.outputs);
  return out.content();
}

// The stand-in for ONNX Runtime

std::size_t element_size(ort::ElementType type) {
  switch (type) {
    case ort::ElementType::uint8:
    case ort::ElementType::boolean:
      return 1;
    case ort::ElementType::uint16:
      return 2;
    case ort::ElementType::int64:
      return 8;
    default:
      return 4;
  }
}

struct Tensor {
  ort::ElementType type{};
  std::vector<std::int64_t> dims;
  std::shared_ptr<std::byte[]> memory;
  std::size_t bytes = 0;
};

// -1 if there are more elements than `most`.
std::int64_t elements(const std::vector<std::int64_t>& dims, std::int64_t most) {
  std::int64_t count = 1;
  for (std::int64_t size : dims) {
    if (size < 0 || (size > 0 && count > most / size)) return -1;
    count *= size;
  }
  return count;
}

struct Call {
  const ort::CustomOp* op;
  const Case* made;
  std::vector<std::optional<Tensor>> inputs, outputs;
  std::vector<int> alias;  // input of each output, or -1
  std::int64_t output_bytes = 0;
};

ort::Status* status(std::string text) { return new ort::Status{std::move(text)}; }
const Case& case_of(const ort::KernelInfo* info) { return *reinterpret_cast<const Case*>(info); }
Call& call_of(const ort::KernelContext* context) {
  return *const_cast<Call*>(reinterpret_cast<const Call*>(context));
}
const Tensor& tensor_of(const void* value) { return *static_cast<const Tensor*>(value); }

const Attribute* find(const ort::KernelInfo* info, const char* name, std::uint8_t kind) {
  for (const Attribute& attribute : case_of(info).attributes)
    if (attribute.name == name && attribute.kind == kind) return &attribute;
  return nullptr;
}

struct Fake {
  static ort::Status* create_status(ort::ErrorCode, const char* text) { return status(text); }
  static const char* message(const ort::Status* s) { return s->text.c_str(); }
  static void release(ort::Status* s) { delete s; }
  static ort::Status* env(ort::LoggingLevel, const char*, ort::Env** made) {
    *made = reinterpret_cast<ort::Env*>(1);
    return nullptr;
  }
  static ort::Status* memory_info(ort::AllocatorType, ort::MemoryType, ort::MemoryInfo** made) {
    *made = reinterpret_cast<ort::MemoryInfo*>(1);
    return nullptr;
  }
  static ort::Status* allocator(ort::Env*, ort::Allocator*) { return nullptr; }

  // The operators, by domain and name, are what RegisterCustomOps adds.
  struct Entry {
    std::string domain;
    const ort::CustomOp* op;
  };
  static std::vector<Entry>& operators() {
    static std::vector<Entry> all;
    return all;
  }
  static ort::Status* domain(const char* name, ort::CustomOpDomain** made) {
    *made = reinterpret_cast<ort::CustomOpDomain*>(new std::string(name));
    return nullptr;
  }
  static ort::Status* add(ort::CustomOpDomain* to, const ort::CustomOp* op) {
    operators().push_back({*reinterpret_cast<std::string*>(to), op});
    return nullptr;
  }
  static ort::Status* add_domain(ort::SessionOptions*, ort::CustomOpDomain*) { return nullptr; }

  static ort::Status* integer(const ort::KernelInfo* info, const char* name, std::int64_t* value) {
    const Attribute* found = find(info, name, 0);
    if (found == nullptr) return status("no such attribute");
    *value = found->integers.at(0);
    return nullptr;
  }
  static ort::Status* real(const ort::KernelInfo* info, const char* name, float* value) {
    const Attribute* found = find(info, name, 1);
    if (found == nullptr) return status("no such attribute");
    *value = found->real;
    return nullptr;
  }
  static ort::Status* text(const ort::KernelInfo* info, const char* name, char* value, std::size_t* size) {
    const Attribute* found = find(info, name, 2);
    if (found == nullptr) return status("no such attribute");
    const std::size_t needed = found->text.size() + 1;
    if (value != nullptr && *size < needed) return status("too small");
    if (value != nullptr) std::memcpy(value, found->text.c_str(), needed);
    *size = needed;
    return nullptr;
  }
  static ort::Status* integers(const ort::KernelInfo* info, const char* name, std::int64_t* value,
                               std::size_t* size) {
    const Attribute* found = find(info, name, 3);
    if (found == nullptr) return status("no such attribute");
    if (value != nullptr && *size < found->integers.size()) return status("too small");
    if (value != nullptr) std::copy(found->integers.begin(), found->integers.end(), value);
    *size = found->integers.size();
    return nullptr;
  }

  static ort::Status* input_count(const ort::KernelContext* context, std::size_t* count) {
    *count = call_of(context).inputs.size();
    return nullptr;
  }
  static ort::Status* output_count(const ort::KernelContext* context, std::size_t* count) {
    *count = call_of(context).outputs.size();
    return nullptr;
  }
  static ort::Status* input(const ort::KernelContext* context, std::size_t index, const ort::Value** value) {
    const auto& held = call_of(context).inputs.at(index);
    *value = held ? reinterpret_cast<const ort::Value*>(&*held) : nullptr;
    return nullptr;
  }
  static ort::Status* output(ort::KernelContext* context, std::size_t index, const std::int64_t* sizes,
                             std::size_t rank, ort::Value** value) {
    Call& call = call_of(context);
    *value = nullptr;
    const bool optional = call.op->get_output_characteristic(call.op, index) == ort::Characteristic::optional;
    if (optional && (call.made->outputs >> index & 1) == 0) return nullptr;
    const std::vector<std::int64_t> dims(sizes, sizes + rank);
    auto& held = call.outputs.at(index);
    if (held) {
      if (held->dims != dims) return status("an output has two shapes");
    } else {
      Tensor made{call.op->get_output_type(call.op, index), dims, nullptr, 0};
      const std::int64_t count = elements(dims, budget_bytes);
      if (count < 0) return status("the output is too large");
      made.bytes = static_cast<std::size_t>(count) * element_size(made.type);
      const int from = call.alias.at(index);
      const auto* source = from >= 0 && call.inputs.at(from) ? &*call.inputs[from] : nullptr;
      if (source != nullptr && (call.made->in_place & 1) != 0 && source->dims == dims && source->type == made.type) {
        made.memory = source->memory;
      } else {
        call.output_bytes += static_cast<std::int64_t>(made.bytes);
        if (call.output_bytes > budget_bytes) return status("the outputs are over the budget");
        made.memory = std::make_shared_for_overwrite<std::byte[]>(made.bytes);
      }
      held = std::move(made);
    }
    *value = reinterpret_cast<ort::Value*>(&*held);
    return nullptr;
  }
  static ort::Status* data(ort::Value* value, void** memory) {
    *memory = tensor_of(value).memory.get();
    return nullptr;
  }
  static ort::Status* shape_info(const ort::Value* value, ort::ShapeInfo** info) {
    *info = reinterpret_cast<ort::ShapeInfo*>(const_cast<ort::Value*>(value));
    return nullptr;
  }
  static void release_shape_info(ort::ShapeInfo*) {}
  static ort::Status* type(const ort::ShapeInfo* info, ort::ElementType* value) {
    *value = tensor_of(info).type;
    return nullptr;
  }
  static ort::Status* rank(const ort::ShapeInfo* info, std::size_t* value) {
    *value = tensor_of(info).dims.size();
    return nullptr;
  }
  static ort::Status* dimensions(const ort::ShapeInfo* info, std::int64_t* sizes, std::size_t rank) {
    std::copy_n(tensor_of(info).dims.begin(), std::min(rank, tensor_of(info).dims.size()), sizes);
    return nullptr;
  }
  // In an order that is not the obvious one: the result must not depend on it.
  static ort::Status* parallel_for(const ort::KernelContext*, void (*body)(void*, std::size_t), std::size_t total,
                                   std::size_t, void* data) {
    for (std::size_t i = total; i > 0; --i) body(data, i - 1);
    return nullptr;
  }

  static const void* api(std::uint32_t) {
    static std::array<void*, 512> slots{};
    const auto set = [](std::size_t slot, auto* function) { slots[slot] = reinterpret_cast<void*>(function); };
    set(0, create_status), set(2, message), set(3, env), set(26, domain), set(27, add), set(28, add_domain);
    set(51, data), set(60, type), set(61, rank), set(62, dimensions), set(65, shape_info), set(69, memory_info);
    set(85, real), set(86, integer), set(87, text), set(88, input_count), set(89, output_count), set(90, input);
    set(91, output), set(93, release), set(99, release_shape_info), set(163, integers), set(176, allocator);
    set(274, parallel_for);
    return slots.data();
  }
};

const ort::CustomOp* operator_named(const std::string& domain, const std::string& name) {
  for (const auto& entry : Fake::operators())
    if (entry.domain == domain && name == entry.op->get_name(entry.op)) return entry.op;
  return nullptr;
}

// False if the case is none: a tensor too large, or of a type that the operator does not declare.
bool make_inputs(Call& call) {
  const std::size_t declared = call.op->get_input_count(call.op);
  for (std::size_t i = 0; i < std::min(declared, call.made->inputs.size()); ++i) {
    const Input& given = call.made->inputs[i];
    if (given.type == 0) {
      call.inputs.emplace_back();
      continue;
    }
    if (given.type == 255) {
      if (given.shared >= i || !call.inputs[given.shared]) return false;
      const ort::ElementType wanted = call.op->get_input_type(call.op, i);
      if (wanted != ort::ElementType::any && wanted != call.inputs[given.shared]->type) return false;
      call.inputs.push_back(call.inputs[given.shared]);
      continue;
    }
    Tensor tensor{static_cast<ort::ElementType>(given.type), {given.dims.begin(), given.dims.end()}, nullptr, 0};
    // ONNX Runtime has checked the type of every tensor.
    const ort::ElementType wanted = call.op->get_input_type(call.op, i);
    if (wanted != ort::ElementType::any && wanted != tensor.type) return false;
    const std::int64_t count = elements(tensor.dims, largest_tensor);
    if (count < 0) return false;
    tensor.bytes = static_cast<std::size_t>(count) * element_size(tensor.type);
    tensor.memory = std::make_shared<std::byte[]>(tensor.bytes);
    for (std::size_t at = 0; at < tensor.bytes && !given.data.empty(); at += given.data.size())
      std::memcpy(tensor.memory.get() + at, given.data.data(), std::min(given.data.size(), tensor.bytes - at));
    call.inputs.push_back(std::move(tensor));
  }
  for (std::size_t i = 0; i < call.inputs.size(); ++i)
    if (!call.inputs[i] && call.op->get_input_characteristic(call.op, i) != ort::Characteristic::optional) return false;
  for (std::size_t i = call.inputs.size(); i < declared; ++i)
    if (call.op->get_input_characteristic(call.op, i) != ort::Characteristic::optional) return false;
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  static const ort::ApiBase base{&Fake::api, [] { return "fuzz"; }};
  edge_bcs_provide_training_operators(1);
  if (RegisterCustomOps(nullptr, &base) != nullptr) std::abort();
  if (edge_bcs_budget_begin(budget_bytes) != 0) std::abort();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Case made = decode(data, size);
  Call call{operator_named(made.domain, made.name), &made, {}, {}, {}};
  if (call.op == nullptr || !make_inputs(call)) return -1;
  call.outputs.resize(call.op->get_output_count(call.op));
  call.alias.assign(call.outputs.size(), -1);
  int *from = nullptr, *to = nullptr;
  for (std::size_t i = 0, count = call.op->get_alias_map(&from, &to); i < count; ++i) call.alias.at(to[i]) = from[i];

  void* kernel = nullptr;
  ort::Status* failed =
      call.op->create_kernel_v2(call.op, nullptr, reinterpret_cast<const ort::KernelInfo*>(&made), &kernel);
  if (failed == nullptr) {
    failed = call.op->compute_v2(kernel, reinterpret_cast<ort::KernelContext*>(&call));
    call.op->destroy(kernel);
  }
  if (std::getenv("EDGE_BCS_FUZZ_SHOW") != nullptr)
    std::fprintf(stderr, "%s\n", failed == nullptr ? "ran" : failed->text.c_str());
  delete failed;
  if (edge_bcs_budget_current() != 0) std::abort();  // work memory that was not given back
  return 0;
}

// Mutation

namespace {

class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  void change(Case& made) {
    switch (below(10)) {
      case 0:
      case 1:
        return change_attribute(made);
      case 2:
        return change_dimension(made);
      case 3:
      case 4:
        return change_everywhere(made);
      case 5:
      case 6:
      case 7:
        return change_element(made);
      case 8:
        return change_input(made);
      default:
        if (below(2) == 0) made.in_place ^= 1;
        else made.outputs ^= 1u << below(5);
    }
  }

 private:
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : random_() % bound; }

  std::int64_t number(std::int64_t old) {
    static constexpr std::int64_t special[] = {-1,  0,   1,       2,       3,         4,         7,         8,
                                               16,  64,  65,      255,     256,       257,       1 << 14,   1 << 23,
                                               -2,  1LL << 31,    (1LL << 31) - 1,    1LL << 32, 1LL << 40, 1LL << 62,
                                               INT64_MAX,         INT64_MIN,          1 << 20,   1 << 30};
    switch (below(4)) {
      case 0:
        return old == INT64_MAX ? old : old + 1;
      case 1:
        return old == INT64_MIN ? old : old - 1;
      case 2:
        return static_cast<std::int64_t>(below(12));
      default:
        return special[below(std::size(special))];
    }
  }

  float special_float() {
    using Limits = std::numeric_limits<float>;
    static constexpr float special[] = {0, -0.0f, 1, -1, 0.5f, 1e-12f, Limits::max(), Limits::lowest(),
                                        Limits::denorm_min(), Limits::infinity(), -Limits::infinity(),
                                        Limits::quiet_NaN()};
    return special[below(std::size(special))];
  }

  void change_attribute(Case& made) {
    if (made.attributes.empty()) return;
    Attribute& attribute = made.attributes[below(made.attributes.size())];
    if (below(40) == 0) {
      made.attributes.erase(made.attributes.begin() + (&attribute - made.attributes.data()));
      return;
    }
    if (attribute.kind == 1) {
      attribute.real = special_float();
    } else if (attribute.kind == 2) {
      static const char* const special[] = {"", "sparse", "dense", "none", "sum", "mean", "VALID", "x"};
      attribute.text = special[below(std::size(special))];
    } else if (attribute.kind == 3 && (attribute.integers.empty() || below(10) == 0)) {
      if (below(2) == 0 && !attribute.integers.empty()) attribute.integers.pop_back();
      else attribute.integers.push_back(number(1));
    } else {
      auto& value = attribute.integers[below(attribute.integers.size())];
      value = number(value);
    }
  }

  Input* any_tensor(Case& made) {
    std::vector<Input*> found;
    for (Input& input : made.inputs)
      if (input.type != 0 && input.type != 255) found.push_back(&input);
    return found.empty() ? nullptr : found[below(found.size())];
  }

  void change_dimension(Case& made) {
    Input* const input = any_tensor(made);
    if (input == nullptr) return;
    if (input->dims.empty() || below(12) == 0) {
      if (below(2) == 0 && !input->dims.empty()) input->dims.pop_back();
      else if (input->dims.size() < largest_rank) input->dims.push_back(static_cast<std::int32_t>(below(4)));
      return;
    }
    auto& size = input->dims[below(input->dims.size())];
    size = static_cast<std::int32_t>(number(size));
  }

  // One number becomes another wherever it occurs, so that sizes that belong together stay together.
  void change_everywhere(Case& made) {
    std::vector<std::int64_t> there;
    for (const Attribute& attribute : made.attributes)
      there.insert(there.end(), attribute.integers.begin(), attribute.integers.end());
    for (const Input& input : made.inputs) there.insert(there.end(), input.dims.begin(), input.dims.end());
    if (there.empty()) return;
    const std::int64_t old = there[below(there.size())], other = number(old);
    for (Attribute& attribute : made.attributes)
      std::replace(attribute.integers.begin(), attribute.integers.end(), old, other);
    for (Input& input : made.inputs)
      for (std::int32_t& size : input.dims)
        if (size == old) size = static_cast<std::int32_t>(other);
  }

  void change_element(Case& made) {
    Input* const input = any_tensor(made);
    if (input == nullptr) return;
    const std::size_t width = element_size(static_cast<ort::ElementType>(input->type));
    if (input->data.size() < width) {
      input->data.assign(width * (1 + below(8)), '\0');
      return;
    }
    char* const place = input->data.data() + below(input->data.size() / width) * width;
    if (static_cast<ort::ElementType>(input->type) == ort::ElementType::float32) {
      const float other = special_float();
      std::memcpy(place, &other, width);
    } else {
      std::int64_t old = 0;
      std::memcpy(&old, place, width);
      const std::int64_t other = number(old);
      std::memcpy(place, &other, width);
    }
  }

  void change_input(Case& made) {
    if (made.inputs.empty()) return;
    Input& input = made.inputs[below(made.inputs.size())];
    switch (below(4)) {
      case 0:
        input.type = 0;
        break;
      case 1:
        input.type = 255;
        input.shared = static_cast<std::uint8_t>(below(made.inputs.size()));
        break;
      case 2: {  // another input, of the same type or not
        const Input& other = made.inputs[below(made.inputs.size())];
        if (&other != &input) input = Input(other);
        break;
      }
      default: {
        static constexpr std::uint8_t types[] = {1, 2, 4, 6, 7, 9};
        input.type = types[below(std::size(types))];
      }
    }
  }

  std::minstd_rand random_;
};

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most,
                                               unsigned seed) {
  if (seed % 32 == 0) return LLVMFuzzerMutate(data, size, most);
  Case made = decode(data, size);
  Mutator mutator(seed);
  for (unsigned changes = 1 + seed % 3; changes > 0; --changes) mutator.change(made);
  const std::string written = encode(made);
  if (written.size() > most) return LLVMFuzzerMutate(data, size, most);
  std::memcpy(data, written.data(), written.size());
  return written.size();
}
