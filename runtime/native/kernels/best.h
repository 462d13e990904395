// The maximum of a window.
#pragma once

#include "kernels/activation.h"
#include "kernels/rows.h"
#include "kernels/simd.h"

namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE {

// The best of a window so far, in VL windows at once.
template <int VL>
struct Best {
  Vector<VL> value;
  Integers<VL> where;

  EDGE_BCS_INLINE void consider(Vector<VL> pixel, Integers<VL> place) {
    // Not a number wins, so that it is seen.
    const Integers<VL> more = (pixel > value) | (pixel != pixel);
    value = more ? pixel : value;
    where = more ? place : where;
  }
  EDGE_BCS_INLINE void consider(Vector<VL> pixel, std::int64_t place) {
    consider(pixel, Integers<VL>{} + static_cast<std::int32_t>(place));
  }
  // ReLU, ReLU6 or nothing.
  EDGE_BCS_INLINE void activate(Function function) {
    if (function != Function::none) clip(value <= Vector<VL>{}, Vector<VL>{});
    if (function == Function::relu6) clip(value >= broadcast<VL>(6), broadcast<VL>(6));
  }
  EDGE_BCS_INLINE void finish(Function function, float* y, std::uint8_t* choice) {
    activate(function);
    store<VL>(y, value);
    if (choice != nullptr) store_bytes<VL>(choice, where);
  }

 private:
  // Where the activation is flat it has the value `flat`, and no pixel is chosen.
  EDGE_BCS_INLINE void clip(Integers<VL> here, Vector<VL> flat) {
    where = here ? Integers<VL>{} + no_choice : where;
    value = here ? flat : value;
  }
};

}  // namespace edge_bcs::EDGE_BCS_KERNEL_NAMESPACE
