/*
 * The 16550A: no character is lost, interrupts come in the order of the data sheet, loopback, modem
 * lines, errors.
 */
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

static struct serial *listening(struct rig *r, u8 fcr, u8 ier)
{
    struct device *dev = create(r);

    out(r, 0x3fb, 0x03);
    out(r, 0x3fa, fcr);
    out(r, 0x3fc, 0x0b);
    out(r, 0x3f9, ier);
    return (struct serial *)dev;
}

static void finish(struct rig *r, struct serial *s)
{
    struct device *dev = serial_device(s);

    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void trigger_levels_say_when_to_interrupt(void **state)
{
    static const struct {
        u8 fcr;
        unsigned level;
    } rows[] = {{0x00, 1}, {0x01, 1}, {0x41, 4}, {0x81, 8}, {0xc1, 14}};

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct serial *s = listening(r, rows[i].fcr, 0x01);

        for (unsigned n = 1; n < rows[i].level; n++) {
            assert_int_equal(serial_receive(s, (const u8 *)"x", 1), 1);
            assert_false(r->levels[4]);
        }
        assert_int_equal(serial_receive(s, (const u8 *)"x", 1), 1);
        assert_true(r->levels[4]);
        assert_int_equal(in(r, 0x3fa) & 0x0f, 0x04);
        in(r, 0x3f8);
        assert_false(r->levels[4]);
        finish(r, s);
    }
}

static void the_timeout_is_four_characters_after_the_last(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0xc1, 0x01);

    /* 9600 baud, 8N1: 4.17 ms. */
    serial_receive(s, (const u8 *)"x", 1);
    rig_advance(r->env.clock, 4000000);
    serial_receive(s, (const u8 *)"y", 1);
    rig_advance(r->env.clock, 4000000);
    assert_false(r->levels[4]);
    rig_advance(r->env.clock, 300000);
    assert_true(r->levels[4]);
    assert_int_equal(in(r, 0x3fa), 0xcc);
    assert_int_equal(in(r, 0x3f8), 'x'); /* a read ends it, and starts it anew */
    assert_false(r->levels[4]);
    rig_advance(r->env.clock, 4300000);
    assert_true(r->levels[4]);
    assert_int_equal(in(r, 0x3f8), 'y');
    rig_advance(r->env.clock, NS_PER_SEC);
    assert_false(r->levels[4]);
    finish(r, s);
}

static void loopback_wires_the_modem_lines(void **state)
{
    /* MCR's outputs, and the inputs that they are in loopback. */
    static const u8 rows[][2] = {{0x01, 0x20}, {0x02, 0x10}, {0x04, 0x40},
                                 {0x08, 0x80}, {0x0f, 0xf0}, {0x00, 0x00}};
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x00);

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        out(r, 0x3fc, 0x10 | rows[i][0]);
        assert_int_equal(in(r, 0x3fe) & 0xf0, rows[i][1]);
    }
    out(r, 0x3fc, 0x0b);
    assert_int_equal(in(r, 0x3fe) & 0xf0, 0xb0); /* the peer again */
    finish(r, s);
}

static void modem_deltas_show_changes_until_they_are_read(void **state)
{
    /* MCR before and after, in loopback, and the deltas: DCTS 1, DDSR 2, TERI 4, DDCD 8. */
    static const u8 rows[][3] = {
        {0x10, 0x12, 0x01}, {0x12, 0x10, 0x01}, {0x10, 0x11, 0x02}, {0x10, 0x18, 0x08},
        {0x10, 0x14, 0x00}, {0x14, 0x10, 0x04}, {0x10, 0x10, 0x00}, {0x1f, 0x10, 0x0f},
    };
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x08);

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        out(r, 0x3fc, rows[i][0]);
        in(r, 0x3fe);
        out(r, 0x3fc, rows[i][1]);
        assert_int_equal(in(r, 0x3fa) & 0x0f, rows[i][2] ? 0x00 : 0x01);
        assert_int_equal(in(r, 0x3fe) & 0x0f, rows[i][2]);
        assert_int_equal(in(r, 0x3fe) & 0x0f, 0);
        assert_int_equal(in(r, 0x3fa) & 0x0f, 0x01);
    }
    finish(r, s);
}

