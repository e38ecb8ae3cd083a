#define _GNU_SOURCE
#include "parallel.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void check(int ok, const char *what)
{
    if (!ok)
        die(what);
}

/* --- Threads and processes --- */

/* Units are handed out one by one, so that who has a faster processor does more of them. */
static struct {
    _Atomic u32 next;
    u32 units;
    _Atomic u64 sum;
    u64 (*unit)(u32 n);
} team;

static void *work_units(void *unused)
{
    u64 sum = 0;

    (void)unused;
    for (u32 n; (n = atomic_fetch_add(&team.next, 1)) < team.units;)
        sum += team.unit(n);
    atomic_fetch_add(&team.sum, sum);
    return NULL;
}

static void run_threads(unsigned workers, void *(*run)(void *), void *argument)
{
    pthread_t threads[WORKERS_MAX];

    for (unsigned i = 0; i < workers; i++)
        check(!(errno = pthread_create(&threads[i], NULL, run, argument)), "pthread_create");
    for (unsigned i = 0; i < workers; i++)
        pthread_join(threads[i], NULL);
}

/* The sum of unit(0) to unit(units - 1), by threads. */
static u64 run_team(unsigned workers, u32 units, u64 (*unit)(u32 n))
{
    atomic_store(&team.next, 0);
    atomic_store(&team.sum, 0);
    team.units = units;
    team.unit = unit;
    run_threads(workers, work_units, NULL);
    return atomic_load(&team.sum);
}

static u64 wait_for(pid_t child)
{
    int status;

    check(waitpid(child, &status, 0) == child, "waitpid");
    check(WIFEXITED(status), "a child didn't exit");
    return (u64)WEXITSTATUS(status);
}

/* --- Computing --- */

/* Arithmetic and a table of 4 KiB on the stack. */
static u64 compute_unit(u32 n)
{
    u64 table[512], x = n + 1;

    for (u32 i = 0; i < 512; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        table[i] = x >> 20;
    }
    for (u32 i = 0; i < 200000; i++) {
        u32 at = (u32)(x >> 40) % 512;

        x = (x << 13 | x >> 51) ^ table[at];
        table[at] += x;
    }
    return x & 0xffffff;
}

static u64 run_compute(unsigned workers, u32 units)
{
    return run_team(workers, units, compute_unit);
}

/* --- Pipes --- */

#define CHUNK 4096

static u64 read_all(int from, u8 *buffer)
{
    u64 sum = 0;
    ssize_t n;

    while ((n = read(from, buffer, CHUNK)) > 0) {
        for (ssize_t i = 0; i < n; i++)
            sum += buffer[i];
    }
    check(n == 0, "read from a pipe");
    return sum;
}

/* A process writes `units` chunks, this one adds up what it reads. Always two. */
static u64 run_pipe(unsigned workers, u32 units)
{
    u8 buffer[CHUNK];
    int ends[2];
    u64 sum;
    pid_t child;

    (void)workers;
    check(!pipe(ends), "pipe");
    child = fork();
    check(child >= 0, "fork");
    if (!child) {
        close(ends[0]);
        for (u32 n = 0; n < units; n++) {
            memset(buffer, (int)(n & 0xff), CHUNK);
            check(write(ends[1], buffer, CHUNK) == CHUNK, "write to a pipe");
        }
        _exit(0);
    }
    close(ends[1]);
    sum = read_all(ends[0], buffer);
    close(ends[0]);
    wait_for(child);
    return sum;
}

/* A byte there and back, `units` times, between two processes. */
static u64 run_trips(unsigned workers, u32 units)
{
    int there[2], back[2];
    u8 byte = 0;
    u64 sum = 0;
    pid_t child;

    (void)workers;
    check(!pipe(there) && !pipe(back), "pipe");
    child = fork();
    check(child >= 0, "fork");
    if (!child) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1) {
            byte++;
            check(write(back[1], &byte, 1) == 1, "write to a pipe");
        }
        _exit(0);
    }
    for (u32 n = 0; n < units; n++) {
        check(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "a pipe's trip");
        sum += byte;
    }
    close(there[1]);
    wait_for(child);
    return sum;
}

