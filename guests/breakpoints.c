/*
 * Debug exceptions: instruction, data and I/O breakpoints, general detect, single step and what
 * defers or suppresses them, and what DR6, RF and the frame say.
 *
 * Intel SDM vol. 3, chapter 17 (18 in later editions) and 6.8.3.
 */
#include "guest.h"

#define VECTOR_TEST 0x40
#define DR6_BD BIT(13)
#define DR6_BS BIT(14)
#define DR6_EMPTY 0xffff0ff0u
#define DR7_EMPTY 0x400u
#define DR7_GD BIT(13)

enum kind { EXECUTE, WRITE, IO, ACCESS };
enum length { ONE, TWO, EIGHT, FOUR };
#define DR7(n, kind, length) (1u << (2 * (n)) | ((kind) | (u32)(length) << 2) << (16 + 4 * (n)))

/* What each #DB since watch() found. */
static struct hit {
    word ip, dr6, dr7, flags, cx;
} hits[16];
static unsigned nhits, limit;
static word int_flags;
static unsigned ints;

static void on_debug(struct frame *f)
{
    if (nhits < ARRAY_SIZE(hits))
        hits[nhits] = (struct hit){f->ip, dr6(), dr7(), f->flags, f->cx};
    nhits++;
    set_dr6(DR6_EMPTY);
    f->flags |= FLAG_RF;
    if (nhits >= limit)
        f->flags &= ~(word)FLAG_TF;
}

static void on_int(struct frame *f)
{
    ints++;
    int_flags = f->flags;
}

/* Forgets what was found. Single step ends after `steps` traps. */
static void watch(unsigned steps, word dr7)
{
    nhits = ints = 0;
    limit = steps;
    set_dr6(DR6_EMPTY);
    set_dr7(DR7_EMPTY | dr7);
}

/* Where the n-th #DB was, from the start of the instructions of TRY; all ones: there was none. */
static word hit_at(unsigned n)
{
    return n < nhits ? hits[n].ip - trap_at : (word)-1;
}

#define TF_ON "pushf; orl $0x100, (" REG_SP "); popf\n\t"
#define TF_ON_LENGTH 9
#define STEP(steps, insn, ...)                                                                     \
    do {                                                                                           \
        watch(steps, 0);                                                                           \
        TRY(TF_ON insn, __VA_ARGS__);                                                              \
    } while (0)

static word step_at(unsigned n)
{
    return hit_at(n) - TF_ON_LENGTH;
}

static void single_step(void)
{
    u8 buffer[8];
    void *to = buffer;
    word n = 3, ss;

    STEP(2, "nop; nop", : : : "memory", "cc");
    check_equal("step-first", step_at(0), 1);
    check_equal("step-second", step_at(1), 2);
    check_equal("step-dr6", hits[0].dr6, DR6_EMPTY | DR6_BS);
    check("step-tf-in-frame", hits[0].flags & FLAG_TF);
    check("step-no-rf-in-frame", !(hits[0].flags & FLAG_RF));
    check("step-tf-clear-in-handler", nhits == 2);

    STEP(4, "rep stosb; nop", : "+D"(to), "+c"(n) : "a"(1) : "memory", "cc");
    check_equal("step-rep-first", step_at(0), 0);
    check_equal("step-rep-first-count", hits[0].cx, 2);
    check_equal("step-rep-last", step_at(2), 2);
    check_equal("step-rep-last-count", hits[2].cx, 0);
    check_equal("step-rep-then-next", step_at(3), 3);
    check("step-rep-rf-between", hits[0].flags & hits[1].flags & FLAG_RF);
    check("step-rep-no-rf-at-end", !(hits[2].flags & FLAG_RF));
    STEP(2, "rep stosb; nop", : "+D"(to), "+c"(n) : "a"(1) : "memory", "cc");
    check_equal("step-rep-of-none", step_at(0), 2);

    STEP(3, "mov %%ss, %k0; mov %k0, %%ss; nop; nop", : "=&a"(ss) : : "memory", "cc");
    check_equal("step-before-mov-ss", step_at(0), 2);
    check_equal("step-mov-ss-deferred", step_at(1), 5);
    check_equal("step-after-mov-ss", step_at(2), 6);
#ifndef __x86_64__
    STEP(2, "push %%ss; pop %%ss; nop; nop", : : : "memory", "cc");
    check_equal("step-before-pop-ss", step_at(0), 1);
    check_equal("step-pop-ss-deferred", step_at(1), 3);
    STEP(2, "push %%ds; pop %%ds; nop; nop", : : : "memory", "cc");
    check_equal("step-pop-ds", step_at(1), 2);
#endif

    STEP(16, "pushf; andl $~0x100, (" REG_SP "); popf; nop; nop", : : : "memory", "cc");
    check_equal("step-popf-clears-tf", step_at(2), 9);
    check_equal("step-popf-last", nhits, 3);
    check("step-popf-frame", !(hits[2].flags & FLAG_TF));

    /* INT n enters its handler with TF clear, and IRET's TF acts one instruction later. */
    STEP(1, "int $0x40; nop; nop", : : : "memory", "cc");
    check_equal("step-int-handler-ran", ints, 1);
    check("step-int-tf-in-frame", int_flags & FLAG_TF);
    check_equal("step-int-after-iret", step_at(0), 3);
    STEP(1, "cmp %0, %0; jne 1f; jmp 1f; nop; 1: nop", : : "a"(1) : "memory", "cc");
    check_equal("step-branch", step_at(0), 2);
    if (on_tcg()) {
        skip("step-wakes-hlt", "TCG sleeps on");
    } else {
        STEP(1, "hlt; nop", : : : "memory", "cc");
        check_equal("step-wakes-hlt", step_at(0), 1);
    }
    /* A fault is not stepped: the trap belongs to what completed. */
    STEP(2, "ud2", : : : "memory", "cc");
    check("step-fault-before-step", trap.vector == UD && !nhits && trap.flags & FLAG_TF);
}

