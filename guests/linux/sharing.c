/*
 * Threads and processes at the same addresses: what one takes away, no other has any more from when the system call is
 * over; what a process has is no other's. With several processors these are races that one side must win. As corners.c,
 * not measured.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define ROUNDS 50
#define WARM 20000 /* accesses before something changes: enough for any translator */
#define CHILDREN 4
#define FAULT 0xfa017u

static void *map_pages(void *at, size_t count, int fd, off_t offset)
{
    int flags = (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | (at ? MAP_FIXED : 0);
    void *got = mmap(at, count * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, flags, fd, offset);

    if (got == MAP_FAILED)
        die("mmap");
    return got;
}

/* --- Somebody who uses a page all the time --- */

static struct {
    volatile u8 *page;
    u32 (*use)(volatile u8 *page);
    _Atomic u32 uses;  /* so far, this round */
    _Atomic u32 round; /* under way */
    _Atomic u32 over;  /* the last one whose change was made */
    _Atomic u32 seen;  /* the last one of which the result is there */
    u32 result;        /* of the first use after the change */
} user;

static __thread sigjmp_buf behind_fault;

static void on_fault(int sig)
{
    (void)sig;
    siglongjmp(behind_fault, 1);
}

static u32 use_once(void)
{
    return user.use(user.page);
}

/* Uses the page until the round is over, and once more. */
static u32 use_until(u32 round)
{
    if (sigsetjmp(behind_fault, 1)) {
        while (atomic_load(&user.over) != round)
            sched_yield();
        if (sigsetjmp(behind_fault, 1))
            return FAULT;
        return use_once();
    }
    while (atomic_load(&user.over) != round) {
        use_once();
        atomic_fetch_add(&user.uses, 1);
    }
    __asm__ volatile("cpuid"
                     :
                     : "a"(0)
                     : "rbx", "rcx", "rdx", "memory"); /* what was fetched already goes */
    return use_once();
}

static void *use_in_rounds(void *unused)
{
    (void)unused;
    for (u32 round = 1; round <= ROUNDS; round++) {
        while (atomic_load(&user.round) != round)
            sched_yield();
        user.result = use_until(round);
        atomic_store(&user.seen, round);
    }
    return NULL;
}

/* While another thread uses the page, `change` does something to it. A sum of what was met after each change. */
static u64 race(volatile u8 *page, u32 (*use)(volatile u8 *page), void (*change)(u32 round))
{
    pthread_t thread;
    u64 sum = 1;

    user.page = page;
    user.use = use;
    atomic_store(&user.round, 0);
    atomic_store(&user.over, 0);
    atomic_store(&user.seen, 0);
    signal(SIGSEGV, on_fault);
    errno = pthread_create(&thread, NULL, use_in_rounds, NULL);
    if (errno)
        die("pthread_create");
    for (u32 round = 1; round <= ROUNDS; round++) {
        atomic_store(&user.uses, 0);
        atomic_store(&user.round, round);
        while (atomic_load(&user.uses) < WARM / ROUNDS)
            sched_yield();
        change(round);
        atomic_store(&user.over, round);
        while (atomic_load(&user.seen) != round)
            sched_yield();
        sum = mix(sum, user.result);
        change(0);
    }
    pthread_join(thread, NULL);
    signal(SIGSEGV, SIG_DFL);
    return sum;
}

/* --- What is done to it: 0 undoes it --- */

static u32 read_page(volatile u8 *page)
{
    return page[100];
}

static u32 write_page(volatile u8 *page)
{
    page[200]++;
    return 1;
}

static u32 call_page(volatile u8 *page)
{
    u32 (*function)(void);

    memcpy(&function, &page, sizeof(function));
    return function();
}

static u8 *target;
static int file;

static void protect_all(u32 round)
{
    if (mprotect(target, PAGE, round ? PROT_NONE : PROT_READ | PROT_WRITE | PROT_EXEC))
        die("mprotect");
}

static void protect_writing(u32 round)
{
    if (mprotect(target, PAGE, round ? PROT_READ : PROT_READ | PROT_WRITE | PROT_EXEC))
        die("mprotect");
}

static void drop(u32 round)
{
    if (round && madvise(target, PAGE, MADV_DONTNEED))
        die("madvise");
    target[100] = round ? target[100] : 77;
}

/* Pages of a file by turns, each with its number. */
static void map_over(u32 round)
{
    map_pages(target, 1, file, (round % 2) * PAGE);
}

/* mov eax, round; ret */
static void write_function(u32 round)
{
    if (round)
        memcpy(target + 1, &round, sizeof(round));
}

static u64 with_page(u32 (*use)(volatile u8 *page), void (*change)(u32 round))
{
    u64 sum;

    target = map_pages(NULL, 1, -1, 0);
    target[0] = 0xb8;
    target[5] = 0xc3;
    target[100] = 77;
    sum = race(target, use, change);
    munmap(target, PAGE);
    return sum;
}

static u64 run_protected(void)
{
    u64 sum = with_page(read_page, protect_all);

    return mix(mix(sum, 1), with_page(write_page, protect_writing));
}

static u64 run_dropped(void)
{
    return with_page(read_page, drop);
}

static u64 run_code_of_another(void)
{
    return with_page(call_page, write_function);
}

static u64 run_mapped_over(void)
{
    u64 sum;
    u8 *all;

    file = memfd_create("pages", 0);
    if (file < 0 || ftruncate(file, 2 * PAGE))
        die("memfd_create");
    all = map_pages(NULL, 2, file, 0);
    all[100] = 11;
    all[PAGE + 100] = 22;
    sum = with_page(read_page, map_over);
    munmap(all, 2 * PAGE);
    close(file);
    return sum;
}

/* --- Processes --- */

static volatile u64 counters[64 * PAGE / sizeof(u64)];
static _Atomic int stop;

static void *count_up(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop))
        for (size_t n = 0; n < ARRAY_SIZE(counters); n += 64)
            counters[n]++;
    return NULL;
}

