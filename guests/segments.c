/*
 * Segments, gates and far transfers: what every kind of descriptor, selector and limit lets
 * through, and the vector and error code of what it does not.
 *
 * Intel SDM vol. 3, chapters 3, 5 and 7; vol. 2, the operation of MOV, JMP, CALL, RET, IRET, LAR,
 * LSL, VERR, VERW and ARPL. Where AMD differs (APM vol. 2, 4.8; vol. 3), the check says so.
 *
 * A transfer that succeeds lands on `int $VECTOR_LANDED`, in whatever ring and width; landing and
 * fault both come to catch(), which notes where the processor was and goes on behind the TRY in the
 * ring that the test is at home in.
 */
#include "guest.h"

#define VECTOR_LANDED 0x46

#define S_ANY SEL_FREE           /* what a test is about; 16 bytes */
#define S_GATE (SEL_FREE + 0x10) /* 16 bytes */
#define S_CONFORMING (SEL_FREE + 0x20)
#define S_CODE1 (SEL_FREE + 0x29) /* ring 1, with its RPL */
#define S_DATA1 (SEL_FREE + 0x31)
#define S_LDT (SEL_FREE + 0x38)  /* 16 bytes */
#define S_TASK (SEL_FREE + 0x48) /* 16 bytes */
#define S_BEYOND 0xfff8

#ifdef __x86_64__
#define SEL_USER_CODE SEL_USER_CODE64
#define CODE_FLAGS 0xa /* G, L */
#else
#define SEL_USER_CODE SEL_USER_CODE32
#define CODE_FLAGS 0xc /* G, D */
#endif

/* Access bytes. */
#define CODE 0x9a
#define CODE_ONLY 0x98 /* not readable */
#define CONFORMING 0x9e
#define DATA 0x92
#define READ_ONLY 0x90
#define DOWN 0x96
#define DPL(n) ((n) << 5)
#define ABSENT 0x80 /* to be taken away */
#define ACCESSED BIT(40)
#define TYPE_LDT 0x82
#define TYPE_TSS 0x89
#define TYPE_BUSY 0x8b
#define TYPE_GATE16 0x84
#define TYPE_GATE32 0x8c

static struct {
    word cs, ss, sp, ip, ds, es, fs, gs;
} landed;
/* Where TRY goes on. */
static u16 home_cs = SEL_CODE, home_ss = SEL_DATA;
static u8 area[512] __attribute__((aligned(16)));
static u64 ldt[4] __attribute__((aligned(16)));
static word stack1[64];
static word frames[256 + 8]; /* RET's and IRET's operands lie at frames[256] */
static struct {
    u32 offset;
    u16 selector;
} __attribute__((packed)) pointer; /* of JMP and CALL: m16:32 */

void land(void);
__asm__("land: int $0x46\n");

static void catch (struct frame *f)
{
    trap.vector = (int)f->vector;
    trap.error = f->error;
    trap.ip = f->ip;
    landed.cs = f->cs;
    landed.ip = f->ip;
#ifdef __x86_64__
    landed.ss = f->ss;
    landed.sp = f->sp;
    __asm__("mov %%ds, %w0; mov %%es, %w1; mov %%fs, %w2; mov %%gs, %w3"
            : "=r"(landed.ds), "=r"(landed.es), "=r"(landed.fs), "=r"(landed.gs));
    landed.ds &= 0xffff;
    landed.es &= 0xffff;
    landed.fs &= 0xffff;
    landed.gs &= 0xffff;
    f->sp = trap_sp;
    f->ss = home_ss;
#else
    landed.ds = f->ds & 0xffff;
    landed.es = f->es & 0xffff;
    landed.fs = f->fs & 0xffff;
    landed.gs = f->gs & 0xffff;
    if (f->cs & 3) {
        landed.ss = f->ss;
        landed.sp = f->sp;
    }
    f->ds = f->es = home_ss;
    f->fs = f->gs = 0;
    /* To an outer ring: what lies there is the frame of a gate that is not returned through. */
    if (home_cs & 3) {
        f->sp = trap_sp;
        f->ss = home_ss;
    }
#endif
    f->cs = home_cs;
    f->ip = trap_resume;
    f->flags &= ~(word)(FLAG_TF | FLAG_RF | FLAG_NT);
    trap_resume = 0;
}

/* What the last TRY ended by, wherever in it. */
static void expect(const char *name, int vector, word error)
{
    if (trap.vector == vector && vector != NONE && vector != VECTOR_LANDED)
        check_equal(name, trap.error, error);
    else
        check_equal(name, (u64)(long long)trap.vector, (u64)(long long)vector);
}

static void expect_landed(const char *name, u16 cs)
{
    if (trap.vector == VECTOR_LANDED)
        check_equal(name, landed.cs & 0xffff, cs);
    else
        expect(name, VECTOR_LANDED, 0);
}

static void set(u16 selector, u64 d)
{
    gdt[selector / 8] = d;
}

static u64 flat(u8 access, u8 flags)
{
    return descriptor(0, 0xfffff, access, flags);
}

/* A call gate; the upper half of a 64-bit one is 0, as all offsets here are below 4 GiB. */
static u64 call_gate(u16 selector, word offset, u8 access, u8 params)
{
    return (offset & 0xffff) | (u64)selector << 16 | (u64)params << 32 | (u64)access << 40 |
           (u64)(offset >> 16 & 0xffff) << 48;
}

static void at_home_in_ring3(void (*fn)(void))
{
    home_cs = SEL_USER_CODE;
    home_ss = SEL_USER_DATA;
    if (!run_user(fn, 0))
        check("user-returns", false);
    home_cs = SEL_CODE;
    home_ss = SEL_DATA;
}

/* --- Loading data segments --- */

#define LOAD_ES(sel) TRY("mov %w0, %%es", : : "r"(sel) : "memory")
#define LOAD_SS(sel)                                                                               \
    TRY("mov %%ss, %%ecx; mov %w0, %%ss; mov %%ecx, %%ss", : : "r"(sel) : "ecx", "memory")

/* Of a descriptor loaded into ES, and into SS: what comes of it. */
struct load {
    const char *name;
    u8 access, rpl;
    short es, ss; /* a vector, or NONE */
};
static const struct load loads_ring0[] = {
    {"data", DATA, 0, NONE, NONE},
    {"data-expand-down", DOWN, 0, NONE, NONE},
    {"data-read-only", READ_ONLY, 0, NONE, GP},
    {"data-dpl3", DATA | DPL(3), 0, NONE, GP},
    {"data-dpl3-rpl3", DATA | DPL(3), 3, NONE, GP},
    {"data-rpl3", DATA, 3, GP, GP},
    {"data-rpl1-dpl1", DATA | DPL(1), 1, NONE, GP},
    {"data-rpl2-dpl1", DATA | DPL(1), 2, GP, GP},
    {"data-absent", DATA - ABSENT, 0, NP, SS},
    {"data-absent-rpl3", DATA - ABSENT, 3, GP, GP},
    {"code-readable", CODE, 0, NONE, GP},
    {"code-readable-rpl3", CODE, 3, GP, GP},
    {"code-execute-only", CODE_ONLY, 0, GP, GP},
    {"code-execute-only-absent", CODE_ONLY - ABSENT, 0, GP, GP},
    {"conforming-rpl3", CONFORMING, 3, NONE, GP},
    {"conforming-absent", CONFORMING - ABSENT, 3, NP, GP},
    {"conforming-execute-only", CONFORMING - 2, 0, GP, GP},
    {"system", TYPE_LDT, 0, GP, GP},
    {"system-absent", TYPE_LDT - ABSENT, 0, GP, GP},
};
static const struct load loads_ring3[] = {
    {"data", DATA | DPL(3), 3, NONE, NONE},
    {"data-rpl0", DATA | DPL(3), 0, NONE, GP},
    {"data-dpl2", DATA | DPL(2), 0, GP, GP},
    {"data-absent", (DATA | DPL(3)) - ABSENT, 3, NP, SS},
    {"code-dpl0", CODE, 0, GP, GP},
    {"conforming-dpl0", CONFORMING, 0, NONE, GP},
    {"conforming-dpl0-rpl3", CONFORMING, 3, NONE, GP},
};

