/*
 * CPUID under KVM: what KVM can offer, by KVM_GET_SUPPORTED_CPUID, and the model's answers as the
 * table that KVM_SET_CPUID2 takes. KVM itself keeps the bits that follow the vCPU's state (OSXSAVE,
 * OSPKE, the sizes in leaf 0xd, APIC).
 *
 * The hypervisor's leaves name KVM, whose paravirtual features the guest then uses: KVM's kernel
 * answers their MSRs and hypercalls (Documentation/virt/kvm/x86/cpuid.rst).
 */
#include "engine/kvm/kvm.h"
#include "x86/lapic.h"
#include "x86/regs.h"

#include <errno.h>
#include <linux/kvm_para.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define MAX_ENTRIES 256

#define LEAF_HYPERVISOR 0x40000000u
#define LEAF_PV_FEATURES 0x40000001u
#define LEAF_TIMING 0x40000010u

/* Those of KVM's features that need nothing of the VMM. */
#define PV_FEATURES                                                                                \
    (BIT(KVM_FEATURE_CLOCKSOURCE) | BIT(KVM_FEATURE_NOP_IO_DELAY) |                                \
     BIT(KVM_FEATURE_CLOCKSOURCE2) | BIT(KVM_FEATURE_STEAL_TIME) | BIT(KVM_FEATURE_PV_EOI) |       \
     BIT(KVM_FEATURE_PV_UNHALT) | BIT(KVM_FEATURE_PV_TLB_FLUSH) | BIT(KVM_FEATURE_ASYNC_PF) |      \
     BIT(KVM_FEATURE_ASYNC_PF_VMEXIT) | BIT(KVM_FEATURE_ASYNC_PF_INT) |                            \
     BIT(KVM_FEATURE_PV_SEND_IPI) | BIT(KVM_FEATURE_POLL_CONTROL) |                                \
     BIT(KVM_FEATURE_PV_SCHED_YIELD) | BIT(KVM_FEATURE_CLOCKSOURCE_STABLE_BIT))

static struct kvm_cpuid2 *new_table(void)
{
    struct kvm_cpuid2 *t = calloc(1, sizeof(*t) + MAX_ENTRIES * sizeof(t->entries[0]));

    return t;
}

/* KVM's answer, or NULL with errno set. */
static struct kvm_cpuid2 *supported_table(int dev)
{
    struct kvm_cpuid2 *t = new_table();

    if (!t)
        return NULL;
    t->nent = MAX_ENTRIES;
    if (ioctl(dev, KVM_GET_SUPPORTED_CPUID, t) < 0) {
        int saved = errno;

        free(t);
        errno = saved;
        return NULL;
    }
    return t;
}

static const struct kvm_cpuid_entry2 *find(const struct kvm_cpuid2 *t, u32 leaf, u32 subleaf)
{
    for (u32 i = 0; i < t->nent; i++) {
        const struct kvm_cpuid_entry2 *e = &t->entries[i];

        if (e->function == leaf &&
            (!(e->flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e->index == subleaf))
            return e;
    }
    return NULL;
}

u32 kvm_cpuid_pv_features(int dev)
{
    struct kvm_cpuid2 *t = supported_table(dev);
    const struct kvm_cpuid_entry2 *e = t ? find(t, LEAF_PV_FEATURES, 0) : NULL;
    u32 features = e ? e->eax & (u32)PV_FEATURES : 0;

    free(t);
    return features;
}

static void offer(struct cpuid_support *s, enum cpuid_feature f)
{
    s->bits[f / 64] |= BIT(f % 64);
}

/*
 * Whether the host's own kernel keeps its time by the TSC. A guest may then do as much: where the
 * host is a VM itself, its CPUID often doesn't say so.
 */
static bool host_trusts_tsc(void)
{
    FILE *file = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "re");
    char name[16] = "";
    bool trusts;

    if (!file)
        return false;
    trusts = fgets(name, sizeof(name), file) && !strcmp(name, "tsc\n");
    fclose(file);
    return trusts;
}

