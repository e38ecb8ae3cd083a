/*
 * The local APIC.
 *
 * The vCPU asks one question all the time, "is there an interrupt for me?", and changes the answer
 * rarely. So the answer is kept: l->deliverable is the vector that would be taken now, or 0, and
 *
 *  1. deliverable is recomputed under the lock by whatever changes IRR, ISR, TPR or the enable bit
 *     (update), and read without it;
 *  2. whoever makes it change to another vector than 0 tells the owner (LAPIC_EVENT_INTERRUPT)
 *     after the lock is released: `struct events` collects what is to be told;
 *  3. the same holds for extint, of LINT0's level, its LVT, the enable bit, and ExtINT messages;
 *  4. while eoi_deferred is set, ISR may hold an interrupt that the guest has ended already, so whatever is
 *     in IRR is told, deliverable or not.
 *
 * An IPI is decoded under the sender's lock and delivered without it, so a lock is never taken
 * while another is held.
 *
 * Time: the timer's clock is LAPIC_TIMER_HZ, 1 GHz: a tick is a nanosecond of the VM clock. A
 * countdown is its start and its deadline; the current count is computed when it is read.
 *
 * An APIC's ID doesn't change. Deliberate limits: the register at 0x20 is
 * read-only, as on recent processors; an IPI's focus processor is ignored (as the manual allows);
 * SMI messages are dropped, as there is no SMM; ExtINT can't be sent as an IPI (table 11-3).
 *
 * References: Intel SDM vol. 3, chapter 11 (section numbers below are of that chapter).
 */
#include "engine/soft/lapic.h"
#include "bus/clock.h"
#include "host/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Register numbers: MMIO offset / 16, MSR number - 0x800 (tables 11-1 and 11-6). */
enum lapic_reg {
    REG_ID = 0x02,
    REG_VERSION = 0x03,
    REG_TPR = 0x08,
    REG_APR = 0x09,
    REG_PPR = 0x0a,
    REG_EOI = 0x0b,
    REG_RRD = 0x0c,
    REG_LDR = 0x0d,
    REG_DFR = 0x0e,
    REG_SVR = 0x0f,
    REG_ISR = 0x10,
    REG_TMR = 0x18,
    REG_IRR = 0x20,
    REG_ESR = 0x28,
    REG_LVT_CMCI = 0x2f,
    REG_ICR = 0x30,
    REG_ICR_HIGH = 0x31,
    REG_LVT_TIMER = 0x32,
    REG_LVT_THERMAL = 0x33,
    REG_LVT_PERF = 0x34,
    REG_LVT_LINT0 = 0x35,
    REG_LVT_LINT1 = 0x36,
    REG_LVT_ERROR = 0x37,
    REG_TIMER_INITIAL = 0x38,
    REG_TIMER_CURRENT = 0x39,
    REG_TIMER_DIVIDE = 0x3e,
    REG_SELF_IPI = 0x3f,
};

/* Version 0x14, six LVT entries: no CMCI, no suppression of EOI broadcasts (11.4.8). */
#define LAPIC_VERSION 0x00050014u

#define SVR_ENABLE 0x100u
#define SVR_WRITABLE 0x3ffu /* vector, enable, focus checking */

#define LVT_VECTOR 0xffu
#define LVT_MODE 0x700u
#define LVT_STATUS 0x1000u
#define LVT_REMOTE_IRR 0x4000u
#define LVT_MASKED 0x10000u
#define LVT_TIMER_PERIODIC 0x20000u
#define LVT_TIMER_TSC_DEADLINE 0x40000u
#define LVT_TIMER_MODE 0x60000u

#define ESR_SEND_ILLEGAL 0x20u
#define ESR_RECEIVE_ILLEGAL 0x40u
#define ESR_ILLEGAL_REGISTER 0x80u

#define ICR_VECTOR 0xffull
#define ICR_LOGICAL BIT(11)
#define ICR_STATUS BIT(12)
#define ICR_ASSERT BIT(14)
#define ICR_LEVEL BIT(15)
#define ICR_SHORTHAND_SHIFT 18
#define ICR_LOW_WRITABLE 0xccfffull /* without the delivery status, bit 12 */
enum icr_shorthand { TO_DESTINATION, TO_SELF, TO_ALL, TO_OTHERS };

enum delivery_mode {
    DELIVER_FIXED,
    DELIVER_LOWEST,
    DELIVER_SMI,
    DELIVER_RESERVED,
    DELIVER_NMI,
    DELIVER_INIT,
    DELIVER_SIPI,
    DELIVER_EXTINT,
};

#define BROADCAST8 0xffu
#define BROADCAST32 0xffffffffu

/* A guest that asks for a faster periodic timer gets this one: it could only burn host time. */
#define MIN_PERIOD_NS 20000

struct lapic {
    pthread_mutex_t lock;
    struct lapic_bus *bus;
    struct lapic_config config;
    struct lapic_state s;
    u64 tsc_offset;
    bool lint0;
    /* Answers kept for the vCPU; see above. */
    _Atomic u8 deliverable;
    _Atomic bool
        eoi_deferred; /* the guest may have ended what is in service; changed by the owner */
    _Atomic bool extint;
    _Atomic u64 base; /* s.base_msr */
    _Atomic u32 tpr;  /* s.tpr */
};

struct lapic_bus {
    struct lapic *members[LAPIC_BUS_MAX]; /* by index */
    struct lapic *by_id[UINT8_MAX + 1];
};

