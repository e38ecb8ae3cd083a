/*
 * Segments and stacks (Intel SDM vol. 3, chapters 3 and 5; vol. 2, the instructions by name).
 *
 * Vendors differ in one thing here: a null selector loaded into FS or GS clears the base on Intel, and
 * leaves it on AMD but where CPUID says "null selector clears base" (AMD APM vol. 3, CPUID
 * Fn8000_0021_EAX[6]). The CPUID model's vendor and feature decide.
 */
#include "engine/soft/segment.h"

#include "engine/soft/bt/bt.h"
#include "engine/soft/descriptor.h"
#include "engine/soft/flags.h"
#include "engine/soft/system.h"

/* --- Descriptors --- */

/* Linear address of a selector's descriptor, and whether `size` bytes of it are within its table. */
static bool descriptor_address(const struct soft_vcpu *v, u16 selector, unsigned size, gva_t *lin)
{
    u32 offset = selector & ~7u;
    u64 base;
    u32 limit;

    if (selector & 4) {
        if (v->cpu.ldtr.attr & SEG_ATTR_UNUSABLE)
            return false;
        base = v->cpu.ldtr.base;
        limit = v->cpu.ldtr.limit;
    } else {
        base = v->cpu.gdtr.base;
        limit = v->cpu.gdtr.limit;
    }
    *lin = base + offset;
    return (u64)offset + size - 1 <= limit;
}

bool soft_read_descriptor(struct soft_vcpu *v, u16 selector, u64 *d)
{
    gva_t lin;

    if (!descriptor_address(v, selector, 8, &lin))
        return false;
    *d = soft_system_load(v, lin, 8);
    return true;
}

bool soft_read_system_descriptor(struct soft_vcpu *v, u16 selector, u64 *d, u64 *high)
{
    gva_t lin;

    *high = 0;
    if (!soft_read_descriptor(v, selector, d))
        return false;
    if (!soft_long_mode(v) || !desc_is_system(*d))
        return true;
    if (!descriptor_address(v, selector, 16, &lin))
        return false;
    *high = soft_system_load(v, lin + 8, 8);
    return true;
}

void soft_update_descriptor(struct soft_vcpu *v, u16 selector, u8 set, u8 clear)
{
    gva_t lin;
    u8 *p;

    if (!descriptor_address(v, selector, 8, &lin))
        return;
    lin += 5;
    p = soft_pointer(v, lin, 1, ACCESS_WRITE | ACCESS_SYSTEM);
    if (!p) {
        u64 old = soft_system_load(v, lin, 1);

        soft_system_store(v, lin, (old & ~(u64)clear) | set, 1);
        return;
    }
    if (set)
        __atomic_fetch_or(p, set, __ATOMIC_SEQ_CST);
    if (clear)
        __atomic_fetch_and(p, (u8)~clear, __ATOMIC_SEQ_CST);
}

void soft_descriptor_accessed(struct soft_vcpu *v, u16 selector, u64 *d)
{
    if (*d & BIT(40))
        return;
    soft_update_descriptor(v, selector, SEG_ATTR_ACCESSED, 0);
    *d |= BIT(40);
}

struct segment soft_segment(u16 selector, u64 d)
{
    return (struct segment){
        .base = descriptor_base(d),
        .limit = descriptor_limit(d),
        .attr = descriptor_attr(d),
        .selector = selector,
    };
}

struct segment soft_null_segment(u16 selector, unsigned dpl)
{
    return (struct segment){.attr = SEG_ATTR_UNUSABLE | ATTR_DPL(dpl), .selector = selector};
}

void soft_commit_segment(struct soft_vcpu *v, enum segreg seg, struct segment s)
{
    v->cpu.seg[seg] = s;
    v->seg_base[seg] = soft_code64(v) && seg < SEG_FS ? 0 : s.base;
    if (!soft_code64(v))
        bt_mode_changed(v);
}

/* --- Addresses --- */

static _Noreturn void segment_fault(struct soft_vcpu *v, unsigned seg)
{
    soft_raise_error(v, seg == SEG_SS ? EXC_SS : EXC_GP, 0);
}

