/*
 * Is translated code harmless? Each instruction of a block is decoded by Zydis and held against this, which
 * is all that keeps a guest inside its own memory:
 *
 *  1. A memory operand is one of
 *      gs:[disp]           within a field of struct soft_vcpu that code may read, or write;
 *      gs:[S2 * 4 + disp]  an entry of the jump cache, S2 being a masked slot;
 *      gs:[S2 + disp]      a tag or host address of the TLB that the block's mode uses, S2 being a
 *                          masked index;
 *      [S1 + n]            behind a check for n and the operand's size, for a write where it writes;
 *      [U + n]             likewise, U being a borrowed register (perm[2], perm[3]) that was copied from S1
 *                          behind such a check, and not written since;
 *      gs:[kept_address]   moved to from the borrowed register that it is for, and from there to it.
 *     Anything else, implied operands too, is refused: so there is no CALL, and PUSH and string instructions are in
 *     direct code only. A bit's number, which moves an operand, is S2 masked to be within it.
 *      [address]           in direct code, as audit_direct.c has it, and gs:[S2 + direct_map] with it.
 *  2. A check is: XOR of S1 with a tag, CMP of S1 with 4096 less the size, JA, and ADD of the host address
 *     from the same entry; neither S1 nor S2 is changed between. That S1 was a linear address, and S2 its
 *     index, need not be known: if the XOR leaves an offset in a page, S1 was an address in the page
 *     that the entry is for.
 *  3. From the ADD on S1 is a host address, and nothing reads it but as the base of an address, until it is
 *     written anew, or copies it but to a borrowed register. The same goes for that one, which may hold the
 *     host address of the block before, too, at native entries. Borrowed registers hold guest values at all
 *     ways out but exits to who borrows the same ones. So no host address gets to where the guest sees it.
 *     Nor does anything read one from struct soft_vcpu.
 *  4. A branch leads to an instruction of the block or to one of the ways out in glue.c; only the jump
 *     cache is jumped through. The end isn't run over. What is known of S1 and S2 where branches lead is what
 *     is known at all of them; at an entry, nothing. Where C goes on at a site's resume, kept_address is what
 *     it was at the site's way out, and all else is the guest's.
 *  5. No system call, interrupt, privileged instruction, and none that sees or changes a segment.
 *
 * Branches also lead backward, from cold code, so the block is gone over until nothing new is known. Code
 * that nothing leads to yet waits for its turn.
 */
#include "engine/soft/bt/audit.h"

#include "engine/soft/bt/asm.h"
#include "engine/soft/bt/audit_direct.h"
#include "engine/soft/decode.h"

#include <stdlib.h>

#define MAX_CODE KIB(64) /* of a half of a block */
#define MAX_TARGETS 1024
#define MAX_ROUNDS 256

/* S1_HOST with a size of 0: nobody knows what it is, so it may be a host address. */
enum s1 { S1_ANY, S1_XORED, S1_COMPARED, S1_CHECKED, S1_HOST };
enum s2 { S2_ANY, S2_SLOT, S2_INDEX };

/* What is known of a borrowed register, or of what is kept of it. */
struct address {
    bool guest; /* it is no host address */
    bool write;
    u32 size; /* bytes that it was checked for; 0: nobody knows what it is */
};

/* What is known of the scratch registers, and of the borrowed ones. */
struct known {
    u8 s1; /* enum s1 */
    u8 s2; /* enum s2 */
    bool write;
    u32 size;                 /* from S1_COMPARED on: bytes that the check is for */
    u64 s2_below, temp_below; /* S2, and v->bt_shared.temp, are less than that; 0: nobody knows */
    struct address borrowed[BT_BORROWED], kept[BT_BORROWED];
    u32 site; /* what v->bt_shared.site is now, and 1; 0: nobody knows */
    struct direct_known direct;
};

static struct known nothing_known(void)
{
    struct known known = {.s1 = S1_HOST};

    direct_known_clear(&known.direct);
    return known;
}

struct target {
    u32 from, end, to; /* end: behind the branch; 0: C leads there */
    struct known known;
};

struct audit {
    const struct bt *bt;
    const struct bt_block *b;
    const u32 *sites;
    ZydisDecoder decoder;
    struct known known;
    struct target targets[MAX_TARGETS];
    unsigned ntargets;
    bool changed;               /* a target in this round */
    u32 unreached;              /* in this round; 0: none */
    u8 starts[2][MAX_CODE / 8]; /* bits: where instructions start, in the hot and the cold half */
    u32 at, next;
    const char *what;
};

static bool refuse(struct audit *a, const char *what)
{
    if (!a->what)
        a->what = what;
    return false;
}

