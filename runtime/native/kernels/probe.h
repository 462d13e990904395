// What a core can do at most: the roof under which the kernels work.
#pragma once

#include <cstdint>

namespace edge_bcs {

// Sizes in vectors of `lanes` floats: a tile is `rows` × `across` of them, in a plane with room for 3×3 positions.
struct ProbeTile {
  static constexpr std::int64_t positions = 3;
  std::int64_t lanes, rows, across;

  constexpr std::int64_t vectors() const { return rows * across; }
  constexpr std::int64_t plane_row() const { return (across + positions - 1) * lanes; }  // in floats
  constexpr std::int64_t plane() const { return (rows + positions - 1) * plane_row(); }  // in floats
};

struct ProbeKernels {
  // Runs `rounds` rounds of independent multiply-adds in registers and returns how many floating-point operations these
  // were (two each).
  std::int64_t (*multiply_adds)(std::int64_t rounds);
  // The sum of `count` floats, read in order.
  float (*sum)(const float* from, std::int64_t count);
  // to[i] = from[i].
  void (*copy)(const float* from, float* to, std::int64_t count);
  // A tile of the sparse kernels and the input plane around it.
  ProbeTile tile;
  // Adds weight[j] times the tile at `planes` + distance[j] to sums in registers, for each of `entries`: the inner loop of
  // the sparse kernels, where every multiply-add of a vector loads that vector. Returns the sum of all.
  float (*load_multiply_adds)(const float* planes, const std::int32_t* distance, const float* weight,
                              std::int64_t entries);
};

extern const ProbeKernels probe_kernels_scalar;
extern const ProbeKernels probe_kernels_avx2;
extern const ProbeKernels probe_kernels_avx512;
extern const ProbeKernels probe_kernels_neon;

}  // namespace edge_bcs
