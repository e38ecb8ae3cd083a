/*
 * Time under KVM.
 *
 * KVM's clocks run on the host's: a guest's TSC is the host's plus an offset, kvmclock is the
 * kernel's, the APIC timer is a timer of the kernel. None stops when the VM does. The VM clock
 * does, so after a pause each is set back by what was missed. How long that was, to the
 * nanosecond and the same for every vCPU, the VM clock says: its origin, the host's time at which
 * it would have read 0, moves by just that.
 *
 *  1. The engine: VM TSC = host TSC - tsc_origin. tsc_origin is chosen when the first vCPU runs,
 *     so that VM TSC = VM clock times frequency then, and moves with the origin.
 *  2. A vCPU: KVM's offset = struct cpu's tsc_offset - tsc_origin; a guest that writes its TSC
 *     changes KVM's offset, and with it tsc_offset. Nobody else samples a clock, so that vCPUs
 *     whose TSCs were the same stay so.
 *  3. The host's frequency is known to some ppm only, so VM TSC by (1) drifts from the VM clock.
 *     The drift is measured when a vCPU is left, and counted in when its tsc_offset is asked for:
 *     another engine goes on from where this guest's TSC stood, not from where it should.
 *  4. The timer's count and deadline are read when the vCPU is left, before the clock stops. They
 *     are given back after the pause; an interrupt of the timer that came within it is taken back.
 */
#include "engine/kvm/kvm.h"
#include "x86/msr.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <string.h>
#include <sys/ioctl.h>
#include <x86intrin.h>

#define CLOCK_FEATURES (BIT(KVM_FEATURE_CLOCKSOURCE) | BIT(KVM_FEATURE_CLOCKSOURCE2))

#define APIC_IRR 0x200
#define APIC_LVT_TIMER 0x320
#define APIC_TMCCT 0x390

static const struct kvm_device_attr offset_attr = {
    .group = KVM_VCPU_TSC_CTRL,
    .attr = KVM_VCPU_TSC_OFFSET,
};

int kvm_time_check(int vcpu, struct error *err)
{
    if (ioctl(vcpu, KVM_HAS_DEVICE_ATTR, &offset_attr) < 0)
        return error_host(err, ENOSYS, "this kernel's KVM lacks KVM_VCPU_TSC_OFFSET");
    return 0;
}

static u64 get_offset(struct kvm_vcpu *v)
{
    struct kvm_device_attr attr = offset_attr;
    u64 offset = 0;

    attr.addr = (u64)(uintptr_t)&offset;
    /* Fails only without the attribute, for which vcpu_create looked. */
    (void)ioctl(v->fd, KVM_GET_DEVICE_ATTR, &attr);
    return offset;
}

static int set_offset(struct kvm_vcpu *v, u64 offset, struct error *err)
{
    struct kvm_device_attr attr = offset_attr;

    attr.addr = (u64)(uintptr_t)&offset;
    if (ioctl(v->fd, KVM_SET_DEVICE_ATTR, &attr) < 0)
        return error_host(err, errno, "cannot set the TSC of vCPU %u", v->index);
    return 0;
}

/* Sets kvmclock back by `missed` ns; when the VM hasn't run yet, to the VM clock. */
static int adjust_kvmclock(struct kvm_engine *e, u64 missed, struct error *err)
{
    struct kvm_clock_data clock = {0};

    if (!(e->pv_features & CLOCK_FEATURES))
        return 0;
    if (!e->origin_ns) {
        clock.clock = vm_clock_now(e->config.clock);
    } else {
        if (ioctl(e->vm, KVM_GET_CLOCK, &clock) < 0)
            return error_host(err, errno, "KVM_GET_CLOCK");
        clock = (struct kvm_clock_data){.clock = clock.clock - MIN(missed, clock.clock)};
    }
    if (ioctl(e->vm, KVM_SET_CLOCK, &clock) < 0)
        return error_host(err, errno, "KVM_SET_CLOCK");
    return 0;
}

