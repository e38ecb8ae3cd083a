/*
 * `struct cpu`: the architectural state of one logical processor: what a snapshot stores, and what every
 * engine gives and takes through the engine contract. Nothing of an implementation is in it.
 */
#ifndef DOPPEL_X86_CPU_H
#define DOPPEL_X86_CPU_H

#include "host/types.h"
#include "state/fields.h"
#include "x86/regs.h"
#include "x86/segment.h"

/*
 * Two pseudo-registers follow the sixteen: one that is always zero (an absent base or index), and RIP,
 * so that every effective address is base + index * scale + displacement.
 */
#define GPR_ZERO 16
#define GPR_RIP 17

/* Where the processor is in its life (SDM vol. 3, 8.4 and 10.4.7; names as KVM's MP states). */
enum cpu_activity {
    CPU_RUNNING,
    CPU_HALTED,
    CPU_WAIT_FOR_SIPI,
    CPU_SHUTDOWN, /* after a triple fault */
};

struct cpu_msrs {
    u64 efer, star, lstar, cstar, sfmask, kernel_gs_base;
    u64 sysenter_cs, sysenter_esp, sysenter_eip;
    u64 pat, tsc_aux, tsc_adjust, misc_enable, spec_ctrl, debugctl, xss, pkrs;
    u64 mtrr_def_type, mtrr_fix[11], mtrr_phys_base[8], mtrr_phys_mask[8];
    u64 mcg_status, mcg_ctl, mc_ctl[4], mc_status[4], mc_addr[4], mc_misc[4];
    u64 feature_control, bios_sign_id, hwcr, syscfg, vm_cr, vm_hsave_pa;
    /* KVM's paravirtual ones. What an engine doesn't offer it keeps, for the one that does. */
    u64 kvm_wall_clock, kvm_system_time, kvm_async_pf, kvm_async_pf_int, kvm_steal_time, kvm_pv_eoi;
    u64 kvm_poll_control;
};

struct cpu {
    u64 gpr[18]; /* indexed by enum gpr, GPR_ZERO and GPR_RIP */
    u64 rflags;
    struct segment seg[SEG_COUNT];
    struct segment ldtr, tr;
    struct descriptor_table gdtr, idtr;
    u64 cr0, cr2, cr3, cr4;
    u64 cr8;      /* held by the local APIC; here when a state is got or set */
    u64 dr[8];    /* dr[4] and dr[5] unused */
    u64 pdpte[4]; /* PAE paging: as loaded by the last MOV to CR (vol. 3, 4.4.1) */
    struct cpu_msrs msr;
    u64 tsc_offset; /* guest TSC = VM TSC + offset */

    /* x87 and SIMD. fpr: physical registers R0 to R7 (not relative to TOP), 80 bits in 16 bytes. */
    u64 xcr0;
    u16 fcw, fsw, ftw; /* ftw: the full tag word as FNSTENV stores it */
    u16 fop;
    u32 mxcsr;
    u64 fip, fdp;
    u16 fcs, fds;
    u32 pkru;
    u8 fpr[8][16];
    _Alignas(64) u8 vec[32][64]; /* ZMM0 to ZMM31, their low parts YMM and XMM */
    u64 k[8];

    /* Events under way. */
    u8 activity;      /* enum cpu_activity */
    bool nmi_pending; /* latched, not yet delivered */
    bool nmi_blocked; /* from delivery until IRET */
    bool shadow_sti;  /* the instruction after STI: no maskable interrupt */
    bool shadow_ss;   /* after MOV SS or POP SS: no interrupt, NMI nor debug trap */
    bool smi_blocked;
    u8 sipi_vector;
    bool apic_bsp;
    /* An exception or interrupt whose delivery was begun and not finished (restore resumes it). */
    bool event_pending;
    u8 event_vector;
    u8 event_type; /* enum cpu_event_type */
    bool event_has_error;
    u32 event_error;
    u64 db_pending; /* DR6 bits of a debug trap that is due after the current instruction */
};

enum cpu_event_type {
    CPU_EVENT_EXTERNAL, /* interrupt from the APIC or the PIC */
    CPU_EVENT_NMI,
    CPU_EVENT_EXCEPTION,
    CPU_EVENT_SOFT_INT, /* INT n */
    CPU_EVENT_SOFT_EXC, /* INT3, INTO */
    CPU_EVENT_PRIV_EXC, /* INT1 */
};

extern const struct state_desc cpu_state_desc;

/* The state after power-up or RESET (index 0 starts, others wait for SIPI), and after INIT
 * (SDM vol. 3, table 9-1). */
void cpu_reset(struct cpu *cpu, unsigned index);
void cpu_init(struct cpu *cpu);
/* INIT done, now start at vector << 12 in real mode (vol. 3, 8.4.4). */
void cpu_sipi(struct cpu *cpu, u8 vector);

static inline unsigned cpu_cpl(const struct cpu *cpu)
{
    return segment_dpl(&cpu->seg[SEG_SS]);
}

#endif
