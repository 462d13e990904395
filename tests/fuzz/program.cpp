// libFuzzer target: program.bin, read, checked, and every graph of it run once in an arena that is a heap block of exactly
// its size. A finding is whatever AddressSanitizer, UndefinedBehaviorSanitizer or libFuzzer's limits of time and memory
// report; a refusal is a good answer. record_files.py writes the programs to begin with.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <span>

#include "runner/runner.h"

namespace {

constexpr std::size_t largest_arena = std::size_t{32} << 20, alignment = 64;

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};

void run(std::span<const std::byte> file) {
  const std::size_t needed = edge_bcs::Program::arena(file);
  if (needed == 0 || needed > largest_arena) return;
  const std::unique_ptr<std::byte, Free> arena(static_cast<std::byte*>(
      std::aligned_alloc(alignment, (needed + alignment - 1) / alignment * alignment)));
  std::memset(arena.get(), 0, needed);
  edge_bcs::Runner runner(file, {arena.get(), needed}, 1);
  // Ones in the buffers let more operators come further than zeros.
  for (const edge_bcs::PlacedTensor& buffer : runner.program().buffers)
    for (std::size_t i = 0; buffer.type == edge_bcs::int32 && i + 4 <= buffer.bytes; i += 4) {
      const auto number = static_cast<std::int32_t>(i / 4);
      std::memcpy(arena.get() + buffer.address + i, &number, sizeof number);
    }
  for (const edge_bcs::ProgramGraph& graph : runner.program().graphs) {
    try {
      runner.run(graph.name);
    } catch (const edge_bcs::Error&) {
      continue;
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    run(std::as_bytes(std::span(data, size)));
  } catch (const edge_bcs::Error&) {
    return 0;
  }
  return 0;
}
