/*
 * System instructions: control registers, flags, ports, MSRs, caches and TLB, and the table of all that
 * this file and its neighbours implement (Intel SDM vol. 2 by instruction; vol. 3, chapter 2).
 *
 * Instructions that no table names raise #UD: so do UD0, UD1 and UD2, RSM outside SMM, and those of VMX,
 * SVM and SMX, which are not offered.
 */
#include "engine/soft/system.h"

#include "engine/soft/debug.h"
#include "engine/soft/decode.h"
#include "engine/soft/descriptor.h"
#include "engine/soft/flags.h"
#include "engine/soft/lapic.h"
#include "engine/soft/msr.h"
#include "engine/soft/operand.h"
#include "engine/soft/posts.h"
#include "engine/soft/pv.h"
#include "engine/soft/wait.h"

#include <sys/random.h>
#include <time.h>

/* --- Checks --- */

static _Noreturn void raise_gp(struct soft_vcpu *v)
{
    soft_raise_error(v, EXC_GP, 0);
}

void soft_require_cpl0(struct soft_vcpu *v)
{
    if (unlikely(soft_cpl(v) != 0))
        raise_gp(v);
}

void soft_check_umip(struct soft_vcpu *v)
{
    if ((v->cpu.cr4 & CR4_UMIP) && soft_cpl(v) != 0)
        raise_gp(v);
}

void soft_interrupts_open(struct soft_vcpu *v)
{
    if (v->irq_waiting && (v->cpu.rflags & EFLAGS_IF))
        atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
}

static unsigned iopl(const struct soft_vcpu *v)
{
    return (v->cpu.rflags & EFLAGS_IOPL) >> EFLAGS_IOPL_SHIFT;
}

/* EDX:EAX */
static u64 get_edx_eax(const struct soft_vcpu *v)
{
    return (v->cpu.gpr[RDX] & 0xffffffff) << 32 | (u32)v->cpu.gpr[RAX];
}
static void set_edx_eax(struct soft_vcpu *v, u64 value)
{
    v->cpu.gpr[RAX] = (u32)value;
    v->cpu.gpr[RDX] = value >> 32;
}

/* --- Control registers (vol. 3, 2.5) --- */

#define CR0_VALID                                                                                  \
    (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD |     \
     CR0_PG)

/* What turning paging on or off asks for (vol. 3, 9.8.5 and 4.1.2). */
static void check_paging_switch(struct soft_vcpu *v, bool on)
{
    const struct cpu *cpu = &v->cpu;
    bool tss16 = !(cpu->tr.attr & 8) && !selector_null(cpu->tr.selector);

    if (on && (cpu->msr.efer & EFER_LME) &&
        (!(cpu->cr4 & CR4_PAE) || (cpu->seg[SEG_CS].attr & SEG_ATTR_L) || tss16))
        raise_gp(v);
    if (!on && (soft_code64(v) || (cpu->cr4 & CR4_PCIDE)))
        raise_gp(v);
}

static void set_cr0(struct soft_vcpu *v, u64 value)
{
    struct cpu *cpu = &v->cpu;
    u64 changed;

    if (value >> 32)
        raise_gp(v);
    value = (value & CR0_VALID) | CR0_ET;
    changed = value ^ cpu->cr0;
    if ((value & (CR0_PG | CR0_PE)) == CR0_PG || (value & (CR0_NW | CR0_CD)) == CR0_NW)
        raise_gp(v);
    if (changed & CR0_PG)
        check_paging_switch(v, value & CR0_PG);
    /* PAE paging: vol. 3, 4.4.1 */
    if ((value & CR0_PG) && (cpu->cr4 & CR4_PAE) && !(cpu->msr.efer & EFER_LME) &&
        (changed & (CR0_PG | CR0_CD | CR0_NW)) && !soft_load_pdptes(v, cpu->cr3))
        raise_gp(v);

    cpu->cr0 = value;
    if (changed & CR0_PG) {
        if ((value & CR0_PG) && (cpu->msr.efer & EFER_LME))
            cpu->msr.efer |= EFER_LMA;
        else
            cpu->msr.efer &= ~EFER_LMA;
    }
    if (changed & (CR0_PG | CR0_WP))
        soft_tlb_flush(v);
    soft_mode_changed(v);
}

static void set_cr3(struct soft_vcpu *v, u64 value)
{
    struct cpu *cpu = &v->cpu;
    bool pcide = cpu->cr4 & CR4_PCIDE, keep = false;

    if (soft_long_mode(v)) {
        keep = pcide && (value & CR3_NOFLUSH);
        if (pcide)
            value &= ~CR3_NOFLUSH;
        if (value >> v->phys_bits)
            raise_gp(v);
    } else if ((cpu->cr0 & CR0_PG) && (cpu->cr4 & CR4_PAE) && !soft_load_pdptes(v, value)) {
        raise_gp(v);
    }
    cpu->cr3 = value;
    soft_tlb_switch(v, pcide ? (unsigned)(value & CR3_PCID_MASK) : 0, keep);
}

