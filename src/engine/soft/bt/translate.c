/*
 * Translation of a block, from x86-64 to x86-64.
 *
 * 32-bit code is translated where its segments are flat: then an effective address, cut to 32 bits, is
 * the linear address, and all registers are as in 64-bit code. What differs stands in struct bt_insn
 * (code32, word); instructions that 64-bit mode has not, or has otherwise, are re-encoded or left to the
 * interpreter (insn.c).
 *
 * Registers. Each guest register but two lives in the host register of the same number, RSP included;
 * so do all vector registers and MXCSR. R14 and R15, which compilers take last, live in memory
 * (v->cpu.gpr) and their host registers are the emitter's scratch, S1 and S2. A block that uses them
 * more than others may have two others in memory instead, while it runs and goes on to blocks that have
 * the same ones there (choose_perm). GS holds the vCPU. No C
 * code and no signal handler runs on the guest's RSP: C is entered through glue.c, which goes back to
 * the stack that bt_enter left, and signals have a stack of their own.
 *
 * Memory. See emit.c: a TLB lookup in front of each access, or of a group of accesses off one base. In direct
 * code (emit_direct.c) a look into a map of the guest's addresses, which are used as they are then.
 *
 * Flags. The guest's arithmetic flags are the host's. A lookup destroys them, so the translator
 * knows at each point where they are (struct flag_state): in the host's register, in v->aflags, or
 * nowhere but in a recipe that makes them again from registers. Liveness is not asked: the flags that a
 * fault shows must be right even where no instruction reads them. So a block has two entries: for
 * flags in the host's register, and in memory.
 *
 * RIP. Code is shared by all mappings of its page, so it knows its offset in the page and
 * v->bt_shared.ip_page. gpr[RIP] is exact only when the code is left. Direct code and kernel code are made for one
 * address, which they know (placed, cache.h); they have ip_page right when they are left, other code always.
 *
 * Ways out of a block
 *  - a direct branch within the page: a jump that is patched to the target's code, once there is any. No
 *    check is needed: who runs in a page has its translation. In direct code and kernel code, branches to other pages
 *    likewise, for as long as direct.c, or kernel_links.c, knows what is mapped there.
 *  - any other branch: the jump cache is asked for the linear address (put_jump).
 *  - the slow path of an access, and instructions that are not translated: back to C, which goes on
 *    by the interpreter at exactly that instruction.
 *
 * Interrupts. No code looks for them. Whoever wants the vCPU's attention sends its thread a signal, and
 * the handler undoes the links out of the block that runs (kick.c).
 */
#include "engine/soft/bt/translate.h"

#include "engine/soft/bt/audit.h"

#include "engine/perf_map.h"
#include "engine/soft/code_pages.h"
#include "engine/soft/mmu.h"
#include "host/log.h"

#include <stdio.h>
#include <stdlib.h>

/* --- The ways out --- */

/* S2 = bt_jump_slot(S1), shifted by JUMP_ALIGN */
static void put_jump_slot(u8 **p)
{
    put_rorx(p, S2, S1, JUMP_BITS);
    put_op_rr(p, false, OP_XOR, S2, S1);
    put_op_ri(p, false, EXT_AND, S2, JUMP_MASK);
}

/*
 * Goes to the linear address in S1 by the jump cache. Flags are in memory. kick.c knows the last
 * two instructions. `site` counts when reason is BT_BRANCH.
 */
static void put_jump(struct translation *t, enum bt_reason reason, u32 site)
{
    u8 **p = &t->p;
    struct stub *s;

    put_store_gs(p, GS_GPR(GPR_RIP), S1);
    put_jump_slot(p);
    put_op_gs(p, true, OP_XOR, S1, GS_OFFSET(bt_shared.jump_key));
    put_op_gs_index4(p, true, OP_CMP, S1, S2, GS_OFFSET(bt_shared.jump[0].tag));
    s = add_stub(t, STUB_SITE, put_jcc(p, CC_NE));
    s->reason = (u8)reason;
    s->number = site;
    put_op_gs_index4(p, false, 0xff, 4, S2, GS_OFFSET(bt_shared.jump[0].code));
}

/* The displacement at `from` leads to what may be elsewhere, seen from there, when the block is copied. */
static void lead(struct translation *t, u8 *from, const u8 *to)
{
    patch_rel32(from, to);
    add_reloc(t, from + 4, RELOC_CODE);
}

