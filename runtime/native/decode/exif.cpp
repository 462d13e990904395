#include "decode/exif.h"

#include <cstdint>
#include <string_view>

namespace edge_bcs {

namespace {

constexpr std::uint16_t orientation_tag = 0x0112, byte_type = 1, short_type = 3, long_type = 4;
constexpr std::size_t entry_bytes = 12;

// Numbers of a block in its byte order; 0 beyond its end.
class Reader {
 public:
  Reader(std::span<const std::byte> block, bool little) : block_(block), little_(little) {}

  std::uint32_t number(std::size_t at, std::size_t size) const {
    if (at > block_.size() || size > block_.size() - at) return 0;
    std::uint32_t value = 0;
    for (std::size_t i = 0; i < size; ++i)
      value = value << 8 | std::to_integer<std::uint32_t>(block_[little_ ? at + size - 1 - i : at + i]);
    return value;
  }

 private:
  std::span<const std::byte> block_;
  bool little_;
};

int valid(std::uint32_t number) { return number >= 1 && number <= 8 ? static_cast<int>(number) : 0; }

std::string_view text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

int exif_orientation(std::span<const std::byte> block) {
  const std::string_view order = text_of(block).substr(0, 2);
  if (order != "II" && order != "MM") return 0;
  const Reader reader(block, order == "II");
  if (reader.number(2, 2) != 42) return 0;
  const std::size_t directory = reader.number(4, 4), entries = reader.number(directory, 2);
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t entry = directory + 2 + entry_bytes * i;
    if (entry + entry_bytes > block.size()) return 0;
    if (reader.number(entry, 2) != orientation_tag) continue;
    if (reader.number(entry + 4, 4) != 1) return 0;
    switch (reader.number(entry + 2, 2)) {
      case byte_type:
        return valid(reader.number(entry + 8, 1));
      case short_type:
        return valid(reader.number(entry + 8, 2));
      case long_type:
        return valid(reader.number(entry + 8, 4));
      default:
        return 0;
    }
  }
  return 0;
}

int xmp_orientation(std::span<const std::byte> packet) {
  constexpr std::string_view name = "tiff:Orientation";
  const std::string_view text = text_of(packet);
  const std::size_t found = text.find(name);
  if (found == std::string_view::npos) return 0;
  std::string_view rest = text.substr(found + name.size());
  if (rest.starts_with("=\""))
    rest.remove_prefix(2);
  else if (rest.starts_with(">"))
    rest.remove_prefix(1);
  else
    return 0;
  return rest.empty() || rest[0] < '0' || rest[0] > '9' ? 0
                                                        : valid(static_cast<std::uint32_t>(rest[0] - '0'));
}

}  // namespace edge_bcs
