#define _GNU_SOURCE /* CPU_SET and its like */
#include "host/processors.h"

#include <errno.h>
#include <sched.h>

unsigned processors_usable(const struct processor_list *list)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    if (!list->count && sched_getaffinity(0, sizeof(set), &set) != 0)
        return 1;
    for (unsigned n = 0; n < list->count; n++)
        CPU_SET(list->number[n], &set);
    return (unsigned)CPU_COUNT(&set);
}

int processors_pin(pthread_t thread, const struct processor_list *list, unsigned n,
                   struct error *err)
{
    unsigned number;
    cpu_set_t set;

    if (!list->count)
        return 0;
    number = list->number[n % list->count];
    CPU_ZERO(&set);
    CPU_SET(number, &set);
    if (pthread_setaffinity_np(thread, sizeof(set), &set) == 0)
        return 0;
    return error_input(err, "--pin: this process has no processor %u (see taskset -p $$)", number);
}
