// Labelled images, read when they are asked for: edge_bcs/data for what a board has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "decode/decode.h"
#include "image/augment.h"

namespace edge_bcs::app {

// An image that is not used, and a sentence that says why.
struct LeftOut {
  std::string name, why;
};

// What happens to images that cannot be used: edge_bcs/data/faults.py.
struct Handling {
  bool skip = false;  // leave them out; else they stop the reading
  std::map<std::string, std::string>
      known;            // of a training that goes on: those that it left out, with the reasons
  bool strict = false;  // refuse others
  std::function<void()> watch = [] {};  // called now and then; what it throws ends the reading

  // Those of `source` that are left out. Throws Error if there are any that stop the reading.
  std::vector<LeftOut> settle(std::vector<LeftOut> found, const std::string& source) const;
};

// How data is opened.
struct Opening {
  ImageShape shape{};
  std::optional<double> crop;
  std::span<std::byte> workspace;  // in which images are decoded
  Handling handling;
  bool keeps_all_files = false;  // those of other splits, too, for `repeated`
};

class Data {
 public:
  virtual ~Data() = default;

  // Writes the image at `position` as it is, f32[C, H, W] in [0, 1]. Throws Error.
  virtual void image(std::size_t position, std::span<float> into) = 0;

  // What people know an image by.
  virtual std::string name_of(std::size_t position) const { return "image " + std::to_string(position); }

  std::size_t size() const { return labels.size(); }

  // Writes it as a training sees it.
  void drawn(std::size_t position, const Draw& draw, std::span<float> into);

  std::vector<std::string> classes;
  std::vector<std::int32_t> labels;
  bool named = false;  // whether names that look like label numbers are names all the same
  std::vector<LeftOut> left_out;
  ImageShape shape{};

 private:
  std::vector<float> plain_;
};

// Opens one split ("train" or "test") of "digits", a folder of class folders, or an .npz. Throws Error.
std::unique_ptr<Data> open_data(const std::string& spec, const std::string& split, const Opening& opening);

std::unique_ptr<Data> open_digits(const std::string& split, const Opening& opening);
std::unique_ptr<Data> open_folder(const std::string& folder, const std::string& split,
                                  const Opening& opening);
// Photographs without labels in a folder and in its folders, of any depth: edge_bcs/data/photographs.py.
std::unique_ptr<Data> open_photographs(const std::string& folder, const Opening& opening);
// Which images of `data` are the same file, byte for byte, as one of `others`, of whatever split: place, and name of the other.
// Only image files, opened with `keeps_all_files`, are compared.
std::map<std::size_t, std::string> repeated(const Data& data, const Data& others);
// A plain tar of class folders. `other`: the one for testing beside it, or "".
std::unique_ptr<Data> open_tar(const std::string& file, const std::string& other, const std::string& split,
                               const Opening& opening);
// `kind`: the split of all of it, or "" where it holds both.
std::unique_ptr<Data> open_arrays(const std::string& file, const std::string& other, const std::string& split,
                                  const Opening& opening);

// Whether each image is kept for testing: every tenth of its class.
std::vector<bool> held_out(const std::vector<std::int32_t>& labels);

// The order of an epoch's images: a permutation of (seed, epoch).
std::vector<std::uint32_t> shuffled(std::size_t count, std::uint64_t seed, std::uint64_t epoch);

// The same in which the classes come up evenly (edge_bcs/data/balance.py): k·N + n is image n in pass k of its class.
std::vector<std::uint64_t> balanced(const std::vector<std::int64_t>& labels, std::uint64_t seed,
                                    std::uint64_t epoch);

// How many images which classes have, where that is uneven; else "".
std::string imbalance(const std::vector<std::int64_t>& labels,
                      const std::function<std::string(std::size_t)>& name);

// Writes the pixels u8[C, H, W] of an image file that is named on the command line, or throws BadImage.
void decode_file(const std::string& file, const Opening& opening, std::span<std::uint8_t> pixels);

}  // namespace edge_bcs::app
