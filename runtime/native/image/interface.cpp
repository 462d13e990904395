// What Python calls of the images: the same functions that edge-bcs-run uses.

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <span>

#include "image/augment.h"
#include "image/resize.h"

#define EDGE_BCS_EXPORT extern "C" __attribute__((visibility("default")))

// Begins to resize the part (left, top, right, bottom) of an image u8[height, width, channels] to wanted_width ×
// wanted_height. Null where memory does not suffice; else to be closed.
EDGE_BCS_EXPORT void* edge_bcs_resizer_open(int height, int width, int channels, const float* part,
                                            int wanted_height, int wanted_width) {
  try {
    const edge_bcs::Box box{part[0], part[1], part[2], part[3]};
    return std::make_unique<edge_bcs::RowResizer>(width, height, channels, box, wanted_width, wanted_height)
        .release();
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Takes the image's next `rows` rows, and writes what becomes known into `result`, u8[wanted_height, wanted_width, channels].
EDGE_BCS_EXPORT void edge_bcs_resizer_take(void* resizer, const std::uint8_t* pixels, int rows,
                                           std::uint8_t* result) {
  static_cast<edge_bcs::RowResizer*>(resizer)->take_into(pixels, rows, result);
}

EDGE_BCS_EXPORT void edge_bcs_resizer_close(void* resizer) {
  std::unique_ptr<edge_bcs::RowResizer>(static_cast<edge_bcs::RowResizer*>(resizer)).reset();
}

// Writes f32[channels, height, width] into `result` as the augmentation (0 none, 1 shift, 2 photo, 3 zoom, 4 mix) of this draw changes
// it.
// Returns 0, or -1 where memory does not suffice.
EDGE_BCS_EXPORT int edge_bcs_augment(const float* image, int channels, int height, int width, int kind,
                                     std::uint64_t seed, std::uint64_t epoch, std::uint64_t position,
                                     float* result) {
  try {
    const edge_bcs::ImageShape shape{channels, height, width};
    const edge_bcs::Draw draw{static_cast<edge_bcs::Augmentation>(kind), seed, epoch, position};
    edge_bcs::augment({image, shape.size()}, shape, draw, {result, shape.size()});
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}
