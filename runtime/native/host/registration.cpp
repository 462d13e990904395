// The entry point that SessionOptions.register_custom_ops_library calls.

#include <atomic>
#include <exception>
#include <mutex>
#include <span>
#include <sstream>
#include <string>

#include "host/bridge.h"
#include "host/budget.h"
#include "host/ort_abi.h"
#include "ops/op.h"

namespace edge_bcs {

ort::Api ort::api{};

namespace {

const char* type_name(ElementType type) {
  switch (type) {
    case float32:
      return "f32";
    case uint8:
      return "u8";
    case uint16:
      return "u16";
    case int32:
      return "i32";
    case int64:
      return "i64";
    case boolean:
      return "bool";
    default:
      return "any";
  }
}

void write_ports(std::ostringstream& text, std::span<const Port> ports) {
  for (const Port& port : ports) {
    text << ' ' << port.name
         << (port.use.variadic   ? "*:"
             : port.use.optional ? "?:"
                                 : ":")
         << type_name(port.type);
    if (port.use.alias >= 0) text << '=' << port.use.alias;
  }
}

ort::CustomOpDomain* make_domain(Domain which, const char* name) {
  ort::CustomOpDomain* domain = nullptr;
  ort::check(ort::api.create_custom_op_domain(name, &domain));
  for (const ort::CustomOp* op : ort::custom_ops(which))
    ort::check(ort::api.custom_op_domain_add(domain, op));
  return domain;
}

// The domain with every operator of ours; made once and shared by all sessions of the process.
ort::CustomOpDomain* own_domain() {
  static ort::CustomOpDomain* const made = make_domain(Domain::edge_bcs, "edge_bcs");
  return made;
}

// The operators of ONNX Runtime's training builds, for stock builds, which lack them.
ort::CustomOpDomain* training_domain() {
  static ort::CustomOpDomain* const made = make_domain(Domain::microsoft, "com.microsoft");
  return made;
}

std::atomic<bool> provide_training_operators{false};

}  // namespace

}  // namespace edge_bcs

// Every operator of ours, one a line: its name, its inputs, "->", its outputs; a port is name:type, with "?" behind the
// name where it may be absent, "*" where there may be any number of it, and "=i" behind the type where it continues input i.
extern "C" __attribute__((visibility("default"))) const char* edge_bcs_operators() {
  using namespace edge_bcs;
  static const std::string listing = [] {
    std::ostringstream text;
    for (const Declaration& declaration : operators(Domain::edge_bcs)) {
      text << declaration.name;
      write_ports(text, declaration.inputs);
      text << " ->";
      write_ports(text, declaration.outputs);
      text << '\n';
    }
    return text.str();
  }();
  return listing.c_str();
}

// Whether sessions that are opened from now on also get the operators of ONNX Runtime's training builds (domain
// com.microsoft). Off at first: a training build has its own.
extern "C" __attribute__((visibility("default"))) void edge_bcs_provide_training_operators(int provide) {
  edge_bcs::provide_training_operators = provide != 0;
}

// Whether sessions that this thread opens from now on keep their activations in half precision. Off at first.
extern "C" __attribute__((visibility("default"))) void edge_bcs_half_precision(int half) {
  edge_bcs::ort::make_in_half_precision(half != 0);
}

extern "C" __attribute__((visibility("default"))) edge_bcs::ort::Status* RegisterCustomOps(
    edge_bcs::ort::SessionOptions* options, const edge_bcs::ort::ApiBase* base) {
  using namespace edge_bcs;
  const void* table = base->get_api(ort::api_version);
  if (table == nullptr)
    return nullptr;  // older than 1.18: the session then says that it does not know the operators
  static std::once_flag once;
  std::call_once(once, [&] { ort::api.load(table); });
  try {
    budget::register_with_environment();
    if (provide_training_operators) ort::check(ort::api.add_custom_op_domain(options, training_domain()));
    return ort::api.add_custom_op_domain(options, own_domain());
  } catch (const std::exception& error) {
    return ort::error_status("edge-bcs", error.what());
  }
}
