#include "bus/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>

#include <cmocka.h>

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000ULL

static struct event_loop *loop;
static struct vm_clock *vm_clock;
static pthread_t loop_thread;

static void *run(void *opaque)
{
    event_loop_run(loop);
    return NULL;
}

static int setup(void **state)
{
    struct error err;

    loop = event_loop_create(&err);
    vm_clock = vm_clock_create(loop, &err);
    return loop && vm_clock ? pthread_create(&loop_thread, NULL, run, NULL) : -1;
}

static int teardown(void **state)
{
    event_loop_stop(loop);
    pthread_join(loop_thread, NULL);
    vm_clock_destroy(vm_clock);
    event_loop_destroy(loop);
    return 0;
}

static void sleep_ms(unsigned ms)
{
    usleep(ms * 1000);
}

static void starts_stopped_at_zero(void **state)
{
    assert_int_equal(vm_clock_now(vm_clock), 0);
    sleep_ms(2);
    assert_int_equal(vm_clock_now(vm_clock), 0);
}

static void runs_at_the_hosts_speed(void **state)
{
    u64 host = host_clock_ns(), ran;

    vm_clock_start(vm_clock);
    sleep_ms(20);
    ran = vm_clock_now(vm_clock);
    assert_true(ran >= 20 * MS);
    assert_true(ran <= host_clock_ns() - host);
}

static void stops_and_resumes_without_a_jump(void **state)
{
    u64 stopped, resumed, host;

    vm_clock_start(vm_clock);
    sleep_ms(2);
    vm_clock_stop(vm_clock);
    stopped = vm_clock_now(vm_clock);
    assert_true(stopped >= 2 * MS);
    sleep_ms(50);
    assert_int_equal(vm_clock_now(vm_clock), stopped);
    host = host_clock_ns();
    vm_clock_start(vm_clock);
    resumed = vm_clock_now(vm_clock);
    assert_true(resumed >= stopped);
    assert_true(resumed - stopped <= host_clock_ns() - host);
}

static void can_be_set_while_it_is_stopped(void **state)
{
    struct timespec now;
    u64 wall;

    vm_clock_set(vm_clock, 123456789);
    assert_int_equal(vm_clock_now(vm_clock), 123456789);
    clock_gettime(CLOCK_REALTIME, &now);
    wall = vm_clock_wall_ns(vm_clock);
    assert_in_range(wall / NS_PER_SEC, now.tv_sec - 1, now.tv_sec + 1);
    vm_clock_start(vm_clock);
    vm_clock_set(vm_clock, 5);
    assert_true(vm_clock_now(vm_clock) >= 123456789);
}

static void converts_to_host_time(void **state)
{
    u64 before, after, vm;

    vm_clock_set(vm_clock, 1000 * MS);
    before = host_clock_ns();
    vm_clock_start(vm_clock);
    after = host_clock_ns();
    vm = vm_clock_to_host(vm_clock, 1500 * MS);
    assert_in_range(vm, before + 500 * MS, after + 500 * MS);
    vm = vm_clock_to_host(vm_clock, 900 * MS);
    assert_in_range(vm, before - 100 * MS, after - 100 * MS);
    assert_true(vm_clock_to_host(vm_clock, UINT64_MAX) == UINT64_MAX);
}

/* ---- timers ---- */

static atomic_uint fired;
static _Atomic u64 fired_at;

static void count(void *opaque)
{
    fired_at = vm_clock_now(vm_clock);
    fired++;
}

static void wait_until_fired(unsigned wanted)
{
    for (unsigned i = 0; i < 5000 && fired < wanted; i++)
        sleep_ms(1);
    assert_int_equal(fired, wanted);
}

static void a_timer_waits_for_its_vm_time_through_a_stop(void **state)
{
    struct vm_timer t;

    fired = 0;
    vm_timer_init(&t, vm_clock, count, NULL);
    vm_timer_arm(&t, 30 * MS);
    sleep_ms(40);
    assert_int_equal(fired, 0);
    vm_clock_start(vm_clock);
    sleep_ms(5);
    vm_clock_stop(vm_clock);
    sleep_ms(40);
    assert_int_equal(fired, 0);
    vm_clock_start(vm_clock);
    wait_until_fired(1);
    assert_true(fired_at >= 30 * MS);
    vm_timer_destroy(&t);
}

