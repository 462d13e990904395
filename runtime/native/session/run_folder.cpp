#include "session/run_folder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>

namespace edge_bcs {

namespace {

constexpr const char* manifest_partial = "manifest.json.partial";
constexpr std::size_t piece = std::size_t{1} << 16;

// A system call was refused; `errno` says why.
class Refused : public std::system_error {
 public:
  Refused() : std::system_error(errno, std::generic_category()) {}
};

void expect(bool done) {
  if (!done) throw Refused();
}

// Renames `partial` to `name`, and what had that name to `previous`; null if it goes nowhere.
void put(int folder, const char* partial, const char* name, const char* previous) {
  if (previous != nullptr && ::renameat(folder, name, folder, previous) != 0) expect(errno == ENOENT);
  expect(::renameat(folder, partial, folder, name) == 0);
}

// A file that takes the place of another when it is whole and on the medium, else is removed.
class Replacement {
 public:
  Replacement(int folder, const char* partial)
      : folder_(folder),
        partial_(partial),
        file_(::openat(folder, partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666)) {
    expect(static_cast<bool>(file_));
  }
  ~Replacement() {
    if (!done_) ::unlinkat(folder_, partial_, 0);
  }
  Replacement(const Replacement&) = delete;
  Replacement& operator=(const Replacement&) = delete;

