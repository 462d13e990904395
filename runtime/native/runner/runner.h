// Runs the graphs of a program in an arena.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "runner/pool.h"
#include "runner/program.h"

namespace edge_bcs {

class Runner {
 public:
  // Reads and checks the program. The arena, of at least `Program::arena_bytes` from a multiple of 64 bytes on, stays the
  // caller's, who fills the buffers in it. With `half` attacks are in half precision. Throws Error.
  Runner(std::span<const std::byte> file, std::span<std::byte> arena, int threads, bool half = false);

  const Program& program() const { return program_; }

  // Runs a graph from its first node to its last. Throws Error, with the operator's name, where one refuses.
  void run(std::string_view graph);

 private:
  Program program_;
  std::byte* arena_;
  Pool pool_;
};

}  // namespace edge_bcs
