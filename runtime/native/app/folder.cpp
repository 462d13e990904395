// Image files in class folders, on disk or in a plain tar: edge_bcs/data/listing.py and images.py.

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string_view>

#include "app/archive.h"
#include "app/data.h"
#include "app/paths.h"
#include "app/progress.h"
#include "app/tar.h"
#include "app/text.h"
#include "session/files.h"
#include "session/json.h"
#include "session/sha256.h"

namespace edge_bcs::app {

namespace {

constexpr std::array<std::string_view, 2> train_names{"train", "training"};
constexpr std::array<std::string_view, 4> test_names{"test", "val", "valid", "validation"};
constexpr std::size_t most_bad = 20;

// "train", "test" or "".
std::string split_of(std::string_view folder) {
  const std::string low = lowered(folder);
  if (std::ranges::find(train_names, low) != train_names.end()) return "train";
  return std::ranges::find(test_names, low) != test_names.end() ? "test" : "";
}

// Why a link is not followed, or "": one that leads out of the data's folder may, in a copy of that folder from elsewhere,
// name any file of this machine.
std::string why_no_link(const std::string& link, const std::string& root) {
  const std::string target = resolved(link);
  if (target.empty()) return plain(link) + " is a link to nothing, or in a circle: remove it.";
  if (target == root || target.starts_with(root == "/" ? root : root + "/")) return {};
  return plain(link) + " is a link out of " + plain(root) + ", which is refused: copy what it names into it.";
}

std::string why_unusable(const std::string& file, const std::string& root) {
  if (is_link(file))
    if (std::string why = why_no_link(file, root); !why.empty()) return why;
  if (!is_file(file)) return plain(file) + " is not a file, which is refused among images.";
  return {};
}

std::vector<std::string> folders_in(const std::string& parent, const std::string& root) {
  std::vector<std::string> found;
  for (const std::string& name : names_in(parent)) {
    if (name.starts_with('.')) continue;
    const std::string path = joined(parent, name);
    if (is_link(path)) {
      const std::string why = why_no_link(path, root);
      // A link to nothing, or in a circle, may have been to a class folder.
      require(why.empty() || !(is_folder(path) || resolved(path).empty()), why);
    }
    if (is_folder(path)) found.push_back(path);
  }
  return found;
}

// The first folder with images below `path`; "" if there is none.
std::string images_within(const std::string& path) {
  std::vector<std::string> left{path};
  while (!left.empty()) {
    const std::string folder = left.back();
    left.pop_back();
    if (last_part(folder).starts_with('.') || is_link(folder) || !is_folder(folder)) continue;
    for (const std::string& name : names_in(folder)) {
      const std::string inner = joined(folder, name);
      if (is_image(name) && is_file(inner)) return folder;
      left.push_back(inner);
    }
  }
  return {};
}

struct Tar {
  std::string path;
  FileSource file{path};
};

// What is kept of an image for as long as the data is open.
struct ImageFile {
  std::string name;
  std::shared_ptr<const Tar> tar = nullptr;  // that it lies in; null: a file of its own
  std::uint64_t offset = 0, size = 0;        // there
};

struct Entry : ImageFile {
  std::string split, class_name, why;
};

// The entry of an image's path (…/[split/]class/file.jpg); nothing if it is no image in a class folder. What is hidden is
// none, nor is a class folder that is. In a tar, which may come from Windows, a backslash separates, too; on disk it is
// part of a name.
std::optional<Entry> entry_of(std::string path, bool in_tar) {
  if (in_tar) std::ranges::replace(path, '\\', '/');
  const std::size_t end = path.rfind('/');
  if (end == std::string::npos || !is_image(std::string_view(path).substr(end + 1))) return {};
  const std::string above = path.substr(0, end), class_name = last_part(above);
  if (class_name.starts_with('.')) return {};
  const bool nested = class_name.size() != above.size();
  const std::string parent = nested ? last_part(above.substr(0, above.size() - class_name.size() - 1)) : "";
  return Entry{{path}, split_of(parent), class_name, {}};
}

// Without "." and empty parts, as posixpath.normpath has it where nothing goes up.
std::vector<std::string> parts_of(std::string_view path) {
  std::vector<std::string> parts;
  while (!path.empty()) {
    const std::size_t end = std::min(path.find('/'), path.size());
    const std::string_view part = path.substr(0, end);
    if (!part.empty() && part != ".") parts.emplace_back(part);
    path.remove_prefix(std::min(end + 1, path.size()));
  }
  return parts;
}

// The folder in which class folders lie, without that of a split.
std::vector<std::string> around(std::vector<std::string> class_folder) {
  class_folder.pop_back();
  if (!class_folder.empty() && !split_of(class_folder.back()).empty()) class_folder.pop_back();
  return class_folder;
}

std::string joined_parts(std::span<const std::string> parts) {
  std::string path;
  for (const std::string& part : parts) path += (path.empty() ? "" : "/") + part;
  return path;
}

// The folders of a tar that hold images are classes, so all must lie side by side, as in a folder.
void check_side_by_side(const std::vector<std::string>& first, const std::vector<std::string>& folder,
                        const std::string& tar) {
  if (around(first) == around(folder)) return;
  const bool other_way = around(first).size() < around(folder).size();
  const std::vector<std::string>&inner = other_way ? folder : first, &other = other_way ? first : folder;
  std::size_t outer = 1;
  while (outer < std::min(inner.size(), other.size()) && inner[outer - 1] == other[outer - 1]) ++outer;
  while (outer < inner.size() - 1 && !split_of(inner[outer - 1]).empty()) ++outer;
  fail(plain(tar), " has images in ", plain(joined_parts(inner)), ", a folder inside the class folder ",
       plain(joined_parts(std::span(inner).first(outer))), ": move the images of one class into one folder.");
}

// The images of a plain tar; `split`: of all of them, or "".
void add_entries_of(const std::string& tar, const std::string& split, std::vector<Entry>& entries) {
  std::shared_ptr<const Tar> opened;
  std::vector<TarMember> members;
  try {
    opened = std::make_shared<const Tar>(tar);
    members = members_of(opened->file);
  } catch (const Error& error) {
    fail("the data ", plain(tar), " cannot be used: ", error.what(), ".");
  }
  std::set<std::string> seen;
  std::optional<std::vector<std::string>> first;
  for (const TarMember& member : members) {
    std::optional<Entry> entry = entry_of(member.name, true);
    if (!entry) continue;
    require(is_utf8(entry->class_name), "the name of the class folder ", plain(entry->class_name),
            " is not UTF-8: rename it.");
    const std::string folder = entry->name.substr(0, entry->name.rfind('/'));
    if (seen.insert(folder).second) {
      const std::vector<std::string> parts = parts_of(folder);
      if (!first) first = parts;
      check_side_by_side(*first, parts, tar);
    }
    if (!split.empty()) entry->split = split;
    entry->name = member.name;
    entry->tar = opened, entry->offset = member.offset, entry->size = member.size;
    entries.push_back(std::move(*entry));
  }
}

std::vector<Entry> entries_of(const std::string& folder) {
  const std::string root = resolved(folder);
  std::vector<std::string> parents;
  for (const std::string& path : folders_in(folder, root))
    if (!split_of(last_part(path)).empty()) parents.push_back(path);
  const bool split = !parents.empty();
  if (!split) parents.push_back(folder);
  std::vector<Entry> entries;
  for (const std::string& parent : parents)
    for (const std::string& class_folder : folders_in(parent, root)) {
      const std::string class_name = last_part(class_folder);
      require(is_utf8(class_name), "the name of the class folder ", plain(class_name),
              " is not UTF-8: rename it.");
      bool found = false;
      std::string inner;
      for (const std::string& file : names_in(class_folder)) {
        const std::string path = joined(class_folder, file);
        if (is_image(file)) {
          found = true;
          const std::string name = class_name + "/" + file;
          entries.push_back({{split ? last_part(parent) + "/" + name : name},
                             split ? split_of(last_part(parent)) : "",
                             class_name,
                             why_unusable(path, root)});
        } else if (inner.empty()) {
          inner = images_within(path);
        }
      }
      require(inner.empty(), plain(folder), " has images in ", plain(inner),
              ", a folder inside the class folder ", plain(class_folder),
              ": move the images of one class into one folder.");
      require(found, "the class folder ", plain(class_folder), " holds no image (.jpg, .jpeg, .png, …).");
    }
  return entries;
}

class FolderData final : public Data {
 public:
  // `flat`: no class folders, and so no labels.
  FolderData(const std::string& folder, std::vector<Entry> found, const std::string& split,
             const Opening& opening, bool flat = false)
      : folder_(folder), opening_(opening), flat_(flat) {
    shape = opening.shape;
    named = true;
    require(shape.channels == 1 || shape.channels == 3,
            "image files have 1 or 3 channels; the network takes ", shape.channels, ".");
    pixels_.resize(shape.size());
    require(!found.empty(), plain(folder), " holds no images in class folders (expected …/class/image.jpg).");
    add_known_and_gone(found);
    std::ranges::sort(found, [](const Entry& one, const Entry& other) {
      return one.class_name != other.class_name ? before(one.class_name, other.class_name)
                                                : before(one.name, other.name);
    });
    std::vector<std::int32_t> all_labels;
    for (const Entry& entry : found) {
      if (classes.empty() || classes.back() != entry.class_name) classes.push_back(entry.class_name);
      all_labels.push_back(static_cast<std::int32_t>(classes.size() - 1));
    }
    choose(found, all_labels, split);
    if (opening.keeps_all_files) all_files_.assign(found.begin(), found.end());
    require(!labels.empty(), plain(folder), " holds no ", split, " images.");
  }

