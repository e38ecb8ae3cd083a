/*
 * Emitting single instructions: operands, memory accesses, flags.
 *
 * Every access to guest memory is emitted by access(): the linear address in S1, its TLB entry's offset
 * in S2, then
 *      xor S1, tag       the offset in the page, if the tag matches
 *      cmp S1, 4096 - n  no match, or across the page's end: out, to the slow path
 *      ja
 *      add S1, host      the host address
 * and the instruction itself, whose memory operand is [S1 + n] with nothing else. A check for a group of
 * accesses covers all of them; if it is to serve for longer, its host address is moved to a borrowed register
 * u, and the operand is [u + n]. That is the invariant on which isolation rests: no other host address is
 * ever dereferenced, but through GS at constant offsets in struct soft_vcpu, and in direct code what emit_direct.c
 * tells of. audit.c checks it.
 */
#include "engine/soft/bt/translate.h"

#include "engine/soft/flags.h"

/* --- Registers --- */

bool in_memory(const struct translation *t, u8 reg)
{
    return reg != NO_REG && t->home[reg] == NO_REG;
}

/* op reg, the guest's register in memory, and back */
static void put_load_reg(struct translation *t, u8 to, u8 reg)
{
    if (in_memory(t, reg))
        put_load_gs(&t->p, to, GS_GPR(reg));
    else
        put_mov_rr(&t->p, to, t->home[reg]);
}
static void put_store_reg(struct translation *t, u8 reg, u8 from)
{
    if (in_memory(t, reg))
        put_store_gs(&t->p, GS_GPR(reg), from);
    else
        put_mov_rr(&t->p, t->home[reg], from);
}

void use_perm(struct translation *t, const u8 perm[BT_PERM])
{
    memcpy(t->perm, perm, BT_PERM);
    for (u8 reg = 0; reg < 16; reg++)
        t->home[reg] = reg < S1 ? reg : NO_REG;
    for (u8 n = 0; n < 2; n++) {
        t->memory_reg[n] = (u8)(S1 + n);
        if (perm[n] == NO_REG)
            continue;
        t->home[S1 + n] = perm[n];
        t->home[perm[n]] = NO_REG;
        t->memory_reg[n] = perm[n];
    }
}

void put_perm_in(struct translation *t)
{
    for (u8 n = 0; n < 2; n++)
        if (t->perm[n] != NO_REG) {
            put_store_gs(&t->p, GS_GPR(t->perm[n]), t->perm[n]);
            put_load_gs(&t->p, t->perm[n], GS_GPR(S1 + n));
        }
    for (u8 n = 2; n < BT_PERM; n++)
        if (t->perm[n] != NO_REG)
            put_store_gs(&t->p, GS_GPR(t->perm[n]), t->perm[n]);
}

void put_perm_out(struct translation *t)
{
    for (u8 n = 0; n < 2; n++)
        if (t->perm[n] != NO_REG) {
            put_store_gs(&t->p, GS_GPR(S1 + n), t->perm[n]);
            put_load_gs(&t->p, t->perm[n], GS_GPR(t->perm[n]));
        }
    for (u8 n = 2; n < BT_PERM; n++)
        if (t->perm[n] != NO_REG)
            put_load_gs(&t->p, t->perm[n], GS_GPR(t->perm[n]));
}

void put_keep_addresses(struct translation *t, bool again)
{
    for (u8 n = 0; n < BT_BORROWED; n++) {
        u32 slot = GS_OFFSET(bt_shared.kept_address) + 8u * n;

        if (t->perm[2 + n] == NO_REG)
            continue;
        if (again)
            put_load_gs(&t->p, t->perm[2 + n], slot);
        else
            put_store_gs(&t->p, slot, t->perm[2 + n]);
    }
}

const u8 no_perm[BT_PERM] = {NO_REG, NO_REG, NO_REG, NO_REG};

void leave_perm(struct translation *t)
{
    put_perm_out(t);
    use_perm(t, no_perm);
    for (unsigned n = 0; n < ARRAY_SIZE(t->groups); n++)
        t->groups[n].valid = false;
}

/* --- Flags --- */

/* The upper half of v->aflags becomes zero: no recipe is pending. */
void emit_flags_save(u8 **p)
{
    put_mov_rr(p, S2, RAX);
    put8(p, 0x9f); /* lahf */
    put8(p, 0x0f); /* seto al */
    put8(p, 0x90);
    put8(p, 0xc0);
    put8(p, 0x0f); /* movzx eax, ax */
    put8(p, 0xb7);
    put8(p, 0xc0);
    put_op_gs(p, false, 0x89, RAX, GS_OFFSET(aflags));
    put_mov_rr(p, RAX, S2);
}

void flags_settle(struct translation *t)
{
    u8 **p = &t->p;
    struct stub *s;

    if (!t->flags.memory || t->flags.settled || t->flags.host || t->flags.recipe.kind)
        return;
    put8(p, 0x66); /* of a word */
    put_op_gs_imm8(p, OP_GROUP, EXT_CMP, GS_OFFSET(aflags) + 2, 0);
    s = add_stub(t, STUB_SITE, put_jcc(p, CC_NE));
    s->reason = BT_FLAGS;
    s->number = add_site(t, &t->insns[t->at]);
    s->resume = *p;
    t->flags.settled = true;
    t->groups[0].valid = false;
    direct_forget(t);
}

void put_flags_load(struct translation *t)
{
    u8 **p = &t->p;

    put_mov_rr(p, S2, RAX);
    put_op_gs(p, false, OP_MOV, RAX, GS_OFFSET(aflags));
    put8(p, 0x04); /* add al, 0x7f: OF */
    put8(p, 0x7f);
    put8(p, 0x9e); /* sahf: the others */
    put_mov_rr(p, RAX, S2);
}

