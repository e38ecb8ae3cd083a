/*
 * Hardware task switches (Intel SDM vol. 3, chapter 7).
 *
 * A switch has two halves (7.3). Up to the commit, every fault is the old task's and nothing has changed:
 * so both TSSes are read and checked, and their pages probed for writing, first. Behind it the new task
 * is in place with its selectors, and faults of its segments, its LDT and its error-code push are the
 * new task's: they find its EIP saved.
 */
#include "engine/soft/descriptor.h"
#include "engine/soft/flags.h"

#define TYPE_BUSY 2u /* of a TSS descriptor's type */
#define TYPE_TSS32 8u

/* DR7.L0 to L3 and LE: local to the task. */
#define DR7_LOCAL 0x155ULL

/* Offsets in the two kinds of TSS (figures 7-2 and 7-10); EFLAGS and the eight registers follow IP. */
struct tss_layout {
    u32 min_limit, size;
    unsigned width;         /* of registers */
    unsigned cr3, ip, trap; /* 0: not there */
    unsigned sregs, sreg_stride, nsregs;
    unsigned ldt;
};

static const struct tss_layout layout32 = {
    .min_limit = 0x67,
    .size = 0x68,
    .width = 4,
    .cr3 = 0x1c,
    .ip = 0x20,
    .trap = 0x64,
    .sregs = 0x48,
    .sreg_stride = 4,
    .nsregs = 6,
    .ldt = 0x60,
};
static const struct tss_layout layout16 = {
    .min_limit = 0x2b,
    .size = 0x2c,
    .width = 2,
    .ip = 0x0e,
    .sregs = 0x22,
    .sreg_stride = 2,
    .nsregs = 4,
    .ldt = 0x2a,
};

static const struct tss_layout *layout_of(unsigned type)
{
    return type & TYPE_TSS32 ? &layout32 : &layout16;
}

static u32 image_get(const u8 *image, unsigned at, unsigned width)
{
    u32 value = 0;

    memcpy(&value, image + at, width);
    return value;
}

/* The descriptor of the TSS to switch to (7.3, steps 1 to 4); JMP, CALL and gates have checked their
 * own privileges. */
