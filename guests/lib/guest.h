/*
 * What every guest uses: output, checks, descriptor tables, and exceptions that are caught.
 *
 * A guest is guest_main() and this library, built for 32 or 64 bits, without a C library. It prints
 * one line a check, "ok NAME" or "not ok NAME: ...", and ends through the debug-exit port: 0 when all
 * passed, else GUEST_FAILED.
 *
 * TRY("instruction" : operands) runs an instruction and catches its exception in `trap`. Works in
 * ring 3 too (run_user), where the I/O map lets checks print.
 */
#ifndef GUEST_H
#define GUEST_H

#include "selectors.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)
#define BIT(n) (1ULL << (n))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define PORT_EXIT 0xf4
#define GUEST_FAILED 2 /* status 5; 1 would be 3, a triple fault's */

#define FLAG_CF BIT(0)
#define FLAG_PF BIT(2)
#define FLAG_ZF BIT(6)
#define FLAG_TF BIT(8)
#define FLAG_IF BIT(9)
#define FLAG_DF BIT(10)
#define FLAG_IOPL3 (3 << 12)
#define FLAG_NT BIT(14)
#define FLAG_RF BIT(16)
#define FLAG_VM BIT(17)
#define FLAG_AC BIT(18)
#define FLAG_VIF BIT(19)
#define FLAG_VIP BIT(20)

#define CR0_PE BIT(0)
#define CR0_MP BIT(1)
#define CR0_EM BIT(2)
#define CR0_TS BIT(3)
#define CR0_NE BIT(5)
#define CR0_WP BIT(16)
#define CR0_AM BIT(18)
#define CR0_PG BIT(31)
#define CR4_VME BIT(0)
#define CR4_PVI BIT(1)
#define CR4_TSD BIT(2)
#define CR4_DE BIT(3)
#define CR4_PSE BIT(4)
#define CR4_PAE BIT(5)
#define CR4_PGE BIT(7)
#define CR4_PCE BIT(8)
#define CR4_OSFXSR BIT(9)
#define CR4_OSXMMEXCPT BIT(10)
#define CR4_UMIP BIT(11)
#define CR4_LA57 BIT(12)
#define CR4_FSGSBASE BIT(16)
#define CR4_PCIDE BIT(17)
#define CR4_OSXSAVE BIT(18)
#define CR4_SMEP BIT(20)
#define CR4_SMAP BIT(21)
#define CR4_PKE BIT(22)
#define CR4_PKS BIT(24)

#define MSR_EFER 0xc0000080
#define EFER_SCE BIT(0)
#define EFER_LME BIT(8)
#define EFER_LMA BIT(10)
#define EFER_NXE BIT(11)

enum {
    DE = 0,
    DB = 1,
    NMI = 2,
    BP = 3,
    OF = 4,
    BR = 5,
    UD = 6,
    NM = 7,
    DF = 8,
    TS = 10,
    NP = 11,
    SS = 12,
    GP = 13,
    PF = 14,
    MF = 16,
    AC = 17,
    MC = 18,
    XM = 19,
    NONE = -1,
};

/* The frame of an exception, interrupt, or INT. */
struct frame {
#ifdef __x86_64__
    u64 r15, r14, r13, r12, r11, r10, r9, r8, di, si, bp, bx, dx, cx, ax;
    u64 vector, error, ip, cs, flags, sp, ss;
#else
    u32 gs, fs, es, ds, di, si, bp, sp_ignored, bx, dx, cx, ax;
    u32 vector, error, ip, cs, flags;
    u32 sp, ss;                         /* only from another ring */
    u32 v86_es, v86_ds, v86_fs, v86_gs; /* only from virtual-8086 mode */
#endif
};

/* The last exception that TRY met; vector is NONE when there was none. */
struct trap {
    int vector;
    word error, ip, cr2, flags, cs, sp, frame;
};
extern volatile struct trap trap;
extern volatile word trap_resume, trap_at, trap_sp, trap_bp;

#ifdef __x86_64__
#define MOVW "movq "
#define REG_SP "%%rsp"
#define REG_BP "%%rbp"
#else
#define MOVW "movl "
#define REG_SP "%%esp"
#define REG_BP "%%ebp"
#endif

/* TRY("insn", : "=a"(out) : "r"(in)): the operands are those of asm, from the first colon. */
#define TRY(insn, ...)                                                                             \
    do {                                                                                           \
        trap.vector = NONE;                                                                        \
        __asm__ volatile(MOVW "$99f, trap_resume\n\t" MOVW "$98f, trap_at\n\t" MOVW REG_SP         \
                              ", trap_sp\n\t" MOVW REG_BP ", trap_bp\n98:\t" insn "\n99:\t" MOVW   \
                              "trap_sp, " REG_SP "\n\t" MOVW "trap_bp, " REG_BP __VA_ARGS__);      \
        trap_resume = 0;                                                                           \
    } while (0)
/* TRY, and a check that it raised `vec` as a fault (at the instruction) with this error code. */
#define FAULTS(name, vec, err, insn, ...)                                                          \
    do {                                                                                           \
        TRY(insn, __VA_ARGS__);                                                                    \
        expect_fault(name, vec, err);                                                              \
    } while (0)
#define WORKS(name, insn, ...)                                                                     \
    do {                                                                                           \
        TRY(insn, __VA_ARGS__);                                                                    \
        check_equal(name, (u64)(long long)trap.vector, (u64)(long long)NONE);                      \
    } while (0)

void guest_main(void);
void guest_exit(u8 status) __attribute__((noreturn));

