// In the place of session/archive_files.cpp, folder_files.cpp, lock.cpp and run_folder.cpp where there are no files: who asks for a
// folder gets a sentence.
#include "ops/op.h"
#include "session/archive_files.h"
#include "session/run_folder.h"

namespace edge_bcs {

namespace {

[[noreturn]] void refuse() {
  fail(
      "there are no files here: open a network by edge_bcs_open_files, and keep its state by "
      "edge_bcs_state_stream");
}

}  // namespace

void Descriptor::close() {}

FolderFiles::FolderFiles(std::string) { refuse(); }

std::unique_ptr<Source> FolderFiles::open(const std::string&) const { refuse(); }

std::string FolderFiles::shown_name(const std::string& name) const { return name; }

std::unique_ptr<Files> open_files(const std::string&) { refuse(); }

FolderLock::~FolderLock() = default;

RunFolder::RunFolder(std::string, const Files&, const Network&, std::uint64_t) { refuse(); }

RunFolder::~RunFolder() = default;

std::uint64_t RunFolder::save(const Network&, std::string_view) { refuse(); }

std::uint64_t RunFolder::keep_best() const { refuse(); }

}  // namespace edge_bcs
