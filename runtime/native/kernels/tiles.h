// How a walk is cut: vectors within an image row, tiles of vectors that stay in registers, and tasks.
#pragma once

#include <cstdint>

#include "kernels/activate.h"
#include "kernels/simd.h"
#include "kernels/walk.h"
#include "ops/dispatch.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

inline constexpr int max_tile_rows = 8;
inline constexpr int max_tile_vectors = 4;
// Accumulators of one tile; the rest of the registers hold weights and loads.
inline constexpr int max_accumulators = registers == 32 ? 16 : 8;
// What the input around a tile may take of the first-level cache (bytes): the sums of other rows pass through it, too.
inline std::int64_t first_cache() {
  static const std::int64_t bytes = first_level_cache() / 16 * (native_lanes == 16 ? 14 : 11);
  return bytes;
}
// And that around a band of tiles of the second.
inline constexpr std::int64_t second_cache = native_lanes == 16 ? 768 << 10 : 192 << 10;
// Tasks to aim at: enough for the threads of a board to share evenly.
inline constexpr std::int64_t enough_tasks = 16;

constexpr int smaller_int(int a, int b) { return a < b ? a : b; }
EDGE_BCS_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
EDGE_BCS_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
EDGE_BCS_INLINE std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Whether the pixels of an image row are one run of floats on every side, so that a vector may span pixels.
inline bool contiguous(const Walk& walk) {
  return walk.input_pixel == walk.lanes && walk.output_pixel == walk.lanes &&
         ((walk.mask == nullptr && walk.pre == nullptr) || walk.mask_pixel == walk.lanes);
}

// The longest vectors that cut the walk's runs of floats evenly.
inline int vector_length(const Walk& walk) {
  const std::int64_t run = contiguous(walk) ? walk.width * walk.lanes : walk.lanes;
  for (int length = native_lanes; length >= 4; length /= 2)
    if (run % length == 0) return length;
  return 1;
}

// The size of the tiles of a walk, in image rows and vectors.
struct TileShape {
  int rows;
  int vectors;
};

inline TileShape tile_shape(const Walk& walk) {
  const std::int64_t vectors = walk.width * walk.lanes / vector_length(walk);
  const int across = vectors >= 4 ? 4 : vectors >= 2 ? 2 : 1;
  const int down = static_cast<int>(smaller(max_tile_rows, max_accumulators / across));
  return {down, across};
}

// Where the vectors of a tile lie (floats from the walk's pointers at plane 0; bits from a row's start).
struct Place {
  std::int64_t input[max_tile_rows], output[max_tile_rows], mask[max_tile_rows], bits[max_tile_rows];
  std::int64_t input_x[max_tile_vectors], output_x[max_tile_vectors], mask_x[max_tile_vectors],
      bit[max_tile_vectors];
  bool ends_row;                 // the tile has the last vector of its rows
  bool last_row[max_tile_rows];  // the tile's row is the last of its plane
};

// Distance of vector t from vector 0 along the row: known to the compiler unless the walk is strided.
template <int VL, bool strided>
EDGE_BCS_INLINE std::int64_t along(const std::int64_t* x, int t) {
  if constexpr (strided)
    return x[t] - x[0];
  else
    return t * VL;
}

// Sets what depends on the tile's rows: `count` image rows from number `first` of all blocks' rows.
template <class Rows>
inline void place_rows(Rows& place, const Walk& walk, std::int64_t first, int count) {
  for (int t = 0; t < count; ++t) {
    const std::int64_t block = (first + t) / walk.height, y = (first + t) % walk.height;
    place.input[t] = block * walk.input_block + y * walk.input_row;
    place.output[t] = block * walk.output_block + y * walk.output_row;
    place.mask[t] = block * walk.mask_block + y * walk.mask_row;
    place.bits[t] = block * walk.bits_block + y * walk.bits_row;
    place.last_row[t] = y == walk.height - 1;
  }
}

// Sets what depends on the tile's vectors: `count` of them from number `first` of `total`.
template <int VL>
inline void place_vectors(Place& place, const Walk& walk, std::int64_t first, int count, std::int64_t total) {
  const bool run = contiguous(walk);
  const std::int64_t in_pixel = run ? 1 : walk.lanes / VL;
  for (int t = 0; t < count; ++t) {
    const std::int64_t pixel = (first + t) / in_pixel, part = (first + t) % in_pixel * VL;
    place.input_x[t] = run ? (first + t) * VL : pixel * walk.input_pixel + part;
    place.output_x[t] = run ? (first + t) * VL : pixel * walk.output_pixel + part;
    place.mask_x[t] = run ? (first + t) * VL : pixel * walk.mask_pixel + part;
    place.bit[t] = walk.bits_first + (run ? (first + t) * VL : pixel * walk.bits_pixel + part);
  }
  place.ends_row = first + count == total;
}

