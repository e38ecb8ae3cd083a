/*
 * Stack addresses: what PUSH, POP, CALL, RET, ENTER and LEAVE share. The width of the stack pointer is
 * 64 bits in 64-bit mode, else 32 or 16 by SS.B; a narrower pointer leaves the rest of RSP alone.
 */
#ifndef DOPPEL_ENGINE_SOFT_STACK_H
#define DOPPEL_ENGINE_SOFT_STACK_H

#include "engine/soft/operand.h"

static inline u64 stack_mask(const struct soft_vcpu *v)
{
    return soft_code64(v) ? UINT64_MAX : v->mode & MODE_STACK32 ? 0xffffffff : 0xffff;
}
/* `value` in the stack pointer's width, the rest of RSP kept. A 32-bit pointer clears the upper half. */
static inline u64 stack_merge(const struct soft_vcpu *v, u64 value)
{
    u64 mask = stack_mask(v);

    return mask == 0xffff ? (v->cpu.gpr[RSP] & ~mask) | (value & mask) : value & mask;
}
/* A stack pointer moved down or up. */
static inline u64 stack_below(const struct soft_vcpu *v, u64 sp, u64 n)
{
    u64 mask = stack_mask(v);

    return mask == 0xffff ? (sp & ~mask) | ((sp - n) & mask) : (sp - n) & mask;
}
static inline u64 stack_above(const struct soft_vcpu *v, u64 sp, u64 n)
{
    return stack_below(v, sp, -n);
}

static inline gva_t stack_linear(struct soft_vcpu *v, u64 sp, unsigned size, unsigned access)
{
    if (soft_code64(v))
        return sp;
    return soft_linear(v, SEG_SS, sp & stack_mask(v), size, access);
}
/* Reads at a stack pointer. */
static inline u64 stack_load_at(struct soft_vcpu *v, u64 sp, unsigned size)
{
    return soft_load(v, stack_linear(v, sp, size, ACCESS_READ), size, ACCESS_STACK);
}
/* Raises what writing at a stack pointer would; and what a push from it would. */
static inline void stack_probe_write(struct soft_vcpu *v, u64 sp, unsigned size)
{
    soft_probe(v, stack_linear(v, sp, size, ACCESS_WRITE), size, ACCESS_WRITE | ACCESS_STACK);
}
static inline void stack_probe_at(struct soft_vcpu *v, u64 sp, unsigned size)
{
    stack_probe_write(v, stack_below(v, sp, size), size);
}

/* PUSH and POP in 64-bit mode: through the TLB at once. */
static inline void stack_push64(struct soft_vcpu *v, const struct insn *i, u64 value)
{
    gva_t lin = v->cpu.gpr[RSP] - 8;
    const struct tlb_entry *e = tlb_slot(v->tlb, lin);

    if (likely((lin ^ e->write_tag) <= GUEST_PAGE_SIZE - 8)) {
        memcpy((void *)(uintptr_t)((lin ^ e->write_tag) + e->host), &value, 8);
    } else {
        v->cur = i;
        soft_store(v, lin, value, 8, ACCESS_WRITE | ACCESS_STACK);
    }
    v->cpu.gpr[RSP] = lin;
}
static inline u64 stack_pop64(struct soft_vcpu *v, const struct insn *i)
{
    gva_t lin = v->cpu.gpr[RSP];
    const struct tlb_entry *e = tlb_slot(v->tlb, lin);
    u64 value;

    if (likely((lin ^ e->read_tag) <= GUEST_PAGE_SIZE - 8)) {
        memcpy(&value, (const void *)(uintptr_t)((lin ^ e->read_tag) + e->host), 8);
    } else {
        v->cur = i;
        value = soft_load(v, lin, 8, ACCESS_STACK);
    }
    v->cpu.gpr[RSP] = lin + 8;
    return value;
}

#endif
