/*
 * Every exception that a program can raise, with its error code, its place (fault or trap) and its
 * flags; INT n and its gates; nested delivery up to the double fault. Built for 32 and 64 bits.
 *
 * Intel SDM vol. 3, chapter 6.
 */
#include "guest.h"

#define VECTOR_TEST 0x40
#define SEL_TEST SEL_FREE
#ifdef __x86_64__
#define IDT_ENTRY 16
#else
#define IDT_ENTRY 8
#endif

/* What a gate that fails to deliver says: vector * 8, IDT, and EXT when not INT n. */
#define ERROR_IDT(vector, ext) ((vector)*8 + 2 + (ext))

static void divide(void)
{
    u32 q, r;

    FAULTS("de-div-by-zero", DE, 0, "divl %2", : "=a"(q), "=d"(r) : "r"(0), "0"(1), "1"(0));
    FAULTS("de-div-overflow", DE, 0, "divl %2", : "=a"(q), "=d"(r) : "r"(2), "0"(0), "1"(2));
    FAULTS("de-idiv-overflow", DE, 0, "idivl %2",
           : "=a"(q), "=d"(r)
           : "r"(-1), "0"(0x80000000), "1"(0xffffffff));
    FAULTS("de-div8", DE, 0, "divb %b1", : "=a"(q) : "c"(1), "0"(0x100));
    FAULTS("de-div16", DE, 0, "divw %w2", : "=a"(q), "=d"(r) : "r"(0), "0"(1), "1"(0));
    WORKS("div-works", "divl %2", : "=a"(q), "=d"(r) : "r"(7), "0"(100), "1"(0));
    check_equal("div-quotient", q, 14);
#ifndef __x86_64__
    FAULTS("de-aam-zero", DE, 0, "aam $0", : : : "eax");
#endif
}

/* A trap's frame points past the instruction. */
static void expect_trap(const char *name, int vector, word length)
{
    check_equal(name, trap.vector == vector && !trap.error ? trap.ip - trap_at : 0x100u, length);
}

static void software(void)
{
    TRY("int3", :);
    expect_trap("bp-int3", BP, 1);
    TRY(".byte 0xcd, 3", :);
    expect_trap("bp-int-3", BP, 2);
    TRY("int $0x40", :);
    expect_trap("int-n", VECTOR_TEST, 2);
    TRY(".byte 0xf1", :);
    expect_trap("db-int1", DB, 1);
#ifndef __x86_64__
    TRY("movb $0x7f, %%al; incb %%al; into", : : : "eax");
    check_equal("of-into", trap.vector == OF ? trap.ip - trap_at : 0x100u, 5);
    WORKS("of-into-clear", "xorl %%eax, %%eax; into", : : : "eax");
    {
        static const int bounds[2] = {-5, 5};
        static const short bounds16[2] = {0, 1};

        FAULTS("br-bound-below", BR, 0, "bound %0, %1", : : "r"(-6), "m"(bounds));
        FAULTS("br-bound-above", BR, 0, "bound %0, %1", : : "r"(6), "m"(bounds));
        WORKS("br-bound-lowest", "bound %0, %1", : : "r"(-5), "m"(bounds));
        WORKS("br-bound-highest", "bound %0, %1", : : "r"(5), "m"(bounds));
        FAULTS("br-bound16", BR, 0, "bound %w0, %1", : : "r"(2), "m"(bounds16));
    }
#else
    FAULTS("ud-into-in-64", UD, 0, ".byte 0xce", :);
    FAULTS("ud-bound-in-64", UD, 0, ".byte 0x62, 0x00", :);
#endif
    check("trap-if-clear", !(flags_get() & FLAG_IF));
}

