// See rows.h. The scalar variant is the same code, one float at a time.
#include "kernels/rows.h"

#include "kernels/simd.h"
#include "kernels/table.h"

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace {

template <int VL>
EDGE_BCS_INLINE void combine_vector(const Row& row, std::int64_t j) {
  Vector<VL> value = load<VL>(row.a + j) * row.scale + row.shift;
  if (row.addend != nullptr) value += load<VL>(row.addend + j);
  if (row.relu) value = relu<VL>(value);
  if (row.mask != nullptr) value = where_positive<VL>(load<VL>(row.mask + j), value);
  if (row.mask_bits != nullptr) value = where_bits<VL>(load_bits<VL>(row.mask_bits, j), value);
  store<VL>(row.out + j, value);
  if (row.bits != nullptr) store_bits<VL>(row.bits, j, positive_bits<VL>(value));
}

void combine(const Row& row) {
  std::int64_t j = 0;
  for (; j + longest <= row.count; j += longest) combine_vector<longest>(row, j);
  for (; j < row.count; ++j) combine_vector<1>(row, j);
}


template <int VL>
void max_pool_lanes(const PoolRow& pool, const float* input, bool rectify, float* y, std::uint8_t* choice) {
  for (std::int64_t x = 0; x < pool.out_width; ++x) {
    const std::int64_t left = pool.left(x), right = pool.right(x);
    const float* window = input + (x * pool.stride - pool.padding) * pool.lanes;
    for (std::int64_t b = 0; b < pool.lanes; b += VL) {
      Vector<VL> best = load<VL>(window + pool.top * pool.row + left * pool.lanes + b);
      Integers<VL> where = Integers<VL>{} + static_cast<std::int32_t>(pool.top * pool.kernel + left);
      for (std::int64_t ky = pool.top; ky < pool.bottom; ++ky)
        for (std::int64_t kx = left; kx < right; ++kx) {
          const Vector<VL> pixel = load<VL>(window + ky * pool.row + kx * pool.lanes + b);
          // Not a number wins, so that it is seen.
          const Integers<VL> more = (pixel > best) | (pixel != pixel);
          best = more ? pixel : best;
          where = more ? Integers<VL>{} + static_cast<std::int32_t>(ky * pool.kernel + kx) : where;
        }
      if (rectify) {
        const Integers<VL> stopped = best <= Vector<VL>{};
        where = stopped ? Integers<VL>{} + no_choice : where;
        best = stopped ? Vector<VL>{} : best;
      }
      store<VL>(y + x * pool.lanes + b, best);
      if (choice != nullptr) store_bytes<VL>(choice + x * pool.lanes + b, where);
    }
  }
}

template <int VL>
void gradient_lanes(const PoolRow& pool, const float* dy, const std::uint8_t* choice, bool add, float* dx) {
  for (std::int64_t x = 0; x < pool.out_width; ++x) {
    const std::int64_t left = pool.left(x), right = pool.right(x);
    float* window = dx + (x * pool.stride - pool.padding) * pool.lanes;
    for (std::int64_t b = 0; b < pool.lanes; b += VL) {
      const Vector<VL> gradient = load<VL>(dy + x * pool.lanes + b);
      const Integers<VL> where = load_bytes<VL>(choice + x * pool.lanes + b);
      for (std::int64_t ky = pool.top; ky < pool.bottom; ++ky)
        for (std::int64_t kx = left; kx < right; ++kx) {
          float* pixel = window + ky * pool.row + kx * pool.lanes + b;
          const Integers<VL> here = where == Integers<VL>{} + static_cast<std::int32_t>(ky * pool.kernel + kx);
          const Vector<VL> passed = here ? gradient : Vector<VL>{};
          store<VL>(pixel, add ? load<VL>(pixel) + passed : passed);
        }
    }
  }
}

// Calls body.template operator()<vector length>() with the longest vectors that cut `lanes` evenly.
template <class Body>
void with_lanes(std::int64_t lanes, const Body& body) {
  if constexpr (longest >= 16) {
    if (lanes % 16 == 0) return body.template operator()<16>();
  }
  if constexpr (longest >= 8) {
    if (lanes % 8 == 0) return body.template operator()<8>();
  }
  if constexpr (longest >= 4) {
    if (lanes % 4 == 0) return body.template operator()<4>();
  }
  body.template operator()<1>();
}

void max_pool(const PoolRow& pool, const float* input, bool rectify, float* y, std::uint8_t* choice) {
  with_lanes(pool.lanes, [&]<int VL>() { max_pool_lanes<VL>(pool, input, rectify, y, choice); });
}

void max_pool_gradient(const PoolRow& pool, const float* dy, const std::uint8_t* choice, bool add, float* dx) {
  with_lanes(pool.lanes, [&]<int VL>() { gradient_lanes<VL>(pool, dy, choice, add, dx); });
}

}  // namespace
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const RowKernels EDGE_BCS_JOIN(row_kernels_, EDGE_BCS_VARIANT) = {
    EDGE_BCS_KERNEL_NAMESPACE::combine,
    EDGE_BCS_KERNEL_NAMESPACE::max_pool,
    EDGE_BCS_KERNEL_NAMESPACE::max_pool_gradient,
};

}  // namespace edge_bcs
