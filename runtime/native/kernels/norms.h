// Work of norms: sums for each of the images that lie innermost, and the gradient of a norm with the batch's statistics.
#pragma once

#include <cstdint>

namespace edge_bcs {

// Rows of two planes, of `lanes` images side by side: `count` floats each, a multiple of `lanes`, and from one row of a plane
// to the next so many floats.
struct LaneRows {
  std::int64_t lanes = 1, count = 0, rows = 1;
  const float* a = nullptr;
  std::int64_t a_step = 0;
  double a_origin = 0;
  const float* b = nullptr;
  std::int64_t b_step = 0;
  double b_origin = 0;
};

// One row of batch norm's gradient: out = scale · ((d − mean_d) − slope · (x − mean)), with a scale for each lane.
struct NormRow {
  std::int64_t lanes = 1, count = 0;
  const float* scale = nullptr;
  const float* d = nullptr;
  float mean_d = 0;
  const float* x = nullptr;
  float mean = 0, slope = 0;
  float* out = nullptr;
};

struct NormKernels {
  // For each lane: sums += Σ (a − a_origin), products += Σ (a − a_origin) · (b − b_origin), in double, pixel after pixel.
  void (*lane_sums)(const LaneRows&, double* sums, double* products);
  void (*gradient)(const NormRow&);
};

extern const NormKernels norm_kernels_scalar;
extern const NormKernels norm_kernels_avx2;
extern const NormKernels norm_kernels_avx512;
extern const NormKernels norm_kernels_neon;

}  // namespace edge_bcs