/* --- What of struct soft_vcpu is whose --- */

struct range {
    u32 from, to;
    bool write;
};

#define FIELD(member, write)                                                                       \
    {                                                                                              \
        GS_OFFSET(member), GS_OFFSET(member) + sizeof(((struct soft_vcpu *)0)->member), write      \
    }

static const struct range ranges[] = {
    FIELD(cpu.gpr, true),
    FIELD(cpu.rflags, true),
    FIELD(cpu.msr.kernel_gs_base, true),
    FIELD(cpu.seg[SEG_GS].base, true),
    FIELD(cpu.seg, false),
    FIELD(cpu.fip, true),
    FIELD(cpu.fdp, true),
    FIELD(cpu.fcs, true),
    FIELD(cpu.fds, true),
    FIELD(cpu.fop, true),
    FIELD(fpu_live, false),
    FIELD(aflags, true),
    FIELD(seg_base[SEG_GS], true),
    FIELD(seg_base, false),
    FIELD(irq_waiting, false),
    FIELD(bt_shared.ip_page, true),
    FIELD(bt_shared.jump_key, false),
    FIELD(bt_shared.linear, true),
    FIELD(bt_shared.temp, true),
    FIELD(bt_shared.flag_source, true),
    FIELD(bt_shared.site, true),
};

static bool is_field(u64 disp, u64 size, bool write)
{
    for (unsigned n = 0; n < ARRAY_SIZE(ranges); n++)
        if (disp >= ranges[n].from && disp + size <= ranges[n].to)
            return ranges[n].write || !write;
    return false;
}

/* What a displacement from a TLB index is; the block's own TLB alone. */
enum tlb_field { TLB_FIELD_NONE, TLB_FIELD_READ, TLB_FIELD_WRITE, TLB_FIELD_HOST };

static enum tlb_field tlb_field(const struct audit *a, u64 disp)
{
    enum tlb_kind kind = a->b->mode & BT_MODE_USER ? TLB_USER
                         : a->b->mode & BT_MODE_AC ? TLB_KERNEL_AC
                                                   : TLB_KERNEL;
    u64 entries = offsetof(struct soft_vcpu, tlbs) + kind * sizeof(struct tlb) +
                  offsetof(struct tlb, entries);

    if (disp == entries + offsetof(struct tlb_entry, read_tag))
        return TLB_FIELD_READ;
    if (disp == entries + offsetof(struct tlb_entry, write_tag))
        return TLB_FIELD_WRITE;
    return disp == entries + offsetof(struct tlb_entry, host) ? TLB_FIELD_HOST : TLB_FIELD_NONE;
}

/* --- Branches --- */

static bool in_hot(const struct audit *a, u32 at)
{
    return at >= a->b->start.hot && at < a->b->hot_end;
}
static bool in_cold(const struct audit *a, u32 at)
{
    return at >= a->b->start.cold && at < a->b->cold_end;
}

static bool is_way_out(const struct audit *a, u32 at)
{
    for (unsigned reason = 0; reason <= BT_FAULT; reason++)
        if (at == a->bt->glue[reason])
            return true;
    return false;
}

/* The ways out whose sites have a resume. */
static bool comes_back(const struct audit *a, u32 at)
{
    return at == a->bt->glue[BT_SLOW] || at == a->bt->glue[BT_FPU] || at == a->bt->glue[BT_FLAGS] ||
           at == a->bt->glue[BT_STRING];
}

/* The host register that the block borrows as its k'th, or NO_REG. */
static u8 borrowed_reg(const struct audit *a, unsigned k)
{
    u8 reg = a->b->perm[2 + k];

    return reg < S1 && reg != RSP ? reg : NO_REG;
}

static bool same_address(const struct address *x, const struct address *y)
{
    return x->guest == y->guest && x->write == y->write && x->size == y->size;
}

static bool same_scratch(const struct known *x, const struct known *y)
{
    return x->s1 == y->s1 && x->s2 == y->s2 && x->write == y->write && x->size == y->size &&
           x->s2_below == y->s2_below;
}

static bool same_known(const struct known *x, const struct known *y)
{
    for (unsigned k = 0; k < BT_BORROWED; k++)
        if (!same_address(&x->borrowed[k], &y->borrowed[k]) ||
            !same_address(&x->kept[k], &y->kept[k]))
            return false;
    return same_scratch(x, y) && x->temp_below == y->temp_below && x->site == y->site &&
           direct_known_same(&x->direct, &y->direct);
}