static u64 new_tss(struct soft_vcpu *v, u16 selector, enum task_switch_source source)
{
    enum exception vector = source == TASK_IRET ? EXC_TS : EXC_GP;
    unsigned busy = source == TASK_IRET ? TYPE_BUSY : 0;
    u32 error = selector_error(selector);
    u64 d;

    if ((selector & 4) || !soft_read_descriptor(v, selector, &d) || !desc_is_system(d) ||
        (desc_type(d) & ~TYPE_TSS32) != (SYSSEG_TSS16_AVAIL | busy))
        soft_raise_error(v, vector, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    if (descriptor_limit(d) < layout_of(desc_type(d))->min_limit)
        soft_raise_error(v, EXC_TS, error);
    return d;
}

/* Steps 6 to 9: the old task's registers into its TSS. */
static void save_task(struct soft_vcpu *v, u64 next_ip, u64 flags)
{
    const struct cpu *cpu = &v->cpu;
    const struct tss_layout *l = layout_of(cpu->tr.attr & SEG_ATTR_TYPE);
    unsigned end = l->sregs + l->nsregs * l->sreg_stride, w = l->width;
    u8 image[0x68];

    /* The upper halves of the selectors' slots are left as they are. */
    soft_load_bytes(v, cpu->tr.base + l->ip, image + l->ip, end - l->ip,
                    ACCESS_READ | ACCESS_SYSTEM);
    memcpy(image + l->ip, &next_ip, w);
    memcpy(image + l->ip + w, &flags, w);
    for (unsigned r = 0; r < 8; r++)
        memcpy(image + l->ip + (2 + r) * w, &cpu->gpr[r], w);
    for (unsigned s = 0; s < l->nsregs; s++)
        memcpy(image + l->sregs + s * l->sreg_stride, &cpu->seg[s].selector, 2);
    soft_store_bytes(v, cpu->tr.base + l->ip, image + l->ip, end - l->ip,
                     ACCESS_WRITE | ACCESS_SYSTEM);
}

/* LDTR of the new task. */
static void load_ldt(struct soft_vcpu *v, u16 selector)
{
    u64 d;

    v->cpu.ldtr = soft_null_segment(selector, 0);
    if (selector_null(selector))
        return;
    if ((selector & 4) || !soft_read_descriptor(v, selector, &d) || !desc_is_system(d) ||
        desc_type(d) != SYSSEG_LDT || !desc_present(d))
        soft_raise_error(v, EXC_TS, selector_error(selector));
    v->cpu.ldtr = soft_segment(selector, d);
}

/* CS of the new task (table 7-1). */
static u64 check_task_code(struct soft_vcpu *v, u16 selector)
{
    u32 error = selector_error(selector);
    unsigned rpl = selector_rpl(selector);
    u64 d;

    if (selector_null(selector) || !soft_read_descriptor(v, selector, &d) || !desc_is_code(d))
        soft_raise_error(v, EXC_TS, error);
    if (desc_is_conforming(d) ? desc_dpl(d) > rpl : desc_dpl(d) != rpl)
        soft_raise_error(v, EXC_TS, error);
    if (!desc_present(d))
        soft_raise_error(v, EXC_NP, error);
    return d;
}

/* Loads the new task's segments from the selectors that are already in place. */
static void load_segments(struct soft_vcpu *v)
{
    static const u8 data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    u16 cs = v->cpu.seg[SEG_CS].selector, ss = v->cpu.seg[SEG_SS].selector;
    u64 d;

    if (selector_null(ss))
        soft_raise_error(v, EXC_TS, selector_error(ss));
    d = soft_check_stack_segment(v, ss, selector_rpl(cs), EXC_TS);
    soft_descriptor_accessed(v, ss, &d);
    soft_commit_segment(v, SEG_SS, soft_segment(ss, d));
    for (unsigned n = 0; n < ARRAY_SIZE(data); n++) {
        u16 selector = v->cpu.seg[data[n]].selector;

        if (selector_null(selector))
            continue;
        d = soft_check_data_segment(v, selector, EXC_TS);
        soft_descriptor_accessed(v, selector, &d);
        soft_commit_segment(v, data[n], soft_segment(selector, d));
    }
    d = check_task_code(v, cs);
    soft_descriptor_accessed(v, cs, &d);
    soft_commit_segment(v, SEG_CS, soft_segment(cs, d));
}

/*
 * Steps 11 to 13: all that can't fault, from the image of the new TSS. False: PAE paging refuses the new
 * CR3's PDPTEs, and goes on with the old ones.
 */
static bool load_task(struct soft_vcpu *v, const struct tss_layout *l, const u8 *image, bool nested)
{
    struct cpu *cpu = &v->cpu;
    unsigned w = l->width;
    u64 flags = image_get(image, l->ip + w, w);
    bool vm86 = (flags & EFLAGS_VM) && w == 4, paging = l->cr3 && (cpu->cr0 & CR0_PG), ok = true;

    if (paging) {
        u32 cr3 = image_get(image, l->cr3, 4);

        ok = !(cpu->cr4 & CR4_PAE) || soft_load_pdptes(v, cr3);
        if (ok)
            cpu->cr3 = cr3;
        soft_tlb_flush_nonglobal(v);
    }
    if (nested)
        flags |= EFLAGS_NT;
    soft_flags_set(v, flags & 0x3f7fd5);
    for (unsigned r = 0; r < 8; r++)
        cpu->gpr[r] = image_get(image, l->ip + (2 + r) * w, w);
    for (unsigned s = 0; s < SEG_COUNT; s++) {
        u16 selector = s < l->nsregs ? (u16)image_get(image, l->sregs + s * l->sreg_stride, 2) : 0;

        if (vm86)
            soft_set_real_segment(v, s, selector);
        else
            soft_commit_segment(v, s, soft_null_segment(selector, 0));
    }
    if (!vm86) {
        unsigned cpl = selector_rpl(cpu->seg[SEG_CS].selector);

        cpu->seg[SEG_SS].attr = SEG_ATTR_UNUSABLE | ATTR_DPL(cpl);
        /* Until it is loaded CS has the task's operand size, so that a fault saves the whole EIP. */
        cpu->seg[SEG_CS].attr = SEG_ATTR_UNUSABLE | (w == 4 ? SEG_ATTR_DB : 0);
    }
    cpu->cr0 |= CR0_TS;
    cpu->dr[7] &= ~DR7_LOCAL;
    soft_mode_changed(v);
    soft_set_ip(v, image_get(image, l->ip, w));
    return ok;
}

void soft_task_switch(struct soft_vcpu *v, u16 selector, enum task_switch_source source,
                      u64 next_ip, bool has_error, u32 error)
{
    struct cpu *cpu = &v->cpu;
    u64 d = new_tss(v, selector, source);
    u64 flags = cpu->event_pending ? soft_event_flags(v) : soft_flags_get(v);
    const struct tss_layout *l = layout_of(desc_type(d));
    const struct tss_layout *old = layout_of(cpu->tr.attr & SEG_ATTR_TYPE);
    bool nested = source == TASK_CALL || source == TASK_GATE;
    u8 image[0x68];

    if (cpu->tr.limit < old->min_limit)
        soft_raise_error(v, EXC_TS, selector_error(cpu->tr.selector));
    soft_probe(v, cpu->tr.base, old->size, ACCESS_WRITE | ACCESS_SYSTEM);
    soft_load_bytes(v, descriptor_base(d), image, l->size, ACCESS_READ | ACCESS_SYSTEM);
    if (nested)
        soft_probe(v, descriptor_base(d), 2, ACCESS_WRITE | ACCESS_SYSTEM);

    if (source == TASK_IRET)
        flags &= ~EFLAGS_NT;
    save_task(v, next_ip, flags);
    if (nested)
        soft_system_store(v, descriptor_base(d), cpu->tr.selector, 2);
    else
        soft_update_descriptor(v, cpu->tr.selector, 0, TYPE_BUSY);
    if (source != TASK_IRET)
        soft_update_descriptor(v, selector, TYPE_BUSY, 0);
    cpu->tr = soft_segment(selector, d);
    cpu->tr.attr |= TYPE_BUSY;
    if (!load_task(v, l, image, nested))
        soft_raise_error(v, EXC_GP, 0);

    load_ldt(v, (u16)image_get(image, l->ldt, 2));
    if (!soft_vm86(v))
        load_segments(v);
    soft_mode_changed(v);
    if (has_error)
        soft_push(v, error, l->width);
    if (cpu->gpr[GPR_RIP] > cpu->seg[SEG_CS].limit)
        soft_raise_error(v, EXC_GP, 0);
    if (l->trap && (image[l->trap] & 1)) {
        cpu->db_pending |= DR6_BT;
        atomic_fetch_or(&v->attention, ATTN_SHADOW);
    }
}
