// A bounded group of a sparse matrix's entries, turned into what the kernels use.
#pragma once

#include <cstdint>

#include "kernels/simd.h"
#include "kernels/tiles.h"
#include "kernels/walk.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// Where in a range of rows the next group starts.
struct Cursor {
  Cursor(const SparseRows& rows, std::int64_t first, std::int64_t last)
      : row(first), end(last), entry(first < last ? rows.begin(first) : 0) {}
  std::int64_t row;
  std::int64_t end;
  std::int64_t entry;  // of `row`: the first one that is still to do
};

// Whole rows, except that the first may have been started by the group before and the last be continued by the next.
struct Group {
  static constexpr int capacity = 8192;  // entries
  static constexpr int max_rows = 128;
  static constexpr int max_chunks = 16;

  std::int64_t first_row = 0;
  int rows = 0;
  int chunks = 1;
  bool continues = false;   // the first row was started before
  bool unfinished = false;  // the last row goes on
  const float* weights = nullptr;
  std::int64_t first_entry = 0;  // of the matrix, if its rows follow each other

  alignas(64) std::int32_t distance[capacity];
  alignas(64) float weight[capacity];
  std::int32_t pointer[max_rows * (max_chunks + 1)];

  int entries() const { return end(rows - 1, chunks - 1); }
  int begin(int r, int chunk) const { return pointer[r * (chunks + 1) + chunk]; }
  int end(int r, int chunk) const { return pointer[r * (chunks + 1) + chunk + 1]; }
  bool starts(int r, int chunk) const { return chunk == 0 && !(continues && r == 0); }
  bool completes(int r, int chunk) const { return chunk == chunks - 1 && !(unfinished && r == rows - 1); }

  // Takes the next rows, of `most` entries at most; false if there are none left.
  bool fill(const Walk& walk, const SparseRows& matrix, Cursor& cursor, int most = capacity) {
    if (cursor.row == cursor.end) return false;
    first_row = cursor.row;
    first_entry = cursor.entry;
    continues = cursor.entry != matrix.begin(cursor.row);
    unfinished = false;
    rows = 0;
    // How many entries, and so into how many chunks of channels to cut them.
    std::int64_t entries = 0;
    {
      std::int64_t entry = cursor.entry;
      for (std::int64_t row = cursor.row; row < cursor.end && rows < max_rows && entries < most; ++row) {
        const std::int64_t count = matrix.end(row) - entry;
        entries += smaller(count, most - entries);
        ++rows;
        if (row + 1 < cursor.end) entry = matrix.begin(row + 1);
      }
    }
    chunks = chunks_for(walk, entries);
    const std::int64_t chunk_channels = ceil_divide(walk.channels, chunks);
    std::int64_t used = 0;
    for (int r = 0; r < rows; ++r) {
      const std::int64_t row = first_row + r, end = matrix.end(row);
      const std::int64_t count = smaller(end - cursor.entry, most - used);
      turn(walk, matrix, cursor.entry, static_cast<int>(used), static_cast<int>(count));
      std::int32_t* const pointers = pointer + r * (chunks + 1);
      pointers[0] = static_cast<std::int32_t>(used);
      std::int64_t from = cursor.entry;
      for (int chunk = 1; chunk < chunks; ++chunk) {
        from = matrix.first_at_least(from, cursor.entry + count, chunk * chunk_channels);
        pointers[chunk] = static_cast<std::int32_t>(used + from - cursor.entry);
      }
      used += count;
      pointers[chunks] = static_cast<std::int32_t>(used);
      if (count < end - cursor.entry) {
        cursor.entry += count;
        unfinished = true;
        break;
      }
      ++cursor.row;
      if (cursor.row < cursor.end) cursor.entry = matrix.begin(cursor.row);
    }
    weights = matrix.position == nullptr ? matrix.value + first_entry : weight;
    return true;
  }

 private:
  // Chunks are worth the sums' way to memory and back where each has enough entries of a row.
  int chunks_for(const Walk& walk, std::int64_t entries) const {
    const std::int64_t wanted = ceil_divide(walk.channels * tile_footprint(walk), first_cache());
    const std::int64_t affordable = entries / (rows * smallest_chunk);
    return wanted <= affordable ? static_cast<int>(smaller(wanted, max_chunks)) : 1;
  }
  static constexpr int smallest_chunk = 6;

  void turn(const Walk& walk, const SparseRows& matrix, std::int64_t from, int to, int count) {
    const std::int32_t* const entry = matrix.entry + from;
    const std::int32_t plane = static_cast<std::int32_t>(walk.input_plane);
    for (int i = 0; i < count; ++i) distance[to + i] = (entry[i] >> 8) * plane + walk.tap[entry[i] & 255];
    if (matrix.position == nullptr) return;
    const std::int32_t* const position = matrix.position + from;
    if (matrix.factor == nullptr)
      for (int i = 0; i < count; ++i) weight[to + i] = matrix.value[position[i]];
    else
      for (int i = 0; i < count; ++i)
        weight[to + i] = matrix.value[position[i]] * matrix.factor[entry[i] >> 8];
  }
};

// Calls body.template operator()<vector length, strided>() as the walk needs.
template <class Body>
inline void with_vectors(const Walk& walk, const Body& body) {
  const int length = vector_length(walk);
  const auto choose = [&]<bool strided>() {
    if constexpr (native_lanes >= 16) {
      if (length == 16) return body.template operator()<16, strided>();
    }
    if constexpr (native_lanes >= 8) {
      if (length == 8) return body.template operator()<8, strided>();
    }
    if (length == 4) return body.template operator()<4, strided>();
    body.template operator()<1, strided>();
  };
  if (contiguous(walk))
    choose.template operator()<false>();
  else
    choose.template operator()<true>();
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
