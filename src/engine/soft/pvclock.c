#include "engine/soft/pvclock.h"

#define SYSTEM_TIME_ENABLE BIT(0)
#define PVCLOCK_TSC_STABLE 0x01u

/* struct pvclock_vcpu_time_info: ns = system_time + ((tsc - tsc_timestamp) << shift) * mul / 2^32. */
struct pvclock_time {
    u32 version; /* odd while it changes */
    u32 zero;
    u64 tsc_timestamp;
    u64 system_time;
    u32 tsc_to_system_mul;
    s8 tsc_shift;
    u8 flags;
    u8 zero2[2];
};

/* struct pvclock_wall_clock: the wall clock's time at VM time 0. */
struct pvclock_wall {
    u32 version;
    u32 seconds;
    u32 nanoseconds;
};

/* The multiplier and shift for a TSC of hz: shift first, so that the multiplier has all of its 32 bits. */
static void set_scale(struct pvclock_time *t, u64 hz)
{
    u128 scaled = (u128)NS_PER_SEC << 32;

    while (hz << MAX(t->tsc_shift, 0) <= NS_PER_SEC)
        t->tsc_shift++;
    if (t->tsc_shift > 0)
        hz <<= t->tsc_shift;
    while (scaled / hz < BIT(31)) {
        scaled <<= 1;
        t->tsc_shift--;
    }
    t->tsc_to_system_mul = (u32)(scaled / hz);
}

/*
 * One writing is enough for the guest's life: the TSC is the VM clock in other units, also across a
 * pause. The guest does not run meanwhile, so it never sees an odd version.
 */
static bool publish(struct soft_vcpu *v, gpa_t gpa)
{
    struct pvclock_time t = {.flags = PVCLOCK_TSC_STABLE};
    u32 version = 0;

    if (memory_read(v->engine->config.memory, gpa, &version, sizeof(version)) < 0)
        return false;
    t.version = (version | 1) + 1;
    t.system_time = vm_clock_now(v->engine->config.clock);
    t.tsc_timestamp = clock_ns_to_ticks(t.system_time, v->engine->tsc_hz) + v->cpu.tsc_offset;
    set_scale(&t, v->engine->tsc_hz);
    return memory_write(v->engine->config.memory, gpa, &t, sizeof(t)) == 0;
}

bool pvclock_set_system_time(struct soft_vcpu *v, u64 value)
{
    if ((value & SYSTEM_TIME_ENABLE) && !publish(v, value & ~SYSTEM_TIME_ENABLE))
        return false;
    v->cpu.msr.kvm_system_time = value;
    return true;
}

bool pvclock_set_wall_clock(struct soft_vcpu *v, u64 value)
{
    struct vm_clock *clock = v->engine->config.clock;
    u64 start = vm_clock_wall_ns(clock) - vm_clock_now(clock);
    struct pvclock_wall w = {
        .version = 2,
        .seconds = (u32)(start / NS_PER_SEC),
        .nanoseconds = (u32)(start % NS_PER_SEC),
    };

    if (memory_write(v->engine->config.memory, value, &w, sizeof(w)) < 0)
        return false;
    v->cpu.msr.kvm_wall_clock = value;
    return true;
}

void pvclock_tsc_changed(struct soft_vcpu *v)
{
    u64 value = v->cpu.msr.kvm_system_time;

    if (value & SYSTEM_TIME_ENABLE)
        publish(v, value & ~SYSTEM_TIME_ENABLE);
}
