/* The keyboard controller: probing, scan codes, reset, A20. */
#include "device/i8042.h"
#include "legacy_rig.h"

static struct a20_gate gate;

static struct device *create(struct rig *r)
{
    a20_gate_init(&gate, NULL, NULL);
    const struct i8042_config config = {.keyboard_irq = rig_line(r, 1),
                                        .mouse_irq = rig_line(r, 12),
                                        .a20 = &gate,
                                        .power = rig_power(r)};

    return i8042_device(i8042_create(&r->env, &config, &r->err));
}

static void state_moves(void **state)
{
    static const u16 ports[] = {0x60, 0x64, 0x60};

    assert_state_moves(create, ports, ARRAY_SIZE(ports));
}

static void keys_arrive_translated(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_true(r->levels[1]);
    assert_int_equal(in(r, 0x60), 0x1e);
    i8042_key((struct i8042 *)dev, 0x1c, false);
    assert_int_equal(in(r, 0x60), 0x9e);
    assert_false(r->levels[1]);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void probing_finds_both_devices(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x64, 0xaa);
    assert_int_equal(in(r, 0x60), 0x55);
    out(r, 0x60, 0xff);
    assert_int_equal(in(r, 0x60), 0xfa);
    assert_int_equal(in(r, 0x60), 0xaa);
    out(r, 0x64, 0xd4);
    out(r, 0x60, 0xff);
    assert_int_equal(in(r, 0x64) & 0x21, 0x21);
    assert_int_equal(in(r, 0x60), 0xfa);
    assert_int_equal(in(r, 0x60), 0xaa);
    assert_int_equal(in(r, 0x60), 0x00);
    assert_int_equal(in(r, 0x64) & 0x21, 0);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void reset_and_a20_go_out(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_true(a20_gate_enabled(&gate));
    out(r, 0x64, 0xdd);
    assert_false(a20_gate_enabled(&gate));
    out(r, 0x64, 0xfe);
    assert_int_equal(r->power_requests, 1);
    assert_int_equal(r->power, POWER_RESET);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(keys_arrive_translated),
        cmocka_unit_test(probing_finds_both_devices),
        cmocka_unit_test(reset_and_a20_go_out),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
