// The threads of a runner.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace edge_bcs {

// `threads` threads that share the parts of one job at a time, the caller's own among them. What a part computes must not
// depend on who runs it. The others watch for the next job for a moment and then sleep.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Calls body(data, i) for i in [0, count), and returns when all are done. `body` must not throw.
  void run(void (*body)(void*, std::size_t), std::size_t count, void* data);

 private:
  // Whether a job is open, and how many of the others are at it, in one word: who comes late does not join a job whose
  // caller has left. The rest of the word counts jobs.
  static constexpr std::uint32_t open = 1, helper = 2, inside = 0xfffe, job = 0x10000;

  void help();
  void work();

  std::vector<std::thread> others_;
  std::atomic<bool> ended_{false};
  alignas(64) std::atomic<std::uint32_t> state_{0};
  alignas(64) std::atomic<std::size_t> next_{0};
  void (*body_)(void*, std::size_t) = nullptr;
  void* data_ = nullptr;
  std::size_t count_ = 0, part_ = 1;
};

}  // namespace edge_bcs
