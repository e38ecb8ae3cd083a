/*
 * The architectural state: its field table, and what RESET, INIT and SIPI make of it.
 */
#include "x86/cpu.h"

#include <string.h>

static const struct state_field segment_fields[] = {
    STATE_FIELD(struct segment, base), STATE_FIELD(struct segment, limit),
    STATE_FIELD(struct segment, attr), STATE_FIELD(struct segment, selector),
    STATE_HOST(struct segment, pad),
};
static const struct state_desc segment_desc =
    STATE_DESC("segment", 1, struct segment, segment_fields);

static const struct state_field table_fields[] = {
    STATE_FIELD(struct descriptor_table, base),
    STATE_FIELD(struct descriptor_table, limit),
    STATE_HOST(struct descriptor_table, pad),
};
static const struct state_desc table_desc =
    STATE_DESC("table", 1, struct descriptor_table, table_fields);

#define MSR_FIELD(m) STATE_FIELD(struct cpu_msrs, m)
static const struct state_field msr_fields[] = {MSR_FIELD(efer),
                                                MSR_FIELD(star),
                                                MSR_FIELD(lstar),
                                                MSR_FIELD(cstar),
                                                MSR_FIELD(sfmask),
                                                MSR_FIELD(kernel_gs_base),
                                                MSR_FIELD(sysenter_cs),
                                                MSR_FIELD(sysenter_esp),
                                                MSR_FIELD(sysenter_eip),
                                                MSR_FIELD(pat),
                                                MSR_FIELD(tsc_aux),
                                                MSR_FIELD(tsc_adjust),
                                                MSR_FIELD(misc_enable),
                                                MSR_FIELD(spec_ctrl),
                                                MSR_FIELD(debugctl),
                                                MSR_FIELD(xss),
                                                MSR_FIELD(pkrs),
                                                MSR_FIELD(mtrr_def_type),
                                                MSR_FIELD(mtrr_fix),
                                                MSR_FIELD(mtrr_phys_base),
                                                MSR_FIELD(mtrr_phys_mask),
                                                MSR_FIELD(mcg_status),
                                                MSR_FIELD(mcg_ctl),
                                                MSR_FIELD(mc_ctl),
                                                MSR_FIELD(mc_status),
                                                MSR_FIELD(mc_addr),
                                                MSR_FIELD(mc_misc),
                                                MSR_FIELD(feature_control),
                                                MSR_FIELD(bios_sign_id),
                                                MSR_FIELD(hwcr),
                                                MSR_FIELD(syscfg),
                                                MSR_FIELD(vm_cr),
                                                MSR_FIELD(vm_hsave_pa),
                                                MSR_FIELD(kvm_wall_clock),
                                                MSR_FIELD(kvm_system_time),
                                                MSR_FIELD(kvm_async_pf),
                                                MSR_FIELD(kvm_async_pf_int),
                                                MSR_FIELD(kvm_steal_time),
                                                MSR_FIELD(kvm_pv_eoi),
                                                MSR_FIELD(kvm_poll_control)};
static const struct state_desc msr_desc = STATE_DESC("msr", 1, struct cpu_msrs, msr_fields);

#define CPU_FIELD(m) STATE_FIELD(struct cpu, m)
static const struct state_field fields[] = {
    CPU_FIELD(gpr),
    CPU_FIELD(rflags),
    STATE_STRUCTS(struct cpu, seg, &segment_desc),
    STATE_STRUCTS(struct cpu, ldtr, &segment_desc),
    STATE_STRUCTS(struct cpu, tr, &segment_desc),
    STATE_STRUCTS(struct cpu, gdtr, &table_desc),
    STATE_STRUCTS(struct cpu, idtr, &table_desc),
    CPU_FIELD(cr0),
    CPU_FIELD(cr2),
    CPU_FIELD(cr3),
    CPU_FIELD(cr4),
    CPU_FIELD(cr8),
    CPU_FIELD(dr),
    CPU_FIELD(pdpte),
    STATE_STRUCTS(struct cpu, msr, &msr_desc),
    CPU_FIELD(tsc_offset),
    CPU_FIELD(xcr0),
    CPU_FIELD(fcw),
    CPU_FIELD(fsw),
    CPU_FIELD(ftw),
    CPU_FIELD(fop),
    CPU_FIELD(mxcsr),
    CPU_FIELD(fip),
    CPU_FIELD(fdp),
    CPU_FIELD(fcs),
    CPU_FIELD(fds),
    CPU_FIELD(pkru),
    STATE_BYTES(struct cpu, fpr),
    STATE_BYTES(struct cpu, vec),
    CPU_FIELD(k),
    CPU_FIELD(activity),
    CPU_FIELD(nmi_pending),
    CPU_FIELD(nmi_blocked),
    CPU_FIELD(shadow_sti),
    CPU_FIELD(shadow_ss),
    CPU_FIELD(smi_blocked),
    CPU_FIELD(sipi_vector),
    CPU_FIELD(apic_bsp),
    CPU_FIELD(event_pending),
    CPU_FIELD(event_vector),
    CPU_FIELD(event_type),
    CPU_FIELD(event_has_error),
    CPU_FIELD(event_error),
    CPU_FIELD(db_pending),
};

