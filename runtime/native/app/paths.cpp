#include "app/paths.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <memory>

#include "app/text.h"
#include "session/files.h"

namespace edge_bcs::app {

namespace {

constexpr std::array<std::string_view, 10> suffixes{".jpg", ".jpeg", ".png", ".bmp", ".webp",
                                                    ".ppm", ".pgm",  ".gif", ".tif", ".tiff"};

mode_t mode_of(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 ? status.st_mode : 0;
}

}  // namespace

bool is_file(const std::string& path) { return S_ISREG(mode_of(path)); }
bool is_folder(const std::string& path) { return S_ISDIR(mode_of(path)); }

bool is_link(const std::string& path) {
  struct stat status{};
  return lstat(path.c_str(), &status) == 0 && S_ISLNK(status.st_mode);
}

bool exists(const std::string& path) {
  struct stat status{};
  return lstat(path.c_str(), &status) == 0;
}

std::string joined(const std::string& folder, const std::string& name) {
  return folder.ends_with('/') ? folder + name : folder + "/" + name;
}

std::string last_part(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string folder_of(const std::string& path) {
  const std::size_t end = path.rfind('/');
  return end == std::string::npos ? "." : end == 0 ? "/" : path.substr(0, end);
}

std::string resolved(const std::string& path) {
  struct Free {
    void operator()(char* text) const { std::free(text); }
  };
  const std::unique_ptr<char, Free> found(realpath(path.c_str(), nullptr));
  return found == nullptr ? std::string() : std::string(found.get());
}

std::string resolved_so_far(const std::string& path) {
  std::string found = resolved(path), above = path, rest;
  while (found.empty() && above != "." && above != "/") {
    while (above.size() > 1 && above.ends_with('/')) above.pop_back();
    rest = rest.empty() ? last_part(above) : joined(last_part(above), rest);
    above = folder_of(above);
    found = resolved(above);
  }
  return rest.empty() ? found : joined(found, rest);
}

std::vector<std::string> names_in(const std::string& folder) {
  struct Close {
    void operator()(DIR* listing) const { closedir(listing); }
  };
  const std::unique_ptr<DIR, Close> listing(opendir(folder.c_str()));
  require(listing != nullptr, "the folder ", plain(folder), " cannot be read: ", cause_of(errno), ".");
  std::vector<std::string> names;
  while (const dirent* const entry = readdir(listing.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  std::ranges::sort(names, before);
  return names;
}

std::string lowered(std::string_view text) {
  std::string made(text);
  for (char& letter : made)
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter + 32);
  return made;
}

bool is_image(std::string_view name) {
  const std::string low = lowered(name);
  return !name.starts_with('.') &&
         std::ranges::any_of(suffixes, [&](auto suffix) { return low.ends_with(suffix); });
}

std::vector<std::string> images_below(const std::string& folder) {
  std::vector<std::string> images;
  for (const std::string& name : names_in(folder)) {
    if (name.starts_with('.')) continue;
    const std::string path = joined(folder, name);
    if (is_folder(path)) {
      if (is_link(path)) continue;
      for (const std::string& image : images_below(path)) images.push_back(joined(name, image));
    } else if (is_image(name)) {
      images.push_back(name);
    }
  }
  return images;
}

}  // namespace edge_bcs::app
