/* pvpanic: what it announces, and what it passes on. */
#include "device/pvpanic.h"
#include "device_rig.h"

#include <setjmp.h>
#include <stdarg.h>

#include <cmocka.h>

static void passes_on_panics_only(void **state)
{
    struct rig *r = rig_create();
    struct pvpanic_config cfg = {.port = 0x505, .power = rig_power(r)};
    struct pvpanic *p = pvpanic_create(&r->env, &cfg, &r->err);

    assert_non_null(p);
    assert_int_equal(io_bus_read(r->env.ports, 0x505, 1), 3);
    io_bus_write(r->env.ports, 0x505, PVPANIC_CRASH_LOADED, 1);
    io_bus_write(r->env.ports, 0x505, 0xf0, 1);
    assert_int_equal(r->power_requests, 0);
    io_bus_write(r->env.ports, 0x505, PVPANIC_PANICKED, 1);
    assert_int_equal(r->power_requests, 1);
    assert_int_equal(r->power, POWER_PANICKED);
    assert_int_equal(r->power_value, PVPANIC_PANICKED);

    /* No state, but a table that says so, and a port that can't be taken twice. */
    assert_int_equal(state_size(pvpanic_device(p)->state), 0);
    assert_int_equal(state_desc_check(pvpanic_device(p)->state, &r->err), 0);
    assert_null(pvpanic_create(&r->env, &cfg, &r->err));
    pvpanic_device(p)->ops->destroy(pvpanic_device(p));
    rig_destroy(r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(passes_on_panics_only)};

    return cmocka_run_group_tests_name("pvpanic", tests, NULL, NULL);
}