void print(const char *text);
void print_hex(u64 value);
/* What the names of the checks that follow begin with; "" at first. */
extern const char *check_group;
void check(const char *name, bool passed);
void check_equal(const char *name, u64 got, u64 want);
void skip(const char *name, const char *why);
void expect_fault(const char *name, int vector, word error);

/* Interrupt handlers by vector; one that is set is called instead of the catcher. */
typedef void (*trap_handler)(struct frame *frame);
extern trap_handler trap_handlers[256];
void trap_entry(struct frame *frame);
extern const u8 trap_stubs[];

/* Runs fn() in ring 3 on a stack of its own, with `flags` (and bit 1). True when fn returned; false
 * when an exception outside of TRY ended it, which is then in `trap`. */
bool run_user(void (*fn)(void), word flags);
void user_enter(word ip, word sp, word flags, word cs, word ss);
void user_leave(void) __attribute__((noreturn));
void user_done(void);
extern word user_kernel_sp;
extern u8 user_stack[16384], trap_stack[16384];

/* Tables */
extern u64 gdt[GDT_ENTRIES];
struct table_pointer {
    u16 limit;
    word base;
} __attribute__((packed));
extern struct table_pointer gdt_pointer, idt_pointer;

#ifdef __x86_64__
struct gate {
    u16 offset_low, selector;
    u8 ist, type;
    u16 offset_mid;
    u32 offset_high, reserved;
};
struct tss {
    u32 reserved0;
    u64 sp[3] __attribute__((packed));
    u64 reserved1 __attribute__((packed));
    u64 ist[7] __attribute__((packed));
    u64 reserved2 __attribute__((packed));
    u16 reserved3, iomap;
    u8 map[8193];
} __attribute__((packed, aligned(16)));
#else
struct gate {
    u16 offset_low, selector;
    u8 count, type;
    u16 offset_high;
};
struct tss {
    u32 link, sp0, ss0, sp1, ss1, sp2, ss2, cr3, ip, flags, ax, cx, dx, bx, sp, bp, si, di;
    u32 es, cs, ss, ds, fs, gs, ldt;
    u16 trace, iomap;
    u8 map[8193];
} __attribute__((aligned(16)));
#endif
extern struct gate idt[256];
extern struct tss tss;

#define GATE_INT 0x8e
#define GATE_TRAP 0x8f
#define GATE_TASK 0x85
#define GATE_DPL3 0x60
void set_gate(unsigned vector, const void *entry, u16 selector, u8 type);
/* A descriptor: `access` is byte 5, `flags` the high nibble of byte 6 (G, D/B, L, AVL). */
u64 descriptor(u32 base, u32 limit, u8 access, u8 flags);
void load_tables(void);
void load_tr(void);

/* The registers at `start`, and boot_entry.eax as each segment shows it there. FS and GS are looked
 * at under multiboot only. */
struct boot_entry {
    u32 eax, ebx, flags, cr0, by_es, by_fs, by_gs;
};
extern struct boot_entry boot_entry;

/* Instructions */
static inline void outb(u16 port, u8 v)
{
    __asm__ volatile("outb %0, %1" : : "a"(v), "Nd"(port));
}
static inline u8 inb(u16 port)
{
    u8 v;

    __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port));
    return v;
}
static inline u64 rdmsr(u32 msr)
{
    u32 lo, hi;

    __asm__ volatile("rdmsr" : "=a"(lo), "=d"(hi) : "c"(msr));
    return (u64)hi << 32 | lo;
}
static inline void wrmsr(u32 msr, u64 v)
{
    __asm__ volatile("wrmsr" : : "c"(msr), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}
static inline u64 rdtsc(void)
{
    u32 lo, hi;

    __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
    return (u64)hi << 32 | lo;
}
#define CONTROL_REGISTER(n)                                                                        \
    static inline word cr##n(void)                                                                 \
    {                                                                                              \
        word v;                                                                                    \
                                                                                                   \
        __asm__ volatile("mov %%cr" #n ", %0" : "=r"(v) : : "memory");                             \
        return v;                                                                                  \
    }                                                                                              \
    static inline void set_cr##n(word v)                                                           \
    {                                                                                              \
        __asm__ volatile("mov %0, %%cr" #n : : "r"(v) : "memory");                                 \
    }
CONTROL_REGISTER(0)
CONTROL_REGISTER(2)
CONTROL_REGISTER(3)
CONTROL_REGISTER(4)
#define DEBUG_REGISTER(n)                                                                          \
    static inline word dr##n(void)                                                                 \
    {                                                                                              \
        word v;                                                                                    \
                                                                                                   \
        __asm__ volatile("mov %%dr" #n ", %0" : "=r"(v));                                          \
        return v;                                                                                  \
    }                                                                                              \
    static inline void set_dr##n(word v)                                                           \
    {                                                                                              \
        __asm__ volatile("mov %0, %%dr" #n : : "r"(v) : "memory");                                 \
    }
DEBUG_REGISTER(0)
DEBUG_REGISTER(1)
DEBUG_REGISTER(2)
DEBUG_REGISTER(3)
DEBUG_REGISTER(6)
DEBUG_REGISTER(7)
static inline word flags_get(void)
{
    word v;

    __asm__ volatile("pushf; pop %0" : "=r"(v) : : "memory");
    return v;
}
static inline void flags_set(word v)
{
    __asm__ volatile("push %0; popf" : : "r"(v) : "memory", "cc");
}

struct cpuid {
    u32 a, b, c, d;
};
struct cpuid cpuid(u32 leaf, u32 subleaf);
bool cpu_is_amd(void);
/* QEMU's translator, which a few checks must not be tried on. */
bool on_tcg(void);

void *memset(void *to, int c, word n);
void *memcpy(void *to, const void *from, word n);
int memcmp(const void *a, const void *b, word n);

#endif
