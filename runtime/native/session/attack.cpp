#include "session/attack.h"

#include <algorithm>
#include <array>

#include "ops/dispatch.h"
#include "ops/exponential.h"

namespace edge_bcs {

namespace {

constexpr float gaussian_start = 0.001f;  // TRADES, MART and RST: x + 0.001·N(0, 1)
constexpr std::uint64_t words = 4;        // of a block
constexpr std::size_t blocks_at_once = 64;
constexpr double no_ball = 1;       // a radius that no pixel can leave
constexpr double fast_step = 1.25;  // of ε: Wong et al. (2020)
constexpr double wide_noise = 2;    // of ε: de Jorge et al. (2022)

// Adds to each number of x the draw with its number, from `start` on, and brings the sum back into [0, 1].
template <class Draw>
void add_draws(std::span<float> x, std::uint64_t start, const Draw& draw) {
  std::array<float, words * blocks_at_once> drawn;
  std::size_t done = 0;
  while (done < x.size()) {
    const std::uint64_t first = (start + done) / words;
    const std::size_t skipped = static_cast<std::size_t>((start + done) % words);
    const std::size_t count = std::min(drawn.size() - skipped, x.size() - done);
    draw(first, (skipped + count + words - 1) / words, drawn.data());
    for (std::size_t i = 0; i < count; ++i) {
      const float moved = x[done + i] + drawn[skipped + i];
      x[done + i] = std::min(std::max(moved, 0.0f), 1.0f);
    }
    done += count;
  }
}

}  // namespace

void move_to_start(std::span<float> x, Start start, double width, const Noise& noise, std::size_t pixels) {
  if (start == Start::none) {
    for (float& pixel : x) pixel = std::min(std::max(pixel, 0.0f), 1.0f);
    return;
  }
  const Philox philox(noise.seed, noise.step, noise.purpose);
  const std::uint64_t first_draw = noise.place * pixels;
  if (start == Start::uniform) {
    add_draws(x, first_draw,
              [&, reach = static_cast<float>(width)](std::uint64_t first, std::size_t blocks, float* drawn) {
      for (std::size_t block = 0; block < blocks; ++block)
        for (const std::uint32_t word : philox.block(first + block)) {
          const float uniform = static_cast<float>(word >> 8) * 0x1p-24f;
          *drawn++ = (2.0f * uniform - 1.0f) * reach;
        }
    });
    return;
  }
  const NormalStream stream = philox.stream();
  add_draws(x, first_draw, [&](std::uint64_t first, std::size_t blocks, float* drawn) {
    normal_kernels().normals(stream, first, static_cast<int>(blocks), drawn);
    for (std::size_t i = 0; i < words * blocks; ++i) drawn[i] *= gaussian_start;
  });
}

void softmax(std::span<const float> logits, std::size_t classes, std::span<float> probabilities) {
  for (std::size_t first = 0; first + classes <= logits.size(); first += classes) {
    const std::span<const float> row = logits.subspan(first, classes);
    double largest = row[0], sum = 0;
    for (const float logit : row) largest = std::max(largest, static_cast<double>(logit));
    for (const float logit : row) sum += exponential(logit - largest);
    for (std::size_t k = 0; k < classes; ++k)
      probabilities[first + k] = static_cast<float>(exponential(row[k] - largest) / sum);
  }
}

void descend(Network& network, std::size_t images, const Descent& how, const Noise& noise) {
  const Buffers& buffers = network.buffers();
  const std::size_t classes = network.manifest().num_classes;
  const std::size_t pixels = buffers.input.size() / buffers.labels.size();
  if (how.increases_kl) {
    network.run("eval");
    softmax(buffers.logits, classes, buffers.target);
  } else {
    std::ranges::fill(buffers.target, 0.0f);
    for (std::size_t i = 0; i < buffers.labels.size(); ++i)
      buffers.target[i * classes + static_cast<std::size_t>(buffers.labels[i])] = 1;
  }
  std::ranges::copy(buffers.input, buffers.adversarial.begin());
  move_to_start(buffers.adversarial.first(images * pixels), how.start, how.noise, noise, pixels);
  buffers.epsilon[0] = static_cast<float>(how.radius);
  buffers.step_size[0] = static_cast<float>(how.step_size);
  for (std::uint32_t step = 0; step < how.steps; ++step) network.run("attack");
}

Descent crafting(const Manifest& manifest, AttackKind kind) {
  const Objective& objective = *manifest.objective;
  const double epsilon = manifest.epsilon;
  switch (kind) {
    case AttackKind::fgsm_rs:
      return {epsilon, epsilon, fast_step * epsilon, 1, Start::uniform, objective.increases_kl};
    case AttackKind::n_fgsm:
      return {wide_noise * epsilon, no_ball, epsilon, 1, Start::uniform, objective.increases_kl};
    default:
      break;
  }
  const Start start = objective.start == Objective::Start::uniform ? Start::uniform : Start::gaussian;
  return {epsilon, epsilon, manifest.step_size, manifest.attack_steps, start, objective.increases_kl};
}

Descent measuring(double epsilon, std::uint32_t steps) {
  return {epsilon, epsilon, 2.5 / std::max<std::uint32_t>(steps, 1) * epsilon, steps, Start::uniform, false};
}

void craft(Network& network, AttackKind kind, std::size_t images, std::uint64_t first, std::uint64_t batch,
           const Noise& noise) {
  const Manifest& manifest = network.manifest();
  const Buffers& buffers = network.buffers();
  const std::uint64_t attacked = manifest.objective->attacked(batch);
  if (first < attacked) descend(network, images, crafting(manifest, kind), noise);
  const std::size_t pixels = buffers.input.size() / buffers.labels.size();
  const std::uint64_t kept =
      attacked > first ? std::min<std::uint64_t>(attacked - first, buffers.labels.size()) : 0;
  const std::size_t clean = static_cast<std::size_t>(kept) * pixels;
  std::ranges::copy(buffers.input.subspan(clean),
                    buffers.adversarial.begin() + static_cast<std::ptrdiff_t>(clean));
}

}  // namespace edge_bcs
