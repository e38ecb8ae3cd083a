/*
 * A machine of engine bt whose guest calls a function over and over: with code in RAM, in ROM and in MMIO.
 */
#ifndef DOPPEL_TESTS_UNIT_BT_RIG_H
#define DOPPEL_TESTS_UNIT_BT_RIG_H

#include "engine/soft/bt/bt.h"
#include "x86/regs.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

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

static inline u64 read_device(void *opaque, u64 offset, unsigned size)
{
    struct rig *r = opaque;
    u64 value = 0;

    r->device_reads++;
    if (offset + size <= sizeof(r->device_code))
        memcpy(&value, r->device_code + offset, size);
    return value;
}
static inline void write_device(void *opaque, u64 offset, u64 value, unsigned size)
{
}
static inline u64 read_end(void *opaque, u64 offset, unsigned size)
{
    return 0;
}
static inline void write_end(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct rig *r = opaque;

    engine_bt.vcpu_kick(r->vcpu);
}
static const struct io_ops device_ops = {.read = read_device, .write = write_device, .max_size = 8};
static const struct io_ops end_ops = {.read = read_end, .write = write_end, .max_size = 1};

static inline int no_interrupt(void *machine)
{
    return -1;
}
static inline void no_eoi(void *machine, u8 vector)
{
}
static inline void memory_was_written(void *opaque, gpa_t gpa, u64 len)
{
    struct rig *r = opaque;

    engine_bt.memory_written(r->engine, gpa, len);
}

static inline void put(struct rig *r, gpa_t gpa, const void *bytes, size_t n)
{
    assert_int_equal(memory_write(&r->memory, gpa, bytes, n), 0);
}
static inline void put64(struct rig *r, gpa_t gpa, u64 value)
{
    put(r, gpa, &value, 8);
}

/* mov $value, %eax; ret */
static inline void make_function(u8 code[6], u32 value)
{
    code[0] = 0xb8;
    memcpy(code + 1, &value, 4);
    code[5] = 0xc3;
}
static inline void put_function(struct rig *r, gpa_t gpa, u32 value)
{
    u8 code[6];

    make_function(code, value);
    put(r, gpa, code, sizeof(code));
}

/* seed: of engine_checks. For rig_destroy. */
static inline struct rig *rig_create(unsigned ncpus, u64 seed)
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
                                    .ncpus = ncpus,
                                    .checks = {.seed = seed}};
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
    return r;
}

static inline void rig_destroy(struct rig *r)
{
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
}

static inline void enter(struct rig *r, gpa_t function, u64 calls)
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
static inline u64 sum(struct rig *r, gpa_t function, u64 calls)
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

static inline struct engine_stats stats(struct rig *r)
{
    struct engine_stats stats;

    engine_bt.stats(r->engine, &stats);
    return stats;
}

#endif
