/*
 * The hypercalls of KVM's interface: pv.h.
 */
#include "engine/soft/lapic.h"
#include "engine/soft/pv.h"

#include <sched.h>

enum hypercall { HC_VAPIC_POLL_IRQ = 1, HC_KICK_CPU = 5, HC_SEND_IPI = 10, HC_SCHED_YIELD = 11 };
#define HC_EPERM (-1LL)
#define HC_EINVAL (-22LL)

static struct soft_vcpu *by_apic_id(const struct soft_engine *e, u64 id)
{
    for (unsigned n = 0; n < e->nvcpus; n++)
        if (e->vcpus[n] && cpuid_model_apic_id(e->config.cpuid, n) == id)
            return e->vcpus[n];
    return NULL;
}

/* A vCPU that sleeps while it waits for a lock is awoken; one that is about to sleep won't. */
static s64 kick_cpu(struct soft_vcpu *v, u64 id)
{
    struct soft_vcpu *to = by_apic_id(v->engine, id);

    if (to)
        soft_attend(to, ATTN_UNHALT);
    return 0;
}

/* To the APIC IDs `first` + n for each bit n of the 128 in low and high. Returns to how many. */
static s64 send_ipi(struct soft_vcpu *v, u64 low, u64 high, u32 first, u32 icr)
{
    s64 sent = 0;

    for (unsigned n = 0; n < 128; n++) {
        if (!((n < 64 ? low >> n : high >> (n - 64)) & 1))
            continue;
        if (!lapic_bus_send(v->engine->lapic_bus, first + n, icr))
            return HC_EINVAL;
        sent++;
    }
    return sent;
}

/* The feature that offers a call, or FEATURE_HYPERVISOR: one that is always there; FEATURE_COUNT: none. */
static enum cpuid_feature feature_of(u64 call)
{
    switch (call) {
    case HC_VAPIC_POLL_IRQ: /* for its being an exit */
        return FEATURE_HYPERVISOR;
    case HC_KICK_CPU:
        return FEATURE_KVM_PV_UNHALT;
    case HC_SEND_IPI:
        return FEATURE_KVM_PV_SEND_IPI;
    case HC_SCHED_YIELD:
        return FEATURE_KVM_PV_SCHED_YIELD;
    default:
        return FEATURE_COUNT;
    }
}

bool pv_hypercall(struct soft_vcpu *v)
{
    u64 *gpr = v->cpu.gpr, mask = soft_code64(v) ? UINT64_MAX : UINT32_MAX, call = gpr[RAX] & mask;
    enum cpuid_feature feature = feature_of(call);
    s64 result = 0;

    if (feature == FEATURE_COUNT || !soft_has(v, feature))
        return false;
    if (soft_cpl(v) != 0)
        result = HC_EPERM;
    else if (call == HC_KICK_CPU)
        result = kick_cpu(v, gpr[RCX] & mask);
    else if (call == HC_SEND_IPI)
        result = send_ipi(v, gpr[RBX] & mask, gpr[RCX] & mask, (u32)gpr[RDX], (u32)gpr[RSI]);
    else if (call == HC_SCHED_YIELD)
        sched_yield();
    gpr[RAX] = (u64)result & mask;
    return true;
}
