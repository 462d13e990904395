// The weights of a convolution as its operators are given them, Connections or DenseWeights. Both are bound to the tensors of
// a call, checked, and give the kernels what they read: Bound::forward, by output channel, and Bound::transpose, by input
// channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/walk.h"
#include "ops/conv_layer.h"
#include "ops/dispatch.h"
#include "ops/op.h"

namespace edge_bcs {

// Checks entries [begin, end): channel << 8 | kernel position, both in range.
inline void check_entries(const std::int32_t* entry, std::int64_t begin, std::int64_t end,
                          std::int64_t channels, std::int64_t positions, const char* name) {
  const EntryBounds largest = row_kernels().entry_bounds(entry + begin, end - begin);
  require((largest.entry >> 8) < channels && largest.position < positions, "lists: an entry of ", name,
          " is out of range for ", channels, " channels and ", positions, " kernel positions");
}

// Checks that `count` + 1 pointers ascend within [0, kappa].
inline void check_pointers(const std::int32_t* pointer, std::int64_t count, std::int64_t kappa,
                           const char* name) {
  bool ascending = pointer[0] >= 0 && pointer[count] <= kappa;
  for (std::int64_t i = 0; i < count; ++i) ascending &= pointer[i] <= pointer[i + 1];
  require(ascending, "lists: the ", name, " pointers do not ascend within [0, ", kappa, "]");
}

// Checks that a gradient has as many elements as what it is the gradient of.
inline void check_size(const char* name, std::int64_t count, const char* values, std::int64_t size) {
  require(count == size, name, " has ", count, " elements, ", values, " has ", size);
}

// The weights of a layer among the connections: where they act lies in coo.lists. Attributes forward_pointer and
// transpose_pointer, the input lists after all others.
class Connections {
 public:
  Connections(const Attributes& attributes, const ConvLayer& layer)
      : forward_pointer_(attributes.integer_in("forward_pointer", 0, most)),
        transpose_pointer_(attributes.integer_in("transpose_pointer", none, most)),
        transposed_(attributes.integer_in("transposed", all, most, all)),
        skip_(attributes.integer_in("skip", all_trained, most, all_trained)) {
    require(layer.algorithm == Algorithm::sparse ||
                (layer.groups == 1 && layer.algorithm != Algorithm::depthwise),
            "attribute algorithm is not \"sparse\", which connections of a layer with groups take");
  }

  // The parts of coo.lists that the layer uses, checked.
  class Bound {
   public:
    Bound(const Connections& self, const ConvLayer& layer, const Tensor<const float>& value,
          const Tensor<const std::int32_t>& lists)
        : layer_(layer),
          value_(value.data()),
          kappa_(value.size()),
          skip_(self.skip_),
          transposed_(self.transposed_ == all ? value.size() : self.transposed_),
          data_(lists.data()),
          forward_(lists.data() + self.forward_pointer_),
          transpose_(self.transpose_pointer_ == none ? nullptr : lists.data() + self.transpose_pointer_) {
      require(kappa_ <= most / 3 && transposed_ <= kappa_ && kappa_ + 2 * transposed_ <= lists.size() &&
                  self.forward_pointer_ + layer.y.channels + 1 <= lists.size() &&
                  (transpose_ == nullptr ||
                   self.transpose_pointer_ + layer.x.channels * layer.window.phases() + 1 <= lists.size()),
              "lists has ", lists.size(), " elements, too few for ", kappa_,
              " values and this layer's pointers");
    }

    // By output channel, in the order of the arrays.
    Weights forward() const {
      Weights weights;
      SparseRows& rows = weights.rows;
      rows.pointer = forward_;
      rows.entry = data_;
      rows.value = value_;
      check_pointers(rows.pointer, layer_.y.channels, kappa_, "forward");
      check_entries(rows.entry, rows.pointer[0], rows.pointer[layer_.y.channels], layer_.x.channels,
                    layer_.window.positions(), "forward_column");
      return weights;
    }

    // By input channel and phase; pointers of phase 0.
    Weights transpose(const float* scale) const {
      require(transpose_ != nullptr,
              "the layer has no transpose lists, which the gradient of its input reads");
      const std::int64_t count = layer_.x.channels * layer_.window.phases();
      Weights weights;
      SparseRows& rows = weights.rows;
      rows.pointer = transpose_;
      rows.step = layer_.window.phases();
      rows.entry = data_ + kappa_;
      rows.position = data_ + kappa_ + transposed_;
      rows.value = value_;
      rows.factor = scale;
      check_pointers(rows.pointer, count, transposed_, "transpose");
      check_entries(rows.entry, rows.pointer[0], rows.pointer[count], layer_.y.channels,
                    layer_.window.positions(), "transpose_row");
      const EntryBounds largest =
          row_kernels().entry_bounds(rows.position + rows.pointer[0], rows.pointer[count] - rows.pointer[0]);
      require(largest.entry < kappa_ || rows.pointer[0] == rows.pointer[count],
              "lists: a transpose_position is not in [0, ", kappa_, ")");
      return weights;
    }