/* CR4's bits that the CPUID model has; the others are reserved. */
static u64 cr4_valid(const struct soft_vcpu *v)
{
    static const struct {
        enum cpuid_feature feature;
        u64 bits;
    } bits[] = {
        {FEATURE_VME, CR4_VME | CR4_PVI},
        {FEATURE_TSC, CR4_TSD},
        {FEATURE_DE, CR4_DE},
        {FEATURE_PSE, CR4_PSE},
        {FEATURE_PAE, CR4_PAE},
        {FEATURE_MCE, CR4_MCE},
        {FEATURE_PGE, CR4_PGE},
        {FEATURE_FXSR, CR4_OSFXSR},
        {FEATURE_SSE, CR4_OSXMMEXCPT},
        {FEATURE_UMIP, CR4_UMIP},
        {FEATURE_LA57, CR4_LA57},
        {FEATURE_FSGSBASE, CR4_FSGSBASE},
        {FEATURE_PCID, CR4_PCIDE},
        {FEATURE_XSAVE, CR4_OSXSAVE},
        {FEATURE_SMEP, CR4_SMEP},
        {FEATURE_SMAP, CR4_SMAP},
        {FEATURE_PKU, CR4_PKE},
        {FEATURE_PKS, CR4_PKS},
    };
    u64 valid = CR4_PCE;

    for (size_t n = 0; n < ARRAY_SIZE(bits); n++)
        if (soft_has(v, bits[n].feature))
            valid |= bits[n].bits;
    return valid;
}

#define CR4_PAGING                                                                                 \
    (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_PKS | CR4_LA57)

static void set_cr4(struct soft_vcpu *v, u64 value)
{
    struct cpu *cpu = &v->cpu;
    u64 changed = value ^ cpu->cr4;

    if (value & ~cr4_valid(v))
        raise_gp(v);
    if (soft_long_mode(v) && (!(value & CR4_PAE) || (changed & CR4_LA57)))
        raise_gp(v);
    if ((value & changed & CR4_PCIDE) && (!soft_long_mode(v) || (cpu->cr3 & CR3_PCID_MASK)))
        raise_gp(v);
    if ((cpu->cr0 & CR0_PG) && (value & CR4_PAE) && !soft_long_mode(v) &&
        (changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP)) && !soft_load_pdptes(v, cpu->cr3))
        raise_gp(v);
    cpu->cr4 = value;
    if (changed & CR4_PAGING)
        soft_tlb_flush(v);
    soft_mode_changed(v);
}

static void set_cr8(struct soft_vcpu *v, u64 value)
{
    if (value >> 4)
        raise_gp(v);
    lapic_set_cr8(v->lapic, (u8)value);
    atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
}

static void check_cr_access(struct soft_vcpu *v, unsigned n)
{
    if (n != 0 && n != 2 && n != 3 && n != 4 && n != 8)
        soft_raise(v, EXC_UD);
    soft_require_cpl0(v);
}

/* MOV from a control register (vol. 2B, MOV) */
void op_mov_from_cr(struct soft_vcpu *v, const struct insn *i)
{
    const struct cpu *cpu = &v->cpu;
    u64 value = 0;

    check_cr_access(v, i->reg);
    switch (i->reg) {
    case 0:
        value = cpu->cr0;
        break;
    case 2:
        value = cpu->cr2;
        break;
    case 3:
        value = cpu->cr3;
        break;
    case 4:
        value = cpu->cr4;
        break;
    case 8:
        value = lapic_cr8(v->lapic);
        break;
    default:
        break;
    }
    v->cpu.gpr[i->rm] = soft_code64(v) ? value : (u32)value;
}

/* MOV to a control register (vol. 2B, MOV) */
void op_mov_to_cr(struct soft_vcpu *v, const struct insn *i)
{
    u64 value = soft_code64(v) ? v->cpu.gpr[i->rm] : (u32)v->cpu.gpr[i->rm];

    check_cr_access(v, i->reg);
    switch (i->reg) {
    case 0:
        set_cr0(v, value);
        break;
    case 2:
        v->cpu.cr2 = value;
        break;
    case 3:
        set_cr3(v, value);
        break;
    case 4:
        set_cr4(v, value);
        break;
    case 8:
        set_cr8(v, value);
        break;
    default:
        break;
    }
}

