/*
 * Interrupts: their shadow after STI and MOV SS, the local APIC (self-IPI, priorities, EOI, timer in
 * its three modes, NMI, x2APIC), the IOAPIC, the 8259s, the PIT, RTC and HPET, and HLT.
 *
 * Intel SDM vol. 3, chapters 6 and 10.
 */
#include "guest.h"

#define APIC 0xfee00000UL
#define APIC_TPR 0x80
#define APIC_PPR 0xa0
#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_ISR 0x100
#define APIC_IRR 0x200
#define APIC_ICR 0x300
#define APIC_TIMER 0x320
#define APIC_LINT0 0x350
#define APIC_INITIAL 0x380
#define APIC_CURRENT 0x390
#define APIC_DIVIDE 0x3e0
#define SELF (1u << 18)
#define LVT_MASKED (1u << 16)
#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_PV_EOI 0x4b564d04
#define IOAPIC 0xfec00000UL
#define HPET 0xfed00000UL
#define LOW 0x51
#define HIGH 0x91
#define PATIENCE 20000000000ULL /* TSC ticks that nothing here takes */

static volatile unsigned count[256];
static volatile word last_ip;
static volatile u8 order[8];
static volatile unsigned ordered;
static bool x2apic;

static u32 apic_read(u32 reg)
{
    if (x2apic)
        return (u32)rdmsr(0x800 + reg / 16);
    return *(volatile u32 *)(APIC + reg);
}

static void apic_write(u32 reg, u32 v)
{
    if (x2apic)
        wrmsr(0x800 + reg / 16, v);
    else
        *(volatile u32 *)(APIC + reg) = v;
}

static void on_apic(struct frame *f)
{
    count[f->vector]++;
    last_ip = f->ip;
    if (ordered < ARRAY_SIZE(order))
        order[ordered++] = (u8)f->vector;
    apic_write(APIC_EOI, 0);
}

static void on_pic(struct frame *f)
{
    count[f->vector]++;
    if (f->vector >= 0x28)
        outb(0xa0, 0x20);
    outb(0x20, 0x20);
}

/* KVM's word (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_PV_EOI_EN): bit 0 set, clearing it is the EOI. */
static volatile u32 eoi_word __attribute__((aligned(4)));

static void on_pv(struct frame *f)
{
    bool pending;

    count[f->vector]++;
    __asm__ volatile("btrl $0, %0" : "+m"(eoi_word), "=@ccc"(pending));
    if (!pending)
        apic_write(APIC_EOI, 0);
}

/* To its own ID: an NMI by the self shorthand is not valid. */
static void send_nmi(void)
{
    *(volatile u32 *)(APIC + APIC_ICR + 0x10) = apic_read(0x20);
    apic_write(APIC_ICR, 4 << 8);
}

static void on_nmi(struct frame *f)
{
    count[f->vector]++;
    if (count[NMI] == 1) {
        send_nmi(); /* held back until this one's IRET */
        for (volatile int i = 0; i < 1000; i++)
            ;
        check_equal("nmi-masked-in-its-handler", count[NMI], 1);
    }
}

static void send(u32 vector)
{
    apic_write(APIC_ICR, SELF | vector);
}

/* Waits with interrupts on until `vector` has come `n` times. */
static bool wait_for(unsigned vector, unsigned n)
{
    u64 end = rdtsc() + PATIENCE;

    while (count[vector] < n && rdtsc() < end)
        __asm__ volatile("sti; nop; nop; cli" ::: "memory");
    return count[vector] >= n;
}

