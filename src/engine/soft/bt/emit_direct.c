/*
 * Accesses to memory in direct code (BT_MODE_DIRECT): user addresses are the host's own, where direct_map
 * says so. An access off a base is the guest's instruction itself, behind
 *      mov S2, base
 *      shr S2, 21
 *      cmp byte gs:[S2 + direct_map], 0
 *      je                the same instruction with a check by the TLB (BT_MODE_NARROW)
 * which stays good for DIRECT_REACH around, reading and writing, for as long as the base changes by constants
 * only: direct.c has address space beside what it maps. So one check for each base is all that most blocks
 * need, and PUSH, POP and the like run as they are, RSP being the guest's. RSP itself isn't looked up where it
 * changes by constants: what direct.c has mapped has address space to both sides, so who made a stack access just now
 * is still within that, whatever the access was allowed to meet there (struct stack_state). bt_run looks it up before
 * it enters code.
 *
 * MOVS and STOS run as they are too, behind a look for each pointer, if they go forward and RCX keeps them within reach.
 *
 * A page that is not there, or not for writing, is met by the access as a page fault of the host; so is an
 * address that isn't canonical, by the look into the map or by the access. Both are points (add_point), at
 * which everything is as before the guest's instruction. audit.c checks that no access goes without its check.
 */
#include "engine/soft/bt/translate.h"

/* --- Checks --- */

static void put_narrow_branch(struct translation *t, const struct bt_insn *i, u32 chunk)
{
    struct stub *s = add_stub(t, STUB_NARROW, put_jcc(&t->p, CC_E));

    s->target = i->offset;
    s->number = chunk;
    s->x87 = t->x87;
    s->resume = t->check_start;
}

/* S2 = an address: ZF if its chunk isn't mapped. */
static void put_chunk_look(struct translation *t, s64 offset)
{
    u8 **p = &t->p;

    put_shift(p, true, 5, S2, DIRECT_SHIFT);
    add_point_at(t, offset);
    put8(p, 0x65); /* cmp byte gs:[S2 + direct_map], 0 */
    put_rex(p, false, 0, 0, S2);
    put8(p, 0x80);
    put_modrm(p, 2, EXT_CMP, S2);
    put32(p, GS_OFFSET(direct_map));
    put8(p, 0);
}

/* S2 = the address: goes on if its chunk is mapped. */
static void put_direct_check(struct translation *t, const struct bt_insn *i)
{
    put_chunk_look(t, i->offset);
    put_narrow_branch(t, i, CHUNK_IN_S2);
}

/* The same for an address that is known. */
static void put_known_check(struct translation *t, const struct bt_insn *i, u32 chunk)
{
    put_op_gs_imm8(&t->p, OP_GROUP_BYTE, EXT_CMP, GS_OFFSET(direct_map) + chunk, 0);
    put_narrow_branch(t, i, chunk);
}

/* An access was made: RSP is `drift` more than its address. */
static void touch_stack(struct translation *t, s64 drift)
{
    t->stack = (struct stack_state){.known = true, .touched = true, .drift = drift};
}

/* RSP must be looked up before the instruction at `offset`. */
static void put_stack_check(struct translation *t, s64 offset)
{
    struct stub *s;

    put_mov_rr(&t->p, S2, RSP);
    put_chunk_look(t, offset);
    s = add_stub(t, STUB_STACK, put_jcc(&t->p, CC_E));
    s->target = (s32)offset;
    s->x87 = t->x87;
    touch_stack(t, 0);
}

static bool covers(const struct direct_group *g, const struct access *a)
{
    s64 from = (s64)a->disp + g->shift - g->at;

    return g->valid && g->base == a->base && g->index == a->index &&
           (a->index == NO_REG || g->scale == a->scale) && from >= -DIRECT_REACH &&
           from <= DIRECT_REACH;
}

static bool is_stack(const struct access *a)
{
    return a->base == RSP && a->index == NO_REG;
}

static bool is_covered(const struct translation *t, const struct access *a)
{
    s64 from = a->disp + t->stack.drift;

    if (is_stack(a))
        return t->stack.known && from >= -DIRECT_REACH && from <= DIRECT_REACH;
    for (unsigned n = 0; n < BT_DIRECT_GROUPS; n++)
        if (covers(&t->direct[n], a))
            return true;
    return false;
}