static void op_clts(struct soft_vcpu *v, const struct insn *i)
{
    soft_require_cpl0(v);
    v->cpu.cr0 &= ~CR0_TS;
    soft_mode_changed(v);
}

/* LMSW: PE, MP, EM, TS; it can set PE, never clear it. */
static void op_lmsw(struct soft_vcpu *v, const struct insn *i)
{
    u64 low = CR0_PE | CR0_MP | CR0_EM | CR0_TS, value;

    soft_require_cpl0(v);
    value = insn_read_rm(v, i, 2) & low;
    set_cr0(v, (v->cpu.cr0 & ~(low & ~CR0_PE)) | value);
}

static void op_smsw(struct soft_vcpu *v, const struct insn *i)
{
    soft_check_umip(v);
    insn_write_rm(v, i, v->cpu.cr0, i->flags & INSN_MEM ? 2 : i->osize);
}

/* XGETBV (vol. 2D). Every component counts as in use (XINUSE), which is allowed: vol. 1, 13.6. */
static void op_xgetbv(struct soft_vcpu *v, const struct insn *i)
{
    u32 index = (u32)v->cpu.gpr[RCX];

    if (!(v->cpu.cr4 & CR4_OSXSAVE))
        soft_raise(v, EXC_UD);
    if (index > 1 || (index == 1 && !soft_has(v, FEATURE_XGETBV1)))
        raise_gp(v);
    set_edx_eax(v, v->cpu.xcr0);
}

/* XSETBV (vol. 2D; vol. 1, 13.3) */
static void op_xsetbv(struct soft_vcpu *v, const struct insn *i)
{
    u64 value = get_edx_eax(v), avx512 = value & XCR0_AVX512;

    if (!(v->cpu.cr4 & CR4_OSXSAVE))
        soft_raise(v, EXC_UD);
    soft_require_cpl0(v);
    if ((u32)v->cpu.gpr[RCX] != 0 || !(value & XCR0_X87) || (value & ~cpuid_model_xcr0(v->cpuid)))
        raise_gp(v);
    if ((value & XCR0_AVX) && !(value & XCR0_SSE))
        raise_gp(v);
    if (avx512 && (avx512 != XCR0_AVX512 || !(value & XCR0_AVX)))
        raise_gp(v);
    v->cpu.xcr0 = value;
    soft_mode_changed(v);
}

/* RDPKRU, WRPKRU (vol. 2B, 2D) */
static void op_rdpkru(struct soft_vcpu *v, const struct insn *i)
{
    if (!(v->cpu.cr4 & CR4_PKE))
        soft_raise(v, EXC_UD);
    if ((u32)v->cpu.gpr[RCX])
        raise_gp(v);
    set_edx_eax(v, v->cpu.pkru);
}

static void op_wrpkru(struct soft_vcpu *v, const struct insn *i)
{
    u32 value = (u32)v->cpu.gpr[RAX];

    if (!(v->cpu.cr4 & CR4_PKE))
        soft_raise(v, EXC_UD);
    if ((u32)v->cpu.gpr[RCX] || (u32)v->cpu.gpr[RDX])
        raise_gp(v);
    if (value == v->cpu.pkru)
        return;
    v->cpu.pkru = value;
    soft_tlb_flush(v);
}

/* --- TLB and caches --- */

/* INVLPG (vol. 2A): the address is not checked against anything; non-canonical ones do nothing. */
static void op_invlpg(struct soft_vcpu *v, const struct insn *i)
{
    gva_t lin = v->seg_base[i->seg] + insn_offset(v, i);

    soft_require_cpl0(v);
    if (!soft_code64(v))
        lin = (u32)lin;
    if (!soft_long_mode(v) || soft_canonical(v, lin))
        soft_tlb_flush_page(v, lin);
}

/* INVPCID (vol. 2A): the TLB has no PCIDs, so one context is all that isn't global. */
static void op_invpcid(struct soft_vcpu *v, const struct insn *i)
{
    u64 type = soft_code64(v) ? v->cpu.gpr[i->reg] : (u32)v->cpu.gpr[i->reg], pcid, lin;
    struct {
        u64 pcid, lin;
    } desc;

    if (soft_vm86(v))
        raise_gp(v);
    soft_require_cpl0(v);
    soft_load_bytes(v, insn_linear(v, i, sizeof(desc), ACCESS_READ), &desc, sizeof(desc),
                    i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ);
    pcid = desc.pcid;
    lin = desc.lin;
    if (type > 3 || pcid > CR3_PCID_MASK)
        raise_gp(v);
    if (type < 2 && pcid && !(v->cpu.cr4 & CR4_PCIDE))
        raise_gp(v);
    if (type == 0 && !soft_canonical(v, lin))
        raise_gp(v);
    switch (type) {
    case 0:
        soft_tlb_flush_page(v, lin);
        break;
    case 2:
        soft_tlb_flush(v);
        break;
    default:
        soft_tlb_flush_nonglobal(v);
        break;
    }
}

