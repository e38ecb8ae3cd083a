/*
 * Runs the benchmarks and prints "begin", a line for each as it is done, and at last how long the
 * whole took:
 *
 *     result NAME CLASS NANOSECONDS CHECKSUM
 *     done NANOSECONDS
 *
 * A result's nanoseconds are those of one unit or operation. Whoever reads the lines can compare
 * the time from "begin" to "done" with a clock of its own, since that of a guest may be wrong.
 *
 *     bench [--seconds S] [--least] [--list] [NAME|CLASS...]
 *
 * A benchmark runs for about S seconds (0.3) in SLICES parts, of which the median counts, or with
 * --least the shortest, after a while for finding out how often that is. With S = 0 it runs once.
 */
#define _GNU_SOURCE
#include "bench.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SLICES 9
#define CORNERS "corners" /* run only where nothing is measured */

static const struct {
    const char *name;
    const struct benchmark *list;
} classes[] = {
    {"compute", compute_benchmarks}, {"fp", float_benchmarks},      {"system", system_benchmarks},
    {CORNERS, corner_benchmarks},    {CORNERS, sharing_benchmarks},
};

void die(const char *what)
{
    fflush(stdout);
    fprintf(stderr, "bench: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    _exit(1);
}

static u64 now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (u64)t.tv_sec * 1000000000 + (u64)t.tv_nsec;
}

/* Nanoseconds of `count` runs, all with the same checksum. */
static u64 time_runs(const struct benchmark *b, u64 count, u64 checksum)
{
    u64 begin = now();

    while (count--) {
        if (b->run() != checksum) {
            errno = 0;
            die("a checksum changed");
        }
    }
    return now() - begin;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* Nanoseconds of a run: the median of some slices, or the least. */
static double measure(const struct benchmark *b, u64 checksum, double nanoseconds, int least)
{
    double slices[SLICES], slice = nanoseconds / SLICES;
    u64 count = 1, took;

    for (;;) {
        took = time_runs(b, count, checksum);
        if ((double)took >= slice)
            break;
        /* Long enough to say how long a slice will be. */
        if ((double)took >= slice / 2) {
            count = (u64)((double)count * slice / (double)took) + 1;
            break;
        }
        count *= 2;
    }
    for (int i = 0; i < SLICES; i++)
        slices[i] = (double)time_runs(b, count, checksum) / (double)count;
    qsort(slices, SLICES, sizeof(slices[0]), compare_doubles);
    return slices[least ? 0 : SLICES / 2];
}

/* Binds this process, and its children, to the processor that it is on, or to all again. */
static void pin(int one)
{
    static cpu_set_t all;
    cpu_set_t set;
    int cpu = sched_getcpu();

    if (!CPU_COUNT(&all))
        sched_getaffinity(0, sizeof(all), &all);
    set = all;
    if (one && cpu >= 0) {
        CPU_ZERO(&set);
        CPU_SET((unsigned)cpu, &set);
    }
    sched_setaffinity(0, sizeof(set), &set);
}

static void run(const struct benchmark *b, const char *class, double seconds, int least)
{
    unsigned operations = b->operations ? b->operations : 1;
    double nanoseconds;
    u64 begin, checksum;

    if (b->possible && !b->possible())
        return;
    pin(!strcmp(class, "system"));
    if (b->begin)
        b->begin();
    /* What the first run costs more (page faults, a translator's work) isn't measured. */
    begin = now();
    checksum = b->run();
    nanoseconds = (double)(now() - begin);
    if (seconds > 0)
        nanoseconds = measure(b, checksum, seconds * 1e9, least);
    if (b->end)
        b->end();
    printf("result %s %s %.2f %016llx\n", b->name, class, nanoseconds / operations,
           (unsigned long long)checksum);
    fflush(stdout);
}

static int wanted(char **names, const char *name, const char *class)
{
    if (!*names)
        return 1;
    for (; *names; names++) {
        if (!strcmp(*names, name) || !strcmp(*names, class))
            return 1;
    }
    return 0;
}

/* Whether a benchmark or class has this name. */
static int known(const char *name)
{
    char *names[] = {(char *)name, NULL};

    for (size_t c = 0; c < ARRAY_SIZE(classes); c++) {
        for (const struct benchmark *b = classes[c].list; b->name; b++) {
            if (wanted(names, b->name, classes[c].name))
                return 1;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    double seconds = 0.3;
    u64 begin;
    int list = 0, least = 0, at = 1;

    for (; at < argc && argv[at][0] == '-'; at++) {
        if (!strcmp(argv[at], "--exit")) {
            _exit(7); /* what system.c's exec runs */
        } else if (!strcmp(argv[at], "--list")) {
            list = 1;
        } else if (!strcmp(argv[at], "--least")) {
            least = 1;
        } else if (!strcmp(argv[at], "--seconds") && at + 1 < argc) {
            seconds = strtod(argv[++at], NULL);
        } else {
            fputs("usage: bench [--seconds S] [--least] [--list] [NAME|CLASS...]\n", stderr);
            return 2;
        }
    }
    for (int i = at; i < argc; i++) {
        if (!known(argv[i])) {
            fprintf(stderr, "bench: no benchmark or class is called '%s'\n", argv[i]);
            return 2;
        }
    }
    if (!list) {
        puts("begin");
        fflush(stdout);
    }
    begin = now();
    for (size_t c = 0; c < ARRAY_SIZE(classes); c++) {
        for (const struct benchmark *b = classes[c].list; b->name; b++) {
            if (!wanted(argv + at, b->name, classes[c].name) ||
                (seconds > 0 && !strcmp(classes[c].name, CORNERS)))
                continue;
            if (list)
                printf("%s %s\n", b->name, classes[c].name);
            else
                run(b, classes[c].name, seconds, least);
        }
    }
    if (!list)
        printf("done %llu\n", (unsigned long long)(now() - begin));
    return 0;
}
