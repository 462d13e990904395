// Reads FlatBuffers (flatbuffers.dev, "Internals") from a file that nobody has checked: every offset and every length is
// looked at before it is followed. Whatever lies outside the file throws Error. Nothing is copied but what is returned.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

#include "ops/op.h"

namespace edge_bcs::flat {

static_assert(std::endian::native == std::endian::little);

// The whole file, and how much may still be read of it: tables may share what they point to, so that a small file could
// be endless to walk through.
class File {
 public:
  explicit File(std::span<const std::byte> bytes) : bytes_(bytes), left_(16 * bytes.size()) {}

  // The number at `at`, which need not be aligned.
  template <class T>
  T read(std::size_t at) const {
    const auto part = bytes(at, sizeof(T));
    T value;
    std::memcpy(&value, part.data(), sizeof(T));
    return value;
  }

  std::span<const std::byte> bytes(std::size_t at, std::size_t size) const {
    require(at <= bytes_.size() && size <= bytes_.size() - at, "the file ends early");
    require(size <= left_, "the file refers to the same bytes too often");
    left_ -= size;
    return bytes_.subspan(at, size);
  }

  std::size_t size() const { return bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
  mutable std::size_t left_;
};

// Numbers one after the other.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(std::span<const std::byte> bytes) : bytes_(bytes) {}
  std::size_t size() const { return bytes_.size() / sizeof(T); }
  T operator[](std::size_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }

 private:
  std::span<const std::byte> bytes_;
};

class Table;

// Tables, by their places.
class Tables {
 public:
  Tables(const File& file, std::size_t first, std::size_t count)
      : file_(file), first_(first), count_(count) {}
  std::size_t size() const { return count_; }
  Table operator[](std::size_t i) const;

 private:
  const File& file_;
  std::size_t first_, count_;
};

class Table {
 public:
  Table(const File& file, std::size_t at) : file_(file), at_(at) {
    const auto distance = file.read<std::int32_t>(at);
    const std::int64_t fields = static_cast<std::int64_t>(at) - distance;
    require(fields >= 0, "a table has no list of fields");
    fields_ = static_cast<std::size_t>(fields);
    bytes_ = file.read<std::uint16_t>(fields_);
    require(bytes_ >= 4 && bytes_ % 2 == 0, "a table has an impossible list of fields");
  }

  // The number in field `slot`, or `otherwise` where it is left out.
  template <class T>
  T number(std::size_t slot, T otherwise) const {
    const std::size_t place = field(slot);
    return place == 0 ? otherwise : file_.read<T>(place);
  }

  // The text in field `slot`; empty where it is left out.
  std::string_view text(std::size_t slot) const {
    const std::size_t place = field(slot);
    if (place == 0) return {};
    const std::size_t at = follow(file_, place);
    const auto found = file_.bytes(at + 4, file_.read<std::uint32_t>(at));
    return {reinterpret_cast<const char*>(found.data()), found.size()};
  }

  // The numbers in field `slot`; none where it is left out.
  template <class T>
  Numbers<T> numbers(std::size_t slot) const {
    const std::size_t place = field(slot);
    if (place == 0) return {};
    const std::size_t at = follow(file_, place);
    return Numbers<T>(file_.bytes(at + 4, std::size_t{file_.read<std::uint32_t>(at)} * sizeof(T)));
  }

  // The tables in field `slot`; none where it is left out.
  Tables tables(std::size_t slot) const {
    const std::size_t place = field(slot);
    if (place == 0) return {file_, 0, 0};
    const std::size_t at = follow(file_, place);
    const std::size_t count = file_.read<std::uint32_t>(at);
    file_.bytes(at + 4, count * 4);
    return {file_, at + 4, count};
  }

  // Where the offset at `place` leads.
  static std::size_t follow(const File& file, std::size_t place) {
    return place + file.read<std::uint32_t>(place);
  }

 private:
  // Where field `slot` lies; 0 where it is left out.
  std::size_t field(std::size_t slot) const {
    const std::size_t entry = 4 + 2 * slot;
    if (entry + 2 > bytes_) return 0;
    const auto offset = file_.read<std::uint16_t>(fields_ + entry);
    return offset == 0 ? 0 : at_ + offset;
  }

  const File& file_;
  std::size_t at_, fields_ = 0, bytes_ = 0;
};

inline Table Tables::operator[](std::size_t i) const {
  require(i < count_, "a table is asked for that is not there");
  return {file_, Table::follow(file_, first_ + 4 * i)};
}

// The first table of a file with this four-letter identifier.
inline Table root(const File& file, std::string_view identifier) {
  const auto found = file.bytes(4, 4);
  require(std::memcmp(found.data(), identifier.data(), 4) == 0, "the file is not a program of edge-bcs");
  return {file, Table::follow(file, 0)};
}

}  // namespace edge_bcs::flat