/* Leaves in *x what both know. */
static void meet(struct known *x, const struct known *y)
{
    if (!same_scratch(x, y)) {
        x->s1 = S1_HOST;
        x->s2 = S2_ANY;
        x->write = false;
        x->size = 0;
        x->s2_below = 0;
    }
    if (x->temp_below != y->temp_below)
        x->temp_below = 0;
    for (unsigned k = 0; k < BT_BORROWED; k++) {
        if (!same_address(&x->borrowed[k], &y->borrowed[k]))
            x->borrowed[k] = (struct address){0};
        if (!same_address(&x->kept[k], &y->kept[k]))
            x->kept[k] = (struct address){0};
    }
    if (x->site != y->site)
        x->site = 0;
    direct_known_meet(&x->direct, &y->direct);
}

/* At an entry: RSP is as placed blocks need it. */
static struct known entry_known(void)
{
    struct known known = nothing_known();

    known.direct.stack.known = true;
    return known;
}

/* Where the guest's registers are all in their places. */
static struct known guest_known(void)
{
    struct known known = entry_known();

    for (unsigned k = 0; k < BT_BORROWED; k++)
        known.borrowed[k].guest = true;
    return known;
}

static bool all_guest(struct audit *a)
{
    for (unsigned k = 0; k < BT_BORROWED; k++)
        if (borrowed_reg(a, k) != NO_REG && !a->known.borrowed[k].guest)
            return refuse(a, "a host address goes out");
    return true;
}

static bool put_target(struct audit *a, u32 end, u32 to, const struct known *known)
{
    if (!in_hot(a, to) && !in_cold(a, to))
        return refuse(a, "a branch out of the block");
    for (unsigned n = 0; n < a->ntargets; n++) {
        struct target *t = &a->targets[n];

        if (t->from != a->at)
            continue;
        if (t->to != to)
            return refuse(a, "a way out of two sites");
        a->changed |= !same_known(&t->known, known);
        t->known = *known;
        return true;
    }
    if (a->ntargets == MAX_TARGETS)
        return refuse(a, "too many branches");
    a->targets[a->ntargets++] = (struct target){a->at, end, to, *known};
    a->changed = true;
    return true;
}

/* C goes on at the site's resume, with the guest's registers and what was kept. */
static bool add_resume(struct audit *a)
{
    struct known known = guest_known();
    u32 site = a->known.site - 1;

    if (!a->known.site || site < a->sites[0] || site >= a->sites[1])
        return refuse(a, "a way out without its site");
    memcpy(known.kept, a->known.kept, sizeof(known.kept));
    known.direct.stack = a->known.direct.stack;
    return put_target(a, 0, a->bt->sites[site].resume, &known);
}

/* Another block may follow. */
static bool audit_stack(struct audit *a)
{
    return !(a->b->mode & BT_MODE_DIRECT) || direct_stack_is_settled(&a->known.direct)
               ? true
               : refuse(a, "a way out without a look at RSP");
}

/*
 * An exit's branches will be linked: the first to a native entry of a block that borrows the same, if
 * there is a second; what is linked to other entries leaves nothing borrowed.
 */
static bool audit_exit(struct audit *a)
{
    const struct bt_block *b = a->b;

    for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++) {
        const struct bt_exit *e = &a->bt->exits[n];
        bool native = e->at2 && memcmp(e->perm, b->perm, BT_PERM) == 0;

        if (e->at + 4 != a->next && (!e->at2 || e->at2 + 4 != a->next))
            continue;
        if (!audit_stack(a))
            return false;
        if (e->at + 4 != a->next || !native)
            return all_guest(a);
    }
    return true;
}

/* As add_resume, of an exit that C may go on before, with all registers as they are. */
static bool add_narrow_resume(struct audit *a)
{
    const struct bt_block *b = a->b;
    struct known known = guest_known();
    u32 exit = a->known.site - 1;

    if (!a->known.site || exit < b->start.exits || exit >= b->start.exits + b->nexits)
        return refuse(a, "a way out without its exit");
    known.direct = a->known.direct;
    return put_target(a, 0, a->bt->exits[exit].resume, &known);
}

static bool add_target(struct audit *a, u32 to)
{
    struct known known = a->known;

    if (is_way_out(a, to) && !all_guest(a))
        return false;
    if (is_way_out(a, to))
        return to == a->bt->glue[BT_NARROW] ? add_narrow_resume(a)
                                            : !comes_back(a, to) || add_resume(a);
    known.direct.step = DIRECT_NOTHING; /* what follows a look is known where it goes on */
    return audit_exit(a) && put_target(a, a->next, to, &known);
}

/* What is known before the instruction at a->at, when `reached` says whether the one before goes on.
 * False: nothing leads here yet. */
