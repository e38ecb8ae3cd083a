/*
 * What direct code may access: the rules of emit_direct.c, as the host's instructions show them.
 *
 *  1. A memory operand without a segment is at most DIRECT_REACH away from an address whose chunk was found
 *     mapped: by MOV or LEA of it to S2, SHR of S2 by 21, CMP of gs:[S2 + direct_map] with 0, and JE, one behind
 *     the other. PUSH and POP are accesses off RSP, LEAVE off RBP.
 *  2. That holds until a register that the address is made of changes, but by a constant (LEA off itself, ADD, SUB,
 *     PUSH, POP).
 *  3. What is loaded to S1 from the vCPU (a register that is in memory, a segment's base) is known by where it came
 *     from, until something is stored there.
 *  4. MOVS and STOS begin at addresses that are checked, and RCX is compared by CMP and JA with what is within reach.
 *  5. RSP is good without a look at a block's entries, and is to be so again at its exits: that is, it is what it was,
 *     or was looked up, or an access near it (AUDIT_SLACK) was made since. In between it may change by constants.
 *  6. An address that is a number, in the operand or moved to S1, is looked up by a CMP of its chunk's byte and JE.
 */
#include "engine/soft/bt/audit_direct.h"

#include <stdlib.h>

#define AUDIT_SLACK (2 * STACK_SLACK)

static const struct direct_value none = {NO_VALUE, NO_VALUE, 0, 0};

void direct_known_clear(struct direct_known *k)
{
    k->step = DIRECT_NOTHING;
    k->s2 = none;
    k->s1_slot = 0;
    k->s1_is_number = false;
    k->s1_number = 0;
    k->s2_copy = NO_VALUE;
    k->s2_away = false;
    k->next = 0;
    k->rcx_most = UINT64_MAX;
    k->compared = 0;
    k->stack = (struct stack_state){.known = false};
    for (unsigned n = 0; n < DIRECT_CHECKED; n++)
        k->checked[n] = none;
}

static bool same_value(const struct direct_value *x, const struct direct_value *y)
{
    return x->base == y->base && x->index == y->index && x->scale == y->scale && x->disp == y->disp;
}

static bool is_none(const struct direct_value *x)
{
    return x->base == NO_VALUE && x->index == NO_VALUE;
}

static bool is_checked(const struct direct_known *k, const struct direct_value *x)
{
    for (unsigned n = 0; n < DIRECT_CHECKED; n++)
        if (same_value(&k->checked[n], x))
            return true;
    return false;
}

static void forget_value(struct direct_known *k, u32 value)
{
    for (unsigned n = 0; n < DIRECT_CHECKED; n++)
        if (k->checked[n].base == value || k->checked[n].index == value)
            k->checked[n] = none;
}

static bool same_stack(const struct stack_state *x, const struct stack_state *y)
{
    return x->known == y->known && x->touched == y->touched && x->drift == y->drift;
}

/* Ways that differ in an access that one of them made: each is where it may be, within AUDIT_SLACK of the other. */
static void meet_stack(struct stack_state *x, const struct stack_state *y)
{
    if (!x->known || !y->known || (!x->touched && !y->touched && x->drift != y->drift))
        *x = (struct stack_state){.known = false};
    else if (!y->touched)
        *x = *y;
    else if (x->touched && llabs(y->drift) > llabs(x->drift))
        x->drift = y->drift;
}

void direct_known_meet(struct direct_known *k, const struct direct_known *other)
{
    if (k->step != other->step || !same_value(&k->s2, &other->s2)) {
        k->step = DIRECT_NOTHING;
        k->s2 = none;
    }
    if (k->s1_slot != other->s1_slot)
        k->s1_slot = 0;
    meet_stack(&k->stack, &other->stack);
    k->rcx_most = MAX(k->rcx_most, other->rcx_most);
    if (k->compared != other->compared)
        k->step = DIRECT_NOTHING;
    if (!other->s1_is_number || k->s1_number != other->s1_number)
        k->s1_is_number = false;
    if (k->s2_copy != other->s2_copy || k->s2_away != other->s2_away) {
        k->s2_copy = NO_VALUE;
        k->s2_away = false;
        forget_value(k, S2_VALUE);
    }
    for (unsigned n = 0; n < DIRECT_CHECKED; n++)
        if (!is_checked(other, &k->checked[n]))
            k->checked[n] = none;
}