/* What is to be told once the lock is released. */
struct events {
    u32 set; /* one bit an enum lapic_event */
    u8 sipi_vector;
    u8 eoi_vector; /* 0: none to broadcast */
};

/* A message on the bus. */
struct message {
    u32 destination;
    bool logical;
    bool wide; /* 32-bit destination, from an x2APIC; else 8 bits */
    bool level, assert;
    u8 mode; /* enum delivery_mode */
    u8 vector;
};

static void lapic_lock(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
}

/* --- Bits of the 256-bit registers --- */

static bool vector_test(const u32 *reg, u8 vector)
{
    return reg[vector / 32] & BIT(vector % 32);
}

static void vector_set(u32 *reg, u8 vector)
{
    reg[vector / 32] |= (u32)BIT(vector % 32);
}

static void vector_clear(u32 *reg, u8 vector)
{
    reg[vector / 32] &= ~(u32)BIT(vector % 32);
}

/* The highest vector that is set, or 0 (vectors below 16 never are). */
static u8 vector_highest(const u32 *reg)
{
    for (int i = 7; i >= 0; i--) {
        if (reg[i])
            return (u8)(i * 32 + 31 - __builtin_clz(reg[i]));
    }
    return 0;
}

/* --- Derived state --- */

static bool is_enabled(const struct lapic *l)
{
    return l->s.base_msr & APIC_BASE_ENABLE;
}

static bool is_x2apic(const struct lapic *l)
{
    return l->s.base_msr & APIC_BASE_X2APIC;
}

/* The processor priority (11.8.3.1). */
static u8 processor_priority(const struct lapic *l)
{
    u8 in_service = vector_highest(l->s.isr) & 0xf0;

    return (l->s.tpr & 0xf0) >= in_service ? (u8)l->s.tpr : in_service;
}

static u8 find_deliverable(const struct lapic *l)
{
    u8 vector = vector_highest(l->s.irr);

    return is_enabled(l) && (vector & 0xf0) > (processor_priority(l) & 0xf0) ? vector : 0;
}

static bool extint_passes(const struct lapic *l)
{
    u32 lint0 = l->s.lvt[LVT_LINT0];

    return !is_enabled(l) || (!(lint0 & LVT_MASKED) && (lint0 & LVT_MODE) == DELIVER_EXTINT << 8);
}

/* Invariants 1 to 4: after every change, before the lock is released. */
static void update(struct lapic *l, struct events *ev)
{
    u8 vector = find_deliverable(l);
    bool extint = (l->lint0 && extint_passes(l)) || l->s.extint;

    if (vector && vector != atomic_load_explicit(&l->deliverable, memory_order_relaxed))
        ev->set |= 1u << LAPIC_EVENT_INTERRUPT;
    if (atomic_load_explicit(&l->eoi_deferred, memory_order_relaxed) && vector_highest(l->s.irr))
        ev->set |= 1u << LAPIC_EVENT_INTERRUPT;
    if (extint && !atomic_load_explicit(&l->extint, memory_order_relaxed))
        ev->set |= 1u << LAPIC_EVENT_EXTINT;
    atomic_store_explicit(&l->deliverable, vector, memory_order_release);
    atomic_store_explicit(&l->extint, extint, memory_order_release);
    atomic_store_explicit(&l->base, l->s.base_msr, memory_order_relaxed);
    atomic_store_explicit(&l->tpr, l->s.tpr, memory_order_relaxed);
}

/* Ends a change: releases the lock and tells. */
static void lapic_unlock(struct lapic *l, struct events *ev)
{
    const struct lapic_ops *ops = l->config.ops;

    update(l, ev);
    pthread_mutex_unlock(&l->lock);
    if (ev->eoi_vector)
        ops->eoi_broadcast(l->config.opaque, ev->eoi_vector);
    for (u32 left = ev->set; left; left &= left - 1) {
        enum lapic_event event = (enum lapic_event)__builtin_ctz(left);

        ops->wake(l->config.opaque, event, event == LAPIC_EVENT_SIPI ? ev->sipi_vector : 0);
    }
}

/* --- Accepting interrupts --- */

static void accept_fixed(struct lapic *l, u8 vector, bool level);

/* Notes an error; interrupts through LVT Error when that is unmasked (11.5.3). */
static void raise_error(struct lapic *l, u32 bit)
{
    u32 lvt = l->s.lvt[LVT_ERROR];

    if (l->s.esr_pending & bit)
        return;
    l->s.esr_pending |= bit;
    if (!(lvt & LVT_MASKED))
        accept_fixed(l, lvt & LVT_VECTOR, false);
}

static void accept_fixed(struct lapic *l, u8 vector, bool level)
{
    if (!is_enabled(l) || !(l->s.svr & SVR_ENABLE))
        return;
    if (vector < 16) {
        raise_error(l, ESR_RECEIVE_ILLEGAL);
        return;
    }
    if (level)
        vector_set(l->s.tmr, vector);
    else
        vector_clear(l->s.tmr, vector);
    vector_set(l->s.irr, vector);
}

/* What a message or a local source brings (11.5.1 and 11.6.1). */
static void accept(struct lapic *l, u8 mode, u8 vector, bool level, struct events *ev)
{
    switch (mode) {
    case DELIVER_FIXED:
    case DELIVER_LOWEST:
        accept_fixed(l, vector, level);
        break;
    case DELIVER_NMI:
        ev->set |= 1u << LAPIC_EVENT_NMI;
        break;
    case DELIVER_INIT:
        ev->set |= 1u << LAPIC_EVENT_INIT;
        break;
    case DELIVER_SIPI:
        ev->set |= 1u << LAPIC_EVENT_SIPI;
        ev->sipi_vector = vector;
        break;
    case DELIVER_EXTINT: /* whoever sends it has the vector, as over the pin */
        l->s.extint = 1;
        break;
    default: /* SMI: there is no SMM */
        log_once(LOG_DEBUG, "local APIC: message with delivery mode %u dropped", mode);
        break;
    }
}

