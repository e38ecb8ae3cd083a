/*
 * The architectural state of a vCPU: struct cpu and struct lapic_state, to the kernel and back.
 *
 * The kernel keeps it in pieces, each with an ioctl of its own. Their order matters when they are
 * set: CPUID first (at creation), the control registers before what depends on the mode (XCR0, the
 * APIC's page by IA32_APIC_BASE), events last.
 *
 * Not in KVM's state, so not carried: FCS and FDS (the kernel saves FPU state in its 64-bit form,
 * where FIP and FDP are 64 bits wide), and a debug trap that is pending on an instruction boundary.
 */
#include "engine/kvm/kvm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

/* --- Registers --- */

static void get_regs(const struct kvm_regs *r, struct cpu *cpu)
{
    const u64 gpr[GPR_COUNT] = {r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi,
                                r->r8,  r->r9,  r->r10, r->r11, r->r12, r->r13, r->r14, r->r15};

    memcpy(cpu->gpr, gpr, sizeof(gpr));
    cpu->gpr[GPR_ZERO] = 0;
    cpu->gpr[GPR_RIP] = r->rip;
    cpu->rflags = r->rflags;
}

static void set_regs(const struct cpu *cpu, struct kvm_regs *r)
{
    const u64 *g = cpu->gpr;

    *r = (struct kvm_regs){
        .rax = g[RAX],
        .rcx = g[RCX],
        .rdx = g[RDX],
        .rbx = g[RBX],
        .rsp = g[RSP],
        .rbp = g[RBP],
        .rsi = g[RSI],
        .rdi = g[RDI],
        .r8 = g[R8],
        .r9 = g[R9],
        .r10 = g[R10],
        .r11 = g[R11],
        .r12 = g[R12],
        .r13 = g[R13],
        .r14 = g[R14],
        .r15 = g[R15],
        .rip = g[GPR_RIP],
        .rflags = cpu->rflags,
    };
}

static struct segment get_segment(const struct kvm_segment *k)
{
    u32 attr = k->type | (u32)k->s << 4 | (u32)k->dpl << SEG_ATTR_DPL_SHIFT;

    attr |= (k->present ? SEG_ATTR_P : 0) | (k->avl ? SEG_ATTR_AVL : 0) | (k->l ? SEG_ATTR_L : 0) |
            (k->db ? SEG_ATTR_DB : 0) | (k->g ? SEG_ATTR_G : 0) |
            (k->unusable ? SEG_ATTR_UNUSABLE : 0);
    return (struct segment){
        .base = k->base, .limit = k->limit, .attr = attr, .selector = k->selector};
}

static struct kvm_segment set_segment(const struct segment *s)
{
    return (struct kvm_segment){
        .base = s->base,
        .limit = s->limit,
        .selector = s->selector,
        .type = s->attr & SEG_ATTR_TYPE,
        .s = !!(s->attr & SEG_ATTR_S),
        .dpl = (u8)segment_dpl(s),
        .present = !!(s->attr & SEG_ATTR_P),
        .avl = !!(s->attr & SEG_ATTR_AVL),
        .l = !!(s->attr & SEG_ATTR_L),
        .db = !!(s->attr & SEG_ATTR_DB),
        .g = !!(s->attr & SEG_ATTR_G),
        .unusable = !!(s->attr & SEG_ATTR_UNUSABLE),
    };
}

static void get_sregs(const struct kvm_sregs2 *s, struct cpu *cpu)
{
    cpu->seg[SEG_ES] = get_segment(&s->es);
    cpu->seg[SEG_CS] = get_segment(&s->cs);
    cpu->seg[SEG_SS] = get_segment(&s->ss);
    cpu->seg[SEG_DS] = get_segment(&s->ds);
    cpu->seg[SEG_FS] = get_segment(&s->fs);
    cpu->seg[SEG_GS] = get_segment(&s->gs);
    cpu->ldtr = get_segment(&s->ldt);
    cpu->tr = get_segment(&s->tr);
    cpu->gdtr = (struct descriptor_table){.base = s->gdt.base, .limit = s->gdt.limit};
    cpu->idtr = (struct descriptor_table){.base = s->idt.base, .limit = s->idt.limit};
    cpu->cr0 = s->cr0;
    cpu->cr2 = s->cr2;
    cpu->cr3 = s->cr3;
    cpu->cr4 = s->cr4;
    cpu->cr8 = s->cr8;
    cpu->msr.efer = s->efer;
    cpu->apic_bsp = s->apic_base & APIC_BASE_BSP;
    if (s->flags & KVM_SREGS2_FLAGS_PDPTRS_VALID)
        memcpy(cpu->pdpte, s->pdptrs, sizeof(cpu->pdpte));
}

