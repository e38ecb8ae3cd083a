/*
 * The CPUID model.
 *
 * A model is an identity (vendor, signature, brand), a set of features, and a topology: one
 * package, one core for each CPU, one thread a core, so that a CPU's APIC ID is its number. A query
 * composes a leaf from those; nothing is copied wholesale from the host, so a bit that we don't
 * know never reaches a guest.
 *
 * Models:
 * - host: the host's identity and, of its features, those that the engine supports; and what the
 *   engine makes by itself whatever the host (synthetic[] below).
 * - max: all that the engine supports, under the host's identity: for tests of the features that
 *   the host lacks and the engine doesn't need it for (LA57, protection keys).
 * - v2, v3: the psABI's x86-64-v2 and -v3 and what every processor of that level has in practice.
 *   They are the same on every host and engine, or refused. Their identity is GenuineIntel, family
 *   6, the model of the first processor of the level (Nehalem, Haswell). Intel, because a guest
 *   then uses SYSENTER from compatibility mode, which every engine can do: KVM emulates it on AMD
 *   hosts for an Intel guest. And because an Intel guest of that age takes all mitigations, which
 *   errs on the safe side wherever it runs. PCID, which would make them cheaper, came to AMD with
 *   Zen 3 only. Physical addresses are 39 bits wide, the narrowest that such processors have.
 *
 * SIMD and XSAVE layout: an engine may use the host's XSAVE, so components lie where the host has
 * them. A component that the host lacks (PKRU: the software processor needs no help with it)
 * follows the last one, where Intel and AMD put it too.
 *
 * References: Intel SDM vol. 2A, CPUID; vol. 1, 13.4 and 13.5 (XSAVE). AMD APM vol. 3, appendix E.
 */
#include "x86/cpuid.h"
#include "x86/lapic.h"
#include "x86/regs.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <x86intrin.h>

enum { REG_EAX, REG_EBX, REG_ECX, REG_EDX };

struct feature_place {
    u32 leaf;
    u8 subleaf, reg, bit;
    const char *name;
};

static const struct feature_place places[FEATURE_COUNT] = {
#define CPUID_FEATURE(name, leaf, subleaf, reg, bit) {leaf, subleaf, REG_##reg, bit, #name},
#include "x86/cpuid_features.def"
#undef CPUID_FEATURE
};

/* `feature` is worth nothing without `needs`. In an order in which one pass settles all. */
static const struct {
    u8 feature, needs;
} dependencies[] = {
    {FEATURE_XSAVEOPT, FEATURE_XSAVE},
    {FEATURE_XSAVEC, FEATURE_XSAVE},
    {FEATURE_XGETBV1, FEATURE_XSAVEC},
    {FEATURE_XSAVES, FEATURE_XSAVEC},
    {FEATURE_PKU, FEATURE_XSAVE},
    {FEATURE_AVX, FEATURE_XSAVE},
    {FEATURE_F16C, FEATURE_AVX},
    {FEATURE_FMA, FEATURE_AVX},
    {FEATURE_AVX2, FEATURE_AVX},
    {FEATURE_VAES, FEATURE_AVX},
    {FEATURE_VPCLMULQDQ, FEATURE_AVX},
    {FEATURE_AVX_VNNI, FEATURE_AVX2},
    {FEATURE_AVX512F, FEATURE_AVX2},
    {FEATURE_AVX512DQ, FEATURE_AVX512F},
    {FEATURE_AVX512CD, FEATURE_AVX512F},
    {FEATURE_AVX512BW, FEATURE_AVX512F},
    {FEATURE_AVX512VL, FEATURE_AVX512F},
    {FEATURE_AVX512IFMA, FEATURE_AVX512F},
    {FEATURE_AVX512VBMI, FEATURE_AVX512BW},
    {FEATURE_AVX512VBMI2, FEATURE_AVX512BW},
    {FEATURE_AVX512VNNI, FEATURE_AVX512F},
    {FEATURE_AVX512BITALG, FEATURE_AVX512BW},
    {FEATURE_AVX512VPOPCNTDQ, FEATURE_AVX512F},
    {FEATURE_AVX512BF16, FEATURE_AVX512BW},
    {FEATURE_INVPCID, FEATURE_PCID},
    {FEATURE_TSC_DEADLINE, FEATURE_APIC},
    {FEATURE_X2APIC, FEATURE_APIC},
};

/* clang-format off */