/* INVD, WBINVD, WBNOINVD: guest memory is coherent, so nothing but the check is left. */
static void op_cache(struct soft_vcpu *v, const struct insn *i)
{
    soft_require_cpl0(v);
}

/* CLFLUSH, CLFLUSHOPT, CLWB: faults as a load of a byte. */
static void op_cache_line(struct soft_vcpu *v, const struct insn *i)
{
    soft_probe(v, insn_linear(v, i, 1, ACCESS_READ), 1,
               i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ);
}

/* --- Halting --- */

/* HLT (vol. 2A) */
static void op_hlt(struct soft_vcpu *v, const struct insn *i)
{
    soft_require_cpl0(v);
    v->cpu.activity = CPU_HALTED;
    soft_set_ip(v, soft_next_ip(v));
}

/* MONITOR (vol. 2B): the address is checked as a load of a byte; see MWAIT. */
static void op_monitor(struct soft_vcpu *v, const struct insn *i)
{
    unsigned access = i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ;

    if (soft_cpl(v) != 0)
        soft_raise(v, EXC_UD);
    if ((u32)v->cpu.gpr[RCX])
        raise_gp(v);
    soft_probe(v, soft_linear(v, i->seg, reg_get_asize(v, RAX, i->asize), 1, ACCESS_READ), 1,
               access);
}

#define MWAIT_NS 50000

/*
 * MWAIT (vol. 2B) may end at any time for reasons of the implementation's own. The monitored line is not
 * watched: it ends after 50 us, or when something asks for attention. So a guest that idles by MWAIT costs
 * little, and sees a store by another processor soon enough.
 */
static void op_mwait(struct soft_vcpu *v, const struct insn *i)
{
    struct timespec until;

    if (soft_cpl(v) != 0)
        soft_raise(v, EXC_UD);
    if ((u32)v->cpu.gpr[RCX] & ~1u)
        raise_gp(v);
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += MWAIT_NS;
    if (until.tv_nsec >= (long)NS_PER_SEC) {
        until.tv_nsec -= (long)NS_PER_SEC;
        until.tv_sec++;
    }
    soft_posts_begin_sleep(v);
    while (!atomic_load(&v->attention) && soft_sleep(v, 0, &until))
        ;
    soft_posts_end_sleep(v);
    v->poll = 0;
}

/* VMCALL, VMMCALL: what isn't offered here goes to the machine. */
static void op_hypercall(struct soft_vcpu *v, const struct insn *i)
{
    soft_set_ip(v, soft_next_ip(v));
    if (pv_hypercall(v))
        return;
    v->exit->reason = VCPU_EXIT_HYPERCALL;
    v->leave = true;
}

/* --- Identification, time, MSRs, random numbers --- */

static void op_cpuid(struct soft_vcpu *v, const struct insn *i)
{
    struct cpu *cpu = &v->cpu;
    struct cpuid_dynamic now = {
        .index = v->index,
        .cr4 = cpu->cr4,
        .xcr0 = cpu->xcr0,
        .xss = cpu->msr.xss,
        .apic_enabled = lapic_base(v->lapic) & APIC_BASE_ENABLE,
    };
    struct cpuid_regs r;

    cpuid_model_query(v->cpuid, &now, (u32)cpu->gpr[RAX], (u32)cpu->gpr[RCX], &r);
    cpu->gpr[RAX] = r.eax;
    cpu->gpr[RBX] = r.ebx;
    cpu->gpr[RCX] = r.ecx;
    cpu->gpr[RDX] = r.edx;
}

static void op_rdmsr(struct soft_vcpu *v, const struct insn *i)
{
    u64 value;

    soft_require_cpl0(v);
    if (!soft_rdmsr(v, (u32)v->cpu.gpr[RCX], &value))
        raise_gp(v);
    set_edx_eax(v, value);
}

/* WRMSR: among the MSRs are the APIC's, so what is due is looked at again. */
static void op_wrmsr(struct soft_vcpu *v, const struct insn *i)
{
    soft_require_cpl0(v);
    if (!soft_wrmsr(v, (u32)v->cpu.gpr[RCX], get_edx_eax(v)))
        raise_gp(v);
    v->poll = 0;
    atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
}

static void check_tsc(struct soft_vcpu *v)
{
    if ((v->cpu.cr4 & CR4_TSD) && soft_cpl(v) != 0)
        raise_gp(v);
}

static void op_rdtsc(struct soft_vcpu *v, const struct insn *i)
{
    check_tsc(v);
    set_edx_eax(v, soft_tsc(v));
}

