// One encoded image into pixels: edge_bcs/data/decoding.py for JPEG and PNG, row after row, in memory that is given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "decode/rows.h"
#include "image/augment.h"

namespace edge_bcs {

// A workspace of so many bytes decodes what cameras and screens make, but for images that come in passes.
inline constexpr std::size_t least_workspace = 1 << 20;
inline constexpr std::uint64_t largest_file = 64 << 20;

// Writes the pixels of the image in the bytes [offset, offset + size) of an open file into `pixels`, u8[C, H, W]. `crop`: see
// resized_part. Throws BadImage, whose text follows the image's name.
void decode(int descriptor, std::uint64_t offset, std::uint64_t size, const ImageShape& shape,
            std::optional<double> crop, std::span<std::byte> workspace, std::span<std::uint8_t> pixels);

}  // namespace edge_bcs
