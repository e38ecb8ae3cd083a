/*
 * Between processors: every kind of interrupt that one sends another, HLT, one TSC for all, code that another
 * processor writes, translations that another takes away, and registers that spinning must not change.
 *
 * Intel SDM vol. 3, 8.4 (start-up), 10.6 (IPIs), 8.1.3 (cross-modifying code), 4.10.5 (shoot-down).
 */
#include "smp.h"

#define VECTOR 0x40
#define VECTOR_SHOOT 0x41
#define ICR_LOWEST 0x100u
#define ICR_NMI 0x400u
#define ICR_LOGICAL 0x800u
#define TO_SELF (1u << 18)
#define TO_ALL (2u << 18)
#define TO_OTHERS (3u << 18)
#define MSR_APIC_BASE 0x1b
#define MSR_X2APIC_ICR 0x830
#define CPUS 4
#define WAKES 100
#define CHANGES 50

static volatile u32 taken[CPUS], nmis[CPUS];
static volatile bool x2apic;

static void end_of_interrupt(void)
{
    if (x2apic)
        wrmsr(0x80b, 0);
    else
        apic_write(APIC_EOI, 0);
}

static void on_ipi(struct frame *f)
{
    (void)f;
    taken[smp_cpu()]++;
    end_of_interrupt();
}

static void on_nmi(struct frame *f)
{
    (void)f;
    nmis[smp_cpu()]++;
}

/* --- Vector registers --- */

#define VECTOR_TIMER 0x42
#define XMM_AT 160 /* in FXSAVE's image */
#define XMM_BYTES (sizeof(void *) * 32)
#define SPIN_ROUNDS 200
#define SPIN_PAUSES 2000

static volatile u32 spoilt;

static void on_timer(struct frame *f)
{
    (void)f;
    end_of_interrupt();
}

/* Loops of PAUSE that go on for so long that they are noticed, and interrupts meanwhile, leave them alone. */
static void vectors_job(unsigned cpu)
{
    static u8 images[CPUS][2][512] __attribute__((aligned(16)));
    u8 *before = images[cpu][0], *after = images[cpu][1];

    set_cr4(cr4() | (word)CR4_OSFXSR);
    __asm__ volatile("fxsave (%0)" : : "r"(before) : "memory");
    for (unsigned n = 0; n < XMM_BYTES; n++)
        before[XMM_AT + n] = (u8)(n + cpu * 64 + 1);
    apic_write(APIC_LVT_TIMER, APIC_TIMER_PERIODIC | VECTOR_TIMER);
    apic_write(APIC_INITIAL, 100000);
    __asm__ volatile("fxrstor (%0); sti" : : "r"(before));
    for (unsigned round = 0; round < SPIN_ROUNDS; round++) {
        for (unsigned n = 0; n < SPIN_PAUSES; n++)
            pause();
        __asm__ volatile("fxsave (%0)" : : "r"(after) : "memory");
        for (unsigned n = XMM_AT; n < XMM_AT + XMM_BYTES; n++)
            if (before[n] != after[n])
                spoilt = 1;
    }
    __asm__ volatile("cli");
    apic_write(APIC_INITIAL, 0);
    apic_write(APIC_LVT_TIMER, APIC_LVT_MASKED);
}

/* --- IPIs --- */

static volatile u32 stop, ready;

/* All have done what comes before; once a job. */
static void meet(void)
{
    __asm__ volatile("lock incl %0" : "+m"(ready));
    smp_wait_for(&ready, CPUS);
}

static void take_interrupts(void)
{
    __asm__ volatile("sti");
    while (!stop)
        pause();
    __asm__ volatile("cli");
}

/* Which processors took one since the last look, as bits; waits for `want` of them, and a little for more. */
static u32 who_took(volatile u32 *counts, u32 want)
{
    u32 who = 0;

    for (u64 start = rdtsc(), end = 0; !end || rdtsc() < end;) {
        who = 0;
        for (unsigned n = 0; n < CPUS; n++)
            who |= counts[n] ? 1u << n : 0;
        if ((who == want || rdtsc() - start > 20000000000ULL) && !end)
            end = rdtsc() + 1000000;
        pause();
    }
    for (unsigned n = 0; n < CPUS; n++)
        counts[n] = 0;
    return who;
}