static bool is_pae(const struct cpu *cpu)
{
    return (cpu->cr0 & CR0_PG) && (cpu->cr4 & CR4_PAE) && !(cpu->msr.efer & EFER_LMA);
}

static void set_sregs(const struct cpu *cpu, u64 apic_base, struct kvm_sregs2 *s)
{
    *s = (struct kvm_sregs2){
        .es = set_segment(&cpu->seg[SEG_ES]),
        .cs = set_segment(&cpu->seg[SEG_CS]),
        .ss = set_segment(&cpu->seg[SEG_SS]),
        .ds = set_segment(&cpu->seg[SEG_DS]),
        .fs = set_segment(&cpu->seg[SEG_FS]),
        .gs = set_segment(&cpu->seg[SEG_GS]),
        .ldt = set_segment(&cpu->ldtr),
        .tr = set_segment(&cpu->tr),
        .gdt = {.base = cpu->gdtr.base, .limit = (u16)cpu->gdtr.limit},
        .idt = {.base = cpu->idtr.base, .limit = (u16)cpu->idtr.limit},
        .cr0 = cpu->cr0,
        .cr2 = cpu->cr2,
        .cr3 = cpu->cr3,
        .cr4 = cpu->cr4,
        .cr8 = cpu->cr8,
        .efer = cpu->msr.efer,
        .apic_base = apic_base,
    };
    if (is_pae(cpu)) {
        s->flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
        memcpy(s->pdptrs, cpu->pdpte, sizeof(s->pdptrs));
    }
}

static void get_debug(const struct kvm_debugregs *d, struct cpu *cpu)
{
    memcpy(cpu->dr, d->db, sizeof(d->db));
    cpu->dr[6] = d->dr6;
    cpu->dr[7] = d->dr7;
}

static void set_debug(const struct cpu *cpu, struct kvm_debugregs *d)
{
    *d = (struct kvm_debugregs){.dr6 = cpu->dr[6], .dr7 = cpu->dr[7]};
    memcpy(d->db, cpu->dr, sizeof(d->db));
}

/* --- x87 and SIMD: the XSAVE area in its standard format (SDM vol. 1, 13.4) --- */

/* Offsets in the legacy region, by FXSAVE64 (SDM vol. 2A, table 3-44). */
#define FX_FCW 0
#define FX_FSW 2
#define FX_FTW 4
#define FX_FOP 6
#define FX_FIP 8
#define FX_FDP 16
#define FX_MXCSR 24
#define FX_ST 32
#define FX_XMM 160
#define XSAVE_BV 512

#define COMPONENT_AVX 2
#define COMPONENT_OPMASK 5
#define COMPONENT_ZMM_HI256 6
#define COMPONENT_HI16_ZMM 7
#define COMPONENT_PKRU 9

#define FSW_TOP(fsw) ((fsw) >> 11 & 7)
#define FCW_INIT 0x37f
#define FTW_EMPTY 0xffff

enum x87_tag { TAG_VALID, TAG_ZERO, TAG_SPECIAL, TAG_EMPTY };

/* What FNSTENV would say of a register that isn't empty (SDM vol. 1, 8.1.7). */
static enum x87_tag tag_of(const u8 *reg)
{
    u64 fraction;
    u16 exponent;

    memcpy(&fraction, reg, sizeof(fraction));
    memcpy(&exponent, reg + 8, sizeof(exponent));
    exponent &= 0x7fff;
    if (exponent == 0)
        return fraction ? TAG_SPECIAL : TAG_ZERO;
    return exponent == 0x7fff || !(fraction & BIT(63)) ? TAG_SPECIAL : TAG_VALID;
}

static void get_x87(const u8 *x, bool init, struct cpu *cpu)
{
    u8 tags;

    memset(cpu->fpr, 0, sizeof(cpu->fpr));
    cpu->fcs = cpu->fds = 0;
    if (init) {
        cpu->fcw = FCW_INIT;
        cpu->fsw = 0;
        cpu->ftw = FTW_EMPTY;
        cpu->fop = 0;
        cpu->fip = cpu->fdp = 0;
        return;
    }
    memcpy(&cpu->fcw, x + FX_FCW, 2);
    memcpy(&cpu->fsw, x + FX_FSW, 2);
    memcpy(&cpu->fop, x + FX_FOP, 2);
    memcpy(&cpu->fip, x + FX_FIP, 8);
    memcpy(&cpu->fdp, x + FX_FDP, 8);
    tags = x[FX_FTW];
    cpu->ftw = 0;
    for (unsigned i = 0; i < 8; i++) {
        unsigned physical = (FSW_TOP(cpu->fsw) + i) & 7;

        memcpy(cpu->fpr[physical], x + FX_ST + 16 * i, 10);
    }
    for (unsigned i = 0; i < 8; i++) {
        unsigned tag = tags & BIT(i) ? tag_of(cpu->fpr[i]) : TAG_EMPTY;

        cpu->ftw |= (u16)(tag << (2 * i));
    }
}