/* Whether [offset, offset + size) is within a segment (vol. 3, 5.3). */
static bool within_limit(u32 limit, u32 attr, u64 offset, unsigned size)
{
    u64 last = offset + size - 1;

    if ((attr & (SEG_ATTR_CODE | SEG_ATTR_DOWN)) == SEG_ATTR_DOWN)
        return offset > limit && last <= (attr & SEG_ATTR_DB ? 0xffffffffULL : 0xffff);
    return last <= limit;
}

gva_t soft_linear(struct soft_vcpu *v, unsigned seg, u64 offset, unsigned size, unsigned access)
{
    const struct segment *s = &v->cpu.seg[seg];

    if (soft_code64(v))
        return v->seg_base[seg] + offset;
    if (s->attr & SEG_ATTR_UNUSABLE)
        segment_fault(v, seg);
    if (soft_protected(v)) {
        bool code = s->attr & SEG_ATTR_CODE, bit = s->attr & SEG_ATTR_WRITABLE;

        /* Data may always be read, code never be written (vol. 3, 5.5). */
        if (access & ACCESS_WRITE ? code || !bit : code && !bit)
            segment_fault(v, seg);
    }
    if (!within_limit(s->limit, s->attr, offset, size))
        segment_fault(v, seg);
    return (u32)(s->base + offset);
}

static unsigned operand_access(const struct insn *i, unsigned access)
{
    return access | (i->seg == SEG_SS ? ACCESS_STACK : 0);
}

u64 insn_read_rm(struct soft_vcpu *v, const struct insn *i, unsigned size)
{
    if (i->flags & INSN_MEM)
        return soft_load(v, insn_linear(v, i, size, ACCESS_READ), size,
                         operand_access(i, ACCESS_READ));
    return size == 8 ? v->cpu.gpr[i->rm] : v->cpu.gpr[i->rm] & (BIT(8 * size) - 1);
}

static void write_gpr(struct soft_vcpu *v, unsigned reg, u64 value, unsigned size)
{
    u64 *gpr = &v->cpu.gpr[reg];

    *gpr = size == 8 ? value : size == 4 ? (u32)value : (*gpr & ~0xffffULL) | (u16)value;
}

void insn_write_rm(struct soft_vcpu *v, const struct insn *i, u64 value, unsigned size)
{
    if (i->flags & INSN_MEM)
        soft_store(v, insn_linear(v, i, size, ACCESS_WRITE), value, size,
                   operand_access(i, ACCESS_WRITE));
    else
        write_gpr(v, i->rm, value, size);
}

/* --- Stacks --- */

struct stack soft_stack_in(const struct soft_vcpu *v, const struct segment *ss, u64 sp, bool flat,
                           u32 error)
{
    struct stack s = {.sp = sp, .mask = UINT64_MAX, .access = ACCESS_STACK, .error = error};

    if (flat)
        return s;
    s.base = ss->base;
    s.limit = ss->limit;
    s.attr = ss->attr;
    s.mask = ss->attr & SEG_ATTR_DB ? 0xffffffff : 0xffff;
    return s;
}

struct stack soft_stack(const struct soft_vcpu *v)
{
    return soft_stack_in(v, &v->cpu.seg[SEG_SS], v->cpu.gpr[RSP], soft_code64(v), 0);
}

static gva_t stack_linear(struct soft_vcpu *v, const struct stack *s, u64 sp, unsigned bytes)
{
    if (s->mask == UINT64_MAX)
        return sp;
    sp &= s->mask;
    if ((s->attr & SEG_ATTR_UNUSABLE) || !within_limit(s->limit, s->attr, sp, bytes))
        soft_raise_error(v, EXC_SS, s->error);
    return (u32)(s->base + sp);
}

/* Whether `bytes` from sp upwards wrap around the end of the stack's address size. */
static bool stack_wraps(const struct stack *s, u64 sp, unsigned bytes)
{
    sp &= s->mask;
    return s->mask - sp < bytes - 1;
}

void soft_stack_room(struct soft_vcpu *v, const struct stack *s, unsigned bytes)
{
    if (!stack_wraps(s, s->sp - bytes, bytes))
        stack_linear(v, s, s->sp - bytes, bytes);
}

/* Whether a frame can be accessed at once: alignment is checked word by word. */
static bool in_one_piece(const struct soft_vcpu *v, const struct stack *s, u64 sp, unsigned bytes)
{
    return likely(!v->align_check && !stack_wraps(s, sp, bytes));
}

