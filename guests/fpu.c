/*
 * The floating-point unit's state and the switches around it: FXSAVE and XSAVE images, the FNSTENV
 * forms, #NM by TS, EM and MP, #MF, #XM, XCR0 and what it enables, and header faults of XRSTOR.
 * Built for 32 and 64 bits.
 *
 * Intel SDM vol. 1, chapters 8, 10.5 and 13; vol. 3, chapter 13.
 */
#include "guest.h"

#define XCR0_X87 BIT(0)
#define XCR0_SSE BIT(1)
#define XCR0_AVX BIT(2)
#define CPUID_XSAVE BIT(26)
#define CPUID_AVX BIT(28)
#define ALL_MASKED 0x1f80

static u8 image[4096] __attribute__((aligned(64))), other[4096] __attribute__((aligned(64)));

static u16 u16_at(const u8 *at)
{
    return (u16)(at[0] | at[1] << 8);
}
static u32 u32_at(const u8 *at)
{
    return u16_at(at) | (u32)u16_at(at + 2) << 16;
}
static u64 u64_at(const u8 *at)
{
    return u32_at(at) | (u64)u32_at(at + 4) << 32;
}

static void x87_environment(void)
{
    static u8 env[128];
    u16 control = 0x27f;
    word at;

    __asm__ volatile("fninit; fldcw %1; fld1; fldpi; " MOVW "$1f, %0; 1: fldz"
                     : "=&r"(at)
                     : "m"(control));
    memset(env, 0xcc, sizeof(env));
    __asm__ volatile("fnstenv %0" : "=m"(env));
    check_equal("fnstenv-control", u32_at(env), 0xffff027f);
    check_equal("fnstenv-status-top", u32_at(env + 4), 0xffff0000 | 5 << 11);
    check_equal("fnstenv-tags", u32_at(env + 8), 0xffff07ff);
    check_equal("fnstenv-ip", u32_at(env + 12), (u32)at);
    check_equal("fnstenv-length", env[28], 0xcc);
    __asm__ volatile("fnstcw %0" : "=m"(control));
    check_equal("fnstenv-masks-all", control, 0x27f | 0x3f);
    memset(env, 0xcc, sizeof(env));
    __asm__ volatile("data16 fnstenv %0" : "=m"(env));
    check_equal("fnstenv16-control", u16_at(env), 0x27f);
    check_equal("fnstenv16-tags", u16_at(env + 4), 0x7ff);
    check_equal("fnstenv16-ip", u16_at(env + 6), (u16)at);
    check_equal("fnstenv16-length", env[14], 0xcc);
    memset(env, 0xcc, sizeof(env));
    __asm__ volatile("fnsave %0" : "=m"(env));
    check_equal("fnsave-st0-zero", u64_at(env + 28), 0);
    check_equal("fnsave-st2-one", u64_at(env + 48), BIT(63));
    check_equal("fnsave-length", env[108], 0xcc);
    __asm__ volatile("fnstcw %0" : "=m"(control));
    check_equal("fnsave-initializes", control, 0x37f);
    __asm__ volatile("frstor %0; fnstcw %1" : : "m"(env), "m"(control));
    check_equal("frstor-control", control, 0x27f);
    __asm__ volatile("fstp %%st; fstp %%st; fnstsw %0; fninit" : "=m"(control));
    check_equal("frstor-stack", control >> 11 & 7, 7);
}

