// The memory of libjpeg, in the place of its own jmemnobs.c: the workspace of whoever decodes. Declared in libjpeg's
// jmemsys.h, which is not installed. A libjpeg that is linked dynamically goes on using its own.

#include <cstddef>

#include "decode/libjpeg.h"
#include "decode/memory.h"

namespace {

edge_bcs::Workspace& workspace(j_common_ptr info) {
  return *static_cast<edge_bcs::Workspace*>(info->client_data);
}

}  // namespace

extern "C" {

void* jpeg_get_small(j_common_ptr info, std::size_t size) { return workspace(info).take(size); }
void jpeg_free_small(j_common_ptr info, void* block, std::size_t) { workspace(info).give_back(block); }
void* jpeg_get_large(j_common_ptr info, std::size_t size) { return workspace(info).take(size); }
void jpeg_free_large(j_common_ptr info, void* block, std::size_t) { workspace(info).give_back(block); }

std::size_t jpeg_mem_available(j_common_ptr info, std::size_t, std::size_t, std::size_t) {
  return workspace(info).left();
}

void jpeg_open_backing_store(j_common_ptr info, void*, long) {
  info->err->msg_code = JERR_NO_BACKING_STORE;
  info->err->error_exit(info);
}

long jpeg_mem_init(j_common_ptr) { return 0; }
void jpeg_mem_term(j_common_ptr) {}

}  // extern "C"
