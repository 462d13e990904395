#include "host/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

namespace edge_bcs {

namespace {

const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
constexpr std::size_t large_page = std::size_t{1} << 21;
// Addresses of a region, which cost nothing until they are opened.
constexpr std::size_t addresses = std::size_t{1} << 30;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Addresses without memory, which begin on a large page; null if there are none.
std::byte* reserve(std::size_t bytes) {
  void* const mapped =
      mmap(nullptr, bytes + large_page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* const start = static_cast<std::byte*>(mapped);
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::size_t skip = round_up(address, large_page) - address;
  if (skip > 0) munmap(start, skip);
  munmap(start + skip + bytes, large_page - skip);
  return start + skip;
}

// Has large pages put there, where the system does that on demand.
void prefer_large_pages([[maybe_unused]] std::byte* start, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(start, bytes, MADV_HUGEPAGE);
#endif
}

}  // namespace

void* Arena::take(std::size_t bytes, std::size_t room) {
  auto found = by_size_.lower_bound({bytes, nullptr});
  if (found == by_size_.end()) {
    if (!grow(bytes, room)) return nullptr;
    found = by_size_.lower_bound({bytes, nullptr});
  }
  const auto [size, start] = *found;
  remove_free(free_.find(start));
  if (size > bytes) add_free(start + bytes, size - bytes);
  return start;
}

void Arena::give_back(void* memory, std::size_t bytes) { add_free(static_cast<std::byte*>(memory), bytes); }

void Arena::trim() {
  for (auto at = regions_.begin(); at != regions_.end();) {
    auto& [start, region] = *at;
    const std::size_t unused = free_at_end(start, region) / page * page;
    if (unused == region.open) {
      remove_free(free_.find(start));
      munmap(start, region.reserved);
      held_ -= unused;
      at = regions_.erase(at);
      continue;
    }
    ++at;
    std::byte* const end = start + region.open - unused;
    if (unused == 0 ||
        mmap(end, unused, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != end)
      continue;
    prefer_large_pages(end, unused);
    const auto range = std::prev(free_.lower_bound(start + region.open));
    const auto [first, size] = *range;
    remove_free(range);
    if (size > unused) add_free(first, size - unused);
    region.open -= unused;
    held_ -= unused;
  }
}

// Makes a free range of `bytes` bytes at the end of a region.
bool Arena::grow(std::size_t bytes, std::size_t room) {
  const auto grown = [&](std::byte* start, Region& region) {
    const std::size_t size = round_up(region.open - free_at_end(start, region) + bytes, page);
    if (size > region.reserved) return false;
    const std::size_t filled = round_up(size, large_page);
    const bool fill = bytes >= large_page && filled <= region.reserved && filled - region.open <= room;
    return (fill && open(start, region, filled)) || open(start, region, size);
  };
  for (auto& [start, region] : regions_)
    if (grown(start, region)) return true;
  const std::size_t size = round_up(bytes, large_page);
  for (const std::size_t reserved : {std::max(size, addresses), size}) {  // less where addresses are limited
    std::byte* const start = reserve(reserved);
    if (start == nullptr) continue;
    prefer_large_pages(start, reserved);
    const auto region = regions_.emplace(start, Region{reserved, 0}).first;
    if (grown(start, region->second)) return true;
    regions_.erase(region);
    munmap(start, reserved);
    return false;  // not for want of addresses
  }
  return false;
}

// Makes memory of the first `size` bytes of a region.
bool Arena::open(std::byte* start, Region& region, std::size_t size) {
  std::byte* const end = start + region.open;
  if (mprotect(end, size - region.open, PROT_READ | PROT_WRITE) != 0) return false;
  held_ += size - region.open;
  add_free(end, size - region.open);
  region.open = size;
  return true;
}

// Bytes of the free range in which the open part of a region ends.
std::size_t Arena::free_at_end(std::byte* start, const Region& region) const {
  const auto after = free_.lower_bound(start + region.open);
  if (after == free_.begin()) return 0;
  const auto [first, size] = *std::prev(after);
  return first >= start && first + size == start + region.open ? size : 0;
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