bool direct_known_same(const struct direct_known *k, const struct direct_known *other)
{
    if (k->step != other->step || !same_value(&k->s2, &other->s2) || k->s1_slot != other->s1_slot ||
        !same_stack(&k->stack, &other->stack) || k->rcx_most != other->rcx_most ||
        k->compared != other->compared || k->s1_is_number != other->s1_is_number ||
        k->s1_number != other->s1_number || k->s2_copy != other->s2_copy ||
        k->s2_away != other->s2_away || k->next % DIRECT_CHECKED != other->next % DIRECT_CHECKED)
        return false;
    for (unsigned n = 0; n < DIRECT_CHECKED; n++)
        if (!same_value(&k->checked[n], &other->checked[n]))
            return false;
    return true;
}

/* --- Operands --- */

static u32 register_value(const struct direct_known *k, ZydisRegister reg)
{
    u32 number;

    if (reg == ZYDIS_REGISTER_NONE)
        return NO_VALUE;
    number = (u32)(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg) -
                   ZYDIS_REGISTER_RAX);
    return number == S1 && k->s1_slot ? SLOT_VALUE(k->s1_slot) : number;
}

static struct direct_value operand_value(const struct direct_known *k,
                                         const ZydisDecodedOperandMem *m)
{
    struct direct_value x = {.base = register_value(k, m->base),
                             .index = register_value(k, m->index)};

    x.scale = x.index == NO_VALUE ? 0 : m->scale;
    x.disp = m->disp.has_displacement ? m->disp.value : 0;
    if (is_none(&x)) {
        x.base = NUMBER_VALUE;
    } else if (x.base == S1 && x.index == NO_VALUE && k->s1_is_number) {
        x.base = NUMBER_VALUE;
        x.disp += k->s1_number;
    }
    return x;
}

/* How far an address may be from one that was looked up. */
static bool is_within_reach(const struct direct_value *c, s64 from)
{
    s64 chunk = c->base == NUMBER_VALUE ? (s64)BIT(DIRECT_SHIFT) - 1 : 0;

    return from >= -DIRECT_REACH && from <= chunk + DIRECT_REACH;
}

static bool is_near(const struct direct_known *k, const struct direct_value *x)
{
    for (unsigned n = 0; n < DIRECT_CHECKED; n++) {
        const struct direct_value *c = &k->checked[n];
        s64 from = x->disp - c->disp;

        if (!is_none(c) && c->base == x->base && c->index == x->index && c->scale == x->scale &&
            is_within_reach(c, from))
            return true;
    }
    return false;
}

static bool is_stack(const struct direct_value *x)
{
    return x->base == RSP && x->index == NO_VALUE;
}

bool direct_allows_stack(const struct direct_known *k, const ZydisDecodedOperandMem *m)
{
    struct direct_value x = operand_value(k, m);
    s64 from = x.disp + k->stack.drift;

    return is_stack(&x) && k->stack.known && from >= -DIRECT_REACH && from <= DIRECT_REACH;
}

bool direct_stack_is_settled(const struct direct_known *k)
{
    const struct stack_state *s = &k->stack;

    return s->known &&
           (s->touched ? s->drift >= -AUDIT_SLACK && s->drift <= AUDIT_SLACK : !s->drift);
}

bool direct_allows(const struct direct_known *k, const ZydisDecodedOperandMem *m)
{
    struct direct_value x = operand_value(k, m);

    return is_near(k, &x) || direct_allows_stack(k, m);
}

bool direct_allows_string(const struct direct_known *k, const ZydisDecodedInstruction *zi)
{
    u64 size;

    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_MOVSB:
    case ZYDIS_MNEMONIC_STOSB:
        size = 1;
        break;
    case ZYDIS_MNEMONIC_MOVSW:
    case ZYDIS_MNEMONIC_STOSW:
        size = 2;
        break;
    case ZYDIS_MNEMONIC_MOVSD:
    case ZYDIS_MNEMONIC_STOSD:
        size = 4;
        break;
    case ZYDIS_MNEMONIC_MOVSQ:
    case ZYDIS_MNEMONIC_STOSQ:
        size = 8;
        break;
    default:
        return false;
    }
    return !(zi->attributes & ZYDIS_ATTRIB_HAS_REP) || k->rcx_most <= (u64)DIRECT_REACH / size;
}

