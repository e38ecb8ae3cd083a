/*
 * A vCPU that waits: asleep in HLT, or spinning for what another vCPU has to do.
 */
#ifndef DOPPEL_ENGINE_SOFT_WAIT_H
#define DOPPEL_ENGINE_SOFT_WAIT_H

#include "engine/soft/vcpu.h"

/* HLT: returns when attention is called for, or the APIC timer is due. On the vCPU's thread. */
void soft_wait_for_attention(struct soft_vcpu *v);

/* PAUSE: gives way to other threads of the host when the guest has been spinning for a while. */
void soft_pause(struct soft_vcpu *v);

#endif