static void shadows(void)
{
    word at;

    count[LOW] = 0;
    send(LOW);
    __asm__ volatile("sti; 1: nop; 2: nop; cli; " MOVW "$2b, %0" : "=r"(at) : : "memory");
    check_equal("sti-shadow-count", count[LOW], 1);
    check_equal("sti-shadow-ip", last_ip, at);
    send(LOW);
    __asm__ volatile("sti; cli; nop" : : : "memory");
    check_equal("sti-cli-lets-nothing-in", count[LOW], 1);
    __asm__ volatile("sti; nop; cli");
    check_equal("then-it-comes", count[LOW], 2);
    __asm__ volatile("movl %%ss, %%eax; movl %2, %%ecx; movl $0x40051, %%edx; sti; nop;"
                     "movl %%edx, (%%rcx); movl %%eax, %%ss; nop; 2: nop; cli; nop"
                     :
                     : "i"(0), "i"(0), "i"(APIC + APIC_ICR)
                     : "rax", "rcx", "rdx", "memory");
    check_equal("mov-ss-came", count[LOW], 3);
    count[LOW] = 0;
    send(LOW);
    __asm__ volatile("sti; movl %%ss, %%eax; movl %%eax, %%ss; nop; cli" : : : "rax", "memory");
    check_equal("sti-mov-ss", count[LOW], 1);
    send(LOW);
    __asm__ volatile("sti; hlt; cli" ::: "memory");
    check_equal("sti-hlt-wakes", count[LOW], 2);
}

static void priorities(void)
{
    ordered = 0;
    send(LOW);
    send(HIGH);
    check("irr-both",
          apic_read(APIC_IRR + 0x20) & 1u << 17 && apic_read(APIC_IRR + 0x40) & 1u << 17);
    __asm__ volatile("sti; nop; nop; nop; cli" ::: "memory");
    check("higher-first", ordered == 2 && order[0] == HIGH && order[1] == LOW);
    count[LOW] = count[HIGH] = 0;
    apic_write(APIC_TPR, 0x50);
    check_equal("ppr", apic_read(APIC_PPR), 0x50);
    send(LOW);
    send(HIGH);
    __asm__ volatile("sti; nop; nop; nop; cli" ::: "memory");
    check("tpr-holds-its-class", count[LOW] == 0 && count[HIGH] == 1);
    {
        u64 v;

        __asm__ volatile("mov %%cr8, %0" : "=r"(v));
        check_equal("cr8-is-tpr", v, 5);
        __asm__ volatile("mov %0, %%cr8" : : "r"(0ULL));
    }
    check_equal("cr8-sets-tpr", apic_read(APIC_TPR), 0);
    __asm__ volatile("sti; nop; nop; cli" ::: "memory");
    check_equal("tpr-lowered-lets-in", count[LOW], 1);
    check_equal("isr-empty", apic_read(APIC_ISR + 0x20), 0);
}

static void timer(void)
{
    count[LOW] = 0;
    apic_write(APIC_DIVIDE, 0xb);
    apic_write(APIC_TIMER, LOW);
    apic_write(APIC_INITIAL, 100000);
    check("timer-one-shot", wait_for(LOW, 1));
    check_equal("timer-one-shot-ends", apic_read(APIC_CURRENT), 0);
    count[LOW] = 0;
    apic_write(APIC_TIMER, LOW | 1 << 17);
    apic_write(APIC_INITIAL, 100000);
    check("timer-periodic", wait_for(LOW, 3));
    apic_write(APIC_INITIAL, 0);
    apic_write(APIC_TIMER, LVT_MASKED);
    __asm__ volatile("sti; nop; nop; cli");
    if (cpuid(1, 0).c & BIT(24)) {
        u64 deadline;

        count[LOW] = 0;
        apic_write(APIC_TIMER, LOW | 2 << 17);
        __asm__ volatile("mfence");
        deadline = rdtsc() + (1ULL << 40); /* far away, however slow this is */
        wrmsr(MSR_TSC_DEADLINE, deadline);
        check_equal("tsc-deadline-reads-back", rdmsr(MSR_TSC_DEADLINE), deadline);
        deadline = rdtsc() + 1000000;
        wrmsr(MSR_TSC_DEADLINE, deadline);
        check("tsc-deadline", wait_for(LOW, 1));
        check("tsc-deadline-not-early", rdtsc() >= deadline);
        check_equal("tsc-deadline-clears", rdmsr(MSR_TSC_DEADLINE), 0);
        count[LOW] = 0;
        wrmsr(MSR_TSC_DEADLINE, 1);
        check("tsc-deadline-in-the-past", wait_for(LOW, 1));
        apic_write(APIC_TIMER, LVT_MASKED);
    } else {
        skip("tsc-deadline", "not there");
    }
}

static void nmi(void)
{
    count[NMI] = 0;
    send_nmi();
    for (volatile int i = 0; i < 1000; i++)
        ;
    check_equal("nmi-by-ipi-with-if-clear", count[NMI], 2);
}