static void add_group(struct translation *t, struct direct_group g)
{
    t->direct[t->next_direct++ % BT_DIRECT_GROUPS] = g;
}

/* Checks what isn't covered: base and index are the host registers that hold a's. */
static void cover(struct translation *t, const struct bt_insn *i, const struct access *a, u8 base,
                  u8 index)
{
    struct direct_group g = {true, a->base, a->index, a->scale, a->disp, 0};

    if (is_covered(t, a))
        return;
    if (is_stack(a) && a->disp >= -DIRECT_REACH && a->disp <= DIRECT_REACH) {
        put_stack_check(t, i->offset);
        return;
    }
    if (index == NO_REG && base != NO_REG && a->disp >= -DIRECT_REACH && a->disp <= DIRECT_REACH) {
        g.at = 0;
        put_mov_rr(&t->p, S2, base);
    } else {
        put_lea_full(&t->p, true, S2, base, index, a->scale, a->disp);
    }
    put_direct_check(t, i);
    add_group(t, g);
}

/* i was emitted: what its access, and its change of RSP, make known. */
static void move_stack(struct translation *t, const struct bt_insn *i)
{
    s32 by;

    if (i->op == BT_PLAIN && i->mem && i->base == RSP && i->index == NO_REG && is_direct(t) &&
        i->disp > -(s32)GUEST_PAGE_SIZE && i->disp < (s32)GUEST_PAGE_SIZE && t->stack.known)
        touch_stack(t, -i->disp);
    if (!(insn_changed_regs(i) & BIT32(RSP)))
        return;
    if (adds_constant(i, RSP, &by))
        t->stack.drift += by;
    else
        t->stack.known = false;
    if (t->stack.drift < -STACK_SLACK || t->stack.drift > STACK_SLACK)
        t->stack.known = false;
}

void direct_after(struct translation *t, const struct bt_insn *i)
{
    u32 changed = insn_changed_regs(i);
    s32 by;

    if (i->op != BT_LEAVE || !is_direct(t)) /* direct_leave did, off RBP */
        move_stack(t, i);
    for (unsigned n = 0; n < BT_DIRECT_GROUPS; n++) {
        struct direct_group *g = &t->direct[n];

        if (g->index != NO_REG && (changed & BIT32(g->index)))
            g->valid = false;
        else if (g->base < 16 && (changed & BIT32(g->base)) && !adds_constant(i, g->base, &by))
            g->valid = false;
        else if (g->base < 16 && (changed & BIT32(g->base)))
            g->shift += by;
        if (g->shift < -DIRECT_REACH || g->shift > DIRECT_REACH)
            g->valid = false;
    }
}

/* Comes first: has the flags kept if there will be a check. */
static void begin_check(struct translation *t, const struct access *a)
{
    if (!is_covered(t, a))
        flags_clobber(t);
    t->check_start = t->p;
}

void direct_forget(struct translation *t)
{
    for (unsigned n = 0; n < BT_DIRECT_GROUPS; n++)
        t->direct[n].valid = false;
}

void stack_settle(struct translation *t, s64 offset)
{
    const struct stack_state *s = &t->stack;

    if (!has_direct_stack(t) || (s->known && (s->touched || !s->drift)))
        return;
    if (!s->known) {
        flags_clobber(t);
        put_stack_check(t, offset);
        return;
    }
    add_point_at(t, offset);
    put_load_word(&t->p, 8, S2, RSP, 0);
    touch_stack(t, 0);
}

/* --- Operands --- */

static s32 use_operand(struct translation *t, u8 base, u8 index, u8 scale, s32 disp)
{
    t->operand = base;
    t->operand_index = index;
    t->operand_scale = scale;
    return disp;
}

/* An address that no check is shared for: it is worked out in S1. */
static s32 lone_access(struct translation *t, const struct bt_insn *i, u8 base, s32 disp)
{
    flags_clobber(t);
    t->check_start = t->p;
    emit_address(t, i, S1, base, disp);
    if (i->seg != NO_REG)
        put_op_gs(&t->p, true, OP_ADD, S1, GS_OFFSET(seg_base) + 8u * (u32)i->seg);
    put_mov_rr(&t->p, S2, S1);
    put_direct_check(t, i);
    return use_operand(t, S1, NO_REG, 0, 0);
}

