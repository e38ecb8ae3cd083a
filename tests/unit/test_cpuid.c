/*
 * The CPUID models: fixed ones are the same for every engine, and every leaf is consistent in
 * itself.
 */
#include "engine/soft/soft_cpuid.h"
#include "x86/cpuid.h"
#include "x86/lapic.h"
#include "x86/regs.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define HZ 2994375000ull

static const struct cpuid_dynamic running = {.xcr0 = 1, .apic_enabled = true};

static void support_all(struct cpuid_support *s)
{
    memset(s, 0xff, sizeof(*s));
}

static struct cpuid_model *make(const char *name, const struct cpuid_support *s, unsigned ncpus)
{
    struct error err = {0};
    struct cpuid_model *m = cpuid_model_create(name, s, ncpus, HZ, &err);

    if (!m)
        fail_msg("%s: %s", name, err.text);
    return m;
}

static struct cpuid_regs ask(const struct cpuid_model *m, u32 leaf, u32 subleaf)
{
    struct cpuid_regs r;

    cpuid_model_query(m, &running, leaf, subleaf, &r);
    return r;
}

static void unknown_model_and_missing_feature_are_refused(void **unused)
{
    struct cpuid_support s;
    struct error err = {0};

    support_all(&s);
    assert_null(cpuid_model_create("v9", &s, 1, HZ, &err));
    assert_int_equal(err.class, ERROR_INPUT);
    assert_null(cpuid_model_create("v2", &s, 0, HZ, &err));
    assert_null(cpuid_model_create("v2", &s, 256, HZ, &err));
    s.bits[FEATURE_AVX2 / 64] &= ~BIT(FEATURE_AVX2 % 64);
    assert_null(cpuid_model_create("v3", &s, 1, HZ, &err));
    assert_non_null(strstr(err.text, "AVX2"));
    cpuid_model_destroy(make("v2", &s, 1));
}

static void levels_do_not_depend_on_the_engine(void **unused)
{
    static const char *const names[] = {"v2", "v3"};
    struct cpuid_support all;

    support_all(&all);
    for (int n = 0; n < 2; n++) {
        struct cpuid_model *a = make(names[n], &all, 4);
        struct cpuid_model *b = make(names[n], soft_cpuid_support(), 4);

        for (u32 leaf = 0; leaf < 0x20; leaf++) {
            for (u32 base = 0; base < 2; base++) {
                for (u32 sub = 0; sub < 8; sub++) {
                    struct cpuid_regs ra = ask(a, leaf | base << 31, sub);
                    struct cpuid_regs rb = ask(b, leaf | base << 31, sub);

                    assert_memory_equal(&ra, &rb, sizeof(ra));
                }
            }
        }
        cpuid_model_destroy(a);
        cpuid_model_destroy(b);
    }
}

static void host_offers_no_more_than_the_engine(void **unused)
{
    struct cpuid_support none = {0};
    struct cpuid_model *m = make("host", &none, 1);
    struct cpuid_regs r;

    for (unsigned f = 0; f < FEATURE_COUNT; f++)
        assert_false(cpuid_model_has(m, f));
    r = ask(m, 1, 0);
    assert_int_equal(r.ecx | r.edx, 0);
    assert_int_equal(cpuid_model_xcr0(m), 0);
    cpuid_model_destroy(m);

    m = make("host", soft_cpuid_support(), 1);
    assert_true(cpuid_model_has(m, FEATURE_SSE2));
    assert_true(cpuid_model_has(m, FEATURE_LM));
    assert_true(cpuid_model_has(m, FEATURE_X2APIC));
    r = ask(m, 0x80000001, 0);
    assert_true(r.edx & BIT(29));
    cpuid_model_destroy(m);
}

static void features_without_their_basis_go(void **unused)
{
    struct cpuid_support s;
    struct cpuid_model *m;

    support_all(&s);
    s.bits[FEATURE_XSAVE / 64] &= ~BIT(FEATURE_XSAVE % 64);
    m = make("max", &s, 1);
    assert_false(cpuid_model_has(m, FEATURE_AVX));
    assert_false(cpuid_model_has(m, FEATURE_AVX512BW));
    assert_false(cpuid_model_has(m, FEATURE_AVX512VBMI2));
    assert_false(cpuid_model_has(m, FEATURE_PKU));
    assert_false(cpuid_model_has(m, FEATURE_XSAVES));
    assert_true(cpuid_model_has(m, FEATURE_SSE42));
    assert_int_equal(ask(m, 0xd, 0).ebx, 0);
    cpuid_model_destroy(m);
}

