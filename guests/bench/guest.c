/*
 * The guest of bench/bochs: runs the kernels, and then kernels of what operating systems do.
 *
 * Each is a line "begin NAME", the work, and a line "end NAME CHECKSUM". Whoever reads the serial
 * port takes the time between, so that no clock of the guest's, which an emulator may bend, has a
 * part in it.
 */
#include "guest.h"

#include "kernels.h"

#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_FMASK 0xc0000084
#define VECTOR_CALL 0x80
#define PORT_COM1_LCR 0x3fb
#define PORT_COM1_LSR 0x3fd
#define LCR_8_BITS 3

#define PTE_P BIT(0)
#define PTE_RW BIT(1)
#define PTE_US BIT(2)
#define WINDOW (1ULL << 39) /* PML4[1]: addresses that are ours to map */
#define WINDOW_PAGES 256
#define PAGE 4096

static u64 window_pdpt[512] __attribute__((aligned(PAGE)));
static u64 window_pd[512] __attribute__((aligned(PAGE)));
static u64 window_pt[512] __attribute__((aligned(PAGE)));
static u8 window_memory[WINDOW_PAGES][PAGE] __attribute__((aligned(PAGE)));
static u64 faults;

/* For functions of ring 3, which take no arguments. */
static unsigned user_rounds;

/* The shortest ways into the kernel and back. The caller expects RCX and R11 to be lost. */
void enter_by_syscall(void);
void enter_by_interrupt(void);
u64 enter_count, enter_user_sp;
__asm__(".text\n"
        "enter_by_syscall:\n\t"
        "movq %rsp, enter_user_sp\n\t"
        "movq $trap_stack + 16384, %rsp\n\t"
        "pushq %rcx\n\t"
        "pushq %r11\n\t"
        "incq enter_count\n\t"
        "popq %r11\n\t"
        "popq %rcx\n\t"
        "movq enter_user_sp, %rsp\n\t"
        "sysretq\n"
        "enter_by_interrupt:\n\t"
        "incq enter_count\n\t"
        "iretq");

static void user_syscalls(void)
{
    for (unsigned i = user_rounds; i; i--)
        __asm__ volatile("syscall" : : : "rcx", "r11", "memory");
}

static void user_interrupts(void)
{
    for (unsigned i = user_rounds; i; i--)
        __asm__ volatile("int %0" : : "i"(VECTOR_CALL) : "memory");
}

static u64 run_syscall(unsigned n)
{
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    wrmsr(MSR_STAR, (u64)SEL_USER_CODE32 << 48 | (u64)SEL_CODE << 32);
    wrmsr(MSR_LSTAR, (word)enter_by_syscall);
    wrmsr(MSR_FMASK, FLAG_IF | FLAG_DF | FLAG_TF);
    user_rounds = n;
    enter_count = 0;
    return run_user(user_syscalls, 0) ? enter_count : 0;
}

static u64 run_interrupt(unsigned n)
{
    set_gate(VECTOR_CALL, (const void *)enter_by_interrupt, SEL_CODE, GATE_INT | GATE_DPL3);
    user_rounds = n;
    enter_count = 0;
    return run_user(user_interrupts, 0) ? enter_count : 0;
}

static void on_page_fault(struct frame *f)
{
    u64 page = (cr2() - WINDOW) / PAGE;

    if (page >= WINDOW_PAGES) {
        print("not ok page fault outside of the window\n");
        guest_exit(GUEST_FAILED);
    }
    faults++;
    window_pt[page] = (word)window_memory[page] | PTE_P | PTE_RW;
}

/* Demand paging: first touch faults, the handler maps, in the end all is unmapped. */
static u64 run_fault(unsigned n)
{
    faults = 0;
    trap_handlers[PF] = on_page_fault;
    while (n--) {
        for (unsigned i = 0; i < WINDOW_PAGES; i++)
            *(volatile u64 *)(WINDOW + i * PAGE) += i;
        for (unsigned i = 0; i < WINDOW_PAGES; i++) {
            window_pt[i] = 0;
            __asm__ volatile("invlpg (%0)" : : "r"(WINDOW + i * PAGE) : "memory");
        }
    }
    trap_handlers[PF] = NULL;
    return faults;
}

/* Switches of the address space, with 16 pages used in each. */
static u64 run_switch(unsigned n)
{
    u64 sum = 0;

    for (unsigned i = 0; i < WINDOW_PAGES; i++)
        window_pt[i] = (word)window_memory[i] | PTE_P | PTE_RW;
    while (n--) {
        set_cr3(cr3());
        for (unsigned i = 0; i < 16; i++)
            sum += *(volatile u64 *)(WINDOW + (n + i) % WINDOW_PAGES * PAGE);
    }
    for (unsigned i = 0; i < WINDOW_PAGES; i++)
        window_pt[i] = 0;
    set_cr3(cr3());
    return sum;
}

/* A driver that polls. */
static u64 run_port(unsigned n)
{
    u64 sum = 0;

    while (n--)
        sum += inb(PORT_COM1_LSR) != 0xff;
    return sum;
}

/* A just-in-time compiler: writes a small function, calls it, writes the next. */
static u64 run_patch(unsigned n)
{
    /* mov $imm32, %eax; ret */
    static u8 code[6] __attribute__((aligned(PAGE))) = {0xb8, 0, 0, 0, 0, 0xc3};
    u64 sum = 0;

    while (n--) {
        *(volatile u32 *)(code + 1) = n;
        sum += ((u32(*)(void))(word)code)();
        sum += ((u32(*)(void))(word)code)();
    }
    return sum;
}

static const struct kernel system_kernels[] = {
    {"syscall", run_syscall, 400000}, {"interrupt", run_interrupt, 200000},
    {"fault", run_fault, 500},        {"switch", run_switch, 60000},
    {"port", run_port, 1500000},      {"patch", run_patch, 200000},
};

static void run(const struct kernel *k)
{
    u64 sum;

    print("begin ");
    print(k->name);
    print("\n");
    sum = k->run(k->n);
    print("end ");
    print(k->name);
    print(" ");
    print_hex(sum);
    print("\n");
}

void guest_main(void)
{
    u64 *pml4 = (u64 *)(word)cr3();

    pml4[1] = (word)window_pdpt | PTE_P | PTE_RW | PTE_US;
    window_pdpt[0] = (word)window_pd | PTE_P | PTE_RW | PTE_US;
    window_pd[0] = (word)window_pt | PTE_P | PTE_RW | PTE_US;
    __asm__ volatile("fninit");
    outb(PORT_COM1_LCR, LCR_8_BITS); /* no firmware did it */
    kernels_prepare();
    for (unsigned i = 0; i < kernel_count; i++)
        run(&kernels[i]);
    for (unsigned i = 0; i < ARRAY_SIZE(system_kernels); i++)
        run(&system_kernels[i]);
    print("done\n");
}
