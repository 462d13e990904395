#include "session/files.h"

#include <cstring>

#include "ops/op.h"

namespace edge_bcs {

std::unique_ptr<Source> MemoryFiles::open(const std::string& name) const {
  for (const File& file : files_)
    if (file.name == name) return std::make_unique<MemorySource>(file.content);
  return nullptr;
}

void MemorySource::read(std::uint64_t offset, std::span<std::byte> into) const {
  require(offset <= content_.size() && into.size() <= content_.size() - offset, "it ends too early");
  if (!into.empty()) std::memcpy(into.data(), content_.data() + offset, into.size());
}

std::string read_all(const Source& source, std::uint64_t most) {
  require(source.size() <= most, "it has ", source.size(), " bytes, more than any such file");
  std::string content(static_cast<std::size_t>(source.size()), '\0');
  source.read(0, std::as_writable_bytes(std::span(content)));
  return content;
}

}  // namespace edge_bcs
