/* The small ports: A20, reset, POST, debug exit. */
#include "device/sysport.h"
#include "legacy_rig.h"

static struct a20_gate gate;

static struct device *create(struct rig *r)
{
    a20_gate_init(&gate, NULL, NULL);
    const struct sysport_config config = {
        .a20 = &gate, .power = rig_power(r), .debug_exit_port = 0xf4};

    return sysport_device(sysport_create(&r->env, &config, &r->err));
}

static void state_moves(void **state)
{
    static const u16 ports[] = {0x92, 0xcf9, 0x80, 0xed, 0xf4};

    assert_state_moves(create, ports, ARRAY_SIZE(ports));
}

static void each_port_does_its_one_thing(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x92, 2);
    assert_true(a20_gate_enabled(&gate));
    out(r, 0xcf9, 2);
    assert_int_equal(r->power_requests, 0);
    out(r, 0xcf9, 6);
    assert_int_equal(r->power, POWER_RESET);
    io_bus_write(r->env.ports, 0xf4, 0x10, 4);
    assert_int_equal(r->power_requests, 2);
    assert_int_equal(r->power, POWER_DEBUG_EXIT);
    assert_int_equal(r->power_value, 0x21);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(each_port_does_its_one_thing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
