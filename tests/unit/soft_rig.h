/*
 * A vCPU of the software engines that runs nothing: with 1 MiB of memory and a clock, for tests of one part of it.
 */
#ifndef DOPPEL_TESTS_UNIT_SOFT_RIG_H
#define DOPPEL_TESTS_UNIT_SOFT_RIG_H

#include "engine/soft/vcpu.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

static struct event_loop *loop;
static struct guest_memory memory;

/* All else in it is zero. For soft_rig_destroy. */
static inline struct soft_vcpu *soft_rig_create(void)
{
    struct soft_vcpu *v = calloc(1, sizeof(*v));
    struct soft_engine *e = calloc(1, sizeof(*e));
    struct error err;

    assert_non_null(v);
    assert_non_null(e);
    memory = (struct guest_memory){0};
    loop = event_loop_create(&err);
    assert_non_null(loop);
    assert_int_equal(memory_add_slot(&memory, 0, MIB(1), 0, &err), 0);
    e->config.memory = &memory;
    e->config.clock = vm_clock_create(loop, &err);
    v->engine = e;
    return v;
}

static inline void soft_rig_destroy(struct soft_vcpu *v)
{
    vm_clock_destroy(v->engine->config.clock);
    memory_destroy(&memory);
    event_loop_destroy(loop);
    free(v->engine);
    free(v);
}

#endif
