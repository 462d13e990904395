// Rows of bfloat16 in pairs. The pixels of a window of 2 × 2 in one row are one word.
#include "kernels/half_rows.h"

#include "kernels/best.h"
#include "kernels/half_tiles.h"

#if defined(__AVX512BF16__)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace half_precision {
namespace {

template <int VL>
EDGE_BCS_INLINE Vector<VL> finished(const Row& row, std::int64_t pixel, Vector<VL> value, Vector<VL> mask) {
  const std::int64_t bit = pixel * VL;
  if (row.bits != nullptr) store_bits<VL>(row.bits, bit, positive_bits<VL>(value));
  if (row.activation.function == Function::relu) value = relu<VL>(value);
  if (row.mask != nullptr) value = where_positive<VL>(mask, value);
  if (row.mask_bits != nullptr) value = where_bits<VL>(load_bits<VL>(row.mask_bits, bit), value);
  return value;
}

template <int VL>
void combine_row(const Row& row, std::int64_t count) {
  for (std::int64_t x = 0; x < count; x += 2) {
    const Integers<VL> pair = load_pair<VL>(numbers(row.a) + x * VL);
    Vector<VL> first = lower<VL>(pair) * row.scale + row.shift,
               second = upper<VL>(pair) * row.scale + row.shift;
    if (row.addend != nullptr) {
      const Integers<VL> addend = load_pair<VL>(numbers(row.addend) + x * VL);
      first += lower<VL>(addend);
      second += upper<VL>(addend);
    }
    const Integers<VL> mask =
        row.mask == nullptr ? Integers<VL>{} : load_pair<VL>(numbers(row.mask) + x * VL);
    first = finished<VL>(row, x, first, lower<VL>(mask));
    second = x + 1 < count ? finished<VL>(row, x + 1, second, upper<VL>(mask)) : Vector<VL>{};
    store_pair<VL>(numbers(row.out) + x * VL, pair_of<VL>(first, second));
  }
}

void combine(const Row& row, std::int64_t lanes, std::int64_t count) {
  lanes == 16 ? combine_row<16>(row, count) : combine_row<8>(row, count);
}

// The maximum of a window in as many images, from its two pairs.
template <int VL>
EDGE_BCS_INLINE Best<VL> best_of(const Number* upper_pair, const Number* lower_pair, Function function) {
  const Integers<VL> first = load_pair<VL>(upper_pair), second = load_pair<VL>(lower_pair);
  Best<VL> best{lower<VL>(first), Integers<VL>{}}, below{lower<VL>(second), Integers<VL>{} + 2};
  best.consider(upper<VL>(first), Integers<VL>{} + 1);
  below.consider(upper<VL>(second), Integers<VL>{} + 3);
  best.consider(below.value, below.where);
  best.activate(function);
  return best;
}

template <int VL>
void max_pool_row(const Number* upper_row, const Number* lower_row, std::int64_t count, Function function,
                  Number* y, std::uint8_t* choice) {
  const auto best_at = [&](std::int64_t x) {
    const Best<VL> best = best_of<VL>(upper_row + 2 * x * VL, lower_row + 2 * x * VL, function);
    if (choice != nullptr) store_bytes<VL>(choice + x * VL, best.where);
    return reinterpret_cast<Integers<VL>>(best.value);  // of whose halves the lower one is 0
  };
  constexpr std::int32_t lower_half = 0xffff;
  std::int64_t x = 0;
  for (; x + 2 <= count; x += 2) {
    const Integers<VL> first = best_at(x), second = best_at(x + 1);
    store_pair<VL>(y + x * VL, ((first >> 16) & lower_half) | second);
  }
  if (x < count) store_pair<VL>(y + x * VL, (best_at(x) >> 16) & lower_half);
}

// The gradient of a window, in the lower half of each word and in the upper one, where it was chosen.
template <int VL>
EDGE_BCS_INLINE void put_chosen(Integers<VL> low, Integers<VL> high, const std::uint8_t* choice,
                                Number* upper_pair, Number* lower_pair) {
  const Integers<VL> where = load_bytes<VL>(choice);
  store_pair<VL>(upper_pair, (low & (where == 0)) | (high & (where == 1)));
  store_pair<VL>(lower_pair, (low & (where == 2)) | (high & (where == 3)));
}

template <int VL>
void gradient_row(const Number* dy, const std::uint8_t* choice, std::int64_t count, Number* upper_row,
                  Number* lower_row) {
  constexpr std::int32_t lower_half = 0xffff;
  for (std::int64_t x = 0; x < count; x += 2) {
    const Integers<VL> pair = load_pair<VL>(dy + x * VL);
    Number *const to = upper_row + 2 * x * VL, *const below = lower_row + 2 * x * VL;
    put_chosen<VL>(pair & lower_half, pair << 16, choice + x * VL, to, below);
    if (x + 1 < count)
      put_chosen<VL>((pair >> 16) & lower_half, pair & ~lower_half, choice + (x + 1) * VL, to + 2 * VL,
                     below + 2 * VL);
  }
}

void max_pool(const Number* upper, const Number* lower, std::int64_t lanes, std::int64_t count,
              Function function, Number* y, std::uint8_t* choice) {
  lanes == 16 ? max_pool_row<16>(upper, lower, count, function, y, choice)
              : max_pool_row<8>(upper, lower, count, function, y, choice);
}

void gradient(const Number* dy, const std::uint8_t* choice, std::int64_t lanes, std::int64_t count,
              Number* upper, Number* lower) {
  lanes == 16 ? gradient_row<16>(dy, choice, count, upper, lower)
              : gradient_row<8>(dy, choice, count, upper, lower);
}

}  // namespace
}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const HalfRowKernels half_rows_avx512bf16 = {EDGE_BCS_KERNEL_NAMESPACE::half_precision::combine,
                                             EDGE_BCS_KERNEL_NAMESPACE::half_precision::max_pool,
                                             EDGE_BCS_KERNEL_NAMESPACE::half_precision::gradient};

}  // namespace edge_bcs

#endif
