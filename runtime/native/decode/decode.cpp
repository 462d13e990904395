#include "decode/decode.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "image/resize.h"

namespace edge_bcs {

namespace {

constexpr double most_pixels = 64 << 20;
constexpr int first_sideways = 5;      // of EXIF's numbers
constexpr std::size_t most_bytes = 4;  // of a pixel

// a · b / 255, rounded.
unsigned part(unsigned a, unsigned b) {
  const unsigned product = a * b + 128;
  return (product + (product >> 8)) >> 8;
}

// `colour` over white, of which it hides `alpha` in 255.
std::uint8_t over_white(unsigned colour, unsigned alpha) {
  const unsigned sum = 255 * (255 - alpha) + colour * alpha + 128;
  return static_cast<std::uint8_t>((sum + (sum >> 8)) >> 8);
}

std::array<std::uint8_t, 3> colour_of(const std::uint8_t* pixel, Pixels kind) {
  const auto mapped = [&](auto change) {
    return std::array{change(pixel[0]), change(pixel[1]), change(pixel[2])};
  };
  switch (kind) {
    case Pixels::grey:
      return {pixel[0], pixel[0], pixel[0]};
    case Pixels::rgb:
      return {pixel[0], pixel[1], pixel[2]};
    case Pixels::rgba:
      return mapped([&](std::uint8_t value) { return over_white(value, pixel[3]); });
    case Pixels::cmyk: {
      const unsigned light = 255u - pixel[3];
      return mapped([&](std::uint8_t value) {
        return static_cast<std::uint8_t>(std::clamp(static_cast<int>(light - part(value, light)), 0, 255));
      });
    }
  }
  return {};
}

std::uint8_t grey_of(const std::array<std::uint8_t, 3>& colour) {
  return static_cast<std::uint8_t>((colour[0] * 19595u + colour[1] * 38470u + colour[2] * 7471u + 0x8000u) >>
                                   16);
}

// Makes a row of 1 or 3 channels of what was decoded, in its place: pixels only become smaller, or are written from the end.
void flatten(std::span<std::uint8_t> row, const Picture& picture, int channels) {
  const auto width = static_cast<std::size_t>(picture.decoded_width);
  const std::size_t from = static_cast<std::size_t>(bytes_of(picture.pixels)),
                    to = static_cast<std::size_t>(channels);
  if (from == to) return;
  for (std::size_t i = 0; i < width; ++i) {
    const std::size_t place = from < to ? width - 1 - i : i;
    const std::array<std::uint8_t, 3> colour = colour_of(&row[from * place], picture.pixels);
    if (channels == 1)
      row[place] = grey_of(colour);
    else
      std::ranges::copy(colour, &row[3 * place]);
  }
}

// Where the pixel (x, y) of an image that is turned as `orientation` says belongs in one of `width` × `height`.
std::size_t turned(int orientation, int x, int y, int width, int height) {
  if (orientation >= first_sideways) std::swap(x, y);
  if (orientation == 2 || orientation == 3 || orientation == 6 || orientation == 7) x = width - 1 - x;
  if (orientation == 3 || orientation == 4 || orientation == 7 || orientation == 8) y = height - 1 - y;
  return static_cast<std::size_t>(y) * static_cast<std::size_t>(width) + static_cast<std::size_t>(x);
}

std::unique_ptr<ImageRows> rows_of(Bytes& bytes, Bytes& ahead, Bytes& beginning, Workspace& workspace) {
  constexpr std::array<unsigned char, 8> png{0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  std::array<std::byte, 8> signature{};
  beginning.fill(signature);
  if (std::to_integer<int>(signature[0]) == 0xff && std::to_integer<int>(signature[1]) == 0xd8)
    return jpeg_rows(bytes, workspace);
  if (std::ranges::equal(signature, std::as_bytes(std::span(png)))) return png_rows(bytes, ahead, workspace);
  throw BadImage("is neither a JPEG nor a PNG, and other images are not read here");
}

}  // namespace

int bytes_of(Pixels pixels) {
  switch (pixels) {
    case Pixels::grey:
      return 1;
    case Pixels::rgb:
      return 3;
    default:
      return 4;
  }
}

std::size_t Picture::row_bytes() const {
  return static_cast<std::size_t>(decoded_width) * static_cast<std::size_t>(bytes_of(pixels));
}

void check_pixels(double width, double height) {
  if (width * height <= most_pixels) return;
  throw BadImage(text_of("declares ", static_cast<std::uint64_t>(width), "×",
                         static_cast<std::uint64_t>(height), " pixels, which is refused"));
}

void fail_for_memory(const Picture& picture, const char* kind, std::uint64_t needed, std::uint64_t given,
                     const char* remedy) {
  throw BadImage(text_of("(", picture.width, "×", picture.height, " pixels, ", kind, ") takes ", needed,
                         " bytes of memory to decode, and the network's plan has ", given,
                         " for it: ", remedy));
}

void decode(int descriptor, std::uint64_t offset, std::uint64_t size, const ImageShape& shape,
            std::optional<double> crop, std::span<std::byte> memory, std::span<std::uint8_t> pixels) {
  if (size > largest_file) throw BadImage("is larger than 64 MiB, which is refused");
  Workspace workspace(memory);
  Bytes bytes(descriptor, offset, size), ahead(descriptor, offset, size), beginning(descriptor, offset, size);
  const std::unique_ptr<ImageRows> rows = rows_of(bytes, ahead, beginning, workspace);
  // Twice the network's input is left for the filter, however the image is turned.
  const double side = std::ceil(2 * std::max(shape.height, shape.width) / crop.value_or(1));
  const Picture picture =
      rows->begin(static_cast<int>(std::min(side, double{std::numeric_limits<int>::max()})));
  const bool sideways = picture.orientation >= first_sideways;
  const int width = sideways ? shape.height : shape.width, height = sideways ? shape.width : shape.height;
  const std::size_t needed =
      RowResizer::bytes(picture.decoded_width, picture.decoded_height, shape.channels, width, height);
  if (needed > std::max(workspace.size(), least_workspace))
    fail_for_memory(picture, "to be resized", needed, workspace.size(), "make it smaller");
  const Box box = resized_part(picture.extent_width, picture.extent_height, width, height, crop);
  RowResizer resizer(picture.decoded_width, picture.decoded_height, shape.channels, box, width, height);
  std::vector<std::uint8_t> row(static_cast<std::size_t>(picture.decoded_width) * most_bytes);
  int made = 0;
  for (int y = 0; y < picture.decoded_height; ++y) {
    rows->next(row.data());
    if (resizer.done()) continue;  // what is not needed must be whole, too
    flatten(row, picture, shape.channels);
    resizer.take(row.data());
    for (; const std::uint8_t* resized = resizer.next(); ++made)
      for (int x = 0; x < width; ++x) {
        const std::size_t place = turned(picture.orientation, x, made, shape.width, shape.height);
        for (int channel = 0; channel < shape.channels; ++channel)
          pixels[static_cast<std::size_t>(channel) * shape.plane() + place] = *resized++;
      }
  }
  rows->finish();
}

}  // namespace edge_bcs
