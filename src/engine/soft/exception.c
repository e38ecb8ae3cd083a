/*
 * Exceptions, interrupts and the return from them (Intel SDM vol. 3, chapter 6 and 20.3; vol. 2A, INT and
 * IRET).
 *
 * Delivery and return work in three steps: read and check everything, in the manual's order; write the
 * frame, whole or not at all; commit. A fault in the first two leaves the processor as it was.
 *
 * EXT, bit 0 of the error codes of #TS, #NP, #SS and #GP, says that the fault came while an event was
 * delivered that no instruction asked for. It follows from cpu.event_*, so soft_raise_error adds it and
 * the checks need not know.
 */
#include "engine/soft/exception.h"

#include "engine/soft/descriptor.h"
#include "engine/soft/flags.h"
#include "engine/soft/system.h"

#define ERROR_EXT 1u
#define ERROR_IDT 2u

#define DEBUGCTL_LBR BIT(0)
#define DEBUGCTL_BTF BIT(1)

/* --- Raising --- */

/* v->cur stays, for the run loop to see how far the block came. */
static _Noreturn void unwind(struct soft_vcpu *v, u8 vector, bool has_error, u32 error)
{
    v->cpu.gpr[GPR_RIP] = soft_ip(v);
    v->cpu.db_pending = 0;
    v->raised.vector = vector;
    v->raised.has_error = has_error;
    v->raised.error = error;
    longjmp(v->unwind, 1);
}

_Noreturn void soft_raise(struct soft_vcpu *v, enum exception vector)
{
    unwind(v, (u8)vector, false, 0);
}

static bool event_is_external(const struct cpu *cpu)
{
    return cpu->event_pending && cpu->event_type != CPU_EVENT_SOFT_INT &&
           cpu->event_type != CPU_EVENT_SOFT_EXC;
}

_Noreturn void soft_raise_error(struct soft_vcpu *v, enum exception vector, u32 error)
{
    if (vector >= EXC_TS && vector <= EXC_GP && event_is_external(&v->cpu))
        error |= ERROR_EXT;
    unwind(v, (u8)vector, true, error);
}

_Noreturn void soft_raise_page_fault(struct soft_vcpu *v, gva_t lin, u32 error)
{
    v->cpu.cr2 = lin;
    unwind(v, EXC_PF, true, error);
}

/* --- Combining (vol. 3, table 6-5) --- */

enum severity { BENIGN, CONTRIBUTORY, PAGE_FAULT, DOUBLE_FAULT };

static enum severity severity(u8 vector)
{
    switch (vector) {
    case EXC_DE:
    case EXC_TS:
    case EXC_NP:
    case EXC_SS:
    case EXC_GP:
        return CONTRIBUTORY;
    case EXC_PF:
        return PAGE_FAULT;
    case EXC_DF:
        return DOUBLE_FAULT;
    default:
        return BENIGN;
    }
}

int soft_combine(u8 first, enum cpu_event_type first_type, u8 second)
{
    enum severity a = first_type == CPU_EVENT_EXCEPTION ? severity(first) : BENIGN;
    enum severity b = severity(second);

    if (a == BENIGN || b == BENIGN)
        return second;
    if (a == DOUBLE_FAULT)
        return -1;
    if (a == CONTRIBUTORY && b == PAGE_FAULT)
        return second;
    return EXC_DF;
}

/* --- Delivery --- */

static bool vector_is_fault(u8 vector)
{
    return vector != EXC_DB && vector != EXC_BP && vector != EXC_OF && vector != EXC_DF &&
           vector != EXC_MC;
}

/* RF: vol. 3, 17.3.1.1. */
u64 soft_event_flags(const struct soft_vcpu *v)
{
    u64 flags = soft_flags_get(v);

    if (soft_inside_repeated(v) ||
        (v->cpu.event_type == CPU_EVENT_EXCEPTION && vector_is_fault(v->cpu.event_vector)))
        flags |= EFLAGS_RF;
    return flags;
}

