// Rows in half precision with AVX-512 BF16, and the table of its kernels.
#include "kernels/half_tiles.h"

#if defined(__AVX512BF16__)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace half_precision {
namespace {

template <int VL>
void widen_row(const Number* row, std::int64_t first, std::int64_t count, float* to) {
  std::int64_t x = first;
  const std::int64_t end = first + count;
  if (x % 2 != 0 && x < end) {
    store<VL>(to, upper<VL>(load_pair<VL>(row + (x - 1) * VL)));
    ++x, to += VL;
  }
  for (; x + 2 <= end; x += 2, to += 2 * VL) {
    const Integers<VL> pair = load_pair<VL>(row + x * VL);
    store<VL>(to, lower<VL>(pair));
    store<VL>(to + VL, upper<VL>(pair));
  }
  if (x < end) store<VL>(to, lower<VL>(load_pair<VL>(row + x * VL)));
}

template <int VL>
void narrow_row(const float* from, std::int64_t count, Number* row) {
  std::int64_t x = 0;
  for (; x + 2 <= count; x += 2)
    store_pair<VL>(row + x * VL, pair_of<VL>(load<VL>(from + x * VL), load<VL>(from + (x + 1) * VL)));
  if (x < count) store_pair<VL>(row + x * VL, pair_of<VL>(load<VL>(from + x * VL), Vector<VL>{}));
}

void widen(const Number* row, std::int64_t lanes, std::int64_t first, std::int64_t count, float* to) {
  lanes == 16 ? widen_row<16>(row, first, count, to) : widen_row<8>(row, first, count, to);
}

void narrow(const float* from, std::int64_t lanes, std::int64_t count, Number* row) {
  lanes == 16 ? narrow_row<16>(from, count, row) : narrow_row<8>(from, count, row);
}

}  // namespace
}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

namespace variant = EDGE_BCS_KERNEL_NAMESPACE::half_precision;

const HalfKernels half_kernels_avx512bf16 = {
    {variant::sparse_tasks, variant::sparse, variant::pack_tasks, variant::pack, variant::dense_tasks,
     variant::dense},
    nullptr,
    variant::widen,
    variant::narrow,
};

}  // namespace edge_bcs

#endif