static void set_x87(const struct cpu *cpu, u8 *x)
{
    memcpy(x + FX_FCW, &cpu->fcw, 2);
    memcpy(x + FX_FSW, &cpu->fsw, 2);
    memcpy(x + FX_FOP, &cpu->fop, 2);
    memcpy(x + FX_FIP, &cpu->fip, 8);
    memcpy(x + FX_FDP, &cpu->fdp, 8);
    for (unsigned i = 0; i < 8; i++) {
        if ((cpu->ftw >> (2 * i) & 3) != TAG_EMPTY)
            x[FX_FTW] |= (u8)BIT(i);
        memcpy(x + FX_ST + 16 * i, cpu->fpr[(FSW_TOP(cpu->fsw) + i) & 7], 10);
    }
}

/*
 * One component, between where it lies in the area and where struct cpu has it: `count` pieces of
 * `size` bytes, in struct cpu each `stride` bytes after the other.
 */
struct piece {
    u8 component;
    u8 count, size;
    u16 stride;
    size_t offset; /* in struct cpu */
};

static const struct piece pieces[] = {
    {COMPONENT_AVX, 16, 16, 64, offsetof(struct cpu, vec) + 16},
    {COMPONENT_OPMASK, 8, 8, 8, offsetof(struct cpu, k)},
    {COMPONENT_ZMM_HI256, 16, 32, 64, offsetof(struct cpu, vec) + 32},
    {COMPONENT_HI16_ZMM, 16, 64, 64, offsetof(struct cpu, vec) + 16 * 64},
    {COMPONENT_PKRU, 1, 4, 4, offsetof(struct cpu, pkru)},
};

static void get_xsave(struct kvm_engine *e, const struct kvm_xsave *area, struct cpu *cpu)
{
    const u8 *x = (const u8 *)area->region;
    u64 present;

    memcpy(&present, x + XSAVE_BV, sizeof(present));
    get_x87(x, !(present & XCR0_X87), cpu);
    memcpy(&cpu->mxcsr, x + FX_MXCSR, 4);
    memset(cpu->vec, 0, sizeof(cpu->vec));
    memset(cpu->k, 0, sizeof(cpu->k));
    cpu->pkru = 0;
    for (unsigned i = 0; (present & XCR0_SSE) && i < 16; i++)
        memcpy(cpu->vec[i], x + FX_XMM + 16 * i, 16);
    for (size_t i = 0; i < ARRAY_SIZE(pieces); i++) {
        const struct piece *p = &pieces[i];
        u32 offset, size;

        if (!(present & e->xcr0 & BIT(p->component)) ||
            !kvm_xsave_place(p->component, &offset, &size) || offset + size > sizeof(*area))
            continue;
        for (unsigned n = 0; n < p->count; n++)
            memcpy((u8 *)cpu + p->offset + (size_t)n * p->stride, x + offset + n * p->size,
                   p->size);
    }
}

static void set_xsave(struct kvm_engine *e, const struct cpu *cpu, struct kvm_xsave *area)
{
    u64 present = XCR0_X87 | XCR0_SSE;
    u8 *x = (u8 *)area->region;

    memset(area, 0, sizeof(*area));
    set_x87(cpu, x);
    memcpy(x + FX_MXCSR, &cpu->mxcsr, 4);
    for (unsigned i = 0; i < 16; i++)
        memcpy(x + FX_XMM + 16 * i, cpu->vec[i], 16);
    for (size_t i = 0; i < ARRAY_SIZE(pieces); i++) {
        const struct piece *p = &pieces[i];
        u32 offset, size;

        if (!(e->xcr0 & BIT(p->component)) || !kvm_xsave_place(p->component, &offset, &size) ||
            offset + size > sizeof(*area))
            continue;
        present |= BIT(p->component);
        for (unsigned n = 0; n < p->count; n++)
            memcpy(x + offset + n * p->size, (const u8 *)cpu + p->offset + (size_t)n * p->stride,
                   p->size);
    }
    memcpy(x + XSAVE_BV, &present, sizeof(present));
}

