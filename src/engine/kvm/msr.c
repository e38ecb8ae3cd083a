/*
 * Model-specific registers under KVM.
 *
 * Those that struct cpu_msrs holds are found at the start by reading each once: KVM's own list
 * (KVM_GET_MSR_INDEX_LIST) leaves out some that it has, the MTRRs among them. What a kernel doesn't
 * keep for a guest stays as the reset left it, in struct cpu only.
 *
 * KVM knows fewer registers than x86/msr.def. An access to one that it doesn't know comes here
 * (KVM_CAP_X86_USER_SPACE_MSR) and is answered by that table, so that a guest finds the same
 * constants under every engine.
 */
#include "x86/msr.h"
#include "engine/kvm/kvm.h"
#include "host/log.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <string.h>
#include <sys/ioctl.h>

enum msr_vendor { VENDOR_ANY, VENDOR_INTEL, VENDOR_AMD };

struct kept_msr {
    u32 number;
    u32 offset;  /* in struct cpu_msrs */
    u16 needs;   /* enum cpuid_feature */
    u8 vendor;   /* enum msr_vendor */
    bool strict; /* a value that KVM refuses is an error; else it keeps its own */
    u32 pv;      /* one of KVM's own, for any of these features of its; 0: of the processor's */
};

#define MSR_KVM(number, field, pv)                                                                 \
    {                                                                                              \
        number, offsetof(struct cpu_msrs, field), FEATURE_HYPERVISOR, VENDOR_ANY, true, pv         \
    }