// Calls body.template operator()<rows, vectors>() for the largest tile of at most the given size, and returns that size.
template <int max_rows, int max_vectors, class Body>
inline TileShape with_tile(std::int64_t rows, std::int64_t vectors, const Body& body) {
  if constexpr (max_rows > 1) {
    if (rows < max_rows) return with_tile<max_rows / 2, max_vectors>(rows, vectors, body);
  }
  if constexpr (max_vectors > 1) {
    if (vectors < max_vectors) return with_tile<max_rows, max_vectors / 2>(rows, vectors, body);
  }
  body.template operator()<max_rows, max_vectors>();
  return {max_rows, max_vectors};
}

// Visits all tiles of image rows [begin, end), from left to right within the same rows: body.template
// operator()<rows, vectors>(place).
template <int VL, class Body>
inline void for_tiles(const Walk& walk, std::int64_t begin, std::int64_t end, const Body& body) {
  const TileShape shape = tile_shape(walk);
  const std::int64_t total = walk.width * walk.lanes / VL;
  Place place;
  for (std::int64_t row = begin; row < end;) {
    // The rows of this strip of tiles: a power of two.
    int rows = shape.rows;
    while (rows > end - row) rows /= 2;
    place_rows(place, walk, row, rows);
    for (std::int64_t vector = 0; vector < total;) {
      int vectors = shape.vectors;
      while (vectors > total - vector) vectors /= 2;
      place_vectors<VL>(place, walk, vector, vectors, total);
      const auto call = [&]<int TY, int TV>() { body.template operator()<TY, TV>(place); };
      if (shape.vectors == 4)
        with_tile<smaller_int(max_tile_rows, max_accumulators / 4), 4>(rows, vectors, call);
      else if (shape.vectors == 2)
        with_tile<smaller_int(max_tile_rows, max_accumulators / 2), 2>(rows, vectors, call);
      else
        with_tile<max_tile_rows, 1>(rows, vectors, call);
      vector += vectors;
    }
    row += rows;
  }
}

// Tasks of a walk: bands of image rows times groups of output planes.
struct Tasks {
  std::int64_t band = 1;  // image rows of a band, a multiple of the tile's
  std::int64_t bands = 1;
  std::int64_t group = 1;  // output planes of a group
  std::int64_t groups = 1;
};

inline Tasks cut(const Walk& walk, std::int64_t smallest_group) {
  const TileShape shape = tile_shape(walk);
  const std::int64_t image_rows = walk.blocks * walk.height;
  Tasks tasks;
  tasks.band = ceil_divide(ceil_divide(image_rows, enough_tasks), shape.rows) * shape.rows;
  tasks.bands = ceil_divide(image_rows, tasks.band);
  const std::int64_t groups =
      larger(1, smaller(ceil_divide(enough_tasks, tasks.bands), walk.rows / larger(1, smallest_group)));
  tasks.group = ceil_divide(walk.rows, groups);
  tasks.groups = ceil_divide(walk.rows, tasks.group);
  return tasks;
}

// Bytes of one input plane that a tile of the walk reads.
inline std::int64_t tile_footprint(const Walk& walk) {
  const TileShape shape = tile_shape(walk);
  // The reach of the taps around a pixel, guessed from their number: kernels are nearly always square.
  std::int64_t side = 1;
  while (side * side < walk.taps) ++side;
  const std::int64_t pixels = larger(1, shape.vectors * vector_length(walk) / walk.lanes);
  const std::int64_t stride = walk.input_pixel / walk.lanes;
  const std::int64_t across = (pixels - 1) * stride + side, down = (shape.rows - 1) * stride + side;
  return across * down * walk.lanes * static_cast<std::int64_t>(sizeof(float));
}

// Whether to ask for a walk's memory before it is needed: where its input lies beyond the caches and most of its planes are
// used. Tiles go from left to right, but over more planes at once than a core follows by itself.
inline bool fetches_ahead(const Walk& walk, std::int64_t entries) {
  const std::int64_t floats = walk.blocks * walk.channels * walk.height * walk.input_row;
  return contiguous(walk) && floats * static_cast<std::int64_t>(sizeof(float)) >= 8 * second_cache &&
         entries >= walk.channels;
}

