// The work memory of one node, handed out piece by piece.
#pragma once

#include <cstddef>

#include "ops/op.h"

namespace edge_bcs {

class Work {
 public:
  Work() = default;
  Work(std::byte* begin, std::size_t bytes) : begin_(begin), bytes_(bytes) {}

  // Memory for `bytes` bytes; what is taken after the first is aligned for any number. Throws Error where it does not suffice.
  void* take(std::size_t bytes) {
    constexpr std::size_t unit = alignof(std::max_align_t);
    const std::size_t first = (taken_ + unit - 1) / unit * unit;
    require(first <= bytes_ && bytes <= bytes_ - first, "more work memory is asked for than the ", bytes_,
            " bytes of the program");
    taken_ = first + bytes;
    return begin_ + first;
  }

  // Gives back what `take` gave, and all that was taken after it.
  void give_back(void* memory) noexcept {
    taken_ = static_cast<std::size_t>(static_cast<std::byte*>(memory) - begin_);
  }

 private:
  std::byte* begin_ = nullptr;
  std::size_t bytes_ = 0, taken_ = 0;
};

}  // namespace edge_bcs
