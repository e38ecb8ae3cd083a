/*
 * Numbers of the model-specific registers: MSR_IA32_EFER and so on, from msr.def.
 */
#ifndef DOPPEL_X86_MSR_H
#define DOPPEL_X86_MSR_H

enum msr_number {
#define MSR_STORED(name, number, needs, vendor, field, reset, writable) MSR_##name = number,
#define MSR_KEPT(name, number, needs, vendor, field, reset, writable) MSR_##name = number,
#define MSR_CONST(name, number, needs, vendor, value) MSR_##name = number,
#define MSR_QUIET(name, number, needs, vendor, value) MSR_##name = number,
#define MSR_SPECIAL(name, number, needs, vendor) MSR_##name = number,
#include "x86/msr.def"
#undef MSR_STORED
#undef MSR_KEPT
#undef MSR_CONST
#undef MSR_QUIET
#undef MSR_SPECIAL
};

/* The range through which an x2APIC's registers are reached. */
#define MSR_X2APIC_FIRST 0x800u
#define MSR_X2APIC_LAST 0x8ffu

#endif
