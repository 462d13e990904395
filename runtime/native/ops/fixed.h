// A short list that lives on the stack: what an operator makes anew in every run, where nothing may be allocated.
#pragma once

#include <array>
#include <cstddef>

#include "ops/op.h"

namespace edge_bcs {

// At most `most` elements. Throws Error for one more.
template <class T, std::size_t most>
class Fixed {
 public:
  void push_back(const T& element) {
    require(size_ < most, "there are more than ", most, " of them");
    elements_[size_++] = element;
  }
  std::size_t size() const { return size_; }
  const T& operator[](std::size_t i) const { return elements_[i]; }
  const T& back() const { return elements_[size_ - 1]; }
  const T* begin() const { return elements_.data(); }
  const T* end() const { return elements_.data() + size_; }

 private:
  std::array<T, most> elements_;
  std::size_t size_ = 0;
};

}  // namespace edge_bcs
