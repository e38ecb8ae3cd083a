/*
 * A control group of this process's own, with a share of the host's processors: cgroup v2's cpu.weight and
 * cpu.max (Linux, Documentation/admin-guide/cgroup-v2.rst).
 *
 * It is made below the group that the process is in, or, where processes there keep groups from getting the
 * controller ("no internal processes"), beside it.
 */
#ifndef DOPPEL_HOST_CGROUP_H
#define DOPPEL_HOST_CGROUP_H

#include "host/error.h"

#define CGROUP_WEIGHT_MAX 10000

struct cgroup;

/*
 * Makes the group and moves the process, with threads that it has, into it. weight: 1 to CGROUP_WEIGHT_MAX, against
 * its neighbours' (100 where nobody says anything); 0: as it is. cap: of processor time, in hundredths of one processor; 0: none.
 * NULL, err set (a host failure), when this process may not, or cgroup v2 doesn't have the processors.
 */
struct cgroup *cgroup_enter(unsigned weight, unsigned cap, struct error *err);

/* Moves the process back and removes the group. NULL is fine. */
void cgroup_leave(struct cgroup *g);

#endif
