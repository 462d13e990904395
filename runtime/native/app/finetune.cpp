// edge-bcs-run finetune.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>

#include "app/commands.h"
#include "app/lean.h"
#include "app/opening.h"
#include "app/reading.h"
#include "app/rounds.h"
#include "app/self_training.h"
#include "app/service.h"
#include "app/shared_options.h"
#include "app/signals.h"
#include "app/text.h"
#include "app/training.h"

namespace edge_bcs::app {

namespace {

constexpr std::array<std::string_view, 3> schedules{"steps", "cosine", "one-cycle"},
    precisions{"f32", "half", "auto"};

constexpr std::array options_of_finetune{
    data_option,
    class_names_option,
    OptionSpec{"--epochs", "N", "Passes over the data; default: 1."},
    OptionSpec{"--steps", "N", "Optimizer steps, instead of epochs."},
    OptionSpec{"--batch-size", "N", "Images per optimizer step; default: the artifact's."},
    OptionSpec{"--learning-rate", "RATE",
               "At its highest; --schedule says how it changes. Default: the artifact's."},
    memory_option,
    threads_option,
    engine_option,
    trust_key_option,
    min_release_option,
    OptionSpec{"--seed", "N", "Of all randomness; default: the artifact's."},
    OptionSpec{
        "--schedule", "steps|cosine|one-cycle",
        "How the learning rate changes; steps (the default): divided by 10 at 50 % and again at 75 %."},
    OptionSpec{"--warmup", "SHARE",
               "Of the steps, such as 0.05, in which the learning rate rises to its highest."},
    OptionSpec{
        "--augment", "none|shift|photo|zoom|mix|mirror",
        "shift: by ±10 %, and flip; photo: crop, flip, and change brightness, contrast and saturation; "
        "zoom: the same, from nearer or farther; mix: zoom, and chains of changes of tones and shape "
        "(AugMix), for "
        "cameras and light that no image here has; mirror: flip alone. Default: shift, which --augment alone "
        "is, too.",
        "shift"},
    OptionSpec{
        "--validation", "SHARE",
        "Of the training images, such as 0.1, that is held out and measured after each epoch (under attack, "
        "where "
        "the training has one): the run ends with its best epoch. Every better epoch is saved, whatever "
        "--max-writes says."},
    OptionSpec{"--patience", "EPOCHS", "With --validation: end after so many epochs that were no better."},
    OptionSpec{
        "--attack-precision", "f32|half|auto",
        "Of the training's attacks: half is two bytes a number, faster on processors that have "
        "arithmetic "
        "in it (AVX-512 BF16, ARM's FP16); auto is half on those and f32 on others. What is learned stays "
        "float32. Default: "
        "the artifact's; of a run that goes on, what it was begun with."},
    OptionSpec{"--no-augment", nullptr, "Short for --augment none."},
    OptionSpec{"--balance", nullptr,
               "Draw images so that the classes come up evenly, however many each has."},
    OptionSpec{
        "--unlabelled", "DIR",
        "A folder of photographs without labels, in folders of any depth and name. Before each epoch the "
        "network "
        "labels those that it is sure of; these are trained on, too. With trades and rst the others take "
        "part "
        "as well, in the second term. An epoch is then one pass over the labelled or the unlabelled images, "
        "whichever takes more steps; the others come up several times."},
    OptionSpec{"--confidence", "SHARE",
               "With --unlabelled: probability from which on the network's answer is a label; default: 0.9."},
    OptionSpec{"--unlabelled-share", "SHARE",
               "With --unlabelled: of each batch, that has no labels; default: 0.5."},
    OptionSpec{"--unlabelled-weight", "WEIGHT",
               "With --unlabelled: of such an image in the loss, where a labelled one has 1; default: 1."},
    rounds_option,
    board_option,
    max_rounds_option,
    wait_option,
    OptionSpec{"-o/--output", "FOLDER", "The run folder; default: ARTIFACT-run."},
    OptionSpec{"--resume", nullptr, "Go on with the run in the output folder, if there is one."},
    OptionSpec{"--save-steps", "N", "Steps from one save to the next."},
    OptionSpec{"--save-seconds", "S",
               "Seconds from one save to the next; default: 60, unless --save-steps is given."},
    OptionSpec{
        "--max-writes", "SIZE",
        "Most bytes an hour that saves and metrics may write, so that an SD card lasts; none: no limit. "
        "Default: 200MiB."},
    OptionSpec{"--on-nan", "stop|skip",
               "What a batch with a pixel, loss or gradient that is NaN or infinite does. Default: stop."},
    on_bad_option,
    OptionSpec{"--max-temp", "°C", "Pause while any sensor of this machine shows more."},
    OptionSpec{
        "--max-hours", "H",
        "Save and exit with status 75 after so many hours (with --rounds, of all rounds and their waiting); "
        "--resume goes on."},
    OptionSpec{"--eval-samples", "N",
               "Held-out images that are measured before and after; 0: none. Default: 200."},
    OptionSpec{"--eval-steps", "N", "PGD steps of these measurements. Default: 20."},
    OptionSpec{"--print-service", nullptr,
               "Train nothing; print a systemd service that trains with these options at every boot."},
    OptionSpec{"--json", nullptr, "Print the report as one JSON object."},
};
constexpr const char* who_merges =
    "it merges nothing; let `edge-bcs merge` do so, or one board with `edge-bcs finetune --rounds … --boards "
    "N`.";
constexpr std::array elsewhere_of_finetune{Elsewhere{"--boards", who_merges},
                                           Elsewhere{"--robust", who_merges}};

struct Wanted : RunWishes {
  std::string data;
  TrainingWishes training;
  std::uint64_t eval_samples, eval_steps;
  bool skips_bad, as_json;
  std::optional<std::string> unlabelled;
  std::optional<Names> names;
  std::optional<double> max_temp;
  std::optional<RoundWishes> rounds;
};

// --unlabelled and what belongs to it.
void take_unlabelled(const Options& options, Wanted& wanted) {
  wanted.unlabelled = options.text("--unlabelled");
  const auto number = [&](const char* name, const char* range, const auto& holds) {
    const std::optional<double> value = options.number(name);
    if (value && !holds(*value))
      throw UsageError(std::string("Invalid value for '") + name + "': " + written(*value) +
                       " is not in the range " + range + ".");
    require(!value || wanted.unlabelled, name, " belongs to --unlabelled, which is not given.");
    return value;
  };
  TrainingWishes& training = wanted.training;
  training.confidence = number("--confidence", "0<=x<=1", [](double x) { return x >= 0 && x <= 1; });
  training.unlabelled_share = number("--unlabelled-share", "0<x<1", [](double x) { return x > 0 && x < 1; });
  training.unlabelled_weight = number("--unlabelled-weight", "x>0", [](double x) { return x > 0; });
}

// Refuses what cannot be meant, before anything is read, measured or saved.
Wanted wanted_by(const Options& options) {
  Wanted wanted;
  wanted.artifact = options.arguments()[0];
  if (!options.has("--data")) throw UsageError("Missing option '--data'.");
  wanted.data = options.text_or("--data", "");
  std::string stem = wanted.artifact;
  while (stem.size() > 1 && stem.ends_with('/')) stem.pop_back();
  if (stem.ends_with(".tar")) stem.resize(stem.size() - std::string_view(".tar").size());
  wanted.folder = options.text_or("--output", (stem + "-run").c_str());
  wanted.machine = machine_of(options);
  wanted.machine.attack_precision = options.choice("--attack-precision", precisions);
  TrainingWishes& training = wanted.training;
  training.epochs = options.whole("--epochs", 1);
  training.steps = options.whole("--steps", 1);
  require(!training.epochs || !training.steps, "give the length in --epochs or in --steps, not both.");
  training.batch_size = options.whole("--batch-size", 1);
  training.learning_rate = options.number("--learning-rate");
  require(!training.learning_rate || (*training.learning_rate > 0 && std::isfinite(*training.learning_rate)),
          "--learning-rate must be a positive number, not ", options.text_or("--learning-rate", ""), ".");
  training.schedule = options.choice("--schedule", schedules);
  training.warmup = options.number("--warmup");
  if (training.warmup && !(*training.warmup >= 0 && *training.warmup < 1))
    throw UsageError("Invalid value for '--warmup': it is a share of the steps, at least 0 and below 1.");
  training.validation = options.number("--validation");
  if (training.validation && !(*training.validation >= 0 && *training.validation < 1))
    throw UsageError(
        "Invalid value for '--validation': it is a share of the images, at least 0 and below 1.");
  training.patience = options.whole("--patience", 1);
  training.augment = options.choice("--augment", augmentations);
  require(!options.has("--no-augment") || training.augment.value_or("none") == "none",
          "--no-augment and --augment ", training.augment.value_or(""),
          " contradict each other: leave one out.");
  if (options.has("--no-augment")) training.augment = "none";
  training.balance = options.has("--balance");
  take_unlabelled(options, wanted);
  training.saving.steps = options.whole("--save-steps", 1);
  training.saving.seconds = options.number("--save-seconds");
  if (training.saving.seconds && !(*training.saving.seconds >= 1))
    throw UsageError("Invalid value for '--save-seconds': it is at least 1.");
  std::string most = options.text_or("--max-writes", "200MiB");
  if (most.ends_with("/h")) most.resize(most.size() - 2);
  if (most != "none") training.saving.max_writes = parse_bytes(most);
  training.skips = options.choice("--on-nan", stop_or_skip).value_or("stop") == "skip";
  training.max_hours = options.number("--max-hours");
  if (training.max_hours && !(*training.max_hours > 0))
    throw UsageError("Invalid value for '--max-hours': it is above 0.");
  wanted.max_temp = options.number("--max-temp");
  wanted.eval_samples = options.whole("--eval-samples", 0).value_or(200);
  wanted.eval_steps = options.whole("--eval-steps", 0, 1 << 20).value_or(20);
  wanted.skips_bad = options.choice("--on-bad", stop_or_skip).value_or("stop") == "skip";
  wanted.resume = options.has("--resume");
  wanted.as_json = options.has("--json");
  if (const auto names = options.text("--class-names")) wanted.names = given_names(*names);
  wanted.rounds = rounds_by(options);
  return wanted;
}

// A new run must not lie among the class folders of its data, where the next reading would take it for one of them.
void check_apart(const std::string& output, const std::string& data) {
  if (data == "digits" || !is_folder(data)) return;
  const std::string source = resolved(data), place = resolved_so_far(output), parent = folder_of(place);
  require(place != source && parent != source, plain(output), " lies among the class folders of ",
          plain(data), ", where it would be taken for one: choose another -o.");
}

// What of the report of the run so far is whole.
void take_earlier(const std::string& folder, Value& report) {
  const Value earlier = read_json(joined(folder, report_file), largest_report);
  for (const char* const name : {"before", "training", "after"})
    if (const Value* const part = earlier.find(name); part != nullptr && part->is_object())
      report[name] = *part;
}

Value measured(Network& network, Data& data, const Match& match, const Wanted& wanted, const char* when,
               const std::function<void()>& between) {
  const std::uint64_t limit = std::min<std::uint64_t>(wanted.eval_samples, data.size());
  say(std::string("Measuring accuracy ") + when + " on " + std::to_string(limit) + " held-out images …");
  edge_bcs_measure how = sized<edge_bcs_measure>();
  how.attack_steps = static_cast<std::uint32_t>(wanted.eval_steps);
  how.epsilon = -1;
  give_back_unused();
  const Value report = network.evaluate(data, match, {how, limit, nullptr, between}, "measuring");
  if (const Value* const warnings = report.find("warnings"))
    for (const Value& warning : warnings->items()) say("Warning: " + warning.text());
  return report;
}

// From here on no other process may write into the run folder. Said once the outputs have their names.
void claim(Network& network, const Wanted& wanted) {
  check(edge_bcs_save_into(network.handle(), wanted.folder.c_str()));
}

void fine_tune(Network& network, bool resumed, const Wanted& wanted, Value& report, bool& claimed) {
  const std::string& folder = wanted.folder;
  std::optional<Thermostat> thermostat;
  if (wanted.max_temp) thermostat.emplace(*wanted.max_temp);
  std::string told;
  const auto between = [&] {
    check_signals();
    if (!thermostat) return;
    thermostat->wait([&](const std::string& why) {
      check_signals();
      if (why != told) say(why);
      told = why;
    });
  };
  Reading reading(wanted.data, network, wanted.skips_bad, resumed ? folder : "", between);
  const std::unique_ptr<Data> data = reading.open("train", wanted.unlabelled.has_value());
  const std::unique_ptr<Data> held_out = wanted.eval_samples > 0 ? reading.open("test") : nullptr;
  const std::unique_ptr<Data> unlabelled =
      wanted.unlabelled ? reading.open_unlabelled(*wanted.unlabelled) : nullptr;
  if (resumed) take_earlier(folder, report);
  if (const char* const precision = network.info().attack_precision; precision != nullptr)
    report["attack_precision"] = precision;
  const Match match = network.match(*data, true, resumed);
  Value::List classes, missing;
  for (const std::string& name : match.classes) classes.emplace_back(name);
  for (const std::string& name : match.missing) missing.emplace_back(name);
  report["classes"] = match.classes.empty() ? Value() : Value(classes);
  report["matched_by"] = match.by_name ? "name" : "position";
  report["missing_classes"] = missing;
  reading.report(report);
  claim(network, wanted);
  claimed = true;
  const std::optional<Match> for_held_out =
      held_out == nullptr ? std::nullopt : std::optional(network.match(*held_out, false, resumed));
  if (held_out != nullptr && report.find("before") == nullptr)
    report["before"] = measured(network, *held_out, *for_held_out, wanted, "before", between);
  if (!resumed) check(edge_bcs_save(network.handle(), nullptr));
  reading.record(folder);
  write_json(joined(folder, report_file), report);
  TrainingWishes wishes = wanted.training;
  wishes.resume = resumed;
  wishes.unlabelled = unlabelled.get();
  wishes.thermostat = thermostat ? &*thermostat : nullptr;
  say(SaveSchedule(network.info().state_bytes, network.steps(), wishes.saving).describe() + ".");
  give_back_unused();
  Value training;
  try {
    training = train(network, *data, match, folder, wishes);
  } catch (const NotFiniteBatch& error) {
    fail(error.what(), " The state before it is saved: go on with --resume -o ", shell_word(folder),
         ", adding --on-nan skip to leave such batches out.");
  }
  const bool finished = training["finished"].truth();
  if (training["steps"].whole() > 0 || report.find("training") == nullptr) {
    report["training"] = training;
    report.erase("after");
  } else {  // a run that was cut off between its last step and its report has only where it stands to add
    for (const char* const name : {"step", "done", "finished"}) report["training"][name] = training[name];
  }
  if (held_out != nullptr && finished && report.find("after") == nullptr)
    report["after"] = measured(network, *held_out, *for_held_out, wanted, "after", between);
  report["memory"] = network.memory(network.cap(wanted.machine));
}

std::string share_of(const Value* part, const char* name) {
  const Value* const share = part == nullptr ? nullptr : part->find(name);
  return share == nullptr ? "–" : percent(share->number());
}

void print_report(Value& report, const Network& network, const Wanted& wanted) {
  const Value* const after = report.find("after");
  if (after != nullptr) {
    const std::uint64_t steps =
        after->find("attack_steps") == nullptr ? 0 : after->find("attack_steps")->whole();
    print("Held-out accuracy (" + std::to_string(after->find("samples")->whole()) +
          " images): before → after\n");
    const Value* const before = report.find("before");
    std::vector<std::pair<std::string, std::string>> rows{
        {"clean", share_of(before, "accuracy") + " → " + share_of(after, "accuracy")}};
    if (after->find("robust_accuracy") != nullptr)
      rows.emplace_back("robust (PGD-" + std::to_string(steps) + ")",
                        share_of(before, "robust_accuracy") + " → " + share_of(after, "robust_accuracy"));
    print_pairs(rows);
  }
  Value &training = report["training"], &memory = report["memory"];
  const std::uint64_t done = training["done"].whole(), now = training["steps"].whole();
  const std::string cap =
      memory["cap_bytes"].is_null() ? "no cap" : "cap " + format_bytes(memory["cap_bytes"].number());
  print(grouped(done) + (done == 1 ? " step" : " steps") +
        (now != done ? " (" + std::to_string(now) + " of them now)" : "") + " of " +
        fixed(training["milliseconds_per_step"].number(), 0) + " ms (" +
        std::to_string(network.info().threads) + " threads); arena " +
        format_bytes(static_cast<double>(network.info().arena_bytes)) + " (" + cap + "), process " +
        format_bytes(memory["rss_bytes"].number()) + "\n");
  if (const Value* const best = training.find("best"))
    print("The best epoch ended with step " + std::to_string(best->find("step")->whole()) + ": " +
          percent(best->find("accuracy")->number()) + " on the images held out for it" +
          (training["early"].truth() ? "; ended early, after " + std::to_string(done) + " steps" : "") +
          ".\n");
  if (const Value* const fell_back = training.find("fell_back");
      fell_back != nullptr && !fell_back->is_null())
    print(std::string(network.info().attack) + " collapsed: after step " +
          std::to_string(fell_back->whole()) + " the training attacked with PGD.\n");
  if (const Value* const used = training.find("unlabelled"); used != nullptr)
    print(described_unlabelled(*used) + "\n");
  if (training["skipped"].whole() > 0)
    print("Skipped batches that were not finite: " + std::to_string(training["skipped"].whole()) +
          "; metrics.jsonl says which.\n");
  if (const Value* const left_out = report.find("left_out"))
    print("Left out " + std::to_string(left_out->find("count")->whole()) +
          " images that cannot be used; report.json lists them.\n");
  if (const double paused = training["paused_seconds"].number(); paused > 0)
    print("Paused for " + format_seconds(paused) + " to cool.\n");
  print("Saved " + plain(wanted.folder) + " (" + format_bytes(training["writes"]["bytes_per_hour"].number()) +
        " an hour at this pace); next: edge-bcs-run evaluate " + shell_word(wanted.folder) + " --data " +
        shell_word(wanted.data) + "\n");
}

// Trains what is open, writes the report and returns the exit status.
int train_opened(const Opened& opened, const Wanted& wanted, Value& report) {
  Network& network = *opened.network;
  if (wanted.names) network.name(named(network.classes(), *wanted.names, network.info().classes));
  const auto stopped = [&](const char* by) {
    Value stop;
    stop["by"] = by;
    stop["step"] = network.steps();
    report["stopped"] = std::move(stop);
  };
  int status = 0;
  bool claimed = false;
  try {
    fine_tune(network, opened.resumed, wanted, report, claimed);
    if (!report["training"]["finished"].truth()) {
      stopped("--max-hours");
      status = time_is_up;
    }
  } catch (const Interrupted& signal) {
    if (!claimed) claim(network, wanted);
    std::uint64_t bytes = 0;
    // Not saved, so this is no status that says so.
    require(edge_bcs_save(network.handle(), &bytes) == EDGE_BCS_OK, "stopped by ", signal.name(),
            " after step ", network.steps(), ", but ", edge_bcs_last_error());
    stopped(signal.name());
    status = signal.exit_status();
  }
  write_json(joined(wanted.folder, report_file), report);
  return status;
}

}  // namespace

const CommandSpec finetune_spec{
    "finetune",
    "ARTIFACT",
    "Train an artifact robustly on this machine, inside one arena, and report what it gained.\n\n"
    "ARTIFACT is a folder, or a .tar, which is read where it lies. "
    "The run folder is an artifact with the newest state, metrics.jsonl (one line a step) and report.json, "
    "as "
    "`edge-bcs finetune` writes them: either goes on with what the other began, with the same bits. It is "
    "saved now and "
    "then, and when the command is stopped. --resume goes on there. One process at a time trains into a run "
    "folder.\n\n"
    "With --rounds several boards learn together: each trains for a round, somebody merges their runs, and "
    "all "
    "go on with what they became. The run folder then holds that.\n\n"
    "Exit status: 0 finished; 1 failed, what was saved is kept; 2 the command line makes no sense; 75 the "
    "time of "
    "--max-hours or --wait is over; 130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM. After the last three, "
    "--resume "
    "goes on.",
    options_of_finetune,
    elsewhere_of_finetune,
    "    edge-bcs-run finetune out/vgg16 --data digits --steps 30\n"
    "    edge-bcs-run finetune out/vgg16 --data photos/ --epochs 5 -o run\n"
    "    edge-bcs-run finetune out/vgg16 --data photos/ --epochs 5 -o run --resume\n"
    "    edge-bcs-run finetune out/vgg16 --data photos/ --epochs 2 --rounds share/ --max-rounds 10 -o run\n",
    1,
    1};

int finetune(const Options& options) {
  Wanted wanted = wanted_by(options);
  const std::string& folder = wanted.folder;
  if (!is_file(joined(folder, manifest_file))) check_apart(folder, wanted.data);
  if (options.has("--print-service")) {
    print(service_for(finetune_spec, options, folder));
    return 0;
  }
  note_signals();
  Value report;
  report["run"] = folder;
  int status = 0;
  if (wanted.rounds) {
    wanted.rounds->max_hours = wanted.training.max_hours;
    const auto look = [&](const Network& network) {
      Reading(wanted.data, network, wanted.skips_bad, "", check_signals, true).open("train");
    };
    status = take_part(*wanted.rounds, wanted, report, look,
                       [&](const Opened& opened, bool anew, std::optional<double> hours) {
      wanted.training.anew = anew, wanted.training.max_hours = hours;
      return train_opened(opened, wanted, report);
    });
    // Stopped before it began anything, it leaves nothing.
    if (holds_run(folder)) write_json(joined(folder, report_file), report);
    if (!wanted.as_json && status == 0) print_rounds(report);
  } else {
    const Opened opened = open_run(wanted);
    status = train_opened(opened, wanted, report);
    if (!wanted.as_json && status == 0) print_report(report, *opened.network, wanted);
  }
  if (wanted.as_json) print(report.dump(1) + "\n");
  if (status != 0)
    say("Stopped by " + report["stopped"]["by"].text() + " after step " +
        std::to_string(report["stopped"]["step"].whole()) + "; go on with --resume -o " + shell_word(folder) +
        ".");
  return status;
}

}  // namespace edge_bcs::app
