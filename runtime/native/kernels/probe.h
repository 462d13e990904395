// What a core can do at most: the roof under which the kernels work.
#pragma once

#include <cstdint>

namespace edge_bcs {

struct ProbeKernels {
  // Runs `rounds` rounds of independent multiply-adds in registers and returns how many floating-point operations these
  // were (two each).
  std::int64_t (*multiply_adds)(std::int64_t rounds);
  // The sum of `count` floats, read in order.
  float (*sum)(const float* from, std::int64_t count);
  // to[i] = from[i].
  void (*copy)(const float* from, float* to, std::int64_t count);
};

extern const ProbeKernels probe_kernels_scalar;
extern const ProbeKernels probe_kernels_avx2;
extern const ProbeKernels probe_kernels_avx512;
extern const ProbeKernels probe_kernels_neon;

}  // namespace edge_bcs
