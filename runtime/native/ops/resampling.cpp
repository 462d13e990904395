// Maps of other sizes: constants around them or parts of them, and interpolation (Upsample); and their gradients.

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/lanes.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// Padding along one axis of `size` pixels: `before` of them in front, or cut off where that is negative.
struct Side {
  std::int64_t size, out, before;

  // The part [begin, end) of the padded axis that is pixels of the map.
  std::int64_t begin() const { return std::clamp<std::int64_t>(before, 0, out); }
  std::int64_t end() const { return std::clamp<std::int64_t>(before + size, begin(), out); }
};

// Attribute pads: [top, left, bottom, right].
struct Padding : Maps {
  Side down, across;

  explicit Padding(const Attributes& attributes) : Maps(attributes) {
    const auto pads = attributes.integers("pads");
    require(pads.size() == 4, "the attribute pads has ", pads.size(), " numbers, not 4");
    for (const std::int64_t pad : pads)
      require(pad >= -(1 << 14) && pad <= 1 << 14, "attribute pads is ", pad, ", not in [-16384, 16384]");
    down = {in.height, out.height, pads[0]};
    across = {in.width, out.width, pads[1]};
    require(out.height == in.height + pads[0] + pads[2] && out.width == in.width + pads[1] + pads[3],
            "padding ", in.height, " by ", in.width, " pixels with ", pads[0], ", ", pads[1], ", ", pads[2],
            " and ", pads[3], " does not give ", out.height, " by ", out.width);
  }
};

struct Pad {
  static constexpr const char* name = "Pad";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  Padding padding;
  float value;

  explicit Pad(const Attributes& attributes) : padding(attributes), value(attributes.real("value", 0)) {}

  void compute(Context& context) const {
    const Stack &in = padding.in, &out = padding.out;
    const Side &down = padding.down, &across = padding.across;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x"), lanes = in.lanes;
    const auto y = context.output<float>(0, out.shape(blocks));
    write_rows(context, out, y.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t oy) {
      const bool inside = oy >= down.begin() && oy < down.end();
      const std::int64_t begin = inside ? across.begin() : out.width, end = inside ? across.end() : out.width;
      std::fill_n(row, begin * lanes, value);
      if (begin < end)
        std::copy_n(x.data() + in.at(nb, c, oy - down.before, begin - across.before), (end - begin) * lanes,
                    row + begin * lanes);
      std::fill_n(row + end * lanes, (out.width - end) * lanes, value);
    });
  }
};
const Register<Pad> pad;

// dx = mask∘(dy where the map is in it, 0 elsewhere, + addend)
struct PadGrad {
  static constexpr const char* name = "PadGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"addend", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Padding padding;
  InputGradient gradient;

  explicit PadGrad(const Attributes& attributes)
      : padding(attributes), gradient(attributes, padding.out, padding.in) {}

  void compute(Context& context) const {
    const Stack &in = padding.in, &out = padding.out;
    const Side &down = padding.down, &across = padding.across;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = out.blocks(dy, "dy"), lanes = in.lanes;
    const Finish finish = gradient.finish(context, 1, 2, blocks);
    const auto dx = context.output<float>(0, in.shape(blocks));
    write_rows(context, in, dx.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t y) {
      const std::int64_t oy = y + down.before, begin = across.begin(), end = across.end();
      if (oy >= 0 && oy < out.height && begin < end) {
        const std::int64_t left = begin - across.before, right = end - across.before;
        std::fill_n(row, left * lanes, 0.0f);
        std::copy_n(dy.data() + out.at(nb, c, oy, begin), (end - begin) * lanes, row + left * lanes);
        std::fill_n(row + right * lanes, (in.width - right) * lanes, 0.0f);
      } else {
        std::fill_n(row, in.row(), 0.0f);
      }
      finish(row, 1, 0, row, nb, c, y);
    });
  }
};
const Register<PadGrad> pad_grad;

// Interpolation along one axis: pixel o of the output is (1 − weight)·first + weight·second, two pixels of the input, as
// torch.nn.functional.interpolate finds them.
class Interpolation {
 public:
  struct Taps {
    std::int64_t first, second;
    float weight;

    // The share of pixel i.
    float share(std::int64_t i) const { return (first == i ? 1 - weight : 0) + (second == i ? weight : 0); }
  };

  // `scale` is the distance in the input of neighbours in the output; 0: size / count.
  Interpolation(std::int64_t size, std::int64_t count, bool linear, bool corners, double scale)
      : taps_(static_cast<std::size_t>(count)),
        begin_(static_cast<std::size_t>(size), count),
        end_(static_cast<std::size_t>(size), 0) {
    require(std::isfinite(scale) && scale >= 0, "a scale is ", scale, ", not a finite number of at least 0");
    double step = scale > 0 ? scale : static_cast<double>(size) / static_cast<double>(count);
    if (linear && corners)
      step = count > 1 ? static_cast<double>(size - 1) / static_cast<double>(count - 1) : 0;
    for (std::int64_t o = 0; o < count; ++o) {
      const auto at = static_cast<double>(o);
      double place = at * step;
      if (linear && !corners) place = std::max(0.0, (at + 0.5) * step - 0.5);
      const auto first =
          static_cast<std::int64_t>(std::min(std::floor(place), static_cast<double>(size - 1)));
      const std::int64_t second = std::min(first + 1, size - 1);
      Taps& taps = taps_[static_cast<std::size_t>(o)];
      taps = {first, second, linear ? static_cast<float>(place - static_cast<double>(first)) : 0.0f};
      if (!linear) taps.second = first;
      taps.weight = std::clamp(taps.weight, 0.0f, 1.0f);
      for (const std::int64_t i : {taps.first, taps.second}) {
        begin_[static_cast<std::size_t>(i)] = std::min(begin_[static_cast<std::size_t>(i)], o);
        end_[static_cast<std::size_t>(i)] = o + 1;
      }
    }
  }

