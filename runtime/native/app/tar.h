// The files of a plain tar, where they lie in it: what Python's tarfile finds, read as hostile.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "session/files.h"

namespace edge_bcs::app {

struct TarMember {
  std::string name;
  std::uint64_t offset, size;
};

// Its regular files in their order. Throws Error ("it …").
std::vector<TarMember> members_of(const Source& tar);

}  // namespace edge_bcs::app
