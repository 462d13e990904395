// The memory budget: every tensor that ONNX Runtime makes, every bound buffer and all work memory are counted
// to the byte, and nothing goes over the cap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>

#include "host/ort_abi.h"

namespace edge_bcs::budget {

// Thrown when an allocation would go over the cap; ONNX Runtime turns it into a failed run.
class Exceeded : public std::bad_alloc {
 public:
  explicit Exceeded(std::string text) : text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Memory aligned to 64 bytes, counted as exactly `bytes`. Throws Exceeded over the cap, std::bad_alloc if the
// system has none. Zero bytes give a null pointer.
void* allocate(std::size_t bytes);

// Gives memory of `allocate` back; null does nothing.
void release(void* memory) noexcept;

// Makes this allocator the one that sessions with session.use_env_allocators=1 use. Only the first call does
// anything.
void register_with_environment();

}  // namespace edge_bcs::budget
