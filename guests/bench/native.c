/*
 * The kernels as a Linux program: what the processor itself takes for them. Lines as in guest.c,
 * but with nanoseconds behind the checksum: some kernels last a millisecond here, and a reader on a
 * busy machine is later than that. The argument says which clock: wall or cpu.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "kernels.h"

static u64 now(clockid_t clock)
{
    struct timespec t;

    clock_gettime(clock, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

int main(int argc, char **argv)
{
    clockid_t clock = CLOCK_MONOTONIC;

    if (argc > 1 && !strcmp(argv[1], "cpu"))
        clock = CLOCK_PROCESS_CPUTIME_ID;
    kernels_prepare();
    for (const struct kernel *k = kernels; k < kernels + kernel_count; k++) {
        u64 begin = now(clock), sum = k->run(k->n), end = now(clock);

        printf("end %s %#llx %llu\n", k->name, sum, end - begin);
    }
    printf("done\n");
    return 0;
}