  std::string name_of(std::size_t position) const override { return files_[position].name; }

  std::map<std::size_t, std::string> found_in(const FolderData& others) const {
    std::vector<std::int64_t> sizes;
    for (const ImageFile& file : files_) sizes.push_back(size_of(file));
    const std::set<std::int64_t> wanted(sizes.begin(), sizes.end());
    std::set<std::int64_t> found;
    std::map<std::string, std::string> names;
    for (const ImageFile& file : others.all_files_) {
      const std::int64_t size = others.size_of(file);
      if (!wanted.contains(size)) continue;
      found.insert(size);
      if (const std::string digest = others.digest_of(file); !digest.empty()) names[digest] = file.name;
    }
    std::map<std::size_t, std::string> twins;
    for (std::size_t place = 0; place < files_.size(); ++place) {
      if (!found.contains(sizes[place])) continue;
      const auto twin = names.find(digest_of(files_[place]));
      if (twin != names.end()) twins.emplace(place, twin->second);
    }
    return twins;
  }

  void image(std::size_t position, std::span<float> into) override {
    try {
      decode_file_of(files_[position]);
    } catch (const BadImage& bad) {
      fail(sentence(files_[position], bad),
           " It could be used when this data was opened: put it back as it was.");
    }
    std::ranges::transform(pixels_, into.begin(),
                           [](std::uint8_t value) { return static_cast<float>(value) / 255.0f; });
  }

