/*
 * The KVM engine by its contract alone (engine/engine.h), with a few instructions of real-mode code for a guest:
 * which ends of interrupt it reports, messages that eventfds send, the dirty log, and the paravirtual features.
 *
 * Such code runs under any KVM, in its emulator if need be: also where no 64-bit guest does.
 */
#include "engine/kvm/kvm.h"
#include "host/event_loop.h"
#include "x86/regs.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Guest memory. */
#define CODE 0x1000       /* waits for interrupts */
#define HANDLERS 0x2000   /* one for each vector, 16 bytes apart */
#define END_OF_ALL 0x3000 /* where they all end */
#define SHOW_PV 0x4000    /* writes CPUID's paravirtual features to PV_SEEN */
#define PV_SEEN 0x5000
#define WRITE 0x6000 /* writes to WRITTEN_A and WRITTEN_B */
#define STACK_TOP 0x8000
#define WRITTEN_A 0x9000
#define WRITTEN_B 0xb000
#define SHARED 0x20000 /* pages for KVM to write to */

#define PORT_VECTOR 0x80 /* a handler says its vector */
#define PORT_END 0x81    /* and that it is done: KVM may owe the report of its EOI still */

#define MSI_ADDRESS 0xfee00000
#define MSI_LEVEL 0xc000 /* asserted */

#define TIMEOUT_SECONDS                                                                            \
    120 /* an interrupt that never comes: the guest sleeps, and SIGALRM ends the test */

static unsigned failures;

static void check(bool passed, const char *name)
{
    failures += !passed;
    printf("%s engine: %s\n", passed ? "ok" : "not ok", name);
    fflush(stdout);
}

static void die(const char *what)
{
    printf("not ok engine: %s\n", what);
    exit(1);
}

/* ---- a machine without devices ---- */

struct rig {
    struct event_loop *loop;
    struct guest_memory memory;
    struct io_bus *ports, *mmio;
    struct io_range range;
    struct vm_clock *clock;
    struct cpuid_model *cpuid;
    struct engine *engine;
    struct vcpu *vcpu;
    unsigned seen[256], eois[256]; /* what handlers said; what the engine reported */
};

static u64 port_read(void *opaque, u64 offset, unsigned size)
{
    return 0;
}

static void port_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct rig *r = opaque;

    switch (PORT_VECTOR + offset) {
    case PORT_VECTOR:
        r->seen[value & 0xff]++;
        break;
    case PORT_END:
        engine_kvm.vcpu_kick(r->vcpu);
        break;
    default:
        break;
    }
}

static const struct io_ops port_ops = {port_read, port_write, 1};

static int no_extint(void *machine)
{
    return -1;
}

static void eoi_broadcast(void *machine, u8 vector)
{
    ((struct rig *)machine)->eois[vector]++;
}

static void put(struct rig *r, gpa_t at, const void *data, size_t len)
{
    if (memory_write(&r->memory, at, data, len))
        die("no memory");
}