static void local_interrupt(struct lapic *l, enum lapic_lvt entry, struct events *ev)
{
    u32 lvt = l->s.lvt[entry];
    bool has_mode = entry != LVT_TIMER && entry != LVT_ERROR;

    if (!(lvt & LVT_MASKED))
        accept(l, has_mode ? (lvt & LVT_MODE) >> 8 : DELIVER_FIXED, lvt & LVT_VECTOR, false, ev);
}

/* --- Messages --- */

/* Whether a logical destination means this APIC (11.6.2.2 and 11.12.10.2). */
static bool matches_logical(const struct lapic *l, const struct message *m)
{
    u32 ldr = l->s.ldr, dest = m->destination;
    u8 id8, dest8;

    if (is_x2apic(l)) {
        if (dest == BROADCAST32)
            return true;
        return ldr >> 16 == dest >> 16 && (ldr & dest & 0xffff);
    }
    if (m->wide && dest > BROADCAST8)
        return dest == BROADCAST32;
    id8 = ldr >> 24;
    dest8 = (u8)dest;
    if (l->s.dfr >> 28 == 0xf)
        return id8 & dest8;
    return (dest8 >> 4 == 0xf || dest8 >> 4 == id8 >> 4) && (id8 & dest8 & 0xf);
}

static bool is_broadcast(const struct message *m)
{
    return m->wide ? m->destination == BROADCAST32 : m->destination == BROADCAST8;
}

static void deliver_to(struct lapic *l, const struct message *m)
{
    struct events ev = {0};

    lapic_lock(l);
    if (is_enabled(l))
        accept(l, m->mode, m->vector, m->level, &ev);
    lapic_unlock(l, &ev);
}

/*
 * Of the APICs that a message is meant for, the one whose processor has the least priority; on a
 * draw the lowest number. NULL when none of them is on.
 */
static struct lapic *lowest_priority(struct lapic_bus *bus, u64 targets)
{
    struct lapic *best = NULL;
    unsigned best_priority = 256;

    for (; targets; targets &= targets - 1) {
        struct lapic *l = bus->members[__builtin_ctzll(targets)];
        unsigned priority = 256;

        lapic_lock(l);
        if (is_enabled(l) && (l->s.svr & SVR_ENABLE))
            priority = processor_priority(l);
        pthread_mutex_unlock(&l->lock);
        if (priority < best_priority) {
            best_priority = priority;
            best = l;
        }
    }
    return best;
}

/* The members that a message's destination means, one bit each. */
static u64 find_targets(struct lapic_bus *bus, const struct message *m)
{
    u64 targets = 0;

    if (!m->logical && !is_broadcast(m))
        return m->destination <= UINT8_MAX && bus->by_id[m->destination]
                   ? BIT(bus->by_id[m->destination]->config.index)
                   : 0;
    for (unsigned i = 0; i < LAPIC_BUS_MAX; i++) {
        struct lapic *l = bus->members[i];
        bool match = is_broadcast(m);

        if (!l)
            continue;
        if (!match) {
            lapic_lock(l);
            match = matches_logical(l, m);
            pthread_mutex_unlock(&l->lock);
        }
        if (match)
            targets |= BIT(i);
    }
    return targets;
}

static void deliver_to_targets(struct lapic_bus *bus, u64 targets, const struct message *m)
{
    if (m->mode == DELIVER_LOWEST) {
        struct lapic *l = lowest_priority(bus, targets);

        if (l)
            deliver_to(l, m);
        return;
    }
    for (; targets; targets &= targets - 1)
        deliver_to(bus->members[__builtin_ctzll(targets)], m);
}

void lapic_bus_deliver(struct lapic_bus *bus, u64 address, u32 data)
{
    struct message m = {
        .destination = (address >> 12) & 0xff,
        .logical = address & BIT(2),
        .level = data & BIT(15),
        .assert = data & BIT(14),
        .mode = (data >> 8) & 7,
        .vector = data & 0xff,
    };

    if (address >> 20 != 0xfee) {
        log_once(LOG_DEBUG, "MSI to %#llx dropped: not a local APIC's address",
                 (unsigned long long)address);
        return;
    }
    /* A level-triggered message that says "no longer" is nothing to an APIC of today. */
    if (m.level && !m.assert)
        return;
    deliver_to_targets(bus, find_targets(bus, &m), &m);
}

bool lapic_bus_send(struct lapic_bus *bus, u32 id, u32 icr)
{
    struct message m = {
        .destination = id, .wide = true, .mode = (icr >> 8) & 7, .vector = icr & ICR_VECTOR};

    if (m.mode != DELIVER_FIXED && m.mode != DELIVER_NMI)
        return false;
    deliver_to_targets(bus, find_targets(bus, &m), &m);
    return true;
}