/* Off a segment's base. */
static s32 segment_access(struct translation *t, const struct bt_insn *i, s32 disp)
{
    struct access a = {.base = SEG_BASE(i->seg), .index = NO_REG, .disp = disp};

    begin_check(t, &a);
    put_load_gs(&t->p, S1, GS_OFFSET(seg_base) + 8u * (u32)i->seg);
    cover(t, i, &a, S1, NO_REG);
    return use_operand(t, S1, NO_REG, 0, disp);
}

/* At an address that is known. False: it is none that is ever mapped. */
static bool known_access(struct translation *t, const struct bt_insn *i, s64 offset, s32 *disp)
{
    struct access a = {.base = PAGE_BASE, .index = NO_REG, .disp = (s32)offset};
    struct direct_group g = {true, a.base, a.index, 0, a.disp, 0};
    gva_t lin = t->block->page + (u64)offset;

    if (lin >> DIRECT_SHIFT >= DIRECT_CHUNKS || a.disp != offset)
        return false;
    begin_check(t, &a);
    if (!is_covered(t, &a)) {
        put_known_check(t, i, (u32)(lin >> DIRECT_SHIFT));
        add_group(t, g);
    }
    if (lin <= INT32_MAX) {
        *disp = use_operand(t, NO_REG, NO_REG, 0, (s32)lin);
    } else {
        put_mov_imm(&t->p, S1, lin);
        *disp = use_operand(t, S1, NO_REG, 0, 0);
    }
    return true;
}

s32 direct_access(struct translation *t, const struct bt_insn *i, u8 base, s32 disp)
{
    bool plain = i->op == BT_PLAIN; /* else its index and segment are none of the stack's */
    struct access a = {.base = base, .index = NO_REG, .disp = disp};
    u8 host_base, host_index = NO_REG;
    s32 known;

    if (plain && i->rip_relative && !i->address32 && i->seg == NO_REG &&
        known_access(t, i, (s64)i->offset + i->len + disp, &known))
        return known;
    if (plain) {
        a.index = i->index;
        a.scale = i->scale;
        if (i->seg != NO_REG && base == NO_REG && a.index == NO_REG && !i->address32 &&
            !i->rip_relative)
            return segment_access(t, i, disp);
        if (i->seg != NO_REG || i->address32 || i->rip_relative ||
            (base == NO_REG && a.index == NO_REG) || (in_memory(t, base) && in_memory(t, a.index)))
            return lone_access(t, i, base, disp);
    }
    begin_check(t, &a);
    host_base = base == NO_REG ? NO_REG : read_reg(t, base, S1);
    if (a.index != NO_REG)
        host_index = read_reg(t, a.index, S1);
    cover(t, i, &a, host_base, host_index);
    return use_operand(t, host_base, host_index, a.scale, disp);
}

/* --- The stack --- */

static void put_push_reg(u8 **p, unsigned reg)
{
    if (reg >= 8)
        put8(p, 0x41);
    put8(p, 0x50 | (reg & 7));
}
static void put_pop_reg(u8 **p, unsigned reg)
{
    if (reg >= 8)
        put8(p, 0x41);
    put8(p, 0x58 | (reg & 7));
}

static void put_push_imm(u8 **p, u32 imm)
{
    put8(p, 0x68);
    put32(p, imm);
}

/* RSP, or RBP, is good for the stack's accesses. */
static void cover_stack(struct translation *t, const struct bt_insn *i, u8 reg)
{
    struct access a = {.base = reg, .index = NO_REG};

    begin_check(t, &a);
    cover(t, i, &a, reg, NO_REG);
}

