// BuildLists: where each connection acts, layer by layer, row by row and column by column.

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "ops/fixed.h"
#include "ops/op.h"
#include "ops/window.h"

namespace edge_bcs {
namespace {

// A sparse layer [out_channels, in_channels / groups, kernel height, kernel width] whose first number is `offset`.
struct Layer {
  // Integers of a layer in the attribute `layers`: all of it, and in the files of earlier releases one stride and one padding.
  static constexpr std::size_t integers = 14, fewer_integers = 7;

  std::int64_t offset, out_channels, in_channels;
  Window window;
  std::int64_t groups = 1;

  static Layer from(const std::int64_t* n, std::size_t count) {
    if (count == fewer_integers)
      return {n[0], n[1], n[2], {{n[3], n[5], n[6], n[6]}, {n[4], n[5], n[6], n[6]}}};
    return {n[0], n[1], n[2], {{n[3], n[5], n[7], n[9], n[11]}, {n[4], n[6], n[8], n[10], n[12]}}, n[13]};
  }

  bool in_range() const {
    constexpr std::int64_t channels = std::int64_t{1} << 23;
    return out_channels >= 1 && out_channels < channels && in_channels >= 1 && in_channels < channels &&
           window.in_range() && groups >= 1 && in_channels % groups == 0 && out_channels % groups == 0;
  }
  std::int64_t row_size() const { return in_channels / groups * window.positions(); }
  std::int64_t size() const { return out_channels * row_size(); }
  std::int64_t forward_pointers() const { return out_channels + 1; }
  std::int64_t transpose_pointers() const { return in_channels * window.phases() + 1; }
};

// Fills coo.lists (i32[M], in place) from the positions (i32[κ]): M = 3κ + Σ(O + 1) + Σ(I·sy·sx + 1).
//   forward_column[κ]      in_channel << 8 | kernel position, in the order of the κ arrays
//   transpose_row[κ]       out_channel << 8 | kernel position } both ordered, within a layer, by
//   transpose_position[κ]  where in the κ arrays              } (in_channel, phase, out_channel, kernel pos.)
//   forward pointers       for each layer O + 1 positions: where the rows begin
//   transpose pointers     for each layer I·sy·sx + 1 positions: where (in_channel, phase) begins
//
// In channels are those of the whole input, also where the layer has groups. The phase of a kernel position is which of the
// sy·sx interleaved images of the input it touches (Window::phase).
//
// Where no gradient goes through a layer it needs neither transpose lists nor their pointers: the attribute `transposed` has a 1
// for each layer that has them and a 0 for the others, and M = κ + 2κ' + Σ(O + 1) + Σ'(I·sy·sx + 1), where κ' and Σ' are of the
// former. Without it all have them.
//
// The attribute `layers` has 14 integers a layer: its offset, O, I, kernel height and width, strides sy and sx, the pads at the
// top, left, bottom and right, dilations and groups; `layer_integers` is 14 then. Without it they are the seven of earlier
// releases: offset, O, I, kernel height and width, stride, padding.
struct BuildLists {
  static constexpr const char* name = "BuildLists";
  static constexpr std::array inputs{Port{"index", int32}, Port{"lists", int32}};
  static constexpr std::array outputs{Port{"lists_out", int32, aliases(1)}};

  std::vector<Layer> layers;
  std::vector<bool> transposed;  // the layers that have transpose lists
  std::int64_t positions = 0;    // N
  std::int64_t pointers = 0;     // of all layers

  // Where each layer's part of the transpose lists begins; last κ'.
  static constexpr std::size_t most_layers = 2048;
  using Places = Fixed<std::int64_t, most_layers + 1>;

