/* The network of this program: arrays of network.c, and its memory. Written by edge-bcs export. */
#ifndef NETWORK_H
#define NETWORK_H

#include <edge_bcs.h>
#include <stddef.h>

#include "sizes.h"

extern const unsigned char network_manifest[], network_program[], network_state[];
extern const size_t network_manifest_bytes, network_program_bytes, network_state_bytes;

/* Opens it in the static arena. Once: there is one arena. */
edge_bcs_status network_open(edge_bcs_network** opened);

#endif
