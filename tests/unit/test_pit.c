/* The 8254: rates without drift, the gate of channel 2. */
#include "device/pit.h"
#include "legacy_rig.h"

static struct device *create(struct rig *r)
{
    const struct pit_config config = {.irq = rig_line(r, 0)};

    return pit_device(pit_create(&r->env, &config, &r->err));
}

static void state_moves(void **state)
{
    static const u16 ports[] = {0x40, 0x41, 0x42, 0x43, 0x43, 0x61};

    assert_state_moves(create, ports, ARRAY_SIZE(ports));
}

static void mode_2_keeps_its_rate(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0x34);
    out(r, 0x40, 11932 & 0xff);
    out(r, 0x40, 11932 >> 8);
    unsigned before = r->edges[0];
    rig_advance(r->env.clock, 10 * NS_PER_SEC);
    assert_in_range(r->edges[0] - before, 999, 1000);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void channel_2_counts_while_its_gate_is_up(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x61, 1);
    out(r, 0x43, 0xb0);
    out(r, 0x42, 0xa9);
    out(r, 0x42, 0x04); /* 1193: a millisecond */
    rig_advance(r->env.clock, 500000);
    assert_int_equal(in(r, 0x61) & 0x20, 0);
    out(r, 0x61, 0);
    rig_advance(r->env.clock, 5000000);
    assert_int_equal(in(r, 0x61) & 0x20, 0);
    out(r, 0x61, 1);
    rig_advance(r->env.clock, 510000);
    assert_int_equal(in(r, 0x61) & 0x20, 0x20);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(mode_2_keeps_its_rate),
        cmocka_unit_test(channel_2_counts_while_its_gate_is_up),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
