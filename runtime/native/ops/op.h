// A small framework in which an operator is one struct:
//
//   struct ResetGradient {
//     static constexpr const char* name = "ResetGradient";
//     static constexpr std::array inputs{Port{"buffer", float32}, Port{"lazy_reset_grad", boolean}};
//     static constexpr std::array outputs{Port{"buffer_out", float32, aliases(0)}};
//     explicit ResetGradient(const Attributes& attributes);
//     void compute(Context& context) const;
//   };
//   const Register<ResetGradient> registered;
//
// The constructor reads and checks the attributes once, when the graph is opened; compute runs on every call, from whichever
// thread the host chooses. Either may throw: the exception's text, after the operator's name, becomes the error of the host.
// `require` is the way to check an input.
//
// The host is whoever runs the graph: ONNX Runtime (host/) or our own runner (runner/). An operator meets it only as the
// `AttributeSource` of its node and as the `Call` of a run.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace edge_bcs {

// Bad input, explained in one sentence.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Adds texts and numbers to a text as streams do, which would bring hundreds of kilobytes of locales into a program.
void append(std::string& text, std::string_view part);
void append(std::string& text, char part);
void append(std::string& text, double part);
void append_whole(std::string& text, std::int64_t part);
void append_whole(std::string& text, std::uint64_t part);
template <std::integral Number>
void append(std::string& text, Number part) {
  if constexpr (std::is_signed_v<Number>)
    append_whole(text, std::int64_t{part});
  else
    append_whole(text, std::uint64_t{part});
}

// The parts written one after the other.
template <class... Parts>
[[gnu::cold]] std::string text_of(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

// Throws Error with the parts written one after the other.
template <class... Parts>
[[noreturn, gnu::cold]] void fail(const Parts&... parts) {
  throw Error(text_of(parts...));
}

// Throws Error with the parts written one after the other unless `condition` holds.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

// Element types with the numbers that ONNX gives them; `any` in a port stands for each of them.
enum class ElementType : std::int32_t {
  any = 0,
  float32 = 1,
  uint8 = 2,
  uint16 = 4,
  int32 = 6,
  int64 = 7,
  boolean = 9
};
using enum ElementType;

// How a port is used beyond its name and type: may be absent, stands for any number of tensors (only the last input), or
// (outputs) shares the memory of an input.
struct Use {
  bool optional = false;
  int alias = -1;
  bool variadic = false;
};
inline constexpr Use optional{true, -1};
inline constexpr Use variadic{false, -1, true};
constexpr Use aliases(int input) { return {false, input}; }
constexpr Use optional_aliases(int input) { return {true, input}; }

// One input or output of an operator.
struct Port {
  const char* name;
  ElementType type;
  Use use{};
};

template <class T>
constexpr ElementType element_type() {
  using Bare = std::remove_const_t<T>;
  if constexpr (std::is_same_v<Bare, float>)
    return float32;
  else if constexpr (std::is_same_v<Bare, std::uint8_t>)
    return uint8;
  else if constexpr (std::is_same_v<Bare, std::uint16_t>)
    return uint16;
  else if constexpr (std::is_same_v<Bare, std::int32_t>)
    return int32;
  else if constexpr (std::is_same_v<Bare, std::int64_t>)
    return int64;
  else if constexpr (std::is_same_v<Bare, bool>)
    return boolean;
}

// Dimensions of a tensor, at most eight of them.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<std::int64_t> sizes) {
    for (std::int64_t size : sizes) append(size);
  }
  void append(std::int64_t size) {
    require(rank_ < sizes_.size(), "a tensor has more than ", sizes_.size(), " dimensions");
    sizes_[rank_++] = size;
  }
  std::size_t rank() const { return rank_; }
  std::int64_t operator[](std::size_t axis) const { return sizes_[axis]; }
  const std::int64_t* data() const { return sizes_.data(); }
  std::int64_t count() const {
    std::int64_t product = 1;
    for (std::size_t axis = 0; axis < rank_; ++axis) product *= sizes_[axis];
    return product;
  }
  bool operator==(const Shape& other) const {
    return rank_ == other.rank_ && std::equal(data(), data() + rank_, other.data());
  }
  // "[2, 3, 4]"
  std::string text() const;

 private:
  std::array<std::int64_t, 8> sizes_{};
  std::size_t rank_ = 0;
};

