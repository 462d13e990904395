// The part of ONNX Runtime's C ABI that the library uses, declared by slot number.
//
// No package ships the C headers, and the ABI is append-only and versioned, so a short declaration of our own
// is enough: a function is the pointer at a fixed slot of the table that OrtApiBase::GetApi returns, and
// OrtCustomOp and OrtAllocator are structs with fixed offsets (checked by the static_asserts below).
#pragma once

#include <cstddef>
#include <cstdint>

#include "ops/op.h"

namespace edge_bcs::ort {

struct Status;
struct Env;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct MemoryInfo;

// ONNXTensorElementDataType.
using ElementType = edge_bcs::ElementType;

enum class ErrorCode : std::int32_t { fail = 1, invalid_argument = 2, runtime_exception = 6 };
enum class Characteristic : std::int32_t { required = 0, optional = 1, variadic = 2 };
enum class AllocatorType : std::int32_t { device = 0 };
enum class MemoryType : std::int32_t { by_default = 0 };
enum class LoggingLevel : std::int32_t { warning = 2 };

// The newest version of the ABI that we rely on (alias maps); every ONNX Runtime from 1.18 on provides it.
inline constexpr std::uint32_t api_version = 18;

// OrtApiBase.
struct ApiBase {
  const void* (*get_api)(std::uint32_t version);
  const char* (*get_version_string)();
};

// OrtCustomOp.
struct CustomOp {
  std::uint32_t version;
  void* (*create_kernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, std::size_t);
  std::size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, std::size_t);
  std::size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  Characteristic (*get_input_characteristic)(const CustomOp*, std::size_t);
  Characteristic (*get_output_characteristic)(const CustomOp*, std::size_t);
  MemoryType (*get_input_memory_type)(const CustomOp*, std::size_t);
  int (*get_variadic_input_min_arity)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min_arity)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  std::size_t (*get_may_inplace)(int** inputs, int** outputs);
  void (*release_may_inplace)(int* inputs, int* outputs);
  std::size_t (*get_alias_map)(int** inputs, int** outputs);
  void (*release_alias_map)(int* inputs, int* outputs);
};
static_assert(sizeof(void*) != 8 || sizeof(CustomOp) == 208);
static_assert(sizeof(void*) != 8 || offsetof(CustomOp, create_kernel_v2) == 136);
static_assert(sizeof(void*) != 8 || offsetof(CustomOp, get_alias_map) == 192);

// OrtAllocator; the functions after `reserve` exist in newer versions only and stay null.
struct Allocator {
  std::uint32_t version;
  void* (*alloc)(Allocator*, std::size_t bytes);
  void (*free)(Allocator*, void*);
  const MemoryInfo* (*info)(const Allocator*);
  void* (*reserve)(Allocator*, std::size_t bytes);
  void* newer[4];
};
static_assert(sizeof(void*) != 8 || offsetof(Allocator, reserve) == 32);

// The functions of OrtApi, by name; `load` fills them from their slots.
struct Api {
  Status* (*create_status)(ErrorCode, const char* message);
  const char* (*get_error_message)(const Status*);
  Status* (*create_env)(LoggingLevel, const char* id, Env**);
  Status* (*create_custom_op_domain)(const char* domain, CustomOpDomain**);
  Status* (*custom_op_domain_add)(CustomOpDomain*, const CustomOp*);
  Status* (*add_custom_op_domain)(SessionOptions*, CustomOpDomain*);
  Status* (*get_tensor_data)(Value*, void** data);
  Status* (*get_element_type)(const ShapeInfo*, ElementType*);
  Status* (*get_rank)(const ShapeInfo*, std::size_t*);
  Status* (*get_dimensions)(const ShapeInfo*, std::int64_t* dimensions, std::size_t rank);
  Status* (*get_type_and_shape)(const Value*, ShapeInfo**);
  Status* (*create_cpu_memory_info)(AllocatorType, MemoryType, MemoryInfo**);
  Status* (*attribute_float)(const KernelInfo*, const char* name, float*);
  Status* (*attribute_int)(const KernelInfo*, const char* name, std::int64_t*);
  Status* (*attribute_string)(const KernelInfo*, const char* name, char*, std::size_t* size);
  Status* (*attribute_floats)(const KernelInfo*, const char* name, float*, std::size_t* size);
  Status* (*attribute_ints)(const KernelInfo*, const char* name, std::int64_t*, std::size_t* size);
  Status* (*input_count)(const KernelContext*, std::size_t*);
  Status* (*output_count)(const KernelContext*, std::size_t*);
  Status* (*get_input)(const KernelContext*, std::size_t index, const Value**);
  Status* (*get_output)(KernelContext*, std::size_t index, const std::int64_t* dimensions, std::size_t rank,
                        Value**);
  void (*release_status)(Status*);
  void (*release_shape_info)(ShapeInfo*);
  Status* (*register_allocator)(Env*, Allocator*);
  Status* (*parallel_for)(const KernelContext*, void (*body)(void*, std::size_t), std::size_t total,
                          std::size_t batches, void* data);

  void load(const void* table) {
    const auto* slots = static_cast<void* const*>(table);
    fill(create_status, slots[0]);
    fill(get_error_message, slots[2]);
    fill(create_env, slots[3]);
    fill(create_custom_op_domain, slots[26]);
    fill(custom_op_domain_add, slots[27]);
    fill(add_custom_op_domain, slots[28]);
    fill(get_tensor_data, slots[51]);
    fill(get_element_type, slots[60]);
    fill(get_rank, slots[61]);
    fill(get_dimensions, slots[62]);
    fill(get_type_and_shape, slots[65]);
    fill(create_cpu_memory_info, slots[69]);
    fill(attribute_float, slots[85]);
    fill(attribute_int, slots[86]);
    fill(attribute_string, slots[87]);
    fill(input_count, slots[88]);
    fill(output_count, slots[89]);
    fill(get_input, slots[90]);
    fill(get_output, slots[91]);
    fill(release_status, slots[93]);
    fill(release_shape_info, slots[99]);
    fill(attribute_floats, slots[162]);
    fill(attribute_ints, slots[163]);
    fill(register_allocator, slots[176]);
    fill(parallel_for, slots[274]);
  }

 private:
  template <class Function>
  static void fill(Function*& function, void* slot) {
    function = reinterpret_cast<Function*>(slot);
  }
};

// The table of the ONNX Runtime that loaded the library; filled by RegisterCustomOps before anything else
// runs.
extern Api api;

}  // namespace edge_bcs::ort