/* Offered by `host` whenever the engine supports them, whatever the host has. */
static const u8 synthetic[] = {
    FEATURE_HYPERVISOR, FEATURE_X2APIC, FEATURE_TSC_DEADLINE, FEATURE_TSC_ADJUST, FEATURE_ARAT,
    FEATURE_INVARIANT_TSC, FEATURE_KVM_CLOCKSOURCE2, FEATURE_KVM_CLOCKSOURCE_STABLE,
};
/* In every model, where the engine has them: KVM's paravirtual interface beyond its clock. */
static const u8 paravirtual[] = {
    FEATURE_KVM_STEAL_TIME, FEATURE_KVM_PV_EOI, FEATURE_KVM_PV_UNHALT, FEATURE_KVM_PV_TLB_FLUSH,
    FEATURE_KVM_PV_SEND_IPI, FEATURE_KVM_PV_SCHED_YIELD,
};
static const u8 synthetic_amd[] = {
    FEATURE_TOPOEXT, FEATURE_LFENCE_SERIALIZING, FEATURE_NULL_SEL_CLEARS_BASE,
    FEATURE_AUTO_IBRS, FEATURE_SRSO_NO, FEATURE_BTC_NO,
};
static const u8 synthetic_intel[] = {
    FEATURE_SPEC_CTRL, FEATURE_ARCH_CAPABILITIES,
};

/* Only AMD's processors have these, and only they are asked for them; and the other way round. */
static const u8 amd_only[] = {
    FEATURE_CR8_LEGACY, FEATURE_MISALIGNSSE, FEATURE_TOPOEXT, FEATURE_MMXEXT, FEATURE_FFXSR,
    FEATURE_SSE4A, FEATURE_CLZERO, FEATURE_XSAVEERPTR, FEATURE_IBPB, FEATURE_BTC_NO,
    FEATURE_LFENCE_SERIALIZING, FEATURE_NULL_SEL_CLEARS_BASE, FEATURE_AUTO_IBRS,
    FEATURE_SRSO_NO,
};
static const u8 intel_only[] = {
    FEATURE_SPEC_CTRL, FEATURE_STIBP, FEATURE_ARCH_CAPABILITIES, FEATURE_SPEC_CTRL_SSBD,
};

/* Offered by cpuid_model_offer_nested only, as VMX is. */
static const u8 svm_features[] = {
    FEATURE_SVM, FEATURE_SVM_NPT, FEATURE_SVM_LBRV, FEATURE_SVM_NRIPS,
    FEATURE_SVM_TSCRATE, FEATURE_SVM_VMCB_CLEAN, FEATURE_SVM_FLUSH_BY_ASID,
    FEATURE_SVM_DECODE_ASSISTS, FEATURE_SVM_PAUSE_FILTER, FEATURE_SVM_PF_THRESHOLD,
    FEATURE_SVM_VGIF,
};

/* psABI x86-64-v2 (and the baseline below it), and what Nehalem or a virtual machine adds. */
static const u8 v2_features[] = {
    FEATURE_FPU, FEATURE_VME, FEATURE_DE, FEATURE_PSE, FEATURE_TSC, FEATURE_MSR, FEATURE_PAE,
    FEATURE_MCE, FEATURE_CX8, FEATURE_APIC, FEATURE_SEP, FEATURE_MTRR, FEATURE_PGE, FEATURE_MCA,
    FEATURE_CMOV, FEATURE_PAT, FEATURE_PSE36, FEATURE_CLFLUSH, FEATURE_MMX, FEATURE_FXSR,
    FEATURE_SSE, FEATURE_SSE2, FEATURE_SSE3, FEATURE_SSSE3, FEATURE_SSE41, FEATURE_SSE42,
    FEATURE_CX16, FEATURE_POPCNT, FEATURE_LAHF64, FEATURE_SYSCALL, FEATURE_NX, FEATURE_LM,
    FEATURE_RDTSCP, FEATURE_X2APIC, FEATURE_TSC_DEADLINE, FEATURE_TSC_ADJUST,
    FEATURE_HYPERVISOR, FEATURE_ARAT, FEATURE_INVARIANT_TSC, FEATURE_KVM_CLOCKSOURCE2,
    FEATURE_KVM_CLOCKSOURCE_STABLE,
};
/* What v3 has beyond v2: the psABI's list, and what both Haswell and the first Zen have. */
static const u8 v3_features[] = {
    FEATURE_XSAVE, FEATURE_XSAVEOPT, FEATURE_AVX, FEATURE_AVX2, FEATURE_BMI1, FEATURE_BMI2,
    FEATURE_F16C, FEATURE_FMA, FEATURE_LZCNT, FEATURE_MOVBE, FEATURE_AES, FEATURE_PCLMUL,
    FEATURE_RDRAND, FEATURE_FSGSBASE, FEATURE_SMEP, FEATURE_PAGE1GB,
};

/* clang-format on */

