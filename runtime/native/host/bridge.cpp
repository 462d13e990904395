#include "host/bridge.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "host/budget.h"
#include "host/placement.h"

namespace edge_bcs::ort {

namespace {

// Most operators of a domain; `alias_maps` has a function for each.
constexpr std::size_t most_operators = 128;

// A status in which the caller only wants to know whether it is an error.
bool succeeded(Status* status) {
  if (status == nullptr) return true;
  api.release_status(status);
  return false;
}

// Of the sessions that this thread makes.
thread_local bool half_precision = false;

class NodeAttributes final : public AttributeSource {
 public:
  explicit NodeAttributes(const KernelInfo* info) : info_(info) {}

  bool half() const override { return half_precision; }

  std::optional<std::int64_t> integer(const char* name) const override {
    std::int64_t value = 0;
    if (!succeeded(api.attribute_int(info_, name, &value))) return {};
    return value;
  }
  std::optional<float> real(const char* name) const override {
    float value = 0;
    if (!succeeded(api.attribute_float(info_, name, &value))) return {};
    return value;
  }
  std::optional<std::vector<std::int64_t>> integers(const char* name) const override {
    return list<std::int64_t>(name, api.attribute_ints);
  }
  std::optional<std::vector<float>> reals(const char* name) const override {
    return list<float>(name, api.attribute_floats);
  }
  std::optional<std::string> text(const char* name) const override {
    std::size_t size = 0;
    if (!succeeded(api.attribute_string(info_, name, nullptr, &size)) || size == 0) return {};
    std::string value(size, '\0');
    check(api.attribute_string(info_, name, value.data(), &size));
    value.resize(size - 1);  // the size counts the terminating zero
    return value;
  }

 private:
  template <class T, class Read>
  std::optional<std::vector<T>> list(const char* name, Read read) const {
    std::size_t size = 0;
    if (!succeeded(read(info_, name, nullptr, &size))) return {};
    std::vector<T> values(size);
    if (size > 0) check(read(info_, name, values.data(), &size));
    return values;
  }

  const KernelInfo* info_;
};

class KernelCall final : public Call {
 public:
  KernelCall(KernelContext* context, placement::Node& node) : context_(context), node_(node) {}

  std::size_t input_count() const override {
    std::size_t count = 0;
    check(api.input_count(context_, &count));
    return count;
  }

  RawTensor input(std::size_t index) const override {
    const Value* value = nullptr;
    check(api.get_input(context_, index, &value));
    if (value == nullptr) return {};
    ShapeInfo* made = nullptr;
    check(api.get_type_and_shape(value, &made));
    const std::unique_ptr<ShapeInfo, void (*)(ShapeInfo*)> info(made, api.release_shape_info);
    RawTensor raw;
    check(api.get_element_type(info.get(), &raw.type));
    std::size_t rank = 0;
    check(api.get_rank(info.get(), &rank));
    std::array<std::int64_t, 8> sizes{};
    require(rank <= sizes.size(), "input ", index, " has ", rank, " dimensions");
    check(api.get_dimensions(info.get(), sizes.data(), rank));
    for (std::size_t axis = 0; axis < rank; ++axis) raw.shape.append(sizes[axis]);
    // The interface gives data as mutable only; Context::input makes it const again.
    check(api.get_tensor_data(const_cast<Value*>(value), &raw.data));
    raw.present = true;
    return raw;
  }

  RawTensor output(std::size_t index, const Shape& shape) const override {
    std::size_t count = 0;
    check(api.output_count(context_, &count));
    Value* value = nullptr;
    if (index < count) {
      const placement::Node::Output wanted(node_, index);
      check(api.get_output(context_, index, shape.data(), shape.rank(), &value));
    }
    if (value == nullptr) return {};
    RawTensor raw;
    check(api.get_tensor_data(value, &raw.data));
    raw.shape = shape;
    raw.present = true;
    return raw;
  }

  void* take(std::size_t bytes) const override { return node_ ? node_.take(bytes) : budget::allocate(bytes); }
  void give_back(void* memory) const noexcept override {
    node_ ? node_.give_back(memory) : budget::release(memory);
  }

  void parallel(void (*run)(void*, std::size_t), std::size_t count, void* data) const override {
    // Few enough batches that handing them out costs little, enough of them that uneven work evens out.
    constexpr std::size_t batches = 64;
    check(api.parallel_for(context_, run, count, std::min(count, batches), data));
  }

 private:
  KernelContext* context_;
  placement::Node& node_;
};

// What ONNX Runtime keeps of a node.
struct Kernel {
  const Declaration& declaration;
  std::unique_ptr<void, void (*)(void*)> object;
};

template <class Work>
Status* guarded(const char* name, const Work& work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return error_status(name, error.what());
  } catch (...) {
    return error_status(name, "unknown error");
  }
}

// Output → input whose memory it continues, in the form that ONNX Runtime asks for.
struct Aliases {
  std::vector<int> inputs, outputs;

  explicit Aliases(std::span<const Port> ports) {
    for (std::size_t i = 0; i < ports.size(); ++i) {
      if (ports[i].use.alias < 0) continue;
      inputs.push_back(ports[i].use.alias);
      outputs.push_back(static_cast<int>(i));
    }
  }
};

struct Operator : CustomOp {
  const Declaration* declaration = nullptr;

