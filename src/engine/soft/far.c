/*
 * Far transfers: JMP, CALL and RET between code segments, through call gates and to tasks, and the fast
 * system calls (Intel SDM vol. 3, 5.8 and 7.3; vol. 2 by instruction).
 *
 * Vendors differ in the fast system calls. Intel: SYSCALL and SYSRET exist in 64-bit mode only, SYSENTER
 * and SYSEXIT in every protected mode. AMD (APM vol. 3): SYSCALL and SYSRET in all of protected
 * mode, by CSTAR from compatibility mode; SYSENTER and SYSEXIT in legacy mode only; SYSRET takes a
 * non-canonical RCX, and the fetch faults in user mode. The CPUID model's vendor decides.
 */
#include "engine/soft/descriptor.h"
#include "engine/soft/flags.h"
#include "engine/soft/system.h"

/* --- What all transfers share --- */

void soft_check_ip(struct soft_vcpu *v, u64 d, u64 ip)
{
    if (soft_desc_is_code64(v, d) ? !soft_canonical(v, ip) : ip > descriptor_limit(d))
        soft_raise_error(v, EXC_GP, 0);
}

struct stack soft_inner_stack(struct soft_vcpu *v, unsigned cpl, unsigned ist, struct segment *ss)
{
    const struct segment *tr = &v->cpu.tr;
    bool wide = tr->attr & 8;
    u32 tss_error = selector_error(tr->selector), error = 0;
    struct stack s;
    u64 sp, d;
    u32 at;
    u16 selector;

    if (soft_long_mode(v)) {
        at = ist ? ist * 8 + 28 : cpl * 8 + 4;
        if (at + 7 > tr->limit)
            soft_raise_error(v, EXC_TS, tss_error);
        sp = soft_system_load(v, tr->base + at, 8);
        if (!soft_canonical(v, sp))
            soft_raise_error(v, EXC_SS, 0);
        *ss = cpl < soft_cpl(v) ? soft_null_segment((u16)cpl, cpl) : v->cpu.seg[SEG_SS];
    } else {
        at = wide ? cpl * 8 + 4 : cpl * 4 + 2;
        if (at + (wide ? 5 : 3) > tr->limit)
            soft_raise_error(v, EXC_TS, tss_error);
        sp = soft_system_load(v, tr->base + at, wide ? 4 : 2);
        selector = (u16)soft_system_load(v, tr->base + at + (wide ? 4 : 2), 2);
        if (selector_null(selector))
            soft_raise_error(v, EXC_TS, 0);
        error = selector_error(selector);
        d = soft_check_stack_segment(v, selector, cpl, EXC_TS);
        soft_descriptor_accessed(v, selector, &d);
        *ss = soft_segment(selector, d);
    }
    s = soft_stack_in(v, ss, sp, soft_long_mode(v), error);
    if (soft_cpl(v) == 3 && cpl < 3)
        s.access |= ACCESS_SYSTEM;
    return s;
}

u64 soft_check_return_code(struct soft_vcpu *v, u16 selector)
{
    unsigned rpl = selector_rpl(selector);
    u32 error = selector_error(selector);
    u64 d;

    if (selector_null(selector))
        soft_raise_error(v, EXC_GP, 0);
    if (!soft_read_descriptor(v, selector, &d) || !desc_is_code(d) || rpl < soft_cpl(v))
        soft_raise_error(v, EXC_GP, error);
    if (desc_is_conforming(d) ? desc_dpl(d) > rpl : desc_dpl(d) != rpl)
        soft_raise_error(v, EXC_GP, error);
    if (soft_desc_is_code64(v, d) && desc_db(d))
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    return d;
}

void soft_drop_inner_segments(struct soft_vcpu *v)
{
    static const u8 data[] = {SEG_ES, SEG_FS, SEG_GS, SEG_DS};
    unsigned cpl = soft_cpl(v);

    for (unsigned n = 0; n < ARRAY_SIZE(data); n++) {
        struct segment *s = &v->cpu.seg[data[n]];
        bool conforming =
            (s->attr & (SEG_ATTR_CODE | SEG_ATTR_DOWN)) == (SEG_ATTR_CODE | SEG_ATTR_DOWN);

        /* A null selector loses its RPL; the base that FS or GS may have stays. */
        if (s->attr & SEG_ATTR_UNUSABLE)
            s->selector = 0;
        else if (!conforming && segment_dpl(s) < cpl)
            soft_commit_segment(v, data[n], soft_null_segment(0, 0));
    }
}

