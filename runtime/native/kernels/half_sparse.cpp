// Walks over the entries of a sparse matrix in half precision: see sparse.cpp.
#include "kernels/half_entries.h"
#include "kernels/half_tiles.h"

#if defined(__AVX512BF16__)

namespace edge_bcs {
namespace EDGE_BCS_KERNEL_NAMESPACE {
namespace half_precision {
namespace {

inline constexpr int sparse_across = 8, sparse_sums = 16;
inline constexpr int most_chunks = 16, smallest_chunk = 6;

// Bytes of one input plane that a tile of the walk reads.
std::int64_t footprint(const Walk& walk) {
  const int across = pixels_across(walk, sparse_across);
  const std::int64_t down = smaller(smaller(most_rows, sparse_sums / across), walk.blocks * walk.height);
  std::int64_t side = 1;  // of the kernel, guessed from the number of its positions
  while (side * side < walk.taps) ++side;
  const std::int64_t stride = walk.input_pixel / walk.lanes;
  const std::int64_t pairs = ((across - 1) * stride + side) / 2 + 1;
  return ((down - 1) * stride + side) * pairs * walk.lanes * 4;
}

// Into how many chunks of channels to cut rows of `entries` on average.
int chunks_of(const Walk& walk, std::int64_t entries) {
  const std::int64_t wanted = ceil_divide(walk.channels * footprint(walk), first_cache());
  return wanted <= entries / smallest_chunk ? static_cast<int>(smaller(wanted, most_chunks)) : 1;
}

// Some rows of the matrix: for each entry the distance, down to an even number of pixels, and its weight. Where rows are long,
// each is cut into chunks of input channels, so that the input around a tile stays in the first-level cache while all rows use
// it. Of a chunk those at an even distance come first, so that neither kind needs a branch.
struct Entries {
  static constexpr int capacity = 8192, most_of_rows = 64;
  struct Part {
    int begin, middle, end;
  };

  std::int64_t first_row = 0;
  int rows = 0, chunks = 1, used = 0;
  std::int32_t distance[capacity];
  std::uint32_t weight[capacity];
  Part parts[most_of_rows][most_chunks];
  bool continued = false, unfinished = false;  // of one row alone: it goes on from others, others go on

  // For one walk: whether its kernel positions fit a vector, as those of a kernel of 3×3 do.
  explicit Entries(const Walk& walk) : few(true) {
    for (int i = 0; i < walk.taps; ++i) few &= walk.used[i] < 16;
  }

  bool few;

  void clear(std::int64_t row) {
    first_row = row, rows = used = 0, chunks = 1, continued = unfinished = false;
  }

  // Empty, for rows [row, last).
  void begin(const Walk& walk, const SparseRows& matrix, std::int64_t row, std::int64_t last) {
    clear(row);
    chunks = chunks_of(walk, (matrix.end(last - 1) - matrix.begin(row)) / ((last - row) * matrix.step));
  }

  bool fits(std::int64_t count) const { return rows < most_of_rows && used + count <= capacity; }

  // Adds entries [from, to) of the matrix as a row.
  void add(const Walk& walk, const SparseRows& matrix, std::int64_t from, std::int64_t to) {
    const std::int64_t channels = ceil_divide(walk.channels, chunks), stop = matrix.end(walk.rows - 1);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t end =
          chunk == chunks - 1 ? to : first_beyond(matrix, from, to, (chunk + 1) * channels);
      const auto count = static_cast<int>(end - from);
      int even = used, odd = used + count;
      for (std::int64_t j = from; j < end; j += 16)
        add_some(walk, matrix, j, static_cast<int>(smaller(16, end - j)), even, odd, stop);
      parts[rows][chunk] = {used, even, used + count};
      used += count;
      from = end;
    }
    ++rows;
  }

 private:
  // SparseRows::first_at_least, from the front: chunks are short, and a search by halves mispredicts.
  static std::int64_t first_beyond(const SparseRows& matrix, std::int64_t from, std::int64_t to,
                                   std::int64_t channel) {
    const __m512i bound = _mm512_set1_epi32(static_cast<int>(channel << 8));
    for (; from < to; from += 16) {
      const auto left = static_cast<int>(smaller(16, to - from));
      const auto all = static_cast<__mmask16>((1u << left) - 1);
      const __m512i entry = _mm512_maskz_loadu_epi32(all, matrix.entry + from);
      const int below = __builtin_popcount(_mm512_mask_cmplt_epi32_mask(all, entry, bound));
      if (below < 16) return from + below;
    }
    return to;
  }