#define SVM_ASIDS 8           /* as KVM has for a guest's guests */
#define XSAVE_COMPONENTS 10   /* up to PKRU */
#define XSAVE_LEGACY_END 576u /* the legacy region and the header */

struct xsave_component {
    u32 size, offset;
    bool aligned; /* to 64 bytes, in the compacted format */
};

struct cpuid_model {
    u64 features[(FEATURE_COUNT + 63) / 64];
    bool amd;
    bool of_host; /* the model `host` */
    char vendor[13];
    char brand[49];
    u32 signature; /* family, model, stepping as in leaf 1 EAX */
    u32 max_basic, max_extended;
    struct cpu_topology topology;
    unsigned thread_bits, core_bits; /* of an APIC ID */
    unsigned phys_bits;
    u64 tsc_hz;
    u64 xcr0;
    struct xsave_component xsave[XSAVE_COMPONENTS];
};

/* A level of cache; the same in every model, and shared by a socket or a core. */
static const struct cache {
    u8 level, type; /* type: 1 data, 2 instruction, 3 unified */
    u8 ways;
    bool shared;
    u32 size;
} caches[] = {
    {1, 1, 8, false, 32 << 10},
    {1, 2, 8, false, 32 << 10},
    {2, 3, 8, false, 512 << 10},
    {3, 3, 16, true, 16 << 20},
};
#define CACHE_LINE 64u

void cpuid_host(u32 leaf, u32 subleaf, struct cpuid_regs *out)
{
    __cpuid_count(leaf, subleaf, out->eax, out->ebx, out->ecx, out->edx);
}

/* cpuid_host, or zeros for a leaf beyond what the host has. */
static void host_leaf(u32 leaf, u32 subleaf, struct cpuid_regs *out)
{
    struct cpuid_regs top;

    memset(out, 0, sizeof(*out));
    cpuid_host(leaf & 0xc0000000, 0, &top);
    if (top.eax >= leaf && (top.eax ^ leaf) < 0x40000000)
        cpuid_host(leaf, subleaf, out);
}

static u32 *reg_of(struct cpuid_regs *r, u8 reg)
{
    switch (reg) {
    case REG_EAX:
        return &r->eax;
    case REG_EBX:
        return &r->ebx;
    case REG_ECX:
        return &r->ecx;
    default:
        return &r->edx;
    }
}

bool cpuid_host_has(enum cpuid_feature f)
{
    struct cpuid_regs r;

    if (places[f].subleaf > 0) {
        host_leaf(places[f].leaf, 0, &r);
        if (places[f].leaf == 7 && places[f].subleaf > r.eax)
            return false;
    }
    host_leaf(places[f].leaf, places[f].subleaf, &r);
    return *reg_of(&r, places[f].reg) & BIT(places[f].bit);
}

static bool bit_test(const u64 *bits, unsigned n)
{
    return bits[n / 64] & BIT(n % 64);
}

static void bit_set(u64 *bits, unsigned n)
{
    bits[n / 64] |= BIT(n % 64);
}

static void bit_clear(u64 *bits, unsigned n)
{
    bits[n / 64] &= ~BIT(n % 64);
}

/* Sets those of list[] that the engine supports. */
static void offer(struct cpuid_model *m, const struct cpuid_support *support, const u8 *list,
                  size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (bit_test(support->bits, list[i]))
            bit_set(m->features, list[i]);
    }
}

/* Sets all of list[]; -EINVAL when the engine lacks one. */
static int promise(struct cpuid_model *m, const char *name, const struct cpuid_support *support,
                   const u8 *list, size_t n, struct error *err)
{
    for (size_t i = 0; i < n; i++) {
        if (!bit_test(support->bits, list[i]))
            return error_input(err,
                               "CPU model %s needs %s, which this engine on this host can't give; "
                               "use --cpu host",
                               name, places[list[i]].name);
        bit_set(m->features, list[i]);
    }
    return 0;
}

static void drop_unusable(struct cpuid_model *m)
{
    const u8 *other = m->amd ? intel_only : amd_only;
    size_t n = m->amd ? ARRAY_SIZE(intel_only) : ARRAY_SIZE(amd_only);

    for (size_t i = 0; i < n; i++)
        bit_clear(m->features, other[i]);
    bit_clear(m->features, FEATURE_VMX);
    for (size_t i = 0; i < ARRAY_SIZE(svm_features); i++)
        bit_clear(m->features, svm_features[i]);
    for (size_t i = 0; i < ARRAY_SIZE(dependencies); i++) {
        if (!bit_test(m->features, dependencies[i].needs))
            bit_clear(m->features, dependencies[i].feature);
    }
}

