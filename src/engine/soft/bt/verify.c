/*
 * --engine bt,verify: each translated block is run beside the interpreter, and they must agree.
 *
 * The interpreter goes first, an instruction at a time, through the block that is to be entered. Every
 * store is noted in a journal, and afterwards undone; it stops before an access to MMIO, which can't be
 * undone, and where it faults. Then the translated block runs from the same state, alone: no exit is
 * linked and the jump cache is empty. Wherever it leaves, the interpreter must have been there, with the
 * same registers, flags and vectors, and the same memory.
 *
 * A and D bits of page tables that the interpreter's walk set stay set: its TLB entries rely on them.
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/block.h"
#include "engine/soft/flags.h"
#include "engine/soft/host_exec.h"
#include "engine/soft/mmu.h"
#include "engine/soft/run.h"
#include "host/log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define FSW_TOP 0x3800
#define MAX_STEPS 65
#define MAX_WRITES 512
#define WRITE_MAX 64
#define MXCSR_FLAGS 0x3fu

struct write {
    u8 *host;
    u32 size;
    u8 old[WRITE_MAX], new[WRITE_MAX]; /* before it, and after all writes */
};

struct step {
    u64 gpr[18];
    u32 aflags;
    u64 rflags, gs_base, kernel_gs_base;
    u32 mxcsr;
    u8 vec[16][32];
    u8 fpr[8][16];
    u16 fcw, fsw, ftw, fop, fcs, fds;
    u64 fip, fdp;
    unsigned nwrites; /* so far */
};

struct bt_journal {
    struct write writes[MAX_WRITES];
    unsigned nwrites;
    bool stop; /* the interpreter must not go on */
    struct step steps[MAX_STEPS + 1];
    unsigned nsteps;
};

void bt_journal_write(struct soft_vcpu *v, void *host, size_t n)
{
    struct bt_journal *j = v->journal;
    struct write *w = &j->writes[j->nwrites];

    if (j->nwrites == MAX_WRITES || n > WRITE_MAX)
        bt_journal_stop(v);
    w->host = host;
    w->size = (u32)n;
    memcpy(w->old, host, n);
    j->nwrites++;
}

void bt_journal_stop(struct soft_vcpu *v)
{
    v->journal->stop = true;
    longjmp(v->unwind, 1);
}

static void record_x87(const struct cpu *cpu, struct step *s)
{
    memcpy(s->fpr, cpu->fpr, sizeof(s->fpr));
    s->fcw = cpu->fcw;
    s->fsw = cpu->fsw;
    s->ftw = cpu->ftw;
    s->fop = cpu->fop;
    s->fcs = cpu->fcs;
    s->fds = cpu->fds;
    s->fip = cpu->fip;
    s->fdp = cpu->fdp;
}

static void undo_x87(struct cpu *cpu, const struct step *s)
{
    memcpy(cpu->fpr, s->fpr, sizeof(s->fpr));
    cpu->fcw = s->fcw;
    cpu->fsw = s->fsw;
    cpu->ftw = s->ftw;
    cpu->fop = s->fop;
    cpu->fcs = s->fcs;
    cpu->fds = s->fds;
    cpu->fip = s->fip;
    cpu->fdp = s->fdp;
}

static bool same_x87(const struct cpu *cpu, const struct step *s, bool faulted)
{
    u16 kept = faulted ? (u16)~FSW_TOP : UINT16_MAX;

    return memcmp(s->fpr, cpu->fpr, sizeof(s->fpr)) == 0 && s->fcw == cpu->fcw &&
           !((s->fsw ^ cpu->fsw) & kept) && (faulted || s->ftw == cpu->ftw) && s->fop == cpu->fop &&
           s->fcs == cpu->fcs && s->fds == cpu->fds && s->fip == cpu->fip && s->fdp == cpu->fdp;
}

static void record(struct soft_vcpu *v, struct step *s)
{
    soft_fpu_sync(v);
    record_x87(&v->cpu, s);
    memcpy(s->gpr, v->cpu.gpr, sizeof(s->gpr));
    s->aflags = v->aflags;
    s->rflags = v->cpu.rflags;
    s->gs_base = v->cpu.seg[SEG_GS].base;
    s->kernel_gs_base = v->cpu.msr.kernel_gs_base;
    s->mxcsr = v->cpu.mxcsr;
    for (unsigned n = 0; n < 16; n++)
        memcpy(s->vec[n], v->cpu.vec[n], 32);
    s->nwrites = v->journal->nwrites;
}