void kvm_cpuid_support(struct cpuid_support *out)
{
    static const struct {
        u32 leaf;
        u8 subleaf;
        u8 reg; /* offset of the register in an entry */
        u8 bit;
    } places[FEATURE_COUNT] = {
#define EAX offsetof(struct kvm_cpuid_entry2, eax)
#define EBX offsetof(struct kvm_cpuid_entry2, ebx)
#define ECX offsetof(struct kvm_cpuid_entry2, ecx)
#define EDX offsetof(struct kvm_cpuid_entry2, edx)
#define CPUID_FEATURE(name, leaf, subleaf, reg, bit) {leaf, subleaf, reg, bit},
#include "x86/cpuid_features.def"
#undef CPUID_FEATURE
#undef EAX
#undef EBX
#undef ECX
#undef EDX
    };
    struct error err;
    int dev = kvm_host_open(&err);
    struct kvm_cpuid2 *t = dev >= 0 ? supported_table(dev) : NULL;

    memset(out, 0, sizeof(*out));
    for (unsigned f = 0; t && f < FEATURE_COUNT; f++) {
        const struct kvm_cpuid_entry2 *e = find(t, places[f].leaf, places[f].subleaf);
        u32 value;

        if (!e)
            continue;
        memcpy(&value, (const char *)e + places[f].reg, sizeof(value));
        if (value & BIT(places[f].bit))
            offer(out, (enum cpuid_feature)f);
    }
    if (t) {
        /* KVM leaves these to the VMM, which knows whether it uses the kernel's local APICs. */
        offer(out, FEATURE_HYPERVISOR);
        offer(out, FEATURE_X2APIC);
        offer(out, FEATURE_TSC_DEADLINE);
        if (host_trusts_tsc())
            offer(out, FEATURE_INVARIANT_TSC);
    }
    free(t);
    if (dev >= 0)
        close(dev);
}

bool kvm_xsave_place(unsigned i, u32 *offset, u32 *size)
{
    struct cpuid_regs r;

    cpuid_host(0xd, i, &r);
    *offset = r.ebx;
    *size = r.eax;
    return r.eax != 0;
}

static struct kvm_cpuid_entry2 *add(struct kvm_cpuid2 *t, u32 leaf, u32 subleaf, bool indexed)
{
    struct kvm_cpuid_entry2 *e;

    if (t->nent == MAX_ENTRIES)
        return NULL;
    e = &t->entries[t->nent++];
    *e = (struct kvm_cpuid_entry2){
        .function = leaf,
        .index = subleaf,
        .flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
    };
    return e;
}

/* How many subleaves of a leaf there can be; 0 when ECX doesn't matter. */
static u32 subleaves(u32 leaf)
{
    switch (leaf) {
    case 4:
    case 0x8000001d:
        return 5;
    case 7:
        return 2;
    case 0xb:
        return 3;
    case 0xd:
        return 10;
    default:
        return 0;
    }
}

static void add_leaf(struct kvm_cpuid2 *t, struct kvm_vcpu *v, u32 leaf)
{
    const struct cpuid_dynamic d = {
        .index = v->index, .cr4 = 0, .xcr0 = XCR0_X87, .apic_enabled = true};
    u32 count = subleaves(leaf);

    for (u32 i = 0; i < MAX(count, 1u); i++) {
        struct kvm_cpuid_entry2 *e;
        struct cpuid_regs r;

        cpuid_model_query(v->engine->config.cpuid, &d, leaf, i, &r);
        if (i && !(r.eax | r.ebx | r.ecx | r.edx))
            continue;
        e = add(t, leaf, i, count != 0);
        if (e) {
            e->eax = r.eax;
            e->ebx = r.ebx;
            e->ecx = r.ecx;
            e->edx = r.edx;
        }
    }
}

static void add_range(struct kvm_cpuid2 *t, struct kvm_vcpu *v, u32 first)
{
    const struct cpuid_dynamic d = {.index = v->index};
    struct cpuid_regs top;

    cpuid_model_query(v->engine->config.cpuid, &d, first, 0, &top);
    for (u32 leaf = first; leaf <= top.eax && leaf - first < 0x100; leaf++)
        add_leaf(t, v, leaf);
}

static void add_hypervisor(struct kvm_cpuid2 *t, struct kvm_vcpu *v)
{
    struct kvm_cpuid_entry2 *e = add(t, LEAF_HYPERVISOR, 0, false);

    if (e) {
        e->eax = LEAF_TIMING;
        memcpy(&e->ebx, "KVMK", 4);
        memcpy(&e->ecx, "VMKV", 4);
        memcpy(&e->edx, "M\0\0\0", 4);
    }
    e = add(t, LEAF_PV_FEATURES, 0, false);
    if (e)
        e->eax = v->engine->pv_features;
    e = add(t, LEAF_TIMING, 0, false);
    if (e) {
        e->eax = (u32)(v->engine->tsc_hz / 1000);
        e->ebx = (u32)(LAPIC_TIMER_HZ / 1000);
    }
}

int kvm_cpuid_set(struct kvm_vcpu *v, struct error *err)
{
    struct kvm_cpuid2 *t = new_table();
    int ret = 0;

    if (!t)
        return error_host(err, ENOMEM, "CPUID of vCPU %u", v->index);
    add_range(t, v, 0);
    if (cpuid_model_has(v->engine->config.cpuid, FEATURE_HYPERVISOR))
        add_hypervisor(t, v);
    add_range(t, v, 0x80000000);
    if (ioctl(v->fd, KVM_SET_CPUID2, t) < 0)
        ret = error_host(err, errno, "KVM refuses the CPUID of vCPU %u", v->index);
    free(t);
    return ret;
}