/* op S2, b of the recipe, in its size; op is the opcode with a register destination, above 8 bits */
static void recipe_op(struct translation *t, const struct bt_recipe *r, unsigned op, unsigned ext)
{
    u8 **p = &t->p;

    if (r->size == 2)
        put8(p, 0x66);
    if (r->b == NO_REG) {
        put_rex(p, r->size == 8, 0, 0, S2);
        put8(p, ext == 8 ? (r->size == 1 ? 0xf6 : 0xf7) : r->size == 1 ? 0x80 : 0x81);
        put_modrm(p, 3, ext == 8 ? 0 : ext, S2);
        if (r->size == 1)
            put8(p, (u8)r->imm);
        else if (r->size == 2) {
            put8(p, (u8)r->imm);
            put8(p, (u8)(r->imm >> 8));
        } else
            put32(p, (u32)r->imm);
    } else if (in_memory(t, r->b)) {
        put8(p, 0x65);
        put_rex(p, r->size == 8, S2, 0, 0);
        put8(p, r->size == 1 ? op - 1 : op);
        put_modrm(p, 0, S2, 4);
        put8(p, 0x25);
        put32(p, GS_GPR(r->b));
    } else {
        put_rex(p, r->size == 8, S2, 0, t->home[r->b]);
        put8(p, r->size == 1 ? op - 1 : op);
        put_modrm(p, 3, S2, t->home[r->b]);
    }
}

static void emit_recipe(struct translation *t, const struct bt_recipe *r)
{
    if (r->a == NO_REG)
        put_load_gs(&t->p, S2, GS_OFFSET(bt_shared.flag_source));
    else
        put_load_reg(t, S2, r->a);
    switch (r->kind) {
    case RECIPE_CMP:
        recipe_op(t, r, OP_CMP, EXT_CMP);
        break;
    case RECIPE_TEST:
        recipe_op(t, r, 0x85, 8);
        break;
    case RECIPE_ADD:
        recipe_op(t, r, OP_SUB, EXT_SUB);
        recipe_op(t, r, OP_ADD, EXT_ADD);
        break;
    case RECIPE_SUB:
        recipe_op(t, r, OP_ADD, EXT_ADD);
        recipe_op(t, r, OP_CMP, EXT_CMP);
        break;
    case RECIPE_NEG:
        put_unary(&t->p, r->size == 8, 3, S2);
        put_unary(&t->p, r->size == 8, 3, S2);
        break;
    case RECIPE_SHL:
        put_shift(&t->p, r->size == 8, 4, S2, (u8)r->imm);
        break;
    case RECIPE_SHR:
        put_shift(&t->p, r->size == 8, 5, S2, (u8)r->imm);
        break;
    case RECIPE_SAR:
        put_shift(&t->p, r->size == 8, 7, S2, (u8)r->imm);
        break;
    default: /* RECIPE_LOGIC */
        put_op_rr(&t->p, r->size == 8, 0x85, S2, S2);
        break;
    }
}

void flags_need(struct translation *t)
{
    if (t->flags.host)
        return;
    if (t->flags.recipe.kind)
        emit_recipe(t, &t->flags.recipe);
    else
        put_flags_load(t);
    t->flags.host = true;
}

void flags_to_memory(struct translation *t)
{
    if (t->flags.memory)
        return;
    flags_need(t);
    emit_flags_save(&t->p);
    t->flags.memory = t->flags.settled = true;
}

bool put_recipe(struct translation *t, const struct bt_recipe *r)
{
    u16 number = bt_recipe_number(t->bt, r);

    if (!number)
        return false;
    put_store_gs_imm32(&t->p, GS_OFFSET(aflags), (u32)number << 16);
    add_reloc(t, t->p, RELOC_RECIPE);
    return true;
}

void flags_put_away(struct translation *t)
{
    struct bt_recipe r = t->flags.recipe;

    if (t->flags.memory)
        return;
    if (r.kind && r.b == NO_REG) {
        u8 a = r.a;

        r.a = NO_REG;
        if (put_recipe(t, &r)) {
            if (a != NO_REG)
                put_store_gs(&t->p, GS_OFFSET(bt_shared.flag_source), read_reg(t, a, S2));
            t->flags.memory = true;
            t->flags.settled = false;
            return;
        }
    }
    flags_to_memory(t);
}

void flags_clobber(struct translation *t)
{
    if (!t->flags.memory && !t->flags.recipe.kind)
        flags_to_memory(t);
    t->flags.host = false;
}

static bool recipe_uses(const struct bt_recipe *r, u32 regs)
{
    return r->kind &&
           ((r->a != NO_REG && (regs & BIT32(r->a))) || (r->b != NO_REG && (regs & BIT32(r->b))));
}

/* The registers are about to change; the flags stay. */
void flags_before_write(struct translation *t, u32 regs)
{
    if (!recipe_uses(&t->flags.recipe, regs))
        return;
    if (!t->flags.memory)
        flags_need(t);
    t->flags.recipe.kind = RECIPE_NONE;
}

/*
 * Whether somebody may ask for the flags that instruction `at` makes after the host's are gone: a clobber
 * comes before the next instruction that makes all of them anew.
 */
static bool flags_outlive(const struct translation *t, unsigned at)
{
    for (unsigned n = at + 1; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        if (insn_clobbers_flags(i))
            return true;
        if (i->flags_out && !i->flags_in)
            return false;
    }
    return true;
}

/* Before i, which makes flags of a register that it overwrites: keeps what it was. */
static void keep_flag_source(struct translation *t, struct bt_recipe *r, u8 host_reg)
{
    if (r->kind < RECIPE_SHL || r->a != NO_REG)
        return;
    if (flags_outlive(t, t->at))
        put_store_gs(&t->p, GS_OFFSET(bt_shared.flag_source), host_reg);
    else
        r->kind = RECIPE_NONE;
}

/* Whether `reg` changes behind the instruction under way before somebody may ask for its flags. */
static bool changes_too_soon(const struct translation *t, u8 reg)
{
    bool changed = false;

    for (unsigned n = t->at + 1; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        if (changed && (insn_clobbers_flags(i) || i->flags_in))
            return true;
        if (i->flags_out && !i->flags_partial)
            return false;
        changed |= (insn_changed_regs(i) >> reg) & 1;
    }
    return changed;
}

/* A recipe whose first register will soon be another's: keeps what it is now, for one store. */
static void keep_recipe_reg(struct translation *t)
{
    struct bt_recipe *r = &t->flags.recipe;

    if (!r->kind || r->a == NO_REG || in_memory(t, r->a) || r->kind >= RECIPE_SHL ||
        !changes_too_soon(t, r->a))
        return;
    put_store_gs(&t->p, GS_OFFSET(bt_shared.flag_source), t->home[r->a]);
    r->a = NO_REG;
}