  // Puts up to 16 entries, those at even distances from `even` on upwards, the others below `odd`; the matrix ends at `stop`.
  void add_some(const Walk& walk, const SparseRows& matrix, std::int64_t first, int count, int& even,
                int& odd, std::int64_t stop) {
    const auto all = static_cast<__mmask16>((1u << count) - 1);
    const __m512i none = _mm512_setzero_si512();
    const __m512i entry = _mm512_maskz_loadu_epi32(all, matrix.entry + first);
    const __m512i channel = _mm512_maskz_srli_epi32(all, entry, 8);
    const __m512i place = _mm512_maskz_and_epi32(all, entry, _mm512_set1_epi32(255));
    const __m512i taps = few ? _mm512_maskz_permutexvar_epi32(all, place, _mm512_loadu_si512(walk.tap))
                             : _mm512_mask_i32gather_epi32(none, all, place, walk.tap, 4);
    const __m512i plane = _mm512_set1_epi32(static_cast<int>(walk.input_plane));
    const __m512i distances = _mm512_add_epi32(_mm512_mullo_epi32(channel, plane), taps);
    __m512 values;
    if (matrix.position == nullptr) {
      values = _mm512_maskz_loadu_ps(all, matrix.value + first);
    } else {
      // Weights that lie anywhere are asked for before they are gathered.
      for (std::int64_t j = first + 64; j < smaller(first + 80, stop); ++j)
        __builtin_prefetch(matrix.value + matrix.position[j]);
      const __m512i positions = _mm512_maskz_loadu_epi32(all, matrix.position + first);
      values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, positions, matrix.value, 4);
      if (matrix.factor != nullptr)
        values *= _mm512_mask_i32gather_ps(_mm512_setzero_ps(), all, channel, matrix.factor, 4);
    }
    const auto weights = reinterpret_cast<__m512i>(rounded<16>(reinterpret_cast<Vector<16>>(values)));
    // A multiple of 8 or 16 numbers, the lowest set bit of which says whether it is an odd number of pixels.
    const __m512i lanes = _mm512_set1_epi32(static_cast<int>(walk.lanes));
    const __mmask16 odds = _mm512_mask_test_epi32_mask(all, distances, lanes);
    const __m512i down = _mm512_maskz_andnot_epi32(0xffff, lanes, distances);
    const auto put = [&](__mmask16 which, int at) {
      const auto packed = static_cast<__mmask16>((1u << __builtin_popcount(which)) - 1);
      _mm512_mask_storeu_epi32(distance + at, packed, _mm512_maskz_compress_epi32(which, down));
      _mm512_mask_storeu_epi32(weight + at, packed, _mm512_maskz_compress_epi32(which, weights));
    };
    const auto evens = static_cast<__mmask16>(all & ~odds);
    put(evens, even);
    even += __builtin_popcount(evens);
    odd -= __builtin_popcount(odds);
    put(odds, odd);
  }
};

// Adds entries [begin, end), all at even distances or all at odd ones.
template <int VL, int TY, int TX, bool unit, bool odd>
EDGE_BCS_INLINE void accumulate(Vector<VL> (&sums)[TY][TX], const Number* const (&rows)[TY],
                                const Across<VL, TX>& across, const Entries& entries, int begin, int end) {
  const bool even_step = !unit && across.step % 2 == 0;
  for (int e = begin; e < end; ++e) {
    Integers<VL> low = spread<VL>(entries.weight[e]);
    // Changes nothing, but without it the compiler shifts in a register for integers and moves both to vectors.
    asm("" : "+v"(low));
    const Integers<VL> high = low << 16;
    const std::int64_t distance = entries.distance[e];
    if constexpr (unit) {
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y) {
        const Number* const from = rows[y] + distance;
        Integers<VL> pair = load_pair<VL>(from);
#pragma GCC unroll 8
        for (int x = 0; x < TX; x += 2) {
          sums[y][x] = dot<VL>(sums[y][x], odd ? high : low, pair);
          if (odd && x + 1 < TX) pair = load_pair<VL>(from + (x + 2) * VL);
          if (x + 1 < TX) sums[y][x + 1] = dot<VL>(sums[y][x + 1], odd ? low : high, pair);
          if (!odd && x + 2 < TX) pair = load_pair<VL>(from + (x + 2) * VL);
        }
      }
    } else {
      // Where pixels are an even number apart, all are in the same place of their pairs.
      const Integers<VL> first = odd ? high : low, second = even_step ? first : (odd ? low : high);
      const std::int64_t beside = distance + (odd && !even_step ? 2 * VL : 0);
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
        for (int x = 0; x < TX; ++x)
          sums[y][x] = dot<VL>(sums[y][x], x % 2 == 0 ? first : second,
                               load_pair<VL>(rows[y] + (x % 2 == 0 ? distance : beside) + across.at[x]));
    }
  }
}

// Bytes of an input from which on it is asked for before it is needed: the next tile's, a few planes with each row.
inline constexpr std::int64_t far_input = 2 << 20;

bool fetches_ahead(const Walk& walk, const Entries& entries) {
  const std::int64_t numbers = walk.blocks * walk.channels * walk.height * walk.input_row;
  return 2 * numbers >= far_input && entries.used >= walk.channels;
}

template <int VL, int TY, int TX>
EDGE_BCS_INLINE void fetch_input(const Walk& walk, const Number* const (&rows)[TY], std::int64_t& plane,
                                 std::int64_t end) {
  for (; plane < end; ++plane)
#pragma GCC unroll 8
    for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
      for (int x = 0; x < TX; x += 2)
        __builtin_prefetch(rows[y] + plane * walk.input_plane + (TX + x + 2) * VL, 0, 2);
}

template <int VL, int TY, int TX>
EDGE_BCS_INLINE void fetch_output(const Walk& walk, const Tile& tile, std::int64_t row) {
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TX; x += 2) {
      const std::int64_t at = row * walk.output_plane + tile.output[y] + (tile.first + TX + x) * VL;
      __builtin_prefetch(numbers(walk.output) + at, 1, 2);
      if (walk.addend != nullptr) __builtin_prefetch(numbers(walk.addend) + at, 0, 2);
    }
}