/* --- Events --- */

static void get_event(const struct kvm_vcpu_events *ev, struct cpu *cpu)
{
    cpu->event_pending = true;
    if (ev->exception.injected) {
        bool soft = ev->exception.nr == EXC_BP || ev->exception.nr == EXC_OF;

        cpu->event_type = soft ? CPU_EVENT_SOFT_EXC : CPU_EVENT_EXCEPTION;
        cpu->event_vector = ev->exception.nr;
        cpu->event_has_error = ev->exception.has_error_code;
        cpu->event_error = ev->exception.error_code;
    } else if (ev->nmi.injected) {
        cpu->event_type = CPU_EVENT_NMI;
        cpu->event_vector = EXC_NMI;
    } else if (ev->interrupt.injected) {
        cpu->event_type = ev->interrupt.soft ? CPU_EVENT_SOFT_INT : CPU_EVENT_EXTERNAL;
        cpu->event_vector = ev->interrupt.nr;
    } else {
        cpu->event_pending = false;
    }
}

static void get_events(const struct kvm_vcpu *v, const struct kvm_vcpu_events *ev, struct cpu *cpu)
{
    get_event(ev, cpu);
    if (!cpu->event_pending && v->extint.queued) {
        cpu->event_pending = true;
        cpu->event_type = CPU_EVENT_EXTERNAL;
        cpu->event_vector = v->extint.vector;
    }
    cpu->nmi_pending = ev->nmi.pending || atomic_load(&v->nmi);
    cpu->nmi_blocked = ev->nmi.masked;
    cpu->shadow_sti = ev->interrupt.shadow & KVM_X86_SHADOW_INT_STI;
    cpu->shadow_ss = ev->interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS;
    cpu->smi_blocked = ev->smi.smm;
    cpu->sipi_vector = (u8)ev->sipi_vector;
}

static void set_events(struct kvm_vcpu *v, const struct cpu *cpu, struct kvm_vcpu_events *ev)
{
    bool queued = v->extint.queued;

    *ev = (struct kvm_vcpu_events){
        .nmi = {.pending = cpu->nmi_pending, .masked = cpu->nmi_blocked},
        .interrupt.shadow = (cpu->shadow_sti ? KVM_X86_SHADOW_INT_STI : 0) |
                            (cpu->shadow_ss ? KVM_X86_SHADOW_INT_MOV_SS : 0),
        .sipi_vector = cpu->sipi_vector,
        .flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR |
                 KVM_VCPUEVENT_VALID_SHADOW,
    };
    atomic_store(&v->nmi, false);
    if (!cpu->event_pending)
        return;
    switch ((enum cpu_event_type)cpu->event_type) {
    case CPU_EVENT_EXTERNAL:
    case CPU_EVENT_SOFT_INT:
        /* The vector that KVM holds already isn't given to it twice. */
        ev->interrupt.injected = !(queued && cpu->event_vector == v->extint.vector);
        ev->interrupt.nr = cpu->event_vector;
        ev->interrupt.soft = cpu->event_type == CPU_EVENT_SOFT_INT;
        break;
    case CPU_EVENT_NMI:
        ev->nmi.injected = 1;
        break;
    case CPU_EVENT_EXCEPTION:
    case CPU_EVENT_SOFT_EXC:
    case CPU_EVENT_PRIV_EXC:
        ev->exception.injected = 1;
        ev->exception.nr = cpu->event_vector;
        ev->exception.has_error_code = cpu->event_has_error;
        ev->exception.error_code = cpu->event_error;
        break;
    }
}

static u8 get_activity(u32 mp_state)
{
    switch (mp_state) {
    case KVM_MP_STATE_HALTED:
    case KVM_MP_STATE_AP_RESET_HOLD:
        return CPU_HALTED;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED:
        return CPU_WAIT_FOR_SIPI;
    default:
        return CPU_RUNNING;
    }
}

static u32 set_activity(u8 activity)
{
    switch (activity) {
    case CPU_HALTED:
        return KVM_MP_STATE_HALTED;
    case CPU_WAIT_FOR_SIPI:
        return KVM_MP_STATE_INIT_RECEIVED;
    default:
        return KVM_MP_STATE_RUNNABLE;
    }
}

/* --- All of it --- */

struct kvm_pieces {
    struct kvm_regs regs;
    struct kvm_sregs2 sregs;
    struct kvm_debugregs debug;
    struct kvm_xcrs xcrs;
    struct kvm_mp_state mp;
    struct kvm_vcpu_events events;
    struct kvm_lapic_state apic;
    struct kvm_xsave xsave; /* the last: its size is open */
};