/* Whether an ICR value is to be sent; notes what is wrong with it. Called with the lock held. */
static bool icr_sendable(struct lapic *l, u64 icr)
{
    u8 mode = (icr >> 8) & 7, vector = icr & ICR_VECTOR;
    enum icr_shorthand to = (icr >> ICR_SHORTHAND_SHIFT) & 3;

    /* INIT level de-assert only set arbitration IDs, and those are history (11.6.1). */
    if (mode == DELIVER_INIT && (icr & ICR_LEVEL) && !(icr & ICR_ASSERT))
        return false;
    if (mode == DELIVER_RESERVED || mode == DELIVER_EXTINT)
        return false;
    /* To itself a processor sends only fixed interrupts (table 11-3). */
    if ((to == TO_SELF || to == TO_ALL) && mode != DELIVER_FIXED)
        return false;
    if ((mode == DELIVER_FIXED || mode == DELIVER_LOWEST) && vector < 16) {
        raise_error(l, ESR_SEND_ILLEGAL);
        return false;
    }
    return true;
}

static void send_ipi(struct lapic *l, u64 icr, bool wide)
{
    struct lapic_bus *bus = l->bus;
    const struct message m = {
        .destination = wide ? (u32)(icr >> 32) : (u32)(icr >> 56),
        .wide = wide,
        .logical = icr & ICR_LOGICAL,
        .mode = (icr >> 8) & 7,
        .vector = icr & ICR_VECTOR,
    };
    u64 all = 0, self = BIT(l->config.index);

    for (unsigned i = 0; i < LAPIC_BUS_MAX; i++) {
        if (bus->members[i])
            all |= BIT(i);
    }
    switch ((enum icr_shorthand)((icr >> ICR_SHORTHAND_SHIFT) & 3)) {
    case TO_DESTINATION:
        deliver_to_targets(bus, find_targets(bus, &m), &m);
        break;
    case TO_SELF:
        deliver_to_targets(bus, self, &m);
        break;
    case TO_ALL:
        deliver_to_targets(bus, all, &m);
        break;
    case TO_OTHERS:
        deliver_to_targets(bus, all & ~self, &m);
        break;
    }
}

/* --- Timer (11.5.4) --- */

static bool is_tsc_deadline(const struct lapic *l)
{
    return (l->s.lvt[LVT_TIMER] & LVT_TIMER_MODE) == LVT_TIMER_TSC_DEADLINE;
}

static bool is_periodic(const struct lapic *l)
{
    return (l->s.lvt[LVT_TIMER] & LVT_TIMER_MODE) == LVT_TIMER_PERIODIC;
}

/* Nanoseconds a tick: bits 3, 1 and 0 of the divide register; 0 is by 2, 7 is by 1. */
static u64 timer_divisor(const struct lapic *l)
{
    u32 d = (l->s.timer_divide & 3) | (l->s.timer_divide & 8) >> 1;

    return BIT((d + 1) & 7);
}

static u64 timer_period(const struct lapic *l)
{
    return l->s.timer_initial * timer_divisor(l);
}

static void set_deadline(struct lapic *l, u64 deadline, struct events *ev)
{
    if (l->s.timer_deadline_ns == deadline)
        return;
    l->s.timer_deadline_ns = deadline;
    ev->set |= 1u << LAPIC_EVENT_TIMER;
}

static void start_countdown(struct lapic *l, u64 now, struct events *ev)
{
    l->s.timer_start_ns = now;
    set_deadline(l, l->s.timer_initial ? now + timer_period(l) : UINT64_MAX, ev);
}

static u32 timer_current(const struct lapic *l, u64 now)
{
    u64 deadline = l->s.timer_deadline_ns, period = timer_period(l), left;

    if (is_tsc_deadline(l) || deadline == UINT64_MAX || period == 0)
        return 0;
    if (now < deadline)
        left = deadline - now;
    else if (is_periodic(l)) /* it has expired and the owner has not come to it yet */
        left = period - (now - deadline) % period;
    else
        return 0;
    return (u32)MIN((left + timer_divisor(l) - 1) / timer_divisor(l), l->s.timer_initial);
}

static void set_divide(struct lapic *l, u32 value, struct events *ev)
{
    u64 now = l->config.ops->now(l->config.opaque);
    u32 count = timer_current(l, now);

    l->s.timer_divide = value & 0xb;
    if (count && l->s.timer_deadline_ns != UINT64_MAX)
        set_deadline(l, now + count * timer_divisor(l), ev);
}

/* VM ns at which the guest's TSC reaches tsc_deadline. */
static u64 deadline_of_tsc(const struct lapic *l)
{
    u64 ticks = l->s.tsc_deadline - l->tsc_offset;

    if (l->s.tsc_deadline == 0)
        return UINT64_MAX;
    /* The VM's TSC starts at 0: a difference with the top bit set is a deadline before that. */
    if ((s64)ticks <= 0)
        return 0;
    if (ticks / l->config.tsc_hz >= UINT64_MAX / NS_PER_SEC / 2)
        return UINT64_MAX;
    return clock_ticks_to_ns(ticks, l->config.tsc_hz);
}

static void set_lvt_timer(struct lapic *l, u32 value, struct events *ev)
{
    u32 before = l->s.lvt[LVT_TIMER] & LVT_TIMER_MODE;
    u32 after = value & LVT_TIMER_MODE;

    l->s.lvt[LVT_TIMER] = value;
    /* To and from TSC-deadline mode the timer is disarmed (11.5.4.1). */
    if (before != after && (before | after) & LVT_TIMER_TSC_DEADLINE) {
        l->s.tsc_deadline = 0;
        l->s.timer_initial = 0;
        set_deadline(l, UINT64_MAX, ev);
    }
}