static void invalid(void)
{
    u32 x = 0;

    FAULTS("ud-ud2", UD, 0, "ud2", :);
    FAULTS("ud-ud1", UD, 0, ".byte 0x0f, 0xb9, 0xc0", :);
    FAULTS("ud-ud0", UD, 0, ".byte 0x0f, 0xff, 0xc0", :);
    FAULTS("ud-lock-mov", UD, 0, "lock; .byte 0x89, 0x00", : : "a"(&x));
    FAULTS("ud-lock-register", UD, 0, "lock; .byte 0x01, 0xc0", : : : "eax");
    FAULTS("ud-lock-cmp", UD, 0, "lock; .byte 0x39, 0x00", : : "a"(&x));
    FAULTS("ud-lea-register", UD, 0, ".byte 0x8d, 0xc0", :);
    FAULTS("ud-mov-cs", UD, 0, ".byte 0x8e, 0xc8", : : "a"(SEL_CODE));
    FAULTS("ud-mov-seg-6", UD, 0, ".byte 0x8e, 0xf0", : : "a"(SEL_DATA));
    FAULTS("ud-mov-cr1", UD, 0, ".byte 0x0f, 0x20, 0xc8", :);
    FAULTS("ud-mov-cr5", UD, 0, ".byte 0x0f, 0x20, 0xe8", :);
    FAULTS("ud-group-fe-7", UD, 0, ".byte 0xfe, 0xf8", :);
    FAULTS("ud-group-ff-7", UD, 0, ".byte 0xff, 0xf8", :);
    FAULTS("ud-group-8-0", UD, 0, ".byte 0x0f, 0xba, 0xc0, 0", :);
    FAULTS("ud-cmpxchg8b-register", UD, 0, ".byte 0x0f, 0xc7, 0xc8", :);
    FAULTS("ud-far-call-register", UD, 0, ".byte 0xff, 0xd8", :);
    FAULTS("ud-far-jump-register", UD, 0, ".byte 0xff, 0xe8", :);
#ifdef __x86_64__
    FAULTS("ud-push-es", UD, 0, ".byte 0x06", :);
    FAULTS("ud-pop-ds", UD, 0, ".byte 0x1f", :);
    FAULTS("ud-aaa", UD, 0, ".byte 0x37", :);
    FAULTS("ud-daa", UD, 0, ".byte 0x27", :);
    FAULTS("ud-aam", UD, 0, ".byte 0xd4, 0x0a", :);
    FAULTS("ud-salc", UD, 0, ".byte 0xd6", :);
    FAULTS("ud-pusha", UD, 0, ".byte 0x60", :);
    FAULTS("ud-far-call-direct", UD, 0, ".byte 0x9a, 0, 0, 0, 0, 8, 0", :);
    FAULTS("ud-far-jump-direct", UD, 0, ".byte 0xea, 0, 0, 0, 0, 8, 0", :);
    FAULTS("ud-82", UD, 0, ".byte 0x82, 0xc0, 0", :);
    FAULTS("sysenter-without-cs", cpu_is_amd() ? UD : GP, 0, "sysenter", :);
    FAULTS("ud-syscall-without-sce", UD, 0, "syscall", :);
    FAULTS("ud-mov-cr9", UD, 0, ".byte 0x44, 0x0f, 0x20, 0xc8", :);
#else
    FAULTS("sysenter-without-cs", GP, 0, "sysenter", :);
    FAULTS("ud-swapgs-in-32", UD, 0, ".byte 0x0f, 0x01, 0xf8", :);
#endif
}

