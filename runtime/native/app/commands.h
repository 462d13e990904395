// The commands of edge-bcs-run: each takes its options, and returns the exit status.
#pragma once

#include "app/options.h"

namespace edge_bcs::app {

extern const CommandSpec finetune_spec, evaluate_spec, predict_spec, inspect_spec;

int finetune(const Options& options);
int evaluate(const Options& options);
int predict(const Options& options);
int inspect(const Options& options);

}  // namespace edge_bcs::app
