/*
 * The 8254: the six modes as the data sheet draws them, rates without drift, latches, the gate of
 * channel 2.
 */
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

/* ---- the modes, tick by tick ---- */

enum what { OUT_IS, COUNT_IS, GATE, WRITE };

/* At a tick of the PIT's clock something is done to channel 2 or seen there. */
struct step {
    u32 tick;
    enum what what;
    u16 value;
};

static void advance_to_tick(struct rig *r, u32 tick)
{
    rig_advance(r->env.clock, clock_ticks_to_ns(tick, PIT_HZ) - vm_clock_now(r->env.clock));
}

static u16 latched_count(struct rig *r, u16 port)
{
    out(r, 0x43, (u8)((port & 3) << 6));
    u8 low = in(r, port);

    return (u16)(in(r, port) << 8 | low);
}

static void write_count(struct rig *r, u16 port, u16 count)
{
    out(r, port, (u8)count);
    out(r, port, (u8)(count >> 8));
}

/* Programs channel 2 (two bytes, so `control` is its mode and BCD bit) and follows the steps. */
static void follow(u8 control, const struct step *steps, size_t n)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0xb0 | control);
    for (size_t i = 0; i < n; i++) {
        advance_to_tick(r, steps[i].tick);
        bool high = in(r, 0x61) & 0x20;
        u16 count = steps[i].what == COUNT_IS ? latched_count(r, 0x42) : 0;

        if (steps[i].what == GATE)
            out(r, 0x61, (u8)steps[i].value);
        else if (steps[i].what == WRITE)
            write_count(r, 0x42, steps[i].value);
        else if (steps[i].what == OUT_IS && high != steps[i].value)
            fail_msg("OUT is %d at tick %u", high, steps[i].tick);
        else if (steps[i].what == COUNT_IS && count != steps[i].value)
            fail_msg("the count is 0x%x at tick %u", count, steps[i].tick);
    }
    dev->ops->destroy(dev);
    rig_destroy(r);
}
#define FOLLOW(control, steps) follow(control, steps, ARRAY_SIZE(steps))

static void mode_0_rises_at_terminal_count(void **state)
{
    static const struct step steps[] = {
        {1, GATE, 1},      {1, OUT_IS, 0},  {10, WRITE, 5},  {11, COUNT_IS, 5},
        {13, COUNT_IS, 3}, {15, OUT_IS, 0}, {16, OUT_IS, 1}, {17, COUNT_IS, 0xffff},
        {20, WRITE, 5},    {20, OUT_IS, 0}, {23, GATE, 0},   {40, COUNT_IS, 3},
        {40, OUT_IS, 0},   {40, GATE, 1},   {42, OUT_IS, 0}, {43, OUT_IS, 1},
    };

    FOLLOW(0 << 1, steps);
}

static void mode_1_is_one_shot_per_trigger(void **state)
{
    static const struct step steps[] = {
        {10, WRITE, 5},  {19, OUT_IS, 1}, {20, GATE, 1},   {21, OUT_IS, 0}, {25, OUT_IS, 0},
        {26, OUT_IS, 1}, {30, GATE, 0},   {31, OUT_IS, 1}, {31, GATE, 1},   {32, OUT_IS, 0},
        {34, GATE, 0},   {35, OUT_IS, 0}, {35, GATE, 1},   {40, OUT_IS, 0}, {41, OUT_IS, 1},
        {42, WRITE, 2},  {45, OUT_IS, 1}, {46, GATE, 0},   {47, GATE, 1},   {49, OUT_IS, 0},
        {50, OUT_IS, 1},
    };

    FOLLOW(1 << 1, steps);
}

static void mode_2_is_low_for_the_last_tick(void **state)
{
    static const struct step steps[] = {
        {1, GATE, 1},      {10, WRITE, 5},    {11, COUNT_IS, 5}, {14, OUT_IS, 1},
        {15, OUT_IS, 0},   {15, COUNT_IS, 1}, {16, OUT_IS, 1},   {16, COUNT_IS, 5},
        {20, OUT_IS, 0},   {22, GATE, 0},     {25, OUT_IS, 1},   {30, GATE, 1},
        {31, COUNT_IS, 5}, {34, OUT_IS, 1},   {35, OUT_IS, 0},   {36, OUT_IS, 1},
    };

    FOLLOW(2 << 1, steps);
}