static void identity_of_host(struct cpuid_model *m)
{
    struct cpuid_regs r;

    cpuid_host(0, 0, &r);
    memcpy(m->vendor, &r.ebx, 4);
    memcpy(m->vendor + 4, &r.edx, 4);
    memcpy(m->vendor + 8, &r.ecx, 4);
    m->amd = strcmp(m->vendor, "AuthenticAMD") == 0 || strcmp(m->vendor, "HygonGenuine") == 0;
    cpuid_host(1, 0, &r);
    m->signature = r.eax;
    for (u32 i = 0; i < 3; i++) {
        host_leaf(0x80000002 + i, 0, &r);
        memcpy(m->brand + 16 * i, &r, 16);
    }
    host_leaf(0x80000008, 0, &r);
    m->phys_bits = r.eax & 0xff;
    /* Memory encryption takes some bits away (AMD APM vol. 3, E.4.17). */
    if (m->amd && m->phys_bits) {
        host_leaf(0x8000001f, 0, &r);
        m->phys_bits -= MIN((r.ebx >> 6) & 0x3f, m->phys_bits);
    }
    m->phys_bits = MIN(MAX(m->phys_bits, 36u), 52u);
}

static void identity_of_level(struct cpuid_model *m, u32 signature, const char *brand)
{
    memcpy(m->vendor, "GenuineIntel", 12);
    m->signature = signature;
    snprintf(m->brand, sizeof(m->brand), "%s", brand);
    m->phys_bits = 39;
}

static void lay_out_xsave(struct cpuid_model *m)
{
    static const u16 sizes[XSAVE_COMPONENTS] = {
        [2] = 256, [5] = 64, [6] = 512, [7] = 1024, [9] = 8,
    };
    u32 end = XSAVE_LEGACY_END;

    if (!cpuid_model_has(m, FEATURE_XSAVE))
        return;
    m->xcr0 = XCR0_X87 | XCR0_SSE;
    if (cpuid_model_has(m, FEATURE_AVX))
        m->xcr0 |= XCR0_AVX;
    if (cpuid_model_has(m, FEATURE_AVX512F))
        m->xcr0 |= XCR0_AVX512;
    if (cpuid_model_has(m, FEATURE_PKU))
        m->xcr0 |= XCR0_PKRU;

    for (u32 i = 2; i < XSAVE_COMPONENTS; i++) {
        struct xsave_component *c = &m->xsave[i];
        struct cpuid_regs r;

        if (!(m->xcr0 & BIT(i)))
            continue;
        host_leaf(0xd, i, &r);
        c->size = sizes[i];
        if (r.eax == sizes[i] && r.ebx >= end) {
            c->offset = r.ebx;
            c->aligned = r.ecx & BIT(1);
        } else {
            c->offset = end;
        }
        end = c->offset + c->size;
    }
}

struct cpuid_model *cpuid_model_create(const char *name, const struct cpuid_support *support,
                                       unsigned ncpus, u64 tsc_hz, struct error *err)
{
    struct cpuid_model *m = calloc(1, sizeof(*m));
    int ret = 0;

    if (!m) {
        error_host(err, ENOMEM, "the CPUID model");
        return NULL;
    }
    if (strcmp(name, "host") == 0 || strcmp(name, "max") == 0) {
        identity_of_host(m);
        m->of_host = name[0] == 'h';
        for (unsigned f = 0; f < FEATURE_COUNT; f++) {
            if (bit_test(support->bits, f) && (name[0] == 'm' || cpuid_host_has(f)))
                bit_set(m->features, f);
        }
        offer(m, support, synthetic, ARRAY_SIZE(synthetic));
        if (m->amd)
            offer(m, support, synthetic_amd, ARRAY_SIZE(synthetic_amd));
        else
            offer(m, support, synthetic_intel, ARRAY_SIZE(synthetic_intel));
    } else if (strcmp(name, "v2") == 0) {
        identity_of_level(m, 0x106a3, "doppel x86-64-v2 processor");
        ret = promise(m, name, support, v2_features, ARRAY_SIZE(v2_features), err);
    } else if (strcmp(name, "v3") == 0) {
        identity_of_level(m, 0x306c4, "doppel x86-64-v3 processor");
        ret = promise(m, name, support, v2_features, ARRAY_SIZE(v2_features), err);
        if (ret == 0)
            ret = promise(m, name, support, v3_features, ARRAY_SIZE(v3_features), err);
    } else {
        ret = error_input(err, "unknown CPU model '%s': use host, v2 or v3", name);
    }
    if (ret == 0 && (ncpus < 1 || ncpus > 255))
        ret = error_input(err, "%u CPUs: a machine has 1 to 255", ncpus);
    if (ret < 0) {
        free(m);
        return NULL;
    }

    offer(m, support, paravirtual, ARRAY_SIZE(paravirtual));
    drop_unusable(m);
    if (ncpus > 1) /* no engine watches the line: who waits for another CPU's store is told late */
        bit_clear(m->features, FEATURE_MONITOR);
    cpuid_model_set_topology(m, &(struct cpu_topology){1, ncpus, 1});
    m->tsc_hz = tsc_hz;
    m->max_basic = m->amd ? 0xd : 0x16;
    m->max_extended = m->amd ? 0x80000021 : 0x80000008;
    lay_out_xsave(m);
    return m;
}

