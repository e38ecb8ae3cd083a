/*
 * x87: where the state lives, the environment in memory, and the control instructions.
 *
 * While soft_vcpu.fpu_live the x87 and MMX registers, FCW, FSW and FTW of the guest are the host's
 * own, and the copies in struct cpu are stale. FRSTOR and FNSAVE move them; FNSAVE leaves the
 * host's unit initialised, as C code wants it. The instruction and data pointers would be the
 * host's, so handlers keep the guest's in struct cpu (host_exec.c), always current.
 *
 * An unmasked exception is pending until the next waiting instruction, which raises #MF. The thunks
 * leave that to the host; what is written here in C asks fpu_check_pending.
 *
 * CR0.NE = 0 asks for FERR# and IRQ 13 instead of #MF; no system for this processor's machine uses
 * that, and #MF is raised in either case.
 *
 * References: Intel SDM vol. 1, 8.1 (the layouts: figures 8-9 to 8-12); vol. 3, 2.5 (MP and TS).
 */
#include "engine/soft/host_exec.h"

#define FCW_INIT 0x037fu
#define FCW_MASKS 0x003fu
#define FSW_EXCEPTIONS 0x003fu
#define FSW_ES 0x0080u
#define FSW_TOP_SHIFT 11
#define FSW_BUSY 0x8000u
#define TAGS_EMPTY 0xffffu
#define FOP_MASK 0x07ffu

#define ENV_MAX 28u
#define REGISTERS 80u /* eight of 10 bytes */

/* FNSAVE and FRSTOR in 64-bit mode: the 32-bit protected-mode layout. */
struct fsave_image {
    u32 fcw, fsw, ftw, fip, fcs_fop, fdp, fds;
    u8 st[8][10];
};
_Static_assert(sizeof(struct fsave_image) == 108, "FNSAVE's image");

static unsigned top_of(u16 fsw)
{
    return fsw >> FSW_TOP_SHIFT & 7;
}

void fpu_load(struct soft_vcpu *v)
{
    struct fsave_image image;

    memset(&image, 0, sizeof(image));
    image.fcw = v->cpu.fcw;
    image.fsw = v->cpu.fsw;
    image.ftw = v->cpu.ftw;
    for (unsigned n = 0; n < 8; n++)
        memcpy(image.st[n], v->cpu.fpr[(n + top_of(v->cpu.fsw)) & 7], 10);
    __asm__ volatile("frstor %0" : : "m"(image));
    v->fpu_live = true;
}

void soft_fpu_sync(struct soft_vcpu *v)
{
    struct fsave_image image;

    if (!v->fpu_live)
        return;
    __asm__ volatile("fnsave %0" : "=m"(image));
    v->fpu_live = false;
    v->cpu.fcw = (u16)image.fcw;
    v->cpu.fsw = (u16)image.fsw;
    v->cpu.ftw = (u16)image.ftw;
    for (unsigned n = 0; n < 8; n++)
        memcpy(v->cpu.fpr[(n + top_of(v->cpu.fsw)) & 7], image.st[n], 10);
}

void soft_fpu_drop(struct soft_vcpu *v)
{
    if (v->fpu_live)
        __asm__ volatile("fninit");
    v->fpu_live = false;
}

void fpu_check_pending(struct soft_vcpu *v, const struct insn *i)
{
    u16 fsw = v->cpu.fsw;

    if (v->fpu_live)
        __asm__ volatile("fnstsw %0" : "=m"(fsw));
    if (fsw & FSW_ES) {
        v->cur = i;
        soft_raise(v, EXC_MF);
    }
}

/* ES and B follow from the exception flags and masks. */
static void update_summary(struct cpu *cpu)
{
    cpu->fsw &= (u16) ~(FSW_ES | FSW_BUSY);
    if (cpu->fsw & ~cpu->fcw & FSW_EXCEPTIONS)
        cpu->fsw |= FSW_ES | FSW_BUSY;
}

/* A waiting instruction in C: class, pending exceptions, and the state in struct cpu. */
static void begin(struct soft_vcpu *v, const struct insn *i, bool waiting)
{
    fpu_class_check(v, i, FPU_X87);
    v->cur = i;
    if (waiting)
        fpu_check_pending(v, i);
    soft_fpu_sync(v);
}

