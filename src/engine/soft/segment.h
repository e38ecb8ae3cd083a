/*
 * Segmentation: descriptor loads with all their checks, addresses through segments, and the far
 * transfers (Intel SDM vol. 3, chapters 3, 5 and 7).
 */
#ifndef DOPPEL_ENGINE_SOFT_SEGMENT_H
#define DOPPEL_ENGINE_SOFT_SEGMENT_H

#include "engine/soft/mmu.h"
#include "engine/soft/vcpu.h"

/*
 * Linear address of a `size`-byte access at `offset` (already cut to the address size) in a segment,
 * outside 64-bit flat addressing: null, type and limit checks (#GP(0), #SS(0)), base added, cut to 32
 * bits outside 64-bit mode. access: ACCESS_READ or ACCESS_WRITE.
 */
gva_t soft_linear(struct soft_vcpu *v, unsigned seg, u64 offset, unsigned size, unsigned access);

/* Effective address of i's memory operand: the offset in its segment, cut to the address size. */
static inline u64 insn_offset(const struct soft_vcpu *v, const struct insn *i)
{
    u64 ea = v->cpu.gpr[i->base] + (v->cpu.gpr[i->index] << i->scale) + (u64)i->disp;

    return i->asize == 8 ? ea : i->asize == 4 ? (u32)ea : (u16)ea;
}

/* Linear address of i's memory operand for an access of `size` bytes. */
static inline __attribute__((always_inline)) gva_t
insn_linear(struct soft_vcpu *v, const struct insn *i, unsigned size, unsigned access)
{
    if (likely(i->address == ADDRESS_FLAT))
        return v->cpu.gpr[i->base] + (v->cpu.gpr[i->index] << i->scale) + (u64)i->disp +
               v->seg_base[i->seg];
    v->cur = i;
    return soft_linear(v, i->seg, insn_offset(v, i), size, access);
}

/* The r/m operand of rarely run instructions: register i->rm or memory. size 1 is never a register
 * here. Writing 4 bytes to a register clears its upper half, 2 bytes leave the rest. */
u64 insn_read_rm(struct soft_vcpu *v, const struct insn *i, unsigned size);
void insn_write_rm(struct soft_vcpu *v, const struct insn *i, u64 value, unsigned size);

/* Stack accesses at the current privilege: size 2, 4 or 8. They move (E/R)SP as the stack's size asks. */
void soft_push(struct soft_vcpu *v, u64 value, unsigned size);
u64 soft_pop(struct soft_vcpu *v, unsigned size);

/* MOV to and POP into ES, SS, DS, FS, GS (and LxS): in every mode, with all checks. */
void soft_load_segment(struct soft_vcpu *v, enum segreg seg, u16 selector);
/* A real-mode or virtual-8086 segment value. */
void soft_set_real_segment(struct soft_vcpu *v, enum segreg seg, u16 selector);

/* A task switch (vol. 3, 7.3). source: how it came about. next_ip: saved in the old TSS. */
enum task_switch_source { TASK_JMP, TASK_CALL, TASK_IRET, TASK_GATE };
void soft_task_switch(struct soft_vcpu *v, u16 selector, enum task_switch_source source,
                      u64 next_ip, bool has_error, u32 error);

#endif
