// Images in .npz files, read one at a time where they lie.

#include <algorithm>
#include <array>

#include "app/archive.h"
#include "app/data.h"
#include "app/text.h"

namespace edge_bcs::app {

namespace {

constexpr std::uint64_t most_labels = (1 << 24) * std::uint64_t{8}, most_classes = 100'000;
constexpr std::array image_names{"x", "images", "data"};
constexpr std::array label_names{"y", "labels", "targets"};

// One array of images, and where its split's images are in it.
struct Part {
  std::unique_ptr<FileSource> file;
  StoredArray images;
  bool channels_last = false, grey = false;
};

class ArrayData final : public Data {
 public:
  ArrayData(const std::string& file, const std::string& other, const std::string& split,
            const Opening& opening) {
    shape = opening.shape;
    pixels_.resize(shape.size());
    // Where a file "test…" lies beside it, one is for training and one is for testing.
    add(file, other.empty() ? "" : "train");
    if (!other.empty()) add(other, "test");
    choose(file, split);
  }

  void image(std::size_t position, std::span<float> into) override {
    const auto [part_number, place] = places_[position];
    const Part& part = parts_[part_number];
    const std::size_t size = part.grey ? shape.plane() : shape.size();
    part.file->read(part.images.offset + place * size,
                    std::as_writable_bytes(std::span(pixels_).first(size)));
    const auto channels = static_cast<std::size_t>(shape.channels);
    for (std::size_t channel = 0; channel < channels; ++channel)
      for (std::size_t i = 0; i < shape.plane(); ++i) {
        const std::size_t from = part.grey            ? i
                                 : part.channels_last ? i * channels + channel
                                                      : channel * shape.plane() + i;
        into[channel * shape.plane() + i] = static_cast<float>(pixels_[from]) / 255.0f;
      }
  }

 private:
  void add(const std::string& path, const std::string& split) try {
    Part probe{std::make_unique<FileSource>(path), {}};
    const Arrays arrays(*probe.file);
    bool found = false;
    for (const char* const kind : {"train", "test"}) {
      const std::string images = std::string("x_") + kind;
      if (!arrays.has(images)) continue;
      found = true;
      add_pair(path, arrays, images, std::string("y_") + kind, kind);
    }
    if (found) return;
    const auto named = [&](const auto& names) {
      const auto name = std::ranges::find_if(names, [&](const char* one) { return arrays.has(one); });
      require(name != names.end(), "it lacks the arrays x and y (or images and labels)");
      return std::string(*name);
    };
    const std::string images = named(image_names), labels = named(label_names);
    add_pair(path, arrays, images, labels, split);
  } catch (const Error& error) {
    fail("the data ", plain(path), " cannot be used: ", error.what(), ".");
  }

  void add_pair(const std::string& path, const Arrays& arrays, const std::string& images,
                const std::string& labels, const std::string& split) {
    const std::vector<std::int64_t> numbers = arrays.whole_numbers(labels, most_labels);
    Part part{std::make_unique<FileSource>(path), arrays.array(images, 0)};
    require(part.images.count() == numbers.size() && !part.images.shape.empty(), "it has ", numbers.size(),
            " labels for ", part.images.count(), " images");
    require(part.images.type == "|u1", "its images are of the type ", part.images.type,
            ", and edge-bcs-run reads u8 alone: save them as np.uint8 from 0 to 255");
    const std::vector<std::uint64_t> found(part.images.shape.begin() + 1, part.images.shape.end());
    const auto channels = static_cast<std::uint64_t>(shape.channels),
               height = static_cast<std::uint64_t>(shape.height),
               width = static_cast<std::uint64_t>(shape.width);
    part.grey = found == std::vector{height, width};
    part.channels_last =
        found == std::vector{height, width, channels} && found != std::vector{channels, height, width};
    require(part.grey || part.channels_last || found == std::vector{channels, height, width},
            "its images have another shape than the network's, ", channels, "×", height, "×", width);
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      require(numbers[i] >= 0 && static_cast<std::uint64_t>(numbers[i]) < most_classes, "label ", numbers[i],
              " is not one of its classes");
      all_labels_.push_back(static_cast<std::int32_t>(numbers[i]));
      all_places_.emplace_back(parts_.size(), i);
      splits_.push_back(split == "test" ? 2 : split == "train" ? 1 : 0);
    }
    parts_.push_back(std::move(part));
  }

  void choose(const std::string& file, const std::string& split) {
    require(!all_labels_.empty(), plain(file), " holds no images.");
    const int highest = *std::ranges::max_element(all_labels_);
    for (int label = 0; label <= highest; ++label) classes.push_back(std::to_string(label));
    const bool told = std::ranges::any_of(splits_, [](int kind) { return kind != 0; });
    const std::vector<bool> held = held_out(all_labels_);
    for (std::size_t i = 0; i < all_labels_.size(); ++i) {
      const bool is_test = told ? splits_[i] == 2 : held[i];
      if (is_test != (split == "test")) continue;
      labels.push_back(all_labels_[i]);
      places_.push_back(all_places_[i]);
    }
    require(!labels.empty(), plain(file), " holds no ", split, " images.");
    all_labels_ = {}, all_places_ = {}, splits_ = {};
  }

  std::vector<Part> parts_;
  std::vector<std::pair<std::size_t, std::uint64_t>> places_, all_places_;
  std::vector<std::int32_t> all_labels_;
  std::vector<int> splits_;
  std::vector<std::uint8_t> pixels_;
};

}  // namespace

std::unique_ptr<Data> open_arrays(const std::string& file, const std::string& other, const std::string& split,
                                  const Opening& opening) {
  return std::make_unique<ArrayData>(file, other, split, opening);
}

}  // namespace edge_bcs::app
