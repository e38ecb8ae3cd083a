/*
 * The CPUID model: what a guest's processor says of itself, the same under every engine.
 *
 * A model is made once from a name (host, v2, v3), the host's own CPUID and the number of CPUs. The
 * features that it offers are also what the software engine decodes: an instruction whose feature
 * is not offered raises #UD. Feature names come from cpuid_features.def.
 */
#ifndef DOPPEL_X86_CPUID_H
#define DOPPEL_X86_CPUID_H

#include "host/error.h"
#include "host/types.h"

enum cpuid_feature {
#define CPUID_FEATURE(name, leaf, subleaf, reg, bit) FEATURE_##name,
#include "x86/cpuid_features.def"
#undef CPUID_FEATURE
    FEATURE_COUNT,
};

struct cpuid_regs {
    u32 eax, ebx, ecx, edx;
};

struct cpuid_model;

/* How a machine's processors are arranged: cores a socket, threads a core. */
struct cpu_topology {
    unsigned sockets, cores, threads;
};

/* Which features an engine can offer at all: one bit a feature, indexed by enum cpuid_feature. */
struct cpuid_support {
    u64 bits[(FEATURE_COUNT + 63) / 64];
};

/*
 * name: "host", "v2", "v3", or "max" (all of the engine's support, for tests). support: the
 * engine's; features outside it are never offered. tsc_hz: the guest's TSC frequency. -EINVAL (err
 * set) when the name is unknown or this host lacks what the model promises (v3 on a host without
 * AVX2: SIMD runs on the host's units).
 */
struct cpuid_model *cpuid_model_create(const char *name, const struct cpuid_support *support,
                                       unsigned ncpus, u64 tsc_hz, struct error *err);
void cpuid_model_destroy(struct cpuid_model *m);

bool cpuid_model_has(const struct cpuid_model *m, enum cpuid_feature f);
/* XCR0 bits that may be set; the guest's physical address width; its TSC's frequency. No model has
 * supervisor state in XSAVE: IA32_XSS stays 0. */
u64 cpuid_model_xcr0(const struct cpuid_model *m);
unsigned cpuid_model_phys_bits(const struct cpuid_model *m);
/*
 * Before the model is used: offers the virtualisation of the host's vendor (VMX or SVM). -EINVAL, err set,
 * when the model isn't `host` or `support`, the engine's, has none.
 */
int cpuid_model_offer_nested(struct cpuid_model *m, const struct cpuid_support *support,
                             struct error *err);
/* Before the model is used: no more than these, at least 36. */
void cpuid_model_limit_phys_bits(struct cpuid_model *m, unsigned bits);
/* Before the model is used: without these of KVM's paravirtual features, bits of EAX in leaf 0x40000001. */
void cpuid_model_drop_pv(struct cpuid_model *m, u32 bits);
/* Before the model is used: the product of the three is its number of CPUs. Without it they are the cores
 * of one socket. */
void cpuid_model_set_topology(struct cpuid_model *m, const struct cpu_topology *t);
struct cpu_topology cpuid_model_topology(const struct cpuid_model *m);
/* The APIC ID of a CPU: its thread, core and socket, each in bits of its own (SDM vol. 3, 9.9.1). Less than 256
 * for up to 64 CPUs. */
u32 cpuid_model_apic_id(const struct cpuid_model *m, unsigned index);
u64 cpuid_model_tsc_hz(const struct cpuid_model *m);
/* Whether the vendor is AMD or Hygon, where SYSCALL, SYSENTER and some MSRs differ from Intel's. */
bool cpuid_model_is_amd(const struct cpuid_model *m);

/* What depends on the asking processor's state. */
struct cpuid_dynamic {
    unsigned index; /* its number */
    u64 cr4, xcr0, xss;
    bool apic_enabled;
};
/* The CPUID instruction (SDM vol. 2A): leaf in EAX, subleaf in ECX. */
void cpuid_model_query(const struct cpuid_model *m, const struct cpuid_dynamic *d, u32 leaf,
                       u32 subleaf, struct cpuid_regs *out);

/* The host's own CPUID; and whether it has a feature. */
void cpuid_host(u32 leaf, u32 subleaf, struct cpuid_regs *out);
bool cpuid_host_has(enum cpuid_feature f);

/* The host's TSC frequency in Hz, from CPUID or measured against CLOCK_MONOTONIC once. */
u64 host_tsc_hz(void);

#endif
