/*
 * Loops of PAUSE: who spins for long gives way, and has the APIC timer looked at each time, for giving way may take
 * long; who spins for a moment, or alone, does neither.
 */
#include "engine/soft/wait.h"

#include "soft_rig.h"

#define BLOCKS 256
#define PAUSES_MAX 100000000u
#define GIVEN_WAY 5

static int setup(void **state)
{
    struct soft_vcpu *v = soft_rig_create();

    v->engine->config.ncpus = 2;
    v->poll = BLOCKS;
    *state = v;
    return 0;
}

static int teardown(void **state)
{
    soft_rig_destroy(*state);
    return 0;
}

static void long_loop_gives_way(void **state)
{
    struct soft_vcpu *v = *state;

    for (unsigned n = 0; v->stats.spins < GIVEN_WAY; n++) {
        u64 before = v->stats.spins;

        assert_true(n < PAUSES_MAX);
        soft_pause(v);
        assert_int_equal(v->poll, v->stats.spins > before ? 0 : BLOCKS);
        v->poll = BLOCKS;
    }
}

static void short_loop_does_not(void **state)
{
    struct soft_vcpu *v = *state;

    soft_pause(v);
    assert_int_equal(v->stats.spins, 0);
    assert_int_equal(v->poll, BLOCKS);
}

static void alone_nobody_is_waited_for(void **state)
{
    struct soft_vcpu *v = *state;

    v->engine->config.ncpus = 1;
    for (unsigned n = 0; n < 10000; n++)
        soft_pause(v);
    assert_int_equal(v->stats.spins, 0);
    assert_int_equal(v->poll, BLOCKS);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(long_loop_gives_way),
        TEST(short_loop_does_not),
        TEST(alone_nobody_is_waited_for),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