static void flags_made(struct translation *t, const struct bt_insn *i, struct bt_recipe recipe)
{
    if (!i->flags_out)
        return;
    t->flags = (struct flag_state){.host = true, .recipe = recipe};
    keep_recipe_reg(t);
}

/* --- Leaving --- */

struct stub *add_stub(struct translation *t, enum stub_kind kind, u8 *from)
{
    struct stub *s = &t->stubs[t->nstubs++];

    *s = (struct stub){.kind = (u8)kind, .from = from, .flags = t->flags, .stack = t->stack};
    memcpy(s->perm, t->perm, sizeof(s->perm));
    return s;
}

u32 add_site(struct translation *t, const struct bt_insn *i)
{
    struct bt_site *s = &t->bt->sites[t->bt->next.sites];

    *s = (struct bt_site){
        .offset = i->offset,
        .flags = t->flags.memory ? SITE_FLAGS_MEMORY : SITE_FLAGS_RECIPE,
        .recipe = t->flags.recipe,
        .x87 = t->x87,
    };
    return t->bt->next.sites++;
}

void add_point(struct translation *t, const struct bt_insn *i)
{
    add_point_at(t, i->offset);
}

void add_point_at(struct translation *t, s64 offset)
{
    t->bt->points[t->bt->next.points++] =
        (struct bt_point){.at = code_offset(t, t->p),
                          .offset = (u16)offset,
                          .flags = t->flags.memory ? SITE_FLAGS_MEMORY
                                   : t->flags.host ? SITE_FLAGS_HOST
                                                   : SITE_FLAGS_RECIPE,
                          .recipe = t->flags.recipe,
                          .x87 = t->x87};
}

/* --- Memory --- */

/* ModRM, SIB and displacement of [base + index * scale + disp]; either may be absent. */
static void put_address(u8 **p, unsigned reg, u8 base, u8 index, u8 scale, s32 disp)
{
    unsigned mod, b = base == NO_REG ? 0 : base, x = index == NO_REG ? 0 : index;

    if (index == NO_REG && base != NO_REG) {
        put_base_disp(p, reg, base, disp);
        return;
    }
    if (base == NO_REG) {
        put_modrm(p, 0, reg, 4);
        put8(p, (u32)scale << 6 | (index == NO_REG ? 4 : (x & 7)) << 3 | 5);
        put32(p, (u32)disp);
        return;
    }
    mod = disp == 0 && (base & 7) != RBP ? 0 : disp == (s8)disp ? 1 : 2;
    put_modrm(p, mod, reg, 4);
    put8(p, (u32)scale << 6 | (x & 7) << 3 | (b & 7));
    if (mod == 1)
        put8(p, (u8)disp);
    else if (mod == 2)
        put32(p, (u32)disp);
}

void put_lea_full(u8 **p, bool wide, unsigned reg, u8 base, u8 index, u8 scale, s32 disp)
{
    put_rex(p, wide, reg, index == NO_REG ? 0 : index, base == NO_REG ? 0 : base);
    put8(p, 0x8d);
    put_address(p, reg, base, index, scale, disp);
}

void put_operand(struct translation *t, unsigned reg, s32 disp)
{
    put_address(&t->p, reg, t->operand, t->operand_index, t->operand_scale, disp);
}

static void put_operand_rex(struct translation *t, bool wide, unsigned reg)
{
    put_rex(&t->p, wide, reg, t->operand_index == NO_REG ? 0 : t->operand_index,
            t->operand == NO_REG ? 0 : t->operand);
}

void put_page_address(struct translation *t, u8 reg, s64 offset, unsigned word)
{
    if (is_placed(t)) {
        put_mov_imm(&t->p, reg, t->block->page + (u64)offset);
        return;
    }
    put_load_gs(&t->p, reg, GS_OFFSET(bt_shared.ip_page));
    put_lea_word(&t->p, word, reg, reg, (s32)offset);
}

/* A register for reading: the host's own, or `scratch` loaded from memory. */
u8 read_reg(struct translation *t, u8 reg, u8 scratch)
{
    if (!in_memory(t, reg))
        return t->home[reg];
    put_load_gs(&t->p, scratch, GS_GPR(reg));
    return scratch;
}

void emit_address(struct translation *t, const struct bt_insn *i, u8 to, u8 base_reg, s32 disp)
{
    u8 base, index;

    if (i->rip_relative && base_reg == NO_REG) {
        put_page_address(t, to, (s64)i->offset + i->len + disp, 8);
        return;
    }
    base = base_reg == NO_REG ? NO_REG : read_reg(t, base_reg, S1);
    index = i->index == NO_REG ? NO_REG : read_reg(t, i->index, S2);
    if (!i->address32 && index == NO_REG && base != NO_REG && disp == 0) {
        if (base != to)
            put_mov_rr(&t->p, to, base);
    } else {
        put_lea_full(&t->p, !i->address32, to, base, index, i->scale, disp);
    }
}

bool adds_constant(const struct bt_insn *i, u8 base, s32 *by)
{
    switch (i->op) {
    case BT_PUSH:
        *by = -i->word;
        return base == RSP;
    case BT_POP:
        *by = i->word;
        return base == RSP && i->rm != RSP;
    case BT_LEA:
        *by = i->disp;
        return i->reg == base && i->base == base && i->index == NO_REG &&
               i->address32 == i->code32 && i->insn.osize == i->word;
    case BT_PLAIN:
        *by = i->recipe.kind == RECIPE_SUB ? -i->recipe.imm : i->recipe.imm;
        return (i->recipe.kind == RECIPE_ADD || i->recipe.kind == RECIPE_SUB) &&
               i->recipe.size == i->word && i->recipe.b == NO_REG && i->recipe.a == base &&
               i->recipe.imm > -4096 && i->recipe.imm < 4096;
    default:
        return false;
    }
}

u32 insn_changed_regs(const struct bt_insn *i)
{
    switch (i->op) {
    case BT_PUSH:
    case BT_PUSHF:
        return BIT32(RSP);
    case BT_POP:
        return BIT32(RSP) | BIT32(i->rm);
    case BT_LEAVE:
        return BIT32(RSP) | BIT32(RBP);
    default:
        return i->written;
    }
}

