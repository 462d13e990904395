// Where ONNX Runtime's tensors lie: at the places that `program.bin` gives them, in one arena, as with our own runner.
//
// ONNX Runtime makes an output when its operator asks for it. Our operators say before which one they ask for, so the
// allocator knows its place. That holds for graphs that run node after node in the order of the program, which is checked
// at every node.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "ops/op.h"
#include "runner/work.h"

namespace edge_bcs::placement {

// Lays the tensors of all runs (`Run`) from now on into an arena of the caller's, until `end`. Throws Error where the program
// is damaged or the arena too small.
void begin(std::span<const std::byte> program, std::span<std::byte> arena);
void end() noexcept;

// Where a bound buffer lies, in bytes from the start of the arena, and its size; -1 if there is none of that name.
std::int64_t buffer(const char* name, std::uint64_t* bytes) noexcept;

// This thread runs a graph of the program from now on; null: none. Throws Error if the program has none of that name.
void run(const char* graph);

// The next node of the graph that this thread runs, if it runs one; its outputs and its work memory have their places then.
class Node {
 public:
  // Throws Error if another operator is next.
  explicit Node(const Declaration& declaration);

  // Whether the node has places.
  explicit operator bool() const { return step_ != nullptr; }

  // Its work memory, see `Work`.
  void* take(std::size_t bytes);
  void give_back(void* memory) noexcept { work_.give_back(memory); }

  // While it lives, the memory that this thread asks for is that of an output.
  class Output {
   public:
    Output(const Node& node, std::size_t index);
    ~Output();
    Output(const Output&) = delete;
    Output& operator=(const Output&) = delete;
  };

 private:
  friend class Output;
  const struct Step* step_ = nullptr;
  Work work_;
};

// The place of `bytes` bytes, if they are those of an `Output`; else null.
void* wanted(std::size_t bytes) noexcept;

// Whether memory is a part of the arena.
bool holds(const void* memory) noexcept;

// Bytes from the start of the arena to the end of what was given a place since `forget`; at least those of the buffers.
std::size_t highest() noexcept;
void forget() noexcept;

}  // namespace edge_bcs::placement
