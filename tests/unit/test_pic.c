/* The 8259A pair: priorities and their rotation, masks, poll, spurious requests, cascade. */
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

/* Initialised with these ICW4s, and all levels unmasked. */
static struct device *ready_with(struct rig *r, u8 master_icw4, u8 slave_icw4)
{
    const u8 master[] = {0x20, 4, master_icw4}, slave[] = {0x28, 2, slave_icw4};
    struct device *dev = create(r);

    out(r, 0x20, 0x11);
    out(r, 0xa0, 0x11);
    for (unsigned i = 0; i < 3; i++) {
        out(r, 0x21, master[i]);
        out(r, 0xa1, slave[i]);
    }
    return dev;
}

static u8 in_service(struct rig *r, u16 port)
{
    out(r, port, 0x0b);
    u8 isr = in(r, port);
    out(r, port, 0x0a);
    return isr;
}

static void pulse(struct pic *pic, unsigned n)
{
    pic_set_irq(pic, n, true);
    pic_set_irq(pic, n, false);
}

static void requests_are_served_by_priority(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
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
    struct device *dev = ready_with(r, 1, 1);
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
    struct device *dev = ready_with(r, 1, 1);
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

static void a_chip_asks_for_nothing_before_its_initialisation(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    pulse((struct pic *)dev, 1);
    assert_false(r->levels[0]);
    assert_int_equal(pic_ack((struct pic *)dev), -1);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void icw1_forgets_edges_masks_and_rotation(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    pulse(pic, 3);
    out(r, 0x21, 0x55);
    out(r, 0x20, 0xc4);
    out(r, 0x20, 0x11);
    out(r, 0x21, 0x40);
    out(r, 0x21, 4);
    out(r, 0x21, 1);
    assert_int_equal(in(r, 0x21), 0);
    assert_int_equal(in(r, 0x20), 0);
    pulse(pic, 5);
    pulse(pic, 0);
    assert_int_equal(pic_ack(pic), 0x40);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void masked_requests_wait(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    out(r, 0x21, 0x08);
    pulse(pic, 3);
    assert_false(r->levels[0]);
    assert_int_equal(in(r, 0x20), 0x08);
    out(r, 0x21, 0x00);
    assert_int_equal(pic_ack(pic), 0x23);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void rotation_makes_a_level_the_lowest(void **state)
{
    /* Level 3 is served, `command` ends it, then 1 and 5 ask together. */
    static const struct {
        u8 command;
        int first;
    } rows[] = {
        {0x20, 0x21}, /* EOI */
        {0x63, 0x21}, /* specific EOI of 3 */
        {0xa0, 0x25}, /* rotate on EOI: 4 is the highest */
        {0xe3, 0x25}, /* rotate on specific EOI of 3 */
    };

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = ready_with(r, 1, 1);
        struct pic *pic = (struct pic *)dev;

        pulse(pic, 3);
        assert_int_equal(pic_ack(pic), 0x23);
        out(r, 0x20, rows[i].command);
        assert_int_equal(in_service(r, 0x20), 0);
        pulse(pic, 1);
        pulse(pic, 5);
        assert_int_equal(pic_ack(pic), rows[i].first);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void set_priority_names_the_lowest(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    out(r, 0x20, 0xc4);
    pulse(pic, 0);
    pulse(pic, 4);
    pulse(pic, 6);
    assert_int_equal(pic_ack(pic), 0x26);
    out(r, 0x20, 0x20);
    assert_int_equal(pic_ack(pic), 0x20);
    out(r, 0x20, 0x20);
    assert_int_equal(pic_ack(pic), 0x24);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void auto_eoi_leaves_nothing_in_service(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 3, 1);
    struct pic *pic = (struct pic *)dev;

    pulse(pic, 1);
    pulse(pic, 5);
    assert_int_equal(pic_ack(pic), 0x21);
    assert_int_equal(in_service(r, 0x20), 0);
    assert_int_equal(pic_ack(pic), 0x25);
    out(r, 0x20, 0x80); /* from now on it rotates */
    pulse(pic, 3);
    assert_int_equal(pic_ack(pic), 0x23);
    pulse(pic, 1);
    pulse(pic, 4);
    assert_int_equal(pic_ack(pic), 0x24);
    out(r, 0x20, 0x00); /* and from now on not; 4 stays the lowest */
    assert_int_equal(pic_ack(pic), 0x21);
    pulse(pic, 4);
    pulse(pic, 5);
    assert_int_equal(pic_ack(pic), 0x25);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void special_mask_mode_lets_lower_levels_through(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    pulse(pic, 3);
    assert_int_equal(pic_ack(pic), 0x23);
    pulse(pic, 5);
    out(r, 0x21, 0x08);
    assert_false(r->levels[0]);
    out(r, 0x20, 0x68);
    assert_true(r->levels[0]);
    assert_int_equal(pic_ack(pic), 0x25);
    out(r, 0x20, 0x20); /* ends 5: it passes over the masked 3 */
    assert_int_equal(in_service(r, 0x20), 0x08);
    out(r, 0x20, 0x63);
    assert_int_equal(in_service(r, 0x20), 0);
    out(r, 0x20, 0x48);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void special_fully_nested_mode_nests_the_slave(void **state)
{
    for (unsigned nested = 0; nested < 2; nested++) {
        struct rig *r = rig_create();
        struct device *dev = ready_with(r, nested ? 0x11 : 0x01, 1);
        struct pic *pic = (struct pic *)dev;

        pulse(pic, 10);
        assert_int_equal(pic_ack(pic), 0x2a);
        pulse(pic, 12); /* lower than what the slave serves */
        assert_false(r->levels[0]);
        pulse(pic, 8);
        assert_int_equal(r->levels[0], nested);
        if (nested)
            assert_int_equal(pic_ack(pic), 0x28);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void poll_acknowledges_by_a_read(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    pulse(pic, 6);
    out(r, 0x20, 0x0c);
    assert_int_equal(in(r, 0x20), 0x86);
    assert_false(r->levels[0]);
    assert_int_equal(in_service(r, 0x20), 0x40);
    out(r, 0x20, 0x20);
    out(r, 0x20, 0x0c);
    assert_int_equal(in(r, 0x20) & 0x80, 0);
    assert_int_equal(in(r, 0x20), 0); /* one read only: this is the IRR */
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_withdrawn_level_is_spurious(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    out(r, 0x4d1, 0x08);
    pic_set_irq(pic, 11, true);
    assert_true(r->levels[0]);
    pic_set_irq(pic, 11, false);
    assert_false(r->levels[0]);
    assert_int_equal(pic_ack(pic), 0x27);
    assert_int_equal(in_service(r, 0x20), 0);
    assert_int_equal(in_service(r, 0xa0), 0);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_cascaded_request_needs_an_eoi_each(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = ready_with(r, 1, 1);
    struct pic *pic = (struct pic *)dev;

    pulse(pic, 14);
    pulse(pic, 15);
    assert_int_equal(pic_ack(pic), 0x2e);
    assert_int_equal(in_service(r, 0x20), 0x04);
    assert_int_equal(in_service(r, 0xa0), 0x40);
    out(r, 0x20, 0x62);
    assert_false(r->levels[0]); /* the slave still serves 14 */
    out(r, 0xa0, 0x66);
    assert_int_equal(pic_ack(pic), 0x2f);
    pic_set_irq(pic, 2, true); /* nothing is wired there but the slave */
    assert_int_equal(in(r, 0x20), 0);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void single_mode_skips_icw3(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x20, 0x12); /* SNGL, no ICW4 */
    out(r, 0x21, 0x47); /* the low bits of the base are not there */
    out(r, 0x21, 0xfe); /* a mask already */
    assert_int_equal(in(r, 0x21), 0xfe);
    pulse((struct pic *)dev, 0);
    assert_int_equal(pic_ack((struct pic *)dev), 0x40);
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
        cmocka_unit_test(a_chip_asks_for_nothing_before_its_initialisation),
        cmocka_unit_test(icw1_forgets_edges_masks_and_rotation),
        cmocka_unit_test(masked_requests_wait),
        cmocka_unit_test(rotation_makes_a_level_the_lowest),
        cmocka_unit_test(set_priority_names_the_lowest),
        cmocka_unit_test(auto_eoi_leaves_nothing_in_service),
        cmocka_unit_test(special_mask_mode_lets_lower_levels_through),
        cmocka_unit_test(special_fully_nested_mode_nests_the_slave),
        cmocka_unit_test(poll_acknowledges_by_a_read),
        cmocka_unit_test(a_withdrawn_level_is_spurious),
        cmocka_unit_test(a_cascaded_request_needs_an_eoi_each),
        cmocka_unit_test(single_mode_skips_icw3),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
