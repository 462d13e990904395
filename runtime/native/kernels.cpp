#include "kernels.h"

#include "isa.h"

namespace edge_bcs {

#ifdef EDGE_BCS_HAVE_AVX512
#define EDGE_BCS_AVX512(table) \
  case Isa::avx512: return table##_avx512;
#else
#define EDGE_BCS_AVX512(table)
#endif
#ifdef EDGE_BCS_HAVE_AVX2
#define EDGE_BCS_AVX2(table) \
  case Isa::avx2: return table##_avx2;
#else
#define EDGE_BCS_AVX2(table)
#endif
#ifdef EDGE_BCS_HAVE_NEON
#define EDGE_BCS_NEON(table) \
  case Isa::neon: return table##_neon;
#else
#define EDGE_BCS_NEON(table)
#endif
#define EDGE_BCS_SELECT(table)         \
  switch (selected_isa()) {            \
    EDGE_BCS_AVX512(table)             \
    EDGE_BCS_AVX2(table)               \
    EDGE_BCS_NEON(table)               \
    default: return table##_scalar;    \
  }

const RowKernels& row_kernels() { EDGE_BCS_SELECT(row_kernels) }
const NormalKernels& normal_kernels() { EDGE_BCS_SELECT(normal_kernels) }
const ProbeKernels& probe_kernels() { EDGE_BCS_SELECT(probe_kernels) }

}  // namespace edge_bcs

// As edge_bcs_conv_kernels in isa.cpp.
#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))
EDGE_BCS_EXPORT const edge_bcs::RowKernels* edge_bcs_row_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::row_kernels_scalar : &edge_bcs::row_kernels();
}
EDGE_BCS_EXPORT const edge_bcs::NormalKernels* edge_bcs_normal_kernels(int scalar) {
  return scalar != 0 ? &edge_bcs::normal_kernels_scalar : &edge_bcs::normal_kernels();
}