static void op_rdtscp(struct soft_vcpu *v, const struct insn *i)
{
    check_tsc(v);
    set_edx_eax(v, soft_tsc(v));
    v->cpu.gpr[RCX] = (u32)v->cpu.msr.tsc_aux;
}

static void op_rdpid(struct soft_vcpu *v, const struct insn *i)
{
    v->cpu.gpr[i->rm] = (u32)v->cpu.msr.tsc_aux;
}

/* RDPMC: no model has performance counters, so ECX names none. */
static void op_rdpmc(struct soft_vcpu *v, const struct insn *i)
{
    raise_gp(v);
}

/* RDRAND, RDSEED (vol. 2B). CF says that there was a number; the other arithmetic flags are cleared. */
static void op_random(struct soft_vcpu *v, const struct insn *i)
{
    u64 value = 0;
    bool ok = getrandom(&value, sizeof(value), 0) == sizeof(value);

    insn_write_rm(v, i, ok ? value : 0, i->osize);
    v->aflags = aflags_from_eflags(ok ? EFLAGS_CF : 0);
}

/* --- FS and GS bases (vol. 2B, 2D) --- */

static void check_fsgsbase(struct soft_vcpu *v)
{
    if (!soft_code64(v) || !(v->cpu.cr4 & CR4_FSGSBASE))
        soft_raise(v, EXC_UD);
}

static void read_base(struct soft_vcpu *v, const struct insn *i, enum segreg seg)
{
    check_fsgsbase(v);
    insn_write_rm(v, i, v->cpu.seg[seg].base, i->osize == 8 ? 8 : 4);
}

static void write_base(struct soft_vcpu *v, const struct insn *i, enum segreg seg)
{
    u64 base = insn_read_rm(v, i, i->osize == 8 ? 8 : 4); /* 66 means nothing */

    check_fsgsbase(v);
    if (!soft_canonical(v, base))
        raise_gp(v);
    v->cpu.seg[seg].base = base;
    v->seg_base[seg] = base;
}

static void op_rdfsbase(struct soft_vcpu *v, const struct insn *i)
{
    read_base(v, i, SEG_FS);
}
static void op_rdgsbase(struct soft_vcpu *v, const struct insn *i)
{
    read_base(v, i, SEG_GS);
}
static void op_wrfsbase(struct soft_vcpu *v, const struct insn *i)
{
    write_base(v, i, SEG_FS);
}
static void op_wrgsbase(struct soft_vcpu *v, const struct insn *i)
{
    write_base(v, i, SEG_GS);
}

/* --- Flags --- */

/*
 * Which flag CLI and STI work on: IF by IOPL; else VIF in virtual-8086 mode under VME and at CPL 3
 * under PVI; else #GP(0) (vol. 2A, CLI, table 3-7).
 */
static u64 interrupt_flag(struct soft_vcpu *v)
{
    bool vm86 = soft_vm86(v);

    if (!(v->cpu.cr0 & CR0_PE) || soft_cpl(v) <= iopl(v))
        return EFLAGS_IF;
    if (vm86 ? !(v->cpu.cr4 & CR4_VME) : soft_cpl(v) != 3 || !(v->cpu.cr4 & CR4_PVI))
        raise_gp(v);
    return EFLAGS_VIF;
}

static void op_cli(struct soft_vcpu *v, const struct insn *i)
{
    v->cpu.rflags &= ~interrupt_flag(v);
}

/* STI (vol. 2B): when it sets IF, the next instruction still runs before an interrupt. */
static void op_sti(struct soft_vcpu *v, const struct insn *i)
{
    u64 flag = interrupt_flag(v);

    if (flag == EFLAGS_VIF) {
        if (v->cpu.rflags & EFLAGS_VIP)
            raise_gp(v);
        v->cpu.rflags |= EFLAGS_VIF;
        return;
    }
    if (v->cpu.rflags & EFLAGS_IF)
        return;
    v->cpu.rflags |= EFLAGS_IF;
    v->cpu.shadow_sti = true;
    atomic_fetch_or(&v->attention, ATTN_SHADOW);
    soft_interrupts_open(v);
}

static void set_ac(struct soft_vcpu *v, bool on)
{
    if (soft_cpl(v) != 0)
        soft_raise(v, EXC_UD);
    v->cpu.rflags = on ? v->cpu.rflags | EFLAGS_AC : v->cpu.rflags & ~EFLAGS_AC;
    soft_privilege_changed(v);
}

static void op_clac(struct soft_vcpu *v, const struct insn *i)
{
    set_ac(v, false);
}
static void op_stac(struct soft_vcpu *v, const struct insn *i)
{
    set_ac(v, true);
}