u64 lapic_next_deadline(struct lapic *l)
{
    u64 deadline;

    lapic_lock(l);
    deadline = l->s.timer_deadline_ns;
    pthread_mutex_unlock(&l->lock);
    return deadline;
}

void lapic_timer_expire(struct lapic *l, u64 now)
{
    struct events ev = {0};
    u64 period, deadline;

    lapic_lock(l);
    deadline = l->s.timer_deadline_ns;
    if (now >= deadline) {
        local_interrupt(l, LVT_TIMER, &ev);
        period = timer_period(l);
        if (is_tsc_deadline(l)) {
            l->s.tsc_deadline = 0;
            set_deadline(l, UINT64_MAX, &ev);
        } else if (!is_periodic(l) || period == 0) {
            set_deadline(l, UINT64_MAX, &ev);
        } else if (period < MIN_PERIOD_NS) {
            l->s.timer_start_ns = now;
            set_deadline(l, now + MIN_PERIOD_NS, &ev);
        } else {
            /* Expiries that were missed meanwhile would only have set the same IRR bit. */
            deadline += (now - deadline) / period * period;
            l->s.timer_start_ns = deadline;
            set_deadline(l, deadline + period, &ev);
        }
    }
    lapic_unlock(l, &ev);
}

u64 lapic_tsc_deadline(struct lapic *l)
{
    u64 tsc;

    lapic_lock(l);
    tsc = l->s.tsc_deadline;
    pthread_mutex_unlock(&l->lock);
    return tsc;
}

void lapic_set_tsc_deadline(struct lapic *l, u64 tsc)
{
    struct events ev = {0};

    lapic_lock(l);
    /* In the other modes the write is ignored and the MSR reads 0. */
    if (is_tsc_deadline(l) && is_enabled(l)) {
        l->s.tsc_deadline = tsc;
        set_deadline(l, deadline_of_tsc(l), &ev);
    }
    lapic_unlock(l, &ev);
}

void lapic_set_tsc_offset(struct lapic *l, u64 offset)
{
    struct events ev = {0};

    lapic_lock(l);
    l->tsc_offset = offset;
    if (is_tsc_deadline(l))
        set_deadline(l, deadline_of_tsc(l), &ev);
    lapic_unlock(l, &ev);
}

/* --- Registers --- */

/* The bits of each LVT entry that software may write; the timer's mode bits come on top. */
static const u32 lvt_writable[LVT_COUNT] = {
    [LVT_TIMER] = LVT_MASKED | LVT_VECTOR,
    [LVT_THERMAL] = LVT_MASKED | LVT_MODE | LVT_VECTOR,
    [LVT_PERF] = LVT_MASKED | LVT_MODE | LVT_VECTOR,
    [LVT_LINT0] = LVT_MASKED | 0xa000 | LVT_MODE | LVT_VECTOR, /* with trigger and polarity */
    [LVT_LINT1] = LVT_MASKED | 0xa000 | LVT_MODE | LVT_VECTOR,
    [LVT_ERROR] = LVT_MASKED | LVT_VECTOR,
};

static u32 lvt_mask(const struct lapic *l, enum lapic_lvt entry)
{
    u32 mask = lvt_writable[entry];

    if (entry == LVT_TIMER)
        mask |= LVT_TIMER_PERIODIC | (l->config.tsc_deadline ? LVT_TIMER_TSC_DEADLINE : 0);
    return mask;
}

/* The LVT entry of a register number, or LVT_COUNT. */
static enum lapic_lvt lvt_of(u32 reg)
{
    return reg >= REG_LVT_TIMER && reg <= REG_LVT_ERROR ? LVT_TIMER + (reg - REG_LVT_TIMER)
                                                        : LVT_COUNT;
}

static void write_lvt(struct lapic *l, enum lapic_lvt entry, u32 value, struct events *ev)
{
    value &= lvt_mask(l, entry);
    if (!(l->s.svr & SVR_ENABLE))
        value |= LVT_MASKED;
    if (entry == LVT_TIMER) {
        /* Both mode bits: reserved. It behaves as one-shot here. */
        if ((value & LVT_TIMER_MODE) == LVT_TIMER_MODE)
            value &= ~LVT_TIMER_MODE;
        set_lvt_timer(l, value, ev);
    } else {
        l->s.lvt[entry] = value;
    }
}

static void write_svr(struct lapic *l, u32 value)
{
    l->s.svr = value & SVR_WRITABLE;
    if (value & SVR_ENABLE)
        return;
    for (unsigned i = 0; i < LVT_COUNT; i++) /* 11.4.7.2 */
        l->s.lvt[i] |= LVT_MASKED;
}

static void end_of_interrupt(struct lapic *l, struct events *ev)
{
    u8 vector = vector_highest(l->s.isr);

    if (!vector)
        return;
    vector_clear(l->s.isr, vector);
    if (vector_test(l->s.tmr, vector)) /* stays set, as on hardware, until the next acceptance */
        ev->eoi_vector = vector;
}

void lapic_sync_eoi(struct lapic *l)
{
    struct events ev = {0};

    if (!atomic_load_explicit(&l->eoi_deferred, memory_order_relaxed))
        return;
    /* Should an interrupt come now: the guest's own EOI, or the one below, makes it deliverable. */
    atomic_store(&l->eoi_deferred, false);
    if (!l->config.ops->take_eoi(l->config.opaque))
        return;
    lapic_lock(l);
    end_of_interrupt(l, &ev);
    lapic_unlock(l, &ev);
}

