// Images as a training sees them: edge_bcs/data/augmentation.py, to the bit.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace edge_bcs {

enum class Augmentation : std::int32_t { none = 0, shift = 1, photo = 2, zoom = 3, mix = 4, mirror = 5 };

// Their names, in this order.
inline constexpr std::array<std::string_view, 6> augmentations{"none", "shift", "photo",
                                                               "zoom", "mix",   "mirror"};

// What happens to the image at `position` of the data in an epoch.
struct Draw {
  Augmentation kind;
  std::uint64_t seed, epoch, position;
};

struct ImageShape {
  int channels, height, width;

  std::size_t row() const { return static_cast<std::size_t>(width); }
  std::size_t plane() const { return row() * static_cast<std::size_t>(height); }
  std::size_t size() const { return plane() * static_cast<std::size_t>(channels); }
};

// Writes `image`, f32 [C, H, W] in [0, 1], as it is drawn into `result` of the same shape, which lies apart from it.
void augment(std::span<const float> image, const ImageShape& shape, const Draw& draw,
             std::span<float> result);

}  // namespace edge_bcs
