// The entry point that SessionOptions.register_custom_ops_library calls.

#include <exception>
#include <mutex>
#include <vector>

#include "budget.h"
#include "op.h"
#include "ort_abi.h"

namespace edge_bcs {

ort::Api ort::api{};

namespace {

std::vector<const ort::CustomOp*>& registry() {
  static std::vector<const ort::CustomOp*> ops;
  return ops;
}

// The domain with every operator; made once and shared by all sessions of the process.
ort::CustomOpDomain* domain() {
  static ort::CustomOpDomain* const made = [] {
    ort::CustomOpDomain* domain = nullptr;
    detail::check(ort::api.create_custom_op_domain("edge_bcs", &domain));
    for (const ort::CustomOp* op : registry()) detail::check(ort::api.custom_op_domain_add(domain, op));
    return domain;
  }();
  return made;
}

}  // namespace

void detail::add_to_registry(const ort::CustomOp* op) { registry().push_back(op); }

}  // namespace edge_bcs

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
    return ort::api.add_custom_op_domain(options, domain());
  } catch (const std::exception& error) {
    return detail::error_status("edge-bcs", error.what());
  }
}
