/* The MC146818: the calendar, setting it, the interrupts. */
#include "device/rtc.h"
#include "legacy_rig.h"

static struct device *create(struct rig *r)
{
    const struct rtc_config config = {.irq = rig_line(r, 8)};

    return rtc_device(rtc_create(&r->env, &config, &r->err));
}

static void state_moves(void **state)
{
    static const u16 ports[] = {0x70, 0x71, 0x70, 0x71, 0x72, 0x73};

    assert_state_moves(create, ports, ARRAY_SIZE(ports));
}

static u8 get(struct rig *r, u8 index)
{
    out(r, 0x70, index);
    return in(r, 0x71);
}

static void set(struct rig *r, u8 index, u8 value)
{
    out(r, 0x70, index);
    out(r, 0x71, value);
}

static void a_leap_day_follows_february_28(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    static const u8 time[][2] = {{0, 0x58}, {2, 0x59}, {4, 0x23},   {7, 0x28},
                                 {8, 0x02}, {9, 0x24}, {0x32, 0x20}};

    set(r, 11, 0x82);
    for (unsigned i = 0; i < ARRAY_SIZE(time); i++)
        set(r, time[i][0], time[i][1]);
    set(r, 11, 0x02);
    rig_advance(r->env.clock, 2 * NS_PER_SEC);
    assert_int_equal(get(r, 0), 0);
    assert_int_equal(get(r, 4), 0);
    assert_int_equal(get(r, 7), 0x29);
    assert_int_equal(get(r, 6), 5); /* a Thursday */
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void the_periodic_interrupt_waits_for_register_c(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    unsigned count = 0;

    set(r, 11, 0x42);
    rig_advance(r->env.clock, NS_PER_SEC);
    assert_int_equal(r->edges[8], 1);
    get(r, 12);
    for (unsigned i = 0; i < 20000; i++) {
        rig_advance(r->env.clock, 50000);
        if (r->levels[8])
            count += get(r, 12) >> 7;
    }
    assert_in_range(count, 1023, 1025);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(a_leap_day_follows_february_28),
        cmocka_unit_test(the_periodic_interrupt_waits_for_register_c),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
