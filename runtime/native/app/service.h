// The systemd service that goes on with a training whenever the board starts: edge_bcs/cli/service.py.
#pragma once

#include <string>

#include "app/options.h"

namespace edge_bcs::app {

// The unit for this command line, which trains into the folder `run`. Throws Error where the service could not start.
std::string service_for(const CommandSpec& command, const Options& options, const std::string& run);

}  // namespace edge_bcs::app
