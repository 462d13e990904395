// Half precision with the FP16 of ARMv8.2 (half_eights.h): products are added in FP16, in runs of a bounded number of terms
// (half.h). Tiles are those of sparse.cpp and dense.cpp, with numbers of two bytes.
#include <utility>

#include "kernels/blocks.h"
#include "kernels/depthwise_sums.h"
#include "kernels/half.h"
#include "kernels/half_eights.h"
#include "kernels/half_entries.h"
#include "kernels/table.h"
#include "kernels/tiles.h"

#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
// A room of its own, where the names of other kernels (table.h) are hidden.
namespace half_precision {
namespace {

// A walk whose output begins where its pointers are: what half.h says of a stack in pairs is a distance here.
Walk from_first_pixel(Walk walk) {
  const std::int64_t distance = walk.first_pixel * walk.lanes;
  const auto move = [&](auto*& stack) {
    if (stack != nullptr) stack = reinterpret_cast<decltype(stack + 0)>(numbers(stack) + distance);
  };
  move(walk.output), move(walk.addend), move(walk.pre), move(walk.mask);
  walk.tail_at -= distance;
  walk.first_pixel = 0;
  return walk;
}

// Sums of earlier runs wait as floats.
template <int TY, int TV>
EDGE_BCS_INLINE void wait(float* waiting, const Eight (&sums)[TY][TV], bool first) {
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x, waiting += VL) {
      Vector<4> low = lower(sums[y][x]), high = upper(sums[y][x]);
      if (!first) low += load<4>(waiting), high += load<4>(waiting + 4);
      store<4>(waiting, low);
      store<4>(waiting + 4, high);
    }
}
template <int TY, int TV>
EDGE_BCS_INLINE void total(const float* waiting, Eight (&sums)[TY][TV]) {
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x, waiting += VL)
      sums[y][x] = rounded(lower(sums[y][x]) + load<4>(waiting), upper(sums[y][x]) + load<4>(waiting + 4));
}

// Some rows of the matrix: the distance of each entry, and its weight, times the row's scale.
struct Entries {
  static constexpr int capacity = 8192, most_rows = 32;
  static_assert(capacity % run_of_entries == 0);

  std::int64_t first_row = 0;
  int rows = 0, runs = 1;  // the most runs that a row has
  std::int32_t distance[capacity];
  Number weight[capacity];
  int pointer[most_rows + 1] = {};
  bool continued = false, unfinished = false;  // of one row alone: it goes on from others, others go on

  void clear(std::int64_t row) { first_row = row, rows = 0, runs = 1, continued = unfinished = false; }

  void begin(const Walk&, const SparseRows&, std::int64_t row, std::int64_t) { clear(row); }

  bool fits(std::int64_t count) const { return rows < most_rows && pointer[rows] + count <= capacity; }

  void add(const Walk& walk, const SparseRows& matrix, std::int64_t from, std::int64_t to) {
    const float scale = walk.scale == nullptr ? 1 : walk.scale[first_row + rows];
    const auto plane = static_cast<std::int32_t>(walk.input_plane);
    const std::int32_t* const entry = matrix.entry + from;
    std::int32_t* const distances = distance + pointer[rows];
    Number* const weights = weight + pointer[rows];
    const auto count = static_cast<int>(to - from);
    // Loops of their own where several entries are taken at once.
    if (walk.taps == 1) {
      const std::int32_t tap = walk.tap[walk.used[0]];
      for (int i = 0; i < count; ++i) distances[i] = (entry[i] >> 8) * plane + tap;
    } else {
      for (int i = 0; i < count; ++i) distances[i] = (entry[i] >> 8) * plane + walk.tap[entry[i] & 255];
    }
    if (matrix.position != nullptr || matrix.factor != nullptr) {
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) weights[i] = static_cast<Number>(matrix.weight(from + i) * scale);
    } else {
      const float* const values = matrix.value + from;
      int i = 0;
      for (; i + VL <= count; i += VL)
        vst1q_f16(weights + i, rounded(load<4>(values + i) * scale, load<4>(values + i + 4) * scale));
      for (; i < count; ++i) weights[i] = static_cast<Number>(values[i] * scale);
    }
    pointer[rows + 1] = pointer[rows] + count;
    ++rows;
    runs = count > runs * run_of_entries ? (count + run_of_entries - 1) / run_of_entries : runs;
  }
};

