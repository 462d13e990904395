#include "image/resize.h"

#include <algorithm>
#include <cmath>

namespace edge_bcs {

namespace {

constexpr int fraction_bits = 32 - 8 - 2;

double triangle(double x) {
  x = std::abs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

std::uint8_t rounded(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> fraction_bits, 0, 255));
}

double pixels_into_one(double in, int out) { return std::max(1.0, in / out); }

}  // namespace

Box resized_part(double width, double height, int wanted_width, int wanted_height,
                 std::optional<double> crop) {
  if (!crop) return {0, 0, static_cast<float>(width), static_cast<float>(height)};
  const double scale = *crop * std::min(width / wanted_width, height / wanted_height);
  const double wide = std::min(scale * wanted_width, width), tall = std::min(scale * wanted_height, height);
  const double left = (width - wide) / 2, top = (height - tall) / 2;
  return {static_cast<float>(left), static_cast<float>(top), static_cast<float>(left + wide),
          static_cast<float>(top + tall)};
}

Taps::Taps(int in, float from, float to, int out) {
  // Each operation as Pillow has it, for every rounding counts.
  const double scale = static_cast<double>(to - from) / out, wide = std::max(scale, 1.0), narrow = 1.0 / wide;
  std::vector<double> shares;
  spans_.reserve(static_cast<std::size_t>(out));
  for (int place = 0; place < out; ++place) {
    const double centre = from + (place + 0.5) * scale;
    const int first = std::max(static_cast<int>(centre - wide + 0.5), 0);
    const int end = std::min(static_cast<int>(centre + wide + 0.5), in);
    const int count = std::max(end - first, 0);
    shares.resize(static_cast<std::size_t>(count));
    double total = 0.0;
    for (int i = 0; i < count; ++i) {
      const double share = triangle((i + first - centre + 0.5) * narrow);
      shares[static_cast<std::size_t>(i)] = share;
      total += share;
    }
    spans_.push_back({first, count, weights_.size()});
    most_ = std::max(most_, count);
    for (const double share : shares)
      weights_.push_back(
          static_cast<std::int32_t>(0.5 + (total != 0.0 ? share / total : share) * (1 << fraction_bits)));
  }
}

std::size_t Taps::bytes(double in, int out) {
  const double each = 2 * std::ceil(pixels_into_one(in, out)) + 1;
  // A vector that grows has twice what it needs, and what it had before beside it.
  return static_cast<std::size_t>(out * (3 * each * sizeof(std::int32_t) + sizeof(Span)) +
                                  each * sizeof(double));
}

RowResizer::RowResizer(int width, int height, int channels, const Box& part, int wanted_width,
                       int wanted_height)
    : width_(width),
      channels_(channels),
      wanted_width_(wanted_width),
      wanted_height_(wanted_height),
      across_(width, part.left, part.right, wanted_width),
      down_(height, part.top, part.bottom, wanted_height),
      rows_(static_cast<std::size_t>(down_.most()) * row_bytes()),
      sums_(row_bytes()),
      result_(row_bytes()) {}

void RowResizer::take(const std::uint8_t* row) {
  std::uint8_t* into = kept(taken_++);
  for (int place = 0; place < wanted_width_; ++place) {
    const std::uint8_t* const from = row + static_cast<std::ptrdiff_t>(across_.first(place)) * channels_;
    const std::span<const std::int32_t> weights = across_.weights(place);
    for (int channel = 0; channel < channels_; ++channel) {
      std::int32_t sum = 1 << (fraction_bits - 1);
      for (std::size_t i = 0; i < weights.size(); ++i)
        sum += from[i * static_cast<std::size_t>(channels_) + static_cast<std::size_t>(channel)] * weights[i];
      *into++ = rounded(sum);
    }
  }
}

const std::uint8_t* RowResizer::next() {
  if (done() || down_.first(given_) + down_.count(given_) > taken_) return nullptr;
  std::ranges::fill(sums_, 1 << (fraction_bits - 1));
  const std::span<const std::int32_t> weights = down_.weights(given_);
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const std::uint8_t* const row = kept(down_.first(given_) + static_cast<int>(i));
    for (std::size_t j = 0; j < sums_.size(); ++j) sums_[j] += row[j] * weights[i];
  }
  std::ranges::transform(sums_, result_.begin(), rounded);
  ++given_;
  return result_.data();
}

void RowResizer::take_into(const std::uint8_t* pixels, int rows, std::uint8_t* result) {
  for (int i = 0; i < rows && !done(); ++i) {
    take(pixels + std::ptrdiff_t{i} * width_ * channels_);
    for (int place = given_; const std::uint8_t* const made = next(); place = given_)
      std::copy_n(made, row_bytes(), result + static_cast<std::size_t>(place) * row_bytes());
  }
}

std::size_t RowResizer::bytes(int width, int height, int channels, int wanted_width, int wanted_height) {
  const double row = static_cast<double>(wanted_width) * channels;
  const double rows = 2 * std::ceil(pixels_into_one(height, wanted_height)) + 1;
  return Taps::bytes(width, wanted_width) + Taps::bytes(height, wanted_height) +
         static_cast<std::size_t>(rows * row + row * (sizeof(std::int32_t) + 1));
}

}  // namespace edge_bcs