/* Instructions of more than 15 bytes; cr0 and cr4 bits that may not be; rings. */
static void protection(void)
{
    FAULTS("gp-16-byte-instruction", GP, 0, ".rept 15; .byte 0x66; .endr; nop", :);
    WORKS("15-byte-instruction", ".rept 14; .byte 0x66; .endr; nop", :);
    if (on_tcg())
        skip("gp-cr0-pg-without-pe", "TCG obeys, and the guest is gone");
    else
        FAULTS("gp-cr0-pg-without-pe", GP, 0, "mov %0, %%cr0",
               :
               : "r"((cr0() | (word)CR0_PG) & ~(word)CR0_PE));
    if (on_tcg()) {
        skip("gp-cr0-nw-without-cd", "TCG obeys");
        skip("gp-cr4-reserved", "TCG hangs");
    } else {
        FAULTS("gp-cr0-nw-without-cd", GP, 0, "mov %0, %%cr0",
               :
               : "r"((cr0() | (word)BIT(29)) & ~(word)BIT(30)));
        FAULTS("gp-cr4-reserved", GP, 0, "mov %0, %%cr4", : : "r"(cr4() | (word)BIT(31)));
    }
    FAULTS("gp-rdmsr-unknown", GP, 0, "rdmsr", : : "c"(0x12345) : "eax", "edx");
    FAULTS("gp-wrmsr-efer-reserved", GP, 0, "wrmsr", : : "c"(MSR_EFER), "a"(0xfe), "d"(0xffffffff));
    FAULTS("gp-load-beyond-gdt", GP, 0xfff8, "mov %0, %%es", : : "r"(0xfff8));
    FAULTS("gp-load-rpl-in-error-code", GP, 0xfff8, "mov %0, %%es", : : "r"(0xfffb));
    FAULTS("gp-load-ldt-error-code", GP, 0xc, "mov %0, %%es", : : "r"(0xc));
    FAULTS("gp-load-tss-as-data", GP, SEL_TSS, "mov %0, %%es", : : "r"(SEL_TSS));
    gdt[SEL_TEST / 8] = descriptor(0, 0xfffff, 0x13, 0xc);
    FAULTS("np-data", NP, SEL_TEST, "mov %0, %%es", : : "r"(SEL_TEST));
    FAULTS("ss-not-present", SS, SEL_TEST, "mov %0, %%ss", : : "r"(SEL_TEST));
    gdt[SEL_TEST / 8] = descriptor(0, 0xfffff, 0x91, 0xc);
    FAULTS("gp-ss-read-only", GP, SEL_TEST, "mov %0, %%ss", : : "r"(SEL_TEST));
    FAULTS("gp-ss-rpl", GP, SEL_DATA, "mov %0, %%ss", : : "r"(SEL_DATA | 1));
    gdt[SEL_TEST / 8] = descriptor(0, 0xfffff, 0x99, 0xc); /* code, not readable */
    FAULTS("gp-load-execute-only", GP, SEL_TEST, "mov %0, %%es", : : "r"(SEL_TEST));
    FAULTS("gp-ltr-busy", GP, SEL_TSS, "ltr %w0", : : "r"(SEL_TSS));
    FAULTS("gp-ltr-null", GP, 0, "ltr %w0", : : "r"(0));
    FAULTS("gp-lldt-not-ldt", GP, SEL_DATA, "lldt %w0", : : "r"(SEL_DATA));
    WORKS("lldt-null", "lldt %w0", : : "r"(0));
#ifdef __x86_64__
    FAULTS("gp-noncanonical", GP, 0, "mov (%0), %%al", : : "r"(0x800000000000ULL << 9) : "eax");
    TRY("mov %0, %%rbp; mov (%%rbp), %%al", : : "r"(BIT(56)) : "eax");
    check_equal("ss-noncanonical", (u64)trap.vector, SS);
    FAULTS("gp-noncanonical-jump", GP, 0, "jmp *%0", : : "r"(0x800000000000ULL << 9));
    FAULTS("gp-wrmsr-fsbase-noncanonical", GP, 0, "wrmsr",
           :
           : "c"(0xc0000100), "a"(0), "d"(0x01000000));
    FAULTS("gp-cr8-reserved", GP, 0, "mov %0, %%cr8", : : "r"(0x10ULL));
    if (on_tcg()) {
        skip("gp-cr3-reserved", "TCG obeys, and the guest is gone");
        skip("gp-cr4-pae-in-long", "the same");
    } else {
        FAULTS("gp-cr3-reserved", GP, 0, "mov %0, %%cr3", : : "r"(cr3() | BIT(62)));
        FAULTS("gp-cr4-pae-in-long", GP, 0, "mov %0, %%cr4", : : "r"(cr4() & ~CR4_PAE));
    }
#else
    __asm__ volatile("mov %0, %%es" : : "r"(0));
    FAULTS("gp-null-data", GP, 0, "movb %%es:0, %%al", : : : "eax");
    __asm__ volatile("mov %0, %%es" : : "r"(SEL_DATA));
#endif
}