static void instruction(void)
{
    static volatile u32 counter;
    u8 buffer[8];
    void *to = buffer;
    word n = 3, ss;

#define AT(label)                                                                                  \
    "mov"                                                                                          \
    " $" label ", %0; mov %0, %%dr0\n\t"
    watch(0, DR7(0, EXECUTE, ONE));
    TRY(AT("1f") "incl %1; 1: incl %1; 2: incl %1", : "=&r"(ss), "+m"(counter) : : "cc");
    check_equal("execute-once", nhits, 1);
    check_equal("execute-runs-all", counter, 3);
    check_equal("execute-ip", hits[0].ip, dr0());
    check_equal("execute-dr6", hits[0].dr6, DR6_EMPTY | 1);
    check("execute-no-rf-in-frame", !(hits[0].flags & FLAG_RF));

    watch(0, DR7(0, EXECUTE, ONE));
    TRY(AT("1f") "1: rep stosb", : "=&r"(ss), "+D"(to), "+c"(n) : "a"(1) : "memory", "cc");
    check_equal("execute-rep-once", nhits, 1);
    check_equal("execute-rep-finishes", n, 0);
    check_equal("execute-rep-before", hits[0].cx, 3);

    watch(0, DR7(0, EXECUTE, ONE) | DR7(1, EXECUTE, ONE));
    TRY(AT("1f") "mov $2f, %0; mov %0, %%dr1; nop; 1: nop; 2: nop", : "=&r"(ss) : :);
    check_equal("execute-rf-for-one-only", nhits, 2);
    check_equal("execute-second-dr6", hits[1].dr6, DR6_EMPTY | 2);

    watch(0, DR7(0, EXECUTE, ONE));
    TRY("mov %%ss, %%eax\n\t" AT("1f") "mov %%eax, %%ss; 1: nop; nop", : "=&r"(ss) : : "eax");
    check_equal("execute-after-mov-ss-inhibited", nhits, 0);

    watch(0, 0);
    TRY(AT("1f") "1: nop", : "=&r"(ss) : :);
    check_equal("execute-disabled", nhits, 0);
    watch(0, 2 | EXECUTE << 16);
    TRY(AT("1f") "1: nop", : "=&r"(ss) : :);
    check_equal("execute-global", nhits, 1);
    watch(0, DR7(0, EXECUTE, ONE));
    TRY(AT("1f") "jmp 1f; nop; 1: ud2", : "=&r"(ss) : :);
    check("execute-before-its-fault", nhits == 1 && trap.vector == UD);
    watch(0, 0);
}