static void loopback_keeps_characters_from_the_stream(void **state)
{
    static const struct {
        u8 lcr, sent, received;
    } rows[] = {{0x00, 0xff, 0x1f}, {0x01, 0xff, 0x3f}, {0x02, 0xff, 0x7f}, {0x03, 0xff, 0xff}};
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x00);

    nsent = 0;
    room = 1000;
    out(r, 0x3fc, 0x1b);
    assert_int_equal(serial_can_receive(s), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        out(r, 0x3fb, rows[i].lcr);
        out(r, 0x3f8, rows[i].sent);
        assert_int_equal(in(r, 0x3f8), rows[i].received);
    }
    assert_int_equal(nsent, 0);
    finish(r, s);
}

static void input_stays_outside_when_the_guest_turns_away(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x01);

    assert_int_equal(serial_can_receive(s), 16);
    out(r, 0x3fa, 0x00);
    assert_int_equal(serial_receive(s, (const u8 *)"ab", 2), 1);
    out(r, 0x3fa, 0x01);
    assert_int_equal(serial_can_receive(s), 16);
    out(r, 0x3fc, 0x1b);
    assert_int_equal(serial_receive(s, (const u8 *)"ab", 2), 0);
    finish(r, s);
}

static void an_overrun_loses_by_the_mode(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x04);

    out(r, 0x3fc, 0x1b);
    for (unsigned i = 0; i < 17; i++)
        out(r, 0x3f8, (u8)('a' + i));
    assert_int_equal(in(r, 0x3fa), 0xc6);
    assert_int_equal(in(r, 0x3fd) & 0x03, 0x03);
    assert_int_equal(in(r, 0x3fd) & 0x02, 0); /* the read cleared it */
    assert_int_equal(in(r, 0x3fa), 0xc1);
    for (unsigned i = 0; i < 16; i++)
        assert_int_equal(in(r, 0x3f8), 'a' + i);
    assert_int_equal(in(r, 0x3fd) & 0x01, 0);
    out(r, 0x3fa, 0x00);
    out(r, 0x3f8, 'x');
    out(r, 0x3f8, 'y');
    assert_int_equal(in(r, 0x3fd) & 0x03, 0x03);
    assert_int_equal(in(r, 0x3f8), 'y'); /* without FIFOs the older one goes */
    finish(r, s);
}

static void a_break_is_a_zero_with_its_flags(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x05);

    serial_receive(s, (const u8 *)"x", 1);
    serial_receive_break(s);
    assert_int_equal(in(r, 0x3fd), 0xe1); /* an error waits in the FIFO, behind the x */
    assert_int_equal(in(r, 0x3f8), 'x');
    assert_int_equal(in(r, 0x3fa), 0xc6);
    assert_int_equal(in(r, 0x3fd), 0xf9);
    assert_int_equal(in(r, 0x3fd), 0x61);
    assert_int_equal(in(r, 0x3f8), 0);
    assert_int_equal(in(r, 0x3fd), 0x60);
    finish(r, s);
}

static void iir_answers_by_priority(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x0f);

    out(r, 0x3fc, 0x18); /* CTS, DSR went: modem status */
    out(r, 0x3fc, 0x0b);
    serial_receive_break(s);
    assert_int_equal(in(r, 0x3fa), 0xc6);
    in(r, 0x3fd);
    assert_int_equal(in(r, 0x3fa), 0xc4);
    in(r, 0x3f8);
    assert_int_equal(in(r, 0x3fa), 0xc2);
    assert_int_equal(in(r, 0x3fa), 0xc0); /* the read cleared THRE, nothing but it */
    in(r, 0x3fe);
    assert_int_equal(in(r, 0x3fa), 0xc1);
    assert_false(r->levels[4]);
    finish(r, s);
}

