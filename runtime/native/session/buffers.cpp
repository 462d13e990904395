#include "session/buffers.h"

#include <algorithm>

#include "ops/op.h"

namespace edge_bcs {

namespace {

class Table {
 public:
  Table(const Program& program, std::byte* arena) : program_(program), arena_(arena) {}

  template <class T>
  std::span<T> find(std::string_view name, std::size_t count, ElementType type) const {
    const auto found = std::ranges::find(program_.buffers, name, &PlacedTensor::name);
    require(found != program_.buffers.end() && found->type == type && found->bytes == count * sizeof(T),
            "program.bin does not fit the manifest: the buffer ", std::string(name), " should have ",
            count * sizeof(T), " bytes");
    return {reinterpret_cast<T*>(arena_ + found->address), count};
  }

  std::span<float> floats(std::string_view name, std::size_t count) const {
    return find<float>(name, count, float32);
  }

 private:
  const Program& program_;
  std::byte* arena_;
};

}  // namespace

Buffers::Buffers(const Program& program, std::byte* arena, const Manifest& manifest) {
  const Table table(program, arena);
  const std::size_t images = manifest.attack_micro_batch, classes = manifest.num_classes;
  const std::size_t pixels = images * manifest.image[0] * manifest.image[1] * manifest.image[2];
  input = table.floats("input", pixels);
  adversarial = table.floats("adversarial", pixels);
  target = table.floats("target", images * classes);
  logits = table.floats("logits", images * classes);
  sample_weight = table.floats("sample_weight", images);
  labels = table.find<std::int64_t>("labels", images, int64);
  loss = table.floats("loss", 1);
  correct = table.floats("correct", manifest.objective->two_branches ? 2 : 1);
  step_size = table.floats("step_size", 1);
  epsilon = table.floats("epsilon", 1);
  hyper = table.floats("hyper", 4);
  counter = table.find<std::int64_t>("counter", 2, int64);
  reset_gradients = table.find<std::uint8_t>("lazy_reset_grad", 1, boolean);
  coo_gradient = table.floats("coo.value_grad.accumulation.buffer", manifest.trained_kappa);
  dense_gradient = table.floats("dense.value_grad.accumulation.buffer", manifest.trained_dense_size);
  table.find<std::int32_t>("coo.lists", manifest.lists_length, int32);
  const auto counts = state_counts(manifest);
  for (std::size_t tensor = 0; tensor < state_tensors; ++tensor)
    state[tensor] =
        tensor == coo_index
            ? std::as_writable_bytes(table.find<std::int32_t>(state_names[tensor], counts[tensor], int32))
            : std::as_writable_bytes(table.floats(state_names[tensor], counts[tensor]));
  mean = floats(batchnorm_mean);
  variance = floats(batchnorm_variance);
  if (!manifest.batch_statistics()) return;
  kept_mean = table.floats("rollback.mean", manifest.statistics_size);
  kept_variance = table.floats("rollback.variance", manifest.statistics_size);
}

StateBytes Buffers::state_bytes() const {
  StateBytes bytes;
  std::ranges::copy(state, bytes.begin());
  return bytes;
}

}  // namespace edge_bcs
