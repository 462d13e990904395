#include "ops/dispatch.h"

// The kernels of this machine's instruction set and, with `scalar` not 0, the scalar ones that they are checked against.
#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))
EDGE_BCS_EXPORT const edge_bcs::ConvKernels* edge_bcs_conv_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::conv_kernels_scalar : &edge_bcs::conv_kernels();
}
EDGE_BCS_EXPORT const edge_bcs::RowKernels* edge_bcs_row_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::row_kernels_scalar : &edge_bcs::row_kernels();
}
EDGE_BCS_EXPORT const edge_bcs::NormKernels* edge_bcs_norm_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::norm_kernels_scalar : &edge_bcs::norm_kernels();
}
// What this machine can do in half precision: 2 if its processor has the arithmetic, 1 if only the scalar kernels compute it, 0
// if nothing does.
EDGE_BCS_EXPORT int edge_bcs_half_kernels() {
  return edge_bcs::has_half_arithmetic() ? 2 : edge_bcs::has_half_kernels() ? 1 : 0;
}
EDGE_BCS_EXPORT const edge_bcs::HalfKernels* edge_bcs_half_kernel_table(int scalar) {
  return scalar != 0 ? &edge_bcs::half_kernels_scalar : &edge_bcs::half_kernels();
}
EDGE_BCS_EXPORT const edge_bcs::NormalKernels* edge_bcs_normal_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::normal_kernels_scalar : &edge_bcs::normal_kernels();
}
