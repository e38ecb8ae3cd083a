/*
 * What leaving the guest costs: cycles of the TSC for one CPUID, port write, MMIO write, a timer's interrupt awake and
 * in HLT, first touch of a page, and an IPI. bench/exits runs it under each engine.
 *
 * Each is done in several rounds, and the fastest counts: an interrupted round is not what it costs. A
 * page has only one first touch, so those rounds each have pages of their own.
 */
#include "smp.h"

#define ROUNDS 5
#define CALLS 200
#define PAGES 512
#define PAGE_SIZE 4096
#define FRESH_MEMORY 0x2000000 /* 32 MiB: beyond the guest's image */

#define PORT_UNUSED 0x80 /* POST codes: a port that takes a byte and does nothing with it */
#define IOAPIC_SELECT 0xfec00000

#define APIC_TIMER_TSC_DEADLINE 0x40000
#define CPUID_TSC_DEADLINE (1u << 24) /* leaf 1, ECX */
#define MSR_TSC_DEADLINE 0x6e0
#define APIC_ENABLE_SPURIOUS_FF 0x1ff
#define VECTOR_TIMER 0x40
#define WAKES 20
#define WAKE_CYCLES 5000000
#define VECTOR_IPI 0x41
#define IPIS 50
#define IPI_PAUSE 200000 /* cycles: the other is asleep again */

static void write32(word at, u32 value)
{
    *(volatile u32 *)at = value;
}

static void do_cpuid(unsigned round)
{
    (void)round;
    for (unsigned i = 0; i < CALLS; i++)
        cpuid(0, 0);
}

static void do_port(unsigned round)
{
    (void)round;
    for (unsigned i = 0; i < CALLS; i++)
        outb(PORT_UNUSED, 0);
}

static void do_mmio(unsigned round)
{
    (void)round;
    for (unsigned i = 0; i < CALLS; i++)
        write32(IOAPIC_SELECT, 0);
}

static void do_touch(unsigned round)
{
    volatile u8 *memory = (volatile u8 *)(word)FRESH_MEMORY + (word)round * PAGES * PAGE_SIZE;

    for (unsigned i = 0; i < PAGES; i++)
        memory[(word)i * PAGE_SIZE] = 1;
}

/* When the timer's interrupt arrived. */
static volatile u64 woken_at;

static void timer_fired(struct frame *frame)
{
    (void)frame;
    woken_at = rdtsc();
    apic_write(APIC_EOI, 0);
}

/*
 * From the TSC's deadline to the handler, awake or halted. The wait is long enough for a host that polls for a while
 * to have put the processor's thread to sleep.
 */
static void measure_wake(const char *name, bool halt)
{
    u64 best = ~0ULL;

    for (unsigned i = 0; i < WAKES; i++) {
        u64 deadline = rdtsc() + WAKE_CYCLES;

        woken_at = 0;
        wrmsr(MSR_TSC_DEADLINE, deadline);
        while (!woken_at) {
            if (halt)
                __asm__ volatile("sti; hlt; cli" : : : "memory");
            else
                __asm__ volatile("sti; pause; cli" : : : "memory");
        }
        if (woken_at - deadline < best)
            best = woken_at - deadline;
    }
    print(name);
    print(" ");
    print_hex(best);
    print("\n");
}

static void measure_wakes(void)
{
    if (!(cpuid(1, 0).c & CPUID_TSC_DEADLINE))
        return;
    trap_handlers[VECTOR_TIMER] = timer_fired;
    apic_write(APIC_SVR, APIC_ENABLE_SPURIOUS_FF);
    apic_write(APIC_LVT_TIMER, APIC_TIMER_TSC_DEADLINE | VECTOR_TIMER);
    measure_wake("timer-awake", false);
    measure_wake("halt-wake", true);
}

static void measure(const char *name, void (*run)(unsigned round), u64 count)
{
    u64 best = ~0ULL;

    for (unsigned round = 0; round < ROUNDS; round++) {
        u64 begin = rdtsc(), took;

        run(round);
        took = rdtsc() - begin;
        if (took < best)
            best = took;
    }
    print(name);
    print(" ");
    print_hex(best / count);
    print("\n");
}

/* Set by the first processor: whether the second waits for IPIs in HLT, and that it need wait no more. */
static volatile bool target_halts, target_done;
static volatile u64 ipi_arrived;

static void ipi_handler(struct frame *frame)
{
    (void)frame;
    ipi_arrived = rdtsc();
    apic_write(APIC_EOI, 0);
}

static void wait_for_ipis(void)
{
    while (!target_done) {
        if (target_halts)
            __asm__ volatile("sti; hlt; cli" : : : "memory");
        else
            __asm__ volatile("sti; pause; cli" : : : "memory");
    }
}

/* From the command to the handler on the other processor; their TSCs are the same. */
static void measure_ipi(const char *name, bool halted)
{
    u64 best = ~0ULL;

    target_halts = halted;
    for (unsigned i = 0; i < IPIS; i++) {
        u64 begin = rdtsc();

        while (rdtsc() - begin < IPI_PAUSE)
            pause();
        ipi_arrived = 0;
        begin = rdtsc();
        apic_send(1, VECTOR_IPI);
        while (!ipi_arrived)
            pause();
        if (i && ipi_arrived - begin < best) /* the first may find it in the other loop */
            best = ipi_arrived - begin;
    }
    print(name);
    print(" ");
    print_hex(best);
    print("\n");
}

static void ipi_job(unsigned cpu)
{
    if (cpu) {
        wait_for_ipis();
        return;
    }
    measure_ipi("ipi", false);
    measure_ipi("ipi-wake", true);
    target_done = true;
    apic_send(1, VECTOR_IPI);
}

void guest_main(void)
{
    measure("cpuid", do_cpuid, CALLS);
    measure("port-write", do_port, CALLS);
    measure("mmio-write", do_mmio, CALLS);
    measure("page-first-touch", do_touch, PAGES);
    measure_wakes();
    trap_handlers[VECTOR_IPI] = ipi_handler;
    if ((cpuid(1, 0).b >> 16 & 0xff) > 1 && smp_start() > 1)
        smp_run(2, ipi_job);
    else
        skip("ipi", "one processor");
    check("measured", true);
}
