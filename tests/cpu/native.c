/*
 * The real processor's side of the oracle test.
 *
 *     native FD
 *
 * FD is the memory of struct shared. Each case is entered by returning from a signal handler with the
 * case's whole state in the signal frame, and ends with the exception that brings the handler back:
 * so a batch runs inside one handler, a case costs one exception and one sigreturn, and the kernel
 * loads and saves all registers by the processor's own XRSTOR and XSAVE.
 *
 * What the frame does not carry is set by hand: DS, ES, FS, GS with their bases, and the flags ID and
 * NT, which sigreturn takes from the flags it was called with. Nothing here may use thread-local
 * storage between a case and the restoring of FS.
 */
#define _GNU_SOURCE
#include "case.h"

#include <cpuid.h>
#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define EFLAGS_NT BIT(14)
#define EFLAGS_AC BIT(18)
#define EFLAGS_ID BIT(21)

#define UC_SIGCONTEXT_SS 2
#define UC_STRICT_RESTORE_SS 4

enum {
    XCOMP_AVX = 2,
    XCOMP_OPMASK = 5,
    XCOMP_ZMM_HI256 = 6,
    XCOMP_HI16_ZMM = 7,
    XCOMP_PKRU = 9,
    XCOMPS = 10,
};
#define XSAVE_HEADER 512
#define SW_RESERVED 464 /* in the legacy area: the kernel's description of the frame */
#define XSAVE_MAX 8192

static struct shared *shared;
static u8 *code_alias; /* the code pages, writable */
static u32 code_used, code_used_len;
static u32 xcomp_offset[XCOMPS];

static bool active;
static u32 next;
static u64 home_fs;
static greg_t home_gregs[NGREG];
static u8 home_xsave[XSAVE_MAX];
static size_t home_xsave_size;

static const u8 greg_of[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};

struct segments {
    u16 ds, es, fs, gs;
    u64 fs_base, gs_base;
};

