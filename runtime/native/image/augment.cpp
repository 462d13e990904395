#include "image/augment.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "image/interpolation.h"
#include "image/mixing.h"
#include "ops/philox.h"

namespace edge_bcs {

namespace {

constexpr double shift_share = 0.1;  // of the size, on each axis
constexpr double least_area = 0.35, least_side = 0.6, colour_reach = 0.3;
constexpr float grey_shares[] = {0.299f, 0.587f, 0.114f};  // of red, green and blue: ITU-R BT.601
constexpr std::uint64_t mix_blocks = 2 + std::tuple_size_v<MixDraws> / 4;  // of four words each
constexpr double fine = 1 << 24;  // steps of brightness in which a mean is summed

// Where the pixels of one side are taken from, moved by `word`'s share of the most that it may be moved.
std::vector<int> shifted(int length, std::uint32_t word) {
  const auto reach = static_cast<std::int64_t>(std::nearbyint(shift_share * length));
  const std::int64_t shift =
      static_cast<std::int64_t>(std::uint64_t{word} * static_cast<std::uint64_t>(2 * reach + 1) >> 32) -
      reach;
  std::vector<int> places(static_cast<std::size_t>(length));
  for (int i = 0; i < length; ++i)
    places[static_cast<std::size_t>(i)] =
        static_cast<int>(std::clamp<std::int64_t>(i - shift, 0, length - 1));
  return places;
}

bool mirrored(const Philox::Words& words) { return words[2] >> 31 != 0; }

Philox::Words words_of(const Draw& draw) {
  return Philox(draw.seed, draw.epoch, Purpose::augment).block(draw.position);
}

void mirror(std::span<const float> image, const ImageShape& shape, const Draw& draw,
            std::span<float> result) {
  std::ranges::copy(image, result.begin());
  if (!mirrored(words_of(draw))) return;
  for (std::size_t row = 0; row < result.size(); row += shape.row())
    std::ranges::reverse(result.subspan(row, shape.row()));
}

void shift_and_flip(std::span<const float> image, const ImageShape& shape, const Draw& draw,
                    std::span<float> result) {
  const Philox::Words words = words_of(draw);
  const std::vector<int> rows = shifted(shape.height, words[0]);
  std::vector<int> columns = shifted(shape.width, words[1]);
  if (mirrored(words)) std::ranges::reverse(columns);
  float* into = result.data();
  for (int channel = 0; channel < shape.channels; ++channel)
    for (const int row : rows) {
      const float* const from = image.data() + static_cast<std::size_t>(channel) * shape.plane() +
                                static_cast<std::size_t>(row) * shape.row();
      for (const int column : columns) *into++ = from[column];
    }
}

// Of each pixel of a side: between which two it lies.
std::vector<Place> places(int length, double share, double draw) {
  const double first = draw * (1 - share) * length;
  std::vector<Place> made(static_cast<std::size_t>(length));
  for (int i = 0; i < length; ++i)
    made[static_cast<std::size_t>(i)] = around(first + (i + 0.5) * share - 0.5, length);
  return made;
}

float in_range(float value) { return std::clamp(value, 0.0f, 1.0f); }

class Coloured {
 public:
  Coloured(std::span<float> image, const ImageShape& shape) : image_(image), shape_(shape) {}

  void brighten(float factor) {
    for (float& value : image_) value = in_range(value * factor);
  }

  void contrast(float factor) {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < shape_.plane(); ++i)
      sum += static_cast<std::int64_t>(std::nearbyint(static_cast<double>(grey(i)) * fine));
    const auto mean = static_cast<float>(static_cast<double>(sum) / (fine * shape_.height * shape_.width));
    for (float& value : image_) value = in_range(between(mean, value, factor));
  }

  void saturate(float factor) {
    for (std::size_t i = 0; i < shape_.plane(); ++i) {
      const float alone = grey(i);
      for (std::size_t channel = 0; channel < 3; ++channel) {
        float& value = image_[channel * shape_.plane() + i];
        value = in_range(between(alone, value, factor));
      }
    }
  }

