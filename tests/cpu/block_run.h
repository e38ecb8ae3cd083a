/* The oracle test: running random blocks on both sides, and shrinking those that differ. */
#ifndef DOPPEL_TESTS_CPU_BLOCK_RUN_H
#define DOPPEL_TESTS_CPU_BLOCK_RUN_H

#include "case.h"
#include "generate.h"

struct block_options {
    const char *native, *engine;
    struct host host;
    u64 seed, first, count;
    unsigned mode;   /* 64 or 32 */
    unsigned rounds; /* how often doppel runs a block from each of its states */
    unsigned max_errors;
    unsigned ncpus; /* as guest_create's */
    bool kicks; /* as guest_start_kicks does; what comes of them is another time something else */
    bool coverage, verbose;
};

/* Blocks first to first + count - 1; prints a line at the end. Returns how many differ. */
unsigned run_blocks(const struct block_options *o);

#endif
