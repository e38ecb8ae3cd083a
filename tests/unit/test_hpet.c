/* The HPET: its counter, one-shot and periodic timers, all ways to interrupt, and its state. */
#include "device/hpet.h"
#include "device_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define BASE 0xfed00000ULL
#define CFG(n) (0x100 + 0x20 * (n))
#define CMP(n) (0x108 + 0x20 * (n))
#define FSB(n) (0x110 + 0x20 * (n))

#define TN_LEVEL 0x2
#define TN_ENABLE 0x4
#define TN_PERIODIC 0x8
#define TN_VAL_SET 0x40
#define TN_32 0x100
#define TN_ROUTE(pin) ((pin) << 9)
#define TN_FSB 0x4000

#define LINE_LEGACY 30 /* and 31, of the rig's lines */

struct fixture {
    struct rig *rig;
    struct hpet *h;
    bool legacy;
};

static void legacy_route(void *opaque, bool on)
{
    struct fixture *f = opaque;

    f->legacy = on;
}

static struct hpet *make(struct fixture *f, gpa_t base)
{
    struct hpet_config cfg = {
        .base = base,
        .legacy = {rig_line(f->rig, LINE_LEGACY), rig_line(f->rig, LINE_LEGACY + 1)},
        .msi = rig_msi(f->rig),
        .legacy_route = legacy_route,
        .opaque = f,
    };