  void write(std::span<const std::byte> bytes) const {
    while (!bytes.empty()) {
      const ssize_t count = ::write(file_.number(), bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) continue;
      expect(count >= 0);
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
  }

  // `previous`: where what is replaced goes; null if it goes nowhere.
  void finish(const char* name, const char* previous = nullptr) {
    expect(::fsync(file_.number()) == 0);
    put(folder_, partial_, name, previous);
    done_ = true;
  }

 private:
  int folder_;
  const char* partial_;
  Descriptor file_;
  bool done_ = false;
};

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

bool is_compiled(std::string_view name) { return name.ends_with("_model.onnx") || name == "program.bin"; }

// Name of the first field of `one` that `other` has not, or has otherwise; `skipped` are not looked at.
const std::string* differing(const Json& one, const Json& other) {
  for (std::size_t i = 0; i < one.names().size(); ++i) {
    const std::string& name = one.names()[i];
    if (name == "created_by" || name == "classes" || name == "files" || name == "attack_precision") continue;
    const Json* const counterpart = other.find(name);
    if (counterpart == nullptr || !same(one.items()[i], *counterpart)) return &name;
  }
  return nullptr;
}

// What stands in a text in the place of [begin, end).
struct Change {
  std::size_t begin, end;
  std::string text;
};

std::string listed_files(const std::string& text, const Json& files) {
  Text listed(2 * (files.end() - files.begin()) + 64);
  for (std::size_t i = 0; i < files.names().size(); ++i) {
    if (!is_compiled(files.names()[i])) continue;
    listed.add(listed.view().empty() ? "{\n  " : ",\n  ");
    listed.add_quoted(files.names()[i]);
    listed.add(": ");
    listed.add(std::string_view(text).substr(files.items()[i].begin(),
                                             files.items()[i].end() - files.items()[i].begin()));
  }
  listed.add("\n }");
  return std::string(listed.view());
}

std::string list_of(const std::vector<std::string>& names) {
  std::size_t length = 64;
  for (const std::string& name : names) length += 6 * name.size() + 8;
  Text classes(length);
  for (const std::string& name : names) {
    classes.add(classes.view().empty() ? "[" : ", ");
    classes.add_quoted(name);
  }
  classes.add("]");
  return std::string(classes.view());
}

// The manifest of a run: the artifact's, which lists no state, with the names that the classes got, and what attacks are in.
std::string run_manifest(const std::string& text, const Json& content, const Network& network) {
  const Json& files = *content.find("files");
  std::vector<Change> changes{{files.begin(), files.end(), listed_files(text, files)}};
  const std::vector<std::string>& classes = network.manifest().classes;
  const Json* const named = content.find("classes");
  if (!classes.empty() && named == nullptr)
    changes.push_back(
        {content.begin() + 1, content.begin() + 1, "\n \"classes\": " + list_of(classes) + ","});
  else if (!classes.empty())
    changes.push_back({named->begin(), named->end(), list_of(classes)});
  if (const Json* const precision = content.find("attack_precision"); precision != nullptr)
    changes.push_back({precision->begin(), precision->end(), network.half() ? "\"half\"" : "\"f32\""});
  std::ranges::sort(changes, std::ranges::greater(), &Change::begin);
  std::string made = text;
  for (const Change& change : changes) made.replace(change.begin, change.end - change.begin, change.text);
  return made;
}

// Folders above `path`, and itself, that are not there, outermost first.
std::vector<std::string> missing_folders(std::string path) {
  std::vector<std::string> missing;
  struct stat status{};
  while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  while (!path.empty() && stat(path.c_str(), &status) != 0) {
    missing.insert(missing.begin(), path);
    while (!path.empty() && !path.ends_with('/')) path.pop_back();
    while (path.size() > 1 && path.ends_with('/')) path.pop_back();
  }
  return missing;
}

bool is_same_folder(int one, int other) {
  struct stat first{}, second{};
  return ::fstat(one, &first) == 0 && ::fstat(other, &second) == 0 && first.st_dev == second.st_dev &&
         first.st_ino == second.st_ino;
}

}  // namespace

std::unique_ptr<StoredState> StoredState::read(const Files& files, const char* name,
                                               const Manifest& manifest) {
  try {
    const std::unique_ptr<Source> source = files.open(name);
    if (source == nullptr) return nullptr;
    auto stored = std::make_unique<StoredState>();
    stored->header = StateHeader::read(*source, manifest);
    stored->content = read_all(*source, source->size());
    const auto counts = state_counts(manifest);
    for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
      stored->tensors[tensor] = bytes_of(stored->content)
                                    .subspan(static_cast<std::size_t>(stored->header.offsets[tensor]),
                                             counts[tensor] * sizeof(float));
    check_sum(stored->header, stored->tensors);
    check_state(stored->tensors, manifest);
    return stored;
  } catch (const Error&) {
    return nullptr;
  }
}

std::unique_ptr<StoredState> StoredState::newest(const Files& files, const Manifest& manifest) {
  for (const char* const name : {partial_file, state_file, previous_file})
    if (auto stored = read(files, name, manifest)) return stored;
  return nullptr;
}

RunFolder::RunFolder(std::string path, const Files& source, const Network& network, std::uint64_t opened_at)
    : path_(std::move(path)), shown_(shown(path_, 4096)), made_(missing_folders(path_)) {
  const Json ours = Json::parse(network.manifest_text());
  try {
    for (const std::string& folder : made_)
      require(::mkdir(folder.c_str(), 0777) == 0 || errno == EEXIST, shown_,
              " cannot be made: ", cause_of(errno));
    struct stat there{};
    require(::stat(path_.c_str(), &there) != 0 || S_ISDIR(there.st_mode), shown_,
            " is a file; choose a folder for the run");
    files_ = std::make_unique<FolderFiles>(path_);
    const bool run = holds_run(ours, network);
    if (!run) check_nothing_is_lost(network.manifest());
    lock_ = std::make_unique<FolderLock>(files_->folder(), shown_);
    is_source_ = run && is_same_folder(files_->folder(), source.folder());
    if (is_source_) {
      const std::unique_ptr<StoredState> saved = StoredState::newest(*files_, network.manifest());
      const std::uint64_t step = saved == nullptr ? 0 : saved->header.step;
      require(
          step <= opened_at, shown_, " is at step ", step, " and was at ", opened_at,
          " when it was opened here: another process trained on; open it again, or save to another folder");
    }
    if (run) {
      end_save(network.manifest());
      return;
    }
    for (const ListedFile& listed : network.manifest().files)
      if (is_compiled(listed.name)) copy(source, listed);
    manifest_ = run_manifest(network.manifest_text(), ours, network);
  } catch (...) {
    lock_.reset();
    for (auto folder = made_.rbegin(); folder != made_.rend(); ++folder) ::rmdir(folder->c_str());
    throw;
  }
}

// What was made and stayed empty goes again.
RunFolder::~RunFolder() {
  lock_.reset();
  for (auto folder = made_.rbegin(); folder != made_.rend(); ++folder)
    if (::rmdir(folder->c_str()) != 0) break;
}

// Whether a run of this artifact lies there; false if nothing does. A run whose classes have no names gets ours,
// and says from the next save on what attacks are in.
bool RunFolder::holds_run(const Json& ours, const Network& network) {
  const std::unique_ptr<Source> source = files_->open(manifest_file);
  if (source == nullptr) return false;
  std::string text;
  Json theirs;
  Manifest found;
  try {
    text = read_all(*source, largest_manifest);
    theirs = Json::parse(text);
    found = Manifest::read(theirs);
  } catch (const Error& error) {
    fail(shown_, "/", manifest_file, ": ", error.what(), "; choose another output folder");
  }
  require(found.file(state_file) == nullptr, shown_,
          " is an exported artifact, which stays as it is; choose another output folder");
  const std::string* field = differing(ours, theirs);
  if (field == nullptr) field = differing(theirs, ours);
  require(field == nullptr, shown_, " holds a run of another artifact: its ",
          field == nullptr ? std::string() : shown(*field),
          " is not this artifact's; choose another output folder");
  for (const ListedFile& listed : network.manifest().files) {
    if (!is_compiled(listed.name)) continue;
    const ListedFile* const counterpart = found.file(listed.name);
    require(counterpart != nullptr && counterpart->sha256 == listed.sha256, shown_,
            " holds a run of another artifact: its ", listed.name,
            " is another; choose another output folder");
  }
  const auto& classes = network.manifest().classes;
  require(found.classes.empty() || classes.empty() || may_become(found.classes, classes), shown_,
          " holds a run with other classes; choose another folder for the run");
  const Json* const precision = theirs.find("attack_precision");
  if ((found.classes != classes && !classes.empty()) ||
      (precision != nullptr && precision->text() != (network.half() ? "half" : "f32")))
    manifest_ = run_manifest(text, theirs, network);
  return true;
}

// A save that was cut may have written its file whole, which is then the newest, and the next save would overwrite it.
void RunFolder::end_save(const Manifest& manifest) const {
  if (StoredState::read(*files_, partial_file, manifest) == nullptr) return;
  try {
    put(files_->folder(), partial_file, state_file, previous_file);
  } catch (const Refused& refused) {
    fail(shown_, " cannot be written: ", cause_of(refused.code().value()));
  }
}

void RunFolder::check_nothing_is_lost(const Manifest& manifest) const {
  const auto lies_there = [&](const char* name) {
    struct stat found{};
    return ::fstatat(files_->folder(), name, &found, AT_SYMLINK_NOFOLLOW) == 0;
  };
  const auto refuse = [&](std::string_view name) {
    fail(shown_, " holds no run, but a ", std::string(name),
         " that the run would replace; choose another folder for the run");
  };
  for (const char* const name : {state_file, previous_file})
    if (lies_there(name)) refuse(name);
  for (const ListedFile& listed : manifest.files) {
    if (!is_compiled(listed.name) || !lies_there(listed.name.c_str())) continue;
    // It is there if a power cut interrupted the making of the run.
    const std::unique_ptr<Source> source = files_->open(listed.name);
    if (source == nullptr || source->size() != listed.bytes) refuse(listed.name);
    Sha256 digest;
    digest.add(read_all(*source, listed.bytes));
    if (view(digest.finish()) != listed.sha256) refuse(listed.name);
  }
}

void RunFolder::copy(const Files& source, const ListedFile& listed) const {
  const std::unique_ptr<Source> from = source.open(listed.name);
  require(from != nullptr && from->size() == listed.bytes, source.shown_name(listed.name),
          " was altered while it was in use; copy the artifact again");
  const std::string partial = listed.name + ".partial";
  try {
    Replacement made(files_->folder(), partial.c_str());
    Sha256 digest;
    std::vector<std::byte> part(piece);
    for (std::uint64_t at = 0; at < listed.bytes; at += part.size()) {
      part.resize(static_cast<std::size_t>(std::min<std::uint64_t>(piece, listed.bytes - at)));
      from->read(at, part);
      digest.add(part);
      made.write(part);
    }
    require(view(digest.finish()) == listed.sha256, source.shown_name(listed.name),
            " was altered while it was in use; copy the artifact again");
    made.finish(listed.name.c_str());
  } catch (const Refused& refused) {
    fail(shown_, " cannot be written: ", cause_of(refused.code().value()));
  }
}

std::uint64_t RunFolder::keep_best() const {
  constexpr const char* partial = "state.best.safetensors.partial";
  const int folder = files_->folder();
  std::uint64_t written = 0;
  try {
    expect(::unlinkat(folder, partial, 0) == 0 || errno == ENOENT);
    // Slots are replaced, and never written to.
    if (::linkat(folder, state_file, folder, partial, 0) != 0 ||
        ::renameat(folder, partial, folder, best_file) != 0) {
      const std::unique_ptr<Source> newest = files_->open(state_file);
      require(newest != nullptr, shown_, "/", state_file, " is gone");
      Replacement copy(folder, partial);
      std::array<std::byte, 4096> part;
      for (std::uint64_t size = newest->size(); written < size;) {
        const auto bytes = std::span(part).first(
            static_cast<std::size_t>(std::min<std::uint64_t>(part.size(), size - written)));
        newest->read(written, bytes);
        copy.write(bytes);
        written += bytes.size();
      }
      copy.finish(best_file);
    }
    expect(::fsync(folder) == 0);
  } catch (const Refused& refused) {
    fail("the best state could not be kept in ", shown_, ": ", cause_of(refused.code().value()));
  }
  return written;
}

std::uint64_t RunFolder::save(const Network& network, std::string_view header) {
  const StateBytes state = network.buffers().state_bytes();
  try {
    check_state(state, network.manifest());
  } catch (const Error& error) {
    fail_with<NotFinite>("the state was not saved to ", shown_, ": ", error.what(),
                         "; earlier saves are kept");
  }
  const int folder = files_->folder();
  try {
    if (!manifest_.empty()) {
      Replacement made(folder, manifest_partial);
      made.write(bytes_of(manifest_));
      made.finish(manifest_file);
      expect(::fsync(folder) == 0);
      manifest_.clear();
      made_.clear();
    }
    Replacement made(folder, partial_file);
    const std::uint64_t bytes =
        write_parts(header, state, [&](std::span<const std::byte> part) { made.write(part); });
    made.finish(state_file, previous_file);
    expect(::fsync(folder) == 0);
    return bytes;
  } catch (const Refused& refused) {
    fail("the state could not be saved to ", shown_, ": ", cause_of(refused.code().value()),
         "; earlier saves are kept");
  }
}

}  // namespace edge_bcs