static u64 sum_counters(void)
{
    u64 sum = 0;

    for (size_t n = 0; n < ARRAY_SIZE(counters); n += 64)
        sum = mix(sum, counters[n]);
    return sum;
}

static u64 wait_for(pid_t child)
{
    int status;

    if (child < 0 || waitpid(child, &status, 0) != child)
        die("fork");
    return (u64)status;
}

/* A child's memory stays what it was at fork(), whatever its parent's threads do. */
static u64 run_fork_while_writing(void)
{
    pthread_t thread;
    u64 sum = 0;

    atomic_store(&stop, 0);
    errno = pthread_create(&thread, NULL, count_up, NULL);
    if (errno)
        die("pthread_create");
    for (int round = 0; round < ROUNDS; round++) {
        pid_t child = fork();

        if (child == 0) {
            u64 before = sum_counters(), same = 1;

            for (int n = 0; n < 20; n++)
                same &= sum_counters() == before;
            _exit(same);
        }
        sum = mix(sum, wait_for(child));
    }
    atomic_store(&stop, 1);
    pthread_join(thread, NULL);
    return sum;
}

static u32 work_alone(u32 number)
{
    for (u32 round = 1; round <= 200; round++) {
        for (size_t n = 0; n < ARRAY_SIZE(counters); n += 64)
            counters[n] = number * round + n;
        if (round % 50 == 0)
            sched_yield();
        for (size_t n = 0; n < ARRAY_SIZE(counters); n += 64)
            if (counters[n] != number * round + n)
                return 0;
    }
    return number;
}

/* Several write to the same addresses of their own. */
static u64 run_processes_alike(void)
{
    pid_t children[CHILDREN];
    u64 sum = 0;

    for (u32 n = 0; n < CHILDREN; n++) {
        children[n] = fork();
        if (children[n] == 0)
            _exit((int)work_alone(n + 1));
    }
    for (u32 n = 0; n < CHILDREN; n++)
        sum = mix(sum, wait_for(children[n]));
    return sum;
}

const struct benchmark sharing_benchmarks[] = {{"protected", run_protected},
                                               {"dropped", run_dropped},
                                               {"code-of-another", run_code_of_another},
                                               {"mapped-over", run_mapped_over},
                                               {"fork-while-writing", run_fork_while_writing},
                                               {"processes-alike", run_processes_alike},
                                               {0}};