    // Of the pointers of one phase those of the next.
    static void next_phase(Weights& weights) { ++weights.rows.pointer; }

    // That no entry lies in a phase that no kernel position reaches: it would be a fault of the lists.
    static void check_none(const Weights& weights, std::int64_t count) {
      for (std::int64_t row = 0; row < count; ++row)
        require(weights.rows.begin(row) == weights.rows.end(row),
                "lists: an entry lies in a phase that no kernel position reaches");
    }

    // That the gradient, of `count` numbers, has room for that of this layer's connections, whose pointers are checked.
    void check_gradient(const char* name, std::int64_t count, const char* values) const {
      if (skip_ == all_trained) return check_size(name, count, values, kappa_);
      require(skip_ <= forward_[0] && forward_[layer_.y.channels] - skip_ <= count, name, " has ", count,
              " elements, and the layer's connections ", forward_[0], " to ", forward_[layer_.y.channels],
              " less ", skip_, " are not among them");
    }

    // Where the gradient of the first of all connections would lie: `skip` of those before the layer have none.
    float* gradient(const Tensor<float>& trained) const {
      return trained.data() - (skip_ == all_trained ? 0 : skip_);
    }

   private:
    const ConvLayer& layer_;
    const float* value_;
    std::int64_t kappa_, skip_, transposed_;  // the last: entries of the transpose lists
    const std::int32_t *data_, *forward_, *transpose_;
  };

  Bound bind(const Context& context, const ConvLayer& layer, std::size_t value, std::size_t lists) const {
    return {*this, layer, context.input<float>(value), context.input<std::int32_t>(lists)};
  }

 private:
  static constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  static constexpr std::int64_t all_trained = -1, all = -1, none = -1;
  std::int64_t forward_pointer_, transpose_pointer_, transposed_, skip_;
};

// The weights of a layer in dense.value, [out, in / groups, kernel positions] from the attribute `weight`.
class DenseWeights {
 public:
  DenseWeights(const Attributes& attributes, const ConvLayer& layer)
      : offset_(attributes.integer_in("weight", 0, most)),
        gradient_(attributes.integer_in("weight_gradient", all_trained, most, all_trained)) {
    require(layer.algorithm != Algorithm::sparse,
            "attribute algorithm is \"sparse\", but all weights are there");
  }

  class Bound {
   public:
    Bound(const DenseWeights& self, const ConvLayer& layer, const Tensor<const float>& dense)
        : layer_(layer),
          size_(dense.size()),
          gradient_(self.gradient_),
          offset_(self.offset_),
          weights_(dense.data() + offset_) {
      const std::int64_t offset = offset_;
      require(offset + layer.weights() <= dense.size(), "the layer's weights are ", offset, " to ",
              offset + layer.weights(), " of ", dense.size(), " numbers");
    }

    Weights forward() const {
      Weights weights;
      weights.all = weights_;
      weights.row_step = row();
      weights.channel_step = layer_.window.positions();
      return weights;
    }

    Weights transpose(const float* scale) const {
      Weights weights;
      weights.all = weights_;
      weights.row_step = layer_.window.positions();
      weights.channel_step = row();
      weights.factor = scale;
      return weights;
    }

    static void next_phase(Weights&) {}
    static void check_none(const Weights&, std::int64_t) {}

    void check_gradient(const char* name, std::int64_t count, const char* values) const {
      if (gradient_ == all_trained) return check_size(name, count, values, size_);
      require(gradient_ + layer_.weights() <= count, name, " has ", count, " elements, and none from ",
              gradient_, " to ", gradient_ + layer_.weights());
    }

    float* gradient(const Tensor<float>& trained) const {
      return trained.data() + (gradient_ == all_trained ? offset_ : gradient_);
    }

   private:
    std::int64_t row() const { return layer_.x.channels / layer_.groups * layer_.window.positions(); }

    const ConvLayer& layer_;
    std::int64_t size_, gradient_, offset_;
    const float* weights_;
  };

  Bound bind(const Context& context, const ConvLayer& layer, std::size_t value, std::size_t) const {
    return {*this, layer, context.input<float>(value)};
  }

 private:
  static constexpr std::int64_t most = std::int64_t{1} << 40, all_trained = -1;
  std::int64_t offset_, gradient_;
};

}  // namespace edge_bcs