/* CS and RIP of a transfer that keeps CPL. */
static void commit_code(struct soft_vcpu *v, u16 selector, u64 d, u64 ip)
{
    soft_commit_segment(v, SEG_CS, soft_segment((u16)((selector & ~3u) | soft_cpl(v)), d));
    soft_mode_changed(v);
    soft_set_ip(v, ip);
}

/* The target of a far JMP or CALL: from the instruction or from memory. */
static void far_pointer(struct soft_vcpu *v, const struct insn *i, u16 *selector, u64 *offset)
{
    unsigned size = i->osize, access = i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ;
    gva_t lin;

    if (!(i->flags & INSN_MEM)) {
        *selector = i->selector;
        *offset = size == 2 ? (u16)i->imm : (u32)i->imm;
        return;
    }
    *offset = soft_load(v, insn_linear(v, i, size, ACCESS_READ), size, access);
    lin = insn_linear(v, i, size + 2, ACCESS_READ);
    *selector = (u16)soft_load(v, lin + size, 2, access | ACCESS_UNALIGNED);
}

/* Reads the descriptor that a far JMP or CALL names; only the null and limit checks are done. */
static u64 far_descriptor(struct soft_vcpu *v, u16 selector, u64 *high)
{
    u64 d;

    if (selector_null(selector))
        soft_raise_error(v, EXC_GP, 0);
    if (!soft_read_system_descriptor(v, selector, &d, high))
        soft_raise_error(v, EXC_GP, selector_error(selector));
    return d;
}

/* A code segment named directly by JMP or CALL (vol. 3, 5.8.1). */
static void check_direct_code(struct soft_vcpu *v, u16 selector, u64 d)
{
    u32 error = selector_error(selector);
    unsigned cpl = soft_cpl(v);

    if (soft_desc_is_code64(v, d) && desc_db(d))
        soft_raise_error(v, EXC_GP, error);
    if (desc_is_conforming(d) ? desc_dpl(d) > cpl
                              : selector_rpl(selector) > cpl || desc_dpl(d) != cpl)
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
}

/* Privilege and presence of a call gate, task gate or TSS that JMP or CALL names. */
static void check_gate(struct soft_vcpu *v, u16 selector, u64 d)
{
    u32 error = selector_error(selector);

    if (desc_dpl(d) < soft_cpl(v) || selector_rpl(selector) > desc_dpl(d))
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
}

struct call_gate {
    u16 selector;
    u64 offset;
    u64 code; /* descriptor of the target segment */
    unsigned size, params;
};

/* A call gate and the code it leads to (vol. 3, 5.8.3 and 5.8.4). */
static struct call_gate read_call_gate(struct soft_vcpu *v, u16 selector, u64 d, u64 high,
                                       bool jump)
{
    bool wide = soft_long_mode(v), too_high;
    struct call_gate g = {
        .selector = gate_selector(d),
        .offset = gate_offset(d),
        .size = wide                                ? 8
                : desc_type(d) == SYSSEG_CALLGATE32 ? 4
                                                    : 2,
        .params = wide ? 0 : (d >> 32) & 31,
    };
    u32 error = selector_error(g.selector);
    unsigned cpl = soft_cpl(v);

    /* In IA-32e mode the upper half has a type field of its own, which must be 0. */
    if (wide && ((high >> 40) & 0x1f))
        soft_raise_error(v, EXC_GP, selector_error(selector));
    check_gate(v, selector, d);
    if (g.size == 8)
        g.offset |= (high & 0xffffffff) << 32;
    else if (g.size == 2)
        g.offset &= 0xffff;
    if (selector_null(g.selector))
        soft_raise_error(v, EXC_GP, 0);
    if (!soft_read_descriptor(v, g.selector, &g.code) || !desc_is_code(g.code))
        soft_raise_error(v, EXC_GP, error);
    too_high =
        jump && !desc_is_conforming(g.code) ? desc_dpl(g.code) != cpl : desc_dpl(g.code) > cpl;
    if (too_high || (wide && (!desc_long(g.code) || desc_db(g.code))))
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(g.code))
        soft_raise_error(v, EXC_NP, error);
    return g;
}

