// Whose artifacts are taken: --trust-key and --min-release, and the newest release that was (runtime/release.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "app/options.h"

namespace edge_bcs::app {

inline constexpr std::size_t key_bytes = 32;

// Keys are those of the environment where the command line has none.
struct Trusted {
  std::vector<std::uint8_t> keys;  // `key_bytes` each
  std::uint64_t min_release = 0;

  bool any() const { return !keys.empty(); }
};

// The files of the keys: of the command line, else of the environment.
std::vector<std::string> trusted_files(const Options& options);
// Throws Error for a key that cannot be used.
Trusted trusted_by(const Options& options);

// Refuses an artifact of a release below one that was accepted for the run folder before. Throws Error.
void check_release(const std::string& artifact, std::uint64_t release, const std::string& run);
// Keeps, beside the run folder, that it was accepted.
void remember_release(std::uint64_t release, const std::string& run);

}  // namespace edge_bcs::app
