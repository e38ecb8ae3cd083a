/*
 * RDMSR and WRMSR of the software processor.
 */
#ifndef DOPPEL_ENGINE_SOFT_MSR_H
#define DOPPEL_ENGINE_SOFT_MSR_H

#include "engine/soft/vcpu.h"

/* False: #GP(0), and nothing has changed. CPL is the caller's affair. On the vCPU's thread. */
bool soft_rdmsr(struct soft_vcpu *v, u32 msr, u64 *value);
bool soft_wrmsr(struct soft_vcpu *v, u32 msr, u64 value);

#endif
