/*
 * Random bytes as guest code under the translator, which translates each block at once by choices that
 * the input seeds; in a build with -Daudit=true each block is audited before it runs. Nothing that a guest
 * runs may end the process, or write beyond its memory. An input is
 *
 *     u8 seed, u8 options, 16 times u8 (a register), then code
 */
#include "engine/soft/bt/bt.h"
#include "host/log.h"
#include "x86/regs.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define OPTION_USER 0x01
#define OPTION_TWO_PAGES 0x02 /* the code lies across a page's end */
#define OPTION_UNMASKED 0x04  /* MXCSR */
#define REGISTERS 16

/* Guest-physical, and linear: RAM, then MMIO, then nothing. A page of RAM can't be written. */
#define MEMORY_SIZE MIB(2)
#define MMIO MIB(2)
#define PML4 0x1000u
#define PDPT 0x2000u
#define PD 0x3000u
#define PT 0x4000u
#define GDT 0x5000u
#define IDT 0x6000u
#define TSS 0x7000u
#define STUB 0x8000u
#define STACK_TOP 0xb000u
#define READ_ONLY 0xc000u
#define CODE 0x10000u
#define PORT_END 0xf4
#define SELECTOR_CODE 0x10u
#define SELECTOR_USER_DATA 0x2bu
#define SELECTOR_USER_CODE 0x33u
#define RUN_NS 500000

/* LeakSanitizer, where it is: what the vCPU, a mapping, points to is no leak. */
void __lsan_register_root_region(const void *begin, size_t size) __attribute__((weak));

static struct guest_memory memory;
static struct io_bus *ports, *mmio;
static struct engine *engine;
static struct vcpu *vcpu;
static struct cpu start;
static struct lapic_state apic;
static u64 mmio_register;

static u64 read_any(void *opaque, u64 offset, unsigned size)
{
    return mmio_register;
}
static void write_any(void *opaque, u64 offset, u64 value, unsigned size)
{
    mmio_register = value ^ offset;
}
static u64 read_end(void *opaque, u64 offset, unsigned size)
{
    return 0;
}
static void write_end(void *opaque, u64 offset, u64 value, unsigned size)
{
    engine_bt.vcpu_kick(vcpu);
}
static const struct io_ops mmio_ops = {.read = read_any, .write = write_any, .max_size = 8};
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
    engine_bt.memory_written(engine, gpa, len);
}

/* Guests may run forever: a thread kicks the vCPU out all the time. */
static void *kicker(void *unused)
{
    for (;;) {
        nanosleep(&(struct timespec){.tv_nsec = RUN_NS}, NULL);
        engine_bt.vcpu_kick(vcpu);
    }
}

static void put64(gpa_t gpa, u64 value)
{
    memory_write(&memory, gpa, &value, 8);
}

static void put_tables(void)
{
    put64(PML4, PDPT | 7);
    put64(PDPT, PD | 7);
    put64(PD, PT | 7);
    put64(PD + 8, MMIO | 0x87);
    for (u64 n = 0; n < 512; n++)
        put64(PT + 8 * n, n * GUEST_PAGE_SIZE | (n * GUEST_PAGE_SIZE == READ_ONLY ? 5 : 7));
    put64(GDT + SELECTOR_CODE, 0x00af9b000000ffff);
    put64(GDT + (SELECTOR_USER_DATA & ~7u), 0x00cff3000000ffff);
    put64(GDT + (SELECTOR_USER_CODE & ~7u), 0x00affb000000ffff);
    for (unsigned n = 0; n < 256; n++) {
        put64(IDT + 16 * n, STUB | (u64)SELECTOR_CODE << 16 | 0xee01ULL << 32);
        put64(IDT + 16 * n + 8, 0);
    }
    put64(TSS + 4, STACK_TOP);
    put64(TSS + 36, STACK_TOP); /* IST1 */
    put64(TSS + 96, 0xffffULL << 48);
    put64(STUB, 0xfdebf4e6); /* out to PORT_END; jmp to itself */
}

static void make_start(void)
{
    engine_bt.vcpu_get_state(vcpu, &start, &apic);
    start.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    start.cr3 = PML4;
    start.cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    start.msr.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    start.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    start.gdtr = (struct descriptor_table){.base = GDT, .limit = 127};
    start.idtr = (struct descriptor_table){.base = IDT, .limit = 4095};
    start.tr = (struct segment){.selector = 0x40, .base = TSS, .limit = 0x67, .attr = 0x8b};
}

