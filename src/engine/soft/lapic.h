/*
 * The local APIC of one software vCPU, and the bus that joins them (Intel SDM vol. 3, chapter 11).
 *
 * Threads: each APIC has a lock of its own. Messages (lapic_bus_deliver, lapic_set_lint0) may come
 * from any thread, with device locks held. All else belongs to the vCPU's thread, or to any one
 * thread while the vCPU is not running. No call holds two APICs' locks, and the callbacks run with
 * none held.
 */
#ifndef DOPPEL_ENGINE_SOFT_LAPIC_H
#define DOPPEL_ENGINE_SOFT_LAPIC_H

#include "host/error.h"
#include "host/types.h"
#include "x86/lapic.h"

#include <stdatomic.h>

#define LAPIC_BUS_MAX 64

struct lapic;
struct lapic_bus;

enum lapic_event {
    LAPIC_EVENT_INTERRUPT, /* lapic_has_interrupt has become true */
    LAPIC_EVENT_EXTINT,    /* lapic_has_extint has become true */
    LAPIC_EVENT_NMI,
    LAPIC_EVENT_INIT,
    LAPIC_EVENT_SIPI,  /* vector: start at vector << 12, if waiting for it */
    LAPIC_EVENT_TIMER, /* lapic_next_deadline has changed; on the vCPU's own thread */
};

struct lapic_ops {
    /* Something for the vCPU to look at. Any thread, may be the vCPU's own. vector: SIPI's. */
    void (*wake)(void *opaque, enum lapic_event event, u8 vector);
    /* A level-triggered interrupt was ended: tell the IOAPICs. On the vCPU's thread. */
    void (*eoi_broadcast)(void *opaque, u8 vector);
    /* For lapic_sync_eoi: whether the guest has ended the interrupt; it is told no more. */
    bool (*take_eoi)(void *opaque);
    /* The VM clock, in ns. */
    u64 (*now)(void *opaque);
};

struct lapic_config {
    unsigned index; /* the vCPU's number */
    u8 id;          /* its APIC ID: no other's on this bus */
    unsigned phys_bits;
    u64 tsc_hz;
    bool x2apic, tsc_deadline; /* offered by the CPUID model */
    const struct lapic_ops *ops;
    void *opaque;
};

struct lapic_bus *lapic_bus_create(void);
/* All its members must be gone. */
void lapic_bus_destroy(struct lapic_bus *bus);

/* In the state after RESET, on the bus (before any vCPU runs). Tells no event. NULL: no memory. */
struct lapic *lapic_create(struct lapic_bus *bus, const struct lapic_config *config);
void lapic_destroy(struct lapic *l);

/* After RESET; and after INIT, which leaves the ID and IA32_APIC_BASE alone (11.4.7.3). */
void lapic_reset(struct lapic *l);
void lapic_init(struct lapic *l);

void lapic_save(struct lapic *l, struct lapic_state *out);
/* -EINVAL, err set: not a state that this APIC can be in. */
int lapic_load(struct lapic *l, const struct lapic_state *in, struct error *err);

/* --- Delivery to the vCPU --- */

/* The highest vector in IRR that the processor priority lets through, or 0. One load. */
u8 lapic_deliverable(const struct lapic *l);
static inline bool lapic_has_interrupt(const struct lapic *l)
{
    return lapic_deliverable(l) != 0;
}
/* Takes that interrupt: from IRR to ISR. When it is gone meanwhile, the spurious vector. */
u8 lapic_ack(struct lapic *l);

/*
 * A guest may end an interrupt without an access to the APIC, in memory that it shares with us (pv.h). True: the
 * interrupt that was just taken may be ended so: it is edge-triggered, and no other waits. From then on every new
 * interrupt tells LAPIC_EVENT_INTERRUPT, and lapic_sync_eoi asks take_eoi what the guest did and does it here,
 * before registers are looked at and interrupts taken. On the vCPU's thread.
 */
bool lapic_defer_eoi(struct lapic *l);
void lapic_sync_eoi(struct lapic *l);

/* The 8259 pair's INTR, wired to LINT0. Edges matter when LVT LINT0 isn't in ExtINT mode. */
void lapic_set_lint0(struct lapic *l, bool level);
/* The line is up and reaches the processor (ExtINT mode, unmasked; or the APIC is disabled), or an ExtINT
 * message has come, which the acknowledgement takes. */
bool lapic_has_extint(const struct lapic *l);
void lapic_ack_extint(struct lapic *l);

/* CR8: the task priority's upper four bits. */
u8 lapic_cr8(const struct lapic *l);
void lapic_set_cr8(struct lapic *l, u8 cr8);

/* --- Registers --- */

u64 lapic_base(const struct lapic *l);
/* WRMSR to IA32_APIC_BASE; false: #GP(0) (reserved bits, or a transition that 11.12.5 forbids). */
bool lapic_set_base(struct lapic *l, u64 value);

/* True when gpa is in the APIC's page and that page is in use (enabled, not in x2APIC mode). */
bool lapic_claims(const struct lapic *l, gpa_t gpa);
/* Accesses to the page; offset within it. Registers are 32 bits wide, at multiples of 16. */
u64 lapic_mmio_read(struct lapic *l, u32 offset, unsigned size);
void lapic_mmio_write(struct lapic *l, u32 offset, u64 value, unsigned size);

/* MSRs 0x800 to 0x8ff; false: #GP(0). */
bool lapic_msr_read(struct lapic *l, u32 msr, u64 *value);
bool lapic_msr_write(struct lapic *l, u32 msr, u64 value);

/* --- Timer --- */

/* VM ns at which lapic_timer_expire is due; UINT64_MAX: never. */
u64 lapic_next_deadline(struct lapic *l);
/* Does what is due at `now`; harmless when nothing is. */
void lapic_timer_expire(struct lapic *l, u64 now);

u64 lapic_tsc_deadline(struct lapic *l);
void lapic_set_tsc_deadline(struct lapic *l, u64 tsc);
/* The guest's TSC is the VM's plus offset from now on. */
void lapic_set_tsc_offset(struct lapic *l, u64 offset);

/* --- Messages --- */

/* An MSI: 11.11.1 and 11.11.2. Addresses outside 0xfeexxxxx are dropped. */
void lapic_bus_deliver(struct lapic_bus *bus, u64 address, u32 data);
/* An IPI to an APIC ID, mode (fixed or NMI) and vector as in ICR. False: no such mode. To nobody: dropped. */
bool lapic_bus_send(struct lapic_bus *bus, u32 id, u32 icr);

#endif