/* v->bt_shared.ip_page = page; the flags stay. */
static void put_store_page(struct translation *t, gva_t page)
{
    if (page == (u64)(s64)(s32)page) {
        put_store_gs_simm32(&t->p, GS_OFFSET(bt_shared.ip_page), (s32)page);
        return;
    }
    put_store_gs_imm32(&t->p, GS_OFFSET(bt_shared.ip_page), (u32)page);
    put_store_gs_imm32(&t->p, GS_OFFSET(bt_shared.ip_page) + 4, (u32)(page >> 32));
}

static void put_leave(struct translation *t, enum bt_reason reason, u32 number)
{
    put_store_gs_imm32(&t->p, GS_OFFSET(bt_shared.site), number);
    if (reason != BT_JUMP)
        add_reloc(t, t->p, reason == BT_LINK || reason == BT_NARROW ? RELOC_EXIT : RELOC_SITE);
    if (is_placed(t))
        put_store_page(t, t->block->page);
    lead(t, put_jmp(&t->p), bt_write_at(t->bt, t->bt->glue[reason]));
}

/* A branch to an offset from the page's start that may lie outside of it. */
static void put_far_jump(struct translation *t, s32 target)
{
    leave_perm(t);
    put_page_address(t, S1, target, t->v->bt_mode & BT_MODE_CODE32 ? 4 : 8);
    put_jump(t, BT_JUMP, 0);
}

static bool is_in_page(s64 target)
{
    return target >= 0 && target < (s64)GUEST_PAGE_SIZE;
}

static bool can_link(const struct translation *t, s64 target)
{
    return is_in_page(target) || (t->links_pages && target == (s32)target);
}

/* The displacement at `from` leads to `target`, from the page's start; the flags are as they are now. */
static void add_exit(struct translation *t, u8 *from, s64 target)
{
    struct bt *bt = t->bt;
    u32 number = bt->next.exits++;

    bt->exits[number] = (struct bt_exit){.at = code_offset(t, from),
                                         .target = (s32)target,
                                         .flags = t->flags.memory ? EXIT_MEMORY
                                                  : t->pending    ? EXIT_RECIPE
                                                                  : EXIT_HOST,
                                         .recipe_regs = t->pending};
    memcpy(bt->exits[number].perm, t->perm, sizeof(t->perm));
    add_stub(t, STUB_EXIT, from)->number = number;
}

/* Whether the code at an offset from the page's start is known to make all flags anew, first. */
static bool overwrites_flags(const struct translation *t, s64 target)
{
    const struct bt_block *b = t->block, *to = b;

    if (!is_in_page(target))
        return false;
    if (target != t->insns[0].offset)
        to = bt_block_find(t->v, (b->gpa & ~(GUEST_PAGE_SIZE - 1)) + (u64)target, b->page, b->mode);
    return to && to->first_use == FLAGS_OVERWRITTEN;
}

/* Before a branch to `target`: lets it have the flags as a recipe, for one store. */
static void put_pending(struct translation *t, s64 target)
{
    const struct bt_recipe *r = &t->flags.recipe;

    t->pending = 0;
    if (t->flags.memory || !r->kind || overwrites_flags(t, target))
        return;
    if (!put_recipe(t, r))
        return;
    t->pending = RECIPE_NO_REGS;
    if (r->a != NO_REG)
        t->pending |= BIT32(r->a);
    if (r->b != NO_REG)
        t->pending |= BIT32(r->b);
}

/* A jump that may be linked. */
static void put_exit(struct translation *t, s64 target)
{
    if (!t->flags.memory)
        flags_need(t);
    put_pending(t, target);
    add_exit(t, put_jmp(&t->p), target);
}

/* From the instruction at an offset from the page's start to another. */
static void put_direct(struct translation *t, s64 offset, s64 target)
{
    stack_settle(t, offset);
    if (can_link(t, target)) {
        put_exit(t, target);
    } else {
        flags_to_memory(t);
        put_far_jump(t, (s32)target);
    }
}

static void put_conditional(struct translation *t, const struct bt_insn *i)
{
    s64 target = i->offset + i->len + i->imm;
    struct stub *s;

    x87_store_pointers(t);
    flags_settle(t);
    stack_settle(t, i->offset);
    flags_need(t);
    if (can_link(t, target)) {
        put_pending(t, target);
        add_exit(t, put_jcc(&t->p, i->cc), target);
    } else {
        s = add_stub(t, STUB_FAR, put_jcc(&t->p, i->cc));
        s->target = (s32)target;
    }
}