/* Real-mode code. */
static void put_code(struct rig *r)
{
    static const u8 wait[] = {0xfb, 0xf4, 0xeb, 0xfc}; /* sti; hlt; jmp to sti */
    static const u8 end[] = {
        0x66, 0xb9,     0x0b, 0x08, 0x00, 0x00, /* mov $0x80b, %ecx: x2APIC's EOI register */
        0x66, 0x31,     0xc0,                   /* xor %eax, %eax */
        0x66, 0x31,     0xd2,                   /* xor %edx, %edx */
        0x0f, 0x30,                             /* wrmsr */
        0xe6, PORT_END,                         /* out %al, $PORT_END */
        0xcf,                                   /* iret */
    };
    static const u8 show[] = {
        0x66, 0xb8,     0x01, 0x00, 0x00, 0x40, /* mov $0x40000001, %eax */
        0x0f, 0xa2,                             /* cpuid */
        0x66, 0xa3,     0x00, 0x50,             /* mov %eax, PV_SEEN */
        0xe6, PORT_END,                         /* out %al, $PORT_END */
    };

    static const u8 write[] = {
        0xc6, 0x06,     WRITTEN_A & 0xff, WRITTEN_A >> 8, 1, /* movb $1, WRITTEN_A */
        0xc6, 0x06,     WRITTEN_B & 0xff, WRITTEN_B >> 8, 1, /* movb $1, WRITTEN_B */
        0xe6, PORT_END,                                      /* out %al, $PORT_END */
    };

    put(r, CODE, wait, sizeof(wait));
    put(r, WRITE, write, sizeof(write));
    put(r, END_OF_ALL, end, sizeof(end));
    put(r, SHOW_PV, show, sizeof(show));
    for (unsigned n = 0; n < 256; n++) {
        u16 at = (u16)(HANDLERS + 16 * n), distance = (u16)(END_OF_ALL - (at + 7));
        const u8 handler[] = {
            0xb0, (u8)n,                             /* mov $n, %al */
            0xe6, PORT_VECTOR,                       /* out %al, $PORT_VECTOR */
            0xe9, (u8)distance, (u8)(distance >> 8), /* jmp END_OF_ALL */
        };
        const u16 entry[] = {at, 0};

        put(r, at, handler, sizeof(handler));
        put(r, 4 * n, entry, sizeof(entry));
    }
}

static void create_engine(struct rig *r, u32 pv_off, struct error *err)
{
    struct engine_config config = {
        .memory = &r->memory,
        .machine = {no_extint, eoi_broadcast, r},
        .ncpus = 1,
        .pv_off = pv_off,
    };
    struct cpuid_support support;

    engine_kvm.cpuid_support(&support);
    r->cpuid = cpuid_model_create("max", &support, 1, host_tsc_hz(), err);
    if (!r->cpuid)
        die(err->text);
    config.cpuid = r->cpuid;
    config.clock = r->clock;
    config.ports = r->ports;
    config.mmio = r->mmio;
    r->engine = engine_kvm.create(&config, err);
    r->vcpu = r->engine ? engine_kvm.vcpu_create(r->engine, 0, err) : NULL;
    if (!r->vcpu)
        die(err->text);
}

static struct rig *rig_create(u32 pv_off)
{
    struct rig *r = calloc(1, sizeof(*r));
    struct error err = {0};

    r->loop = event_loop_create(&err);
    r->clock = vm_clock_create(r->loop, &err);
    r->ports = io_bus_create("port", 0x10000, &err);
    r->mmio = io_bus_create("mmio", BIT(36), &err);
    r->range = (struct io_range){"test", PORT_VECTOR, 2, &port_ops, r};
    if (memory_add_slot(&r->memory, 0, MIB(1), 0, &err) || io_bus_add(r->ports, &r->range, &err))
        die(err.text);
    put_code(r);
    create_engine(r, pv_off, &err);
    vm_clock_start(r->clock);
    return r;
}

static void rig_destroy(struct rig *r)
{
    engine_kvm.vcpu_destroy(r->vcpu);
    engine_kvm.destroy(r->engine);
    cpuid_model_destroy(r->cpuid);
    io_bus_destroy(r->mmio);
    io_bus_destroy(r->ports);
    memory_destroy(&r->memory);
    vm_clock_destroy(r->clock);
    event_loop_destroy(r->loop);
    free(r);
}

/* The processor to where it executes the code at `ip`, with its APIC on; to be changed and set. */
static void get_state(struct rig *r, u16 ip, struct cpu *cpu, struct lapic_state *apic)
{
    engine_kvm.vcpu_get_state(r->vcpu, cpu, apic);
    for (unsigned i = 0; i < SEG_COUNT; i++)
        cpu->seg[i].selector = 0, cpu->seg[i].base = 0;
    cpu->gpr[GPR_RIP] = ip;
    cpu->gpr[RSP] = STACK_TOP;
    apic->base_msr = LAPIC_DEFAULT_BASE | APIC_BASE_BSP | APIC_BASE_ENABLE | APIC_BASE_X2APIC;
    apic->svr = 0x1ff;
}