static bool join(struct audit *a, bool reached)
{
    const struct bt_block *b = a->b;
    const struct known guest = guest_known();

    if (a->at == b->memory_native || a->at == b->host_native || a->at == b->fault) {
        a->known = entry_known();
        return true;
    }
    if (a->at == b->jump_entry || a->at == b->memory_entry || a->at == b->host_entry) {
        if (reached)
            meet(&a->known, &guest);
        else
            a->known = guest;
        reached = true;
    }
    for (unsigned n = 0; n < a->ntargets; n++) {
        const struct target *t = &a->targets[n];

        if (t->to != a->at)
            continue;
        if (reached)
            meet(&a->known, &t->known);
        else
            a->known = t->known;
        reached = true;
    }
    return reached;
}

/* --- Instructions --- */

static bool is_forbidden(const ZydisDecodedInstruction *zi)
{
    switch (zi->meta.category) {
    case ZYDIS_CATEGORY_CALL:
    case ZYDIS_CATEGORY_RET:
    case ZYDIS_CATEGORY_PUSH:
    case ZYDIS_CATEGORY_POP:
    case ZYDIS_CATEGORY_SYSCALL:
    case ZYDIS_CATEGORY_SYSRET:
    case ZYDIS_CATEGORY_SYSTEM:
    case ZYDIS_CATEGORY_INTERRUPT:
    case ZYDIS_CATEGORY_IO:
    case ZYDIS_CATEGORY_IOSTRINGOP:
    case ZYDIS_CATEGORY_STRINGOP:
    case ZYDIS_CATEGORY_SEGOP:
    case ZYDIS_CATEGORY_RDWRFSGS:
    case ZYDIS_CATEGORY_XSAVE:
    case ZYDIS_CATEGORY_XSAVEOPT:
    case ZYDIS_CATEGORY_VTX:
        return true;
    default:
        return zi->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED;
    }
}

static bool is_direct_block(const struct audit *a)
{
    return (a->b->mode & (BT_MODE_DIRECT | BT_MODE_NARROW)) == BT_MODE_DIRECT;
}

/* Those of BT_MODE_DIRECT have the stack's instructions as they are, direct code LEAVE too. */
static bool is_direct_stack(const struct audit *a, const ZydisDecodedInstruction *zi)
{
    return ((a->b->mode & BT_MODE_DIRECT) &&
            (zi->mnemonic == ZYDIS_MNEMONIC_PUSH || zi->mnemonic == ZYDIS_MNEMONIC_POP)) ||
           (is_direct_block(a) && zi->mnemonic == ZYDIS_MNEMONIC_LEAVE);
}

static bool is_general(const ZydisDecodedOperand *op)
{
    ZydisRegister whole =
        op->type == ZYDIS_OPERAND_TYPE_REGISTER
            ? ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, op->reg.value)
            : ZYDIS_REGISTER_NONE;

    return whole >= ZYDIS_REGISTER_RAX && whole <= ZYDIS_REGISTER_R15;
}

/* Whether it is the general register of that number, or a part. */
static bool is_part_of(ZydisRegister reg, unsigned number)
{
    return reg != ZYDIS_REGISTER_NONE && number != NO_REG &&
           ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg) ==
               (ZydisRegister)(ZYDIS_REGISTER_RAX + number);
}

static bool is_register(const ZydisDecodedOperand *op, unsigned number)
{
    return op->type == ZYDIS_OPERAND_TYPE_REGISTER && is_part_of(op->reg.value, number);
}

static bool reads(const ZydisDecodedOperand *op)
{
    return op->actions & ZYDIS_OPERAND_ACTION_MASK_READ;
}
static bool writes(const ZydisDecodedOperand *op)
{
    return op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
}

/* Which borrowed register it is; BT_BORROWED: none. */
static unsigned which_borrowed(const struct audit *a, ZydisRegister reg)
{
    unsigned k = 0;

    while (k < BT_BORROWED && !is_part_of(reg, borrowed_reg(a, k)))
        k++;
    return k;
}

static bool is_kept_address(u64 disp, u64 size)
{
    u64 from = GS_OFFSET(bt_shared.kept_address);

    return disp < from + sizeof(((struct soft_vcpu *)0)->bt_shared.kept_address) &&
           disp + size > from;
}