/*
 * The return that belongs to the call i looks into the jump cache, which is larger than the host's caches. Where the
 * address to return to is known, its entry is fetched while the callee runs.
 */
static void put_return_prefetch(struct translation *t, const struct bt_insn *i)
{
    gva_t to = t->block->page + i->offset + i->len;

    if (is_placed(t))
        put_prefetch_gs(&t->p, GS_OFFSET(bt_shared.jump) +
                                   bt_jump_slot(to) * (u32)sizeof(struct jump_entry));
}

/* An indirect call looks its target up before it pushes: what has no code yet is the interpreter's,
 * which finds out if the target is canonical. */
static void put_indirect_call(struct translation *t, const struct bt_insn *i)
{
    u8 **p = &t->p;
    struct stub *s;

    emit_branch_target(t, i);
    leave_perm(t);
    t->flags.host = false;
    put_store_gs(p, GS_GPR(GPR_RIP), S1);
    put_jump_slot(p);
    put_op_gs(p, true, OP_XOR, S1, GS_OFFSET(bt_shared.jump_key));
    put_op_gs_index4(p, true, OP_CMP, S1, S2, GS_OFFSET(bt_shared.jump[0].tag));
    s = add_stub(t, STUB_SITE, put_jcc(p, CC_NE));
    s->reason = BT_STOP;
    s->number = add_site(t, i);
    emit_push_return(t, i);
    put_return_prefetch(t, i);
    put_load_gs(p, S1, GS_GPR(GPR_RIP));
    put_jump(t, BT_JUMP, 0);
}

/* The instruction that ends the block. */
static void put_end(struct translation *t, const struct bt_insn *i)
{
    s64 target = i->offset + i->len + i->imm;
    u32 site;

    if (i->op != BT_FAST && i->op != BT_INTERP)
        x87_store_pointers(t);
    switch (i->op) {
    case BT_JMP:
        put_direct(t, i->offset, target);
        break;
    case BT_CALL:
        emit_push_return(t, i);
        put_return_prefetch(t, i);
        put_direct(t, i->offset, target);
        break;
    case BT_JMP_INDIRECT:
        stack_settle(t, i->offset);
        emit_branch_target(t, i);
        leave_perm(t);
        site = add_site(t, i);
        put_jump(t, BT_BRANCH, site);
        break;
    case BT_CALL_INDIRECT:
        put_indirect_call(t, i);
        break;
    case BT_RET:
        emit_pop_return(t, i);
        leave_perm(t);
        site = add_site(t, i);
        t->bt->sites[site].size = (u16)(i->word + i->imm);
        put_jump(t, BT_BRANCH, site);
        break;
    case BT_FAST:
        flags_to_memory(t);
        site = add_site(t, i);
        t->bt->sites[site].resume = bt_keep_insn(t->bt, &i->insn);
        t->quick_site = site;
        put_perm_out(t);
        put_leave(t, BT_QUICK, site);
        break;
    default: /* BT_INTERP */
        if (!t->flags.memory && !t->flags.recipe.kind)
            flags_to_memory(t);
        put_perm_out(t);
        put_leave(t, BT_STOP, add_site(t, i));
        break;
    }
}

/* --- Cold code --- */

static bool has_perm(const struct translation *t)
{
    for (unsigned n = 0; n < BT_PERM; n++)
        if (t->perm[n] != NO_REG)
            return true;
    return false;
}

/* Where C goes on in the block, if it does. */
static void put_resume(struct translation *t, const struct stub *stub)
{
    u32 *resume = &t->bt->sites[stub->number].resume;

    if (!stub->resume)
        return;
    *resume = code_offset(t, stub->resume);
    if (has_perm(t)) {
        *resume = code_offset(t, t->p);
        put_perm_in(t);
        put_keep_addresses(t, true);
        lead(t, put_jmp(&t->p), stub->resume);
    }
}

/* RSP isn't where direct code needs it: C goes on at the instruction. */
static void put_stack_exit(struct translation *t, const struct stub *stub)
{
    t->x87 = stub->x87;
    x87_store_pointers(t);
    flags_to_memory(t);
    leave_perm(t);
    put_page_address(t, S1, stub->target, 8);
    put_store_gs(&t->p, GS_GPR(GPR_RIP), S1);
    put_leave(t, BT_JUMP, 0);
}

