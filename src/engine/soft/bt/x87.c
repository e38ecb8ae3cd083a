/*
 * The x87 pointers that translated code kept back: see emit_x87.c. Compiled without vector instructions.
 */
#include "engine/soft/bt/bt.h"

void bt_x87_point(struct soft_vcpu *v, u32 number)
{
    const struct bt_x87 *x = &v->bt->x87s[number];
    struct cpu *cpu = &v->cpu;
    u64 address;

    if (!number)
        return;
    cpu->fip = v->bt_shared.ip_page + x->offset;
    cpu->fop = x->fop;
    cpu->fcs = cpu->seg[SEG_CS].selector;
    if (!x->memory)
        return;
    address = (u64)x->disp;
    if (x->rip_relative)
        address += v->bt_shared.ip_page;
    if (x->base != NO_REG)
        address += cpu->gpr[x->base];
    if (x->index != NO_REG)
        address += cpu->gpr[x->index] << x->scale;
    cpu->fdp = x->address32 ? (u32)address : address;
    cpu->fds = cpu->seg[x->seg].selector;
}
