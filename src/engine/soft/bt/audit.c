/*
 * Is translated code harmless? Each instruction of a block is decoded by Zydis and held against this, which
 * is all that keeps a guest inside its own memory:
 *
 *  1. A memory operand is one of
 *      gs:[disp]           within a field of struct soft_vcpu that code may read, or write;
 *      gs:[S2 * 8 + disp]  an entry of the jump cache, S2 being a 16-bit number;
 *      gs:[S2 + disp]      a tag or host address of the TLB that the block's mode uses, S2 being a
 *                          masked index;
 *      [S1 + n]            behind a check for n and the operand's size, for a write where it writes.
 *     Anything else, implied operands too, is refused: so there is no PUSH, CALL or string instruction.
 *  2. A check is: XOR of S1 with a tag, CMP of S1 with 4096 less the size, JA, and ADD of the host address
 *     from the same entry; neither S1 nor S2 is changed between. That S1 was a linear address, and S2 its
 *     index, need not be known: if the XOR leaves an offset in a page, S1 was an address in the page
 *     that the entry is for.
 *  3. From the ADD on S1 is a host address, and nothing reads it but as the base of an address, until it is
 *     written anew. So no host address gets to where the guest sees it. Nor does anything read one from
 *     struct soft_vcpu.
 *  4. A branch leads to an instruction of the block or to one of the ways out in glue.c; only the jump
 *     cache is jumped through. The end isn't run over. What is known of S1 and S2 where branches lead is what
 *     is known at all of them; at an entry, nothing.
 *  5. No system call, interrupt, privileged instruction, and none that sees or changes a segment.
 *
 * Branches also lead backward, from cold code, so the block is gone over until nothing new is known.
 */
#include "engine/soft/bt/audit.h"

#include "engine/soft/bt/asm.h"
#include "engine/soft/decode.h"

#include <stdlib.h>

#define MAX_CODE KIB(64) /* of a half of a block */
#define MAX_TARGETS 1024
#define MAX_ROUNDS 16

/* S1_HOST with a size of 0: nobody knows what it is, so it may be a host address. */
enum s1 { S1_ANY, S1_XORED, S1_COMPARED, S1_CHECKED, S1_HOST };
enum s2 { S2_ANY, S2_NUMBER16, S2_INDEX };

/* What is known of the scratch registers. */
struct known {
    u8 s1; /* enum s1 */
    u8 s2; /* enum s2 */
    bool write;
    u32 size; /* from S1_COMPARED on: bytes that the check is for */
};

static const struct known nothing_known = {.s1 = S1_HOST};

struct target {
    u32 from, to;
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
    u8 starts[2][MAX_CODE / 8]; /* bits: where instructions start, in the hot and the cold half */
    u32 at;
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
    FIELD(cpu.seg, false),
    FIELD(cpu.fip, true),
    FIELD(cpu.fdp, true),
    FIELD(cpu.fcs, true),
    FIELD(cpu.fds, true),
    FIELD(cpu.fop, true),
    FIELD(fpu_live, false),
    FIELD(aflags, true),
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
    return at >= a->b->hot && at < a->b->hot_end;
}
static bool in_cold(const struct audit *a, u32 at)
{
    return at >= a->b->cold && at < a->b->cold_end;
}

static bool is_way_out(const struct audit *a, u32 at)
{
    for (unsigned reason = 0; reason <= BT_FAULT; reason++)
        if (at == a->bt->glue[reason])
            return true;
    return false;
}

static bool same_known(const struct known *x, const struct known *y)
{
    return x->s1 == y->s1 && x->s2 == y->s2 && x->write == y->write && x->size == y->size;
}

static bool add_target(struct audit *a, u32 to)
{
    if (is_way_out(a, to))
        return true;
    if (!in_hot(a, to) && !in_cold(a, to))
        return refuse(a, "a branch out of the block");
    for (unsigned n = 0; n < a->ntargets; n++) {
        struct target *t = &a->targets[n];

        if (t->from != a->at)
            continue;
        a->changed |= !same_known(&t->known, &a->known);
        t->known = a->known;
        return true;
    }
    if (a->ntargets == MAX_TARGETS)
        return refuse(a, "too many branches");
    a->targets[a->ntargets++] = (struct target){a->at, to, a->known};
    a->changed = true;
    return true;
}