/* --- Futexes --- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t turned;
    u32 turn, units;
    u64 sum;
    unsigned workers;
    _Atomic unsigned joined;
} ring = {.lock = PTHREAD_MUTEX_INITIALIZER, .turned = PTHREAD_COND_INITIALIZER};

/* Short critical sections that all want at once, and every 16 units a turn that goes round. */
static void *go_round(void *unused)
{
    unsigned self = atomic_fetch_add(&ring.joined, 1);

    (void)unused;
    for (u32 n = 0; n < ring.units; n++) {
        pthread_mutex_lock(&ring.lock);
        ring.sum += n;
        if (n % 16 == 0) {
            while (ring.turn % ring.workers != self)
                pthread_cond_wait(&ring.turned, &ring.lock);
            ring.turn++;
            pthread_cond_broadcast(&ring.turned);
        }
        pthread_mutex_unlock(&ring.lock);
    }
    return NULL;
}

/* `units` in all. */
static u64 run_futex(unsigned workers, u32 units)
{
    ring.workers = workers;
    ring.units = units / workers;
    run_threads(workers, go_round, NULL);
    return ring.sum == (u64)workers * ring.units * (ring.units - 1) / 2;
}

/* --- Processes --- */

static u64 fork_unit(u32 n)
{
    pid_t child = fork();

    check(child >= 0, "fork");
    if (!child)
        _exit((int)(n % 100));
    return wait_for(child);
}

/* Forks of single-threaded processes, as a shell's are: workers are processes as well. */
static u64 run_fork(unsigned workers, u32 units)
{
    u64 *sums = mmap(NULL, sizeof(u64) * WORKERS_MAX, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t children[WORKERS_MAX];
    u64 sum = 0;

    check(sums != MAP_FAILED, "mmap");
    for (unsigned w = 0; w < workers; w++) {
        children[w] = fork();
        check(children[w] >= 0, "fork");
        if (!children[w]) {
            for (u32 n = w; n < units; n += workers)
                sums[w] += fork_unit(n);
            _exit(0);
        }
    }
    for (unsigned w = 0; w < workers; w++) {
        wait_for(children[w]);
        sum += sums[w];
    }
    return sum;
}

static u64 exec_unit(u32 n)
{
    char program[] = "/proc/self/exe", argument[] = "--exit";
    char *arguments[] = {program, argument, NULL};
    pid_t child;

    (void)n;
    errno = posix_spawn(&child, program, NULL, NULL, arguments, environ);
    check(!errno, "exec of /proc/self/exe");
    return 1 + wait_for(child);
}

static u64 run_exec(unsigned workers, u32 units)
{
    return run_team(workers, units, exec_unit);
}

/* --- Signals --- */

static _Atomic u64 caught;

static void catch (int number)
{
    (void)number;
    atomic_fetch_add(&caught, 1);
}

/* To the whole process: whichever thread has it unblocked takes it. Each is waited for, or the next would be
 * one with it. */
static void *send_signals(void *lock)
{
    for (u32 n = 0; n < ring.units; n++) {
        u64 before;

        pthread_mutex_lock(lock);
        before = atomic_load(&caught);
        kill(getpid(), SIGUSR1);
        while (atomic_load(&caught) == before)
            ;
        pthread_mutex_unlock(lock);
    }
    return NULL;
}

static u64 run_signal(unsigned workers, u32 units)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct sigaction action = {.sa_handler = catch, .sa_flags = SA_RESTART};

    check(!sigaction(SIGUSR1, &action, NULL), "sigaction");
    ring.units = units / workers;
    run_threads(workers, send_signals, &lock);
    return atomic_load(&caught) == (u64)ring.units * workers;
}

/* --- Timers --- */

static u64 last_seen; /* by anybody, under the ring's lock */

/* Sleeps of a millisecond: none ends early, and no processor's clock is behind another's. */
static u64 timer_unit(u32 n)
{
    const struct timespec nap = {.tv_nsec = 1000000 + (long)(n % 7) * 100000};
    u64 begin = now(), good;

    clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, NULL);
    good = now() - begin >= (u64)nap.tv_nsec;
    pthread_mutex_lock(&ring.lock);
    begin = now();
    good &= begin >= last_seen;
    last_seen = begin;
    pthread_mutex_unlock(&ring.lock);
    return good;
}

static u64 run_timers(unsigned workers, u32 units)
{
    return run_team(workers, units, timer_unit);
}

const struct work works[] = {
    {"compute", run_compute}, {"pipe", run_pipe},     {"trips", run_trips},
    {"futex", run_futex},     {"fork", run_fork},     {"exec", run_exec},
    {"signal", run_signal},   {"timers", run_timers}, {NULL},
};