/* JMP or CALL to a TSS, or through a task gate. */
static void task_transfer(struct soft_vcpu *v, u16 selector, u64 d, enum task_switch_source source)
{
    check_gate(v, selector, d);
    if (desc_type(d) == SYSSEG_TASKGATE)
        selector = gate_selector(d);
    soft_task_switch(v, selector, source, soft_next_ip(v), false, 0);
}

enum far_target { FAR_CODE, FAR_CALL_GATE, FAR_TASK };

static enum far_target far_target(struct soft_vcpu *v, u16 selector, u64 d)
{
    bool wide = soft_long_mode(v);

    if (desc_is_code(d))
        return FAR_CODE;
    if (desc_is_system(d))
        switch (desc_type(d)) {
        case SYSSEG_CALLGATE32:
            return FAR_CALL_GATE;
        case SYSSEG_CALLGATE16:
            if (!wide)
                return FAR_CALL_GATE;
            break;
        case SYSSEG_TASKGATE:
        case SYSSEG_TSS16_AVAIL:
        case SYSSEG_TSS16_BUSY:
        case SYSSEG_TSS32_AVAIL:
        case SYSSEG_TSS32_BUSY:
            if (!wide)
                return FAR_TASK;
            break;
        default:
            break;
        }
    soft_raise_error(v, EXC_GP, selector_error(selector));
}

/* --- JMP --- */

/* JMP ptr16:16, ptr16:32, m16:16, m16:32, m16:64 (vol. 2A, JMP, far jumps) */
void op_jmp_far(struct soft_vcpu *v, const struct insn *i)
{
    u64 offset, d, high;
    u16 selector;
    struct call_gate g;

    far_pointer(v, i, &selector, &offset);
    if (!soft_protected(v)) {
        if (offset > (soft_vm86(v) ? 0xffff : v->cpu.seg[SEG_CS].limit))
            soft_raise_error(v, EXC_GP, 0);
        soft_set_real_segment(v, SEG_CS, selector);
        soft_mode_changed(v);
        soft_set_ip(v, offset);
        return;
    }
    d = far_descriptor(v, selector, &high);
    switch (far_target(v, selector, d)) {
    case FAR_CODE:
        check_direct_code(v, selector, d);
        soft_check_ip(v, d, offset);
        soft_descriptor_accessed(v, selector, &d);
        commit_code(v, selector, d, offset);
        break;
    case FAR_CALL_GATE:
        g = read_call_gate(v, selector, d, high, true);
        soft_check_ip(v, g.code, g.offset);
        soft_descriptor_accessed(v, g.selector, &g.code);
        commit_code(v, g.selector, g.code, g.offset);
        break;
    case FAR_TASK:
        task_transfer(v, selector, d, TASK_JMP);
        break;
    }
}

/* --- CALL --- */

static void call_8086(struct soft_vcpu *v, u16 selector, u64 offset, unsigned size)
{
    u64 frame[] = {v->cpu.seg[SEG_CS].selector, soft_next_ip(v)};
    struct stack s = soft_stack(v);

    soft_stack_room(v, &s, 2 * size);
    if (offset > (soft_vm86(v) ? 0xffff : v->cpu.seg[SEG_CS].limit))
        soft_raise_error(v, EXC_GP, 0);
    soft_stack_push(v, &s, frame, 2, size);
    soft_stack_commit(v, &s);
    soft_set_real_segment(v, SEG_CS, selector);
    soft_mode_changed(v);
    soft_set_ip(v, offset);
}

/*
 * A call that keeps CPL. `flat` is the stack of the new mode: a gate's 64-bit target has the whole of
 * RSP for its stack even when the caller runs in compatibility mode.
 */
