/*
 * A damaged state into the real board and the software processor: bytes of a good state are changed,
 * what loads is used (registers are read and written, timers fire, the processor runs), and what
 * doesn't is refused with one line. Then the good state must load again: it is what each input starts
 * from. An input is
 *
 *     u8 options, u8 n, n times (u16 where, u8 value), then code for the guest and accesses
 *
 * or, with OPTION_RAW, a stream as it is.
 */
#include "../unit/device_rig.h"
#include "engine/engine.h"
#include "host/log.h"
#include "machine/board.h"
#include "machine/layout.h"
#include "machine/loader.h"
#include "state/stream.h"

#include <time.h>

#define OPTION_RAW 0x01
#define OPTION_LONG_MODE 0x02
#define OPTION_RUN 0x04

/* Guest memory: RIG_MEMORY bytes at 0. */
#define PAGE_TABLES 0x1000
#define CODE 0x8000
#define RUN_NS 300000

static struct rig *rig;
static struct board *board;
static struct engine *engine;
static struct vcpu *vcpu;
static struct state_writer good;

/* ---- the machine ---- */

static int ack_extint(void *machine)
{
    return board_ack_extint(board);
}

static void eoi_broadcast(void *machine, u8 vector)
{
    board_eoi(board, vector);
}

/* Guests may run forever: a thread kicks the vCPU out all the time. */
static void *kicker(void *unused)
{
    for (;;) {
        nanosleep(&(struct timespec){.tv_nsec = RUN_NS}, NULL);
        engine_interp.vcpu_kick(vcpu);
    }
}

static void save(struct state_writer *w)
{
    struct lapic_state apic;
    struct cpu cpu;

    board_save(board, w);
    engine_interp.vcpu_get_state(vcpu, &cpu, &apic);
    state_write_section(w, &cpu_state_desc, 0, &cpu);
    state_write_section(w, &lapic_state_desc, 0, &apic);
}

static void check_refusal(const struct error *err)
{
    if (err->class != ERROR_INPUT || !err->text[0] || strchr(err->text, '\n'))
        abort();
}

/* As machine_load does. True when it was taken. */
static bool load(const u8 *data, size_t len)
{
    struct state_reader r = {.data = data, .len = len};
    struct lapic_state apic = {0};
    struct cpu cpu = {0};
    struct error err = {0};

    if (board_load(board, &r, &err) || state_read_section(&r, &cpu_state_desc, 0, &cpu, &err) ||
        state_read_section(&r, &lapic_state_desc, 0, &apic, &err) ||
        engine_interp.vcpu_set_state(vcpu, &cpu, &apic, &err) || state_read_end(&r, &err)) {
        check_refusal(&err);
        return false;
    }
    return true;
}

static void build(void)
{
    static struct e820_map e820 = {.entries = {{0, RIG_MEMORY, E820_RAM}}, .count = 1};
    struct cpuid_support support = {0};
    struct error err = {0};
    pthread_t thread;

    log_set_level(LOG_ERROR);
    rig = rig_create();
    rig->env.loop = event_loop_create(&err); /* never run: notifications stay where they are */
    engine_interp.cpuid_support(&support);
    struct engine_config config = {
        .memory = &rig->memory,
        .ports = rig->env.ports,
        .mmio = rig->env.mmio,
        .clock = rig->env.clock,
        .machine = {ack_extint, eoi_broadcast, NULL},
        .cpuid = cpuid_model_create("host", &support, 1, NS_PER_SEC, &err),
        .ncpus = 1,
    };
    engine = engine_interp.create(&config, &err);
    struct board_config board_config = {
        .env = rig->env,
        .ops = &engine_interp,
        .engine = engine,
        .power = rig_power(rig),
        .cpus = 1,
        .cpuid = config.cpuid,
        .phys_bits = cpuid_model_phys_bits(config.cpuid),
        .e820 = &e820,
        .debug_exit_port = 0xf4,
    };
    board = board_create(&board_config, &err);
    vcpu = engine_interp.vcpu_create(engine, 0, &err);
    if (!board || !vcpu || pthread_create(&thread, NULL, kicker, NULL))
        abort();
    vm_clock_set(rig->env.clock, NS_PER_SEC);
    save(&good);
}

/* ---- the guest ---- */

static void write_guest(gpa_t gpa, const void *data, size_t len)
{
    memory_write(&rig->memory, gpa, data, len);
    engine_interp.memory_written(engine, gpa, len);
}

