/*
 * Sleeping: no wake is lost, time ends it, and wakes that come late are noticed, unless they are few. Loops of
 * PAUSE: who spins for long gives way, and has the APIC timer looked at each time, for giving way may take long; who
 * spins for a moment, or alone, does neither.
 */
#include "engine/soft/wait.h"

#include "soft_rig.h"

#include <sched.h>

#define BLOCKS 256
#define PAUSES_MAX 100000000u
#define GIVEN_WAY 5
#define WAKES 20000
#define PATIENCE_S 20

static int setup(void **state)
{
    struct soft_vcpu *v = soft_rig_create();

    v->engine->config.ncpus = 2;
    v->poll = BLOCKS;
    *state = v;
    return 0;
}

static int teardown(void **state)
{
    soft_rig_destroy(*state);
    return 0;
}

static struct timespec in_seconds(time_t n)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += n;
    return t;
}

static _Atomic unsigned taken;

/* The next only when the last was taken: one that is lost ends it all. */
static void *wake_again_and_again(void *opaque)
{
    struct soft_vcpu *v = opaque;

    for (unsigned n = 0; n < WAKES; n++) {
        soft_attend(v, ATTN_KICK);
        while (atomic_load(&taken) <= n)
            sched_yield();
    }
    return NULL;
}

static void no_wake_is_lost(void **state)
{
    struct soft_vcpu *v = *state;
    struct timespec until = in_seconds(PATIENCE_S);
    bool lost = false;
    pthread_t waker;

    atomic_store(&taken, 0);
    assert_int_equal(pthread_create(&waker, NULL, wake_again_and_again, v), 0);
    while (atomic_load(&taken) < WAKES && !lost) {
        while (!atomic_load(&v->attention) && !lost)
            lost = !soft_sleep(v, 0, &until);
        atomic_store(&v->attention, 0);
        atomic_fetch_add(&taken, 1);
    }
    atomic_store(&taken, WAKES);
    pthread_join(waker, NULL);
    assert_false(lost);
}

static void time_ends_sleep(void **state)
{
    struct soft_vcpu *v = *state;
    struct timespec until = in_seconds(0);

    while (soft_sleep(v, 0, &until)) /* a signal may end it, too */
        ;
    assert_false(atomic_load(&v->waiting));
}

static void what_is_there_already_ends_sleep(void **state)
{
    struct soft_vcpu *v = *state;

    atomic_store(&v->attention, ATTN_NMI);
    assert_true(soft_sleep(v, 0, NULL));
}

/* As if the thread had been woken so long ago, and ran only now. */
static bool sleep_and_wake(struct soft_vcpu *v, u64 ns_ago)
{
    atomic_store(&v->attention, ATTN_NMI);
    atomic_store(&v->woken_at, vm_clock_now(v->engine->config.clock) - ns_ago);
    soft_wait_for_attention(v);
    assert_int_equal(atomic_load(&v->woken_at), 0);
    return soft_wakes_late(v);
}

static void late_wakes_are_noticed(void **state)
{
    struct soft_vcpu *v = *state;
    unsigned late = 0, in_time = 0;

    v->engine->config.host_cpus = 1; /* so it doesn't poll */
    vm_clock_set(v->engine->config.clock, NS_PER_SEC);
    assert_false(sleep_and_wake(v, 1));
    assert_false(sleep_and_wake(v, NS_PER_SEC / 10));
    while (!sleep_and_wake(v, NS_PER_SEC / 100))
        assert_true(++late < 10);
    while (sleep_and_wake(v, 1))
        assert_true(++in_time < 10);
}

static void long_loop_gives_way(void **state)
{
    struct soft_vcpu *v = *state;

    for (unsigned n = 0; v->stats.spins < GIVEN_WAY; n++) {
        u64 before = v->stats.spins;

        assert_true(n < PAUSES_MAX);
        soft_pause(v);
        assert_int_equal(v->poll, v->stats.spins > before ? 0 : BLOCKS);
        v->poll = BLOCKS;
    }
}

static void short_loop_does_not(void **state)
{
    struct soft_vcpu *v = *state;

    soft_pause(v);
    assert_int_equal(v->stats.spins, 0);
    assert_int_equal(v->poll, BLOCKS);
}

static void alone_nobody_is_waited_for(void **state)
{
    struct soft_vcpu *v = *state;

    v->engine->config.ncpus = 1;
    for (unsigned n = 0; n < 10000; n++)
        soft_pause(v);
    assert_int_equal(v->stats.spins, 0);
    assert_int_equal(v->poll, BLOCKS);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(no_wake_is_lost),
        TEST(time_ends_sleep),
        TEST(what_is_there_already_ends_sleep),
        TEST(late_wakes_are_noticed),
        TEST(long_loop_gives_way),
        TEST(short_loop_does_not),
        TEST(alone_nobody_is_waited_for),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