 private:
  float grey(std::size_t pixel) const {
    if (shape_.channels == 3) {
      float sum = image_[pixel] * grey_shares[0];
      sum += image_[shape_.plane() + pixel] * grey_shares[1];
      sum += image_[2 * shape_.plane() + pixel] * grey_shares[2];
      return sum;
    }
    float sum = image_[pixel];
    for (std::size_t i = pixel + shape_.plane(); i < shape_.size(); i += shape_.plane()) sum += image_[i];
    return sum / static_cast<float>(shape_.channels);
  }

  std::span<float> image_;
  ImageShape shape_;
};

// From a word: a multiple of 2^-24 in [0, 1).
double uniform(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

void photograph(std::span<const float> image, const ImageShape& shape, const Draw& draw,
                std::span<float> result) {
  const Philox philox(draw.seed, draw.epoch, Purpose::augment);
  const bool mixes = draw.kind == Augmentation::mix;
  const std::uint64_t first = (mixes ? mix_blocks : 2) * draw.position;
  const Philox::Words one = philox.block(first), two = philox.block(first + 1);
  // From 3/4 to 4/3, and as often above 1 as below; a logarithm would not be the same everywhere.
  const double aspect = (6 + 2 * uniform(one[1])) / (8 - 2 * uniform(one[1]));
  const bool zoom = draw.kind != Augmentation::photo;
  const double side = least_side + uniform(one[0]);
  const double area = zoom ? side * side : least_area + (1 - least_area) * uniform(one[0]);
  const double most = zoom ? std::numeric_limits<double>::infinity() : 1.0;
  const double tall = std::min(std::sqrt(area / aspect), most),
               wide = std::min(std::sqrt(area * aspect), most);
  const std::vector<Place> rows = places(shape.height, tall, uniform(one[2]));
  std::vector<Place> columns = places(shape.width, wide, uniform(one[3]));
  if (uniform(two[0]) >= 0.5) std::ranges::reverse(columns);
  std::vector<float> line(shape.row());
  float* into = result.data();
  for (int channel = 0; channel < shape.channels; ++channel) {
    const float* const plane = image.data() + static_cast<std::size_t>(channel) * shape.plane();
    for (const Place& row : rows) {
      const float* const before = plane + static_cast<std::size_t>(row.before) * shape.row();
      const float* const after = plane + static_cast<std::size_t>(row.after) * shape.row();
      for (std::size_t i = 0; i < line.size(); ++i) line[i] = between(before[i], after[i], row.weight);
      for (const Place& column : columns)
        *into++ = between(line[static_cast<std::size_t>(column.before)],
                          line[static_cast<std::size_t>(column.after)], column.weight);
    }
  }
  const auto factor = [](std::uint32_t word) {
    return static_cast<float>(1 + colour_reach * (2 * uniform(word) - 1));
  };
  Coloured coloured(result, shape);
  coloured.brighten(factor(two[1]));
  coloured.contrast(factor(two[2]));
  if (shape.channels == 3) coloured.saturate(factor(two[3]));
  if (!mixes) return;
  MixDraws draws{};
  for (std::size_t i = 0; i < draws.size(); i += 4)
    std::ranges::transform(philox.block(first + 2 + i / 4), draws.begin() + static_cast<std::ptrdiff_t>(i),
                           uniform);
  mix(result, shape, draws);
}

}  // namespace

void augment(std::span<const float> image, const ImageShape& shape, const Draw& draw,
             std::span<float> result) {
  switch (draw.kind) {
    case Augmentation::none:
      std::ranges::copy(image, result.begin());
      return;
    case Augmentation::mirror:
      return mirror(image, shape, draw, result);
    case Augmentation::shift:
      return shift_and_flip(image, shape, draw, result);
    case Augmentation::photo:
    case Augmentation::zoom:
    case Augmentation::mix:
      return photograph(image, shape, draw, result);
  }
}

}  // namespace edge_bcs
