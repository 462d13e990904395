// The bytes of an image file, read piece by piece.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace edge_bcs {

class Bytes {
 public:
  // The bytes [offset, offset + size) of an open file.
  Bytes(int descriptor, std::uint64_t offset, std::uint64_t size)
      : descriptor_(descriptor), next_(offset), end_(offset + size) {}
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  // The next bytes, which are valid until the next call; none at the end. Sets `failed` where the file cannot be read.
  std::span<const std::byte> more();
  // Fills `into`; false where the bytes end before.
  bool fill(std::span<std::byte> into);

  // Passes over so many; false where the bytes end before.
  bool skip(std::uint64_t count);

  bool failed() const { return failed_; }

 private:
  int descriptor_;
  std::uint64_t next_, end_;
  bool failed_ = false;
  std::span<const std::byte> ready_;
  std::array<std::byte, 16384> buffer_;
};

}  // namespace edge_bcs
