// The trained state as files have it: runtime/state.py and edge_bcs/core/state.py in C++.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "session/files.h"
#include "session/manifest.h"
#include "session/sha256.h"

namespace edge_bcs {

inline constexpr const char* state_file = "state.safetensors";
inline constexpr const char* previous_file = "state.previous.safetensors";
inline constexpr const char* best_file = "state.best.safetensors";
inline constexpr const char* partial_file = "state.safetensors.partial";

// The seven tensors, in their order.
enum StateTensor : std::size_t {
  coo_value,
  coo_index,
  coo_momentum,
  dense_value,
  dense_momentum,
  batchnorm_mean,
  batchnorm_variance
};
inline constexpr std::array state_names{"coo.value",         "coo.index",      "coo.momentum",
                                        "dense.value",       "dense.momentum", "batchnorm.mean",
                                        "batchnorm.variance"};
inline constexpr std::size_t state_tensors = state_names.size();

// Bytes of each tensor; they need not be aligned.
using StateBytes = std::array<std::span<const std::byte>, state_tensors>;

// Numbers of each tensor.
std::array<std::size_t, state_tensors> state_counts(const Manifest& manifest);

// What a state says beside its tensors, sorted by name.
using Metadata = std::vector<std::pair<std::string, std::string>>;

// A state's file whose header was read and checked.
struct StateHeader {
  Metadata metadata;   // without the checksum
  std::string sha256;  // as stated; empty where there is none
  std::array<std::uint64_t, state_tensors> offsets{};
  std::uint64_t step = 0, seed = 0;
  std::optional<std::uint64_t> images;  // that its training saw, where it says so

  // Null if there is none of that name.
  const std::string* find(std::string_view name) const;

  // Throws Error ("it …") if it is no state of this network.
  static StateHeader read(const Source& source, const Manifest& manifest);
};

// Throws Error ("its …") if the checksum is not that of these tensors with this metadata.
void check_sum(const StateHeader& header, const StateBytes& state);

// Throws Error unless `state` is one: positions ascending, every number finite, no connection of weight 0, no negative
// variance.
void check_state(const StateBytes& state, const Manifest& manifest);

// Name of the kernel, parameter or batch norm that an element of a tensor belongs to.
std::string owner(const Manifest& manifest, StateTensor tensor, std::size_t place, const StateBytes& state);

// A text that grows within memory that it got once.
class Text {
 public:
  explicit Text(std::size_t most) { content_.reserve(most); }
  void clear() { content_.clear(); }
  // Throws Error if there is no place left.
  void add(std::string_view part);
  void add(std::uint64_t number);
  // As Python writes it: "0.001", "1e-05", "2.0".
  void add(double number);
  // As json.dumps writes text, in quotes.
  void add_quoted(std::string_view part);
  std::string_view view() const { return content_; }

 private:
  std::string content_;
};

// What a state that is written says beside its tensors; no progress is empty.
struct Facts {
  std::uint64_t step, seed, images;
  std::string_view progress;
  const Metadata& notes;  // others, sorted by name
};

// What a state that was read says beside what every state says: of a round of a fleet, for one.
Metadata notes_of(const StateHeader& header);
// Bytes of memory that a header with these notes never exceeds.
std::size_t most_header_of(const Metadata& notes);

// Writes into `header` what a state's file begins with, the checksum among it.
void write_header(Text& header, const Facts& facts, const StateBytes& state);

// What a state's file begins with: the length of its header.
std::array<std::byte, 8> length_of(std::string_view header);

// The order in which the file has the tensors behind its header.
inline constexpr std::array<StateTensor, state_tensors> file_order{
    batchnorm_mean, batchnorm_variance, coo_momentum, coo_value, dense_momentum, dense_value, coo_index};

// Calls write(bytes) for each part of a state's file, whose header was made by `write_header`; returns the bytes of all.
template <class Write>
std::uint64_t write_parts(std::string_view header, const StateBytes& state, const Write& write) {
  write(std::span<const std::byte>(length_of(header)));
  write(std::as_bytes(std::span(header)));
  std::uint64_t bytes = sizeof(std::uint64_t) + header.size();
  for (const StateTensor tensor : file_order) {
    write(state[tensor]);
    bytes += state[tensor].size();
  }
  return bytes;
}

// Writes it into memory that is large enough; returns its bytes.
std::size_t write_state(std::string_view header, const StateBytes& state, std::span<std::byte> memory);

// Bytes of memory that a header never exceeds.
inline constexpr std::size_t most_header = 8192;

}  // namespace edge_bcs
