#include "slots.h"

#include <string.h>

/* In front of a state, programmed after it: a slot without it was not finished. */
typedef struct header {
  uint32_t magic, crc;        /* crc: of all that follows it here */
  uint64_t number, bytes;     /* of this save, and of the state */
  uint32_t content_crc, rest; /* of the state */
} header;

static const uint32_t magic = 0x53434245; /* "EBCS" */

static uint32_t crc_of(uint32_t crc, const void* data, size_t bytes) {
  const unsigned char* byte = data;
  crc = ~crc;
  for (size_t i = 0; i < bytes; ++i) {
    crc ^= byte[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1)));
  }
  return ~crc;
}

static uint32_t crc_of_header(const header* found) {
  return crc_of(0, (const unsigned char*)found + 8, sizeof *found - 8);
}

/* Whether the slot was finished; its header then. */
static int is_finished(const slots_flash* flash, int slot, header* found) {
  memcpy(found, flash->memory + (size_t)slot * flash->slot_bytes, sizeof *found);
  return found->magic == magic && found->crc == crc_of_header(found) &&
         found->bytes <= flash->slot_bytes - SLOTS_UNIT;
}

/* Collects what is written into pieces that the flash takes. */
typedef struct writer {
  const slots_flash* flash;
  size_t at, end;
  uint32_t crc;
  size_t held, bytes;
  unsigned char piece[SLOTS_UNIT];
} writer;

static int write_piece(writer* to) {
  if (to->at + SLOTS_UNIT > to->end) return 1;
  if (to->flash->program(to->at, to->piece, SLOTS_UNIT) != 0) return 1;
  to->at += SLOTS_UNIT;
  to->held = 0;
  return 0;
}

static int write_some(void* user, const void* data, size_t bytes) {
  writer* to = user;
  const unsigned char* from = data;
  to->crc = crc_of(to->crc, data, bytes);
  to->bytes += bytes;
  while (bytes > 0) {
    const size_t room = SLOTS_UNIT - to->held, count = bytes < room ? bytes : room;
    memcpy(to->piece + to->held, from, count);
    to->held += count, from += count, bytes -= count;
    if (to->held == SLOTS_UNIT && write_piece(to) != 0) return 1;
  }
  return 0;
}

slots_status slots_save(edge_bcs_network* network, const slots_flash* flash) {
  header found[2];
  const int finished[2] = {is_finished(flash, 0, &found[0]), is_finished(flash, 1, &found[1])};
  int older = 0;
  uint64_t number = 1;
  if (finished[0] && (!finished[1] || found[0].number > found[1].number)) older = 1;
  if (finished[0]) number = found[0].number + 1;
  if (finished[1] && found[1].number >= number) number = found[1].number + 1;
  const size_t first = (size_t)older * flash->slot_bytes;
  writer to = {.flash = flash, .at = first + SLOTS_UNIT, .end = first + flash->slot_bytes};
  if (flash->erase(first, flash->slot_bytes) != 0) return SLOTS_FAILED;
  if (edge_bcs_state_stream(network, write_some, &to) != EDGE_BCS_OK) return SLOTS_FAILED;
  if (to.held > 0) {
    memset(to.piece + to.held, 0xff, SLOTS_UNIT - to.held);
    if (write_piece(&to) != 0) return SLOTS_FAILED;
  }
  header made = {.magic = magic, .number = number, .bytes = to.bytes, .content_crc = to.crc, .rest = 0};
  made.crc = crc_of_header(&made);
  memset(to.piece, 0xff, SLOTS_UNIT);
  memcpy(to.piece, &made, sizeof made);
  to.at = first;
  return write_piece(&to) == 0 ? SLOTS_OK : SLOTS_FAILED;
}

slots_status slots_load(edge_bcs_network* network, const slots_flash* flash) {
  header found[2];
  int finished[2] = {is_finished(flash, 0, &found[0]), is_finished(flash, 1, &found[1])};
  while (finished[0] || finished[1]) {
    const int newest = finished[1] && (!finished[0] || found[1].number > found[0].number);
    const unsigned char* state = flash->memory + (size_t)newest * flash->slot_bytes + SLOTS_UNIT;
    const size_t bytes = (size_t)found[newest].bytes;
    if (crc_of(0, state, bytes) == found[newest].content_crc &&
        edge_bcs_state_read(network, state, bytes) == EDGE_BCS_OK)
      return SLOTS_OK;
    finished[newest] = 0;
  }
  return SLOTS_EMPTY;
}
