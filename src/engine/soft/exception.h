/*
 * Raising and delivering exceptions and interrupts (Intel SDM vol. 3, chapter 6).
 */
#ifndef DOPPEL_ENGINE_SOFT_EXCEPTION_H
#define DOPPEL_ENGINE_SOFT_EXCEPTION_H

#include "engine/soft/vcpu.h"

/*
 * Raises a fault at the current instruction: RIP is put on it, the run loop delivers it. error is pushed
 * by the exceptions that have one. #PF: set cpu.cr2 first (soft_raise_page_fault does).
 */
_Noreturn void soft_raise(struct soft_vcpu *v, enum exception vector);
_Noreturn void soft_raise_error(struct soft_vcpu *v, enum exception vector, u32 error);
_Noreturn void soft_raise_page_fault(struct soft_vcpu *v, gva_t lin, u32 error);

/*
 * Delivers an event through the IDT (or IVT) with RIP exact in gpr[GPR_RIP]; for software interrupts and
 * traps gpr[GPR_RIP] already is the next instruction's. Called by the run loop with v->cur =
 * &insn_none inside its unwind frame: faults during delivery are raised as any other, and the run loop
 * combines them (soft_combine) to a double or triple fault.
 * While it runs, cpu.event_* describe the event; they are cleared when delivery is complete.
 */
void soft_deliver(struct soft_vcpu *v, u8 vector, enum cpu_event_type type, bool has_error,
                  u32 error);

/*
 * What becomes of a second exception while a first was delivered (vol. 3, table 6-5): returns the
 * vector to deliver (`second`, or EXC_DF with *error = 0), or -1: triple fault.
 */
int soft_combine(u8 first, enum cpu_event_type first_type, u8 second);

#endif
