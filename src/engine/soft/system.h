/*
 * System instructions and far transfers: handlers that the decoder picks by itself because their
 * mnemonics are shared with plain instructions (all others are in system_insns, decode.h), and what the
 * neighbours of system.c share.
 */
#ifndef DOPPEL_ENGINE_SOFT_SYSTEM_H
#define DOPPEL_ENGINE_SOFT_SYSTEM_H

#include "engine/soft/vcpu.h"

typedef void system_fn(struct soft_vcpu *v, const struct insn *i);

/* reg: the control, debug or segment register; rm: the general register, or memory. */
system_fn op_mov_from_cr, op_mov_to_cr, op_mov_from_dr, op_mov_to_dr;
system_fn op_mov_from_sreg, op_mov_to_sreg;
/* reg: enum segreg. */
system_fn op_push_sreg, op_pop_sreg;
/* Memory m16:16, m16:32, m16:64; or imm: offset, ext: selector. RET: imm bytes to release. */
system_fn op_jmp_far, op_call_far, op_ret_far;

/* exception.c */
system_fn op_int, op_int1, op_int3, op_into, op_bound, op_iret;

/* segment.c */
system_fn op_lds, op_les, op_lfs, op_lgs, op_lss, op_lar, op_lsl, op_verr, op_verw, op_arpl;
system_fn op_sgdt, op_sidt, op_lgdt, op_lidt, op_sldt, op_lldt, op_str, op_ltr;

/* far.c */
system_fn op_syscall, op_sysret, op_sysenter, op_sysexit, op_swapgs;

/* #GP(0) unless CPL is 0. */
void soft_require_cpl0(struct soft_vcpu *v);
/* #GP(0) if UMIP forbids SGDT, SIDT, SLDT, SMSW, STR here (vol. 3, 2.5, CR4.UMIP). */
void soft_check_umip(struct soft_vcpu *v);
/* EFLAGS.IF was set, or the task priority lowered: interrupts that wait are looked at again. */
void soft_interrupts_open(struct soft_vcpu *v);

#endif
