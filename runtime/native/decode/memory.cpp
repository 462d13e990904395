#include "decode/memory.h"

#include <memory>

namespace edge_bcs {

void* Workspace::take(std::size_t size) {
  void* place = memory_.data() + used_;
  std::size_t space = left();
  if (std::align(64, size, place, space) == nullptr) return nullptr;
  last_ = memory_.size() - space;
  used_ = last_ + size;
  return place;
}

void Workspace::give_back(void* block) {
  if (block == memory_.data() + last_) used_ = last_;
}

}  // namespace edge_bcs