  static const Declaration& of(const CustomOp* op) { return *static_cast<const Operator*>(op)->declaration; }
};

std::vector<Aliases>& all_aliases() {
  static std::vector<Aliases> aliases;
  return aliases;
}

// ONNX Runtime does not say which operator it asks about, so each has a function of its own.
using AliasMap = std::size_t (*)(int**, int**);
template <std::size_t... I>
constexpr std::array<AliasMap, sizeof...(I)> make_alias_maps(std::index_sequence<I...>) {
  return {[](int** inputs, int** outputs) -> std::size_t {
    Aliases& own = all_aliases()[I];
    *inputs = own.inputs.data();
    *outputs = own.outputs.data();
    return own.inputs.size();
  }...};
}
constexpr auto alias_maps = make_alias_maps(std::make_index_sequence<2 * most_operators>());

Status* create(const CustomOp* op, const void*, const KernelInfo* info, void** kernel) {
  const Declaration& declaration = Operator::of(op);
  return guarded(declaration.name, [&] {
    const NodeAttributes source(info);
    Kernel made{declaration, {edge_bcs::create(declaration, Attributes(source)), declaration.destroy}};
    *kernel = std::make_unique<Kernel>(std::move(made)).release();
  });
}

Status* compute(void* raw, KernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(raw);
  const Declaration& declaration = kernel.declaration;
  return guarded(declaration.name, [&] {
    placement::Node node(declaration);
    const KernelCall call(context, node);
    Context given(call, declaration.inputs, declaration.outputs);
    declaration.compute(kernel.object.get(), given);
  });
}

Characteristic characteristic(const Port& port) {
  if (port.use.variadic) return Characteristic::variadic;
  return port.use.optional ? Characteristic::optional : Characteristic::required;
}

Operator described(const Declaration& declaration, AliasMap alias_map) {
  Operator made{};
  made.declaration = &declaration;
  made.version = api_version;
  made.get_name = [](const CustomOp* op) { return Operator::of(op).name; };
  made.get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
  made.get_input_type = [](const CustomOp* op, std::size_t i) { return Operator::of(op).inputs[i].type; };
  made.get_input_count = [](const CustomOp* op) { return Operator::of(op).inputs.size(); };
  made.get_output_type = [](const CustomOp* op, std::size_t i) { return Operator::of(op).outputs[i].type; };
  made.get_output_count = [](const CustomOp* op) { return Operator::of(op).outputs.size(); };
  made.destroy = [](void* kernel) { std::unique_ptr<Kernel>(static_cast<Kernel*>(kernel)).reset(); };
  made.get_input_characteristic = [](const CustomOp* op, std::size_t i) {
    return characteristic(Operator::of(op).inputs[i]);
  };
  made.get_output_characteristic = [](const CustomOp* op, std::size_t i) {
    return characteristic(Operator::of(op).outputs[i]);
  };
  made.get_input_memory_type = [](const CustomOp*, std::size_t) { return MemoryType::by_default; };
  made.get_variadic_input_min_arity = [](const CustomOp*) { return 1; };
  made.get_variadic_input_homogeneity = [](const CustomOp*) { return 0; };
  made.get_variadic_output_min_arity = [](const CustomOp*) { return 1; };
  made.get_variadic_output_homogeneity = [](const CustomOp*) { return 0; };
  made.create_kernel_v2 = create;
  made.compute_v2 = compute;
  made.get_start_version = [](const CustomOp*) { return 1; };
  made.get_end_version = [](const CustomOp*) { return 0x7fffffff; };
  made.get_may_inplace = [](int**, int**) -> std::size_t { return 0; };
  made.release_may_inplace = [](int*, int*) {};
  made.get_alias_map = alias_map;
  made.release_alias_map = [](int*, int*) {};
  return made;
}

// The operators of both domains, made at the first call.
struct Described {
  std::array<std::vector<Operator>, 2> of;
  std::array<std::vector<const CustomOp*>, 2> pointers;

  Described() {
    for (const Domain domain : {Domain::edge_bcs, Domain::microsoft}) {
      const auto at = static_cast<std::size_t>(domain);
      const std::vector<Declaration>& declared = operators(domain);
      if (declared.size() > most_operators) fail("more than ", most_operators, " operators in a domain");
      for (const Declaration& declaration : declared) {
        of[at].push_back(described(declaration, alias_maps[all_aliases().size()]));
        all_aliases().emplace_back(declaration.outputs);
      }
      for (const Operator& op : of[at]) pointers[at].push_back(&op);
    }
  }
};

}  // namespace

void check(Status* status) {
  if (status == nullptr) return;
  const std::unique_ptr<Status, void (*)(Status*)> owned(status, api.release_status);
  throw Error(api.get_error_message(status));
}

Status* error_status(const char* name, const char* message) {
  return api.create_status(ErrorCode::fail, (std::string(name) + ": " + message).c_str());
}

void make_in_half_precision(bool half) { half_precision = half; }

std::span<const CustomOp* const> custom_ops(Domain domain) {
  // Never destroyed: ONNX Runtime keeps the pointers until the very end of the process.
  alignas(Described) static std::byte storage[sizeof(Described)];
  static const Described* const made = new (storage) Described();
  return made->pointers[static_cast<std::size_t>(domain)];
}

}  // namespace edge_bcs::ort
