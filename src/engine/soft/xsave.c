/*
 * FXSAVE and the XSAVE family: the extended state in memory.
 *
 * All of it is C on struct cpu; the x87 state is brought home first. Whether a component is in its
 * initial configuration (XINUSE) is told from its contents, which is one of the ways that the
 * manual allows. XSAVEOPT and XSAVES don't use the modified optimisation: it is optional, too.
 *
 * An image is built or taken apart component by component. The legacy region and the header are
 * handled as one piece of 576 bytes; all pieces of a save are probed before the first is written.
 *
 * References: Intel SDM vol. 1, chapter 13 (13.4 the layout, 13.7 to 13.12 the instructions) and
 * 10.5 (FXSAVE). AMD APM vol. 2, 11.5: AMD's processors store FIP, FDP and FOP only with a pending
 * exception.
 */
#include "engine/soft/host_exec.h"

#define LEGACY_SIZE 512u
#define HEADER 512u
#define EXTENDED 576u
#define FXSAVE_WRITTEN 464u /* the rest is the software's */
#define MXCSR_AT 24u
#define ST_AT 32u
#define XMM_AT 160u
#define MXCSR_INIT 0x1f80u
#define FCW_INIT 0x037fu
#define FSW_ES 0x0080u
#define XCOMP_COMPACTED BIT(63)
#define COMPONENTS 10u

enum xsave_kind { KIND_XSAVE, KIND_XSAVEOPT, KIND_XSAVEC, KIND_XSAVES, KIND_XRSTOR, KIND_XRSTORS };

/* --- Components --- */

static unsigned vec_registers(const struct soft_vcpu *v)
{
    return soft_code64(v) ? 16 : 8;
}

