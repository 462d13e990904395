#include "app/data.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "app/archive.h"
#include "app/paths.h"
#include "app/text.h"
#include "ops/philox.h"
#include "session/shuffle.h"

// The digits that come with the Python package, as they are there.
__asm__(
    ".section .rodata\n"
    ".global edge_bcs_digits\n"
    ".global edge_bcs_digits_end\n"
    "edge_bcs_digits:\n"
    ".incbin \"" EDGE_BCS_DIGITS
    "\"\n"
    "edge_bcs_digits_end:\n"
    ".previous\n");
extern "C" const std::byte edge_bcs_digits[], edge_bcs_digits_end[];

namespace edge_bcs::app {

namespace {

constexpr std::size_t digit_side = 8, most_named = 3;
constexpr float darkest = 16;

// Where the pixels of a side of `out` lie among those of `in`: the pixels before and after, and their weights.
struct Between {
  std::size_t before, after;
  float first, second;  // the weights; all in the first where both are one
};

std::vector<Between> enlarged(std::size_t in, std::size_t out) {
  std::vector<Between> made(out);
  for (std::size_t i = 0; i < out; ++i) {
    const double place =
        std::clamp((static_cast<double>(i) + 0.5) * static_cast<double>(in) / static_cast<double>(out) - 0.5,
                   0.0, static_cast<double>(in - 1));
    const double low = std::floor(place);
    const auto before = static_cast<std::size_t>(low), after = std::min(before + 1, in - 1);
    made[i] = {before, after, static_cast<float>(1 - (place - low)), static_cast<float>(place - low)};
    if (before == after)
      made[i].first = static_cast<float>((1 - (place - low)) + (place - low)), made[i].second = 0;
  }
  return made;
}

// The handwritten digits: edge_bcs/data/digits.py.
class Digits final : public Data {
 public:
  Digits(const std::string& split, const Opening& opening) {
    shape = opening.shape;
    named = true;
    for (int digit = 0; digit < 10; ++digit) classes.push_back(std::to_string(digit));
    const MemorySource stored(std::span(edge_bcs_digits, edge_bcs_digits_end));
    const Arrays arrays(stored);
    const std::vector<std::int64_t> numbers = arrays.whole_numbers("labels", 1 << 20);
    StoredArray images = arrays.array("images", 1 << 20);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      if ((i % 5 == 4) != (split == "test")) continue;
      labels.push_back(static_cast<std::int32_t>(numbers[i]));
      pixels_ += images.content.substr(static_cast<std::size_t>(images.offset) + i * digit_side * digit_side,
                                       digit_side * digit_side);
    }
    rows_ = enlarged(digit_side, static_cast<std::size_t>(shape.height));
    columns_ = enlarged(digit_side, static_cast<std::size_t>(shape.width));
  }

  void image(std::size_t position, std::span<float> into) override {
    const char* const digit = pixels_.data() + position * digit_side * digit_side;
    std::size_t place = 0;
    for (const Between& row : rows_)
      for (const Between& column : columns_) {
        // Products and sums in the order of the reference, each rounded by itself.
        float sum = 0;
        const auto add = [&](std::size_t i, float weight, std::size_t j, float other) {
          const float grey = static_cast<float>(digit[i * digit_side + j]) / darkest;
          sum += weight * grey * other;
        };
        add(row.before, row.first, column.before, column.first);
        if (column.after != column.before) add(row.before, row.first, column.after, column.second);
        if (row.after != row.before) {
          add(row.after, row.second, column.before, column.first);
          if (column.after != column.before) add(row.after, row.second, column.after, column.second);
        }
        into[place++] = std::clamp(sum, 0.0f, 1.0f);
      }
    for (std::size_t channel = 1; channel < static_cast<std::size_t>(shape.channels); ++channel)
      std::copy_n(into.begin(), shape.plane(), into.subspan(channel * shape.plane()).begin());
  }

 private:
  std::string pixels_;
  std::vector<Between> rows_, columns_;
};

std::string without_stop(std::string text) {
  if (text.ends_with('.')) text.pop_back();
  return text;
}

[[noreturn]] void fail_kind(const std::string& path) {
  fail(plain(path),
       " is not data that edge-bcs-run reads: give a folder or a .tar with a folder of images for each "
       "class, an ",
       ".npz of u8 images, or digits; `edge-bcs` reads more.");
}

std::unique_ptr<Data> open_file(const std::string& path, const std::string& split, const Opening& opening) {
  const std::string file = last_part(path), name = lowered(file);
  for (const char* const packed : {".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"})
    if (name.ends_with(packed))
      fail(plain(path),
           " is packed, and edge-bcs-run reads images where they lie: unpack it into a .tar or a folder; "
           "`edge-bcs` reads it.");
  if (!name.ends_with(".npz") && !name.ends_with(".tar")) fail_kind(path);
  const std::string other = name.starts_with("train") ? joined(folder_of(path), "test" + file.substr(5)) : "";
  if (name.ends_with(".tar")) return open_tar(path, is_file(other) ? other : "", split, opening);
  return open_arrays(path, is_file(other) ? other : "", split, opening);
}

}  // namespace

std::vector<LeftOut> Handling::settle(std::vector<LeftOut> found, const std::string& source) const {
  std::vector<const LeftOut*> fresh;
  for (const LeftOut& image : found)
    if (!known.contains(image.name)) fresh.push_back(&image);
  if (!fresh.empty() && strict)
    fail(without_stop(fresh[0]->why),
         ", and this training began with it: put the image back as it was, or begin a new training.");
  if (fresh.empty() || skip) return found;
  std::string text;
  if (fresh.size() > 1) text = std::to_string(fresh.size()) + " images of " + source + " cannot be used: ";
  for (std::size_t i = 0; i < fresh.size() && i < most_named; ++i)
    text += (i == 0 ? "" : "; ") + without_stop(fresh[i]->why);
  if (fresh.size() > most_named) text += "; and " + std::to_string(fresh.size() - most_named) + " more";
  const char* const them = fresh.size() > 1 ? "them" : "it";
  fail(text, "; mend or remove ", them, ", or leave ", them, " out with --on-bad skip.");
}