/* Reads a register that both modes have. False: there is none, or it can't be read. */
static bool read_common(struct lapic *l, u32 reg, u32 *value)
{
    switch (reg) {
    case REG_ID:
        *value = l->s.id;
        return true;
    case REG_VERSION:
        *value = LAPIC_VERSION;
        return true;
    case REG_TPR:
        *value = l->s.tpr;
        return true;
    case REG_PPR:
        *value = processor_priority(l);
        return true;
    case REG_LDR:
        *value = l->s.ldr;
        return true;
    case REG_SVR:
        *value = l->s.svr;
        return true;
    case REG_ISR ... REG_ISR + 7:
        *value = l->s.isr[reg - REG_ISR];
        return true;
    case REG_TMR ... REG_TMR + 7:
        *value = l->s.tmr[reg - REG_TMR];
        return true;
    case REG_IRR ... REG_IRR + 7:
        *value = l->s.irr[reg - REG_IRR];
        return true;
    case REG_ESR:
        *value = l->s.esr;
        return true;
    case REG_LVT_TIMER ... REG_LVT_ERROR:
        *value = l->s.lvt[lvt_of(reg)];
        return true;
    case REG_TIMER_INITIAL:
        *value = l->s.timer_initial;
        return true;
    case REG_TIMER_CURRENT:
        *value = timer_current(l, l->config.ops->now(l->config.opaque));
        return true;
    case REG_TIMER_DIVIDE:
        *value = l->s.timer_divide;
        return true;
    default:
        return false;
    }
}

/* Writes a register that both modes have (reserved bits are dealt with). False: there is none. */
static bool write_common(struct lapic *l, u32 reg, u32 value, struct events *ev)
{
    switch (reg) {
    case REG_TPR:
        l->s.tpr = value & 0xff;
        return true;
    case REG_EOI:
        end_of_interrupt(l, ev);
        return true;
    case REG_SVR:
        write_svr(l, value);
        return true;
    case REG_ESR: /* a write latches what came since the last one */
        l->s.esr = l->s.esr_pending;
        l->s.esr_pending = 0;
        return true;
    case REG_LVT_TIMER ... REG_LVT_ERROR:
        write_lvt(l, lvt_of(reg), value, ev);
        return true;
    case REG_TIMER_INITIAL:
        if (!is_tsc_deadline(l)) {
            l->s.timer_initial = value;
            start_countdown(l, l->config.ops->now(l->config.opaque), ev);
        }
        return true;
    case REG_TIMER_DIVIDE:
        set_divide(l, value, ev);
        return true;
    default:
        return false;
    }
}

bool lapic_claims(const struct lapic *l, gpa_t gpa)
{
    u64 base = atomic_load_explicit(&l->base, memory_order_relaxed);

    return (base & (APIC_BASE_ENABLE | APIC_BASE_X2APIC)) == APIC_BASE_ENABLE &&
           (gpa ^ base) >> 12 == 0;
}

/*
 * Only 32-bit accesses to the start of a register are defined (11.4.1); narrower and other ones
 * read their part of it, or of the reserved rest, which is zero. Wider ones likewise get 32 bits.
 */
u64 lapic_mmio_read(struct lapic *l, u32 offset, unsigned size)
{
    struct events ev = {0};
    u32 reg = (offset >> 4) & 0xff, value = 0, shift = (offset & 0xf) * 8;

    lapic_sync_eoi(l);
    lapic_lock(l);
    switch (reg) {
    case REG_APR: /* history: no bus arbitrates by it any more */
    case REG_RRD:
        break;
    case REG_DFR:
        value = l->s.dfr;
        break;
    case REG_ICR:
        value = (u32)l->s.icr;
        break;
    case REG_ICR_HIGH:
        value = (u32)(l->s.icr >> 32);
        break;
    default:
        if (!read_common(l, reg, &value))
            raise_error(l, ESR_ILLEGAL_REGISTER);
        break;
    }
    lapic_unlock(l, &ev);
    if (shift >= 32)
        return 0;
    value >>= shift;
    return size < 4 ? value & (BIT(size * 8) - 1) : value;
}

/* Narrow and misaligned writes are undefined (11.4.1): dropped. Of a wide one, the low half. */
void lapic_mmio_write(struct lapic *l, u32 offset, u64 value, unsigned size)
{
    struct events ev = {0};
    u32 reg = (offset >> 4) & 0xff, v = (u32)value;
    u64 send = 0;
    bool sending = false;

    if ((offset & 0xf) || size < 4)
        return;
    lapic_sync_eoi(l);
    lapic_lock(l);
    switch (reg) {
    case REG_LDR:
        l->s.ldr = v & 0xff000000;
        break;
    case REG_DFR:
        l->s.dfr = v | 0x0fffffff;
        break;
    case REG_ICR_HIGH:
        l->s.icr = (u32)l->s.icr | (u64)(v & 0xff000000) << 32;
        break;
    case REG_ICR:
        l->s.icr = (l->s.icr & ~0xffffffffull) | (v & ICR_LOW_WRITABLE);
        send = l->s.icr;
        sending = icr_sendable(l, send);
        break;
    case REG_ID:
    case REG_VERSION:
    case REG_APR:
    case REG_PPR:
    case REG_RRD:
    case REG_ISR ... REG_IRR + 7:
    case REG_TIMER_CURRENT:
        break; /* read-only */
    default:
        if (!write_common(l, reg, v, &ev))
            raise_error(l, ESR_ILLEGAL_REGISTER);
        break;
    }
    lapic_unlock(l, &ev);
    if (sending)
        send_ipi(l, send, false);
}

