#include "runner/pool.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace edge_bcs {

namespace {

constexpr int looks = 4000;  // at the state, some fifty microseconds, before a thread sleeps
// Pieces of a thread's share of a job: few enough that taking one costs little, enough that uneven ones even out.
constexpr std::size_t pieces = 16;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

class Pool::Others {
 public:
  explicit Others(int count);
  ~Others();
  Others(const Others&) = delete;
  Others& operator=(const Others&) = delete;

  void run(void (*body)(void*, std::size_t), std::size_t count, void* data);

 private:
  // Whether a job is open, and how many of the others are at it, in one word: who comes late does not join a job whose
  // caller has left. The rest of the word counts jobs.
  static constexpr std::uint32_t open = 1, helper = 2, inside = 0xfffe, job = 0x10000;

  // What is left of a thread's share of the job, on a cache line of its own.
  struct alignas(64) Share {
    std::atomic<std::size_t> next{0};
    std::size_t end = 0;
  };

  void help(std::size_t thread);
  void work(std::size_t thread);

  std::vector<std::thread> threads_;
  std::vector<Share> shares_;  // of the caller first
  std::atomic<bool> ended_{false};
  alignas(64) std::atomic<std::uint32_t> state_{0};
  void (*body_)(void*, std::size_t) = nullptr;
  void* data_ = nullptr;
  std::size_t part_ = 1;
};

Pool::Pool(int threads) : others_(threads > 1 ? std::make_unique<Others>(threads - 1) : nullptr) {}

Pool::~Pool() = default;

void Pool::run(void (*body)(void*, std::size_t), std::size_t count, void* data) {
  if (others_ != nullptr && count > 1) return others_->run(body, count, data);
  for (std::size_t i = 0; i < count; ++i) body(data, i);
}

int available_threads() {
#ifdef __linux__
  cpu_set_t processors;
  if (::sched_getaffinity(0, sizeof processors, &processors) == 0) return std::max(1, CPU_COUNT(&processors));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

Pool::Others::Others(int count) : shares_(static_cast<std::size_t>(count) + 1) {
  for (std::size_t i = 1; i < shares_.size(); ++i) threads_.emplace_back([this, i] { help(i); });
}

Pool::Others::~Others() {
  ended_ = true;
  state_.fetch_add(job, std::memory_order_release);
  state_.notify_all();
  for (std::thread& other : threads_) other.join();
}

// A thread does its own share first, and then what others have left of theirs. The parts of a job go through the images in order,
// so from one operator to the next a thread meets what it wrote itself, in its own caches.
void Pool::Others::work(std::size_t thread) {
  for (std::size_t i = 0; i < shares_.size(); ++i) {
    Share& share = shares_[(thread + i) % shares_.size()];
    for (;;) {
      const std::size_t first = share.next.fetch_add(part_, std::memory_order_relaxed);
      if (first >= share.end) break;
      for (std::size_t at = first; at < std::min(share.end, first + part_); ++at) body_(data_, at);
    }
  }
}

void Pool::Others::run(void (*body)(void*, std::size_t), std::size_t count, void* data) {
  const std::size_t threads = shares_.size();
  body_ = body, data_ = data;
  part_ = std::max<std::size_t>(1, count / (pieces * threads));
  for (std::size_t i = 0; i < threads; ++i) {
    shares_[i].next.store(count * i / threads, std::memory_order_relaxed);
    shares_[i].end = count * (i + 1) / threads;
  }
  state_.fetch_add(job | open, std::memory_order_release);
  state_.notify_all();
  work(0);
  state_.fetch_and(~open, std::memory_order_relaxed);
  for (int look = 0; (state_.load(std::memory_order_acquire) & inside) != 0; ++look) {
    if (look < looks)
      pause();
    else
      std::this_thread::yield();
  }
}

void Pool::Others::help(std::size_t thread) {
  std::uint32_t seen = 0;
  for (;;) {
    std::uint32_t now = state_.load(std::memory_order_acquire);
    for (int look = 0; now == seen && look < looks; ++look) {
      pause();
      now = state_.load(std::memory_order_acquire);
    }
    if (ended_) return;
    if (now == seen) {
      state_.wait(seen, std::memory_order_acquire);
      continue;
    }
    seen = now;
    if ((now & open) == 0) continue;
    if (!state_.compare_exchange_strong(now, now + helper, std::memory_order_acquire)) {
      seen = now & ~open;  // somebody else joined, or the job was closed: look again
      continue;
    }
    work(thread);
    state_.fetch_sub(helper, std::memory_order_release);
    seen = state_.load(std::memory_order_relaxed) & ~open;
  }
}

}  // namespace edge_bcs
