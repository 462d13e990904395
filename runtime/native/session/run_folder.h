// A run folder that is saved into: runtime/state.py's two slots, and the same files.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "session/files.h"
#include "session/lock.h"
#include "session/network.h"
#include "session/state.h"

namespace edge_bcs {

// An intact state in a file of a run, all of it in memory.
struct StoredState {
  StateHeader header;
  std::string content;
  StateBytes tensors;  // in it

  StoredState() = default;
  StoredState(const StoredState&) = delete;
  StoredState& operator=(const StoredState&) = delete;

  // Null if there is none of that name.
  static std::unique_ptr<StoredState> read(const Files& files, const char* name, const Manifest& manifest);
  // Of the slots of a run; null if none is intact. The one before may be of a higher step: what boards became together may have
  // fewer than one of them.
  static std::unique_ptr<StoredState> newest(const Files& files, const Manifest& manifest);
};

class RunFolder {
 public:
  // Locks the folder, made if it is missing, and copies into it the files of the artifact that `source` has.
  // `opened_at`: the step of the state when it was read from there. Throws Error if something else lies there, if another
  // process writes there or trained the run on, or if nothing can be written.
  RunFolder(std::string path, const Files& source, const Network& network, std::uint64_t opened_at);
  ~RunFolder();
  RunFolder(const RunFolder&) = delete;
  RunFolder& operator=(const RunFolder&) = delete;

  // Writes the newest slot; returns its bytes. Allocates nothing, unless it throws Error: earlier saves are then kept.
  std::uint64_t save(const Network& network, std::string_view header);

  // Keeps what the newest slot holds as the best state, too: a link, or a copy where there are no links. Returns the bytes that
  // were written. Throws Error; the best state before is then kept.
  std::uint64_t keep_best() const;

  const FolderFiles& files() const { return *files_; }
  // Whether it is the folder that was opened.
  bool is_source() const { return is_source_; }

 private:
  bool holds_run(const Json& ours, const Network& network);
  void end_save(const Manifest& manifest) const;
  void check_nothing_is_lost(const Manifest& manifest) const;
  void copy(const Files& source, const ListedFile& listed) const;

  std::string path_, shown_;
  std::vector<std::string> made_;  // folders that were missing, outermost first
  std::unique_ptr<FolderFiles> files_;
  std::unique_ptr<FolderLock> lock_;
  bool is_source_ = false;
  std::string manifest_;  // to be written with the next save; empty once it is there
};

}  // namespace edge_bcs
