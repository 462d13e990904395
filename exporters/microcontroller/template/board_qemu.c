/* The boards of QEMU, by semihosting. Their flash is memory that is kept in the file flash.bin. */
#include <string.h>

#include "board.h"
#include "network.h"

static int call(int operation, const void* argument) {
  register int r0 __asm__("r0") = operation;
  register const void* r1 __asm__("r1") = argument;
  __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
  return r0;
}

enum { OPEN = 1, WRITE0 = 4, WRITE = 5, READ = 6, SEEK = 10, EXIT_WITH = 0x20 };

void board_print(const char* text) { call(WRITE0, text); }

void board_exit(int code) {
  const uint32_t how[2] = {0x20026, (uint32_t)code}; /* of its own accord */
  call(EXIT_WITH, how);
}

static int file = -1;

static int open_file(uint32_t mode) {
  static const char name[] = "flash.bin";
  const uint32_t how[3] = {(uint32_t)name, mode, sizeof name - 1};
  return call(OPEN, how);
}

static int write_through(size_t offset, size_t bytes) {
  const uint32_t where[2] = {(uint32_t)file, offset};
  const uint32_t what[3] = {(uint32_t)file, SLOTS_ORIGIN + offset, bytes};
  return call(SEEK, where) != 0 || call(WRITE, what) != 0;
}

static unsigned char* flash_at(size_t offset) { return (unsigned char*)SLOTS_ORIGIN + offset; }

static int erase(size_t offset, size_t bytes) {
  memset(flash_at(offset), 0xff, bytes);
  return write_through(offset, bytes);
}

static int program(size_t offset, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    if (flash_at(offset)[i] != 0xff) return 1;
  memcpy(flash_at(offset), data, bytes);
  return write_through(offset, bytes);
}

const slots_flash* board_flash(void) {
  static const slots_flash flash = {(const unsigned char*)SLOTS_ORIGIN, SLOT_BYTES, erase, program};
  if (file >= 0) return &flash;
  memset(flash_at(0), 0xff, 2 * SLOT_BYTES);
  file = open_file(3); /* "r+b" */
  if (file >= 0) {
    const uint32_t what[3] = {(uint32_t)file, SLOTS_ORIGIN, 2 * SLOT_BYTES};
    call(READ, what);
  } else {
    file = open_file(7); /* "w+b" */
    write_through(0, 2 * SLOT_BYTES);
  }
  return &flash;
}
