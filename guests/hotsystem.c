/*
 * System instructions that run so often that a translator has its own ways for them: SYSCALL and SYSRET,
 * interrupts and IRET, page faults, SWAPGS, STAC and CLAC, segment and control registers. Each lap checks
 * what it did; other guests have the same, once.
 */
#include "guest.h"

#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_FMASK 0xc0000084
#define MSR_KERNEL_GS_BASE 0xc0000102
#define WINDOW 0x4000000UL
#define LAPS 300
#define VECTOR 0x50

extern u64 boot_pml4[];
void syscall_entry(void);

static u64 table[512] __attribute__((aligned(4096)));
static u64 kernel_page[512] __attribute__((aligned(4096)));
static u64 gs_areas[2] = {1, 2};
static volatile u64 interrupts, faults, bad_faults;
volatile u64 syscalls, bad_entries; /* by name: syscall_entry */
static volatile bool user_done_right;

static u64 *page_directory(void)
{
    u64 *upper = (u64 *)(boot_pml4[0] & ~0xfffULL);

    return (u64 *)(upper[0] & ~0xfffULL);
}

/* Whether all that is mapped from the start is there for user code. */
static void set_user_pages(bool on)
{
    u64 *pd = page_directory();

    for (unsigned n = 0; n < 512; n++)
        pd[n] = on ? pd[n] | 4 : pd[n] & ~4ULL;
    set_cr3(cr3());
}

/* A second mapping of a page, with rights of its own. */
static void map_window(const void *page, u64 rights)
{
    page_directory()[WINDOW >> 21] = (word)table | 7;
    table[(WINDOW >> 12) & 511] = (word)page | rights;
    __asm__ volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
}

/* --- SWAPGS --- */

static void swaps_gs(void)
{
    bool right = true;

    wrmsr(0xc0000101, (word)&gs_areas[0]);
    wrmsr(MSR_KERNEL_GS_BASE, (word)&gs_areas[1]);
    for (unsigned n = 0; n < LAPS; n++) {
        u64 kernel, user;

        __asm__ volatile("swapgs\n\tmov %%gs:0, %0\n\tswapgs\n\tmov %%gs:0, %1"
                         : "=&r"(kernel), "=&r"(user));
        right &= kernel == 2 && user == 1;
    }
    check("swapgs", right);
    __asm__ volatile("swapgs");
    check_equal("swapgs-base", rdmsr(0xc0000101), (word)&gs_areas[1]);
    check_equal("swapgs-kernel-base", rdmsr(MSR_KERNEL_GS_BASE), (word)&gs_areas[0]);
}

/* --- SYSCALL --- */

/* Returns what is in the window, which is the kernel's. */
__asm__("syscall_entry:\n"
        "    mov %cs, %eax\n"
        "    cmp $0x08, %ax\n" /* SEL_CODE */
        "    je 1f\n"
        "    incq bad_entries\n"
        "1:  mov $0x4000000, %eax\n" /* WINDOW */
        "    mov (%rax), %rax\n"
        "    incq syscalls\n"
        "    sysretq\n");

static void user_syscalls(void)
{
    bool right = true;

    for (unsigned n = 0; n < LAPS; n++) {
        u64 value, flags, next, at;

        __asm__ volatile("lea 1f(%%rip), %2\n\tstc\n\tsyscall\n1:\tpushf\n\tpop %1"
                         : "=&a"(value), "=&r"(flags), "=&r"(next), "=c"(at)
                         :
                         : "r11", "memory", "cc");
        right &= value == 77 && (flags & FLAG_CF) && next == at;
        TRY("mov (%0), %0", : "=r"(value) : "0"(WINDOW) : "memory");
        right &= trap.vector == PF && trap.error == 5 && trap.cr2 == WINDOW;
    }
    user_done_right = right;
}

static void calls_system(void)
{
    wrmsr(MSR_STAR, (u64)SEL_CODE << 32 | (u64)SEL_USER_CODE32 << 48);
    wrmsr(MSR_LSTAR, (word)syscall_entry);
    wrmsr(MSR_FMASK, FLAG_IF | FLAG_DF | FLAG_TF);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    kernel_page[0] = 77;
    map_window(kernel_page, 3);
    check("syscall-user", run_user(user_syscalls, FLAG_IF) && user_done_right);
    check_equal("syscalls", syscalls, LAPS);
    check_equal("syscall-bad-entries", bad_entries, 0);
}

/* --- Interrupts --- */

static void on_interrupt(struct frame *frame)
{
    interrupts++;
    bad_entries +=
        (frame->cs & 3) != 3 || !(frame->flags & FLAG_CF) || *(volatile u64 *)WINDOW != 77;
    frame->ax++;
}

