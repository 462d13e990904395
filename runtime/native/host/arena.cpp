#include "host/arena.h"

#include <sys/mman.h>

#include <cstdint>

namespace edge_bcs {

namespace {

constexpr std::size_t page = std::size_t{1} << 12;
constexpr std::size_t large_page = std::size_t{1} << 21;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Memory of the system that begins on a multiple of `unit`; null if there is none.
std::byte* map_aligned(std::size_t bytes, std::size_t unit) {
  const std::size_t slack = unit > page ? unit : 0;
  void* const mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* const start = static_cast<std::byte*>(mapped);
  const std::size_t skip = round_up(reinterpret_cast<std::uintptr_t>(start), unit) - reinterpret_cast<std::uintptr_t>(start);
  if (skip > 0) munmap(start, skip);
  if (slack > skip) munmap(start + skip + bytes, slack - skip);
  return start + skip;
}

}  // namespace

void* Arena::take(std::size_t bytes) {
  auto found = by_size_.lower_bound({bytes, nullptr});
  if (found == by_size_.end()) {
    if (!grow(bytes)) return nullptr;
    found = by_size_.lower_bound({bytes, nullptr});
  }
  const auto [size, start] = *found;
  remove_free(free_.find(start));
  if (size > bytes) add_free(start + bytes, size - bytes);
  return start;
}

void Arena::give_back(void* memory, std::size_t bytes) { add_free(static_cast<std::byte*>(memory), bytes); }

void Arena::trim() {
  for (auto region = regions_.begin(); region != regions_.end();) {
    const auto range = free_.find(region->first);
    if (range == free_.end() || range->second != region->second) {
      ++region;
      continue;
    }
    remove_free(range);
    munmap(region->first, region->second);
    region = regions_.erase(region);
  }
}

// Adds a region for `bytes`. Regions that are free are too small for it, and are returned first: what the arena holds
// stays near what was in use at once.
bool Arena::grow(std::size_t bytes) {
  trim();
  const bool large = bytes >= large_page;
  const std::size_t size = round_up(bytes, page);
  std::byte* const start = map_aligned(size, large ? large_page : page);
  if (start == nullptr) return false;
#ifdef MADV_HUGEPAGE
  if (large) madvise(start, size, MADV_HUGEPAGE);
#endif
  regions_.emplace(start, size);
  add_free(start, size);
  return true;
}

// Adds a free range, joined with its neighbours in the same region.
void Arena::add_free(std::byte* start, std::size_t bytes) {
  const auto next = free_.lower_bound(start);
  if (next != free_.end() && next->first == start + bytes && !regions_.contains(next->first)) {
    bytes += next->second;
    remove_free(next);
  }
  const auto after = free_.lower_bound(start);
  if (after != free_.begin() && !regions_.contains(start)) {
    const auto before = std::prev(after);
    if (before->first + before->second == start) {
      start = before->first;
      bytes += before->second;
      remove_free(before);
    }
  }
  free_.emplace(start, bytes);
  by_size_.emplace(bytes, start);
}

void Arena::remove_free(Places::iterator range) {
  by_size_.erase({range->second, range->first});
  free_.erase(range);
}

}  // namespace edge_bcs