  const Taps& operator[](std::int64_t o) const { return taps_[static_cast<std::size_t>(o)]; }
  // The pixels [begin, end) of the output that may have a share of pixel i of the input.
  std::int64_t begin(std::int64_t i) const { return begin_[static_cast<std::size_t>(i)]; }
  std::int64_t end(std::int64_t i) const { return end_[static_cast<std::size_t>(i)]; }

 private:
  std::vector<Taps> taps_;
  std::vector<std::int64_t> begin_, end_;
};

// Attributes linear (1: between the two nearest pixels, 0: the nearest), align_corners, scale_height and scale_width.
struct Resampling : Maps {
  bool linear;
  Interpolation down, across;

  explicit Resampling(const Attributes& attributes)
      : Maps(attributes),
        linear(attributes.flag("linear", false)),
        down(in.height, out.height, linear, attributes.flag("align_corners", false),
             attributes.real("scale_height", 0)),
        across(in.width, out.width, linear, attributes.flag("align_corners", false),
               attributes.real("scale_width", 0)) {}
};

struct Upsample {
  static constexpr const char* name = "Upsample";
  static constexpr std::array inputs{Port{"x", float32}};
  static constexpr std::array outputs{Port{"y", float32}};

  Resampling resampling;

  explicit Upsample(const Attributes& attributes) : resampling(attributes) {}

  void compute(Context& context) const {
    const Stack &in = resampling.in, &out = resampling.out;
    const auto x = context.input<float>(0);
    const std::int64_t blocks = in.blocks(x, "x");
    const auto y = context.output<float>(0, out.shape(blocks));
    write_rows(context, out, y.data(), blocks,
               [&](float* to, std::int64_t nb, std::int64_t c, std::int64_t oy) {
      const auto& rows = resampling.down[oy];
      const float* const upper = x.data() + in.at(nb, c, rows.first);
      const float* const lower = x.data() + in.at(nb, c, rows.second);
      with_lanes(in.lanes, [&](auto lanes) {
        for (std::int64_t ox = 0; ox < out.width; ++ox) {
          const auto& columns = resampling.across[ox];
          const std::int64_t left = columns.first * lanes, right = columns.second * lanes;
          float* const pixel = to + ox * lanes;
          if (!resampling.linear) {
            std::copy_n(upper + left, lanes, pixel);
            continue;
          }
          for (std::int64_t b = 0; b < lanes; ++b)
            pixel[b] =
                (1 - rows.weight) *
                    ((1 - columns.weight) * upper[left + b] + columns.weight * upper[right + b]) +
                rows.weight * ((1 - columns.weight) * lower[left + b] + columns.weight * lower[right + b]);
        }
      });
    });
  }
};
const Register<Upsample> upsample;

// dx = mask∘(the shares of each pixel in dy, + addend)
struct UpsampleGrad {
  static constexpr const char* name = "UpsampleGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"addend", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  Resampling resampling;
  InputGradient gradient;

  explicit UpsampleGrad(const Attributes& attributes)
      : resampling(attributes), gradient(attributes, resampling.out, resampling.in) {}

  void compute(Context& context) const {
    const Stack &in = resampling.in, &out = resampling.out;
    const Interpolation &down = resampling.down, &across = resampling.across;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = out.blocks(dy, "dy");
    const Finish finish = gradient.finish(context, 1, 2, blocks);
    const auto dx = context.output<float>(0, in.shape(blocks));
    write_rows(context, in, dx.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t y) {
      with_lanes(in.lanes, [&](auto lanes) {
        for (std::int64_t ix = 0; ix < in.width; ++ix) {
          std::array<float, most_lanes> sum;
          std::fill_n(sum.data(), lanes, 0.0f);
          for (std::int64_t oy = down.begin(y); oy < down.end(y); ++oy) {
            const float* const from = dy.data() + out.at(nb, c, oy);
            const float of_row = down[oy].share(y);
            for (std::int64_t ox = across.begin(ix); ox < across.end(ix); ++ox) {
              const float share = of_row * across[ox].share(ix);
              for (std::int64_t b = 0; b < lanes; ++b) sum[b] += share * from[ox * lanes + b];
            }
          }
          std::copy_n(sum.data(), lanes, row + ix * lanes);
        }
      });
      finish(row, 1, 0, row, nb, c, y);
    });
  }
};
const Register<UpsampleGrad> upsample_grad;

}  // namespace
}  // namespace edge_bcs
