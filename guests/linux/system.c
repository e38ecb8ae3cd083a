/*
 * What a kernel does for its programs: system calls, processes, memory, signals. One processor does
 * the work everywhere: on a host with more, the processes of these benchmarks are pinned to one
 * (main.c), as a guest here has no second.
 *
 * Processes that wait for each other end by a signal when the benchmark does, or when this program
 * dies.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define CALLS 2000
#define TRIPS 200 /* of a byte there and back */
#define RING 8    /* processes */
#define ROUNDS 25 /* of a byte through the ring */
#define FORKS 8
#define SPAWNS 3
#define FAULTS 512 /* pages */
#define PROTECTIONS 256
#define FILE_PAGES 256
#define MAPPINGS 4
#define SIGNALS 400

static void check(int ok, const char *what)
{
    if (!ok)
        die(what);
}

/* getppid, the least that a system call can do. */
static u64 run_getppid(void)
{
    long parent = syscall(SYS_getppid);
    u64 same = 0;

    for (int i = 0; i < CALLS; i++)
        same += syscall(SYS_getppid) == parent;
    return same;
}

/* clock_gettime as programs call it: in the vDSO where the kernel trusts its clock. */
static u64 run_clock_gettime(void)
{
    struct timespec last = {0}, now;
    u64 forward = 0;

    for (int i = 0; i < CALLS; i++) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        forward +=
            now.tv_sec > last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec >= last.tv_nsec);
        last = now;
    }
    return forward;
}

/* Processes in a ring: each hands on a byte, one more than it got. The first is this program. */
static struct {
    int pipes[RING][2]; /* [i] leads from process i to the next */
    pid_t children[RING - 1];
    unsigned count;
} ring;

static void pass_on(int from, int to)
{
    u8 byte;

    while (read(from, &byte, 1) == 1) {
        byte++;
        if (write(to, &byte, 1) != 1)
            break;
    }
    _exit(0);
}

static void ring_begin(unsigned count)
{
    ring.count = count;
    for (unsigned i = 0; i < count; i++)
        check(!pipe(ring.pipes[i]), "pipe");
    for (unsigned i = 1; i < count; i++) {
        pid_t child = fork();

        check(child >= 0, "fork");
        if (!child) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            pass_on(ring.pipes[i - 1][0], ring.pipes[i][1]);
        }
        ring.children[i - 1] = child;
    }
}

static void ring_end(void)
{
    for (unsigned i = 1; i < ring.count; i++) {
        kill(ring.children[i - 1], SIGKILL);
        waitpid(ring.children[i - 1], NULL, 0);
    }
    for (unsigned i = 0; i < ring.count; i++) {
        close(ring.pipes[i][0]);
        close(ring.pipes[i][1]);
    }
}

static u64 ring_send(unsigned rounds)
{
    u64 sum = 0;
    u8 byte = 1;

    while (rounds--) {
        check(write(ring.pipes[0][1], &byte, 1) == 1, "write to a pipe");
        check(read(ring.pipes[ring.count - 1][0], &byte, 1) == 1, "read from a pipe");
        sum = mix(sum, byte);
    }
    return sum;
}

static void pipe_begin(void)
{
    ring_begin(2);
}

static void switch_begin(void)
{
    ring_begin(RING);
}

static u64 run_pipe(void)
{
    return ring_send(TRIPS);
}

static u64 run_switch(void)
{
    return ring_send(ROUNDS);
}

static u64 wait_for(pid_t child)
{
    int status;

    check(waitpid(child, &status, 0) == child, "waitpid");
    check(WIFEXITED(status), "a child didn't exit");
    return (u64)WEXITSTATUS(status);
}

static u64 run_fork(void)
{
    u64 sum = 0;

    for (int i = 0; i < FORKS; i++) {
        pid_t child = fork();

        check(child >= 0, "fork");
        if (!child)
            _exit(i + 1);
        sum = mix(sum, wait_for(child));
    }
    return sum;
}

/* This program again, which main() ends at once when it gets this argument. */
static u64 run_exec(void)
{
    char program[] = "/proc/self/exe", argument[] = "--exit";
    char *arguments[] = {program, argument, NULL};
    u64 sum = 0;

    for (int i = 0; i < SPAWNS; i++) {
        pid_t child;

        /* A vfork and an execve. */
        errno = posix_spawn(&child, program, NULL, NULL, arguments, environ);
        check(!errno, "exec of /proc/self/exe");
        sum = mix(sum, wait_for(child));
    }
    return sum;
}