void cpuid_model_drop_pv(struct cpuid_model *m, u32 bits)
{
    for (unsigned f = 0; f < FEATURE_COUNT; f++)
        if (places[f].leaf == 0x40000001 && (bits & BIT(places[f].bit)))
            bit_clear(m->features, f);
}

void cpuid_model_destroy(struct cpuid_model *m)
{
    free(m);
}

bool cpuid_model_has(const struct cpuid_model *m, enum cpuid_feature f)
{
    return bit_test(m->features, f);
}

u64 cpuid_model_xcr0(const struct cpuid_model *m)
{
    return m->xcr0;
}

int cpuid_model_offer_nested(struct cpuid_model *m, const struct cpuid_support *support,
                             struct error *err)
{
    enum cpuid_feature virtualisation = m->amd ? FEATURE_SVM : FEATURE_VMX;

    if (!m->of_host)
        return error_input(err, "nested=on goes with --cpu host only");
    if (!bit_test(support->bits, virtualisation))
        return error_input(err,
                           "nested=on: this engine on this host can't give %s (kvm can, where its "
                           "module's parameter `nested` is on)",
                           places[virtualisation].name);
    if (m->amd)
        offer(m, support, svm_features, ARRAY_SIZE(svm_features));
    else
        bit_set(m->features, FEATURE_VMX);
    return 0;
}

void cpuid_model_limit_phys_bits(struct cpuid_model *m, unsigned bits)
{
    m->phys_bits = MIN(m->phys_bits, MAX(bits, 36u));
}

/* Bits that tell n things apart. */
static unsigned bits_for(unsigned n)
{
    unsigned bits = 0;

    while ((1u << bits) < n)
        bits++;
    return bits;
}

struct cpu_topology cpuid_model_topology(const struct cpuid_model *m)
{
    return m->topology;
}

void cpuid_model_set_topology(struct cpuid_model *m, const struct cpu_topology *t)
{
    m->topology = *t;
    m->thread_bits = bits_for(t->threads);
    m->core_bits = bits_for(t->cores);
}

u32 cpuid_model_apic_id(const struct cpuid_model *m, unsigned index)
{
    const struct cpu_topology *t = &m->topology;
    unsigned thread = index % t->threads, core = index / t->threads % t->cores;
    unsigned socket = index / t->threads / t->cores;

    return (socket << m->core_bits | core) << m->thread_bits | thread;
}

/* CPUs of a socket, and the bits of their APIC IDs in which they differ. */
static unsigned socket_cpus(const struct cpuid_model *m)
{
    return m->topology.cores * m->topology.threads;
}
static unsigned socket_bits(const struct cpuid_model *m)
{
    return m->core_bits + m->thread_bits;
}

unsigned cpuid_model_phys_bits(const struct cpuid_model *m)
{
    return m->phys_bits;
}

u64 cpuid_model_tsc_hz(const struct cpuid_model *m)
{
    return m->tsc_hz;
}

bool cpuid_model_is_amd(const struct cpuid_model *m)
{
    return m->amd;
}

/* The feature bits of a leaf. */
static void feature_bits(const struct cpuid_model *m, u32 leaf, u32 subleaf, struct cpuid_regs *out)
{
    for (unsigned f = 0; f < FEATURE_COUNT; f++) {
        if (places[f].leaf == leaf && places[f].subleaf == subleaf && cpuid_model_has(m, f))
            *reg_of(out, places[f].reg) |= (u32)BIT(places[f].bit);
    }
}

static void leaf_features(const struct cpuid_model *m, const struct cpuid_dynamic *d,
                          struct cpuid_regs *out)
{
    out->eax = m->signature;
    out->ebx =
        cpuid_model_apic_id(m, d->index) << 24 | socket_cpus(m) << 16 | (CACHE_LINE / 8) << 8;
    feature_bits(m, 1, 0, out);
    if (d->cr4 & CR4_OSXSAVE)
        out->ecx |= BIT(27);
    if (!d->apic_enabled)
        out->edx &= ~(u32)BIT(9);
    if (socket_cpus(m) > 1)
        out->edx |= BIT(28); /* HTT: the count in EBX means something */
}

