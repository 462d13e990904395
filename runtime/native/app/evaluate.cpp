// edge-bcs-run evaluate.

#include <array>

#include "app/answers.h"
#include "app/commands.h"
#include "app/reading.h"
#include "app/saving.h"
#include "app/shared_options.h"
#include "app/signals.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::array<std::string_view, 3> attacks{"pgd", "fgsm", "none"};
constexpr std::array<std::string_view, 2> splits{"test", "train"};
constexpr std::array options_of_evaluate{
    data_option,
    class_names_option,
    OptionSpec{"--attack", "pgd|fgsm|none", "none: clean accuracy alone. Default: pgd."},
    OptionSpec{"--attack-steps", "N", "Steps of pgd; default: 50."},
    OptionSpec{"--restarts", "N", "Random starts of pgd; default: 1."},
    OptionSpec{"--epsilon", "E",
               "How far the attack may change a pixel, such as 8/255; default: the artifact's."},
    OptionSpec{"--split", "test|train", "Which part of the data is measured. Default: test."},
    OptionSpec{"--limit", "N", "Measure only so many images, drawn from all classes."},
    engine_option,
    on_bad_option,
    memory_option,
    threads_option,
    trust_key_option,
    min_release_option,
    OptionSpec{"--json", "FILE|-", "Write the answer as JSON, to standard output if no file is named.", "-"},
};
constexpr std::array elsewhere_of_evaluate{
    Elsewhere{"--model"},      Elsewhere{"--weights"}, Elsewhere{"--input-size"}, Elsewhere{"--input-shape"},
    Elsewhere{"--normalize"},  Elsewhere{"--resize"},  Elsewhere{"--step-size"},  Elsewhere{"--queries"},
    Elsewhere{"--batch-size"}, Elsewhere{"--seed"},    Elsewhere{"--device"},     Elsewhere{"--resume"},
    Elsewhere{"--html"}};

}  // namespace

const CommandSpec evaluate_spec{
    "evaluate",
    "PATH",
    "Measure the accuracy of an artifact or a run, on clean images and under attack, as on the board.\n\n"
    "PATH is a folder, or an artifact's .tar. The JSON has the names of RobustBench: clean_acc, adv_acc, "
    "norm, eps. Classes are matched by name; the "
    "data may lack some. \"per_class\" has the accuracy of each, and \"confused\" how many images of a class "
    "were "
    "taken for another.",
    options_of_evaluate,
    elsewhere_of_evaluate,
    "    edge-bcs-run evaluate run --data digits\n"
    "    edge-bcs-run evaluate run --data photos/ --attack pgd --attack-steps 50 --restarts 10 --json\n",
    1,
    1};

int evaluate(const Options& options) {
  const std::string path = options.arguments()[0];
  if (!options.has("--data")) throw UsageError("Missing option '--data'.");
  const std::string spec = options.text_or("--data", ""),
                    split = options.choice("--split", splits).value_or("test"),
                    attack = options.choice("--attack", attacks).value_or("pgd");
  for (const char* const name : {"--attack-steps", "--restarts"})
    require(attack == "pgd" || !options.has(name), name, " belongs to pgd, not to ", attack, ".");
  const bool skips = options.choice("--on-bad", stop_or_skip).value_or("stop") == "skip";
  const MachineWishes machine = machine_of(options);
  edge_bcs_measure how = sized<edge_bcs_measure>();
  const auto pgd_steps = static_cast<std::uint32_t>(options.whole("--attack-steps", 1, 1 << 20).value_or(50));
  how.attack_steps = attack == "none" ? 0 : attack == "fgsm" ? 1 : pgd_steps;
  how.fgsm = attack == "fgsm" ? 1 : 0;
  how.restarts = static_cast<std::uint32_t>(options.whole("--restarts", 1, 1 << 20).value_or(1));
  const std::optional<std::uint64_t> limit = options.whole("--limit", 1);
  const auto given_epsilon = options.text("--epsilon");
  how.epsilon = given_epsilon ? fraction(*given_epsilon, "--epsilon") : -1;
  require(how.epsilon <= 1, "epsilon must lie in [0, 1], not ", how.epsilon, ".");
  note_signals();
  Network network(path, machine);
  const edge_bcs_info& info = network.info();
  if (const auto names = options.text("--class-names"))
    network.name(named(network.classes(), given_names(*names), info.classes));
  Reading reading(spec, network, skips, "", check_signals);
  const std::unique_ptr<Data> data = reading.open(split);
  const Match match = network.match(*data, false, false);
  if (how.epsilon < 0) how.epsilon = info.epsilon;
  Answers answers(network);
  Value measured =
      network.evaluate(*data, match, {how, limit, &answers}, attack == "none" ? "measuring" : attack);
  Value result;
  result["path"] = path;
  result["data"] = spec;
  result["split"] = split;
  result["engine"] = "native";
  result["clean_acc"] = measured["accuracy"];
  const Value* const robust = measured.find("robust_accuracy");
  result["adv_acc"] = robust == nullptr ? Value() : *robust;
  result["attack"] = attack;
  result["norm"] = "Linf";
  result["eps"] = how.epsilon;
  for (const auto& [name, value] : measured.members()) result[name] = value;
  result["sparsity"] = info.sparsity;
  result["kappa"] = info.connections;
  result["size"] = info.positions;
  result["step"] = network.steps();
  Value::List classes, missing;
  for (const std::string& name : match.classes) classes.emplace_back(name);
  for (const std::string& name : match.missing) missing.emplace_back(name);
  result["classes"] = match.classes.empty() ? Value() : Value(classes);
  result["matched_by"] = match.by_name ? "name" : "position";
  result["missing_classes"] = missing;
  result["peak_bytes"] = info.arena_bytes;
  reading.report(result);
  if (attack != "none") {
    result["steps"] = how.attack_steps;
    result["step_size"] = how.epsilon * (how.fgsm != 0 ? 1.0 : 2.5 / how.attack_steps);
  }
  result["per_class"] = answers.per_class();
  result["confused"] = answers.confused();
  const auto file = options.text("--json");
  if (file == "-") {
    print(result.dump(1) + "\n");
    return 0;
  }
  if (file) write_json(*file, result);
  std::vector<std::pair<std::string, std::string>> rows{
      {"engine", "native"}, {"images", std::to_string(result["samples"].whole())}};
  if (const Value* const left_out = result.find("left_out"))
    rows.emplace_back("left out", std::to_string(left_out->find("count")->whole()) + " images");
  rows.emplace_back("clean accuracy", percent(result["accuracy"].number()));
  if (robust != nullptr) rows.emplace_back("robust accuracy (" + attack + ")", percent(robust->number()));
  if (const Value* const warnings = result.find("warnings"))
    for (const Value& warning : warnings->items()) rows.emplace_back("warning", warning.text());
  print_pairs(rows);
  return 0;
}

}  // namespace edge_bcs::app
