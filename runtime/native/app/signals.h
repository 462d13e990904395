// Ending in good order when SIGINT or SIGTERM asks for it.
#pragma once

#include "ops/op.h"

namespace edge_bcs::app {

// A signal arrived; what was under way has been finished.
class Interrupted : public Error {
 public:
  explicit Interrupted(int number);
  const char* name() const;
  // 128 and the signal's number, as shells have it.
  int exit_status() const { return 128 + number_; }

 private:
  int number_;
};

// From now on the two signals are noted; the second one ends the process at once.
void note_signals();
bool signal_arrived();
// Throws Interrupted if one has arrived.
void check_signals();

}  // namespace edge_bcs::app