static void gates(void)
{
    struct gate saved = idt[VECTOR_TEST];
    struct table_pointer small = {VECTOR_TEST * IDT_ENTRY + IDT_ENTRY - 2, (word)idt};

    idt[VECTOR_TEST].type &= 0x7f;
    FAULTS("np-gate", NP, ERROR_IDT(VECTOR_TEST, 0), "int $0x40", :);
    idt[VECTOR_TEST] = saved;
    idt[VECTOR_TEST].type = 0x89;
    FAULTS("gp-gate-type", GP, ERROR_IDT(VECTOR_TEST, 0), "int $0x40", :);
    idt[VECTOR_TEST] = saved;
    idt[VECTOR_TEST].selector = 0;
    FAULTS("gp-gate-null-selector", GP, 0, "int $0x40", :);
    idt[VECTOR_TEST].selector = SEL_DATA;
    FAULTS("gp-gate-data-selector", GP, SEL_DATA, "int $0x40", :);
    gdt[SEL_TEST / 8] = gdt[SEL_CODE / 8] & ~BIT(47);
    idt[VECTOR_TEST].selector = SEL_TEST;
    FAULTS("np-gate-code-absent", NP, SEL_TEST, "int $0x40", :);
    gdt[SEL_TEST / 8] = gdt[SEL_CODE / 8] | 3ULL << 45;
    FAULTS("gp-gate-code-less-privileged", GP, SEL_TEST, "int $0x40", :);
    idt[VECTOR_TEST] = saved;
    __asm__ volatile("lidt %0" : : "m"(small));
    FAULTS("gp-beyond-idt", GP, ERROR_IDT(VECTOR_TEST, 0), "int $0x40", :);
    load_tables();

    /* An exception's own gate: EXT is set. */
    saved = idt[UD];
    idt[UD].type &= 0x7f;
    FAULTS("np-gate-of-exception", NP, ERROR_IDT(UD, 1), "ud2", :);
    idt[UD] = saved;
    saved = idt[BP];
    idt[BP].type &= 0x7f;
    FAULTS("np-gate-of-int3", NP, ERROR_IDT(BP, 0), "int3", :);
    idt[BP] = saved;
    idt[VECTOR_TEST].type = GATE_TRAP;
    TRY("sti; nop; int $0x40; cli", :);
    check("trap-gate-keeps-if", trap.vector == VECTOR_TEST && trap.flags & FLAG_IF);
    __asm__ volatile("cli");
    set_gate(VECTOR_TEST, trap_stubs + 16 * VECTOR_TEST, SEL_CODE, GATE_INT);
}

static void user_instructions(void)
{
    FAULTS("user-gp-cli", GP, 0, "cli", :);
    FAULTS("user-gp-sti", GP, 0, "sti", :);
    FAULTS("user-gp-hlt", GP, 0, "hlt", :);
    FAULTS("user-gp-in", GP, 0, "inb $0x60, %%al", : : : "eax");
    FAULTS("user-gp-out", GP, 0, "outb %%al, $0x80", :);
    FAULTS("user-gp-in-dx-word-at-map-edge", GP, 0, "inw %%dx, %%ax", : : "d"(0x3ff) : "eax");
    FAULTS("user-gp-rdmsr", GP, 0, "rdmsr", : : "c"(0x1b) : "eax", "edx");
    FAULTS("user-gp-wrmsr", GP, 0, "wrmsr", : : "c"(0x1b), "a"(0), "d"(0));
    FAULTS("user-gp-mov-cr0", GP, 0, "mov %%cr0, %0", : "=r"((word){0}) :);
    FAULTS("user-gp-mov-to-cr3", GP, 0, "mov %0, %%cr3", : : "r"((word)0));
    FAULTS("user-gp-mov-dr7", GP, 0, "mov %%dr7, %0", : "=r"((word){0}) :);
    FAULTS("user-gp-clts", GP, 0, "clts", :);
    FAULTS("user-gp-lgdt", GP, 0, "lgdt %0", : : "m"(gdt_pointer));
    FAULTS("user-gp-lidt", GP, 0, "lidt %0", : : "m"(idt_pointer));
    FAULTS("user-gp-lldt", GP, 0, "lldt %w0", : : "r"(0));
    FAULTS("user-gp-ltr", GP, 0, "ltr %w0", : : "r"(SEL_TSS));
    FAULTS("user-gp-lmsw", GP, 0, "lmsw %w0", : : "r"(0));
    FAULTS("user-gp-invd", GP, 0, "invd", :);
    FAULTS("user-gp-wbinvd", GP, 0, "wbinvd", :);
    FAULTS("user-gp-invlpg", GP, 0, "invlpg (%0)", : : "r"(user_stack));
    FAULTS("user-gp-int-n", GP, ERROR_IDT(VECTOR_TEST, 0), "int $0x40", :);
    FAULTS("user-gp-load-kernel-data", GP, SEL_DATA, "mov %0, %%es", : : "r"(SEL_DATA));
    TRY("int3", :);
    expect_trap("user-bp", BP, 1);
    FAULTS("user-ud2", UD, 0, "ud2", :);
    TRY(".byte 0xf1", :);
    expect_trap("user-db-int1", DB, 1);
    WORKS("user-in-allowed-by-map", "inb %%dx, %%al", : : "d"(0x3fd) : "eax");
}