static void dynamic_bits_follow_the_processor(void **unused)
{
    struct cpuid_model *m = make("max", soft_cpuid_support(), 2);
    struct cpuid_dynamic d = {.index = 1, .cr4 = CR4_OSXSAVE | CR4_PKE, .xcr0 = 1};
    struct cpuid_regs r;

    cpuid_model_query(m, &d, 1, 0, &r);
    assert_true(r.ecx & BIT(27));
    assert_false(r.edx & BIT(9));
    assert_int_equal(r.ebx >> 24, 1);
    assert_int_equal((r.ebx >> 16) & 0xff, 2);
    cpuid_model_query(m, &d, 7, 0, &r);
    assert_true(r.ecx & BIT(4));
    cpuid_model_query(m, &d, 0xb, 1, &r);
    assert_int_equal(r.edx, 1);

    r = ask(m, 1, 0);
    assert_false(r.ecx & BIT(27));
    assert_true(r.edx & BIT(9));
    assert_false(ask(m, 7, 0).ecx & BIT(4));
    cpuid_model_destroy(m);
}

static void xsave_areas_fit(void **unused)
{
    struct cpuid_model *m = make("max", soft_cpuid_support(), 1);
    struct cpuid_dynamic d = running;
    u64 xcr0 = cpuid_model_xcr0(m);
    struct cpuid_regs r, all;
    u32 end = 576, sum = 576;

    all = ask(m, 0xd, 0);
    assert_int_equal(all.eax, xcr0);
    assert_int_equal(all.ebx, 576);
    for (u32 i = 2; i < 63; i++) {
        r = ask(m, 0xd, i);
        if (!(xcr0 & BIT(i))) {
            assert_int_equal(r.eax, 0);
            continue;
        }
        assert_true(r.ebx >= end);
        end = r.ebx + r.eax;
        sum += r.eax;
    }
    assert_int_equal(all.ecx, end);
    d.xcr0 = xcr0;
    cpuid_model_query(m, &d, 0xd, 0, &r);
    assert_int_equal(r.ebx, end);
    cpuid_model_query(m, &d, 0xd, 1, &r);
    assert_true(r.ebx >= sum && r.ebx < sum + 64 * 8);
    d.xcr0 = 3;
    cpuid_model_query(m, &d, 0xd, 0, &r);
    assert_int_equal(r.ebx, 576);
    cpuid_model_destroy(m);

    m = make("v3", soft_cpuid_support(), 1);
    assert_int_equal(ask(m, 0xd, 0).ecx, 832);
    cpuid_model_destroy(m);
}

static void topology_counts_every_cpu(void **unused)
{
    static const struct {
        unsigned ncpus, shift;
    } cases[] = {{1, 0}, {2, 1}, {3, 2}, {4, 2}, {64, 6}};

    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct cpuid_model *m = make("v3", soft_cpuid_support(), cases[i].ncpus);
        struct cpuid_regs r = ask(m, 0xb, 0);

        assert_int_equal(r.eax, 0);
        assert_int_equal(r.ebx, 1);
        assert_int_equal(r.ecx, 0x100);
        r = ask(m, 0xb, 1);
        assert_int_equal(r.eax, cases[i].shift);
        assert_int_equal(r.ebx, cases[i].ncpus);
        assert_int_equal(r.ecx, 0x201);
        r = ask(m, 0xb, 2);
        assert_int_equal(r.eax | r.ebx, 0);
        assert_int_equal(r.ecx, 2);
        r = ask(m, 4, 0);
        assert_int_equal(r.eax >> 26, (1u << cases[i].shift) - 1);
        assert_int_equal(!!(ask(m, 1, 0).edx & BIT(28)), cases[i].ncpus > 1);
        assert_int_equal(ask(m, 4, 4).eax, 0);
        cpuid_model_destroy(m);
    }
}

static void topology_has_bits_of_its_own_for_each_level(void **unused)
{
    static const u32 ids[] = {0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13};
    const struct cpu_topology topology = {.sockets = 2, .cores = 3, .threads = 2};
    struct cpuid_model *m = make("v3", soft_cpuid_support(), 12);
    struct cpuid_regs r;

    cpuid_model_set_topology(m, &topology);
    for (unsigned n = 0; n < ARRAY_SIZE(ids); n++) {
        struct cpuid_dynamic d = {.index = n};

        assert_int_equal(cpuid_model_apic_id(m, n), ids[n]);
        cpuid_model_query(m, &d, 1, 0, &r);
        assert_int_equal(r.ebx >> 24, ids[n]);
        assert_int_equal(r.ebx >> 16 & 0xff, 6);
        cpuid_model_query(m, &d, 0xb, 1, &r);
        assert_int_equal(r.edx, ids[n]);
    }
    r = ask(m, 0xb, 0);
    assert_int_equal(r.eax, 1);
    assert_int_equal(r.ebx, 2);
    r = ask(m, 0xb, 1);
    assert_int_equal(r.eax, 3);
    assert_int_equal(r.ebx, 6);
    r = ask(m, 4, 0); /* L1: the two threads of a core; cores by their IDs */
    assert_int_equal(r.eax >> 14 & 0xfff, 1);
    assert_int_equal(r.eax >> 26, 3);
    r = ask(m, 4, 3); /* L3: the socket's IDs */
    assert_int_equal(r.eax >> 14 & 0xfff, 7);
    cpuid_model_destroy(m);
}

