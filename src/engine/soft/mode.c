/*
 * What is derived from the processor's mode, recomputed whenever the mode may have changed.
 */
#include "engine/soft/bt/bt.h"
#include "engine/soft/debug.h"
#include "engine/soft/vcpu.h"

const struct insn insn_none = {.base = GPR_ZERO, .index = GPR_ZERO};

/*
 * Which exception an instruction of each class raises now, if any (Intel SDM vol. 2A, 2.8, tables of
 * exception classes; vol. 3, 2.5, table 2-2).
 */
static void update_class_faults(struct soft_vcpu *v)
{
    const struct cpu *cpu = &v->cpu;
    bool ts = cpu->cr0 & CR0_TS, em = cpu->cr0 & CR0_EM;
    bool vex_ok = (v->mode & MODE_PROTECTED) && (cpu->cr4 & CR4_OSXSAVE);
    u64 avx = XCR0_SSE | XCR0_AVX, avx512 = avx | XCR0_AVX512;
    u8 nm = ts ? EXC_NM : 0;

    v->class_fault[FPU_X87] = em || ts ? EXC_NM : 0;
    v->class_fault[FPU_MMX] = em ? EXC_UD : nm;
    v->class_fault[FPU_SSE] = em || !(cpu->cr4 & CR4_OSFXSR) ? EXC_UD : nm;
    v->class_fault[FPU_AVX] = !vex_ok || (cpu->xcr0 & avx) != avx ? EXC_UD : nm;
    v->class_fault[FPU_AVX512] = !vex_ok || (cpu->xcr0 & avx512) != avx512 ? EXC_UD : nm;
}

/* Which translations accesses use, and whether something watches them. */
static void update_access(struct soft_vcpu *v, unsigned cpl)
{
    const struct cpu *cpu = &v->cpu;
    bool aligned = cpl == 3 && (cpu->cr0 & CR0_AM) && (cpu->rflags & EFLAGS_AC);

    v->tlb_kind = cpl == 3                                             ? TLB_USER
                  : (cpu->cr4 & CR4_SMAP) && (cpu->rflags & EFLAGS_AC) ? TLB_KERNEL_AC
                                                                       : TLB_KERNEL;
    v->align_check = aligned;
    v->tlb = aligned || v->data_breakpoints ? &v->tlb_none : &v->tlbs[v->tlb_kind];
}

void soft_mode_changed(struct soft_vcpu *v)
{
    struct cpu *cpu = &v->cpu;
    bool vm86 = cpu->rflags & EFLAGS_VM;
    unsigned cpl = cpu_cpl(cpu);
    u32 mode = 0;

    if ((cpu->cr0 & CR0_PE) && !vm86)
        mode |= MODE_PROTECTED;
    if ((cpu->msr.efer & EFER_LMA) && (cpu->seg[SEG_CS].attr & SEG_ATTR_L))
        mode |= MODE_CODE64;
    else if (cpu->seg[SEG_CS].attr & SEG_ATTR_DB)
        mode |= MODE_CODE32;
    if (cpu->seg[SEG_SS].attr & SEG_ATTR_DB)
        mode |= MODE_STACK32;
    if (cpl == 3)
        mode |= MODE_USER;
    v->mode = mode;

    for (unsigned s = 0; s < SEG_COUNT; s++) {
        bool flat = (mode & MODE_CODE_MASK) == MODE_CODE64 && s < SEG_FS;

        v->seg_base[s] = flat ? 0 : cpu->seg[s].base;
    }

    v->canonical_shift = cpu->cr4 & CR4_LA57 ? 7 : 16;
    v->data_breakpoints = soft_data_breakpoints_enabled(v);
    update_access(v, cpl);

    update_class_faults(v);
    bt_mode_changed(v);
    if ((cpu->rflags & (EFLAGS_TF | EFLAGS_RF)) || v->data_breakpoints ||
        soft_code_breakpoints_enabled(v))
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
}

void soft_privilege_changed(struct soft_vcpu *v)
{
    const struct cpu *cpu = &v->cpu;
    unsigned cpl = cpu_cpl(cpu);

    if (!soft_code64(v) || !(cpu->seg[SEG_CS].attr & SEG_ATTR_L)) {
        soft_mode_changed(v);
        return;
    }
    v->mode = MODE_PROTECTED | MODE_CODE64 | (cpl == 3 ? MODE_USER : 0) |
              (cpu->seg[SEG_SS].attr & SEG_ATTR_DB ? MODE_STACK32 : 0);
    update_access(v, cpl);
    bt_privilege_changed(v);
    if (cpu->rflags & (EFLAGS_TF | EFLAGS_RF))
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
}
