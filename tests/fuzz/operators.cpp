// libFuzzer target: every operator of the library, through the interface that ONNX Runtime calls it by.
//
// The stand-in for ONNX Runtime (tests/native/ort_host.h) makes one operator with the attributes of the test case and runs
// it on the case's tensors, each of which is a heap block of exactly its size. A finding is whatever AddressSanitizer, UndefinedBehaviorSanitizer or libFuzzer's limits of time and memory
// report; an error status is a good answer. Cases are changed as what they are (an attribute, a dimension, an
// element), so that many of them pass the operators' checks; record_operators.py writes those that the native tests
// use, to begin with.
//
// A case: operator and domain; attributes; inputs; which outputs are wanted; all in the order of `encode`.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "ort_host.h"

extern "C" edge_bcs::ort::Status* RegisterCustomOps(edge_bcs::ort::SessionOptions*,
                                                    const edge_bcs::ort::ApiBase*);
extern "C" void edge_bcs_provide_training_operators(int);
extern "C" std::int64_t edge_bcs_budget_begin(std::int64_t);
extern "C" std::int64_t edge_bcs_budget_current();
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t*, std::size_t, std::size_t);

namespace {

using namespace ort_host;

constexpr std::int64_t budget_bytes = 32 << 20;  // of outputs and of work memory, each
constexpr std::size_t largest_tensor = 1 << 16;  // elements of an input
constexpr std::size_t largest_rank = 9;          // one more than the operators take

struct Attribute {
  std::string name;
  std::uint8_t kind = 0;  // 0 integer, 1 float, 2 text, 3 integers, 4 floats
  std::vector<std::int64_t> integers;
  float real = 0;
  std::vector<float> reals;
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
    attribute.kind = in.number<std::uint8_t>() % 5;
    if (attribute.kind == 1) attribute.real = in.number<float>();
    if (attribute.kind == 2) attribute.text = in.name();
    const int length = attribute.kind == 0 ? 1 : attribute.kind == 3 ? in.number<std::uint8_t>() : 0;
    for (int i = 0; i < length; ++i) attribute.integers.push_back(in.number<std::int64_t>());
    if (attribute.kind == 4)
      for (int i = in.number<std::uint8_t>(); i > 0; --i) attribute.reals.push_back(in.number<float>());
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
    if (attribute.kind == 4) {
      out.number(static_cast<std::uint8_t>(attribute.reals.size()));
      for (float value : attribute.reals) out.number(value);
    }
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

// Running them

KernelInfo attributes_of(const Case& made) {
  KernelInfo info;
  for (const Attribute& attribute : made.attributes) {
    auto& value = info.attributes[attribute.name];
    switch (attribute.kind) {
      case 0:
        value = attribute.integers.at(0);
        break;
      case 1:
        value = attribute.real;
        break;
      case 2:
        value = attribute.text;
        break;
      case 4:
        value = attribute.reals;
        break;
      default:
        value = attribute.integers;
    }
  }
  return info;
}

// The tensors that the operator declares; none if the case is none: a tensor too large, or of a type that it does not take
// or missing, which ONNX Runtime has checked.
std::optional<std::vector<std::unique_ptr<Value>>> make_inputs(const CustomOp& op, const Case& made) {
  static const Input absent;
  std::vector<std::unique_ptr<Value>> tensors;
  std::size_t count = op.get_input_count(&op);
  const std::size_t last = count - 1;
  if (op.get_input_characteristic(&op, last) == Characteristic::variadic)
    count = std::max(count, made.inputs.size());
  for (std::size_t i = 0; i < count; ++i) {
    const Input& given = i < made.inputs.size() ? made.inputs[i] : absent;
    if (given.type == 0) {
      if (op.get_input_characteristic(&op, std::min(i, last)) != Characteristic::optional)
        return std::nullopt;
      if (i < made.inputs.size()) tensors.push_back(nullptr);
      continue;
    }
    auto tensor = std::make_unique<Value>(static_cast<ElementType>(given.type),
                                          std::vector<std::int64_t>{given.dims.begin(), given.dims.end()});
    if (given.type == 255) {
      if (given.shared >= i || tensors[given.shared] == nullptr) return std::nullopt;
      *tensor = *tensors[given.shared];
    }
    const ElementType wanted = op.get_input_type(&op, std::min(i, last));
    if (wanted != ElementType::any && wanted != tensor->type) return std::nullopt;
    if (given.type != 255) {
      if (!tensor->bytes_within(largest_tensor * Value::element_bytes(tensor->type))) return std::nullopt;
      tensor->allocate();
      for (std::size_t at = 0, size = tensor->bytes(); at < size && !given.data.empty();
           at += given.data.size())
        std::memcpy(tensor->data() + at, given.data.data(), std::min(given.data.size(), size - at));
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

const Operators& operators() {
  static const Operators registered(RegisterCustomOps);
  return registered;
}

// What the operator refused, or "ran".
std::string outcome(const CustomOp* op, const KernelInfo& info, KernelContext call) {
  try {
    Operator(op, info).run(std::move(call));
    return "ran";
  } catch (const Failure& failure) {
    return failure.what();
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  edge_bcs_provide_training_operators(1);
  operators();
  if (edge_bcs_budget_begin(budget_bytes) != 0) std::abort();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Case made = decode(data, size);
  const CustomOp* const op = operators().find(made.domain, made.name);
  if (op == nullptr) return -1;
  const auto inputs = make_inputs(*op, made);
  if (!inputs) return -1;
  std::vector<Value> outputs(op->get_output_count(op));
  KernelContext call;
  for (const auto& input : *inputs) call.inputs.push_back(input.get());
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const bool optional = op->get_output_characteristic(op, i) == Characteristic::optional;
    call.outputs.push_back(optional && (made.outputs >> i & 1) == 0 ? nullptr : &outputs[i]);
  }
  call.in_place = (made.in_place & 1) != 0;
  call.budget = static_cast<std::size_t>(budget_bytes);
  const std::string said = outcome(op, attributes_of(made), std::move(call));
  if (std::getenv("EDGE_BCS_FUZZ_SHOW") != nullptr) std::fprintf(stderr, "%s\n", said.c_str());
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
        if (below(2) == 0)
          made.in_place ^= 1;
        else
          made.outputs ^= 1u << below(5);
    }
  }

 private:
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : random_() % bound; }

  std::int64_t number(std::int64_t old) {
    // clang-format off
    static constexpr std::int64_t special[] = {
        -2, -1, 0, 1, 2, 3, 4, 7, 8, 16, 64, 65, 255, 256, 257, 1 << 14, 1 << 20, 1 << 23, 1 << 30,
        (1LL << 31) - 1, 1LL << 31, 1LL << 32, 1LL << 40, 1LL << 62, INT64_MAX, INT64_MIN};
    // clang-format on
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
    // clang-format off
    static constexpr float special[] = {
        0, -0.0f, 1, -1, 0.5f, 1e-12f, Limits::max(), Limits::lowest(), Limits::denorm_min(), Limits::infinity(),
        -Limits::infinity(), Limits::quiet_NaN()};
    // clang-format on
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
    } else if (attribute.kind == 4) {
      if (attribute.reals.empty() || below(4) == 0)
        attribute.reals.resize(below(5));
      else
        attribute.reals[below(attribute.reals.size())] = special_float();
    } else if (attribute.kind == 2) {
      static const char* const special[] = {"",          "sparse", "dense", "winograd",   "depthwise",
                                            "none",      "relu",   "relu6", "leaky_relu", "hardsigmoid",
                                            "sigmoid",   "tanh",   "silu",  "hardswish",  "gelu",
                                            "gelu_tanh", "sum",    "mean",  "VALID",      "x"};
      attribute.text = special[below(std::size(special))];
    } else if (attribute.kind == 3 && (attribute.integers.empty() || below(10) == 0)) {
      if (below(2) == 0 && !attribute.integers.empty())
        attribute.integers.pop_back();
      else
        attribute.integers.push_back(number(1));
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
      if (below(2) == 0 && !input->dims.empty())
        input->dims.pop_back();
      else if (input->dims.size() < largest_rank)
        input->dims.push_back(static_cast<std::int32_t>(below(4)));
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
    const std::size_t width = Value::element_bytes(static_cast<ElementType>(input->type));
    if (input->data.size() < width) {
      input->data.assign(width * (1 + below(8)), '\0');
      return;
    }
    char* const place = input->data.data() + below(input->data.size() / width) * width;
    if (static_cast<ElementType>(input->type) == ElementType::float32) {
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