static void die(const char *what)
{
    fprintf(stderr, "native: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static u8 *window_page(unsigned n)
{
    return (u8 *)(uintptr_t)(WINDOW + writable_pages[n] * PAGE);
}

/* --- The signal frame's XSAVE area --- */

static u16 get16(const u8 *p)
{
    u16 v;

    memcpy(&v, p, 2);
    return v;
}
static u32 get32(const u8 *p)
{
    u32 v;

    memcpy(&v, p, 4);
    return v;
}
static u64 get64(const u8 *p)
{
    u64 v;

    memcpy(&v, p, 8);
    return v;
}

static void load_xsave(u8 *x, const struct user_state *s)
{
    u64 features = get64(x + SW_RESERVED + 8);

    memcpy(x + 0, &s->fcw, 2);
    memcpy(x + 2, &s->fsw, 2);
    x[4] = s->ftw;
    memcpy(x + 6, &s->fop, 2);
    memcpy(x + 8, &s->fip, 8);
    memcpy(x + 16, &s->fdp, 8);
    memcpy(x + 24, &s->mxcsr, 4);
    for (unsigned n = 0; n < 8; n++)
        memcpy(x + 32 + 16 * n, s->st[n], 16);
    for (unsigned n = 0; n < 16; n++)
        memcpy(x + 160 + 16 * n, s->vec[n], 16);
    memset(x + XSAVE_HEADER, 0, 64);
    memcpy(x + XSAVE_HEADER, &features, 8);
    if (features & BIT(XCOMP_AVX)) {
        for (unsigned n = 0; n < 16; n++)
            memcpy(x + xcomp_offset[XCOMP_AVX] + 16 * n, s->vec[n] + 16, 16);
    }
    if (features & BIT(XCOMP_OPMASK)) {
        memcpy(x + xcomp_offset[XCOMP_OPMASK], s->k, 64);
        for (unsigned n = 0; n < 16; n++)
            memcpy(x + xcomp_offset[XCOMP_ZMM_HI256] + 32 * n, s->vec[n] + 32, 32);
        memcpy(x + xcomp_offset[XCOMP_HI16_ZMM], s->vec[16], 16 * 64);
    }
    if (features & BIT(XCOMP_PKRU))
        memcpy(x + xcomp_offset[XCOMP_PKRU], &s->pkru, 4);
}

static void save_xsave(const u8 *x, struct user_state *s)
{
    u64 present = get64(x + XSAVE_HEADER);

    s->fcw = 0x37f;
    s->mxcsr = get32(x + 24);
    if (present & BIT(0)) {
        s->fcw = get16(x);
        s->fsw = get16(x + 2);
        s->ftw = x[4];
        s->fop = get16(x + 6);
        s->fip = get64(x + 8);
        s->fdp = get64(x + 16);
        for (unsigned n = 0; n < 8; n++)
            memcpy(s->st[n], x + 32 + 16 * n, 10);
    }
    if (present & BIT(1)) {
        for (unsigned n = 0; n < 16; n++)
            memcpy(s->vec[n], x + 160 + 16 * n, 16);
    }
    if (present & BIT(XCOMP_AVX)) {
        for (unsigned n = 0; n < 16; n++)
            memcpy(s->vec[n] + 16, x + xcomp_offset[XCOMP_AVX] + 16 * n, 16);
    }
    if (present & BIT(XCOMP_OPMASK))
        memcpy(s->k, x + xcomp_offset[XCOMP_OPMASK], 64);
    if (present & BIT(XCOMP_ZMM_HI256)) {
        for (unsigned n = 0; n < 16; n++)
            memcpy(s->vec[n] + 32, x + xcomp_offset[XCOMP_ZMM_HI256] + 32 * n, 32);
    }
    if (present & BIT(XCOMP_HI16_ZMM))
        memcpy(s->vec[16], x + xcomp_offset[XCOMP_HI16_ZMM], 16 * 64);
    if (present & BIT(XCOMP_PKRU))
        memcpy(&s->pkru, x + xcomp_offset[XCOMP_PKRU], 4);
}

/* --- One case --- */

static void set_code(const struct test_case *c)
{
    memset(code_alias + code_used, INT3, code_used_len);
    code_used = c->code_offset;
    code_used_len = MIN(CODE_SIZE - c->code_offset, c->code_len);
    memcpy(code_alias + code_used, c->code, code_used_len);
}

/* Returning from the handler enters the case, but for what `segments` has still to set. */
static void load_case(ucontext_t *uc, const struct test_case *c)
{
    const struct user_state *s = &c->before;
    greg_t *g = uc->uc_mcontext.gregs;

    set_code(c);
    for (unsigned n = 0; n < WRITABLE_PAGES; n++)
        memcpy(window_page(n), shared->images[c->image] + n * PAGE, PAGE);
    for (unsigned n = 0; n < c->npokes; n++)
        memcpy(window_page(c->pokes[n].offset / PAGE) + c->pokes[n].offset % PAGE,
               &c->pokes[n].value, 8);

    for (unsigned n = 0; n < 16; n++)
        g[greg_of[n]] = (greg_t)s->gpr[n];
    g[REG_RIP] = (greg_t)s->rip;
    g[REG_EFL] = (greg_t)s->rflags;
    g[REG_CSGSFS] = (greg_t)((u64)s->ss << 48 | s->cs);
    g[REG_CR2] = 0;
    uc->uc_flags |= UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS;
    load_xsave((u8 *)uc->uc_mcontext.fpregs, s);
}

static void save_case(const ucontext_t *uc, const struct segments *seg, struct outcome *o)
{
    const greg_t *g = uc->uc_mcontext.gregs;
    struct user_state *s = &o->after;

    memset(s, 0, sizeof(*s));
    for (unsigned n = 0; n < 16; n++)
        s->gpr[n] = (u64)g[greg_of[n]];
    s->rip = (u64)g[REG_RIP];
    s->rflags = (u64)g[REG_EFL];
    s->cs = (u16)g[REG_CSGSFS];
    s->ss = (u16)((u64)g[REG_CSGSFS] >> 48);
    s->ds = seg->ds;
    s->es = seg->es;
    s->fs = seg->fs;
    s->gs = seg->gs;
    s->fs_base = seg->fs_base;
    s->gs_base = seg->gs_base;
    save_xsave((const u8 *)uc->uc_mcontext.fpregs, s);
    o->vector = (u8)g[REG_TRAPNO];
    o->error = (u32)g[REG_ERR];
    o->cr2 = o->vector == 14 ? (u64)g[REG_CR2] : 0;
    o->lost = false;
    for (unsigned n = 0; n < WRITABLE_PAGES; n++)
        memcpy(o->window + n * PAGE, window_page(n), PAGE);
}

static void save_home(const ucontext_t *uc)
{
    const u8 *x = (const u8 *)uc->uc_mcontext.fpregs;

    home_xsave_size = get32(x + SW_RESERVED + 16);
    if (home_xsave_size > XSAVE_MAX)
        _exit(1);
    memcpy(home_gregs, uc->uc_mcontext.gregs, sizeof(home_gregs));
    memcpy(home_xsave, x, home_xsave_size);
}

static void go_home(ucontext_t *uc)
{
    memcpy(uc->uc_mcontext.gregs, home_gregs, sizeof(home_gregs));
    memcpy(uc->uc_mcontext.fpregs, home_xsave, home_xsave_size);
}

static void on_exception(int sig, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    struct segments seg;

    /* The kernel leaves AC as the case had it. */
    __asm__ volatile("pushfq; andq %0, (%%rsp); popfq" ::"r"(~EFLAGS_AC) : "memory", "cc");
    __asm__ volatile("mov %%ds, %0; mov %%es, %1; mov %%fs, %2; mov %%gs, %3"
                     : "=m"(seg.ds), "=m"(seg.es), "=m"(seg.fs), "=m"(seg.gs));
    seg.fs_base = _readfsbase_u64();
    seg.gs_base = _readgsbase_u64();
    __asm__ volatile("mov %0, %%fs; mov %0, %%gs; mov %1, %%ds; mov %1, %%es"
                     :
                     : "r"(0), "r"(USER_DS));
    _writefsbase_u64(home_fs);

    if (info->si_code <= 0)
        _exit(1);
    if (!active) {
        save_home(uc);
        active = true;
    } else {
        save_case(uc, &seg, &shared->outcomes[next++]);
    }
    if (next < shared->count) {
        const struct test_case *c = &shared->cases[next];

        shared->running = next;
        load_case(uc, c);
        _writefsbase_u64(c->before.fs_base);
        _writegsbase_u64(c->before.gs_base);
        __asm__ volatile("pushfq; andq %0, (%%rsp); orq %1, (%%rsp); popfq"
                         :
                         : "r"(~(EFLAGS_NT | EFLAGS_ID)),
                           "r"(c->before.rflags & (EFLAGS_NT | EFLAGS_ID))
                         : "memory", "cc");
    } else {
        active = false;
        go_home(uc);
    }
}

/* --- Set-up --- */

static void map_code(void)
{
    int fd = memfd_create("code", 0);

    if (fd < 0 || ftruncate(fd, CODE_SIZE) < 0)
        die("the code pages");
    code_alias = mmap(NULL, CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (code_alias == MAP_FAILED ||
        mmap((void *)(uintptr_t)CODE, CODE_SIZE, PROT_READ | PROT_EXEC,
             MAP_SHARED | MAP_POPULATE | MAP_FIXED_NOREPLACE, fd, 0) == MAP_FAILED)
        die("the code pages");
    memset(code_alias, INT3, CODE_SIZE);
    close(fd);
}

static void map_window_page(unsigned n)
{
    u8 *p = (u8 *)(uintptr_t)(WINDOW + n * PAGE);

    if (mmap(p, PAGE, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
        die("the window");
    if (n != WINDOW_READ_ONLY)
        return;
    memcpy(p, shared->read_only, PAGE);
    if (mprotect(p, PAGE, PROT_READ) < 0)
        die("the window");
}

static void install_handler(void)
{
    static const int signals[] = {SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
    struct sigaction action = {.sa_sigaction = on_exception,
                               .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    stack_t stack = {.ss_size = 1 << 18};

    stack.ss_sp = mmap(NULL, stack.ss_size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (stack.ss_sp == MAP_FAILED || sigaltstack(&stack, NULL) < 0)
        die("the signal stack");
    for (unsigned n = 0; n < ARRAY_SIZE(signals); n++) {
        if (sigaction(signals[n], &action, NULL) < 0)
            die("a signal handler");
    }
}

static void find_components(void)
{
    u32 a, b, c, d;

    for (unsigned n = XCOMP_AVX; n < XCOMPS; n++) {
        __cpuid_count(0xd, n, a, b, c, d);
        xcomp_offset[n] = b;
    }
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                  atoi(argv[1]), 0);
    if (shared == MAP_FAILED)
        die("the shared memory");
    home_fs = _readfsbase_u64();
    find_components();
    map_code();
    for (unsigned n = 0; n < WINDOW_PAGES; n++) {
        if (n != 3 && n != 5)
            map_window_page(n);
    }
    install_handler();

    for (;;) {
        while (__atomic_load_n(&shared->command, __ATOMIC_ACQUIRE) != NATIVE_RUN)
            syscall(SYS_futex, &shared->command, FUTEX_WAIT, NATIVE_IDLE, NULL, NULL, 0);
        next = 0;
        __asm__ volatile("int3" ::: "memory");
        __atomic_store_n(&shared->command, NATIVE_IDLE, __ATOMIC_RELEASE);
        syscall(SYS_futex, &shared->command, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
}
