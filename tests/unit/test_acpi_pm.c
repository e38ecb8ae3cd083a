/* ACPI fixed hardware: events and the SCI, the PM timer, power-off, and its state. */
#include "device/acpi_pm.h"
#include "device_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

#define EVT 0x600
#define CNT 0x604
#define TMR 0x608
#define GPE 0x620
#define SCI 9
#define HALF_WRAP_NS clock_ticks_to_ns(1ULL << 31, ACPI_PM_TIMER_HZ)

struct fixture {
    struct rig *rig;
    struct acpi_pm *pm;
};

static struct acpi_pm *make(struct rig *r, u16 base)
{
    struct acpi_pm_config cfg = {
        .pm1_evt = base,
        .pm1_cnt = base + 4,
        .pm_tmr = base + 8,
        .gpe0 = base + 0x20,
        .sci = rig_line(r, SCI),
        .power = rig_power(r),
    };

    return acpi_pm_create(&r->env, &cfg, &r->err);
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));

    f->rig = rig_create();
    f->pm = make(f->rig, EVT);
    *state = f;
    return f->pm ? 0 : -1;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    acpi_pm_device(f->pm)->ops->destroy(acpi_pm_device(f->pm));
    rig_destroy(f->rig);
    free(f);
    return 0;
}

static u32 in(struct fixture *f, u16 port, unsigned size)
{
    return io_bus_read(f->rig->env.ports, port, size);
}

static void out(struct fixture *f, u16 port, u32 value, unsigned size)
{
    io_bus_write(f->rig->env.ports, port, value, size);
}

static void power_button_raises_the_sci(void **state)
{
    struct fixture *f = *state;

    acpi_pm_power_button(f->pm);
    assert_int_equal(in(f, EVT, 2), 0x100);
    assert_false(f->rig->levels[SCI]);
    out(f, EVT + 2, 0x100, 2);
    assert_true(f->rig->levels[SCI]);
    assert_int_equal(in(f, EVT, 4), 0x01000100);
    out(f, EVT + 1, 1, 1); /* one byte of status: clears it */
    assert_false(f->rig->levels[SCI]);
    assert_int_equal(in(f, EVT + 2, 2), 0x100);
}

static void gpes_have_status_and_enable(void **state)
{
    struct fixture *f = *state;

    out(f, GPE + 4, 0x80000001, 4);
    acpi_pm_gpe_raise(f->pm, 1);
    assert_false(f->rig->levels[SCI]);
    acpi_pm_gpe_raise(f->pm, 31);
    assert_true(f->rig->levels[SCI]);
    assert_int_equal(in(f, GPE, 4), 0x80000002);
    out(f, GPE + 3, 0x80, 1);
    assert_int_equal(in(f, GPE, 4), 2);
    assert_int_equal(in(f, GPE + 7, 1), 0x80);
    assert_false(f->rig->levels[SCI]);
}

static void sleep_type_5_powers_off(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(in(f, CNT, 2), 1);
    out(f, CNT, 5 << 10 | 1 << 13, 2); /* a type that is not offered */
    assert_int_equal(f->rig->power_requests, 0);
    out(f, CNT, ACPI_SLP_TYP_S5 << 10, 2);
    assert_int_equal(in(f, CNT, 2), ACPI_SLP_TYP_S5 << 10 | 1);
    assert_int_equal(f->rig->power_requests, 0);
    out(f, CNT, ACPI_SLP_TYP_S5 << 10 | 1 << 13, 2);
    assert_int_equal(f->rig->power_requests, 1);
    assert_int_equal(f->rig->power, POWER_OFF);
    assert_int_equal(in(f, CNT, 2), ACPI_SLP_TYP_S5 << 10 | 1);
}

static void pm_timer_counts_and_tells_of_its_top_bit(void **state)
{
    struct fixture *f = *state;

    rig_advance(f->rig->env.clock, NS_PER_SEC);
    assert_int_equal(in(f, TMR, 4), ACPI_PM_TIMER_HZ);
    assert_int_equal(in(f, TMR + 1, 1), ACPI_PM_TIMER_HZ >> 8 & 0xff);
    out(f, EVT + 2, 1, 2);
    rig_advance(f->rig->env.clock, HALF_WRAP_NS - NS_PER_SEC - 1000);
    assert_false(f->rig->levels[SCI]);
    rig_advance(f->rig->env.clock, 2000);
    assert_true(f->rig->levels[SCI]);
    assert_int_equal(in(f, EVT, 2), 1);
    assert_int_equal(in(f, TMR, 4) >> 31, 1);
    out(f, EVT, 1, 2);
    assert_false(f->rig->levels[SCI]);
    rig_advance(f->rig->env.clock, HALF_WRAP_NS);
    assert_true(f->rig->levels[SCI]);
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = *state;
    u64 seed = 0xac91;
    char buf[128];

    for (unsigned i = 0; i < 2000; i++) {
        u64 r = rig_random(&seed);
        out(f, EVT + r % 0x28, r >> 8, 1 << (r >> 40 & 1));
        if (r >> 41 & 1)
            acpi_pm_power_button(f->pm);
        acpi_pm_gpe_raise(f->pm, r >> 48 & 31);
        rig_advance(f->rig->env.clock, r & 0xffffffffff);
    }
    out(f, EVT, 0xffff, 2);
    out(f, EVT + 2, 1, 2);
    out(f, GPE + 4, 0, 4);
    struct acpi_pm *fresh = make(f->rig, EVT + 0x100);
    assert_non_null(fresh);
    const char *wrong =
        rig_round_trip(f->rig, acpi_pm_device(f->pm), acpi_pm_device(fresh), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    out(f, EVT + 2, 0,
        2); /* the old one goes silent: the fresh one's timer was armed by the load */
    assert_false(f->rig->levels[SCI]);
    rig_advance(f->rig->env.clock, HALF_WRAP_NS);
    assert_true(f->rig->levels[SCI]);
    acpi_pm_device(fresh)->ops->destroy(acpi_pm_device(fresh));
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(power_button_raises_the_sci),   TEST(gpes_have_status_and_enable),
        TEST(sleep_type_5_powers_off),       TEST(pm_timer_counts_and_tells_of_its_top_bit),
        TEST(state_survives_the_round_trip),
    };
    return cmocka_run_group_tests_name("acpi_pm", tests, NULL, NULL);
}
