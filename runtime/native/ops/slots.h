// The affine tensor f32 [2A] (scales, then shifts) and the part of it that one operator uses.
#pragma once

#include <cstdint>

#include "ops/op.h"

namespace edge_bcs {

// The range [affine, affine + channels) of slots, from the attribute affine.
class Slots {
 public:
  Slots(const Attributes& attributes, std::int64_t channels)
      : first_(attributes.integer_in("affine", 0, most)), channels_(channels) {}

  // Of an operator that may have neither scales nor shifts: affine is then −1, or not there.
  static Slots if_any(const Attributes& attributes, std::int64_t channels) {
    return Slots(attributes.integer_in("affine", none, most, none), channels);
  }

  template <class T>
  struct Bound {
    T* scale = nullptr;
    T* shift = nullptr;
  };

  // The scales and shifts of this range in the tensor `name`; checks that it has them. Null where the operator has none.
  template <class T>
  Bound<T> bind(const Tensor<T>& tensor, const char* name) const {
    require(first_ == none || tensor, "the input ", name, " is missing");
    return bind_if_there(tensor, name);
  }

  // The same of a tensor that may be absent: null then, too.
  template <class T>
  Bound<T> bind_if_there(const Tensor<T>& tensor, const char* name) const {
    if (first_ == none || !tensor) return {};
    const std::int64_t count = tensor.size() / 2;  // A
    require(tensor.shape() == Shape{2 * count} && first_ + channels_ <= count, "the ", name, " tensor is ",
            tensor.shape().text(), " and has no slots ", first_, " to ", first_ + channels_);
    return {tensor.data() + first_, tensor.data() + count + first_};
  }

 private:
  static constexpr std::int64_t none = -1, most = std::int64_t{1} << 40;

  Slots(std::int64_t first, std::int64_t channels) : first_(first), channels_(channels) {}

  std::int64_t first_, channels_;
};

}  // namespace edge_bcs