static bool all_zero(const void *bytes, size_t n)
{
    const u8 *p = bytes;

    return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

/* The part of the vector registers that component n holds: registers [first, first + count), their
 * bytes [from, from + size). */
struct vec_part {
    u8 first, count, from, size;
};

static struct vec_part vec_part(unsigned component)
{
    switch (component) {
    case 1:
        return (struct vec_part){0, 16, 0, 16};
    case 2:
        return (struct vec_part){0, 16, 16, 16};
    case 6:
        return (struct vec_part){0, 16, 32, 32};
    default:
        return (struct vec_part){16, 16, 0, 64};
    }
}

static bool x87_in_use(const struct cpu *c)
{
    return c->fcw != FCW_INIT || c->fsw != 0 || c->ftw != 0xffff || c->fop || c->fip || c->fdp ||
           c->fcs || c->fds || !all_zero(c->fpr, sizeof(c->fpr));
}

static bool vec_in_use(const struct cpu *c, struct vec_part part)
{
    for (unsigned n = part.first; n < part.first + part.count; n++) {
        if (!all_zero(c->vec[n] + part.from, part.size))
            return true;
    }
    return false;
}

static u64 components_in_use(const struct cpu *c)
{
    u64 in_use = 0;

    if (x87_in_use(c))
        in_use |= XCR0_X87;
    if (vec_in_use(c, vec_part(1)))
        in_use |= XCR0_SSE;
    if (vec_in_use(c, vec_part(2)))
        in_use |= XCR0_AVX;
    if (!all_zero(c->k, sizeof(c->k)))
        in_use |= XCR0_OPMASK;
    if (vec_in_use(c, vec_part(6)))
        in_use |= XCR0_ZMM_HI256;
    if (vec_in_use(c, vec_part(7)))
        in_use |= XCR0_HI16_ZMM;
    if (c->pkru)
        in_use |= XCR0_PKRU;
    return in_use;
}

/* Registers of a component that the mode can't name keep what they have, in memory and in the
 * processor (SDM vol. 1, 13.5.2 and 13.5.3); ZMM16 to 31 exist in 64-bit mode only. */
static unsigned part_count(const struct soft_vcpu *v, unsigned component, struct vec_part part)
{
    if (component == 7)
        return soft_code64(v) ? part.count : 0;
    return vec_registers(v);
}

/* Sizes are multiples of 16. Of a size that it doesn't know the compiler makes a call, or a slow instruction. */
static void copy_part(u8 *to, const u8 *from, unsigned size)
{
    for (unsigned at = 0; at < size; at += 16)
        memcpy(to + at, from + at, 16);
}

static void clear_part(u8 *to, unsigned size)
{
    for (unsigned at = 0; at < size; at += 16)
        memset(to + at, 0, 16);
}

static void vec_put(const struct soft_vcpu *v, unsigned component, u8 *image)
{
    struct vec_part part = vec_part(component);
    unsigned count = part_count(v, component, part);

    for (unsigned n = 0; n < count; n++)
        copy_part(image + n * part.size, v->cpu.vec[part.first + n] + part.from, part.size);
}

/* image: NULL for the initial configuration. */
static void vec_get(struct soft_vcpu *v, unsigned component, const u8 *image)
{
    struct vec_part part = vec_part(component);
    unsigned count = part_count(v, component, part);

    for (unsigned n = 0; n < count; n++) {
        u8 *at = v->cpu.vec[part.first + n] + part.from;

        if (image)
            copy_part(at, image + n * part.size, part.size);
        else
            clear_part(at, part.size);
    }
}

static void extended_put(const struct soft_vcpu *v, unsigned component, u8 *image)
{
    if (component == 5)
        memcpy(image, v->cpu.k, sizeof(v->cpu.k));
    else if (component == 9)
        memcpy(image, &v->cpu.pkru, sizeof(v->cpu.pkru));
    else
        vec_put(v, component, image);
}

static void extended_get(struct soft_vcpu *v, unsigned component, const u8 *image)
{
    u32 pkru = 0;

    if (component == 5) {
        if (image)
            memcpy(v->cpu.k, image, sizeof(v->cpu.k));
        else
            memset(v->cpu.k, 0, sizeof(v->cpu.k));
    } else if (component == 9) {
        if (image)
            memcpy(&pkru, image, sizeof(pkru));
        if (pkru != v->cpu.pkru) {
            v->cpu.pkru = pkru;
            soft_tlb_flush(v);
        }
    } else {
        vec_get(v, component, image);
    }
}

/* The x87 part of the legacy region: bytes 0 to 23 and ST0 to ST7. wide: FXSAVE64's pointers. */
static void x87_put(const struct soft_vcpu *v, u8 *image, bool wide)
{
    const struct cpu *c = &v->cpu;
    bool pointers = !cpuid_model_is_amd(v->cpuid) || (c->fsw & FSW_ES);
    bool selectors = pointers && !soft_has(v, FEATURE_ZERO_FCS_FDS);
    u16 fop = pointers ? c->fop : 0;
    u64 fip = pointers ? c->fip : 0, fdp = pointers ? c->fdp : 0;
    unsigned top = c->fsw >> 11 & 7;

    if (!wide) {
        fip = (u32)fip | (selectors ? (u64)c->fcs << 32 : 0);
        fdp = (u32)fdp | (selectors ? (u64)c->fds << 32 : 0);
    }
    memcpy(image, &c->fcw, 2);
    memcpy(image + 2, &c->fsw, 2);
    image[4] = image[5] = 0;
    for (unsigned n = 0; n < 8; n++) {
        if ((c->ftw >> 2 * n & 3) != 3)
            image[4] |= (u8)BIT(n);
        memcpy(image + ST_AT + 16 * n, c->fpr[(n + top) & 7], 10);
        memset(image + ST_AT + 16 * n + 10, 0, 6);
    }
    memcpy(image + 6, &fop, 2);
    memcpy(image + 8, &fip, 8);
    memcpy(image + 16, &fdp, 8);
}

static void x87_get(struct soft_vcpu *v, const u8 *image, bool wide)
{
    struct cpu *c = &v->cpu;
    unsigned top;

    memcpy(&c->fcw, image, 2);
    memcpy(&c->fsw, image + 2, 2);
    c->fcw = (u16)((c->fcw & 0x1f7f) | 0x40);
    c->fsw &= 0x7f7f;
    if (c->fsw & ~c->fcw & 0x3f)
        c->fsw |= 0x8080;
    top = c->fsw >> 11 & 7;
    c->ftw = 0;
    for (unsigned n = 0; n < 8; n++) {
        if (!(image[4] & BIT(n)))
            c->ftw |= (u16)(3u << 2 * n);
        memcpy(c->fpr[(n + top) & 7], image + ST_AT + 16 * n, 10);
    }
    fpu_refresh_tags(c);
    memcpy(&c->fop, image + 6, 2);
    c->fop &= 0x7ff;
    memcpy(&c->fip, image + 8, 8);
    memcpy(&c->fdp, image + 16, 8);
    if (!wide) {
        c->fcs = (u16)(c->fip >> 32);
        c->fds = (u16)(c->fdp >> 32);
        c->fip = (u32)c->fip;
        c->fdp = (u32)c->fdp;
    } else { /* kept as linear addresses, which have 57 bits at most */
        c->fcs = c->fds = 0;
        c->fip = (u64)((s64)(c->fip << 7) >> 7);
        c->fdp = (u64)((s64)(c->fdp << 7) >> 7);
    }
}

static void x87_init(struct cpu *c)
{
    c->fcw = FCW_INIT;
    c->fsw = c->fop = c->fcs = c->fds = 0;
    c->ftw = 0xffff;
    c->fip = c->fdp = 0;
    memset(c->fpr, 0, sizeof(c->fpr));
}

static unsigned access_of(const struct insn *i, unsigned access)
{
    return access | (i->seg == SEG_SS ? ACCESS_STACK : 0);
}

static gva_t aligned_operand(struct soft_vcpu *v, const struct insn *i, unsigned size,
                             unsigned access, unsigned align)
{
    gva_t lin = insn_linear(v, i, size, access);

    if (!(lin & (align - 1)))
        return lin;
    /* FXSAVE and FXRSTOR may raise #AC by their 32-bit words instead (vol. 2A, FXSAVE). */
    if (align == 16) {
        if (soft_long_mode(v) && !(soft_canonical(v, lin) && soft_canonical(v, lin + size - 1)))
            soft_raise_error(v, i->seg == SEG_SS ? EXC_SS : EXC_GP, 0);
        if (v->align_check && (lin & 3))
            soft_raise_error(v, EXC_AC, 0);
    }
    soft_raise_error(v, EXC_GP, 0);
}

/* --- FXSAVE, FXRSTOR --- */

/* Whether the XMM registers are part of it: not under EFER.FFXSR at CPL 0 in 64-bit mode, nor when
 * the system doesn't know them. */
static bool fxsave_has_xmm(const struct soft_vcpu *v)
{
    if ((v->cpu.msr.efer & EFER_FFXSR) && soft_code64(v) && soft_cpl(v) == 0)
        return false;
    return v->cpu.cr4 & CR4_OSFXSR;
}

static void fxsave_begin(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    if (v->cpu.cr0 & (CR0_EM | CR0_TS))
        soft_raise(v, EXC_NM);
    soft_fpu_sync(v);
}

/* imm: 1 for the forms with 64-bit pointers. */
static void run_fxsave(struct soft_vcpu *v, const struct insn *i)
{
    u8 image[LEGACY_SIZE];
    gva_t lin;

    fxsave_begin(v, i);
    lin = aligned_operand(v, i, LEGACY_SIZE, ACCESS_WRITE, 16);
    soft_probe(v, lin, LEGACY_SIZE, access_of(i, ACCESS_WRITE));
    soft_load_bytes(v, lin, image, LEGACY_SIZE, access_of(i, ACCESS_READ));
    x87_put(v, image, i->imm);
    memcpy(image + MXCSR_AT, &v->cpu.mxcsr, 4);
    memcpy(image + MXCSR_AT + 4, &v->host_exec->mxcsr_mask, 4);
    if (fxsave_has_xmm(v))
        vec_put(v, 1, image + XMM_AT);
    soft_store_bytes(v, lin, image, FXSAVE_WRITTEN, access_of(i, ACCESS_WRITE));
    NEXT(v, i);
}

static void check_mxcsr(struct soft_vcpu *v, const u8 *image)
{
    u32 mxcsr;

    memcpy(&mxcsr, image + MXCSR_AT, sizeof(mxcsr));
    if (mxcsr & ~v->host_exec->mxcsr_mask)
        soft_raise_error(v, EXC_GP, 0);
}

static void run_fxrstor(struct soft_vcpu *v, const struct insn *i)
{
    u8 image[LEGACY_SIZE];
    gva_t lin;

    fxsave_begin(v, i);
    lin = aligned_operand(v, i, LEGACY_SIZE, ACCESS_READ, 16);
    soft_load_bytes(v, lin, image, LEGACY_SIZE, access_of(i, ACCESS_READ));
    check_mxcsr(v, image);
    x87_get(v, image, i->imm);
    memcpy(&v->cpu.mxcsr, image + MXCSR_AT, 4);
    if (fxsave_has_xmm(v))
        vec_get(v, 1, image + XMM_AT);
    NEXT(v, i);
}

/* --- XSAVE --- */

static enum xsave_kind kind_of(const struct insn *i)
{
    return (enum xsave_kind)i->dst;
}

/* The checks of all; returns the requested-feature bitmap. */
static u64 xsave_begin(struct soft_vcpu *v, const struct insn *i)
{
    enum xsave_kind kind = kind_of(i);
    bool supervisor = kind == KIND_XSAVES || kind == KIND_XRSTORS;
    u64 wanted = (u32)v->cpu.gpr[RAX] | v->cpu.gpr[RDX] << 32;

    v->cur = i;
    if (!(v->cpu.cr4 & CR4_OSXSAVE))
        soft_raise(v, EXC_UD);
    if (v->cpu.cr0 & CR0_TS)
        soft_raise(v, EXC_NM);
    if (supervisor && soft_cpl(v) != 0)
        soft_raise_error(v, EXC_GP, 0);
    soft_fpu_sync(v);
    return wanted & (v->cpu.xcr0 | (supervisor ? v->cpu.msr.xss : 0));
}

/* Where component n lies: standard, or compacted with the components of `layout` before it. */
static u32 component_at(const struct soft_vcpu *v, unsigned n, u64 layout)
{
    u32 at = EXTENDED;

    if (!(layout & XCOMP_COMPACTED))
        return v->host_exec->xsave[n].offset;
    for (unsigned m = 2; m <= n; m++) {
        if (!(layout & BIT(m)))
            continue;
        if (v->host_exec->xsave[m].aligned)
            at = (at + 63) & ~63u;
        if (m < n)
            at += v->host_exec->xsave[m].size;
    }
    return at;
}

static u64 get64(const u8 *at)
{
    u64 value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static void run_xsave(struct soft_vcpu *v, const struct insn *i)
{
    enum xsave_kind kind = kind_of(i);
    u64 requested = xsave_begin(v, i), in_use = components_in_use(&v->cpu), written, layout = 0;
    u64 state;
    unsigned write = access_of(i, ACCESS_WRITE);
    u8 image[EXTENDED], part[1024];
    gva_t lin = aligned_operand(v, i, EXTENDED, ACCESS_WRITE, 64);

    if (kind == KIND_XSAVEC || kind == KIND_XSAVES) {
        layout = XCOMP_COMPACTED | requested;
        /* MXCSR belongs to SSE here. */
        if (v->cpu.mxcsr != MXCSR_INIT)
            in_use |= XCR0_SSE;
    }
    written = kind == KIND_XSAVE ? requested : requested & in_use;

    soft_probe(v, lin, EXTENDED, write);
    for (unsigned n = 2; n < COMPONENTS; n++) {
        if (written & BIT(n))
            soft_probe(v, lin + component_at(v, n, layout), v->host_exec->xsave[n].size, write);
    }
    soft_load_bytes(v, lin, image, EXTENDED, access_of(i, ACCESS_READ));
    for (unsigned n = 2; n < COMPONENTS; n++) {
        gva_t at = lin + component_at(v, n, layout);
        u32 size = v->host_exec->xsave[n].size;

        if (!(written & BIT(n)))
            continue;
        soft_load_bytes(v, at, part, size, access_of(i, ACCESS_READ));
        extended_put(v, n, part);
        soft_store_bytes(v, at, part, size, write);
    }
    if (written & XCR0_X87)
        x87_put(v, image, i->imm);
    if (written & XCR0_SSE)
        vec_put(v, 1, image + XMM_AT);
    if (layout ? written & XCR0_SSE : requested & (XCR0_SSE | XCR0_AVX)) {
        memcpy(image + MXCSR_AT, &v->cpu.mxcsr, 4);
        memcpy(image + MXCSR_AT + 4, &v->host_exec->mxcsr_mask, 4);
    }
    state = requested & in_use;
    if (!layout)
        state |= get64(image + HEADER) & ~requested;
    memcpy(image + HEADER, &state, 8);
    if (layout)
        memcpy(image + HEADER + 8, &layout, 8);
    soft_store_bytes(v, lin, image, FXSAVE_WRITTEN, write);
    soft_store_bytes(v, lin + HEADER, image + HEADER, layout ? 16 : 8, write);
    NEXT(v, i);
}

/* #GP for a header that the instruction refuses (SDM vol. 1, 13.8.1 and 13.12). */
static void check_header(struct soft_vcpu *v, const struct insn *i, const u8 *header)
{
    u64 state = get64(header), layout = get64(header + 8);
    u64 allowed = v->cpu.xcr0 | (kind_of(i) == KIND_XRSTORS ? v->cpu.msr.xss : 0);
    bool good;

    if (layout & XCOMP_COMPACTED)
        good = soft_has(v, FEATURE_XSAVEC) && !(layout & ~XCOMP_COMPACTED & ~allowed) &&
               !(state & ~layout) && all_zero(header + 16, 48);
    else
        good = kind_of(i) != KIND_XRSTORS && layout == 0 && !(state & ~allowed) &&
               get64(header + 16) == 0;
    if (!good || state & XCOMP_COMPACTED)
        soft_raise_error(v, EXC_GP, 0);
}

static void run_xrstor(struct soft_vcpu *v, const struct insn *i)
{
    u64 requested = xsave_begin(v, i), state, layout;
    unsigned read = access_of(i, ACCESS_READ);
    u8 image[EXTENDED], part[COMPONENTS][1024];
    gva_t lin = aligned_operand(v, i, EXTENDED, ACCESS_READ, 64);
    bool compacted, mxcsr;

    soft_load_bytes(v, lin, image, EXTENDED, read);
    check_header(v, i, image + HEADER);
    state = get64(image + HEADER);
    layout = get64(image + HEADER + 8);
    compacted = layout & XCOMP_COMPACTED;
    /* The standard format has MXCSR beside the components: it is loaded for SSE or AVX. */
    mxcsr = compacted ? requested & state & XCR0_SSE : requested & (XCR0_SSE | XCR0_AVX);
    if (mxcsr)
        check_mxcsr(v, image);
    for (unsigned n = 2; n < COMPONENTS; n++) {
        if (requested & state & BIT(n))
            soft_load_bytes(v, lin + component_at(v, n, layout), part[n],
                            v->host_exec->xsave[n].size, read);
    }

    if (requested & XCR0_X87) {
        if (state & XCR0_X87)
            x87_get(v, image, i->imm);
        else
            x87_init(&v->cpu);
    }
    if (requested & XCR0_SSE)
        vec_get(v, 1, state & XCR0_SSE ? image + XMM_AT : NULL);
    if (mxcsr)
        memcpy(&v->cpu.mxcsr, image + MXCSR_AT, 4);
    else if (compacted && (requested & XCR0_SSE))
        v->cpu.mxcsr = MXCSR_INIT;
    for (unsigned n = 2; n < COMPONENTS; n++) {
        if (requested & BIT(n))
            extended_get(v, n, state & BIT(n) ? part[n] : NULL);
    }
    NEXT(v, i);
}

static insn_fn *xsave_form(struct insn *out, enum xsave_kind kind, bool wide)
{
    out->dst = kind;
    out->imm = wide;
    return kind >= KIND_XRSTOR ? run_xrstor : run_xsave;
}

insn_fn *xsave_decode(const struct decode_context *ctx, struct insn *out)
{
    switch (ctx->zi->mnemonic) {
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
        out->imm = ctx->zi->mnemonic == ZYDIS_MNEMONIC_FXSAVE64;
        return run_fxsave;
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
        out->imm = ctx->zi->mnemonic == ZYDIS_MNEMONIC_FXRSTOR64;
        return run_fxrstor;
    case ZYDIS_MNEMONIC_XSAVE:
        return xsave_form(out, KIND_XSAVE, false);
    case ZYDIS_MNEMONIC_XSAVE64:
        return xsave_form(out, KIND_XSAVE, true);
    case ZYDIS_MNEMONIC_XSAVEOPT:
        return xsave_form(out, KIND_XSAVEOPT, false);
    case ZYDIS_MNEMONIC_XSAVEOPT64:
        return xsave_form(out, KIND_XSAVEOPT, true);
    case ZYDIS_MNEMONIC_XSAVEC:
        return xsave_form(out, KIND_XSAVEC, false);
    case ZYDIS_MNEMONIC_XSAVEC64:
        return xsave_form(out, KIND_XSAVEC, true);
    case ZYDIS_MNEMONIC_XSAVES:
        return xsave_form(out, KIND_XSAVES, false);
    case ZYDIS_MNEMONIC_XSAVES64:
        return xsave_form(out, KIND_XSAVES, true);
    case ZYDIS_MNEMONIC_XRSTOR:
        return xsave_form(out, KIND_XRSTOR, false);
    case ZYDIS_MNEMONIC_XRSTOR64:
        return xsave_form(out, KIND_XRSTOR, true);
    case ZYDIS_MNEMONIC_XRSTORS:
        return xsave_form(out, KIND_XRSTORS, false);
    case ZYDIS_MNEMONIC_XRSTORS64:
        return xsave_form(out, KIND_XRSTORS, true);
    default:
        return NULL;
    }
}
