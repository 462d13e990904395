// What norms add to a variance, so that its inverse root is finite.
#pragma once

#include "ops/op.h"

namespace edge_bcs {

inline double epsilon_from(const Attributes& attributes) {
  const double epsilon = attributes.real("epsilon", 1e-5f);
  require(epsilon > 0 && epsilon < 1, "epsilon is ", epsilon, ", not in (0, 1)");
  return epsilon;
}

}  // namespace edge_bcs
