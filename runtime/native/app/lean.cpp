#include "app/lean.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#ifdef __GLIBC__
#include <malloc.h>
#endif

// Where the linker has put the program's code.
extern "C" const char __executable_start, __etext;

namespace edge_bcs::app {

void give_back_unused() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto whole = [page](const char& place) {
    return reinterpret_cast<std::uintptr_t>(&place) / page * page;
  };
  const std::uintptr_t begin = whole(__executable_start) + page, end = whole(__etext);
  // Nothing is written there, so it is the file's, from which the system maps it again.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace edge_bcs::app