static void a_timer_can_be_moved_and_cancelled(void **state)
{
    struct vm_timer late, never;

    fired = 0;
    vm_timer_init(&late, vm_clock, count, NULL);
    vm_timer_init(&never, vm_clock, count, NULL);
    vm_clock_start(vm_clock);
    vm_timer_arm(&late, vm_clock_now(vm_clock) + 10 * MS);
    vm_timer_arm(&late, vm_clock_now(vm_clock) + 10000 * MS);
    vm_timer_arm(&never, vm_clock_now(vm_clock) + 10 * MS);
    vm_timer_cancel(&never);
    vm_timer_cancel(&never);
    sleep_ms(30);
    assert_int_equal(fired, 0);
    vm_timer_arm(&late, 0);
    wait_until_fired(1);
    vm_timer_destroy(&late);
    vm_timer_destroy(&never);
}

static void a_timer_in_the_farthest_future_does_not_fire(void **state)
{
    struct vm_timer t;

    fired = 0;
    vm_timer_init(&t, vm_clock, count, NULL);
    vm_clock_start(vm_clock);
    vm_timer_arm(&t, UINT64_MAX);
    sleep_ms(5);
    assert_int_equal(fired, 0);
    vm_timer_destroy(&t);
}

static void arm_again(void *opaque)
{
    count(NULL);
    vm_timer_arm(opaque, vm_clock_now(vm_clock) + MS / 10);
}

static void a_destroyed_timer_stays_away_though_its_callback_arms_it(void **state)
{
    for (unsigned i = 0; i < 50; i++) {
        struct vm_timer t;
        unsigned seen;

        vm_timer_init(&t, vm_clock, arm_again, &t);
        vm_clock_start(vm_clock);
        vm_timer_arm(&t, 0);
        usleep(300);
        vm_timer_destroy(&t);
        seen = fired;
        usleep(300);
        assert_int_equal(fired, seen);
    }
}

/* ---- threads ---- */

static atomic_bool done;

static void *read_clock(void *opaque)
{
    u64 last = 0, went_back = 0;

    while (!done) {
        u64 now = vm_clock_now(vm_clock);

        went_back += now < last;
        last = now;
    }
    return (void *)(uintptr_t)went_back;
}

static void is_monotonic_while_it_is_stopped_and_started(void **state)
{
    pthread_t readers[2];
    void *went_back;

    done = false;
    for (unsigned i = 0; i < ARRAY_SIZE(readers); i++)
        pthread_create(&readers[i], NULL, read_clock, NULL);
    for (unsigned i = 0; i < 3000; i++) {
        u64 before, stopped;

        vm_clock_start(vm_clock);
        before = vm_clock_now(vm_clock);
        vm_clock_stop(vm_clock);
        stopped = vm_clock_now(vm_clock);
        assert_true(before <= stopped);
    }
    done = true;
    for (unsigned i = 0; i < ARRAY_SIZE(readers); i++) {
        pthread_join(readers[i], &went_back);
        assert_null(went_back);
    }
}

static void tick_conversions_round_as_promised(void **state)
{
    const u64 rates[] = {1, 1193182, 3579545, 14318180, 1000000000, 2995200000};

    for (unsigned r = 0; r < ARRAY_SIZE(rates); r++) {
        for (u64 ticks = 1; ticks < 1000000; ticks = ticks * 3 + 1) {
            u64 ns = clock_ticks_to_ns(ticks, rates[r]);

            assert_true(clock_ns_to_ticks(ns, rates[r]) >= ticks);
            assert_true(clock_ns_to_ticks(ns - 1, rates[r]) < ticks);
        }
    }
    /* A damaged snapshot may name any tick: far in the future mustn't become soon. */
    assert_true(clock_ticks_to_ns(INT64_MAX, 1193182) == UINT64_MAX);
    assert_true(clock_ticks_to_ns(UINT64_MAX, 1000000000) == UINT64_MAX);
    /* A century, at 3 GHz. */
    assert_int_equal(clock_ns_to_ticks(100ULL * 365 * 86400 * NS_PER_SEC, 3000000000) / 3000000000,
                     100ULL * 365 * 86400);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(starts_stopped_at_zero),
        TEST(runs_at_the_hosts_speed),
        TEST(stops_and_resumes_without_a_jump),
        TEST(can_be_set_while_it_is_stopped),
        TEST(converts_to_host_time),
        TEST(a_timer_waits_for_its_vm_time_through_a_stop),
        TEST(a_timer_can_be_moved_and_cancelled),
        TEST(a_timer_in_the_farthest_future_does_not_fire),
        TEST(a_destroyed_timer_stays_away_though_its_callback_arms_it),
        TEST(is_monotonic_while_it_is_stopped_and_started),
        cmocka_unit_test(tick_conversions_round_as_promised),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