bool lapic_msr_read(struct lapic *l, u32 msr, u64 *value)
{
    u32 reg = msr - 0x800, low = 0;
    bool ok = false;

    lapic_sync_eoi(l);
    lapic_lock(l);
    if (is_x2apic(l)) {
        ok = read_common(l, reg, &low);
        *value = low;
        if (reg == REG_ICR) {
            *value = l->s.icr;
            ok = true;
        }
    }
    pthread_mutex_unlock(&l->lock);
    return ok;
}

/* The bits that WRMSR may set in a register of an x2APIC (11.12.1.3: others give #GP). */
static bool x2apic_value_ok(const struct lapic *l, u32 reg, u64 value)
{
    switch (reg) {
    case REG_TPR:
    case REG_SELF_IPI:
        return value <= 0xff;
    case REG_EOI:
    case REG_ESR:
        return value == 0;
    case REG_SVR:
        return !(value & ~(u64)SVR_WRITABLE);
    case REG_ICR:
        return !(value & 0xffffffff & ~(ICR_LOW_WRITABLE | ICR_STATUS));
    case REG_LVT_TIMER ... REG_LVT_ERROR:
        /* The read-only bits may be written back as they were read. */
        return !(value & ~(u64)(lvt_mask(l, lvt_of(reg)) | LVT_STATUS | LVT_REMOTE_IRR));
    case REG_TIMER_INITIAL:
        return value <= UINT32_MAX;
    case REG_TIMER_DIVIDE:
        return !(value & ~0xbull);
    default:
        return false;
    }
}

bool lapic_msr_write(struct lapic *l, u32 msr, u64 value)
{
    struct events ev = {0};
    u32 reg = msr - 0x800;
    bool ok, sending = false;

    lapic_sync_eoi(l);
    lapic_lock(l);
    ok = is_x2apic(l) && x2apic_value_ok(l, reg, value);
    if (ok && reg == REG_ICR) {
        l->s.icr = value & ~ICR_STATUS;
        sending = icr_sendable(l, value);
    } else if (ok && reg == REG_SELF_IPI) {
        if (value < 16)
            raise_error(l, ESR_SEND_ILLEGAL);
        else
            accept_fixed(l, (u8)value, false);
    } else if (ok) {
        write_common(l, reg, (u32)value, &ev);
    }
    lapic_unlock(l, &ev);
    if (sending)
        send_ipi(l, value, true);
    return ok;
}

u8 lapic_cr8(const struct lapic *l)
{
    return (u8)(atomic_load_explicit(&l->tpr, memory_order_relaxed) >> 4);
}

void lapic_set_cr8(struct lapic *l, u8 cr8)
{
    struct events ev = {0};

    lapic_lock(l);
    l->s.tpr = (u32)(cr8 & 0xf) << 4;
    lapic_unlock(l, &ev);
}

/* --- IA32_APIC_BASE, reset, state --- */

u64 lapic_base(const struct lapic *l)
{
    return atomic_load_explicit(&l->base, memory_order_relaxed);
}

/* The logical x2APIC ID follows from the ID (11.12.10.2). */
static u32 x2apic_ldr(u32 id)
{
    return (id >> 4) << 16 | (u32)BIT(id & 0xf);
}

/* The registers after RESET and INIT, but for the ID and IA32_APIC_BASE (11.4.7.1). */
static void reset_registers(struct lapic *l, struct events *ev)
{
    struct lapic_state *s = &l->s;
    u64 base = s->base_msr;

    memset(s, 0, sizeof(*s));
    s->base_msr = base;
    s->id = is_x2apic(l) ? l->config.id : (u32)l->config.id << 24;
    s->ldr = is_x2apic(l) ? x2apic_ldr(l->config.id) : 0;
    s->dfr = 0xffffffff;
    s->svr = 0xff;
    for (unsigned i = 0; i < LVT_COUNT; i++)
        s->lvt[i] = LVT_MASKED;
    s->timer_deadline_ns = UINT64_MAX;
    atomic_store(&l->eoi_deferred, false);
    ev->set |= 1u << LAPIC_EVENT_TIMER;
}

static u64 base_reserved(const struct lapic *l)
{
    u64 valid = APIC_BASE_BSP | APIC_BASE_ENABLE | ((BIT(l->config.phys_bits) - 1) & ~0xfffull);

    return ~(valid | (l->config.x2apic ? APIC_BASE_X2APIC : 0));
}

bool lapic_set_base(struct lapic *l, u64 value)
{
    const u64 mode_bits = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
    struct events ev = {0};
    u64 from, to = value & mode_bits;
    bool ok = false;

    lapic_sync_eoi(l);
    lapic_lock(l);
    from = l->s.base_msr & mode_bits;
    if (value & base_reserved(l))
        goto out;
    /* 11.12.5: x2APIC is entered from xAPIC mode only, and left by disabling only. */
    if (to == APIC_BASE_X2APIC || (to == mode_bits && from == 0) ||
        (to == APIC_BASE_ENABLE && from == mode_bits))
        goto out;
    ok = true;
    l->s.base_msr = value;
    if (from != to && to == 0) {
        reset_registers(l, &ev);
    } else if (from != to && to == mode_bits) {
        l->s.id = l->config.id;
        l->s.ldr = x2apic_ldr(l->config.id);
        l->s.icr = (u32)l->s.icr;
    }
out:
    lapic_unlock(l, &ev);
    return ok;
}