static void pic(u8 master, u8 slave)
{
    outb(0x20, 0x11);
    outb(0x21, 0x20);
    outb(0x21, 4);
    outb(0x21, 1);
    outb(0xa0, 0x11);
    outb(0xa1, 0x28);
    outb(0xa1, 2);
    outb(0xa1, 1);
    outb(0x21, master);
    outb(0xa1, slave);
}

static void legacy(void)
{
    apic_write(APIC_LINT0, 7 << 8); /* ExtINT */
    pic(0xfe, 0xff);
    count[0x20] = 0;
    outb(0x43, 0x34);
    outb(0x40, 0xa9); /* 1193 ticks: a millisecond */
    outb(0x40, 0x04);
    check("pit-by-pic", wait_for(0x20, 3));
    outb(0x43, 0x30); /* mode 0 with no count: still */
    outb(0x70, 0x0a);
    outb(0x71, 0x26);
    outb(0x70, 0x0b);
    outb(0x71, 0x42); /* periodic, 24 hours */
    outb(0x70, 0x0c);
    inb(0x71);
    pic(0xfb, 0xfe);
    /* ICW1 forgets the edge of a flag that was set meanwhile, and without this no other would come. */
    outb(0x70, 0x0c);
    inb(0x71);
    count[0x28] = 0;
    check("rtc-periodic-by-slave-pic", wait_for(0x28, 1));
    outb(0x70, 0x0c);
    check("rtc-status-c", (inb(0x71) & 0xc0) == 0xc0);
    outb(0x70, 0x0b);
    outb(0x71, 0x02);
    outb(0x70, 0x0c);
    inb(0x71);
    pic(0xff, 0xff);
    apic_write(APIC_LINT0, LVT_MASKED);
}

static void ioapic_write(u32 reg, u32 v)
{
    *(volatile u32 *)IOAPIC = reg;
    *(volatile u32 *)(IOAPIC + 16) = v;
}

static void ioapic(void)
{
    u32 id = apic_read(0x20);

    count[LOW] = 0;
    ioapic_write(0x10 + 2 * 2 + 1, id);
    ioapic_write(0x10 + 2 * 2, LOW); /* pin 2, the PIT; edge, fixed, physical */
    outb(0x43, 0x34);
    outb(0x40, 0xa9);
    outb(0x40, 0x04);
    check("pit-by-ioapic", wait_for(LOW, 3));
    outb(0x43, 0x30);
    count[LOW] = 0;
    {
        volatile u64 *hpet = (volatile u64 *)HPET;
        u64 period = hpet[0] >> 32; /* femtoseconds */

        check("hpet-period", period && period <= 100000000);
        hpet[2] = 3; /* enable, legacy replacement: timer 0 at pin 2 */
        hpet[0x100 / 8] = 1 << 2;
        hpet[0x108 / 8] = hpet[0xf0 / 8] + 1000000000000ULL / period;
        check("hpet-one-shot-by-ioapic", wait_for(LOW, 1));
        hpet[0x100 / 8] = 0;
        hpet[2] = 0;
    }
    ioapic_write(0x10 + 2 * 2, LVT_MASKED);
}

static u16 pit_count(void)
{
    u8 low;

    outb(0x43, 0); /* latch channel 0 */
    low = inb(0x40);
    return (u16)(low | inb(0x40) << 8);
}

/* 20 ms by the HPET are 23864 ticks of the PIT, and twice as long twice as many of the APIC timer. */
static void rates(void)
{
    volatile u64 *hpet = (volatile u64 *)HPET;
    u64 window = 20000000000000ULL / (hpet[0] >> 32), start;
    bool pit_ok = false, apic_ok = false;
    u32 ticks[2];
    u16 pit;

    hpet[2] = 1;
    apic_write(APIC_TIMER, LVT_MASKED);
    /* A busy host may leave the guest waiting between two readings: the best of some. */
    for (unsigned tries = 0; tries < 20 && !(pit_ok && apic_ok); tries++) {
        outb(0x43, 0x34);
        outb(0x40, 0);
        outb(0x40, 0);
        for (unsigned n = 0; n < 2; n++) {
            apic_write(APIC_INITIAL, 0xffffffff);
            start = hpet[0xf0 / 8];
            while (hpet[0xf0 / 8] - start < window << n)
                ;
            ticks[n] = 0xffffffff - apic_read(APIC_CURRENT);
        }
        start = hpet[0xf0 / 8];
        pit = pit_count();
        while (hpet[0xf0 / 8] - start < window)
            ;
        pit = (u16)(pit - pit_count());
        pit_ok |= pit > 22000 && pit < 40000;
        apic_ok |= ticks[1] > ticks[0] && ticks[1] / 3 < ticks[0];
    }
    check("pit-runs-as-the-hpet", pit_ok);
    check("apic-timer-runs-as-the-hpet", apic_ok);
    outb(0x43, 0x30);
    apic_write(APIC_INITIAL, 0);
    hpet[2] = 0;
}

