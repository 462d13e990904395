// Files and folders by their paths. Not std::filesystem, which would bring locales into the program, twice its own size.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace edge_bcs::app {

bool is_file(const std::string& path);
bool is_folder(const std::string& path);
bool is_link(const std::string& path);
// Whether something lies there, be it a link to nothing.
bool exists(const std::string& path);

std::string joined(const std::string& folder, const std::string& name);
// Behind the last slash, and before it ("." without one).
std::string last_part(const std::string& path);
std::string folder_of(const std::string& path);

// Without links, dots and the like; "" if there is no such thing.
std::string resolved(const std::string& path);
// The same of what need not be there yet.
std::string resolved_so_far(const std::string& path);

// Names in a folder, sorted as Python sorts text. Throws Error.
std::vector<std::string> names_in(const std::string& folder);

// Letters of ASCII made small.
std::string lowered(std::string_view text);
// Whether a name is that of an image file, which is not hidden.
bool is_image(std::string_view name);
// The image files in a folder and in its folders, by their paths from there, in order. What is hidden, and links to folders, are
// passed over. Throws Error.
std::vector<std::string> images_below(const std::string& folder);

}  // namespace edge_bcs::app
