/*
 * The host's processors: which of them threads run on.
 */
#ifndef DOPPEL_HOST_PROCESSORS_H
#define DOPPEL_HOST_PROCESSORS_H

#include "host/error.h"

#include <pthread.h>

#define PROCESSOR_LIST_MAX 256
#define PROCESSOR_NUMBER_MAX 1023

/* Numbers of the host's processors, as its kernel counts them; none: wherever the kernel likes. */
struct processor_list {
    unsigned count;
    u16 number[PROCESSOR_LIST_MAX];
};

/* How many processors threads that are pinned to `list` can run on at once; with none in it, this process's. */
unsigned processors_usable(const struct processor_list *list);

/* The n-th thread has the n-th of the list to itself, as far as the list goes, then from its beginning. 0, or -EINVAL with err
 * set (a user's error) where there is no such processor for this process. */
int processors_pin(pthread_t thread, const struct processor_list *list, unsigned n,
                   struct error *err);

#endif
