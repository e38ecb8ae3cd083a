/*
 * Work for several processors of a guest running Linux, by threads and processes, each kind with a result that
 * doesn't depend on how many do it or in which order.
 */
#ifndef PARALLEL_H
#define PARALLEL_H

#include <stdint.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

struct work {
    const char *name;
    /* Does `units` of it by `workers` threads or processes; returns its result. */
    u64 (*run)(unsigned workers, u32 units);
};

/* Ends with an entry without a name. */
extern const struct work works[];

#define WORKERS_MAX 256

/* Tells on stderr what went wrong, with errno's text where it is set, and ends the program. */
void die(const char *what) __attribute__((noreturn));

/* CLOCK_MONOTONIC in ns. */
u64 now(void);

#endif
