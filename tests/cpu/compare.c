/*
 * Comparing and printing what the two sides made of a case.
 */
#include "compare.h"

#include "x86/regs.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define FSW_ES 0x80u
#define TASK_SIZE 0x7ffffffff000ULL

#define TASK_SIZE 0x7ffffffff000ULL

/*
 * What the architecture leaves open, and doppel and this processor do differently. An entry excuses
 * some flags or registers after one instruction (ZYDIS_MNEMONIC_INVALID: any), nothing else.
 */
enum {
    FREE_X87_POINTERS = 1,
    FREE_FAULT = 4,   /* which of its faults an instruction raises */
    FREE_X87_TOP = 8, /* TOP and the tags, when it faults */
    FREE_GPRS = 16,   /* general registers, when it faults */
    FREE_MEMORY = 64, /* what was stored, when it faults */
    FREE_UPPER = 32,  /* all but 128 bits of vector registers, when it faults */
};
static const struct {
    ZydisMnemonic mnemonic;
    u32 what;
    u64 flags;
    const char *why;
} freedoms[] = {
    {ZYDIS_MNEMONIC_INVALID, FREE_X87_POINTERS, 0,
     "AMD's processors show zeros in FOP, FIP and FDP unless an x87 exception is pending"},
#define UPPER "whether elements that are done have cleared the destination's upper part"
    {ZYDIS_MNEMONIC_VGATHERDPS, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VGATHERDPD, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VGATHERQPS, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VGATHERQPD, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VPGATHERDD, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VPGATHERDQ, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VPGATHERQD, FREE_UPPER, 0, UPPER},
    {ZYDIS_MNEMONIC_VPGATHERQQ, FREE_UPPER, 0, UPPER},
#undef UPPER
#define ORDER "which part of the operand is touched first"
    {ZYDIS_MNEMONIC_FNSTENV, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FLDENV, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FNSAVE, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FRSTOR, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FBLD, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FBSTP, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_IRET, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_IRETD, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_IRETQ, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VPCOMPRESSD, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VPCOMPRESSQ, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VCOMPRESSPS, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VCOMPRESSPD, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VPCOMPRESSB, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VPCOMPRESSW, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FXSAVE, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FXSAVE64, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FXRSTOR, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_FXRSTOR64, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XSAVE, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XSAVE64, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XSAVEC, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XSAVEC64, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XSAVEOPT, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XSAVEOPT64, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XRSTOR, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_XRSTOR64, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_MASKMOVQ, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_MASKMOVDQU, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_VMASKMOVDQU, FREE_FAULT, 0, ORDER},
    {ZYDIS_MNEMONIC_PUSHA, FREE_MEMORY, 0, "AMD's processors store registers until they fault"},
    {ZYDIS_MNEMONIC_PUSHAD, FREE_MEMORY, 0, "AMD's processors store registers until they fault"},
    {ZYDIS_MNEMONIC_POPA, FREE_GPRS, 0, "AMD's processors load registers until they fault"},
    {ZYDIS_MNEMONIC_POPAD, FREE_GPRS, 0, "AMD's processors load registers until they fault"},
    {ZYDIS_MNEMONIC_AAA, 0, EFLAGS_OF | EFLAGS_SF | EFLAGS_ZF | EFLAGS_PF, "undefined"},
    {ZYDIS_MNEMONIC_AAS, 0, EFLAGS_OF | EFLAGS_SF | EFLAGS_ZF | EFLAGS_PF, "undefined"},
    {ZYDIS_MNEMONIC_AAD, 0, EFLAGS_OF | EFLAGS_AF | EFLAGS_CF, "undefined"},
    {ZYDIS_MNEMONIC_AAM, 0, EFLAGS_OF | EFLAGS_AF | EFLAGS_CF, "undefined"},
    {ZYDIS_MNEMONIC_DAA, 0, EFLAGS_OF, "undefined"},
    {ZYDIS_MNEMONIC_DAS, 0, EFLAGS_OF, "undefined"},
    {ZYDIS_MNEMONIC_MASKMOVQ, FREE_X87_TOP, 0,
     "AMD's processors leave x87 for MMX before they find that it faults"},
    {ZYDIS_MNEMONIC_CMPSB, FREE_FAULT, 0, "which operand is read first"},
    {ZYDIS_MNEMONIC_CMPSW, FREE_FAULT, 0, "which operand is read first"},
    {ZYDIS_MNEMONIC_CMPSD, FREE_FAULT, 0, "which operand is read first"},
    {ZYDIS_MNEMONIC_CMPSQ, FREE_FAULT, 0, "which operand is read first"},
    {ZYDIS_MNEMONIC_CALL, FREE_FAULT, 0, "whether the target is checked before the push"},
    {ZYDIS_MNEMONIC_RET, FREE_FAULT, 0, "AMD's processors read the outer stack before all checks"},
#undef ORDER
};
/* --- Printing --- */