/* Intel's leaf 4 and AMD's 0x8000001d share their layout, but for the number of cores; and Intel counts IDs. */
static void leaf_cache(const struct cpuid_model *m, u32 subleaf, bool cores, struct cpuid_regs *out)
{
    u32 sharing, core_ids = (1u << m->core_bits) - 1;
    const struct cache *c;

    if (subleaf >= ARRAY_SIZE(caches))
        return;
    c = &caches[subleaf];
    if (cores)
        sharing = (1u << (c->shared ? socket_bits(m) : m->thread_bits)) - 1;
    else
        sharing = (c->shared ? socket_cpus(m) : m->topology.threads) - 1;
    out->eax = c->type | (u32)c->level << 5 | BIT(8) | sharing << 14;
    if (cores)
        out->eax |= MIN(core_ids, 63u) << 26;
    out->ebx = (CACHE_LINE - 1) | (u32)(c->ways - 1) << 22;
    out->ecx = c->size / CACHE_LINE / c->ways - 1;
    if (c->shared)
        out->edx = BIT(1); /* inclusive of the levels below */
}

static void leaf_topology(const struct cpuid_model *m, const struct cpuid_dynamic *d, u32 subleaf,
                          struct cpuid_regs *out)
{
    out->ecx = subleaf & 0xff;
    out->edx = cpuid_model_apic_id(m, d->index);
    if (subleaf == 0) { /* threads of a core */
        out->eax = m->thread_bits;
        out->ebx = m->topology.threads;
        out->ecx |= 1 << 8;
    } else if (subleaf == 1) { /* cores of the package */
        out->eax = socket_bits(m);
        out->ebx = socket_cpus(m);
        out->ecx |= 2 << 8;
    }
}

static u32 xsave_size(const struct cpuid_model *m, u64 components, bool compacted)
{
    u32 end = XSAVE_LEGACY_END;

    for (u32 i = 2; i < XSAVE_COMPONENTS; i++) {
        const struct xsave_component *c = &m->xsave[i];

        if (!(components & m->xcr0 & BIT(i)))
            continue;
        if (!compacted)
            end = MAX(end, c->offset + c->size);
        else
            end = (c->aligned ? (end + 63) & ~63u : end) + c->size;
    }
    return end;
}

static void leaf_xsave(const struct cpuid_model *m, const struct cpuid_dynamic *d, u32 subleaf,
                       struct cpuid_regs *out)
{
    if (!m->xcr0)
        return;
    if (subleaf == 0) {
        out->eax = (u32)m->xcr0;
        out->edx = (u32)(m->xcr0 >> 32);
        out->ebx = xsave_size(m, d->xcr0, false);
        out->ecx = xsave_size(m, m->xcr0, false);
    } else if (subleaf == 1) {
        feature_bits(m, 0xd, 1, out);
        if (out->eax & (BIT(1) | BIT(3)))
            out->ebx = xsave_size(m, d->xcr0 | d->xss, true);
    } else if (subleaf < XSAVE_COMPONENTS && (m->xcr0 & BIT(subleaf))) {
        out->eax = m->xsave[subleaf].size;
        out->ebx = m->xsave[subleaf].offset;
        out->ecx = m->xsave[subleaf].aligned ? BIT(1) : 0;
    }
}

/*
 * The TSC as a ratio of the crystal, which is also the APIC timer's clock (SDM vol. 3, 19.7.3).
 * Guests (Linux) multiply the crystal's kHz by EBX in 32 bits, so of all ratios that don't overflow
 * then, the nearest: at 3 GHz within 1 part in 10^7.
 */
static void leaf_tsc(const struct cpuid_model *m, struct cpuid_regs *out)
{
    const u64 crystal_khz = LAPIC_TIMER_HZ / 1000, tsc_khz = m->tsc_hz / 1000;
    const u64 max_numerator = UINT32_MAX / crystal_khz;
    u64 best_error = UINT64_MAX, best_denominator = 1;

    for (u64 den = 1; tsc_khz && (tsc_khz * den + crystal_khz / 2) / crystal_khz <= max_numerator;
         den++) {
        u64 num = (tsc_khz * den + crystal_khz / 2) / crystal_khz;
        s64 diff = (s64)(num * crystal_khz) - (s64)(tsc_khz * den);
        u64 error = (u64)(diff < 0 ? -diff : diff);

        if (num == 0)
            continue;
        /* error / den is the deviation in kHz: compare fractions crosswise. */
        if (out->eax == 0 || error * best_denominator < best_error * den) {
            best_error = error;
            best_denominator = den;
            out->eax = (u32)den;
            out->ebx = (u32)num;
        }
        if (error == 0)
            break;
    }
    if (out->eax)
        out->ecx = (u32)LAPIC_TIMER_HZ;
}

