// The threads of a runner.
#pragma once

#include <cstddef>
#include <memory>

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
  class Others;
  std::unique_ptr<Others> others_;  // none beside the caller's
};

// Processors that this process may run on.
int available_threads();

}  // namespace edge_bcs
