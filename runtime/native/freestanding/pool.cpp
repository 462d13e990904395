// In the place of runner/pool.cpp where there are no threads: the caller does every part.
#include "runner/pool.h"

#include "ops/op.h"

namespace edge_bcs {

class Pool::Others {};

Pool::Pool(int threads) {
  require(threads == 1, "there are no threads here, and ", threads, " are asked for");
}

Pool::~Pool() = default;

void Pool::run(void (*body)(void*, std::size_t), std::size_t count, void* data) {
  for (std::size_t i = 0; i < count; ++i) body(data, i);
}

int available_threads() { return 1; }

}  // namespace edge_bcs