  explicit BuildLists(const Attributes& attributes) {
    const std::vector<std::int64_t> flat = attributes.integers("layers");
    const auto count = static_cast<std::size_t>(attributes.integer("layer_integers", Layer::fewer_integers));
    require(count == Layer::integers || count == Layer::fewer_integers, "the attribute layer_integers is ",
            count, ", neither ", Layer::fewer_integers, " nor ", Layer::integers);
    require(!flat.empty() && flat.size() % count == 0, "the attribute layers has ", flat.size(),
            " numbers, not ", count, " for each layer");
    const std::vector<std::int64_t> flags = attributes.integers("transposed", {});
    require(flags.empty() || flags.size() == flat.size() / count, "the attribute transposed has ",
            flags.size(), " numbers for ", flat.size() / count, " layers");
    require(flat.size() / count <= most_layers, "there are more than ", most_layers, " layers");
    for (std::size_t i = 0; i < flat.size(); i += count) {
      transposed.push_back(flags.empty() || flags[i / count] != 0);
      const Layer layer = Layer::from(&flat[i], count);
      require(layer.in_range(), "layer ", layers.size(), " has a size out of range");
      require(layer.offset == positions, "layer ", layers.size(), " begins at ", layer.offset, ", not at ",
              positions);
      positions += layer.size();
      require(positions <= std::numeric_limits<std::int32_t>::max(), "the network has 2^31 weights or more");
      pointers += layer.forward_pointers() + (transposed.back() ? layer.transpose_pointers() : 0);
      layers.push_back(layer);
    }
  }

  void compute(Context& context) const {
    const auto index = context.input<std::int32_t>(0);
    const std::int64_t kappa = index.size();
    require(index.shape() == Shape{kappa}, "index is ", index.shape().text(), ", not a vector");
    const Places places = checked(index);
    const auto length = context.input<std::int32_t>(1).shape();
    require(length == Shape{size(kappa, places)}, "lists is ", length.text(), ", not [", size(kappa, places),
            "]");
    fill_all(context, index.data(), kappa, places, context.in_place<std::int32_t>(0, 1).data());
  }

  // Checks that the positions ascend, and returns what they say.
  Places checked(const Tensor<const std::int32_t>& index) const {
    const std::int64_t kappa = index.size();
    int descending = 0;  // gathered without branching, so that the compiler uses vectors
    const std::int32_t* const places = index.data();
    for (std::int64_t t = 1; t < kappa; ++t) descending |= static_cast<int>(places[t - 1] >= places[t]);
    require(descending == 0 && (kappa == 0 || (index[0] >= 0 && index[kappa - 1] < positions)),
            "index is not strictly ascending in [0, ", positions, ")");
    Places ends;
    ends.push_back(0);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const auto [first, last] = range(layers[l], places, kappa);
      ends.push_back(ends.back() + (transposed[l] ? last - first : 0));
    }
    return ends;
  }

  // M
  std::int64_t size(std::int64_t kappa, const Places& places) const {
    return kappa + 2 * places.back() + pointers;
  }

  void fill_all(const Context& context, const std::int32_t* index, std::int64_t kappa, const Places& places,
                std::int32_t* lists) const {
    context.parallel_for(static_cast<std::int64_t>(layers.size()), [&](std::int64_t number) {
      std::int32_t* forward_pointer = lists + kappa + 2 * places.back();
      for (std::int64_t l = 0; l < number; ++l) forward_pointer += layers[l].forward_pointers();
      std::int32_t* transpose_pointer = forward_pointer;
      for (std::size_t l = number; l < layers.size(); ++l) transpose_pointer += layers[l].forward_pointers();
      for (std::int64_t l = 0; l < number; ++l)
        if (transposed[l]) transpose_pointer += layers[l].transpose_pointers();
      const Transpose transpose{lists + kappa, lists + kappa + places.back(), transpose_pointer,
                                places[number]};
      fill(layers[number], index, kappa, lists, forward_pointer, transposed[number] ? &transpose : nullptr);
    });
  }

 private:
  // The transpose lists, a layer's pointers into them, and where its part begins.
  struct Transpose {
    std::int32_t *row, *position, *pointer;
    std::int64_t first;
  };

  // The connections of a layer, [first, last).
  static std::pair<std::int64_t, std::int64_t> range(const Layer& layer, const std::int32_t* index,
                                                     std::int64_t kappa) {
    const auto find = [&](std::int64_t position) {
      return std::lower_bound(index, index + kappa, position) - index;
    };
    return {find(layer.offset), find(layer.offset + layer.size())};
  }

