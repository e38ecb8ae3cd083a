/*
 * A vCPU that waits: asleep in HLT, or spinning for what another vCPU has to do.
 */
#ifndef DOPPEL_ENGINE_SOFT_WAIT_H
#define DOPPEL_ENGINE_SOFT_WAIT_H

#include "engine/soft/vcpu.h"

#include <time.h>

/* HLT: returns when attention is called for, or the APIC timer is due. On the vCPU's thread. */
void soft_wait_for_attention(struct soft_vcpu *v);

/*
 * Sleeps until v->attention isn't `seen` any more or CLOCK_MONOTONIC comes to `until` (NULL: no bound); maybe less. False:
 * that time has come.
 */
bool soft_sleep(struct soft_vcpu *v, u32 seen, const struct timespec *until);
/* Ends that. For who has set attention, on any thread. */
void soft_wake(struct soft_vcpu *v);

/* Whether the host has lately had no processor at once for the vCPU's thread when it was woken. */
bool soft_wakes_late(const struct soft_vcpu *v);

/* PAUSE: gives way to other threads of the host when the guest has been spinning for a while. */
void soft_pause(struct soft_vcpu *v);

#endif
