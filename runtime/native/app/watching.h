// A single-step attack that is watched: once it has collapsed, the training goes on with PGD (runtime/watching.py).
#pragma once

#include <functional>

#include "app/network.h"
#include "app/validation.h"

namespace edge_bcs::app {

// The images of a training that it is watched on, once it has begun.
class AttackWatch {
 public:
  // `data`: all of it, what is held out included.
  AttackWatch(Network& network, Data& data, const Match& match);

  // Looks at the attack, and says so if it has collapsed. `between` is called after each micro-batch; what it throws ends the
  // look, which is then due.
  void look(const edge_bcs_position& position, const std::function<void()>& between);

 private:
  static Part watched_of(const Network& network, Data& data);

  Network& network_;
  const Match& match_;
  Part watched_;
};

}  // namespace edge_bcs::app