static void switches(void)
{
    word base = cr0() & ~(CR0_MP | CR0_EM | CR0_TS);

    for (unsigned n = 0; n < 8; n++) {
        bool mp = n & 1, em = n & 2, ts = n & 4;
        static const char *const groups[] = {"",    "mp-",    "em-",    "em-mp-",
                                             "ts-", "ts-mp-", "ts-em-", "ts-em-mp-"};

        check_group = groups[n];
        set_cr0(base | (mp ? CR0_MP : 0) | (em ? CR0_EM : 0) | (ts ? CR0_TS : 0));
        FAULTS("switch-x87", em || ts ? NM : NONE, 0, "fnop", :);
        FAULTS("switch-wait", mp && ts ? NM : NONE, 0, "fwait", :);
        FAULTS("switch-mmx", em ? UD : ts ? NM : NONE, 0, ".byte 0x0f, 0xef, 0xc0", :);
        FAULTS("switch-sse", em ? UD : ts ? NM : NONE, 0, ".byte 0x0f, 0x57, 0xc0", :);
        FAULTS("switch-fxsave", em || ts ? NM : NONE, 0, "fxsave (%0)", : : "r"(image) : "memory");
        FAULTS("switch-ldmxcsr",
               em   ? UD
               : ts ? NM
                    : NONE,
               0, "ldmxcsr %0",
               :
               : "m"((u32){ALL_MASKED}));
        FAULTS("switch-prefetch", NONE, 0, ".byte 0x0f, 0x18, 0x08", : : "a"(image));
        FAULTS("switch-sfence", NONE, 0, "sfence", :);
    }
    check_group = "";
    set_cr0(base | CR0_MP);
    __asm__ volatile("fninit");
}

static void x87_errors(void)
{
    u16 control = 0x37e, status;
    static u8 env[28];

    /* Raised at the next instruction that waits; those of control do not. */
    __asm__ volatile("fninit; fldcw %0; fldz; fdiv %%st, %%st" : : "m"(control));
    WORKS("mf-not-at-fnstenv", "fnstenv %0", : "=m"(env) :);
    check_equal("mf-status-in-environment", u16_at(env + 4) & 0x8081, 0x8081);
    WORKS("mf-not-when-masked-by-fnstenv", "fwait", :);
    WORKS("mf-not-at-fnclex", "fnclex", :);
    __asm__ volatile("fninit; fldcw %0; fldz; fdiv %%st, %%st" : : "m"(control));
    FAULTS("mf-at-fld", MF, 0, "fld1", :);
    FAULTS("mf-at-mmx", MF, 0, ".byte 0x0f, 0xef, 0xc0", :);
    FAULTS("mf-at-emms", MF, 0, "emms", :);
    WORKS("mf-not-at-sse", ".byte 0x0f, 0x57, 0xc0", :);
    WORKS("mf-not-at-fxsave", "fxsave (%0)", : : "r"(image) : "memory");
    WORKS("mf-cleared-by-fnclex", "fnclex; fwait", :);
    __asm__ volatile("fnstsw %0; fninit" : "=m"(status));
    check_equal("fnclex-clears", status & 0x80ff, 0);
    /* FLDCW that unmasks what is pending raises ES. */
    control = 0x37f;
    __asm__ volatile("fldcw %0; fldz; fdiv %%st, %%st" : : "m"(control));
    control = 0x37e;
    WORKS("fldcw-unmasks", "fldcw %0", : : "m"(control));
    FAULTS("mf-after-unmasking", MF, 0, "fwait", :);
    __asm__ volatile("fninit; fxrstor (%0)" : : "r"(image));
    FAULTS("mf-restored-by-fxrstor", MF, 0, "fwait", :);
    __asm__ volatile("fninit");
    WORKS("stack-underflow-masked", "fstp %%st; fnstsw %%ax", : : : "eax");
    __asm__ volatile("fnstsw %0; fninit" : "=m"(status));
    check_equal("stack-underflow-status", status & 0x0241, 0x41);
}

/* %xmm0 = four times `bits`, and the same in %xmm1. */
static void sse_set(u32 a, u32 b)
{
    static u32 va[4] __attribute__((aligned(16))), vb[4] __attribute__((aligned(16)));

    for (unsigned i = 0; i < 4; i++) {
        va[i] = a;
        vb[i] = b;
    }
    __asm__ volatile("movaps %0, %%xmm0; movaps %1, %%xmm1" : : "m"(va), "m"(vb));
}

