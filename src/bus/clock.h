/*
 * The VM clock: nanoseconds that the VM has run. Every guest clock (TSC, PIT, RTC, APIC timer, HPET,
 * ACPI PM timer) derives from it, so that all stop with the VM and resume without a jump.
 */
#ifndef DOPPEL_BUS_CLOCK_H
#define DOPPEL_BUS_CLOCK_H

#include "host/event_loop.h"
#include "host/types.h"

struct vm_clock;

/* The clock starts stopped at 0. The loop must outlive it. */
struct vm_clock *vm_clock_create(struct event_loop *loop, struct error *err);
void vm_clock_destroy(struct vm_clock *clock);

/* Nanoseconds run so far. Monotonic; any thread. */
u64 vm_clock_now(struct vm_clock *clock);

/* Starts and stops; armed timers keep their VM deadlines. */
void vm_clock_start(struct vm_clock *clock);
void vm_clock_stop(struct vm_clock *clock);
/* Sets the time of a stopped clock (restore of a snapshot). */
void vm_clock_set(struct vm_clock *clock, u64 now_ns);

/* Host CLOCK_MONOTONIC ns at which the VM clock will read `vm_ns`, if it keeps running. */
u64 vm_clock_to_host(struct vm_clock *clock, u64 vm_ns);

/* The wall clock, in ns since 1970 UTC, that goes with the VM clock (for the RTC). */
u64 vm_clock_wall_ns(struct vm_clock *clock);

/*
 * A one-shot timer in VM time. `fire` runs on the event loop's thread with no lock held; it takes the
 * device's lock itself and must recheck the device's state, for it may race with a cancel.
 */
struct vm_timer {
    void (*fire)(void *opaque);
    void *opaque;
    /* the clock's own */
    struct vm_clock *clock;
    u64 deadline; /* VM ns; UINT64_MAX: not armed */
    struct host_timer host;
    struct vm_timer *next, *prev;
};

void vm_timer_init(struct vm_timer *t, struct vm_clock *clock, void (*fire)(void *), void *opaque);
void vm_timer_arm(struct vm_timer *t, u64 deadline_ns);
void vm_timer_cancel(struct vm_timer *t);
/* Cancels and forgets the timer: after this no callback runs. Not from within the callback. */
void vm_timer_destroy(struct vm_timer *t);

/*
 * For frequencies below 18 GHz: ticks = ns * hz / 10^9 without overflow, rounded down; and the smallest ns with that
 * many ticks, UINT64_MAX when it is beyond what 64 bits count: a timer for then never fires.
 */
static inline u64 clock_ns_to_ticks(u64 ns, u64 hz)
{
    return ns / NS_PER_SEC * hz + ns % NS_PER_SEC * hz / NS_PER_SEC;
}
static inline u64 clock_ticks_to_ns(u64 ticks, u64 hz)
{
    u128 ns = ((u128)ticks * NS_PER_SEC + hz - 1) / hz;

    return ns > UINT64_MAX ? UINT64_MAX : (u64)ns;
}

#endif