static bool set_state(struct rig *r, const struct cpu *cpu, const struct lapic_state *apic)
{
    struct error err = {0};

    if (!engine_kvm.vcpu_set_state(r->vcpu, cpu, apic, &err))
        return true;
    printf("    | %s\n", err.text);
    return false;
}

static void go_to(struct rig *r, u16 ip)
{
    struct lapic_state apic;
    struct cpu cpu;

    get_state(r, ip, &cpu, &apic);
    if (!set_state(r, &cpu, &apic))
        die("KVM refuses the processor's state");
}

/* Until the guest says that it is done. */
static void run(struct rig *r)
{
    struct vcpu_exit exit = {0};

    alarm(TIMEOUT_SECONDS);
    engine_kvm.vcpu_run(r->vcpu, &exit);
    if (exit.reason != VCPU_EXIT_KICKED)
        die(exit.error.text[0] ? exit.error.text : "the guest went astray");
}

/* ---- ends of interrupt ---- */

static void test_messages(void)
{
    struct rig *r = rig_create(0);

    go_to(r, CODE);
    engine_kvm.deliver_msi(r->engine, MSI_ADDRESS, MSI_LEVEL | 0x41);
    run(r);
    check(r->seen[0x41] == 1 && r->eois[0x41] == 1, "level-message-has-its-eoi-reported");
    engine_kvm.deliver_msi(r->engine, MSI_ADDRESS, 0x42);
    run(r);
    check(r->seen[0x42] == 1 && r->eois[0x42] == 0, "edge-message-has-not");
    rig_destroy(r);
}

/* Such as another engine delivered before the machine was moved here: this one has seen no message. */
static void test_loaded(bool in_service)
{
    struct rig *r = rig_create(0);
    struct lapic_state apic;
    struct cpu cpu;

    get_state(r, in_service ? END_OF_ALL : CODE, &cpu, &apic);
    (in_service ? apic.isr : apic.irr)[0x51 / 32] |= (u32)BIT(0x51 % 32);
    apic.tmr[0x51 / 32] |= (u32)BIT(0x51 % 32);
    if (set_state(r, &cpu, &apic))
        run(r);
    check(r->seen[0x51] == !in_service && r->eois[0x51] == 1,
          in_service ? "level-in-service-has-its-eoi-reported"
                     : "level-requested-has-its-eoi-reported");
    rig_destroy(r);
}

/* ---- messages by eventfd ---- */

static void test_irqfd(void)
{
    struct rig *r = rig_create(0);
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct engine_stats stats;

    go_to(r, CODE);
    check(!engine_kvm.msi_bind(r->engine, fd, MSI_ADDRESS, 0x61), "irqfd-binds");
    eventfd_write(fd, 1);
    run(r);
    check(r->seen[0x61] == 1, "irqfd-sends-its-message");
    check(!engine_kvm.msi_bind(r->engine, fd, MSI_ADDRESS, 0x62), "irqfd-binds-anew");
    eventfd_write(fd, 1);
    run(r);
    check(r->seen[0x61] == 1 && r->seen[0x62] == 1, "irqfd-sends-its-new-message");
    engine_kvm.stats(r->engine, &stats);
    check(stats.irqfds == 1, "irqfd-is-counted-once");
    /* A level-triggered message in between changes the same table in the kernel. */
    engine_kvm.deliver_msi(r->engine, MSI_ADDRESS, MSI_LEVEL | 0x63);
    run(r);
    eventfd_write(fd, 1);
    run(r);
    check(r->eois[0x63] == 1 && r->seen[0x62] == 2, "irqfd-lives-beside-level-messages");
    check(engine_kvm.msi_bind(r->engine, fd, MSI_ADDRESS, MSI_LEVEL | 0x64) == -EINVAL,
          "irqfd-takes-no-level-message");
    engine_kvm.msi_unbind(r->engine, fd);
    eventfd_write(fd, 1);
    engine_kvm.deliver_msi(r->engine, MSI_ADDRESS, 0x65);
    run(r);
    check(r->seen[0x65] == 1 && r->seen[0x62] == 2, "irqfd-unbound-sends-nothing");
    rig_destroy(r);
    close(fd);
}

