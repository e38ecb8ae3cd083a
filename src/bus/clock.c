/*
 * VM time is host time minus an offset while the clock runs, and a constant while it doesn't. Reading it
 * is on the way of every guest clock, so readers take no lock: a sequence counter, odd while a writer is
 * at work, tells them to read again.
 *
 * Invariants:
 *  1. A writer makes the counter odd before it reads the host's clock. So a reader whose counter did not
 *     change read the host's clock before the writer did, and time that was read while the clock ran is
 *     never later than the time at which it stopped.
 *  2. A timer is on the clock's list while it is armed; its host timer is armed while, besides, the
 *     clock runs.
 *
 * Lock order: clock->lock before the event loop's own. Callbacks run with neither.
 */
#include "bus/clock.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#define NOT_ARMED UINT64_MAX

struct vm_clock {
    struct event_loop *loop;
    pthread_mutex_t lock; /* writers, and the list of timers */
    atomic_uint sequence;
    atomic_bool running;
    _Atomic u64 offset;      /* running: host time minus VM time, modulo 2^64; stopped: VM time */
    _Atomic u64 wall_offset; /* wall time minus VM time */
    struct vm_timer *timers;
};

static u64 host_wall_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_REALTIME, &ts);
    return (u64)ts.tv_sec * NS_PER_SEC + (u64)ts.tv_nsec;
}

struct vm_clock *vm_clock_create(struct event_loop *loop, struct error *err)
{
    struct vm_clock *clock = calloc(1, sizeof(*clock));

    if (!clock) {
        error_host(err, ENOMEM, "VM clock");
        return NULL;
    }
    clock->loop = loop;
    pthread_mutex_init(&clock->lock, NULL);
    atomic_init(&clock->wall_offset, host_wall_ns());
    return clock;
}

void vm_clock_destroy(struct vm_clock *clock)
{
    if (!clock)
        return;
    pthread_mutex_destroy(&clock->lock);
    free(clock);
}

/* One consistent look at the clock: VM time, and the host time that goes with it. */
static u64 clock_read(struct vm_clock *clock, u64 *host_ns)
{
    for (;;) {
        unsigned before = atomic_load_explicit(&clock->sequence, memory_order_acquire);
        bool running = atomic_load_explicit(&clock->running, memory_order_acquire);
        u64 offset = atomic_load_explicit(&clock->offset, memory_order_acquire);
        u64 host = host_clock_ns();

        if (before % 2 == 0 && before == atomic_load(&clock->sequence)) {
            *host_ns = host;
            return running ? host - offset : offset;
        }
    }
}

u64 vm_clock_now(struct vm_clock *clock)
{
    u64 host;

    return clock_read(clock, &host);
}

/* Brackets a change to the time; clock->lock is held. */
static void write_begin(struct vm_clock *clock)
{
    atomic_fetch_add(&clock->sequence, 1);
}

static void write_end(struct vm_clock *clock)
{
    atomic_fetch_add(&clock->sequence, 1);
}

u64 vm_clock_to_host(struct vm_clock *clock, u64 vm_ns)
{
    u64 host, now = clock_read(clock, &host), result;

    if (vm_ns <= now)
        return host - MIN(host, now - vm_ns);
    return __builtin_add_overflow(host, vm_ns - now, &result) ? UINT64_MAX : result;
}

/* clock->lock is held, the clock runs, the timer is armed. */
static void arm_host_timer(struct vm_clock *clock, struct vm_timer *t)
{
    event_loop_timer_arm(clock->loop, &t->host, vm_clock_to_host(clock, t->deadline));
}

void vm_clock_start(struct vm_clock *clock)
{
    pthread_mutex_lock(&clock->lock);
    if (!clock->running) {
        write_begin(clock);
        atomic_store(&clock->offset, host_clock_ns() - atomic_load(&clock->offset));
        atomic_store(&clock->running, true);
        write_end(clock);
        for (struct vm_timer *t = clock->timers; t; t = t->next)
            arm_host_timer(clock, t);
    }
    pthread_mutex_unlock(&clock->lock);
}

void vm_clock_stop(struct vm_clock *clock)
{
    pthread_mutex_lock(&clock->lock);
    if (clock->running) {
        write_begin(clock);
        atomic_store(&clock->offset, host_clock_ns() - atomic_load(&clock->offset));
        atomic_store(&clock->running, false);
        write_end(clock);
        for (struct vm_timer *t = clock->timers; t; t = t->next)
            event_loop_timer_cancel(clock->loop, &t->host);
    }
    pthread_mutex_unlock(&clock->lock);
}

void vm_clock_set(struct vm_clock *clock, u64 now_ns)
{
    pthread_mutex_lock(&clock->lock);
    if (!clock->running) {
        write_begin(clock);
        atomic_store(&clock->offset, now_ns);
        write_end(clock);
        /* A restored machine's RTC shows the time of its restoration. */
        atomic_store(&clock->wall_offset, host_wall_ns() - now_ns);
    }
    pthread_mutex_unlock(&clock->lock);
}

u64 vm_clock_wall_ns(struct vm_clock *clock)
{
    return atomic_load(&clock->wall_offset) + vm_clock_now(clock);
}

/* ---- timers ---- */

/* clock->lock is held. */
static void list_remove(struct vm_clock *clock, struct vm_timer *t)
{
    if (t->deadline == NOT_ARMED)
        return;
    t->deadline = NOT_ARMED;
    if (t->prev)
        t->prev->next = t->next;
    else
        clock->timers = t->next;
    if (t->next)
        t->next->prev = t->prev;
}

/* The host timer's callback. The timer may have been moved, or the clock stopped, just before. */
static void host_timer_fired(void *opaque)
{
    struct vm_timer *t = opaque;
    struct vm_clock *clock = t->clock;
    bool due = false;

    pthread_mutex_lock(&clock->lock);
    if (clock->running && t->deadline != NOT_ARMED) {
        due = t->deadline <= vm_clock_now(clock);
        if (due)
            list_remove(clock, t);
        else
            arm_host_timer(clock, t);
    }
    pthread_mutex_unlock(&clock->lock);
    if (due)
        t->fire(t->opaque);
}

void vm_timer_init(struct vm_timer *t, struct vm_clock *clock, void (*fire)(void *), void *opaque)
{
    *t = (struct vm_timer){
        .fire = fire,
        .opaque = opaque,
        .clock = clock,
        .deadline = NOT_ARMED,
        .host = {.fire = host_timer_fired, .opaque = t},
    };
}

void vm_timer_arm(struct vm_timer *t, u64 deadline_ns)
{
    struct vm_clock *clock = t->clock;

    pthread_mutex_lock(&clock->lock);
    if (t->deadline == NOT_ARMED) {
        t->prev = NULL;
        t->next = clock->timers;
        if (t->next)
            t->next->prev = t;
        clock->timers = t;
    }
    t->deadline = MIN(deadline_ns, NOT_ARMED - 1);
    if (clock->running)
        arm_host_timer(clock, t);
    pthread_mutex_unlock(&clock->lock);
}

void vm_timer_cancel(struct vm_timer *t)
{
    struct vm_clock *clock = t->clock;

    pthread_mutex_lock(&clock->lock);
    list_remove(clock, t);
    event_loop_timer_cancel(clock->loop, &t->host);
    pthread_mutex_unlock(&clock->lock);
}

void vm_timer_destroy(struct vm_timer *t)
{
    vm_timer_cancel(t);
    event_loop_timer_remove(t->clock->loop, &t->host);
    vm_timer_cancel(t); /* a callback that was running may have armed it again */
}
