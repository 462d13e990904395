// edge-bcs-run inspect.

#include <algorithm>
#include <array>
#include <cmath>

#include "app/commands.h"
#include "app/opening.h"
#include "app/reading.h"
#include "app/shared_options.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::array options_of_inspect{
    trust_key_option, min_release_option,
    OptionSpec{"--json", nullptr, "Print the answer as one JSON object."}};

// "1 image", or "4 images, attacked 16 at once".
std::string micro_batches(const edge_bcs_info& info) {
  std::string text = std::to_string(info.micro_batch) + (info.micro_batch == 1 ? " image" : " images");
  if (info.attack_micro_batch != info.micro_batch)
    text += ", attacked " + std::to_string(info.attack_micro_batch) + " at once";
  return text;
}

struct Layer {
  std::string name, shape;
  std::uint64_t offset, size, active;
};

// The layers of the manifest, and how many connections of the state each has.
std::vector<Layer> layers_of(const Value& manifest, const Network& network) {
  edge_bcs_tensor index = sized<edge_bcs_tensor>();
  check(edge_bcs_get_tensor(network.handle(), "coo.index", &index));
  const std::span positions(static_cast<const std::int32_t*>(index.data),
                            static_cast<std::size_t>(index.count));
  std::vector<Layer> layers;
  const Value* const listed = manifest.find("layers");
  for (const Value& entry : listed == nullptr ? Value::List{} : listed->items()) {
    Layer layer{};
    const Value *const name = entry.find("name"), *const shape = entry.find("shape"),
                       *const offset = entry.find("offset");
    if (name == nullptr || shape == nullptr || offset == nullptr) continue;
    layer.name = name->text();
    layer.offset = offset->whole();
    layer.size = 1;
    for (const Value& extent : shape->items()) {
      layer.size *= extent.whole();
      layer.shape += (layer.shape.empty() ? "" : "×") + std::to_string(extent.whole());
    }
    const auto below = [&](std::uint64_t place) {
      return std::ranges::lower_bound(positions, static_cast<std::int64_t>(place), {},
                                      [](std::int32_t position) { return std::int64_t{position}; });
    };
    layer.active = static_cast<std::uint64_t>(below(layer.offset + layer.size) - below(layer.offset));
    layers.push_back(std::move(layer));
  }
  return layers;
}

}  // namespace

const CommandSpec inspect_spec{
    "inspect",
    "ARTIFACT",
    "Check every file of an artifact (a folder, or a .tar) or a run, and show what it "
    "holds.",
    options_of_inspect,
    {},
    "    edge-bcs-run inspect out/vgg16\n"
    "    edge-bcs-run inspect run --json\n",
    1,
    1};

int inspect(const Options& options) {
  const std::string path = options.arguments()[0];
  const MachineWishes machine = machine_of(options);
  const Network network(path, machine);
  const edge_bcs_info& info = network.info();
  const Value manifest = manifest_of(path);
  const std::vector<Layer> layers = layers_of(manifest, network);
  const char* const signature = machine.trusted.any() ? "valid" : has_signature(path) ? "unchecked" : "none";
  if (options.has("--json")) {
    Value result;
    for (const auto& [name, value] : manifest.members())
      if (name != "files" && name != "memory") result[name] = value;
    Value::List classes;
    for (const std::string& name : network.classes()) classes.emplace_back(name);
    result["classes"] = network.classes().empty() ? Value() : Value(classes);
    result["signature"] = signature;
    result["step"] = network.steps();
    result["state_seed"] = info.seed;
    result["predicted_peak_bytes"] = info.working_set_bytes;
    Value active = Value::Object{};
    for (const Layer& layer : layers) active[layer.name] = layer.active;
    result["active"] = std::move(active);
    print(result.dump(1) + "\n");
    return 0;
  }
  std::string attack =
      "PGD-" + std::to_string(info.attack_steps) + ", ε = " + fixed(info.epsilon * 255, 2) + "/255";
  if (std::string_view(info.attack) != "pgd") attack = std::string(info.attack) + ", or else " + attack;
  std::vector<std::pair<std::string, std::string>> rows{
      {"network", std::string(info.name) + ", " + std::to_string(info.channels) + "×" +
                      std::to_string(info.height) + "×" + std::to_string(info.width) + " images, " +
                      std::to_string(info.classes) + " classes"},
      {"classes", network.classes().empty() ? "no names stored: labels are matched by position"
                                            : listed(network.classes())},
      {"connections",
       grouped(info.connections) + " of " + grouped(info.positions) + " (sparsity " + info.sparsity + ")"},
      {"trained", std::to_string(network.steps()) + " steps, seed " + std::to_string(info.seed)},
      {"objective", std::string(info.objective) + (info.attack_steps > 0 ? " with " + attack : "")},
      {"batch norm", info.batch_norm},
      {"learns", info.trained},
      {"batches", std::to_string(info.batch_size) + " images, in micro-batches of " + micro_batches(info)},
      {"predicted peak", format_bytes(static_cast<double>(info.working_set_bytes))},
      {"arena", format_bytes(static_cast<double>(info.arena_bytes))}};
  if (info.budget_bytes > 0)
    rows.emplace_back("budget", format_bytes(static_cast<double>(info.budget_bytes)));
  if (info.release > 0) rows.emplace_back("release", std::to_string(info.release));
  rows.emplace_back("signature", std::string_view(signature) == "unchecked"
                                     ? "there is one, not checked (--trust-key does)"
                                     : signature);
  print_pairs(rows);
  print("\nLayers\n");
  std::vector<std::pair<std::string, std::string>> table;
  for (const Layer& layer : layers)
    table.emplace_back(
        layer.name,
        layer.shape + ", " + grouped(layer.active) + " active, " +
            fixed(100.0 * static_cast<double>(layer.active) / static_cast<double>(layer.size), 2) + " %");
  if (!table.empty()) print_pairs(table);
  return 0;
}

}  // namespace edge_bcs::app
