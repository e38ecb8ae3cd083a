/*
 * doppel's side of the oracle test.
 *
 * Guest-physical memory holds page tables, a GDT as Linux has it, an IDT whose every gate leads to a stub
 * of its own in ring 0, and the case's pages. A stub writes to the port of its vector's number, which
 * kicks the vCPU out. What an exception pushed is then read from the ring-0 stack.
 */
#include "guest.h"

#include "engine/engine.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Guest-physical places. The kernel half of the linear addresses maps them at KERNEL + gpa. */
#define KERNEL 0xffff800000000000ULL
#define PML4 0x1000u
#define PDPT_USER 0x2000u
#define PD_USER 0x3000u
#define PT_CODE 0x4000u
#define PT_WINDOW 0x5000u
#define PDPT_KERNEL 0x6000u
#define PD_KERNEL 0x7000u
#define GDT 0x9000u
#define IDT 0xa000u
#define TSS 0xb000u
#define STUBS 0xc000u
#define STACK_TOP 0xf000u
#define CODE_GPA(page) (0x18000u - (page)*0x4000u) /* not in the order of the linear addresses */
#define WINDOW_GPA 0x20000u
#define MEMORY_SIZE MIB(2)

#define STUB_SIZE 4
#define TSS_SELECTOR 0x40u

#define CPUS_MAX 2

struct guest {
    const struct engine_ops *ops;
    struct event_loop *loop;
    struct vm_clock *clock;
    struct guest_memory memory;
    struct io_bus *ports, *mmio;
    struct io_range range;
    struct cpuid_model *cpuid;
    struct engine *engine;
    struct vcpu *vcpus[CPUS_MAX];
    unsigned ncpus;
    struct vcpu *vcpu; /* whose turn it is */
    u64 runs;
    struct cpu start;
    struct lapic_state apics[CPUS_MAX]; /* at the start, too */
    u8 code[CODE_SIZE];                 /* what the code pages hold */
    u64 flags;                          /* those that can be compared */
    int vector;                         /* of the stub that wrote its port; -1: none did */
    bool kicked;                        /* from time to time, by the kicker */
    _Atomic bool kicking;
    pthread_t kicker;
};

/* --- Guest memory --- */

static void put64(struct guest *g, gpa_t gpa, u64 value)
{
    memory_write(&g->memory, gpa, &value, 8);
}

static void put_page_tables(struct guest *g)
{
    const u64 table = PTE_P | PTE_W | PTE_U | PTE_A;
    const u64 page = PTE_P | PTE_U | PTE_A | PTE_D;

    put64(g, PML4, PDPT_USER | table);
    put64(g, PDPT_USER, PD_USER | table);
    put64(g, PD_USER + (CODE >> 21) * 8, PT_CODE | table);
    put64(g, PD_USER + (WINDOW >> 21) * 8, PT_WINDOW | table);
    for (unsigned n = 0; n < CODE_PAGES; n++)
        put64(g, PT_CODE + 8 * n, CODE_GPA(n) | page);
    for (unsigned n = 0; n < WINDOW_PAGES; n++) {
        u64 access = n == WINDOW_READ_ONLY ? PTE_NX : PTE_NX | PTE_W;

        if (n != 3 && n != 5)
            put64(g, PT_WINDOW + 8 * n, (WINDOW_GPA + n * PAGE) | page | access);
    }
    put64(g, PML4 + 256 * 8, PDPT_KERNEL | table);
    put64(g, PDPT_KERNEL, PD_KERNEL | table);
    put64(g, PD_KERNEL, PTE_P | PTE_W | PTE_PS | PTE_A | PTE_D);
}

