#include "app/reading.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "app/saving.h"
#include "app/signals.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::uint64_t largest_record = std::uint64_t{256} << 20;
constexpr std::size_t most_told = 20;
constexpr const char* unlabelled = "unlabelled";  // beside the splits of the data

}  // namespace

MachineWishes machine_of(const Options& options) {
  constexpr std::string_view engines[] = {"native", "onnxruntime"};
  require(options.choice("--engine", engines).value_or("native") == "native",
          "edge-bcs-run has the native engine alone; `edge-bcs` has the other.");
  MachineWishes wishes;
  if (const auto memory = options.text("--memory")) wishes.memory = parse_bytes(*memory);
  wishes.threads = static_cast<std::uint32_t>(options.whole("--threads", 1, 1024).value_or(0));
  wishes.seed = options.whole("--seed", 0);
  wishes.trusted = trusted_by(options);
  wishes.attack_precision = "f32";  // in which every measurement is made
  return wishes;
}

void print(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  require(std::fflush(stdout) == 0, "the answer cannot be written.");
}

void print_pairs(const std::vector<std::pair<std::string, std::string>>& rows) {
  std::size_t widest = 0;
  for (const auto& [name, value] : rows) widest = std::max(widest, name.size());
  std::string text;
  for (const auto& [name, value] : rows)
    text += "  " + name + std::string(widest - name.size(), ' ') + "  " + plain(value) + "\n";
  print(text);
}

Reading::Reading(std::string spec, const Network& network, bool skip, const std::string& folder,
                 std::function<void()> watch, bool quiet)
    : spec_(std::move(spec)),
      network_(network),
      skip_(skip),
      resumes_(!folder.empty()),
      quiet_(quiet),
      watch_(std::move(watch)) {
  if (folder.empty()) return;
  const Value record = read_json(joined(folder, record_file), largest_record);
  if (const Value* const left_out = record.find("left_out"); left_out != nullptr && left_out->is_object())
    recorded_ = *left_out;
}

Handling Reading::handling_of(const std::string& split) const {
  Handling handling;
  handling.skip = skip_;
  handling.strict = recorded_.find(split) != nullptr;
  handling.watch = watch_;
  if (!recorded_.is_object()) return handling;
  // An image of another split has its place, too.
  for (const auto& [other, images] : recorded_.members())
    if ((other == unlabelled) == (split == unlabelled))
      for (const auto& [name, why] : images.is_object() ? images.members() : Value::Object{})
        handling.known.emplace(name, why.text());
  return handling;
}

std::unique_ptr<Data> Reading::open(const std::string& split, bool keeps_all_files) {
  Opening opening = network_.opening(handling_of(split));
  opening.keeps_all_files = keeps_all_files;
  std::unique_ptr<Data> data = open_data(spec_, split, opening);
  tell(split, *data);
  return data;
}

std::unique_ptr<Data> Reading::open_unlabelled(const std::string& folder) {
  std::unique_ptr<Data> data = open_photographs(folder, network_.opening(handling_of(unlabelled)));
  tell(unlabelled, *data);
  return data;
}

void Reading::tell(const std::string& split, const Data& data) {
  Value left_out = Value::Object{};
  for (const LeftOut& image : data.left_out) left_out[image.name] = image.why;
  left_out_[split] = std::move(left_out);
  if (data.left_out.empty() || quiet_) return;
  say(std::to_string(data.left_out.size()) + " of " + std::to_string(data.left_out.size() + data.size()) +
      " images (" + split + ") are left out:");
  for (std::size_t i = 0; i < data.left_out.size() && i < most_told; ++i) say("  " + data.left_out[i].why);
  if (data.left_out.size() > most_told)
    say("  and " + std::to_string(data.left_out.size() - most_told) + " more");
}

void Reading::report(Value& into) const {
  Value::List images;
  if (left_out_.is_object())
    for (const auto& [split, names] : left_out_.members())
      for (const auto& [name, why] : names.members()) {
        Value image;
        image["split"] = split;
        image["image"] = name;
        image["why"] = why;
        images.push_back(std::move(image));
      }
  if (!skip_ && images.empty()) return;
  Value left_out;
  left_out["count"] = images.size();
  left_out["images"] = std::move(images);
  into["left_out"] = std::move(left_out);
}

void Reading::record(const std::string& folder) const {
  Value kept = recorded_.is_object() ? recorded_ : Value(Value::Object{});
  if (left_out_.is_object())
    for (const auto& [split, names] : left_out_.members()) kept[split] = names;
  const std::string file = joined(folder, record_file);
  if (resumes_ && recorded_.is_object() && kept.dump() == recorded_.dump()) return;
  Value report;
  this->report(report);
  if (!report.is_null() || recorded_.is_object()) {
    Value record;
    record["left_out"] = std::move(kept);
    write_json(file, record);
  } else if (is_file(file)) {
    unlink(file.c_str());
  }
}

}  // namespace edge_bcs::app
