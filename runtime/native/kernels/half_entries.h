// How both forms of half precision go through the rows of a sparse matrix: whole ones, as many as there is room for.
#pragma once

#include <cstdint>

#include "kernels/tiles.h"
#include "kernels/walk.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// Calls tiles(visit) for rows [row, end), some of them ready in `entries`, where tiles(body) calls
// body.template operator()<rows, pixels or vectors>(tile) for each tile. A row of more entries than there is room for is visited a
// part after the other in each tile.
//
// Entries: begin(walk, matrix, row, end) empties it before rows from `row` on; fits(count) says whether a row of so many entries
// finds room; add(walk, matrix, from, to) makes a row of entries [from, to) ready; `rows` counts them; `continued` and `unfinished`
// say of one row alone that others went before, and that others follow.
template <class Entries, class Tiles, class Visit>
inline void visit_rows(const Walk& walk, const SparseRows& matrix, std::int64_t row, std::int64_t end,
                       Entries& entries, const Tiles& tiles, const Visit& visit) {
  while (row < end) {
    entries.begin(walk, matrix, row, end);
    for (; row < end && entries.fits(matrix.end(row) - matrix.begin(row)); ++row)
      entries.add(walk, matrix, matrix.begin(row), matrix.end(row));
    if (entries.rows > 0) {
      tiles(visit);
      continue;
    }
    tiles([&]<int height, int width>(const auto& tile) {
      for (std::int64_t from = matrix.begin(row), to; from < matrix.end(row); from = to) {
        to = smaller(matrix.end(row), from + Entries::capacity);
        entries.clear(row);
        entries.continued = from > matrix.begin(row);
        entries.unfinished = to < matrix.end(row);
        entries.add(walk, matrix, from, to);
        visit.template operator()<height, width>(tile);
      }
    });
    ++row;
  }
}

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