/* kept_address: moves from and to the register that it is for, and no others. */
static bool audit_kept(struct audit *a, const ZydisDecodedInstruction *zi,
                       const ZydisDecodedOperand *ops, u64 disp)
{
    bool store = ops[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
    const ZydisDecodedOperand *other = &ops[store];
    u64 k = (disp - GS_OFFSET(bt_shared.kept_address)) / 8;

    if (zi->mnemonic != ZYDIS_MNEMONIC_MOV || other->size != 64 ||
        disp != GS_OFFSET(bt_shared.kept_address) + 8 * k || k >= BT_BORROWED ||
        !is_register(other, borrowed_reg(a, (unsigned)k)))
        return refuse(a, "a kept address of another's");
    if (store && a->known.borrowed[k].guest)
        return refuse(a, "a guest's value kept as an address");
    return true;
}

/* An access by a register that may hold a host address, of what it was checked for. */
static bool audit_access(struct audit *a, s64 disp, u64 size, bool write,
                         const struct address *allowed)
{
    if (allowed->guest)
        return refuse(a, "an access without a check");
    if (disp < 0 || (u64)disp + size > allowed->size)
        return refuse(a, "an access beyond its check");
    if (write && !allowed->write)
        return refuse(a, "a store checked for loads");
    return true;
}

/* BT, BTS, BTR and BTC of memory: whether the bit is one of the operand. */
static bool is_bit_inside(const struct audit *a, const ZydisDecodedInstruction *zi,
                          const ZydisDecodedOperand *ops)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
        return ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ||
               (is_register(&ops[1], S2) && a->known.s2_below && a->known.s2_below <= ops[0].size);
    default:
        return true;
    }
}

static bool audit_memory(struct audit *a, const ZydisDecodedInstruction *zi,
                         const ZydisDecodedOperand *ops, const ZydisDecodedOperand *op)
{
    const ZydisDecodedOperandMem *m = &op->mem;
    s64 disp = m->disp.has_displacement ? m->disp.value : 0;
    u64 size = op->size / 8;
    unsigned k;

    if (m->type == ZYDIS_MEMOP_TYPE_AGEN || zi->mnemonic == ZYDIS_MNEMONIC_PREFETCHT0)
        return true; /* it's no access */
    if (m->type != ZYDIS_MEMOP_TYPE_MEM || !size)
        return refuse(a, "an operand without a size");
    if (zi->address_width != 64)
        return refuse(a, "a 32-bit address");
    if (!is_bit_inside(a, zi, ops))
        return refuse(a, "a bit outside of its operand");
    if (m->segment == ZYDIS_REGISTER_GS) {
        if ((is_direct_block(a) && direct_is_look(&a->known.direct, zi, m)) ||
            ((a->b->mode & BT_MODE_DIRECT) && direct_is_stack_look(&a->known.direct, zi, m)))
            return size == 1 && !writes(op) ? true : refuse(a, "no look into the map");
        if (m->base == ZYDIS_REGISTER_NONE && m->index == ZYDIS_REGISTER_NONE &&
            is_kept_address((u64)disp, size))
            return audit_kept(a, zi, ops, (u64)disp);
        if (m->base == ZYDIS_REGISTER_NONE && m->index == ZYDIS_REGISTER_NONE)
            return disp >= 0 && is_field((u64)disp, size, writes(op))
                       ? true
                       : refuse(a, "a field that isn't the code's");
        if (m->base == ZYDIS_REGISTER_NONE && m->index == ZYDIS_REGISTER_R15 && m->scale == 4) {
            bool jump = zi->mnemonic == ZYDIS_MNEMONIC_JMP;
            u64 want = jump ? GS_OFFSET(bt_shared.jump[0].code) : GS_OFFSET(bt_shared.jump[0].tag);

            if (a->known.s2 != S2_SLOT || (u64)disp != want || size != 8 || writes(op) ||
                (!jump && zi->mnemonic != ZYDIS_MNEMONIC_CMP))
                return refuse(a, "no look into the jump cache");
            return true;
        }
        if (m->base == ZYDIS_REGISTER_R15 && m->index == ZYDIS_REGISTER_NONE) {
            enum tlb_field f = tlb_field(a, (u64)disp);

            if (a->known.s2 != S2_INDEX || !f || size != 8 || writes(op))
                return refuse(a, "no look into the TLB");
            if (f == TLB_FIELD_HOST && (zi->mnemonic != ZYDIS_MNEMONIC_ADD ||
                                        a->known.s1 != S1_CHECKED || !is_register(&ops[0], S1)))
                return refuse(a, "a host address without a check");
            if (f != TLB_FIELD_HOST && zi->mnemonic != ZYDIS_MNEMONIC_XOR)
                return refuse(a, "a tag that isn't compared");
            return true;
        }
        return refuse(a, "an address off GS");
    }
    if (m->segment == ZYDIS_REGISTER_FS)
        return refuse(a, "an address off FS");
    if (is_direct_block(a) && size <= 64 && direct_allows(&a->known.direct, m))
        return true;
    if ((a->b->mode & BT_MODE_DIRECT) && direct_allows_stack(&a->known.direct, m))
        return true;
    if (is_direct_block(a) && zi->mnemonic == ZYDIS_MNEMONIC_LEAVE)
        return direct_allows_leave(&a->known.direct) ? true
                                                     : refuse(a, "an access without a check");
    if (m->index != ZYDIS_REGISTER_NONE)
        return refuse(a, "an address that isn't S1's");
    if (m->base == ZYDIS_REGISTER_R14) {
        struct address s1 = {a->known.s1 != S1_HOST, a->known.write, a->known.size};

        return audit_access(a, disp, size, writes(op), &s1);
    }
    k = which_borrowed(a, m->base);
    if (k == BT_BORROWED)
        return refuse(a, "an address that isn't S1's");
    return audit_access(a, disp, size, writes(op), &a->known.borrowed[k]);
}