static void user_iopl3(void)
{
    WORKS("iopl3-cli", "cli", :);
    WORKS("iopl3-sti", "sti; cli", :);
    WORKS("iopl3-in", "inb $0x61, %%al", : : : "eax");
    FAULTS("iopl3-gp-hlt", GP, 0, "hlt", :);
}

static void user_alignment(void)
{
    static u32 buffer[8] __attribute__((aligned(16)));
    u8 *p = (u8 *)buffer;

    FAULTS("ac-dword", AC, 0, "movl (%0), %%eax", : : "r"(p + 1) : "eax");
    FAULTS("ac-word", AC, 0, "movw (%0), %%ax", : : "r"(p + 1) : "eax");
    FAULTS("ac-store", AC, 0, "movl %%eax, (%0)", : : "r"(p + 2) : "memory");
    WORKS("ac-aligned", "movl (%0), %%eax", : : "r"(p + 4) : "eax");
    WORKS("ac-byte", "movb (%0), %%al", : : "r"(p + 3) : "eax");
    __asm__ volatile("pushf; andl $~0x40000, (" REG_SP "); popf" ::: "memory", "cc");
    WORKS("ac-flag-clear", "movl (%0), %%eax", : : "r"(p + 1) : "eax");
}

static void alignment(void)
{
    static u32 buffer[2];

    set_cr0(cr0() | (word)CR0_AM);
    flags_set(flags_get() | (word)FLAG_AC);
    WORKS("ac-not-in-ring-0", "movl (%0), %%eax", : : "r"((u8 *)buffer + 1) : "eax");
    flags_set(flags_get() & ~(word)FLAG_AC);
    run_user(user_alignment, FLAG_AC);
    set_cr0(cr0() & ~(word)CR0_AM);
}

