#include "app/service.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "app/archive.h"
#include "app/paths.h"
#include "app/text.h"
#include "app/trust.h"

// The unit as it comes with the Python package.
__asm__(
    ".section .rodata\n"
    ".global edge_bcs_service\n"
    ".global edge_bcs_service_end\n"
    "edge_bcs_service:\n"
    ".incbin \"" EDGE_BCS_SERVICE
    "\"\n"
    "edge_bcs_service_end:\n"
    ".previous\n");
extern "C" const char edge_bcs_service[], edge_bcs_service_end[];

namespace edge_bcs::app {

namespace {

std::string replaced(std::string text, std::string_view old, std::string_view made) {
  for (std::size_t at = text.find(old); at != std::string::npos; at = text.find(old, at + made.size()))
    text.replace(at, old.size(), made);
  return text;
}

// One word as systemd reads it.
std::string quoted(std::string word) {
  word = replaced(replaced(replaced(std::move(word), "\\", "\\\\"), "%", "%%"), "\"", "\\\"");
  return word.find_first_of(" \t\r\n\v\f\"';") == std::string::npos ? word : "\"" + word + "\"";
}

std::string this_program() {
  std::array<char, 4096> path;
  const ssize_t count = readlink("/proc/self/exe", path.data(), path.size());
  require(count > 0,
          "where this program lies cannot be told without /proc: print the service where it is mounted.");
  return {path.data(), static_cast<std::size_t>(count)};
}

// The name of who is logged in, or of whose process this is.
std::string user() {
  for (const char* const name : {"LOGNAME", "USER", "LNAME", "USERNAME"})
    if (const char* const value = std::getenv(name); value != nullptr && *value != '\0') return value;
  // Not getpwuid, which a static program has not.
  const std::string number = std::to_string(getuid());
  std::string listing;
  try {
    listing = read_all(FileSource("/etc/passwd"), 1 << 24);
  } catch (const Error&) {
    return number;
  }
  std::string_view rest = listing;
  while (!rest.empty()) {
    const std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    const std::size_t name = line.find(':'), password = line.find(':', name + 1);
    if (name == std::string_view::npos || password == std::string_view::npos) continue;
    if (line.substr(password + 1).starts_with(number + ":")) return std::string(line.substr(0, name));
  }
  return number;
}

bool is_path(std::string_view option, const std::string& value) {
  if (option == "--class-names") return is_file(value);
  return option == "--trust-key" || option == "--unlabelled" || option == "--rounds" ||
         (option == "--data" && value != "digits");
}

// The command line again, with absolute paths and --resume.
std::vector<std::string> words_of(const CommandSpec& command, const Options& options,
                                  const std::string& run) {
  std::vector<std::string> words{this_program(), command.name, resolved_so_far(options.arguments()[0])};
  for (const OptionSpec& option : command.options) {
    const std::string_view all = option.name, name = all.substr(all.rfind('/') + 1);
    if (name == "--output" || name == "--resume" || name == "--print-service") continue;
    if (option.metavar == nullptr) {
      if (options.has(name)) words.emplace_back(name);
      continue;
    }
    std::vector<std::string> values = options.texts(name);
    if (name == "--trust-key") values = trusted_files(options);
    if (name != "--trust-key" && values.size() > 1) values.erase(values.begin(), values.end() - 1);
    for (const std::string& value : values) {
      words.emplace_back(name);
      words.push_back(is_path(name, value) ? resolved_so_far(value) : value);
    }
  }
  words.insert(words.end(), {"--output", run, "--resume"});
  return words;
}

}  // namespace

std::string service_for(const CommandSpec& command, const Options& options, const std::string& run) {
  const std::string place = resolved_so_far(run), above = folder_of(place);
  require(is_folder(above), "the folder ", plain(above),
          " does not exist, and the service may write nowhere else: make it, then print the service.");
  std::string paths = quoted(resolved_so_far(options.arguments()[0])) + " " + quoted(above);
  if (const std::string data = options.text_or("--data", ""); data != "digits")
    paths += " " + quoted(resolved_so_far(data));
  if (const auto unlabelled = options.text("--unlabelled"))
    paths += " " + quoted(resolved_so_far(*unlabelled));
  std::string writable = quoted(above);
  if (const auto share = options.text("--rounds")) {
    writable += " " + quoted(resolved_so_far(*share));
    paths += " " + quoted(resolved_so_far(*share));
  }
  std::string line;
  for (const std::string& word : words_of(command, options, place))
    line += (line.empty() ? "" : " ") + replaced(quoted(word), "$", "$$");
  std::string unit(edge_bcs_service, edge_bcs_service_end);
  unit = replaced(std::move(unit), "edge-bcs finetune …", "edge-bcs-run finetune …");
  unit = replaced(std::move(unit), "@RUN@", replaced(place, "%", "%%"));
  unit = replaced(std::move(unit), "@PATHS@", paths);
  unit = replaced(std::move(unit), "@USER@", user());
  unit = replaced(std::move(unit), "@COMMAND@", line);
  return replaced(std::move(unit), "@WRITABLE@", writable);
}

}  // namespace edge_bcs::app
