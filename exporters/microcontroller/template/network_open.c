#include "freestanding/memory.h"
#include "network.h"

/* The working set, and what opening needs beside it. */
static _Alignas(64) unsigned char arena[ARENA_BYTES];
_Alignas(16) unsigned char edge_bcs_pool[POOL_BYTES];
const size_t edge_bcs_pool_bytes = sizeof edge_bcs_pool;

edge_bcs_status network_open(edge_bcs_network** opened) {
  const edge_bcs_file files[] = {
      {"manifest.json", network_manifest, network_manifest_bytes},
      {"program.bin", network_program, network_program_bytes},
      {"state.safetensors", network_state, network_state_bytes},
  };
  edge_bcs_options options = EDGE_BCS_INIT(edge_bcs_options);
  options.threads = 1;
  options.arena = arena;
  options.arena_bytes = sizeof arena;
  return edge_bcs_open_files(files, sizeof files / sizeof files[0], &options, opened);
}
