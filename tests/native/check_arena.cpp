// The arena, from random requests and from a few that are worked out by hand:
//
//   check_arena LIBRARY SEED
//
// Prints nothing and exits with 0, or says what is wrong. (The library is not used; every program is given it.)

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "host/arena.cpp"  // NOLINT(bugprone-suspicious-include): it is not in the library's interface

namespace {

constexpr std::size_t kib = 1 << 10, mib = 1 << 20;
constexpr std::size_t unlimited = std::numeric_limits<std::size_t>::max();

void expect(bool right, const char* what) {
  if (right) return;
  std::cerr << "wrong: " << what << '\n';
  std::exit(1);
}

struct Block {
  std::uint64_t* memory;
  std::size_t bytes;
  std::uint64_t mark;
};

// Takes and gives back at random; every block is filled with a mark of its own and must still hold it in the end.
class Work {
 public:
  explicit Work(edge_bcs::Arena& arena) : arena_(arena) {}

  std::size_t peak() const { return peak_; }

  void run(std::uint64_t seed, int requests) {
    std::mt19937_64 random(seed);
    for (int i = 0; i < requests; ++i) {
      if (!blocks_.empty() && random() % 2 == 0) {
        give_back(random() % blocks_.size());
      } else {
        const std::size_t largest = random() % 8 == 0 ? 3 * mib : 300 * kib;
        take(64 * (1024 + random() % (largest / 64)));
      }
    }
    while (!blocks_.empty()) give_back(random() % blocks_.size());
  }

 private:
  void take(std::size_t bytes) {
    auto* const memory = static_cast<std::uint64_t*>(arena_.take(bytes, unlimited));
    expect(memory != nullptr && reinterpret_cast<std::uintptr_t>(memory) % 64 == 0, "a block's address");
    const Block block{memory, bytes, ++marks_};
    for (std::size_t i = 0; i < bytes / 8; ++i) memory[i] = block.mark;
    blocks_.push_back(block);
    live_ += bytes;
    peak_ = std::max(peak_, live_);
    expect(live_ <= arena_.held(), "more is in use than is held");
  }

  void give_back(std::size_t which) {
    const Block block = blocks_[which];
    for (std::size_t i = 0; i < block.bytes / 8; ++i)
      expect(block.memory[i] == block.mark, "two blocks share memory");
    blocks_[which] = blocks_.back();
    blocks_.pop_back();
    arena_.give_back(block.memory, block.bytes);
    live_ -= block.bytes;
  }

  edge_bcs::Arena& arena_;
  std::vector<Block> blocks_;
  std::uint64_t marks_ = 0;
  std::size_t live_ = 0, peak_ = 0;
};

void check_random_requests(std::uint64_t seed) {
  edge_bcs::Arena arena;
  Work work(arena);
  work.run(seed, 2000);
  const std::size_t held = arena.held();
  work.run(seed, 2000);  // the same again finds its places
  expect(arena.held() == held, "a second run takes more");
  arena.trim();
  expect(arena.held() == 0, "an arena without blocks holds memory");
  work.run(seed + 1, 200);  // and goes on after that
}

// The free range at the end counts when it grows: 1 MiB, and 3 MiB in its place, are 3 MiB and not 4.
void check_growth() {
  edge_bcs::Arena arena;
  void* const first = arena.take(mib, 0);
  expect(arena.held() == mib, "one block takes more than itself");
  arena.give_back(first, mib);
  void* const second = arena.take(3 * mib, 0);
  expect(second == first && arena.held() == 3 * mib,
         "a larger block does not grow from the free one at the end");
  // Neighbours that are free are one place, however they came.
  void* const third = arena.take(mib, 0);
  arena.give_back(second, 3 * mib);
  arena.give_back(third, mib);
  expect(arena.take(4 * mib, 0) == first && arena.held() == 4 * mib, "neighbours are not joined");
}

// A large page is filled only where there is room for it.
void check_room() {
  for (const std::size_t room : {std::size_t{0}, 4 * mib - 1, 4 * mib, unlimited}) {
    edge_bcs::Arena arena;
    expect(arena.take(3 * mib, room) != nullptr, "a block that there is no room to round up");
    expect(arena.held() == (room < 4 * mib ? 3 * mib : 4 * mib), "the room is not kept, or not used");
  }
}

// What is free at the end goes back, and what is in use stays as it is.
void check_trim() {
  edge_bcs::Arena arena;
  auto* const kept = static_cast<int*>(arena.take(mib, 0));
  *kept = 7;
  void* const last = arena.take(5 * mib, 0);
  arena.give_back(last, 5 * mib);
  arena.trim();
  expect(arena.held() == mib && *kept == 7, "trim");
  auto* const again = static_cast<int*>(arena.take(5 * mib, 0));
  expect(again == last && *again == 0 && arena.held() == 6 * mib, "what was trimmed does not come back");
}

// More than the addresses of one region, and more than there are at all.
void check_size() {
  edge_bcs::Arena arena;
  expect(arena.take(mib, 0) != nullptr && arena.take(1025 * mib, 0) != nullptr, "a second region");
  expect(arena.held() == 1026 * mib, "two regions");
  expect(arena.take(std::size_t{1} << 60, 0) == nullptr && arena.held() == 1026 * mib,
         "a block that cannot be");
}

}  // namespace

int main(int count, char** arguments) {
  const std::uint64_t seed = count > 2 ? std::stoull(arguments[2]) : 0;
  check_random_requests(seed);
  check_growth();
  check_room();
  check_trim();
  check_size();
  return 0;
}