static void floating(void)
{
    static double memory;
    u32 mxcsr = 0x1f80 & ~0x80u; /* invalid unmasked */
    u16 control = 0x037e;        /* the same for x87 */
    u32 bad = 0xffff0000;

    set_cr0(cr0() | (word)CR0_TS);
    FAULTS("nm-x87", NM, 0, "fld1", :);
    FAULTS("nm-sse", NM, 0, ".byte 0x0f, 0x57, 0xc0", :);
    FAULTS("nm-wait-with-mp", NM, 0, "fwait", :);
    set_cr0(cr0() & ~(word)CR0_MP);
    WORKS("nm-wait-without-mp", "fwait", :);
    __asm__ volatile("clts");
    set_cr0((cr0() | (word)CR0_EM));
    FAULTS("nm-x87-em", NM, 0, "fld1", :);
    FAULTS("ud-sse-em", UD, 0, ".byte 0x0f, 0x57, 0xc0", :);
    set_cr0((cr0() & ~(word)CR0_EM) | (word)CR0_MP);
    set_cr4(cr4() & ~(word)CR4_OSFXSR);
    FAULTS("ud-sse-without-osfxsr", UD, 0, ".byte 0x0f, 0x57, 0xc0", :);
    set_cr4(cr4() | (word)CR4_OSFXSR);

    __asm__ volatile("fninit; fldcw %0; fldz; fldz; .byte 0xde, 0xf9" : : "m"(control)); /* 0/0 */
    FAULTS("mf-at-next-x87", MF, 0, "fldz", :);
    FAULTS("mf-at-wait", MF, 0, "fwait", :);
    WORKS("mf-not-at-fnstsw", "fnstsw %%ax", : : : "eax");
    FAULTS("mf-at-store", MF, 0, "fstpl %0", : "=m"(memory) :);
    __asm__ volatile("fninit");
    WORKS("mf-gone-after-fninit", "fwait", :);

    __asm__ volatile("ldmxcsr %0; .byte 0x0f, 0x57, 0xc0" : : "m"(mxcsr)); /* xorps xmm0, xmm0 */
    FAULTS("xm-divps", XM, 0, ".byte 0x0f, 0x5e, 0xc0", :);
    set_cr4(cr4() & ~(word)CR4_OSXMMEXCPT);
    FAULTS("ud-xm-without-osxmmexcpt", UD, 0, ".byte 0x0f, 0x5e, 0xc0", :);
    set_cr4(cr4() | (word)CR4_OSXMMEXCPT);
    mxcsr = 0x1f80;
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
    FAULTS("gp-mxcsr-reserved", GP, 0, "ldmxcsr %0", : : "m"(bad));
    FAULTS("gp-movaps-misaligned", GP, 0, ".byte 0x0f, 0x28, 0x00", : : "a"((u8 *)&memory + 1));
}

static void flags(void)
{
    TRY("ud2", :);
    check("fault-pushes-rf", trap.flags & FLAG_RF);
    TRY("int3", :);
    check("trap-pushes-no-rf", trap.vector == BP && !(trap.flags & FLAG_RF));
    TRY("int $0x40", :);
    check("int-pushes-no-rf", trap.vector == VECTOR_TEST && !(trap.flags & FLAG_RF));
    /* TF: a trap after the instruction that follows the POPF. */
    flags_get();
    set_dr6(0xffff0ff0);
    TRY("pushf; orl $0x100, (" REG_SP "); popf; nop; nop", : : : "memory", "cc");
    check("tf-vector", trap.vector == DB);
    check("tf-flag-in-frame", trap.flags & FLAG_TF);
    check("tf-dr6-bs", dr6() & BIT(14));
    set_dr6(0xffff0ff0);
    __asm__ volatile("cld");
}

/* Nested exceptions. A fault in delivering a contributory one: double fault. */
static void nested(void)
{
    struct gate ud = idt[UD], gp = idt[GP], np = idt[NP], de = idt[DE];
    u32 q, r;

    idt[DE].type &= 0x7f;
    idt[NP].type &= 0x7f; /* #DE's gate: #NP, both contributory: #DF */
    TRY("divl %2", : "=a"(q), "=d"(r) : "r"(0), "0"(1), "1"(0));
    check_equal("df-contributory-twice", (u64)trap.vector, DF);
    check_equal("df-error-code", trap.error, 0);
    idt[NP] = np;
    FAULTS("np-after-de-is-df", DF, 0, "divl %2", : "=a"(q), "=d"(r) : "r"(0), "0"(1), "1"(0));
    idt[DE] = de;
    idt[UD].type &= 0x7f;
    idt[NP] = np;
    FAULTS("np-after-benign", NP, ERROR_IDT(UD, 1), "ud2", :);
    idt[UD] = ud;
    idt[GP].type &= 0x7f;
    TRY("rdmsr", : : "c"(0x12345) : "eax", "edx");
    check_equal("df-gp-without-gate", (u64)trap.vector, DF);
    idt[GP] = gp;
}

void guest_main(void)
{
    divide();
    software();
    invalid();
    protection();
    gates();
    floating();
    flags();
    nested();
    check("run-user-returns", run_user(user_instructions, 0));
    check("run-user-iopl3-returns", run_user(user_iopl3, FLAG_IOPL3));
    alignment();
}