static void initialise(struct cpu *cpu)
{
    cpu->fcw = FCW_INIT;
    cpu->fsw = 0;
    cpu->ftw = TAGS_EMPTY;
    cpu->fop = cpu->fcs = cpu->fds = 0;
    cpu->fip = cpu->fdp = 0;
}

static void put16(u8 *at, u64 value)
{
    u16 word = (u16)value;

    memcpy(at, &word, sizeof(word));
}

static void put32(u8 *at, u64 value)
{
    u32 word = (u32)value;

    memcpy(at, &word, sizeof(word));
}

static u32 get16(const u8 *at)
{
    u16 word;

    memcpy(&word, at, sizeof(word));
    return word;
}

static u32 get32(const u8 *at)
{
    u32 word;

    memcpy(&word, at, sizeof(word));
    return word;
}

/* Writes the environment in the layout of the mode and operand size; returns its size in bytes. */
static unsigned environment_put(const struct soft_vcpu *v, const struct insn *i, u8 *env)
{
    const struct cpu *c = &v->cpu;
    bool hide = soft_has(v, FEATURE_ZERO_FCS_FDS);
    u16 fcs = hide ? 0 : c->fcs, fds = hide ? 0 : c->fds;
    u32 fip = (u32)c->fip + ((u32)c->fcs << 4), fdp = (u32)c->fdp + ((u32)c->fds << 4);
    u32 words[7] = {c->fcw, c->fsw, c->ftw, (u32)c->fip, fcs, (u32)c->fdp, fds};

    if (!soft_protected(v)) {
        words[3] = fip & 0xffff;
        words[4] = (i->osize == 2 ? fip >> 16 & 15 : fip >> 16) << 12 | c->fop;
        words[5] = fdp & 0xffff;
        words[6] = (i->osize == 2 ? fdp >> 16 & 15 : fdp >> 16) << 12;
    } else if (i->osize != 2) {
        words[4] |= (u32)c->fop << 16;
    }
    if (i->osize == 2) {
        for (unsigned n = 0; n < 7; n++)
            put16(env + 2 * n, words[n]);
        return 14;
    }
    /* The reserved halves read as ones; the 32-bit FIP and FDP have none in protected mode. */
    for (unsigned n = 0; n < 7; n++)
        put32(env + 4 * n, words[n]);
    for (unsigned n = 0; n < 3; n++)
        put16(env + 4 * n + 2, 0xffff);
    if (soft_protected(v))
        put16(env + 26, 0xffff);
    return 28;
}

static void environment_get(struct soft_vcpu *v, const struct insn *i, const u8 *env)
{
    struct cpu *c = &v->cpu;
    u32 words[7];

    for (unsigned n = 0; n < 7; n++)
        words[n] = i->osize == 2 ? get16(env + 2 * n) : get32(env + 4 * n);
    c->fcw = (u16)((words[0] & 0x1f7f) | 0x40);
    c->fsw = (u16)words[1];
    c->ftw = (u16)words[2];
    if (soft_protected(v)) {
        c->fip = words[3];
        c->fcs = (u16)words[4];
        c->fop = i->osize == 2 ? 0 : words[4] >> 16 & FOP_MASK;
        c->fdp = words[5];
        c->fds = (u16)words[6];
    } else {
        c->fip = (words[3] & 0xffff) | words[4] >> 12 << 16;
        c->fop = words[4] & FOP_MASK;
        c->fdp = (words[5] & 0xffff) | words[6] >> 12 << 16;
        c->fcs = c->fds = 0;
    }
    update_summary(c);
}

void fpu_refresh_tags(struct cpu *c)
{
    for (unsigned n = 0; n < 8; n++) {
        unsigned tag = c->ftw >> 2 * n & 3, exponent = get16(c->fpr[n] + 8) & 0x7fff;
        u64 mantissa;

        if (tag == 3)
            continue;
        memcpy(&mantissa, c->fpr[n], sizeof(mantissa));
        if (exponent == 0x7fff || (exponent != 0 && !(mantissa >> 63)))
            tag = 2;
        else
            tag = exponent != 0 ? 0 : mantissa != 0 ? 2 : 1;
        c->ftw = (u16)((c->ftw & ~(3u << 2 * n)) | tag << 2 * n);
    }
}