void Data::drawn(std::size_t position, const Draw& draw, std::span<float> into) {
  if (draw.kind == Augmentation::none) return image(position, into);
  plain_.resize(shape.size());
  image(position, plain_);
  augment(plain_, shape, draw, into);
}

std::unique_ptr<Data> open_digits(const std::string& split, const Opening& opening) {
  return std::make_unique<Digits>(split, opening);
}

std::unique_ptr<Data> open_data(const std::string& spec, const std::string& split, const Opening& opening) {
  if (spec == "digits") return open_digits(split, opening);
  if (is_folder(spec)) {
    for (const char* const nested : {"cifar-10-batches-py", "cifar-100-python", "data_batch_1"})
      if (exists(joined(spec, nested)))
        fail(plain(spec), " holds CIFAR's pickles, which edge-bcs-run does not read: `edge-bcs` does.");
    for (const char* const name : {"train.tar", "train.tar.gz", "train.tgz", "train.tar.bz2", "train.tar.xz",
                                   "train.npz", "train.mat", "train_32x32.mat"}) {
      const std::string file = joined(spec, name);
      if (is_file(file)) return open_file(file, split, opening);
    }
    return open_folder(spec, split, opening);
  }
  require(exists(spec), "the data ", plain(spec), " does not exist; give a folder, an .npz, or digits.");
  return open_file(spec, split, opening);
}

std::vector<bool> held_out(const std::vector<std::int32_t>& labels) {
  std::vector<bool> held(labels.size());
  std::map<std::int32_t, std::vector<std::size_t>> members;
  for (std::size_t i = 0; i < labels.size(); ++i) members[labels[i]].push_back(i);
  for (const auto& [label, places] : members) {
    if (places.size() >= 10)
      for (std::size_t i = 9; i < places.size(); i += 10) held[places[i]] = true;
    else if (places.size() >= 2)
      held[places.back()] = true;
  }
  return held;
}

std::vector<std::uint32_t> shuffled(std::size_t count, std::uint64_t seed, std::uint64_t epoch) {
  std::vector<std::uint32_t> order(count);
  shuffle({seed, epoch, Purpose::shuffle}, order);
  return order;
}

std::vector<std::uint64_t> balanced(const std::vector<std::int64_t>& labels, std::uint64_t seed,
                                    std::uint64_t epoch) {
  std::map<std::int64_t, std::vector<std::uint32_t>> members;
  for (const std::uint32_t place : shuffled(labels.size(), seed, epoch))
    members[labels[place]].push_back(place);
  std::vector<const std::vector<std::uint32_t>*> groups;
  for (const auto& [label, places] : members) groups.push_back(&places);
  const Philox philox(seed, epoch, Purpose::balance);
  const auto key = [&](std::size_t turn) {
    const Philox::Words words = philox.block(turn / 2);
    const std::size_t low = turn % 2 * 2;
    return words[low] | std::uint64_t{words[low + 1]} << 32;
  };
  std::vector<std::uint64_t> order;
  std::vector<std::pair<std::uint64_t, std::size_t>> turns(groups.size());
  for (std::size_t round = 0; order.size() < labels.size(); ++round) {
    for (std::size_t group = 0; group < groups.size(); ++group)
      turns[group] = {key(round * groups.size() + group), group};
    std::ranges::sort(turns);
    for (const auto& [drawn, group] : turns) {
      const std::vector<std::uint32_t>& own = *groups[group];
      order.push_back(own[round % own.size()] + labels.size() * (round / own.size()));
    }
  }
  order.resize(labels.size());
  return order;
}

std::string imbalance(const std::vector<std::int64_t>& labels,
                      const std::function<std::string(std::size_t)>& name) {
  constexpr std::size_t few = 10, at_each_end = 3;
  std::map<std::int64_t, std::size_t> counts;
  for (const std::int64_t label : labels) ++counts[label];
  std::vector<std::pair<std::size_t, std::int64_t>> sorted;
  for (const auto& [label, count] : counts) sorted.emplace_back(count, label);
  std::ranges::sort(sorted);
  if (sorted.size() < 2 || sorted.back().first < 2 * sorted.front().first ||
      sorted.back().first - sorted.front().first < few)
    return {};
  std::string text;
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    const bool passed_over =
        sorted.size() > 2 * at_each_end + 1 && i >= at_each_end && i < sorted.size() - at_each_end;
    if (passed_over && i > at_each_end) continue;
    text += text.empty() ? "" : ", ";
    text += passed_over
                ? "…"
                : name(static_cast<std::size_t>(sorted[i].second)) + " " + std::to_string(sorted[i].first);
  }
  return text + " images";
}

void decode_file(const std::string& file, const Opening& opening, std::span<std::uint8_t> pixels) {
  const int number = open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  const Descriptor descriptor(number);
  if (!descriptor) throw BadImage("cannot be read: " + cause_of(errno));
  struct stat status{};
  if (fstat(number, &status) != 0 || !S_ISREG(status.st_mode))
    throw BadImage("cannot be read: it is not a file");
  decode(number, 0, static_cast<std::uint64_t>(status.st_size), opening.shape, opening.crop,
         opening.workspace, pixels);
}

}  // namespace edge_bcs::app
