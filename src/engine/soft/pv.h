/*
 * KVM's paravirtual interface, but for its clock (pvclock.h): steal time, the flag that a vCPU doesn't run with
 * the TLB flush that may be asked for meanwhile, EOIs without an access to the APIC, and hypercalls. (Linux, Documentation/virt/kvm/x86/msr.rst,
 * cpuid.rst and hypercalls.rst.)
 *
 * All on the vCPU's thread.
 */
#ifndef DOPPEL_ENGINE_SOFT_PV_H
#define DOPPEL_ENGINE_SOFT_PV_H

#include "engine/soft/vcpu.h"

/* A write of MSR_KVM_STEAL_TIME: the structure's guest-physical address, bit 0 to turn it on. False: #GP. */
bool pv_set_steal_time(struct soft_vcpu *v, u64 value);

/* Once in a while, while guest code runs: brings the stolen time up to date. */
void pv_update_steal(struct soft_vcpu *v);

/* Round sleeping in HLT. */
void pv_begin_sleep(struct soft_vcpu *v);
void pv_end_sleep(struct soft_vcpu *v);

/* A write of MSR_KVM_PV_EOI_EN: the word's guest-physical address, bit 0 to turn it on. False: #GP. */
bool pv_set_eoi(struct soft_vcpu *v, u64 value);

/* An interrupt of the local APIC's was taken: lets the guest end it in the word, where that is possible. */
void pv_offer_eoi(struct soft_vcpu *v);

/* Takes the offer back. True: the guest has ended the interrupt. */
bool pv_take_eoi(struct soft_vcpu *v);

/* VMCALL or VMMCALL: does it, with the result in RAX. False: a call that isn't offered here. */
bool pv_hypercall(struct soft_vcpu *v);

void pv_destroy(struct soft_vcpu *v);

#endif