static void expect(const char *name, u32 destination, u32 icr, u32 want)
{
    apic_send(destination, icr);
    check_equal(name, who_took(icr & ICR_NMI ? nmis : taken, want), want);
}

static void set_logical(unsigned cpu, bool cluster)
{
    apic_write(APIC_DFR, cluster ? 0x0fffffff : 0xffffffff);
    /* flat: a bit each; cluster: two to a cluster */
    apic_write(APIC_LDR, (cluster ? (cpu / 2) << 4 | 1u << cpu % 2 : 1u << cpu) << 24);
}

static void send_xapic(void)
{
    expect("physical", 2, VECTOR, 1 << 2);
    expect("physical-self", 0, VECTOR, 1 << 0);
    expect("physical-nobody", 77, VECTOR, 0);
    expect("physical-broadcast", 0xff, VECTOR, 0xf);
    expect("shorthand-self", 0, VECTOR | TO_SELF, 1);
    expect("shorthand-all", 0, VECTOR | TO_ALL, 0xf);
    expect("shorthand-others", 0, VECTOR | TO_OTHERS, 0xe);
    expect("nmi", 3, ICR_NMI, 1 << 3);
    expect("nmi-others", 0, ICR_NMI | TO_OTHERS, 0xe);
}

static void logical_job(unsigned cpu)
{
    u32 who;

    set_logical(cpu, false);
    meet();
    if (cpu) {
        take_interrupts();
        return;
    }
    __asm__ volatile("sti");
    expect("flat-two", 0x0a, VECTOR | ICR_LOGICAL, 0xa);
    expect("flat-all", 0xff, VECTOR | ICR_LOGICAL, 0xf);
    expect("flat-nobody", 0x30, VECTOR | ICR_LOGICAL, 0);
    apic_send(0x0e, VECTOR | ICR_LOGICAL | ICR_LOWEST);
    while (!(taken[1] | taken[2] | taken[3]))
        pause();
    who = who_took(taken, 0xff);
    check("lowest-priority-takes-one", who && !(who & (who - 1)) && (who & 0xe));
    __asm__ volatile("cli");
    stop = 1;
}

static void cluster_job(unsigned cpu)
{
    set_logical(cpu, true);
    meet();
    if (cpu) {
        take_interrupts();
        return;
    }
    __asm__ volatile("sti");
    expect("cluster-0", 0x03, VECTOR | ICR_LOGICAL, 0x3);
    expect("cluster-1-second", 0x12, VECTOR | ICR_LOGICAL, 0x8);
    expect("cluster-all-first", 0xf1, VECTOR | ICR_LOGICAL, 0x5);
    __asm__ volatile("cli");
    stop = 1;
}

static void physical_job(unsigned cpu)
{
    if (cpu) {
        take_interrupts();
        return;
    }
    __asm__ volatile("sti");
    send_xapic();
    __asm__ volatile("cli");
    stop = 1;
}

static void expect_x2(const char *name, u64 icr, u32 want)
{
    wrmsr(MSR_X2APIC_ICR, icr);
    check_equal(name, who_took(icr & ICR_NMI ? nmis : taken, want), want);
}

static void x2apic_job(unsigned cpu)
{
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | BIT(10));
    x2apic = true;
    meet();
    if (cpu) {
        take_interrupts();
        return;
    }
    __asm__ volatile("sti");
    expect_x2("x2apic-physical", 2ULL << 32 | VECTOR, 1 << 2);
    expect_x2("x2apic-physical-broadcast", 0xffffffffULL << 32 | VECTOR, 0xf);
    expect_x2("x2apic-logical", 0xaULL << 32 | VECTOR | ICR_LOGICAL, 0xa);
    expect_x2("x2apic-logical-other-cluster", 0x1000fULL << 32 | VECTOR | ICR_LOGICAL, 0);
    expect_x2("x2apic-others", VECTOR | TO_OTHERS, 0xe);
    expect_x2("x2apic-nmi", 1ULL << 32 | ICR_NMI, 1 << 1);
    __asm__ volatile("cli");
    stop = 1;
}

