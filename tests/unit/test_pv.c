/*
 * Steal time's structure: who sleeps says so there, and a flush that was asked for meanwhile is done. EOIs: where a
 * guest may end an interrupt in memory, and what becomes of it.
 */
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"
#include "engine/soft/pv.h"
#include "engine/soft/soft_cpuid.h"

#include "soft_rig.h"

#define STEAL 0x1000
#define EOI 0x2000
#define PREEMPTED 16 /* offset in the structure */

static void on_wake(void *opaque, enum lapic_event event, u8 vector)
{
    (void)opaque;
    (void)event;
    (void)vector;
}

static bool on_take_eoi(void *opaque)
{
    return pv_take_eoi(opaque);
}

static int set_up(void **state)
{
    static const struct lapic_ops ops = {.wake = on_wake, .take_eoi = on_take_eoi};
    struct soft_vcpu *v = soft_rig_create();
    struct lapic_config config = {.phys_bits = 40, .x2apic = true, .ops = &ops, .opaque = v};
    struct error err;

    v->engine->config.cpuid = cpuid_model_create("v2", soft_cpuid_support(), 2, 1000000000, &err);
    assert_non_null(v->engine->config.cpuid);
    v->cpuid = v->engine->config.cpuid;
    soft_tlb_init(v);
    v->engine->lapic_bus = lapic_bus_create();
    v->lapic = lapic_create(v->engine->lapic_bus, &config);
    assert_true(lapic_set_base(v->lapic, lapic_base(v->lapic) | APIC_BASE_X2APIC));
    assert_true(lapic_msr_write(v->lapic, 0x80f, 0x1ff)); /* SVR: enabled */
    *state = v;
    return 0;
}

static int tear_down(void **state)
{
    struct soft_vcpu *v = *state;

    pv_destroy(v);
    lapic_destroy(v->lapic);
    lapic_bus_destroy(v->engine->lapic_bus);
    cpuid_model_destroy((struct cpuid_model *)v->cpuid);
    soft_rig_destroy(v);
    return 0;
}

static u8 *preempted(void)
{
    return (u8 *)memory_host(&memory, STEAL + PREEMPTED, 1);
}

static void bad_addresses_are_refused(void **state)
{
    assert_false(pv_set_steal_time(*state, STEAL | 3));
    assert_false(pv_set_steal_time(*state, MIB(1) | 1));
    assert_false(pv_set_steal_time(*state, ~0x3fULL | 1));
    assert_true(pv_set_steal_time(*state, ~0x3fULL));
    assert_true(pv_set_steal_time(*state, (MIB(1) - 64) | 1));
}

static void a_sleeper_says_so_and_flushes(void **state)
{
    struct soft_vcpu *v = *state;
    u64 flushes = v->stats.tlb_flushes;

    pv_begin_sleep(v); /* off: nothing is written */
    assert_int_equal(*preempted(), 0);
    assert_true(pv_set_steal_time(v, STEAL | 1));
    pv_begin_sleep(v);
    assert_int_equal(*preempted(), 1);
    pv_end_sleep(v);
    assert_int_equal(*preempted(), 0);
    assert_int_equal(v->stats.tlb_flushes, flushes);
    pv_begin_sleep(v);
    *preempted() |= 2;
    pv_end_sleep(v);
    assert_int_equal(*preempted(), 0);
    assert_int_equal(v->stats.tlb_flushes, flushes + 1);
}

static u8 *eoi_word(void)
{
    return (u8 *)memory_host(&memory, EOI, 4);
}

static void bad_words_for_eois_are_refused(void **state)
{
    assert_false(pv_set_eoi(*state, EOI | 2));
    assert_false(pv_set_eoi(*state, MIB(1) | 1));
    assert_true(pv_set_eoi(*state, (MIB(1) - 4) | 1));
    assert_true(pv_set_eoi(*state, 0));
}

/* Sends the vCPU an interrupt of its own and takes it, as the run loop does. */
static void interrupt(struct soft_vcpu *v, u8 vector)
{
    assert_true(lapic_msr_write(v->lapic, 0x83f, vector));
    assert_int_equal(lapic_ack(v->lapic), vector);
    pv_offer_eoi(v);
}

static void an_interrupt_ends_by_the_word(void **state)
{
    struct soft_vcpu *v = *state;

    interrupt(v, 0x40); /* off: the word is left alone */
    assert_int_equal(*eoi_word(), 0);
    assert_true(lapic_msr_write(v->lapic, 0x80b, 0));

    *eoi_word() = 0xf0;
    assert_true(pv_set_eoi(v, EOI | 1));
    interrupt(v, 0x41);
    assert_int_equal(*eoi_word(), 0xf1);
    *eoi_word() = 0xf0; /* as a guest does it */
    interrupt(v, 0x42);

    assert_int_equal(*eoi_word(), 0xf1);
    lapic_sync_eoi(v->lapic); /* the guest hasn't: it has to tell the APIC */
    assert_int_equal(*eoi_word(), 0xf0);
    assert_true(lapic_msr_write(v->lapic, 0x83f, 0x43));
    assert_int_equal(lapic_deliverable(v->lapic), 0);
    assert_true(lapic_msr_write(v->lapic, 0x80b, 0));
    assert_int_equal(lapic_deliverable(v->lapic), 0x43);
}

/* The host's account of this thread only grows, and so does what the guest is told. */
static void stolen_time_grows(void **state)
{
    struct soft_vcpu *v = *state;
    u64 steal;
    u32 version;

    assert_true(pv_set_steal_time(v, STEAL | 1));
    v->steal_seen = 0; /* as if the thread had waited since */
    v->steal_looked_at = 0;
    vm_clock_set(v->engine->config.clock, NS_PER_SEC);
    pv_update_steal(v);
    assert_int_equal(memory_read(&memory, STEAL, &steal, sizeof(steal)), 0);
    assert_int_equal(memory_read(&memory, STEAL + 8, &version, sizeof(version)), 0);
    assert_int_equal(steal, v->steal_seen);
    assert_int_equal(version % 2, 0);
}

static void features_that_are_off_are_not_there(void **state)
{
    struct soft_vcpu *v = *state;

    assert_true(soft_has(v, FEATURE_KVM_STEAL_TIME));
    assert_true(soft_has(v, FEATURE_KVM_CLOCKSOURCE2));
    cpuid_model_drop_pv((struct cpuid_model *)v->cpuid, BIT32(5));
    assert_false(soft_has(v, FEATURE_KVM_STEAL_TIME));
    assert_true(soft_has(v, FEATURE_KVM_CLOCKSOURCE2));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(bad_addresses_are_refused, set_up, tear_down),
        cmocka_unit_test_setup_teardown(a_sleeper_says_so_and_flushes, set_up, tear_down),
        cmocka_unit_test_setup_teardown(bad_words_for_eois_are_refused, set_up, tear_down),
        cmocka_unit_test_setup_teardown(an_interrupt_ends_by_the_word, set_up, tear_down),
        cmocka_unit_test_setup_teardown(stolen_time_grows, set_up, tear_down),
        cmocka_unit_test_setup_teardown(features_that_are_off_are_not_there, set_up, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
