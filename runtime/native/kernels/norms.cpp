// See norms.h. The scalar variant, and numbers of lanes that no vector holds, take a float at a time.
#include "kernels/norms.h"

#include "kernels/simd.h"
#include "kernels/table.h"

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace {

// Sums of `parts` · `width` lanes, which stay in registers.
template <int width, int parts>
void lane_sums_in_registers(const LaneRows& rows, double* sums, double* products) {
  typedef double Doubles __attribute__((vector_size(width * sizeof(double))));
  const auto wide = [](const float* from) { return __builtin_convertvector(load<width>(from), Doubles); };
  Doubles sum[parts]{}, product[parts]{};
  const double a_origin = rows.a_origin, b_origin = rows.b_origin;
  for (std::int64_t y = 0; y < rows.rows; ++y) {
    const float* const a = rows.a + y * rows.a_step;
    const float* const b = rows.b + y * rows.b_step;
    for (std::int64_t j = 0; j < rows.count; j += parts * width)
#pragma GCC unroll 8
      for (int part = 0; part < parts; ++part) {
        const Doubles u = wide(a + j + part * width) - a_origin, v = wide(b + j + part * width) - b_origin;
        sum[part] += u;
        product[part] += u * v;
      }
  }
  for (int part = 0; part < parts; ++part)
    for (int lane = 0; lane < width; ++lane) {
      sums[part * width + lane] += sum[part][lane];
      products[part * width + lane] += product[part][lane];
    }
}

void lane_sums(const LaneRows& rows, double* sums, double* products) {
  constexpr int width = longest >= 4 ? longest / 2 : 1;
  if constexpr (width > 1) {
    if (rows.lanes == 16) return lane_sums_in_registers<width, 16 / width>(rows, sums, products);
    if (rows.lanes == 8) return lane_sums_in_registers<width, 8 / width>(rows, sums, products);
    if (rows.lanes == 4 && width <= 4)
      return lane_sums_in_registers<(width < 4 ? width : 4), (width < 4 ? 4 / width : 1)>(rows, sums,
                                                                                          products);
  }
  for (std::int64_t y = 0; y < rows.rows; ++y) {
    const float* const a = rows.a + y * rows.a_step;
    const float* const b = rows.b + y * rows.b_step;
    for (std::int64_t j = 0; j < rows.count; j += rows.lanes)
      for (std::int64_t lane = 0; lane < rows.lanes; ++lane) {
        const double u = a[j + lane] - rows.a_origin, v = b[j + lane] - rows.b_origin;
        sums[lane] += u;
        products[lane] += u * v;
      }
  }
}

template <int VL>
EDGE_BCS_INLINE void norm_gradient_vector(const NormRow& row, std::int64_t j, Vector<VL> scale) {
  const Vector<VL> centred = load<VL>(row.d + j) - row.mean_d;
  store<VL>(row.out + j, scale * (centred - row.slope * (load<VL>(row.x + j) - row.mean)));
}

void norm_gradient(const NormRow& row) {
  std::int64_t j = 0;
  if (longest > 1 && 16 % row.lanes == 0) {  // a pattern of scales that repeats with the vectors
    constexpr int vectors = 16 / longest;
    float pattern[16];
    for (int i = 0; i < 16; ++i) pattern[i] = row.scale[i % row.lanes];
    Vector<longest> scale[vectors];
    for (int i = 0; i < vectors; ++i) scale[i] = load<longest>(pattern + i * longest);
    for (; j + 16 <= row.count; j += 16)
#pragma GCC unroll 4
      for (int i = 0; i < vectors; ++i) norm_gradient_vector<longest>(row, j + i * longest, scale[i]);
  }
  for (std::int64_t lane = j % row.lanes; j < row.count; ++j) {
    norm_gradient_vector<1>(row, j, broadcast<1>(row.scale[lane]));
    if (++lane == row.lanes) lane = 0;
  }
}

}  // namespace
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const NormKernels EDGE_BCS_JOIN(norm_kernels_, EDGE_BCS_VARIANT) = {
    EDGE_BCS_KERNEL_NAMESPACE::lane_sums,
    EDGE_BCS_KERNEL_NAMESPACE::norm_gradient,
};

}  // namespace edge_bcs