static u32 mxcsr_get(void)
{
    u32 v;

    __asm__ volatile("stmxcsr %0" : "=m"(v));
    return v;
}
static void mxcsr_set(u32 v)
{
    __asm__ volatile("ldmxcsr %0" : : "m"(v));
}

static void sse_errors(void)
{
    static const struct {
        const char *name;
        u32 flag, a, b;
    } cases[] = {
        {"xm-invalid", 0x01, 0, 0},
        {"xm-denormal", 0x02, 1, 0x3f800000},
        {"xm-divide-by-zero", 0x04, 0x3f800000, 0},
        {"xm-overflow", 0x08, 0x7f7fffff, 0x00800000},
        {"xm-underflow", 0x10, 0x00800000, 0x7f7fffff},
        {"xm-precision", 0x20, 0x3f800000, 0x40400000},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        u32 out[4] __attribute__((aligned(16)));

        mxcsr_set(ALL_MASKED & ~(cases[i].flag << 7));
        sse_set(cases[i].a, cases[i].b);
        check_group = cases[i].name;
        FAULTS("", XM, 0, "divps %%xmm1, %%xmm0", :);
        __asm__ volatile("movaps %%xmm0, %0" : "=m"(out));
        check("-flag-and-destination", mxcsr_get() & cases[i].flag && out[0] == cases[i].a);
        set_cr4(cr4() & ~(word)CR4_OSXMMEXCPT);
        FAULTS("-is-ud-without-osxmmexcpt", UD, 0, "divps %%xmm1, %%xmm0", :);
        set_cr4(cr4() | (word)CR4_OSXMMEXCPT);
    }
    check_group = "";
    /* A flag that is set, and unmasked by LDMXCSR, raises nothing by itself. */
    WORKS("xm-not-by-ldmxcsr", "ldmxcsr %0", : : "m"((u32){0x003f}));
    sse_set(0x40000000, 0x40000000);
    WORKS("xm-not-by-old-flags", "divps %%xmm1, %%xmm0", :);
    mxcsr_set(ALL_MASKED);
    FAULTS("mxcsr-reserved", GP, 0, "ldmxcsr %0", : : "m"((u32){0x10000}));
    check_equal("mxcsr-unchanged-by-fault", mxcsr_get(), ALL_MASKED);
}

static void fxsave(void)
{
    memset(image, 0xcc, 512);
    __asm__ volatile("fninit; fld1; fldpi");
    sse_set(0x11111111, 0x22222222);
    __asm__ volatile("fxsave (%0)" : : "r"(image) : "memory");
    check_equal("fxsave-control", u16_at(image), 0x37f);
    check_equal("fxsave-status", u16_at(image + 2), 6 << 11);
    check_equal("fxsave-abridged-tags", image[4], 0xc0);
    check_equal("fxsave-mxcsr", u32_at(image + 24), ALL_MASKED);
    check_equal("fxsave-mxcsr-mask", u32_at(image + 28) & 0xffff, 0xffff);
    check_equal("fxsave-st1", u64_at(image + 48), BIT(63));
    check_equal("fxsave-st1-exponent", u16_at(image + 56), 0x3fff);
    check_equal("fxsave-xmm1", u64_at(image + 176), 0x2222222222222222);
    check_equal("fxsave-spares-software-area", u64_at(image + 464), 0xcccccccccccccccc);
    FAULTS("fxsave-misaligned", GP, 0, "fxsave (%0)", : : "r"(image + 8) : "memory");
    FAULTS("fxrstor-misaligned", GP, 0, "fxrstor (%0)", : : "r"(image + 4));
    memcpy(other, image, 512);
    other[26] = 1;
    FAULTS("fxrstor-mxcsr-reserved", GP, 0, "fxrstor (%0)", : : "r"(other));
    __asm__ volatile("fninit");
    sse_set(0, 0);
    __asm__ volatile("fxrstor (%0); fxsave (%1)" : : "r"(image), "r"(other) : "memory");
    check("fxrstor-all", !memcmp(other, image, 5) && !memcmp(other + 32, image + 32, 160));
    set_cr4(cr4() & ~(word)CR4_OSFXSR);
    WORKS("fxsave-without-osfxsr", "fxsave (%0)", : : "r"(other) : "memory");
    set_cr4(cr4() | (word)CR4_OSFXSR);
#ifdef __x86_64__
    __asm__ volatile("fxsave64 (%0)" : : "r"(other) : "memory");
    check_equal("fxsave64-xmm1", u64_at(other + 176), 0x2222222222222222);
#endif
}

