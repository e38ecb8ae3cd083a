/*
 * The map by which Linux's `perf report` shows guest symbols for translated code: /tmp/perf-PID.map, a line
 * for each piece of code, which perf looks for by itself (tools/perf/Documentation/jit-interface.txt in
 * Linux). A name is guest_user_ADDRESS or guest_kernel_ADDRESS; or, for supervisor code, the symbol of a
 * System.map that the address belongs to. Such a guest must not move its kernel (nokaslr).
 *
 * Code that was evicted from a full cache stays in the map: where it is overwritten, perf may show either name.
 *
 * perf_map_add may be called from any thread.
 */
#ifndef DOPPEL_ENGINE_PERF_MAP_H
#define DOPPEL_ENGINE_PERF_MAP_H

#include "host/error.h"
#include "host/types.h"

#include <stddef.h>

struct perf_map;

/* symbols: the path of a System.map, or "" for none. */
struct perf_map *perf_map_create(const char *symbols, struct error *err);
/* Writes what is left. */
void perf_map_destroy(struct perf_map *m);

/* [code, code + size) was made from the guest's code at linear address lin. */
void perf_map_add(struct perf_map *m, const void *code, size_t size, u64 lin, bool user);

#endif