void print_code(const ZydisDecoder *decoder, const struct test_case *c)
{
    ZydisFormatter formatter;

    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    for (unsigned n = 0; n < c->ncode; n++) {
        unsigned end = n + 1u < c->ncode ? c->starts[n + 1] : c->code_len;
        ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
        ZydisDecodedInstruction zi;
        char text[128] = "(invalid)";

        if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, c->code + c->starts[n], end - c->starts[n],
                                                &zi, ops)))
            ZydisFormatterFormatInstruction(&formatter, &zi, ops, zi.operand_count_visible, text,
                                            sizeof(text), CODE + c->code_offset + c->starts[n],
                                            NULL);
        printf("    %#llx ", (unsigned long long)(CODE + c->code_offset + c->starts[n]));
        for (unsigned b = c->starts[n]; b < end; b++)
            printf("%02x", c->code[b]);
        printf("  %s\n", text);
    }
}

static void print_bytes(const u8 *p, unsigned n)
{
    while (n--)
        printf("%02x", p[n]);
}

void print_gprs(const char *name, const struct user_state *s)
{
    static const char *const names[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                        "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

    printf("  %s:\n", name);
    for (unsigned n = 0; n < 16; n++)
        printf("%s%-3s %016llx%s", n % 4 ? "  " : "    ", names[n], (unsigned long long)s->gpr[n],
               n % 4 == 3 ? "\n" : "");
    printf("    rip %016llx  rflags %llx  cs %x ss %x ds %x es %x fs %x %llx gs %x %llx\n",
           (unsigned long long)s->rip, (unsigned long long)s->rflags, s->cs, s->ss, s->ds, s->es,
           s->fs, (unsigned long long)s->fs_base, s->gs, (unsigned long long)s->gs_base);
}

void print_state(const char *name, const struct user_state *s)
{
    print_gprs(name, s);
    printf("    mxcsr %x  pkru %x  fcw %x fsw %x ftw %x fop %x fip %llx fdp %llx\n", s->mxcsr,
           s->pkru, s->fcw, s->fsw, s->ftw, s->fop, (unsigned long long)s->fip,
           (unsigned long long)s->fdp);
    for (unsigned n = 0; n < 8; n++) {
        printf("    st%u ", n);
        print_bytes(s->st[n], 10);
        printf("  k%u %016llx\n", n, (unsigned long long)s->k[n]);
    }
    for (unsigned n = 0; n < 32; n++) {
        printf("    zmm%-2u ", n);
        print_bytes(s->vec[n], 64);
        printf("\n");
    }
}

/* --- Comparing --- */

static void differ(struct report *r, const char *fmt, ...) PRINTF_LIKE(2, 3);
static void differ(struct report *r, const char *fmt, ...)
{
    va_list args;
    int n;

    va_start(args, fmt);
    n = vsnprintf(r->text + r->used, sizeof(r->text) - r->used, fmt, args);
    va_end(args);
    if (n > 0)
        r->used = MIN(r->used + (size_t)n, sizeof(r->text) - 1);
}

static void compare_value(struct report *r, const char *name, u64 native, u64 doppel)
{
    if (native != doppel)
        differ(r, "    %s: native %llx, doppel %llx\n", name, (unsigned long long)native,
               (unsigned long long)doppel);
}

static void compare_bytes(struct report *r, const char *name, unsigned number, const u8 *native,
                          const u8 *doppel, unsigned size)
{
    if (!memcmp(native, doppel, size))
        return;
    differ(r, "    %s%u: native ", name, number);
    for (unsigned n = size; n-- > 0;)
        differ(r, "%02x", native[n]);
    differ(r, "\n    %*s doppel ", (int)strlen(name) + 2, "");
    for (unsigned n = size; n-- > 0;)
        differ(r, "%02x", doppel[n]);
    differ(r, "\n");
}

static void compare_window(struct report *r, const u8 *native, const u8 *doppel)
{
    unsigned shown = 0;

    if (!memcmp(native, doppel, WRITABLE_PAGES * PAGE))
        return;
    for (unsigned n = 0; n < WRITABLE_PAGES * PAGE && shown < 8; n += 8) {
        u64 a, b;

        memcpy(&a, native + n, 8);
        memcpy(&b, doppel + n, 8);
        if (a == b)
            continue;
        differ(r, "    memory at %#x: native %016llx, doppel %016llx\n",
               WINDOW + writable_pages[n / PAGE] * PAGE + n % PAGE, (unsigned long long)a,
               (unsigned long long)b);
        shown++;
    }
}

static bool decode_at(const ZydisDecoder *decoder, const struct test_case *c, unsigned n,
                      ZydisDecodedInstruction *zi, ZydisDecodedOperand *ops)
{
    return ZYAN_SUCCESS(ZydisDecoderDecodeFull(decoder, c->code + c->starts[n],
                                               c->code_len - c->starts[n], zi, ops));
}

ZydisMnemonic mnemonic_at(const ZydisDecoder *decoder, const struct test_case *c, unsigned n)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;

    return decode_at(decoder, c, n, &zi, ops) ? zi.mnemonic : ZYDIS_MNEMONIC_INVALID;
}