bool direct_allows_leave(const struct direct_known *k)
{
    return is_near(k, &(struct direct_value){RBP, NO_VALUE, 0, 0});
}

/* Whether it is the byte of a chunk that is known. */
static bool is_known_chunk(const ZydisDecodedOperandMem *m)
{
    s64 chunk = m->disp.value - (s64)GS_OFFSET(direct_map);

    return m->segment == ZYDIS_REGISTER_GS && m->base == ZYDIS_REGISTER_NONE &&
           m->index == ZYDIS_REGISTER_NONE && chunk >= 0 && chunk < (s64)DIRECT_CHUNKS;
}

bool direct_is_look(const struct direct_known *k, const ZydisDecodedInstruction *zi,
                    const ZydisDecodedOperandMem *m)
{
    if (zi->mnemonic == ZYDIS_MNEMONIC_CMP && is_known_chunk(m))
        return true;
    return k->step == DIRECT_CHUNK && zi->mnemonic == ZYDIS_MNEMONIC_CMP &&
           m->segment == ZYDIS_REGISTER_GS && m->base == ZYDIS_REGISTER_R15 &&
           m->index == ZYDIS_REGISTER_NONE && m->disp.value == (s64)GS_OFFSET(direct_map);
}

bool direct_is_stack_look(const struct direct_known *k, const ZydisDecodedInstruction *zi,
                          const ZydisDecodedOperandMem *m)
{
    return direct_is_look(k, zi, m) && !is_known_chunk(m) && is_stack(&k->s2) && !k->s2.disp;
}

/* --- Changes --- */

static bool is_reg64(const ZydisDecodedOperand *op, unsigned number)
{
    return op->type == ZYDIS_OPERAND_TYPE_REGISTER &&
           op->reg.value == (ZydisRegister)(ZYDIS_REGISTER_RAX + number);
}

static bool is_written(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops,
                       unsigned number)
{
    for (unsigned n = 0; n < zi->operand_count; n++)
        if (ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
            (ops[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) &&
            ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, ops[n].reg.value) ==
                (ZydisRegister)(ZYDIS_REGISTER_RAX + number))
            return true;
    return false;
}

/* What it adds to the register, if that is all it does to it. */
static bool adds(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops, unsigned number,
                 s64 *by)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
        *by = -8;
        return number == RSP;
    case ZYDIS_MNEMONIC_POP:
        *by = 8;
        return number == RSP && !is_reg64(&ops[0], RSP);
    case ZYDIS_MNEMONIC_LEA:
        *by = ops[1].mem.disp.has_displacement ? ops[1].mem.disp.value : 0;
        return is_reg64(&ops[0], number) && ops[1].mem.base == ops[0].reg.value &&
               ops[1].mem.index == ZYDIS_REGISTER_NONE && zi->address_width == 64;
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_SUB:
        *by = zi->mnemonic == ZYDIS_MNEMONIC_ADD ? ops[1].imm.value.s : -ops[1].imm.value.s;
        return is_reg64(&ops[0], number) && ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
    default:
        return false;
    }
}

/* What was `from` is `to` from now on. */
static void rename_value(struct direct_known *k, u32 from, u32 to)
{
    forget_value(k, to);
    for (unsigned n = 0; n < DIRECT_CHECKED; n++) {
        struct direct_value *c = &k->checked[n];

        c->base = c->base == from ? to : c->base;
        c->index = c->index == from ? to : c->index;
    }
}

static void add_checked(struct direct_known *k, const struct direct_value *x)
{
    k->checked[k->next++ % DIRECT_CHECKED] = *x;
}

/* `to` is the same as `from` now. */
static void copy_value(struct direct_known *k, u32 from, u32 to)
{
    const struct direct_known before = *k;

    for (unsigned n = 0; n < DIRECT_CHECKED; n++) {
        struct direct_value c = before.checked[n];

        if (c.base != from && c.index != from)
            continue;
        c.base = c.base == from ? to : c.base;
        c.index = c.index == from ? to : c.index;
        add_checked(k, &c);
    }
}

