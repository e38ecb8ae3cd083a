/*
 * Engine bt with code in RAM that others write, in ROM, and in MMIO: what runs is what is there. And what a vCPU has of
 * another's translations.
 */
#include "bt_rig.h"

#include <pthread.h>
#include <time.h>

#define CALLS 1000
#define PATIENCE_MS 10000

static int setup(void **state)
{
    *state = rig_create(1, 0);
    return 0;
}

static int setup_two(void **state)
{
    *state = rig_create(2, 0);
    return 0;
}

static int teardown(void **state)
{
    rig_destroy(*state);
    return 0;
}

static u64 translated(struct rig *r)
{
    return stats(r).blocks_translated;
}

static void code_written_by_another(void **state)
{
    struct rig *r = *state;
    u64 before;

    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS);
    assert_true(translated(r) > 0);
    before = translated(r);
    put_function(r, FUNCTION, 3);
    assert_int_equal(sum(r, FUNCTION, CALLS), 3 * CALLS);
    assert_true(translated(r) > before);
}

static void code_in_rom(void **state)
{
    struct rig *r = *state;
    u64 before;

    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS); /* what calls is translated */
    before = translated(r);
    assert_int_equal(sum(r, ROM, CALLS), 7 * CALLS);
    assert_true(translated(r) > before);
}

/* A device may answer otherwise each time, so nothing of it is kept. */
static void code_in_mmio(void **state)
{
    struct rig *r = *state;
    unsigned reads;

    assert_int_equal(sum(r, MMIO, CALLS), 5 * CALLS);
    reads = r->device_reads;
    assert_true(reads >= 6 * CALLS);
    make_function(r->device_code, 6);
    assert_int_equal(sum(r, MMIO, CALLS), 6 * CALLS);
    assert_true(r->device_reads >= reads + 6 * CALLS);
}

/* Makes the function clear RDI's last lap: "mov $1, %edi; ret", while the guest runs it all the time. */
static void *patch_later(void *opaque)
{
    static const u8 code[] = {0xbf, 1, 0, 0, 0, 0xc3};
    struct rig *r = opaque;

    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    memory_write(&r->memory, FUNCTION, code, sizeof(code));
    return NULL;
}

/* A loop of chained blocks that ends only when it sees its new code. */
static void running_code_written_by_another(void **state)
{
    struct rig *r = *state;
    struct vcpu_exit exit;
    pthread_t thread;

    enter(r, FUNCTION, UINT64_MAX);
    assert_int_equal(pthread_create(&thread, NULL, patch_later, r), 0);
    engine_bt.vcpu_run(r->vcpu, &exit); /* the test's time is bounded */
    pthread_join(thread, NULL);
    assert_int_equal(exit.reason, VCPU_EXIT_KICKED);
}

static void *kick_later(void *opaque)
{
    struct rig *r = opaque;

    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    engine_bt.vcpu_kick(r->vcpu);
    return NULL;
}

static u64 now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (u64)ts.tv_sec * 1000000000 + (u64)ts.tv_nsec;
}

/* A kick ends a loop that looks at nothing, and leaves it in the midst: it goes on from there. */
static void kick_of_a_loop(void **state)
{
    struct rig *r = *state;
    struct lapic_state apic;
    struct vcpu_exit exit;
    struct cpu before, after;
    pthread_t thread;
    u64 begin = now_ns();

    enter(r, FUNCTION, UINT64_MAX);
    assert_int_equal(pthread_create(&thread, NULL, kick_later, r), 0);
    engine_bt.vcpu_run(r->vcpu, &exit);
    pthread_join(thread, NULL);
    assert_true(now_ns() - begin < PATIENCE_MS * 1000000ULL);
    assert_int_equal(exit.reason, VCPU_EXIT_KICKED);
    engine_bt.vcpu_get_state(r->vcpu, &before, &apic);
    /* Each lap adds 1 to RBX and takes 1 from RDI: they are at most one apart. */
    assert_true(UINT64_MAX - before.gpr[RDI] - before.gpr[RBX] + 1 <= 2);
    assert_int_equal(pthread_create(&thread, NULL, kick_later, r), 0);
    engine_bt.vcpu_run(r->vcpu, &exit);
    pthread_join(thread, NULL);
    engine_bt.vcpu_get_state(r->vcpu, &after, &apic);
    assert_true(after.gpr[RBX] > before.gpr[RBX]);
}

/* What one vCPU found hot, the other has at first sight: it interprets none of it. */
static void code_that_another_translated(void **state)
{
    struct rig *r = *state;
    struct engine_stats before, after;

    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS);
    before = stats(r);
    assert_int_equal(before.blocks_adopted, 0);
    r->vcpu = r->vcpus[1];
    assert_int_equal(sum(r, FUNCTION, 1), 1);
    after = stats(r);
    assert_int_equal(after.blocks_translated, before.blocks_translated);
    assert_true(after.blocks_adopted >= 2); /* the function, and what calls it */
    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS);
}

/* The copy is of code that isn't there any more. */
static void code_changed_before_it_is_adopted(void **state)
{
    struct rig *r = *state;
    u64 before;

    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS);
    put_function(r, FUNCTION, 3);
    before = translated(r);
    r->vcpu = r->vcpus[1];
    assert_int_equal(sum(r, FUNCTION, CALLS), 3 * CALLS);
    assert_true(translated(r) > before);
    r->vcpu = r->vcpus[0]; /* which has the new one from the other, in the place of the old one */
    before = translated(r);
    assert_int_equal(sum(r, FUNCTION, CALLS), 3 * CALLS);
    assert_int_equal(translated(r), before);
}

/* A copy is protected as what it was made from is. */
static void code_changed_after_it_was_adopted(void **state)
{
    struct rig *r = *state;

    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS);
    r->vcpu = r->vcpus[1];
    assert_int_equal(sum(r, FUNCTION, CALLS), CALLS);
    put_function(r, FUNCTION, 4);
    assert_int_equal(sum(r, FUNCTION, CALLS), 4 * CALLS);
    r->vcpu = r->vcpus[0];
    assert_int_equal(sum(r, FUNCTION, CALLS), 4 * CALLS);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
#define TEST_TWO(name) cmocka_unit_test_setup_teardown(name, setup_two, teardown)
    const struct CMUnitTest tests[] = {
        TEST(code_written_by_another),
        TEST(code_in_rom),
        TEST(code_in_mmio),
        TEST(running_code_written_by_another),
        TEST(kick_of_a_loop),
        TEST_TWO(code_that_another_translated),
        TEST_TWO(code_changed_before_it_is_adopted),
        TEST_TWO(code_changed_after_it_was_adopted),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
