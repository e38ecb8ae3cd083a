#ifdef __x86_64__

#include "smp.h"

#define TRAMPOLINE 0x8000UL
#define STACK_SIZE 16384
#define PATIENCE 50000000000ULL /* TSC ticks */
#define ICR_INIT 0x4500u
#define ICR_STARTUP 0x4600u
#define TO_OTHERS (3u << 18)

/*
 * What a processor runs after a start-up IPI, copied to TRAMPOLINE: from real mode right into long mode, by the
 * first processor's tables.
 */
__asm__(".code16\n"
        "ap_start:\n"
        "    cli\n"
        "    xorw %ax, %ax\n"
        "    movw %ax, %ds\n"
        "    lgdtl 0x8000 + ap_gdt - ap_start\n"
        "    movl 0x8000 + ap_cr4 - ap_start, %eax\n"
        "    movl %eax, %cr4\n"
        "    movl 0x8000 + ap_cr3 - ap_start, %eax\n"
        "    movl %eax, %cr3\n"
        "    movl $0xc0000080, %ecx\n"
        "    rdmsr\n"
        "    orl $0x900, %eax\n"
        "    wrmsr\n"
        "    movl 0x8000 + ap_cr0 - ap_start, %eax\n"
        "    movl %eax, %cr0\n"
        "    ljmpl $0x08, $ap_start64\n"
        "    .balign 8\n"
        "ap_gdt: .skip 8\n"
        "ap_cr0: .long 0\n"
        "ap_cr3: .long 0\n"
        "ap_cr4: .long 0\n"
        "ap_end:\n"
        ".code64\n"
        "ap_start64:\n"
        "    movl $0x10, %eax\n"
        "    movl %eax, %ds\n"
        "    movl %eax, %es\n"
        "    movl %eax, %ss\n"
        "    movl $1, %edi\n"
        "    lock xaddl %edi, ap_stacks_taken\n"
        "    leal 1(%rdi), %esp\n"
        "    imull $16384, %esp\n"
        "    addq $ap_stacks, %rsp\n"
        "    call ap_main\n");

extern u8 ap_start[], ap_gdt[], ap_cr0[], ap_cr3[], ap_cr4[], ap_end[];
u8 ap_stacks[SMP_MAX][STACK_SIZE] __attribute__((aligned(16)));
u32 ap_stacks_taken;
void ap_main(u32 stack) __attribute__((noreturn));

static volatile u32 online = 1;
static struct {
    volatile u32 number; /* of jobs so far */
    volatile u32 count, done;
    void (*volatile run)(unsigned cpu);
} job;

unsigned smp_cpu(void)
{
    return cpuid(1, 0).b >> 24;
}

void apic_send(u32 destination, u32 icr)
{
    apic_write(APIC_ICR_HIGH, destination << 24);
    apic_write(APIC_ICR, icr);
}

bool smp_wait_for(volatile u32 *at, u32 value)
{
    u64 start = rdtsc();

    while (*at != value) {
        if (rdtsc() - start > PATIENCE)
            return false;
        pause();
    }
    return true;
}

void ap_main(u32 stack)
{
    u32 seen = 0;
    unsigned cpu;

    load_tables();
    apic_write(APIC_SVR, 0x1ff);
    cpu = smp_cpu();
    if (stack >= SMP_MAX - 1 || cpu >= SMP_MAX)
        for (;;)
            __asm__ volatile("cli; hlt");
    __asm__ volatile("lock incl %0" : "+m"(online));
    for (;;) {
        while (job.number == seen)
            pause();
        seen = job.number;
        if (cpu < job.count) {
            job.run(cpu);
            __asm__ volatile("lock incl %0" : "+m"(job.done));
        }
    }
}

static void wait_ticks(u64 ticks)
{
    for (u64 start = rdtsc(); rdtsc() - start < ticks;)
        pause();
}

unsigned smp_start(void)
{
    u8 *at = (u8 *)TRAMPOLINE;
    u32 before;

    memcpy(at, ap_start, (word)(ap_end - ap_start));
    memcpy(at + (ap_gdt - ap_start), &gdt_pointer.limit, 2);
    memcpy(at + (ap_gdt - ap_start) + 2, &gdt_pointer.base, 4);
    *(u32 *)(at + (ap_cr0 - ap_start)) = (u32)cr0();
    *(u32 *)(at + (ap_cr3 - ap_start)) = (u32)cr3();
    *(u32 *)(at + (ap_cr4 - ap_start)) = (u32)cr4();
    apic_write(APIC_SVR, 0x1ff);
    apic_send(0, ICR_INIT | TO_OTHERS);
    apic_send(0, ICR_STARTUP | TO_OTHERS | TRAMPOLINE >> 12);
    do { /* until no more come */
        before = online;
        wait_ticks(1000000000);
    } while (before != online || before == 1);
    return before;
}

void smp_run(unsigned count, void (*run)(unsigned cpu))
{
    job.count = count;
    job.done = 0;
    job.run = run;
    fence();
    job.number++;
    run(0);
    while (job.done != count - 1)
        pause();
}

#endif
