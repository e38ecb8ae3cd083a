/*
 * What the tests of single devices share: a VM clock that moves only when a test says so, buses,
 * memory, recorders of what a device sends, and the round trip of its state.
 *
 * The clock takes the place of src/bus/clock.c at link time: a test that includes this file is one
 * translation unit, and defines every function of bus/clock.h.
 */
#ifndef DOPPEL_TESTS_DEVICE_RIG_H
#define DOPPEL_TESTS_DEVICE_RIG_H

#include "device/device.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* ---- the clock ---- */

struct vm_clock {
    u64 now;
    struct vm_timer *timers; /* armed or not; unordered */
};

struct vm_clock *vm_clock_create(struct event_loop *loop, struct error *err)
{
    return calloc(1, sizeof(struct vm_clock));
}
void vm_clock_destroy(struct vm_clock *clock)
{
    assert(!clock->timers);
    free(clock);
}
u64 vm_clock_now(struct vm_clock *clock)
{
    return clock->now;
}
void vm_clock_start(struct vm_clock *clock)
{
}
void vm_clock_stop(struct vm_clock *clock)
{
}
void vm_clock_set(struct vm_clock *clock, u64 now_ns)
{
    clock->now = now_ns;
}
u64 vm_clock_to_host(struct vm_clock *clock, u64 vm_ns)
{
    return vm_ns;
}
u64 vm_clock_wall_ns(struct vm_clock *clock)
{
    return clock->now;
}
void vm_timer_init(struct vm_timer *t, struct vm_clock *clock, void (*fire)(void *), void *opaque)
{
    *t = (struct vm_timer){.fire = fire, .opaque = opaque, .clock = clock, .deadline = UINT64_MAX};
    t->next = clock->timers;
    clock->timers = t;
}
void vm_timer_arm(struct vm_timer *t, u64 deadline_ns)
{
    t->deadline = deadline_ns;
}
void vm_timer_cancel(struct vm_timer *t)
{
    t->deadline = UINT64_MAX;
}
void vm_timer_destroy(struct vm_timer *t)
{
    struct vm_timer **p = &t->clock->timers;

    while (*p != t)
        p = &(*p)->next;
    *p = t->next;
}

static struct vm_timer *rig_next_timer(struct vm_clock *clock)
{
    struct vm_timer *first = NULL;

    for (struct vm_timer *t = clock->timers; t; t = t->next)
        if (t->deadline != UINT64_MAX && (!first || t->deadline < first->deadline))
            first = t;
    return first;
}

/* Moves the clock on, firing at most `limit` timers on the way, each at its deadline. */
static inline void rig_advance_bounded(struct vm_clock *clock, u64 ns, unsigned limit)
{
    u64 end = clock->now + ns;
    struct vm_timer *t;

    while (limit-- && (t = rig_next_timer(clock)) && t->deadline <= end) {
        clock->now = t->deadline > clock->now ? t->deadline : clock->now;
        t->deadline = UINT64_MAX;
        t->fire(t->opaque);
    }
    clock->now = end;
}
static inline void rig_advance(struct vm_clock *clock, u64 ns)
{
    rig_advance_bounded(clock, ns, UINT32_MAX);
}

/* ---- the machine around a device ---- */

struct rig {
    struct device_env env;
    struct guest_memory memory;
    struct error err;

    bool levels[32];    /* of the lines */
    unsigned edges[32]; /* how often each was raised */
    unsigned messages;  /* MSIs so far, and the last one */
    u64 msi_address;
    u32 msi_data;
    unsigned power_requests; /* and the last one */
    enum power_request power;
    u32 power_value;
};

static inline void rig_line_set(void *opaque, unsigned n, bool level)
{
    struct rig *r = opaque;

    r->levels[n] = level;
    r->edges[n] += level;
}
static inline struct irq_line rig_line(struct rig *r, unsigned n)
{
    return (struct irq_line){.set = rig_line_set, .sink = r, .n = n};
}
static inline void rig_deliver(void *opaque, u64 address, u32 data)
{
    struct rig *r = opaque;

    r->messages++;
    r->msi_address = address;
    r->msi_data = data;
}
static inline struct msi_sink rig_msi(struct rig *r)
{
    return (struct msi_sink){.deliver = rig_deliver, .sink = r};
}
static inline void rig_request(void *opaque, enum power_request what, u32 value)
{
    struct rig *r = opaque;

    r->power_requests++;
    r->power = what;
    r->power_value = value;
}
static inline struct power_sink rig_power(struct rig *r)
{
    return (struct power_sink){rig_request, r};
}

/* 64 KiB of memory at 0. */
#define RIG_MEMORY 0x10000

static inline struct rig *rig_create(void)
{
    struct rig *r = calloc(1, sizeof(*r));

    r->env.memory = &r->memory;
    r->env.ports = io_bus_create("ports", 0x10000, &r->err);
    r->env.mmio = io_bus_create("mmio", 1ULL << 36, &r->err);
    r->env.clock = vm_clock_create(NULL, &r->err);
    if (memory_add_slot(&r->memory, 0, RIG_MEMORY, 0, &r->err) < 0)
        abort();
    return r;
}
static inline void rig_destroy(struct rig *r)
{
    vm_clock_destroy(r->env.clock);
    io_bus_destroy(r->env.mmio);
    io_bus_destroy(r->env.ports);
    memory_destroy(&r->memory);
    free(r);
}

/* Lets the loop of a rig that has one do what there is to do. */
static inline void rig_stop_loop(void *opaque)
{
    event_loop_stop(opaque);
}
static inline void rig_run_loop(struct rig *r)
{
    for (unsigned i = 0; i < 3; i++) {
        event_loop_post(r->env.loop, rig_stop_loop, r->env.loop);
        event_loop_run(r->env.loop);
    }
}

/*
 * Saves `from` and loads it into `to`, a fresh device of the same kind at the same VM time. NULL,
 * or what went wrong: the error's text, or the name of the first field that differs. Devices begin
 * with their struct device, so its address is theirs.
 */
static inline const char *rig_round_trip(struct rig *r, struct device *from, struct device *to,
                                         char *buf, size_t buflen)
{
    size_t len = state_size(from->state);
    u8 *bytes = malloc(len + 1);
    const char *wrong = NULL;

    state_save(from->state, from, bytes);
    if (state_desc_check(from->state, &r->err) < 0 ||
        state_load(to->state, to, bytes, len, &r->err) < 0)
        wrong = r->err.text;
    else
        wrong = state_compare(from->state, from, to, buf, buflen);
    free(bytes);
    return wrong;
}

/* A small generator with a fixed seed: tests are the same every time. */
static inline u64 rig_random(u64 *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545f4914f6cdd1dULL;
}

#endif
