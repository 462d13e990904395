// Decodes image files as edge-bcs-run does: decode_images CHANNELS HEIGHT WIDTH CROP WORKSPACE FILE…
// CROP: a share, or 0 for none. WORKSPACE: bytes. Writes for each file a line "ok HEX" with its pixels u8[C, H, W], or
// "bad REASON".

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "decode/decode.h"

int main(int count, char** words) {
  if (count < 6) return 2;
  const edge_bcs::ImageShape shape{std::atoi(words[1]), std::atoi(words[2]), std::atoi(words[3])};
  const double share = std::atof(words[4]);
  const std::optional<double> crop = share > 0 ? std::optional(share) : std::nullopt;
  const auto size = static_cast<std::size_t>(std::atoll(words[5]));
  std::vector<std::uint8_t> pixels(shape.size());
  for (int i = 6; i < count; ++i) {
    std::vector<std::byte> memory(size);  // anew, so that a sanitizer sees what lies beyond it
    const int file = open(words[i], O_RDONLY);
    struct stat status{};
    if (file < 0 || fstat(file, &status) != 0) return 2;
    try {
      edge_bcs::decode(file, 0, static_cast<std::uint64_t>(status.st_size), shape, crop, memory, pixels);
      std::cout << "ok ";
      for (const std::uint8_t value : pixels) {
        char digits[3];
        std::snprintf(digits, sizeof digits, "%02x", value);
        std::cout << digits;
      }
      std::cout << '\n';
    } catch (const edge_bcs::BadImage& bad) {
      std::cout << "bad " << bad.what() << '\n';
    }
    close(file);
  }
  return 0;
}