/* In virtual-8086 mode with IOPL below 3: true when VME lets PUSHF and POPF work on VIF. */
static bool vme_flags(struct soft_vcpu *v, unsigned size)
{
    if (!soft_vm86(v) || iopl(v) == 3)
        return false;
    if (!(v->cpu.cr4 & CR4_VME) || size != 2)
        raise_gp(v);
    return true;
}

/* PUSHF, PUSHFD, PUSHFQ (vol. 2B) */
static void op_pushf(struct soft_vcpu *v, const struct insn *i)
{
    u64 flags = soft_flags_get(v) & ~(EFLAGS_VM | EFLAGS_RF);

    if (vme_flags(v, i->osize)) {
        flags = (flags & ~EFLAGS_IF) | EFLAGS_IOPL;
        if (flags & EFLAGS_VIF)
            flags |= EFLAGS_IF;
    }
    soft_push(v, flags, i->osize);
}

/* POPF, POPFD, POPFQ (vol. 2B, table 4-16) */
static void op_popf(struct soft_vcpu *v, const struct insn *i)
{
    u64 change = EFLAGS_ARITH | EFLAGS_TF | EFLAGS_DF | EFLAGS_NT, old = soft_flags_get(v), flags;
    bool by_vme = vme_flags(v, i->osize);
    struct stack s = soft_stack(v);

    soft_stack_pop(v, &s, &flags, 1, i->osize);
    if (i->osize >= 4)
        change |= EFLAGS_AC | EFLAGS_ID;
    if (by_vme) {
        if ((flags & EFLAGS_TF) || ((flags & EFLAGS_IF) && (old & EFLAGS_VIP)))
            raise_gp(v);
        old = flags & EFLAGS_IF ? old | EFLAGS_VIF : old & ~EFLAGS_VIF;
    } else {
        if (!(v->cpu.cr0 & CR0_PE) || soft_cpl(v) <= iopl(v))
            change |= EFLAGS_IF;
        if (soft_cpl(v) == 0)
            change |= EFLAGS_IOPL;
    }
    soft_stack_commit(v, &s);
    soft_flags_set(v, (old & ~change & ~EFLAGS_RF) | (flags & change));
    soft_privilege_changed(v);
    soft_interrupts_open(v);
}

/* --- Ports --- */

/* #GP(0) unless the port may be accessed: IOPL, or the TSS's I/O permission bitmap (vol. 1, 19.5). */
static void check_io(struct soft_vcpu *v, u16 port, unsigned size)
{
    const struct segment *tr = &v->cpu.tr;
    u32 at, bits;

    if (!(v->cpu.cr0 & CR0_PE) || (!soft_vm86(v) && soft_cpl(v) <= iopl(v)))
        return;
    if (!(tr->attr & 8) || tr->limit < 103)
        raise_gp(v);
    at = (u32)soft_system_load(v, tr->base + 102, 2) + port / 8u;
    if (at + 1 > tr->limit)
        raise_gp(v);
    bits = (u32)soft_system_load(v, tr->base + at, 2) >> (port % 8);
    if (bits & ((1u << size) - 1))
        raise_gp(v);
}

static u64 port_read(struct soft_vcpu *v, u16 port, unsigned size)
{
    v->stats.exits_port++;
    soft_io_access(v, port, size);
    return io_bus_read(v->engine->config.ports, port, size);
}

static void port_write(struct soft_vcpu *v, u16 port, u64 value, unsigned size)
{
    v->stats.exits_port++;
    soft_io_access(v, port, size);
    io_bus_write(v->engine->config.ports, port, value, size);
}

/* The port operand: DX when the decoder saw that register in its place, else the immediate. */
static u16 port_operand(const struct soft_vcpu *v, const struct insn *i, u8 reg)
{
    return reg == RDX ? (u16)v->cpu.gpr[RDX] : (u8)i->imm;
}

/* IN, OUT (vol. 2A, 2B): REX.W doesn't widen them. */
static void op_in(struct soft_vcpu *v, const struct insn *i)
{
    unsigned size = MIN(i->osize, 4);
    u16 port = port_operand(v, i, i->src);
    u64 value;

    check_io(v, port, size);
    value = port_read(v, port, size);
    if (size == 1)
        reg_set8(v, RAX, (u8)value);
    else if (size == 2)
        reg_set16(v, RAX, (u16)value);
    else
        v->cpu.gpr[RAX] = (u32)value;
}

static void op_out(struct soft_vcpu *v, const struct insn *i)
{
    unsigned size = MIN(i->osize, 4);
    u16 port = port_operand(v, i, i->dst);

    check_io(v, port, size);
    port_write(v, port, v->cpu.gpr[RAX] & (BIT(8 * size) - 1), size);
}

