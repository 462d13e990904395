// Image files in class folders: edge_bcs/data/listing.py and images.py.

#include <algorithm>
#include <array>
#include <memory>
#include <set>
#include <string_view>

#include "app/data.h"
#include "app/paths.h"
#include "app/progress.h"
#include "app/text.h"
#include "session/files.h"

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

struct Entry {
  std::string split, class_name, name, why;
};

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
          entries.push_back({split ? split_of(last_part(parent)) : "", class_name,
                             split ? last_part(parent) + "/" + name : name, why_unusable(path, root)});
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
  FolderData(const std::string& folder, const std::string& split, const Opening& opening)
      : folder_(folder), opening_(opening) {
    shape = opening.shape;
    named = true;
    require(shape.channels == 1 || shape.channels == 3,
            "image files have 1 or 3 channels; the network takes ", shape.channels, ".");
    pixels_.resize(shape.size());
    std::vector<Entry> found = entries_of(folder);
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
    require(!labels.empty(), plain(folder), " holds no ", split, " images.");
  }

  void image(std::size_t position, std::span<float> into) override {
    try {
      decode_file(joined(folder_, files_[position]), opening_, pixels_);
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
    for (const auto& [name, why] : opening_.handling.known) {
      const std::size_t end = name.rfind('/');
      if (names.contains(name) || end == std::string::npos || !is_image(name.substr(end + 1))) continue;
      const std::string above = name.substr(0, end), class_name = last_part(above);
      if (class_name.starts_with('.')) continue;
      const bool nested = class_name.size() != above.size();
      const std::string parent =
          nested ? last_part(above.substr(0, above.size() - class_name.size() - 1)) : "";
      found.push_back({split_of(parent), class_name, name, why});
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
      files_.push_back(entry.name);
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
      decode_file(joined(folder_, entry.name), opening_, pixels_);
    } catch (const BadImage& bad) {
      return sentence(entry.name, bad);
    }
    return {};
  }

  std::string sentence(const std::string& name, const BadImage& bad) const {
    return "the image " + plain(joined(folder_, name)) + " " + bad.what() + ".";
  }

  std::string folder_;
  Opening opening_;
  std::vector<std::string> files_;
  std::vector<std::uint8_t> pixels_;
};

}  // namespace

std::unique_ptr<Data> open_folder(const std::string& folder, const std::string& split,
                                  const Opening& opening) {
  return std::make_unique<FolderData>(folder, split, opening);
}

}  // namespace edge_bcs::app
