#include "host/budget.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <mutex>

#include "host/arena.h"
#include "host/placement.h"
#include "ops/dispatch.h"
#include "runner/say.h"

#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))

namespace edge_bcs::budget {

namespace {

constexpr std::size_t alignment = 64;
// Blocks from this size on come from the arena, smaller ones from the C library.
constexpr std::size_t large = std::size_t{1} << 16;

// An allocation that did not fit.
struct Refusal {
  std::int64_t asked = 0;
  std::int64_t in_use = 0;
  std::int64_t cap = 0;
};

// What one process has in use. The environment of ONNX Runtime has one CPU allocator, so there is one of
// these too.
struct Account {
  std::mutex mutex;
  bool owned = false;
  std::int64_t cap = -1;  // -1: none
  std::int64_t allocated = 0;
  std::int64_t reserved = 0;
  std::int64_t arena_reserved = 0;  // of them, for the buffers in the program's arena
  std::int64_t peak = 0;
  std::int64_t small = 0;  // of the blocks from the C library, headers included
  std::int64_t placed_peak = 0;
  Refusal refusal;
  Arena arena;  // of the large blocks

  std::int64_t in_use() const { return allocated + reserved; }

  // What is in use, with all up to the highest place that was given in the program's arena.
  std::int64_t touched() const {
    return in_use() - arena_reserved + static_cast<std::int64_t>(placement::highest());
  }

  // What the counted bytes occupy: all that the own arena holds, free or not, and every block with its header.
  std::int64_t placed() const {
    return touched() - allocated + small + static_cast<std::int64_t>(arena.held());
  }

  // Throws Exceeded where `bytes` more would go over the cap.
  void check(std::int64_t bytes) {
    if (cap < 0 || bytes <= cap - touched()) return;
    refusal = {bytes, touched(), cap};
    throw Exceeded("edge-bcs: memory budget exceeded: asked for " + std::to_string(bytes) + " bytes with " +
                   std::to_string(touched()) + " of " + std::to_string(cap) + " bytes in use");
  }

  // What the memory may grow by before it is more than the cap.
  std::size_t room() const {
    if (cap < 0) return std::numeric_limits<std::size_t>::max();
    return static_cast<std::size_t>(std::max<std::int64_t>(0, cap - placed()));
  }

  void note_peaks() {
    peak = std::max(peak, touched());
    placed_peak = std::max(placed_peak, placed());
  }
};

// Never destroyed: ONNX Runtime frees tensors until the very end of the process.
Account& account() {
  alignas(Account) static std::byte storage[sizeof(Account)];
  static Account* const made = new (storage) Account();
  return *made;
}

// Stands before every block; the block itself starts at the next multiple of the alignment.
struct Header {
  std::size_t bytes;
};

// Bytes of the block for `bytes` bytes, its header included.
std::size_t block_size(std::size_t bytes) {
  return alignment + (bytes + alignment - 1) / alignment * alignment;
}

ort::MemoryInfo* memory_info = nullptr;
ort::Allocator allocator{};
bool registered = false;

}  // namespace

void* allocate(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  if (bytes > (std::size_t{1} << 62)) throw std::bad_alloc();
  if (void* const place = placement::wanted(bytes)) {
    Account& a = account();
    const std::lock_guard lock(a.mutex);
    a.note_peaks();
    return place;
  }
  const std::size_t size = block_size(bytes);
  Account& a = account();
  void* block = nullptr;
  {
    const std::lock_guard lock(a.mutex);
    a.check(static_cast<std::int64_t>(bytes));
    block = size < large ? std::aligned_alloc(alignment, size) : a.arena.take(size, a.room());
    if (block == nullptr) throw std::bad_alloc();
    a.allocated += static_cast<std::int64_t>(bytes);
    if (size < large) a.small += static_cast<std::int64_t>(size);
    a.note_peaks();
  }
  static_cast<Header*>(block)->bytes = bytes;
  return static_cast<std::byte*>(block) + alignment;
}

void release(void* memory) noexcept {
  if (memory == nullptr || placement::holds(memory)) return;
  void* const block = static_cast<std::byte*>(memory) - alignment;
  const std::size_t bytes = static_cast<Header*>(block)->bytes;
  const std::size_t size = block_size(bytes);
  Account& a = account();
  const std::lock_guard lock(a.mutex);
  a.allocated -= static_cast<std::int64_t>(bytes);
  if (size < large) {
    a.small -= static_cast<std::int64_t>(size);
    std::free(block);
  } else {
    a.arena.give_back(block, size);
  }
}

namespace {

// ONNX Runtime closes a custom-operator library with the last session options that registered it, while its
// environment keeps the pointer to our allocator for good: the library must outlive both.
void stay_loaded() {
  Dl_info self{};
  if (dladdr(&allocator, &self) != 0 && self.dli_fname != nullptr)
    dlopen(self.dli_fname, RTLD_LAZY | RTLD_NODELETE);
}

}  // namespace

void register_with_environment() {
  static std::once_flag once;
  std::call_once(once, [] {
    stay_loaded();
    const auto succeeded = [](ort::Status* status) {
      if (status != nullptr) ort::api.release_status(status);
      return status == nullptr;
    };
    // CreateEnv gives the process's one environment and adds a reference; it is kept for good. In versions
    // whose Python module has an environment of its own this fails, and sessions keep ONNX Runtime's
    // allocator.
    ort::Env* env = nullptr;
    if (!succeeded(ort::api.create_env(ort::LoggingLevel::warning, "edge_bcs", &env))) return;
    if (!succeeded(ort::api.create_cpu_memory_info(ort::AllocatorType::device, ort::MemoryType::by_default,
                                                   &memory_info)))
      return;
    allocator.version = ort::api_version;
    allocator.alloc = [](ort::Allocator*, std::size_t bytes) { return allocate(bytes); };
    allocator.free = [](ort::Allocator*, void* memory) { release(memory); };
    allocator.info = [](const ort::Allocator*) -> const ort::MemoryInfo* { return memory_info; };
    allocator.reserve = [](ort::Allocator*, std::size_t bytes) { return allocate(bytes); };
    registered = succeeded(ort::api.register_allocator(env, &allocator));
  });
}

}  // namespace edge_bcs::budget