/* To code for the instruction at offset with a check by the TLB: an exit that has its jump in cold code. */
static void put_narrow_exit(struct translation *t, const struct stub *stub)
{
    u32 number = t->bt->next.exits++;
    struct bt_exit *e = &t->bt->exits[number];

    if (stub->number == CHUNK_IN_S2) {
        put_store_gs(&t->p, GS_OFFSET(bt_shared.linear), S2);
    } else {
        put_store_gs_imm32(&t->p, GS_OFFSET(bt_shared.linear), stub->number);
        put_store_gs_imm32(&t->p, GS_OFFSET(bt_shared.linear) + 4, 0);
    }
    t->x87 = stub->x87;
    stack_settle(t, stub->target);
    x87_store_pointers(t);
    flags_to_memory(t);
    leave_perm(t);
    *e = (struct bt_exit){
        .target = stub->target, .flags = EXIT_MEMORY, .resume = code_offset(t, stub->resume)};
    memcpy(e->perm, t->perm, sizeof(e->perm));
    e->at = code_offset(t, put_jmp(&t->p));
    e->bridge = e->stub = code_offset(t, t->p);
    put_leave(t, BT_NARROW, number);
    use_perm(t, stub->perm);
    if (has_perm(t)) {
        e->resume = code_offset(t, t->p);
        put_perm_in(t);
        lead(t, put_jmp(&t->p), stub->resume);
    }
}

static void put_stub(struct translation *t, const struct stub *stub)
{
    u8 **p = &t->p;
    struct bt_exit *e;

    lead(t, stub->from, *p);
    t->flags = stub->flags;
    t->stack = stub->stack;
    use_perm(t, stub->perm);
    switch (stub->kind) {
    case STUB_SLOW:
        put_op_gs_base(p, OP_XOR, S1, S2, (u32)stub->target); /* the linear address again */
        put_store_gs(p, GS_OFFSET(bt_shared.linear), S1);
        put_keep_addresses(t, false);
        put_perm_out(t);
        put_leave(t, BT_SLOW, stub->number);
        put_resume(t, stub);
        break;
    case STUB_EXIT:
        e = &t->bt->exits[stub->number];
        e->bridge = code_offset(t, *p);
        if (has_perm(t)) {
            put_perm_out(t);
            e->at2 = code_offset(t, put_jmp(p));
        }
        e->stub = code_offset(t, *p); /* the bridge's jump leads here, with a displacement of 0 */
        if (e->flags == EXIT_HOST)
            emit_flags_save(p);
        put_leave(t, BT_LINK, stub->number);
        break;
    case STUB_FAR:
        if (can_link(t, stub->target)) {
            put_exit(t, stub->target);
            break;
        }
        flags_to_memory(t);
        put_far_jump(t, stub->target);
        break;
    case STUB_NARROW:
        put_narrow_exit(t, stub);
        break;
    case STUB_STACK:
        put_stack_exit(t, stub);
        break;
    default: /* STUB_SITE */
        if (stub->resume)
            put_keep_addresses(t, false);
        put_perm_out(t);
        put_leave(t, (enum bt_reason)stub->reason, stub->number);
        put_resume(t, stub);
        break;
    }
}

/* --- Entries --- */

static enum first_use first_use(const struct translation *t)
{
    for (unsigned n = 0; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        if (insn_clobbers_flags(i))
            return FLAGS_CLOBBERED;
        if (i->flags_in)
            return FLAGS_NEEDED;
        if (i->flags_out)
            return FLAGS_OVERWRITTEN;
    }
    return FLAGS_CLOBBERED;
}

/*
 * Whether the block may be entered with the flags as a pending recipe: all of them are made anew before
 * anybody asks for them but for a fault, and no fault comes after a change of the recipe's registers.
 */
static void find_kept_regs(const struct translation *t, struct bt_block *b)
{
    u32 changed = 0;

    for (unsigned n = 0; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        switch (i->op) {
        case BT_PLAIN:
        case BT_LEA:
        case BT_NOP:
        case BT_PUSH:
        case BT_POP:
        case BT_LEAVE:
            break;
        default:
            return;
        }
        if (i->flags_in)
            return;
        if (insn_clobbers_flags(i))
            b->kept_regs = changed;
        if (i->flags_out) {
            b->takes_recipe = true;
            return;
        }
        changed |= insn_changed_regs(i);
    }
}