 private:
  // Images that the training left out and that were removed since: they keep their places in the order, so that every other
  // image keeps its own.
  void add_known_and_gone(std::vector<Entry>& found) const {
    std::set<std::string> names;
    for (const Entry& entry : found) names.insert(entry.name);
    const bool in_tar = found.front().tar != nullptr;
    for (const auto& [name, why] : opening_.handling.known) {
      if (names.contains(name)) continue;
      std::optional<Entry> entry = flat_ ? Entry{{name}, "train", "", {}} : entry_of(name, in_tar);
      if (!entry) continue;
      entry->name = name, entry->why = why;
      found.push_back(std::move(*entry));
    }
  }

  void choose(const std::vector<Entry>& found, const std::vector<std::int32_t>& all_labels,
              const std::string& split) {
    const Handling& handling = opening_.handling;
    const bool told = std::ranges::any_of(found, [](const Entry& entry) { return !entry.split.empty(); });
    const std::vector<bool> held = held_out(all_labels);
    std::vector<LeftOut> bad, elsewhere;
    Progress progress("looking at " + plain(folder_), 0, "images");
    for (std::size_t i = 0; i < found.size(); ++i) {
      const Entry& entry = found[i];
      const bool is_test = told ? entry.split == "test" : held[i];
      if (is_test != (split == "test")) {
        if (!entry.why.empty()) elsewhere.push_back({entry.name, entry.why});
        continue;
      }
      if (bad.size() >= most_bad && !handling.skip) break;
      handling.watch();
      progress.update(i);
      if (const std::string why = why_not(entry); !why.empty()) {
        bad.push_back({entry.name, why});
        continue;
      }
      files_.push_back(entry);
      labels.push_back(all_labels[i]);
    }
    // What can be seen without opening it stops the reading in whichever split it is.
    std::vector<LeftOut> stopping = bad;
    if (!handling.skip && !handling.strict)
      stopping.insert(stopping.end(), elsewhere.begin(), elsewhere.end());
    left_out = handling.settle(std::move(stopping), plain(folder_));
  }

