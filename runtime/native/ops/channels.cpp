// Channels in another order: concatenation, slices, chunks, shuffles, and their gradient.

#include <algorithm>
#include <string>
#include <vector>

#include "ops/fixed.h"
#include "ops/op.h"
#include "ops/rows.h"
#include "ops/stack.h"

namespace edge_bcs {
namespace {

// The attribute `source`: for each output channel the one that it is, −1 for zeros.
std::vector<std::int64_t> sources(const Attributes& attributes, std::int64_t channels) {
  auto source = attributes.integers("source");
  for (const std::int64_t from : source)
    require(from >= -1 && from < channels, "the attribute source has ", from, ", not in [-1, ", channels,
            ")");
  return source;
}

// y's channel i is channel source[i] of the inputs, whose channels lie one input behind the other, or zeros.
struct Channels {
  static constexpr const char* name = "Channels";
  static constexpr std::array inputs{Port{"parts", float32, variadic}};
  static constexpr std::array outputs{Port{"y", float32}};

  struct Place {
    std::size_t part = 0;  // that of zeros does not matter
    std::int64_t channel = -1;
  };

  static constexpr std::size_t most_parts = 512;

  std::vector<Stack> stacks;
  std::vector<Place> places;  // of each output channel
  Stack out;

  explicit Channels(const Attributes& attributes) {
    const auto counts = attributes.integers("channels"), halos = attributes.integers("in_halos");
    require(!counts.empty() && counts.size() == halos.size(), "the attributes channels and in_halos have ",
            counts.size(), " and ", halos.size(), " numbers");
    require(counts.size() <= most_parts, "there are more than ", most_parts, " inputs");
    const std::int64_t height = attributes.integer("height"), width = attributes.integer("width"),
                       lanes = attributes.integer("lanes");
    std::vector<Place> all;
    for (std::size_t part = 0; part < counts.size(); ++part) {
      stacks.push_back(Stack::checked(counts[part], height, width, halos[part], lanes));
      require(all.size() + static_cast<std::size_t>(counts[part]) < (1u << 23),
              "there are too many channels");
      for (std::int64_t c = 0; c < counts[part]; ++c) all.push_back({part, c});
    }
    for (const std::int64_t from : sources(attributes, static_cast<std::int64_t>(all.size())))
      places.push_back(from < 0 ? Place{} : all[static_cast<std::size_t>(from)]);
    out = Stack::checked(static_cast<std::int64_t>(places.size()), height, width,
                         attributes.integer("out_halo"), lanes);
  }

  void compute(Context& context) const {
    require(context.input_count() == stacks.size(), "there are ", context.input_count(), " inputs, not ",
            stacks.size());
    const std::int64_t blocks = stacks[0].blocks(context.input<float>(0), "parts");
    Fixed<const float*, most_parts> parts;
    for (std::size_t i = 0; i < stacks.size(); ++i) {
      const auto part = context.input<float>(i);
      stacks[i].check(part, blocks, "parts");
      parts.push_back(part.data());
    }
    const auto y = context.output<float>(0, out.shape(blocks));
    write_rows(context, out, y.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t i) {
      const Place place = places[static_cast<std::size_t>(c)];
      if (place.channel < 0)
        std::fill_n(row, out.row(), 0.0f);
      else
        std::copy_n(parts[place.part] + stacks[place.part].at(nb, place.channel, i), out.row(), row);
    });
  }
};
const Register<Channels> channels;

// dx's channel i is mask∘(the sum of dy over the channels that are i, + addend), with `source` as in the forward pass.
struct ChannelsGrad {
  static constexpr const char* name = "ChannelsGrad";
  static constexpr std::array inputs{Port{"dy", float32}, Port{"addend", float32, optional},
                                     Port{"mask", any, optional}};
  static constexpr std::array outputs{Port{"dx", float32}};

  std::vector<std::vector<std::int64_t>> readers;  // of each channel of x: channels of y, in order
  InputGradient gradient;

  explicit ChannelsGrad(const Attributes& attributes)
      : ChannelsGrad(attributes, Stack::from(attributes, "", "dx_halo")) {}

  void compute(Context& context) const {
    const Stack &from = gradient.dy, &to = gradient.dx;
    const auto dy = context.input<float>(0);
    const std::int64_t blocks = from.blocks(dy, "dy");
    const Finish finish = gradient.finish(context, 1, 2, blocks);
    const auto dx = context.output<float>(0, to.shape(blocks));
    write_rows(context, to, dx.data(), blocks,
               [&](float* row, std::int64_t nb, std::int64_t c, std::int64_t y) {
      const auto& found = readers[static_cast<std::size_t>(c)];
      const float* sum = row;
      if (found.empty()) std::fill_n(row, to.row(), 0.0f);
      if (found.size() == 1) sum = dy.data() + from.at(nb, found[0], y);
      if (found.size() > 1) std::copy_n(dy.data() + from.at(nb, found[0], y), to.row(), row);
      for (std::size_t i = 1; i < found.size(); ++i) {
        const float* const more = dy.data() + from.at(nb, found[i], y);
        for (std::int64_t j = 0; j < to.row(); ++j) row[j] += more[j];
      }
      finish(sum, 1, 0, row, nb, c, y);
    });
  }

 private:
  ChannelsGrad(const Attributes& attributes, const Stack& x)
      : readers(static_cast<std::size_t>(x.channels)), gradient(attributes, dy_of(attributes, x), x) {
    const auto source = sources(attributes, x.channels);
    for (std::size_t i = 0; i < source.size(); ++i)
      if (source[i] >= 0)
        readers[static_cast<std::size_t>(source[i])].push_back(static_cast<std::int64_t>(i));
  }

  static Stack dy_of(const Attributes& attributes, const Stack& x) {
    const auto count = static_cast<std::int64_t>(attributes.integers("source").size());
    return Stack::checked(count, x.height, x.width, attributes.integer("dy_halo"), x.lanes);
  }
};
const Register<ChannelsGrad> channels_grad;

}  // namespace
}  // namespace edge_bcs
