// A header of a tar archive, which is read as hostile.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "session/files.h"

namespace edge_bcs {

class TarHeader {
 public:
  static constexpr std::size_t bytes = 512;

  // Throws Error ("it …") if the archive ends before.
  TarHeader(const Source& archive, std::uint64_t offset);

  // Nothing but zeros: the end.
  bool is_blank() const;
  // Whether its checksum is right.
  bool is_intact() const;
  // Whether it is one of POSIX, or of GNU after it.
  bool is_ustar() const;
  // '0', '\0' or '7' of a file, '5' of a folder, others of links, devices and headers that say more of the next file.
  char kind() const { return content_[156]; }
  std::string name() const;
  // Of what lies behind it; nothing if it is no number.
  std::optional<std::uint64_t> size() const { return number(size_at, size_bytes); }
  // The same as an artifact has it: in octal digits, so that no two readers take it for different sizes.
  std::optional<std::uint64_t> plain_size() const { return octal(size_at, size_bytes); }

 private:
  std::string_view field(std::size_t at, std::size_t length) const;
  std::optional<std::uint64_t> octal(std::size_t at, std::size_t length) const;
  std::optional<std::uint64_t> number(std::size_t at, std::size_t length) const;

  static constexpr std::size_t size_at = 124, size_bytes = 12;

  std::array<char, bytes> content_;
};

// How far the next header is from that of content of so many bytes.
constexpr std::uint64_t tar_padded(std::uint64_t size) {
  return (size + TarHeader::bytes - 1) / TarHeader::bytes * TarHeader::bytes;
}

}  // namespace edge_bcs
