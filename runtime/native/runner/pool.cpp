#include "runner/pool.h"

#include <algorithm>

namespace edge_bcs {

namespace {

constexpr int looks = 4000;  // at the state, some fifty microseconds, before a thread sleeps
// Pieces of a job for each thread: few enough that taking one costs little, enough that uneven ones even out.
constexpr std::size_t pieces = 16;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  for (int i = 1; i < threads; ++i) others_.emplace_back([this] { help(); });
}

Pool::~Pool() {
  ended_ = true;
  state_.fetch_add(job, std::memory_order_release);
  state_.notify_all();
  for (std::thread& other : others_) other.join();
}

void Pool::work() {
  for (;;) {
    const std::size_t first = next_.fetch_add(part_, std::memory_order_relaxed);
    if (first >= count_) return;
    for (std::size_t i = first; i < std::min(count_, first + part_); ++i) body_(data_, i);
  }
}

void Pool::run(void (*body)(void*, std::size_t), std::size_t count, void* data) {
  if (others_.empty() || count < 2) {
    for (std::size_t i = 0; i < count; ++i) body(data, i);
    return;
  }
  body_ = body, data_ = data, count_ = count;
  part_ = std::max<std::size_t>(1, count / (pieces * (others_.size() + 1)));
  next_.store(0, std::memory_order_relaxed);
  state_.fetch_add(job | open, std::memory_order_release);
  state_.notify_all();
  work();
  state_.fetch_and(~open, std::memory_order_relaxed);
  for (int look = 0; (state_.load(std::memory_order_acquire) & inside) != 0; ++look) {
    if (look < looks)
      pause();
    else
      std::this_thread::yield();
  }
}

void Pool::help() {
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
    work();
    state_.fetch_sub(helper, std::memory_order_release);
    seen = state_.load(std::memory_order_relaxed) & ~open;
  }
}

}  // namespace edge_bcs