struct transfer {
    unsigned long request;
    const char *name;
    size_t offset; /* of the argument in struct kvm_pieces */
};

#define TRANSFER(request, member)                                                                  \
    {                                                                                              \
        request, #request, offsetof(struct kvm_pieces, member)                                     \
    }

static int transfer(struct kvm_vcpu *v, struct kvm_pieces *p, const struct transfer *list, size_t n,
                    struct error *err)
{
    for (size_t i = 0; i < n; i++) {
        if (ioctl(v->fd, list[i].request, (char *)p + list[i].offset) < 0)
            return error_host(err, errno, "vCPU %u: %s", v->index, list[i].name);
    }
    return 0;
}

int kvm_state_get(struct kvm_vcpu *v, struct cpu *cpu, struct lapic_state *apic, struct error *err)
{
    static const struct transfer list[] = {
        /* First: it may change what the others tell (an INIT or SIPI is taken). */
        TRANSFER(KVM_GET_MP_STATE, mp),        TRANSFER(KVM_GET_REGS, regs),
        TRANSFER(KVM_GET_SREGS2, sregs),       TRANSFER(KVM_GET_DEBUGREGS, debug),
        TRANSFER(KVM_GET_XCRS, xcrs),          TRANSFER(KVM_GET_XSAVE, xsave),
        TRANSFER(KVM_GET_VCPU_EVENTS, events),
    };
    struct kvm_pieces p = {0};
    int ret = transfer(v, &p, list, ARRAY_SIZE(list), err);

    memset(cpu, 0, sizeof(*cpu));
    cpu_reset(cpu, v->index); /* for the MSRs that KVM doesn't keep */
    if (!ret)
        ret = kvm_msr_get(v, &cpu->msr, err);
    if (!ret)
        ret = kvm_time_get_apic(v, &p.apic, err);
    if (ret)
        return ret;
    get_regs(&p.regs, cpu);
    get_sregs(&p.sregs, cpu);
    get_debug(&p.debug, cpu);
    cpu->xcr0 = p.xcrs.nr_xcrs ? p.xcrs.xcrs[0].value : XCR0_X87;
    get_xsave(v->engine, &p.xsave, cpu);
    get_events(v, &p.events, cpu);
    cpu->activity = get_activity(p.mp.mp_state);
    cpu->tsc_offset = kvm_time_tsc_offset(v);
    kvm_lapic_to_state(&p.apic, p.sregs.apic_base, v->left_deadline, v->left_ns, apic);
    return 0;
}

int kvm_state_set(struct kvm_vcpu *v, const struct cpu *cpu, const struct lapic_state *apic,
                  struct error *err)
{
    static const struct transfer before[] = {
        TRANSFER(KVM_SET_SREGS2, sregs),    TRANSFER(KVM_SET_REGS, regs),
        TRANSFER(KVM_SET_DEBUGREGS, debug), TRANSFER(KVM_SET_XSAVE, xsave),
        TRANSFER(KVM_SET_LAPIC, apic),
    };
    static const struct transfer xcrs[] = {TRANSFER(KVM_SET_XCRS, xcrs)};
    static const struct transfer after[] = {
        TRANSFER(KVM_SET_MP_STATE, mp),
        TRANSFER(KVM_SET_VCPU_EVENTS, events),
    };
    struct kvm_pieces p = {0};
    int ret;

    v->left_ns = vm_clock_now(v->engine->config.clock);
    v->left_deadline = apic->tsc_deadline;
    set_regs(cpu, &p.regs);
    set_sregs(cpu, apic->base_msr, &p.sregs);
    set_debug(cpu, &p.debug);
    set_xsave(v->engine, cpu, &p.xsave);
    set_events(v, cpu, &p.events);
    kvm_lapic_from_state(apic, v->left_ns, &p.apic);
    p.xcrs.nr_xcrs = 1;
    p.xcrs.xcrs[0].value = cpu->xcr0;
    p.mp.mp_state = set_activity(cpu->activity);

    ret = transfer(v, &p, before, ARRAY_SIZE(before), err);
    if (!ret && cpuid_model_xcr0(v->engine->config.cpuid))
        ret = transfer(v, &p, xcrs, ARRAY_SIZE(xcrs), err);
    if (!ret)
        ret = kvm_msr_set(v, &cpu->msr, err);
    if (!ret)
        ret = transfer(v, &p, after, ARRAY_SIZE(after), err);
    if (ret)
        return ret;
    v->left_apic = p.apic;
    kvm_time_set_tsc_offset(v, cpu->tsc_offset);
    return 0;
}
