// What the manifest of an artifact says, each field checked: runtime/manifest.py in C++.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "session/json.h"

namespace edge_bcs {

inline constexpr const char *manifest_file = "manifest.json", *signature_file = "manifest.json.sig";
inline constexpr std::uint64_t largest_manifest = std::uint64_t{16} << 20, largest_signature = 4 << 10;

// Numbers of a flat buffer that belong to one kernel, parameter or batch norm.
struct Segment {
  std::string name;
  std::size_t offset = 0, size = 0;
  bool trained = true;

  std::size_t end() const { return offset + size; }
};

// An objective: edge_bcs/core/objectives.py says what each is.
struct Objective {
  enum class Start { uniform, gaussian };

  const char* name;
  bool adversarial;
  Start start;
  bool increases_kl;  // of the answer to the image as it is; else the cross-entropy with the label
  double adversarial_part;
  bool two_branches;

  // How many images of a batch are attacked: the first ones.
  std::uint64_t attacked(std::uint64_t batch) const {
    return static_cast<std::uint64_t>(static_cast<double>(batch) * adversarial_part);
  }
  bool accuracy_is_robust() const { return adversarial_part == 1 && !two_branches; }
  bool learns_without_labels() const { return two_branches && increases_kl; }
  // The buffer whose images the training graph reads.
  const char* training_input() const { return adversarial && !two_branches ? "adversarial" : "input"; }
};

// In which precision attacks are to be computed: runtime/precision.py.
enum class Precision { f32, half, automatic };

// Throws Error if there is none of that name.
Precision precision_named(std::string_view name);

// With what a training attacks (edge_bcs/core/settings.py): PGD, or a single step, which is watched.
enum class AttackKind { pgd, fgsm_rs, n_fgsm };

// "pgd", "fgsm-rs" or "n-fgsm".
const char* name_of(AttackKind kind);

struct ListedFile {
  std::string name;
  std::uint64_t bytes = 0;
  std::string sha256;
};

struct Manifest {
  std::string network, sparsity, batch_norm, resize, trained = "all";
  std::array<std::uint32_t, 3> image{};  // C, H, W
  std::uint32_t num_classes = 0;
  std::vector<std::string> classes;  // none, or as many as there are outputs
  std::size_t kappa = 0, size = 0, lists_length = 0, dense_size = 0, statistics_size = 0;
  std::size_t trained_kappa = 0, trained_dense_size = 0;
  std::vector<Segment> kernels, dense, statistics;
  std::uint64_t seed = 0, predicted_peak = 0, budget = 0, release = 0;  // 0: none
  // Images that are trained on at once, and that the buffers hold, a multiple: so many are attacked at once.
  std::uint32_t micro_batch = 0, attack_micro_batch = 0;
  std::uint32_t batch_size = 0, attack_steps = 0;
  const Objective* objective = nullptr;
  AttackKind attack = AttackKind::pgd;
  double beta = 0, epsilon = 0, step_size = 0;  // beta: weight of the loss's second term
  double learning_rate = 0, weight_decay = 0, momentum = 0, noise = 0;
  std::vector<ListedFile> files;

  std::optional<Precision> attack_precision;  // none of a network whose attack has no half-precision form

  bool batch_statistics() const { return batch_norm == "batch"; }
  bool trains_all() const { return trained == "all"; }
  const ListedFile* file(std::string_view name) const;

  // Throws Error, which names the field, if it cannot be right.
  static Manifest read(const Json& content);
};

// Whether stored names, or none, may be replaced by others: only outputs without a name get one.
bool may_become(const std::vector<std::string>& stored, const std::vector<std::string>& names);

// Throws Error unless the names are text that can be shown, distinct, of 1 to 255 characters.
void check_class_names(const std::vector<std::string>& names);

}  // namespace edge_bcs
