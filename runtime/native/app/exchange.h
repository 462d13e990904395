// The folder through which boards exchange runs, for a board that merges nothing: edge_bcs/fleet/rounds.py.
#pragma once

#include <cstdint>
#include <string>

#include "app/value.h"
#include "include/edge_bcs.h"

namespace edge_bcs::app {

class Exchange {
 public:
  // Throws Error for a name that no board can have.
  Exchange(std::string folder, std::string board);

  const std::string& board() const { return board_; }
  // The last round that somebody has merged, whether well or not; 0 before the first.
  std::uint64_t last_merged() const;
  bool is_merged(std::uint64_t round) const;
  // How many boards have sent a run in a round.
  std::size_t sent(std::uint64_t round) const;

  // Puts what this board learned in a round into the folder; returns the bytes of its state. The velocities of the network are 0
  // then. Throws Error if something else lies there under this board's name.
  std::uint64_t send(edge_bcs_network& network, std::uint64_t round) const;
  // Puts what a round became in the place of the network's state. Throws Error if it cannot be used; the state is then anything.
  void take(edge_bcs_network& network, std::uint64_t round) const;
  // What is told of how it was merged; empty where nobody left a report, or a damaged one.
  Value report(std::uint64_t round) const;

 private:
  std::string place(std::uint64_t round) const;
  std::string merged(std::uint64_t round) const;

  std::string folder_, board_;
};

// The name of this machine as that of a board.
std::string name_of_host();

// The round that the network's run takes part in; 0: none.
std::uint64_t round_of(const edge_bcs_network& network);
// Whether the training that the run was saved in is of the round before, and over.
bool begins_anew(const edge_bcs_network& network);
// Saves into the run folder `run` that a round begins with the network's state. `goes_on`: the network is that of this run.
void begin_round(edge_bcs_network& network, const std::string& run, std::uint64_t round, bool goes_on);

// Whether a report of a merger has what is shown of it.
bool tells(const Value& report);

}  // namespace edge_bcs::app
