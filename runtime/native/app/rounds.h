// finetune --rounds: boards that meet again through a folder, round after round (edge_bcs/cli/rounds.py). This one merges
// nothing: `edge-bcs merge` does, or a board with Python.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "app/opening.h"
#include "app/options.h"
#include "app/value.h"

namespace edge_bcs::app {

inline constexpr OptionSpec rounds_option{
    "--rounds", "DIR",
    "Learn in rounds with other boards, through a folder that all of them see (a mounted share, rsync): each "
    "trains for --epochs or --steps, somebody merges their runs there (`edge-bcs merge`, or `edge-bcs "
    "finetune --boards` on one of them), and all go on with that."};
inline constexpr OptionSpec board_option{
    "--board", "NAME", "With --rounds: what this board is called there; default: its host name."};
inline constexpr OptionSpec max_rounds_option{
    "--max-rounds", "N", "With --rounds: rounds that this call takes part in; default: 1."};
inline constexpr OptionSpec wait_option{"--wait", "SECONDS",
                                        "With --rounds: how long to wait for what a round becomes; then the "
                                        "command ends with status 75. Default: "
                                        "600."};

constexpr int time_is_up = 75;  // sysexits.h: a temporary failure; try again

struct RoundWishes {
  std::string folder, board;
  std::uint64_t max_rounds;
  double wait;  // seconds
  std::optional<double> max_hours = {};
};

// Nothing without --rounds. Throws Error for what belongs to it without it, and for a name that no board can have.
std::optional<RoundWishes> rounds_by(const Options& options);

// Trains what was opened to the end of its round, at most so many hours, and saves it into the run folder; `anew`: what it was
// saved in is over. Its status is not 0 if it was cut off.
using TrainRound = std::function<int(const Opened& opened, bool anew, std::optional<double> hours)>;

// Takes part in rounds and returns the exit status; what became of each is in "rounds" of the report. `look`: looks at what a new
// run would be trained on before it is begun, and throws Error where that cannot be used.
int take_part(const RoundWishes& rounds, const RunWishes& run, Value& report,
              const std::function<void(const Network&)>& look, const TrainRound& train);

void print_rounds(const Value& report);

}  // namespace edge_bcs::app
