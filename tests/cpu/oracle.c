/*
 * Random instructions on the real processor and under doppel: everything must be the same.
 *
 *     oracle [options] NATIVE
 *
 *     --seed N      of the random numbers; "random" for one by the clock (default: ORACLE_SEED of the
 *                   environment, or else 1, so that a run of the tests doesn't fail by luck). Printed.
 *     --count N     cases of each mode (200000 for 64-bit, a quarter of it for 32-bit)
 *     --first N     begin with case N
 *     --mode 64|32  only this one
 *     --only NAME   only this mnemonic
 *     --bytes HEX   only this instruction
 *     --engine NAME as in doppel run (interp)
 *     --errors N    stop after this many differences (10)
 *     --coverage    count the cases of each mnemonic, and those that ended without a fault
 *     --verbose     all registers of differing cases
 *
 * NATIVE is the program that runs cases on the real processor (native.c). A case is made from the seed
 * and its own number, so `--seed S --first N --count 1 --mode M` shows it again.
 */
#define _GNU_SOURCE
#include "case.h"
#include "generate.h"
#include "guest.h"

#include "x86/regs.h"

#include <cpuid.h>
#include <errno.h>
#include <getopt.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NATIVE_SECONDS 10
#define FSW_ES 0x80u
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

struct options {
    u64 seed, first, count;
    unsigned mode, max_errors;
    const char *only, *engine, *native;
    u8 bytes[15];
    unsigned nbytes;
    bool coverage, verbose;
};

struct coverage {
    u32 cases, completed;
};

static struct options options = {.max_errors = 10, .engine = "interp"};
static struct shared *shared;
static int shared_fd;
static pid_t native_pid;
static struct guest *guest;
static struct generator *generator;
static struct host host;
static struct coverage coverage[ZYDIS_MNEMONIC_MAX_VALUE + 2];
static unsigned errors;
/* For the handler of a crash or a hang. */
static const struct test_case *current;
static u64 current_number;

/* --- Printing --- */

static void print_code(const struct test_case *c)
{
    ZydisFormatter formatter;

    ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
    for (unsigned n = 0; n < c->ncode; n++) {
        unsigned end = n + 1u < c->ncode ? c->starts[n + 1] : c->code_len;
        ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
        ZydisDecodedInstruction zi;
        char text[128] = "(invalid)";

        if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(generator_decoder(generator),
                                                c->code + c->starts[n], end - c->starts[n], &zi,
                                                ops)))
            ZydisFormatterFormatInstruction(&formatter, &zi, ops, zi.operand_count_visible, text,
                                            sizeof(text), CODE_PAGE + c->code_offset + c->starts[n],
                                            NULL);
        printf("    %#llx ", (unsigned long long)(CODE_PAGE + c->code_offset + c->starts[n]));
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

static void print_state(const char *name, const struct user_state *s)
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

/* Writes what differs, as text; false when nothing does. */
struct report {
    char text[4096];
    size_t used;
};

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

static ZydisMnemonic mnemonic_at(const struct test_case *c, unsigned n)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;

    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(generator_decoder(generator), c->code + c->starts[n],
                                             c->code_len - c->starts[n], &zi, ops)))
        return ZYDIS_MNEMONIC_INVALID;
    return zi.mnemonic;
}