/* --- KVM's hypercalls (Linux, Documentation/virt/kvm/x86/hypercalls.rst) --- */

#define HC_KICK_CPU 5
#define HC_SEND_IPI 10
#define HC_SCHED_YIELD 11

static volatile u32 kicked;

static u64 hypercall(u64 number, u64 b, u64 c, u64 d, u64 s)
{
    u64 result;

    __asm__ volatile("vmcall"
                     : "=a"(result)
                     : "a"(number), "b"(b), "c"(c), "d"(d), "S"(s)
                     : "memory");
    return result;
}

static void hypercall_job(unsigned cpu)
{
    meet();
    if (cpu == 1) { /* asleep with interrupts off */
        __asm__ volatile("cli; hlt" : : : "memory");
        kicked = 1;
        return;
    }
    if (cpu) {
        take_interrupts();
        return;
    }
    check_equal("hypercall-ipi-count", hypercall(HC_SEND_IPI, 3, 0, 2, VECTOR), 2);
    check_equal("hypercall-ipi", who_took(taken, 0xc), 0xc);
    /* A reserved delivery mode: whoever sends it all the same does no harm. */
    check_equal("hypercall-ipi-mode", hypercall(HC_SEND_IPI, 1, 0, 2, 0x300), (u64)-22);
    check_equal("hypercall-kick-result", hypercall(HC_KICK_CPU, 0, 1, 0, 0), 0);
    check("hypercall-kick", smp_wait_for(&kicked, 1));
    check_equal("hypercall-yield", hypercall(HC_SCHED_YIELD, 1, 0, 0, 0), 0);
    check_equal("hypercall-unknown", hypercall(99, 0, 0, 0, 0), (u64)-1000);
    stop = 1;
}

/* --- HLT and the TSC --- */

static volatile u32 woken;

static void halt_job(unsigned cpu)
{
    if (cpu == 1) {
        for (u32 n = 1; n <= WAKES; n++) {
            while (taken[1] < n)
                __asm__ volatile("sti; hlt; cli" : : : "memory");
            woken = n;
        }
        return;
    }
    for (u32 n = 1; n <= WAKES; n++) {
        apic_send(1, VECTOR);
        if (!smp_wait_for(&woken, n))
            break;
    }
    check_equal("hlt-wakes", woken, WAKES);
    taken[1] = 0;
}

static volatile u64 stamp;
static volatile u32 backwards;

/* Each takes what another left, and leaves its own. */
static void tsc_job(unsigned cpu)
{
    (void)cpu;
    for (unsigned n = 0; n < 20000; n++) {
        u64 other = stamp, mine;

        __asm__ volatile("lfence" : : : "memory");
        mine = rdtsc();
        if (mine < other)
            backwards++;
        else
            stamp = mine;
    }
}

/* --- Code that another processor writes --- */

static u8 code[3 * 4096] __attribute__((aligned(4096)));
static volatile u32 published, answered, wrong;
typedef u32 (*function)(void);

/* mov $value, %eax; ret */
static void write_function(u8 *at, u32 value)
{
    at[0] = 0xb8;
    *(volatile u32 *)(at + 1) = value;
    at[5] = 0xc3;
}

static u8 *code_at; /* where; the immediate lies on 4 bytes, or across pages */

static void modify_job(unsigned cpu)
{
    for (u32 n = 1; n <= CHANGES; n++) {
        if (cpu == 0) {
            write_function(code_at, n);
            published = n;
            smp_wait_for(&answered, n * (CPUS - 1));
            continue;
        }
        smp_wait_for(&published, n);
        cpuid(0, 0); /* serializes */
        for (unsigned k = 0; k < 4; k++)
            if (((function)(word)code_at)() != n)
                __asm__ volatile("lock incl %0" : "+m"(wrong));
        __asm__ volatile("lock incl %0" : "+m"(answered));
    }
}

