// Standard normal draws from Philox4x32-10, many at a time.
#pragma once

#include <cstdint>

namespace edge_bcs {

// What makes the blocks of one (seed, step, purpose); philox.h says how.
struct NormalStream {
  std::uint32_t key[2];
  std::uint32_t step_low;
  std::uint32_t tag;
};

struct NormalKernels {
  // numbers[4i … 4i + 3] = the standard normal quantiles of the four words of block `first` + i, for i < `blocks`: the
  // same bits as normal_from_word in philox.h gives, in every variant.
  void (*normals)(const NormalStream&, std::uint64_t first, int blocks, float* numbers);
};

extern const NormalKernels normal_kernels_scalar;
extern const NormalKernels normal_kernels_avx2;
extern const NormalKernels normal_kernels_avx512;
extern const NormalKernels normal_kernels_neon;

}  // namespace edge_bcs
