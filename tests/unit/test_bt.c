/*
 * Engine bt with code in RAM that others write, in ROM, and in MMIO: what runs is what is there. And what a vCPU has of
 * another's translations.
 */
#include "engine/soft/bt/bt.h"
#include "x86/regs.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

/* Each a page of 2 MiB, mapped where it is. */
#define RAM 0u
#define ROM MIB(2)
#define MMIO MIB(4)
#define PML4 0x1000u
#define PDPT 0x2000u
#define PD 0x3000u
#define STACK_TOP 0x8000u
#define LOOP 0x10000u
#define FUNCTION 0x20000u
#define PORT_END 0xf4
#define CALLS 1000
#define PATIENCE_MS 10000

struct rig {
    struct event_loop *loop;
    struct vm_clock *clock;
    struct guest_memory memory;
    struct io_bus *ports, *mmio;
    struct io_range end, device;
    struct cpuid_model *cpuid;
    struct engine *engine;
    struct vcpu *vcpus[2];
    unsigned ncpus;
    struct vcpu *vcpu; /* the one that runs */
    u8 device_code[16];
    unsigned device_reads;
};

static u64 read_device(void *opaque, u64 offset, unsigned size)
{
    struct rig *r = opaque;
    u64 value = 0;

    r->device_reads++;
    if (offset + size <= sizeof(r->device_code))
        memcpy(&value, r->device_code + offset, size);
    return value;
}
static void write_device(void *opaque, u64 offset, u64 value, unsigned size)
{
}
static u64 read_end(void *opaque, u64 offset, unsigned size)
{
    return 0;
}
static void write_end(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct rig *r = opaque;

    engine_bt.vcpu_kick(r->vcpu);
}
static const struct io_ops device_ops = {.read = read_device, .write = write_device, .max_size = 8};
static const struct io_ops end_ops = {.read = read_end, .write = write_end, .max_size = 1};

static int no_interrupt(void *machine)
{
    return -1;
}
static void no_eoi(void *machine, u8 vector)
{
}
static void memory_was_written(void *opaque, gpa_t gpa, u64 len)
{
    struct rig *r = opaque;

    engine_bt.memory_written(r->engine, gpa, len);
}

static void put(struct rig *r, gpa_t gpa, const void *bytes, size_t n)
{
    assert_int_equal(memory_write(&r->memory, gpa, bytes, n), 0);
}
static void put64(struct rig *r, gpa_t gpa, u64 value)
{
    put(r, gpa, &value, 8);
}

/* mov $value, %eax; ret */
static void make_function(u8 code[6], u32 value)
{
    code[0] = 0xb8;
    memcpy(code + 1, &value, 4);
    code[5] = 0xc3;
}
static void put_function(struct rig *r, gpa_t gpa, u32 value)
{
    u8 code[6];

    make_function(code, value);
    put(r, gpa, code, sizeof(code));
}

