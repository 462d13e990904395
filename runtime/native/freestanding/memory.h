/*
 * Memory for what opening a network needs beside its arena: one block of fixed size, in the place of a heap.
 *
 * The program that is linked says how large it is: `edge_bcs_pool` and `edge_bcs_pool_bytes`.
 */
#ifndef EDGE_BCS_MEMORY_H
#define EDGE_BCS_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The block, from a multiple of 16 on. */
extern unsigned char edge_bcs_pool[];
extern const size_t edge_bcs_pool_bytes;

/* What is taken now, what was taken at most, and how often something was asked for. */
typedef struct edge_bcs_pool_use {
  size_t bytes, most;
  uint32_t calls;
} edge_bcs_pool_use;

edge_bcs_pool_use edge_bcs_get_pool_use(void);

#ifdef __cplusplus
}
#endif

#endif
