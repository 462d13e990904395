#include "runner/runner.h"

#include <cstdint>
#include <exception>

#include "runner/work.h"

namespace edge_bcs {

namespace {

// One run of one node: its tensors lie where the program says.
class NodeCall final : public Call {
 public:
  NodeCall(const ProgramGraph& graph, const ProgramNode& node, std::byte* arena, Pool& pool)
      : graph_(graph),
        node_(node),
        arena_(arena),
        pool_(pool),
        work_(arena + node.work_address, node.work_bytes) {}

  std::size_t input_count() const override { return node_.inputs.size(); }

  RawTensor input(std::size_t index) const override {
    return index < node_.inputs.size() ? at(node_.inputs[index]) : RawTensor{};
  }

  RawTensor output(std::size_t index, const Shape& shape) const override {
    const RawTensor found = index < node_.outputs.size() ? at(node_.outputs[index]) : RawTensor{};
    require(!found.present || found.shape == shape, "output ", index, " has the dimensions ", shape.text(),
            ", and the program has ", found.shape.text());
    return found;
  }

  void* take(std::size_t bytes) const override { return work_.take(bytes); }
  void give_back(void* memory) const noexcept override { work_.give_back(memory); }

  void parallel(void (*run)(void*, std::size_t), std::size_t count, void* data) const override {
    pool_.run(run, count, data);
  }

 private:
  RawTensor at(std::int32_t place) const {
    if (place < 0) return {};
    const PlacedTensor& tensor = graph_.tensors[static_cast<std::size_t>(place)];
    return {arena_ + tensor.address, tensor.type, tensor.shape, true};
  }

  const ProgramGraph& graph_;
  const ProgramNode& node_;
  std::byte* arena_;
  Pool& pool_;
  mutable Work work_;
};

}  // namespace

Runner::Runner(std::span<const std::byte> file, std::span<std::byte> arena, int threads, bool half)
    : program_(Program::read(file, half)), arena_(arena.data()), pool_(threads) {
  require(arena.size() >= program_.arena_bytes, "the arena has ", arena.size(),
          " bytes, and the program needs ", program_.arena_bytes);
  require(reinterpret_cast<std::uintptr_t>(arena_) % 64 == 0,
          "the arena does not begin at a multiple of 64 bytes");
}

void Runner::run(std::string_view name) {
  const ProgramGraph& graph = program_.graph(name);
  for (const ProgramNode& node : graph.nodes) {
    const NodeCall call(graph, node, arena_, pool_);
    Context context(call, node.declaration->inputs, node.declaration->outputs);
    try {
      node.declaration->compute(node.object.get(), context);
    } catch (const std::exception& error) {
      fail("the operator ", node.declaration->name, " '", node.name, "' of the ", graph.name,
           " graph refused its input: ", error.what());
    }
  }
}

}  // namespace edge_bcs