// Rows of the matrix between asking for the tile of dy of one of their planes and using it.
inline constexpr int rows_ahead = 2;

// Asks for the vectors of a tile at `from`, to be written (write = 1) or read, into the first-level cache (level = 3) or
// the second (2).
template <int VL, int TY, int TV, int write, int level>
EDGE_BCS_INLINE void fetch(const float* from, const std::int64_t (&rows)[max_tile_rows]) {
#pragma GCC unroll 8
  for (int y = 0; y < TY; ++y)
#pragma GCC unroll 4
    for (int x = 0; x < TV; ++x) __builtin_prefetch(from + rows[y] + x * VL, write, level);
}

// Asks for the input of the tile to the right of `place` in planes [plane, end): what this tile has not read, too.
template <int VL, int TY, int TV>
EDGE_BCS_INLINE void fetch_next_input(const Walk& walk, const Place& place, std::int64_t& plane,
                                      std::int64_t end) {
  if (place.ends_row) return;
  for (; plane < end; ++plane) {
    const float* const input = walk.input + plane * walk.input_plane;
    fetch<VL, TY, TV, 0, 2>(input + place.input_x[0] + TV * VL + walk.lanes, place.input);
  }
}

// What `finish` does after scale, shift and addend where there are activations that do more than clip, for `height` × `width`
// vectors of a tile. Not inlined: their code would stand in every kernel.
template <int VL>
__attribute__((noinline)) void finish_activated(const Walk& walk, const Place& place, std::int64_t row,
                                                Vector<VL>* values, int height, int width, int down,
                                                int right) {
  const int count = height * width;
  const auto each = [&](const auto& body) {
    for (int y = 0, i = 0; y < height; ++y)
      for (int x = 0; x < width; ++x, ++i) body(values[i], down + y, right + x);
  };
  if (walk.pre != nullptr) {
    float* const plane = walk.pre + row * walk.mask_plane;
    each([&](Vector<VL> value, int y, int x) { store<VL>(plane + place.mask[y] + place.mask_x[x], value); });
  }
  if (walk.bits != nullptr) {
    std::uint8_t* const plane = walk.bits + row * walk.bits_plane;
    each([&](Vector<VL> value, int y, int x) {
      const Vector<VL> open = openness<VL>(walk.activation.function, value);
      store_bits<VL>(plane + place.bits[y], place.bit[x], positive_bits<VL>(open));
    });
  }
  activate<VL>(walk.activation, values, count);
  if (walk.mask != nullptr) {
    const float* const plane = walk.mask + row * walk.mask_plane;
    Vector<VL> kept[max_accumulators];
    int next = 0;
    each([&](Vector<VL>, int y, int x) { kept[next++] = load<VL>(plane + place.mask[y] + place.mask_x[x]); });
    pass_back<VL>(walk.through, kept, values, count);
  }
  if (walk.mask_bits != nullptr) {
    const std::uint8_t* const plane = walk.mask_bits + row * walk.bits_plane;
    const Slopes slopes = slopes_of(walk.through);
    each([&](Vector<VL>& value, int y, int x) {
      value = pass_slopes<VL>(slopes, load_bits<VL>(plane + place.bits[y], place.bit[x]), value);
    });
  }
  float* const plane = walk.output + row * walk.output_plane;
  each(
      [&](Vector<VL> value, int y, int x) { store<VL>(plane + place.output[y] + place.output_x[x], value); });
}

// sums · scale + shift + addend of one output plane, for TY rows and TV vectors of a tile that begin `down` and `right` in it.
#define EDGE_BCS_EACH_VECTOR \
  _Pragma("GCC unroll 8") for (int y = 0; y < TY; ++y) _Pragma("GCC unroll 4") for (int x = 0; x < TV; ++x)
template <int VL, int TY, int TV, bool strided>
EDGE_BCS_INLINE void scale_and_add(const Walk& walk, const Place& place, std::int64_t row,
                                   Vector<VL> (&sums)[TY][TV], int down, int right) {
  if (walk.scale != nullptr) {
    const Vector<VL> scale = broadcast<VL>(walk.scale[row]), shift = broadcast<VL>(walk.shift[row]);
    EDGE_BCS_EACH_VECTOR sums[y][x] = sums[y][x] * scale + shift;
  }
  if (walk.addend != nullptr) {
    const float* const plane = walk.addend + row * walk.output_plane + place.output_x[right];
    EDGE_BCS_EACH_VECTOR sums[y][x] +=
        load<VL>(plane + place.output[down + y] + along<VL, strided>(place.output_x + right, x));
  }
}

