#include "image/mixing.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "image/interpolation.h"

namespace edge_bcs {

namespace {

constexpr double least_strength = 0.01, most_strength = 0.3;  // of what each operation does at most
constexpr double half_angle = 0.2679491924311227;             // tangent of 15°: an angle up to 30°
constexpr double shear_reach = 0.3, translate_reach = 1.0 / 3;
constexpr int bits = 4;  // of posterize, without strength
constexpr float brightest = 255;

using Plane = std::vector<float>;

int level(float value) { return static_cast<int>(std::nearbyint(value * brightest)); }

// The operations, each from a plane of `height` × `width` pixels into another.
class Operations {
 public:
  static constexpr int count = 9;

  Operations(int height, int width) : height_(height), width_(width) {}

  void apply(int number, double draw, const Plane& from, Plane& into) const {
    const double sign = draw < 0.5 ? 1 : -1, rest = draw < 0.5 ? 2 * draw : 2 * draw - 1;
    const double strength = least_strength + (most_strength - least_strength) * rest;
    switch (number) {
      case 0:
        return autocontrast(from, into);
      case 1:
        return equalize(from, into);
      case 2:
        return posterize(from, strength, into);
      case 3:
        return solarize(from, strength, into);
      case 4:
        return rotate(from, sign * strength * half_angle, into);
      case 5:
        return move(from, {1, 0, sign * strength * shear_reach, 1}, 0, 0, into);
      case 6:
        return move(from, {1, sign * strength * shear_reach, 0, 1}, 0, 0, into);
      case 7:
        return move(from, {1, 0, 0, 1}, 0, sign * strength * translate_reach * width_, into);
      default:
        return move(from, {1, 0, 0, 1}, sign * strength * translate_reach * height_, 0, into);
    }
  }

 private:
  // Rows and columns as sums of shares of the row and the column from the middle.
  struct Turn {
    double row_of_row, row_of_column, column_of_row, column_of_column;
  };

  static void autocontrast(const Plane& from, Plane& into) {
    const auto [low, high] = std::ranges::minmax(from);
    const float spread = high - low;
    std::ranges::transform(from, into.begin(),
                           [&](float value) { return spread > 0 ? (value - low) / spread : value; });
  }

  static void equalize(const Plane& from, Plane& into) {
    std::array<std::int64_t, 256> counts{};
    for (const float value : from) ++counts[static_cast<std::size_t>(level(value))];
    const auto brightest_there =
        std::ranges::find_if(counts.rbegin(), counts.rend(), [](auto held) { return held != 0; });
    const std::int64_t rest = static_cast<std::int64_t>(from.size()) - *brightest_there;
    if (rest == 0) {
      std::ranges::copy(from, into.begin());
      return;
    }
    std::array<float, 256> shares{};
    std::int64_t darker = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      shares[i] = std::min(static_cast<float>(static_cast<double>(darker) / static_cast<double>(rest)), 1.0f);
      darker += counts[i];
    }
    std::ranges::transform(from, into.begin(),
                           [&](float value) { return shares[static_cast<std::size_t>(level(value))]; });
  }

  static void posterize(const Plane& from, double strength, Plane& into) {
    const int step = 1 << (8 - (bits - static_cast<int>(strength * bits)));
    std::ranges::transform(from, into.begin(), [&](float value) {
      return static_cast<float>(level(value) / step * step) / brightest;
    });
  }

  static void solarize(const Plane& from, double strength, Plane& into) {
    const auto least = static_cast<float>(1 - strength);
    std::ranges::transform(from, into.begin(),
                           [&](float value) { return value < least ? value : 1 - value; });
  }

  // By the angle the tangent of whose half is given.
  void rotate(const Plane& from, double half, Plane& into) const {
    const double length = 1 + half * half;
    const double cosine = (1 - half * half) / length, sine = 2 * half / length;
    move(from, {cosine, sine, -sine, cosine}, 0, 0, into);
  }

  void move(const Plane& from, const Turn& turn, double down, double right, Plane& into) const {
    const double middle_row = (height_ - 1) / 2.0, middle_column = (width_ - 1) / 2.0;
    float* next = into.data();
    for (int i = 0; i < height_; ++i)
      for (int j = 0; j < width_; ++j) {
        const double row = i - middle_row, column = j - middle_column;
        const Place vertical =
            around(turn.row_of_row * row + turn.row_of_column * column + down + middle_row, height_);
        const Place horizontal =
            around(turn.column_of_row * row + turn.column_of_column * column + right + middle_column, width_);
        const auto pixel = [&](int line, int place) {
          return from[static_cast<std::size_t>(line) * static_cast<std::size_t>(width_) +
                      static_cast<std::size_t>(place)];
        };
        const auto on = [&](int line) {
          return between(pixel(line, horizontal.before), pixel(line, horizontal.after), horizontal.weight);
        };
        *next++ = between(on(vertical.before), on(vertical.after), vertical.weight);
      }
  }

  int height_, width_;
};

}  // namespace

void mix(std::span<float> image, const ImageShape& shape, const MixDraws& draws) {
  const auto [low, high] = std::minmax(draws[1], draws[2]);
  const std::array<double, mix_chains> weights{low, high - low, 1 - high};
  const auto share = static_cast<float>(draws[0]);
  const Operations operations(shape.height, shape.width);
  Plane sum(shape.plane()), changed(shape.plane()), next(shape.plane());
  for (std::size_t at = 0; at < image.size(); at += shape.plane()) {
    const std::span<float> plane = image.subspan(at, shape.plane());
    std::ranges::fill(sum, 0.0f);
    for (std::size_t chain = 0; chain < mix_chains; ++chain) {
      const double* draw = draws.data() + 3 + chain * (1 + 2 * longest_chain);
      const auto length = 1 + static_cast<std::size_t>(*draw++ * longest_chain);
      std::ranges::copy(plane, changed.begin());
      for (std::size_t i = 0; i < length; ++i, draw += 2) {
        operations.apply(static_cast<int>(draw[0] * Operations::count), draw[1], changed, next);
        std::swap(changed, next);
      }
      const auto weight = static_cast<float>(weights[chain]);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += weight * changed[i];
    }
    for (std::size_t i = 0; i < sum.size(); ++i)
      plane[i] = std::clamp(between(plane[i], sum[i], share), 0.0f, 1.0f);
  }
}

}  // namespace edge_bcs
