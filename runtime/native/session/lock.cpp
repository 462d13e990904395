#include "session/lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <span>
#include <string_view>

#include "ops/op.h"
#include "session/json.h"

namespace edge_bcs {

namespace {

constexpr const char* lock_file = ".edge-bcs.lock";
constexpr int attempts = 100;

// Whether the open file is still the one in the folder.
bool is_there(int folder, const Descriptor& file) {
  struct stat ours{}, found{};
  return ::fstat(file.number(), &ours) == 0 &&
         ::fstatat(folder, lock_file, &found, AT_SYMLINK_NOFOLLOW) == 0 && ours.st_dev == found.st_dev &&
         ours.st_ino == found.st_ino;
}

std::string host() {
  std::array<char, 256> name{};
  return ::gethostname(name.data(), name.size() - 1) == 0 ? std::string(name.data()) : std::string();
}

// Who wrote its number and machine into the file.
std::string holder(int folder) {
  std::array<char, 1024> content{};
  const Descriptor file(::openat(folder, lock_file, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  const ssize_t count = file ? ::read(file.number(), content.data(), content.size()) : 0;
  std::string_view text(content.data(), count > 0 ? static_cast<std::size_t>(count) : 0);
  const std::size_t space = text.find(' ');
  if (space == std::string_view::npos || text.substr(0, space).find_first_not_of("0123456789") != text.npos)
    return "another process";
  std::string_view machine = text.substr(space + 1);
  machine = machine.substr(0, machine.find('\n'));
  const std::string where = machine == host() ? "" : " on " + shown(machine);
  return "process " + std::string(text.substr(0, space)) + where;
}

}  // namespace

FolderLock::FolderLock(int folder, const std::string& shown) : folder_(folder) {
  // Open for reading only, so that a disk can still be made read-only; NFS wants it open for writing.
  int mode = O_RDONLY;
  for (int attempt = 0; attempt < attempts; ++attempt) {
    Descriptor file(::openat(folder, lock_file, mode | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0644));
    struct stat found{};
    // Nothing can be written here, as the writer will find and say.
    if (!file || ::fstat(file.number(), &found) != 0 || !S_ISREG(found.st_mode)) return;
    if (::flock(file.number(), LOCK_EX | LOCK_NB) != 0) {
      if (errno == EWOULDBLOCK)
        fail(shown, " is being written by ", holder(folder),
             ": wait until it has ended, stop it, or choose another folder");
      if (errno != EBADF || mode == O_RDWR) return;  // the file system has no locks
      mode = O_RDWR;
      continue;
    }
    if (!is_there(folder, file)) continue;  // its last holder removed it just now
    const std::string owner = std::to_string(::getpid()) + " " + host() + "\n";
    const Descriptor writer(::openat(folder, lock_file, O_WRONLY | O_TRUNC | O_NOFOLLOW | O_CLOEXEC));
    if (writer && ::write(writer.number(), owner.data(), owner.size()) < 0) {
      // A full disk; the sentence that others get then names nobody.
    }
    file_ = std::move(file);
    return;
  }
}

FolderLock::~FolderLock() {
  if (file_ && is_there(folder_, file_)) ::unlinkat(folder_, lock_file, 0);
}

}  // namespace edge_bcs