static void load_all(const char *group_es, const char *group_ss, const struct load *l, u32 n)
{
    for (; n--; l++) {
        set(S_ANY, flat(l->access, 0xc));
        check_group = group_es;
        LOAD_ES(S_ANY | l->rpl);
        expect(l->name, l->es, S_ANY);
        check_group = group_ss;
        LOAD_SS(S_ANY | l->rpl);
        expect(l->name, l->ss, S_ANY);
    }
    check_group = "";
    __asm__ volatile("mov %0, %%es" : : "r"(home_ss));
}

static void loads_in_ring3(void)
{
    load_all("ring3-load-", "ring3-stack-", loads_ring3, ARRAY_SIZE(loads_ring3));
}

#define LOAD_BEYOND(seg)                                                                           \
    FAULTS("load-beyond-table-" #seg, GP, S_BEYOND, "mov %w0, %%" #seg, : : "r"(S_BEYOND | 3))
#define ACCESSED_BY(seg)                                                                           \
    set(S_ANY, flat(DATA, 0xc));                                                                   \
    TRY("mov %%" #seg ", %%ecx; mov %w0, %%" #seg "; mov %%ecx, %%" #seg,                          \
        :                                                                                          \
        : "r"(S_ANY)                                                                               \
        : "ecx", "memory");                                                                        \
    check("accessed-by-" #seg, gdt[S_ANY / 8] & ACCESSED)

static void loads(void)
{
    u32 offset = 0;

    load_all("load-", "stack-", loads_ring0, ARRAY_SIZE(loads_ring0));
    at_home_in_ring3(loads_in_ring3);
    LOAD_BEYOND(ds);
    LOAD_BEYOND(es);
    LOAD_BEYOND(fs);
    LOAD_BEYOND(gs);
    LOAD_BEYOND(ss);
    if (on_tcg())
        skip("without-ldt", "TCG reads a null LDT");
    else
        FAULTS("load-without-ldt", GP, 4, "mov %w0, %%es", : : "r"(4));
    ACCESSED_BY(ds);
    ACCESSED_BY(es);
    ACCESSED_BY(fs);
    ACCESSED_BY(gs);
    ACCESSED_BY(ss);
    set(S_ANY, flat(DATA - ABSENT, 0xc));
    LOAD_ES(S_ANY);
    check("refused-is-not-accessed", !(gdt[S_ANY / 8] & ACCESSED));
    pointer.offset = 0x12345678;
    pointer.selector = S_ANY;
    set(S_ANY, flat(DATA, 0xc));
    TRY("lfs %1, %0", : "=r"(offset) : "m"(pointer));
    check_equal("lfs-offset", offset, 0x12345678);
    __asm__("mov %%fs, %0" : "=r"(landed.fs));
    check_equal("lfs-selector", landed.fs & 0xffff, S_ANY);
    pointer.selector = S_BEYOND;
    FAULTS("lgs-beyond-table", GP, S_BEYOND, "lgs %0, %%ecx", : : "m"(pointer) : "ecx");
    FAULTS("lss-beyond-table", GP, S_BEYOND, "lss %0, %%ecx", : : "m"(pointer) : "ecx");
    WORKS("null-fs", "mov %w0, %%fs", : : "r"(0));
    WORKS("null-gs-rpl3", "mov %w0, %%gs", : : "r"(3));
    __asm__("mov %%gs, %0" : "=r"(landed.gs));
    check_equal("null-keeps-rpl", landed.gs & 0xffff, 3);
}

/* --- Limits --- */

#ifndef __x86_64__
/* The segment in ES, and in SS: an access that fails is #GP(0), or #SS(0) by SS. Ring 3, so that
 * the exception has a stack. */
static void access(const char *name, u64 d, u32 offset, bool ok)
{
    set(S_ANY, d | 3ULL << 45);
    check_group = "limit-es-";
    TRY("mov %w0, %%es; movl %%es:(%1), %%eax", : : "r"(S_ANY | 3), "r"(offset) : "eax");
    expect(name, ok ? NONE : GP, 0);
    check_group = "limit-ss-";
    TRY("mov %w0, %%ss; movl %%ss:(%1), %%eax; mov %w2, %%ss",
        :
        : "r"(S_ANY | 3), "r"(offset), "r"(SEL_USER_DATA)
        : "eax");
    expect(name, ok ? NONE : SS, 0);
    check_group = "";
}

static void limits(void)
{
    u32 base = (u32)area;

    access("last", descriptor(base, 0x1f, DATA, 4), 0x1c, true);
    access("across", descriptor(base, 0x1f, DATA, 4), 0x1d, false);
    access("beyond", descriptor(base, 0x1f, DATA, 4), 0x20, false);
    access("zero", descriptor(base, 0, DATA, 4), 0, false);
    access("top-wraps", descriptor(base, 0x1f, DATA, 4), 0xfffffffe, false);
    access("pages-last", descriptor(0, 0x1ff, DATA, 0xc), 0x1ffffc, true);
    access("pages-across", descriptor(0, 0x1ff, DATA, 0xc), 0x1ffffd, false);
    access("down-first", descriptor(base - 0x20, 0x1f, DOWN, 4), 0x20, true);
    access("down-across", descriptor(base - 0x20, 0x1f, DOWN, 4), 0x1f, false);
    access("down-inside", descriptor(base - 0x20, 0x1f, DOWN, 4), 0, false);
    access("down-16-bit-last", descriptor(base - 0xfffc, 0x1f, DOWN, 0), 0xfffc, true);
    access("down-16-bit-across", descriptor(base - 0xfffc, 0x1f, DOWN, 0), 0xfffd, false);
    access("down-16-bit-beyond", descriptor(base - 0x10000, 0x1f, DOWN, 0), 0x10000, false);
    access("down-32-bit-beyond-64k", descriptor(base - 0x10000, 0x1f, DOWN, 4), 0x10000, true);
    access("down-pages-inside", descriptor(0, 0x100, DOWN, 0xc), 0x100ffc, false);
    access("down-pages-first", descriptor(0, 0x100, DOWN, 0xc), 0x101000, true);
    access("down-nothing", descriptor(0, 0xfffff, DOWN, 0xc), 0x1000, false);
}

#define USE_NULL(seg)                                                                              \
    TRY("mov %w0, %%" #seg "; movb %%" #seg ":(%1), %%al; mov %w2, %%" #seg,                       \
        :                                                                                          \
        : "r"(3), "r"(area), "r"(SEL_USER_DATA)                                                    \
        : "eax");                                                                                  \
    expect("null-use-" #seg, GP, 0)

static void nulls(void)
{
    USE_NULL(ds);
    USE_NULL(es);
    USE_NULL(fs);
    USE_NULL(gs);
    FAULTS("null-load-ss", GP, 0, "mov %w0, %%ss", : : "r"(3));
    FAULTS("null-load-ss-rpl0", GP, 0, "mov %w0, %%ss", : : "r"(0));
}

static void rights(void)
{
    set(S_ANY, flat(READ_ONLY | DPL(3), 0xc));
    LOAD_ES(S_ANY | 3);
    FAULTS("store-read-only", GP, 0, "movb %%al, %%es:(%0)", : : "r"(area));
    LOAD_ES(S_ANY | 3); /* catch() has put another back */
    FAULTS("add-read-only", GP, 0, "addb %%al, %%es:(%0)", : : "r"(area) : "cc");
    WORKS("load-read-only", "movb %%es:(%0), %%al", : : "r"(area) : "eax");
    FAULTS("store-code", GP, 0, "movb %%al, %%cs:(%0)", : : "r"(area));
    WORKS("load-code", "movb %%cs:(%0), %%al", : : "r"(area) : "eax");
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_USER_DATA));
}

/* --- 16-bit segments --- */

static u8 segment16[0x20000] __attribute__((aligned(16)));
volatile u32 sp_after;

/* An instruction on the 16-bit stack, in ring 3; its SP afterwards is in sp_after. */
#define ON_STACK16(sp, insn)                                                                       \
    TRY("mov %%esp, %%edx; mov %w0, %%ss; mov %1, %%esp; " insn "; mov %%esp, %%ecx; "             \
        "mov %w2, %%ss; mov %%edx, %%esp; mov %%ecx, sp_after",                                    \
        :                                                                                          \
        : "r"(S_ANY | 3), "r"(sp), "r"(SEL_USER_DATA)                                              \
        : "eax", "ecx", "edx", "memory")

static void stack16(void)
{
    set(S_ANY, descriptor((u32)segment16, 0xffff, DATA | DPL(3), 0));
    ON_STACK16(0xabcd0000, "pushw $0x1234");
    expect("stack16-push-wraps", NONE, 0);
    check_equal("stack16-push-sp", sp_after, 0xabcdfffe);
    check_equal("stack16-push-at", *(u16 *)(segment16 + 0xfffe), 0x1234);
    ON_STACK16(0xabcdfffe, "popw %%ax");
    expect("stack16-pop-wraps", NONE, 0);
    check_equal("stack16-pop-sp", sp_after, 0xabcd0000);
    ON_STACK16(0xabcd0002, "pushl $0");
    expect("stack16-push-across", SS, 0);
    ON_STACK16(0xabcdfffe, "popl %%eax");
    expect("stack16-pop-across", SS, 0);
    ON_STACK16(0xabcd0001, "pushw $0");
    expect("stack16-push-odd-across", SS, 0);
    set(S_ANY, descriptor((u32)segment16, 0xfff, DOWN | DPL(3), 0));
    ON_STACK16(0x1002, "pushw $0");
    expect("stack16-down-last", NONE, 0);
    ON_STACK16(0x1000, "pushw $0");
    expect("stack16-down-below", SS, 0);
    ON_STACK16(0, "pushw $0");
    expect("stack16-down-top", NONE, 0);
    set(S_ANY, descriptor((u32)segment16, 0xfff, DOWN | DPL(3), 4));
    ON_STACK16(0x10000, "pushl $0");
    check_equal("stack32-down-sp", sp_after, 0xfffc);
}

static void jump(u16 selector, u32 offset)
{
    pointer.offset = offset;
    pointer.selector = selector;
    TRY("ljmp *%0", : : "m"(pointer) : "memory");
}

static void code16(void)
{
    memset(segment16, 0x90, sizeof(segment16));
    memcpy(segment16 + 0xfff0, "\xeb\x20", 2); /* jmp .+0x22 */
    memcpy(segment16 + 0x12, "\xcd\x46", 2);
    set(S_ANY, descriptor((u32)segment16, 0xffff, CODE, 0));
    jump(S_ANY, 0xfff0);
    expect_landed("code16-jump-wraps", S_ANY);
    check_equal("code16-jump-wraps-to", landed.ip, 0x14);
    check("code16-accessed", gdt[S_ANY / 8] & ACCESSED);
    jump(S_ANY, 0xfffe);
    expect("code16-runs-off-its-limit", GP, 0);
    set(S_ANY, descriptor((u32)segment16, 0x1ffff, CODE, 0));
    jump(S_ANY, 0xfff0);
    check_equal("code16-jump-wraps-in-large-segment", landed.ip, 0x14);
    memcpy(segment16 + 0x10010, "\xcd\x46", 2);
    jump(S_ANY, 0x10010);
    check_equal("code16-far-jump-beyond-64k", landed.ip, 0x10012);
    set(S_ANY, descriptor((u32)segment16, 0x1f, CODE, 0));
    memcpy(segment16 + 0x1c, "\xeb\x00", 2); /* jmp .+2 */
    memcpy(segment16 + 0x1e, "\xcd\x46", 2);
    jump(S_ANY, 0x1c);
    expect_landed("code-limit-last", S_ANY);
    memcpy(segment16 + 0x1c, "\xeb\x02", 2);
    jump(S_ANY, 0x1c);
    expect("code-limit-jump", GP, 0);
    check_equal("code-limit-jump-is-a-fault", trap.ip, 0x1c);
    memcpy(segment16 + 0x1e, "\xb8\x00\x00", 3); /* mov $0, %ax */
    jump(S_ANY, 0x1e);
    expect("code-limit-in-instruction", GP, 0);
    check_equal("code-limit-in-instruction-ip", trap.ip, 0x1e);
}
#else
static void jump(u16 selector, u32 offset)
{
    pointer.offset = offset;
    pointer.selector = selector;
    TRY("ljmp *%0", : : "m"(pointer) : "memory");
}
#endif

static void call(u16 selector, u32 offset)
{
    pointer.offset = offset;
    pointer.selector = selector;
    TRY("lcall *%0", : : "m"(pointer) : "memory");
}

/* --- JMP and CALL --- */

struct target {
    const char *name;
    u8 access, flags, rpl;
    short vector; /* VECTOR_LANDED: there */
};
static const struct target targets_ring0[] = {
    {"code", CODE, CODE_FLAGS, 0, VECTOR_LANDED},
    {"code-execute-only", CODE_ONLY, CODE_FLAGS, 0, VECTOR_LANDED},
    {"code-rpl3", CODE, CODE_FLAGS, 3, GP},
    {"code-dpl3", CODE | DPL(3), CODE_FLAGS, 0, GP},
    {"code-dpl3-rpl3", CODE | DPL(3), CODE_FLAGS, 3, GP},
    {"code-absent", CODE - ABSENT, CODE_FLAGS, 0, NP},
    {"code-absent-dpl3", (CODE | DPL(3)) - ABSENT, CODE_FLAGS, 0, GP},
    {"conforming", CONFORMING, CODE_FLAGS, 0, VECTOR_LANDED},
    {"conforming-rpl3", CONFORMING, CODE_FLAGS, 3, VECTOR_LANDED},
    {"conforming-dpl3", CONFORMING | DPL(3), CODE_FLAGS, 3, GP},
    {"conforming-absent", CONFORMING - ABSENT, CODE_FLAGS, 0, NP},
    {"data", DATA, 0xc, 0, GP},
    {"system-0", 0x80, 0, 0, GP},
    {"ldt", TYPE_LDT, 0, 0, GP},
    {"interrupt-gate", 0x8e, 0, 0, GP},
    {"trap-gate", 0x8f, 0, 0, GP},
#ifdef __x86_64__
    {"code-l-and-d", CODE, 0xe, 0, GP},
    {"call-gate16", TYPE_GATE16, 0, 0, GP},
    {"task-gate", 0x85, 0, 0, GP},
    {"tss16", 0x81, 0, 0, GP},
    {"tss", TYPE_TSS, 0, 0, GP},
    {"tss-busy", TYPE_BUSY, 0, 0, GP},
#endif
};
static const struct target targets_ring3[] = {
    {"code", CODE | DPL(3), CODE_FLAGS, 3, VECTOR_LANDED},
    {"code-rpl0", CODE | DPL(3), CODE_FLAGS, 0, VECTOR_LANDED},
    {"code-dpl0", CODE, CODE_FLAGS, 0, GP},
    {"code-dpl2", CODE | DPL(2), CODE_FLAGS, 0, GP},
    {"conforming-dpl0", CONFORMING, CODE_FLAGS, 0, VECTOR_LANDED},
    {"conforming-dpl1-rpl3", CONFORMING | DPL(1), CODE_FLAGS, 3, VECTOR_LANDED},
};

static void go_to_all(const char *group_jump, const char *group_call, const struct target *t, u32 n)
{
    for (; n--; t++) {
        for (u32 calls = 0; calls < 2; calls++) {
            set(S_ANY, flat(t->access, t->flags));
            set(S_ANY + 8, 0);
            check_group = calls ? group_call : group_jump;
            (calls ? call : jump)(S_ANY | t->rpl, (u32)(word)land);
            if (t->vector == VECTOR_LANDED)
                expect_landed(t->name, S_ANY | (home_cs & 3));
            else
                expect(t->name, t->vector, S_ANY);
        }
    }
    check_group = "";
}

static void go_in_ring3(void)
{
    go_to_all("ring3-jump-", "ring3-call-", targets_ring3, ARRAY_SIZE(targets_ring3));
}

static void direct(void)
{
    go_to_all("jump-", "call-", targets_ring0, ARRAY_SIZE(targets_ring0));
    at_home_in_ring3(go_in_ring3);
    jump(0, 0);
    expect("jump-null", GP, 0);
    call(3, 0);
    expect("call-null-rpl3", GP, 0);
    jump(S_BEYOND, 0);
    expect("jump-beyond-table", GP, S_BEYOND);
    if (!on_tcg()) {
        call(4, 0);
        expect("call-without-ldt", GP, 4);
    }
    set(S_ANY, flat(CODE, CODE_FLAGS));
    jump(S_ANY, (u32)(word)land);
    check("jump-sets-accessed", gdt[S_ANY / 8] & ACCESSED);
#ifndef __x86_64__
    set(S_ANY, descriptor(0, 0xfff, CODE, 4));
    jump(S_ANY, 0x1000);
    expect("jump-limit", GP, 0);
    call(S_ANY, 0x1000);
    expect("call-limit", GP, 0);
    check("fault-leaves-accessed-clear", !(gdt[S_ANY / 8] & ACCESSED));
#endif
}

/* --- RET and IRET --- */

static void retf(u16 cs, word ip, u16 ss)
{
    word *f = &frames[256];

    f[0] = ip;
    f[1] = cs;
    f[2] = (word)&stack1[60];
    f[3] = ss;
    TRY("mov %0, " REG_SP "; "
#ifdef __x86_64__
        "lretq",
#else
        "lretl",
#endif
        :
        : "r"(f)
        : "memory");
}

static void iret(u16 cs, word ip, u16 ss)
{
    word *f = &frames[256];

    f[0] = ip;
    f[1] = cs;
    f[2] = 2;
    f[3] = (word)&stack1[60];
    f[4] = ss;
    TRY("mov %0, " REG_SP "; "
#ifdef __x86_64__
        "iretq",
#else
        "iretl",
#endif
        :
        : "r"(f)
        : "memory");
}

struct back {
    const char *name;
    u64 d; /* 0: none */
    u16 cs, ss;
    short vector;
    u16 error; /* CS of a landing */
};
#define D(access, flags) (0x000f00000000ffffULL | (u64)(access) << 40 | (u64)(flags) << 52)
static const struct back backs[] = {
    {"null", 0, 0, SEL_USER_DATA, GP, 0},
    {"null-rpl3", 0, 3, SEL_USER_DATA, GP, 0},
    {"data", 0, SEL_USER_DATA, SEL_USER_DATA, GP, SEL_USER_DATA & ~3},
    {"beyond-table", 0, S_BEYOND | 3, SEL_USER_DATA, GP, S_BEYOND},
    {"without-ldt", 0, 0x0f, SEL_USER_DATA, GP, 0x0c},
    {"same-ring", D(CODE, CODE_FLAGS), S_ANY, SEL_DATA, VECTOR_LANDED, S_ANY},
    {"code-dpl0-rpl3", D(CODE, CODE_FLAGS), S_ANY | 3, SEL_USER_DATA, GP, S_ANY},
    {"code-dpl3-rpl0", D(CODE | DPL(3), CODE_FLAGS), S_ANY, SEL_DATA, GP, S_ANY},
    {"code-dpl3-rpl2", D(CODE | DPL(3), CODE_FLAGS), S_ANY | 2, SEL_USER_DATA, GP, S_ANY},
    {"conforming-dpl3-rpl2", D(CONFORMING | DPL(3), CODE_FLAGS), S_ANY | 2, SEL_USER_DATA, GP,
     S_ANY},
    {"conforming-dpl1-rpl3", D(CONFORMING | DPL(1), CODE_FLAGS), S_ANY | 3, SEL_USER_DATA,
     VECTOR_LANDED, S_ANY | 3},
    {"code-absent", D((CODE | DPL(3)) - ABSENT, CODE_FLAGS), S_ANY | 3, SEL_USER_DATA, NP, S_ANY},
    {"outer", 0, SEL_USER_CODE, SEL_USER_DATA, VECTOR_LANDED, SEL_USER_CODE},
    {"ring1", 0, S_CODE1, S_DATA1, VECTOR_LANDED, S_CODE1},
    {"stack-null", 0, SEL_USER_CODE, 0, GP, 0},
    {"stack-null-rpl3", 0, SEL_USER_CODE, 3, GP, 0},
    {"stack-rpl0", 0, SEL_USER_CODE, SEL_USER_DATA & ~3, GP, SEL_USER_DATA & ~3},
    {"stack-dpl0", 0, SEL_USER_CODE, SEL_DATA | 3, GP, SEL_DATA},
    {"stack-read-only", D(READ_ONLY | DPL(3), 0xc), SEL_USER_CODE, S_ANY | 3, GP, S_ANY},
    {"stack-code", 0, SEL_USER_CODE, SEL_USER_CODE32, GP, SEL_USER_CODE32 & ~3},
    {"stack-absent", D((DATA | DPL(3)) - ABSENT, 0xc), SEL_USER_CODE, S_ANY | 3, SS, S_ANY},
    {"stack-beyond-table", 0, SEL_USER_CODE, S_BEYOND | 3, GP, S_BEYOND},
#ifdef __x86_64__
    {"code-l-and-d", D(CODE | DPL(3), 0xe), S_ANY | 3, SEL_USER_DATA, GP, S_ANY},
    {"stack-null-ring1", 0, S_CODE1, 1, VECTOR_LANDED, S_CODE1},
    {"compatibility", 0, SEL_USER_CODE32, SEL_USER_DATA, VECTOR_LANDED, SEL_USER_CODE32},
    {"compatibility-stack-null", D(CODE | DPL(1), 0xc), S_ANY | 1, 1, GP, 0},
#endif
};

static void go_back(void)
{
    for (u32 i = 0; i < ARRAY_SIZE(backs); i++) {
        const struct back *b = &backs[i];

        if (b->cs & 4 && on_tcg()) {
            skip(b->name, "TCG reads a null LDT");
            continue;
        }
        for (u32 irets = 0; irets < 2; irets++) {
            set(S_ANY, b->d);
            check_group = irets ? "iret-" : "retf-";
            (irets ? iret : retf)(b->cs, (word)land, b->ss);
            if (b->vector == VECTOR_LANDED)
                expect_landed(b->name, b->error);
            else
                expect(b->name, b->vector, b->error);
        }
    }
    for (u32 irets = 0; irets < 2; irets++) {
        check_group = irets ? "iret-" : "retf-";
#ifdef __x86_64__
        (irets ? iret : retf)(SEL_USER_CODE, BIT(62), SEL_USER_DATA);
        expect("noncanonical", GP, 0);
        (irets ? iret : retf)(SEL_CODE, BIT(62), SEL_DATA);
        expect("same-ring-noncanonical", GP, 0);
#else
        set(S_ANY, descriptor(0, 0xfff, CODE | DPL(3), 4));
        (irets ? iret : retf)(S_ANY | 3, 0x1000, SEL_USER_DATA);
        expect("limit", GP, 0);
        check("limit-leaves-accessed-clear", !(gdt[S_ANY / 8] & ACCESSED));
#endif
        set(S_ANY, flat(DATA | DPL(3), 0xc));
        (irets ? iret : retf)(SEL_USER_CODE, (word)land, S_ANY | 3);
        check("stack-accessed", gdt[S_ANY / 8] & ACCESSED);
        check_equal("stack", landed.ss & 0xffff, S_ANY | 3);
        check_equal("stack-pointer", landed.sp, (word)&stack1[60]);
    }
    check_group = "";
#ifdef __x86_64__
    iret(SEL_CODE, (word)land, 0);
    expect_landed("iret-same-ring-stack-null", SEL_CODE);
    check_equal("iret-same-ring-pops-stack", landed.ss, 0);
    /* The landing's frame is aligned to 16 bytes; RSP is what was popped. */
    check_equal("iret-same-ring-pops-stack-pointer", landed.sp, (word)&stack1[60]);
#endif
}

static void inwards(void)
{
    retf(SEL_CODE, (word)land, SEL_DATA);
    expect("retf-inner", GP, SEL_CODE);
    iret(SEL_CODE, (word)land, SEL_DATA);
    expect("iret-inner", GP, SEL_CODE);
    retf(S_CONFORMING, (word)land, SEL_DATA);
    expect("retf-inner-conforming-rpl0", GP, S_CONFORMING);
    iret(S_CONFORMING | 3, (word)land, SEL_USER_DATA);
    expect_landed("iret-conforming-rpl3", S_CONFORMING | 3);
}

/* The data segments on the way out: those that the outer ring may not use become null, and a null
 * selector loses its RPL. */
static void nulling(void)
{
    word *f = &frames[256];

    f[0] = (word)land;
    f[1] = SEL_USER_CODE;
    f[2] = 2;
    f[3] = (word)&stack1[60];
    f[4] = SEL_USER_DATA;
    set(S_CONFORMING, flat(CONFORMING, CODE_FLAGS));
    TRY("mov %w1, %%es; mov %w2, %%fs; mov %w3, %%gs; mov %w4, %%ds; mov %0, " REG_SP "; "
#ifdef __x86_64__
        "iretq",
#else
        "iretl",
#endif
        :
        : "r"(f), "r"(SEL_USER_DATA), "r"(S_CONFORMING), "r"(SEL_DATA), "r"(2)
        : "memory");
    expect_landed("nulling", SEL_USER_CODE);
    check_equal("nulling-keeps-user-data", landed.es, SEL_USER_DATA);
    check_equal("nulling-keeps-conforming-code", landed.fs, S_CONFORMING);
    check_equal("nulling-drops-kernel-data", landed.gs, 0);
    check_equal("nulling-drops-rpl-of-null", landed.ds, 0);
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" : : "r"(SEL_DATA));
}

/* RET with a count releases it from both stacks. */
static void releases(void)
{
    word *f = &frames[256];

    f[0] = (word)land;
    f[1] = SEL_USER_CODE;
    f[4] = (word)&stack1[32];
    f[5] = SEL_USER_DATA;
#ifdef __x86_64__
    TRY("mov %0, %%rsp; lretq $16", : : "r"(f) : "memory");
    check_equal("retf-releases-outer-stack", landed.sp, (word)&stack1[34]);
#else
    TRY("mov %0, %%esp; lretl $8", : : "r"(f) : "memory");
    check_equal("retf-releases-outer-stack", landed.sp, (word)&stack1[34]);
#endif
    expect_landed("retf-with-count", SEL_USER_CODE);
}

/* --- Call gates --- */

static void set_gate_to(u16 selector, u8 access, u8 params)
{
    set(S_GATE, call_gate(selector, (word)land, access, params));
    set(S_GATE + 8, 0);
}

static void gates_ring0(void)
{
    set_gate_to(SEL_CODE, TYPE_GATE32, 0);
    jump(S_GATE, 0x12345678);
    expect_landed("gate-jump", SEL_CODE);
    call(S_GATE, 0x12345678);
    expect_landed("gate-call", SEL_CODE);
    call(S_GATE | 3, 0);
    expect("gate-rpl", GP, S_GATE);
    set_gate_to(SEL_CODE, TYPE_GATE32 - ABSENT, 0);
    call(S_GATE, 0);
    expect("gate-absent", NP, S_GATE);
    jump(S_GATE | 3, 0);
    expect("gate-absent-rpl", GP, S_GATE);
    set_gate_to(SEL_DATA, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect("gate-to-data", GP, SEL_DATA);
    set_gate_to(3, TYPE_GATE32, 0);
    jump(S_GATE, 0);
    expect("gate-to-null", GP, 0);
    set_gate_to(S_BEYOND, TYPE_GATE32, 0);
    jump(S_GATE, 0);
    expect("gate-beyond-table", GP, S_BEYOND);
    set_gate_to(SEL_USER_CODE, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect("gate-to-outer-ring", GP, SEL_USER_CODE & ~3);
    set_gate_to(SEL_CODE | 3, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect_landed("gate-code-rpl-is-ignored", SEL_CODE);
    set(S_ANY, flat(CODE - ABSENT, CODE_FLAGS));
    set_gate_to(S_ANY, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect("gate-to-absent-code", NP, S_ANY);
#ifdef __x86_64__
    set_gate_to(SEL_CODE32, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect("gate-to-32-bit-code", GP, SEL_CODE32);
    set_gate_to(SEL_CODE, TYPE_GATE32, 0);
    set(S_GATE + 8, BIT(40));
    call(S_GATE, 0);
    expect("gate-upper-type", GP, S_GATE);
    set(S_GATE + 8, 0x12345678);
    call(S_GATE, 0);
    expect("gate-noncanonical", GP, 0);
    set_gate_to(SEL_CODE, TYPE_GATE32, 31);
    call(S_GATE, 0);
    expect_landed("gate-has-no-parameters", SEL_CODE);
    gdt[GDT_ENTRIES - 1] = call_gate(SEL_CODE, (word)land, TYPE_GATE32, 0);
    call((GDT_ENTRIES - 1) * 8, 0);
    expect("gate-half-beyond-table", GP, (GDT_ENTRIES - 1) * 8);
#else
    set(S_ANY, descriptor(0, 0xfff, CODE, 4));
    set_gate_to(S_ANY, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect("gate-limit", GP, 0);
#endif
}

#ifndef __x86_64__
/* Calls a gate with three words of 32 bits (or six of 16) on the stack. */
#define CALL_WITH_PARAMETERS()                                                                     \
    pointer.selector = S_GATE;                                                                     \
    TRY("pushl $0x33333333; pushl $0x22222222; pushl $0x11111111; lcall *%0",                      \
        :                                                                                          \
        : "m"(pointer)                                                                             \
        : "memory")

static void inner_stack(const char *name, u16 ss, int vector, word error)
{
    tss.ss1 = ss;
    call(S_GATE, 0);
    expect(name, vector, error);
    tss.ss1 = S_DATA1;
}
#endif

static void gates_ring3(void)
{
    word *sp = &stack1[60];

    set_gate_to(SEL_CODE, TYPE_GATE32, 0);
    call(S_GATE, 0);
    expect("gate-dpl", GP, S_GATE);
    set_gate_to(S_CONFORMING, TYPE_GATE32 | DPL(3), 0);
    call(S_GATE | 3, 0);
    expect_landed("gate-to-conforming", S_CONFORMING | 3);
    jump(S_GATE | 3, 0);
    expect_landed("gate-jump-to-conforming", S_CONFORMING | 3);
    set_gate_to(S_CODE1, TYPE_GATE32 | DPL(3), 0);
    jump(S_GATE, 0);
    expect("gate-jump-inwards", GP, S_CODE1 & ~3);
    set_gate_to(SEL_USER_CODE, TYPE_GATE32 | DPL(3), 0);
    call(S_GATE, 0);
    expect_landed("gate-to-same-ring", SEL_USER_CODE);
    set_gate_to(S_CODE1, TYPE_GATE32 | DPL(3), 0);
    call(S_GATE, 0);
    expect_landed("gate-inwards", S_CODE1);
#ifdef __x86_64__
    check_equal("gate-inwards-stack", landed.sp, (word)(sp - 4));
    check_equal("gate-inwards-null-stack-segment", landed.ss, 1);
    check_equal("gate-inwards-saves-cs", sp[-3], SEL_USER_CODE);
    check_equal("gate-inwards-saves-sp", sp[-2], trap_sp);
    check_equal("gate-inwards-saves-ss", sp[-1], SEL_USER_DATA);
    tss.sp[1] = BIT(62);
    call(S_GATE, 0);
    check_equal("gate-inwards-noncanonical-stack", (u64)(long long)trap.vector, SS);
    tss.sp[1] = (word)sp;
#else
    check_equal("gate-inwards-stack", landed.sp, (word)(sp - 4));
    check_equal("gate-inwards-stack-segment", landed.ss, S_DATA1);
    set_gate_to(S_CODE1, TYPE_GATE32 | DPL(3), 3);
    CALL_WITH_PARAMETERS();
    expect_landed("gate32", S_CODE1);
    check_equal("gate32-stack", landed.sp, (word)(sp - 7));
    check_equal("gate32-saves-cs", sp[-6] & 0xffff, SEL_USER_CODE);
    check_equal("gate32-first-parameter", sp[-5], 0x11111111);
    check_equal("gate32-third-parameter", sp[-3], 0x33333333);
    check_equal("gate32-saves-sp", sp[-2], trap_sp - 12);
    check_equal("gate32-saves-ss", sp[-1] & 0xffff, SEL_USER_DATA);

    set(S_ANY, descriptor((u32)land, 0xff, CODE | DPL(1), 0));
    set(S_GATE, call_gate(S_ANY, 0, TYPE_GATE16 | DPL(3), 3) | 0x5555ULL << 48);
    CALL_WITH_PARAMETERS();
    expect_landed("gate16", S_ANY | 1);
    check_equal("gate16-stack", landed.sp, (word)((u16 *)sp - 7));
    check_equal("gate16-offset-is-16-bits", landed.ip, 2);
    check_equal("gate16-saves-cs", ((u16 *)sp)[-6], SEL_USER_CODE);
    check_equal("gate16-first-parameter", ((u16 *)sp)[-5], 0x1111);
    check_equal("gate16-third-parameter", ((u16 *)sp)[-3], 0x2222);
    check_equal("gate16-saves-sp", ((u16 *)sp)[-2], (trap_sp - 12) & 0xffff);
    check_equal("gate16-saves-ss", ((u16 *)sp)[-1], SEL_USER_DATA);

    set_gate_to(S_CODE1, TYPE_GATE32 | DPL(3), 0);
    inner_stack("inner-stack-null", 0, TS, 0);
    inner_stack("inner-stack-rpl", S_DATA1 & ~3, TS, S_DATA1 & ~3);
    inner_stack("inner-stack-dpl", SEL_DATA | 1, TS, SEL_DATA);
    inner_stack("inner-stack-beyond-table", S_BEYOND | 1, TS, S_BEYOND);
    inner_stack("inner-stack-code", S_CODE1, TS, S_CODE1 & ~3);
    set(S_ANY, flat((DATA | DPL(1)) - ABSENT, 0xc));
    inner_stack("inner-stack-absent", S_ANY | 1, SS, S_ANY);
    set(S_ANY, flat(READ_ONLY | DPL(1), 0xc));
    inner_stack("inner-stack-read-only", S_ANY | 1, TS, S_ANY);
    set(S_ANY, descriptor(0, 0xfff, DATA | DPL(1), 4));
    inner_stack("inner-stack-without-room", S_ANY | 1, SS, S_ANY);
#endif
}

/* --- LAR, LSL, VERR, VERW, ARPL --- */

#define ASKS(insn, out, sel)                                                                       \
    ({                                                                                             \
        bool zf;                                                                                   \
                                                                                                   \
        __asm__ volatile(insn : "=@ccz"(zf), "+r"(out) : "r"(sel));                                \
        zf;                                                                                        \
    })

static void questions(void)
{
    u32 lar = 0, lsl = 0, verr = 0, verw = 0, got = 0;
    word wide = 0x12345678;

    for (u32 type = 0; type < 32; type++) {
        set(S_ANY, descriptor(0x123456, 0x54321, (u8)(0x80 | type), 0x4));
        set(S_ANY + 8, 0);
        lar |= (u32)ASKS("lar %w2, %k1", got, S_ANY) << type;
        lsl |= (u32)ASKS("lsl %w2, %k1", got, S_ANY) << type;
        verr |= (u32)ASKS("verr %w2", got, S_ANY) << type;
        verw |= (u32)ASKS("verw %w2", got, S_ANY) << type;
    }
#ifdef __x86_64__
    check_equal("lar-types", lar, 0xffff1a04);
    check_equal("lsl-types", lsl, 0xffff0a04);
#else
    check_equal("lar-types", lar, 0xffff1a3e);
    check_equal("lsl-types", lsl, 0xffff0a0e);
#endif
    check_equal("verr-types", verr, 0xccff0000);
    check_equal("verw-types", verw, 0x00cc0000);

    set(S_ANY, descriptor(0x123456, 0x54321, DATA | DPL(2), 0xd));
    check("lar-works", ASKS("lar %w2, %k1", got, S_ANY));
    check_equal("lar-value", got & 0xf0ff00, 0xd0d200); /* bits 19:16 are undefined */
    check("lsl-works", ASKS("lsl %w2, %k1", got, S_ANY));
    check_equal("lsl-value-in-pages", got, 0x54321fff);
    check("lar16-works", ASKS("lar %w2, %w1", wide, S_ANY));
    check_equal("lar16-value", wide, 0x1234d200);
    check("lsl16-works", ASKS("lsl %w2, %w1", wide, S_ANY));
    check_equal("lsl16-value", wide, 0x12341fff);
    check("lar-leaves-accessed-clear", !(gdt[S_ANY / 8] & ACCESSED));
    check("lar-rpl", !ASKS("lar %w2, %k1", got, S_ANY | 3));
    check("verr-rpl", !ASKS("verr %w2", got, S_ANY | 3));
    check("verw-rpl2", ASKS("verw %w2", got, S_ANY | 2));
    got = 0x77;
    check("lsl-beyond-table", !ASKS("lsl %w2, %k1", got, S_BEYOND));
    check_equal("lsl-refused-keeps-register", got, 0x77);
    check("lsl-null", !ASKS("lsl %w2, %k1", got, 3));
    set(S_ANY, flat(CONFORMING - ABSENT, 0));
    check("lar-conforming-any-rpl", ASKS("lar %w2, %k1", got, S_ANY | 3));
    check_equal("lar-absent", got & 0xff00, 0x1e00);
    check("verr-conforming-any-rpl", ASKS("verr %w2", got, S_ANY | 3));
#ifndef __x86_64__
    got = 0x1234fff0;
    check("arpl-raises", ASKS("arpl %w2, %w1", got, 3));
    check_equal("arpl-raised", got, 0x1234fff3);
    check("arpl-equal", !ASKS("arpl %w2, %w1", got, 3));
    check("arpl-lower", !ASKS("arpl %w2, %w1", got, 1));
    check_equal("arpl-kept", got, 0x1234fff3);
#endif
}

/* --- LDT and system descriptors --- */

static void local(void)
{
    ldt[1] = descriptor((u32)(word)area, 0xff, DATA, 4);
    ldt[2] = flat(CODE, CODE_FLAGS);
    set(S_LDT, descriptor((u32)(word)ldt, 3 * 8 - 1, TYPE_LDT, 0));
    set(S_LDT + 8, 0);
    WORKS("lldt", "lldt %w0", : : "r"(S_LDT));
    __asm__("sldt %0" : "=r"(landed.ip));
    check_equal("sldt", landed.ip & 0xffff, S_LDT);
    LOAD_ES(0x0c);
    expect("ldt-data", NONE, 0);
    check("ldt-accessed", ldt[1] & ACCESSED);
    check("ldt-leaves-gdt", gdt[1] == flat(0x9b, CODE_FLAGS));
    jump(0x14, (u32)(word)land);
    expect_landed("ldt-code", 0x14);
    LOAD_ES(0x04);
    expect("ldt-entry-0-is-not-null", GP, 0x04);
    LOAD_ES(0x1c);
    expect("ldt-beyond", GP, 0x1c);
    set(S_LDT, descriptor((u32)(word)ldt, 3 * 8 - 2, TYPE_LDT, 0));
    WORKS("lldt-again", "lldt %w0", : : "r"(S_LDT));
    LOAD_ES(0x14);
    expect("ldt-last-byte-beyond", GP, 0x14);
    FAULTS("lldt-local", GP, 0x0c, "lldt %w0", : : "r"(0x0c));
    FAULTS("lldt-data", GP, SEL_DATA, "lldt %w0", : : "r"(SEL_DATA));
    FAULTS("lldt-tss", GP, SEL_TSS, "lldt %w0", : : "r"(SEL_TSS));
    FAULTS("lldt-beyond-table", GP, S_BEYOND, "lldt %w0", : : "r"(S_BEYOND));
    set(S_LDT, descriptor((u32)(word)ldt, 0xff, TYPE_LDT - ABSENT, 0));
    FAULTS("lldt-absent", NP, S_LDT, "lldt %w0", : : "r"(S_LDT | 3));
    WORKS("lldt-null", "lldt %w0", : : "r"(0));
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_DATA));

    FAULTS("ltr-busy", GP, SEL_TSS, "ltr %w0", : : "r"(SEL_TSS));
    FAULTS("ltr-local", GP, 0x0c, "ltr %w0", : : "r"(0x0c));
    FAULTS("ltr-data", GP, SEL_DATA, "ltr %w0", : : "r"(SEL_DATA));
    FAULTS("ltr-beyond-table", GP, S_BEYOND, "ltr %w0", : : "r"(S_BEYOND));
    set(S_TASK, descriptor((u32)(word)&tss, sizeof(tss) - 1, TYPE_TSS - ABSENT, 0));
    set(S_TASK + 8, 0);
    FAULTS("ltr-absent", NP, S_TASK, "ltr %w0", : : "r"(S_TASK));
    check_equal("ltr-absent-stays-available", gdt[S_TASK / 8] >> 40 & 0xff, TYPE_TSS - ABSENT);
#ifdef __x86_64__
    set(S_TASK, descriptor((u32)(word)&tss, sizeof(tss) - 1, TYPE_TSS, 0));
    set(S_TASK + 8, BIT(40));
    FAULTS("ltr-upper-type", GP, S_TASK, "ltr %w0", : : "r"(S_TASK));
    set(S_TASK + 8, BIT(20));
    FAULTS("ltr-noncanonical", GP, S_TASK, "ltr %w0", : : "r"(S_TASK));
    set(S_TASK, descriptor((u32)(word)&tss, sizeof(tss) - 1, 0x81, 0));
    set(S_TASK + 8, 0);
    FAULTS("ltr-16-bit", GP, S_TASK, "ltr %w0", : : "r"(S_TASK));
    set(S_LDT, descriptor((u32)(word)ldt, 0xff, TYPE_LDT, 0));
    set(S_LDT + 8, BIT(42));
    FAULTS("lldt-upper-type", GP, S_LDT, "lldt %w0", : : "r"(S_LDT));
    set(S_LDT + 8, BIT(20));
    FAULTS("lldt-noncanonical", GP, S_LDT, "lldt %w0", : : "r"(S_LDT));
    gdt[GDT_ENTRIES - 1] = descriptor((u32)(word)ldt, 0xff, TYPE_LDT, 0);
    FAULTS("lldt-half-beyond-table", GP, (GDT_ENTRIES - 1) * 8, "lldt %w0",
           :
           : "r"((GDT_ENTRIES - 1) * 8));
#else
    set(S_TASK, descriptor((u32)&tss, sizeof(tss) - 1, TYPE_TSS, 0));
    WORKS("ltr", "ltr %w0", : : "r"(S_TASK));
    check_equal("ltr-makes-busy", gdt[S_TASK / 8] >> 40 & 0xff, TYPE_BUSY);
    load_tr();
#endif
}

#ifdef __x86_64__
/* --- 64-bit mode --- */

#define MSR_FS_BASE 0xc0000100
#define MSR_GS_BASE 0xc0000101

static void bases(void)
{
    bool clears =
        !cpu_is_amd() || (cpuid(0x80000000, 0).a >= 0x80000021 && cpuid(0x80000021, 0).a & BIT(6));
    u64 base = 0x123456789000;
    u8 value;

    area[16] = 0x5a;
    set(S_ANY, descriptor((u32)(word)area, 0, READ_ONLY, 0));
    wrmsr(MSR_FS_BASE, base);
    WORKS("fs-load", "mov %w0, %%fs", : : "r"(S_ANY));
    check_equal("fs-load-sets-base", rdmsr(MSR_FS_BASE), (u32)(word)area);
    TRY("movb %%fs:16, %0", : "=q"(value) :);
    check_equal("fs-base-counts-limit-does-not", value, 0x5a);
    WORKS("fs-store-read-only", "movb $0x5b, %%fs:16", : : : "memory");
    WORKS("es-load", "mov %w0, %%es", : : "r"(S_ANY));
    TRY("movb %%es:(%1), %0", : "=q"(value) : "r"(area + 16));
    check_equal("es-base-does-not-count", value, 0x5b);
    WORKS("null-ds", "mov %w0, %%ds", : : "r"(0));
    WORKS("null-ds-use", "movb (%0), %%al", : : "r"(area) : "eax");
    WORKS("null-ss", "mov %w0, %%ss", : : "r"(0));
    WORKS("null-ss-use", "push %%rax; pop %%rax", : : : "memory");
    FAULTS("null-ss-rpl", GP, 0, "mov %w0, %%ss", : : "r"(3));
    __asm__ volatile("mov %0, %%ss; mov %0, %%ds; mov %0, %%es" : : "r"(SEL_DATA));

    wrmsr(MSR_FS_BASE, base);
    wrmsr(MSR_GS_BASE, base);
    __asm__ volatile("mov %0, %%fs; mov %1, %%gs" : : "r"(0), "r"(3));
    check_equal(clears ? "null-fs-clears-base" : "null-fs-keeps-base", rdmsr(MSR_FS_BASE),
                clears ? 0 : base);
    check_equal(clears ? "null-gs-clears-base" : "null-gs-keeps-base", rdmsr(MSR_GS_BASE),
                clears ? 0 : base);
    wrmsr(MSR_FS_BASE, base);
    wrmsr(MSR_GS_BASE, base);
    iret(SEL_USER_CODE, (word)land, SEL_USER_DATA);
    check_equal("outer-iret-keeps-base-of-null-fs", rdmsr(MSR_FS_BASE), base);
    check_equal("outer-iret-keeps-base-of-null-gs", rdmsr(MSR_GS_BASE), base);
    wrmsr(MSR_FS_BASE, BIT(46));
    FAULTS("fs-noncanonical", GP, 0, "movb %%fs:(%0), %%al", : : "r"(BIT(46)) : "eax");
}

static void null_stack_in_ring3(void)
{
    FAULTS("ring3-null-ss", GP, 0, "mov %w0, %%ss", : : "r"(3));
}

/* In compatibility mode segments count again, and gates lead to 64-bit mode. */
void compatibility_store(void);
void compatibility_store_beyond(void);
void compatibility_call(void);
__asm__(".code32\n"
        "compatibility_store:\n"
        "    movb $0x77, %es:0x1f\n"
        "    int $0x46\n"
        "compatibility_store_beyond:\n"
        "    movb $0x77, %es:0x20\n"
        "    int $0x46\n"
        "compatibility_call:\n"
        "    lcall $0x7b, $0\n"
        ".code64\n");

static void compatibility(void)
{
    word *sp = &stack1[60];

    set(S_ANY, descriptor((u32)(word)area, 0x1f, DATA | DPL(3), 4));
    LOAD_ES(S_ANY | 3);
    iret(SEL_USER_CODE32, (word)compatibility_store, SEL_USER_DATA);
    expect_landed("compatibility-store", SEL_USER_CODE32);
    check_equal("compatibility-base", area[0x1f], 0x77);
    iret(SEL_USER_CODE32, (word)compatibility_store_beyond, SEL_USER_DATA);
    expect("compatibility-limit", GP, 0);
    LOAD_ES(0);
    iret(SEL_USER_CODE32, (word)compatibility_store, SEL_USER_DATA);
    expect("compatibility-null-use", GP, 0);
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_DATA));
    set_gate_to(S_CODE1, TYPE_GATE32 | DPL(3), 0);
    iret(SEL_USER_CODE32, (word)compatibility_call, SEL_USER_DATA);
    expect_landed("compatibility-gate", S_CODE1);
    check_equal("compatibility-gate-stack", landed.sp, (word)(sp - 4));
    check_equal("compatibility-gate-saves-ip", sp[-4], (word)compatibility_call + 7);
    check_equal("compatibility-gate-saves-cs", sp[-3], SEL_USER_CODE32);
    check_equal("compatibility-gate-saves-sp", sp[-2], (word)sp);
    check_equal("compatibility-gate-saves-ss", sp[-1], SEL_USER_DATA);
}

static void nested(void)
{
    flags_set(flags_get() | FLAG_NT);
    FAULTS("iret-nt", GP, 0, "iretq", :);
    flags_set(flags_get() & ~(word)FLAG_NT);
}
#else
/* --- Tasks --- */

struct tss df_task;
static u32 df_stack[64];
volatile u32 df_error, df_link, df_ip;
void df_entry(void);
__asm__("df_entry:\n"
        "    popl df_error\n"
        "    movl df_task, %eax\n"
        "    movl %eax, df_link\n"
        "    movl tss + 32, %eax\n"
        "    movl %eax, df_ip\n"
        "    movl trap_resume, %eax\n"
        "    movl %eax, tss + 32\n"
        "    iretl\n");

/* #GP whose gate is absent, and a task for the #DF. */
static void double_fault(void)
{
    df_task = (struct tss){
        .ip = (u32)df_entry,
        .flags = 2,
        .sp = (u32)&df_stack[64],
        .cs = SEL_CODE,
        .ss = SEL_DATA,
        .ds = SEL_DATA,
        .es = SEL_DATA,
        .iomap = 104,
    };
    set(SEL_TSS_DF, descriptor((u32)&df_task, 103, TYPE_TSS, 0));
    set_gate(DF, NULL, SEL_TSS_DF, GATE_TASK);
    idt[GP].type &= ~ABSENT;
    df_error = 1;
    TRY("movw %w0, %%es", : : "r"(S_BEYOND) : "memory", "eax");
    check_equal("df-task-error", df_error, 0);
    check_equal("df-task-link", df_link & 0xffff, SEL_TSS);
    check_equal("df-task-ip-of-instruction", df_ip, trap_at);
    check_equal("df-task-returned", gdt[SEL_TSS_DF / 8] >> 40 & 0xff, TYPE_TSS);
    check("df-task-sets-ts", cr0() & CR0_TS);
    __asm__ volatile("clts");
    idt[GP].type |= ABSENT;
    set_gate(DF, trap_stubs + 16 * DF, SEL_CODE, GATE_INT);
}

/* IRET with NT: to the task that the link names. */
static void link_to(const char *name, u16 link, int vector)
{
    tss.link = link;
    flags_set(flags_get() | FLAG_NT);
    TRY("iretl", : : : "memory");
    expect(name, vector, link & ~3u);
    flags_set(flags_get() & ~(word)FLAG_NT);
    tss.link = 0;
}

static void nested(void)
{
    link_to("link-null", 0, TS);
    link_to("link-data", SEL_DATA, TS);
    link_to("link-local", 0x0c, TS);
    link_to("link-beyond-table", S_BEYOND, TS);
    set(S_TASK, descriptor((u32)&df_task, 103, TYPE_TSS, 0));
    link_to("link-not-busy", S_TASK, TS);
    set(S_TASK, descriptor((u32)&df_task, 103, TYPE_BUSY - ABSENT, 0));
    link_to("link-absent", S_TASK, NP);
    set(S_TASK, descriptor((u32)&df_task, 102, TYPE_BUSY, 0));
    link_to("link-short", S_TASK, TS);
    check_equal("link-refused-stays-busy", gdt[SEL_TSS / 8] >> 40 & 0xff, TYPE_BUSY);
}
#endif

void guest_main(void)
{
    static const u8 caught[] = {UD, TS, NP, SS, GP, VECTOR_LANDED};

    for (u32 i = 0; i < ARRAY_SIZE(caught); i++)
        trap_handlers[caught[i]] = catch;
    set_gate(VECTOR_LANDED, trap_stubs + 16 * VECTOR_LANDED, SEL_CODE, GATE_INT | GATE_DPL3);
    set(S_CONFORMING, flat(CONFORMING, CODE_FLAGS));
    set(S_CODE1 & ~3, flat(CODE | DPL(1), CODE_FLAGS));
    set(S_DATA1 & ~3, flat(DATA | DPL(1), 0xc));
#ifdef __x86_64__
    tss.sp[1] = (word)&stack1[60];
#else
    tss.sp1 = (word)&stack1[60];
    tss.ss1 = S_DATA1;
#endif

    loads();
    direct();
    go_back();
    at_home_in_ring3(inwards);
    nulling();
    releases();
    gates_ring0();
    at_home_in_ring3(gates_ring3);
    questions();
    local();
#ifdef __x86_64__
    bases();
    compatibility();
    if (on_tcg())
        skip("ring3-null-ss", "TCG takes it, and does not come back");
    else
        at_home_in_ring3(null_stack_in_ring3);
    nested();
#else
    at_home_in_ring3(limits);
    at_home_in_ring3(nulls);
    at_home_in_ring3(rights);
    at_home_in_ring3(stack16);
    if (on_tcg())
        skip("code16", "TCG runs on where a limit is");
    else
        code16();
    double_fault();
    nested();
#endif
}