/* Interrupts that end by the word, one by one and two at once: each must let the next one come. */
static void pv_eoi(void)
{
    if (cpuid(0x40000000, 0).b != 0x4b4d564b || !(cpuid(0x40000001, 0).a & BIT(6))) {
        skip("pv-eoi", "not there");
        return;
    }
    FAULTS("pv-eoi-reserved", GP, 0, "wrmsr", : : "c"(MSR_PV_EOI), "a"(2), "d"(0));
    trap_handlers[LOW] = trap_handlers[HIGH] = on_pv;
    wrmsr(MSR_PV_EOI, (word)&eoi_word | 1);
    check_equal("pv-eoi-msr", rdmsr(MSR_PV_EOI), (word)&eoi_word | 1);
    count[LOW] = count[HIGH] = 0;
    for (unsigned i = 1; i <= 100; i++) {
        send(LOW);
        wait_for(LOW, i);
    }
    check_equal("pv-eoi-one-by-one", count[LOW], 100);
    send(LOW);
    send(HIGH);
    check("pv-eoi-two-at-once", wait_for(HIGH, 1) && wait_for(LOW, 101));
    check_equal("pv-eoi-none-in-service", apic_read(APIC_ISR + LOW / 32 * 16), 0);
    wrmsr(MSR_PV_EOI, 0);
    eoi_word = 0;
    send(LOW);
    check("pv-eoi-off", wait_for(LOW, 102));
    check_equal("pv-eoi-off-word", eoi_word, 0);
    trap_handlers[LOW] = trap_handlers[HIGH] = on_apic;
}

static void x2apic_mode(void)
{
    if (!(cpuid(1, 0).c & BIT(21))) {
        skip("x2apic", "not there");
        return;
    }
    FAULTS("x2apic-msr-in-xapic-mode", GP, 0, "rdmsr", : : "c"(0x802) : "eax", "edx");
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | BIT(10));
    x2apic = true;
    check_equal("x2apic-id", apic_read(0x20), cpuid(1, 0).b >> 24);
    count[LOW] = 0;
    wrmsr(0x83f, LOW); /* SELF IPI */
    __asm__ volatile("sti; nop; nop; cli" ::: "memory");
    check_equal("x2apic-self-ipi", count[LOW], 1);
    wrmsr(0x830, SELF | LOW);
    __asm__ volatile("sti; nop; nop; cli" ::: "memory");
    check_equal("x2apic-icr", count[LOW], 2);
    FAULTS("x2apic-eoi-nonzero", GP, 0, "wrmsr", : : "c"(0x80b), "a"(1), "d"(0));
    FAULTS("x2apic-back-to-xapic", GP, 0, "wrmsr",
           :
           : "c"(MSR_APIC_BASE), "a"((u32)rdmsr(MSR_APIC_BASE) & ~(u32)BIT(10)), "d"(0));
    timer();
}

void guest_main(void)
{
    trap_handlers[LOW] = trap_handlers[HIGH] = on_apic;
    trap_handlers[0x20] = trap_handlers[0x28] = on_pic;
    trap_handlers[NMI] = on_nmi;
    pic(0xff, 0xff);
    apic_write(APIC_SVR, 0x1ff);
    apic_write(APIC_LINT0, LVT_MASKED);
    apic_write(APIC_TPR, 0);
    shadows();
    priorities();
    timer();
    nmi();
    legacy();
    ioapic();
    rates();
    pv_eoi();
    check_group = "x2-";
    x2apic_mode();
}
