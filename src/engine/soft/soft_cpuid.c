/*
 * What the software processor offers.
 *
 * Two lists: what it does by itself, on every host; and what runs on the host's own units, offered
 * where the host has it (and where the host's OS lets the state be used: XCR0). Not offered: VMX,
 * SVM, HLE and RTM, CET, MPX, AMX, performance counters.
 *
 * The "not affected" bits (AUTO_IBRS, BTC_NO, SRSO_NO; IA32_ARCH_CAPABILITIES): the sequences with
 * which a guest's kernel guards itself against its user mode are written for a processor's own
 * predictors and buffers. Guest code that is interpreted or translated doesn't meet those in the
 * way that they assume, so they cost much and guard nothing. The isolation of guest from host is
 * the engine's and doesn't rest on these bits.
 */
#include "engine/soft/soft_cpuid.h"
#include "x86/regs.h"

#include <pthread.h>

/* clang-format off */
static const u8 own[] = {
    FEATURE_FPU, FEATURE_VME, FEATURE_DE, FEATURE_PSE, FEATURE_TSC, FEATURE_MSR, FEATURE_PAE,
    FEATURE_MCE, FEATURE_CX8, FEATURE_APIC, FEATURE_SEP, FEATURE_MTRR, FEATURE_PGE, FEATURE_MCA,
    FEATURE_CMOV, FEATURE_PAT, FEATURE_PSE36, FEATURE_CLFLUSH, FEATURE_MMX, FEATURE_FXSR,
    FEATURE_SSE, FEATURE_SSE2, FEATURE_MONITOR, FEATURE_CX16, FEATURE_PCID, FEATURE_X2APIC,
    FEATURE_MOVBE, FEATURE_POPCNT, FEATURE_TSC_DEADLINE, FEATURE_XSAVE, FEATURE_RDRAND,
    FEATURE_HYPERVISOR, FEATURE_ARAT, FEATURE_FSGSBASE, FEATURE_TSC_ADJUST, FEATURE_BMI1,
    FEATURE_SMEP, FEATURE_BMI2, FEATURE_ERMS, FEATURE_INVPCID, FEATURE_RDSEED, FEATURE_ADX,
    FEATURE_SMAP, FEATURE_CLFLUSHOPT, FEATURE_CLWB, FEATURE_UMIP, FEATURE_PKU, FEATURE_LA57,
    FEATURE_RDPID, FEATURE_PKS, FEATURE_FSRM, FEATURE_SPEC_CTRL, FEATURE_ARCH_CAPABILITIES,
    FEATURE_XSAVEOPT, FEATURE_XSAVEC, FEATURE_XGETBV1, FEATURE_XSAVES, FEATURE_LAHF64,
    FEATURE_CR8_LEGACY, FEATURE_LZCNT, FEATURE_PREFETCHW, FEATURE_TOPOEXT, FEATURE_SYSCALL,
    FEATURE_NX, FEATURE_PAGE1GB, FEATURE_RDTSCP, FEATURE_LM, FEATURE_INVARIANT_TSC,
    FEATURE_BTC_NO, FEATURE_LFENCE_SERIALIZING, FEATURE_NULL_SEL_CLEARS_BASE, FEATURE_AUTO_IBRS,
    FEATURE_SRSO_NO, FEATURE_KVM_CLOCKSOURCE2, FEATURE_KVM_CLOCKSOURCE_STABLE,
    FEATURE_KVM_STEAL_TIME, FEATURE_KVM_PV_EOI, FEATURE_KVM_PV_UNHALT, FEATURE_KVM_PV_TLB_FLUSH,
    FEATURE_KVM_PV_SEND_IPI, FEATURE_KVM_PV_SCHED_YIELD,
};
/* clang-format on */

/* `state`: what XCR0 must hold on the host for the feature to be usable there. */
#define YMM (XCR0_SSE | XCR0_AVX)
#define ZMM (YMM | XCR0_AVX512)
static const struct {
    enum cpuid_feature feature;
    u64 state;
} hosted[] = {
    {FEATURE_SSE3, 0},
    {FEATURE_PCLMUL, 0},
    {FEATURE_SSSE3, 0},
    {FEATURE_FMA, YMM},
    {FEATURE_SSE41, 0},
    {FEATURE_SSE42, 0},
    {FEATURE_AES, 0},
    {FEATURE_AVX, YMM},
    {FEATURE_F16C, YMM},
    {FEATURE_AVX2, YMM},
    {FEATURE_ZERO_FCS_FDS, 0},
    {FEATURE_AVX512F, ZMM},
    {FEATURE_AVX512DQ, ZMM},
    {FEATURE_AVX512IFMA, ZMM},
    {FEATURE_AVX512CD, ZMM},
    {FEATURE_SHA, 0},
    {FEATURE_AVX512BW, ZMM},
    {FEATURE_AVX512VL, ZMM},
    {FEATURE_AVX512VBMI, ZMM},
    {FEATURE_AVX512VBMI2, ZMM},
    {FEATURE_GFNI, 0},
    {FEATURE_VAES, YMM},
    {FEATURE_VPCLMULQDQ, YMM},
    {FEATURE_AVX512VNNI, ZMM},
    {FEATURE_AVX512BITALG, ZMM},
    {FEATURE_AVX512VPOPCNTDQ, ZMM},
    {FEATURE_AVX512BF16, ZMM},
    {FEATURE_SSE4A, 0},
    {FEATURE_MISALIGNSSE, 0},
    {FEATURE_MMXEXT, 0},
};
#undef YMM
#undef ZMM

static struct cpuid_support support;

static u64 host_xcr0(void)
{
    struct cpuid_regs r;
    u32 low, high;

    cpuid_host(1, 0, &r);
    if (!(r.ecx & BIT(27))) /* OSXSAVE */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (u64)high << 32 | low;
}

static void find_support(void)
{
    u64 xcr0 = host_xcr0();

    for (size_t i = 0; i < ARRAY_SIZE(own); i++)
        support.bits[own[i] / 64] |= BIT(own[i] % 64);
    for (size_t i = 0; i < ARRAY_SIZE(hosted); i++) {
        enum cpuid_feature f = hosted[i].feature;

        if ((xcr0 & hosted[i].state) == hosted[i].state && cpuid_host_has(f))
            support.bits[f / 64] |= BIT(f % 64);
    }
}

const struct cpuid_support *soft_cpuid_support(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, find_support);
    return &support;
}
