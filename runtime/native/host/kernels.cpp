#include "ops/dispatch.h"

// The kernels of this machine's instruction set and, with `scalar` not 0, the scalar ones that they are checked against.
#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))
EDGE_BCS_EXPORT const edge_bcs::ConvKernels* edge_bcs_conv_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::conv_kernels_scalar : &edge_bcs::conv_kernels();
}
EDGE_BCS_EXPORT const edge_bcs::RowKernels* edge_bcs_row_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::row_kernels_scalar : &edge_bcs::row_kernels();
}
EDGE_BCS_EXPORT const edge_bcs::NormalKernels* edge_bcs_normal_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::normal_kernels_scalar : &edge_bcs::normal_kernels();
}