// A tensor of a known type: memory that the host owns, and its dimensions. An absent optional tensor is
// empty.
template <class T>
class Tensor {
 public:
  Tensor() = default;
  Tensor(T* data, Shape shape) : data_(data), shape_(shape), present_(true) {}
  explicit operator bool() const { return present_; }
  T* data() const { return data_; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size(); }
  std::int64_t size() const { return present_ ? shape_.count() : 0; }
  const Shape& shape() const { return shape_; }
  std::int64_t dim(std::size_t axis) const { return shape_[axis]; }
  T& operator[](std::int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  Shape shape_;
  bool present_ = false;
};

// What the attributes of one node are read from; nothing where there is none of that name and type.
class AttributeSource {
 public:
  virtual std::optional<std::int64_t> integer(const char* name) const = 0;
  virtual std::optional<float> real(const char* name) const = 0;
  virtual std::optional<std::vector<std::int64_t>> integers(const char* name) const = 0;
  virtual std::optional<std::vector<float>> reals(const char* name) const = 0;
  virtual std::optional<std::string> text(const char* name) const = 0;
  // Whether the node's graph keeps its activations in half precision (kernels/half.h).
  virtual bool half() const { return false; }

 protected:
  ~AttributeSource() = default;
};

// The attributes of a node.
class Attributes {
 public:
  explicit Attributes(const AttributeSource& source) : source_(source) {}
  std::int64_t integer(const char* name) const;
  std::int64_t integer(const char* name, std::int64_t otherwise) const;
  // An integer that must lie in [low, high].
  std::int64_t integer_in(const char* name, std::int64_t low, std::int64_t high) const;
  std::int64_t integer_in(const char* name, std::int64_t low, std::int64_t high,
                          std::int64_t otherwise) const;
  // 0 or 1.
  bool flag(const char* name, bool otherwise) const;
  float real(const char* name) const;
  float real(const char* name, float otherwise) const;
  std::vector<std::int64_t> integers(const char* name) const;
  std::vector<std::int64_t> integers(const char* name, const std::vector<std::int64_t>& otherwise) const;
  // Finite or not; empty where the attribute is missing.
  std::vector<float> reals(const char* name) const;
  std::string text(const char* name, const std::string& otherwise) const;
  bool half() const { return source_.half(); }

 private:
  const AttributeSource& source_;
};

// Numbers that one thread takes at a time where an operator does little to each of them.
inline constexpr std::int64_t elements_a_task = 1 << 14;

// A tensor as the host gives it.
struct RawTensor {
  void* data = nullptr;
  ElementType type{};
  Shape shape{};
  bool present = false;
};

// One run of one node, as the host provides it.
class Call {
 public:
  virtual std::size_t input_count() const = 0;
  // Input `index`; not present where the node leaves it out.
  virtual RawTensor input(std::size_t index) const = 0;
  // Output `index`, of these dimensions; not present where the graph does not use it.
  virtual RawTensor output(std::size_t index, const Shape& shape) const = 0;
  // Work memory, aligned to 64 bytes, until it is given back; the last taken is given back first.
  virtual void* take(std::size_t bytes) const = 0;
  virtual void give_back(void* memory) const noexcept = 0;
  // Calls run(data, i) for i in [0, count) from several threads; which runs which is the host's choice.
  virtual void parallel(void (*run)(void*, std::size_t), std::size_t count, void* data) const = 0;

 protected:
  ~Call() = default;
};

// Work memory of one call. Not zeroed; 64-byte aligned.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Call& call, std::size_t count)
      : data_(count > 0 ? static_cast<T*>(call.take(count * sizeof(T))) : nullptr, GiveBack{&call}),
        count_(count) {}
  T* data() const { return data_.get(); }
  std::size_t size() const { return count_; }
  T& operator[](std::size_t i) const { return data_.get()[i]; }

 private:
  struct GiveBack {
    const Call* call = nullptr;
    void operator()(T* memory) const { call->give_back(memory); }
  };
  std::unique_ptr<T, GiveBack> data_;
  std::size_t count_ = 0;
};

// One call of an operator: its tensors and its threads.
class Context {
 public:
  Context(const Call& call, std::span<const Port> inputs, std::span<const Port> outputs)
      : call_(call), inputs_(inputs), outputs_(outputs) {}

  // How many inputs the node has; a variadic port counts as often as it has tensors.
  std::size_t input_count() const { return call_.input_count(); }

  // Work memory for `count` numbers, until it is destroyed.
  template <class T>
  Scratch<T> scratch(std::size_t count) const {
    return Scratch<T>(call_, count);
  }

  // Input `index`; empty if it is optional and absent.
  template <class T>
  Tensor<const T> input(std::size_t index) const {
    const RawTensor raw = raw_input(index, element_type<T>());
    return raw.present ? Tensor<const T>(static_cast<const T*>(raw.data), raw.shape) : Tensor<const T>();
  }