/* The instruction that faulted; the first when none of the case's did. */
static unsigned faulting(const struct test_case *c, const struct outcome *o)
{
    for (unsigned n = 0; n < c->ncode; n++) {
        if (o->after.rip == CODE + c->code_offset + c->starts[n])
            return n;
    }
    return 0;
}

/*
 * What instruction `at` leaves open when it faults. Undefined flags are the first one's: such an
 * instruction is followed by no other.
 */
static u32 freedoms_of(const ZydisDecoder *decoder, const struct test_case *c, unsigned at,
                       u64 *flags)
{
    ZydisMnemonic mnemonic = mnemonic_at(decoder, c, at);
    u32 what = 0;

    *flags = 0;
    for (unsigned f = 0; f < ARRAY_SIZE(freedoms); f++) {
        if (freedoms[f].mnemonic && freedoms[f].mnemonic != mnemonic)
            continue;
        what |= freedoms[f].what;
        if (at == 0)
            *flags |= freedoms[f].flags;
    }
    return what;
}

/* Linux says that the kernel's half is present, whether it is or not (arch/x86/mm/fault.c). */
static u32 page_fault_error(const struct outcome *o)
{
    return o->vector == EXC_PF && o->cr2 >= TASK_SIZE ? o->error | PF_P : o->error;
}

static bool is_trap(u8 vector)
{
    return vector == EXC_DB || vector == EXC_BP;
}

/*
 * Between two iterations of a repeated instruction a single-step trap pushes RF set on Intel's
 * processors (SDM vol. 3, 17.3.1.1), and clear on AMD's.
 */
static bool is_repeated(const ZydisDecoder *decoder, const struct test_case *c, unsigned n)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;

    return decode_at(decoder, c, n, &zi, ops) &&
           (zi.attributes &
            (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE));
}

/* Linux makes all null selectors 0 when it switches tasks. */
static u16 null_as_zero(u16 selector)
{
    return selector & ~3u ? selector : 0;
}

/* Some processors keep all bits that were loaded, others only an address's 48. */
static u64 x87_pointer(u64 value)
{
    return (u64)((s64)(value << 16) >> 16);
}

/* Whether instruction bytes were missing behind the code. */
static bool is_cut_off(const struct outcome *o)
{
    return o->vector == EXC_PF && (o->error & PF_I) && o->cr2 == CODE + CODE_SIZE;
}

/* Of user mode. */
static u64 last_address(const struct test_case *c)
{
    return (c->before.cs == USER_CS32 ? BIT(32) : BIT(47)) - 1;
}

