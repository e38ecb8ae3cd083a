/*
 * Runs one kind of work and prints its result and how long it took:
 *
 *     parallel NAME WORKERS UNITS
 *     result NAME NANOSECONDS RESULT
 */
#include "parallel.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

void die(const char *what)
{
    fprintf(stderr, "parallel: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    _exit(1);
}

u64 now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

int main(int argc, char **argv)
{
    const struct work *work = works;
    unsigned long workers;
    u64 begin, result;

    if (argc == 2 && !strcmp(argv[1], "--exit")) /* what `exec` executes */
        return 0;
    if (argc != 4) {
        fputs("usage: parallel NAME WORKERS UNITS\n", stderr);
        return 2;
    }
    while (work->name && strcmp(work->name, argv[1]))
        work++;
    workers = strtoul(argv[2], NULL, 10);
    if (!work->name || workers < 1 || workers > WORKERS_MAX) {
        fputs("parallel: no such work, or more or less than 1 to 256 workers\n", stderr);
        return 2;
    }
    begin = now();
    result = work->run((unsigned)workers, (u32)strtoul(argv[3], NULL, 10));
    printf("result %s %llu %llu\n", work->name, (unsigned long long)(now() - begin),
           (unsigned long long)result);
    return 0;
}
