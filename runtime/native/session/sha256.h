// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace edge_bcs {

class Sha256 {
 public:
  using Text = std::array<char, 64>;  // hexadecimal

  void add(std::span<const std::byte> bytes);
  void add(std::string_view text) { add(std::as_bytes(std::span(text))); }

  // Of all that was added; nothing can be added afterwards.
  Text finish();

 private:
  void take_block(const std::byte* block);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> rest_{};
  std::uint64_t count_ = 0;
};

inline std::string_view view(const Sha256::Text& text) { return {text.data(), text.size()}; }

}  // namespace edge_bcs
