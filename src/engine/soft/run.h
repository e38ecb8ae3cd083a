/*
 * The run loop of the software processor, and what others ask of a running vCPU.
 */
#ifndef DOPPEL_ENGINE_SOFT_RUN_H
#define DOPPEL_ENGINE_SOFT_RUN_H

#include "engine/soft/vcpu.h"

/* Runs guest code until the vCPU must leave; v->exit says why. On the vCPU's thread. */
void soft_run(struct soft_vcpu *v);

/* Runs a block that block_cache_find returned. */
struct block;
void soft_run_block(struct soft_vcpu *v, struct block *b);

/* The local APIC's timer was set: when to look at it next. On the vCPU's thread. */
void soft_update_deadline(struct soft_vcpu *v);

#endif