  std::string why_not(const Entry& entry) {
    const auto known = opening_.handling.known.find(entry.name);
    if (known != opening_.handling.known.end()) return known->second;
    if (!entry.why.empty()) return entry.why;
    try {
      decode_file_of(entry);
    } catch (const BadImage& bad) {
      return sentence(entry, bad);
    }
    return {};
  }

  void decode_file_of(const ImageFile& file) {
    if (file.tar == nullptr) return decode_file(joined(folder_, file.name), opening_, pixels_);
    decode(file.tar->file.descriptor(), file.offset, file.size, opening_.shape, opening_.crop,
           opening_.workspace, pixels_);
  }

  std::string sentence(const ImageFile& file, const BadImage& bad) const {
    const std::string name = file.tar == nullptr ? plain(joined(folder_, file.name))
                                                 : plain(file.name) + " in " + plain(file.tar->path);
    return "the image " + name + " " + bad.what() + ".";
  }

  // Bytes of an image's file; -1 if there is none.
  std::int64_t size_of(const ImageFile& file) const {
    if (file.tar != nullptr) return static_cast<std::int64_t>(file.size);
    struct stat status{};
    return stat(joined(folder_, file.name).c_str(), &status) == 0 ? status.st_size : -1;
  }

  // The sha256 of it; empty if it cannot be read.
  std::string digest_of(const ImageFile& file) const {
    try {
      const auto own =
          file.tar != nullptr ? nullptr : std::make_unique<const FileSource>(joined(folder_, file.name));
      const FileSource& source = own != nullptr ? *own : file.tar->file;
      Sha256 digest;
      std::array<std::byte, 1 << 14> part;
      std::uint64_t left = own != nullptr ? source.size() : file.size, at = file.offset;
      while (left > 0) {
        const auto bytes =
            std::span(part).first(static_cast<std::size_t>(std::min<std::uint64_t>(part.size(), left)));
        source.read(at, bytes);
        digest.add(bytes);
        at += bytes.size(), left -= bytes.size();
      }
      return std::string(view(digest.finish()));
    } catch (const Error&) {
      return {};
    }
  }

  std::string folder_;
  Opening opening_;
  bool flat_;
  std::vector<ImageFile> files_;
  std::vector<ImageFile> all_files_;  // of every split, usable or not; none unless they are kept
  std::vector<std::uint8_t> pixels_;
};

}  // namespace

std::unique_ptr<Data> open_photographs(const std::string& folder, const Opening& opening) {
  require(is_folder(folder), plain(folder), exists(folder) ? " is a file" : " does not exist",
          "; unlabelled images are a folder of photographs, in folders of any depth.");
  const std::string root = resolved(folder);
  std::vector<Entry> entries;
  for (const std::string& image : images_below(folder))
    entries.push_back({{image}, "train", "", why_unusable(joined(folder, image), root)});
  require(!entries.empty(), "the folder ", plain(folder), " holds no image (.jpg, .jpeg, .png, …).");
  return std::make_unique<FolderData>(folder, std::move(entries), "train", opening, true);
}

std::map<std::size_t, std::string> repeated(const Data& data, const Data& others) {
  const auto* const one = dynamic_cast<const FolderData*>(&data);
  const auto* const other = dynamic_cast<const FolderData*>(&others);
  return one == nullptr || other == nullptr ? std::map<std::size_t, std::string>{} : one->found_in(*other);
}

std::unique_ptr<Data> open_folder(const std::string& folder, const std::string& split,
                                  const Opening& opening) {
  return std::make_unique<FolderData>(folder, entries_of(folder), split, opening);
}

std::unique_ptr<Data> open_tar(const std::string& file, const std::string& other, const std::string& split,
                               const Opening& opening) {
  std::vector<Entry> entries;
  add_entries_of(file, other.empty() ? "" : "train", entries);
  if (!other.empty()) add_entries_of(other, "test", entries);
  return std::make_unique<FolderData>(file, std::move(entries), split, opening);
}

}  // namespace edge_bcs::app
