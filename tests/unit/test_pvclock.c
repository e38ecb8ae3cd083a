/*
 * The paravirtual clock: what a guest computes from the structure is the VM clock.
 */
#include "engine/soft/pvclock.h"

#include "soft_rig.h"

#define SYSTEM_TIME 0x1000
#define WALL_CLOCK 0x2000

static int set_up(void **state)
{
    struct soft_vcpu *v = soft_rig_create();

    v->engine->tsc_hz = 2596140000;
    *state = v;
    return 0;
}

static int tear_down(void **state)
{
    soft_rig_destroy(*state);
    return 0;
}

/* As Linux's pvclock_read: from a TSC value to nanoseconds, by the structure in guest memory. */
static u64 guest_time(u64 tsc)
{
    struct {
        u32 version, zero;
        u64 tsc, time;
        u32 mul;
        s8 shift;
        u8 flags;
    } t;
    u64 delta;

    assert_int_equal(memory_read(&memory, SYSTEM_TIME, &t, sizeof(t)), 0);
    assert_int_equal(t.version & 1, 0);
    assert_int_equal(t.flags, 1);
    delta = tsc - t.tsc;
    delta = t.shift < 0 ? delta >> -t.shift : delta << t.shift;
    return t.time + (u64)((u128)delta * t.mul >> 32);
}

static void computes_the_vm_clock_at_any_frequency(void **state)
{
    static const u64 hz[] = {100000000, 999999999, 1000000000, 1000000001, 2596140000, 5200000000};
    struct soft_vcpu *v = *state;

    vm_clock_set(v->engine->config.clock, 123456789);
    for (size_t i = 0; i < ARRAY_SIZE(hz); i++) {
        u64 later = 123456789 + 3600 * NS_PER_SEC, tsc, time;

        v->engine->tsc_hz = hz[i];
        v->cpu.tsc_offset = 77;
        assert_true(pvclock_set_system_time(v, SYSTEM_TIME | 1));
        tsc = clock_ns_to_ticks(later, hz[i]) + 77;
        time = guest_time(tsc);
        /* An hour off by at most 10 us: the multiplier has 32 bits. */
        assert_true(time + 10000 > later && time < later + 10000);
    }
}

static void a_changed_tsc_changes_nothing_of_the_time(void **state)
{
    struct soft_vcpu *v = *state;
    u32 before, after;

    vm_clock_set(v->engine->config.clock, 5 * NS_PER_SEC);
    assert_true(pvclock_set_system_time(v, SYSTEM_TIME | 1));
    memory_read(&memory, SYSTEM_TIME, &before, sizeof(before));
    v->cpu.tsc_offset = 1000000;
    pvclock_tsc_changed(v);
    memory_read(&memory, SYSTEM_TIME, &after, sizeof(after));
    assert_true(after > before);
    assert_int_equal(guest_time(clock_ns_to_ticks(5 * NS_PER_SEC, v->engine->tsc_hz) + 1000000),
                     5 * NS_PER_SEC);
}

static void off_writes_nothing(void **state)
{
    struct soft_vcpu *v = *state;
    u32 version = 0;

    assert_true(pvclock_set_system_time(v, SYSTEM_TIME));
    pvclock_tsc_changed(v);
    memory_read(&memory, SYSTEM_TIME, &version, sizeof(version));
    assert_int_equal(version, 0);
}

static void outside_ram_is_refused(void **state)
{
    static const u64 bad[] = {MIB(1) - 16, MIB(1), GIB(5), UINT64_MAX - 30};
    struct soft_vcpu *v = *state;

    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_false(pvclock_set_system_time(v, (bad[i] & ~1ull) | 1));
        assert_int_equal(v->cpu.msr.kvm_system_time, 0);
    }
    assert_false(pvclock_set_wall_clock(v, MIB(1) - 8));
}

static void wall_clock_is_when_the_vm_clock_was_zero(void **state)
{
    struct soft_vcpu *v = *state;
    struct vm_clock *clock = v->engine->config.clock;
    u32 wall[3];

    vm_clock_set(clock, 100 * NS_PER_SEC);
    assert_true(pvclock_set_wall_clock(v, WALL_CLOCK));
    memory_read(&memory, WALL_CLOCK, wall, sizeof(wall));
    assert_int_equal(wall[0] & 1, 0);
    assert_true(wall[1] + 100 - vm_clock_wall_ns(clock) / NS_PER_SEC <= 1);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(computes_the_vm_clock_at_any_frequency, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_changed_tsc_changes_nothing_of_the_time, set_up,
                                        tear_down),
        cmocka_unit_test_setup_teardown(off_writes_nothing, set_up, tear_down),
        cmocka_unit_test_setup_teardown(outside_ram_is_refused, set_up, tear_down),
        cmocka_unit_test_setup_teardown(wall_clock_is_when_the_vm_clock_was_zero, set_up,
                                        tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