  static void fill(const Layer& layer, const std::int32_t* index, std::int64_t kappa,
                   std::int32_t* forward_column, std::int32_t* forward_pointer, const Transpose* transpose) {
    const auto [first, last] = range(layer, index, kappa);
    std::int32_t* const transpose_pointer = transpose == nullptr ? nullptr : transpose->pointer;

    std::array<std::int64_t, 256> phase{};
    for (std::int64_t k = 0; k < layer.window.positions(); ++k) phase[k] = layer.window.phase(k);
    const std::int64_t slots = layer.transpose_pointers() - 1, phases = layer.window.phases();
    const auto slot_of = [&](std::int64_t t) {
      return (forward_column[t] >> 8) * phases + phase[forward_column[t] & 255];
    };

    // Rows, and how many entries each slot has; counts are kept two places up, so that the running sums turn
    // into where each slot begins (one place up), and filling the slots turns that into the pointers.
    if (transpose != nullptr) std::fill_n(transpose_pointer, slots + 1, 0);
    std::int64_t rows = 0;
    const std::int64_t row_size = layer.row_size(), group_rows = layer.out_channels / layer.groups;
    const auto kernel = static_cast<std::uint32_t>(layer.window.positions());  // 32 bits divide faster
    std::int64_t row_start = -row_size;
    std::uint32_t first_channel = 0;  // of the row's group
    for (std::int64_t t = first; t < last; ++t) {
      const std::int64_t position = index[t] - layer.offset;
      for (; row_start + row_size <= position; ++rows, row_start += row_size) {
        forward_pointer[rows] = static_cast<std::int32_t>(t);
        first_channel = static_cast<std::uint32_t>(rows / group_rows * (layer.in_channels / layer.groups));
      }
      const auto in_row = static_cast<std::uint32_t>(position - row_start);
      const std::uint32_t in_group = in_row / kernel, channel = first_channel + in_group;
      forward_column[t] = static_cast<std::int32_t>(channel << 8 | (in_row - in_group * kernel));
      if (transpose == nullptr) continue;
      const std::int64_t slot = slot_of(t);
      if (slot + 2 <= slots) ++transpose_pointer[slot + 2];
    }
    for (; rows <= layer.out_channels; ++rows) forward_pointer[rows] = static_cast<std::int32_t>(last);
    if (transpose == nullptr) return;
    transpose_pointer[0] = transpose_pointer[1] = static_cast<std::int32_t>(transpose->first);
    for (std::int64_t slot = 2; slot <= slots; ++slot) transpose_pointer[slot] += transpose_pointer[slot - 1];

    // In the order of the κ arrays, so that a slot's entries come by out channel and kernel position.
    for (std::int64_t row = 0; row < layer.out_channels; ++row)
      for (std::int64_t t = forward_pointer[row]; t < forward_pointer[row + 1]; ++t) {
        const std::int64_t place = transpose_pointer[slot_of(t) + 1]++;
        transpose->row[place] = static_cast<std::int32_t>(row << 8 | (forward_column[t] & 255));
        transpose->position[place] = static_cast<std::int32_t>(t);
      }
  }
};
const Register<BuildLists> build_lists;

// The same lists, of all layers, in memory of their own: for a graph that is seldom run, which needs more of them than are kept.
struct MakeLists {
  static constexpr const char* name = "MakeLists";
  static constexpr bool half_precision = true;
  static constexpr std::array inputs{Port{"index", int32}};
  static constexpr std::array outputs{Port{"lists", int32}};

  BuildLists built;

  explicit MakeLists(const Attributes& attributes) : built(attributes) {}

  void compute(Context& context) const {
    const auto index = context.input<std::int32_t>(0);
    const std::int64_t kappa = index.size();
    require(index.shape() == Shape{kappa}, "index is ", index.shape().text(), ", not a vector");
    const BuildLists::Places places = built.checked(index);
    const auto lists = context.output<std::int32_t>(0, {built.size(kappa, places)});
    built.fill_all(context, index.data(), kappa, places, lists.data());
  }
};
const Register<MakeLists> make_lists;

}  // namespace
}  // namespace edge_bcs
