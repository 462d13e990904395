// .npz files: a zip of numpy arrays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "session/files.h"

namespace edge_bcs::app {

// A file of the system, open for reading.
class FileSource final : public Source {
 public:
  // Throws Error ("it …") if it is no file, or cannot be opened.
  explicit FileSource(const std::string& path);
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, std::span<std::byte> into) const override;
  int descriptor() const { return file_.number(); }

 private:
  Descriptor file_;
  std::uint64_t size_ = 0;
};

// An array as an archive has it.
struct StoredArray {
  std::string type;  // such as "|u1" or "<i8"
  std::vector<std::uint64_t> shape;
  std::uint64_t offset = 0;  // of its numbers, in the archive or in `content`
  bool packed = false;
  std::string content;  // of one that is packed

  std::uint64_t count() const { return shape.empty() ? 0 : shape[0]; }
};

class Arrays {
 public:
  // Reads the list of what is there. Throws Error ("it …").
  explicit Arrays(const Source& source);

  bool has(const std::string& name) const { return find(name) != nullptr; }
  // The array of that name. One that is packed is unpacked if that takes at most `most` bytes. Throws Error ("it …", or
  // "NAME …"). The checksum is compared.
  StoredArray array(const std::string& name, std::uint64_t most) const;
  // The numbers of one that is not larger than `most` bytes.
  std::vector<std::int64_t> whole_numbers(const std::string& name, std::uint64_t most) const;

 private:
  struct Member {
    std::string name;
    std::uint64_t place, packed, size;
    std::uint32_t check;
    unsigned method;
  };

  const Member* find(const std::string& name) const;
  std::uint64_t data_of(const Member& member) const;
  std::string unpacked(const Member& member) const;
  void compare_checksum(const Member& member, std::uint64_t offset) const;

  const Source& source_;
  std::vector<Member> members_;
};

}  // namespace edge_bcs::app