/* The interpreter's way through the block. */
static void interpret(struct soft_vcpu *v, const struct bt_block *b)
{
    struct bt_journal *j = v->journal;
    jmp_buf unwind;
    struct tlb *tlb = v->tlb;
    u64 icount = v->icount, first = v->cpu.gpr[GPR_RIP];

    memcpy(&unwind, &v->unwind, sizeof(unwind));
    j->nwrites = j->nsteps = 0;
    j->stop = false;
    record(v, &j->steps[0]);
    v->journaling = true;
    v->tlb = &v->tlb_none;
    if (!_setjmp(v->unwind)) {
        while (j->nsteps < b->count) {
            u64 ip = v->cpu.gpr[GPR_RIP];

            if (ip - first >= b->bytes || (j->nsteps && ip <= j->steps[j->nsteps - 1].gpr[GPR_RIP]))
                break;
            v->mode |= MODE_SINGLE;
            soft_run_block(v, block_cache_find(v));
            v->mode &= ~MODE_SINGLE;
            if (v->tlb != &v->tlb_none) /* the mode was changed */
                break;
            record(v, &j->steps[++j->nsteps]);
        }
    }
    v->mode &= ~MODE_SINGLE;
    v->tlb = tlb;
    v->journaling = false;
    v->icount = icount;
    v->cur = &insn_none;
    memcpy(&v->unwind, &unwind, sizeof(unwind));
    for (unsigned n = 0; n < j->nwrites; n++)
        memcpy(j->writes[n].new, j->writes[n].host, j->writes[n].size);
}

/* The value that byte `at`, which some write covers, has after the first n writes. */
static u8 expected(const struct bt_journal *j, unsigned n, const u8 *at)
{
    u8 last = 0;

    for (unsigned k = 0; k < j->nwrites; k++) {
        const struct write *w = &j->writes[k];

        if (at < w->host || at >= w->host + w->size)
            continue;
        if (k >= n)
            return w->old[at - w->host];
        last = w->new[at - w->host]; /* what all writes made of it */
    }
    return last;
}

static void print_insn(struct soft_vcpu *v, const struct bt_block *b, unsigned n)
{
    char text[64] = "";
    const struct memory_slot *slot = memory_find(v->engine->config.memory, b->gpa);
    u64 ip = v->journal->steps[n].gpr[GPR_RIP];
    const u8 *bytes =
        slot->host + ((b->gpa & ~(GUEST_PAGE_SIZE - 1)) - slot->gpa) + (ip & (GUEST_PAGE_SIZE - 1));

    for (unsigned k = 0; k < 15; k++)
        snprintf(text + 3 * k, sizeof(text) - 3 * k, "%02x ", bytes[k]);
    fprintf(stderr, "  %016" PRIx64 "  %s\n", ip, text);
}

/*
 * Whether a store's memory is as it should be after the first n writes. What was stored may be an entry of
 * a page table, in which the interpreter's walk set A or D.
 */
static bool store_differs(const struct bt_journal *j, const struct write *w, unsigned n)
{
    for (unsigned k = 0; k < w->size; k++) {
        u8 wrong = w->host[k] ^ expected(j, n, w->host + k);
        bool entry = ((uintptr_t)(w->host + k) & 3) == 0;

        if (wrong & ~(entry ? PTE_A | PTE_D : 0))
            return true;
    }
    return false;
}

/*
 * faulted: the host raised an exception, and so has done what is the interpreter's next step: it set MXCSR's flag for that,
 * and went to the MMX state if a conversion is from an MMX register (SDM vol. 2A, CVTPI2PS).
 */
