// The order of an epoch's images: `Dataset.order` of edge_bcs/data/dataset.py, to the bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>

#include "ops/philox.h"

namespace edge_bcs {

// Fills `order` with a permutation of [0, its length) that is a function of `random` alone. Needs no memory: what the images
// are sorted by is drawn anew whenever two are compared.
inline void shuffle(const Philox& random, std::span<std::uint32_t> order) {
  const auto key = [&](std::uint32_t image) {
    const Philox::Words words = random.block(image / 2);
    const std::size_t first = 2 * (image % 2);
    return std::pair(std::uint64_t{words[first + 1]} << 32 | words[first], image);
  };
  std::iota(order.begin(), order.end(), 0u);
  std::ranges::sort(order, {}, key);
}

}  // namespace edge_bcs