/* The access of an instruction, where groups know of it. */
static bool simple_access(const struct bt_insn *i, struct access *a)
{
    *a = (struct access){RSP, NO_REG, 0, 0, i->word, false};
    switch (i->op) {
    case BT_PUSH:
        a->disp = -i->word;
        a->write = true;
        return !i->mem;
    case BT_CALL:
        a->disp = -i->word;
        a->write = true;
        return true;
    case BT_POP:
    case BT_RET:
        return true;
    case BT_PLAIN:
        if (!i->mem || i->seg != NO_REG || i->address32 != i->code32)
            return false;
        if (i->rip_relative) {
            *a = (struct access){PAGE_BASE,   NO_REG,      0, i->offset + i->len + i->disp,
                                 i->mem_size, i->mem_write};
            return true;
        }
        if (i->base == NO_REG)
            return false;
        *a = (struct access){i->base, i->index, i->scale, i->disp, i->mem_size, i->mem_write};
        return true;
    default:
        return false;
    }
}

/* Whether emitting it leaves S1 alone, its memory access aside. */
static bool keeps_s1(const struct translation *t, const struct bt_insn *i)
{
    u32 both = BIT32(t->memory_reg[0]) | BIT32(t->memory_reg[1]);

    switch (i->op) {
    case BT_NOP:
    case BT_POP:
    case BT_JCC:
        return true;
    case BT_PUSH:
        return !i->mem;
    case BT_LEA:
        return !i->rip_relative && !(i->read & both);
    case BT_PLAIN:
        return i->mem ? true : ((i->read | i->written) & both) != both;
    default:
        return false;
    }
}

/*
 * Looks ahead for accesses that the check for the current one can serve too, and widens the group's
 * bounds. Its first write behind a conditional branch is not one of them. borrowed: its register survives
 * what changes S1, and accesses off as many other bases as there are borrowed registers. Returns how many
 * accesses it serves.
 */
static unsigned widen_group(struct translation *t, struct access_group *g, unsigned borrowed)
{
    struct access others[BT_BORROWED];
    unsigned nothers = 0, served = 1;
    s32 shift = 0;
    bool branched = false;

    for (unsigned n = t->at; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];
        u32 changed = insn_changed_regs(i);
        struct access a;
        s32 by;

        if (n > t->at) {
            bool simple = simple_access(i, &a);

            if (!borrowed && !keeps_s1(t, i) && i->op != BT_RET && i->op != BT_CALL)
                return served;
            if (simple && a.base == g->base && a.index == g->index &&
                (a.index == NO_REG || a.scale == g->scale)) {
                s64 at = (s64)a.disp + shift; /* displacements may be 4 GiB apart */
                s64 lo = MIN(g->lo, at), hi = MAX(g->hi, at + a.size);

                if (hi - lo > t->bt->choices.group_span || lo < INT32_MIN || (a.write && branched))
                    return served;
                g->lo = lo;
                g->hi = hi;
                g->write |= a.write;
                served++;
            } else if (simple && borrowed) {
                unsigned k = 0;

                while (k < nothers && (others[k].base != a.base || others[k].index != a.index))
                    k++;
                if (k == nothers) {
                    if (nothers == borrowed)
                        return served;
                    others[nothers++] = a;
                }
            } else if (!borrowed && (simple || (i->op == BT_PLAIN && i->mem))) {
                return served;
            }
        }
        if (i->op == BT_JCC)
            branched = true;
        else if (i->op == BT_RET || i->op == BT_CALL)
            return served;
        if (g->index != NO_REG && (changed & BIT32(g->index)))
            return served;
        if (changed & BIT32(g->base)) {
            if (!adds_constant(i, g->base, &by) || by < -4096 || by > 4096)
                return served;
            shift += by;
        }
    }
    return served;
}

/* An instruction was emitted: which groups still serve? */
static void group_after(struct translation *t, const struct bt_insn *i)
{
    u32 changed = insn_changed_regs(i);
    s32 by;

    if (has_direct_stack(t))
        direct_after(t, i);
    if (is_direct(t))
        return;
    if (!keeps_s1(t, i))
        t->groups[0].valid = false;
    for (unsigned n = 0; n < ARRAY_SIZE(t->groups); n++) {
        struct access_group *g = &t->groups[n];

        if (!g->valid)
            continue;
        if (g->index != NO_REG && (changed & BIT32(g->index))) {
            g->valid = false;
        } else if (changed & BIT32(g->base)) {
            if (adds_constant(i, g->base, &by))
                g->shift += by;
            else
                g->valid = false;
        }
    }
}

/* S1 = linear address: checks an access of n bytes, and makes it the host address. */
static void put_check(struct translation *t, const struct bt_insn *i, const u8 *start, unsigned n,
                      bool write, bool grouped)
{
    u8 **p = &t->p;
    enum tlb_kind kind = t->v->bt_mode & BT_MODE_USER ? TLB_USER
                         : t->v->bt_mode & BT_MODE_AC ? TLB_KERNEL_AC
                                                      : TLB_KERNEL;
    u32 entries = (u32)(offsetof(struct soft_vcpu, tlbs) + kind * sizeof(struct tlb) +
                        offsetof(struct tlb, entries));
    u32 tag = entries + (u32)(write ? offsetof(struct tlb_entry, write_tag)
                                    : offsetof(struct tlb_entry, read_tag));
    struct stub *s;
    u32 site;

    _Static_assert(sizeof(struct tlb_entry) == 32, "the index is the page number times 32");
    put_rorx(p, S2, S1, GUEST_PAGE_SHIFT - 5);
    put_op_ri(p, false, EXT_AND, S2, (TLB_SIZE - 1) << 5);
    put_op_gs_base(p, OP_XOR, S1, S2, tag);
    put_op_ri(p, true, EXT_CMP, S1, (s32)(GUEST_PAGE_SIZE - n));
    site = add_site(t, i);
    t->bt->sites[site].size = (u16)n;
    t->bt->sites[site].write = write;
    t->bt->sites[site].grouped = grouped;
    s = add_stub(t, STUB_SLOW, put_jcc(p, CC_A));
    s->number = site;
    s->target = (s32)tag;
    s->resume = start;
    put_op_gs_base(p, OP_ADD, S1, S2, entries + (u32)offsetof(struct tlb_entry, host));
}