static bool differs(struct soft_vcpu *v, const struct step *s, bool faulted, const char **what,
                    char *buf, size_t n)
{
    static const char *const names[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                        "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

    *what = buf;
    for (unsigned r = 0; r < 16; r++)
        if (s->gpr[r] != v->cpu.gpr[r]) {
            snprintf(buf, n, "%s: interpreter %016" PRIx64 ", translation %016" PRIx64, names[r],
                     s->gpr[r], v->cpu.gpr[r]);
            return true;
        }
    if (s->aflags != v->aflags) {
        snprintf(buf, n, "flags: interpreter %04x, translation %04x (as LAHF and SETO give them)",
                 s->aflags, v->aflags);
        return true;
    }
    if (s->rflags != v->cpu.rflags) {
        snprintf(buf, n, "rflags: interpreter %" PRIx64 ", translation %" PRIx64, s->rflags,
                 v->cpu.rflags);
        return true;
    }
    if (s->gs_base != v->cpu.seg[SEG_GS].base || s->kernel_gs_base != v->cpu.msr.kernel_gs_base ||
        v->seg_base[SEG_GS] != v->cpu.seg[SEG_GS].base) {
        snprintf(buf, n,
                 "GS: interpreter %" PRIx64 " (kernel's %" PRIx64 "), translation %" PRIx64
                 " (%" PRIx64 "), in use %" PRIx64,
                 s->gs_base, s->kernel_gs_base, v->cpu.seg[SEG_GS].base, v->cpu.msr.kernel_gs_base,
                 v->seg_base[SEG_GS]);
        return true;
    }
    if ((s->mxcsr ^ v->cpu.mxcsr) & ~(faulted ? MXCSR_FLAGS : 0)) {
        snprintf(buf, n, "mxcsr: interpreter %x, translation %x", s->mxcsr, v->cpu.mxcsr);
        return true;
    }
    for (unsigned r = 0; r < 16; r++)
        if (memcmp(s->vec[r], v->cpu.vec[r], 32) != 0) {
            snprintf(buf, n, "vector register %u", r);
            return true;
        }
    if (!same_x87(&v->cpu, s, faulted)) {
        snprintf(buf, n,
                 "x87: status, tags, FIP, FDP, FOP: interpreter %04x %04x %" PRIx64 " %" PRIx64
                 " %03x, translation %04x %04x %" PRIx64 " %" PRIx64 " %03x",
                 s->fsw, s->ftw, s->fip, s->fdp, s->fop, v->cpu.fsw, v->cpu.ftw, v->cpu.fip,
                 v->cpu.fdp, v->cpu.fop);
        return true;
    }
    for (unsigned w = 0; w < s->nwrites; w++) {
        const struct write *write = &v->journal->writes[w];

        if (store_differs(v->journal, write, s->nwrites)) {
            snprintf(buf, n, "memory: a store of %u bytes", write->size);
            return true;
        }
    }
    return false;
}

static _Noreturn void report(struct soft_vcpu *v, const struct bt_block *b, unsigned n,
                             const char *what)
{
    const struct bt_journal *j = v->journal;

    fprintf(stderr, "doppel: bt,verify: the translation differs in %s\n", what);
    for (unsigned k = 0; k < n; k++)
        print_insn(v, b, k);
    for (unsigned r = 0; r < 16; r++)
        fprintf(stderr,
                "  r%-2u before %016" PRIx64 "  interpreter %016" PRIx64 "  translation %016" PRIx64
                "\n",
                r, j->steps[0].gpr[r], j->steps[n].gpr[r], v->cpu.gpr[r]);
    fprintf(stderr, "  flags before %04x interpreter %04x translation %04x\n", j->steps[0].aflags,
            j->steps[n].aflags, v->aflags);
    abort();
}

void bt_verify_begin(struct soft_vcpu *v, const struct bt_block *b)
{
    struct bt_journal *j = v->journal;

    soft_vectors_sync(v);
    soft_fpu_sync(v);
    fpu_refresh_tags(&v->cpu);
    interpret(v, b);
    soft_fpu_sync(v); /* the step that faulted may have made it live */
    /* Undo it all. */
    for (unsigned n = j->nwrites; n-- > 0;)
        memcpy(j->writes[n].host, j->writes[n].old, j->writes[n].size);
    memcpy(v->cpu.gpr, j->steps[0].gpr, sizeof(j->steps[0].gpr));
    v->aflags = j->steps[0].aflags;
    v->cpu.rflags = j->steps[0].rflags;
    v->cpu.seg[SEG_GS].base = v->seg_base[SEG_GS] = j->steps[0].gs_base;
    v->cpu.msr.kernel_gs_base = j->steps[0].kernel_gs_base;
    v->cpu.mxcsr = j->steps[0].mxcsr;
    undo_x87(&v->cpu, &j->steps[0]);
    for (unsigned n = 0; n < 16; n++)
        memcpy(v->cpu.vec[n], j->steps[0].vec[n], 32);
}

void bt_verify_end(struct soft_vcpu *v, const struct bt_block *b, bool faulted)
{
    const struct bt_journal *j = v->journal;
    char buf[192];
    const char *what = buf;
    int match = -1;

    soft_vectors_sync(v);
    soft_fpu_sync(v);
    /* A loop's first and last step have the same RIP. */
    for (unsigned n = 0; n <= j->nsteps; n++) {
        if (j->steps[n].gpr[GPR_RIP] != v->cpu.gpr[GPR_RIP])
            continue;
        if (!differs(v, &j->steps[n], faulted, &what, buf, sizeof(buf)))
            return;
        match = (int)n;
    }
    if (match >= 0)
        report(v, b, (unsigned)match, what);
    if (!j->stop && j->nsteps) {
        snprintf(buf, sizeof(buf), "rip: interpreter %016" PRIx64 ", translation %016" PRIx64,
                 j->steps[j->nsteps].gpr[GPR_RIP], v->cpu.gpr[GPR_RIP]);
        report(v, b, j->nsteps, buf);
    }
}

int bt_verify_create(struct soft_vcpu *v, struct error *err)
{
    v->journal = calloc(1, sizeof(*v->journal));
    return v->journal ? 0 : error_host(err, ENOMEM, "the journal of bt,verify");
}
