// The memory in which an image is decoded.
#pragma once

#include <cstddef>
#include <span>

namespace edge_bcs {

// Blocks of one piece of memory, which all end with it. What is freed before is not used again, but for the last block.
class Workspace {
 public:
  explicit Workspace(std::span<std::byte> memory) : memory_(memory) {}

  // Null where there is not so much left. From a multiple of 64 on.
  void* take(std::size_t size);
  // Undoes the last `take`, if `block` came from it.
  void give_back(void* block);

  std::size_t left() const { return memory_.size() - used_; }
  std::size_t size() const { return memory_.size(); }

 private:
  std::span<std::byte> memory_;
  std::size_t used_ = 0, last_ = 0;
};

}  // namespace edge_bcs