/* A group that serves the access, or NULL. */
static struct access_group *serving_group(struct translation *t, const struct access *a)
{
    for (unsigned n = 0; n < ARRAY_SIZE(t->groups); n++) {
        struct access_group *g = &t->groups[n];
        s64 at = (s64)a->disp + g->shift;

        if (g->valid && a->base == g->base && a->index == g->index &&
            (a->index == NO_REG || a->scale == g->scale) && (!a->write || g->write) &&
            at >= g->lo && at + a->size <= g->hi)
            return g;
    }
    return NULL;
}

/* The borrowed register's group that was used least lately. */
static unsigned oldest_group(const struct translation *t, unsigned borrowed)
{
    unsigned oldest = 1;

    for (unsigned n = 1; n <= borrowed; n++)
        if (!t->groups[n].valid ||
            (t->groups[oldest].valid && t->groups[n].used < t->groups[oldest].used))
            oldest = n;
    return oldest;
}

static u8 group_reg(const struct translation *t, unsigned n)
{
    return n ? t->perm[1 + n] : S1;
}

/*
 * Emits what an access of `size` bytes at base + disp (and i's index, segment) needs. Returns n: the
 * operand is [t->operand + n]. S2 is free afterwards.
 */
static s32 access(struct translation *t, const struct bt_insn *i, u8 base, s32 disp, unsigned size,
                  bool write)
{
    unsigned borrowed = (t->perm[2] != NO_REG) + (t->perm[3] != NO_REG), slot = 0;
    struct access_group *g, wide;
    struct access a;
    const u8 *start;
    bool simple = simple_access(i, &a);

    if (is_direct(t))
        return direct_access(t, i, base, disp);
    t->operand_index = NO_REG;
    if (simple) {
        base = a.base;
        disp = a.disp;
        g = serving_group(t, &a);
        if (g) {
            g->used = t->at;
            t->operand = group_reg(t, (unsigned)(g - t->groups));
            return (s32)(disp + g->shift - g->lo);
        }
    }
    flags_clobber(t);
    start = t->p;
    wide = (struct access_group){.base = base,
                                 .index = NO_REG,
                                 .lo = disp,
                                 .hi = (s64)disp + size,
                                 .write = write,
                                 .used = t->at};
    if (simple && !(t->block->mode & BT_MODE_NARROW)) {
        wide.index = a.index;
        wide.scale = a.scale;
        wide.valid = true;
        if (widen_group(t, &wide, borrowed) > 1 && borrowed)
            slot = oldest_group(t, borrowed);
    }
    if (i->op != BT_PLAIN) {
        put_lea_word(&t->p, i->word, S1, base, (s32)wide.lo); /* the stack */
    } else if (base == PAGE_BASE) {
        put_page_address(t, S1, wide.lo, 8);
    } else {
        emit_address(t, i, S1, base, (s32)wide.lo);
        if (i->seg != NO_REG)
            put_op_gs(&t->p, !i->code32, OP_ADD, S1, GS_OFFSET(seg_base) + 8u * (u32)i->seg);
    }
    put_check(t, i, start, (unsigned)(wide.hi - wide.lo), wide.write, wide.hi - wide.lo > size);
    t->groups[0].valid = false;
    t->groups[slot] = wide;
    t->operand = group_reg(t, slot);
    if (slot)
        put_mov_rr(&t->p, t->operand, S1);
    return (s32)(disp - wide.lo);
}

/* The access of i's explicit memory operand. */
static s32 access_operand(struct translation *t, const struct bt_insn *i)
{
    return access(t, i, i->base, i->disp, i->mem_size, i->mem_write);
}

bool insn_clobbers_flags(const struct bt_insn *i)
{
    switch (i->op) {
    case BT_PLAIN:
        return i->mem || i->faults;
    case BT_NOP:
    case BT_LEA:
    case BT_JCC:
    case BT_SWAPGS:
        return false;
    default:
        return true;
    }
}

/* --- Plain instructions --- */

/* Writes i with its operands substituted: reg, rm and vvvv, or what access() left and disp for a memory operand. */
static void put_plain(struct translation *t, const struct bt_insn *i, u8 reg, u8 rm, u8 vvvv,
                      s32 disp)
{
    u8 **p = &t->p;
    u8 b = !i->mem ? rm : t->operand == NO_REG ? 0 : t->operand;
    u8 x = !i->mem || t->operand_index == NO_REG ? 0 : t->operand_index;

    if (i->encoding == ENC_LEGACY) {
        unsigned rex = (i->rex & 8u) | (x >> 3) << 1;

        if (i->has_modrm)
            rex |= (reg >> 3) << 2;
        if (i->has_modrm || i->opcode_reg)
            rex |= b >> 3;

        for (unsigned n = 0; n < i->nprefixes; n++)
            put8(p, i->prefixes[n]);
        if (rex || i->rex)
            put8(p, 0x40 | rex);
        if (i->map)
            put8(p, 0x0f);
        if (i->map >= 2)
            put8(p, i->map == 2 ? 0x38 : 0x3a);
        put8(p, i->opcode_reg ? (i->opcode & ~7u) | (rm & 7u) : i->opcode);
    } else {
        put8(p, 0xc4);
        put8(p, (reg < 8 ? 0x80u : 0) | (x < 8 ? 0x40u : 0) | (b < 8 ? 0x20u : 0) | i->map);
        put8(p, i->vex_w_l_pp | (~(unsigned)vvvv & 15) << 3);
        put8(p, i->opcode);
    }
    if (i->has_modrm) {
        if (i->mem)
            put_operand(t, reg, disp);
        else
            put_modrm(p, 3, reg, rm);
    }
    for (unsigned n = 0; n < i->imm_len; n++)
        put8(p, i->bytes[i->imm_at + n]);
}

/* Where the guest's registers in memory are for the length of one instruction. */
struct borrowed {
    u8 host[2]; /* by t->memory_reg */
    u8 action[2];
};

static void note_operand(const struct translation *t, struct borrowed *m, bool gpr, u8 reg,
                         u8 action)
{
    for (unsigned n = 0; n < 2; n++)
        if (gpr && reg == t->memory_reg[n])
            m->action[n] |= action;
}