/* EFER travels with the control registers (KVM_SET_SREGS2). */
static const struct kept_msr kept[] = {
#define MSR_STORED(name, number, needs, vendor, field, reset, writable)                            \
    {number,          offsetof(struct cpu_msrs, field), FEATURE_##needs,                           \
     VENDOR_##vendor, FEATURE_##needs != FEATURE_MCA,   0},
#define MSR_KEPT(name, number, needs, vendor, field, reset, writable)                              \
    {number, offsetof(struct cpu_msrs, field), FEATURE_##needs, VENDOR_##vendor, false, 0},
#define MSR_CONST(name, number, needs, vendor, value)
#define MSR_QUIET(name, number, needs, vendor, value)
#define MSR_SPECIAL(name, number, needs, vendor)
#include "x86/msr.def"
#undef MSR_STORED
#undef MSR_KEPT
#undef MSR_CONST
#undef MSR_QUIET
#undef MSR_SPECIAL
    {MSR_IA32_TSC_ADJUST, offsetof(struct cpu_msrs, tsc_adjust), FEATURE_TSC_ADJUST, VENDOR_ANY,
     true, 0},
    MSR_KVM(MSR_KVM_WALL_CLOCK_NEW, kvm_wall_clock, BIT(KVM_FEATURE_CLOCKSOURCE2)),
    MSR_KVM(MSR_KVM_SYSTEM_TIME_NEW, kvm_system_time, BIT(KVM_FEATURE_CLOCKSOURCE2)),
    /* Before the one that turns it on. */
    MSR_KVM(MSR_KVM_ASYNC_PF_INT, kvm_async_pf_int, BIT(KVM_FEATURE_ASYNC_PF_INT)),
    MSR_KVM(MSR_KVM_ASYNC_PF_EN, kvm_async_pf, BIT(KVM_FEATURE_ASYNC_PF)),
    MSR_KVM(MSR_KVM_STEAL_TIME, kvm_steal_time, BIT(KVM_FEATURE_STEAL_TIME)),
    MSR_KVM(MSR_KVM_PV_EOI_EN, kvm_pv_eoi, BIT(KVM_FEATURE_PV_EOI)),
    MSR_KVM(MSR_KVM_POLL_CONTROL, kvm_poll_control, BIT(KVM_FEATURE_POLL_CONTROL)),
};
_Static_assert(ARRAY_SIZE(kept) <= KVM_MAX_MSRS, "struct kvm_engine holds them all");

#define WALL_CLOCK_SIZE 12 /* struct pvclock_wall_clock: version, seconds, nanoseconds */

union msr_batch {
    struct kvm_msrs head;
    u8 room[sizeof(struct kvm_msrs) + KVM_MAX_MSRS * sizeof(struct kvm_msr_entry)];
};

static const struct kept_msr *find_kept(u32 number)
{
    for (size_t i = 0; i < ARRAY_SIZE(kept); i++) {
        if (kept[i].number == number)
            return &kept[i];
    }
    return NULL;
}

int kvm_msr_read(struct kvm_vcpu *v, u32 number, u64 *value)
{
    union msr_batch b = {.room = {0}};
    int n;

    b.head.nmsrs = 1;
    b.head.entries[0].index = number;
    n = ioctl(v->fd, KVM_GET_MSRS, &b);
    *value = b.head.entries[0].data;
    return n == 1 ? 0 : n < 0 ? -errno : -EINVAL;
}

int kvm_msr_write(struct kvm_vcpu *v, u32 number, u64 value)
{
    union msr_batch b = {.room = {0}};
    int n;

    b.head.nmsrs = 1;
    b.head.entries[0] = (struct kvm_msr_entry){.index = number, .data = value};
    n = ioctl(v->fd, KVM_SET_MSRS, &b);
    return n == 1 ? 0 : n < 0 ? -errno : -EINVAL;
}

/* Whether a guest of this model has the register at all. */
static bool is_offered(const struct cpuid_model *model, u16 needs, u8 vendor)
{
    return cpuid_model_has(model, (enum cpuid_feature)needs) &&
           (vendor == VENDOR_ANY || (vendor == VENDOR_AMD) == cpuid_model_is_amd(model));
}

int kvm_msr_find(struct kvm_vcpu *v, struct error *err)
{
    struct kvm_engine *e = v->engine;

    if (e->nmsrs)
        return 0;
    for (size_t i = 0; i < ARRAY_SIZE(kept); i++) {
        u64 value;

        if (!is_offered(e->config.cpuid, kept[i].needs, kept[i].vendor) ||
            (kept[i].pv && !(kept[i].pv & e->pv_features)))
            continue;
        if (!kvm_msr_read(v, kept[i].number, &value))
            e->msrs[e->nmsrs++] = kept[i].number;
    }
    return e->nmsrs ? 0 : error_host(err, EIO, "KVM shows no MSR of vCPU %u", v->index);
}

static u64 *field_of(struct cpu_msrs *msrs, const struct kept_msr *k)
{
    return (u64 *)((char *)msrs + k->offset);
}

int kvm_msr_get(struct kvm_vcpu *v, struct cpu_msrs *out, struct error *err)
{
    struct kvm_engine *e = v->engine;
    union msr_batch b = {.room = {0}};
    int n;

    b.head.nmsrs = e->nmsrs;
    for (unsigned i = 0; i < e->nmsrs; i++)
        b.head.entries[i].index = e->msrs[i];
    n = ioctl(v->fd, KVM_GET_MSRS, &b);
    if (n < (int)e->nmsrs)
        return error_host(err, n < 0 ? errno : EIO, "KVM can't read MSR %#x", e->msrs[MAX(n, 0)]);
    for (unsigned i = 0; i < e->nmsrs; i++)
        *field_of(out, find_kept(e->msrs[i])) = b.head.entries[i].data;
    /* AMD's processors use 32 bits of these; KVM drops what is above when they are set. */
    if (cpuid_model_is_amd(e->config.cpuid)) {
        out->sysenter_esp = (u32)out->sysenter_esp;
        out->sysenter_eip = (u32)out->sysenter_eip;
    }
    return 0;
}

static int set_all(struct kvm_vcpu *v, const struct cpu_msrs *in, struct error *err)
{
    struct kvm_engine *e = v->engine;
    struct cpu_msrs copy = *in;
    unsigned done = 0;

    /* KVM stops at the first that it refuses: go on behind it. */
    while (done < e->nmsrs) {
        union msr_batch b = {.room = {0}};
        int n;

        b.head.nmsrs = e->nmsrs - done;
        for (unsigned i = done; i < e->nmsrs; i++) {
            b.head.entries[i - done].index = e->msrs[i];
            b.head.entries[i - done].data = *field_of(&copy, find_kept(e->msrs[i]));
        }
        n = ioctl(v->fd, KVM_SET_MSRS, &b);
        if (n < 0)
            return error_host(err, errno, "KVM can't set the MSRs of vCPU %u", v->index);
        done += (unsigned)n;
        if (done == e->nmsrs)
            break;
        if (find_kept(e->msrs[done])->strict)
            return error_host(err, EINVAL, "KVM refuses %#llx for MSR %#x",
                              (unsigned long long)b.head.entries[n].data, e->msrs[done]);
        log_once(LOG_DEBUG, "kvm: MSR %#x keeps the kernel's own value", e->msrs[done]);
        done++;
    }
    return 0;
}

/*
 * Where the guest has asked for the wall clock, KVM writes it afresh whenever the register is set. That isn't the
 * guest's doing here, and KVM knows no VM time yet to reckon from: memory stays as it was.
 */
int kvm_msr_set(struct kvm_vcpu *v, const struct cpu_msrs *in, struct error *err)
{
    struct guest_memory *memory = v->engine->config.memory;
    gpa_t at = in->kvm_wall_clock & ~1ULL;
    u8 clock[WALL_CLOCK_SIZE];
    bool there = at && memory_read(memory, at, clock, sizeof(clock)) == 0;
    int ret = set_all(v, in, err);

    if (there)
        (void)memory_write(memory, at, clock, sizeof(clock)); /* it was there just now */
    return ret;
}

/* Registers that hold nothing: x86/msr.def's constants. */
static const struct constant_msr {
    u32 number;
    u16 needs;
    u8 vendor;
    bool quiet; /* a write does nothing; else it gives #GP */
    u64 value;
} constants[] = {
#define MSR_STORED(name, number, needs, vendor, field, reset, writable)
#define MSR_KEPT(name, number, needs, vendor, field, reset, writable)                              \
    {number, FEATURE_##needs, VENDOR_##vendor, true, reset},
#define MSR_CONST(name, number, needs, vendor, value)                                              \
    {number, FEATURE_##needs, VENDOR_##vendor, false, value},
#define MSR_QUIET(name, number, needs, vendor, value)                                              \
    {number, FEATURE_##needs, VENDOR_##vendor, true, value},
#define MSR_SPECIAL(name, number, needs, vendor)
#include "x86/msr.def"
#undef MSR_STORED
#undef MSR_KEPT
#undef MSR_CONST
#undef MSR_QUIET
#undef MSR_SPECIAL
};

void kvm_msr_exit(struct kvm_vcpu *v)
{
    bool write = v->run->exit_reason == KVM_EXIT_X86_WRMSR;
    u32 number = v->run->msr.index;

    v->run->msr.error = 1;
    for (size_t i = 0; i < ARRAY_SIZE(constants); i++) {
        const struct constant_msr *c = &constants[i];

        if (c->number != number || !is_offered(v->engine->config.cpuid, c->needs, c->vendor) ||
            (write && !c->quiet))
            continue;
        v->run->msr.error = 0;
        if (!write)
            v->run->msr.data = c->value;
        return;
    }
    if (log_first_time((u64)'M' << 56 | (u64)(write ? 'w' : 'r') << 48 | number))
        log_debug("guest %s MSR %#x, which its processor lacks: #GP", write ? "writes" : "reads",
                  number);
}
