// Tells a caller in C, or in Python, why something failed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>

namespace edge_bcs {

// Writes the sentence of an error, as much of it as has room, and a terminating zero.
inline void say(const std::exception& error, char* text, std::uint64_t size) {
  if (size == 0) return;
  const std::size_t length =
      std::min<std::size_t>(std::strlen(error.what()), static_cast<std::size_t>(size) - 1);
  std::memcpy(text, error.what(), length);
  text[length] = '\0';
}

}  // namespace edge_bcs