static void modify(const char *name, unsigned offset)
{
    code_at = code + offset;
    published = answered = wrong = 0;
    write_function(code_at, 0);
    smp_run(CPUS, modify_job);
    check_equal(name, wrong, 0);
}

/* Two stores to different places of one page, each by another processor, which a third runs. */
static void modify_neighbours_job(unsigned cpu)
{
    u8 *mine = code + 4096 + 128 * cpu;

    for (u32 n = 1; n <= CHANGES; n++) {
        write_function(mine, n);
        if (((function)(word)mine)() != n)
            __asm__ volatile("lock incl %0" : "+m"(wrong));
    }
}

/* --- Translations that another processor takes away --- */

extern u64 boot_pml4[];
#define WINDOW 0x4000000UL
static u64 table[512] __attribute__((aligned(4096)));
static u8 pages[2][4096] __attribute__((aligned(4096)));
static volatile u32 shot, done;

static void on_shoot(struct frame *f)
{
    (void)f;
    __asm__ volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
    __asm__ volatile("lock incl %0" : "+m"(shot));
    end_of_interrupt();
}

/* The page behind WINDOW changes; each holds the number of its change, as data and as code. */
static void shoot_job(unsigned cpu)
{
    if (cpu) {
        __asm__ volatile("sti");
        while (done < CHANGES) {
            u32 from = done, data, by_code;

            data = *(volatile u32 *)(WINDOW + 64);
            by_code = ((function)WINDOW)();
            if (data < from || by_code < from)
                __asm__ volatile("lock incl %0" : "+m"(wrong));
        }
        __asm__ volatile("cli");
        return;
    }
    for (u32 n = 1; n <= CHANGES; n++) {
        u8 *page = pages[n & 1];

        write_function(page, n);
        *(volatile u32 *)(page + 64) = n;
        table[0] = (word)page | 3;
        __asm__ volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
        shot = 0;
        apic_send(0, VECTOR_SHOOT | TO_OTHERS);
        if (!smp_wait_for(&shot, CPUS - 1))
            break;
        done = n;
    }
    check_equal("shoot-down-ends", done, CHANGES);
    done = CHANGES;
}

static void map_window(void)
{
    u64 *pdpt = (u64 *)(boot_pml4[0] & ~0xfffULL), *pd = (u64 *)(pdpt[0] & ~0xfffULL);

    write_function(pages[0], 0);
    table[0] = (word)pages[0] | 3;
    pd[WINDOW >> 21] = (word)table | 3;
    set_cr3(cr3());
}
static void reload_cr3(unsigned cpu)
{
    (void)cpu;
    set_cr3(cr3());
}

static void run(void (*job)(unsigned cpu))
{
    stop = ready = 0;
    smp_run(CPUS, job);
}

void guest_main(void)
{
    unsigned cpus = smp_start();

    check_equal("processors", cpus, CPUS);
    if (cpus != CPUS)
        return;
    trap_handlers[VECTOR] = on_ipi;
    trap_handlers[VECTOR_SHOOT] = on_shoot;
    trap_handlers[NMI] = on_nmi;
    trap_handlers[VECTOR_TIMER] = on_timer;
    smp_run(CPUS, vectors_job);
    check_equal("vectors-while-spinning", spoilt, 0);
    run(physical_job);
    run(logical_job);
    run(cluster_job);
    run(hypercall_job);
    smp_run(2, halt_job);
    smp_run(CPUS, tsc_job);
    check_equal("tsc-never-backwards", backwards, 0);
    modify("modified-code-aligned", 64 + 3);
    modify("modified-code-across-lines", 64 + 60);
    modify("modified-code-across-pages", 4096 - 3);
    wrong = 0;
    smp_run(CPUS, modify_neighbours_job);
    check_equal("modified-code-of-neighbours", wrong, 0);
    map_window();
    smp_run(CPUS, reload_cr3);
    wrong = 0;
    smp_run(CPUS, shoot_job);
    check_equal("shoot-down", wrong, 0);
    run(x2apic_job);
}
