// The affine tensor f32 [2A] (scales, then shifts) and the part of it that one operator uses.
#pragma once

#include <cstdint>

#include "ops/op.h"

namespace edge_bcs {

// The range [affine, affine + channels) of slots, from the attribute affine.
struct Slots {
  std::int64_t first, channels;

  Slots(const Attributes& attributes, std::int64_t channels)
      : first(attributes.integer_in("affine", 0, std::int64_t{1} << 40)), channels(channels) {}

  template <class T>
  struct Bound {
    T* scale;
    T* shift;
    std::int64_t count;  // A
  };

  // The scales and shifts of this range; checks that the tensor has them.
  template <class T>
  Bound<T> bind(const Tensor<T>& tensor) const {
    const std::int64_t count = tensor.size() / 2;
    require(tensor.shape() == Shape{2 * count} && first + channels <= count, "the affine tensor is ",
            tensor.shape().text(), " and has no slots ", first, " to ", first + channels);
    return {tensor.data() + first, tensor.data() + count + first, count};
  }
};

}  // namespace edge_bcs
