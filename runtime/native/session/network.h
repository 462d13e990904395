// An artifact that is open: its files verified, its program in an arena, its state read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runner/runner.h"
#include "session/buffers.h"
#include "session/ed25519.h"
#include "session/files.h"
#include "session/manifest.h"
#include "session/state.h"

namespace edge_bcs {

// The machine, or the caller's arena, has not the memory.
class NoMemory : public Error {
 public:
  using Error::Error;
};

// A pixel, the loss or a gradient is not finite.
class NotFinite : public Error {
 public:
  using Error::Error;
};

// Throws a Kind of Error with the parts written one after the other.
template <class Kind, class... Parts>
[[noreturn]] void fail_with(const Parts&... parts) {
  throw Kind(text_of(parts...));
}

// Who is to have made an artifact.
struct Trust {
  std::vector<PublicKey> keys;    // one of them must have signed the manifest; none: nobody
  std::uint64_t min_release = 0;  // with keys: the oldest release that is taken
};

struct Options {
  int threads = 0;  // 0: all processors
  std::span<std::byte> arena;
  std::uint64_t cap = 0;  // of an arena that is not given; 0: what the artifact was exported for
  std::optional<std::uint64_t> seed;
  Trust trust;
  std::optional<Precision> attack_precision;  // none: what the artifact says, or the run was begun with
};

// What a folder says before its program is opened.
struct Described {
  std::string text;  // of the manifest
  Manifest manifest;
  std::string read;                    // of the program's file, where it does not lie in memory
  std::span<const std::byte> program;  // content of the file: that, or where it lies

  Described() = default;
  Described(const Described&) = delete;
  Described& operator=(const Described&) = delete;

  // Throws Error if manifest or program is missing, damaged, not what the manifest says, or made by nobody who is trusted.
  static std::unique_ptr<Described> of(const Files& files, const Trust& trust);
};

class Network {
 public:
  // Throws Error.
  Network(const Files& files, const Options& options, bool all_files);

  // Runs a graph; Error, or NotFinite, if it refuses.
  void run(const char* graph);
  // Builds what follows from the connections.
  void build_lists() { run("lists"); }

  // Replaces the state by one that lies in memory. Throws Error, and keeps its own, if it is not intact.
  void replace_state(std::span<const std::byte> memory);

  // Replaces the state by the newest intact one of another run of this network, however its memory is planned and its training
  // set; takes the names of outputs that have none. Throws Error; the state is then anything.
  void adopt(const Files& run);

  // Replaces the state by the best one of a run, of that step; by the newest slot's if that cannot be used. Returns why it
  // cannot, or "".
  std::string return_to_best(const Files& run, std::uint64_t step);

  const std::string& manifest_text() const { return text_; }
  const Manifest& manifest() const { return manifest_; }
  Manifest& manifest() { return manifest_; }
  const Buffers& buffers() const { return *buffers_; }
  std::size_t arena_bytes() const { return arena_.size(); }
  // Of the bound buffers, which hold something while no graph runs.
  std::size_t bound_bytes() const;
  // What lies behind them, in which nothing is kept.
  std::span<std::byte> scratch() const;
  int threads() const { return threads_; }
  // Whether attacks are in half precision here.
  bool half() const { return half_; }
  // Of the state that was read.
  const StateHeader& read_header() const { return header_; }
  // What the run has noted beside; an artifact's state says other things of itself.
  Metadata notes() const { return manifest_.file(state_file) == nullptr ? notes_of(header_) : Metadata{}; }
  // What was lost by reading an older slot; empty if nothing was.
  const std::string& warning() const { return warning_; }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };

  void take_arena(const Described& described, const Options& options);
  // `sealed`: the manifest lists the state, which was verified.
  void read_state(const Files& files, bool sealed);
  std::string read_slot(const Files& files, const std::string& name, bool sealed);

  std::string text_;
  Manifest manifest_;
  std::unique_ptr<std::byte, Free> owned_;
  std::span<std::byte> arena_;
  int threads_ = 1;
  bool half_ = false;  // whether attacks are in half precision
  std::unique_ptr<Runner> runner_;
  std::unique_ptr<Buffers> buffers_;
  StateHeader header_;
  std::string warning_;
};

}  // namespace edge_bcs
