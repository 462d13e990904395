// Resizing of u8 images, row after row: bilinear over all pixels that fall into one, first across, then down. In whole
// numbers, so that every machine gives the same bits: those of Pillow's `resize(size, BILINEAR, box)`, where it goes across
// first, too (some versions do not with tall images; a pixel then differs by one level at most).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace edge_bcs {

// The part of an image that is resized, in its pixels.
struct Box {
  float left, top, right, bottom;
};

// The part (see edge_bcs/core/resizing.py) of an image of `width` × `height` that becomes one of `wanted_width` ×
// `wanted_height`: all of it, or with `crop` that share of the largest part from the middle with its proportions.
Box resized_part(double width, double height, int wanted_width, int wanted_height,
                 std::optional<double> crop);

// Of each place of one axis after resizing: which pixels it is made of, and with what weights.
class Taps {
 public:
  // `in` pixels of which [from, to) become `out`.
  Taps(int in, float from, float to, int out);

  int first(int place) const { return spans_[static_cast<std::size_t>(place)].first; }
  int count(int place) const { return spans_[static_cast<std::size_t>(place)].count; }
  std::span<const std::int32_t> weights(int place) const {
    const Span& span = spans_[static_cast<std::size_t>(place)];
    return std::span(weights_).subspan(span.at, static_cast<std::size_t>(span.count));
  }
  // The most pixels that one place is made of.
  int most() const { return most_; }

  // Bytes that the tables of `in` pixels to `out` take at most.
  static std::size_t bytes(double in, int out);

 private:
  struct Span {
    int first, count;
    std::size_t at;
  };

  std::vector<Span> spans_;
  std::vector<std::int32_t> weights_;
  int most_ = 1;
};

// Takes an image's rows from the top one on, and gives the resized ones as soon as they are known.
class RowResizer {
 public:
  // Images of `channels` u8 a pixel, interleaved.
  RowResizer(int width, int height, int channels, const Box& part, int wanted_width, int wanted_height);

  // Takes the next row, u8[width · channels].
  void take(const std::uint8_t* row);

  // The next resized row, u8[wanted_width · channels], which is valid until the next call; null until more rows are taken.
  const std::uint8_t* next();

  // Takes `rows` rows, and writes what becomes known to its place in the resized image, `result`.
  void take_into(const std::uint8_t* pixels, int rows, std::uint8_t* result);

  // Whether all resized rows have been given: no more need be taken.
  bool done() const { return given_ == wanted_height_; }

  // Bytes that it takes at most.
  static std::size_t bytes(int width, int height, int channels, int wanted_width, int wanted_height);

 private:
  std::size_t row_bytes() const {
    return static_cast<std::size_t>(wanted_width_) * static_cast<std::size_t>(channels_);
  }
  std::uint8_t* kept(int row) {
    return rows_.data() + static_cast<std::size_t>(row % down_.most()) * row_bytes();
  }

  int width_, channels_, wanted_width_, wanted_height_, taken_ = 0, given_ = 0;
  Taps across_, down_;
  std::vector<std::uint8_t> rows_;  // the last ones, resized across
  std::vector<std::int32_t> sums_;
  std::vector<std::uint8_t> result_;
};

}  // namespace edge_bcs
