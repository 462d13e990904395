#include "decode/bytes.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace edge_bcs {

std::span<const std::byte> Bytes::more() {
  if (!ready_.empty()) {
    const std::span<const std::byte> rest = ready_;
    ready_ = {};
    return rest;
  }
  const auto size = static_cast<std::size_t>(std::min<std::uint64_t>(buffer_.size(), end_ - next_));
  ssize_t got = 0;
  do got = pread(descriptor_, buffer_.data(), size, static_cast<off_t>(next_));
  while (got < 0 && errno == EINTR);
  failed_ |= got < 0;
  if (got <= 0) return {};
  next_ += static_cast<std::uint64_t>(got);
  return std::span(buffer_).first(static_cast<std::size_t>(got));
}

bool Bytes::fill(std::span<std::byte> into) {
  while (!into.empty()) {
    if (ready_.empty()) ready_ = more();
    if (ready_.empty()) return false;
    const std::size_t size = std::min(into.size(), ready_.size());
    std::copy_n(ready_.begin(), size, into.begin());
    into = into.subspan(size);
    ready_ = ready_.subspan(size);
  }
  return true;
}

bool Bytes::skip(std::uint64_t count) {
  const std::size_t here = static_cast<std::size_t>(std::min<std::uint64_t>(count, ready_.size()));
  ready_ = ready_.subspan(here);
  if (count - here > end_ - next_) return false;
  next_ += count - here;
  return true;
}

}  // namespace edge_bcs
