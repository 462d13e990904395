// Where large tensors lie: memory that stays with the process from one run of a graph to the next.
//
// The C library gives large blocks back to the system as soon as they are free, and the system has to hand out every
// page anew, zeroed, in the next run; where that takes two microseconds a page it takes longer than the arithmetic on
// it. Here a free range is kept and given to the next request that it fits, in whole pages of the processor's large size
// where the system has them.
#pragma once

#include <cstddef>
#include <map>
#include <set>
#include <utility>

namespace edge_bcs {

// Best fit over one range of addresses that grows at its end, with neighbouring free ranges joined. It grows by what the
// free range at its end lacks, so that no request leaves a hole of its own behind: over the graphs of a training what is
// held is nearly what was in use at once. The same requests in the same order are served from the same places, so a graph
// that ran once finds all its memory there. Not safe for several threads at once. Every request is a multiple of 64 bytes.
class Arena {
 public:
  // The start of `bytes` bytes, a multiple of 64; null if the system has no more memory. If they do not fit into what is
  // held, it grows by a little more where that fills a large page and is not more than `room` bytes in all.
  void* take(std::size_t bytes, std::size_t room);

  // Gives back what `take` gave for so many bytes.
  void give_back(void* memory, std::size_t bytes);

  // Bytes that it has from the system, in use or free.
  std::size_t held() const { return held_; }

  // Returns what is free at the end to the system.
  void trim();

 private:
  // Addresses that are ours. The first `open` bytes can be used; the rest is not memory yet.
  struct Region {
    std::size_t reserved;
    std::size_t open;
  };
  using Places = std::map<std::byte*, std::size_t>;

  bool grow(std::size_t bytes, std::size_t room);
  bool open(std::byte* start, Region& region, std::size_t size);
  std::size_t free_at_end(std::byte* start, const Region& region) const;
  void add_free(std::byte* start, std::size_t bytes);
  void remove_free(Places::iterator range);

  std::map<std::byte*, Region> regions_;  // one, unless its addresses did not suffice
  std::size_t held_ = 0;
  Places free_;                                           // start → bytes
  std::set<std::pair<std::size_t, std::byte*>> by_size_;  // the same ranges, smallest first
};

}  // namespace edge_bcs