/* Invariant 1. Returns the origin that holds now, or 0 with err set. */
static u64 engine_enter(struct kvm_engine *e, struct error *err)
{
    u64 origin = vm_clock_to_host(e->config.clock, 0);

    pthread_mutex_lock(&e->time_lock);
    if (origin != e->origin_ns) {
        u64 missed = origin - e->origin_ns;

        if (adjust_kvmclock(e, missed, err)) {
            pthread_mutex_unlock(&e->time_lock);
            return 0;
        }
        if (!e->origin_ns)
            e->tsc_origin = __rdtsc() - clock_ns_to_ticks(vm_clock_now(e->config.clock), e->tsc_hz);
        else
            e->tsc_origin += clock_ns_to_ticks(missed, e->tsc_hz);
        e->origin_ns = origin;
    }
    pthread_mutex_unlock(&e->time_lock);
    return origin;
}

/*
 * The APIC as it is now, by messages that came in a pause too, but for its timer, which is as it was
 * when the vCPU was left.
 */
int kvm_time_get_apic(struct kvm_vcpu *v, struct kvm_lapic_state *apic, struct error *err)
{
    u32 vector = kvm_lapic_reg(&v->left_apic, APIC_LVT_TIMER) & 0xff;
    unsigned irr = APIC_IRR + 0x10 * (vector / 32);
    u32 bit = (u32)BIT(vector % 32);

    if (ioctl(v->fd, KVM_GET_LAPIC, apic) < 0)
        return error_host(err, errno, "cannot read the local APIC of vCPU %u", v->index);
    kvm_lapic_set_reg(apic, APIC_TMCCT, kvm_lapic_reg(&v->left_apic, APIC_TMCCT));
    if (!(kvm_lapic_reg(&v->left_apic, irr) & bit))
        kvm_lapic_set_reg(apic, irr, kvm_lapic_reg(apic, irr) & ~bit);
    return 0;
}

/* Invariant 4. */
static int restore_timer(struct kvm_vcpu *v, struct error *err)
{
    struct kvm_lapic_state now;
    int ret = kvm_time_get_apic(v, &now, err);

    if (ret)
        return ret;
    if (ioctl(v->fd, KVM_SET_LAPIC, &now) < 0)
        return error_host(err, errno, "cannot set the local APIC of vCPU %u", v->index);
    kvm_msr_write(v, MSR_IA32_TSC_DEADLINE, v->left_deadline);
    return 0;
}

int kvm_time_enter(struct kvm_vcpu *v, struct error *err)
{
    struct kvm_engine *e = v->engine;
    u64 origin = engine_enter(e, err), offset;
    bool paused = v->origin_ns != 0;
    int ret;

    if (!origin)
        return -EIO;
    if (origin == v->origin_ns)
        return 0;
    if (paused)
        offset = get_offset(v) - clock_ns_to_ticks(origin - v->origin_ns, e->tsc_hz);
    else
        offset = v->tsc_offset - e->tsc_origin;
    ret = set_offset(v, offset, err);
    if (!ret)
        ret = restore_timer(v, err);
    if (ret)
        return ret;
    /* Tells the guest's watchdogs that it was stopped; fails when it uses no kvmclock. */
    if (paused)
        (void)ioctl(v->fd, KVM_KVMCLOCK_CTRL, 0);
    v->origin_ns = origin;
    return 0;
}

void kvm_time_leave(struct kvm_vcpu *v)
{
    struct kvm_engine *e = v->engine;
    u64 now;

    /* They fail for no vCPU that could be run. */
    (void)ioctl(v->fd, KVM_GET_LAPIC, &v->left_apic);
    (void)kvm_msr_read(v, MSR_IA32_TSC_DEADLINE, &v->left_deadline);
    now = vm_clock_now(e->config.clock);
    atomic_store(&e->drift, __rdtsc() - e->tsc_origin - clock_ns_to_ticks(now, e->tsc_hz));
    v->left_ns = now;
}

u64 kvm_time_tsc_offset(struct kvm_vcpu *v)
{
    struct kvm_engine *e = v->engine;

    return (v->origin_ns ? get_offset(v) + e->tsc_origin : v->tsc_offset) + atomic_load(&e->drift);
}

void kvm_time_set_tsc_offset(struct kvm_vcpu *v, u64 offset)
{
    v->tsc_offset = offset - atomic_load(&v->engine->drift);
    v->origin_ns = 0;
}