/* What is free in a case: what any of its instructions leaves open. */
static u32 freedoms_of(const struct test_case *c, u64 *flags)
{
    u32 what = 0;

    *flags = 0;
    for (unsigned n = 0; n < c->ncode; n++) {
        ZydisMnemonic mnemonic = mnemonic_at(c, n);

        for (unsigned f = 0; f < ARRAY_SIZE(freedoms); f++) {
            if (!freedoms[f].mnemonic || freedoms[f].mnemonic == mnemonic) {
                what |= freedoms[f].what;
                *flags |= freedoms[f].flags;
            }
        }
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
static bool is_repeated(const struct test_case *c)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;

    return ZYAN_SUCCESS(ZydisDecoderDecodeFull(generator_decoder(generator), c->code, c->code_len,
                                               &zi, ops)) &&
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

/* Whether instruction bytes were missing behind the code page. */
static bool is_cut_off(const struct outcome *o)
{
    return o->vector == EXC_PF && (o->error & PF_I) && o->cr2 == CODE_PAGE + PAGE;
}

static bool compare(const struct test_case *c, const struct outcome *native,
                    const struct outcome *doppel, struct report *r)
{
    const struct user_state *a = &native->after, *b = &doppel->after;
    static const char *const gprs[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                       "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    u64 free_flags;
    u32 free = freedoms_of(c, &free_flags);

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
    /* An operand goes from an absent page into addresses that are not canonical. */
    if (native->vector == EXC_PF && native->cr2 < BIT(47) && native->cr2 > BIT(47) - PAGE &&
        (doppel->vector == EXC_GP || doppel->vector == EXC_SS))
        free |= FREE_FAULT;
    /* An x87 exception is pending, and the operand is beyond its segment. */
    if (native->vector == EXC_MF && (doppel->vector == EXC_GP || doppel->vector == EXC_SS))
        free |= FREE_FAULT;
    if (native->vector == EXC_DB && is_repeated(c))
        free_flags |= EFLAGS_RF;
    /* A LOCK that is not allowed is found before the operand is read, or after. */
    if (doppel->vector == EXC_UD && memchr(c->code + c->starts[0], 0xf0, 4))
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

/* --- The native side --- */

static int native_start(void)
{
    char fd[16];

    snprintf(fd, sizeof(fd), "%d", shared_fd);
    native_pid = fork();
    if (native_pid < 0)
        return -errno;
    if (native_pid == 0) {
        execl(options.native, options.native, fd, (char *)NULL);
        _exit(127);
    }
    return 0;
}

static void native_begin(u32 count)
{
    for (u32 n = 0; n < count; n++)
        shared->outcomes[n].lost = true;
    shared->count = count;
    __atomic_store_n(&shared->command, NATIVE_RUN, __ATOMIC_RELEASE);
    syscall(SYS_futex, &shared->command, FUTEX_WAKE, 1, NULL, NULL, 0);
}

/* Waits for the batch; false when the native side died or hung. */
static bool native_finish(void)
{
    time_t give_up = time(NULL) + NATIVE_SECONDS;

    while (__atomic_load_n(&shared->command, __ATOMIC_ACQUIRE) != NATIVE_IDLE) {
        struct timespec wait = {.tv_nsec = 100000000};

        syscall(SYS_futex, &shared->command, FUTEX_WAIT, NATIVE_RUN, &wait, NULL, 0);
        if (waitpid(native_pid, NULL, WNOHANG) == native_pid)
            return false;
        if (time(NULL) > give_up) {
            kill(native_pid, SIGKILL);
            waitpid(native_pid, NULL, 0);
            return false;
        }
    }
    return true;
}

/* Brings back a native side that a case ended: that case stays lost, the others are run. */
static void native_recover(u32 count)
{
    while (!native_finish()) {
        u32 lost = shared->running, left = count - lost - 1;
        struct test_case *rest = calloc(BATCH, sizeof(*rest));
        struct outcome *done = calloc(BATCH, sizeof(*done));

        shared->command = NATIVE_IDLE;
        if (!rest || !done || native_start() < 0)
            abort();
        /* The cases behind it move to the front, are run, and go back. */
        memcpy(rest, shared->cases, BATCH * sizeof(*rest));
        memcpy(done, shared->outcomes, BATCH * sizeof(*done));
        memmove(shared->cases, shared->cases + lost + 1, left * sizeof(*rest));
        native_begin(left);
        native_recover(left);
        memcpy(done + lost + 1, shared->outcomes, left * sizeof(*done));
        memcpy(shared->cases, rest, BATCH * sizeof(*rest));
        memcpy(shared->outcomes, done, BATCH * sizeof(*done));
        free(rest);
        free(done);
        return;
    }
}

/* --- Running --- */

static void on_crash(int sig)
{
    signal(sig, SIG_DFL);
    printf("not ok %s: %s at case %llu\n", "oracle", strsignal(sig),
           (unsigned long long)current_number);
    if (current) {
        print_code(current);
        print_state("before", &current->before);
    }
    fflush(stdout);
    raise(sig);
}

static void doppel_run(const struct test_case *c, struct outcome *out)
{
    current = c;
    alarm(20);
    guest_run(guest, c, shared->images[c->image], out);
    alarm(0);
    current = NULL;
}

/* Whether the case shortened to n instructions still differs. */
static bool differs_when_cut(const struct test_case *c, unsigned n, struct test_case *cut,
                             struct outcome *native, struct outcome *doppel, struct report *report)
{
    struct test_case kept = shared->cases[0];
    struct outcome kept_outcome = shared->outcomes[0];

    *cut = *c;
    cut->code_len = n < c->ncode ? c->starts[n] : c->code_len;
    cut->ncode = (u8)n;
    shared->cases[0] = *cut;
    native_begin(1);
    native_recover(1);
    *native = shared->outcomes[0];
    shared->cases[0] = kept;
    shared->outcomes[0] = kept_outcome;
    doppel_run(cut, doppel);
    return !compare(cut, native, doppel, report);
}

static void report_difference(const struct test_case *c, u64 number, unsigned mode)
{
    static struct outcome native, doppel;
    struct test_case cut = *c;
    struct report report;
    unsigned n = 1;

    while (n <= c->ncode && !differs_when_cut(c, n, &cut, &native, &doppel, &report))
        n++;
    printf("%u-bit case %llu differs:%s\n", mode, (unsigned long long)number,
           n > c->ncode ? " not when it is run again" : "");
    print_code(&cut);
    if (options.verbose) {
        print_state("before", &cut.before);
        print_state("native", &native.after);
        print_state("doppel", &doppel.after);
    }
    printf("  exception %u, error %#x, cr2 %#llx; differences:\n%s", native.vector, native.error,
           (unsigned long long)native.cr2, report.text);
    for (unsigned i = 0; i < cut.npokes; i++)
        printf("    poke %#x = %llx\n", cut.pokes[i].offset + WINDOW,
               (unsigned long long)cut.pokes[i].value);
    fflush(stdout);
}

static void count_coverage(const struct test_case *c, const struct outcome *o)
{
    ZydisMnemonic mnemonic = mnemonic_at(c, 0);

    coverage[mnemonic].cases++;
    coverage[mnemonic].completed += o->vector == EXC_DB || o->vector == EXC_BP;
}

static struct random random_for(u64 number, unsigned mode, u64 salt)
{
    struct random r = {options.seed ^ number * 0xd1342543de82ef95 ^ (u64)mode << 56 ^ salt << 48};

    random_next(&r);
    return r;
}

static void make_batch(u64 batch, unsigned mode)
{
    struct random r = random_for(batch, mode, 1);

    generate_images(&r, &host, shared->images);
    for (u32 n = 0; n < BATCH; n++) {
        r = random_for(batch * BATCH + n, mode, 2);
        if (options.nbytes)
            generate_case_of(generator, &r, options.bytes, options.nbytes, &shared->cases[n]);
        else
            generate_case(generator, &r, &shared->cases[n]);
    }
}

/* Runs the cases of one batch that are wanted. */
static void run_batch(u64 batch, unsigned mode, u64 first, u64 end)
{
    static struct outcome doppel[BATCH];
    u32 from = batch * BATCH < first ? (u32)(first - batch * BATCH) : 0;
    u32 to = (u32)MIN((u64)BATCH, end - batch * BATCH);

    make_batch(batch, mode);
    memmove(shared->cases, shared->cases + from, (to - from) * sizeof(shared->cases[0]));
    native_begin(to - from);
    for (u32 n = 0; n < to - from; n++) {
        current_number = batch * BATCH + from + n;
        doppel_run(&shared->cases[n], &doppel[n]);
    }
    native_recover(to - from);
    for (u32 n = 0; n < to - from && errors < options.max_errors; n++) {
        struct report report;

        count_coverage(&shared->cases[n], &shared->outcomes[n]);
        if (!compare(&shared->cases[n], &shared->outcomes[n], &doppel[n], &report)) {
            errors++;
            report_difference(&shared->cases[n], batch * BATCH + from + n, mode);
        }
    }
}

static void run_mode(unsigned mode)
{
    u64 count = options.count ? options.count : 200000;
    u64 end;
    unsigned mnemonics, forms;

    if (!options.count && mode == 32)
        count /= 4;
    end = options.first + count;
    generator = generator_create(mode == 64, options.only, &host);
    if (!generator) {
        printf("not ok %u-bit: no instruction is called %s\n", mode, options.only);
        errors++;
        return;
    }
    generator_size(generator, &mnemonics, &forms);
    errors = 0;
    for (u64 batch = options.first / BATCH; batch * BATCH < end && errors < options.max_errors;
         batch++)
        run_batch(batch, mode, options.first, end);
    printf("# %u-bit: %u mnemonics in %u forms, seed %llu\n", mode, mnemonics, forms,
           (unsigned long long)options.seed);
    if (errors)
        printf("not ok %u-bit user instructions do what the real processor does: %u of %llu cases "
               "differ\n",
               mode, errors, (unsigned long long)count);
    else
        printf("ok %u-bit user instructions do what the real processor does: %llu cases\n", mode,
               (unsigned long long)count);
    generator_destroy(generator);
}

static void print_coverage(void)
{
    for (unsigned n = 0; n <= ZYDIS_MNEMONIC_MAX_VALUE; n++) {
        if (coverage[n].cases)
            printf("# %-20s %6u cases, %6u without a fault\n",
                   ZydisMnemonicGetString((ZydisMnemonic)n), coverage[n].cases,
                   coverage[n].completed);
    }
}

/* --- Set-up --- */

static unsigned parse_bytes(const char *hex)
{
    unsigned n = 0, value;

    while (n < sizeof(options.bytes) && sscanf(hex + 2 * n, "%2x", &value) == 1)
        options.bytes[n++] = (u8)value;
    return n;
}

static u64 parse_seed(const char *text)
{
    struct timespec now;

    if (strcmp(text, "random"))
        return strtoull(text, NULL, 0);
    clock_gettime(CLOCK_REALTIME, &now);
    return (u64)now.tv_sec * 1000 + (u64)now.tv_nsec / 1000000;
}

static int parse_options(int argc, char **argv)
{
    static const struct option known[] = {
        {"seed", required_argument, NULL, 's'},
        {"count", required_argument, NULL, 'c'},
        {"first", required_argument, NULL, 'f'},
        {"mode", required_argument, NULL, 'm'},
        {"only", required_argument, NULL, 'o'},
        {"bytes", required_argument, NULL, 'b'},
        {"engine", required_argument, NULL, 'e'},
        {"errors", required_argument, NULL, 'n'},
        {"coverage", no_argument, NULL, 'C'},
        {"verbose", no_argument, NULL, 'v'},
        {NULL, 0, NULL, 0},
    };
    const char *seed = getenv("ORACLE_SEED");
    int option;

    options.seed = seed ? parse_seed(seed) : 1;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1) {
        switch (option) {
        case 's':
            options.seed = parse_seed(optarg);
            break;
        case 'c':
            options.count = strtoull(optarg, NULL, 0);
            break;
        case 'f':
            options.first = strtoull(optarg, NULL, 0);
            break;
        case 'm':
            options.mode = (unsigned)atoi(optarg);
            break;
        case 'o':
            options.only = optarg;
            break;
        case 'b':
            options.nbytes = parse_bytes(optarg);
            break;
        case 'e':
            options.engine = optarg;
            break;
        case 'n':
            options.max_errors = (unsigned)atoi(optarg);
            break;
        case 'C':
            options.coverage = true;
            break;
        case 'v':
            options.verbose = true;
            break;
        default:
            return -1;
        }
    }
    options.native = argv[optind];
    return optind + 1 == argc ? 0 : -1;
}

static u32 host_mxcsr_mask(void)
{
    _Alignas(16) u8 area[512] = {0};
    u32 mask;

    __asm__ volatile("fxsave %0" : "=m"(area));
    memcpy(&mask, area + 28, 4);
    return mask ? mask : 0xffbf;
}

static u64 host_xcr0(void)
{
    u32 a, b, c, d;

    __cpuid(1, a, b, c, d);
    if (!(c & bit_OSXSAVE))
        return XCR0_X87 | XCR0_SSE;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (u64)d << 32 | a;
}

int main(int argc, char **argv)
{
    static const int crashes[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
    struct error err;
    struct random r;

    if (parse_options(argc, argv) < 0) {
        fprintf(stderr, "usage: oracle [options] NATIVE (see the head of oracle.c)\n");
        return 2;
    }
    printf("# seed %llu\n", (unsigned long long)options.seed);
    for (unsigned n = 0; n < ARRAY_SIZE(crashes); n++)
        signal(crashes[n], on_crash);
    shared_fd = memfd_create("oracle", 0);
    if (shared_fd < 0 || ftruncate(shared_fd, sizeof(*shared)) < 0) {
        perror("oracle: the shared memory");
        return 1;
    }
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
    if (shared == MAP_FAILED) {
        perror("oracle: the shared memory");
        return 1;
    }
    host = (struct host){host_mxcsr_mask(), host_xcr0()};
    r = random_for(0, 0, 3);
    generate_read_only(&r, shared->read_only);
    guest = guest_create(options.engine, &host, shared->read_only, &err);
    if (!guest) {
        printf("not ok oracle: %s\n", err.text);
        return 1;
    }
    if (native_start() < 0) {
        perror("oracle: starting the native side");
        return 1;
    }
    if (options.mode != 32)
        run_mode(64);
    if (options.mode != 64)
        run_mode(32);
    if (options.coverage)
        print_coverage();
    kill(native_pid, SIGKILL);
    waitpid(native_pid, NULL, 0);
    guest_destroy(guest);
    return errors != 0;
}