static void call_same(struct soft_vcpu *v, u16 selector, u64 d, u64 ip, unsigned size, bool flat)
{
    u64 frame[] = {v->cpu.seg[SEG_CS].selector, soft_next_ip(v)};
    struct stack s = soft_stack_in(v, &v->cpu.seg[SEG_SS], v->cpu.gpr[RSP], flat, 0);

    soft_stack_room(v, &s, 2 * size);
    soft_check_ip(v, d, ip);
    soft_descriptor_accessed(v, selector, &d);
    soft_stack_push(v, &s, frame, 2, size);
    soft_stack_commit(v, &s);
    commit_code(v, selector, d, ip);
}

/* A call to inner privilege: stack switch and parameter copy (vol. 3, 5.8.5). */
static void call_inner(struct soft_vcpu *v, const struct call_gate *g)
{
    u64 code = g->code, frame[STACK_MAX], params[32] = {0};
    unsigned cpl = desc_dpl(code), n = 0;
    struct stack old = soft_stack(v), s;
    struct segment ss;

    s = soft_inner_stack(v, cpl, 0, &ss);
    soft_stack_room(v, &s, (4 + g->params) * g->size);
    soft_check_ip(v, code, g->offset);
    frame[n++] = v->cpu.seg[SEG_SS].selector;
    frame[n++] = soft_saved_sp(v);
    if (g->params)
        soft_stack_pop(v, &old, params, g->params, g->size);
    for (unsigned k = g->params; k-- > 0;)
        frame[n++] = params[k];
    frame[n++] = v->cpu.seg[SEG_CS].selector;
    frame[n++] = soft_next_ip(v);
    soft_descriptor_accessed(v, g->selector, &code);
    soft_stack_push(v, &s, frame, n, g->size);

    soft_commit_segment(v, SEG_SS, ss);
    soft_stack_commit(v, &s);
    commit_code(v, g->selector, code, g->offset);
}

/* CALL ptr16:16, ptr16:32, m16:16, m16:32, m16:64 (vol. 2A, CALL, far calls) */
void op_call_far(struct soft_vcpu *v, const struct insn *i)
{
    u64 offset, d, high;
    u16 selector;
    struct call_gate g;

    far_pointer(v, i, &selector, &offset);
    if (!soft_protected(v)) {
        call_8086(v, selector, offset, i->osize);
        return;
    }
    d = far_descriptor(v, selector, &high);
    switch (far_target(v, selector, d)) {
    case FAR_CODE:
        check_direct_code(v, selector, d);
        call_same(v, selector, d, offset, i->osize, soft_code64(v));
        break;
    case FAR_CALL_GATE:
        g = read_call_gate(v, selector, d, high, false);
        if (!desc_is_conforming(g.code) && desc_dpl(g.code) < soft_cpl(v))
            call_inner(v, &g);
        else
            call_same(v, g.selector, g.code, g.offset, g.size, soft_long_mode(v));
        break;
    case FAR_TASK:
        task_transfer(v, selector, d, TASK_CALL);
        break;
    }
}

/* --- RET --- */

static void ret_8086(struct soft_vcpu *v, const struct insn *i)
{
    struct stack s = soft_stack(v);
    u64 frame[2];

    soft_stack_pop(v, &s, frame, 2, i->osize);
    if (frame[0] > (soft_vm86(v) ? 0xffff : v->cpu.seg[SEG_CS].limit))
        soft_raise_error(v, EXC_GP, 0);
    s.sp += (u16)i->imm;
    soft_stack_commit(v, &s);
    soft_set_real_segment(v, SEG_CS, (u16)frame[1]);
    soft_mode_changed(v);
    soft_set_ip(v, frame[0]);
}