static void tsc_leaf_states_the_frequency(void **unused)
{
    static const u64 hz[] = {1000000000, 1896000000, 2994375000, 3700001000, 5800000000};
    struct error err;

    for (size_t i = 0; i < ARRAY_SIZE(hz); i++) {
        struct cpuid_model *m = cpuid_model_create("v2", soft_cpuid_support(), 1, hz[i], &err);
        struct cpuid_regs r;
        double stated;

        assert_non_null(m);
        r = ask(m, 0x15, 0);
        assert_int_equal(r.ecx, LAPIC_TIMER_HZ);
        assert_true(r.eax > 0);
        assert_true((u64)(r.ecx / 1000) * r.ebx <= UINT32_MAX);
        stated = (double)r.ecx * r.ebx / r.eax;
        assert_true(stated > (double)hz[i] * (1 - 2e-6) && stated < (double)hz[i] * (1 + 2e-6));
        r = ask(m, 0x40000010, 0);
        assert_int_equal(r.eax, hz[i] / 1000);
        cpuid_model_destroy(m);
    }
}

static void leaves_beyond_the_last_answer_as_the_vendor_does(void **unused)
{
    struct cpuid_model *m = make("v3", soft_cpuid_support(), 1);
    struct cpuid_regs top = ask(m, 0, 0), last = ask(m, top.eax, 0), r = ask(m, 0x12345678, 0);

    assert_int_equal(top.ebx, 0x756e6547); /* Genu */
    assert_memory_equal(&r, &last, sizeof(r));
    r = ask(m, 0xffffffff, 0xffffffff);
    assert_memory_equal(&r, &last, sizeof(r));
    r = ask(m, 0x40000000, 0);
    assert_int_equal(r.eax, 0x40000010);
    assert_memory_equal(&r.ebx, "KVMKVMKVM\0\0\0", 12);
    cpuid_model_destroy(m);
}

static bool has_virtualisation(const struct cpuid_model *m)
{
    return (ask(m, 1, 0).ecx & BIT(5)) || (ask(m, 0x80000001, 0).ecx & BIT(2));
}

static void virtualisation_is_offered_when_asked_for(void **unused)
{
    struct error err = {0};
    struct cpuid_support all;
    struct cpuid_model *m;
    struct cpuid_regs svm;

    support_all(&all);
    m = make("host", &all, 1);
    assert_false(has_virtualisation(m));
    assert_int_equal(cpuid_model_offer_nested(m, &all, &err), 0);
    assert_true(has_virtualisation(m));
    svm = ask(m, 0x8000000a, 0);
    if (cpuid_model_is_amd(m))
        assert_true(svm.eax == 1 && svm.ebx && (svm.edx & BIT(0)));
    assert_int_equal(ask(m, 1, 0).ecx >> 5 & 1, !cpuid_model_is_amd(m));
    cpuid_model_destroy(m);

    m = make("host", soft_cpuid_support(), 1);
    assert_int_equal(cpuid_model_offer_nested(m, soft_cpuid_support(), &err), -EINVAL);
    assert_non_null(strstr(err.text, cpuid_model_is_amd(m) ? "SVM" : "VMX"));
    cpuid_model_destroy(m);
    m = make("v2", &all, 1);
    assert_false(has_virtualisation(m));
    assert_int_equal(cpuid_model_offer_nested(m, &all, &err), -EINVAL);
    assert_non_null(strstr(err.text, "--cpu host"));
    cpuid_model_destroy(m);
}

static void host_tsc_is_plausible_and_steady(void **unused)
{
    u64 hz = host_tsc_hz();

    assert_true(hz > 100000000 && hz < 20000000000);
    assert_true(hz == host_tsc_hz());
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(unknown_model_and_missing_feature_are_refused),
        cmocka_unit_test(levels_do_not_depend_on_the_engine),
        cmocka_unit_test(host_offers_no_more_than_the_engine),
        cmocka_unit_test(features_without_their_basis_go),
        cmocka_unit_test(dynamic_bits_follow_the_processor),
        cmocka_unit_test(xsave_areas_fit),
        cmocka_unit_test(topology_counts_every_cpu),
        cmocka_unit_test(topology_has_bits_of_its_own_for_each_level),
        cmocka_unit_test(tsc_leaf_states_the_frequency),
        cmocka_unit_test(leaves_beyond_the_last_answer_as_the_vendor_does),
        cmocka_unit_test(virtualisation_is_offered_when_asked_for),
        cmocka_unit_test(host_tsc_is_plausible_and_steady),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
