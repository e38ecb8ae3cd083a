/*
 * The local APIC's architectural state (Intel SDM vol. 3, chapter 11), as engines exchange it.
 */
#ifndef DOPPEL_X86_LAPIC_H
#define DOPPEL_X86_LAPIC_H

#include "host/types.h"
#include "state/fields.h"

#define LAPIC_DEFAULT_BASE 0xfee00000ULL

/* The APIC timer's clock before its divider: CPUID leaf 0x15 calls it the crystal. As KVM's. */
#define LAPIC_TIMER_HZ 1000000000ULL

#define APIC_BASE_BSP BIT(8)
#define APIC_BASE_X2APIC BIT(10)
#define APIC_BASE_ENABLE BIT(11)

enum lapic_lvt {
    LVT_CMCI,
    LVT_TIMER,
    LVT_THERMAL,
    LVT_PERF,
    LVT_LINT0,
    LVT_LINT1,
    LVT_ERROR,
    LVT_COUNT
};

struct lapic_state {
    u64 base_msr; /* IA32_APIC_BASE */
    u32 id;       /* xAPIC: in bits 31:24 as the register shows it; x2APIC: the whole ID */
    u32 tpr, ldr, dfr, svr, esr, esr_pending;
    u32 isr[8], tmr[8], irr[8];
    u64 icr;
    u32 lvt[LVT_COUNT];
    u32 extint; /* an ExtINT message has come and wasn't taken: 0 or 1 */
    u32 timer_initial, timer_divide;
    u64 timer_start_ns;    /* VM ns at which the current countdown began */
    u64 timer_deadline_ns; /* VM ns of the next expiry; UINT64_MAX: none */
    u64 tsc_deadline;      /* IA32_TSC_DEADLINE */
};

extern const struct state_desc lapic_state_desc;

#endif
