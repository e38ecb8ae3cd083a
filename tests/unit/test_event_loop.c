#include "host/event_loop.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MS 1000000ULL

static struct event_loop *loop;
static pthread_t loop_thread;
static bool loop_started;

static int setup(void **state)
{
    struct error err;

    loop = event_loop_create(&err);
    loop_started = false;
    return loop ? 0 : -1;
}

static void *run(void *opaque)
{
    event_loop_run(loop);
    return NULL;
}

static void start_loop(void)
{
    assert_int_equal(pthread_create(&loop_thread, NULL, run, NULL), 0);
    loop_started = true;
}

static int teardown(void **state)
{
    if (loop_started) {
        event_loop_stop(loop);
        pthread_join(loop_thread, NULL);
    }
    event_loop_destroy(loop);
    return 0;
}

static void sleep_ms(unsigned ms)
{
    usleep(ms * 1000);
}

static void wait_until(atomic_uint *value, unsigned wanted)
{
    for (unsigned i = 0; i < 5000 && *value < wanted; i++)
        sleep_ms(1);
    assert_int_equal(*value, wanted);
}

static void stop_it(void *opaque)
{
    event_loop_stop(loop);
}

static void returns_at_once_when_stopped_before(void **state)
{
    event_loop_stop(loop);
    event_loop_run(loop);
}

/* ---- timers ---- */

#define NTIMERS 500

struct recorded {
    struct host_timer timer;
    u64 wanted, fired_at;
};

static struct recorded recorded[NTIMERS];
static unsigned fired;
static u64 last_deadline;

static void record(void *opaque)
{
    struct recorded *r = opaque;

    r->fired_at = host_clock_ns();
    assert_true(r->wanted >= last_deadline);
    last_deadline = r->wanted;
    fired++;
}

static void timers_fire_in_order_and_never_early(void **state)
{
    struct host_timer end = {.fire = stop_it};
    u64 now = host_clock_ns();
    unsigned cancelled = 0;

    fired = 0;
    last_deadline = 0;
    srand(1);
    for (unsigned i = 0; i < NTIMERS; i++) {
        struct recorded *r = &recorded[i];

        *r = (struct recorded){.timer = {.fire = record, .opaque = r}};
        event_loop_timer_arm(loop, &r->timer, now + 1000 * MS);
        r->wanted = now + MS + (u64)(rand() % 50) * MS;
        event_loop_timer_arm(loop, &r->timer, r->wanted);
    }
    for (unsigned i = 0; i < NTIMERS; i += 3, cancelled++)
        event_loop_timer_cancel(loop, &recorded[i].timer);
    event_loop_timer_arm(loop, &end, now + 60 * MS);
    event_loop_run(loop);

    assert_int_equal(fired, NTIMERS - cancelled);
    for (unsigned i = 0; i < NTIMERS; i++) {
        assert_false(recorded[i].timer.armed);
        assert_int_equal(recorded[i].fired_at == 0, i % 3 == 0);
        if (i % 3)
            assert_true(recorded[i].fired_at >= recorded[i].wanted);
    }
    assert_true(host_clock_ns() >= now + 60 * MS);
}

static void fire_again(void *opaque)
{
    struct host_timer *t = opaque;

    fired++;
    event_loop_timer_arm(loop, t, 0);
}

static void note_byte(void *opaque, u32 events)
{
    stop_it(NULL);
}

