#include "app/signals.h"

#include <unistd.h>

#include <csignal>

namespace edge_bcs::app {

namespace {

volatile std::sig_atomic_t arrived = 0;

void note(int number) {
  if (arrived != 0) _exit(128 + number);
  arrived = number;
}

}  // namespace

Interrupted::Interrupted(int number) : Error("stopped by a signal"), number_(number) {}

const char* Interrupted::name() const { return number_ == SIGINT ? "SIGINT" : "SIGTERM"; }

void note_signals() {
  struct sigaction action{};
  action.sa_handler = note;
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

bool signal_arrived() { return arrived != 0; }

void check_signals() {
  if (arrived != 0) throw Interrupted(arrived);
}

}  // namespace edge_bcs::app
