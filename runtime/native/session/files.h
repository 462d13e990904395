// The files of an artifact, wherever they lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace edge_bcs {

// A file of the system, open; -1 is none.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  ~Descriptor() { close(); }
  Descriptor(Descriptor&& other) noexcept : number_(other.number_) { other.number_ = -1; }
  Descriptor& operator=(Descriptor&& other) noexcept;
  int number() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }
  void close();

 private:
  int number_;
};

// A file open for reading.
class Source {
 public:
  virtual ~Source() = default;
  virtual std::uint64_t size() const = 0;
  // Fills `into` from byte `offset` on. Throws Error ("it …") if the file ends before, or cannot be read.
  virtual void read(std::uint64_t offset, std::span<std::byte> into) const = 0;
  // All of it, where it lies in memory as long as whoever opened it says; nothing elsewhere.
  virtual std::optional<std::span<const std::byte>> memory() const { return {}; }
};

class Files {
 public:
  virtual ~Files() = default;
  // Null if there is none of that name. Throws Error if it cannot be opened.
  virtual std::unique_ptr<Source> open(const std::string& name) const = 0;
  // What a sentence calls the file.
  virtual std::string shown_name(const std::string& name) const = 0;
  // Where it is a folder, that, open; else -1.
  virtual int folder() const { return -1; }
};

// A file by its name in an open folder. Null if there is none. Throws Error ("it …").
std::unique_ptr<Source> open_file(int folder, const std::string& name);

class FolderFiles final : public Files {
 public:
  // Throws Error if `folder` is none.
  explicit FolderFiles(std::string folder);
  std::unique_ptr<Source> open(const std::string& name) const override;
  std::string shown_name(const std::string& name) const override;
  int folder() const override { return folder_.number(); }

 private:
  std::string path_;
  Descriptor folder_;
};

class MemoryFiles final : public Files {
 public:
  struct File {
    std::string_view name;
    std::span<const std::byte> content;
  };
  explicit MemoryFiles(std::vector<File> files) : files_(std::move(files)) {}
  std::unique_ptr<Source> open(const std::string& name) const override;
  std::string shown_name(const std::string& name) const override { return name; }

 private:
  std::vector<File> files_;
};

// Bytes in memory as a file.
class MemorySource final : public Source {
 public:
  explicit MemorySource(std::span<const std::byte> content) : content_(content) {}
  std::uint64_t size() const override { return content_.size(); }
  void read(std::uint64_t offset, std::span<std::byte> into) const override;
  std::optional<std::span<const std::byte>> memory() const override { return content_; }

 private:
  std::span<const std::byte> content_;
};

// All of a file of up to `most` bytes. Throws Error ("it …").
std::string read_all(const Source& source, std::uint64_t most);

// Why the system refused, of an `errno`, in a few words.
std::string cause_of(int error);

}  // namespace edge_bcs
