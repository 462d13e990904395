// See rows.h. The scalar variant is the same code, one float at a time.
#include "kernels/rows.h"

#include <cstring>
#include <utility>

#include "kernels/activate.h"
#include "kernels/best.h"
#include "kernels/simd.h"
#include "kernels/table.h"

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace {

template <int VL>
EDGE_BCS_INLINE Vector<VL> scaled_and_added(const Row& row, std::int64_t j) {
  const Vector<VL> value = load<VL>(row.a + j) * row.scale + row.shift;
  return row.addend != nullptr ? value + load<VL>(row.addend + j) : value;
}

template <int VL>
EDGE_BCS_INLINE void combine_vector(const Row& row, std::int64_t j) {
  Vector<VL> value = scaled_and_added<VL>(row, j);
  if (row.bits != nullptr) store_bits<VL>(row.bits, j, positive_bits<VL>(value));
  if (row.activation.function == Function::relu) value = relu<VL>(value);
  if (row.mask != nullptr) value = where_positive<VL>(load<VL>(row.mask + j), value);
  if (row.mask_bits != nullptr) value = where_bits<VL>(load_bits<VL>(row.mask_bits, j), value);
  store<VL>(row.out + j, value);
}

// The same with any activation, for `count` vectors.
inline constexpr int vectors_at_once = 8;
template <int VL>
void combine_activated(const Row& row, std::int64_t j, int count) {
  Vector<VL> values[vectors_at_once], kept[vectors_at_once];
  for (int i = 0; i < count; ++i) values[i] = scaled_and_added<VL>(row, j + i * VL);
  if (row.mask != nullptr)
    for (int i = 0; i < count; ++i) kept[i] = load<VL>(row.mask + j + i * VL);
  if (row.pre != nullptr)
    for (int i = 0; i < count; ++i) store<VL>(row.pre + j + i * VL, values[i]);
  if (row.bits != nullptr)
    for (int i = 0; i < count; ++i)
      store_bits<VL>(row.bits, j + i * VL,
                     positive_bits<VL>(openness<VL>(row.activation.function, values[i])));
  activate<VL>(row.activation, values, count);
  if (row.mask != nullptr) pass_back<VL>(row.through, kept, values, count);
  if (row.mask_bits != nullptr) {
    const Slopes slopes = slopes_of(row.through);
    for (int i = 0; i < count; ++i)
      values[i] = pass_slopes<VL>(slopes, load_bits<VL>(row.mask_bits, j + i * VL), values[i]);
  }
  for (int i = 0; i < count; ++i) store<VL>(row.out + j + i * VL, values[i]);
}

void combine(const Row& row) {
  std::int64_t j = 0;
  if (row.simple()) {
    for (; j + longest <= row.count; j += longest) combine_vector<longest>(row, j);
    for (; j < row.count; ++j) combine_vector<1>(row, j);
    return;
  }
  while (j + longest <= row.count) {
    const std::int64_t vectors = (row.count - j) / longest;
    const int count = vectors < vectors_at_once ? static_cast<int>(vectors) : vectors_at_once;
    combine_activated<longest>(row, j, count);
    j += count * longest;
  }
  for (; j < row.count; ++j) combine_activated<1>(row, j, 1);
}

RowSums sums(const float* a, const float* b, std::int64_t count) {
  // As many floats as doubles fit a vector; several running parts, so that no addition waits for the one before.
  constexpr int length = longest >= 4 ? longest / 2 : 1, parts = 4;
  typedef double Doubles __attribute__((vector_size(length * sizeof(double))));
  Doubles products[parts]{}, values[parts]{};
  std::int64_t j = 0;
  for (; j + parts * length <= count; j += parts * length)
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      const auto from = __builtin_convertvector(load<length>(a + j + part * length), Doubles);
      products[part] += from * __builtin_convertvector(load<length>(b + j + part * length), Doubles);
      values[part] += from;
    }
  const Doubles product = (products[0] + products[1]) + (products[2] + products[3]);
  const Doubles value = (values[0] + values[1]) + (values[2] + values[3]);
  RowSums total;
  for (int lane = 0; lane < length; ++lane) {
    total.products += product[lane];
    total.values += value[lane];
  }
  for (; j < count; ++j) {
    total.products += static_cast<double>(a[j]) * static_cast<double>(b[j]);
    total.values += static_cast<double>(a[j]);
  }
  return total;
}

EntryBounds entry_bounds(const std::int32_t* entry, std::int64_t count) {
  constexpr int length = longest, parts = 4;
  typedef std::uint32_t Words __attribute__((vector_size(length * sizeof(std::uint32_t))));
  const auto larger = [](Words a, Words b) { return a > b ? a : b; };
  Words entries[parts]{}, positions[parts]{};
  std::int64_t j = 0;
  for (; j + parts * length <= count; j += parts * length)
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      Words words;
      std::memcpy(&words, entry + j + part * length, sizeof words);
      entries[part] = larger(entries[part], words);
      positions[part] = larger(positions[part], words & 255u);
    }
  EntryBounds bounds;
  const auto take = [&](std::uint32_t word, std::uint32_t position) {
    if (word > bounds.entry) bounds.entry = word;
    if (position > bounds.position) bounds.position = position;
  };
  for (int part = 0; part < parts; ++part)
    for (int lane = 0; lane < length; ++lane) take(entries[part][lane], positions[part][lane]);
  for (; j < count; ++j)
    take(static_cast<std::uint32_t>(entry[j]), static_cast<std::uint32_t>(entry[j]) & 255u);
  return bounds;
}