/* As Linux on x86-64 lays it out (arch/x86/include/asm/segment.h), less the TLS entries. */
static void put_descriptors(struct guest *g)
{
    static const u64 gdt[16] = {
        [1] = 0x00cf9b000000ffff,
        [2] = 0x00af9b000000ffff,
        [3] = 0x00cf93000000ffff,
        [4] = 0x00cffb000000ffff,
        [5] = 0x00cff3000000ffff,
        [6] = 0x00affb000000ffff,
        [TSS_SELECTOR / 8] = 0x00008b0000004087 | (u64)TSS << 16,
        [9] = KERNEL >> 32,
        [15] = 0x0040f50000000000, /* the processor's number in its limit */
    };

    memory_write(&g->memory, GDT, gdt, sizeof(gdt));
    for (unsigned n = 0; n < 256; n++) {
        u64 stub = KERNEL + STUBS + n * STUB_SIZE;
        u64 dpl = n == 3 || n == 4 ? 3 : 0;
        const u8 code[STUB_SIZE] = {0xe6, (u8)n, 0xeb, 0xfe}; /* OUT n, AL; JMP to itself */

        put64(g, IDT + 16 * n,
              (stub & 0xffff) | 0x10 << 16 | (0x8e00 | dpl << 13) << 32 |
                  (stub >> 16 & 0xffff) << 48);
        put64(g, IDT + 16 * n + 8, stub >> 32);
        memory_write(&g->memory, STUBS + n * STUB_SIZE, code, sizeof(code));
    }
    put64(g, TSS + 4, KERNEL + STACK_TOP); /* RSP0 */
    put64(g, TSS + 96, 0xffffULL << 48);   /* the I/O map is beyond the limit */
}

/* --- The vCPU --- */

static struct segment segment_of(struct guest *g, u16 selector)
{
    struct segment s = {.selector = selector};
    u64 d = 0;

    memory_read(&g->memory, GDT + (selector & ~7u), &d, 8);
    s.base = descriptor_base(d);
    s.limit = descriptor_limit(d);
    s.attr = descriptor_attr(d);
    return s;
}

/* Bits of CR4 as a kernel sets them: those of the processor's that it knows. */
static u64 known_cr4(const struct cpuid_model *cpuid)
{
    static const struct {
        enum cpuid_feature feature;
        u64 bit;
    } optional[] = {
        {FEATURE_UMIP, CR4_UMIP},
        {FEATURE_FSGSBASE, CR4_FSGSBASE},
        {FEATURE_SMEP, CR4_SMEP},
        {FEATURE_SMAP, CR4_SMAP},
    };
    u64 cr4 = 0;

    for (unsigned n = 0; n < ARRAY_SIZE(optional); n++) {
        if (cpuid_model_has(cpuid, optional[n].feature))
            cr4 |= optional[n].bit;
    }
    return cr4;
}

static void make_start(struct guest *g, const struct host *host)
{
    struct cpu *cpu = &g->start;

    for (unsigned n = g->ncpus; n-- > 0;) /* the first is the start's */
        g->ops->vcpu_get_state(g->vcpus[n], cpu, &g->apics[n]);
    cpu->cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG;
    cpu->cr3 = PML4;
    cpu->cr4 = CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_OSFXSR | CR4_OSXMMEXCPT |
               CR4_OSXSAVE | known_cr4(g->cpuid);
    cpu->msr.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    if (host->xcr0 & XCR0_PKRU)
        cpu->cr4 |= CR4_PKE;
    cpu->xcr0 = cpuid_model_xcr0(g->cpuid) & host->xcr0;
    cpu->gdtr = (struct descriptor_table){.base = KERNEL + GDT, .limit = 127};
    cpu->idtr = (struct descriptor_table){.base = KERNEL + IDT, .limit = 4095};
    cpu->tr = segment_of(g, TSS_SELECTOR);
    cpu->tr.base = KERNEL + TSS;
    cpu->ldtr = (struct segment){.attr = SEG_ATTR_UNUSABLE};
}

static u64 read_out(void *opaque, u64 offset, unsigned size)
{
    return UINT64_MAX;
}
static void write_out(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct guest *g = opaque;

    g->vector = (int)offset;
    g->ops->vcpu_kick(g->vcpu);
}
static const struct io_ops out_ops = {.read = read_out, .write = write_out, .max_size = 1};

static int no_interrupt(void *machine)
{
    return -1;
}
static void no_eoi(void *machine, u8 vector)
{
}

