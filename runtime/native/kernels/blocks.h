// Blocks of output planes, which share every load of the input, and their weights: packed block after block, so that each reads
// its own in order.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/table.h"
#include "kernels/tiles.h"
#include "kernels/walk.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

inline constexpr int block_rows = 6;

// Groups of rows begin at multiples of the row block, so that the packed weights do not depend on the cut.
inline Tasks cut_blocks(const Walk& walk) {
  Tasks tasks = cut(walk, 16);
  tasks.group = ceil_divide(tasks.group, block_rows) * block_rows;
  tasks.groups = ceil_divide(walk.rows, tasks.group);
  return tasks;
}

inline std::int64_t packing_tasks(const Walk& walk) {
  return larger(1, smaller(enough_tasks, walk.rows / block_rows));
}

// The rows [first, last) that a task packs.
struct PackedRows {
  std::int64_t first, last;
};
inline PackedRows packed_rows(const Walk& walk, std::int64_t task) {
  const std::int64_t share =
      ceil_divide(ceil_divide(walk.rows, block_rows), packing_tasks(walk)) * block_rows;
  return {task * share, smaller(walk.rows, (task + 1) * share)};
}

// Packs these rows, of `columns` words each. `size_of` says how many rows the block has that begins so many before the end;
// put(words, size, row of the block, its row of the matrix, channel, tap, weight) is called for each weight, with words that are 0.
template <class Word, class SizeOf, class Put>
inline void pack_blocks(const Walk& walk, const Weights& weights, const PackedRows& rows, Word* packed,
                        std::int64_t columns, const SizeOf& size_of, const Put& put) {
  for (std::int64_t row = rows.first; row < rows.last;) {
    const int size = size_of(walk.rows - row);
    Word* const to = packed + row * columns;
    std::memset(to, 0, static_cast<std::size_t>(size * columns) * sizeof *to);
    for_weights(walk, weights, row, size,
                [&](int o, std::int64_t channel, std::int64_t tap, float weight, std::int64_t) {
      put(to, size, o, row + o, channel, tap, weight);
    });
    row += size;
  }
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