static bool is_move(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops, unsigned to,
                    unsigned from)
{
    return zi->mnemonic == ZYDIS_MNEMONIC_MOV && is_reg64(&ops[0], to) && is_reg64(&ops[1], from);
}

/* The register is `by` more than it was: what was an address is so much less, off it. */
static void shift_value(struct direct_known *k, u32 value, s64 by)
{
    for (unsigned n = 0; n < DIRECT_CHECKED; n++) {
        struct direct_value *c = &k->checked[n];

        if (c->index == value || (c->base == value && (by > DIRECT_REACH || by < -DIRECT_REACH)))
            *c = none;
        else if (c->base == value)
            c->disp -= by;
    }
}

static void change_registers(struct direct_known *k, const ZydisDecodedInstruction *zi,
                             const ZydisDecodedOperand *ops)
{
    for (unsigned reg = 0; reg < 16; reg++) {
        s64 by;

        if (!is_written(zi, ops, reg))
            continue;
        if (reg == k->s2_copy && is_move(zi, ops, reg, S2)) { /* there it is again */
            if (k->s2_away)
                rename_value(k, S2_VALUE, reg);
            k->s2_away = false;
        } else if (reg == k->s2_copy && !k->s2_away) {
            rename_value(k, reg, S2_VALUE);
            k->s2_away = true;
        } else if (adds(zi, ops, reg, &by))
            shift_value(k, reg, by);
        else
            forget_value(k, reg);
        if (reg == RCX)
            k->rcx_most = UINT64_MAX;
        if (reg == S1) {
            k->s1_slot = 0;
            k->s1_is_number = false;
            k->s1_number = 0;
        }
        if (reg == S2) {
            forget_value(k, S2_VALUE);
            k->s2_copy = NO_VALUE;
            k->s2_away = false;
        }
    }
    for (unsigned reg = 0; reg < S1; reg++)
        if (is_move(zi, ops, S2, reg))
            k->s2_copy = reg;
}

/* Something is stored in the vCPU: what was known by its place there isn't any more. */
static void change_slots(struct direct_known *k, const ZydisDecodedInstruction *zi,
                         const ZydisDecodedOperand *ops)
{
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperandMem *m = &ops[n].mem;
        u64 from;

        if (ops[n].type != ZYDIS_OPERAND_TYPE_MEMORY || m->segment != ZYDIS_REGISTER_GS ||
            !(ops[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE))
            continue;
        from = (u64)m->disp.value;
        for (u64 slot = from - 7; slot < from + ops[n].size / 8; slot++) {
            forget_value(k, SLOT_VALUE((u32)slot));
            if (k->s1_slot == slot)
                k->s1_slot = 0;
        }
    }
}

