/*
 * What x87 and MMX instructions need besides being emitted as they are.
 *
 * Registers. The guest's are in the host's while v->fpu_live. A block looks at that once, before its first
 * such instruction: nothing within a block can change it.
 *
 * Pointers. FIP, FOP, FCS, FDP and FDS are the guest's, so they are kept in v->cpu, but only the last
 * instruction's are ever seen. So each is kept back as a struct bt_x87, and stored where the code may go
 * on in another block, or before a register of its operand's address changes. Where code is left for the
 * interpreter, the site or point names the instruction, and C does what was kept back.
 */
#include "engine/soft/bt/translate.h"

void x87_make_live(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p;
    struct stub *s;
    u32 site;

    flags_clobber(t);
    t->groups[0].valid = false; /* C doesn't keep S1 */
    direct_forget(t);
    put8(p, 0x65); /* cmp byte gs:[fpu_live], 0 */
    put8(p, 0x80);
    put_modrm(p, 0, EXT_CMP, 4);
    put8(p, 0x25);
    put32(p, GS_OFFSET(fpu_live));
    put8(p, 0);
    s = add_stub(t, STUB_SITE, put_jcc(p, CC_E));
    site = add_site(t, i);
    s->resume = *p;
    s->reason = BT_FPU;
    s->number = site;
    t->x87_live = true;
}

void x87_note(struct translation *t, const struct bt_insn *i)
{
    const struct bt_x87 *before = &t->bt->x87s[t->x87];
    struct bt_x87 *x = &t->bt->x87s[t->bt->next.x87s];

    if (!i->x87_points)
        return;
    *x = *before; /* without a memory operand FDP stays */
    x->offset = i->offset;
    x->fop = i->fop;
    if (i->mem) {
        x->memory = true;
        x->address32 = i->address32;
        x->rip_relative = i->rip_relative;
        x->base = i->base;
        x->index = i->index;
        x->scale = i->scale;
        x->seg = i->insn.seg;
        x->disp = i->rip_relative ? i->offset + i->len + i->disp : i->disp;
    }
    t->x87 = t->bt->next.x87s++;
}

/* v->cpu.to = the selector of seg */
static void put_selector(struct translation *t, u32 to, unsigned seg)
{
    put_op_gs(&t->p, false, OP_MOV, S2,
              GS_OFFSET(cpu.seg) + seg * (u32)sizeof(struct segment) +
                  (u32)offsetof(struct segment, selector));
    put8(&t->p, 0x66);
    put_op_gs(&t->p, false, 0x89, S2, to);
}

void x87_store_pointers(struct translation *t)
{
    const struct bt_x87 *x = &t->bt->x87s[t->x87];
    u8 **p = &t->p;

    if (!t->x87)
        return;
    if (x->memory) {
        struct bt_insn i = {.rip_relative = x->rip_relative,
                            .address32 = x->address32,
                            .index = x->index,
                            .scale = x->scale};

        emit_address(t, &i, S2, x->base, x->disp);
        if (x->rip_relative || (x->base != NO_REG && t->home[x->base] == NO_REG))
            t->groups[0].valid = false; /* it took S1 */
        put_store_gs(p, GS_OFFSET(cpu.fdp), S2);
        put_selector(t, GS_OFFSET(cpu.fds), x->seg);
    }
    put_page_address(t, S2, x->offset, 8);
    put_store_gs(p, GS_OFFSET(cpu.fip), S2);
    put8(p, 0x65); /* mov word gs:[fop], imm */
    put8(p, 0x66);
    put8(p, 0xc7);
    put_modrm(p, 0, 0, 4);
    put8(p, 0x25);
    put32(p, GS_OFFSET(cpu.fop));
    put8(p, x->fop);
    put8(p, x->fop >> 8);
    put_selector(t, GS_OFFSET(cpu.fcs), SEG_CS);
    t->x87 = 0;
}

void x87_before_write(struct translation *t, u32 regs)
{
    const struct bt_x87 *x = &t->bt->x87s[t->x87];

    if (t->x87 && x->memory &&
        ((x->base != NO_REG && (regs & BIT32(x->base))) ||
         (x->index != NO_REG && (regs & BIT32(x->index)))))
        x87_store_pointers(t);
}
