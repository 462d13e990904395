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

// Best fit over a few regions of the system's memory, with neighbouring free ranges joined. The same requests in the
// same order are served from the same places, so a graph that ran once finds all its memory there. Not safe for
// several threads at once. Every request is a multiple of 64 bytes.
class Arena {
 public:
  // The start of `bytes` bytes, a multiple of 64; null if the system has no more memory.
  void* take(std::size_t bytes);

  // Gives back what `take` gave for so many bytes.
  void give_back(void* memory, std::size_t bytes);

  // Returns every region without a block in use to the system.
  void trim();

 private:
  using Places = std::map<std::byte*, std::size_t>;

  bool grow(std::size_t bytes);
  void add_free(std::byte* start, std::size_t bytes);
  void remove_free(Places::iterator range);

  Places regions_;
  Places free_;                                          // start → bytes
  std::set<std::pair<std::size_t, std::byte*>> by_size_;  // the same ranges, smallest first
};

}  // namespace edge_bcs
