// Opening what finetune trains: an artifact, or the run that it goes on with (edge_bcs/cli/opening.py).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "app/network.h"
#include "app/value.h"
#include "session/manifest.h"

namespace edge_bcs::app {

inline constexpr const char *report_file = "report.json", *metrics_file = "metrics.jsonl";
inline constexpr std::uint64_t largest_report = 16 << 20;

struct RunWishes {
  std::string artifact, folder;  // folder: of the run
  MachineWishes machine;
  bool resume = false;
};

struct Opened {
  std::unique_ptr<Network> network;
  bool resumed;
};

// The manifest of an artifact or a run, a folder or a .tar; null if it cannot be read.
Value manifest_of(const std::string& path);
// Whether somebody signed it. Throws Error.
bool has_signature(const std::string& path);

// Whether a run that was saved at least once lies in a folder.
bool holds_run(const std::string& folder);

// Throws Error if a run lies there already, or something of others.
Opened open_run(const RunWishes& wanted);

}  // namespace edge_bcs::app
