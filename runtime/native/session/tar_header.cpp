#include "session/tar_header.h"

#include <algorithm>
#include <charconv>
#include <span>

namespace edge_bcs {

TarHeader::TarHeader(const Source& archive, std::uint64_t offset) {
  archive.read(offset, std::as_writable_bytes(std::span(content_)));
}

std::string_view TarHeader::field(std::size_t at, std::size_t length) const {
  const std::string_view text(content_.data() + at, length);
  return text.substr(0, text.find('\0'));
}

// Octal digits, with spaces and NULs around them.
std::optional<std::uint64_t> TarHeader::octal(std::size_t at, std::size_t length) const {
  constexpr std::string_view around(" \0", 2);
  std::string_view text(content_.data() + at, length);
  text.remove_prefix(std::min(text.find_first_not_of(around), text.size()));
  text = text.substr(0, text.find_last_not_of(around) + 1);
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 8);
  if (error != std::errc() || end != text.data() + text.size()) return {};
  return value;
}

// An octal number, or one of 64 bits as GNU writes what is larger.
std::optional<std::uint64_t> TarHeader::number(std::size_t at, std::size_t length) const {
  std::uint64_t value = 0;
  if (static_cast<unsigned char>(content_[at]) == 0x80) {
    for (std::size_t i = at + length - 8; i < at + length; ++i)
      value = value << 8 | static_cast<unsigned char>(content_[i]);
    return value;
  }
  std::string_view text = field(at, length);
  while (text.starts_with(' ')) text.remove_prefix(1);
  while (text.ends_with(' ')) text.remove_suffix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 8);
  if (!text.empty() && (error != std::errc() || end != text.data() + text.size())) return {};
  return value;
}

bool TarHeader::is_blank() const {
  return std::ranges::all_of(content_, [](char letter) { return letter == '\0'; });
}

bool TarHeader::is_intact() const {
  constexpr std::size_t checksum_at = 148, checksum_bytes = 8;
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < bytes; ++i)
    sum += i - checksum_at < checksum_bytes ? ' ' : static_cast<unsigned char>(content_[i]);
  return octal(checksum_at, checksum_bytes) == sum;
}

bool TarHeader::is_ustar() const { return field(257, 5) == "ustar"; }

std::string TarHeader::name() const {
  const std::string_view end = field(0, 100), front = field(345, 155);
  // GNU's headers have other fields where those of POSIX have the front of a long name.
  if (!is_ustar() || content_[262] != '\0' || front.empty()) return std::string(end);
  return std::string(front) + "/" + std::string(end);
}

}  // namespace edge_bcs
