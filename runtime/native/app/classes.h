// How the labels of data become those of a network: by the names of the classes, as edge_bcs/data/classes.py says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "app/data.h"

namespace edge_bcs::app {

using Names = std::vector<std::string>;

struct Match {
  std::vector<std::int64_t> labels;  // of the network, by those of the data
  Names classes;                     // the network's names; empty while it has none
  Names missing;                     // of them, those that the data lacks
  bool by_name = false;              // else by position
  Names notes;                       // sentences worth telling
};

// What a network knows of its classes.
struct Known {
  Names names;  // empty: not stored
  std::size_t outputs = 0;
  bool naming = false;   // take the names of the data where there are none
  bool trained = true;   // its outputs mean something already
  bool resumed = false;  // a training goes on with the data that it began with
};

// Throws Error for a class that the network does not know, or more classes than outputs.
Match match(const Data& data, const Known& known);

// The names that --class-names gives: "ant,bee", or a file with a name a line. Throws Error.
Names given_names(const std::string& text);

// The names of all outputs of a network that has `stored` (or none) and is told these. Throws Error.
Names named(const Names& stored, const Names& given, std::size_t outputs);

}  // namespace edge_bcs::app