static void leaf_intel_extras(const struct cpuid_model *m, u32 leaf, struct cpuid_regs *out)
{
    u32 mhz = (u32)MIN(m->tsc_hz / 1000000, 0xffffu);

    switch (leaf) {
    case 2: /* one descriptor, 0xff: see leaf 4 */
        out->eax = 0xff01;
        break;
    case 0x15:
        leaf_tsc(m, out);
        break;
    case 0x16:
        out->eax = mhz;
        out->ebx = mhz;
        out->ecx = 100;
        break;
    default:
        break;
    }
}

static void leaf_basic(const struct cpuid_model *m, const struct cpuid_dynamic *d, u32 leaf,
                       u32 subleaf, struct cpuid_regs *out)
{
    switch (leaf) {
    case 0:
        out->eax = m->max_basic;
        memcpy(&out->ebx, m->vendor, 4);
        memcpy(&out->edx, m->vendor + 4, 4);
        memcpy(&out->ecx, m->vendor + 8, 4);
        break;
    case 1:
        leaf_features(m, d, out);
        break;
    case 4:
        if (!m->amd)
            leaf_cache(m, subleaf, true, out);
        break;
    case 5:
        if (cpuid_model_has(m, FEATURE_MONITOR)) {
            out->eax = CACHE_LINE;
            out->ebx = CACHE_LINE;
            out->ecx = BIT(0) | BIT(1); /* EDX counts; interrupts wake even when masked */
            out->edx = 1 << 4;          /* one sub-state of C1 */
        }
        break;
    case 7:
        feature_bits(m, 7, subleaf, out);
        if (subleaf == 0) {
            struct cpuid_regs next = {0};

            feature_bits(m, 7, 1, &next);
            out->eax = next.eax ? 1 : 0; /* the last subleaf */
            if (d->cr4 & CR4_PKE)
                out->ecx |= BIT(4); /* OSPKE */
        }
        break;
    case 0xb:
        leaf_topology(m, d, subleaf, out);
        break;
    case 0xd:
        leaf_xsave(m, d, subleaf, out);
        break;
    case 2:
    case 0x15:
    case 0x16:
        if (!m->amd)
            leaf_intel_extras(m, leaf, out);
        break;
    default:
        feature_bits(m, leaf, subleaf, out);
        break;
    }
}

static void leaf_amd_caches(const struct cpuid_model *m, u32 leaf, struct cpuid_regs *out)
{
    /* Associativity as 0x80000006 encodes it (APM vol. 3, table E-4): 6 is 8 ways, 8 is 16. */
    if (leaf == 0x80000005) {
        out->ecx = (caches[0].size >> 10) << 24 | (u32)caches[0].ways << 16 | 1 << 8 | CACHE_LINE;
        out->edx = (caches[1].size >> 10) << 24 | (u32)caches[1].ways << 16 | 1 << 8 | CACHE_LINE;
        return;
    }
    out->ecx = (caches[2].size >> 10) << 16 | 6 << 12 | 1 << 8 | CACHE_LINE;
    if (m->amd)
        out->edx = (caches[3].size >> 19) << 18 | 8 << 12 | 1 << 8 | CACHE_LINE;
}

static void leaf_extended(const struct cpuid_model *m, const struct cpuid_dynamic *d, u32 leaf,
                          u32 subleaf, struct cpuid_regs *out)
{
    struct cpuid_regs basic = {0};

    switch (leaf) {
    case 0x80000000:
        if (m->amd) /* the vendor's name again */
            leaf_basic(m, d, 0, 0, out);
        out->eax = m->max_extended;
        break;
    case 0x80000001:
        feature_bits(m, leaf, 0, out);
        if (m->amd) {
            out->eax = m->signature;
            leaf_features(m, d, &basic);
            out->edx |= basic.edx & 0x0183f3ff; /* FPU to APIC, MTRR to PSE36, MMX, FXSR */
            if (socket_cpus(m) > 1)
                out->ecx |= BIT(1); /* CmpLegacy: cores, not threads */
        }
        break;
    case 0x80000002:
    case 0x80000003:
    case 0x80000004:
        memcpy(out, m->brand + 16 * (leaf - 0x80000002), 16);
        break;
    case 0x80000005:
        if (m->amd)
            leaf_amd_caches(m, leaf, out);
        break;
    case 0x80000006:
        leaf_amd_caches(m, leaf, out);
        break;
    case 0x80000008:
        feature_bits(m, leaf, 0, out);
        out->eax = m->phys_bits | (cpuid_model_has(m, FEATURE_LA57) ? 57 : 48) << 8;
        if (m->amd)
            out->ecx = (socket_cpus(m) - 1) | socket_bits(m) << 12;
        break;
    case 0x8000000a:
        feature_bits(m, leaf, 0, out);
        if (cpuid_model_has(m, FEATURE_SVM)) {
            out->eax = 1; /* the revision */
            out->ebx = SVM_ASIDS;
        }
        break;
    case 0x8000001d:
        if (cpuid_model_has(m, FEATURE_TOPOEXT))
            leaf_cache(m, subleaf, false, out);
        break;
    case 0x8000001e:
        if (cpuid_model_has(m, FEATURE_TOPOEXT)) {
            out->eax = cpuid_model_apic_id(m, d->index);
            out->ebx =
                d->index / m->topology.threads % m->topology.cores | (m->topology.threads - 1) << 8;
            out->ecx = d->index / socket_cpus(m); /* the node: a socket is one */
        }
        break;
    default:
        feature_bits(m, leaf, subleaf, out);
        break;
    }
}