static void memory_was_written(void *opaque, gpa_t gpa, u64 len)
{
    struct guest *g = opaque;

    g->ops->memory_written(g->engine, gpa, len);
}

static int create_machine(struct guest *g, struct error *err)
{
    struct cpuid_support support;

    g->loop = event_loop_create(err);
    g->clock = g->loop ? vm_clock_create(g->loop, err) : NULL;
    g->ports = io_bus_create("ports", 0x10000, err);
    g->mmio = io_bus_create("mmio", BIT(40), err);
    if (!g->clock || !g->ports || !g->mmio)
        return -1;
    g->range =
        (struct io_range){.name = "stubs", .base = 0, .size = 256, .ops = &out_ops, .opaque = g};
    if (io_bus_add(g->ports, &g->range, err) < 0 ||
        memory_add_slot(&g->memory, 0, MEMORY_SIZE, 0, err) < 0)
        return -1;
    g->ops->cpuid_support(&support);
    g->cpuid = cpuid_model_create("host", &support, 1, host_tsc_hz(), err);
    return g->cpuid ? 0 : -1;
}

static int create_vcpus(struct guest *g, unsigned ncpus, struct error *err)
{
    for (; g->ncpus < ncpus; g->ncpus++) {
        g->vcpus[g->ncpus] = g->ops->vcpu_create(g->engine, g->ncpus, err);
        if (!g->vcpus[g->ncpus])
            return -1;
    }
    g->vcpu = g->vcpus[0];
    return 0;
}

struct guest *guest_create(const char *engine, const struct host *host, const u8 *read_only,
                           unsigned ncpus, struct error *err)
{
    struct guest *g = calloc(1, sizeof(*g));
    struct engine_config config;
    struct engine_checks checks;

    if (!g) {
        error_host(err, ENOMEM, "can't make the guest");
        return NULL;
    }
    g->ops = engine_choose(engine, &checks, err);
    if (!g->ops || create_machine(g, err) < 0)
        goto fail;
    config = (struct engine_config){
        .memory = &g->memory,
        .ports = g->ports,
        .mmio = g->mmio,
        .clock = g->clock,
        .machine = {no_interrupt, no_eoi, g},
        .cpuid = g->cpuid,
        .ncpus = ncpus,
        .checks = checks,
    };
    g->engine = g->ops->create(&config, err);
    if (!g->engine || create_vcpus(g, ncpus, err) < 0)
        goto fail;
    g->memory.listener = (struct memory_listener){memory_was_written, g};
    vm_clock_start(g->clock);
    put_page_tables(g);
    put_descriptors(g);
    memory_write(&g->memory, WINDOW_GPA + WINDOW_READ_ONLY * PAGE, read_only, PAGE);
    make_start(g, host);
    g->flags = host->sets_rf ? UINT64_MAX : ~(u64)EFLAGS_RF;
    return g;
fail:
    guest_destroy(g);
    return NULL;
}

#define KICK_NS 20000

static void *kick(void *opaque)
{
    const struct timespec wait = {.tv_nsec = KICK_NS};
    struct guest *g = opaque;

    while (atomic_load(&g->kicking)) {
        nanosleep(&wait, NULL);
        for (unsigned n = 0; n < g->ncpus; n++)
            g->ops->vcpu_kick(g->vcpus[n]);
    }
    return NULL;
}

int guest_start_kicks(struct guest *g)
{
    int error;

    atomic_store(&g->kicking, true);
    error = pthread_create(&g->kicker, NULL, kick, g);
    g->kicked = !error;
    return -error;
}

void guest_destroy(struct guest *g)
{
    if (g->kicked) {
        atomic_store(&g->kicking, false);
        pthread_join(g->kicker, NULL);
    }
    for (unsigned n = 0; n < g->ncpus; n++)
        g->ops->vcpu_destroy(g->vcpus[n]);
    if (g->engine)
        g->ops->destroy(g->engine);
    if (g->cpuid)
        cpuid_model_destroy(g->cpuid);
    if (g->ports)
        io_bus_destroy(g->ports);
    if (g->mmio)
        io_bus_destroy(g->mmio);
    if (g->clock)
        vm_clock_destroy(g->clock);
    if (g->loop)
        event_loop_destroy(g->loop);
    memory_destroy(&g->memory);
    free(g);
}