template <int TY, int TV>
EDGE_BCS_INLINE void accumulate(Eight (&sums)[TY][TV], const Number* const (&input)[TY],
                                const std::int64_t (&input_x)[TV], const Number* weights,
                                const std::int32_t* distances, int count) {
  // Changes nothing, but without it the compiler reloads these from the stack for every entry.
  const Number* rows[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) {
    rows[y] = input[y];
    asm volatile("" : "+r"(rows[y]));
  }
  const Number* const stop = weights + count;
  for (; weights != stop; ++weights, ++distances) {
    const Eight weight = vld1q_dup_f16(weights);
    const std::int64_t distance = *distances;
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
      for (int x = 0; x < TV; ++x)
        sums[y][x] = vfmaq_f16(sums[y][x], weight, vld1q_f16(rows[y] + distance + input_x[x]));
  }
}

// Asks for what `finish` will touch of output plane `row` in the tile to the right, as in sparse.cpp.
template <int TY>
EDGE_BCS_INLINE void fetch_next_output(const Walk& walk, const Place& place, std::int64_t row, int vectors) {
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) {
    const std::int64_t at = row * walk.output_plane + place.output[y] + place.output_x[0] + vectors * VL;
    __builtin_prefetch(numbers(walk.output) + at, 1, 2);
    if (walk.addend != nullptr) __builtin_prefetch(numbers(walk.addend) + at, 0, 2);
  }
}

// One tile of all rows of `entries`. Sums of rows of more than a run wait in `waiting`.
template <int TY, int TV, bool strided>
__attribute__((noinline)) void sparse_tile(const Walk& walk, const Entries& entries, const Place& place,
                                           float* waiting) {
  const Number* input[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) input[y] = numbers(walk.input) + place.input[y] + place.input_x[0];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x, x);
  for (int run = 0; run < entries.runs; ++run)
    for (int r = 0; r < entries.rows; ++r) {
      const int begin = entries.pointer[r] + run * run_of_entries, end = entries.pointer[r + 1];
      if (begin >= end && run > 0) continue;
      const std::int64_t row = entries.first_row + r;
      const bool first = run == 0 && !entries.continued, last = end - begin <= run_of_entries;
      if constexpr (!strided) {
        if (last && !place.ends_row) fetch_next_output<TY>(walk, place, row, TV);
      }
      Eight sums[TY][TV];
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x) sums[y][x] = vdupq_n_f16(0);
      accumulate<TY, TV>(sums, input, input_x, entries.weight + begin, entries.distance + begin,
                         smaller_int(end - begin, run_of_entries));
      float* const place_of_row = waiting + r * max_accumulators * VL;
      if (last && !entries.unfinished) {
        if (!first) total(place_of_row, sums);
        finish<TY, TV, strided>(walk, place, row, sums);
      } else {
        wait(place_of_row, sums, first);
      }
    }
}

template <bool strided>
void sparse_walk(const Walk& walk, const SparseRows& rows, std::int64_t task) {
  const Tasks tasks = cut(walk, 16);
  const std::int64_t band = task / tasks.groups * tasks.band,
                     band_end = smaller(walk.blocks * walk.height, band + tasks.band);
  const std::int64_t row = task % tasks.groups * tasks.group, end = smaller(walk.rows, row + tasks.group);
  Entries entries;
  alignas(64) float waiting[Entries::most_rows * max_accumulators * VL];
  const auto tiles = [&](const auto& body) { for_tiles<VL>(walk, band, band_end, body); };
  visit_rows(walk, rows, row, end, entries, tiles, [&]<int TY, int TV>(const Place& place) {
    sparse_tile<TY, TV, strided>(walk, entries, place, waiting);
  });
}

inline constexpr int block_vectors = 4;

// Not inlined: it would stand once for each output plane.
template <int TY, int TV, bool strided>
__attribute__((noinline)) void finish_dense(const Walk& walk, const Place& place, std::int64_t row,
                                            const Eight* values, int down, int right) {
  Eight sums[TY][TV];
#pragma GCC unroll 4
  for (int i = 0; i < TY * TV; ++i) sums[i / TV][i % TV] = values[i];
  finish<TY, TV, strided>(walk, place, row, sums, down, right);
}

// The weights of a block, next to each other. Of six, two more are read, for which there is room: the packed weights take half of
// what they would as floats.
template <int OB>
EDGE_BCS_INLINE Eight factors_of(const Number* weights) {
  if constexpr (OB == block_rows) {
    return vld1q_f16(weights);
  } else if constexpr (OB == 4) {
    return vcombine_f16(vld1_f16(weights), vdup_n_f16(0));
  } else {
    Eight factors = vdupq_n_f16(weights[0]);
    if constexpr (OB == 2) factors = vld1q_lane_f16(weights + 1, factors, 1);
    return factors;
  }
}

