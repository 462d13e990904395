// An encoded image, row after row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "decode/bytes.h"
#include "decode/memory.h"
#include "ops/op.h"

namespace edge_bcs {

// One image cannot be used, whatever is wrong with it; others may be. The text is what follows the image's name: "is …".
class BadImage : public Error {
 public:
  using Error::Error;
};

// What a row's pixels are.
enum class Pixels { grey, rgb, rgba, cmyk };

struct Picture {
  int width = 0, height = 0;                   // of the whole image, as stored
  int decoded_width = 0, decoded_height = 0;   // of what the rows are
  double extent_width = 0, extent_height = 0;  // of the whole image in pixels of the rows
  Pixels pixels = Pixels::grey;
  int orientation = 1;  // EXIF's number: how the image is to be turned

  std::size_t row_bytes() const;
};

// Bytes of a pixel.
int bytes_of(Pixels pixels);

class ImageRows {
 public:
  virtual ~ImageRows() = default;

  // Reads what stands before the pixels. `least_side`: that of what is decoded, where only a part of the pixels can be.
  virtual Picture begin(int least_side) = 0;
  // The next row, u8[row_bytes()]; each is asked for.
  virtual void next(std::uint8_t* row) = 0;
  // Reads what stands after the pixels, all of which must be there.
  virtual void finish() = 0;
};

// Readers of the two formats, whose memory is `workspace`. All of what they do throws BadImage.
std::unique_ptr<ImageRows> jpeg_rows(Bytes& bytes, Workspace& workspace);
// `ahead`: the same bytes, to look for what stands behind the pixels.
std::unique_ptr<ImageRows> png_rows(Bytes& bytes, Bytes& ahead, Workspace& workspace);

// Throws BadImage for more pixels than are read.
void check_pixels(double width, double height);

// Throws BadImage: so many bytes are needed, and so many there are.
[[noreturn]] void fail_for_memory(const Picture& picture, const char* kind, std::uint64_t needed,
                                  std::uint64_t given, const char* remedy);

}  // namespace edge_bcs