static void power_on(struct lapic *l, struct events *ev)
{
    l->s.base_msr = LAPIC_DEFAULT_BASE | APIC_BASE_ENABLE | (l->config.index ? 0 : APIC_BASE_BSP);
    l->tsc_offset = 0;
    reset_registers(l, ev);
}

void lapic_reset(struct lapic *l)
{
    struct events ev = {0};

    lapic_lock(l);
    power_on(l, &ev);
    lapic_unlock(l, &ev);
}

void lapic_init(struct lapic *l)
{
    struct events ev = {0};

    lapic_lock(l);
    reset_registers(l, &ev);
    lapic_unlock(l, &ev);
}

void lapic_save(struct lapic *l, struct lapic_state *out)
{
    lapic_lock(l);
    *out = l->s;
    pthread_mutex_unlock(&l->lock);
}

static int check_state(const struct lapic *l, const struct lapic_state *in, struct error *err)
{
    bool x2apic = in->base_msr & APIC_BASE_X2APIC;
    u32 index = l->config.index, id = l->config.id;

    if ((in->base_msr & base_reserved(l)) || (x2apic && !(in->base_msr & APIC_BASE_ENABLE)))
        return error_input(err, "local APIC %u: IA32_APIC_BASE %#llx is impossible", index,
                           (unsigned long long)in->base_msr);
    if (in->id != (x2apic ? id : id << 24) || (x2apic && in->ldr != x2apic_ldr(id)))
        return error_input(err, "local APIC %u: its state is that of APIC ID register %#x", index,
                           in->id);
    if ((in->isr[0] | in->tmr[0] | in->irr[0]) & 0xffff)
        return error_input(err, "local APIC %u: an interrupt below vector 16", index);
    for (unsigned i = 0; i < LVT_COUNT; i++) {
        if (in->lvt[i] & ~(lvt_mask(l, i) | LVT_MASKED | LVT_STATUS | LVT_REMOTE_IRR))
            return error_input(err, "local APIC %u: LVT entry %u holds %#x", index, i, in->lvt[i]);
    }
    if (in->extint > 1 || (in->tpr & ~0xffu) || (in->svr & ~SVR_WRITABLE) ||
        (in->timer_divide & ~0xbu))
        return error_input(err, "local APIC %u: a register has reserved bits set", index);
    return 0;
}

int lapic_load(struct lapic *l, const struct lapic_state *in, struct error *err)
{
    struct events ev = {0};
    int ret;

    lapic_lock(l);
    ret = check_state(l, in, err);
    if (ret == 0) {
        l->s = *in;
        atomic_store(&l->eoi_deferred, false);
        ev.set |= 1u << LAPIC_EVENT_TIMER;
    }
    lapic_unlock(l, &ev);
    return ret;
}

/* --- Delivery to the vCPU --- */

u8 lapic_deliverable(const struct lapic *l)
{
    return atomic_load_explicit(&l->deliverable, memory_order_acquire);
}

u8 lapic_ack(struct lapic *l)
{
    struct events ev = {0};
    u8 vector;

    lapic_lock(l);
    vector = find_deliverable(l);
    if (vector) {
        vector_clear(l->s.irr, vector);
        vector_set(l->s.isr, vector);
    } else {
        vector = l->s.svr & 0xff;
    }
    lapic_unlock(l, &ev);
    return vector;
}

bool lapic_defer_eoi(struct lapic *l)
{
    struct events ev = {0};
    u8 vector;
    bool defer;

    lapic_lock(l);
    vector = vector_highest(l->s.isr);
    defer = vector && !vector_test(l->s.tmr, vector) && !vector_highest(l->s.irr);
    atomic_store(&l->eoi_deferred, defer);
    lapic_unlock(l, &ev);
    return defer;
}

void lapic_set_lint0(struct lapic *l, bool level)
{
    struct events ev = {0};
    u32 mode;

    lapic_lock(l);
    mode = (l->s.lvt[LVT_LINT0] & LVT_MODE) >> 8;
    if (level && !l->lint0 && is_enabled(l) && mode != DELIVER_EXTINT)
        local_interrupt(l, LVT_LINT0, &ev);
    l->lint0 = level;
    lapic_unlock(l, &ev);
}

bool lapic_has_extint(const struct lapic *l)
{
    return atomic_load_explicit(&l->extint, memory_order_acquire);
}

void lapic_ack_extint(struct lapic *l)
{
    struct events ev = {0};

    lapic_lock(l);
    l->s.extint = 0;
    lapic_unlock(l, &ev);
}

/* --- Life --- */

struct lapic_bus *lapic_bus_create(void)
{
    return calloc(1, sizeof(struct lapic_bus));
}

void lapic_bus_destroy(struct lapic_bus *bus)
{
    free(bus);
}

struct lapic *lapic_create(struct lapic_bus *bus, const struct lapic_config *config)
{
    struct events untold = {0}; /* its owner is still being made */
    struct lapic *l;

    if (config->index >= LAPIC_BUS_MAX)
        return NULL;
    l = calloc(1, sizeof(*l));
    if (!l)
        return NULL;
    l->bus = bus;
    l->config = *config;
    pthread_mutex_init(&l->lock, NULL);
    power_on(l, &untold);
    update(l, &untold);
    bus->members[config->index] = l;
    bus->by_id[config->id] = l;
    return l;
}

void lapic_destroy(struct lapic *l)
{
    if (!l)
        return;
    l->bus->members[l->config.index] = NULL;
    l->bus->by_id[l->config.id] = NULL;
    pthread_mutex_destroy(&l->lock);
    free(l);
}