/* One element of INS or OUTS; its index register moves when it is done. */
static void string_io_step(struct soft_vcpu *v, const struct insn *i, unsigned size, bool in)
{
    u16 port = (u16)v->cpu.gpr[RDX];
    unsigned seg = in ? SEG_ES : i->seg, index = in ? RDI : RSI;
    unsigned access = (in ? ACCESS_WRITE : ACCESS_READ) | (seg == SEG_SS ? ACCESS_STACK : 0);
    u64 offset = reg_get_asize(v, index, i->asize);
    gva_t lin;

    check_io(v, port, size);
    lin = soft_linear(v, seg, offset, size, access & ACCESS_WRITE);
    if (in) {
        /* A device may not be read before it is certain that the value can be kept. */
        soft_probe(v, lin, size, access);
        soft_store(v, lin, port_read(v, port, size), size, access);
    } else {
        port_write(v, port, soft_load(v, lin, size, access), size);
    }
    offset = v->cpu.rflags & EFLAGS_DF ? offset - size : offset + size;
    reg_set_asize(v, index, offset, i->asize);
}

#define STRING_IO_CHUNK 1024

/*
 * INS, OUTS (vol. 2A, 2B). With REP some elements at a time: it stops between two when something wants
 * attention or a trap is due, with RIP still on the instruction.
 */
static void string_io(struct soft_vcpu *v, const struct insn *i, unsigned size, bool in)
{
    unsigned left = v->cpu.rflags & EFLAGS_TF ? 1 : STRING_IO_CHUNK;
    u64 count;

    if (!(i->flags & (INSN_REP | INSN_REPNE))) {
        string_io_step(v, i, size, in);
        return;
    }
    check_io(v, (u16)v->cpu.gpr[RDX], size); /* even when there is nothing to do */
    count = reg_get_asize(v, RCX, i->asize);
    while (count) {
        string_io_step(v, i, size, in);
        reg_set_asize(v, RCX, --count, i->asize);
        if (--left == 0 || v->cpu.db_pending || (atomic_load(&v->attention) & ~ATTN_SHADOW))
            break;
    }
    if (count)
        soft_leave_repeated(v);
}

static void op_insb(struct soft_vcpu *v, const struct insn *i)
{
    string_io(v, i, 1, true);
}
static void op_insw(struct soft_vcpu *v, const struct insn *i)
{
    string_io(v, i, 2, true);
}
static void op_insd(struct soft_vcpu *v, const struct insn *i)
{
    string_io(v, i, 4, true);
}
static void op_outsb(struct soft_vcpu *v, const struct insn *i)
{
    string_io(v, i, 1, false);
}
static void op_outsw(struct soft_vcpu *v, const struct insn *i)
{
    string_io(v, i, 2, false);
}
static void op_outsd(struct soft_vcpu *v, const struct insn *i)
{
    string_io(v, i, 4, false);
}

/* --- The table --- */

#define INSN(name, fn, flags, feature)                                                             \
    {                                                                                              \
        ZYDIS_MNEMONIC_##name, fn, flags, feature                                                  \
    }
#define ENDS INSN_ENDS_BLOCK
#define ALWAYS INSN_NO_FEATURE

