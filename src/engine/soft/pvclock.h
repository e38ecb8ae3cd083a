/*
 * The paravirtual clock that KVM made common: a structure in guest memory from which a guest computes
 * the VM clock out of its TSC, without measuring either (Linux, Documentation/virt/kvm/x86/msr.rst:
 * MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW).
 *
 * A guest without it calibrates its TSC against the PIT or HPET at boot, and when the host stalls the
 * vCPU at the wrong moment its clock is wrong by any factor ever after.
 */
#ifndef DOPPEL_ENGINE_SOFT_PVCLOCK_H
#define DOPPEL_ENGINE_SOFT_PVCLOCK_H

#include "engine/soft/vcpu.h"

/*
 * A write of the MSRs: value is the structure's guest-physical address, for the system time with bit 0
 * to turn it on. False: it is not in RAM (#GP), nothing is changed. On the vCPU's thread.
 */
bool pvclock_set_system_time(struct soft_vcpu *v, u64 value);
bool pvclock_set_wall_clock(struct soft_vcpu *v, u64 value);

/* The guest has set its TSC: the structure is made true again. */
void pvclock_tsc_changed(struct soft_vcpu *v);

#endif
