/*
 * Arithmetic flags, computed by the host's own ALU.
 *
 * The interpreter executes each arithmetic instruction with the same instruction of the host and keeps
 * the flags as LAHF and SETO leave them: bits 8 to 15 are SF ZF 0 AF 0 PF 1 CF, bit 0 is OF. So even
 * the flags that the manual leaves undefined are the real processor's. Bits 16 and up are zero.
 */
#ifndef DOPPEL_ENGINE_SOFT_FLAGS_H
#define DOPPEL_ENGINE_SOFT_FLAGS_H

#include "engine/soft/vcpu.h"

#define AFLAG_OF 0x0001u
#define AFLAG_CF 0x0100u
#define AFLAG_PF 0x0400u
#define AFLAG_AF 0x1000u
#define AFLAG_ZF 0x4000u
#define AFLAG_SF 0x8000u

static inline u64 aflags_to_eflags(u32 a)
{
    return ((a >> 8) & 0xd5) | (u64)(a & 1) << 11;
}
static inline u32 aflags_from_eflags(u64 f)
{
    return (u32)(((f & 0xd5) | 2) << 8 | ((f >> 11) & 1));
}

/*
 * For asm: the host's flags from this form in %eax (ADD makes OF from AL, SAHF the others), and back.
 * Used round an instruction that reads flags or leaves some of them alone.
 */
#define ASM_LOAD_FLAGS "addb $0x7f, %%al\n\tsahf\n\t"
#define ASM_SAVE_FLAGS "\n\tlahf\n\tseto %%al"

/* The even condition codes of Jcc, SETcc and CMOVcc (SDM vol. 1, appendix B); odd ones negate them. */
#define CONDITION_0(f) (((f)&AFLAG_OF) != 0)
#define CONDITION_2(f) (((f)&AFLAG_CF) != 0)
#define CONDITION_4(f) (((f)&AFLAG_ZF) != 0)
#define CONDITION_6(f) (((f) & (AFLAG_CF | AFLAG_ZF)) != 0)
#define CONDITION_8(f) (((f)&AFLAG_SF) != 0)
#define CONDITION_10(f) (((f)&AFLAG_PF) != 0)
#define CONDITION_12(f) (((((f) >> 15) ^ (f)) & 1) != 0) /* SF != OF */
#define CONDITION_14(f) (CONDITION_4(f) || CONDITION_12(f))

/* The whole of EFLAGS. */
static inline u64 soft_flags_get(const struct soft_vcpu *v)
{
    return (v->cpu.rflags & ~EFLAGS_ARITH) | aflags_to_eflags(v->aflags) | EFLAGS_FIXED;
}
/* Sets all of it; the caller has applied the privilege rules. Follow with soft_mode_changed when VM, TF
 * or AC may have changed. */
static inline void soft_flags_set(struct soft_vcpu *v, u64 flags)
{
    v->aflags = aflags_from_eflags(flags);
    v->cpu.rflags = (flags & ~EFLAGS_ARITH) | EFLAGS_FIXED;
}

#endif