/* What no processor can be in, and code relies on: a state file may say anything. */
static int cpu_loaded(void *obj, struct error *err)
{
    const struct cpu *cpu = obj;

    if (cpu->activity > CPU_SHUTDOWN)
        return error_input(err, "CPU state: activity %u is unknown", cpu->activity);
    if (cpu->event_type > CPU_EVENT_PRIV_EXC)
        return error_input(err, "CPU state: event type %u is unknown", cpu->event_type);
    if (cpu->gpr[GPR_ZERO] != 0)
        return error_input(err, "CPU state: the zero register holds %#llx",
                           (unsigned long long)cpu->gpr[GPR_ZERO]);
    return 0;
}

const struct state_desc cpu_state_desc = {
    .name = "cpu",
    .version = 1,
    .struct_size = sizeof(struct cpu),
    .fields = fields,
    .nfields = ARRAY_SIZE(fields),
    .loaded = cpu_loaded,
};

/* MSR_KVM_POLL_CONTROL's bit 0: the host polls before it lets a halted vCPU's thread sleep (Linux, msr.rst). */
#define KVM_POLL_CONTROL_HOST 1

static void reset_msrs(struct cpu_msrs *msr)
{
#define MSR_STORED(name, number, needs, vendor, field, reset, writable) msr->field = (reset);
#define MSR_KEPT(name, number, needs, vendor, field, reset, writable) msr->field = (reset);
#define MSR_CONST(name, number, needs, vendor, value)
#define MSR_QUIET(name, number, needs, vendor, value)
#define MSR_SPECIAL(name, number, needs, vendor)
#include "x86/msr.def"
#undef MSR_STORED
#undef MSR_KEPT
#undef MSR_CONST
#undef MSR_QUIET
#undef MSR_SPECIAL
    msr->kvm_poll_control = KVM_POLL_CONTROL_HOST;
}

static struct segment real_mode_segment(u32 type_bits)
{
    return (struct segment){.limit = 0xffff, .attr = SEG_ATTR_P | type_bits};
}

/*
 * What INIT shares with RESET. INIT leaves alone: CR0.CD and NW, the TSC, x87 and SIMD with XCR0
 * and PKRU, the MTRRs, and MSRs but EFER (which can't stay: paging is off) and IA32_DEBUGCTL.
 */
static void init_core(struct cpu *cpu, bool is_bsp)
{
    const u32 data = SEG_ATTR_S | SEG_ATTR_WRITABLE | SEG_ATTR_ACCESSED;

    memset(cpu->gpr, 0, sizeof(cpu->gpr));
    cpu->gpr[RDX] = 0x600; /* a family 6 processor; the engine that knows puts the signature */
    cpu->gpr[GPR_RIP] = 0xfff0;
    cpu->rflags = EFLAGS_FIXED;

    for (int i = 0; i < SEG_COUNT; i++)
        cpu->seg[i] = real_mode_segment(data);
    cpu->seg[SEG_CS].attr |= SEG_ATTR_CODE;
    cpu->seg[SEG_CS].selector = 0xf000;
    cpu->seg[SEG_CS].base = 0xffff0000;
    cpu->ldtr = real_mode_segment(SYSSEG_LDT);
    cpu->tr = real_mode_segment(SYSSEG_TSS32_BUSY);
    cpu->gdtr = cpu->idtr = (struct descriptor_table){.limit = 0xffff};

    cpu->cr2 = cpu->cr3 = cpu->cr4 = cpu->cr8 = 0;
    memset(cpu->pdpte, 0, sizeof(cpu->pdpte));
    memset(cpu->dr, 0, sizeof(cpu->dr));
    cpu->dr[6] = DR6_FIXED;
    cpu->dr[7] = DR7_FIXED;
    cpu->msr.efer = 0;
    cpu->msr.debugctl = 0;

    cpu->activity = is_bsp ? CPU_RUNNING : CPU_WAIT_FOR_SIPI;
    cpu->apic_bsp = is_bsp;
    cpu->nmi_pending = cpu->nmi_blocked = false;
    cpu->shadow_sti = cpu->shadow_ss = false;
    cpu->smi_blocked = false;
    cpu->sipi_vector = 0;
    cpu->event_pending = cpu->event_has_error = false;
    cpu->event_vector = cpu->event_type = 0;
    cpu->event_error = 0;
    cpu->db_pending = 0;
}

void cpu_reset(struct cpu *cpu, unsigned index)
{
    memset(cpu, 0, sizeof(*cpu));
    reset_msrs(&cpu->msr);
    cpu->cr0 = CR0_CD | CR0_NW | CR0_ET;
    cpu->xcr0 = XCR0_X87;
    cpu->fcw = 0x40;
    cpu->ftw = 0x5555; /* all zero, not empty: FNINIT has yet to come */
    cpu->mxcsr = 0x1f80;
    init_core(cpu, index == 0);
}

void cpu_init(struct cpu *cpu)
{
    cpu->cr0 = (cpu->cr0 & (CR0_CD | CR0_NW)) | CR0_ET;
    init_core(cpu, cpu->apic_bsp);
}

void cpu_sipi(struct cpu *cpu, u8 vector)
{
    cpu->seg[SEG_CS].selector = (u16)(vector << 8);
    cpu->seg[SEG_CS].base = (u64)vector << 12;
    cpu->gpr[GPR_RIP] = 0;
    cpu->activity = CPU_RUNNING;
}
