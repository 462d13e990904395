#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "ops/op.h"
#include "session/files.h"
#include "session/json.h"

namespace edge_bcs {

namespace {

constexpr std::size_t longest_path = 4096;

class FileSource final : public Source {
 public:
  FileSource(Descriptor file, std::uint64_t size) : file_(std::move(file)), size_(size) {}
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, std::span<std::byte> into) const override {
    while (!into.empty()) {
      const ssize_t count = ::pread(file_.number(), into.data(), into.size(), static_cast<off_t>(offset));
      if (count < 0 && errno == EINTR) continue;
      require(count >= 0, "it cannot be read: ", cause_of(errno));
      require(count > 0, "it ends too early");
      offset += static_cast<std::uint64_t>(count);
      into = into.subspan(static_cast<std::size_t>(count));
    }
  }

 private:
  Descriptor file_;
  std::uint64_t size_;
};

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(number_, other.number_);
  return *this;
}

void Descriptor::close() {
  if (number_ >= 0) ::close(number_);
  number_ = -1;
}

FolderFiles::FolderFiles(std::string folder)
    : path_(std::move(folder)), folder_(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  const int error = errno;
  if (folder_) return;
  if (error == ENOENT)
    fail("the artifact ", shown(path_, longest_path), " does not exist; create one with `edge-bcs export -o ",
         shown(path_, longest_path), "`");
  if (error == ENOTDIR)
    fail(shown(path_, longest_path),
         " is a file, and an artifact is a folder or a .tar, such as `edge-bcs export` makes");
  fail(shown(path_, longest_path), " cannot be read: ", cause_of(error));
}

std::unique_ptr<Source> FolderFiles::open(const std::string& name) const {
  return open_file(folder_.number(), name);
}

std::unique_ptr<Source> open_file(int folder, const std::string& name) {
  // Not to wait for who writes into a pipe.
  Descriptor file(::openat(folder, name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file && errno == ENOENT) return nullptr;
  if (!file) fail("it cannot be read: ", cause_of(errno));
  struct stat found{};
  require(::fstat(file.number(), &found) == 0, "it cannot be read: ", cause_of(errno));
  require(S_ISREG(found.st_mode), "it is not a regular file");
  return std::make_unique<FileSource>(std::move(file), static_cast<std::uint64_t>(found.st_size));
}

std::string FolderFiles::shown_name(const std::string& name) const {
  return shown(path_, longest_path) + "/" + name;
}

std::string cause_of(int error) {
  switch (error) {
    case ENOSPC:
      return "the disk is full";
    case EFBIG:
      return "the file may not grow further";
    case EDQUOT:
      return "the disk quota is used up";
    case EROFS:
      return "the disk is read-only";
    case EACCES:
      return "permission is denied";
    default:
      return std::generic_category().message(error);
  }
}

}  // namespace edge_bcs