/*
 * From the jump cache: RIP is the block's own address. The store of ip_page is branched round when nothing
 * changes: else each call's return address would depend, through memory, on the last return's. Placed blocks
 * know their address, and store it when they leave for C.
 */
static void put_jump_prefix(struct translation *t, gpa_t gpa)
{
    u8 *skip;

    if (is_placed(t))
        return;
    put_load_gs(&t->p, S1, GS_GPR(GPR_RIP));
    put_lea(&t->p, S1, S1, -(s32)(gpa & (GUEST_PAGE_SIZE - 1)));
    put_op_gs(&t->p, true, OP_CMP, S1, GS_OFFSET(bt_shared.ip_page));
    put8(&t->p, 0x74); /* je */
    put8(&t->p, 0);
    skip = t->p;
    put_store_gs(&t->p, GS_OFFSET(bt_shared.ip_page), S1);
    skip[-1] = (u8)(t->p - skip);
}

static void put_entries(struct translation *t, struct bt_block *b)
{
    if (b->first_use == FLAGS_CLOBBERED) {
        u8 *jump;

        b->host_entry = code_offset(t, t->p);
        emit_flags_save(&t->p);
        jump = t->p;
        put8(&t->p, 0xeb);
        put8(&t->p, 0);
        b->jump_entry = code_offset(t, t->p);
        put_jump_prefix(t, b->gpa);
        b->memory_entry = code_offset(t, t->p);
        jump[1] = (u8)(t->p - (jump + 2));
        put_perm_in(t);
        b->memory_native = code_offset(t, t->p);
        t->flags = (struct flag_state){.memory = true};
        return;
    }
    b->jump_entry = code_offset(t, t->p);
    put_jump_prefix(t, b->gpa);
    b->memory_entry = code_offset(t, t->p);
    if (b->first_use == FLAGS_NEEDED) {
        t->flags = (struct flag_state){.memory = true};
        use_perm(t, no_perm); /* not yet */
        flags_settle(t);
        put_flags_load(t);
        use_perm(t, b->perm);
    }
    b->host_entry = code_offset(t, t->p);
    put_perm_in(t);
    b->host_native = code_offset(t, t->p);
    /* If they are overwritten first, nobody asks where they were. */
    t->flags = (struct flag_state){.host = true};
}

/* The native entry that put_entries left out, and the way out for BT_FAULT: cold code. */
static void put_cold_entries(struct translation *t, struct bt_block *b)
{
    use_perm(t, b->perm);
    if (!b->host_native && !has_perm(t)) {
        b->host_native = b->host_entry;
    } else if (!b->host_native) {
        b->host_native = code_offset(t, t->p);
        emit_flags_save(&t->p);
        lead(t, put_jmp(&t->p), bt_write_at(t->bt, b->memory_native));
    } else if (b->first_use == FLAGS_OVERWRITTEN) {
        b->memory_native = b->host_native;
    } else if (!has_perm(t)) {
        b->memory_native = b->memory_entry;
    } else {
        b->memory_native = code_offset(t, t->p);
        t->at = 0;
        t->x87 = 0;
        t->flags = (struct flag_state){.memory = true};
        flags_settle(t);
        put_flags_load(t);
        lead(t, put_jmp(&t->p), bt_write_at(t->bt, b->host_native));
    }
    b->fault = t->bt->glue[BT_FAULT];
    if (has_perm(t)) {
        b->fault = code_offset(t, t->p);
        put_perm_out(t);
        lead(t, put_jmp(&t->p), bt_write_at(t->bt, t->bt->glue[BT_FAULT]));
    }
}

/* --- Registers --- */

/* What it would cost to have each register in memory, in accesses; ~0: it can't be. */
static void weigh_registers(const struct translation *t, u32 weight[16])
{
    u32 fixed = BIT32(RAX) | BIT32(RSP);

    memset(weight, 0, 16 * sizeof(*weight));
    for (unsigned n = 0; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        fixed |= i->fixed;
        for (u8 reg = 0; reg < 16; reg++)
            weight[reg] += ((i->read >> reg) & 1) + ((i->written >> reg) & 1);
        if ((i->op == BT_PUSH || i->op == BT_POP) && i->rm != NO_REG && !i->mem)
            weight[i->rm]++;
    }
    for (u8 reg = 0; reg < 16; reg++)
        if (fixed & BIT32(reg))
            weight[reg] = UINT32_MAX;
}

