#include "app/lean.h"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace edge_bcs::app {

namespace {

// Gives back what of the program is only read: it is the file's, from which the system maps it again. The program itself comes
// first among what is loaded.
int give_back_file(dl_phdr_info* program, std::size_t, void*) {
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int i = 0; i < program->dlpi_phnum; ++i) {
    const auto& part = program->dlpi_phdr[i];
    if (part.p_type != PT_LOAD || (part.p_flags & PF_W) != 0) continue;
    const std::uintptr_t place = program->dlpi_addr + part.p_vaddr, begin = place / page * page;
    madvise(reinterpret_cast<void*>(begin), place + part.p_memsz - begin, MADV_DONTNEED);
  }
  return 1;
}

}  // namespace

void give_back_unused() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
  dl_iterate_phdr(give_back_file, nullptr);
}

}  // namespace edge_bcs::app