using edge_bcs::budget::account;

// The interface of runtime/budget.py.

// Takes the budget for one trainer. cap_bytes: the most bytes in use at any time, or -1 for no cap. Returns
// 0, or -1 if another trainer has it.
EDGE_BCS_EXPORT std::int64_t edge_bcs_budget_begin(std::int64_t cap_bytes) {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  if (a.owned) return -1;
  a.owned = true;
  a.cap = cap_bytes;
  a.peak = a.in_use();
  a.placed_peak = a.placed();
  return 0;
}

// Gives the budget back: no cap, and nothing reserved.
EDGE_BCS_EXPORT void edge_bcs_budget_end() {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  a.owned = false;
  a.cap = -1;
  a.reserved = a.arena_reserved = 0;
  edge_bcs::placement::end();
  a.arena.trim();
}

// Counts memory that was allocated elsewhere (bound buffers). Returns 0, or -1 if it does not fit.
EDGE_BCS_EXPORT int edge_bcs_budget_reserve(std::int64_t bytes) {
  if (bytes < 0) return -1;
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  try {
    a.check(bytes);
    a.reserved += bytes;
    a.note_peaks();
    return 0;
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

// Takes back what `reserve` counted.
EDGE_BCS_EXPORT void edge_bcs_budget_release(std::int64_t bytes) {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  if (bytes > 0) a.reserved -= bytes < a.reserved ? bytes : a.reserved;
}

// Lays the tensors of graphs that run (`edge_bcs_budget_run`) into an arena of the caller's, at the places of `program.bin`;
// `reserved`: what `reserve` counted for the buffers in it. Returns 0, or -1 with the reason in `error`.
EDGE_BCS_EXPORT int edge_bcs_budget_place(const void* program, std::uint64_t size, void* arena,
                                          std::uint64_t arena_bytes, std::int64_t reserved, char* error,
                                          std::uint64_t error_size) {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  try {
    edge_bcs::placement::begin({static_cast<const std::byte*>(program), static_cast<std::size_t>(size)},
                               {static_cast<std::byte*>(arena), static_cast<std::size_t>(arena_bytes)});
    a.arena_reserved = reserved;
    a.peak = a.touched();
    return 0;
  } catch (const std::exception& failed) {
    edge_bcs::say(failed, error, error_size);
    return -1;
  }
}

// Where a bound buffer lies, in bytes from the start of the arena, and its size; -1 if the program has none of that name.
EDGE_BCS_EXPORT std::int64_t edge_bcs_budget_buffer(const char* name, std::uint64_t* bytes) {
  return edge_bcs::placement::buffer(name, bytes);
}

// What this thread runs from now on is a graph of the program, in its order; null: is none. Returns 0, or -1 if the program has
// none of that name.
EDGE_BCS_EXPORT int edge_bcs_budget_run(const char* graph) {
  try {
    edge_bcs::placement::run(graph);
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

// Bytes in use now.
EDGE_BCS_EXPORT std::int64_t edge_bcs_budget_current() {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  return a.in_use();
}

// The most bytes that were in use at once since `begin` or `reset_peak`.
EDGE_BCS_EXPORT std::int64_t edge_bcs_budget_peak() {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  a.note_peaks();
  return a.peak;
}

// Bytes of memory that what is in use occupies now: with headers, and with what the arena holds free between and after the
// blocks.
EDGE_BCS_EXPORT std::int64_t edge_bcs_budget_placed() {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  return a.placed();
}

// The most of them since `begin` or `reset_peak`.
EDGE_BCS_EXPORT std::int64_t edge_bcs_budget_placed_peak() {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  return a.placed_peak;
}

EDGE_BCS_EXPORT void edge_bcs_budget_reset_peak() {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  edge_bcs::placement::forget();
  a.peak = a.touched();
  a.placed_peak = a.placed();
}

// 1 if ONNX Runtime takes its memory from this allocator, so that counts and cap are exact.
EDGE_BCS_EXPORT int edge_bcs_budget_exact() { return edge_bcs::budget::registered ? 1 : 0; }

// The last allocation that was refused: bytes asked for, bytes in use then, the cap. Zeros if there was none.
EDGE_BCS_EXPORT void edge_bcs_last_refusal(std::int64_t* asked, std::int64_t* in_use, std::int64_t* cap) {
  auto& a = account();
  const std::lock_guard lock(a.mutex);
  *asked = a.refusal.asked;
  *in_use = a.refusal.in_use;
  *cap = a.refusal.cap;
}

// The instruction set that the kernels run with: "scalar", "avx2", "avx512" or "neon".
EDGE_BCS_EXPORT const char* edge_bcs_isa() { return edge_bcs::isa_name(edge_bcs::selected_isa()); }
