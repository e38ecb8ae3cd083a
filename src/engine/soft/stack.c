/*
 * The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE. The 64-bit forms are for 64-bit mode only, where the
 * stack is flat; all others go through soft_push and soft_pop.
 */
#include "engine/soft/stack.h"
#include "engine/soft/integer.h"

#define WIDE_SIZES(prefix)                                                                         \
    {                                                                                              \
        NULL, prefix##16, prefix##32, prefix##64                                                   \
    }

static void push_reg64(struct soft_vcpu *v, const struct insn *i)
{
    stack_push64(v, i, v->cpu.gpr[i->dst]);
    NEXT(v, i);
}
static void pop_reg64(struct soft_vcpu *v, const struct insn *i)
{
    u64 value = stack_pop64(v, i);

    v->cpu.gpr[i->dst] = value;
    NEXT(v, i);
}
static void push_imm64(struct soft_vcpu *v, const struct insn *i)
{
    stack_push64(v, i, i->imm);
    NEXT(v, i);
}
static void push_mem64(struct soft_vcpu *v, const struct insn *i)
{
    stack_push64(v, i, MEM_READ(64));
    NEXT(v, i);
}

#define OTHER_SIZE(bits)                                                                           \
    static void push_reg##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        v->cur = i;                                                                                \
        soft_push(v, reg_get##bits(v, i->dst), (bits) / 8);                                        \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void pop_reg##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        v->cur = i;                                                                                \
        reg_set##bits(v, i->dst, (u##bits)soft_pop(v, (bits) / 8));                                \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void push_imm##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        v->cur = i;                                                                                \
        soft_push(v, (u##bits)i->imm, (bits) / 8);                                                 \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void push_mem##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        u##bits value = MEM_READ(bits);                                                            \
                                                                                                   \
        v->cur = i;                                                                                \
        soft_push(v, value, (bits) / 8);                                                           \
        NEXT(v, i);                                                                                \
    }
OTHER_SIZE(16)
OTHER_SIZE(32)

/* The address of POP's memory operand is computed after (E/R)SP was incremented. */
#define POP_MEM(bits)                                                                              \
    static void pop_mem##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        u64 old = v->cpu.gpr[RSP], moved, value;                                                   \
        gva_t lin;                                                                                 \
                                                                                                   \
        v->cur = i;                                                                                \
        value = soft_pop(v, (bits) / 8);                                                           \
        moved = v->cpu.gpr[RSP];                                                                   \
        if (i->address == ADDRESS_FLAT) {                                                          \
            lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                     \
            v->cpu.gpr[RSP] = old;                                                                 \
        } else {                                                                                   \
            u64 offset = insn_offset(v, i);                                                        \
                                                                                                   \
            v->cpu.gpr[RSP] = old;                                                                 \
            lin = soft_linear(v, i->seg, offset, (bits) / 8, ACCESS_WRITE);                        \
        }                                                                                          \
        mem_store##bits(v, i, lin, (u##bits)value);                                                \
        v->cpu.gpr[RSP] = moved;                                                                   \
        NEXT(v, i);                                                                                \
    }
POP_MEM(16)
POP_MEM(32)
POP_MEM(64)

insn_fn *const push_reg_fns[4] = WIDE_SIZES(push_reg);
insn_fn *const pop_reg_fns[4] = WIDE_SIZES(pop_reg);
insn_fn *const push_imm_fns[4] = WIDE_SIZES(push_imm);
insn_fn *const push_mem_fns[4] = WIDE_SIZES(push_mem);
insn_fn *const pop_mem_fns[4] = WIDE_SIZES(pop_mem);

void op_pusha(struct soft_vcpu *v, const struct insn *i)
{
    u64 old = v->cpu.gpr[RSP], moved;

    v->cur = i;
    /* All eight or none: probe the far end first, by pushing with RSP put back before a fault. */
    for (unsigned r = RAX; r <= RDI; r++) {
        moved = v->cpu.gpr[RSP];
        v->cpu.gpr[RSP] = old;
        stack_probe_at(v, moved, i->osize);
        v->cpu.gpr[RSP] = stack_below(v, moved, i->osize);
    }
    v->cpu.gpr[RSP] = old;
    for (unsigned r = RAX; r <= RDI; r++)
        soft_push(v, r == RSP ? old : v->cpu.gpr[r], i->osize);
    NEXT(v, i);
}

void op_popa(struct soft_vcpu *v, const struct insn *i)
{
    u64 old = v->cpu.gpr[RSP], values[8];

    v->cur = i;
    for (unsigned n = 0; n < 8; n++) {
        u64 at = v->cpu.gpr[RSP];

        v->cpu.gpr[RSP] = old;
        values[7 - n] = stack_load_at(v, at, i->osize);
        v->cpu.gpr[RSP] = stack_above(v, at, i->osize);
    }
    for (unsigned r = RAX; r <= RDI; r++) {
        if (r == RSP)
            continue;
        if (i->osize == 2)
            reg_set16(v, r, (u16)values[r]);
        else
            reg_set32(v, r, (u32)values[r]);
    }
    NEXT(v, i);
}

/* Writes below *sp and moves it; RSP stays until the instruction is done. */
static void enter_push(struct soft_vcpu *v, u64 *sp, u64 value, unsigned size)
{
    u64 to = stack_below(v, *sp, size);

    soft_store(v, stack_linear(v, to, size, ACCESS_WRITE), value, size,
               ACCESS_WRITE | ACCESS_STACK);
    *sp = to;
}

/*
 * ENTER size, level (SDM vol. 2A). i->imm: size; i->imm2: level. It reads and writes by turns, so a fault
 * leaves what was written below RSP, which the instruction writes again when it is restarted.
 */
void op_enter(struct soft_vcpu *v, const struct insn *i)
{
    u64 sp = v->cpu.gpr[RSP], rbp = v->cpu.gpr[RBP], frame;
    unsigned level = i->imm2 & 31, size = i->osize;

    v->cur = i;
    enter_push(v, &sp, rbp, size);
    frame = sp;
    for (unsigned n = 1; n < level; n++) {
        rbp = stack_below(v, rbp, size);
        enter_push(v, &sp, stack_load_at(v, rbp, size), size);
    }
    if (level)
        enter_push(v, &sp, frame, size);
    sp = stack_below(v, sp, (u16)i->imm);
    stack_probe_write(v, sp, size);

    v->cpu.gpr[RSP] = sp;
    if (size == 2)
        reg_set16(v, RBP, (u16)frame);
    else
        v->cpu.gpr[RBP] = size == 4 ? (u32)frame : frame;
    NEXT(v, i);
}

void op_leave(struct soft_vcpu *v, const struct insn *i)
{
    u64 value, at = v->cpu.gpr[RBP];

    v->cur = i;
    value = stack_load_at(v, at, i->osize);
    v->cpu.gpr[RSP] = stack_above(v, stack_merge(v, at), i->osize);
    if (i->osize == 2)
        reg_set16(v, RBP, (u16)value);
    else
        v->cpu.gpr[RBP] = i->osize == 4 ? (u32)value : value;
    NEXT(v, i);
}