  // Input `index`, one bool, or `otherwise` if it is optional and absent. A file may hold any byte there: all
  // but 0 are true.
  bool flag(std::size_t index, bool otherwise = false) const {
    const RawTensor raw = raw_input(index, boolean);
    if (!raw.present) return otherwise;
    require(raw.shape.count() == 1, input_name(index), " has ", raw.shape.count(), " elements, not 1");
    return *static_cast<const std::uint8_t*>(raw.data) != 0;
  }

  // Output `index` with the given dimensions; empty if it is optional and the graph does not use it.
  template <class T>
  Tensor<T> output(std::size_t index, const Shape& shape) const {
    const RawTensor raw = raw_output(index, shape);
    return raw.present ? Tensor<T>(static_cast<T*>(raw.data), shape) : Tensor<T>();
  }

  // Output `index`, which continues input `from` in place. Where the host could not give both the same
  // memory (graph input and output bound to different tensors), the input is copied first, so the operator
  // stays right. Empty if the input or the output is absent.
  template <class T>
  Tensor<T> in_place(std::size_t index, std::size_t from) const {
    Tensor<const T> source = input<T>(from);
    if (!source) return {};
    Tensor<T> target = output<T>(index, source.shape());
    if (target && target.data() != source.data() && source.size() > 0)
      std::memcpy(target.data(), source.data(), static_cast<std::size_t>(source.size()) * sizeof(T));
    return target;
  }

  // Calls body(i) for i in [0, count), from several threads; which thread runs which i is the host's
  // choice, so the result must not depend on it. The first exception that a body throws is thrown again here.
  template <class Body>
  void parallel_for(std::int64_t count, const Body& body) const {
    struct Job {
      const Body& body;
      std::atomic<bool> failed{false};
      std::exception_ptr error{};
    } job{body};
    auto run = [](void* data, std::size_t i) {
      Job& job = *static_cast<Job*>(data);
      if (job.failed.load(std::memory_order_relaxed)) return;
      try {
        job.body(static_cast<std::int64_t>(i));
      } catch (...) {
        if (!job.failed.exchange(true)) job.error = std::current_exception();
      }
    };
    if (count <= 0) return;
    if (count == 1)
      run(&job, 0);
    else
      run_parallel(run, static_cast<std::size_t>(count), &job);
    if (job.error) std::rethrow_exception(job.error);
  }

  // Calls body(begin, end) for the parts of [0, count), of `part` numbers each and the last of fewer, as parallel_for does.
  template <class Body>
  void parallel_parts(std::int64_t count, std::int64_t part, const Body& body) const {
    parallel_for((count + part - 1) / part,
                 [&](std::int64_t i) { body(i * part, std::min(count, (i + 1) * part)); });
  }

  const char* input_name(std::size_t index) const { return input_port(index).name; }

 private:
  // The port of input `index`; those behind the last belong to it.
  const Port& input_port(std::size_t index) const { return inputs_[std::min(index, inputs_.size() - 1)]; }
  RawTensor raw_input(std::size_t index, ElementType type) const;
  RawTensor raw_output(std::size_t index, const Shape& shape) const;
  void run_parallel(void (*run)(void*, std::size_t), std::size_t count, void* data) const {
    call_.parallel(run, count, data);
  }

  const Call& call_;
  std::span<const Port> inputs_;
  std::span<const Port> outputs_;
};

// Where an operator belongs: our own domain, or that of ONNX Runtime's operators that stock builds lack.
enum class Domain { edge_bcs, microsoft };

// An operator as its struct declares it, and its functions over an object that `create` made.
struct Declaration {
  const char* name;
  std::span<const Port> inputs, outputs;
  bool half;  // whether it can take stacks in half precision
  void* (*create)(const Attributes& attributes);
  void (*compute)(const void* object, Context& context);
  void (*destroy)(void* object);
};

// An object of an operator; throws Error where it has no half-precision form and that is asked for.
void* create(const Declaration& declaration, const Attributes& attributes);

// The operators of a domain, in the order in which they were added.
const std::vector<Declaration>& operators(Domain domain);

// Adds an operator to a domain; called while the library is loaded.
void add_operator(const Declaration& declaration, Domain domain);

// An object of this type with static storage adds Op to the library.
template <class Op, Domain domain = Domain::edge_bcs>
struct Register {
  Register() {
    add_operator({Op::name, Op::inputs, Op::outputs, requires { Op::half_precision;
  }
  , [](const Attributes& attributes) -> void* { return std::make_unique<Op>(attributes).release(); },
      [](const void* object, Context& context) { static_cast<const Op*>(object)->compute(context); },
      [](void* object) { std::unique_ptr<Op>(static_cast<Op*>(object)).reset(); }},
                 domain);
}  // namespace edge_bcs
}
;

}  // namespace edge_bcs
