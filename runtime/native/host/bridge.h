// Our operators as ONNX Runtime knows them.
#pragma once

#include <span>

#include "host/ort_abi.h"
#include "ops/op.h"

namespace edge_bcs::ort {

// Turns a status that is not null into an Error.
void check(Status* status);

// "NAME: MESSAGE" as a status.
Status* error_status(const char* name, const char* message);

// Whether what this thread makes of operators from now on has stacks in half precision (ops/stack.h).
void make_in_half_precision(bool half);

// Every operator of a domain; made once, and never destroyed.
std::span<const CustomOp* const> custom_ops(Domain domain);

}  // namespace edge_bcs::ort