// The number of rows of the block that begins `left` rows before the end of the matrix.
int rows_of_block(std::int64_t left) {
  if (left >= block_rows) return block_rows;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Calls body.template operator()<0>() to <N - 1>().
template <int N, class Body>
EDGE_BCS_INLINE void each_lane(const Body& body) {
  [&]<int... lane>(std::integer_sequence<int, lane...>) {
    (body.template operator()<lane>(), ...);
  }(std::make_integer_sequence<int, N>());
}

// OB output planes of TY rows and TV vectors that begin `down` and `right` in a tile.
template <int OB, int TY, int TV, bool strided>
void dense_block(const Walk& walk, const Number* weight, const Place& place, std::int64_t row, int down,
                 int right) {
  constexpr int size = TY * TV;
#define EDGE_BCS_EACH                                                                                       \
  _Pragma("GCC unroll 8") for (int o = 0; o < OB; ++o) _Pragma("GCC unroll 8") for (int y = 0; y < TY; ++y) \
      _Pragma("GCC unroll 4") for (int x = 0; x < TV; ++x)
  const Number* input[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) input[y] = numbers(walk.input) + place.input[down + y] + place.input_x[right];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x + right, x);
  Eight sums[OB][TY][TV];
  alignas(64) float waiting[OB * size * VL] = {};
  const std::int64_t channels = channels_of_run(walk.taps);
  std::int64_t begin = 0, end = 0;
  do {
    begin = end;
    end = smaller(walk.channels, begin + channels);
    EDGE_BCS_EACH sums[o][y][x] = vdupq_n_f16(0);
    for (std::int64_t channel = begin; channel < end; ++channel) {
      const std::int64_t plane = channel * walk.input_plane;
      for (int k = 0; k < walk.taps; ++k, weight += OB) {
        const std::int64_t distance = plane + walk.tap[walk.used[k]];
        Eight pixels[TY][TV];
#pragma GCC unroll 8
        for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < TV; ++x) pixels[y][x] = vld1q_f16(input[y] + distance + input_x[x]);
        const Eight factors = factors_of<OB>(weight);
        each_lane<OB>([&]<int o>() {
#pragma GCC unroll 8
          for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
            for (int x = 0; x < TV; ++x)
              sums[o][y][x] = vfmaq_laneq_f16(sums[o][y][x], pixels[y][x], factors, o);
        });
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < OB; ++o)
      if (end < walk.channels)
        wait(waiting + o * size * VL, sums[o], false);
      else if (begin > 0)
        total(waiting + o * size * VL, sums[o]);
  } while (end < walk.channels);
  Eight values[OB * size];  // a copy: see `finish`
  EDGE_BCS_EACH values[o * size + y * TV + x] = sums[o][y][x];
#undef EDGE_BCS_EACH
  for (int o = 0; o < OB; ++o)
    finish_dense<TY, TV, strided>(walk, place, row + o, values + o * size, down, right);
}

template <int TY, int TV, bool strided>
void dense_tile(const Walk& walk, const Number* packed, const Place& place, std::int64_t first,
                std::int64_t last) {
  // Image rows of a register block.
  constexpr int down = smaller_int(TY, block_vectors > TV ? block_vectors / TV : 1);
  for (std::int64_t row = first; row < last;) {
    const Number* const weights = packed + row * walk.channels * walk.taps;
    const int size = rows_of_block(last - row);
    for (int y = 0; y < TY; y += down) switch (size) {
        case block_rows:
          dense_block<block_rows, down, TV, strided>(walk, weights, place, row, y, 0);
          break;
        case 4:
          dense_block<4, down, TV, strided>(walk, weights, place, row, y, 0);
          break;
        case 2:
          dense_block<2, down, TV, strided>(walk, weights, place, row, y, 0);
          break;
        default:
          dense_block<1, down, TV, strided>(walk, weights, place, row, y, 0);
      }
    row += size;
  }
}

template <class Body>
void with_steps(const Walk& walk, const Body& body) {
  contiguous(walk) ? body.template operator()<false>() : body.template operator()<true>();
}

std::int64_t sparse_tasks(const Walk& walk, const SparseRows&) {
  const Tasks tasks = cut(walk, 16);
  return tasks.bands * tasks.groups;
}

void sparse(const Walk& walk, const SparseRows& rows, std::int64_t task) {
  with_steps(walk, [&]<bool strided>() { sparse_walk<strided>(from_first_pixel(walk), rows, task); });
}

std::int64_t pack_tasks(const Walk& walk) { return packing_tasks(walk); }

void pack(const Walk& walk, const Weights& weights, float* packed, std::int64_t task) {
  pack_blocks(walk, weights, packed_rows(walk, task), numbers(packed), walk.channels * walk.taps,
              rows_of_block,
              [&](Number* to, int size, int o, std::int64_t row, std::int64_t channel, std::int64_t tap,
                  float weight) {
    const float scale = walk.scale == nullptr ? 1 : walk.scale[row];
    to[(channel * walk.taps + tap) * size + o] = static_cast<Number>(weight * scale);
  });
}

