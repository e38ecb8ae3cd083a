/* The 16550A: no character is lost, interrupts come in the order of the data sheet. */
#include "device/serial.h"
#include "legacy_rig.h"

static u8 sent[64];
static size_t nsent, room = 1000;

static size_t put(void *opaque, const u8 *buf, size_t len)
{
    size_t n = MIN(len, room);

    for (size_t i = 0; i < n; i++)
        sent[nsent++ % sizeof(sent)] = buf[i];
    room = MIN(room - n + 1000 * (room > 500), 1000);
    return n;
}

static struct device *create(struct rig *r)
{
    const struct serial_config config = {
        .base = 0x3f8, .irq = rig_line(r, 4), .ops = {put, NULL, r}};

    return serial_device(serial_create(&r->env, &config, &r->err));
}

static void state_moves(void **state)
{
    static const u16 ports[] = {0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff};

    assert_state_moves(create, ports, ARRAY_SIZE(ports));
}

static void a_full_stream_keeps_thre_clear(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    nsent = 0;
    room = 0;
    out(r, 0x3f8, 'a');
    assert_int_equal(in(r, 0x3fd), 0);
    room = 1000;
    serial_writable((struct serial *)dev);
    assert_int_equal(in(r, 0x3fd), 0x60);
    assert_int_equal(nsent, 1);
    assert_int_equal(sent[0], 'a');
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void input_waits_until_the_guest_listens(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    struct serial *s = (struct serial *)dev;

    assert_int_equal(serial_can_receive(s), 0);
    out(r, 0x3fa, 0x81);
    out(r, 0x3fc, 0x0b);
    assert_int_equal(serial_can_receive(s), 16);
    out(r, 0x3f9, 0x01);
    assert_int_equal(serial_receive(s, (const u8 *)"0123456789abcdefg", 17), 16);
    assert_true(r->levels[4]);
    assert_int_equal(in(r, 0x3fa), 0xc4);
    for (unsigned i = 0; i < 16; i++)
        assert_int_equal(in(r, 0x3f8), "0123456789abcdef"[i]);
    assert_false(r->levels[4]);
    serial_receive(s, (const u8 *)"x", 1);
    assert_int_equal(in(r, 0x3fa), 0xc1);
    rig_advance(r->env.clock, 20000000);
    assert_int_equal(in(r, 0x3fa), 0xcc);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void loopback_shows_the_modem_lines(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x3fc, 0x1a);
    assert_int_equal(in(r, 0x3fe) & 0xf0, 0x90);
    out(r, 0x3fb, 0x03);
    out(r, 0x3f8, 0x5a);
    assert_int_equal(in(r, 0x3fd) & 1, 1);
    assert_int_equal(in(r, 0x3f8), 0x5a);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(a_full_stream_keeps_thre_clear),
        cmocka_unit_test(input_waits_until_the_guest_listens),
        cmocka_unit_test(loopback_shows_the_modem_lines),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
