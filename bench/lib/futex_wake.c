/*
 * What waking a thread costs on this host: cycles of the TSC from before FUTEX_WAKE to the sleeper's first
 * instruction, the least of WAKES. For comparison with an IPI that wakes a vCPU.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#define WAKES 1000
#define ASLEEP_US 500 /* after which the thread sleeps for sure, and its processor too */

static _Atomic unsigned turn;
static _Atomic unsigned long long woken;

static void *sleep_and_tell(void *unused)
{
    for (unsigned n = 0; n < WAKES; n++) {
        while (atomic_load(&turn) == n)
            syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, n, NULL, NULL, 0);
        atomic_store(&woken, __rdtsc());
    }
    return unused;
}

int main(void)
{
    unsigned long long best = ~0ull, begin, took;
    pthread_t sleeper;

    if (pthread_create(&sleeper, NULL, sleep_and_tell, NULL))
        return 1;
    for (unsigned n = 0; n < WAKES; n++) {
        usleep(ASLEEP_US);
        atomic_store(&woken, 0);
        begin = __rdtsc();
        atomic_store(&turn, n + 1);
        syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
        while (!atomic_load(&woken))
            ;
        took = atomic_load(&woken) - begin;
        best = took < best ? took : best;
    }
    printf("%llu\n", best);
    return 0;
}