static bool is_loop(const struct translation *t)
{
    for (unsigned n = 0; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        if ((i->op == BT_JCC || i->op == BT_JMP) &&
            i->offset + i->len + i->imm == t->insns[0].offset)
            return true;
    }
    return false;
}

/* The weight of what is in memory under perm; UINT32_MAX: impossible. */
static u32 perm_weight(const u32 weight[16], const u8 perm[BT_PERM])
{
    u32 sum = 0;

    for (u8 n = 0; n < 2; n++) {
        u32 w = weight[perm[n] == NO_REG ? S1 + n : perm[n]];

        if (w == UINT32_MAX)
            return UINT32_MAX;
        sum += w;
    }
    for (u8 n = 2; n < BT_PERM; n++)
        if (perm[n] != NO_REG && weight[perm[n]])
            return UINT32_MAX;
    return sum;
}

/* How many registers are worth borrowing for host addresses. */
static unsigned wanted_addresses(const struct translation *t, bool loop)
{
    u32 bases = 0;
    unsigned accesses = 0, nbases;

    for (unsigned n = 0; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        if (i->op == BT_PUSH || i->op == BT_POP)
            bases |= BIT32(RSP);
        else if (i->op == BT_PLAIN && i->mem)
            bases |= BIT32(i->rip_relative || i->base == NO_REG ? GPR_ZERO : i->base);
        else
            continue;
        accesses++;
    }
    nbases = (unsigned)__builtin_popcount(bases);
    if (nbases < 2 || accesses < nbases + (loop ? 1 : 3))
        return 0;
    return MIN(nbases, BT_BORROWED);
}

static void borrow(const struct translation *t, struct bt_block *b, const u32 weight[16], bool loop)
{
    unsigned wanted = wanted_addresses(t, loop), n = 2;

    for (u8 reg = S1; reg-- > 0 && n < 2 + wanted;)
        if (!weight[reg] && reg != b->perm[0] && reg != b->perm[1])
            b->perm[n++] = reg;
}

/*
 * Chooses the registers that are in memory while the block runs, and those borrowed. A change costs two
 * loads and two stores for each, there and back, if it isn't a loop; none at all if the block before has
 * the same ones.
 */
static void choose_perm(const struct translation *t, struct bt_block *b)
{
    const struct bt_block *from = t->bt->from;
    bool loop = is_loop(t);
    u32 weight[16], change = loop ? 1 : 5, best;

    memset(b->perm, NO_REG, sizeof(b->perm));
    weigh_registers(t, weight);
    if (weight[S1] == UINT32_MAX || weight[S2] == UINT32_MAX)
        return;
    for (u8 n = 0; n < 2; n++) {
        u8 pick = NO_REG;

        for (unsigned reg = 0; reg < S1; reg++)
            if (reg != b->perm[0] && weight[reg] != UINT32_MAX &&
                (pick == NO_REG || weight[reg] < weight[pick]))
                pick = (u8)reg;
        if (pick != NO_REG && weight[S1 + n] > weight[pick] + change)
            b->perm[n] = pick;
    }
    best = perm_weight(weight, b->perm);
    if (b->perm[0] != NO_REG || b->perm[1] != NO_REG)
        best += change;
    if (from && perm_weight(weight, from->perm) <= best)
        memcpy(b->perm, from->perm, sizeof(b->perm));
    if (b->perm[2] == NO_REG && !(b->mode & (BT_MODE_NARROW | BT_MODE_DIRECT)))
        borrow(t, b, weight, loop);
}

/* --- Blocks --- */

static bool ends_block(const struct bt_insn *i)
{
    return i->op == BT_INTERP || i->op == BT_FAST || i->op > BT_JCC;
}

static bool class_faults(const struct soft_vcpu *v, const struct bt_insn *i)
{
    return i->fpu_class != FPU_CLASSES && v->class_fault[i->fpu_class];
}

/*
 * Decodes up to the block's end or the page's. Returns the bytes of what will be emitted. An instruction
 * that goes on in the next page isn't part of the block; it is reached by the jump cache.
 */
static unsigned decode_block(struct translation *t, gpa_t gpa, const u8 *host)
{
    unsigned first = (unsigned)(gpa & (GUEST_PAGE_SIZE - 1)), offset = first;
    const struct bt *bt = t->bt;

    while (t->count < bt->choices.max_insns && offset < GUEST_PAGE_SIZE) {
        struct bt_insn *i = &t->insns[t->count];

        if (!bt_insn_decode(t->v, host + (offset - first), (unsigned)GUEST_PAGE_SIZE - offset,
                            (u16)offset, i)) {
            t->goes_across = true;
            break;
        }
        if (class_faults(t->v, i))
            i->op = BT_INTERP;
        t->count++;
        if (i->op != BT_INTERP)
            offset += i->len;
        if (ends_block(i))
            break;
    }
    return offset - first;
}