/* --- One case --- */

static unsigned top_of(u16 fsw)
{
    return fsw >> 11 & 7;
}

/* The full tag of a register (SDM vol. 1, 8.1.7): 0 valid, 1 zero, 2 special, 3 empty. */
static unsigned full_tag(const u8 *value, bool used)
{
    u64 significand;
    u16 exponent;

    memcpy(&significand, value, 8);
    memcpy(&exponent, value + 8, 2);
    exponent &= 0x7fff;
    if (!used)
        return 3;
    if (exponent == 0)
        return significand ? 2 : 1;
    return exponent == 0x7fff || !(significand & BIT(63)) ? 2 : 0;
}

static void set_state(struct guest *g, unsigned vcpu, const struct user_state *s)
{
    struct cpu cpu = g->start;
    unsigned top = top_of(s->fsw);

    memcpy(cpu.gpr, s->gpr, sizeof(s->gpr));
    cpu.gpr[GPR_RIP] = s->rip;
    cpu.rflags = s->rflags | EFLAGS_IF | EFLAGS_FIXED;
    cpu.seg[SEG_ES] = segment_of(g, s->es);
    cpu.seg[SEG_CS] = segment_of(g, s->cs);
    cpu.seg[SEG_SS] = segment_of(g, s->ss);
    cpu.seg[SEG_DS] = segment_of(g, s->ds);
    cpu.seg[SEG_FS] = (struct segment){.base = s->fs_base, .attr = SEG_ATTR_UNUSABLE};
    cpu.seg[SEG_GS] = (struct segment){.base = s->gs_base, .attr = SEG_ATTR_UNUSABLE};
    cpu.fcw = s->fcw;
    cpu.fsw = s->fsw;
    cpu.fop = s->fop;
    cpu.fip = s->fip;
    cpu.fdp = s->fdp;
    cpu.mxcsr = s->mxcsr;
    cpu.pkru = s->pkru;
    cpu.ftw = 0;
    for (unsigned n = 0; n < 8; n++) {
        unsigned r = (top + n) & 7;

        memcpy(cpu.fpr[r], s->st[n], 16);
        cpu.ftw |= (u16)(full_tag(s->st[n], s->ftw >> r & 1) << 2 * r);
    }
    memcpy(cpu.vec, s->vec, sizeof(cpu.vec));
    memcpy(cpu.k, s->k, sizeof(cpu.k));
    g->ops->vcpu_set_state(g->vcpus[vcpu], &cpu, &g->apics[vcpu], &(struct error){0});
}

static bool has_error_code(int vector)
{
    return vector == EXC_DF || (vector >= EXC_TS && vector <= EXC_PF) || vector == EXC_AC;
}

static void get_state(struct guest *g, struct outcome *out)
{
    struct user_state *s = &out->after;
    struct lapic_state apic;
    struct cpu cpu;
    u64 frame[6] = {0}; /* error code, RIP, CS, RFLAGS, RSP, SS */

    g->ops->vcpu_get_state(g->vcpu, &cpu, &apic);
    memset(s, 0, sizeof(*s));
    if (has_error_code(g->vector))
        memory_read(&g->memory, STACK_TOP - 48, frame, 48);
    else
        memory_read(&g->memory, STACK_TOP - 40, frame + 1, 40);
    memcpy(s->gpr, cpu.gpr, sizeof(s->gpr));
    s->gpr[RSP] = frame[4];
    s->rip = frame[1];
    s->rflags = frame[3] & g->flags;
    s->cs = (u16)frame[2];
    s->ss = (u16)frame[5];
    s->ds = cpu.seg[SEG_DS].selector;
    s->es = cpu.seg[SEG_ES].selector;
    s->fs = cpu.seg[SEG_FS].selector;
    s->gs = cpu.seg[SEG_GS].selector;
    s->fs_base = cpu.seg[SEG_FS].base;
    s->gs_base = cpu.seg[SEG_GS].base;
    s->fcw = cpu.fcw;
    s->fsw = cpu.fsw;
    s->fop = cpu.fop;
    s->fip = cpu.fip;
    s->fdp = cpu.fdp;
    s->mxcsr = cpu.mxcsr;
    s->pkru = cpu.pkru;
    for (unsigned n = 0; n < 8; n++) {
        memcpy(s->st[n], cpu.fpr[(top_of(cpu.fsw) + n) & 7], 10);
        if ((cpu.ftw >> 2 * n & 3) != 3)
            s->ftw |= (u8)(1 << n);
    }
    memcpy(s->vec, cpu.vec, sizeof(s->vec));
    memcpy(s->k, cpu.k, sizeof(s->k));
    out->vector = (u8)g->vector;
    out->error = (u32)frame[0];
    out->cr2 = g->vector == EXC_PF ? cpu.cr2 : 0;
}