/* S2 is another number now: a check under way is off. */
static void set_s2(struct known *k, enum s2 s2)
{
    k->s2 = (u8)s2;
    k->s2_below = 0;
    if (k->s1 != S1_HOST)
        k->s1 = S1_ANY;
}

/* The steps of a check, and what makes S2 an index. True: it is one, and a->known is as after it. */
static bool take_step(struct audit *a, const ZydisDecodedInstruction *zi,
                      const ZydisDecodedOperand *ops)
{
    struct known *k = &a->known;
    bool to_s1 = is_register(&ops[0], S1) && ops[0].size == 64;
    bool memory = zi->operand_count_visible > 1 && ops[1].type == ZYDIS_OPERAND_TYPE_MEMORY;

    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_AND:
        if (!is_register(&ops[0], S2) || ops[0].size != 32 ||
            ops[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || ops[1].imm.value.u > INT32_MAX)
            return false;
        set_s2(k, ops[1].imm.value.u == (TLB_SIZE - 1) << 5 ? S2_INDEX
                  : ops[1].imm.value.u == JUMP_MASK         ? S2_SLOT
                                                            : S2_ANY);
        k->s2_below = ops[1].imm.value.u + 1;
        return true;
    case ZYDIS_MNEMONIC_XOR:
        if (!to_s1 || !memory || ops[1].mem.base != ZYDIS_REGISTER_R15 || k->s1 == S1_HOST)
            return false;
        k->s1 = S1_XORED;
        k->write = tlb_field(a, (u64)ops[1].mem.disp.value) == TLB_FIELD_WRITE;
        return true;
    case ZYDIS_MNEMONIC_CMP:
        if (!to_s1 || k->s1 != S1_XORED || ops[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE ||
            ops[1].imm.value.u >= GUEST_PAGE_SIZE)
            return false;
        k->s1 = S1_COMPARED;
        k->size = (u32)(GUEST_PAGE_SIZE - ops[1].imm.value.u);
        return true;
    case ZYDIS_MNEMONIC_ADD:
        if (!to_s1 || !memory || ops[1].mem.base != ZYDIS_REGISTER_R15)
            return false;
        k->s1 = S1_HOST;
        return true;
    default:
        return false;
    }
}

static bool take_store(struct audit *a, const ZydisDecodedOperand *ops)
{
    struct known *known = &a->known;
    u64 disp = (u64)ops[0].mem.disp.value;

    if (is_kept_address(disp, ops[0].size / 8)) {
        unsigned k = which_borrowed(a, ops[1].reg.value); /* audit_kept saw to it */

        known->kept[k] = known->borrowed[k];
        return true;
    }
    if (disp == GS_OFFSET(bt_shared.temp) && is_register(&ops[1], S2) && ops[0].size == 64) {
        known->temp_below = known->s2_below;
        return true;
    }
    if (disp == GS_OFFSET(bt_shared.site) && ops[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE &&
        ops[0].size == 32) {
        known->site = (u32)ops[1].imm.value.u + 1;
        return true;
    }
    return false;
}

/* What moves of host addresses to and from borrowed registers make known; those of v->bt_shared.temp;
 * and of the site's number. */
static bool take_move(struct audit *a, const ZydisDecodedInstruction *zi,
                      const ZydisDecodedOperand *ops)
{
    struct known *known = &a->known;
    unsigned k;

    if (zi->mnemonic != ZYDIS_MNEMONIC_MOV)
        return false;
    if (is_gs(&ops[0]))
        return take_store(a, ops);
    if (ops[0].type != ZYDIS_OPERAND_TYPE_REGISTER || ops[0].size != 64)
        return false;
    if (is_register(&ops[0], S2) && is_gs(&ops[1]) &&
        ops[1].mem.disp.value == GS_OFFSET(bt_shared.temp)) {
        set_s2(known, S2_ANY);
        known->s2_below = known->temp_below;
        return true;
    }
    k = which_borrowed(a, ops[0].reg.value);
    if (k == BT_BORROWED)
        return false;
    if (is_gs(&ops[1]) && is_kept_address((u64)ops[1].mem.disp.value, 8)) {
        known->borrowed[k] = known->kept[k];
        return true;
    }
    if (is_register(&ops[1], S1) && known->s1 == S1_HOST && known->size) {
        known->borrowed[k] = (struct address){.write = known->write, .size = known->size};
        return true;
    }
    return false;
}

/* Whether a write may leave something of the register as it was. */
static bool keeps_part(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *op)
{
    return writes(op) && (op->size < 32 || !(op->actions & ZYDIS_OPERAND_ACTION_WRITE) ||
                          zi->mnemonic == ZYDIS_MNEMONIC_BSF || zi->mnemonic == ZYDIS_MNEMONIC_BSR);
}

/* Whether an instruction that is no step makes anything of what a register holds. */
static bool uses(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *op, u8 number)
{
    if (is_register(op, number))
        return reads(op) || keeps_part(zi, op);
    return op->type == ZYDIS_OPERAND_TYPE_MEMORY && op->mem.type == ZYDIS_MEMOP_TYPE_AGEN &&
           (is_part_of(op->mem.base, number) || is_part_of(op->mem.index, number));
}

static bool overwrites(const ZydisDecodedOperand *op, u64 from, u64 size)
{
    u64 disp = (u64)op->mem.disp.value;

    return is_gs(op) && writes(op) && disp + op->size / 8 > from && disp < from + size;
}

/* What an instruction that is no step does to S1, S2, the borrowed registers and the site's number. */
static bool forget(struct audit *a, const ZydisDecodedInstruction *zi,
                   const ZydisDecodedOperand *ops)
{
    struct known *known = &a->known;
    bool s1 = false, s2 = false, guest[BT_BORROWED] = {false};

    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &ops[n];

        if (known->s1 == S1_HOST && uses(zi, op, S1))
            return refuse(a, "a host address is read");
        s1 |= is_register(op, S1) && writes(op);
        s2 |= is_register(op, S2) && writes(op);
        for (unsigned k = 0; k < BT_BORROWED; k++) {
            if (!known->borrowed[k].guest && uses(zi, op, borrowed_reg(a, k)))
                return refuse(a, "a host address is read");
            guest[k] |= is_register(op, borrowed_reg(a, k)) && writes(op);
        }
        if (overwrites(op, GS_OFFSET(bt_shared.site), sizeof(u32)))
            known->site = 0;
        if (overwrites(op, GS_OFFSET(bt_shared.temp), sizeof(u64)))
            known->temp_below = 0;
    }
    /* The step from the comparison to the jump bears nothing in between. */
    if (s1 || known->s1 == S1_COMPARED) {
        known->s1 = S1_ANY;
        known->write = false;
        known->size = 0;
    }
    if (s2)
        set_s2(known, S2_ANY);
    for (unsigned k = 0; k < BT_BORROWED; k++)
        if (guest[k])
            known->borrowed[k] = (struct address){.guest = true};
    return true;
}

static bool audit_branch(struct audit *a, const ZydisDecodedInstruction *zi,
                         const ZydisDecodedOperand *ops, bool *goes_on)
{
    bool jump = zi->mnemonic == ZYDIS_MNEMONIC_JMP;

    *goes_on = !jump;
    if (!jump && zi->meta.category != ZYDIS_CATEGORY_COND_BR)
        return refuse(a, "a branch of another kind");
    for (unsigned n = 0; n < zi->operand_count; n++) /* JRCXZ, LOOP */
        if (is_general(&ops[n]))
            return refuse(a, jump ? "an indirect branch" : "a branch of another kind");
    if (ops[0].type == ZYDIS_OPERAND_TYPE_MEMORY)
        return jump && ops[0].mem.index == ZYDIS_REGISTER_R15 /* the jump cache */
                   ? all_guest(a) && audit_stack(a)
                   : refuse(a, "an indirect branch");
    if (ops[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !ops[0].imm.is_relative)
        return refuse(a, "an indirect branch");
    if (!add_target(a, a->next + (u32)ops[0].imm.value.s))
        return false;
    if (a->known.s1 == S1_COMPARED)
        a->known.s1 = zi->mnemonic == ZYDIS_MNEMONIC_JNBE ? S1_CHECKED : S1_ANY;
    return true;
}

static bool audit_insn(struct audit *a, const ZydisDecodedInstruction *zi,
                       const ZydisDecodedOperand *ops, bool *goes_on)
{
    *goes_on = true;
    if (is_forbidden(zi) && !is_direct_stack(a, zi) &&
        !(is_direct_block(a) && direct_allows_string(&a->known.direct, zi)))
        return refuse(a, "an instruction that code must not have");
    for (unsigned n = 0; n < zi->operand_count; n++) {
        if (ops[n].type == ZYDIS_OPERAND_TYPE_MEMORY && !audit_memory(a, zi, ops, &ops[n]))
            return false;
        if (ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
            ZydisRegisterGetClass(ops[n].reg.value) == ZYDIS_REGCLASS_SEGMENT)
            return refuse(a, "a segment register");
    }
    if (zi->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE
            ? !audit_branch(a, zi, ops, goes_on)
            : !take_step(a, zi, ops) && !take_move(a, zi, ops) && !forget(a, zi, ops))
        return false;
    direct_known_after(&a->known.direct, zi, ops);
    return true;
}

static bool audit_half(struct audit *a, u32 from, u32 to, u8 *starts)
{
    bool reached = false;

    if (to - from > MAX_CODE)
        return refuse(a, "too much code");
    for (a->at = from; a->at < to;) {
        ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
        ZydisDecodedInstruction zi;

        if (ZYAN_FAILED(
                ZydisDecoderDecodeFull(&a->decoder, a->bt->writable + a->at, to - a->at, &zi, ops)))
            return refuse(a, "no instruction");
        starts[(a->at - from) / 8] |= (u8)(1 << (a->at - from) % 8);
        a->next = a->at + zi.length;
        reached = join(a, reached);
        if (!reached)
            a->unreached = a->at;
        else if (!audit_insn(a, &zi, ops, &reached))
            return false;
        a->at = a->next;
    }
    return !reached || refuse(a, "its end is run over");
}

static bool is_start(const struct audit *a, u32 at)
{
    u32 n = in_hot(a, at) ? at - a->b->start.hot : at - a->b->start.cold;

    if (!in_hot(a, at) && !in_cold(a, at))
        return false;
    return a->starts[!in_hot(a, at)][n / 8] >> n % 8 & 1;
}

static bool ends_a_branch(const struct audit *a, u32 end)
{
    for (unsigned n = 0; n < a->ntargets; n++)
        if (a->targets[n].end == end)
            return true;
    return false;
}

static bool audit_targets(struct audit *a)
{
    const struct bt_block *b = a->b;
    const u32 entries[] = {b->jump_entry,    b->memory_entry, b->host_entry,
                           b->memory_native, b->host_native,  b->fault};

    for (unsigned n = 0; n < a->ntargets; n++) {
        a->at = a->targets[n].to;
        if (!is_start(a, a->at))
            return refuse(a, "a branch into an instruction");
    }
    for (unsigned n = 0; n < ARRAY_SIZE(entries); n++) {
        a->at = entries[n];
        if (!is_way_out(a, a->at) && !is_start(a, a->at))
            return refuse(a, "an entry into an instruction");
    }
    for (unsigned k = 0; k < BT_BORROWED; k++)
        if (b->perm[2 + k] != NO_REG && is_way_out(a, b->fault))
            return refuse(a, "a host address goes out");
    for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++) {
        const struct bt_exit *e = &a->bt->exits[n];
        const u32 ways[] = {e->stub, e->bridge};

        a->at = e->at;
        if (!ends_a_branch(a, e->at + 4) || (e->at2 && !ends_a_branch(a, e->at2 + 4)))
            return refuse(a, "an exit without a branch");

        for (unsigned k = 0; k < ARRAY_SIZE(ways); k++) {
            a->at = ways[k];
            if (!in_cold(a, a->at) || !is_start(a, a->at))
                return refuse(a, "an exit into an instruction");
        }
    }
    return true;
}

bool bt_audit(const struct bt *bt, const struct bt_block *b, const u32 sites[2],
              struct bt_fault_found *found)
{
    static _Thread_local struct audit audit;
    struct audit *a = &audit;
    bool fine = true;

    memset(a, 0, sizeof(*a));
    a->bt = bt;
    a->b = b;
    a->sites = sites;
    ZydisDecoderInit(&a->decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    a->changed = true;
    for (unsigned round = 0; fine && a->changed; round++) {
        /* The first finds what branches there are; so none is without a change. */
        a->changed = round == 0;
        a->unreached = 0;
        fine = audit_half(a, b->start.hot, b->hot_end, a->starts[0]) &&
               audit_half(a, b->start.cold, b->cold_end, a->starts[1]) &&
               (round < MAX_ROUNDS || refuse(a, "no end of changes"));
    }
    if (fine && a->unreached) {
        a->at = a->unreached;
        fine = refuse(a, "code that nothing leads to");
    }
    fine = fine && audit_targets(a);
    *found = (struct bt_fault_found){a->at, a->what};
    return fine;
}
