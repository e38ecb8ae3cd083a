/*
 * MSRs: the list is sound, what a guest may write, what it may not, and what changes with it.
 */
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"
#include "engine/soft/msr.h"
#include "engine/soft/soft_cpuid.h"
#include "x86/msr.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define HZ 2500000000ull

/* What msr.c calls of the rest of the processor. */
static u64 vm_tsc = 1000000;
static unsigned flushes, mode_changes;

u64 soft_tsc(struct soft_vcpu *v)
{
    return vm_tsc + v->cpu.tsc_offset;
}

void soft_mode_changed(struct soft_vcpu *v)
{
    mode_changes++;
    v->canonical_shift = v->cpu.cr4 & CR4_LA57 ? 7 : 16;
}

void soft_tlb_flush(struct soft_vcpu *v)
{
    flushes++;
}

static void on_wake(void *opaque, enum lapic_event event, u8 vector)
{
}
static void on_eoi(void *opaque, u8 vector)
{
}
static u64 get_now(void *opaque)
{
    return 0;
}
static const struct lapic_ops ops = {.wake = on_wake, .eoi_broadcast = on_eoi, .now = get_now};

static struct lapic_bus *bus;

static struct soft_vcpu *make_vcpu(const char *model, const struct cpuid_support *support)
{
    struct soft_vcpu *v = calloc(1, sizeof(*v));
    struct error err;

    v->cpuid = cpuid_model_create(model, support, 1, HZ, &err);
    assert_non_null(v->cpuid);
    v->phys_bits = cpuid_model_phys_bits(v->cpuid);
    bus = lapic_bus_create();
    v->lapic = lapic_create(bus, &(struct lapic_config){.phys_bits = v->phys_bits,
                                                        .tsc_hz = HZ,
                                                        .x2apic = true,
                                                        .tsc_deadline = true,
                                                        .ops = &ops});
    cpu_reset(&v->cpu, 0);
    soft_mode_changed(v);
    flushes = mode_changes = 0;
    return v;
}

static void drop_vcpu(struct soft_vcpu *v)
{
    lapic_destroy(v->lapic);
    lapic_bus_destroy(bus);
    cpuid_model_destroy((struct cpuid_model *)v->cpuid);
    free(v);
}

static int up(void **state)
{
    *state = make_vcpu("v3", soft_cpuid_support());
    return 0;
}

static int down(void **state)
{
    drop_vcpu(*state);
    return 0;
}

static u64 rd(struct soft_vcpu *v, u32 msr)
{
    u64 value = 0;

    if (!soft_rdmsr(v, msr, &value))
        fail_msg("RDMSR %#x: #GP", msr);
    return value;
}

static bool gp(struct soft_vcpu *v, u32 msr, u64 value)
{
    return !soft_wrmsr(v, msr, value);
}

/* Written and read back. */
static void round_trip(struct soft_vcpu *v, u32 msr, u64 value)
{
    if (gp(v, msr, value))
        fail_msg("WRMSR %#x, %#llx: #GP", msr, (unsigned long long)value);
    assert_true(rd(v, msr) == value);
}

static void list_is_sorted(void **unused)
{
    static const u32 numbers[] = {
#define MSR_STORED(name, number, needs, vendor, field, reset, writable) number,
#define MSR_KEPT(name, number, needs, vendor, field, reset, writable) number,
#define MSR_CONST(name, number, needs, vendor, value) number,
#define MSR_QUIET(name, number, needs, vendor, value) number,
#define MSR_SPECIAL(name, number, needs, vendor) number,
#include "x86/msr.def"
    };

    for (size_t i = 1; i < ARRAY_SIZE(numbers); i++)
        assert_true(numbers[i - 1] < numbers[i]);
}

static void unknown_is_gp(void **state)
{
    static const u32 absent[] = {0x0,        0xc1,       0x186,      0x480,     0x4b564d02,
                                 0x40000000, 0xc0010000, 0xc0010015, 0xffffffff};
    struct soft_vcpu *v = *state;
    u64 value = 77;

    for (size_t i = 0; i < ARRAY_SIZE(absent); i++) {
        assert_false(soft_rdmsr(v, absent[i], &value));
        assert_true(gp(v, absent[i], 0));
    }
    assert_true(gp(v, MSR_IA32_MTRRCAP, 0x508));
    assert_true(gp(v, MSR_IA32_PKRS, 0)); /* v3 has no protection keys */
    assert_true(gp(v, MSR_IA32_SPEC_CTRL, 0));
    assert_true(gp(v, MSR_IA32_PRED_CMD, 1));
}

