/*
 * Waiting.
 *
 * Sleeping and being woken costs two system calls and the scheduler's decisions, many times what an interrupt
 * between processors takes. So HLT looks for a while first, while there is a processor for each vCPU that doesn't
 * sleep: for as long as the last waits make it likely that it pays (v->poll_ns).
 *
 * A guest that knows KVM's steal time takes a vCPU that is said to be preempted for one that can't be had soon, and wakes
 * its threads elsewhere, where they wait for their turn; others it wakes by an interrupt. So who sleeps isn't
 * said to be preempted as long as the host, asked to wake it, does so at once.
 *
 * A guest spins for a lock in the belief that its owner is running. Where there are more vCPUs than processors
 * for them, the owner may be waiting for the very processor. The guest's loops say by PAUSE that they are
 * such: one that goes on for longer than a lock is held gives the processor away. On a busy host it may be long
 * until it has it again, so the APIC timer is looked at each time, not once in so many blocks (run.c).
 */
#include "engine/soft/wait.h"

#include "engine/soft/posts.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

/* Of polling in HLT. */
#define POLL_MIN_NS 4000
#define POLL_MAX_NS 64000
/* A wake that takes longer is a late one. It counts as twice that at most, lest a single one decide. */
#define LATE_NS 500000
/* PAUSEs this far apart, in TSC ticks, belong to one loop; how long it may go on; what gives way costs then. */
#define SPIN_GAP 20000
#define SPIN_TICKS 50000
#define SPIN_YIELDS 64
#define SPIN_NAP_NS 50000

static u64 now(const struct soft_vcpu *v)
{
    return vm_clock_now(v->engine->config.clock);
}

/* Whether what calls for attention ends HLT. */
static bool wakes(u32 attention)
{
    return attention & ~(ATTN_SHADOW | ATTN_LEFT);
}

/* --- Sleeping --- */

/*
 * On attention itself, which the kernel compares before it lets the thread sleep. Who sets attention looks at `waiting`
 * after that; it is set before the comparison: so one of the two is seen.
 */
bool soft_sleep(struct soft_vcpu *v, u32 seen, const struct timespec *until)
{
    bool late;

    atomic_store(&v->waiting, true);
    late = syscall(SYS_futex, &v->attention, FUTEX_WAIT_BITSET_PRIVATE, seen, until, NULL,
                   FUTEX_BITSET_MATCH_ANY) < 0 &&
           errno == ETIMEDOUT;
    atomic_store(&v->waiting, false);
    return !late;
}

void soft_wake(struct soft_vcpu *v)
{
    atomic_store_explicit(&v->woken_at, now(v), memory_order_relaxed);
    syscall(SYS_futex, &v->attention, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* The sleep is over: how long did the thread wait for a processor, in the mean of the last times? */
static void note_wake(struct soft_vcpu *v)
{
    u64 woken_at = atomic_exchange_explicit(&v->woken_at, 0, memory_order_relaxed), time = now(v);

    if (woken_at && time > woken_at)
        v->wake_ns = (u32)((3ull * v->wake_ns + MIN(time - woken_at, 2ull * LATE_NS)) / 4);
}

bool soft_wakes_late(const struct soft_vcpu *v)
{
    return v->wake_ns > LATE_NS;
}

/* --- HLT --- */

/* Whether a vCPU may look for work without taking the processor from another, or from what makes the work. */
static bool may_poll(const struct soft_vcpu *v)
{
    const struct soft_engine *e = v->engine;

    return e->config.host_cpus > 1 &&
           e->config.ncpus - atomic_load_explicit(&e->sleeping, memory_order_relaxed) <=
               e->config.host_cpus;
}

/* True: woken. */
static bool poll_for_attention(struct soft_vcpu *v, u64 start)
{
    u64 end = MIN(start + v->poll_ns, v->timer_deadline);

    while (!wakes(atomic_load(&v->attention))) {
        for (unsigned n = 0; n < 8; n++)
            __builtin_ia32_pause();
        if (now(v) >= end || !may_poll(v))
            return false;
    }
    return true;
}

/* Grows while waits end soon, and is given up by and by when they don't. */
static void adapt_polling(struct soft_vcpu *v, u64 waited)
{
    if (waited <= v->poll_ns)
        return;
    if (waited <= POLL_MAX_NS)
        v->poll_ns = (u32)MIN(MAX(v->poll_ns * 2, POLL_MIN_NS), POLL_MAX_NS);
    else
        v->poll_ns = v->poll_ns > POLL_MIN_NS ? v->poll_ns / 2 : 0;
}

static void sleep_until_attention(struct soft_vcpu *v)
{
    u64 deadline = v->timer_deadline;
    struct timespec until = {0};
    u32 seen;

    if (deadline != UINT64_MAX) {
        u64 host = vm_clock_to_host(v->engine->config.clock, deadline);

        until = (struct timespec){(time_t)(host / NS_PER_SEC), (long)(host % NS_PER_SEC)};
    }
    atomic_fetch_add_explicit(&v->engine->sleeping, 1, memory_order_relaxed);
    while (!wakes(seen = atomic_load(&v->attention)) &&
           soft_sleep(v, seen, deadline == UINT64_MAX ? NULL : &until))
        ;
    note_wake(v);
    atomic_fetch_sub_explicit(&v->engine->sleeping, 1, memory_order_relaxed);
}

void soft_wait_for_attention(struct soft_vcpu *v)
{
    soft_posts_begin_sleep(v);
    if (may_poll(v)) {
        u64 start = now(v);

        if (!poll_for_attention(v, start))
            sleep_until_attention(v);
        adapt_polling(v, now(v) - start);
    } else {
        sleep_until_attention(v);
    }
    soft_posts_end_sleep(v);
}

/* --- PAUSE --- */

void soft_pause(struct soft_vcpu *v)
{
    const struct timespec nap = {.tv_nsec = SPIN_NAP_NS};
    u64 time = __rdtsc();

    if (time - v->spin_last > SPIN_GAP) {
        v->spin_start = time;
        v->spin_yields = 0;
    }
    v->spin_last = time;
    if (time - v->spin_start < SPIN_TICKS || v->engine->config.ncpus == 1) {
        __builtin_ia32_pause();
        return;
    }
    v->stats.spins++;
    if (v->spin_yields++ < SPIN_YIELDS)
        sched_yield();
    else
        nanosleep(&nap, NULL);
    v->poll = 0;
    v->spin_last = __rdtsc();
}