// What follows where activations do no more than clip (Walk::simple). It calls nothing, so that sums of other planes may stay
// in registers meanwhile.
template <int VL, int TY, int TV, bool strided>
EDGE_BCS_INLINE void finish_clipped(const Walk& walk, const Place& place, std::int64_t row,
                                    Vector<VL> (&sums)[TY][TV], int down, int right) {
  if (walk.activation.function == Function::relu) {
    EDGE_BCS_EACH_VECTOR sums[y][x] = relu<VL>(sums[y][x]);
  } else if (walk.activation.function == Function::relu6) {
    EDGE_BCS_EACH_VECTOR sums[y][x] = relu6_of<VL>(sums[y][x]);
  }
  if (walk.mask != nullptr) {
    const float* mask = walk.mask + row * walk.mask_plane + place.mask_x[right];
    const auto kept = [&](int y, int x) {
      return load<VL>(mask + place.mask[down + y] + along<VL, strided>(place.mask_x + right, x));
    };
    if (walk.through.function == Function::relu6) {
      EDGE_BCS_EACH_VECTOR sums[y][x] =
          where_positive<VL>(openness<VL>(Function::relu6, kept(y, x)), sums[y][x]);
    } else {
      EDGE_BCS_EACH_VECTOR sums[y][x] = where_positive<VL>(kept(y, x), sums[y][x]);
    }
  }
  if (walk.mask_bits != nullptr) {
    const std::uint8_t* bits = walk.mask_bits + row * walk.bits_plane;
    EDGE_BCS_EACH_VECTOR {
      const std::int64_t bit = place.bit[right] + along<VL, strided>(place.bit + right, x);
      sums[y][x] = where_bits<VL>(load_bits<VL>(bits + place.bits[down + y], bit), sums[y][x]);
    }
  }
  float* const plane = walk.output + row * walk.output_plane + place.output_x[right];
  EDGE_BCS_EACH_VECTOR store<VL>(
      plane + place.output[down + y] + along<VL, strided>(place.output_x + right, x), sums[y][x]);
  if (walk.bits != nullptr) {
    std::uint8_t* bits = walk.bits + row * walk.bits_plane;
    if (walk.activation.function == Function::relu6) {
      EDGE_BCS_EACH_VECTOR sums[y][x] = openness<VL>(Function::relu6, sums[y][x]);
    }
    if constexpr (strided) {
      EDGE_BCS_EACH_VECTOR store_bits<VL>(bits + place.bits[down + y], place.bit[right + x],
                                          positive_bits<VL>(sums[y][x]));
    } else {
#pragma GCC unroll 8
      for (int y = 0; y < TY; ++y)
        store_positive_bits<VL, TV>(bits + place.bits[down + y], place.bit[right], sums[y]);
    }
  }
}

// The halo beside `height` rows that end, and below the last, of output plane `row`.
__attribute__((noinline)) inline void zero_halo(const Walk& walk, const Place& place, std::int64_t row,
                                                int height, int down) {
  for (int y = down; y < down + height; ++y) {
    const std::int64_t count = walk.tail + (place.last_row[y] ? walk.bottom : 0);
    float* const from = walk.output + row * walk.output_plane + place.output[y] + walk.tail_at;
    for (std::int64_t i = 0; i < count; ++i) from[i] = 0;
  }
}
EDGE_BCS_INLINE bool ends_in_halo(const Walk& walk, const Place& place) {
  return place.ends_row && walk.tail + walk.bottom > 0;
}

// out = act'(mask) · act(scale · sums + shift + addend) of one output plane, with the bits and the halo, for TY rows and TV
// vectors of a tile that begin `down` rows below its first.
template <int VL, int TY, int TV, bool strided>
EDGE_BCS_INLINE void finish(const Walk& walk, const Place& place, std::int64_t row,
                            Vector<VL> (&sums)[TY][TV], int down = 0) {
  scale_and_add<VL, TY, TV, strided>(walk, place, row, sums, down, 0);
  if (walk.simple()) {
    finish_clipped<VL, TY, TV, strided>(walk, place, row, sums, down, 0);
  } else {
    // A copy, because sums whose address is known cannot stay in registers.
    Vector<VL> values[TY * TV];
    EDGE_BCS_EACH_VECTOR values[y * TV + x] = sums[y][x];
    finish_activated<VL>(walk, place, row, values, TY, TV, down, 0);
  }
  if (ends_in_halo(walk, place)) zero_halo(walk, place, row, TY, down);
}
#undef EDGE_BCS_EACH_VECTOR

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