/*
 * Whether somebody may ask for flags as they are behind instruction `at`: an instruction, or a fault, before
 * all of them are made anew.
 */
static bool flags_matter(const struct translation *t, unsigned at)
{
    for (unsigned n = at + 1; n < t->count; n++) {
        const struct bt_insn *i = &t->insns[n];

        if (i->flags_in || insn_clobbers_flags(i))
            return true;
        if (i->flags_out && !i->flags_partial)
            return false;
    }
    return true;
}

/* Those that write a part of the flags need the rest only if it matters. */
static void settle_flags(struct translation *t)
{
    for (unsigned n = t->count; n-- > 0;)
        if (t->insns[n].flags_partial && flags_matter(t, n))
            t->insns[n].flags_in = true;
}

/* One instruction that lies across two pages. */
static unsigned decode_across(struct translation *t, gpa_t gpa, const u8 *bytes, unsigned n)
{
    struct bt_insn *i = &t->insns[0];

    if (!bt_insn_decode(t->v, bytes, n, (u16)(gpa & (GUEST_PAGE_SIZE - 1)), i) ||
        i->op == BT_INTERP || class_faults(t->v, i))
        return 0;
    t->count = 1;
    return i->len;
}

bool bt_source_is(const struct bt_source *source, const u8 *code, unsigned n)
{
    unsigned first = (unsigned)(GUEST_PAGE_SIZE - (source->gpa & (GUEST_PAGE_SIZE - 1)));

    first = MIN(n, first);
    return !memcmp(source->host, code, first) &&
           (n == first || !memcmp(source->host2, code + first, n - first));
}

bool bt_block_protect(struct soft_vcpu *v, const struct bt_block *b, const struct bt_source *source,
                      const u8 *code)
{
    unsigned first = (unsigned)(GUEST_PAGE_SIZE - (b->gpa & (GUEST_PAGE_SIZE - 1)));

    first = MIN(b->bytes, first);
    return soft_code_protect(v, b->gpa, first) &&
           (!b->gpa2 || soft_code_protect(v, b->gpa2, b->bytes - first)) &&
           bt_source_is(source, code, b->bytes);
}

/* The bytes that the instructions were decoded from. */
static void gather_code(struct translation *t)
{
    u8 *to = t->code;

    for (unsigned n = 0; n < t->count; n++) {
        memcpy(to, t->insns[n].bytes, t->insns[n].len);
        to += t->insns[n].len;
    }
}

static unsigned decode(struct translation *t, const struct bt_source *source)
{
    unsigned first = (unsigned)(GUEST_PAGE_SIZE - (source->gpa & (GUEST_PAGE_SIZE - 1)));
    u8 bytes[15];

    if (!source->host2)
        return decode_block(t, source->gpa, source->host);
    for (unsigned k = 0; k < sizeof(bytes); k++)
        bytes[k] = k < first ? source->host[k] : source->host2[k - first];
    return decode_across(t, source->gpa, bytes, sizeof(bytes));
}

/* A build that audits does not outlive its first finding. */
static void audit_block(const struct bt *bt, const struct bt_block *b, u32 first_site,
                        const u8 *code)
{
    u32 sites[2] = {first_site, bt->next.sites};
    struct bt_fault_found found;
    char text[3 * 15 * BT_MAX_INSNS + 1] = "";

    if (bt_audit(bt, b, sites, &found))
        return;
    log_message(LOG_ERROR,
                "audit of translated code: %s, %u bytes into %s part of the block at %#llx",
                found.what, found.at - (found.at < BT_COLD_START ? b->start.hot : b->start.cold),
                found.at < BT_COLD_START ? "the hot" : "the cold", (unsigned long long)b->gpa);
    for (unsigned n = 0; n < b->bytes; n++)
        snprintf(text + 3 * n, sizeof(text) - 3 * n, "%02x ", code[n]);
    log_message(LOG_ERROR, "  %s", text);
    abort();
}

