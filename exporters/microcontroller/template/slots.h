/*
 * Two places in flash that keep the newest state of a training and the one before: whenever the power fails, one is intact.
 */
#ifndef SLOTS_H
#define SLOTS_H

#include <edge_bcs.h>
#include <stddef.h>
#include <stdint.h>

/* Flash that is read as memory. Callbacks return 0, or another number where the flash refuses. */
typedef struct slots_flash {
  const unsigned char* memory;               /* of slot 0; slot 1 follows it */
  size_t slot_bytes;                         /* of each: whole sectors */
  int (*erase)(size_t offset, size_t bytes); /* to 0xff, whole sectors */
  int (*program)(size_t offset, const void* data,
                 size_t bytes); /* once after each erasure, multiples of SLOTS_UNIT */
} slots_flash;

/* Bytes that are programmed at once. */
#define SLOTS_UNIT 64

/* What became of it. */
typedef enum slots_status {
  SLOTS_OK = 0,
  SLOTS_EMPTY = 1, /* no slot has an intact state of this network */
  SLOTS_FAILED =
      2, /* the flash refused, or the state is too large or not finite: edge_bcs_last_error may say why */
} slots_status;

/* Writes the state over the older slot. The newer one stays as it is. */
slots_status slots_save(edge_bcs_network* network, const slots_flash* flash);

/* Reads the newest intact slot. */
slots_status slots_load(edge_bcs_network* network, const slots_flash* flash);

#endif
