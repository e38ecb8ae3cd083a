/*
 * Debug registers and single steps: code, data and I/O breakpoints, general detect, RF, TF through
 * REP and over POPF and MOV SS. Built for 32 and 64 bits.
 *
 * Intel SDM vol. 3, 17.2 and 17.3. Data breakpoints are traps, code breakpoints faults.
 */
#include "guest.h"

#define DR6_NONE 0xffff0ff0UL
#define DR7_NONE 0x400UL
#define ENABLE(n) (1UL << (2 * (n)))
#define KIND(n, rw, len) ((unsigned long)((rw) | (len) << 2) << (16 + 4 * (n)))
enum { EXECUTE, WRITE, IO, ACCESS };
enum { LEN1, LEN2, LEN8, LEN4 };

static u32 watched[8] __attribute__((aligned(16)));
static u8 source[16], target[16];

static void arm(unsigned long dr7_value)
{
    set_dr6(DR6_NONE);
    set_dr7(DR7_NONE | dr7_value);
}

/* A #DB with these bits of DR6. */
static void expect_db(const char *name, word dr6_bits)
{
    word status = dr6();

    set_dr7(DR7_NONE);
    if (trap.vector != DB)
        check_equal(name, (u64)(long long)trap.vector, DB);
    else
        check_equal(name, status & 0xe00f, dr6_bits);
}

static void expect_nothing(const char *name)
{
    set_dr7(DR7_NONE);
    check_equal(name, (u64)(long long)trap.vector, (u64)(long long)NONE);
}

static void data(void)
{
    set_dr0((word)watched + 4);
    arm(ENABLE(0) | KIND(0, WRITE, LEN4));
    TRY("movl $1, 4(%0)", : : "r"(watched) : "memory");
    expect_db("write", 1);
    check("write-is-a-trap", watched[1] == 1 && trap.ip > trap_at);
    arm(ENABLE(0) | KIND(0, WRITE, LEN4));
    TRY("movl 4(%0), %%eax", : : "r"(watched) : "eax");
    expect_nothing("write-not-by-load");
    arm(ENABLE(0) | KIND(0, ACCESS, LEN4));
    TRY("movl 4(%0), %%eax", : : "r"(watched) : "eax");
    expect_db("access-load", 1);
    arm(ENABLE(0) | KIND(0, WRITE, LEN4));
    TRY("movb $2, 7(%0)", : : "r"(watched) : "memory");
    expect_db("write-last-byte", 1);
    arm(ENABLE(0) | KIND(0, WRITE, LEN4));
    TRY("movb $2, 8(%0); movb $2, 3(%0)", : : "r"(watched) : "memory");
    expect_nothing("write-beside");
    arm(ENABLE(0) | KIND(0, WRITE, LEN4));
    TRY("movl $2, 1(%0)", : : "r"(watched) : "memory");
    expect_db("write-overlapping", 1);
    set_dr3((word)watched + 16);
    arm(ENABLE(3) | KIND(3, WRITE, LEN1));
    TRY("movb $2, 16(%0)", : : "r"(watched) : "memory");
    expect_db("write-dr3", 8);
    arm(ENABLE(0) | KIND(0, ACCESS, LEN4) | ENABLE(3) | KIND(3, ACCESS, LEN4));
    TRY("addl $2, 4(%0)", : : "r"(watched) : "memory");
    expect_db("read-modify-write", 1);
    arm(0);
    TRY("movl $2, 4(%0)", : : "r"(watched) : "memory");
    expect_nothing("disabled");
}

static void code(void)
{
    word at;

    __asm__ volatile(MOVW "$breakpoint_code, %0" : "=r"(at));
    set_dr1(at);
    arm(ENABLE(1) | KIND(1, EXECUTE, LEN1));
    TRY("nop; .globl breakpoint_code; breakpoint_code: nop", :);
    check("code-is-a-fault", trap.ip == at);
    check("code-pushes-no-rf", !(trap.flags & FLAG_RF));
    expect_db("code", 2);
}