/* RET far, with or without bytes to release (vol. 2B, RET) */
void op_ret_far(struct soft_vcpu *v, const struct insn *i)
{
    struct stack s = soft_stack(v), to;
    u64 frame[2], outer[2], code;
    struct segment ss;
    unsigned cpl;
    u16 selector;

    if (!soft_protected(v)) {
        ret_8086(v, i);
        return;
    }
    soft_stack_pop(v, &s, frame, 2, i->osize);
    selector = (u16)frame[1];
    code = soft_check_return_code(v, selector);
    cpl = selector_rpl(selector);
    s.sp += (u16)i->imm;
    if (cpl == soft_cpl(v)) {
        soft_check_ip(v, code, frame[0]);
        soft_descriptor_accessed(v, selector, &code);
        soft_stack_commit(v, &s);
        commit_code(v, selector, code, frame[0]);
        return;
    }
    soft_stack_pop(v, &s, outer, 2, i->osize);
    if (!selector_null((u16)outer[1])) {
        u64 d = soft_check_stack_segment(v, (u16)outer[1], cpl, EXC_GP);

        soft_check_ip(v, code, frame[0]);
        soft_descriptor_accessed(v, (u16)outer[1], &d);
        ss = soft_segment((u16)outer[1], d);
    } else {
        if (!soft_desc_is_code64(v, code) || cpl == 3)
            soft_raise_error(v, EXC_GP, 0);
        soft_check_ip(v, code, frame[0]);
        ss = soft_null_segment((u16)outer[1], cpl);
    }
    soft_descriptor_accessed(v, selector, &code);

    to = soft_stack_in(v, &ss, outer[0] + (u16)i->imm, soft_desc_is_code64(v, code), 0);
    soft_commit_segment(v, SEG_SS, ss);
    soft_stack_commit(v, &to);
    commit_code(v, selector, code, frame[0]);
    soft_drop_inner_segments(v);
}

/* --- SYSCALL and its kin --- */

static void set_flat_segment(struct soft_vcpu *v, enum segreg seg, u16 selector, u32 attr)
{
    struct segment *s = &v->cpu.seg[seg];

    s->base = 0;
    s->limit = 0xffffffff;
    s->attr = attr;
    s->selector = selector;
    v->seg_base[seg] = 0;
}

/* CS and SS as the fast system calls set them: flat, without a look at the descriptors. */
static void set_flat(struct soft_vcpu *v, u16 cs, u16 ss, unsigned cpl, bool code64)
{
    u32 common = SEG_ATTR_G | ATTR_DPL(cpl);

    set_flat_segment(v, SEG_SS, ss, common | ATTR_DATA | SEG_ATTR_DB);
    set_flat_segment(v, SEG_CS, cs, common | ATTR_CODE | (code64 ? SEG_ATTR_L : SEG_ATTR_DB));
    soft_privilege_changed(v);
}

/* SYSCALL and SYSRET look at TF when they are done: FMASK keeps the kernel's entry from a single-step
 * trap, and SYSRET traps at once, as if the SYSCALL had just completed. */
static void step_by_new_flags(struct soft_vcpu *v)
{
    if (!(v->cpu.rflags & EFLAGS_TF))
        return;
    v->cpu.db_pending |= DR6_BS;
    atomic_fetch_or(&v->attention, ATTN_SHADOW);
}

/* SYSCALL (vol. 2B; AMD APM vol. 3) */
void op_syscall(struct soft_vcpu *v, const struct insn *i)
{
    struct cpu *cpu = &v->cpu;
    bool amd = cpuid_model_is_amd(v->cpuid);
    u16 selector = (u16)(cpu->msr.star >> 32) & 0xfffc;
    u64 ip, flags = soft_flags_get(v) & ~EFLAGS_RF;

    if (!(cpu->msr.efer & EFER_SCE) || (amd ? !(cpu->cr0 & CR0_PE) : !soft_code64(v)))
        soft_raise(v, EXC_UD);
    cpu->gpr[RCX] = soft_next_ip(v);
    if (soft_long_mode(v)) {
        ip = soft_code64(v) ? cpu->msr.lstar : cpu->msr.cstar;
        cpu->gpr[R11] = flags;
        soft_flags_set(v, flags & ~cpu->msr.sfmask);
    } else {
        ip = (u32)cpu->msr.star;
        soft_flags_set(v, flags & ~(EFLAGS_VM | EFLAGS_IF));
    }
    step_by_new_flags(v);
    set_flat(v, selector, (u16)(selector + 8), 0, soft_long_mode(v));
    soft_set_ip(v, ip);
}