static void mode_2_takes_a_new_count_at_the_end_of_a_period(void **state)
{
    static const struct step steps[] = {
        {1, GATE, 1},    {10, WRITE, 5},  {12, WRITE, 3},    {15, OUT_IS, 0}, {16, COUNT_IS, 3},
        {17, OUT_IS, 1}, {18, OUT_IS, 0}, {19, COUNT_IS, 3}, {21, OUT_IS, 0},
    };

    FOLLOW(2 << 1, steps);
}

static void mode_3_gives_an_odd_tick_to_the_high_half(void **state)
{
    static const struct step steps[] = {
        {1, GATE, 1},    {10, WRITE, 5},  {11, COUNT_IS, 4}, {12, COUNT_IS, 2}, {13, COUNT_IS, 0},
        {13, OUT_IS, 1}, {14, OUT_IS, 0}, {14, COUNT_IS, 4}, {15, COUNT_IS, 2}, {15, OUT_IS, 0},
        {16, OUT_IS, 1}, {18, OUT_IS, 1}, {19, OUT_IS, 0},   {21, OUT_IS, 1},
    };

    FOLLOW(3 << 1, steps);
}

static void mode_3_takes_a_new_count_at_half_time(void **state)
{
    /* High from 11 to 14, then the low half of 8 to 18 and its high half to 22. */
    static const struct step steps[] = {
        {1, GATE, 1},    {10, WRITE, 6},  {12, WRITE, 8},  {13, OUT_IS, 1}, {14, OUT_IS, 0},
        {17, OUT_IS, 0}, {18, OUT_IS, 1}, {21, OUT_IS, 1}, {22, OUT_IS, 0},
    };

    FOLLOW(3 << 1, steps);
}

static void mode_4_strobes_once_and_waits_while_the_gate_is_down(void **state)
{
    static const struct step steps[] = {
        {1, GATE, 1},    {10, WRITE, 5},  {15, OUT_IS, 1}, {16, OUT_IS, 0}, {17, OUT_IS, 1},
        {30, WRITE, 5},  {33, GATE, 0},   {36, OUT_IS, 1}, {40, GATE, 1},   {42, OUT_IS, 1},
        {43, OUT_IS, 0}, {44, OUT_IS, 1}, {99, OUT_IS, 1},
    };

    FOLLOW(4 << 1, steps);
}

static void mode_5_strobes_after_each_trigger(void **state)
{
    static const struct step steps[] = {
        {10, WRITE, 5},  {18, OUT_IS, 1}, {20, GATE, 1},   {25, OUT_IS, 1}, {26, OUT_IS, 0},
        {27, OUT_IS, 1}, {40, GATE, 0},   {41, GATE, 1},   {44, GATE, 0},   {45, GATE, 1},
        {47, OUT_IS, 1}, {51, OUT_IS, 0}, {52, OUT_IS, 1},
    };

    FOLLOW(5 << 1, steps);
}

static void bcd_counts_in_decimal_digits(void **state)
{
    static const struct step rate[] = {
        {1, GATE, 1},           {10, WRITE, 0x1000},      {11, COUNT_IS, 0x1000},
        {12, COUNT_IS, 0x0999}, {1011, COUNT_IS, 0x1000},
    };
    static const struct step longest[] = {
        {1, GATE, 1},
        {10, WRITE, 0},
        {11, COUNT_IS, 0},
        {12, COUNT_IS, 0x9999},
        {10010, COUNT_IS, 0x0001},
        {10011, COUNT_IS, 0},
    };
    static const struct step wraps[] = {
        {1, GATE, 1},
        {10, WRITE, 5},
        {16, COUNT_IS, 0},
        {17, COUNT_IS, 0x9999},
    };

    FOLLOW(2 << 1 | 1, rate);
    FOLLOW(2 << 1 | 1, longest);
    FOLLOW(0 << 1 | 1, wraps);
}

static void modes_6_and_7_are_2_and_3(void **state)
{
    static const struct step rate[] = {
        {1, GATE, 1}, {10, WRITE, 4}, {13, OUT_IS, 1}, {14, OUT_IS, 0}};
    static const struct step square[] = {
        {1, GATE, 1}, {10, WRITE, 4}, {12, OUT_IS, 1}, {13, OUT_IS, 0}};

    FOLLOW(6 << 1, rate);
    FOLLOW(7 << 1, square);
}

/* ---- reading ---- */

