/* The MC146818: the calendar in its formats, setting it, alarms and the other interrupts. */
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

static void set_clock(struct rig *r, u8 b, u8 hour, u8 minute, u8 second)
{
    const u8 time[][2] = {{0, second}, {2, minute}, {4, hour},   {7, 0x15},
                          {8, 0x06},   {9, 0x24},   {0x32, 0x20}};

    set(r, 11, 0x80 | b);
    for (unsigned i = 0; i < ARRAY_SIZE(time); i++)
        set(r, time[i][0], time[i][1]);
    set(r, 11, b);
}

/* Advances by whole seconds and notes how many of them set a flag of register C. */
static unsigned seconds_with(struct rig *r, u8 flag, unsigned seconds)
{
    unsigned n = 0;

    for (unsigned i = 0; i < seconds; i++) {
        rig_advance(r->env.clock, NS_PER_SEC);
        n += !!(get(r, 12) & flag);
    }
    return n;
}

static void alarms_go_off_where_all_fields_match(void **state)
{
    /* The alarm's hour, minute and second, and how often it goes off from 00:00:00 to 02:00:00. */
    static const struct {
        u8 hour, minute, second;
        unsigned times;
    } rows[] = {
        {0x01, 0x02, 0x03, 1},  {0x05, 0x02, 0x03, 0},   {0xff, 0x02, 0x03, 2},
        {0x01, 0xc0, 0x30, 60}, {0xc0, 0xff, 0x00, 120}, {0x01, 0x59, 0xff, 60},
        {0x01, 0x60, 0x00, 0},  {0xff, 0xff, 0x6a, 0},   {0xff, 0xff, 0xff, 7200},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);

        set_clock(r, 0x02, 0, 0, 0);
        set(r, 5, rows[i].hour);
        set(r, 3, rows[i].minute);
        set(r, 1, rows[i].second);
        get(r, 12);
        assert_int_equal(seconds_with(r, 0x20, 7200), rows[i].times);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void an_alarm_interrupts_when_enabled(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    set_clock(r, 0x22, 0x23, 0x59, 0x58);
    set(r, 5, 0x00);
    set(r, 3, 0x00);
    set(r, 1, 0x01);
    get(r, 12);
    rig_advance(r->env.clock, 2 * NS_PER_SEC + NS_PER_SEC / 2);
    assert_false(r->levels[8]);
    rig_advance(r->env.clock, NS_PER_SEC);
    assert_true(r->levels[8]);
    assert_int_equal(get(r, 12) & 0xa0, 0xa0);
    assert_false(r->levels[8]);
    assert_int_equal(get(r, 12), 0);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void the_12_hour_mode_marks_the_afternoon(void **state)
{
    /* Register B, the hour as it is written, and as it reads an hour later. */
    static const struct {
        u8 b, hour, next;
    } rows[] = {
        {0x00, 0x12, 0x01}, {0x00, 0x11, 0x92}, {0x00, 0x92, 0x81}, {0x00, 0x91, 0x12},
        {0x00, 0x09, 0x10}, {0x04, 0x0b, 0x8c}, {0x04, 0x8c, 0x81}, {0x04, 0x8b, 0x0c},
        {0x02, 0x11, 0x12}, {0x02, 0x23, 0x00}, {0x06, 0x17, 0x00}, {0x06, 0x0b, 0x0c},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);

        set_clock(r, rows[i].b, rows[i].hour, 0, 0);
        assert_int_equal(get(r, 4), rows[i].hour);
        rig_advance(r->env.clock, 3600 * NS_PER_SEC);
        assert_int_equal(get(r, 4), rows[i].next);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void an_alarm_in_12_hour_mode_knows_the_afternoon(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    set_clock(r, 0x00, 0x12, 0x59, 0x59); /* midnight's hour */
    set(r, 5, 0x81);
    set(r, 3, 0x00);
    set(r, 1, 0x00);
    get(r, 12);
    rig_advance(r->env.clock, 12 * 3600 * NS_PER_SEC);
    assert_int_equal(get(r, 12) & 0x20, 0);
    rig_advance(r->env.clock, 2 * NS_PER_SEC);
    assert_int_equal(get(r, 12) & 0x20, 0x20);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void updates_interrupt_each_second_and_announce_themselves(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    set(r, 11, 0x12);
    get(r, 12);
    unsigned before = r->edges[8];
    for (unsigned i = 0; i < 10; i++) {
        rig_advance(r->env.clock, NS_PER_SEC - 1000000);
        assert_int_equal(get(r, 10) & 0x80, 0x80); /* within 2.2 ms of the update */
        rig_advance(r->env.clock, 1000000);
        assert_int_equal(get(r, 10) & 0x80, 0);
        assert_int_equal(get(r, 12) & 0xb0, 0x90);
    }
    assert_int_equal(r->edges[8] - before, 10);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void set_holds_the_time_and_the_updates(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    set_clock(r, 0x02, 0x10, 0x20, 0x30);
    rig_advance(r->env.clock, NS_PER_SEC);
    set(r, 11, 0x92);
    assert_int_equal(get(r, 11), 0x82); /* SET clears UIE */
    get(r, 12);
    assert_int_equal(seconds_with(r, 0x10, 5), 0);
    assert_int_equal(get(r, 0), 0x31);
    assert_int_equal(get(r, 10) & 0x80, 0);
    set(r, 11, 0x02);
    rig_advance(r->env.clock, NS_PER_SEC);
    assert_int_equal(get(r, 0), 0x32);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void a_divider_out_of_reset_updates_after_half_a_second(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    set_clock(r, 0x02, 0x10, 0x20, 0x30);
    set(r, 10, 0x66);
    rig_advance(r->env.clock, 10 * NS_PER_SEC + 123456789);
    assert_int_equal(get(r, 0), 0x30);
    set(r, 10, 0x26);
    rig_advance(r->env.clock, NS_PER_SEC / 2 - 1000000);
    assert_int_equal(get(r, 0), 0x30);
    rig_advance(r->env.clock, 2000000);
    assert_int_equal(get(r, 0), 0x31);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void periodic_rates_are_those_of_the_data_sheet(void **state)
{
    static const u16 hz[16] = {0,   256, 128, 8192, 4096, 2048, 1024, 512,
                               256, 128, 64,  32,   16,   8,    4,    2};

    for (unsigned rate = 0; rate < 16; rate++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);
        unsigned count = 0;

        set(r, 10, 0x20 | rate);
        set(r, 11, 0x42);
        for (unsigned i = 0; i < 20000; i++) {
            rig_advance(r->env.clock, 50000);
            count += r->levels[8] && get(r, 12) == 0xc0;
        }
        /* Once a second C shows the update's flag as well. */
        assert_in_range(count, hz[rate] ? hz[rate] - 2U : 0, hz[rate] + 1U);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void the_century_turns_with_the_year(void **state)
{
    /* Year and century before and after midnight on December 31. */
    static const u8 rows[][4] = {
        {0x99, 0x19, 0x00, 0x20}, {0x24, 0x20, 0x25, 0x20}, {0x99, 0x20, 0x00, 0x21}};

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);

        set_clock(r, 0x02, 0x23, 0x59, 0x59);
        set(r, 8, 0x12);
        set(r, 7, 0x31);
        set(r, 9, rows[i][0]);
        set(r, 0x32, rows[i][1]);
        rig_advance(r->env.clock, 2 * NS_PER_SEC);
        assert_int_equal(get(r, 9), rows[i][2]);
        assert_int_equal(get(r, 0x32), rows[i][3]);
        assert_int_equal(get(r, 8), 1);
        assert_int_equal(get(r, 7), 1);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void only_1900_style_centuries_lack_a_leap_day(void **state)
{
    /* Century, and the day after February 28 of its year 0. */
    static const u8 rows[][2] = {{0x19, 0x01}, {0x20, 0x29}, {0x21, 0x01}};

    for (unsigned i = 0; i < ARRAY_SIZE(rows); i++) {
        struct rig *r = rig_create();
        struct device *dev = create(r);

        set_clock(r, 0x02, 0x23, 0x59, 0x59);
        set(r, 8, 0x02);
        set(r, 7, 0x28);
        set(r, 9, 0x00);
        set(r, 0x32, rows[i][0]);
        rig_advance(r->env.clock, 2 * NS_PER_SEC);
        assert_int_equal(get(r, 7), rows[i][1]);
        dev->ops->destroy(dev);
        rig_destroy(r);
    }
}

static void a_reset_keeps_the_time_and_the_ram(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    set_clock(r, 0x72, 0x10, 0x20, 0x30);
    set(r, 0x40, 0xa5);
    out(r, 0x72, 0x7f);
    out(r, 0x73, 0x5a);
    rig_advance(r->env.clock, NS_PER_SEC);
    dev->ops->reset(dev);
    assert_false(r->levels[8]);
    assert_int_equal(get(r, 11), 0x02);
    assert_int_equal(get(r, 0), 0x31);
    assert_int_equal(get(r, 0x40), 0xa5);
    out(r, 0x72, 0x7f);
    assert_int_equal(in(r, 0x73), 0x5a);
    assert_int_equal(get(r, 13), 0x80);
    set(r, 13, 0);
    assert_int_equal(get(r, 13), 0x80);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void port_70_masks_nmi(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    assert_false(rtc_nmi_disabled((struct rtc *)dev));
    out(r, 0x70, 0x8d);
    assert_true(rtc_nmi_disabled((struct rtc *)dev));
    assert_int_equal(in(r, 0x71), 0x80);
    out(r, 0x70, 0x0d);
    assert_false(rtc_nmi_disabled((struct rtc *)dev));
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(a_leap_day_follows_february_28),
        cmocka_unit_test(the_periodic_interrupt_waits_for_register_c),
        cmocka_unit_test(alarms_go_off_where_all_fields_match),
        cmocka_unit_test(an_alarm_interrupts_when_enabled),
        cmocka_unit_test(the_12_hour_mode_marks_the_afternoon),
        cmocka_unit_test(an_alarm_in_12_hour_mode_knows_the_afternoon),
        cmocka_unit_test(updates_interrupt_each_second_and_announce_themselves),
        cmocka_unit_test(set_holds_the_time_and_the_updates),
        cmocka_unit_test(a_divider_out_of_reset_updates_after_half_a_second),
        cmocka_unit_test(periodic_rates_are_those_of_the_data_sheet),
        cmocka_unit_test(the_century_turns_with_the_year),
        cmocka_unit_test(only_1900_style_centuries_lack_a_leap_day),
        cmocka_unit_test(a_reset_keeps_the_time_and_the_ram),
        cmocka_unit_test(port_70_masks_nmi),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