bool compare(const ZydisDecoder *decoder, const struct test_case *c, const struct outcome *native,
             const struct outcome *doppel, struct report *r)
{
    const struct user_state *a = &native->after, *b = &doppel->after;
    static const char *const gprs[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                       "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    unsigned at = faulting(c, native);
    u64 free_flags;
    u32 free = freedoms_of(decoder, c, at, &free_flags);

    r->used = 0;
    if (native->lost || doppel->lost) {
        differ(r, "    %s\n",
               native->lost && doppel->lost ? "lost on both sides"
               : native->lost               ? "lost natively"
                                            : "lost under doppel");
        return false;
    }
    /* An opcode is found invalid, or the rest of its bytes not there: whichever comes first. */
    if ((native->vector == EXC_UD && is_cut_off(doppel)) ||
        (doppel->vector == EXC_UD && is_cut_off(native)))
        free |= FREE_FAULT;
    /* Not aligned, and beyond the stack segment. */
    if (native->vector == EXC_GP && doppel->vector == EXC_SS && !native->error && !doppel->error)
        free |= FREE_FAULT;
    /* An operand goes from an absent page over the end of all addresses. */
    if (native->vector == EXC_PF && native->cr2 < last_address(c) &&
        native->cr2 > last_address(c) - PAGE &&
        (doppel->vector == EXC_GP || doppel->vector == EXC_SS))
        free |= FREE_FAULT;
    /* An x87 exception is pending, or the operand not aligned, and it is beyond its segment. */
    if ((native->vector == EXC_MF || native->vector == EXC_AC) &&
        (doppel->vector == EXC_GP || doppel->vector == EXC_SS))
        free |= FREE_FAULT;
    if (native->vector == EXC_DB && is_repeated(decoder, c, at))
        free_flags |= EFLAGS_RF;
    /* A LOCK that is not allowed is found before the operand is read, or after. */
    if (doppel->vector == EXC_UD && memchr(c->code + c->starts[at], 0xf0, 4))
        free |= FREE_FAULT;
    if (!(free & FREE_FAULT) || is_trap(native->vector) || is_trap(doppel->vector)) {
        compare_value(r, "exception", native->vector, doppel->vector);
        compare_value(r, "error code", page_fault_error(native), page_fault_error(doppel));
        compare_value(r, "cr2", native->cr2, doppel->cr2);
    }
    for (unsigned n = 0; n < 16 && (!(free & FREE_GPRS) || is_trap(native->vector)); n++)
        compare_value(r, gprs[n], a->gpr[n], b->gpr[n]);
    compare_value(r, "rip", a->rip, b->rip);
    compare_value(r, "rflags", a->rflags & ~free_flags, b->rflags & ~free_flags);
    compare_value(r, "cs", a->cs, b->cs);
    compare_value(r, "ss", a->ss, b->ss);
    compare_value(r, "ds", null_as_zero(a->ds), null_as_zero(b->ds));
    compare_value(r, "es", null_as_zero(a->es), null_as_zero(b->es));
    compare_value(r, "fs", null_as_zero(a->fs), null_as_zero(b->fs));
    compare_value(r, "gs", null_as_zero(a->gs), null_as_zero(b->gs));
    compare_value(r, "fs base", a->fs_base, b->fs_base);
    compare_value(r, "gs base", a->gs_base, b->gs_base);
    compare_value(r, "fcw", a->fcw, b->fcw);
    if (!(free & FREE_X87_TOP) || is_trap(native->vector)) {
        compare_value(r, "fsw", a->fsw, b->fsw);
        compare_value(r, "ftw", a->ftw, b->ftw);
        for (unsigned n = 0; n < 8; n++)
            compare_bytes(r, "st", n, a->st[n], b->st[n], 10);
    }
    if (!(free & FREE_X87_POINTERS) || (a->fsw & FSW_ES)) {
        compare_value(r, "fop", a->fop, b->fop);
        compare_value(r, "fip", x87_pointer(a->fip), x87_pointer(b->fip));
        compare_value(r, "fdp", x87_pointer(a->fdp), x87_pointer(b->fdp));
    }
    compare_value(r, "mxcsr", a->mxcsr, b->mxcsr);
    compare_value(r, "pkru", a->pkru, b->pkru);
    for (unsigned n = 0; n < 8; n++)
        compare_bytes(r, "k", n, (const u8 *)&a->k[n], (const u8 *)&b->k[n], 8);
    for (unsigned n = 0; n < 32; n++)
        compare_bytes(r, "zmm", n, a->vec[n], b->vec[n],
                      (free & FREE_UPPER) && !is_trap(native->vector) ? 16 : 64);
    if (!(free & FREE_MEMORY) || is_trap(native->vector))
        compare_window(r, native->window, doppel->window);
    return r->used == 0;
}
