/*
 * Debug registers, breakpoints and single step (Intel SDM vol. 3, chapter 17).
 */
#ifndef DOPPEL_ENGINE_SOFT_DEBUG_H
#define DOPPEL_ENGINE_SOFT_DEBUG_H

#include "engine/soft/vcpu.h"

/* Whether DR7 enables any breakpoint on instructions; on data. */
bool soft_code_breakpoints_enabled(const struct soft_vcpu *v);
bool soft_data_breakpoints_enabled(const struct soft_vcpu *v);

/*
 * Before an instruction (RIP exact): true when a breakpoint on it matches and EFLAGS.RF is clear. DR6
 * is set then; the caller delivers #DB as an exception, with RIP on the instruction.
 */
bool soft_code_breakpoint(struct soft_vcpu *v);

/* A data access of n bytes at lin, from the MMU's slow path: notes matches in cpu.db_pending. */
void soft_data_access(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access);
/* The same for a port. */
void soft_io_access(struct soft_vcpu *v, u16 port, unsigned size);

/*
 * Takes the debug trap that cpu.db_pending says is due after an instruction: sets DR6, clears db_pending
 * and delivers #DB. Conditions as for soft_deliver; RIP is the next instruction's. The run loop adds
 * DR6_BS to db_pending when EFLAGS.TF was set as the instruction began.
 */
void soft_debug_trap(struct soft_vcpu *v);

#endif
