// edge-bcs-run: trains, measures and asks compiled networks, in one static program without Python.

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "app/commands.h"
#include "app/reading.h"
#include "app/signals.h"
#include "app/text.h"
#include "include/edge_bcs.h"

namespace {

using edge_bcs::app::CommandSpec;
using edge_bcs::app::Options;

struct Command {
  const CommandSpec* spec;
  int (*run)(const Options&);
};

constexpr int failed = 1, misused = 2;

std::string first_sentence(const CommandSpec& spec) {
  const std::string_view text = spec.help;
  return std::string(text.substr(0, text.find("\n\n")));
}

std::string overview(std::span<const Command> commands) {
  std::string text =
      "Usage: edge-bcs-run [OPTIONS] COMMAND [ARGS]...\n\n"
      "  Train adversarially robust, sparse networks on this machine, inside one block of memory: what "
      "`edge-bcs` does,\n"
      "  without Python. Every command shows examples with --help.\n\n"
      "  On the host:   edge-bcs export --sparsity 0.99 --memory 12MiB -o out/vgg16\n"
      "  On the board:  edge-bcs-run finetune out/vgg16 --data photos/ -o run\n"
      "                 edge-bcs-run evaluate run --data photos/\n"
      "                 edge-bcs-run predict run photo.jpg\n\n"
      "Options:\n"
      "  --version   Show the version and exit.\n"
      "  -h, --help  Show this message and exit.\n\n"
      "Commands:\n";
  for (const Command& command : commands) {
    const std::string name = command.spec->name;
    text += "  " + name + std::string(10 - name.size(), ' ') + first_sentence(*command.spec) + "\n";
  }
  return text;
}

int run(std::span<const std::string> words) {
  using namespace edge_bcs::app;
  const std::array commands{Command{&finetune_spec, finetune}, Command{&evaluate_spec, evaluate},
                            Command{&predict_spec, predict}, Command{&inspect_spec, inspect}};
  if (words.empty() || words[0] == "--help" || words[0] == "-h") {
    print(overview(commands));
    return words.empty() ? misused : 0;
  }
  if (words[0] == "--version") {
    print(std::string("edge-bcs-run, version ") + edge_bcs_version() + "\n");
    return 0;
  }
  for (const Command& command : commands) {
    if (words[0] != command.spec->name) continue;
    try {
      const Options options(*command.spec, words.subspan(1));
      if (options.wants_help()) {
        print(help_of(*command.spec));
        return 0;
      }
      return command.run(options);
    } catch (const UsageError& error) {
      say(std::string("Usage: edge-bcs-run ") + command.spec->name + " [OPTIONS] " + command.spec->arguments);
      say(std::string("Try 'edge-bcs-run ") + command.spec->name + " --help' for help.");
      say(std::string("Error: ") + error.what());
      return misused;
    }
  }
  say("Usage: edge-bcs-run [OPTIONS] COMMAND [ARGS]...");
  say("Try 'edge-bcs-run --help' for help.");
  say("Error: No such command '" + words[0] + "'.");
  return misused;
}

}  // namespace

// In the place of the C++ library's, which decodes names of types: nothing is thrown that main does not catch.
namespace __gnu_cxx {

void __verbose_terminate_handler() { std::abort(); }

}  // namespace __gnu_cxx

int main(int count, char** words) {
  using namespace edge_bcs::app;
  try {
    const std::vector<std::string> given(words + std::min(count, 1), words + count);
    return run(given);
  } catch (const Interrupted& signal) {
    say("Stopped.");
    return signal.exit_status();
  } catch (const std::bad_alloc&) {
    say("Error: this machine has too little memory for that.");
  } catch (const std::exception& error) {
    std::string sentence = error.what();
    if (sentence.empty() || std::string_view(".!?").find(sentence.back()) == std::string_view::npos)
      sentence += '.';
    say("Error: " + sentence);
  }
  return failed;
}