static volatile u8 *map(size_t pages, int protection, int flags, int file)
{
    void *at = mmap(NULL, pages * PAGE, protection, flags, file, 0);

    check(at != MAP_FAILED, "mmap");
    /* Small pages on every kernel. */
    if (flags & MAP_ANONYMOUS)
        madvise(at, pages * PAGE, MADV_NOHUGEPAGE);
    return at;
}

static u64 run_faults(void)
{
    volatile u8 *at = map(FAULTS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    u64 sum = 0;

    for (u32 i = 0; i < FAULTS; i++) {
        sum += at[i * PAGE + 8] + 1u;
        at[i * PAGE] = (u8)i;
    }
    for (u32 i = 0; i < FAULTS; i++)
        sum = mix(sum, at[i * PAGE]);
    munmap((void *)at, (size_t)FAULTS * PAGE);
    return sum;
}

static volatile u8 *protected;

static void mprotect_begin(void)
{
    protected = map(PROTECTIONS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (u32 i = 0; i < PROTECTIONS; i++)
    protected[i * PAGE] = (u8)i;
}

static void mprotect_end(void)
{
    munmap((void *)protected, (size_t)PROTECTIONS * PAGE);
}

/* A page becomes read-only and is read, becomes writable and is written. */
static u64 run_mprotect(void)
{
    u64 sum = 0;

    for (u32 i = 0; i < PROTECTIONS; i++) {
        volatile u8 *page = protected + (size_t)i * PAGE;

        check(!mprotect((void *)page, PAGE, PROT_READ), "mprotect");
        sum = mix(sum, *page);
        check(!mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE), "mprotect");
        *page = *page;
    }
    return sum;
}

static int file = -1;

/* A file of tmpfs, whatever file system the host has at hand. */
static void mmap_begin(void)
{
    u8 page[PAGE];

    file = memfd_create("bench", MFD_CLOEXEC);
    check(file >= 0, "memfd_create");
    for (u32 i = 0; i < FILE_PAGES; i++) {
        for (u32 j = 0; j < PAGE; j++)
            page[j] = (u8)(i + j);
        check(write(file, page, PAGE) == PAGE, "write to a file");
    }
}

static void mmap_end(void)
{
    close(file);
}

/* Maps the file, reads each page, writes a copy of every fourth. */
static u64 run_mmap(void)
{
    u64 sum = 0;

    for (int i = 0; i < MAPPINGS; i++) {
        volatile u8 *at = map(FILE_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE, file);

        for (u32 page = 0; page < FILE_PAGES; page++) {
            sum = mix(sum, at[page * PAGE + page]);
            if (page % 4 == 0)
                at[page * PAGE] = 1;
        }
        munmap((void *)at, (size_t)FILE_PAGES * PAGE);
    }
    return sum;
}

static volatile sig_atomic_t caught;

static void catch (int number)
{
    caught += number == SIGUSR1;
}

static void signal_begin(void)
{
    struct sigaction action = {.sa_handler = catch};

    check(!sigaction(SIGUSR1, &action, NULL), "sigaction");
}

static void signal_end(void)
{
    signal(SIGUSR1, SIG_DFL);
}

static u64 run_signal(void)
{
    pid_t self = getpid();

    caught = 0;
    for (int i = 0; i < SIGNALS; i++)
        kill(self, SIGUSR1);
    return (u64)caught;
}

const struct benchmark system_benchmarks[] = {
    {"getppid", run_getppid, CALLS},
    {"clock_gettime", run_clock_gettime, CALLS},
    {"pipe", run_pipe, TRIPS, pipe_begin, ring_end},
    {"switch-8", run_switch, ROUNDS *RING, switch_begin, ring_end},
    {"fork", run_fork, FORKS},
    {"exec", run_exec, SPAWNS},
    {"page-fault", run_faults, FAULTS},
    {"mprotect", run_mprotect, PROTECTIONS, mprotect_begin, mprotect_end},
    {"mmap-file", run_mmap, MAPPINGS *FILE_PAGES, mmap_begin, mmap_end},
    {"signal", run_signal, SIGNALS, signal_begin, signal_end},
    {NULL},
};
