#include "app/rounds.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "app/exchange.h"
#include "app/paths.h"
#include "app/progress.h"
#include "app/reading.h"
#include "app/saving.h"
#include "app/signals.h"
#include "app/text.h"
#include "session/handle.h"

namespace edge_bcs::app {

namespace {

constexpr std::array measures{"accuracy", "robust_accuracy"};
constexpr unsigned seconds_between_looks = 1;
constexpr double shortest_hours = 1e-9;  // the first round is trained for a step at least

// "2.5", as Python's %g has it.
std::string seconds_of(double seconds) {
  std::string text = fixed(seconds, 4);
  text.erase(text.find_last_not_of('0') + 1);
  if (text.ends_with('.')) text.pop_back();
  return text;
}

// Waits for what a round becomes, and takes it; false: nobody has merged it in time, or before `ends`. Throws Interrupted.
bool meet(const Exchange& exchange, edge_bcs_network& network, std::uint64_t round, double wait,
          double ends = std::numeric_limits<double>::infinity()) {
  const double began = seconds_now();
  std::string told;
  for (;;) {
    const bool late = seconds_now() - began >= wait;
    if (exchange.is_merged(round)) {
      try {
        exchange.take(network, round);
        return true;
      } catch (const Error&) {
        if (late) throw;  // until then it may be on its way
      }
    } else if (late) {
      return false;
    }
    check_signals();
    const std::string sentence = "Round " + std::to_string(round) +
                                 ": runs that are there: " + std::to_string(exchange.sent(round)) +
                                 "; waiting for what they become.";
    if (sentence != told) say(sentence);
    told = sentence;
    if (seconds_now() >= ends) return false;
    sleep(seconds_between_looks);
  }
}

// Lets the next round begin with what the last one became.
void go_on_with(edge_bcs_network& network, const std::string& run, std::uint64_t round, bool goes_on,
                std::optional<std::uint64_t> seed = {}) {
  network.opened_at = std::max(network.opened_at, network.session.steps());  // that lie in the run folder
  network.session.set_counters(network.session.network().read_header(), seed);
  begin_round(network, run, round, goes_on);
}

bool is_count(const Value* value) {
  if (value == nullptr || !value->is_number()) return false;
  const double number = value->number();
  return number >= 0 && number < 1e15 && number == std::floor(number);
}

bool is_round(const Value& one) {
  const Value* const merged = one.find("merged");
  if (!is_count(one.find("round")) || !is_count(one.find("sent_bytes")) || merged == nullptr) return false;
  if (!(merged->is_object() && merged->members().empty()) && !tells(*merged)) return false;
  for (const char* const when : {"before", "after"})
    for (const char* const name : measures)
      if (const Value* const part = one.find(when); part != nullptr) {
        const Value* const share = part->find(name);
        if (!part->is_object() || (share != nullptr && !share->is_number())) return false;
      }
  return true;
}

// The rounds in the report so far, which is a convenience: what is damaged in it counts as none.
Value::List earlier_rounds(const std::string& run) {
  const Value report = read_json(joined(run, report_file), largest_report);
  const Value* const rounds = report.find("rounds");
  Value::List found;
  if (rounds == nullptr || !rounds->is_list()) return found;
  std::ranges::copy_if(rounds->items(), std::back_inserter(found), is_round);
  return found;
}

// Opens the run, and returns the round that it is in; a new run, or one that the fleet has overtaken, begins the one after the last
// that was merged. What it had to begin is to be opened again. `step` becomes that of the run. Throws Interrupted.
std::pair<std::uint64_t, std::optional<Opened>> join(const Exchange& exchange, const RunWishes& run,
                                                     const RunWishes& again, double wait,
                                                     const std::function<void(const Network&)>& look,
                                                     std::uint64_t& step) {
  const std::uint64_t ahead = exchange.last_merged();
  const bool goes_on = run.resume && holds_run(run.folder);
  Opened opened = open_run(goes_on ? again : run);
  edge_bcs_network& network = *opened.network->handle();
  step = goes_on ? opened.network->steps() : 0;
  if (goes_on) {
    const std::uint64_t round = round_of(network);
    require(round > 0, plain(run.folder), " holds a run that takes part in no rounds: choose another -o.");
    if (ahead < round) return {round, std::move(opened)};
    say("Round " + std::to_string(ahead) + " was merged; the run was in round " + std::to_string(round) +
        ", and goes on from there.");
  } else {
    look(*opened.network);
  }
  if (ahead > 0) meet(exchange, network, ahead, wait);
  go_on_with(network, run.folder, ahead + 1, goes_on, goes_on ? std::nullopt : run.machine.seed);
  Value report;
  report["run"] = run.folder;
  report["rounds"] = earlier_rounds(run.folder);
  write_json(joined(run.folder, report_file), report);
  return {ahead + 1, std::nullopt};
}

}  // namespace

std::optional<RoundWishes> rounds_by(const Options& options) {
  const std::optional<std::string> folder = options.text("--rounds");
  for (const char* const name : {"--board", "--max-rounds", "--wait"})
    require(folder || !options.has(name), name, " belongs to --rounds, which is not given.");
  if (!folder) return {};
  require(!folder->empty(), "--rounds names no folder.");
  RoundWishes wishes{*folder, options.text("--board").value_or(name_of_host()),
                     options.whole("--max-rounds", 1).value_or(1), options.number("--wait").value_or(600)};
  if (!(wishes.wait >= 0)) throw UsageError("Invalid value for '--wait': it is at least 0.");
  Exchange(wishes.folder, wishes.board);  // refuses the name
  return wishes;
}

int take_part(const RoundWishes& rounds, const RunWishes& run, Value& report,
              const std::function<void(const Network&)>& look, const TrainRound& train) {
  const Exchange exchange(rounds.folder, rounds.board);
  RunWishes again = run;
  again.resume = true, again.machine.seed.reset();
  report["rounds"] = earlier_rounds(run.folder);
  const double ends =
      rounds.max_hours ? seconds_now() + 3600 * *rounds.max_hours : std::numeric_limits<double>::infinity();
  std::uint64_t step = 0;  // of the run as it was saved
  const auto stopped = [&](const char* by) {
    Value stop;
    stop["by"] = by;
    stop["step"] = step;
    report["stopped"] = std::move(stop);
    return time_is_up;
  };
  try {
    auto [round, opened] = join(exchange, run, again, rounds.wait, look, step);
    for (std::uint64_t count = 0; count < rounds.max_rounds; ++count, ++round) {
      if (count > 0 && seconds_now() >= ends) {
        say("Round " + std::to_string(round) + " is for another time: the hours of --max-hours are over.");
        return stopped("--max-hours");
      }
      say("Round " + std::to_string(round) + ", as board " + exchange.board() + ".");
      if (!opened) opened = open_run(again);
      edge_bcs_network& network = *opened->network->handle();
      std::optional<double> hours;
      if (rounds.max_hours) hours = std::max((ends - seconds_now()) / 3600, shortest_hours);
      if (const int status = train(*opened, begins_anew(network), hours); status != 0) return status;
      step = opened->network->steps();
      const std::uint64_t sent = exchange.send(network, round);
      if (!meet(exchange, network, round, rounds.wait, ends)) {
        const bool over = seconds_now() >= ends;
        say("Round " + std::to_string(round) + " has not been merged in " +
            (over ? "the hours of --max-hours." : seconds_of(rounds.wait) + " seconds."));
        return stopped(over ? "--max-hours" : "--wait");
      }
      Value one, merged = exchange.report(round);
      one["round"] = round;
      for (const char* const name : {"before", "after", "training", "memory"}) {
        if (const Value* const part = report.find(name)) one[name] = *part;
        report.erase(name);
      }
      one["sent_bytes"] = sent;
      one["merged"] = merged;
      Value::List all = report["rounds"].items();
      all.push_back(std::move(one));
      report["rounds"] = std::move(all);
      // First: cut off before the next round began, it is begun again.
      write_json(joined(run.folder, report_file), report);
      go_on_with(network, run.folder, round + 1, true);
      opened.reset();
      if (const Value* const left_out = merged.find("left_out"))
        for (const Value& out : left_out->items())
          say("Left out of round " + std::to_string(round) + ": " + out.find("why")->text());
    }
  } catch (const Interrupted& signal) {
    stopped(signal.name());
    return signal.exit_status();
  }
  return 0;
}

void print_rounds(const Value& report) {
  const auto share = [](const Value& one, const char* when, const char* name) {
    const Value* const part = one.find(when);
    const Value* const value = part == nullptr ? nullptr : part->find(name);
    return value == nullptr ? std::string("–") : percent(value->number());
  };
  print("Rounds, on this board's held-out images\n");
  for (const Value& one : report.find("rounds")->items()) {
    const Value& merged = *one.find("merged");
    std::string line = "  round " + std::to_string(one.find("round")->whole());
    if (const Value* const runs = merged.find("runs"))
      line += ": " + std::to_string(runs->items().size()) + " boards, " +
              percent(merged.find("overlap")->find("pairwise")->number()) + " of the masks in common";
    line += "; clean " + share(one, "before", measures[0]) + " → " + share(one, "after", measures[0]) +
            ", robust " + share(one, "before", measures[1]) + " → " + share(one, "after", measures[1]) +
            ", sent " + format_bytes(one.find("sent_bytes")->number());
    print(line + "\n");
  }
}

}  // namespace edge_bcs::app