/* The host register for an operand of the encoding. */
static u8 mapped(const struct translation *t, const struct borrowed *m, bool gpr, u8 reg)
{
    if (!gpr)
        return reg;
    for (unsigned n = 0; n < 2; n++)
        if (reg == t->memory_reg[n])
            return m->host[n];
    return t->home[reg];
}

/* Direct code: the next host instruction is the access. */
static void add_access_point(struct translation *t, const struct bt_insn *i)
{
    if (is_direct(t))
        add_point(t, i);
}

/*
 * CMP and TEST of memory: their operand goes through S2, so that it can be kept, if somebody may ask for
 * the flags. False: not such an instruction.
 */
static bool emit_compare_memory(struct translation *t, const struct bt_insn *i, s32 disp)
{
    struct bt_insn on_register = *i;
    u8 **p = &t->p;

    if (i->recipe.kind != RECIPE_CMP && i->recipe.kind != RECIPE_TEST)
        return false;
    if (i->recipe.a != NO_REG || !i->mem || i->encoding != ENC_LEGACY || i->map ||
        (i->reg_gpr && in_memory(t, i->reg)) || !flags_outlive(t, t->at))
        return false;
    add_access_point(t, i);
    put_operand_rex(t, i->mem_size == 8, S2);
    if (i->mem_size < 4) { /* movzx S2d, [operand] */
        put8(p, 0x0f);
        put8(p, i->mem_size == 1 ? 0xb6 : 0xb7);
    } else {
        put8(p, 0x8b);
    }
    put_operand(t, S2, disp);
    put_store_gs(p, GS_OFFSET(bt_shared.flag_source), S2);
    on_register.mem = false;
    on_register.rm_gpr = true;
    put_plain(t, &on_register, i->reg_gpr ? t->home[i->reg] : i->reg, S2, 0, 0);
    flags_made(t, i, i->recipe);
    return true;
}

/*
 * AH, BH, CH or DH beside a memory operand, whose registers need a REX prefix, with which there is no AH: S2's low
 * byte stands for it. The host's flags stay.
 */
static void emit_high_byte(struct translation *t, const struct bt_insn *i, s32 disp)
{
    u8 whole = i->reg - 4; /* RAX to RBX */
    u8 **p = &t->p;

    if (i->reg_action & ACTION_READ)
        put_rorx(p, S2, whole, 8);
    add_access_point(t, i);
    put_plain(t, i, S2, 0, 0, disp);
    if (i->reg_action & ACTION_WRITE) {
        put_rorx(p, whole, whole, 8);
        put_rex(p, false, S2, 0, whole); /* mov al, S2b */
        put8(p, 0x88);
        put_modrm(p, 3, S2, whole);
        put_rorx(p, whole, whole, 56);
    }
}

static void emit_plain(struct translation *t, const struct bt_insn *i)
{
    struct borrowed m = {{S2, S2}, {0, 0}};
    struct bt_recipe recipe = i->recipe;
    s32 disp = 0;

    if (i->x87 && !t->x87_live)
        x87_make_live(t, i);
    if (i->mem)
        disp = access_operand(t, i);
    if (emit_compare_memory(t, i, disp))
        return;
    if (i->flags_in)
        flags_need(t);
    if (i->flags_in || !i->flags_out)
        flags_before_write(t, i->written);
    if (i->mem && i->high_reg) {
        emit_high_byte(t, i, disp);
        flags_made(t, i, i->recipe);
        return;
    }
    note_operand(t, &m, i->reg_gpr, i->reg, i->reg_action);
    note_operand(t, &m, i->rm_gpr, i->rm, i->rm_action);
    note_operand(t, &m, i->vvvv_gpr, i->vvvv, i->vvvv_action);
    /* Both: S1 serves too. With a memory operand there it is, until it is overwritten at the end, which
     * is what BMI instructions do to their first operand. */
    if (m.action[0] && m.action[1]) {
        m.host[i->mem && i->vvvv_gpr && i->vvvv == t->memory_reg[0] ? 1 : 0] = S1;
        t->groups[0].valid = false;
    }
    for (unsigned n = 0; n < 2; n++)
        if (m.action[n] & (ACTION_READ | ACTION_PARTIAL))
            put_load_gs(&t->p, m.host[n], GS_GPR(t->memory_reg[n]));
    if (i->mem) /* its operand isn't kept */
        recipe.kind = RECIPE_NONE;
    if (recipe.kind >= RECIPE_SHL)
        keep_flag_source(t, &recipe, mapped(t, &m, i->rm_gpr, i->rm));
    if (i->faults || (i->mem && is_direct(t)))
        add_point(t, i);
    put_plain(t, i, mapped(t, &m, i->reg_gpr, i->reg), mapped(t, &m, i->rm_gpr, i->rm),
              mapped(t, &m, i->vvvv_gpr, i->vvvv), disp);
    for (unsigned n = 0; n < 2; n++)
        if (m.action[n] & ACTION_WRITE)
            put_store_gs(&t->p, GS_GPR(t->memory_reg[n]), m.host[n]);
    x87_note(t, i);
    flags_made(t, i, recipe);
}

static void emit_lea(struct translation *t, const struct bt_insn *i)
{
    bool wide = i->rex & 8, narrow = i->insn.osize == 2;
    u8 base, index, to = in_memory(t, i->reg) ? S2 : t->home[i->reg];

    flags_before_write(t, i->written);
    if (narrow) {
        emit_address(t, i, S1, i->base, i->disp);
        put_load_reg(t, S2, i->reg);
        put8(&t->p, 0x66); /* mov S2w, S1w */
        put_op_rr(&t->p, false, OP_MOV, S2, S1);
        t->groups[0].valid = false;
        put_store_reg(t, i->reg, S2);
        return;
    }
    if (i->rip_relative) {
        put_page_address(t, to, (s64)i->offset + i->len + i->disp, 8);
        if (!wide)
            put_op_rr(&t->p, false, OP_MOV, to, to);
    } else {
        base = i->base == NO_REG ? NO_REG : read_reg(t, i->base, S1);
        index = i->index == NO_REG ? NO_REG : read_reg(t, i->index, S2);
        put_lea_full(&t->p, wide && !i->address32, to, base, index, i->scale, i->disp);
    }
    if (in_memory(t, i->reg))
        put_store_reg(t, i->reg, to);
}