static void data(void)
{
    static u8 memory[64] __attribute__((aligned(64)));
    void *to;
    const void *from;
    word n, ss = 0;

    set_dr0((word)(memory + 16));
    watch(0, DR7(0, WRITE, FOUR));
    TRY("movb %b1, (%0)", : : "a"(memory + 19), "c"(1) : "memory");
    check_equal("write-ip-behind", hit_at(0), 2);
    check_equal("write-dr6", hits[0].dr6, DR6_EMPTY | 1);
    check_equal("write-done-before", memory[19], 1);
    watch(0, DR7(0, WRITE, FOUR));
    TRY("movb (%0), %%al; movb %%al, 4(%0); movb %%al, -1(%0)",
        :
        : "r"(memory + 16)
        : "memory", "eax");
    check_equal("write-not-by-read-or-neighbours", nhits, 0);
    TRY("movl %k1, (%0)", : : "a"(memory + 13), "c"(1) : "memory");
    check_equal("write-overlap-below", nhits, 1);
    TRY("movl %k1, (%0)", : : "a"(memory + 12), "c"(1) : "memory");
    check_equal("write-no-overlap-below", nhits, 1);
    TRY("movw %w1, (%0)", : : "a"(memory + 19), "c"(1) : "memory");
    check_equal("write-overlap-above", nhits, 2);

    watch(0, DR7(0, ACCESS, TWO));
    TRY("movb (%0), %%al", : : "r"(memory + 17) : "eax");
    check_equal("access-by-read", nhits, 1);
    TRY("movb (%0), %%al", : : "r"(memory + 18) : "eax");
    check_equal("access-length-two", nhits, 1);
    TRY("lock incb (%0)", : : "r"(memory + 16) : "memory", "cc");
    check_equal("access-by-locked", nhits, 2);
#ifdef __x86_64__
    watch(0, DR7(0, WRITE, EIGHT));
    TRY("movb %b1, (%0)", : : "a"(memory + 23), "c"(1) : "memory");
    check_equal("write-length-eight", nhits, 1);
    TRY("movb %b1, (%0)", : : "a"(memory + 24), "c"(1) : "memory");
    check_equal("write-beyond-eight", nhits, 1);
#endif
    set_dr1((word)(memory + 17));
    watch(0, DR7(0, WRITE, ONE) | DR7(1, WRITE, ONE));
    TRY("movw %w1, (%0)", : : "a"(memory + 16), "c"(1) : "memory");
    check("write-two-at-once", nhits == 1 && hits[0].dr6 == (DR6_EMPTY | 3));

    /* A repeated one stops behind the iteration that touched it. */
    to = memory + 14;
    n = 4;
    watch(0, DR7(0, WRITE, ONE));
    TRY("rep stosb; nop", : "+D"(to), "+c"(n) : "a"(7) : "memory");
    check_equal("write-rep-ip", hit_at(0), 0);
    check_equal("write-rep-count", hits[0].cx, 1);
    check("write-rep-rf", hits[0].flags & FLAG_RF);
    check("write-rep-finishes", !n && nhits == 1 && memory[17] == 7);
    to = memory + 32;
    from = memory + 14;
    n = 3;
    watch(0, DR7(0, ACCESS, ONE));
    TRY("rep movsb; nop", : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    check_equal("access-rep-last-iteration", hit_at(0), 2);

    /* MOV SS from a watched place: the trap waits for the instruction behind it. */
    *(u16 *)(memory + 16) = SEL_DATA;
    watch(0, DR7(0, ACCESS, TWO));
    TRY("mov (%0), %%ss; nop; nop", : : "a"(memory + 16) : "memory");
    check_equal("access-mov-ss-deferred", hit_at(0), 3);
    watch(0, DR7(0, ACCESS, TWO));
    TRY("mov (%0), %%ss; int $0x40; nop", : : "r"(memory + 16) : "memory");
    check_equal("access-mov-ss-int-at-handler", hits[0].ip, (word)(trap_stubs + 16 * VECTOR_TEST));
    watch(0, DR7(0, ACCESS, TWO));
    TRY("mov (%0), %%ss; ud2", : : "r"(memory + 16) : "memory");
    check("access-mov-ss-fault-runs", trap.vector == UD);

    /* Pushes and pops are data too. */
    watch(0, DR7(0, WRITE, ONE));
    TRY("push %0; mov " REG_SP ", %0; mov %0, %%dr0; pop %0; push %0; pop %0",
        : "+a"(ss)
        :
        : "memory");
    set_dr7(DR7_EMPTY);
    check_equal("write-by-push", nhits, 1);
    /* What faults does not report. */
    set_dr0((word)memory + 16);
    watch(0, DR7(0, WRITE, ONE));
    TRY("lock; .byte 0x89, 0x00", : : "a"(memory + 16));
    check("write-not-by-ud", nhits == 0);
    watch(0, 0);
}

static void io(void)
{
    word old = cr4();

    set_dr2(0x80);
    set_cr4(old | (word)CR4_DE);
    watch(0, DR7(2, IO, ONE));
    TRY("outb %%al, $0x80; nop", :);
    check_equal("io-ip", hit_at(0), 2);
    check_equal("io-dr6", hits[0].dr6, DR6_EMPTY | 4);
    TRY("inb $0x80, %%al", : : : "eax");
    check_equal("io-in", nhits, 2);
    TRY("inb $0x81, %%al", : : : "eax");
    check_equal("io-other-port", nhits, 2);
    TRY("inw $0x7f, %%ax", : : : "eax");
    check_equal("io-overlap", nhits, 3);
    FAULTS("dr4-with-de", UD, 0, ".byte 0x0f, 0x21, 0xe0", : : : "eax");
    FAULTS("dr5-to-with-de", UD, 0, ".byte 0x0f, 0x23, 0xe8", : : "a"(0));
    watch(0, 0);
    set_cr4(old);
}

static void registers(void)
{
    static volatile u32 watched;
    word v = 0;

    set_dr6(0);
    check_equal("dr6-fixed-ones", dr6(), DR6_EMPTY);
    set_dr6(0xe00fu);
    check_equal("dr6-writable", dr6() & ~BIT(11), (DR6_EMPTY | 0xe00f) & ~BIT(11));
    __asm__ volatile(".byte 0x0f, 0x21, 0xe0" : "=a"(v)); /* mov eax, dr4 */
    check_equal("dr4-is-dr6", v, dr6());
    set_dr6(DR6_EMPTY);
    set_dr7(0);
    check_equal("dr7-fixed-one", dr7(), DR7_EMPTY);
    set_dr7(0xd000);
    check_equal("dr7-fixed-zeros", dr7() & 0xf800 & ~BIT(11), 0);
    set_dr7(0x300);
    check_equal("dr7-exact", dr7(), DR7_EMPTY | 0x300);
    set_dr7(DR7_EMPTY);
    set_dr3((word)-1);
    check_equal("dr3-all-bits", dr3(), (word)-1);
#ifdef __x86_64__
    FAULTS("dr7-high-gp", GP, 0, "mov %0, %%dr7", : : "r"(BIT(32)));
    FAULTS("dr6-high-gp", GP, 0, "mov %0, %%dr6", : : "r"(BIT(63)));
#endif
    /* DR6 gathers: nothing but software clears BS. */
    watch(0, 0);
    set_dr6(DR6_EMPTY | DR6_BS);
    set_dr0((word)&watched);
    set_dr7(DR7_EMPTY | DR7(0, ACCESS, FOUR));
    __asm__ volatile("" : : "r"(watched));
    check("dr6-keeps-bs", hits[0].dr6 & DR6_BS && hits[0].dr6 & 1);
    watch(0, 0);
}

static void general_detect(void)
{
    word v;

    watch(0, 0);
    nhits = 0;
    trap_handlers[DB] = NULL;
    set_dr6(DR6_EMPTY);
    set_dr7(DR7_EMPTY | DR7_GD);
    TRY("mov %%dr0, %0", : "=r"(v) :);
    check("gd-fault", trap.vector == DB && trap.ip == trap_at);
    check("gd-cleared", dr7() == DR7_EMPTY);
    check_equal("gd-dr6", dr6(), DR6_EMPTY | DR6_BD);
    set_dr6(DR6_EMPTY);
    set_dr7(DR7_EMPTY | DR7_GD);
    TRY("mov %0, %%dr7", : : "r"((word)DR7_EMPTY));
    check("gd-write-fault", trap.vector == DB && trap.ip == trap_at && dr7() == DR7_EMPTY);
    set_dr6(DR6_EMPTY);
    trap_handlers[DB] = on_debug;
}

#ifdef __x86_64__
#define MSR_STAR 0xc0000081
#define MSR_LSTAR 0xc0000082
#define MSR_SFMASK 0xc0000084

void step_syscall_entry(void), step_syscall_next(void), step_syscall_user(void);
__asm__(".text\nstep_syscall_entry: nop\nstep_syscall_next: nop\n"
        "sysretq\n"
        "step_syscall_user: syscall\n1: nop\nnop\nret\n");

/* SYSCALL and SYSRET look at TF when they are done (SYSCALL by what FMASK left of it). */
static void syscall_step(void)
{
    word after = (word)step_syscall_user + 2;

    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    wrmsr(MSR_STAR, (u64)(SEL_USER_CODE32) << 48 | (u64)SEL_CODE << 32);
    wrmsr(MSR_LSTAR, (word)step_syscall_entry);
    wrmsr(MSR_SFMASK, FLAG_TF | FLAG_IF);
    watch(1, 0);
    limit = 2;
    trap_handlers[DB] = on_debug;
    run_user(step_syscall_user, FLAG_TF);
    /* IRET's TF acts behind SYSCALL, which masked it; SYSRET brings it back. */
    check_equal("step-syscall-masked-sysret-traps", hits[0].ip, after);
    check_equal("step-sysret-then-next", hits[1].ip, after + 1);
    wrmsr(MSR_SFMASK, FLAG_IF);
    watch(1, 0);
    run_user(step_syscall_user, FLAG_TF);
    check_equal("step-syscall-unmasked", hits[0].ip, (word)step_syscall_entry);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) & ~EFER_SCE);
}
#endif

void guest_main(void)
{
    trap_handlers[DB] = on_debug;
    trap_handlers[VECTOR_TEST] = on_int;
    single_step();
    instruction();
    data();
    io();
    registers();
    general_detect();
#ifdef __x86_64__
    syscall_step();
#endif
}
