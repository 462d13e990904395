// How an image is turned, by what lies beside its pixels.
#pragma once

#include <cstddef>
#include <span>

namespace edge_bcs {

// EXIF's number, 1 to 8, in a block of EXIF data (from "II" or "MM" on); 0 where it says none.
int exif_orientation(std::span<const std::byte> block);

// The same in a packet of XMP.
int xmp_orientation(std::span<const std::byte> packet);

}  // namespace edge_bcs