/* The signature is KVM's, since what is offered behind it is: a guest finds the clock by it. */
static void leaf_hypervisor(const struct cpuid_model *m, u32 leaf, struct cpuid_regs *out)
{
    if (leaf == 0x40000000) {
        out->eax = 0x40000010;
        memcpy(&out->ebx, "KVMKVMKVM\0\0\0", 12);
    } else if (leaf == 0x40000001) {
        feature_bits(m, leaf, 0, out);
    } else if (leaf == 0x40000010) { /* timing, as hypervisors agreed to say it: kHz */
        out->eax = (u32)(m->tsc_hz / 1000);
        out->ebx = (u32)(LAPIC_TIMER_HZ / 1000);
    }
}

void cpuid_model_query(const struct cpuid_model *m, const struct cpuid_dynamic *d, u32 leaf,
                       u32 subleaf, struct cpuid_regs *out)
{
    memset(out, 0, sizeof(*out));
    if (leaf >= 0x40000000 && leaf < 0x50000000 && cpuid_model_has(m, FEATURE_HYPERVISOR)) {
        leaf_hypervisor(m, leaf, out);
    } else if (leaf >= 0x80000000 && leaf <= m->max_extended) {
        leaf_extended(m, d, leaf, subleaf, out);
    } else if (leaf <= m->max_basic) {
        leaf_basic(m, d, leaf, subleaf, out);
    } else if (!m->amd) {
        /* Beyond the last leaf Intel's processors give the last basic one; AMD's zeros. */
        leaf_basic(m, d, m->max_basic, subleaf, out);
    }
}

/* The frequency that CPUID states, or 0. */
static u64 tsc_hz_stated(void)
{
    struct cpuid_regs r, hv;

    host_leaf(0x15, 0, &r);
    if (r.eax && r.ebx && r.ecx)
        return (u64)r.ecx * r.ebx / r.eax;
    cpuid_host(1, 0, &r);
    if (!(r.ecx & BIT(31)))
        return 0;
    cpuid_host(0x40000000, 0, &hv);
    if (hv.eax < 0x40000010 || hv.eax > 0x4000ffff)
        return 0;
    cpuid_host(0x40000010, 0, &r);
    return (u64)r.eax * 1000;
}

/* Reads both clocks as close together as it can: the pair with the shortest gap of several. */
static void read_clocks(u64 *ns, u64 *tsc)
{
    u64 best = UINT64_MAX;

    for (int i = 0; i < 16; i++) {
        struct timespec ts;
        u64 before = __rdtsc(), after;

        clock_gettime(CLOCK_MONOTONIC, &ts);
        after = __rdtsc();
        if (after - before < best) {
            best = after - before;
            *ns = (u64)ts.tv_sec * NS_PER_SEC + (u64)ts.tv_nsec;
            *tsc = before + (after - before) / 2;
        }
    }
}

static u64 tsc_hz_measured(void)
{
    const struct timespec pause = {.tv_nsec = 10 * 1000 * 1000};
    u64 ns0 = 0, ns1 = 0, tsc0 = 0, tsc1 = 0;

    read_clocks(&ns0, &tsc0);
    nanosleep(&pause, NULL);
    read_clocks(&ns1, &tsc1);
    if (ns1 <= ns0)
        return NS_PER_SEC;
    return (u64)((u128)(tsc1 - tsc0) * NS_PER_SEC / (ns1 - ns0)) / 1000 * 1000;
}

static u64 found_tsc_hz;

static void find_tsc_hz(void)
{
    found_tsc_hz = tsc_hz_stated();
    if (found_tsc_hz < 100 * 1000 * 1000)
        found_tsc_hz = tsc_hz_measured();
}

u64 host_tsc_hz(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, find_tsc_hz);
    return found_tsc_hz;
}
