// Which of the compiled kernel variants this machine runs, and its kernels.
#pragma once

#include <cstdint>

#include "kernels/half.h"
#include "kernels/half_rows.h"
#include "kernels/normal.h"
#include "kernels/norms.h"
#include "kernels/probe.h"
#include "kernels/rows.h"
#include "kernels/walk.h"

namespace edge_bcs {

enum class Isa { scalar, avx2, avx512, neon };

// The best variant that was compiled and that the processor has. The environment variable EDGE_BCS_ISA (a
// name as below) asks for another; one that cannot run here is ignored. Decided once.
Isa selected_isa();

// "scalar", "avx2", "avx512" or "neon".
const char* isa_name(Isa isa);

// Bytes of a core's first-level data cache; 32 KiB where the system does not say. How much of it a kernel fills decides
// how fast it is, not what it computes.
std::int64_t first_level_cache();

// The kernels of that variant.
const ConvKernels& conv_kernels();
const RowKernels& row_kernels();
const NormKernels& norm_kernels();
const NormalKernels& normal_kernels();
const ProbeKernels& probe_kernels();

// Whether the processor has arithmetic in half precision, so that an attack in it pays.
bool has_half_arithmetic();
// Whether half precision can be computed here: by that arithmetic, or by the scalar reference if that is the variant.
bool has_half_kernels();
const HalfKernels& half_kernels();
// Null where rows are widened.
const HalfRowKernels* half_rows();

}  // namespace edge_bcs
