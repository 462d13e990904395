#include "host/placement.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "runner/program.h"

namespace edge_bcs::placement {

namespace {

constexpr std::size_t alignment = 64;

struct Place {
  std::size_t address = 0, bytes = 0;

  // The first line behind it.
  std::size_t end() const { return (address + bytes + alignment - 1) / alignment * alignment; }
};

}  // namespace

// A node of the program: its operator, and where its outputs and its work memory lie.
struct Step {
  const Declaration* declaration;
  std::vector<Place> outputs;
  Place work;
};

namespace {

struct Graph {
  std::string name;
  std::vector<Step> steps;
};

// Of the one Trainer that has the process's budget.
struct Placement {
  std::vector<std::pair<std::string, Place>> buffers;
  std::vector<Graph> graphs;
  std::size_t buffers_end = 0;
};

Placement placement;
std::byte* arena = nullptr;
std::size_t arena_bytes = 0;
std::atomic<std::size_t> high{0};

// What this thread runs.
thread_local const Graph* running = nullptr;
thread_local std::size_t next = 0;
thread_local const Place* asked = nullptr;

void note(std::size_t end) {
  std::size_t before = high;
  while (before < end && !high.compare_exchange_weak(before, end)) {
  }
}

Placement read(const Program& program) {
  Placement made;
  for (const PlacedTensor& buffer : program.buffers) {
    made.buffers.emplace_back(buffer.name, Place{buffer.address, buffer.bytes});
    made.buffers_end = std::max(made.buffers_end, made.buffers.back().second.end());
  }
  for (const ProgramGraph& graph : program.graphs) {
    Graph& steps = made.graphs.emplace_back(Graph{graph.name, {}});
    for (const ProgramNode& node : graph.nodes) {
      Step& step = steps.steps.emplace_back(Step{node.declaration, {}, {node.work_address, node.work_bytes}});
      for (const std::int32_t place : node.outputs) {
        const PlacedTensor* const tensor =
            place < 0 ? nullptr : &graph.tensors[static_cast<std::size_t>(place)];
        step.outputs.push_back(tensor == nullptr ? Place{} : Place{tensor->address, tensor->bytes});
      }
    }
  }
  return made;
}

}  // namespace

void begin(std::span<const std::byte> program, std::span<std::byte> memory) {
  const Program content = Program::read(program);
  require(memory.size() >= content.arena_bytes, "the arena has ", memory.size(),
          " bytes, and the program needs ", content.arena_bytes);
  placement = read(content);
  arena = memory.data();
  arena_bytes = memory.size();
  forget();
}

void end() noexcept {
  arena = nullptr;
  arena_bytes = 0;
  placement = {};
  forget();
  running = nullptr;
}

std::int64_t buffer(const char* name, std::uint64_t* bytes) noexcept {
  for (const auto& [found, place] : placement.buffers) {
    if (found != name) continue;
    *bytes = place.bytes;
    return static_cast<std::int64_t>(place.address);
  }
  return -1;
}

void run(const char* graph) {
  running = nullptr;
  next = 0;
  if (graph == nullptr || arena == nullptr) return;
  for (const Graph& found : placement.graphs)
    if (found.name == graph) running = &found;
  require(running != nullptr, "the program has no graph ", graph);
}

Node::Node(const Declaration& declaration) {
  if (running == nullptr) return;
  require(next < running->steps.size() && running->steps[next].declaration == &declaration,
          "the graph does not run in the order of its program; export the artifact again");
  step_ = &running->steps[next++];
  work_ = {arena + step_->work.address, step_->work.bytes};
}

void* Node::take(std::size_t bytes) {
  void* const taken = work_.take(bytes);
  note(Place{static_cast<std::size_t>(static_cast<std::byte*>(taken) - arena), bytes}.end());
  return taken;
}

Node::Output::Output(const Node& node, std::size_t index) {
  if (node.step_ != nullptr && index < node.step_->outputs.size()) asked = &node.step_->outputs[index];
}

Node::Output::~Output() { asked = nullptr; }

void* wanted(std::size_t bytes) noexcept {
  if (asked == nullptr || bytes < asked->bytes || asked->address + bytes > asked->end()) return nullptr;
  note(asked->end());
  return arena + asked->address;
}

bool holds(const void* memory) noexcept {
  const auto* const at = static_cast<const std::byte*>(memory);
  return arena != nullptr && at >= arena && at < arena + arena_bytes;
}

std::size_t highest() noexcept { return high; }

void forget() noexcept { high = placement.buffers_end; }

}  // namespace edge_bcs::placement
