#include "app/tar.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <span>
#include <string_view>

#include "ops/op.h"

namespace edge_bcs::app {

namespace {

constexpr std::size_t block = 512, checksum_at = 148, checksum_bytes = 8, most_members = 1 << 24;
constexpr std::uint64_t largest_extended = 1 << 20;

using Header = std::array<char, block>;

std::string_view field(const Header& header, std::size_t at, std::size_t bytes) {
  const std::string_view text(header.data() + at, bytes);
  return text.substr(0, text.find('\0'));
}

// An octal number, or one of 64 bits as GNU writes what is larger.
std::uint64_t number(const Header& header, std::size_t at, std::size_t bytes) {
  std::uint64_t value = 0;
  if (static_cast<unsigned char>(header[at]) == 0x80) {
    for (std::size_t i = at + bytes - 8; i < at + bytes; ++i)
      value = value << 8 | static_cast<unsigned char>(header[i]);
    return value;
  }
  std::string_view text = field(header, at, bytes);
  while (text.starts_with(' ')) text.remove_prefix(1);
  while (text.ends_with(' ')) text.remove_suffix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 8);
  require(text.empty() || (error == std::errc() && end == text.data() + text.size()),
          "it has a header that is no tar's");
  return value;
}

bool is_intact(const Header& header) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i < block; ++i)
    sum += i - checksum_at < checksum_bytes ? ' ' : static_cast<unsigned char>(header[i]);
  return number(header, checksum_at, checksum_bytes) == sum;
}

// What extended headers say of the next file.
struct Extended {
  bool named = false, sized = false;
  std::string name = {};
  std::uint64_t size = 0;
};

// Records "LENGTH NAME=VALUE\n" of an extended header.
void read_extended(std::string_view text, Extended& into) {
  while (!text.empty() && text.front() != '\0') {
    std::size_t length = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), length);
    const auto digits = static_cast<std::size_t>(end - text.data());
    require(error == std::errc() && length > digits + 2 && length <= text.size() &&
                text[length - 1] == '\n' && text[digits] == ' ',
            "it has an extended header that is damaged");
    const std::string_view record = text.substr(digits + 1, length - digits - 2);
    const std::size_t mark = record.find('=');
    require(mark != std::string_view::npos, "it has an extended header that is damaged");
    const std::string_view name = record.substr(0, mark), value = record.substr(mark + 1);
    if (name == "path") into.named = true, into.name = value;
    if (name == "size") {
      std::uint64_t bytes = 0;
      const auto [stop, fault] = std::from_chars(value.data(), value.data() + value.size(), bytes);
      require(fault == std::errc() && stop == value.data() + value.size(),
              "it has an extended header that is damaged");
      into.sized = true, into.size = bytes;
    }
    require(!name.starts_with("GNU.sparse"), "it holds a sparse file, which is not read");
    text.remove_prefix(length);
  }
}

}  // namespace

std::vector<TarMember> members_of(const Source& tar) {
  std::vector<TarMember> members;
  const std::uint64_t end = tar.size();
  Extended told;
  for (std::uint64_t at = 0; at < end;) {
    Header header;
    require(end - at >= block, "it is truncated");
    tar.read(at, std::as_writable_bytes(std::span(header)));
    at += block;
    if (std::ranges::all_of(header, [](char letter) { return letter == '\0'; })) return members;
    require(is_intact(header), at == block ? "it is no tar archive" : "it is damaged");
    const char kind = header[156];
    const bool extended = kind == 'x' || kind == 'L' || kind == 'K' || kind == 'g' || kind == 'X';
    const std::uint64_t size = !extended && told.sized ? told.size : number(header, 124, 12);
    const bool has_content =
        kind != '1' && kind != '2' && kind != '3' && kind != '4' && kind != '5' && kind != '6';
    require(!has_content || size <= end - at, "it is truncated: a file in it goes beyond its end");
    const std::uint64_t next = has_content ? at + (size + block - 1) / block * block : at;
    if (extended) {
      require(size <= largest_extended,
              "it declares an extended header of more than 1 MiB, which is refused");
      std::string text(static_cast<std::size_t>(size), '\0');
      tar.read(at, std::as_writable_bytes(std::span(text)));
      if (kind == 'L') told.named = true, told.name = text.substr(0, text.find('\0'));
      if (kind == 'x' || kind == 'X') read_extended(text, told);
      at = next;
      continue;
    }
    require(kind != 'S', "it holds a sparse file, which is not read");
    std::string name = told.named ? told.name : std::string(field(header, 0, 100));
    // GNU's headers have other fields where those of POSIX have the front of a long name.
    const std::string_view front = field(header, 345, 155), magic(header.data() + 257, 6);
    if (!told.named && magic == std::string_view("ustar\0", 6) && !front.empty())
      name = std::string(front) + "/" + name;
    told = {};
    const bool is_file = kind == '0' || kind == '\0' || kind == '7';
    if (is_file && !name.ends_with('/')) {
      require(members.size() < most_members, "it holds more files than are read");
      members.push_back({std::move(name), at, size});
    }
    at = next;
  }
  require(!members.empty(), "it is no tar archive");
  return members;
}

}  // namespace edge_bcs::app