void soft_stack_push(struct soft_vcpu *v, struct stack *s, const u64 *values, unsigned n,
                     unsigned size)
{
    u8 frame[STACK_MAX * 8];
    u64 sp = s->sp - n * size;

    if (in_one_piece(v, s, sp, n * size)) {
        for (unsigned k = 0; k < n; k++)
            memcpy(frame + (n - 1 - k) * size, &values[k], size);
        soft_store_bytes(v, stack_linear(v, s, sp, n * size), frame, n * size,
                         ACCESS_WRITE | s->access);
    } else {
        for (unsigned k = 1; k <= n; k++)
            soft_probe(v, stack_linear(v, s, s->sp - k * size, size), size,
                       ACCESS_WRITE | s->access);
        for (unsigned k = 1; k <= n; k++)
            soft_store(v, stack_linear(v, s, s->sp - k * size, size), values[k - 1], size,
                       ACCESS_WRITE | s->access);
    }
    s->sp = sp;
}

void soft_stack_pop(struct soft_vcpu *v, struct stack *s, u64 *values, unsigned n, unsigned size)
{
    u8 frame[STACK_MAX * 8];

    if (in_one_piece(v, s, s->sp, n * size)) {
        soft_load_bytes(v, stack_linear(v, s, s->sp, n * size), frame, n * size,
                        ACCESS_READ | s->access);
        for (unsigned k = 0; k < n; k++) {
            values[k] = 0;
            memcpy(&values[k], frame + k * size, size);
        }
    } else {
        for (unsigned k = 0; k < n; k++)
            values[k] = soft_load(v, stack_linear(v, s, s->sp + k * size, size), size,
                                  ACCESS_READ | s->access);
    }
    s->sp += n * size;
}

void soft_stack_commit(struct soft_vcpu *v, const struct stack *s)
{
    u64 *rsp = &v->cpu.gpr[RSP];

    *rsp = s->mask == 0xffff ? (*rsp & ~0xffffULL) | (u16)s->sp : s->sp & s->mask;
}

void soft_push(struct soft_vcpu *v, u64 value, unsigned size)
{
    struct stack s = soft_stack(v);

    soft_stack_push(v, &s, &value, 1, size);
    soft_stack_commit(v, &s);
}

u64 soft_pop(struct soft_vcpu *v, unsigned size)
{
    struct stack s = soft_stack(v);
    u64 value;

    soft_stack_pop(v, &s, &value, 1, size);
    soft_stack_commit(v, &s);
    return value;
}

/* --- Loading segments --- */