static void thre_interrupts_when_enabled_and_after_each_character(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x00, 0x02);

    room = 1000;
    assert_true(r->levels[4]);
    assert_int_equal(in(r, 0x3fa), 0x02);
    assert_false(r->levels[4]);
    unsigned before = r->edges[4];
    out(r, 0x3f8, 'a');
    out(r, 0x3f8, 'b');
    assert_int_equal(r->edges[4] - before, 2);
    out(r, 0x3f9, 0x00);
    assert_false(r->levels[4]);
    out(r, 0x3f9, 0x02);
    assert_true(r->levels[4]);
    finish(r, s);
}

static void out2_gates_the_interrupt(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x02);

    assert_true(r->levels[4]);
    out(r, 0x3fc, 0x03);
    assert_false(r->levels[4]);
    out(r, 0x3fc, 0x0b);
    assert_true(r->levels[4]);
    finish(r, s);
}

static void dlab_uncovers_the_divisor(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x05);

    out(r, 0x3fb, 0x83);
    out(r, 0x3f8, 0x34);
    out(r, 0x3f9, 0x12);
    assert_int_equal(in(r, 0x3f8), 0x34);
    assert_int_equal(in(r, 0x3f9), 0x12);
    out(r, 0x3fb, 0x03);
    assert_int_equal(in(r, 0x3f9), 0x05);
    out(r, 0x3ff, 0xa5);
    assert_int_equal(in(r, 0x3ff), 0xa5);
    out(r, 0x3f9, 0xff);
    assert_int_equal(in(r, 0x3f9), 0x0f);
    out(r, 0x3fc, 0xff);
    assert_int_equal(in(r, 0x3fc), 0x1f);
    finish(r, s);
}

static void fifo_resets_clear_what_they_name(void **state)
{
    struct rig *r = rig_create();
    struct serial *s = listening(r, 0x01, 0x01);

    nsent = 0;
    room = 0;
    out(r, 0x3f8, 'a');
    serial_receive(s, (const u8 *)"x", 1);
    out(r, 0x3fa, 0x03);
    assert_int_equal(in(r, 0x3fd), 0); /* the receiver's only */
    serial_receive(s, (const u8 *)"y", 1);
    out(r, 0x3fa, 0x05);
    assert_int_equal(in(r, 0x3fd), 0x61);
    out(r, 0x3fa, 0x00); /* FIFOs off: both */
    assert_int_equal(in(r, 0x3fd), 0x60);
    assert_false(r->levels[4]);
    assert_int_equal(in(r, 0x3fa), 0x01);
    room = 1000;
    finish(r, s);
}

static void polling_lsr_shows_that_the_guest_listens(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    struct serial *s = (struct serial *)dev;

    assert_int_equal(serial_can_receive(s), 0);
    for (unsigned i = 0; i < 64; i++)
        in(r, 0x3fd);
    assert_int_equal(serial_can_receive(s), 1);
    out(r, 0x3f8, 'x');
    assert_int_equal(serial_can_receive(s), 0);
    finish(r, s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(a_full_stream_keeps_thre_clear),
        cmocka_unit_test(input_waits_until_the_guest_listens),
        cmocka_unit_test(loopback_shows_the_modem_lines),
        cmocka_unit_test(trigger_levels_say_when_to_interrupt),
        cmocka_unit_test(the_timeout_is_four_characters_after_the_last),
        cmocka_unit_test(loopback_wires_the_modem_lines),
        cmocka_unit_test(modem_deltas_show_changes_until_they_are_read),
        cmocka_unit_test(loopback_keeps_characters_from_the_stream),
        cmocka_unit_test(input_stays_outside_when_the_guest_turns_away),
        cmocka_unit_test(an_overrun_loses_by_the_mode),
        cmocka_unit_test(a_break_is_a_zero_with_its_flags),
        cmocka_unit_test(iir_answers_by_priority),
        cmocka_unit_test(thre_interrupts_when_enabled_and_after_each_character),
        cmocka_unit_test(out2_gates_the_interrupt),
        cmocka_unit_test(dlab_uncovers_the_divisor),
        cmocka_unit_test(fifo_resets_clear_what_they_name),
        cmocka_unit_test(polling_lsr_shows_that_the_guest_listens),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