static void build(void)
{
    static struct io_range range = {.name = "mmio", .base = MMIO, .size = MIB(2), .ops = &mmio_ops};
    static struct io_range end = {.name = "end", .base = PORT_END, .size = 1, .ops = &end_ops};
    struct cpuid_support support = {0};
    struct error err = {0};
    struct event_loop *loop = event_loop_create(&err);
    struct engine_config config = {.memory = &memory, .ncpus = 1};
    pthread_t thread;
    sigset_t set;

    log_set_level(LOG_ERROR);
    engine_bt.cpuid_support(&support);
    ports = io_bus_create("ports", 0x10000, &err);
    mmio = io_bus_create("mmio", BIT(40), &err);
    if (!loop || !ports || !mmio || io_bus_add(mmio, &range, &err) ||
        io_bus_add(ports, &end, &err) || memory_add_slot(&memory, 0, MEMORY_SIZE, 0, &err))
        abort();
    config.ports = ports;
    config.mmio = mmio;
    config.clock = vm_clock_create(loop, &err);
    config.machine = (struct engine_machine_ops){no_interrupt, no_eoi, NULL};
    config.cpuid = cpuid_model_create("host", &support, 1, NS_PER_SEC, &err);
    config.checks.seed = 1;
    engine = engine_bt.create(&config, &err);
    vcpu = engine ? engine_bt.vcpu_create(engine, 0, &err) : NULL;
    if (!vcpu || pthread_create(&thread, NULL, kicker, NULL))
        abort();
    memory.listener = (struct memory_listener){memory_was_written, NULL};
    if (__lsan_register_root_region)
        __lsan_register_root_region(vcpu, sizeof(struct soft_vcpu));
    /* The fuzzer's alarm must not come on a stack that the guest chose: the other thread takes it. */
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    make_start();
}

/* Into RAM, its edges, MMIO, and numbers small and large. */
static u64 register_value(u8 byte)
{
    static const u64 bases[] = {CODE, READ_ONLY - 4, MEMORY_SIZE - 8, MMIO + 64, 0,
                                1,    ~0ULL,         BIT(63)};

    return bases[byte & 7] + (byte >> 3) * 4;
}

static void enter(const u8 *data, u8 options)
{
    struct cpu cpu = start;
    bool user = options & OPTION_USER;

    for (unsigned n = 0; n < REGISTERS; n++)
        cpu.gpr[n] = register_value(data[n]);
    cpu.gpr[GPR_RIP] = options & OPTION_TWO_PAGES ? CODE + GUEST_PAGE_SIZE - 13 : CODE;
    cpu.rflags = EFLAGS_FIXED;
    cpu.mxcsr = options & OPTION_UNMASKED ? 0 : 0x1f80;
    cpu.seg[SEG_CS] = (struct segment){.selector = user ? SELECTOR_USER_CODE : SELECTOR_CODE,
                                       .limit = UINT32_MAX,
                                       .attr = user ? 0xa0fb : 0xa09b};
    cpu.seg[SEG_SS] = (struct segment){.selector = user ? SELECTOR_USER_DATA : 0,
                                       .limit = UINT32_MAX,
                                       .attr = user ? 0xc0f3 : 0xc093};
    cpu.seg[SEG_FS].base = CODE + 64;
    cpu.seg[SEG_GS].base = MMIO;
    if (engine_bt.vcpu_set_state(vcpu, &cpu, &apic, &(struct error){0}))
        abort();
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t len);
int LLVMFuzzerTestOneInput(const u8 *data, size_t len)
{
    static u8 code[4 * GUEST_PAGE_SIZE];
    struct bt *bt;
    struct vcpu_exit exit;
    u8 options;

    if (!vcpu)
        build();
    if (len < 2 + REGISTERS || len > 512)
        return -1;
    bt = ((struct soft_vcpu *)vcpu)->bt;
    bt->choices = bt_choose(&(struct engine_checks){.seed = 1u + data[0]});
    bt->choices.hot_runs = 0;
    options = data[1];
    put_tables();
    memset(code, 0xcc, sizeof(code));
    memcpy(code + (options & OPTION_TWO_PAGES ? GUEST_PAGE_SIZE - 13 : 0), data + 2 + REGISTERS,
           len - 2 - REGISTERS);
    memory_write(&memory, CODE, code, sizeof(code));
    enter(data + 2, options);
    for (unsigned n = 0; n < 2; n++)
        engine_bt.vcpu_run(vcpu, &exit);
    return 0;
}