std::int64_t dense_tasks(const Walk& walk) {
  const Tasks tasks = cut_blocks(walk);
  return tasks.bands * tasks.groups;
}

void dense(const Walk& given, const float* packed, std::int64_t task) {
  const Walk walk = from_first_pixel(given);
  const Tasks tasks = cut_blocks(walk);
  const std::int64_t band = task / tasks.groups * tasks.band, image_rows = walk.blocks * walk.height;
  const std::int64_t first = task % tasks.groups * tasks.group,
                     last = smaller(walk.rows, first + tasks.group);
  with_steps(walk, [&]<bool strided>() {
    for_tiles<VL>(walk, band, smaller(image_rows, band + tasks.band),
                  [&]<int TY, int TV>(const Place& place) {
      dense_tile<TY, TV, strided>(walk, numbers(packed), place, first, last);
    });
  });
}

struct Halves {
  using Number = half_precision::Number;
  using Vector = Eight;
  static EDGE_BCS_INLINE Eight load(const Number* from) { return vld1q_f16(from); }
  static EDGE_BCS_INLINE Eight spread(float weight) { return vdupq_n_f16(static_cast<Number>(weight)); }
  static EDGE_BCS_INLINE Eight multiply_add(Eight sum, Eight weight, Eight pixels) {
    return vfmaq_f16(sum, weight, pixels);
  }
};

template <int TY, int TV, bool strided>
__attribute__((noinline)) void depthwise_tile(const Walk& walk, const Weights& weights, const Place& place,
                                              std::int64_t row, int shared) {
  const Planes planes(walk, row);
  const float scale = walk.scale == nullptr ? 1 : walk.scale[row];
  std::int64_t input_x[TV];
#pragma GCC unroll 4
  for (int x = 0; x < TV; ++x) input_x[x] = along<VL, strided>(place.input_x, x);
  Eight sums[TY][TV] = {};
  alignas(64) float waiting[TY * TV * VL];
  // A plane is a run: its positions are not more.
  for (std::int64_t p = 0; p < planes.count; ++p) {
    const Number* const from = numbers(walk.input) + (planes.first + p) * walk.input_plane + place.input_x[0];
    const float factor = weights.factor == nullptr ? scale : scale * weights.factor[planes.weights + p];
    const Number* input[TY];
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y) input[y] = from + place.input[y];
    add_plane<Halves>(walk, weights.all + (planes.weights + p) * weights.row_step, factor, shared, input,
                      input_x, sums);
    if (p + 1 < planes.count) {
      wait(waiting, sums, p == 0);
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < TV; ++x) sums[y][x] = vdupq_n_f16(0);
    } else if (p > 0) {
      total(waiting, sums);
    }
  }
  finish<TY, TV, strided>(walk, place, row, sums);
}

void depthwise(const Walk& given, const Weights& weights, std::int64_t row, std::int64_t begin,
               std::int64_t end) {
  const Walk walk = from_first_pixel(given);
  const int shared = shared_rows(walk);
  with_steps(walk, [&]<bool strided>() {
    for_tiles<VL>(walk, begin, end, [&]<int TY, int TV>(const Place& place) {
      depthwise_tile<TY, TV, strided>(walk, weights, place, row, shared);
    });
  });
}

void widen(const std::uint16_t* row, std::int64_t lanes, std::int64_t first, std::int64_t count, float* to) {
  const auto* const from = reinterpret_cast<const Number*>(row) + first * lanes;
  for (std::int64_t i = 0; i < count * lanes; i += VL) {
    const Eight value = vld1q_f16(from + i);
    store<4>(to + i, lower(value));
    store<4>(to + i + 4, upper(value));
  }
}

void narrow(const float* from, std::int64_t lanes, std::int64_t count, std::uint16_t* row) {
  auto* const to = reinterpret_cast<Number*>(row);
  for (std::int64_t i = 0; i < count * lanes; i += VL)
    vst1q_f16(to + i, rounded(load<4>(from + i), load<4>(from + i + 4)));
  if (count % 2 != 0) std::memset(to + count * lanes, 0, static_cast<std::size_t>(lanes) * sizeof *to);
}

}  // namespace
}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE

namespace variant = EDGE_BCS_KERNEL_NAMESPACE::half_precision;

const HalfKernels half_kernels_neonfp16 = {
    {variant::sparse_tasks, variant::sparse, variant::pack_tasks, variant::pack, variant::dense_tasks,
     variant::dense},
    variant::depthwise,
    variant::widen,
    variant::narrow,
};

}  // namespace edge_bcs

#endif
