/*
 * Several processors (64-bit guests): started by INIT and start-up IPI, then all run the same function.
 */
#ifndef GUEST_SMP_H
#define GUEST_SMP_H

#include "guest.h"

#define SMP_MAX 8

/* Starts the others, and turns all local APICs on. Returns how many processors there are, SMP_MAX at most. */
unsigned smp_start(void);
/* Runs job(n) on processors 0 to count - 1 at once, the caller's being 0; returns when all are done. */
void smp_run(unsigned count, void (*job)(unsigned cpu));
/* The number of this processor: its APIC ID. */
unsigned smp_cpu(void);

/* The local APIC, by MMIO. */
#define APIC_TPR 0x80
#define APIC_EOI 0xb0
#define APIC_LDR 0xd0
#define APIC_DFR 0xe0
#define APIC_SVR 0xf0
#define APIC_ICR 0x300
#define APIC_ICR_HIGH 0x310
#define APIC_LVT_TIMER 0x320
#define APIC_INITIAL 0x380 /* count of the timer's */
#define APIC_LVT_MASKED (1u << 16)
#define APIC_TIMER_PERIODIC (1u << 17)
static inline u32 apic_read(u32 reg)
{
    return *(volatile u32 *)(0xfee00000UL + reg);
}
static inline void apic_write(u32 reg, u32 value)
{
    *(volatile u32 *)(0xfee00000UL + reg) = value;
}
/* An IPI: destination as in ICR_HIGH's upper byte, the rest as in ICR. */
void apic_send(u32 destination, u32 icr);

static inline void pause(void)
{
    __asm__ volatile("pause" : : : "memory");
}
static inline void fence(void)
{
    __asm__ volatile("mfence" : : : "memory");
}
/* Waits until the word is `value`, or TSC ticks that nothing takes have passed: false. */
bool smp_wait_for(volatile u32 *at, u32 value);

#endif
