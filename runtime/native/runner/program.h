// A program (program.fbs), read and checked: what a hostile file could reach is the arena, and there only what its own
// operators write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ops/op.h"

namespace edge_bcs {

// A tensor of a graph: where it lies, in bytes from the start of the arena.
struct PlacedTensor {
  std::string name;
  ElementType type{};
  Shape shape;
  std::size_t address = 0, bytes = 0;

  std::size_t end() const { return address + bytes; }
};

// An operator with its tensors: places in the graph's `tensors`, -1 where one is left out.
struct ProgramNode {
  std::string name;
  const Declaration* declaration;
  std::unique_ptr<void, void (*)(void*)> object;
  std::vector<std::int32_t> inputs, outputs;
  std::size_t work_address, work_bytes;
};

struct ProgramGraph {
  std::string name;
  std::vector<PlacedTensor> tensors;
  std::vector<ProgramNode> nodes;
};

struct Program {
  std::size_t arena_bytes = 0;
  std::vector<PlacedTensor> buffers;
  std::vector<ProgramGraph> graphs;

  // Throws Error, in one sentence, where the file is damaged or was not written by edge-bcs.
  // With `half` the attack graph keeps its activations in half precision.
  static Program read(std::span<const std::byte> file, bool half = false);

  // Bytes of the arena that the file asks for; nothing else of it is looked at.
  static std::size_t arena(std::span<const std::byte> file);

  // Throws Error if there is none of that name.
  const ProgramGraph& graph(std::string_view name) const;
};

}  // namespace edge_bcs
