/* For the tests of the devices behind ports: byte accesses, random traffic, a move of the state. */
#ifndef DOPPEL_TESTS_LEGACY_RIG_H
#define DOPPEL_TESTS_LEGACY_RIG_H

#include "device_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static inline u8 in(struct rig *r, u16 port)
{
    return (u8)io_bus_read(r->env.ports, port, 1);
}

static inline void out(struct rig *r, u16 port, u8 value)
{
    io_bus_write(r->env.ports, port, value, 1);
}

/*
 * Random accesses to the ports while time passes; every so often the state moves to a fresh device,
 * made by `create` in a machine of its own, and must be the same there.
 */
static inline void assert_state_moves(struct device *(*create)(struct rig *), const u16 *ports,
                                      size_t nports)
{
    u64 seed = 1;

    for (unsigned round = 0; round < 50; round++) {
        struct rig *r = rig_create(), *s = rig_create();
        struct device *from = create(r);
        char where[128];

        for (unsigned i = 0; i < 300; i++) {
            u64 x = rig_random(&seed);
            u16 port = ports[x % nports];

            if (x & BIT(20))
                in(r, port);
            else
                out(r, port, (u8)(x >> 32));
            if ((x >> 40 & 7) == 0)
                rig_advance_bounded(r->env.clock, x >> 44, 100);
        }
        vm_clock_set(s->env.clock, vm_clock_now(r->env.clock));
        struct device *to = create(s);
        const char *wrong = rig_round_trip(s, from, to, where, sizeof(where));
        if (wrong)
            fail_msg("%s", wrong);
        from->ops->destroy(from);
        to->ops->destroy(to);
        rig_destroy(r);
        rig_destroy(s);
    }
}

#endif
