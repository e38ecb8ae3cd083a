/* The 8259A pair: priorities, spurious requests, cascade. */
#include "device/pic.h"
#include "legacy_rig.h"

static struct device *create(struct rig *r)
{
    const struct pic_config config = {.intr = rig_line(r, 0)};

    return pic_device(pic_create(&r->env, &config, &r->err));
}

static void state_moves(void **state)
{
    static const u16 ports[] = {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1};

    assert_state_moves(create, ports, ARRAY_SIZE(ports));
}

static struct device *ready(struct rig *r)
{
    static const u8 master[] = {0x20, 4, 1}, slave[] = {0x28, 2, 1};
    struct device *dev = create(r);

    out(r, 0x20, 0x11);
    out(r, 0xa0, 0x11);
    for (unsigned i = 0; i < 3; i++) {
        out(r, 0x21, master[i]);
        out(r, 0xa1, slave[i]);
    }
    return dev;
}

static void requests_are_served_by_priority(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready(r);
    struct pic *pic = (struct pic *)dev;

    pic_set_irq(pic, 4, true);
    pic_set_irq(pic, 8, true);
    assert_true(r->levels[0]);
    assert_int_equal(pic_ack(pic), 0x28);
    assert_false(r->levels[0]);
    out(r, 0xa0, 0x20);
    out(r, 0x20, 0x20);
    assert_int_equal(pic_ack(pic), 0x24);
    pic_set_irq(pic, 1, true);
    assert_int_equal(pic_ack(pic), 0x21);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_lost_request_is_spurious(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready(r);
    struct pic *pic = (struct pic *)dev;

    pic_set_irq(pic, 3, true);
    out(r, 0x21, 0xff);
    assert_int_equal(pic_ack(pic), 0x27);
    out(r, 0x20, 0x0b);
    assert_int_equal(in(r, 0x20), 0);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_level_stays_requested(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready(r);
    struct pic *pic = (struct pic *)dev;

    out(r, 0x4d1, 0xff);
    assert_int_equal(in(r, 0x4d1), 0xde);
    pic_set_irq(pic, 11, true);
    assert_int_equal(pic_ack(pic), 0x2b);
    out(r, 0xa0, 0x20);
    out(r, 0x20, 0x20);
    assert_true(r->levels[0]);
    pic_set_irq(pic, 11, false);
    assert_false(r->levels[0]);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(requests_are_served_by_priority),
        cmocka_unit_test(a_lost_request_is_spurious),
        cmocka_unit_test(a_level_stays_requested),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