static int create(void **state, unsigned ncpus)
{
    /* 1: call *%rsi; add %rax, %rbx; dec %rdi; jnz 1b; out %al, $PORT_END; 2: jmp 2b */
    static const u8 loop[] = {0xff, 0xd6, 0x48, 0x01, 0xc3,     0x48, 0xff,
                              0xcf, 0x75, 0xf6, 0xe6, PORT_END, 0xeb, 0xfe};
    struct rig *r = calloc(1, sizeof(*r));
    struct cpuid_support support = {0};
    struct error err = {0};
    struct engine_config config;
    u8 *rom;

    r->loop = event_loop_create(&err);
    engine_bt.cpuid_support(&support);
    r->ports = io_bus_create("ports", 0x10000, &err);
    r->mmio = io_bus_create("mmio", BIT(40), &err);
    r->device = (struct io_range){
        .name = "device", .base = MMIO, .size = 4096, .ops = &device_ops, .opaque = r};
    r->end =
        (struct io_range){.name = "end", .base = PORT_END, .size = 1, .ops = &end_ops, .opaque = r};
    assert_int_equal(io_bus_add(r->mmio, &r->device, &err), 0);
    assert_int_equal(io_bus_add(r->ports, &r->end, &err), 0);
    assert_int_equal(memory_add_slot(&r->memory, RAM, MIB(1), 0, &err), 0);
    assert_int_equal(memory_add_slot(&r->memory, ROM, KIB(64), MEMORY_ROM, &err), 0);
    r->cpuid = cpuid_model_create("host", &support, 1, 1000000000, &err);
    r->clock = vm_clock_create(r->loop, &err);
    config = (struct engine_config){.memory = &r->memory,
                                    .ports = r->ports,
                                    .mmio = r->mmio,
                                    .clock = r->clock,
                                    .machine = {no_interrupt, no_eoi, NULL},
                                    .cpuid = r->cpuid,
                                    .ncpus = ncpus};
    r->engine = engine_bt.create(&config, &err);
    for (r->ncpus = 0; r->ncpus < ncpus; r->ncpus++) {
        r->vcpus[r->ncpus] = engine_bt.vcpu_create(r->engine, r->ncpus, &err);
        assert_non_null(r->vcpus[r->ncpus]);
    }
    r->vcpu = r->vcpus[0];
    r->memory.listener = (struct memory_listener){memory_was_written, r};
    put64(r, PML4, PDPT | 3);
    put64(r, PDPT, PD | 3);
    for (u64 n = 0; n < 3; n++)
        put64(r, PD + 8 * n, n * MIB(2) | 0x83);
    put(r, LOOP, loop, sizeof(loop));
    put_function(r, FUNCTION, 1);
    make_function(r->device_code, 5);
    rom = memory_find(&r->memory, ROM)->host;
    make_function(rom, 7);
    *state = r;
    return 0;
}

static int setup(void **state)
{
    return create(state, 1);
}

static int setup_two(void **state)
{
    return create(state, 2);
}

static int teardown(void **state)
{
    struct rig *r = *state;

    for (unsigned n = 0; n < r->ncpus; n++)
        engine_bt.vcpu_destroy(r->vcpus[n]);
    engine_bt.destroy(r->engine);
    cpuid_model_destroy(r->cpuid);
    io_bus_destroy(r->ports);
    io_bus_destroy(r->mmio);
    memory_destroy(&r->memory);
    vm_clock_destroy(r->clock);
    event_loop_destroy(r->loop);
    free(r);
    return 0;
}

static void enter(struct rig *r, gpa_t function, u64 calls)
{
    struct lapic_state apic;
    struct cpu cpu;

    engine_bt.vcpu_get_state(r->vcpu, &cpu, &apic);
    cpu.activity = CPU_RUNNING;
    cpu.cr0 = CR0_PE | CR0_PG | CR0_NE | CR0_ET;
    cpu.cr3 = PML4;
    cpu.cr4 = CR4_PAE;
    cpu.msr.efer = EFER_LME | EFER_LMA;
    cpu.seg[SEG_CS] = (struct segment){.selector = 8, .limit = UINT32_MAX, .attr = 0xa09b};
    cpu.seg[SEG_SS] = (struct segment){.selector = 16, .limit = UINT32_MAX, .attr = 0xc093};
    cpu.rflags = EFLAGS_FIXED;
    cpu.gpr[GPR_RIP] = LOOP;
    cpu.gpr[RSP] = STACK_TOP;
    cpu.gpr[RBX] = 0;
    cpu.gpr[RSI] = function;
    cpu.gpr[RDI] = calls;
    assert_int_equal(engine_bt.vcpu_set_state(r->vcpu, &cpu, &apic, &(struct error){0}), 0);
}

/* The sum of what so many calls return. */
static u64 sum(struct rig *r, gpa_t function, u64 calls)
{
    struct lapic_state apic;
    struct vcpu_exit exit;
    struct cpu cpu;

    enter(r, function, calls);
    engine_bt.vcpu_run(r->vcpu, &exit);
    assert_int_equal(exit.reason, VCPU_EXIT_KICKED);
    engine_bt.vcpu_get_state(r->vcpu, &cpu, &apic);
    return cpu.gpr[RBX];
}

static struct engine_stats stats(struct rig *r)
{
    struct engine_stats stats;

    engine_bt.stats(r->engine, &stats);
    return stats;
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
