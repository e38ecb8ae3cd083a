/*
 * Model-specific registers. x86/msr.def says which there are and what a plain one holds; the rules
 * that a table can't say are here: MSRs that are a view of something else, and values that a
 * processor refuses.
 */
#include "engine/soft/msr.h"
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"
#include "engine/soft/pv.h"
#include "engine/soft/pvclock.h"
#include "host/log.h"
#include "x86/msr.h"

enum msr_kind { MSR_KIND_STORED, MSR_KIND_KEPT, MSR_KIND_CONST, MSR_KIND_QUIET, MSR_KIND_SPECIAL };
enum msr_vendor { VENDOR_ANY, VENDOR_INTEL, VENDOR_AMD };

struct msr_info {
    u32 number;
    u8 kind;    /* enum msr_kind */
    u8 vendor;  /* enum msr_vendor */
    u16 needs;  /* enum cpuid_feature */
    u32 offset; /* in struct cpu_msrs: stored and kept */
    u64 value;  /* stored and kept: the writable bits; else what a read gives */
};

static const struct msr_info msrs[] = {
#define MSR_STORED(name, number, needs, vendor, field, reset, writable)                            \
    {number,  MSR_KIND_STORED, VENDOR_##vendor, FEATURE_##needs, offsetof(struct cpu_msrs, field), \
     writable},
#define MSR_KEPT(name, number, needs, vendor, field, reset, writable)                              \
    {number,  MSR_KIND_KEPT, VENDOR_##vendor, FEATURE_##needs, offsetof(struct cpu_msrs, field),   \
     writable},
#define MSR_CONST(name, number, needs, vendor, value)                                              \
    {number, MSR_KIND_CONST, VENDOR_##vendor, FEATURE_##needs, 0, value},
#define MSR_QUIET(name, number, needs, vendor, value)                                              \
    {number, MSR_KIND_QUIET, VENDOR_##vendor, FEATURE_##needs, 0, value},
#define MSR_SPECIAL(name, number, needs, vendor)                                                   \
    {number, MSR_KIND_SPECIAL, VENDOR_##vendor, FEATURE_##needs, 0, 0},
#include "x86/msr.def"
#undef MSR_STORED
#undef MSR_KEPT
#undef MSR_CONST
#undef MSR_QUIET
#undef MSR_SPECIAL
};

#define HWCR_MC_STATUS_WRITABLE BIT(18)

/* The entry of an MSR that this guest's processor has, or NULL. The list is sorted by number. */
static const struct msr_info *find_msr(const struct soft_vcpu *v, u32 number)
{
    size_t low = 0, high = ARRAY_SIZE(msrs);

    while (low < high) {
        size_t mid = (low + high) / 2;

        if (msrs[mid].number < number)
            low = mid + 1;
        else
            high = mid;
    }
    if (low == ARRAY_SIZE(msrs) || msrs[low].number != number || !soft_has(v, msrs[low].needs))
        return NULL;
    if (msrs[low].vendor != VENDOR_ANY &&
        (msrs[low].vendor == VENDOR_AMD) != cpuid_model_is_amd(v->cpuid))
        return NULL;
    return &msrs[low];
}

static bool refuse(const char *verb, u32 msr)
{
    if (log_first_time((u64)'M' << 56 | (u64)(u8)verb[0] << 48 | msr))
        log_debug("guest %s MSR %#x, which its processor lacks: #GP", verb, msr);
    return false;
}

static u64 *field_of(struct soft_vcpu *v, const struct msr_info *info)
{
    return (u64 *)((char *)&v->cpu.msr + info->offset);
}

/* Sets the TSC forward by delta; IA32_TSC_ADJUST counts what was done (SDM vol. 3, 18.17.3). */
static void adjust_tsc(struct soft_vcpu *v, u64 delta)
{
    v->cpu.tsc_offset += delta;
    v->cpu.msr.tsc_adjust += delta;
    lapic_set_tsc_offset(v->lapic, v->cpu.tsc_offset);
    pvclock_tsc_changed(v);
}

/* The ratio of the frequency to 100 MHz, where Intel's processors show it. */
static u64 bus_ratio(const struct soft_vcpu *v)
{
    return MIN(cpuid_model_tsc_hz(v->cpuid) / 100000000, 0xffu);
}

static bool read_special(struct soft_vcpu *v, u32 msr, u64 *value)
{
    switch (msr) {
    case MSR_IA32_TSC:
        *value = soft_tsc(v);
        return true;
    case MSR_IA32_TSC_ADJUST:
        *value = v->cpu.msr.tsc_adjust;
        return true;
    case MSR_IA32_TSC_DEADLINE:
        *value = lapic_tsc_deadline(v->lapic);
        return true;
    case MSR_IA32_APIC_BASE:
        *value = lapic_base(v->lapic);
        return true;
    case MSR_IA32_EFER:
        *value = v->cpu.msr.efer;
        return true;
    case MSR_IA32_FS_BASE:
        *value = v->cpu.seg[SEG_FS].base;
        return true;
    case MSR_IA32_GS_BASE:
        *value = v->cpu.seg[SEG_GS].base;
        return true;
    case MSR_PLATFORM_INFO: /* maximum non-turbo ratio, and the minimum one: no P-states */
        *value = bus_ratio(v) << 8 | bus_ratio(v) << 40;
        return true;
    case MSR_IA32_PERF_STATUS:
        *value = bus_ratio(v) << 8;
        return true;
    case MSR_KVM_WALL_CLOCK_NEW:
        *value = v->cpu.msr.kvm_wall_clock;
        return true;
    case MSR_KVM_SYSTEM_TIME_NEW:
        *value = v->cpu.msr.kvm_system_time;
        return true;
    case MSR_KVM_STEAL_TIME:
        *value = v->cpu.msr.kvm_steal_time;
        return true;
    case MSR_KVM_PV_EOI_EN:
        *value = v->cpu.msr.kvm_pv_eoi;
        return true;
    default: /* the ones that can only be written */
        return false;
    }
}

bool soft_rdmsr(struct soft_vcpu *v, u32 msr, u64 *value)
{
    const struct msr_info *info;

    if (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST)
        return lapic_msr_read(v->lapic, msr, value);
    info = find_msr(v, msr);
    if (!info)
        return refuse("reads", msr);
    switch ((enum msr_kind)info->kind) {
    case MSR_KIND_STORED:
    case MSR_KIND_KEPT:
        *value = *field_of(v, info);
        return true;
    case MSR_KIND_CONST:
    case MSR_KIND_QUIET:
        *value = info->value;
        return true;
    case MSR_KIND_SPECIAL:
        break;
    }
    return read_special(v, msr, value);
}

/* SDM vol. 3, 2.2.1; AMD APM vol. 2, 3.1.7. LMA follows LME and CR0.PG and isn't written here. */
static bool write_efer(struct soft_vcpu *v, u64 value)
{
    u64 *efer = &v->cpu.msr.efer, valid = 0, changed;

    if (soft_has(v, FEATURE_SYSCALL))
        valid |= EFER_SCE;
    if (soft_has(v, FEATURE_LM))
        valid |= EFER_LME | EFER_LMA;
    if (soft_has(v, FEATURE_NX))
        valid |= EFER_NXE;
    if (soft_has(v, FEATURE_FFXSR))
        valid |= EFER_FFXSR;
    if (soft_has(v, FEATURE_AUTO_IBRS))
        valid |= EFER_AIBRSE;
    changed = value ^ *efer;
    if ((value & ~valid) || ((changed & EFER_LME) && (v->cpu.cr0 & CR0_PG)))
        return false;
    *efer = (value & ~EFER_LMA) | (*efer & EFER_LMA);
    if (changed & EFER_NXE)
        soft_tlb_flush(v);
    soft_mode_changed(v);
    return true;
}

static bool write_base(struct soft_vcpu *v, enum segreg seg, u64 value)
{
    if (!soft_canonical(v, value))
        return false;
    v->cpu.seg[seg].base = value;
    v->seg_base[seg] = value; /* FS and GS have their bases in every mode */
    return true;
}

static bool write_special(struct soft_vcpu *v, u32 msr, u64 value)
{
    switch (msr) {
    case MSR_IA32_TSC:
        adjust_tsc(v, value - soft_tsc(v));
        return true;
    case MSR_IA32_TSC_ADJUST:
        adjust_tsc(v, value - v->cpu.msr.tsc_adjust);
        return true;
    case MSR_IA32_TSC_DEADLINE:
        lapic_set_tsc_deadline(v->lapic, value);
        return true;
    case MSR_IA32_APIC_BASE:
        if (!lapic_set_base(v->lapic, value))
            return false;
        soft_tlb_flush(v); /* the page may hide RAM, or have hidden it */
        return true;
    case MSR_IA32_EFER:
        return write_efer(v, value);
    case MSR_IA32_FS_BASE:
        return write_base(v, SEG_FS, value);
    case MSR_IA32_GS_BASE:
        return write_base(v, SEG_GS, value);
    case MSR_IA32_PRED_CMD: /* IBPB: no predictor of ours holds a guest's branches */
        return value <= 1 && (soft_has(v, FEATURE_SPEC_CTRL) || soft_has(v, FEATURE_IBPB));
    case MSR_IA32_BIOS_UPDT_TRIG:
    case MSR_AMD_PATCH_LOADER: /* a microcode update that changes nothing */
        return true;
    case MSR_KVM_WALL_CLOCK_NEW:
        return pvclock_set_wall_clock(v, value);
    case MSR_KVM_SYSTEM_TIME_NEW:
        return pvclock_set_system_time(v, value);
    case MSR_KVM_STEAL_TIME:
        return pv_set_steal_time(v, value);
    case MSR_KVM_PV_EOI_EN:
        return pv_set_eoi(v, value);
    default: /* the ones that can only be read */
        return false;
    }
}

/* Whether each byte names a memory type (SDM vol. 3, tables 12-8 and 12-10). */
static bool memory_types_ok(u64 value, bool pat)
{
    for (int i = 0; i < 8; i++) {
        u8 type = (u8)(value >> (8 * i));

        if (type > 7 || type == 2 || type == 3 || (type == 7 && !pat))
            return false;
    }
    return true;
}

/* An address within the processor's width in bits 12 and up, and what `extra` allows below. */
static bool mtrr_range_ok(const struct soft_vcpu *v, u64 value, u64 extra)
{
    return !(value & ~((BIT(v->phys_bits) - 1) & ~0xfffull) & ~extra);
}

/* Values that a register refuses beyond the writable bits of its entry. */
static bool value_ok(const struct soft_vcpu *v, u32 msr, u64 value)
{
    switch (msr) {
    case MSR_IA32_SPEC_CTRL:
        return !(value & BIT(2)) || soft_has(v, FEATURE_SPEC_CTRL_SSBD);
    case MSR_IA32_SYSENTER_ESP:
    case MSR_IA32_SYSENTER_EIP:
    case MSR_IA32_LSTAR:
    case MSR_IA32_CSTAR:
    case MSR_IA32_KERNEL_GS_BASE:
        return soft_canonical(v, value);
    case MSR_IA32_PAT:
        return memory_types_ok(value, true);
    case MSR_IA32_MTRR_DEF_TYPE:
        return memory_types_ok(value & 0xff, false);
    case MSR_IA32_MTRR_FIX64K_00000 ... MSR_IA32_MTRR_FIX4K_F8000:
        return memory_types_ok(value, false);
    case MSR_IA32_MTRR_PHYSBASE0 ... MSR_IA32_MTRR_PHYSMASK7:
        if (msr & 1) /* a mask: bit 11 makes the pair valid */
            return mtrr_range_ok(v, value, BIT(11));
        return mtrr_range_ok(v, value, 0xff) && memory_types_ok(value & 0xff, false);
    case MSR_IA32_MC0_CTL ... MSR_IA32_MC3_MISC:
        /* Status, address and misc are cleared by software, not set; AMD has a switch for tests. */
        return (msr & 3) == 0 || value == 0 || (v->cpu.msr.hwcr & HWCR_MC_STATUS_WRITABLE);
    default:
        return true;
    }
}

bool soft_wrmsr(struct soft_vcpu *v, u32 msr, u64 value)
{
    const struct msr_info *info;
    u64 *field;

    if (msr >= MSR_X2APIC_FIRST && msr <= MSR_X2APIC_LAST)
        return lapic_msr_write(v->lapic, msr, value);
    info = find_msr(v, msr);
    if (!info)
        return refuse("writes", msr);
    switch ((enum msr_kind)info->kind) {
    case MSR_KIND_STORED:
        field = field_of(v, info);
        if (((value ^ *field) & ~info->value) || !value_ok(v, msr, value))
            return false;
        *field = value;
        if (msr == MSR_IA32_PKRS)
            soft_tlb_flush(v);
        return true;
    case MSR_KIND_KEPT:
        field = field_of(v, info);
        *field = (*field & ~info->value) | (value & info->value);
        return true;
    case MSR_KIND_CONST:
        return false;
    case MSR_KIND_QUIET:
        return true;
    case MSR_KIND_SPECIAL:
        break;
    }
    return write_special(v, msr, value);
}