static unsigned stack_access(const struct insn *i, unsigned access)
{
    return access | (i->seg == SEG_SS ? ACCESS_STACK : 0);
}

static void run_fnstenv(struct soft_vcpu *v, const struct insn *i)
{
    u8 env[ENV_MAX];
    unsigned size;

    begin(v, i, false);
    fpu_refresh_tags(&v->cpu);
    size = environment_put(v, i, env);
    soft_store_bytes(v, insn_linear(v, i, size, ACCESS_WRITE), env, size,
                     stack_access(i, ACCESS_WRITE));
    v->cpu.fcw |= FCW_MASKS;
    update_summary(&v->cpu);
    NEXT(v, i);
}

static void run_fldenv(struct soft_vcpu *v, const struct insn *i)
{
    unsigned size = i->osize == 2 ? 14 : 28;
    u8 env[ENV_MAX];

    begin(v, i, true);
    soft_load_bytes(v, insn_linear(v, i, size, ACCESS_READ), env, size,
                    stack_access(i, ACCESS_READ));
    environment_get(v, i, env);
    fpu_refresh_tags(&v->cpu);
    NEXT(v, i);
}

static void run_fnsave(struct soft_vcpu *v, const struct insn *i)
{
    u8 image[ENV_MAX + REGISTERS];
    unsigned size;

    begin(v, i, false);
    fpu_refresh_tags(&v->cpu);
    size = environment_put(v, i, image);
    for (unsigned n = 0; n < 8; n++)
        memcpy(image + size + 10 * n, v->cpu.fpr[(n + top_of(v->cpu.fsw)) & 7], 10);
    size += REGISTERS;
    soft_store_bytes(v, insn_linear(v, i, size, ACCESS_WRITE), image, size,
                     stack_access(i, ACCESS_WRITE));
    initialise(&v->cpu);
    NEXT(v, i);
}

static void run_frstor(struct soft_vcpu *v, const struct insn *i)
{
    unsigned env = i->osize == 2 ? 14 : 28, size = env + REGISTERS;
    u8 image[ENV_MAX + REGISTERS];

    begin(v, i, true);
    soft_load_bytes(v, insn_linear(v, i, size, ACCESS_READ), image, size,
                    stack_access(i, ACCESS_READ));
    environment_get(v, i, image);
    for (unsigned n = 0; n < 8; n++)
        memcpy(v->cpu.fpr[(n + top_of(v->cpu.fsw)) & 7], image + env + 10 * n, 10);
    fpu_refresh_tags(&v->cpu);
    NEXT(v, i);
}

static void run_fninit(struct soft_vcpu *v, const struct insn *i)
{
    begin(v, i, false);
    initialise(&v->cpu);
    NEXT(v, i);
}

/* CR0.TS stops FWAIT only together with MP; CR0.EM doesn't. */
static void run_fwait(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    if ((v->cpu.cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        soft_raise(v, EXC_NM);
    fpu_check_pending(v, i);
    NEXT(v, i);
}

/* The environment's size follows the operand size attribute, of which REX.W is no part. */
static insn_fn *environment_form(const struct decode_context *ctx, struct insn *out, insn_fn *fn)
{
    out->osize = ctx->zi->operand_width == 16 ? 2 : 4;
    return fn;
}

insn_fn *x87_decode(const struct decode_context *ctx, struct insn *out)
{
    switch (ctx->zi->mnemonic) {
    case ZYDIS_MNEMONIC_FNSTENV:
        return environment_form(ctx, out, run_fnstenv);
    case ZYDIS_MNEMONIC_FLDENV:
        return environment_form(ctx, out, run_fldenv);
    case ZYDIS_MNEMONIC_FNSAVE:
        return environment_form(ctx, out, run_fnsave);
    case ZYDIS_MNEMONIC_FRSTOR:
        return environment_form(ctx, out, run_frstor);
    case ZYDIS_MNEMONIC_FNINIT:
        return run_fninit;
    case ZYDIS_MNEMONIC_FWAIT:
        return run_fwait;
    default:
        return NULL;
    }
}
