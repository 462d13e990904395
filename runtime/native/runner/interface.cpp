// The interface of runtime/program.py and runtime/attack.py.

#include <cstdint>
#include <exception>
#include <memory>

#include "runner/runner.h"
#include "runner/say.h"
#include "session/attack.h"

#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))

using edge_bcs::say;

// Opens a program over an arena of the caller's, which must live as long; null, with the reason in `error`, if the file is
// damaged or the arena too small. With `half` not 0 attacks are in half precision.
EDGE_BCS_EXPORT void* edge_bcs_program_open(const void* file, std::uint64_t size, void* arena,
                                            std::uint64_t arena_bytes, int threads, int half, char* error,
                                            std::uint64_t error_size) {
  try {
    const std::span content(static_cast<const std::byte*>(file), static_cast<std::size_t>(size));
    const std::span place(static_cast<std::byte*>(arena), static_cast<std::size_t>(arena_bytes));
    return std::make_unique<edge_bcs::Runner>(content, place, threads, half != 0).release();
  } catch (const std::exception& failed) {
    say(failed, error, error_size);
    return nullptr;
  }
}

// Runs a graph by its name. Returns 0, or -1 with the reason in `error`.
EDGE_BCS_EXPORT int edge_bcs_program_run(void* program, const char* graph, char* error,
                                         std::uint64_t error_size) {
  try {
    static_cast<edge_bcs::Runner*>(program)->run(graph);
    return 0;
  } catch (const std::exception& failed) {
    say(failed, error, error_size);
    return -1;
  }
}

EDGE_BCS_EXPORT void edge_bcs_program_close(void* program) {
  std::unique_ptr<edge_bcs::Runner>(static_cast<edge_bcs::Runner*>(program)).reset();
}

// Bytes of the arena that a program asks for, or -1 where the file is none.
EDGE_BCS_EXPORT std::int64_t edge_bcs_program_arena(const void* file, std::uint64_t size) {
  try {
    const std::span content(static_cast<const std::byte*>(file), static_cast<std::size_t>(size));
    return static_cast<std::int64_t>(edge_bcs::Program::arena(content));
  } catch (const std::exception&) {
    return -1;
  }
}

// Where a bound buffer lies, in bytes from the start of the arena, and its size; -1 if the program has none of that name.
EDGE_BCS_EXPORT std::int64_t edge_bcs_program_buffer(const void* program, const char* name,
                                                     std::uint64_t* bytes) {
  for (const edge_bcs::PlacedTensor& tensor :
       static_cast<const edge_bcs::Runner*>(program)->program().buffers) {
    if (tensor.name != name) continue;
    *bytes = tensor.bytes;
    return static_cast<std::int64_t>(tensor.address);
  }
  return -1;
}

// Probabilities [rows, classes] of logits [rows, classes].
EDGE_BCS_EXPORT void edge_bcs_softmax(const float* logits, std::uint64_t rows, std::uint64_t classes,
                                      float* probabilities) {
  const auto count = static_cast<std::size_t>(rows * classes);
  edge_bcs::softmax({logits, count}, static_cast<std::size_t>(classes), {probabilities, count});
}

// Moves `images` images of so many pixels to where an attack on them starts, which `start` says: 0 uniform, 1 gaussian, 2 none.
EDGE_BCS_EXPORT void edge_bcs_move_to_start(float* x, std::uint64_t images, std::uint64_t pixels, int start,
                                            double width, std::uint64_t seed, std::uint64_t step,
                                            std::uint32_t purpose, std::uint64_t place) {
  const edge_bcs::Noise noise{seed, step, static_cast<edge_bcs::Purpose>(purpose), place};
  edge_bcs::move_to_start({x, static_cast<std::size_t>(images * pixels)}, static_cast<edge_bcs::Start>(start),
                          width, noise, static_cast<std::size_t>(pixels));
}