/* ---- paravirtual features ---- */

static const struct pv_msr {
    const char *name;
    unsigned feature;
    size_t field; /* in struct cpu_msrs */
    u64 value;
} pv_msrs[] = {
#define FIELD(name) offsetof(struct cpu_msrs, name)
    {"kvmclock", KVM_FEATURE_CLOCKSOURCE2, FIELD(kvm_system_time), SHARED | 1},
    {"wall-clock", KVM_FEATURE_CLOCKSOURCE2, FIELD(kvm_wall_clock), SHARED + 0x1000},
    {"steal-time", KVM_FEATURE_STEAL_TIME, FIELD(kvm_steal_time), (SHARED + 0x2000) | 1},
    {"pv-eoi", KVM_FEATURE_PV_EOI, FIELD(kvm_pv_eoi), (SHARED + 0x3000) | 1},
    {"async-pf-vector", KVM_FEATURE_ASYNC_PF_INT, FIELD(kvm_async_pf_int), 0x71},
    {"async-pf", KVM_FEATURE_ASYNC_PF_INT, FIELD(kvm_async_pf), (SHARED + 0x4000) | 9},
    {"poll-control", KVM_FEATURE_POLL_CONTROL, FIELD(kvm_poll_control), 0},
#undef FIELD
};

static u64 *pv_field(struct cpu_msrs *msrs, const struct pv_msr *m)
{
    return (u64 *)((char *)msrs + m->field);
}

/* What a guest of an engine without the features of pv_off reads in CPUID. */
static u32 features_seen(u32 pv_off)
{
    struct rig *r = rig_create(pv_off);
    u32 seen = 0;

    go_to(r, SHOW_PV);
    run(r);
    memory_read(&r->memory, PV_SEEN, &seen, sizeof(seen));
    rig_destroy(r);
    return seen;
}

static void test_pv_cpuid(u32 offered)
{
    char name[64];

    check(features_seen(0) == offered, "pv-all-that-the-kernel-offers");
    check(features_seen(~0U) == 0, "pv-all-off");
    for (unsigned bit = 0; bit < 32; bit++) {
        if (!(offered >> bit & 1))
            continue;
        snprintf(name, sizeof(name), "pv-%u-off", bit);
        check(features_seen((u32)BIT(bit)) == (offered & ~(u32)BIT(bit)), name);
    }
}

/* What a guest has told KVM is in the state, and KVM has it when it is loaded. */
static void test_pv_state(u32 offered)
{
    struct rig *r = rig_create(0);
    struct lapic_state apic;
    struct cpu cpu, back;
    char name[64];

    get_state(r, CODE, &cpu, &apic);
    for (size_t i = 0; i < ARRAY_SIZE(pv_msrs); i++) {
        if (offered >> pv_msrs[i].feature & 1)
            *pv_field(&cpu.msr, &pv_msrs[i]) = pv_msrs[i].value;
    }
    check(set_state(r, &cpu, &apic), "pv-state-is-taken");
    engine_kvm.vcpu_get_state(r->vcpu, &back, &apic);
    for (size_t i = 0; i < ARRAY_SIZE(pv_msrs); i++) {
        bool there = offered >> pv_msrs[i].feature & 1;

        snprintf(name, sizeof(name), "pv-state-%s%s", pv_msrs[i].name,
                 there ? "" : " # skip the kernel doesn't offer it");
        check(!there || *pv_field(&back.msr, &pv_msrs[i]) == pv_msrs[i].value, name);
    }
    rig_destroy(r);
}

/* ---- vector registers ---- */