/* The steps of a look. Anything else between two of them ends it. */
static void take_steps(struct direct_known *k, const ZydisDecodedInstruction *zi,
                       const ZydisDecodedOperand *ops)
{
    u8 step = k->step;

    k->step = DIRECT_NOTHING;
    if (zi->mnemonic == ZYDIS_MNEMONIC_MOV && is_reg64(&ops[0], S2) &&
        ops[1].type == ZYDIS_OPERAND_TYPE_REGISTER && ops[1].size == 64) {
        k->s2 = (struct direct_value){register_value(k, ops[1].reg.value), NO_VALUE, 0, 0};
        k->step = DIRECT_ADDRESS;
    } else if (zi->mnemonic == ZYDIS_MNEMONIC_LEA && is_reg64(&ops[0], S2) &&
               zi->address_width == 64) {
        k->s2 = operand_value(k, &ops[1].mem);
        k->step = k->s2.base == NUMBER_VALUE ? DIRECT_NOTHING : DIRECT_ADDRESS;
    } else if (step == DIRECT_ADDRESS && k->s2.base != S2 && k->s2.index != S2 &&
               zi->mnemonic == ZYDIS_MNEMONIC_SHR && is_reg64(&ops[0], S2) &&
               ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE && ops[1].imm.value.u == DIRECT_SHIFT) {
        k->step = DIRECT_CHUNK;
    } else if (zi->mnemonic == ZYDIS_MNEMONIC_CMP && ops[0].type == ZYDIS_OPERAND_TYPE_MEMORY &&
               ops[0].size == 8 && ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE &&
               !ops[1].imm.value.u && (step == DIRECT_CHUNK || is_known_chunk(&ops[0].mem))) {
        k->step = DIRECT_COMPARED; /* direct_is_look saw where */
        if (is_known_chunk(&ops[0].mem))
            k->s2 = (struct direct_value){
                .base = NUMBER_VALUE,
                .index = NO_VALUE,
                .disp = (ops[0].mem.disp.value - (s64)GS_OFFSET(direct_map)) << DIRECT_SHIFT};
    } else if (step == DIRECT_COMPARED && zi->mnemonic == ZYDIS_MNEMONIC_JZ) {
        add_checked(k, &k->s2);
        if (is_stack(&k->s2) && !k->s2.disp)
            k->stack = (struct stack_state){.known = true, .touched = true};
    } else if (zi->mnemonic == ZYDIS_MNEMONIC_CMP && is_reg64(&ops[0], RCX) &&
               ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE && ops[1].imm.value.s >= 0) {
        k->step = DIRECT_COUNTED;
        k->compared = ops[1].imm.value.u;
    } else if (step == DIRECT_COUNTED && zi->mnemonic == ZYDIS_MNEMONIC_JNBE) {
        k->rcx_most = k->compared;
    }
}

/* Registers go to the vCPU and come back; a number to S1. */
static void take_copies(struct direct_known *k, const ZydisDecodedInstruction *zi,
                        const ZydisDecodedOperand *ops)
{
    if (zi->mnemonic != ZYDIS_MNEMONIC_MOV)
        return;
    if (ops[0].type == ZYDIS_OPERAND_TYPE_REGISTER && ops[0].size >= 32 &&
        is_written(zi, ops, S1) && ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        k->s1_is_number = true;
        k->s1_number = ops[0].size == 32 ? (s64)(u32)ops[1].imm.value.u : ops[1].imm.value.s;
    }
    for (unsigned reg = 0; reg <= S2; reg++) {
        if (is_reg64(&ops[1], reg) && is_gs(&ops[0]))
            copy_value(k, register_value(k, ops[1].reg.value),
                       SLOT_VALUE((u32)ops[0].mem.disp.value));
        if (!is_reg64(&ops[0], reg) || !is_gs(&ops[1]))
            continue;
        if (reg == S1)
            k->s1_slot = (u32)ops[1].mem.disp.value;
        else
            copy_value(k, SLOT_VALUE((u32)ops[1].mem.disp.value), reg);
    }
}

/* What an access off RSP, and a change of it, makes of it. */
static void move_stack(struct direct_known *k, const ZydisDecodedInstruction *zi,
                       const ZydisDecodedOperand *ops)
{
    s64 by;

    for (unsigned n = 0; n < zi->operand_count; n++) {
        struct direct_value x;

        if (ops[n].type != ZYDIS_OPERAND_TYPE_MEMORY || ops[n].mem.type != ZYDIS_MEMOP_TYPE_MEM ||
            ops[n].mem.segment == ZYDIS_REGISTER_GS)
            continue;
        x = operand_value(k, &ops[n].mem);
        if (is_stack(&x) && k->stack.known)
            k->stack = (struct stack_state){.known = true, .touched = true, .drift = -x.disp};
    }
    if (!is_written(zi, ops, RSP))
        return;
    if (zi->mnemonic == ZYDIS_MNEMONIC_LEAVE) /* off RBP, which audit.c asked for */
        k->stack = (struct stack_state){.known = true, .touched = true, .drift = 8};
    else if (adds(zi, ops, RSP, &by))
        k->stack.drift += by;
    else
        k->stack.known = false;
}

void direct_known_after(struct direct_known *k, const ZydisDecodedInstruction *zi,
                        const ZydisDecodedOperand *ops)
{
    move_stack(k, zi, ops);
    take_steps(k, zi, ops);
    change_registers(k, zi, ops);
    change_slots(k, zi, ops);
    take_copies(k, zi, ops);
}