u64 soft_check_data_segment(struct soft_vcpu *v, u16 selector, enum exception vector)
{
    u32 error = selector_error(selector);
    u64 d;

    if (!soft_read_descriptor(v, selector, &d) || !desc_is_readable(d))
        soft_raise_error(v, vector, error);
    if (!desc_is_conforming(d) &&
        (selector_rpl(selector) > desc_dpl(d) || soft_cpl(v) > desc_dpl(d)))
        soft_raise_error(v, vector, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    return d;
}

u64 soft_check_stack_segment(struct soft_vcpu *v, u16 selector, unsigned cpl, enum exception vector)
{
    u32 error = selector_error(selector);
    u64 d;

    if (!soft_read_descriptor(v, selector, &d) || selector_rpl(selector) != cpl ||
        !desc_is_writable_data(d) || desc_dpl(d) != cpl)
        soft_raise_error(v, vector, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_SS, error);
    return d;
}

void soft_set_real_segment(struct soft_vcpu *v, enum segreg seg, u16 selector)
{
    struct segment s = v->cpu.seg[seg];

    s.selector = selector;
    s.base = (u64)selector << 4;
    if (soft_vm86(v)) {
        s.limit = 0xffff;
        s.attr = ATTR_DATA | ATTR_DPL(3);
    } else {
        /* Limit, granularity and size stay as protected mode left them ("unreal mode"). */
        s.attr = ATTR_DATA | (s.attr & (SEG_ATTR_G | SEG_ATTR_DB | SEG_ATTR_AVL));
    }
    soft_commit_segment(v, seg, s);
}

/* A null selector: what is left of the segment (see the head of this file). */
static void load_null(struct soft_vcpu *v, enum segreg seg, u16 selector)
{
    struct segment s = soft_null_segment(selector, seg == SEG_SS ? soft_cpl(v) : 0);

    if ((seg == SEG_FS || seg == SEG_GS) && cpuid_model_is_amd(v->cpuid) &&
        !soft_has(v, FEATURE_NULL_SEL_CLEARS_BASE)) {
        s.base = v->cpu.seg[seg].base;
        s.limit = v->cpu.seg[seg].limit;
    }
    soft_commit_segment(v, seg, s);
}

/* MOV to a segment register (vol. 2B). */
void soft_load_segment(struct soft_vcpu *v, enum segreg seg, u16 selector)
{
    u64 d;

    if (!soft_protected(v)) {
        soft_set_real_segment(v, seg, selector);
    } else if (selector_null(selector)) {
        if (seg == SEG_SS &&
            (!soft_code64(v) || soft_cpl(v) == 3 || selector_rpl(selector) != soft_cpl(v)))
            soft_raise_error(v, EXC_GP, 0);
        load_null(v, seg, selector);
    } else {
        d = seg == SEG_SS ? soft_check_stack_segment(v, selector, soft_cpl(v), EXC_GP)
                          : soft_check_data_segment(v, selector, EXC_GP);
        soft_descriptor_accessed(v, selector, &d);
        soft_commit_segment(v, seg, soft_segment(selector, d));
    }
    if (seg == SEG_SS)
        soft_mode_changed(v);
}

/* The instruction after MOV SS or POP SS is not interrupted (vol. 3, 6.8.3). */
static void shadow_ss(struct soft_vcpu *v)
{
    v->cpu.shadow_ss = true;
    atomic_fetch_or(&v->attention, ATTN_SHADOW);
}

/* MOV r/m, Sreg: memory always takes 16 bits (vol. 2B, MOV). */
void op_mov_from_sreg(struct soft_vcpu *v, const struct insn *i)
{
    insn_write_rm(v, i, v->cpu.seg[i->reg].selector, i->flags & INSN_MEM ? 2 : i->osize);
}

/* MOV Sreg, r/m (vol. 2B, MOV) */
void op_mov_to_sreg(struct soft_vcpu *v, const struct insn *i)
{
    if (i->reg == SEG_CS || i->reg >= SEG_COUNT)
        soft_raise(v, EXC_UD);
    soft_load_segment(v, i->reg, (u16)insn_read_rm(v, i, 2));
    if (i->reg == SEG_SS)
        shadow_ss(v);
}

/* PUSH Sreg (vol. 2B): zero-extended to the operand size, as AMD's do and Intel's may. */
void op_push_sreg(struct soft_vcpu *v, const struct insn *i)
{
    soft_push(v, v->cpu.seg[i->reg].selector, i->osize);
}

/* POP Sreg (vol. 2B): the stack pointer moves when the load has succeeded, by the old stack's size. */
void op_pop_sreg(struct soft_vcpu *v, const struct insn *i)
{
    struct stack s = soft_stack(v);
    u64 value;

    soft_stack_pop(v, &s, &value, 1, i->osize);
    soft_load_segment(v, i->reg, (u16)value);
    soft_stack_commit(v, &s);
    if (i->reg == SEG_SS)
        shadow_ss(v);
}

/* LDS, LES, LFS, LGS, LSS (vol. 2A) */
static void load_far_pointer(struct soft_vcpu *v, const struct insn *i, enum segreg seg)
{
    unsigned size = i->osize;
    unsigned access = operand_access(i, ACCESS_READ);
    u64 offset = soft_load(v, insn_linear(v, i, size, ACCESS_READ), size, access);
    gva_t lin = insn_linear(v, i, size + 2, ACCESS_READ);
    u16 selector = (u16)soft_load(v, lin + size, 2, access | ACCESS_UNALIGNED);

    soft_load_segment(v, seg, selector);
    write_gpr(v, i->reg, offset, size);
}

void op_lds(struct soft_vcpu *v, const struct insn *i)
{
    load_far_pointer(v, i, SEG_DS);
}
void op_les(struct soft_vcpu *v, const struct insn *i)
{
    load_far_pointer(v, i, SEG_ES);
}
void op_lfs(struct soft_vcpu *v, const struct insn *i)
{
    load_far_pointer(v, i, SEG_FS);
}
void op_lgs(struct soft_vcpu *v, const struct insn *i)
{
    load_far_pointer(v, i, SEG_GS);
}
void op_lss(struct soft_vcpu *v, const struct insn *i)
{
    load_far_pointer(v, i, SEG_SS);
}

/* --- Asking about descriptors --- */

static void require_protected(struct soft_vcpu *v)
{
    if (!soft_protected(v))
        soft_raise(v, EXC_UD);
}

static void set_zf(struct soft_vcpu *v, bool on)
{
    v->aflags = (v->aflags & ~AFLAG_ZF) | (on ? AFLAG_ZF : 0);
}

/*
 * Reads the descriptor that LAR or LSL asks about: false when it isn't visible at CPL and RPL, or its
 * type is none of `types` (a bit for each system type).
 */
static bool visible_descriptor(struct soft_vcpu *v, u16 selector, u32 types, u64 *d)
{
    u64 high;

    if (selector_null(selector) || !soft_read_system_descriptor(v, selector, d, &high))
        return false;
    if (desc_is_system(*d) && !(types & BIT(desc_type(*d))))
        return false;
    return desc_is_conforming(*d) || desc_dpl(*d) >= MAX(soft_cpl(v), selector_rpl(selector));
}

#define TYPES_LONG_SEGMENT (BIT(SYSSEG_LDT) | BIT(SYSSEG_TSS32_AVAIL) | BIT(SYSSEG_TSS32_BUSY))
#define TYPES_SEGMENT (TYPES_LONG_SEGMENT | BIT(SYSSEG_TSS16_AVAIL) | BIT(SYSSEG_TSS16_BUSY))

/* LAR (vol. 2A) */
void op_lar(struct soft_vcpu *v, const struct insn *i)
{
    u32 types = soft_long_mode(v) ? TYPES_LONG_SEGMENT | BIT(SYSSEG_CALLGATE32)
                                  : TYPES_SEGMENT | BIT(SYSSEG_CALLGATE16) | BIT(SYSSEG_TASKGATE) |
                                        BIT(SYSSEG_CALLGATE32);
    u16 selector;
    u64 d;
    bool ok;

    require_protected(v);
    selector = (u16)insn_read_rm(v, i, 2);
    ok = visible_descriptor(v, selector, types, &d);
    if (ok)
        write_gpr(v, i->reg, (d >> 32) & (i->osize == 2 ? 0xff00 : 0xffff00), i->osize);
    set_zf(v, ok);
}

/* LSL (vol. 2A) */
void op_lsl(struct soft_vcpu *v, const struct insn *i)
{
    u16 selector;
    u64 d;
    bool ok;

    require_protected(v);
    selector = (u16)insn_read_rm(v, i, 2);
    ok =
        visible_descriptor(v, selector, soft_long_mode(v) ? TYPES_LONG_SEGMENT : TYPES_SEGMENT, &d);
    if (ok)
        write_gpr(v, i->reg, descriptor_limit(d), i->osize);
    set_zf(v, ok);
}

/* VERR, VERW (vol. 2B) */
void op_verr(struct soft_vcpu *v, const struct insn *i)
{
    u64 d;

    require_protected(v);
    set_zf(v, visible_descriptor(v, (u16)insn_read_rm(v, i, 2), 0, &d) && desc_is_readable(d));
}

void op_verw(struct soft_vcpu *v, const struct insn *i)
{
    u64 d;

    require_protected(v);
    set_zf(v, visible_descriptor(v, (u16)insn_read_rm(v, i, 2), 0, &d) && desc_is_writable_data(d));
}

/* ARPL (vol. 2A) */
void op_arpl(struct soft_vcpu *v, const struct insn *i)
{
    u16 dst, src = (u16)v->cpu.gpr[i->reg];
    bool raise;

    require_protected(v);
    dst = (u16)insn_read_rm(v, i, 2);
    raise = selector_rpl(dst) < selector_rpl(src);
    if (raise)
        insn_write_rm(v, i, (dst & ~3u) | selector_rpl(src), 2);
    set_zf(v, raise);
}

/* --- System tables --- */

static void store_table(struct soft_vcpu *v, const struct insn *i, const struct descriptor_table *t)
{
    unsigned size = soft_code64(v) ? 10 : 6;
    u8 image[10];
    u16 limit = (u16)t->limit;

    soft_check_umip(v);
    memcpy(image, &limit, 2);
    memcpy(image + 2, &t->base, size - 2);
    soft_store_bytes(v, insn_linear(v, i, size, ACCESS_WRITE), image, size,
                     operand_access(i, ACCESS_WRITE));
}

/* SGDT, SIDT (vol. 2B): with 16-bit operands too the whole base, as all processors since the 386 do. */
void op_sgdt(struct soft_vcpu *v, const struct insn *i)
{
    store_table(v, i, &v->cpu.gdtr);
}

void op_sidt(struct soft_vcpu *v, const struct insn *i)
{
    store_table(v, i, &v->cpu.idtr);
}

/* LGDT, LIDT (vol. 2A) */
static void load_table(struct soft_vcpu *v, const struct insn *i, struct descriptor_table *t)
{
    unsigned size = soft_code64(v) ? 10 : 6;
    u8 image[10];
    u64 base = 0;
    u16 limit;

    soft_require_cpl0(v);
    soft_load_bytes(v, insn_linear(v, i, size, ACCESS_READ), image, size,
                    operand_access(i, ACCESS_READ));
    memcpy(&limit, image, 2);
    memcpy(&base, image + 2, size - 2);
    if (size == 6 && i->osize == 2)
        base &= 0xffffff;
    if (size == 10 && !soft_canonical(v, base))
        soft_raise_error(v, EXC_GP, 0);
    t->base = base;
    t->limit = limit;
}

void op_lgdt(struct soft_vcpu *v, const struct insn *i)
{
    load_table(v, i, &v->cpu.gdtr);
}

void op_lidt(struct soft_vcpu *v, const struct insn *i)
{
    load_table(v, i, &v->cpu.idtr);
}

/* SLDT, STR (vol. 2B) */
void op_sldt(struct soft_vcpu *v, const struct insn *i)
{
    require_protected(v);
    soft_check_umip(v);
    insn_write_rm(v, i, v->cpu.ldtr.selector, i->flags & INSN_MEM ? 2 : i->osize);
}

void op_str(struct soft_vcpu *v, const struct insn *i)
{
    require_protected(v);
    soft_check_umip(v);
    insn_write_rm(v, i, v->cpu.tr.selector, i->flags & INSN_MEM ? 2 : i->osize);
}

/*
 * The descriptor for LLDT or LTR, and its base with the upper half that IA-32e mode adds (there the type
 * field of the third dword must be 0, vol. 3, 7.2.3).
 */
static struct segment system_segment(struct soft_vcpu *v, u16 selector, u32 types)
{
    u32 error = selector_error(selector);
    u64 d, high;
    struct segment s;

    if ((selector & 4) || !soft_read_system_descriptor(v, selector, &d, &high) ||
        !desc_is_system(d) || !(types & BIT(desc_type(d))) || ((high >> 40) & 0x1f))
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    s = soft_segment(selector, d);
    s.base |= high << 32;
    if (soft_long_mode(v) && !soft_canonical(v, s.base))
        soft_raise_error(v, EXC_GP, error);
    return s;
}

/* LLDT (vol. 2A) */
void op_lldt(struct soft_vcpu *v, const struct insn *i)
{
    u16 selector;

    require_protected(v);
    soft_require_cpl0(v);
    selector = (u16)insn_read_rm(v, i, 2);
    if (selector_null(selector))
        v->cpu.ldtr = soft_null_segment(selector, 0);
    else
        v->cpu.ldtr = system_segment(v, selector, BIT(SYSSEG_LDT));
}

/* LTR (vol. 2A) */
void op_ltr(struct soft_vcpu *v, const struct insn *i)
{
    u32 types = soft_long_mode(v) ? BIT(SYSSEG_TSS32_AVAIL)
                                  : BIT(SYSSEG_TSS32_AVAIL) | BIT(SYSSEG_TSS16_AVAIL);
    struct segment tr;
    u16 selector;

    require_protected(v);
    soft_require_cpl0(v);
    selector = (u16)insn_read_rm(v, i, 2);
    if (selector_null(selector))
        soft_raise_error(v, EXC_GP, 0);
    tr = system_segment(v, selector, types);
    soft_update_descriptor(v, selector, 2, 0);
    tr.attr |= 2;
    v->cpu.tr = tr;
}
