/*
 * The local APIC's state: as the kernel gives it (its register page), and as engines exchange it.
 *
 * The kernel's timer counts at LAPIC_TIMER_HZ too, so a count times its divisor is nanoseconds.
 * Reference: Intel SDM vol. 3, table 11-1 (register offsets) and 11.5.4 (timer).
 */
#include "engine/kvm/kvm.h"

#include <string.h>

#define APIC_ID 0x20
#define APIC_VERSION 0x30
#define APIC_TPR 0x80
#define APIC_LDR 0xd0
#define APIC_DFR 0xe0
#define APIC_SVR 0xf0
#define APIC_ISR 0x100
#define APIC_TMR 0x180
#define APIC_IRR 0x200
#define APIC_ESR 0x280
#define APIC_ICR 0x300
#define APIC_ICR_HIGH 0x310
#define APIC_TMICT 0x380
#define APIC_TMCCT 0x390
#define APIC_TDCR 0x3e0

/* Version 0x14 with six LVT entries, as the software engine's. */
#define APIC_VERSION_VALUE 0x00050014u

#define LVT_MASKED 0x10000u
#define LVT_TIMER_TSC_DEADLINE 0x40000u

static const u16 lvt_offset[LVT_COUNT] = {
    [LVT_CMCI] = 0x2f0,  [LVT_TIMER] = 0x320, [LVT_THERMAL] = 0x330, [LVT_PERF] = 0x340,
    [LVT_LINT0] = 0x350, [LVT_LINT1] = 0x360, [LVT_ERROR] = 0x370,
};

u32 kvm_lapic_reg(const struct kvm_lapic_state *s, unsigned offset)
{
    u32 value;

    memcpy(&value, s->regs + offset, sizeof(value));
    return value;
}

void kvm_lapic_set_reg(struct kvm_lapic_state *s, unsigned offset, u32 value)
{
    memcpy(s->regs + offset, &value, sizeof(value));
}

static void get_vector_bits(const struct kvm_lapic_state *s, unsigned offset, u32 *out)
{
    for (unsigned i = 0; i < 8; i++)
        out[i] = kvm_lapic_reg(s, offset + 0x10 * i);
}

static void set_vector_bits(struct kvm_lapic_state *s, unsigned offset, const u32 *in)
{
    for (unsigned i = 0; i < 8; i++)
        kvm_lapic_set_reg(s, offset + 0x10 * i, in[i]);
}

/* Nanoseconds a count: bits 3, 1 and 0 of the divide register; 0 is by 2, 7 is by 1. */
static u64 timer_divisor(u32 divide)
{
    u32 d = (divide & 3) | (divide & 8) >> 1;

    return BIT((d + 1) & 7);
}

static bool is_tsc_deadline(const struct lapic_state *s)
{
    return s->lvt[LVT_TIMER] & LVT_TIMER_TSC_DEADLINE;
}

void kvm_lapic_to_state(const struct kvm_lapic_state *in, u64 base, u64 deadline, u64 now,
                        struct lapic_state *out)
{
    u32 current = kvm_lapic_reg(in, APIC_TMCCT);
    u64 divisor, left;

    *out = (struct lapic_state){
        .base_msr = base,
        .id = kvm_lapic_reg(in, APIC_ID),
        .tpr = kvm_lapic_reg(in, APIC_TPR),
        .ldr = kvm_lapic_reg(in, APIC_LDR),
        .dfr = kvm_lapic_reg(in, APIC_DFR),
        .svr = kvm_lapic_reg(in, APIC_SVR),
        .esr = kvm_lapic_reg(in, APIC_ESR),
        .icr = kvm_lapic_reg(in, APIC_ICR) | (u64)kvm_lapic_reg(in, APIC_ICR_HIGH) << 32,
        .timer_initial = kvm_lapic_reg(in, APIC_TMICT),
        .timer_divide = kvm_lapic_reg(in, APIC_TDCR) & 0xb,
        .timer_deadline_ns = UINT64_MAX,
        .tsc_deadline = deadline,
    };
    get_vector_bits(in, APIC_ISR, out->isr);
    get_vector_bits(in, APIC_TMR, out->tmr);
    get_vector_bits(in, APIC_IRR, out->irr);
    for (unsigned i = 0; i < LVT_COUNT; i++)
        out->lvt[i] = kvm_lapic_reg(in, lvt_offset[i]);
    out->lvt[LVT_CMCI] |= LVT_MASKED; /* the register is not there, and reads as zero */
    divisor = timer_divisor(out->timer_divide);
    left = current * divisor;
    if (!current || is_tsc_deadline(out))
        return;
    out->timer_deadline_ns = now + left;
    out->timer_start_ns = now + left - MIN(now + left, out->timer_initial * divisor);
}

void kvm_lapic_from_state(const struct lapic_state *in, u64 now, struct kvm_lapic_state *out)
{
    u64 divisor = timer_divisor(in->timer_divide), left = 0;

    memset(out, 0, sizeof(*out));
    kvm_lapic_set_reg(out, APIC_ID, in->id);
    kvm_lapic_set_reg(out, APIC_VERSION, APIC_VERSION_VALUE);
    kvm_lapic_set_reg(out, APIC_TPR, in->tpr);
    kvm_lapic_set_reg(out, APIC_LDR, in->ldr);
    kvm_lapic_set_reg(out, APIC_DFR, in->dfr);
    kvm_lapic_set_reg(out, APIC_SVR, in->svr);
    kvm_lapic_set_reg(out, APIC_ESR, in->esr);
    kvm_lapic_set_reg(out, APIC_ICR, (u32)in->icr);
    kvm_lapic_set_reg(out, APIC_ICR_HIGH, (u32)(in->icr >> 32));
    set_vector_bits(out, APIC_ISR, in->isr);
    set_vector_bits(out, APIC_TMR, in->tmr);
    set_vector_bits(out, APIC_IRR, in->irr);
    for (unsigned i = 0; i < LVT_COUNT; i++) {
        if (i != LVT_CMCI)
            kvm_lapic_set_reg(out, lvt_offset[i], in->lvt[i]);
    }
    kvm_lapic_set_reg(out, APIC_TMICT, in->timer_initial);
    kvm_lapic_set_reg(out, APIC_TDCR, in->timer_divide);
    if (in->timer_deadline_ns != UINT64_MAX && !is_tsc_deadline(in))
        left = in->timer_deadline_ns > now ? in->timer_deadline_ns - now : 1;
    kvm_lapic_set_reg(out, APIC_TMCCT,
                      (u32)MIN((left + divisor - 1) / divisor, (u64)in->timer_initial));
}

void kvm_lapic_reset(u32 id, struct lapic_state *out)
{
    *out = (struct lapic_state){
        .base_msr = LAPIC_DEFAULT_BASE | APIC_BASE_ENABLE | (id ? 0 : APIC_BASE_BSP),
        .id = id << 24,
        .dfr = 0xffffffff,
        .svr = 0xff,
        .timer_deadline_ns = UINT64_MAX,
    };
    for (unsigned i = 0; i < LVT_COUNT; i++)
        out->lvt[i] = LVT_MASKED;
}