/* Of those that XSAVE has a component of its own for, each byte has a value of its own. */
static void test_vectors(void)
{
    struct rig *r = rig_create(0);
    u64 xcr0 = XCR0_X87 | (cpuid_model_xcr0(r->cpuid) & (XCR0_SSE | XCR0_AVX));
    unsigned bytes = xcr0 & XCR0_AVX ? 32 : 16;
    struct lapic_state apic;
    struct cpu cpu, back;
    bool same = true;

    get_state(r, END_OF_ALL, &cpu, &apic);
    cpu.xcr0 = xcr0;
    for (unsigned i = 0; i < 16; i++) {
        for (unsigned n = 0; n < bytes; n++)
            cpu.vec[i][n] = (u8)(i * 32 + n + 1);
    }
    check(set_state(r, &cpu, &apic), "vectors-are-taken");
    engine_kvm.vcpu_get_state(r->vcpu, &back, &apic);
    for (unsigned i = 0; i < 16; i++)
        same &= !memcmp(cpu.vec[i], back.vec[i], bytes);
    check(same && back.xcr0 == xcr0, "vectors-come-back");
    run(r);
    engine_kvm.vcpu_get_state(r->vcpu, &back, &apic);
    for (unsigned i = 0; i < 16; i++)
        same &= !memcmp(cpu.vec[i], back.vec[i], bytes);
    check(same, "vectors-outlive-a-run");
    rig_destroy(r);
}

/* ---- the dirty log ---- */

static bool without_rings; /* the kernel doesn't say that it has them */

int __real_ioctl(int fd, unsigned long request, void *arg);
int __wrap_ioctl(int fd, unsigned long request, void *arg);

int __wrap_ioctl(int fd, unsigned long request, void *arg)
{
    if (without_rings && request == KVM_CHECK_EXTENSION && (uintptr_t)arg == KVM_CAP_DIRTY_LOG_RING)
        return 0;
    return __real_ioctl(fd, request, arg);
}

static u64 page_bit(gpa_t gpa)
{
    return BIT(gpa >> GUEST_PAGE_SHIFT);
}

/* Whether the pages marked are those whose bits `wanted` has, all of them among the first 64. */
static bool log_is(struct rig *r, u64 wanted)
{
    u64 bitmap[MIB(1) / GUEST_PAGE_SIZE / 64] = {0};
    int ret = engine_kvm.dirty_log_read(r->engine, memory_find(&r->memory, 0), bitmap,
                                        ARRAY_SIZE(bitmap));

    for (size_t n = 1; n < ARRAY_SIZE(bitmap); n++)
        ret |= bitmap[n] != 0;
    return !ret && bitmap[0] == wanted;
}

static void test_dirty_log(bool rings)
{
    const char *kind = rings ? "rings" : "bitmaps";
    struct error err = {0};
    struct rig *r;
    char name[64];

    without_rings = !rings;
    r = rig_create(0);
    go_to(r, WRITE);
    run(r);
    snprintf(name, sizeof(name), "dirty-log-by-%s-starts-empty", kind);
    check(!engine_kvm.dirty_log_start(r->engine, &err) && log_is(r, 0), name);
    for (unsigned n = 0; n < 2; n++) { /* a page that was read from the log is watched again */
        go_to(r, WRITE);
        run(r);
        engine_kvm.memory_written(r->engine, SHARED, 1);
        snprintf(name, sizeof(name), "dirty-log-by-%s-%u", kind, n + 1);
        check(log_is(r, page_bit(WRITTEN_A) | page_bit(WRITTEN_B) | page_bit(SHARED)), name);
    }
    snprintf(name, sizeof(name), "dirty-log-by-%s-is-taken", kind);
    check(log_is(r, 0), name);
    engine_kvm.dirty_log_stop(r->engine);
    rig_destroy(r);
    without_rings = false;
}

int main(void)
{
    struct error err;
    int dev = kvm_host_open(&err);
    u32 offered;
    bool rings;

    if (dev < 0) {
        printf("ok engine # skip %s\n", err.text);
        return 0;
    }
    offered = kvm_cpuid_pv_features(dev);
    rings = kvm_host_cap(dev, KVM_CAP_DIRTY_LOG_RING) > 0;
    close(dev);
    test_messages();
    test_loaded(false);
    test_loaded(true);
    test_irqfd();
    test_vectors();
    test_dirty_log(false);
    if (rings)
        test_dirty_log(true);
    else
        printf("ok engine: dirty-log-by-rings # skip the kernel has none\n");
    test_pv_cpuid(offered);
    test_pv_state(offered);
    return failures ? 1 : 0;
}