/* Through the interrupt-vector table of real-address mode, and of virtual-8086 mode under VME: four
 * bytes a vector (vol. 3, 20.1.4). `flags` is the image to push. */
static void deliver_8086(struct soft_vcpu *v, gva_t table, u8 vector, u64 flags, u64 return_ip)
{
    u32 entry = (u32)soft_system_load(v, table + vector * 4u, 4);
    u64 frame[] = {flags, v->cpu.seg[SEG_CS].selector, return_ip};
    struct stack s = soft_stack(v);

    if ((entry & 0xffff) > v->cpu.seg[SEG_CS].limit)
        soft_raise_error(v, EXC_GP, 0);
    soft_stack_push(v, &s, frame, ARRAY_SIZE(frame), 2);
    soft_stack_commit(v, &s);
    soft_set_real_segment(v, SEG_CS, (u16)(entry >> 16));
    soft_set_ip(v, entry & 0xffff);
}

static void deliver_real(struct soft_vcpu *v, u8 vector, u64 return_ip)
{
    struct cpu *cpu = &v->cpu;

    if (vector * 4u + 3 > cpu->idtr.limit)
        soft_raise_error(v, EXC_GP, vector * 8u + ERROR_IDT);
    deliver_8086(v, cpu->idtr.base, vector, soft_event_flags(v), return_ip);
    cpu->rflags &= ~(EFLAGS_IF | EFLAGS_TF | EFLAGS_RF | EFLAGS_AC);
}

/* What the gate of an interrupt says, read and checked. */
struct gate {
    u16 selector;
    u64 offset;
    unsigned type; /* enum system_segment_type */
    unsigned ist;
};

static struct gate read_gate(struct soft_vcpu *v, u8 vector)
{
    const struct cpu *cpu = &v->cpu;
    bool wide = soft_long_mode(v), asked;
    u32 size = wide ? 16 : 8, error = vector * 8u + ERROR_IDT;
    struct gate g = {0};
    u64 d, high = 0;

    if (vector * size + size - 1 > cpu->idtr.limit)
        soft_raise_error(v, EXC_GP, error);
    d = soft_system_load(v, cpu->idtr.base + vector * size, 8);
    if (wide)
        high = soft_system_load(v, cpu->idtr.base + vector * size + 8, 8);
    g.type = desc_type(d);
    g.selector = gate_selector(d);
    g.offset = gate_offset(d) | (high & 0xffffffff) << 32;
    g.ist = wide ? (d >> 32) & 7 : 0;

    if (!desc_is_system(d))
        soft_raise_error(v, EXC_GP, error);
    switch (g.type) {
    case SYSSEG_INTGATE32:
    case SYSSEG_TRAPGATE32:
        break;
    case SYSSEG_TASKGATE:
    case SYSSEG_INTGATE16:
    case SYSSEG_TRAPGATE16:
        if (!wide)
            break;
        soft_raise_error(v, EXC_GP, error);
    default:
        soft_raise_error(v, EXC_GP, error);
    }
    asked = cpu->event_type == CPU_EVENT_SOFT_INT || cpu->event_type == CPU_EVENT_SOFT_EXC;
    if (asked && desc_dpl(d) < soft_cpl(v))
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    return g;
}