static void efer_keeps_the_rules(void **state)
{
    struct soft_vcpu *v = *state;

    round_trip(v, MSR_IA32_EFER, EFER_SCE | EFER_LME);
    assert_int_equal(mode_changes, 1);
    assert_int_equal(flushes, 0);
    round_trip(v, MSR_IA32_EFER, EFER_SCE | EFER_LME | EFER_NXE);
    assert_int_equal(flushes, 1);
    assert_true(gp(v, MSR_IA32_EFER, BIT(1)));
    assert_true(gp(v, MSR_IA32_EFER, EFER_SVME));
    assert_true(gp(v, MSR_IA32_EFER, BIT(63)));
    assert_false(gp(v, MSR_IA32_EFER, EFER_LME | EFER_LMA)); /* LMA isn't software's */
    assert_int_equal(rd(v, MSR_IA32_EFER), EFER_LME);

    v->cpu.cr0 |= CR0_PG;
    v->cpu.msr.efer |= EFER_LMA;
    assert_true(gp(v, MSR_IA32_EFER, EFER_LMA));
    assert_false(gp(v, MSR_IA32_EFER, EFER_LME));
    assert_int_equal(rd(v, MSR_IA32_EFER), EFER_LME | EFER_LMA);
}

static void bases_are_canonical(void **state)
{
    static const u32 canonical[] = {MSR_IA32_FS_BASE,     MSR_IA32_GS_BASE, MSR_IA32_KERNEL_GS_BASE,
                                    MSR_IA32_LSTAR,       MSR_IA32_CSTAR,   MSR_IA32_SYSENTER_ESP,
                                    MSR_IA32_SYSENTER_EIP};
    struct soft_vcpu *v = *state;

    for (size_t i = 0; i < ARRAY_SIZE(canonical); i++) {
        round_trip(v, canonical[i], 0xffff800000001234);
        round_trip(v, canonical[i], 0x00007fffffffffff);
        assert_true(gp(v, canonical[i], 0x0000800000000000));
        assert_true(rd(v, canonical[i]) == 0x00007fffffffffff);
    }
    assert_true(v->cpu.seg[SEG_FS].base == 0x00007fffffffffff);
    assert_true(v->seg_base[SEG_GS] == 0x00007fffffffffff);
    v->cpu.cr4 |= CR4_LA57;
    soft_mode_changed(v);
    round_trip(v, MSR_IA32_FS_BASE, 0x0000800000000000);
}

static void memory_types_are_checked(void **state)
{
    struct soft_vcpu *v = *state;

    round_trip(v, MSR_IA32_PAT, 0x0007010600070106);
    assert_true(gp(v, MSR_IA32_PAT, 2));
    assert_true(gp(v, MSR_IA32_PAT, 8ull << 56));
    round_trip(v, MSR_IA32_MTRR_DEF_TYPE, 0xc06);
    assert_true(gp(v, MSR_IA32_MTRR_DEF_TYPE, 0xc07));
    assert_true(gp(v, MSR_IA32_MTRR_DEF_TYPE, 0x1000));
    round_trip(v, MSR_IA32_MTRR_FIX4K_F8000, 0x0605040100060504);
    assert_true(gp(v, MSR_IA32_MTRR_FIX64K_00000, 7));
    round_trip(v, MSR_IA32_MTRR_PHYSBASE7, 0xc0000006);
    round_trip(v, MSR_IA32_MTRR_PHYSMASK7, 0x7fc0000800);
    assert_true(gp(v, MSR_IA32_MTRR_PHYSBASE0, 0x100));
    assert_true(gp(v, MSR_IA32_MTRR_PHYSBASE0, BIT(39)));
    assert_true(gp(v, MSR_IA32_MTRR_PHYSMASK0, 0x400));
}

static void machine_check_banks(void **state)
{
    struct soft_vcpu *v = *state;

    assert_int_equal(rd(v, MSR_IA32_MCG_CAP) & 0xff, 4);
    for (u32 bank = 0; bank < 4; bank++) {
        round_trip(v, 0x400 + 4 * bank, UINT64_MAX);
        for (u32 reg = 1; reg < 4; reg++) {
            round_trip(v, 0x400 + 4 * bank + reg, 0);
            assert_true(gp(v, 0x400 + 4 * bank + reg, 1));
        }
    }
    assert_true(gp(v, 0x410, 0));
    assert_true(gp(v, MSR_IA32_MCG_STATUS, 8));
}

static void tsc_and_its_adjustment(void **state)
{
    struct soft_vcpu *v = *state;

    assert_int_equal(rd(v, MSR_IA32_TSC), vm_tsc);
    assert_false(gp(v, MSR_IA32_TSC, 5000));
    assert_int_equal(rd(v, MSR_IA32_TSC), 5000);
    assert_true(rd(v, MSR_IA32_TSC_ADJUST) == 5000 - vm_tsc);
    assert_false(gp(v, MSR_IA32_TSC_ADJUST, 100));
    assert_int_equal(rd(v, MSR_IA32_TSC), vm_tsc + 100);
    assert_int_equal(rd(v, MSR_IA32_TSC_ADJUST), 100);

    lapic_mmio_write(v->lapic, 0xf0, 0x1ff, 4);
    lapic_mmio_write(v->lapic, 0x320, 0x40040, 4);
    assert_false(gp(v, MSR_IA32_TSC_DEADLINE, 2500100));
    assert_int_equal(lapic_next_deadline(v->lapic), 1000000);
    assert_false(gp(v, MSR_IA32_TSC_ADJUST, 2500));
    assert_int_equal(lapic_next_deadline(v->lapic), 999040);
    assert_int_equal(rd(v, MSR_IA32_TSC_DEADLINE), 2500100);
}