template <int VL>
void max_pool_lanes(const PoolRow& pool, const float* input, Function function, float* y,
                    std::uint8_t* choice) {
  for (std::int64_t x = 0; x < pool.out_width; ++x) {
    const std::int64_t left = pool.left(x), right = pool.right(x);
    const float* window = input + (x * pool.stride - pool.padding) * pool.lanes;
    for (std::int64_t b = 0; b < pool.lanes; b += VL) {
      Best<VL> best{load<VL>(window + pool.top * pool.row + left * pool.lanes + b),
                    Integers<VL>{} + static_cast<std::int32_t>(pool.top * pool.kernel + left)};
      for (std::int64_t ky = pool.top; ky < pool.bottom; ++ky)
        for (std::int64_t kx = left; kx < right; ++kx)
          best.consider(load<VL>(window + ky * pool.row + kx * pool.lanes + b), ky * pool.kernel + kx);
      best.finish(function, y + x * pool.lanes + b,
                  choice == nullptr ? nullptr : choice + x * pool.lanes + b);
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
          const Integers<VL> here =
              where == Integers<VL>{} + static_cast<std::int32_t>(ky * pool.kernel + kx);
          const Vector<VL> passed = here ? gradient : Vector<VL>{};
          store<VL>(pixel, add ? load<VL>(pixel) + passed : passed);
        }
    }
  }
}

// Windows of two by two pixels beside each other, all of them whole.
bool in_twos(const PoolRow& pool) {
  return pool.kernel == 2 && pool.stride == 2 && pool.padding == 0 && pool.width >= 2 * pool.out_width &&
         pool.top == 0 && pool.bottom == 2;
}

template <int VL>
void max_pool_twos(const PoolRow& pool, const float* input, Function function, float* y,
                   std::uint8_t* choice) {
  for (std::int64_t x = 0; x < pool.out_width; ++x)
    for (std::int64_t b = 0; b < pool.lanes; b += VL) {
      const float* const upper = input + 2 * x * pool.lanes + b;
      const float* const lower = upper + pool.row;
      // Two comparisons that do not wait for each other, then the third.
      Best<VL> best{load<VL>(upper), Integers<VL>{}}, below{load<VL>(lower), Integers<VL>{} + 2};
      best.consider(load<VL>(upper + pool.lanes), Integers<VL>{} + 1);
      below.consider(load<VL>(lower + pool.lanes), Integers<VL>{} + 3);
      best.consider(below.value, below.where);
      best.finish(function, y + x * pool.lanes + b,
                  choice == nullptr ? nullptr : choice + x * pool.lanes + b);
    }
}

template <int VL>
void gradient_twos(const PoolRow& pool, const float* dy, const std::uint8_t* choice, float* dx) {
  for (std::int64_t x = 0; x < pool.out_width; ++x)
    for (std::int64_t b = 0; b < pool.lanes; b += VL) {
      const Vector<VL> gradient = load<VL>(dy + x * pool.lanes + b);
      const Integers<VL> where = load_bytes<VL>(choice + x * pool.lanes + b);
      const auto chosen = [&](int place) {
        const Integers<VL> here = where == Integers<VL>{} + place;
        return here ? gradient : Vector<VL>{};
      };
      float* const upper = dx + 2 * x * pool.lanes + b;
      float* const lower = upper + pool.row;
      store<VL>(upper, chosen(0));
      store<VL>(upper + pool.lanes, chosen(1));
      store<VL>(lower, chosen(2));
      store<VL>(lower + pool.lanes, chosen(3));
    }
}

// With few images side by side a vector holds several pixels of `lanes` floats. Of windows of two by two pixels beside each
// other, two vectors of an image row hold the left and the right pixels in turn: `Pairs` sorts them, and puts them back.
template <int VL, int lanes, class = std::make_integer_sequence<int, VL>>
struct Pairs;
template <int VL, int lanes, int... i>
struct Pairs<VL, lanes, std::integer_sequence<int, i...>> {
  static EDGE_BCS_INLINE Vector<VL> left(Vector<VL> a, Vector<VL> b) {
    return __builtin_shufflevector(a, b, (i / lanes * 2 * lanes + i % lanes)...);
  }
  static EDGE_BCS_INLINE Vector<VL> right(Vector<VL> a, Vector<VL> b) {
    return __builtin_shufflevector(a, b, (i / lanes * 2 * lanes + i % lanes + lanes)...);
  }
  static EDGE_BCS_INLINE Vector<VL> first(Vector<VL> left, Vector<VL> right) {
    return __builtin_shufflevector(left, right, source(i)...);
  }
  static EDGE_BCS_INLINE Vector<VL> second(Vector<VL> left, Vector<VL> right) {
    return __builtin_shufflevector(left, right, source(i + VL)...);
  }