void direct_push(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p, reg;

    flags_before_write(t, BIT32(RSP));
    cover_stack(t, i, RSP);
    if (i->mem) {
        struct bt_insn load = *i;
        s32 disp;

        load.op = BT_PLAIN;
        disp = direct_access(t, &load, i->base, i->disp);
        add_point(t, i);
        put_rex(p, false, 0, t->operand_index == NO_REG ? 0 : t->operand_index,
                t->operand == NO_REG ? 0 : t->operand);
        put8(p, 0xff); /* push qword [operand] */
        put_operand(t, 6, disp);
    } else if (i->rm == NO_REG) {
        add_point(t, i);
        put_push_imm(p, (u32)i->imm);
    } else {
        reg = read_reg(t, i->rm, S2);
        add_point(t, i);
        put_push_reg(p, reg);
    }
    touch_stack(t, i->word); /* RSP moves there in direct_after */
}

void direct_pop(struct translation *t, const struct bt_insn *i)
{
    u8 to = in_memory(t, i->rm) ? S2 : t->home[i->rm];

    flags_before_write(t, BIT32(RSP) | BIT32(i->rm));
    cover_stack(t, i, RSP);
    add_point(t, i);
    put_pop_reg(&t->p, to);
    touch_stack(t, 0); /* RSP moves on in direct_after */
    if (to == S2)
        put_store_gs(&t->p, GS_GPR(i->rm), S2);
}

void direct_leave(struct translation *t, const struct bt_insn *i)
{
    flags_before_write(t, BIT32(RSP) | BIT32(RBP));
    cover_stack(t, i, RBP);
    add_point(t, i);
    put8(&t->p, 0xc9);
    touch_stack(t, i->word);
}

void direct_push_return(struct translation *t, const struct bt_insn *i)
{
    gva_t address = t->block->page + i->offset + i->len;

    flags_before_write(t, BIT32(RSP));
    cover_stack(t, i, RSP);
    if (address <= INT32_MAX) {
        add_point(t, i);
        put_push_imm(&t->p, (u32)address);
    } else {
        put_mov_imm(&t->p, S2, address);
        add_point(t, i);
        put_push_reg(&t->p, S2);
    }
    touch_stack(t, 0);
}

void direct_pop_return(struct translation *t, const struct bt_insn *i)
{
    flags_before_write(t, BIT32(RSP));
    cover_stack(t, i, RSP);
    flags_put_away(t);
    add_point(t, i);
    put_pop_reg(&t->p, S1);
    touch_stack(t, i->word + i->imm);
    if (i->imm)
        put_lea(&t->p, RSP, RSP, (s32)i->imm);
}

/* --- Strings --- */

/* If the flags, which were just made by a comparison, are `cc`, C does it. */
static struct stub *put_string_by_c(struct translation *t, const struct bt_insn *i, unsigned cc)
{
    struct stub *s = add_stub(t, STUB_SITE, put_jcc(&t->p, cc));

    s->reason = BT_STRING;
    s->number = add_site(t, i);
    t->bt->sites[s->number].string = i->string;
    return s;
}

bool direct_string(struct translation *t, const struct bt_insn *i)
{
    const struct bt_string *string = &i->string;
    struct stub *backward, *far = NULL;
    u8 **p = &t->p;

    if ((string->op != STRING_MOVE && string->op != STRING_STORE) || in_memory(t, RDI) ||
        in_memory(t, RSI) || in_memory(t, RCX))
        return false;
    flags_before_write(t, i->written);
    flags_clobber(t);
    t->check_start = t->p;
    put_op_gs_imm8(p, OP_TEST_BYTE, 0, GS_OFFSET(cpu.rflags) + 1, EFLAGS_DF >> 8);
    backward = put_string_by_c(t, i, CC_NE);
    if (string->repeated) {
        put_op_ri(p, true, EXT_CMP, RCX, (s32)(DIRECT_REACH / string->size));
        far = put_string_by_c(t, i, CC_A);
    }
    put_mov_rr(p, S2, RDI);
    put_direct_check(t, i);
    if (string_has_source(string)) {
        put_mov_rr(p, S2, RSI);
        put_direct_check(t, i);
    }
    add_point(t, i);
    if (string->size == 2)
        put8(p, 0x66);
    if (string->repeated)
        put8(p, 0xf3);
    if (string->size == 8)
        put_rex(p, true, 0, 0, 0);
    put8(p, (string_has_source(string) ? 0xa4u : 0xaau) | (string->size > 1)); /* movs, stos */
    backward->resume = t->p;
    if (far)
        far->resume = t->p;
    direct_forget(t);
    return true;
}