/* Identity-mapped long mode at privilege level 0, or real mode; at CODE in either. */
static void enter(bool long_mode)
{
    const u64 tables[3] = {(PAGE_TABLES + 0x1000) | 3, (PAGE_TABLES + 0x2000) | 3, 0x83};
    struct lapic_state apic;
    struct error err;
    struct cpu cpu;

    engine_interp.vcpu_get_state(vcpu, &cpu, &apic);
    cpu.gpr[GPR_RIP] = CODE;
    cpu.gpr[RSP] = RIG_MEMORY - 16;
    cpu.seg[SEG_CS].base = 0;
    cpu.seg[SEG_CS].selector = 0;
    if (long_mode) {
        for (unsigned i = 0; i < ARRAY_SIZE(tables); i++)
            write_guest(PAGE_TABLES + i * 0x1000, &tables[i], sizeof(tables[i]));
        cpu.cr3 = PAGE_TABLES;
        cpu.cr0 = CR0_PE | CR0_PG | CR0_NE | CR0_ET;
        cpu.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXSAVE;
        cpu.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        cpu.msr.efer = EFER_LME | EFER_LMA;
        cpu.seg[SEG_CS].attr |= SEG_ATTR_L;
    }
    if (engine_interp.vcpu_set_state(vcpu, &cpu, &apic, &err))
        abort();
}

static void run(void)
{
    struct vcpu_exit exit;

    for (unsigned i = 0; i < 2; i++)
        engine_interp.vcpu_run(vcpu, &exit);
}

static const u16 ports[] = {0x20,  0x21,  0xa0,  0xa1,  0x4d0, 0x4d1, 0x40,  0x41,  0x42,  0x43,
                            0x61,  0x60,  0x64,  0x70,  0x71,  0x72,  0x73,  0x92,  0xcf9, 0x80,
                            0xf4,  0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x505,
                            0x510, 0x511, 0x514, 0x518, 0x600, 0x602, 0x604, 0x608, 0x620, 0x624};

/* Every register is read and written, in the order that the input gives, while time passes. */
static void poke(const u8 *data, size_t len)
{
    struct device_env *env = &rig->env;

    for (unsigned i = 0; i < ARRAY_SIZE(ports); i++)
        io_bus_read(env->ports, ports[i], 1);
    for (u64 reg = 0; reg < 0x200; reg += 8)
        io_bus_read(env->mmio, LAYOUT_HPET_BASE + reg, 8);
    rig_advance_bounded(env->clock, 100000000, 20);
    for (; len >= 4; data += 4, len -= 4) {
        u64 value = data[2] | data[3] << 8;

        if (data[0] & 0x80)
            io_bus_write(env->mmio, LAYOUT_HPET_BASE + (data[1] & 0x1f) * 8, value, 4);
        else if (data[0] & 0x40)
            io_bus_write(env->mmio, LAYOUT_IOAPIC_BASE + (data[1] & 1) * 0x10, value, 4);
        else
            io_bus_write(env->ports, ports[data[1] % ARRAY_SIZE(ports)], value,
                         1U << (data[0] & 1));
        rig_advance_bounded(env->clock, (u64)data[0] << (data[3] & 15), 10);
        board_ack_extint(board);
    }
}

/* ---- inputs ---- */

/* One machine for all inputs, which also lies in mappings that LeakSanitizer can't see through. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
    return "detect_leaks=0";
}

static void damaged(const u8 *data, size_t size, u8 options)
{
    struct state_writer w = {0};
    unsigned changes = size ? data[0] : 0;

    if (size)
        data++, size--;
    enter(options & OPTION_LONG_MODE);
    save(&w);
    for (; changes && size >= 3; changes--, data += 3, size -= 3)
        w.data[(data[0] | data[1] << 8) % w.len] = data[2];
    if (load(w.data, w.len)) {
        write_guest(CODE, data, MIN(size, RIG_MEMORY - CODE));
        if (options & OPTION_RUN)
            run();
        poke(data, MIN(size, 400));
        if (options & OPTION_RUN)
            run();
    }
    state_writer_free(&w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const u8 nothing[RIG_MEMORY];

    if (!size)
        return 0;
    if (!board)
        build();
    vm_clock_set(rig->env.clock, NS_PER_SEC);
    write_guest(0, nothing, sizeof(nothing));
    if (!load(good.data, good.len))
        abort();
    if (data[0] & OPTION_RAW)
        load(data + 1, size - 1);
    else
        damaged(data + 1, size - 1, data[0]);
    return 0;
}