/* --- The stack --- */

static void emit_push(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p;
    s32 disp;

    if (is_direct(t) || (has_direct_stack(t) && !i->mem)) {
        direct_push(t, i);
        return;
    }
    flags_before_write(t, BIT32(RSP));
    if (i->mem) {
        struct bt_insn load = *i;

        /* Two accesses: the value waits in memory for the second. */
        load.op = BT_PLAIN;
        load.mem_size = i->word;
        load.mem_write = false;
        t->groups[0].valid = false;
        disp = access(t, &load, i->base, i->disp, i->word, false);
        put_load_word(p, i->word, S2, t->operand, disp);
        put_store_gs(p, GS_OFFSET(bt_shared.temp), S2);
        t->groups[0].valid = false;
        disp = access(t, i, RSP, -i->word, i->word, true);
        put_load_gs(p, S2, GS_OFFSET(bt_shared.temp));
        put_store_word(p, i->word, t->operand, disp, S2);
        t->groups[0].valid = false;
    } else {
        disp = access(t, i, RSP, -i->word, i->word, true);
        if (i->rm == NO_REG) {
            put_rex(p, i->word == 8, 0, 0, t->operand);
            put8(p, 0xc7);
            put_base_disp(p, 0, t->operand, disp);
            put32(p, (u32)i->imm);
        } else {
            put_store_word(p, i->word, t->operand, disp, read_reg(t, i->rm, S2));
        }
    }
    put_lea_word(p, i->word, RSP, RSP, -i->word);
}

static void emit_pop(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p, to = in_memory(t, i->rm) ? S2 : t->home[i->rm];
    s32 disp;

    if (has_direct_stack(t)) {
        direct_pop(t, i);
        return;
    }
    disp = access(t, i, RSP, 0, i->word, false);
    flags_before_write(t, BIT32(RSP) | BIT32(i->rm));
    if (i->rm != RSP)
        put_lea_word(p, i->word, RSP, RSP, i->word);
    put_load_word(p, i->word, to, t->operand, disp);
    if (in_memory(t, i->rm))
        put_store_reg(t, i->rm, to);
}

static void emit_leave(struct translation *t, const struct bt_insn *i)
{
    s32 disp;

    if (is_direct(t)) {
        direct_leave(t, i);
        return;
    }
    disp = access(t, i, RBP, 0, i->word, false);
    flags_before_write(t, BIT32(RSP) | BIT32(RBP));
    put_lea_word(&t->p, i->word, RSP, RBP, i->word);
    put_load_word(&t->p, i->word, RBP, t->operand, disp);
}

void emit_push_return(struct translation *t, const struct bt_insn *i)
{
    s32 disp;

    if (has_direct_stack(t)) {
        direct_push_return(t, i);
        return;
    }
    disp = access(t, i, RSP, -i->word, i->word, true);
    flags_before_write(t, BIT32(RSP));
    put_page_address(t, S2, i->offset + i->len, i->word);
    put_store_word(&t->p, i->word, t->operand, disp, S2);
    put_lea_word(&t->p, i->word, RSP, RSP, -i->word);
    t->groups[0].valid = false;
}

void emit_pop_return(struct translation *t, const struct bt_insn *i)
{
    s32 disp;

    if (has_direct_stack(t)) {
        direct_pop_return(t, i);
        return;
    }
    disp = access(t, i, RSP, 0, i->word, false);
    flags_before_write(t, BIT32(RSP));
    flags_put_away(t);
    put_load_word(&t->p, i->word, S1, t->operand, disp);
    put_lea_word(&t->p, i->word, RSP, RSP, i->word + (s32)i->imm);
    t->groups[0].valid = false;
}

void emit_branch_target(struct translation *t, const struct bt_insn *i)
{
    if (i->mem) {
        struct bt_insn load = *i;
        s32 disp;

        load.op = BT_PLAIN;
        load.mem_size = i->word;
        load.mem_write = false;
        disp = access(t, &load, i->base, i->disp, i->word, false);
        flags_to_memory(t);
        add_access_point(t, i);
        put_operand_rex(t, i->word == 8, S1);
        put8(&t->p, OP_MOV);
        put_operand(t, S1, disp);
    } else {
        flags_to_memory(t);
        put_load_reg(t, S1, i->rm);
        if (i->word == 4)
            put_op_rr(&t->p, false, OP_MOV, S1, S1);
    }
    t->groups[0].valid = false;
}

/* PUSHFQ: the parts of RFLAGS come from v->cpu.rflags and v->aflags (flags.h). */
static void emit_pushf(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p;
    s32 disp;

    flags_to_memory(t);
    disp = access(t, i, RSP, -i->word, i->word, true);
    put8(p, 0x65); /* movzx S2d, byte gs:[aflags + 1] */
    put_rex(p, false, S2, 0, 0);
    put8(p, 0x0f);
    put8(p, 0xb6);
    put_modrm(p, 0, S2, 4);
    put8(p, 0x25);
    put32(p, GS_OFFSET(aflags) + 1);
    put_op_ri(p, false, EXT_AND, S2, 0xd5);
    put_op_gs(p, true, 0x0b, S2, GS_OFFSET(cpu.rflags));
    put_op_ri(p, true, EXT_OR, S2, EFLAGS_FIXED);
    add_access_point(t, i);
    put_store_word(p, i->word, t->operand, disp, S2);
    put_op_gs(p, false, OP_MOV, S2, GS_OFFSET(aflags));
    put_op_ri(p, false, EXT_AND, S2, 1);
    put_rex(p, false, 0, 0, S2); /* shl S2d, 11 */
    put8(p, 0xc1);
    put_modrm(p, 3, 4, S2);
    put8(p, 11);
    add_access_point(t, i);
    put_rex(p, true, S2, 0, t->operand); /* or [operand + disp], S2 */
    put8(p, 0x09);
    put_base_disp(p, S2, t->operand, disp);
    put_lea(p, RSP, RSP, -8);
    t->flags.host = false;
    t->groups[0].valid = false;
}

/* --- Flags that aren't arithmetic --- */

