/* The same program on a PC, for comparison: `make host`. Its flash is the file flash.bin, too. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "board.h"
#include "freestanding/memory.h"
#include "network.h"

/* A PC has a heap, of which nobody counts. */
edge_bcs_pool_use edge_bcs_get_pool_use(void) { return (edge_bcs_pool_use){0, 0, 0}; }

void board_print(const char* text) {
  fputs(text, stdout);
  fflush(stdout);
}

void board_exit(int code) { exit(code); }

static unsigned char memory[2 * SLOT_BYTES];
static FILE* file;

static int write_through(size_t offset, size_t bytes) {
  return fseek(file, (long)offset, SEEK_SET) != 0 || fwrite(memory + offset, 1, bytes, file) != bytes ||
         fflush(file) != 0;
}

static int erase(size_t offset, size_t bytes) {
  memset(memory + offset, 0xff, bytes);
  return write_through(offset, bytes);
}

/* EDGE_BCS_CUT=N: the power fails in the Nth call, a quarter of which is done. */
static int program(size_t offset, const void* data, size_t bytes) {
  static long calls;
  const char* cut = getenv("EDGE_BCS_CUT");
  const int fails = cut != NULL && ++calls == atol(cut);
  for (size_t i = 0; i < bytes; ++i)
    if (memory[offset + i] != 0xff) return 1;
  memcpy(memory + offset, data, fails ? bytes / 4 : bytes);
  const int refused = write_through(offset, bytes);
  if (fails) _Exit(9);
  return refused;
}

const slots_flash* board_flash(void) {
  static const slots_flash flash = {memory, SLOT_BYTES, erase, program};
  if (file != NULL) return &flash;
  memset(memory, 0xff, sizeof memory);
  file = fopen("flash.bin", "r+b");
  if (file != NULL) {
    if (fread(memory, 1, sizeof memory, file) != sizeof memory) memset(memory, 0xff, sizeof memory);
  } else {
    file = fopen("flash.bin", "w+b");
    if (file == NULL) return NULL;
    write_through(0, sizeof memory);
  }
  return &flash;
}