// One tile of all rows of `entries`. A row that does not fit them is cut, and its sums wait in `waiting`.
template <int VL, int TY, int TX, bool unit>
__attribute__((noinline)) void sparse_tile(const Walk& walk, const Entries& entries, const Tile& tile,
                                           float* waiting) {
  const Across<VL, TX> across(walk, tile.first);
  const Number* rows[TY];
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y) {
    rows[y] = numbers(walk.input) + tile.input[y] + across.base;
    asm volatile("" : "+r"(rows[y]));
  }
  const bool asks = unit && !tile.ends_row, far = asks && fetches_ahead(walk, entries);
  std::int64_t fetched = 0;
  const Finish<VL, TY, TX> finish(walk, tile);
  const std::int64_t visits = std::int64_t{entries.chunks} * entries.rows;
  for (int chunk = 0; chunk < entries.chunks; ++chunk) {
    const bool last = chunk == entries.chunks - 1;
    for (int r = 0; r < entries.rows; ++r) {
      float* const place = waiting + r * sparse_sums * VL;
      const Entries::Part part = entries.parts[r][chunk];
      Vector<VL> sums[TY][TX];
      const bool first = chunk == 0 && !entries.continued;
      if (far)
        fetch_input<VL, TY, TX>(walk, rows, fetched,
                                walk.channels * (std::int64_t{chunk} * entries.rows + r + 1) / visits);
      if (asks && last) fetch_output<VL, TY, TX>(walk, tile, entries.first_row + r);
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
        for (int x = 0; x < TX; ++x) sums[y][x] = first ? Vector<VL>{} : load<VL>(place + (y * TX + x) * VL);
      accumulate<VL, TY, TX, unit, false>(sums, rows, across, entries, part.begin, part.middle);
      accumulate<VL, TY, TX, unit, true>(sums, rows, across, entries, part.middle, part.end);
      if (last && !entries.unfinished) {
        finish(entries.first_row + r, sums);
        continue;
      }
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
#pragma GCC unroll 8
        for (int x = 0; x < TX; ++x) store<VL>(place + (y * TX + x) * VL, sums[y][x]);
    }
  }
}

// The entries are made ready for each task: worth it for a few tiles.
Tasks sparse_cut(const Walk& walk) { return tasks_of(walk, sparse_across, sparse_sums, 16, 4); }

template <int VL>
void sparse_walk(const Walk& walk, const SparseRows& rows, std::int64_t task) {
  const Tasks tasks = sparse_cut(walk);
  const std::int64_t image_rows = walk.blocks * walk.height;
  const std::int64_t band = task / tasks.groups * tasks.band,
                     band_end = smaller(image_rows, band + tasks.band);
  const std::int64_t row = task % tasks.groups * tasks.group, end = smaller(walk.rows, row + tasks.group);
  const bool unit = walk.input_pixel == walk.lanes;
  Entries entries(walk);
  alignas(64) float waiting[Entries::most_of_rows * sparse_sums * VL];
  const auto visit = [&]<int TY, int TX>(const Tile& tile) {
    if (unit)
      sparse_tile<VL, TY, TX, true>(walk, entries, tile, waiting);
    else
      sparse_tile<VL, TY, TX, false>(walk, entries, tile, waiting);
  };
  const auto tiles = [&](const auto& body) {
    for_tiles<sparse_across, sparse_sums>(walk, band, band_end, body);
  };
  visit_rows(walk, rows, row, end, entries, tiles, visit);
}

}  // namespace

std::int64_t sparse_tasks(const Walk& walk, const SparseRows&) {
  const Tasks tasks = sparse_cut(walk);
  return tasks.bands * tasks.groups;
}

void sparse(const Walk& walk, const SparseRows& rows, std::int64_t task) {
  walk.lanes == 16 ? sparse_walk<16>(walk, rows, task) : sparse_walk<8>(walk, rows, task);
}

}  // namespace half_precision
}  // namespace EDGE_BCS_KERNEL_NAMESPACE
}  // namespace edge_bcs

#endif