/* Under the address that it is made for: another mapping of the page will have the same name. */
static void name_block(const struct soft_vcpu *v, const struct bt_block *b)
{
    struct perf_map *m = v->engine->config.perf_map;
    u64 lin = v->cpu.gpr[GPR_RIP];
    bool user = b->mode & BT_MODE_USER;

    perf_map_add(m, bt_run_at(v->bt, b->start.hot), b->hot_end - b->start.hot, lin, user);
    perf_map_add(m, bt_run_at(v->bt, b->start.cold), b->cold_end - b->start.cold, lin, user);
}

void bt_block_finish(struct soft_vcpu *v, struct bt_block *b, u32 first_site, const u8 *code)
{
    struct bt *bt = v->bt;

    bt->next.hot = (b->hot_end + 15) & ~15u;
    bt->next.cold = b->cold_end;
    if (BT_AUDIT)
        audit_block(bt, b, first_site, code);
    if (v->engine->config.perf_map)
        name_block(v, b);
    bt_block_insert(v, b);
}

struct bt_block *bt_translate(struct soft_vcpu *v, const struct bt_source *source, u32 mode)
{
    static _Thread_local struct translation translation;
    struct translation *t = &translation;
    struct bt *bt = v->bt;
    const struct bt_insn *last;
    struct bt_block *b;
    u32 sites = bt->next.sites, x87s = bt->next.x87s;

    if (!bt_has_room(bt))
        return NULL;
    t->v = v;
    t->bt = bt;
    t->count = t->nstubs = t->nrelocs = 0;
    t->goes_across = false;
    memset(t->groups, 0, sizeof(t->groups));
    memset(t->direct, 0, sizeof(t->direct));
    t->next_direct = 0;
    t->stack = (struct stack_state){.known = true};
    t->x87 = 0;
    t->x87_live = false;
    t->quick_site = NO_SITE;
    t->links_pages =
        bt_is_kernel(mode) ? soft_fetch_is_global(v, v->cpu.gpr[GPR_RIP]) : bt_is_placed(mode);
    b = bt_block_nth(bt, bt->nblocks);
    *b = (struct bt_block){.gpa = source->gpa,
                           .gpa2 = source->host2 ? source->gpa2 : 0,
                           .page = bt_place(v->cpu.gpr[GPR_RIP], mode),
                           .mode = mode,
                           .start = bt->next};
    b->bytes = (u16)decode(t, source);
    gather_code(t);
    if (!b->bytes || !bt_block_protect(v, b, source, t->code))
        return NULL;
    settle_flags(t);
    b->first_use = (u8)first_use(t);
    find_kept_regs(t, b);
    choose_perm(t, b);
    use_perm(t, b->perm);
    t->block = b;
    t->at = 0;
    t->p = bt_write_at(bt, bt->next.hot);
    put_entries(t, b);
    last = &t->insns[t->count - 1];
    for (t->at = 0; t->at < t->count; t->at++) {
        const struct bt_insn *i = &t->insns[t->at];

        if (ends_block(i))
            put_end(t, i);
        else if (i->op == BT_JCC)
            put_conditional(t, i);
        else
            emit_insn(t, i);
    }
    if (!ends_block(last))
        x87_store_pointers(t);
    if (t->goes_across) {
        flags_to_memory(t);
        stack_settle(t, last->offset + last->len);
        put_far_jump(t, last->offset + last->len);
    } else if (!ends_block(last)) {
        put_direct(t, last->offset + last->len, last->offset + last->len);
    }
    b->hot_end = code_offset(t, t->p);

    t->p = bt_write_at(bt, bt->next.cold);
    put_cold_entries(t, b);
    for (unsigned n = 0; n < t->nstubs; n++)
        put_stub(t, &t->stubs[n]);
    b->cold_end = code_offset(t, t->p);

    b->count = (u16)(t->count - (last->op == BT_INTERP || last->op == BT_FAST));
    b->nexits = bt->next.exits - b->start.exits;
    b->npoints = bt->next.points - b->start.points;
    bt_block_finish(v, b, sites, t->code);
    bt_publish(t, sites, x87s);
    v->stats.blocks_translated++;
    return b;
}

bool bt_goes_across(struct soft_vcpu *v, gpa_t gpa, const u8 *host)
{
    unsigned left = (unsigned)(GUEST_PAGE_SIZE - (gpa & (GUEST_PAGE_SIZE - 1)));
    struct bt_insn i;

    return left < 15 && !bt_insn_decode(v, host, left, 0, &i);
}
