// An artifact in one file, a plain tar, read where it lies: runtime/archive.py.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "session/files.h"

namespace edge_bcs {

class ArchiveFiles final : public Files {
 public:
  // Checks every header. Throws Error for an archive that is truncated, names anything but the files of its own manifest, or
  // gives one another size or twice.
  explicit ArchiveFiles(const std::string& path);
  // What is opened may not outlive this.
  std::unique_ptr<Source> open(const std::string& name) const override;
  std::string shown_name(const std::string& name) const override { return shown_ + "/" + name; }

 private:
  struct Member {
    std::string name;  // in the artifact's folder
    std::uint64_t offset, size;
  };

  void list();
  void add(char kind, const std::string& name, std::uint64_t offset, std::uint64_t size);
  void check_declared() const;
  const Member* find(std::string_view name) const;

  std::string shown_, top_;  // top_: the one folder
  std::unique_ptr<Source> archive_;
  std::vector<Member> members_;
};

// The files of an artifact: a folder, or a .tar. Throws Error if it is neither.
std::unique_ptr<Files> open_files(const std::string& path);

}  // namespace edge_bcs
