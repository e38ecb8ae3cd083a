/*
 * Near control transfers. Each ends its block: it makes RIP exact and returns to the run loop.
 * i->osize is the width of the new instruction pointer.
 */
#include "engine/soft/exception.h"
#include "engine/soft/integer.h"
#include "engine/soft/stack.h"

static inline u64 next_ip(const struct soft_vcpu *v, const struct insn *i)
{
    return v->cpu.gpr[GPR_RIP] + i->offset + i->len;
}

/* A target in the new pointer's width; raises #GP(0) outside the code segment or not canonical. */
static inline u64 check_target(struct soft_vcpu *v, const struct insn *i, u64 ip)
{
    if (likely(i->osize == 8)) {
        if (likely(soft_canonical(v, ip)))
            return ip;
    } else {
        ip = i->osize == 4 ? (u32)ip : (u16)ip;
        if (soft_code64(v) || ip <= v->cpu.seg[SEG_CS].limit)
            return ip;
    }
    v->cur = i;
    soft_raise_error(v, EXC_GP, 0);
}

static inline void branch(struct soft_vcpu *v, const struct insn *i, u64 ip)
{
    v->cpu.gpr[GPR_RIP] = check_target(v, i, ip);
}

static inline void fall_through(struct soft_vcpu *v, const struct insn *i)
{
    v->cpu.gpr[GPR_RIP] = soft_ip_mask(v, next_ip(v, i));
}

#define JCC(even, negate, number)                                                                  \
    static void jcc##number(struct soft_vcpu *v, const struct insn *i)                             \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        if (CONDITION_##even(f) != (negate))                                                       \
            branch(v, i, next_ip(v, i) + i->imm);                                                  \
        else                                                                                       \
            fall_through(v, i);                                                                    \
    }
#define JCC_PAIR(even, odd) JCC(even, false, even) JCC(even, true, odd)
JCC_PAIR(0, 1)
JCC_PAIR(2, 3)
JCC_PAIR(4, 5)
JCC_PAIR(6, 7)
JCC_PAIR(8, 9)
JCC_PAIR(10, 11)
JCC_PAIR(12, 13)
JCC_PAIR(14, 15)

insn_fn *const jcc_fns[16] = {
    jcc0, jcc1, jcc2,  jcc3,  jcc4,  jcc5,  jcc6,  jcc7,
    jcc8, jcc9, jcc10, jcc11, jcc12, jcc13, jcc14, jcc15,
};

void op_jmp_rel(struct soft_vcpu *v, const struct insn *i)
{
    branch(v, i, next_ip(v, i) + i->imm);
}
void op_jmp_reg(struct soft_vcpu *v, const struct insn *i)
{
    branch(v, i, v->cpu.gpr[i->dst]);
}

/* A near pointer in memory. */
static inline u64 load_pointer(struct soft_vcpu *v, const struct insn *i)
{
    if (likely(i->osize == 8))
        return MEM_READ(64);
    return i->osize == 4 ? MEM_READ(32) : MEM_READ(16);
}

void op_jmp_mem(struct soft_vcpu *v, const struct insn *i)
{
    branch(v, i, load_pointer(v, i));
}

static inline void call(struct soft_vcpu *v, const struct insn *i, u64 ip)
{
    u64 target = check_target(v, i, ip);

    if (likely(i->osize == 8)) {
        stack_push64(v, i, next_ip(v, i));
    } else {
        v->cur = i;
        soft_push(v, next_ip(v, i), i->osize);
    }
    v->cpu.gpr[GPR_RIP] = target;
}

void op_call_rel(struct soft_vcpu *v, const struct insn *i)
{
    call(v, i, next_ip(v, i) + i->imm);
}
void op_call_reg(struct soft_vcpu *v, const struct insn *i)
{
    call(v, i, v->cpu.gpr[i->dst]);
}
void op_call_mem(struct soft_vcpu *v, const struct insn *i)
{
    call(v, i, load_pointer(v, i));
}

/* RET and RET imm16. */
void op_ret(struct soft_vcpu *v, const struct insn *i)
{
    u64 old = v->cpu.gpr[RSP], ip, target;

    if (likely(i->osize == 8)) {
        ip = stack_pop64(v, i);
    } else {
        v->cur = i;
        ip = soft_pop(v, i->osize);
    }
    if (unlikely(i->osize == 8 ? !soft_canonical(v, ip) : true)) {
        u64 moved = v->cpu.gpr[RSP];

        v->cpu.gpr[RSP] = old;
        target = check_target(v, i, ip);
        v->cpu.gpr[RSP] = moved;
    } else {
        target = ip;
    }
    v->cpu.gpr[RSP] = stack_merge(v, v->cpu.gpr[RSP] + (u16)i->imm);
    v->cpu.gpr[GPR_RIP] = target;
}

void op_jrcxz(struct soft_vcpu *v, const struct insn *i)
{
    if (reg_get_asize(v, RCX, i->asize) == 0)
        branch(v, i, next_ip(v, i) + i->imm);
    else
        fall_through(v, i);
}

static inline void loop_if(struct soft_vcpu *v, const struct insn *i, bool condition)
{
    u64 count = reg_get_asize(v, RCX, i->asize) - 1;
    bool taken = reg_get_asize(v, RCX, i->asize) != 1 && condition;
    u64 target =
        taken ? check_target(v, i, next_ip(v, i) + i->imm) : soft_ip_mask(v, next_ip(v, i));

    reg_set_asize(v, RCX, count, i->asize);
    v->cpu.gpr[GPR_RIP] = target;
}

void op_loop(struct soft_vcpu *v, const struct insn *i)
{
    loop_if(v, i, true);
}
void op_loope(struct soft_vcpu *v, const struct insn *i)
{
    loop_if(v, i, v->aflags & AFLAG_ZF);
}
void op_loopne(struct soft_vcpu *v, const struct insn *i)
{
    loop_if(v, i, !(v->aflags & AFLAG_ZF));
}
