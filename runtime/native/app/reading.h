// What commands share: the machine that options describe, and data whose images that cannot be used are told and kept in mind.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "app/network.h"
#include "app/options.h"
#include "app/paths.h"

namespace edge_bcs::app {

// --memory, --threads, --seed, --engine, --trust-key and --min-release.
MachineWishes machine_of(const Options& options);

// Writes to standard output.
void print(std::string_view text);
// Names and values, one pair a line.
void print_pairs(const std::vector<std::pair<std::string, std::string>>& rows);

class Reading {
 public:
  // `folder`: of a training that goes on, whose record says what it left out; "" of a new one.
  // `watch`: called now and then while images are looked at; what it throws ends that. `quiet`: says nothing of what is left out.
  Reading(std::string spec, const Network& network, bool skip, const std::string& folder,
          std::function<void()> watch, bool quiet = false);

  // Opens one split, saying what is left out of it. `keeps_all_files`: it knows the files of all its splits, for `repeated`.
  std::unique_ptr<Data> open(const std::string& split, bool keeps_all_files = false);
  // A folder of photographs without labels, alike.
  std::unique_ptr<Data> open_unlabelled(const std::string& folder);
  // {"left_out": …} for a report; nothing where nothing may be left out.
  void report(Value& into) const;
  // Keeps in a training's folder what it leaves out.
  void record(const std::string& folder) const;

 private:
  Handling handling_of(const std::string& split) const;
  void tell(const std::string& split, const Data& data);

  std::string spec_;
  const Network& network_;
  bool skip_, resumes_, quiet_;
  std::function<void()> watch_;
  Value recorded_, left_out_;  // splits, names, reasons
};

inline constexpr const char* record_file = "left-out.json";

}  // namespace edge_bcs::app
