// One writer at a time in a folder: edge_bcs/core/locks.py, and the same lock.
#pragma once

#include <string>

#include "session/files.h"

namespace edge_bcs {

// Held until it is destroyed; none where nothing can be locked.
class FolderLock {
 public:
  // Throws Error, which names `shown`, if another process, or another handle of this one, holds it. The folder stays open as
  // long as the lock.
  FolderLock(int folder, const std::string& shown);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int folder_;
  Descriptor file_;
};

}  // namespace edge_bcs