/* and/or dword gs:[rflags], imm */
static void put_rflags_op(struct translation *t, unsigned ext, u32 imm)
{
    flags_clobber(t);
    put8(&t->p, 0x65);
    put8(&t->p, 0x81);
    put_modrm(&t->p, 0, ext, 4);
    put8(&t->p, 0x25);
    put32(&t->p, GS_OFFSET(cpu.rflags));
    put32(&t->p, imm);
}

/*
 * Whether an interrupt between STI and what follows may be one too early: HLT and MWAIT, which are the interpreter's,
 * would then wait for another.
 */
static bool shadow_matters(const struct translation *t)
{
    return t->at + 1 >= t->count || t->insns[t->at + 1].op == BT_INTERP;
}

/*
 * STI at CPL 0. When IF was clear and an interrupt waits for it, or the next instruction may wait for one, the interpreter
 * executes it and takes the interrupt behind the next instruction. Else the shadow makes no difference: an interrupt that
 * comes now may as well have come an instruction later.
 */
static void emit_sti(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p, *set;
    struct stub *s;

    flags_to_memory(t);
    t->flags.host = false;
    put_op_gs_imm8(p, OP_TEST_BYTE, 0, GS_OFFSET(cpu.rflags) + 1, EFLAGS_IF >> 8);
    put8(p, 0x75); /* jne: it is set */
    put8(p, 0);
    set = *p;
    if (shadow_matters(t)) {
        s = add_stub(t, STUB_SITE, put_jmp(p));
    } else {
        put_op_gs_imm8(p, OP_GROUP_BYTE, EXT_CMP, GS_OFFSET(irq_waiting), 0);
        s = add_stub(t, STUB_SITE, put_jcc(p, CC_NE));
        put_rflags_op(t, EXT_OR, EFLAGS_IF);
    }
    s->reason = BT_STOP;
    s->number = add_site(t, i);
    set[-1] = (u8)(*p - set);
}

/* SWAPGS at CPL 0 in 64-bit mode. */
static void emit_swapgs(struct translation *t)
{
    put_load_gs(&t->p, S1, GS_OFFSET(cpu.msr.kernel_gs_base));
    put_load_gs(&t->p, S2, GS_OFFSET(cpu.seg[SEG_GS].base));
    put_store_gs(&t->p, GS_OFFSET(cpu.msr.kernel_gs_base), S2);
    put_store_gs(&t->p, GS_OFFSET(cpu.seg[SEG_GS].base), S1);
    put_store_gs(&t->p, GS_OFFSET(seg_base[SEG_GS]), S1);
}

/* --- Bit strings --- */

/* BT, BTS, BTR, BTC of memory by a register: the offset's upper part moves the address. */
static void emit_bit_string(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p;
    bool wide = i->rex & 8;
    const u8 *start;

    flags_clobber(t);
    t->groups[0].valid = false;
    direct_forget(t);
    start = *p;
    emit_address(t, i, S1, i->base, i->disp);
    if (i->seg != NO_REG)
        put_op_gs(p, !i->code32, OP_ADD, S1, GS_OFFSET(seg_base) + 8u * (u32)i->seg);
    put_load_reg(t, S2, i->reg);
    if (!wide) { /* movsxd S2, S2d */
        put_rex(p, true, S2, 0, S2);
        put8(p, 0x63);
        put_modrm(p, 3, S2, S2);
    }
    put_rex(p, true, 0, 0, S2); /* sar S2, 3 */
    put8(p, 0xc1);
    put_modrm(p, 3, 7, S2);
    put8(p, 3);
    put_op_ri(p, true, EXT_AND, S2, wide ? -8 : -4);
    put_op_rr(p, !i->code32, OP_ADD, S1, S2);
    put_check(t, i, start, i->mem_size, i->mem_write, false);
    /* Within the operand now. S2 is needed for the flags, so the offset waits in memory. */
    put_load_reg(t, S2, i->reg);
    put_op_ri(p, false, EXT_AND, S2, wide ? 63 : 31);
    put_store_gs(p, GS_OFFSET(bt_shared.temp), S2);
    flags_need(t);
    put_load_gs(p, S2, GS_OFFSET(bt_shared.temp));
    t->operand = S1;
    t->operand_index = NO_REG;
    put_plain(t, i, S2, 0, 0, 0);
    flags_made(t, i, i->recipe);
}

/* --- Strings --- */

static void emit_string(struct translation *t, const struct bt_insn *i)
{
    struct stub *s;

    if (is_direct(t) && direct_string(t, i))
        return;
    if (string_compares(&i->string)) /* C makes them anew there, if RCX isn't 0 */
        flags_to_memory(t);
    flags_before_write(t, i->written);
    flags_clobber(t);
    direct_forget(t);
    s = add_stub(t, STUB_SITE, put_jmp(&t->p));
    s->reason = BT_STRING;
    s->number = add_site(t, i);
    s->resume = t->p;
    t->bt->sites[s->number].string = i->string;
    if (string_compares(&i->string))
        t->flags = (struct flag_state){.memory = true, .settled = true};
}

/* --- All of them --- */

void emit_insn(struct translation *t, const struct bt_insn *i)
{
    x87_before_write(t, insn_changed_regs(i));
    if (i->flags_in || i->op == BT_PUSHF || i->op == BT_BIT_STRING)
        flags_settle(t);
    switch (i->op) {
    case BT_PLAIN:
        emit_plain(t, i);
        break;
    case BT_LEA:
        emit_lea(t, i);
        break;
    case BT_PUSH:
        emit_push(t, i);
        break;
    case BT_POP:
        emit_pop(t, i);
        break;
    case BT_LEAVE:
        emit_leave(t, i);
        break;
    case BT_STRING_INSN:
        emit_string(t, i);
        break;
    case BT_BIT_STRING:
        emit_bit_string(t, i);
        break;
    case BT_PUSHF:
        emit_pushf(t, i);
        break;
    case BT_CLI:
        put_rflags_op(t, EXT_AND, ~(u32)EFLAGS_IF);
        break;
    case BT_STI:
        emit_sti(t, i);
        break;
    case BT_CLD:
        put_rflags_op(t, EXT_AND, ~(u32)EFLAGS_DF);
        break;
    case BT_STD:
        put_rflags_op(t, EXT_OR, EFLAGS_DF);
        break;
    case BT_SWAPGS:
        emit_swapgs(t);
        break;
    default: /* BT_NOP */
        break;
    }
    group_after(t, i);
}