const struct insn_def system_insns[] = {
    INSN(ARPL, op_arpl, 0, ALWAYS),
    INSN(BOUND, op_bound, 0, ALWAYS),
    INSN(CLAC, op_clac, ENDS, FEATURE_SMAP),
    INSN(CLFLUSH, op_cache_line, 0, FEATURE_CLFLUSH),
    INSN(CLFLUSHOPT, op_cache_line, 0, FEATURE_CLFLUSHOPT),
    INSN(CLI, op_cli, 0, ALWAYS),
    INSN(CLTS, op_clts, ENDS, ALWAYS),
    INSN(CLWB, op_cache_line, 0, FEATURE_CLWB),
    INSN(CPUID, op_cpuid, 0, ALWAYS),
    INSN(HLT, op_hlt, ENDS, ALWAYS),
    INSN(IN, op_in, ENDS, ALWAYS),
    INSN(INSB, op_insb, ENDS, ALWAYS),
    INSN(INSD, op_insd, ENDS, ALWAYS),
    INSN(INSW, op_insw, ENDS, ALWAYS),
    INSN(INT, op_int, ENDS, ALWAYS),
    INSN(INT1, op_int1, ENDS, ALWAYS),
    INSN(INT3, op_int3, ENDS, ALWAYS),
    INSN(INTO, op_into, ENDS, ALWAYS),
    INSN(INVD, op_cache, 0, ALWAYS),
    INSN(INVLPG, op_invlpg, ENDS, ALWAYS),
    INSN(INVPCID, op_invpcid, ENDS, FEATURE_INVPCID),
    INSN(IRET, op_iret, ENDS, ALWAYS),
    INSN(IRETD, op_iret, ENDS, ALWAYS),
    INSN(IRETQ, op_iret, ENDS, ALWAYS),
    INSN(LAR, op_lar, 0, ALWAYS),
    INSN(LDS, op_lds, 0, ALWAYS),
    INSN(LES, op_les, 0, ALWAYS),
    INSN(LFS, op_lfs, 0, ALWAYS),
    INSN(LGDT, op_lgdt, ENDS, ALWAYS),
    INSN(LGS, op_lgs, 0, ALWAYS),
    INSN(LIDT, op_lidt, ENDS, ALWAYS),
    INSN(LLDT, op_lldt, ENDS, ALWAYS),
    INSN(LMSW, op_lmsw, ENDS, ALWAYS),
    INSN(LSL, op_lsl, 0, ALWAYS),
    INSN(LSS, op_lss, ENDS, ALWAYS),
    INSN(LTR, op_ltr, ENDS, ALWAYS),
    INSN(MONITOR, op_monitor, 0, FEATURE_MONITOR),
    INSN(MWAIT, op_mwait, ENDS, FEATURE_MONITOR),
    INSN(OUT, op_out, ENDS, ALWAYS),
    INSN(OUTSB, op_outsb, ENDS, ALWAYS),
    INSN(OUTSD, op_outsd, ENDS, ALWAYS),
    INSN(OUTSW, op_outsw, ENDS, ALWAYS),
    INSN(POPF, op_popf, ENDS, ALWAYS),
    INSN(POPFD, op_popf, ENDS, ALWAYS),
    INSN(POPFQ, op_popf, ENDS, ALWAYS),
    INSN(PUSHF, op_pushf, 0, ALWAYS),
    INSN(PUSHFD, op_pushf, 0, ALWAYS),
    INSN(PUSHFQ, op_pushf, 0, ALWAYS),
    INSN(RDFSBASE, op_rdfsbase, 0, FEATURE_FSGSBASE),
    INSN(RDGSBASE, op_rdgsbase, 0, FEATURE_FSGSBASE),
    INSN(RDMSR, op_rdmsr, 0, FEATURE_MSR),
    INSN(RDPID, op_rdpid, 0, FEATURE_RDPID),
    INSN(RDPKRU, op_rdpkru, 0, FEATURE_PKU),
    INSN(RDPMC, op_rdpmc, 0, ALWAYS),
    INSN(RDRAND, op_random, 0, FEATURE_RDRAND),
    INSN(RDSEED, op_random, 0, FEATURE_RDSEED),
    INSN(RDTSC, op_rdtsc, 0, FEATURE_TSC),
    INSN(RDTSCP, op_rdtscp, 0, FEATURE_RDTSCP),
    INSN(SGDT, op_sgdt, 0, ALWAYS),
    INSN(SIDT, op_sidt, 0, ALWAYS),
    INSN(SLDT, op_sldt, 0, ALWAYS),
    INSN(SMSW, op_smsw, 0, ALWAYS),
    INSN(STAC, op_stac, ENDS, FEATURE_SMAP),
    INSN(STI, op_sti, ENDS, ALWAYS),
    INSN(STR, op_str, 0, ALWAYS),
    INSN(SWAPGS, op_swapgs, 0, ALWAYS),
    INSN(SYSCALL, op_syscall, ENDS, FEATURE_SYSCALL),
    INSN(SYSENTER, op_sysenter, ENDS, FEATURE_SEP),
    INSN(SYSEXIT, op_sysexit, ENDS, FEATURE_SEP),
    INSN(SYSRET, op_sysret, ENDS, FEATURE_SYSCALL),
    INSN(VERR, op_verr, 0, ALWAYS),
    INSN(VERW, op_verw, 0, ALWAYS),
    INSN(VMCALL, op_hypercall, ENDS, ALWAYS),
    INSN(VMMCALL, op_hypercall, ENDS, ALWAYS),
    INSN(WBINVD, op_cache, 0, ALWAYS),
    INSN(WRFSBASE, op_wrfsbase, 0, FEATURE_FSGSBASE),
    INSN(WRGSBASE, op_wrgsbase, 0, FEATURE_FSGSBASE),
    INSN(WRMSR, op_wrmsr, ENDS, FEATURE_MSR),
    INSN(WRPKRU, op_wrpkru, ENDS, FEATURE_PKU),
    INSN(XGETBV, op_xgetbv, 0, FEATURE_XSAVE),
    INSN(XSETBV, op_xsetbv, ENDS, FEATURE_XSAVE),
};
const size_t system_insns_count = ARRAY_SIZE(system_insns);