static void apic_goes_through(void **state)
{
    struct soft_vcpu *v = *state;
    u64 value;

    assert_int_equal(rd(v, MSR_IA32_APIC_BASE), 0xfee00900);
    assert_false(soft_rdmsr(v, 0x803, &value));
    assert_false(gp(v, MSR_IA32_APIC_BASE, 0xfee00d00));
    assert_int_equal(flushes, 1);
    assert_int_equal(rd(v, 0x803), 0x50014);
    assert_true(gp(v, 0x803, 0));
    assert_true(gp(v, MSR_IA32_APIC_BASE, 0xfee00900));
}

static void read_only_bits_stay(void **state)
{
    struct soft_vcpu *v = *state;

    assert_int_equal(rd(v, MSR_IA32_MISC_ENABLE), 0x1801);
    assert_false(gp(v, MSR_IA32_MISC_ENABLE, 0));
    assert_int_equal(rd(v, MSR_IA32_MISC_ENABLE), 0x1800);
    assert_false(gp(v, MSR_IA32_BIOS_SIGN_ID, 0));
    assert_true(rd(v, MSR_IA32_BIOS_SIGN_ID) != 0);
    assert_true(gp(v, MSR_IA32_FEATURE_CONTROL, 5));
    assert_false(gp(v, MSR_IA32_FEATURE_CONTROL, 1));
    assert_true(gp(v, MSR_IA32_TSC_AUX, BIT(32)));
    round_trip(v, MSR_IA32_TSC_AUX, 0xabcdef01);
    assert_int_equal(rd(v, MSR_PLATFORM_INFO) >> 8 & 0xff, 25);
}

static void offered_features_bring_their_msrs(void **unused)
{
    struct soft_vcpu *v = make_vcpu("max", soft_cpuid_support());

    round_trip(v, MSR_IA32_PKRS, 0x55555555);
    assert_int_equal(flushes, 1);
    assert_true(gp(v, MSR_IA32_PKRS, BIT(32)));
    round_trip(v, MSR_IA32_XSS, 0);
    assert_true(gp(v, MSR_IA32_XSS, BIT(8)));
    if (cpuid_model_is_amd(v->cpuid)) {
        assert_int_equal(rd(v, MSR_AMD_VM_CR), 0x18);
        assert_true(rd(v, MSR_AMD_HWCR) & BIT(24));
        assert_true(rd(v, MSR_AMD_DE_CFG) & BIT(1));
        round_trip(v, MSR_IA32_EFER, EFER_AIBRSE);
        round_trip(v, MSR_AMD_HWCR, BIT(24) | BIT(18));
        round_trip(v, MSR_IA32_MC0_STATUS, 0x123); /* McStatusWrEn */
        assert_true(gp(v, MSR_IA32_MISC_ENABLE, 0));
    } else {
        round_trip(v, MSR_IA32_SPEC_CTRL, 1);
        assert_true(gp(v, MSR_IA32_SPEC_CTRL, 4));
        assert_false(gp(v, MSR_IA32_PRED_CMD, 1));
        assert_true(rd(v, MSR_IA32_ARCH_CAPABILITIES) & 1);
    }
    drop_vcpu(v);
}

/* Every number near the list, with a few values: no crash, and a refused write changes nothing. */
static void refused_writes_change_nothing(void **state)
{
    static const struct {
        u32 first, last;
    } ranges[] = {{0, 0x1000}, {0xc0000000, 0xc0000200}, {0xc0010000, 0xc0011100}};
    static const u64 values[] = {0, 1, 0x800, BIT(32), 0x8000000000000000, UINT64_MAX};
    struct soft_vcpu *v = *state;
    struct cpu before;

    for (size_t r = 0; r < ARRAY_SIZE(ranges); r++) {
        for (u32 msr = ranges[r].first; msr < ranges[r].last; msr++) {
            for (size_t i = 0; i < ARRAY_SIZE(values); i++) {
                u64 value;

                before = v->cpu;
                if (gp(v, msr, values[i]))
                    assert_memory_equal(&before, &v->cpu, sizeof(before));
                soft_rdmsr(v, msr, &value);
            }
        }
    }
}

int main(void)
{
#define RIGGED(f) cmocka_unit_test_setup_teardown(f, up, down)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(list_is_sorted),      RIGGED(unknown_is_gp),
        RIGGED(efer_keeps_the_rules),          RIGGED(bases_are_canonical),
        RIGGED(memory_types_are_checked),      RIGGED(machine_check_banks),
        RIGGED(tsc_and_its_adjustment),        RIGGED(apic_goes_through),
        RIGGED(read_only_bits_stay),           cmocka_unit_test(offered_features_bring_their_msrs),
        RIGGED(refused_writes_change_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