static bool is_entry(const struct audit *a, u32 at)
{
    const struct bt_block *b = a->b;

    if (at == b->jump_entry || at == b->memory_entry || at == b->host_entry ||
        at == b->memory_native || at == b->host_native || at == b->fault)
        return true;
    for (u32 n = a->sites[0]; n < a->sites[1]; n++)
        if (a->bt->sites[n].resume == at)
            return true;
    return false;
}

/* What is known before the instruction at a->at, when `reached` says whether the one before goes on. */
static bool join(struct audit *a, bool reached)
{
    if (is_entry(a, a->at)) {
        a->known = nothing_known;
        return true;
    }
    for (unsigned n = 0; n < a->ntargets; n++) {
        const struct target *t = &a->targets[n];

        if (t->to != a->at)
            continue;
        if (!reached)
            a->known = t->known;
        else if (!same_known(&a->known, &t->known))
            a->known = nothing_known;
        reached = true;
    }
    if (!reached)
        a->known = nothing_known;
    return reached || a->changed || refuse(a, "code that nothing leads to");
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

static bool is_register(const ZydisDecodedOperand *op, unsigned number)
{
    if (op->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    switch (ZydisRegisterGetClass(op->reg.value)) {
    case ZYDIS_REGCLASS_GPR64:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR16:
        return ZydisRegisterGetId(op->reg.value) == (ZyanI8)number;
    case ZYDIS_REGCLASS_GPR8:
        return op->reg.value == (number == S1 ? ZYDIS_REGISTER_R14B : ZYDIS_REGISTER_R15B);
    default:
        return false;
    }
}

static bool reads(const ZydisDecodedOperand *op)
{
    return op->actions & ZYDIS_OPERAND_ACTION_MASK_READ;
}
static bool writes(const ZydisDecodedOperand *op)
{
    return op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
}

static bool audit_memory(struct audit *a, const ZydisDecodedInstruction *zi,
                         const ZydisDecodedOperand *ops, const ZydisDecodedOperand *op)
{
    const ZydisDecodedOperandMem *m = &op->mem;
    s64 disp = m->disp.has_displacement ? m->disp.value : 0;
    u64 size = op->size / 8;

    if (m->type == ZYDIS_MEMOP_TYPE_AGEN)
        return true;
    if (m->type != ZYDIS_MEMOP_TYPE_MEM || !size)
        return refuse(a, "an operand without a size");
    if (zi->address_width != 64)
        return refuse(a, "a 32-bit address");
    if (m->segment == ZYDIS_REGISTER_GS) {
        if (m->base == ZYDIS_REGISTER_NONE && m->index == ZYDIS_REGISTER_NONE)
            return disp >= 0 && is_field((u64)disp, size, writes(op))
                       ? true
                       : refuse(a, "a field that isn't the code's");
        if (m->base == ZYDIS_REGISTER_NONE && m->index == ZYDIS_REGISTER_R15 && m->scale == 8) {
            bool jump = zi->mnemonic == ZYDIS_MNEMONIC_JMP;
            u64 want = jump ? GS_OFFSET(bt_shared.jump_code) : GS_OFFSET(bt_shared.jump_tag);

            if (a->known.s2 != S2_NUMBER16 || (u64)disp != want || size != 8 || writes(op) ||
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
    if (m->base != ZYDIS_REGISTER_R14 || m->index != ZYDIS_REGISTER_NONE)
        return refuse(a, "an address that isn't S1's");
    if (a->known.s1 != S1_HOST)
        return refuse(a, "an access without a check");
    if (disp < 0 || (u64)disp + size > a->known.size)
        return refuse(a, "an access beyond its check");
    if (writes(op) && !a->known.write)
        return refuse(a, "a store checked for loads");
    return true;
}

/* S2 is another number now: a check under way is off. */
static void set_s2(struct known *k, enum s2 s2)
{
    k->s2 = (u8)s2;
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
    case ZYDIS_MNEMONIC_MOVZX:
        if (!is_register(&ops[0], S2) || ops[1].type != ZYDIS_OPERAND_TYPE_REGISTER ||
            ops[1].size != 16)
            return false;
        set_s2(k, S2_NUMBER16);
        return true;
    case ZYDIS_MNEMONIC_AND:
        if (!is_register(&ops[0], S2) || ops[0].size != 32 ||
            ops[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE ||
            ops[1].imm.value.u != (TLB_SIZE - 1) << 5)
            return false;
        set_s2(k, S2_INDEX);
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

/* Whether a write may leave something of the register as it was. */
static bool keeps_part(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *op)
{
    return writes(op) && (op->size < 32 || !(op->actions & ZYDIS_OPERAND_ACTION_WRITE) ||
                          zi->mnemonic == ZYDIS_MNEMONIC_BSF || zi->mnemonic == ZYDIS_MNEMONIC_BSR);
}

/* What an instruction that is no step of a check does to S1 and S2. */
static bool forget(struct audit *a, const ZydisDecodedInstruction *zi,
                   const ZydisDecodedOperand *ops)
{
    bool s1 = false, s2 = false;

    for (unsigned n = 0; n < zi->operand_count; n++) {
        if (is_register(&ops[n], S1)) {
            if (a->known.s1 == S1_HOST && (reads(&ops[n]) || keeps_part(zi, &ops[n])))
                return refuse(a, "a host address is read");
            s1 |= writes(&ops[n]);
        } else if (is_register(&ops[n], S2)) {
            s2 |= writes(&ops[n]);
        } else if (ops[n].type == ZYDIS_OPERAND_TYPE_MEMORY &&
                   ops[n].mem.type == ZYDIS_MEMOP_TYPE_AGEN && a->known.s1 == S1_HOST &&
                   (ops[n].mem.base == ZYDIS_REGISTER_R14 ||
                    ops[n].mem.index == ZYDIS_REGISTER_R14)) {
            return refuse(a, "a host address is read");
        }
    }
    /* The step from the comparison to the jump bears nothing in between. */
    if (s1 || a->known.s1 == S1_COMPARED) {
        a->known.s1 = S1_ANY;
        a->known.write = false;
        a->known.size = 0;
    }
    if (s2)
        set_s2(&a->known, S2_ANY);
    return true;
}

static bool audit_branch(struct audit *a, const ZydisDecodedInstruction *zi,
                         const ZydisDecodedOperand *ops, bool *goes_on)
{
    bool jump = zi->mnemonic == ZYDIS_MNEMONIC_JMP;

    *goes_on = !jump;
    if (!jump && zi->meta.category != ZYDIS_CATEGORY_COND_BR)
        return refuse(a, "a branch of another kind");
    if (ops[0].type == ZYDIS_OPERAND_TYPE_MEMORY)
        return jump && ops[0].mem.base == ZYDIS_REGISTER_NONE ? true
                                                              : refuse(a, "an indirect branch");
    if (ops[0].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || !ops[0].imm.is_relative)
        return refuse(a, "an indirect branch");
    if (!add_target(a, (u32)(a->at + zi->length + (u32)ops[0].imm.value.s)))
        return false;
    if (a->known.s1 == S1_COMPARED)
        a->known.s1 = zi->mnemonic == ZYDIS_MNEMONIC_JNBE ? S1_CHECKED : S1_ANY;
    return true;
}

static bool audit_insn(struct audit *a, const ZydisDecodedInstruction *zi,
                       const ZydisDecodedOperand *ops, bool *goes_on)
{
    *goes_on = true;
    if (is_forbidden(zi))
        return refuse(a, "an instruction that code must not have");
    for (unsigned n = 0; n < zi->operand_count; n++) {
        if (ops[n].type == ZYDIS_OPERAND_TYPE_MEMORY && !audit_memory(a, zi, ops, &ops[n]))
            return false;
        if (ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
            ZydisRegisterGetClass(ops[n].reg.value) == ZYDIS_REGCLASS_SEGMENT)
            return refuse(a, "a segment register");
    }
    if (zi->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE)
        return audit_branch(a, zi, ops, goes_on);
    return take_step(a, zi, ops) || forget(a, zi, ops);
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
        if (!join(a, reached) || !audit_insn(a, &zi, ops, &reached))
            return false;
        a->at += zi.length;
    }
    return !reached || refuse(a, "its end is run over");
}

static bool is_start(const struct audit *a, u32 at)
{
    u32 n = in_hot(a, at) ? at - a->b->hot : at - a->b->cold;

    if (!in_hot(a, at) && !in_cold(a, at))
        return false;
    return a->starts[!in_hot(a, at)][n / 8] >> n % 8 & 1;
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
    for (u32 n = b->exits; n < b->exits + b->nexits; n++) {
        const u32 ways[] = {a->bt->exits[n].stub, a->bt->exits[n].bridge};

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
        fine = audit_half(a, b->hot, b->hot_end, a->starts[0]) &&
               audit_half(a, b->cold, b->cold_end, a->starts[1]) &&
               (round < MAX_ROUNDS || refuse(a, "no end of changes"));
    }
    fine = fine && audit_targets(a);
    *found = (struct bt_fault_found){a->at, a->what};
    return fine;
}
