// malloc and its kin over one block of fixed size, first fit. Nothing of it is used between the end of edge_bcs_open_files and a
// call that fails, so it is small and simple rather than fast.
#include "freestanding/memory.h"

#include <cstdlib>
#include <cstring>
#include <exception>

namespace {

// Before each piece of the block; the next one begins where it ends.
struct alignas(16) Piece {
  std::size_t size;  // with this
  bool taken;

  Piece* next() { return reinterpret_cast<Piece*>(reinterpret_cast<unsigned char*>(this) + size); }
  void* memory() { return this + 1; }
};

edge_bcs_pool_use use{};

Piece* begin() { return reinterpret_cast<Piece*>(edge_bcs_pool); }
Piece* end() {
  return reinterpret_cast<Piece*>(edge_bcs_pool + edge_bcs_pool_bytes / sizeof(Piece) * sizeof(Piece));
}

void* take(std::size_t bytes) {
  ++use.calls;
  if (begin()->size == 0)
    begin()->size = static_cast<std::size_t>(reinterpret_cast<unsigned char*>(end()) - edge_bcs_pool);
  if (bytes > edge_bcs_pool_bytes) return nullptr;
  const std::size_t needed = (bytes + sizeof(Piece) - 1) / sizeof(Piece) * sizeof(Piece) + sizeof(Piece);
  for (Piece* piece = begin(); piece != end(); piece = piece->next()) {
    if (piece->taken) continue;
    while (piece->next() != end() && !piece->next()->taken) piece->size += piece->next()->size;
    if (piece->size < needed) continue;
    if (piece->size > needed) {
      Piece* const rest = reinterpret_cast<Piece*>(reinterpret_cast<unsigned char*>(piece) + needed);
      rest->size = piece->size - needed;
      rest->taken = false;
      piece->size = needed;
    }
    piece->taken = true;
    use.bytes += needed;
    if (use.bytes > use.most) use.most = use.bytes;
    return piece->memory();
  }
  return nullptr;
}

void give_back(void* memory) {
  if (memory == nullptr) return;
  Piece* const piece = static_cast<Piece*>(memory) - 1;
  use.bytes -= piece->size;
  piece->taken = false;
}

// In front of an exception: more than the C++ library keeps there.
constexpr std::size_t exception_header = 256;

}  // namespace

extern "C" {

edge_bcs_pool_use edge_bcs_get_pool_use() { return use; }

void* malloc(std::size_t bytes) { return take(bytes); }

void free(void* memory) { give_back(memory); }

void* calloc(std::size_t count, std::size_t size) {
  if (size != 0 && count > edge_bcs_pool_bytes / size) return nullptr;
  void* const memory = take(count * size);
  if (memory != nullptr) std::memset(memory, 0, count * size);
  return memory;
}

void* realloc(void* memory, std::size_t bytes) {
  void* const made = take(bytes);
  if (made == nullptr || memory == nullptr) return made;
  const std::size_t had = (static_cast<Piece*>(memory) - 1)->size - sizeof(Piece);
  std::memcpy(made, memory, had < bytes ? had : bytes);
  give_back(memory);
  return made;
}

// The same as newlib's own functions call them.
struct _reent;
void* _malloc_r(_reent*, std::size_t bytes) { return malloc(bytes); }
void _free_r(_reent*, void* memory) { free(memory); }
void* _calloc_r(_reent*, std::size_t count, std::size_t size) { return calloc(count, size); }
void* _realloc_r(_reent*, void* memory, std::size_t bytes) { return realloc(memory, bytes); }

// For what the arena is not given for: there is no such memory.
void* aligned_alloc(std::size_t, std::size_t) { return nullptr; }
void* memalign(std::size_t, std::size_t) { return nullptr; }
int posix_memalign(void** memory, std::size_t, std::size_t) {
  *memory = nullptr;
  return 12;
}

}  // extern "C"

// In the places of the C++ library's, which would keep a block for exceptions of its own, and print with stdio.
namespace __cxxabiv1 {

extern "C" void* __cxa_allocate_exception(std::size_t size) noexcept {
  void* const memory = take(size + exception_header);
  if (memory == nullptr) std::terminate();
  std::memset(memory, 0, size + exception_header);
  return static_cast<unsigned char*>(memory) + exception_header;
}

extern "C" void __cxa_free_exception(void* exception) noexcept {
  give_back(static_cast<unsigned char*>(exception) - exception_header);
}

// Of an exception that is thrown again from a std::exception_ptr.
extern "C" void* __cxa_allocate_dependent_exception() noexcept { return __cxa_allocate_exception(0); }

extern "C" void __cxa_free_dependent_exception(void* exception) noexcept { __cxa_free_exception(exception); }

}  // namespace __cxxabiv1

namespace __gnu_cxx {

void __verbose_terminate_handler() { std::abort(); }

}  // namespace __gnu_cxx
