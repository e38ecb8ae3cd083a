/*
 * What leaving the guest costs: cycles of the TSC for one CPUID, port write, MMIO write, wake from HLT,
 * and first touch of a page. bench/exits runs it under each engine.
 *
 * Each is done in several rounds, and the fastest counts: an interrupted round is not what it costs. A
 * page has only one first touch, so those rounds each have pages of their own.
 */
#include "guest.h"

#define ROUNDS 5
#define CALLS 200
#define PAGES 512
#define PAGE_SIZE 4096
#define FRESH_MEMORY 0x2000000 /* 32 MiB: beyond the guest's image */

#define PORT_UNUSED 0x80 /* POST codes: a port that takes a byte and does nothing with it */
#define IOAPIC_SELECT 0xfec00000

#define APIC 0xfee00000
#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_LVT_TIMER 0x320
#define APIC_TIMER_INITIAL 0x380
#define APIC_TIMER_DIVIDE 0x3e0
#define APIC_DIVIDE_BY_1 0xb
#define APIC_ENABLE_SPURIOUS_FF 0x1ff
#define VECTOR_TIMER 0x40
#define TIMER_NS 100000

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
    write32(APIC + APIC_EOI, 0);
}

/* From the moment that the timer was due, by the guest's own reckoning, to its handler. */
static void measure_halt(void)
{
    u64 asleep = ~0ULL, awake = ~0ULL;

    trap_handlers[VECTOR_TIMER] = timer_fired;
    write32(APIC + APIC_SVR, APIC_ENABLE_SPURIOUS_FF);
    write32(APIC + APIC_TIMER_DIVIDE, APIC_DIVIDE_BY_1);
    write32(APIC + APIC_LVT_TIMER, VECTOR_TIMER);
    for (unsigned i = 0; i < 2 * 20; i++) {
        bool halt = i & 1;
        u64 begin = rdtsc(), took;

        woken_at = 0;
        write32(APIC + APIC_TIMER_INITIAL, TIMER_NS);
        if (halt)
            __asm__ volatile("sti; hlt; cli" : : : "memory");
        else
            __asm__ volatile("sti" : : : "memory");
        while (!woken_at)
            __asm__ volatile("sti; pause" : : : "memory");
        __asm__ volatile("cli" : : : "memory");
        took = woken_at - begin;
        if (halt && took < asleep)
            asleep = took;
        else if (!halt && took < awake)
            awake = took;
    }
    print("halt-wake ");
    print_hex(asleep > awake ? asleep - awake : 0);
    print("\n");
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

void guest_main(void)
{
    measure("cpuid", do_cpuid, CALLS);
    measure("port-write", do_port, CALLS);
    measure("mmio-write", do_mmio, CALLS);
    measure("page-first-touch", do_touch, PAGES);
    measure_halt();
    check("measured", true);
}