static gpa_t window_gpa(unsigned image_offset)
{
    return WINDOW_GPA + writable_pages[image_offset / PAGE] * PAGE + image_offset % PAGE;
}

/* Into the guest's pages, unless it is there already: then the engine can go on with what it made of
 * it. */
static void set_code(struct guest *g, const struct test_case *c)
{
    u8 code[CODE_SIZE];

    memset(code, INT3, CODE_SIZE);
    memcpy(code + c->code_offset, c->code, MIN(CODE_SIZE - c->code_offset, c->code_len));
    for (unsigned n = 0; n < CODE_PAGES; n++) {
        if (!memcmp(g->code + n * PAGE, code + n * PAGE, PAGE))
            continue;
        memcpy(g->code + n * PAGE, code + n * PAGE, PAGE);
        memory_write(&g->memory, CODE_GPA(n), code + n * PAGE, PAGE);
    }
}

/* Out and in again: the whole state is there between any two instructions. */
static void move_state(struct guest *g)
{
    struct lapic_state apic;
    struct cpu cpu;

    g->ops->vcpu_get_state(g->vcpu, &cpu, &apic);
    g->ops->vcpu_set_state(g->vcpu, &cpu, &apic, &(struct error){0});
}

void guest_run(struct guest *g, const struct test_case *c, const u8 *image, struct outcome *out)
{
    unsigned turn = (unsigned)(g->runs++ % g->ncpus);
    struct vcpu_exit exit = {0};

    g->vcpu = g->vcpus[turn];
    set_code(g, c);
    for (unsigned n = 0; n < WRITABLE_PAGES; n++)
        memory_write(&g->memory, window_gpa(n * PAGE), image + n * PAGE, PAGE);
    for (unsigned n = 0; n < c->npokes; n++)
        put64(g, window_gpa(c->pokes[n].offset), c->pokes[n].value);
    set_state(g, turn, &c->before);

    g->vector = -1;
    g->ops->vcpu_run(g->vcpu, &exit);
    while (g->kicked && exit.reason == VCPU_EXIT_KICKED && g->vector < 0) {
        move_state(g);
        g->ops->vcpu_run(g->vcpu, &exit);
    }
    out->lost = exit.reason != VCPU_EXIT_KICKED || g->vector < 0;
    if (out->lost)
        return;
    get_state(g, out);
    for (unsigned n = 0; n < WRITABLE_PAGES; n++)
        memory_read(&g->memory, window_gpa(n * PAGE), out->window + n * PAGE, PAGE);
}

u64 guest_translated(struct guest *g)
{
    struct engine_stats stats = {0};

    g->ops->stats(g->engine, &stats);
    return stats.blocks_translated;
}

u64 guest_adopted(struct guest *g)
{
    struct engine_stats stats = {0};

    g->ops->stats(g->engine, &stats);
    return stats.blocks_adopted;
}

const char *guest_engine(unsigned n)
{
    for (unsigned at = 0; engines[at]; at++) {
        const char *name = engines[at]->name;

        if ((!strcmp(name, "interp") || !strcmp(name, "bt")) && n-- == 0)
            return name;
    }
    return NULL;
}
