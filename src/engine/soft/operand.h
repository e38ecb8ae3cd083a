/*
 * Operands of the integer handlers: registers of each size, memory, read-modify-write.
 */
#ifndef DOPPEL_ENGINE_SOFT_OPERAND_H
#define DOPPEL_ENGINE_SOFT_OPERAND_H

#include "engine/soft/interp.h"

/* 8-bit registers are numbered by their byte in cpu.gpr, so AH is byte 1. */
static inline u8 reg_get8(const struct soft_vcpu *v, unsigned r)
{
    return ((const u8 *)v->cpu.gpr)[r];
}
static inline u16 reg_get16(const struct soft_vcpu *v, unsigned r)
{
    return (u16)v->cpu.gpr[r];
}
static inline u32 reg_get32(const struct soft_vcpu *v, unsigned r)
{
    return (u32)v->cpu.gpr[r];
}
static inline u64 reg_get64(const struct soft_vcpu *v, unsigned r)
{
    return v->cpu.gpr[r];
}
static inline void reg_set8(struct soft_vcpu *v, unsigned r, u8 value)
{
    ((u8 *)v->cpu.gpr)[r] = value;
}
static inline void reg_set16(struct soft_vcpu *v, unsigned r, u16 value)
{
    memcpy(&v->cpu.gpr[r], &value, sizeof(value));
}
static inline void reg_set32(struct soft_vcpu *v, unsigned r, u32 value)
{
    v->cpu.gpr[r] = value;
}
static inline void reg_set64(struct soft_vcpu *v, unsigned r, u64 value)
{
    v->cpu.gpr[r] = value;
}

/* A register cut to an address size, and written as that size writes it. */
static inline u64 reg_get_asize(const struct soft_vcpu *v, unsigned r, unsigned asize)
{
    u64 value = v->cpu.gpr[r];

    return asize == 8 ? value : asize == 4 ? (u32)value : (u16)value;
}
static inline void reg_set_asize(struct soft_vcpu *v, unsigned r, u64 value, unsigned asize)
{
    if (asize == 2)
        reg_set16(v, r, (u16)value);
    else
        v->cpu.gpr[r] = asize == 4 ? (u32)value : value;
}

/* The memory operand, read and written. */
#define MEM_READ(bits) mem_load##bits(v, i, insn_linear(v, i, (bits) / 8, ACCESS_READ))
#define MEM_WRITE(bits, value)                                                                     \
    mem_store##bits(v, i, insn_linear(v, i, (bits) / 8, ACCESS_WRITE), (value))

/* Guest memory under a host pointer: any alignment, any type. */
typedef u8 mem_u8;
typedef u16 __attribute__((aligned(1), may_alias)) mem_u16;
typedef u32 __attribute__((aligned(1), may_alias)) mem_u32;
typedef u64 __attribute__((aligned(1), may_alias)) mem_u64;

/* Host pointer for a read-modify-write of n bytes at lin, or NULL: use soft_rmw_slow. */
static inline void *mem_rmw(struct soft_vcpu *v, const struct insn *i, gva_t lin, size_t n)
{
    const struct tlb_entry *e = tlb_slot(v->tlb, lin);

    if (likely((lin ^ e->write_tag) <= GUEST_PAGE_SIZE - n))
        return (void *)(uintptr_t)((lin ^ e->write_tag) + e->host);
    v->cur = i;
    return soft_pointer(v, lin, n, ACCESS_WRITE | (i->seg == SEG_SS ? ACCESS_STACK : 0));
}

#endif