static void a_timer_that_is_always_late_does_not_starve_descriptors(void **state)
{
    struct host_timer t = {.fire = fire_again, .opaque = &t};
    struct fd_watch w = {.events = EPOLLIN, .ready = note_byte};
    int pipe_fds[2];

    assert_int_equal(pipe(pipe_fds), 0);
    w.fd = pipe_fds[0];
    fired = 0;
    event_loop_timer_arm(loop, &t, 0);
    assert_int_equal(event_loop_watch(loop, &w), 0);
    assert_int_equal(write(pipe_fds[1], "x", 1), 1);
    event_loop_run(loop);
    event_loop_timer_remove(loop, &t);
    event_loop_unwatch(loop, &w);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

static atomic_uint entered, left;

static void linger(void *opaque)
{
    entered++;
    sleep_ms(30);
    left++;
}

static void removing_a_timer_waits_for_its_callback(void **state)
{
    struct host_timer t = {.fire = linger};

    entered = left = 0;
    start_loop();
    event_loop_timer_arm(loop, &t, 0);
    wait_until(&entered, 1);
    event_loop_timer_remove(loop, &t);
    assert_int_equal(left, 1);
}

static void linger_and_arm(void *opaque)
{
    linger(NULL);
    event_loop_timer_arm(loop, opaque, 0);
}

static void a_removed_timer_stays_away_though_its_callback_arms_it(void **state)
{
    struct host_timer t = {.fire = linger_and_arm, .opaque = &t};

    entered = left = 0;
    start_loop();
    event_loop_timer_arm(loop, &t, 0);
    wait_until(&entered, 1);
    event_loop_timer_remove(loop, &t);
    assert_false(t.armed);
    sleep_ms(20);
    assert_int_equal(entered, 1);
}

/* ---- posts ---- */

static atomic_uint posted;

static void count_post(void *opaque)
{
    assert_true(pthread_equal(pthread_self(), loop_thread));
    posted++;
}

static void *post_many(void *opaque)
{
    for (unsigned i = 0; i < 1000; i++)
        assert_int_equal(event_loop_post(loop, count_post, NULL), 0);
    return NULL;
}

static void posts_of_several_threads_all_run_on_the_loops(void **state)
{
    pthread_t threads[3];

    posted = 0;
    start_loop();
    for (unsigned i = 0; i < ARRAY_SIZE(threads); i++)
        pthread_create(&threads[i], NULL, post_many, NULL);
    for (unsigned i = 0; i < ARRAY_SIZE(threads); i++)
        pthread_join(threads[i], NULL);
    wait_until(&posted, 3000);
}

static unsigned sequence;

static void check_sequence(void *opaque)
{
    assert_int_equal(sequence++, (uintptr_t)opaque);
    if (sequence == 10)
        event_loop_stop(loop);
}

static void posts_run_in_order(void **state)
{
    sequence = 0;
    for (uintptr_t i = 0; i < 10; i++)
        event_loop_post(loop, check_sequence, (void *)i);
    event_loop_run(loop);
    assert_int_equal(sequence, 10);
}

static void posts_that_never_ran_are_freed(void **state)
{
    event_loop_post(loop, count_post, NULL);
}

/* ---- descriptors ---- */

static atomic_uint bytes;

static void read_byte(void *opaque, u32 events)
{
    struct fd_watch *w = opaque;
    char c;

    if (read(w->fd, &c, 1) == 1)
        bytes++;
    else
        event_loop_watch_events(loop, w, 0);
}

static void a_paused_watch_is_silent_also_about_hang_ups(void **state)
{
    int pair[2];
    struct fd_watch w = {.events = EPOLLIN, .ready = read_byte, .opaque = &w};

    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    w.fd = pair[0];
    bytes = 0;
    start_loop();
    assert_int_equal(event_loop_watch(loop, &w), 0);
    assert_int_equal(event_loop_watch(loop, &w), -EEXIST);
    assert_int_equal(write(pair[1], "a", 1), 1);
    wait_until(&bytes, 1);
    assert_int_equal(event_loop_watch_events(loop, &w, 0), 0);
    assert_int_equal(write(pair[1], "b", 1), 1);
    close(pair[1]);
    sleep_ms(20);
    assert_int_equal(bytes, 1);
    assert_int_equal(event_loop_watch_events(loop, &w, EPOLLOUT | EPOLLIN), 0);
    wait_until(&bytes, 2);
    event_loop_unwatch(loop, &w);
    assert_int_equal(event_loop_watch_events(loop, &w, EPOLLIN), -ENOENT);
    close(pair[0]);
}

static void unwatch_other(void *opaque, u32 events)
{
    fired++;
    event_loop_unwatch(loop, opaque);
    event_loop_stop(loop);
}

/* Both are ready in the same epoll_wait: the first takes the second away. */
static void an_event_fetched_before_its_watch_went_is_dropped(void **state)
{
    int pipe_fds[2], other;
    struct fd_watch a, b;

    assert_int_equal(pipe(pipe_fds), 0);
    other = dup(pipe_fds[0]);
    a = (struct fd_watch){pipe_fds[0], EPOLLIN, unwatch_other, &b, false};
    b = (struct fd_watch){other, EPOLLIN, unwatch_other, &a, false};
    fired = 0;
    assert_int_equal(event_loop_watch(loop, &a), 0);
    assert_int_equal(event_loop_watch(loop, &b), 0);
    assert_int_equal(write(pipe_fds[1], "x", 1), 1);
    event_loop_run(loop);
    assert_int_equal(fired, 1);
    event_loop_unwatch(loop, &a);
    event_loop_unwatch(loop, &b);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    close(other);
}

static void linger_ready(void *opaque, u32 events)
{
    linger(NULL);
}

static void unwatching_waits_for_the_callback(void **state)
{
    int pipe_fds[2];
    struct fd_watch w = {.events = EPOLLIN, .ready = linger_ready};

    assert_int_equal(pipe(pipe_fds), 0);
    w.fd = pipe_fds[0];
    entered = left = 0;
    start_loop();
    assert_int_equal(event_loop_watch(loop, &w), 0);
    assert_int_equal(write(pipe_fds[1], "x", 1), 1);
    wait_until(&entered, 1);
    event_loop_unwatch(loop, &w);
    assert_int_equal(entered, left);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

static void a_regular_file_is_refused(void **state)
{
    struct fd_watch w = {.events = EPOLLIN, .ready = read_byte};

    w.fd = open("/proc/self/exe", O_RDONLY);
    assert_int_equal(event_loop_watch(loop, &w), -EPERM);
    close(w.fd);
    w.fd = -1;
    assert_int_equal(event_loop_watch(loop, &w), -EBADF);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(returns_at_once_when_stopped_before),
        TEST(timers_fire_in_order_and_never_early),
        TEST(a_timer_that_is_always_late_does_not_starve_descriptors),
        TEST(removing_a_timer_waits_for_its_callback),
        TEST(a_removed_timer_stays_away_though_its_callback_arms_it),
        TEST(posts_of_several_threads_all_run_on_the_loops),
        TEST(posts_run_in_order),
        TEST(posts_that_never_ran_are_freed),
        TEST(a_paused_watch_is_silent_also_about_hang_ups),
        TEST(an_event_fetched_before_its_watch_went_is_dropped),
        TEST(unwatching_waits_for_the_callback),
        TEST(a_regular_file_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