static void xsetbv(u64 v, u32 index)
{
    TRY("xsetbv", : : "a"((u32)v), "d"((u32)(v >> 32)), "c"(index));
}
static void xsave(void *to, u32 mask)
{
    __asm__ volatile("xsave (%0)" : : "r"(to), "a"(mask), "d"(0) : "memory");
}
#define XRSTOR(from, mask) TRY("xrstor (%0)", : : "r"(from), "a"(mask), "d"(0))

static void user_xsetbv(void)
{
    FAULTS("xsetbv-in-user-mode", GP, 0, "xsetbv", : : "a"(1), "d"(0), "c"(0));
    WORKS("xgetbv-in-user-mode", "xgetbv", : : "c"(0) : "eax", "edx");
}

static void extended(void)
{
    u64 have = cpuid(13, 0).a;
    bool avx = cpuid(1, 0).c & CPUID_AVX;

    if (!(cpuid(1, 0).c & CPUID_XSAVE)) {
        skip("xsave", "not there");
        FAULTS("osxsave-not-there", GP, 0, "mov %0, %%cr4", : : "r"(cr4() | (word)CR4_OSXSAVE));
        return;
    }
    FAULTS("xgetbv-without-osxsave", UD, 0, "xgetbv", : : "c"(0) : "eax", "edx");
    FAULTS("xsave-without-osxsave", UD, 0, "xsave (%0)", : : "r"(image), "a"(1), "d"(0) : "memory");
    if (avx)
        FAULTS("avx-without-osxsave", UD, 0, "vxorps %%xmm0, %%xmm0, %%xmm0", :);
    check("cpuid-osxsave-clear", !(cpuid(1, 0).c & BIT(27)));
    set_cr4(cr4() | (word)CR4_OSXSAVE);
    check("cpuid-osxsave-set", cpuid(1, 0).c & BIT(27));
    check("run-user", run_user(user_xsetbv, 0));
    if (avx)
        FAULTS("avx-without-xcr0", UD, 0, "vxorps %%xmm0, %%xmm0, %%xmm0", :);
    xsetbv(0, 0);
    expect_fault("xsetbv-without-x87", GP, 0);
    xsetbv(XCR0_X87 | XCR0_AVX, 0);
    expect_fault("xsetbv-avx-without-sse", GP, 0);
    xsetbv(XCR0_X87 | BIT(62), 0);
    expect_fault("xsetbv-unknown", GP, 0);
    xsetbv(XCR0_X87, 1);
    expect_fault("xsetbv-index", GP, 0);
    FAULTS("xgetbv-index", GP, 0, "xgetbv", : : "c"(7) : "eax", "edx");
    xsetbv(XCR0_X87 | XCR0_SSE, 0);
    expect_fault("xsetbv-sse", NONE, 0);
    check_equal("cpuid-size-of-enabled", cpuid(13, 0).b, 576);

    /* The standard form, its header and its faults. */
    __asm__ volatile("fninit; fldpi");
    sse_set(0x33333333, 0x44444444);
    memset(image, 0, sizeof(image));
    xsave(image, 3);
    check_equal("xsave-xstate-bv", u64_at(image + 512), 3);
    check_equal("xsave-xmm1", u64_at(image + 176), 0x4444444444444444);
    sse_set(0, 0);
    XRSTOR(image, 3);
    memset(other, 0, sizeof(other));
    xsave(other, 3);
    check("xrstor-restores", !memcmp(other + 160, image + 160, 32));
    image[512] = 1;
    XRSTOR(image, 2);
    xsave(other, 3);
    check("xrstor-initializes-what-is-not-in-use", !u64_at(other + 160) && !u64_at(other + 176));
    image[520] = 1;
    XRSTOR(image, 3);
    expect_fault("xrstor-xcomp-bv", GP, 0);
    image[520] = 0;
    image[528] = 1;
    XRSTOR(image, 3);
    expect_fault("xrstor-header-reserved", GP, 0);
    image[528] = 0;
    image[512] = 7;
    XRSTOR(image, 3);
    expect_fault("xrstor-component-not-enabled", GP, 0);
    image[512] = 3;
    image[26] = 1;
    XRSTOR(image, 3);
    expect_fault("xrstor-mxcsr-reserved", GP, 0);
    image[26] = 0;
    XRSTOR(image + 16, 3);
    expect_fault("xrstor-misaligned", GP, 0);
    set_cr0(cr0() | CR0_TS);
    XRSTOR(image, 3);
    expect_fault("xrstor-ts", NM, 0);
    xsetbv(XCR0_X87 | XCR0_SSE, 0);
    expect_fault("xsetbv-not-by-ts", NONE, 0);
    __asm__ volatile("clts");

    if (!avx || !(have & XCR0_AVX)) {
        skip("avx", "not there");
        return;
    }
    xsetbv(XCR0_X87 | XCR0_SSE | XCR0_AVX, 0);
    expect_fault("xsetbv-avx", NONE, 0);
    check_equal("cpuid-size-with-avx", cpuid(13, 0).b, 832);
    WORKS("avx-enabled", "vxorps %%xmm0, %%xmm0, %%xmm0", :);
    __asm__ volatile("vzeroall; vpcmpeqd %xmm2, %xmm2, %xmm2; vinsertf128 $1, %xmm2, %ymm2, %ymm2");
    memset(image, 0, sizeof(image));
    xsave(image, 7);
    check_equal("avx-upper-half", u64_at(image + 576 + 32), ~0ULL);
    check_equal("avx-in-use", u64_at(image + 512) & 4, 4);
    __asm__ volatile("vzeroall");
    XRSTOR(image, 7);
    memset(other, 0, sizeof(other));
    xsave(other, 7);
    check_equal("avx-restored", u64_at(other + 576 + 40), ~0ULL);
    XRSTOR(image, 3);
    __asm__ volatile("movaps %xmm3, %xmm2");
    xsave(other, 7);
    check_equal("sse-spares-the-upper-half", u64_at(other + 576 + 32), ~0ULL);
    set_cr0(cr0() | CR0_TS);
    FAULTS("avx-ts", NM, 0, "vxorps %%xmm0, %%xmm0, %%xmm0", :);
    __asm__ volatile("clts");
    set_cr0(cr0() | CR0_EM);
    WORKS("avx-not-by-em", "vxorps %%xmm0, %%xmm0, %%xmm0", :);
    set_cr0(cr0() & ~CR0_EM);
    set_cr4(cr4() & ~(word)CR4_OSXSAVE);
    FAULTS("avx-osxsave-off-again", UD, 0, "vxorps %%xmm0, %%xmm0, %%xmm0", :);
    set_cr4(cr4() | (word)CR4_OSXSAVE);
    WORKS("xcr0-survives-osxsave", "vxorps %%xmm0, %%xmm0, %%xmm0", :);
}

void guest_main(void)
{
    x87_environment();
    switches();
    x87_errors();
    fxsave();
    sse_errors();
    extended();
}