 private:
  static constexpr int source(int j) {
    const int pixel = j / lanes;
    return pixel / 2 * lanes + j % lanes + (pixel % 2 == 0 ? 0 : VL);
  }
};

template <int VL, int lanes>
void max_pool_pairs(const PoolRow& pool, const float* input, Function function, float* y,
                    std::uint8_t* choice) {
  for (std::int64_t j = 0; j < pool.out_width * lanes; j += VL) {
    const auto pair = [&](std::int64_t ky) {
      const float* const row = input + ky * pool.row + 2 * j;
      const Vector<VL> a = load<VL>(row), b = load<VL>(row + VL);
      return std::pair(Pairs<VL, lanes>::left(a, b), Pairs<VL, lanes>::right(a, b));
    };
    Best<VL> best{pair(pool.top).first, Integers<VL>{} + static_cast<std::int32_t>(2 * pool.top)};
    for (std::int64_t ky = pool.top; ky < pool.bottom; ++ky) {
      const auto [left, right] = pair(ky);
      best.consider(left, 2 * ky);
      best.consider(right, 2 * ky + 1);
    }
    best.finish(function, y + j, choice == nullptr ? nullptr : choice + j);
  }
}

template <int VL, int lanes>
void gradient_pairs(const PoolRow& pool, const float* dy, const std::uint8_t* choice, float* dx) {
  for (std::int64_t j = 0; j < pool.out_width * lanes; j += VL) {
    const Vector<VL> gradient = load<VL>(dy + j);
    const Integers<VL> where = load_bytes<VL>(choice + j);
    for (std::int64_t ky = pool.top; ky < pool.bottom; ++ky) {
      const auto here = [&](std::int64_t kx) {
        const Integers<VL> chosen = where == Integers<VL>{} + static_cast<std::int32_t>(2 * ky + kx);
        return chosen ? gradient : Vector<VL>{};
      };
      const Vector<VL> left = here(0), right = here(1);
      float* const row = dx + ky * pool.row + 2 * j;
      store<VL>(row, Pairs<VL, lanes>::first(left, right));
      store<VL>(row + VL, Pairs<VL, lanes>::second(left, right));
    }
  }
}

// Calls body.template operator()<vector length, lanes>() with the longest vectors that cut the windows of an output row
// evenly; false where there are none, or where the lanes fill a vector already.
template <class Body>
bool with_pairs(const PoolRow& pool, const Body& body) {
  if (!in_twos(pool)) return false;
  const std::int64_t floats = pool.out_width * pool.lanes;
  const auto with_length = [&]<int VL>() {
    if constexpr (longest >= VL) {
      if (floats % VL != 0) return false;
      const auto with = [&]<int lanes>() {
        if constexpr (lanes < VL) {
          if (pool.lanes == lanes) return body.template operator()<VL, lanes>(), true;
        }
        return false;
      };
      return with.template operator()<1>() || with.template operator()<2>() ||
             with.template operator()<4>() || with.template operator()<8>();
    }
    return false;
  };
  return with_length.template operator()<16>() || with_length.template operator()<8>() ||
         with_length.template operator()<4>();
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

void max_pool(const PoolRow& pool, const float* input, Function function, float* y, std::uint8_t* choice) {
  if (with_pairs(pool,
                 [&]<int VL, int lanes>() { max_pool_pairs<VL, lanes>(pool, input, function, y, choice); }))
    return;
  with_lanes(pool.lanes, [&]<int VL>() {
    if (in_twos(pool))
      max_pool_twos<VL>(pool, input, function, y, choice);
    else
      max_pool_lanes<VL>(pool, input, function, y, choice);
  });
}

void max_pool_gradient(const PoolRow& pool, const float* dy, const std::uint8_t* choice, bool add,
                       float* dx) {
  if (!add && with_pairs(pool, [&]<int VL, int lanes>() { gradient_pairs<VL, lanes>(pool, dy, choice, dx); }))
    return;
  with_lanes(pool.lanes, [&]<int VL>() {
    if (!add && in_twos(pool))
      gradient_twos<VL>(pool, dy, choice, dx);
    else
      gradient_lanes<VL>(pool, dy, choice, add, dx);
  });
}

}  // namespace
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

const RowKernels EDGE_BCS_JOIN(row_kernels_, EDGE_BCS_VARIANT) = {
    EDGE_BCS_KERNEL_NAMESPACE::entry_bounds,
    EDGE_BCS_KERNEL_NAMESPACE::combine,
    EDGE_BCS_KERNEL_NAMESPACE::sums,
    EDGE_BCS_KERNEL_NAMESPACE::max_pool,
    EDGE_BCS_KERNEL_NAMESPACE::max_pool_gradient,
};

}  // namespace edge_bcs