static void user_interrupts(void)
{
    bool right = true;

    for (u64 n = 0; n < LAPS; n++) {
        u64 value = n, flags;

        __asm__ volatile("stc\n\tint %2\n\tpushf\n\tpop %1"
                         : "+a"(value), "=&r"(flags)
                         : "i"(VECTOR)
                         : "memory", "cc");
        right &= value == n + 1 && (flags & FLAG_CF);
    }
    user_done_right = right;
}

static void interrupts_itself(void)
{
    idt[VECTOR].type |= GATE_DPL3;
    trap_handlers[VECTOR] = on_interrupt;
    map_window(kernel_page, 3);
    check("int-user", run_user(user_interrupts, FLAG_IF) && user_done_right);
    check_equal("interrupts", interrupts, LAPS);
    check_equal("int-bad-entries", bad_entries, 0);
    trap_handlers[VECTOR] = NULL;
}

/* --- Page faults --- */

/* Maps what was touched; a page that is there has become read-only since, and becomes writable. */
static void on_page_fault(struct frame *frame)
{
    u64 *entry = &table[(WINDOW >> 12) & 511], want = *entry & 1 ? 7 : 6;

    faults++;
    bad_faults += cr2() != WINDOW + 24 || frame->error != want || (frame->cs & 3) != 3;
    *entry = (word)kernel_page | (*entry & 1 ? 7 : 5);
    __asm__ volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
}

/* The kernel unmaps it again. */
static void on_unmap(struct frame *frame)
{
    (void)frame;
    table[(WINDOW >> 12) & 511] = 0;
    __asm__ volatile("invlpg (%0)" : : "r"(WINDOW) : "memory");
}

static void user_touches(void)
{
    volatile u64 *at = (volatile u64 *)(WINDOW + 24);
    bool right = true;

    for (u64 n = 0; n < LAPS; n++) {
        u64 flags;

        __asm__ volatile("stc\n\tmovq %2, (%1)\n\tpushf\n\tpop %0"
                         : "=&r"(flags)
                         : "r"(at), "r"(n)
                         : "memory", "cc");
        right &= *at == n && (flags & FLAG_CF);
        __asm__ volatile("int %0" : : "i"(VECTOR) : "memory");
    }
    user_done_right = right;
}

static void touches_pages(void)
{
    map_window(NULL, 0);
    trap_handlers[PF] = on_page_fault;
    trap_handlers[VECTOR] = on_unmap;
    check("page-faults-user", run_user(user_touches, FLAG_IF) && user_done_right);
    trap_handlers[PF] = trap_handlers[VECTOR] = NULL;
    check_equal("page-faults", faults, 2 * LAPS);
    check_equal("page-faults-as-wanted", bad_faults, 0);
}

/* --- STAC and CLAC --- */

static void guards_user_pages(void)
{
    bool right = true;
    u64 value = 0;

    if (!(cpuid(7, 0).b & BIT(20))) {
        skip("smap", "not there");
        return;
    }
    set_user_pages(false); /* but for the window */
    map_window(kernel_page, 7);
    set_cr4(cr4() | CR4_SMAP);
    for (unsigned n = 0; n < LAPS; n++) {
        TRY("stac\n\tmov (%1), %0\n\tclac", : "=&r"(value) : "r"(WINDOW) : "memory", "cc");
        right &= value == kernel_page[0] && trap.vector == NONE;
        TRY("mov (%1), %0", : "=&r"(value) : "r"(WINDOW) : "memory");
        right &= trap.vector == PF && trap.error == 1;
    }
    set_cr4(cr4() & ~CR4_SMAP);
    set_user_pages(true);
    check("smap", right);
}

/* --- Segment and control registers --- */

static void moves_registers(void)
{
    bool right = true;

    if (cpuid(7, 0).b & BIT(0))
        set_cr4(cr4() | CR4_FSGSBASE);
    for (u64 n = 0; n < LAPS; n++) {
        u16 selector = n & 1 ? SEL_DATA : 0, got_ds, got_es;
        u8 writable;

        __asm__ volatile("mov %3, %%ds\n\tmov %3, %%es\n\tmov %%ds, %0\n\tmov %%es, %1\n\t"
                         "verw %4\n\tsetz %2"
                         : "=&r"(got_ds), "=&r"(got_es), "=&r"(writable)
                         : "r"(selector), "m"(selector)
                         : "cc");
        right &= got_ds == selector && got_es == selector && writable == (n & 1);
        set_cr2(n);
        right &= cr2() == n;
        set_cr3(cr3());
        if (cr4() & CR4_FSGSBASE) {
            u64 base;

            __asm__ volatile("wrfsbase %1\n\trdfsbase %0" : "=r"(base) : "r"(n));
            right &= base == n;
        }
    }
    check("registers", right);
    __asm__ volatile("mov %0, %%ds\n\tmov %0, %%es" : : "r"(SEL_DATA));
}

void guest_main(void)
{
    swaps_gs();
    calls_system();
    interrupts_itself();
    touches_pages();
    guards_user_pages();
    moves_registers();
}
