/*
 * What --stats writes: one JSON object about a VM that has ended.
 */
#ifndef DOPPEL_CONTROL_STATS_H
#define DOPPEL_CONTROL_STATS_H

#include "host/error.h"
#include "machine/machine.h"

#include <stdio.h>

struct vm_stats {
    const char *name;
    const char *engine;
    u64 begin_ns, end_ns; /* host clock: this process's start and the VM's end */
    int status;           /* exit status */
    struct machine_stats machine;
};

/* Writes to `out` (named `path` in errors), and flushes. 0 or -errno. */
int stats_write(const struct vm_stats *stats, FILE *out, const char *path, struct error *err);

#endif
