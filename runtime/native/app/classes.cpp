#include "app/classes.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "app/archive.h"
#include "app/composition.h"
#include "app/text.h"
#include "session/files.h"
#include "session/json.h"
#include "session/manifest.h"

namespace edge_bcs::app {

namespace {

constexpr std::size_t longest_name = 255, largest_file = 16 << 20;

Names numbers(std::size_t count) {
  Names names;
  for (std::size_t i = 0; i < count; ++i) names.push_back(std::to_string(i));
  return names;
}

std::string unnamed(std::size_t place) { return "class " + std::to_string(place); }

bool contains(const Names& names, const std::string& name) {
  return std::ranges::find(names, name) != names.end();
}

// The names in composed form. Throws Error unless these can be names of classes.
Names checked(const Names& names, const std::string& what) {
  Names made;
  require(!names.empty(), what, " must be at least one name, not an empty list.");
  std::map<std::string, std::size_t> found;
  for (std::size_t place = 0; place < names.size(); ++place) {
    const std::string& name = names[place];
    std::size_t letters = 0;
    bool good = name.find_first_not_of(' ') != std::string::npos && is_utf8(name) && !acts_on_terminals(name);
    for (std::size_t at = 0; at < name.size(); ++letters) take_code_point(name, at);
    good = good && letters <= longest_name;
    require(good, what, " must be printable names of 1 to ", longest_name, " characters; number ", place,
            " is ", plain(name).substr(0, 60), ": rename it.");
    const auto [earlier, fresh] = found.emplace(composed(name), place);
    require(fresh, what, " must be distinct, but number ", earlier->second, " and number ", place,
            " are both '", plain(name), "': rename one.");
    made.push_back(composed(name));
  }
  return made;
}

[[noreturn]] void fail_for_many(const Names& classes, std::size_t outputs) {
  fail("the data has ", classes.size(), " classes, the network only ", outputs, ": make one with --classes ",
       classes.size(), ".");
}

// A name for every output: those of the first ones, then "class 7", or "7" after numbers.
Names completed(const Names& classes, std::size_t outputs) {
  if (classes.size() > outputs) fail_for_many(classes, outputs);
  if (classes == numbers(classes.size())) return numbers(outputs);
  Names all = classes;
  for (std::size_t place = classes.size(); place < outputs; ++place) {
    require(!contains(classes, unnamed(place)), "the network has ", outputs, " outputs and the ",
            classes.size(), " class names contain '", unnamed(place),
            "', which is what an output without a name is called: name all outputs (--class-names), or "
            "rename it.");
    all.push_back(unnamed(place));
  }
  return all;
}

std::string by_position(const Names& network, const Names& data) {
  if (Names(network.begin(), network.begin() + static_cast<std::ptrdiff_t>(data.size())) ==
      numbers(data.size()))
    return "so labels are matched by position";
  Names pairs;
  for (std::size_t i = 0; i < data.size(); ++i) pairs.push_back(std::to_string(i) + " = " + network[i]);
  return "so labels are matched by position (" + listed(pairs) + ")";
}

// Names without case and spaces; of ASCII alone.
std::string loosely(const std::string& name) {
  std::string made;
  for (const char letter : name)
    if (letter != ' ') made += static_cast<char>(letter >= 'A' && letter <= 'Z' ? letter + 32 : letter);
  return made;
}

[[noreturn]] void fail_unknown(const Names& unknown, const Names& names, const Names& known) {
  std::string advice;
  bool all_numbers = true, some_unnamed = false;
  for (std::size_t place = 0; place < known.size(); ++place) {
    all_numbers = all_numbers && (known[place] == std::to_string(place) || known[place] == unnamed(place));
    some_unnamed = some_unnamed || known[place] == unnamed(place);
  }
  const std::string *mine = nullptr, *theirs = nullptr;
  for (const std::string& name : unknown)
    for (const std::string& other : known)
      if (mine == nullptr && loosely(name) == loosely(other)) mine = &name, theirs = &other;
  if (all_numbers)
    advice = "if the network's outputs are these classes, name them in their order with --class-names";
  else if (mine != nullptr)
    advice = "'" + *mine + "' and '" + *theirs + "' differ in case or spaces, which count: rename one";
  else if (some_unnamed)
    advice = "rename the data's classes, or name all outputs of the network with --class-names";
  else
    advice =
        "rename the data's classes or leave them out; a network with other classes is made by export or "
        "train, with "
        "--classes";
  fail("the network does not know the data's class", unknown.size() > 1 ? "es " : " ", listed(unknown),
       ". The data has: ", listed(names), ". The network has: ", listed(known), ". What to do: ", advice,
       ".");
}

// Data for a network that has no names.
Match match_first(const Names& names, bool numbered, const Known& known) {
  if (names.size() > known.outputs) fail_for_many(names, known.outputs);
  Match found;
  for (std::size_t i = 0; i < names.size(); ++i) found.labels.push_back(static_cast<std::int64_t>(i));
  if (!numbered && (known.trained || !known.naming))
    found.notes.push_back("the network has no class names stored, " + by_position(names, names) +
                          "; to name its outputs, give their names in this order with --class-names.");
  if (!known.naming) return found;
  found.classes = completed(names, known.outputs);
  if (found.notes.empty() && names.size() < found.classes.size() && !numbered)
    found.notes.push_back("the data has " + std::to_string(names.size()) + " classes and the network " +
                          std::to_string(found.classes.size()) + " outputs; those without a name are " +
                          listed(Names(found.classes.begin() + static_cast<std::ptrdiff_t>(names.size()),
                                       found.classes.end())) +
                          " until --class-names names them.");
  return found;
}

std::string trimmed(const std::string& text) {
  const std::size_t begin = text.find_first_not_of(" \t\r\n"), end = text.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? std::string() : text.substr(begin, end - begin + 1);
}

Names split_at(const std::string& text, char mark) {
  Names parts;
  std::size_t begin = 0;
  for (std::size_t end = text.find(mark); end != std::string::npos; end = text.find(mark, begin)) {
    parts.push_back(trimmed(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  parts.push_back(trimmed(text.substr(begin)));
  return parts;
}

}  // namespace

Match match(const Data& data, const Known& known) {
  const Names names = checked(data.classes, "the data's classes");
  const bool numbered = !data.named && names == numbers(names.size());
  if (known.names.empty()) {
    require(!(known.naming && known.trained && !known.resumed && !numbered && names.size() < known.outputs),
            "the network was trained without names for its ", known.outputs,
            " outputs, and the data has only ", names.size(), " classes (", listed(names),
            "): which outputs they are is not known. Give the names of the outputs in their order with "
            "--class-names (class_names).");
    return match_first(names, numbered, known);
  }
  Match found;
  found.classes = known.names;
  std::vector<std::optional<std::size_t>> places;
  for (const std::string& name : names) {
    const auto place = std::ranges::find(known.names, name);
    places.push_back(place == known.names.end()
                         ? std::nullopt
                         : std::optional(static_cast<std::size_t>(place - known.names.begin())));
  }
  bool in_order = numbered;
  for (std::size_t i = 0; i < places.size(); ++i) in_order = in_order && (!places[i] || *places[i] == i);
  if (in_order) {
    if (names.size() > known.names.size()) fail_for_many(names, known.names.size());
    found.by_name = std::ranges::all_of(places, [](const auto& place) { return place.has_value(); });
    if (!found.by_name)
      found.notes.push_back("the data has only label numbers, " + by_position(known.names, names) + ".");
    for (std::size_t i = 0; i < names.size(); ++i) found.labels.push_back(static_cast<std::int64_t>(i));
  } else {
    Names unknown;
    for (std::size_t i = 0; i < names.size(); ++i)
      if (!places[i]) unknown.push_back(names[i]);
    if (!unknown.empty()) fail_unknown(unknown, names, known.names);
    found.by_name = true;
    for (const auto& place : places) found.labels.push_back(static_cast<std::int64_t>(*place));
  }
  std::size_t with_names = 0;
  const std::set<std::int64_t> present(found.labels.begin(), found.labels.end());
  for (std::size_t place = 0; place < known.names.size(); ++place) {
    if (known.names[place] == unnamed(place)) continue;
    ++with_names;
    if (!present.contains(static_cast<std::int64_t>(place))) found.missing.push_back(known.names[place]);
  }
  if (!found.missing.empty())
    found.notes.push_back("the data lacks " + std::to_string(found.missing.size()) + " of the network's " +
                          std::to_string(with_names) + " classes: " + listed(found.missing) + ".");
  return found;
}

Names given_names(const std::string& text) {
  std::optional<FileSource> file;
  try {
    file.emplace(text);
  } catch (const Error&) {
    require(
        text.find(',') != std::string::npos, "there is no file ", plain(text).substr(0, 200),
        "; give the class names as ant,bee,cat or as a file with a name a line, in the order of the labels.");
  }
  Names names;
  if (file) {
    std::string content = read_all(*file, largest_file);
    if (content.starts_with("\xef\xbb\xbf")) content.erase(0, 3);
    names = split_at(trimmed(content), '\n');
  } else {
    names = split_at(text, ',');
  }
  return checked(names, "the class names");
}

Names named(const Names& stored, const Names& given, std::size_t outputs) {
  Names names = completed(given, outputs);
  require(may_become(stored, names), "the network's classes have other names: it has ", listed(stored),
          "; given were ", listed(names),
          ". Leave the class names out, or export it anew with them to rename its classes.");
  return names;
}

}  // namespace edge_bcs::app