/* SYSRET (vol. 2B; AMD APM vol. 3). SS becomes flat on every model. */
void op_sysret(struct soft_vcpu *v, const struct insn *i)
{
    struct cpu *cpu = &v->cpu;
    bool amd = cpuid_model_is_amd(v->cpuid), to64 = i->osize == 8;
    u16 base = (u16)(cpu->msr.star >> 48);
    u64 ip = to64 ? cpu->gpr[RCX] : (u32)cpu->gpr[RCX];

    if (!(cpu->msr.efer & EFER_SCE) || (amd ? !soft_protected(v) : !soft_code64(v)))
        soft_raise(v, EXC_UD);
    soft_require_cpl0(v);
    if (to64 && !amd && !soft_canonical(v, ip))
        soft_raise_error(v, EXC_GP, 0);
    if (soft_long_mode(v))
        soft_flags_set(v, cpu->gpr[R11] & 0x3c7fd7);
    else
        cpu->rflags |= EFLAGS_IF;
    step_by_new_flags(v);
    set_flat(v, (u16)((to64 ? base + 16 : base) | 3), (u16)((base + 8) | 3), 3, to64);
    soft_interrupts_open(v);
    soft_set_ip(v, ip);
}

static void check_sysenter(struct soft_vcpu *v)
{
    if (cpuid_model_is_amd(v->cpuid) && soft_long_mode(v))
        soft_raise(v, EXC_UD);
    if (!(v->cpu.cr0 & CR0_PE))
        soft_raise_error(v, EXC_GP, 0);
}

/* SYSENTER (vol. 2B) */
void op_sysenter(struct soft_vcpu *v, const struct insn *i)
{
    struct cpu *cpu = &v->cpu;
    u16 selector = (u16)cpu->msr.sysenter_cs & 0xfffc;
    bool wide = soft_long_mode(v);

    check_sysenter(v);
    if (!selector)
        soft_raise_error(v, EXC_GP, 0);
    cpu->rflags &= ~(EFLAGS_VM | EFLAGS_IF | EFLAGS_RF);
    set_flat(v, selector, (u16)(selector + 8), 0, wide);
    cpu->gpr[RSP] = wide ? cpu->msr.sysenter_esp : (u32)cpu->msr.sysenter_esp;
    soft_set_ip(v, wide ? cpu->msr.sysenter_eip : (u32)cpu->msr.sysenter_eip);
}

/* SYSEXIT (vol. 2B) */
void op_sysexit(struct soft_vcpu *v, const struct insn *i)
{
    struct cpu *cpu = &v->cpu;
    u16 selector = (u16)cpu->msr.sysenter_cs & 0xfffc;
    bool to64 = i->osize == 8;
    u64 ip = cpu->gpr[RDX], sp = cpu->gpr[RCX];

    check_sysenter(v);
    if (!selector)
        soft_raise_error(v, EXC_GP, 0);
    soft_require_cpl0(v);
    if (to64 && (!soft_canonical(v, ip) || !soft_canonical(v, sp)))
        soft_raise_error(v, EXC_GP, 0);
    selector = (u16)(selector + (to64 ? 32 : 16));
    set_flat(v, selector | 3, (u16)((selector + 8) | 3), 3, to64);
    cpu->gpr[RSP] = to64 ? sp : (u32)sp;
    soft_set_ip(v, to64 ? ip : (u32)ip);
}

/* SWAPGS (vol. 2B) */
void op_swapgs(struct soft_vcpu *v, const struct insn *i)
{
    u64 base = v->cpu.msr.kernel_gs_base;

    if (!soft_code64(v))
        soft_raise(v, EXC_UD);
    soft_require_cpl0(v);
    v->cpu.msr.kernel_gs_base = v->cpu.seg[SEG_GS].base;
    v->cpu.seg[SEG_GS].base = base;
    v->seg_base[SEG_GS] = base;
}