/* RF in the flags of IRET lets the instruction there run. */
static void resume_flag(void)
{
    word at;

    __asm__ volatile(MOVW "$resumed_code, %0" : "=r"(at));
    set_dr1(at);
    arm(ENABLE(1) | KIND(1, EXECUTE, LEN1));
#ifdef __x86_64__
    TRY("mov %%rsp, %%rcx; mov %%ss, %%eax; push %%rax; push %%rcx; pushf; orl $0x10000, (%%rsp);"
        "mov %%cs, %%eax; push %%rax; push $resumed_code; iretq; resumed_code: nop",
        : : : "rax", "rcx", "memory", "cc");
#else
    TRY("pushf; orl $0x10000, (%%esp); push %%cs; push $resumed_code; iretl; resumed_code: nop",
        : : : "memory", "cc");
#endif
    expect_nothing("rf-skips-code-breakpoint");
}

static void port(void)
{
    FAULTS("cr4-de-clear-dr4-is-dr6", NONE, 0, ".byte 0x0f, 0x21, 0xe0", : : : "eax");
    set_cr4(cr4() | (word)CR4_DE);
    FAULTS("cr4-de-dr4-ud", UD, 0, ".byte 0x0f, 0x21, 0xe0", : : : "eax");
    set_dr2(0x80);
    arm(ENABLE(2) | KIND(2, IO, LEN1));
    TRY("outb %%al, $0x80", : : "a"(0));
    expect_db("io-write", 4);
    arm(ENABLE(2) | KIND(2, IO, LEN1));
    TRY("inb $0x80, %%al", : : : "eax");
    expect_db("io-read", 4);
    arm(ENABLE(2) | KIND(2, IO, LEN1));
    TRY("outb %%al, $0xed", : : "a"(0));
    expect_nothing("io-other-port");
    set_cr4(cr4() & ~(word)CR4_DE);
}

static void general_detect(void)
{
    word x;

    arm(1 << 13);
    TRY("mov %%dr0, %0", : "=r"(x) :);
    check("gd-clears-gd", !(dr7() & 1 << 13));
    check("gd-is-a-fault", trap.ip == trap_at);
    expect_db("gd", BIT(13));
}

#ifdef __x86_64__
#define SET_TF "pushf; orl $0x100, (%%rsp); popf; "
#else
#define SET_TF "pushf; orl $0x100, (%%esp); popf; "
#endif
static volatile word step_ips[16];
static volatile unsigned steps;

static void count_step(struct frame *f)
{
    if (steps < ARRAY_SIZE(step_ips))
        step_ips[steps] = f->ip;
    steps++;
    if (steps >= 12)
        f->flags &= ~(word)FLAG_TF;
}

static void single_step(void)
{
    word di = (word)target, si = (word)source, count = 3, a, b;

    set_dr6(DR6_NONE);
    set_dr7(DR7_NONE);
    trap_handlers[DB] = count_step;
    steps = 0;
    __asm__ volatile(SET_TF "nop; nop; pushf; andl $~0x100, (" REG_SP "); popf; nop"
                     : : : "memory", "cc");
    check_equal("tf-steps", steps, 5); /* 2 NOPs, PUSHF, AND, POPF */
    steps = 0;
    __asm__ volatile(SET_TF "1: rep movsb; 2: pushf; andl $~0x100, (" REG_SP "); popf;"
                     MOVW "$1b, %3;" MOVW "$2b, %4"
                     : "+D"(di), "+S"(si), "+c"(count), "=r"(a), "=r"(b) : : "memory", "cc");
    check_equal("tf-rep-steps", steps, 6); /* an iteration each, then as above */
    check("tf-rep-ip", step_ips[0] == a && step_ips[1] == a && step_ips[2] == b);
    steps = 0;
    __asm__ volatile(SET_TF "movl %%ss, %%eax; movl %%eax, %%ss; 1: nop; 2: pushf;"
                     "andl $~0x100, (" REG_SP "); popf;" MOVW "$2b, %0"
                     : "=r"(b) : : "eax", "memory", "cc");
    check("tf-mov-ss-holds-the-trap", steps == 5 && step_ips[1] == b);
    steps = 0;
    TRY(SET_TF "ud2", : : : "memory", "cc");
    check("tf-fault-has-no-step", trap.vector == UD && steps == 0);
    check("tf-bs", dr6() & BIT(14));
    trap_handlers[DB] = NULL;
    set_dr6(DR6_NONE);
}

void guest_main(void)
{
    data();
    code();
    resume_flag();
    port();
    general_detect();
    single_step();
}
