#include "app/tar.h"

#include <charconv>
#include <optional>
#include <span>
#include <string_view>

#include "ops/op.h"
#include "session/tar_header.h"

namespace edge_bcs::app {

namespace {

constexpr std::size_t most_members = 1 << 24;
constexpr std::uint64_t largest_extended = 1 << 20;

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
    require(end - at >= TarHeader::bytes, "it is truncated");
    const TarHeader header(tar, at);
    at += TarHeader::bytes;
    if (header.is_blank()) return members;
    const std::optional<std::uint64_t> stated = header.size();
    require(header.is_intact(), at == TarHeader::bytes ? "it is no tar archive" : "it is damaged");
    require(stated.has_value(), "it has a header that is no tar's");
    const char kind = header.kind();
    const bool extended = kind == 'x' || kind == 'L' || kind == 'K' || kind == 'g' || kind == 'X';
    const std::uint64_t size = !extended && told.sized ? told.size : *stated;
    const bool has_content =
        kind != '1' && kind != '2' && kind != '3' && kind != '4' && kind != '5' && kind != '6';
    require(!has_content || size <= end - at, "it is truncated: a file in it goes beyond its end");
    const std::uint64_t next = has_content ? at + tar_padded(size) : at;
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
    std::string name = told.named ? told.name : header.name();
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