    for (unsigned i = 0; i < HPET_PINS; i++)
        cfg.pins[i] = rig_line(f->rig, i);
    return hpet_create(&f->rig->env, &cfg, &f->rig->err);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    f->rig = rig_create();
    f->h = make(f, BASE);
    *state = f;
    return f->h ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    hpet_device(f->h)->ops->destroy(hpet_device(f->h));
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static u64 rd(struct fixture *f, u64 reg)
{
    return io_bus_read(f->rig->env.mmio, BASE + reg, 8);
}

static void wr(struct fixture *f, u64 reg, u64 value)
{
    io_bus_write(f->rig->env.mmio, BASE + reg, value, 8);
}

static void advance(struct fixture *f, u64 ticks)
{
    rig_advance(f->rig->env.clock, ticks * HPET_PERIOD_NS);
}

static void counts_only_while_enabled(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(rd(f, 0), 0x009896808086a201ULL);
    advance(f, 1000);
    assert_int_equal(rd(f, 0xf0), 0);
    wr(f, 0xf0, 0xfffffff0);
    wr(f, 0x10, 1);
    advance(f, 0x20);
    assert_int_equal(rd(f, 0xf0), 0x100000010ULL);
    assert_int_equal(io_bus_read(f->rig->env.mmio, BASE + 0xf4, 4), 1);
    wr(f, 0x10, 0);
    advance(f, 5);
    assert_int_equal(rd(f, 0xf0), 0x100000010ULL);
}

static void one_shot_edge_fires_at_its_tick(void **state)
{
    struct fixture *f = *state;

    wr(f, CFG(0), TN_ENABLE | TN_ROUTE(20));
    wr(f, CMP(0), 5000);
    wr(f, 0x10, 1);
    advance(f, 4999);
    assert_int_equal(f->rig->edges[20], 0);
    advance(f, 1);
    assert_int_equal(f->rig->edges[20], 1);
    assert_false(f->rig->levels[20]);
    advance(f, 1ULL << 34);
    assert_int_equal(f->rig->edges[20], 1);
    wr(f, CMP(0), 17); /* has passed: not before the counter wraps */
    advance(f, 1ULL << 34);
    assert_int_equal(f->rig->edges[20], 1);
}

static void a_32_bit_timer_fires_at_every_wrap(void **state)
{
    struct fixture *f = *state;

    wr(f, CFG(1), TN_ENABLE | TN_32 | TN_ROUTE(21));
    wr(f, CMP(1), 0xabc00000100ULL);
    assert_int_equal(rd(f, CMP(1)), 0x100);
    wr(f, 0x10, 1);
    advance(f, 0x100);
    assert_int_equal(f->rig->edges[21], 1);
    advance(f, 1ULL << 32);
    assert_int_equal(f->rig->edges[21], 2);
}

/* As Linux programs it: the accumulator first, then the period. */
static void periodic_has_an_accumulator(void **state)
{
    struct fixture *f = *state;

    wr(f, 0x10, 1);
    wr(f, CFG(0), TN_ENABLE | TN_PERIODIC | TN_VAL_SET | TN_32 | TN_ROUTE(20));
    wr(f, CMP(0), 100000);
    assert_int_equal(rd(f, CFG(0)) & TN_VAL_SET, 0);
    wr(f, CMP(0), 10000);
    assert_int_equal(rd(f, CMP(0)), 100000);
    advance(f, 100000);
    assert_int_equal(f->rig->edges[20], 1);
    assert_int_equal(rd(f, CMP(0)), 110000);
    advance(f, 50000);
    assert_int_equal(f->rig->edges[20], 6);
    assert_int_equal(rd(f, CMP(0)), 160000);
}

static void a_tiny_period_does_not_flood(void **state)
{
    struct fixture *f = *state;

    wr(f, 0x10, 1);
    wr(f, CFG(0), TN_ENABLE | TN_PERIODIC | TN_VAL_SET | TN_ROUTE(20));
    wr(f, CMP(0), 1);
    advance(f, 10 * HPET_MIN_PERIOD);
    assert_in_range(f->rig->edges[20], 1, 11);
    assert_int_equal(rd(f, CMP(0)), 10 * HPET_MIN_PERIOD + 1);
}

static void level_stays_until_its_status_is_cleared(void **state)
{
    struct fixture *f = *state;

    wr(f, CFG(2), TN_ENABLE | TN_LEVEL | TN_ROUTE(11));
    wr(f, CMP(2), 10);
    wr(f, 0x10, 1);
    advance(f, 10);
    assert_true(f->rig->levels[11]);
    assert_int_equal(rd(f, 0x20), 4);
    wr(f, CFG(2), TN_LEVEL | TN_ROUTE(11));
    assert_false(f->rig->levels[11]);
    wr(f, CFG(2), TN_ENABLE | TN_LEVEL | TN_ROUTE(11));
    assert_true(f->rig->levels[11]);
    wr(f, 0x20, 3);
    assert_true(f->rig->levels[11]);
    wr(f, 0x20, 4);
    assert_false(f->rig->levels[11]);
}

static void refuses_routes_it_does_not_have(void **state)
{
    struct fixture *f = *state;

    wr(f, CFG(0), TN_ROUTE(20));
    wr(f, CFG(0), TN_ROUTE(11));
    assert_int_equal(rd(f, CFG(0)) & TN_ROUTE(31), TN_ROUTE(20));
    assert_int_equal(rd(f, CFG(2)) >> 32, 0x00f00800);
}

static void legacy_route_replaces_pit_and_rtc(void **state)
{
    struct fixture *f = *state;

    wr(f, CFG(0), TN_ENABLE | TN_ROUTE(20));
    wr(f, CFG(1), TN_ENABLE);
    wr(f, CMP(0), 10);
    wr(f, CMP(1), 20);
    wr(f, 0x10, 3);
    assert_true(f->legacy);
    advance(f, 20);
    assert_int_equal(f->rig->edges[20], 0);
    assert_int_equal(f->rig->edges[LINE_LEGACY], 1);
    assert_int_equal(f->rig->edges[LINE_LEGACY + 1], 1);
    hpet_device(f->h)->ops->reset(hpet_device(f->h));
    assert_false(f->legacy);
}

static void fsb_sends_a_message(void **state)
{
    struct fixture *f = *state;

    wr(f, FSB(1), 0xfee0100000004055ULL);
    wr(f, CFG(1), TN_ENABLE | TN_FSB);
    wr(f, CMP(1), 10);
    wr(f, 0x10, 1);
    advance(f, 10);
    assert_int_equal(f->rig->messages, 1);
    assert_int_equal(f->rig->msi_address, 0xfee01000);
    assert_int_equal(f->rig->msi_data, 0x4055);
}

static void random_traffic(struct fixture *f, unsigned n, u64 seed)
{
    while (n--) {
        u64 r = rig_random(&seed);
        u64 reg = r & 1 ? CFG(r >> 1 & 3) + (r >> 3 & 0x1c) : r >> 1 & 0xfc;
        io_bus_write(f->rig->env.mmio, BASE + reg, rig_random(&seed) >> (r >> 8 & 63),
                     r >> 16 & 1 ? 8 : 4);
        rig_advance_bounded(f->rig->env.clock, r >> 20 & 0xffff, 100);
    }
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = *state;
    char buf[128];

    random_traffic(f, 3000, 0x4e7);
    struct hpet *fresh = make(f, BASE + 0x1000);
    assert_non_null(fresh);
    const char *wrong =
        rig_round_trip(f->rig, hpet_device(f->h), hpet_device(fresh), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    hpet_device(fresh)->ops->destroy(hpet_device(fresh));
}

static void deadlines_are_armed_again_after_a_load(void **state)
{
    struct fixture *f = *state;
    char buf[128];

    wr(f, 0x10, 1);
    wr(f, CFG(0), TN_ENABLE | TN_ROUTE(20));
    wr(f, CMP(0), 5000);
    advance(f, 1000);
    struct hpet *fresh = make(f, BASE + 0x1000);
    assert_null(rig_round_trip(f->rig, hpet_device(f->h), hpet_device(fresh), buf, sizeof(buf)));
    wr(f, 0x10, 0); /* the old one goes silent */
    advance(f, 3999);
    assert_int_equal(f->rig->edges[20], 0);
    advance(f, 1);
    assert_int_equal(f->rig->edges[20], 1);
    hpet_device(fresh)->ops->destroy(hpet_device(fresh));
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(counts_only_while_enabled),
        TEST(one_shot_edge_fires_at_its_tick),
        TEST(a_32_bit_timer_fires_at_every_wrap),
        TEST(periodic_has_an_accumulator),
        TEST(a_tiny_period_does_not_flood),
        TEST(level_stays_until_its_status_is_cleared),
        TEST(refuses_routes_it_does_not_have),
        TEST(legacy_route_replaces_pit_and_rtc),
        TEST(fsb_sends_a_message),
        TEST(state_survives_the_round_trip),
        TEST(deadlines_are_armed_again_after_a_load),
    };
    return cmocka_run_group_tests_name("hpet", tests, NULL, NULL);
}
