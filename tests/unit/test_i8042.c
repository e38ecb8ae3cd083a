/* The keyboard controller: its commands, reset and A20; the keyboard; the mouse in all its modes. */
#include "device/i8042.h"
#include "legacy_rig.h"

#include <stdio.h>

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

/* ---- the controller ---- */

static u8 ask(struct rig *r, u8 command)
{
    out(r, 0x64, command);
    return in(r, 0x60);
}

static void send(struct rig *r, u8 command, u8 data)
{
    out(r, 0x64, command);
    out(r, 0x60, data);
}

static void tests_pass_and_ram_keeps_its_bytes(void **state)
{
    static const u8 answers[][2] = {{0xaa, 0x55}, {0xab, 0x00}, {0xa9, 0x00}, {0xa4, 0xf1},
                                    {0xc0, 0x80}, {0xe0, 0x00}, {0x20, 0x47}};
    struct rig *r = rig_create();
    struct device *dev = create(r);

    for (unsigned i = 0; i < ARRAY_SIZE(answers); i++)
        assert_int_equal(ask(r, answers[i][0]), answers[i][1]);
    for (u8 i = 1; i < 32; i++)
        send(r, 0x60 + i, i ^ 0x5a);
    for (u8 i = 1; i < 32; i++)
        assert_int_equal(ask(r, 0x20 + i), i ^ 0x5a);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void the_status_register_tells_what_is_going_on(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_int_equal(in(r, 0x64), 0x14);
    out(r, 0x64, 0x60);
    assert_int_equal(in(r, 0x64), 0x1c); /* the last byte was a command */
    out(r, 0x60, 0x00);
    assert_int_equal(in(r, 0x64), 0x10); /* SYS follows the command byte */
    out(r, 0x64, 0xaa);
    assert_int_equal(in(r, 0x64), 0x1d);
    in(r, 0x60);
    assert_int_equal(in(r, 0x64), 0x1c);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void pulses_reset_when_bit_0_is_low(void **state)
{
    for (unsigned command = 0xf0; command <= 0xff; command++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);

        out(r, 0x64, (u8)command);
        assert_int_equal(r->power_requests, !(command & 1));
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void the_output_port_drives_a20_and_reset(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_int_equal(ask(r, 0xd0) & 0x03, 0x03);
    send(r, 0xd1, 0xdd);
    assert_false(a20_gate_enabled(&gate));
    assert_int_equal(ask(r, 0xd0) & 0x03, 0x01);
    out(r, 0x64, 0xdf);
    assert_true(a20_gate_enabled(&gate));
    assert_int_equal(r->power_requests, 0);
    send(r, 0xd1, 0xde);
    assert_int_equal(r->power_requests, 1);
    assert_int_equal(r->power, POWER_RESET);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void echoes_come_as_if_a_device_had_sent_them(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    send(r, 0xd2, 0x12);
    assert_int_equal(in(r, 0x64) & 0x21, 0x01);
    assert_true(r->levels[1]);
    assert_int_equal(in(r, 0x60), 0x12);
    assert_false(r->levels[1]);
    send(r, 0xd3, 0x5a);
    assert_int_equal(in(r, 0x64) & 0x21, 0x21);
    assert_true(r->levels[12]);
    assert_int_equal(in(r, 0x60), 0x5a);
    assert_false(r->levels[12]);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void an_interface_that_is_off_holds_its_bytes(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    struct i8042 *k = (struct i8042 *)dev;

    send(r, 0xd4, 0xf4);
    assert_int_equal(in(r, 0x60), 0xfa);
    out(r, 0x64, 0xad);
    out(r, 0x64, 0xa7);
    assert_int_equal(ask(r, 0x20) & 0x30, 0x30);
    i8042_key(k, 0x1c, true);
    i8042_mouse(k, 1, 0, 0, 0);
    assert_int_equal(in(r, 0x64) & 0x01, 0);
    out(r, 0x64, 0xae);
    assert_int_equal(in(r, 0x60), 0x1e);
    assert_int_equal(in(r, 0x64) & 0x01, 0);
    out(r, 0x64, 0xa8);
    assert_int_equal(in(r, 0x64) & 0x21, 0x21);
    assert_int_equal(in(r, 0x60), 0x08);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void interrupts_need_the_command_byte(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    send(r, 0x60, 0x44);
    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_int_equal(in(r, 0x64) & 0x01, 0x01);
    assert_false(r->levels[1]);
    send(r, 0x60, 0x45);
    assert_true(r->levels[1]);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

/* ---- the keyboard ---- */

/* What the guest reads until the output buffer stays empty, as hexadecimal digits. */
static const char *read_all(struct rig *r)
{
    static char text[3 * 64];
    size_t n = 0;

    text[0] = 0;
    while ((in(r, 0x64) & 0x01) && n + 4 < sizeof(text))
        n += (size_t)snprintf(text + n, sizeof(text) - n, n ? " %02x" : "%02x", in(r, 0x60));
    return text;
}

static void scan_codes_follow_set_and_translation(void **state)
{
    /* Command byte, scan set, key, and the bytes of its press and release. */
    static const struct {
        u8 mode, set;
        u16 key;
        const char *bytes;
    } rows[] = {
        {0x45, 2, 0x1c, "1e 9e"},
        {0x45, 2, 0x83, "41 c1"},
        {0x45, 2, I8042_KEY_E0 | 0x75, "e0 48 e0 c8"},
        {0x45, 2, I8042_KEY_PAUSE, "e1 1d 45 e1 9d c5"},
        {0x05, 2, 0x1c, "1c f0 1c"},
        {0x05, 2, I8042_KEY_E0 | 0x75, "e0 75 e0 f0 75"},
        {0x05, 2, I8042_KEY_PAUSE, "e1 14 77 e1 f0 14 f0 77"},
        {0x05, 1, 0x1c, "1e 9e"},
        {0x05, 1, I8042_KEY_E0 | 0x75, "e0 48 e0 c8"},
        {0x05, 1, I8042_KEY_PAUSE, "e1 1d 45 e1 9d c5"},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);

        out(r, 0x60, 0xf0);
        out(r, 0x60, rows[i].set);
        read_all(r);
        send(r, 0x60, rows[i].mode);
        i8042_key((struct i8042 *)dev, rows[i].key, true);
        i8042_key((struct i8042 *)dev, rows[i].key, false);
        assert_string_equal(read_all(r), rows[i].bytes);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void the_keyboard_answers_its_commands(void **state)
{
    /* What is written to port 0x60, byte by byte, and all that is read. Without translation. */
    static const struct {
        u8 bytes[2];
        unsigned n;
        const char *answer;
    } rows[] = {
        {{0xee}, 1, "ee"},
        {{0xf2}, 1, "fa ab 83"},
        {{0xff}, 1, "fa aa"},
        {{0xf4}, 1, "fa"},
        {{0xf5}, 1, "fa"},
        {{0xf6}, 1, "fa"},
        {{0xf0, 0x00}, 2, "fa fa 02"},
        {{0xf0, 0x03}, 2, "fa fe"},
        {{0xed, 0x07}, 2, "fa fa"},
        {{0xf3, 0x2b}, 2, "fa fa"},
        {{0xf7}, 1, "fa"},
        {{0x00}, 1, "fe"},
        {{0xed, 0xf4}, 2, "fa fa"},
        {{0xef}, 1, "fe"},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);
        char all[64] = "";

        send(r, 0x60, 0x05);
        for (unsigned n = 0; n < rows[i].n; n++) {
            out(r, 0x60, rows[i].bytes[n]);
            snprintf(all + strlen(all), sizeof(all) - strlen(all), "%s%s", n ? " " : "",
                     read_all(r));
        }
        assert_string_equal(all, rows[i].answer);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void identification_is_translated_like_a_key(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x60, 0xf2);
    assert_string_equal(read_all(r), "fa ab 41");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void resend_repeats_the_last_byte(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    send(r, 0x60, 0x05);
    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_string_equal(read_all(r), "1c");
    out(r, 0x60, 0xfe);
    assert_string_equal(read_all(r), "1c");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void keys_are_dropped_while_scanning_is_off(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x60, 0xf5);
    assert_string_equal(read_all(r), "fa");
    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_string_equal(read_all(r), "");
    out(r, 0x60, 0xf6); /* the defaults leave it off */
    assert_string_equal(read_all(r), "fa");
    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_string_equal(read_all(r), "");
    out(r, 0x60, 0xf4);
    out(r, 0x60, 0xf6); /* and on */
    assert_string_equal(read_all(r), "fa fa");
    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_string_equal(read_all(r), "1e");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_full_keyboard_says_so_once(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    send(r, 0x60, 0x05);
    for (unsigned i = 0; i < 40; i++)
        i8042_key((struct i8042 *)dev, 0x1c, true);
    /* One in the output buffer, 16 behind it, and the overrun code. */
    assert_string_equal(read_all(r), "1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 1c 00");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void there_is_room_for_any_key_or_none(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    unsigned keys = 0;

    send(r, 0x60, 0x05); /* set 2 */
    for (; i8042_has_room((struct i8042 *)dev); keys++)
        i8042_key((struct i8042 *)dev, I8042_KEY_PAUSE, true);
    assert_int_equal(keys, 2); /* of 8 bytes, of which the first has moved on */
    assert_string_equal(read_all(r), "e1 14 77 e1 f0 14 f0 77 e1 14 77 e1 f0 14 f0 77");
    assert_true(i8042_has_room((struct i8042 *)dev));
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_stopped_machine_gets_no_input(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    dev->ops->stop(dev);
    i8042_key((struct i8042 *)dev, 0x1c, true);
    i8042_mouse((struct i8042 *)dev, 1, 1, 0, I8042_BUTTON_LEFT);
    assert_string_equal(read_all(r), "");
    dev->ops->start(dev);
    i8042_key((struct i8042 *)dev, 0x1c, true);
    assert_string_equal(read_all(r), "1e");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

/* ---- the mouse ---- */

static const char *tell_mouse(struct rig *r, u8 byte)
{
    send(r, 0xd4, byte);
    return read_all(r);
}

static void three_rates_turn_the_wheel_on_and_then_the_buttons(void **state)
{
    static const u8 knocks[][3] = {{200, 100, 80}, {200, 200, 80}};
    static const char *const ids[] = {"fa 03", "fa 04"};
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_string_equal(tell_mouse(r, 0xf2), "fa 00");
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned n = 0; n < 3; n++) {
            assert_string_equal(tell_mouse(r, 0xf3), "fa");
            assert_string_equal(tell_mouse(r, knocks[i][n]), "fa");
        }
        assert_string_equal(tell_mouse(r, 0xf2), ids[i]);
    }
    assert_string_equal(tell_mouse(r, 0xff), "fa aa 00");
    assert_string_equal(tell_mouse(r, 0xf2), "fa 00");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void stream_mode_reports_movement_and_buttons(void **state)
{
    static const struct {
        int dx, dy, dz;
        u8 buttons;
        const char *report;
    } rows[] = {
        {1, 2, 0, 0, "08 01 02"},
        {-1, -2, 0, 0, "38 ff fe"},
        {0, 0, 0, I8042_BUTTON_LEFT, "09 00 00"},
        {0, 0, 0, I8042_BUTTON_LEFT, ""},
        {0, 0, 0, I8042_BUTTON_RIGHT | I8042_BUTTON_MIDDLE, "0e 00 00"},
        {0, 0, 5, 0, "08 00 00"},
        {300, 0, 0, 0, "08 ff 00 08 2d 00"},
        {0, -256, 0, 0, "28 00 01 28 00 ff"},
        {INT32_MAX, 0, 0, 0, NULL},
    };
    struct rig *r = rig_create();
    struct device *dev = create(r);

    i8042_mouse((struct i8042 *)dev, 1, 1, 1, 0);
    assert_string_equal(read_all(r), ""); /* not enabled */
    assert_string_equal(tell_mouse(r, 0xf6), "fa");
    assert_string_equal(tell_mouse(r, 0xf4), "fa");
    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        i8042_mouse((struct i8042 *)dev, rows[i].dx, rows[i].dy, rows[i].dz, rows[i].buttons);
        const char *report = read_all(r);
        if (rows[i].report)
            assert_string_equal(report, rows[i].report);
    }
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void the_wheel_is_a_fourth_byte(void **state)
{
    static const u8 knock[] = {0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4};
    struct rig *r = rig_create();
    struct device *dev = create(r);

    for (unsigned i = 0; i < ARRAY_SIZE(knock); i++)
        assert_string_equal(tell_mouse(r, knock[i]), "fa");
    i8042_mouse((struct i8042 *)dev, 0, 0, -1, 0);
    assert_string_equal(read_all(r), "08 00 00 ff");
    i8042_mouse((struct i8042 *)dev, 0, 0, 9, 0);
    assert_string_equal(read_all(r), "08 00 00 07 08 00 00 02");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void remote_mode_reports_when_polled(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_string_equal(tell_mouse(r, 0xf4), "fa");
    assert_string_equal(tell_mouse(r, 0xf0), "fa");
    i8042_mouse((struct i8042 *)dev, 3, 4, 0, I8042_BUTTON_LEFT);
    assert_string_equal(read_all(r), "");
    assert_string_equal(tell_mouse(r, 0xeb), "fa 09 03 04");
    assert_string_equal(tell_mouse(r, 0xeb), "fa 09 00 00");
    assert_string_equal(tell_mouse(r, 0xea), "fa");
    i8042_mouse((struct i8042 *)dev, 1, 0, 0, I8042_BUTTON_LEFT);
    assert_string_equal(read_all(r), "09 01 00");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void wrap_mode_echoes_all_but_its_end(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_string_equal(tell_mouse(r, 0xee), "fa");
    assert_string_equal(tell_mouse(r, 0xf4), "f4");
    assert_string_equal(tell_mouse(r, 0x12), "12");
    assert_string_equal(tell_mouse(r, 0xec), "fa");
    assert_string_equal(tell_mouse(r, 0x12), "fe");
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void mouse_status_shows_the_settings(void **state)
{
    static const u8 settings[] = {0xe8, 3, 0xf3, 40, 0xe7, 0xf4};
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_string_equal(tell_mouse(r, 0xe9), "fa 00 02 64");
    for (unsigned i = 0; i < ARRAY_SIZE(settings); i++)
        assert_string_equal(tell_mouse(r, settings[i]), "fa");
    i8042_mouse((struct i8042 *)dev, 0, 0, 0, I8042_BUTTON_LEFT | I8042_BUTTON_RIGHT);
    read_all(r);
    assert_string_equal(tell_mouse(r, 0xe9), "fa 35 03 28");
    assert_string_equal(tell_mouse(r, 0xf6), "fa");
    assert_string_equal(tell_mouse(r, 0xe9), "fa 05 02 64");
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
        cmocka_unit_test(tests_pass_and_ram_keeps_its_bytes),
        cmocka_unit_test(the_status_register_tells_what_is_going_on),
        cmocka_unit_test(pulses_reset_when_bit_0_is_low),
        cmocka_unit_test(the_output_port_drives_a20_and_reset),
        cmocka_unit_test(echoes_come_as_if_a_device_had_sent_them),
        cmocka_unit_test(an_interface_that_is_off_holds_its_bytes),
        cmocka_unit_test(interrupts_need_the_command_byte),
        cmocka_unit_test(scan_codes_follow_set_and_translation),
        cmocka_unit_test(the_keyboard_answers_its_commands),
        cmocka_unit_test(identification_is_translated_like_a_key),
        cmocka_unit_test(resend_repeats_the_last_byte),
        cmocka_unit_test(keys_are_dropped_while_scanning_is_off),
        cmocka_unit_test(a_full_keyboard_says_so_once),
        cmocka_unit_test(there_is_room_for_any_key_or_none),
        cmocka_unit_test(a_stopped_machine_gets_no_input),
        cmocka_unit_test(three_rates_turn_the_wheel_on_and_then_the_buttons),
        cmocka_unit_test(stream_mode_reports_movement_and_buttons),
        cmocka_unit_test(the_wheel_is_a_fourth_byte),
        cmocka_unit_test(remote_mode_reports_when_polled),
        cmocka_unit_test(wrap_mode_echoes_all_but_its_end),
        cmocka_unit_test(mouse_status_shows_the_settings),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