/* The handler's code segment (vol. 2A, INT n, TRAP-OR-INTERRUPT-GATE). */
static u64 handler_code(struct soft_vcpu *v, u16 selector)
{
    u32 error = selector_error(selector);
    u64 d;

    if (selector_null(selector))
        soft_raise_error(v, EXC_GP, 0);
    if (!soft_read_descriptor(v, selector, &d) || !desc_is_code(d) || desc_dpl(d) > soft_cpl(v))
        soft_raise_error(v, EXC_GP, error);
    if (soft_long_mode(v) && (!desc_long(d) || desc_db(d)))
        soft_raise_error(v, EXC_GP, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    if (soft_vm86(v) && (desc_is_conforming(d) || desc_dpl(d) != 0))
        soft_raise_error(v, EXC_GP, error);
    return d;
}

/* Through an interrupt or trap gate. */
static void deliver_gate(struct soft_vcpu *v, const struct gate *g, bool has_error, u32 error,
                         u64 return_ip)
{
    struct cpu *cpu = &v->cpu;
    bool wide = soft_long_mode(v), from_vm86 = soft_vm86(v);
    u64 code = handler_code(v, g->selector), frame[10];
    unsigned cpl = desc_is_conforming(code) ? soft_cpl(v) : desc_dpl(code);
    unsigned size = wide ? 8 : g->type & 8 ? 4 : 2, n = 0;
    bool inner = cpl < soft_cpl(v);
    struct segment ss = cpu->seg[SEG_SS];
    struct stack s;

    if (inner || g->ist)
        s = soft_inner_stack(v, cpl, g->ist, &ss);
    else
        s = soft_stack_in(v, &ss, cpu->gpr[RSP], wide, 0);
    if (wide)
        s.sp &= ~15ULL;
    if (from_vm86) {
        frame[n++] = cpu->seg[SEG_GS].selector;
        frame[n++] = cpu->seg[SEG_FS].selector;
        frame[n++] = cpu->seg[SEG_DS].selector;
        frame[n++] = cpu->seg[SEG_ES].selector;
    }
    if (inner || wide) {
        frame[n++] = cpu->seg[SEG_SS].selector;
        frame[n++] = soft_saved_sp(v);
    }
    frame[n++] = soft_event_flags(v);
    frame[n++] = cpu->seg[SEG_CS].selector;
    frame[n++] = return_ip;
    if (has_error)
        frame[n++] = error;

    soft_stack_room(v, &s, n * size);
    soft_check_ip(v, code, g->offset);
    soft_descriptor_accessed(v, g->selector, &code);
    soft_stack_push(v, &s, frame, n, size);

    if (from_vm86)
        for (unsigned seg = SEG_ES; seg < SEG_COUNT; seg++)
            if (seg != SEG_CS && seg != SEG_SS)
                soft_commit_segment(v, seg, soft_null_segment(0, 0));
    if (inner)
        soft_commit_segment(v, SEG_SS, ss);
    soft_commit_segment(v, SEG_CS, soft_segment((u16)((g->selector & ~3u) | cpl), code));
    soft_stack_commit(v, &s);
    cpu->rflags &= ~(EFLAGS_TF | EFLAGS_NT | EFLAGS_VM | EFLAGS_RF);
    if (!(g->type & 1))
        cpu->rflags &= ~EFLAGS_IF;
    soft_set_ip(v, g->offset);
}

/* Delivers an event that saves return_ip. A fault leaves v->cur's instruction to be pointed at. */
static void deliver(struct soft_vcpu *v, u8 vector, enum cpu_event_type type, bool has_error,
                    u32 error, u64 return_ip)
{
    struct cpu *cpu = &v->cpu;

    cpu->event_pending = true;
    cpu->event_vector = vector;
    cpu->event_type = (u8)type;
    cpu->event_has_error = has_error;
    cpu->event_error = error;
    if (type == CPU_EVENT_NMI)
        cpu->nmi_blocked = true;

    if (!(cpu->cr0 & CR0_PE)) {
        deliver_real(v, vector, return_ip);
    } else {
        struct gate g = read_gate(v, vector);

        if (g.type == SYSSEG_TASKGATE)
            soft_task_switch(v, g.selector, TASK_GATE, return_ip, has_error, error);
        else
            deliver_gate(v, &g, has_error, error, return_ip);
    }
    if (vector == EXC_DB && (type == CPU_EVENT_EXCEPTION || type == CPU_EVENT_PRIV_EXC)) {
        cpu->dr[7] &= ~DR7_GD;
        cpu->msr.debugctl &= ~(DEBUGCTL_LBR | DEBUGCTL_BTF);
    }
    cpu->event_pending = false;
    cpu->event_vector = 0;
    cpu->event_type = 0;
    cpu->event_has_error = false;
    cpu->event_error = 0;
    soft_privilege_changed(v);
}

void soft_deliver(struct soft_vcpu *v, u8 vector, enum cpu_event_type type, bool has_error,
                  u32 error)
{
    deliver(v, vector, type, has_error, error, v->cpu.gpr[GPR_RIP]);
    v->repeat_icount = 0;
}

/* --- Software interrupts --- */

/*
 * Virtual-8086 mode under CR4.VME: whether the task's redirection bitmap sends INT n to the 8086
 * program's own handler (vol. 3, 20.3.3 and figure 20-5). The bitmap is the 32 bytes below the I/O map.
 */
static bool vme_redirects(struct soft_vcpu *v, u8 vector)
{
    const struct segment *tr = &v->cpu.tr;
    u32 map;

    if (tr->limit < 103)
        soft_raise_error(v, EXC_GP, 0);
    map = (u32)soft_system_load(v, tr->base + 102, 2);
    if (map < 32 || map - 32 + vector / 8u > tr->limit)
        soft_raise_error(v, EXC_GP, 0);
    return !(soft_system_load(v, tr->base + map - 32 + vector / 8u, 1) & BIT(vector % 8));
}

/* Methods 5 and 6 of vol. 3, 20.3.3. With IOPL below 3 the program sees VIF in IF's place. */
static void vme_deliver(struct soft_vcpu *v, u8 vector)
{
    struct cpu *cpu = &v->cpu;
    u64 flags = soft_flags_get(v);
    bool virtual_if = (flags & EFLAGS_IOPL) != EFLAGS_IOPL;

    if (virtual_if) {
        flags = (flags & ~EFLAGS_IF) | EFLAGS_IOPL;
        if (flags & EFLAGS_VIF)
            flags |= EFLAGS_IF;
    }
    deliver_8086(v, 0, vector, flags, soft_next_ip(v));
    cpu->rflags &= ~(EFLAGS_TF | EFLAGS_RF | (virtual_if ? EFLAGS_VIF : EFLAGS_IF));
    soft_mode_changed(v);
}

/* INT n (vol. 2A) */
void op_int(struct soft_vcpu *v, const struct insn *i)
{
    u8 vector = (u8)i->imm;

    if (soft_vm86(v)) {
        if ((v->cpu.cr4 & CR4_VME) && vme_redirects(v, vector)) {
            vme_deliver(v, vector);
            return;
        }
        if ((v->cpu.rflags & EFLAGS_IOPL) != EFLAGS_IOPL)
            soft_raise_error(v, EXC_GP, 0);
    }
    deliver(v, vector, CPU_EVENT_SOFT_INT, false, 0, soft_next_ip(v));
}

/* INT1: #DB without a trace in DR6, past all privilege checks (vol. 2A, INT n). */
void op_int1(struct soft_vcpu *v, const struct insn *i)
{
    deliver(v, EXC_DB, CPU_EVENT_PRIV_EXC, false, 0, soft_next_ip(v));
}

/* INT3: IOPL and VME's redirection have no part in it (vol. 3, 20.3.3). */
void op_int3(struct soft_vcpu *v, const struct insn *i)
{
    deliver(v, EXC_BP, CPU_EVENT_SOFT_EXC, false, 0, soft_next_ip(v));
}

void op_into(struct soft_vcpu *v, const struct insn *i)
{
    if (soft_flags_get(v) & EFLAGS_OF)
        deliver(v, EXC_OF, CPU_EVENT_SOFT_EXC, false, 0, soft_next_ip(v));
}

/* BOUND (vol. 2A): signed index against two bounds in memory. */
void op_bound(struct soft_vcpu *v, const struct insn *i)
{
    gva_t lin = insn_linear(v, i, 2u * i->osize, ACCESS_READ);
    unsigned access = i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ;
    u64 low = soft_load(v, lin, i->osize, access);
    u64 high = soft_load(v, lin + i->osize, i->osize, access), index = v->cpu.gpr[i->reg];
    bool inside = i->osize == 2 ? (s16)index >= (s16)low && (s16)index <= (s16)high
                                : (s32)index >= (s32)low && (s32)index <= (s32)high;

    if (!inside)
        soft_raise(v, EXC_BR);
}

/* --- IRET --- */

/* Flags that IRET and POPF set whatever the privilege. */
#define FLAGS_PLAIN (EFLAGS_ARITH | EFLAGS_TF | EFLAGS_DF | EFLAGS_NT)

static void iret_real(struct soft_vcpu *v, unsigned size)
{
    struct stack s = soft_stack(v);
    u64 keep = EFLAGS_VM | EFLAGS_VIF | EFLAGS_VIP, old = soft_flags_get(v), frame[3];

    soft_stack_pop(v, &s, frame, 3, size);
    if (frame[0] > v->cpu.seg[SEG_CS].limit)
        soft_raise_error(v, EXC_GP, 0);
    if (size == 2)
        keep |= ~0xffffULL;
    soft_stack_commit(v, &s);
    soft_set_real_segment(v, SEG_CS, (u16)frame[1]);
    soft_flags_set(v, (old & keep & ~EFLAGS_RF) | (frame[2] & 0x257fd5 & ~keep));
    soft_set_ip(v, frame[0]);
}

/* In virtual-8086 mode (vol. 3, 20.2.7 and 20.3.3): by IOPL, or by VME with VIF for IF. */
static void iret_vm86(struct soft_vcpu *v, unsigned size)
{
    struct stack s = soft_stack(v);
    u64 keep = EFLAGS_VM | EFLAGS_IOPL | EFLAGS_VIF | EFLAGS_VIP;
    u64 old = soft_flags_get(v), frame[3], flags;
    bool by_vme = (old & EFLAGS_IOPL) != EFLAGS_IOPL;

    if (by_vme && (!(v->cpu.cr4 & CR4_VME) || size != 2))
        soft_raise_error(v, EXC_GP, 0);
    soft_stack_pop(v, &s, frame, 3, size);
    if (frame[0] > v->cpu.seg[SEG_CS].limit)
        soft_raise_error(v, EXC_GP, 0);
    flags = frame[2];
    if (size == 2)
        keep |= ~0xffffULL;
    if (by_vme) {
        if ((flags & EFLAGS_TF) || ((flags & EFLAGS_IF) && (old & EFLAGS_VIP)))
            soft_raise_error(v, EXC_GP, 0);
        old = flags & EFLAGS_IF ? old | EFLAGS_VIF : old & ~EFLAGS_VIF;
        keep |= EFLAGS_IF;
    }
    soft_stack_commit(v, &s);
    soft_set_real_segment(v, SEG_CS, (u16)frame[1]);
    soft_flags_set(v, (old & keep & ~EFLAGS_RF) | (flags & 0x257fd5 & ~keep));
    soft_set_ip(v, frame[0]);
}

/* From protected mode to virtual-8086 mode: frame holds EIP, CS, EFLAGS; ESP to GS follow. */
static void iret_to_vm86(struct soft_vcpu *v, struct stack *s, const u64 *frame)
{
    static const u8 order[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    u64 rest[6];

    soft_stack_pop(v, s, rest, 6, 4);
    if (frame[0] > 0xffff)
        soft_raise_error(v, EXC_GP, 0);
    soft_flags_set(v, frame[2] & (0x3f7fd5ULL | EFLAGS_VM));
    soft_set_real_segment(v, SEG_CS, (u16)frame[1]);
    soft_set_real_segment(v, SEG_SS, (u16)rest[1]);
    for (unsigned n = 0; n < ARRAY_SIZE(order); n++)
        soft_set_real_segment(v, order[n], (u16)rest[2 + n]);
    v->cpu.gpr[RSP] = rest[0];
    soft_set_ip(v, frame[0]);
}

/* The flags after an IRET in protected mode, by the privilege it was executed at. */
static u64 iret_flags(const struct soft_vcpu *v, u64 flags, unsigned size)
{
    u64 change = FLAGS_PLAIN, old = soft_flags_get(v);
    unsigned cpl = soft_cpl(v), iopl = (old & EFLAGS_IOPL) >> EFLAGS_IOPL_SHIFT;

    if (size >= 4)
        change |= EFLAGS_RF | EFLAGS_AC | EFLAGS_ID;
    if (cpl <= iopl)
        change |= EFLAGS_IF;
    if (cpl == 0) {
        change |= EFLAGS_IOPL;
        if (size >= 4)
            change |= EFLAGS_VIF | EFLAGS_VIP;
    }
    return (old & ~change & ~(size < 4 ? EFLAGS_RF : 0)) | (flags & change);
}

static void iret_protected(struct soft_vcpu *v, unsigned size)
{
    struct cpu *cpu = &v->cpu;
    struct stack s = soft_stack(v);
    u64 frame[3], outer[2], code, flags;
    struct segment ss = cpu->seg[SEG_SS];
    bool from64 = soft_code64(v), to64, lower;
    u16 selector;
    unsigned cpl;

    if (cpu->rflags & EFLAGS_NT) {
        if (soft_long_mode(v))
            soft_raise_error(v, EXC_GP, 0);
        soft_task_switch(v, (u16)soft_system_load(v, cpu->tr.base, 2), TASK_IRET, soft_next_ip(v),
                         false, 0);
        return;
    }
    soft_stack_pop(v, &s, frame, 3, size);
    if ((frame[2] & EFLAGS_VM) && size == 4 && soft_cpl(v) == 0 && !soft_long_mode(v)) {
        iret_to_vm86(v, &s, frame);
        return;
    }
    selector = (u16)frame[1];
    code = soft_check_return_code(v, selector);
    to64 = soft_desc_is_code64(v, code);
    cpl = selector_rpl(selector);
    lower = cpl > soft_cpl(v);
    if (lower || from64) {
        soft_stack_pop(v, &s, outer, 2, size);
        ss = soft_null_segment((u16)outer[1], cpl);
        if (!selector_null((u16)outer[1])) {
            u64 d = soft_check_stack_segment(v, (u16)outer[1], cpl, EXC_GP);

            soft_check_ip(v, code, frame[0]);
            soft_descriptor_accessed(v, (u16)outer[1], &d);
            ss = soft_segment((u16)outer[1], d);
        } else if (!to64 || cpl == 3) {
            soft_raise_error(v, EXC_GP, 0);
        }
    }
    soft_check_ip(v, code, frame[0]);
    soft_descriptor_accessed(v, selector, &code);

    flags = iret_flags(v, frame[2], size);
    soft_commit_segment(v, SEG_CS, soft_segment(selector, code));
    if (lower || from64) {
        struct stack to = soft_stack_in(v, &ss, outer[0], to64, 0);

        soft_commit_segment(v, SEG_SS, ss);
        soft_stack_commit(v, &to);
    } else {
        soft_stack_commit(v, &s);
    }
    if (lower)
        soft_drop_inner_segments(v);
    soft_flags_set(v, flags);
    soft_set_ip(v, frame[0]);
}

/* IRET, IRETD, IRETQ (vol. 2A). It unblocks NMIs even when it faults (vol. 3, 6.7.1). */
void op_iret(struct soft_vcpu *v, const struct insn *i)
{
    struct cpu *cpu = &v->cpu;

    if (cpu->nmi_blocked) {
        cpu->nmi_blocked = false;
        if (cpu->nmi_pending)
            atomic_fetch_or(&v->attention, ATTN_NMI);
    }
    if (!(cpu->cr0 & CR0_PE))
        iret_real(v, i->osize);
    else if (soft_vm86(v))
        iret_vm86(v, i->osize);
    else
        iret_protected(v, i->osize);
    soft_privilege_changed(v);
    soft_interrupts_open(v);
}