static void a_latched_count_stays_until_it_is_read(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0x34);
    write_count(r, 0x40, 1000);
    advance_to_tick(r, 101);
    out(r, 0x43, 0x00);
    advance_to_tick(r, 301);
    out(r, 0x43, 0x00); /* ignored: the first is not yet read */
    assert_int_equal(in(r, 0x40), 900 & 0xff);
    assert_int_equal(in(r, 0x40), 900 >> 8);
    assert_int_equal(in(r, 0x40), 700 & 0xff); /* not latched: as it is now */
    assert_int_equal(in(r, 0x40), 700 >> 8);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void one_byte_counts_are_the_half_they_name(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0x14);
    out(r, 0x40, 200);
    advance_to_tick(r, 51);
    assert_int_equal(in(r, 0x40), 150);
    assert_int_equal(in(r, 0x40), 150);
    out(r, 0x43, 0x24);
    out(r, 0x40, 2);
    advance_to_tick(r, 51 + 257);
    out(r, 0x43, 0x00);
    assert_int_equal(in(r, 0x40), 1);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void read_back_latches_status_and_counts_of_several(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0x34);
    write_count(r, 0x40, 1000);
    out(r, 0x43, 0xb0); /* channel 2, mode 0: no count as yet */
    advance_to_tick(r, 101);
    out(r, 0x43, 0xca);
    advance_to_tick(r, 201);
    assert_int_equal(in(r, 0x40), 0x80 | 0x34);
    assert_int_equal(in(r, 0x40), 900 & 0xff);
    assert_int_equal(in(r, 0x40), 900 >> 8);
    assert_int_equal(in(r, 0x42), 0x40 | 0x30);
    out(r, 0x43, 0xe2); /* status only */
    assert_int_equal(in(r, 0x40), 0x80 | 0x34);
    assert_int_equal(in(r, 0x40), 800 & 0xff);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void null_count_tells_that_a_count_waits(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0x34);
    write_count(r, 0x40, 1000);
    write_count(r, 0x40, 500);
    out(r, 0x43, 0xe2);
    assert_int_equal(in(r, 0x40) & 0x40, 0x40);
    advance_to_tick(r, 1002);
    out(r, 0x43, 0xe2);
    assert_int_equal(in(r, 0x40) & 0x40, 0);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void mode_0_interrupts_once(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);

    out(r, 0x43, 0x30);
    unsigned before = r->edges[0];
    assert_false(r->levels[0]);
    write_count(r, 0x40, 1193);
    rig_advance(r->env.clock, 990000);
    assert_int_equal(r->edges[0], before);
    rig_advance(r->env.clock, 20000);
    assert_int_equal(r->edges[0], before + 1);
    rig_advance(r->env.clock, NS_PER_SEC);
    assert_int_equal(r->edges[0], before + 1);
    dev->ops->destroy(dev);
    rig_destroy(r);
}

static void the_refresh_bit_toggles(void **state)
{
    struct rig *r = rig_create();
    struct device *dev = create(r);
    unsigned changes = 0;
    u8 last = in(r, 0x61);

    for (unsigned i = 0; i < 1000; i++) {
        rig_advance(r->env.clock, 1000);
        u8 now = in(r, 0x61);
        changes += (now ^ last) >> 4 & 1;
        last = now;
    }
    assert_in_range(changes, 65, 67); /* in a millisecond */
    dev->ops->destroy(dev);
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(state_moves),
        cmocka_unit_test(mode_2_keeps_its_rate),
        cmocka_unit_test(channel_2_counts_while_its_gate_is_up),
        cmocka_unit_test(mode_0_rises_at_terminal_count),
        cmocka_unit_test(mode_1_is_one_shot_per_trigger),
        cmocka_unit_test(mode_2_is_low_for_the_last_tick),
        cmocka_unit_test(mode_2_takes_a_new_count_at_the_end_of_a_period),
        cmocka_unit_test(mode_3_gives_an_odd_tick_to_the_high_half),
        cmocka_unit_test(mode_3_takes_a_new_count_at_half_time),
        cmocka_unit_test(mode_4_strobes_once_and_waits_while_the_gate_is_down),
        cmocka_unit_test(mode_5_strobes_after_each_trigger),
        cmocka_unit_test(bcd_counts_in_decimal_digits),
        cmocka_unit_test(modes_6_and_7_are_2_and_3),
        cmocka_unit_test(a_latched_count_stays_until_it_is_read),
        cmocka_unit_test(one_byte_counts_are_the_half_they_name),
        cmocka_unit_test(read_back_latches_status_and_counts_of_several),
        cmocka_unit_test(null_count_tells_that_a_count_waits),
        cmocka_unit_test(mode_0_interrupts_once),
        cmocka_unit_test(the_refresh_bit_toggles),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
