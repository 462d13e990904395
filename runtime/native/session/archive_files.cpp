#include "session/archive_files.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <string_view>

#include "ops/op.h"
#include "session/json.h"
#include "session/manifest.h"
#include "session/tar_header.h"

namespace edge_bcs {

namespace {

constexpr std::uint64_t largest = std::uint64_t{8} << 30;
constexpr std::size_t most_members = 64, longest_path = 4096;
constexpr std::string_view suffix = ".tar";

// A part of an archive as a file of its own.
class PartSource final : public Source {
 public:
  PartSource(const Source& archive, std::uint64_t offset, std::uint64_t size)
      : archive_(archive), offset_(offset), size_(size) {}
  std::uint64_t size() const override { return size_; }
  void read(std::uint64_t offset, std::span<std::byte> into) const override {
    require(offset <= size_ && into.size() <= size_ - offset, "it ends too early");
    archive_.read(offset_ + offset, into);
  }

 private:
  const Source& archive_;
  std::uint64_t offset_, size_;
};

const char* named(char kind) {
  switch (kind) {
    case '1':
      return "a hard link";
    case '2':
      return "a symbolic link";
    case '3':
    case '4':
      return "a device";
    case '6':
      return "a pipe";
    case 'S':
      return "a sparse file";
    case 'x':
    case 'g':
    case 'L':
    case 'K':
      return "an extended header";
    default:
      return "something unknown";
  }
}

bool is_archive(const std::string& path) {
  std::string end = path.substr(path.size() - std::min(path.size(), suffix.size()));
  for (char& letter : end)
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter + 32);
  struct stat status{};
  return end == suffix && ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

}  // namespace

ArchiveFiles::ArchiveFiles(const std::string& path) : shown_(shown(path, longest_path)) {
  try {
    archive_ = open_file(AT_FDCWD, path);
    require(archive_ != nullptr, "it is gone");
  } catch (const Error& error) {
    fail("the archive ", shown_, ": ", error.what());
  }
  require(archive_->size() <= largest, shown_, " is larger than 8 GiB, so it is not an archived artifact");
  list();
  check_declared();
}

void ArchiveFiles::list() {
  const std::uint64_t end = archive_->size();
  std::uint64_t at = 0;
  for (std::size_t count = 0;; ++count) {
    require(end - at >= TarHeader::bytes, shown_, " is truncated or not a tar archive; copy it again");
    const TarHeader header(*archive_, at);
    if (header.is_blank()) return;
    require(count < 2 * most_members, shown_, " holds more than ", most_members,
            " files, so it is not an artifact");
    require(header.is_intact() && header.is_ustar(), shown_,
            " is damaged or not a tar archive; copy it again");
    const char kind = header.kind() == '\0' ? '0' : header.kind();
    require(kind == '0' || kind == '5', shown_, " holds ", named(kind),
            ", which an artifact does not have; pack it with `edge-bcs export --archive` or `tar "
            "--format=ustar`");
    at += TarHeader::bytes;
    const std::optional<std::uint64_t> size = header.plain_size();
    require(size && *size <= end - at && tar_padded(*size) <= end - at, shown_,
            " is truncated: a file in it goes beyond its end; copy it again");
    const std::string name = header.name();
    require(is_utf8(name), shown_, " holds a name that is not UTF-8");
    add(kind, name, at, *size);
    at += tar_padded(*size);
  }
}

void ArchiveFiles::add(char kind, const std::string& name, std::uint64_t offset, std::uint64_t size) {
  const bool is_folder = kind == '5';
  const std::string told = "'" + shown(name) + "'";
  std::string_view whole = name;
  while (is_folder && whole.ends_with('/')) whole.remove_suffix(1);
  const std::size_t mark = whole.find('/');
  const std::string_view folder = whole.substr(0, mark), file = mark != whole.npos ? whole.substr(mark + 1)
                                                                : is_folder        ? "."
                                                                                   : "";
  const auto lies_deeper = [](std::string_view part) { return part.find_first_of("/\\") != part.npos; };
  require(!folder.empty() && folder != "." && folder != ".." && !file.empty() && file != ".." &&
              !lies_deeper(folder) && !lies_deeper(file) && (top_.empty() || folder == top_),
          shown_, " holds ", told, ", which does not lie in the one folder of an artifact");
  top_ = folder;
  if (is_folder) {
    require(file == "." && size == 0, shown_, " holds the folder ", told,
            "; an artifact is one folder of files");
    return;
  }
  require(find(file) == nullptr, shown_, " holds ", told, " twice");
  require(members_.size() < most_members, shown_, " holds more than ", most_members,
          " files, so it is not an artifact");
  members_.push_back({std::string(file), offset, size});
}

// That the files are the manifest, its signature, and what it lists.
void ArchiveFiles::check_declared() const {
  const Member* const manifest = find(manifest_file);
  require(manifest != nullptr, shown_, " holds no ", manifest_file, ", so it is not an archived artifact");
  require(manifest->size <= largest_manifest, "the manifest in ", shown_,
          " is larger than 16 MiB, so it is not one of edge-bcs");
  Json content;
  const Json* files = nullptr;
  try {
    content = Json::parse(read_all(*open(manifest_file), largest_manifest));
    files = content.find("files");
    require(files != nullptr && files->kind() == Json::Kind::object, "it lists no files");
  } catch (const Error&) {
    fail("the manifest in ", shown_, " is damaged; copy the archive again");
  }
  for (const Member& member : members_) {
    if (member.name == manifest_file) continue;
    const Json* const entry = files->find(member.name);
    const Json* const bytes = entry == nullptr ? nullptr : entry->find("bytes");
    const bool is_signature = member.name == signature_file;
    require(is_signature || entry != nullptr, shown_, " holds '", shown(member.name),
            "', which its manifest does not list");
    require(
        is_signature ? member.size <= largest_signature : bytes != nullptr && bytes->whole() == member.size,
        "'", shown(member.name), "' in ", shown_, " has ", member.size, " bytes, not what its manifest says");
  }
  for (const std::string& name : files->names())
    require(find(name) != nullptr, shown_, " lacks '", shown(name), "'; copy or export the artifact again");
}

const ArchiveFiles::Member* ArchiveFiles::find(std::string_view name) const {
  const auto found = std::ranges::find(members_, name, &Member::name);
  return found == members_.end() ? nullptr : &*found;
}

std::unique_ptr<Source> ArchiveFiles::open(const std::string& name) const {
  const Member* const member = find(name);
  if (member == nullptr) return nullptr;
  return std::make_unique<PartSource>(*archive_, member->offset, member->size);
}

std::unique_ptr<Files> open_files(const std::string& path) {
  if (is_archive(path)) return std::make_unique<ArchiveFiles>(path);
  return std::make_unique<FolderFiles>(path);
}

}  // namespace edge_bcs
