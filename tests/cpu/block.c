/*
 * Random blocks.
 *
 * Registers have parts to play, so that a block gets far before it faults, if it does:
 *  - pointers lie in the window, most of them well inside. RSP is one. Memory operands have a pointer
 *    as their base, or an address that is a constant.
 *  - offsets are small: memory operands have them as their index, and bit strings as theirs.
 *  - one register counts loops, and nothing else ever writes it.
 *  - the others hold anything.
 * A few instructions write pointers and offsets nevertheless, and wherever they point then, both sides
 * get there. What a register holds differs from variant to variant: where accesses cross a page or
 * fault, and which way branches go.
 *
 * What ends: branches go forward, but for loops, whose counter is set right before them. No branch from
 * elsewhere leads into a loop or a function. Functions store nothing but what they push and pop, and
 * leave RSP alone otherwise, so they return to where they were called from.
 */
#include "block.h"

#include "x86/regs.h"

#include <string.h>

#define FLAG_TF BIT(8)
#define FLAG_NT BIT(14)
#define FLAG_AC BIT(18)
#define FLAG_ID BIT(21)
#define FLAGS_ARITH 0x8d5u
#define MXCSR_MASKS 0x1f80u
#define MXCSR_MM BIT(17)

#define RSP_BIT BIT(RSP)

struct maker {
    const struct generator *g;
    bool mode64;
    struct random *r;
    struct block *b;
    u32 pointers, offsets, data; /* sets of registers */
    unsigned counter;
    unsigned function;            /* whose unit is being made */
    unsigned functions;           /* there are */
    unsigned arguments;           /* that every function takes off the stack when it returns */
    unsigned from[FUNCTIONS + 2]; /* the first unit of each; that behind the last */
    unsigned loops[UNITS_MAX];    /* the head of the loop that a unit is in; NO_LOOP */
};
#define NO_LOOP UNITS_MAX

static unsigned below(struct maker *m, u32 n)
{
    return random_below(m->r, n);
}
static bool percent(struct maker *m, u32 n)
{
    return random_percent(m->r, n);
}

/* A register of the set, NO_REGISTER when it is empty. */
static unsigned one_of(struct maker *m, u32 set)
{
    unsigned skip = set ? below(m, (u32)__builtin_popcount(set)) : 0;

    while (set && skip--)
        set &= set - 1;
    return set ? (unsigned)__builtin_ctz(set) : NO_REGISTER;
}

/* --- A small assembler --- */

static struct block_insn *add_insn(struct unit *u)
{
    return &u->insns[u->ninsns++];
}

static void put(struct block_insn *i, unsigned byte)
{
    i->bytes[i->len++] = (u8)byte;
}
static void put32(struct block_insn *i, u32 value)
{
    memcpy(i->bytes + i->len, &value, 4);
    i->len += 4;
}

/* Operand size and REX for an instruction with registers reg and rm, then its opcode. */
static void put_opcode(struct block_insn *i, unsigned size, unsigned opcode, unsigned reg,
                       unsigned rm)
{
    unsigned rex = (size == 8) << 3 | (reg >= 8) << 2 | (rm >= 8);

    if (size == 2)
        put(i, 0x66);
    if (rex)
        put(i, 0x40 | rex);
    if (opcode > 0xff)
        put(i, 0x0f);
    put(i, opcode & 0xff);
}

static struct block_insn *add_modrm(struct unit *u, unsigned size, unsigned opcode, unsigned reg,
                                    unsigned rm)
{
    struct block_insn *i = add_insn(u);

    put_opcode(i, size, opcode, reg, rm);
    put(i, 0xc0 | (reg & 7) << 3 | (rm & 7));
    return i;
}

/* reg, [base + disp]: disp fits into a byte. */
static void add_based(struct unit *u, unsigned size, unsigned opcode, unsigned reg, unsigned base,
                      int disp)
{
    struct block_insn *i = add_insn(u);

    put_opcode(i, size, opcode, reg, base);
    put(i, 0x40 | (reg & 7) << 3 | (base & 7));
    if ((base & 7) == 4)
        put(i, 0x24);
    put(i, (u8)disp);
}

static unsigned word(const struct maker *m)
{
    return m->mode64 ? 8 : 4;
}

/* 4 bytes, or the mode's own size. */
static unsigned some_size(struct maker *m)
{
    return percent(m, 50) ? 4 : word(m);
}

static void add_push(struct unit *u, unsigned reg)
{
    put_opcode(add_insn(u), 4, 0x50 | (reg & 7), 0, reg);
}
static void add_pop(struct unit *u, unsigned reg)
{
    put_opcode(add_insn(u), 4, 0x58 | (reg & 7), 0, reg);
}

static struct block_insn *add_push_constant(struct unit *u, u32 value)
{
    struct block_insn *i = add_insn(u);

    put(i, 0x68);
    put32(i, value);
    return i;
}

/* MOV reg, value: the register's upper half becomes zero. */
static struct block_insn *add_constant(struct unit *u, unsigned reg, u32 value)
{
    struct block_insn *i = add_insn(u);

    put_opcode(i, 4, 0xb8 | (reg & 7), 0, reg);
    put32(i, value);
    return i;
}

/* LOOPNE, LOOPE, LOOP, JRCXZ */
static bool is_short_only(const struct block_insn *i)
{
    return (i->bytes[0] & 0xfc) == 0xe0;
}

static void add_jump(struct maker *m, struct unit *u, unsigned opcode, unsigned target)
{
    struct block_insn *i = add_insn(u);

    put(i, opcode);
    put(i, 0);
    i->fix = FIX_JUMP;
    i->far = !is_short_only(i) && percent(m, 30);
    i->target = (u16)target;
}

/* Puts a unit's or function's address into a register. */
static void add_code_address(struct maker *m, struct unit *u, unsigned reg, unsigned target)
{
    struct block_insn *i;

    if (m->mode64 && percent(m, 60)) {
        i = add_insn(u);
        put_opcode(i, 8, 0x8d, reg, 0);
        put(i, (reg & 7) << 3 | 5);
        i->fix = FIX_CODE_RIP;
        i->at = i->len;
        put32(i, 0);
    } else {
        i = add_constant(u, reg, 0);
        i->fix = FIX_CODE;
        i->at = i->len - 4u;
    }
    i->target = (u16)target;
}

/* --- Random instructions --- */

/* Of all widths, AH to BH included. */
static int gpr_of(ZydisRegister reg)
{
    int id;

    if (ZydisRegisterGetClass(reg) != ZYDIS_REGCLASS_GPR8)
        return gpr_number(reg);
    id = ZydisRegisterGetId(reg);
    return id < 4 ? id : id - 4;
}

static u32 written(const struct candidate *c)
{
    u32 set = 0;

    /* With REX.B it is XCHG R8, RAX, whatever the decoder says. */
    if (c->zi.mnemonic == ZYDIS_MNEMONIC_PAUSE && c->zi.raw.rex.B)
        return (u32)(BIT(RAX) | BIT(8));
    for (unsigned n = 0; n < c->zi.operand_count; n++) {
        const ZydisDecodedOperand *op = &c->ops[n];

        if (op->type == ZYDIS_OPERAND_TYPE_REGISTER &&
            (op->actions & (ZYDIS_OPERAND_ACTION_WRITE | ZYDIS_OPERAND_ACTION_CONDWRITE)) &&
            gpr_of(op->reg.value) >= 0)
            set |= (u32)BIT(gpr_of(op->reg.value));
    }
    return set;
}

static bool writes_segment(const struct candidate *c)
{
    for (unsigned n = 0; n < c->zi.operand_count; n++) {
        const ZydisDecodedOperand *op = &c->ops[n];

        if (op->type == ZYDIS_OPERAND_TYPE_REGISTER &&
            (op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) &&
            ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_SEGMENT)
            return true;
    }
    return false;
}

/* Mostly faults with what registers happen to hold, or sets what later ones mostly fault with. */
static bool is_unlikely(const ZydisDecodedInstruction *zi)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
    case ZYDIS_MNEMONIC_BOUND:
    case ZYDIS_MNEMONIC_RDPKRU:
    case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_LEAVE:
    case ZYDIS_MNEMONIC_ENTER:
    case ZYDIS_MNEMONIC_FLDCW:
    case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
        return true;
    default:
        break;
    }
    switch (zi->meta.category) {
    case ZYDIS_CATEGORY_IO:
    case ZYDIS_CATEGORY_IOSTRINGOP:
        return true;
    default:
        return zi->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED;
    }
}

/* Units of their own load these with what is good for the instructions after them. */
static bool is_left_to_units(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_VLDMXCSR:
        return true;
    default:
        return false;
    }
}

/* Whether the memory operand is where it should be; *stores: it, or an implicit one, is written. */
static bool addresses_well(struct maker *m, const struct candidate *c, bool *stores)
{
    bool bit_string =
        c->ops[1].type == ZYDIS_OPERAND_TYPE_REGISTER &&
        (c->zi.mnemonic == ZYDIS_MNEMONIC_BT || c->zi.mnemonic == ZYDIS_MNEMONIC_BTS ||
         c->zi.mnemonic == ZYDIS_MNEMONIC_BTR || c->zi.mnemonic == ZYDIS_MNEMONIC_BTC);

    *stores = false;
    for (unsigned n = 0; n < c->zi.operand_count; n++) {
        const ZydisDecodedOperandMem *mem = &c->ops[n].mem;
        int base = gpr_number(mem->base), index = gpr_number(mem->index);

        if (c->ops[n].type != ZYDIS_OPERAND_TYPE_MEMORY)
            continue;
        *stores |= (c->ops[n].actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
        if (mem->type == ZYDIS_MEMOP_TYPE_AGEN)
            continue;
        if (mem->type == ZYDIS_MEMOP_TYPE_VSIB || c->zi.address_width == 16)
            return false;
        if (base >= 0 && !(m->pointers & BIT(base)))
            return false;
        if (index >= 0 && !(m->offsets & BIT(index)))
            return false;
        if (bit_string && !(m->offsets & BIT(gpr_number(c->ops[1].reg.value))))
            return false;
    }
    return true;
}

/* They write RSP, but it is a pointer still. Not so POP RSP. */
static bool is_push_or_pop(const struct candidate *c)
{
    if (c->zi.meta.category == ZYDIS_CATEGORY_POP)
        return c->ops[0].type != ZYDIS_OPERAND_TYPE_REGISTER || gpr_of(c->ops[0].reg.value) != RSP;
    return c->zi.meta.category == ZYDIS_CATEGORY_PUSH;
}

/* Outside 64-bit mode, FS and GS are null selectors. */
static bool uses_null_segment(const struct maker *m, const ZydisDecodedInstruction *zi)
{
    return !m->mode64 &&
           (zi->attributes & (ZYDIS_ATTRIB_HAS_SEGMENT_FS | ZYDIS_ATTRIB_HAS_SEGMENT_GS));
}

static bool is_wanted(struct maker *m, const struct candidate *c)
{
    u32 writes = written(c);
    bool stores, rare = below(m, 200) == 0;

    if (is_left_to_units(c->zi.mnemonic) || (writes & BIT(m->counter)))
        return false;
    if (!addresses_well(m, c, &stores))
        return false;
    if (m->function && (stores || (writes & RSP_BIT)))
        return false;
    if (is_push_or_pop(c))
        writes &= ~(u32)RSP_BIT;
    return rare || !((writes & (m->pointers | m->offsets)) || writes_segment(c) ||
                     is_unlikely(&c->zi) || uses_null_segment(m, &c->zi));
}

/* A displacement for an operand of `size` bytes that its base points near to. */
static s32 random_displacement(struct maker *m, unsigned size, unsigned bits)
{
    s32 range = bits == 8 ? 128 : 384;
    s32 value = (s32)below(m, 2 * (u32)range) - range;

    return percent(m, size >= 16 ? 85 : 50) ? value & -(s32)MIN(MAX(size, 8u), 64u) : value;
}

/* Makes the memory operand's displacement good. */
static void place_operand(struct maker *m, const struct candidate *c, struct block_insn *i)
{
    for (unsigned n = 0; n < c->zi.operand_count; n++) {
        const ZydisDecodedOperandMem *mem = &c->ops[n].mem;
        unsigned size = c->ops[n].size / 8;
        u64 value = WINDOW + below(m, 2 * PAGE - 64);

        if (c->ops[n].type != ZYDIS_OPERAND_TYPE_MEMORY || !c->zi.raw.disp.size)
            continue;
        if (percent(m, size >= 16 ? 85 : 50))
            value &= ~63ULL;
        if (mem->base == ZYDIS_REGISTER_RIP || mem->base == ZYDIS_REGISTER_EIP) {
            i->fix = FIX_DATA_RIP;
            i->at = c->zi.raw.disp.offset;
            i->address = (u32)value;
            return;
        }
        if (gpr_number(mem->base) >= 0)
            value = (u64)random_displacement(m, size, c->zi.raw.disp.size);
        memcpy(i->bytes + c->zi.raw.disp.offset, &value, c->zi.raw.disp.size / 8u);
        return;
    }
}

/* How a memory operand shall look: base NO_REGISTER: as random as it may be. */
static struct address random_address(struct maker *m, unsigned base)
{
    struct address a = {(u8)base, NO_REGISTER, (u8)below(m, 4)};

    if (base == NO_REGISTER && percent(m, 88))
        a.base = (u8)one_of(m, m->pointers);
    if (percent(m, 30))
        a.index = (u8)one_of(m, m->offsets);
    return a;
}

enum operand { OPERAND_ANY, OPERAND_MEMORY, OPERAND_REGISTER };

static void add_random(struct maker *m, struct unit *u, enum choice choice, enum operand operand,
                       unsigned base)
{
    struct candidate c;

    for (unsigned attempt = 0; attempt < 400; attempt++) {
        struct address a = random_address(m, base);
        struct block_insn *i;

        if (!generate_candidate(m->g, m->r, choice, &a, &c) || !is_wanted(m, &c))
            continue;
        if (operand != OPERAND_ANY &&
            (operand == OPERAND_MEMORY) !=
                ((c.zi.attributes & ZYDIS_ATTRIB_HAS_MODRM) && c.zi.raw.modrm.mod != 3))
            continue;
        i = add_insn(u);
        memcpy(i->bytes, c.code, c.zi.length);
        i->len = c.zi.length;
        place_operand(m, &c, i);
        return;
    }
}

/* --- Units --- */

static enum choice some_choice(struct maker *m)
{
    return percent(m, 75) ? CHOICE_COMMON : CHOICE_ANY;
}

static void make_plain(struct maker *m, struct unit *u)
{
    add_random(m, u, some_choice(m), OPERAND_ANY, NO_REGISTER);
}

/* Several accesses by one pointer. */
static void make_neighbours(struct maker *m, struct unit *u)
{
    unsigned base = one_of(m, m->pointers), n = 2 + below(m, 4);

    while (n--)
        add_random(m, u, some_choice(m), OPERAND_MEMORY, base);
}

/* Somewhere ahead; found when all units are there. */
#define AHEAD 0xffffu

/* Flags that live across something else, until they are used. */
static void make_flags(struct maker *m, struct unit *u)
{
    unsigned n = below(m, 3);

    add_random(m, u, CHOICE_PRODUCER, OPERAND_ANY, NO_REGISTER);
    while (n--)
        add_random(m, u, CHOICE_MOVE, percent(m, 70) ? OPERAND_MEMORY : OPERAND_ANY, NO_REGISTER);
    if (percent(m, 50))
        add_jump(m, u, 0x70 | below(m, 16), AHEAD);
    else
        add_random(m, u, CHOICE_CONSUMER, OPERAND_ANY, NO_REGISTER);
}

static void make_branch(struct maker *m, struct unit *u)
{
    unsigned a = one_of(m, m->data), b = one_of(m, m->data & ~(u32)BIT(a));
    struct block_insn *i;

    switch (below(m, 12)) {
    case 0:
        add_jump(m, u, 0xeb, AHEAD);
        break;
    case 1: /* JRCXZ */
        add_jump(m, u, 0xe3, AHEAD);
        break;
    case 2:
        add_code_address(m, u, a, AHEAD);
        add_modrm(u, 4, 0xff, 4, a);
        break;
    case 3: /* to one of two places */
        add_code_address(m, u, a, AHEAD);
        add_code_address(m, u, b, AHEAD);
        add_modrm(u, word(m), 0x140 | below(m, 16), a, b);
        add_modrm(u, 4, 0xff, 4, a);
        break;
    case 4:
        if (m->function)
            break;
        i = add_push_constant(u, 0);
        i->fix = FIX_CODE;
        i->at = 1;
        i->target = AHEAD;
        put(add_insn(u), 0xc3);
        break;
    default:
        add_jump(m, u, 0x70 | below(m, 16), AHEAD);
        break;
    }
}

static void make_call(struct maker *m, struct unit *u)
{
    unsigned a = one_of(m, m->data), b = one_of(m, m->data & ~(u32)BIT(a));
    unsigned callees = m->functions - m->function; /* those behind it: nothing recurs */
    unsigned callee, other;

    if (!callees)
        return;
    callee = m->function + 1 + below(m, callees);
    other = m->function + 1 + below(m, callees);
    for (unsigned n = 0; n < m->arguments; n++)
        add_push(u, below(m, m->mode64 ? 16 : 8));
    if (percent(m, 60)) {
        add_jump(m, u, 0xe8, CALLS + callee);
        return;
    }
    add_code_address(m, u, a, CALLS + callee);
    if (percent(m, 60)) {
        add_code_address(m, u, b, CALLS + other);
        add_modrm(u, word(m), 0x140 | below(m, 16), a, b);
    }
    add_modrm(u, 4, 0xff, 2, a);
}

static void make_return(struct maker *m, struct unit *u)
{
    struct block_insn *i = add_insn(u);

    if (!m->arguments) {
        put(i, 0xc3);
        return;
    }
    put(i, 0xc2);
    put(i, m->arguments * word(m));
    put(i, 0);
}

/* Something between PUSH and POP, or in a frame of its own. */
static void make_stack(struct maker *m, struct unit *u)
{
    unsigned reg = one_of(m, m->data), other = below(m, m->mode64 ? 16 : 8);
    bool frame = percent(m, 20) && m->counter != RBP;
    struct block_insn *i;

    if (frame) {
        i = add_insn(u);
        put(i, 0xc8);
        put(i, 8 * below(m, 5));
        put(i, 0);
        put(i, below(m, percent(m, 95) ? 2 : 32));
    } else {
        add_push(u, other);
    }
    /* In a function it could change RBP, and with it where LEAVE finds the stack. */
    if (!m->function)
        add_random(m, u, CHOICE_COMMON, OPERAND_ANY, RSP);
    else if (!frame)
        add_random(m, u, CHOICE_COMMON, OPERAND_REGISTER, NO_REGISTER);
    if (frame)
        put(add_insn(u), 0xc9);
    else
        add_pop(u, reg);
}

static u32 random_flags(struct maker *m)
{
    u32 flags = 0x202 | ((u32)random_next(m->r) & FLAGS_ARITH);

    if (percent(m, 5))
        flags |= EFLAGS_DF;
    if (percent(m, 2))
        flags |= (u32)FLAG_TF;
    if (percent(m, 2))
        flags |= (u32)FLAG_AC;
    if (percent(m, 10))
        flags |= (u32)FLAG_ID;
    return flags;
}

static void make_flags_image(struct maker *m, struct unit *u)
{
    if (percent(m, 50)) {
        put(add_insn(u), 0x9c);
        add_pop(u, one_of(m, m->data));
    } else {
        add_push_constant(u, random_flags(m));
        put(add_insn(u), 0x9d);
    }
}

static void make_mxcsr(struct maker *m, struct unit *u)
{
    u32 value = MXCSR_MASKS | ((u32)random_next(m->r) & 0xe07f);

    if (percent(m, 5))
        value &= ~((u32)random_next(m->r) & MXCSR_MASKS);
    add_push_constant(u, value);
    add_based(u, 4, 0x1ae, 2, RSP, 0);
    add_pop(u, one_of(m, m->data));
}

static void make_division(struct maker *m, struct unit *u)
{
    static const u8 sizes[] = {2, 4, 4, 8};
    unsigned size = MIN(sizes[below(m, 4)], word(m)), divisor = one_of(m, m->data);
    bool is_signed = percent(m, 50);

    if (((m->pointers | m->offsets | BIT(m->counter)) & (BIT(RAX) | BIT(RDX))) || divisor == RDX)
        return;
    if (is_signed) /* CWD, CDQ, CQO */
        put_opcode(add_insn(u), size, 0x99, 0, 0);
    else /* XOR */
        add_modrm(u, 4, 0x31, RDX, RDX);
    if (percent(m, 30))
        add_based(u, size, 0xf7, is_signed ? 7 : 6, one_of(m, m->pointers),
                  (int)below(m, 128) - 64);
    else
        add_modrm(u, size, 0xf7, is_signed ? 7 : 6, divisor);
}

/* Moves a pointer a little. */
static void make_step(struct maker *m, struct unit *u)
{
    unsigned reg = one_of(m, m->function ? m->pointers & ~(u32)RSP_BIT : m->pointers);
    int step = ((int)below(m, 17) - 8) * (percent(m, 80) ? 8 : 1);

    if (reg == NO_REGISTER)
        return;
    switch (below(m, 3)) {
    case 0: /* INC, DEC */
        add_modrm(u, word(m), 0xff, below(m, 2), reg);
        break;
    case 1:
        add_based(u, word(m), 0x8d, reg, reg, step);
        break;
    default: /* ADD, SUB */
        put(add_modrm(u, word(m), 0x83, percent(m, 50) ? 0 : 5, reg), (u8)step);
        break;
    }
}

static bool is_free(const struct maker *m, unsigned reg)
{
    return m->data & BIT(reg);
}

static void make_string(struct maker *m, struct unit *u)
{
    static const u8 opcodes[] = {0xa4, 0xa4, 0xa6, 0xaa, 0xaa, 0xac, 0xae};
    unsigned opcode = opcodes[below(m, ARRAY_SIZE(opcodes))];
    bool uses_source = opcode != 0xaa && opcode != 0xae;
    bool uses_target = opcode != 0xac, stores = opcode == 0xa4 || opcode == 0xaa;
    bool repeat = percent(m, 75) && is_free(m, RCX);
    unsigned size = 1u << below(m, m->mode64 ? 4 : 3);
    struct block_insn *i;

    if ((uses_source && !is_free(m, RSI) && !(m->pointers & BIT(RSI))) ||
        (uses_target && !is_free(m, RDI) && !(m->pointers & BIT(RDI))) ||
        (opcode == 0xac && !is_free(m, RAX)) || (stores && m->function))
        return;
    if (uses_source && (is_free(m, RSI) || percent(m, 30)))
        add_based(u, word(m), 0x8d, RSI, one_of(m, m->pointers), (int)below(m, 128) - 64);
    if (uses_target && (is_free(m, RDI) || percent(m, 30)))
        add_based(u, word(m), 0x8d, RDI, one_of(m, m->pointers), (int)below(m, 128) - 64);
    if (repeat)
        add_constant(u, RCX, below(m, percent(m, 90) ? 24 : 700 / size));
    i = add_insn(u);
    if (percent(m, 4))
        put(i, 0x67);
    if (repeat)
        put(i, percent(m, 60) ? 0xf3 : 0xf2);
    put_opcode(i, size, opcode | (size > 1), 0, 0);
}

static void make_loop_head(struct maker *m, struct unit *u)
{
    if (percent(m, 40)) {
        add_constant(u, m->counter, 1 + below(m, percent(m, 85) ? 6 : 50));
        return;
    }
    /* As many times as another register's low bits say, and once more. */
    add_modrm(u, some_size(m), 0x89, one_of(m, m->data | m->offsets), m->counter);
    put(add_modrm(u, 4, 0x83, 4, m->counter), 3);
    add_modrm(u, 4, 0xff, 0, m->counter);
}

static void make_loop_tail(struct maker *m, struct unit *u, unsigned target)
{
    switch (below(m, m->counter == RCX ? 4 : 3)) {
    case 0:
        add_modrm(u, some_size(m), 0xff, 1, m->counter); /* DEC */
        add_jump(m, u, 0x75, target);
        break;
    case 1:
        put(add_modrm(u, some_size(m), 0x83, 5, m->counter), 1); /* SUB */
        add_jump(m, u, percent(m, 50) ? 0x75 : 0x7f, target);
        break;
    case 2: /* with an access between the flags and their use */
        put(add_modrm(u, some_size(m), 0x83, 0, m->counter), 0xff); /* ADD */
        add_random(m, u, CHOICE_MOVE, OPERAND_ANY, NO_REGISTER);
        add_jump(m, u, 0x75, target);
        break;
    default: /* LOOPNE, LOOPE, LOOP */
        add_jump(m, u, 0xe0 + below(m, 3), target);
        break;
    }
}

typedef void make_fn(struct maker *m, struct unit *u);
static const struct {
    make_fn *make;
    u8 weight;
} makers[] = {
    {make_plain, 40},      {make_neighbours, 12}, {make_flags, 12},   {make_branch, 14},
    {make_call, 5},        {make_stack, 6},       {make_step, 4},     {make_string, 4},
    {make_flags_image, 3}, {make_mxcsr, 1},       {make_division, 2},
};

static struct unit *add_unit(struct maker *m)
{
    struct unit *u = &m->b->units[m->b->nunits];

    *u = (struct unit){.function = (u8)m->function, .partner = (u8)m->b->nunits};
    m->loops[m->b->nunits] = NO_LOOP;
    return u;
}

static void add_random_unit(struct maker *m, unsigned loop)
{
    unsigned choice = below(m, 103), n = 0;
    struct unit *u = add_unit(m);

    while (choice >= makers[n].weight)
        choice -= makers[n++].weight;
    if (m->function && (makers[n].make == make_flags_image || makers[n].make == make_mxcsr))
        return;
    makers[n].make(m, u);
    m->loops[m->b->nunits] = loop;
    if (u->ninsns)
        m->b->nunits++;
}

static void add_loop(struct maker *m)
{
    unsigned head = m->b->nunits, body = 1 + below(m, 7), tail;

    make_loop_head(m, add_unit(m));
    m->b->nunits++;
    while (body--)
        add_random_unit(m, head);
    tail = m->b->nunits;
    make_loop_tail(m, add_unit(m), head + 1);
    m->loops[tail] = head;
    m->b->units[head].partner = (u8)tail;
    m->b->units[tail].partner = (u8)head;
    m->b->nunits++;
}

/* A unit behind `from`, but not in the middle of a loop that `from` is not in. */
static unsigned unit_ahead(struct maker *m, unsigned from, unsigned end)
{
    unsigned to = from + 1 + below(m, MIN(end - from, 8u));

    if (to < end && m->loops[to] != NO_LOOP && m->loops[to] != m->loops[from] &&
        m->loops[to] != from)
        to = m->loops[to];
    return to;
}

/* The end of the block, or a function's return. */
static unsigned last_target(const struct maker *m, unsigned function)
{
    return m->from[function + 1] - (function ? 1 : 0);
}

static void find_targets(struct maker *m)
{
    for (unsigned n = 0; n < m->b->nunits; n++) {
        struct unit *u = &m->b->units[n];

        for (unsigned k = 0; k < u->ninsns; k++) {
            if (u->insns[k].fix && u->insns[k].target == AHEAD)
                u->insns[k].target = (u16)unit_ahead(m, n, last_target(m, u->function));
        }
    }
}

/* --- Registers --- */

static u32 take(struct maker *m, u32 *left, unsigned n)
{
    u32 set = 0;

    while (n--) {
        unsigned reg = one_of(m, *left);

        *left &= ~(u32)BIT(reg);
        set |= (u32)BIT(reg);
    }
    return set;
}

static void choose_registers(struct maker *m)
{
    u32 left = (m->mode64 ? 0xffff : 0xff) & ~(u32)RSP_BIT;

    m->pointers = (u32)RSP_BIT | take(m, &left, m->mode64 ? 2 + below(m, 4) : 2);
    m->offsets = take(m, &left, m->mode64 ? 1 + below(m, 2) : 1);
    m->counter = percent(m, 30) && (left & BIT(RCX)) ? RCX : one_of(m, left);
    m->data = left & ~(u32)BIT(m->counter);
}

static u64 random_pointer(struct maker *m)
{
    unsigned choice = below(m, 100);
    u64 at;

    if (choice < 72) /* well inside */
        return WINDOW + 512 + (below(m, 2 * PAGE - 1024) & ~63u);
    if (choice < 86) /* around the border of two pages */
        return WINDOW + PAGE - 64 + below(m, 128);
    if (choice < 94)
        return WINDOW + 64 + below(m, 2 * PAGE - 128);
    at = WINDOW + below(m, WINDOW_PAGES) * PAGE; /* around the border of any */
    return at - 256 + below(m, 512);
}

static void random_variant(struct maker *m, struct user_state *s)
{
    generate_state(m->g, m->r, s);
    for (unsigned n = 0; n < (m->mode64 ? 16u : 8u); n++) {
        if (m->pointers & BIT(n))
            s->gpr[n] = random_pointer(m);
        if (m->offsets & BIT(n))
            s->gpr[n] = percent(m, 80) ? 16 * below(m, 5) : (u64)((s64)below(m, 96) - 32);
        if (!m->mode64)
            s->gpr[n] = (u32)s->gpr[n];
    }
    if (percent(m, 90))
        s->gpr[RSP] = WINDOW + PAGE + PAGE / 2 + 8 * below(m, 64);
    s->rflags &= ~(u64)FLAG_NT;
    if (percent(m, 60))
        s->rflags &= ~(u64)(FLAG_AC | EFLAGS_DF);
    s->fs_base = s->gs_base;
    s->mxcsr &= ~(u32)MXCSR_MM;
    if (percent(m, 85)) {
        s->mxcsr |= MXCSR_MASKS;
        s->fcw |= 0x3f;
        s->fsw &= 0x7f7f;
    }
}

void block_generate(const struct generator *g, bool mode64, struct random *r, struct block *b)
{
    struct maker maker = {.g = g, .mode64 = mode64, .r = r, .b = b}, *m = &maker;
    unsigned end;

    b->nunits = 0;
    choose_registers(m);
    m->functions = below(m, FUNCTIONS + 1);
    m->arguments = percent(m, 30) ? below(m, 3) : 0;
    end = 6 + below(m, 22);
    while (b->nunits < end) {
        if (percent(m, 8) && b->nunits + 12 < UNITS_MAX / 2)
            add_loop(m);
        else
            add_random_unit(m, NO_LOOP);
    }
    for (m->function = 1; m->function <= m->functions; m->function++) {
        m->from[m->function] = b->nunits;
        end = b->nunits + 1 + below(m, 4);
        while (b->nunits < end)
            add_random_unit(m, NO_LOOP);
        make_return(m, add_unit(m));
        b->units[b->nunits++].fixed = true;
    }
    m->from[m->function] = b->nunits;
    find_targets(m);
    b->place = (u32)random_next(r);
    b->image = (u8)below(m, IMAGES);
    for (unsigned n = 0; n < VARIANTS; n++)
        random_variant(m, &b->before[n]);
}

/* --- Layout --- */

struct layout {
    const struct block *b;
    const bool *alive;
    bool calls[FUNCTIONS + 1];       /* functions that are called, and 0 */
    bool far[UNITS_MAX][UNIT_INSNS]; /* jumps that have their long form */
    unsigned starts[UNITS_MAX];
    unsigned end, size; /* where INT3 is, behind all that is no function's; of everything */
};

static bool is_there(const struct layout *l, unsigned unit)
{
    return l->alive[unit] && l->calls[l->b->units[unit].function];
}

/* What calls a function comes before it. */
static void find_calls(struct layout *l)
{
    l->calls[0] = true;
    for (unsigned n = 0; n < l->b->nunits; n++) {
        const struct unit *u = &l->b->units[n];

        for (unsigned k = 0; k < u->ninsns && is_there(l, n); k++) {
            if (u->insns[k].fix && u->insns[k].target > CALLS)
                l->calls[u->insns[k].target - CALLS] = true;
        }
    }
}

static unsigned insn_size(const struct layout *l, unsigned unit, unsigned insn)
{
    const struct block_insn *i = &l->b->units[unit].insns[insn];

    if (i->fix != FIX_JUMP)
        return i->len;
    if (i->bytes[0] == 0xe8)
        return 5;
    return !l->far[unit][insn] ? 2 : i->bytes[0] == 0xeb ? 5 : 6;
}

/* Gives every unit its place. Units that are not there have that of the next one, which stands in for
 * them when they are jumped to. */
static void place_units(struct layout *l)
{
    unsigned at = 0, n = 0;

    for (; n < l->b->nunits && !l->b->units[n].function; n++) {
        l->starts[n] = at;
        for (unsigned k = 0; k < l->b->units[n].ninsns && is_there(l, n); k++)
            at += insn_size(l, n, k);
    }
    l->end = at++;
    for (; n < l->b->nunits; n++) {
        l->starts[n] = at;
        for (unsigned k = 0; k < l->b->units[n].ninsns && is_there(l, n); k++)
            at += insn_size(l, n, k);
    }
    l->size = at;
}

/* Where a branch of the unit's leads. */
static unsigned target_of(const struct layout *l, unsigned unit, const struct block_insn *i)
{
    const struct block *b = l->b;
    unsigned n = i->target;

    if (n > CALLS) {
        for (n = 0; b->units[n].function != i->target - CALLS; n++)
            ;
        return l->starts[n];
    }
    return n < b->nunits && b->units[n].function == b->units[unit].function ? l->starts[n] : l->end;
}

/* Lengthens the jumps that are too short. False: one can't be. */
static bool stretch_jumps(struct layout *l, bool *changed)
{
    *changed = false;
    for (unsigned n = 0; n < l->b->nunits; n++) {
        unsigned at = l->starts[n];

        for (unsigned k = 0; k < l->b->units[n].ninsns && is_there(l, n); k++) {
            const struct block_insn *i = &l->b->units[n].insns[k];
            int distance;

            at += insn_size(l, n, k);
            if (i->fix != FIX_JUMP || i->bytes[0] == 0xe8 || l->far[n][k])
                continue;
            distance = (int)target_of(l, n, i) - (int)at;
            if (distance >= -128 && distance <= 127)
                continue;
            if (is_short_only(i))
                return false;
            l->far[n][k] = *changed = true;
        }
    }
    return true;
}

static unsigned count_insns(const struct layout *l)
{
    unsigned n = 1; /* INT3 */

    for (unsigned at = 0; at < l->b->nunits; at++)
        n += is_there(l, at) ? l->b->units[at].ninsns : 0u;
    return n;
}

static bool find_layout(struct layout *l)
{
    bool changed = true;

    find_calls(l);
    for (unsigned n = 0; n < l->b->nunits; n++) {
        for (unsigned k = 0; k < l->b->units[n].ninsns; k++)
            l->far[n][k] = l->b->units[n].insns[k].far;
    }
    while (changed) {
        place_units(l);
        if (!stretch_jumps(l, &changed))
            return false;
    }
    return l->size <= CODE_MAX && count_insns(l) <= INSNS_MAX;
}

static void put_jump(const struct block_insn *i, u8 *p, unsigned size, u32 distance)
{
    unsigned opcode = i->bytes[0];

    if (size == 2) {
        p[0] = (u8)opcode;
        p[1] = (u8)distance;
        return;
    }
    if (size == 6) {
        *p++ = 0x0f;
        *p++ = (u8)(opcode + 0x10);
    } else {
        *p++ = opcode == 0xeb ? 0xe9 : (u8)opcode;
    }
    memcpy(p, &distance, 4);
}

static void put_insn(const struct layout *l, unsigned unit, unsigned insn, struct test_case *c)
{
    const struct block_insn *i = &l->b->units[unit].insns[insn];
    unsigned size = insn_size(l, unit, insn), at = c->code_len;
    u32 base = CODE + c->code_offset, next = base + at + size, value;
    u8 *p = c->code + at;

    c->starts[c->ncode++] = (u16)at;
    c->code_len = (u16)(at + size);
    if (i->fix == FIX_JUMP) {
        put_jump(i, p, size, base + target_of(l, unit, i) - next);
        return;
    }
    memcpy(p, i->bytes, size);
    if (i->fix == FIX_NONE)
        return;
    value = i->fix == FIX_DATA_RIP ? i->address : base + target_of(l, unit, i);
    if (i->fix != FIX_CODE)
        value -= next;
    memcpy(p + i->at, &value, 4);
}

static void put_units(const struct layout *l, bool functions, struct test_case *c)
{
    for (unsigned n = 0; n < l->b->nunits; n++) {
        if ((l->b->units[n].function != 0) != functions)
            continue;
        for (unsigned k = 0; k < l->b->units[n].ninsns && is_there(l, n); k++)
            put_insn(l, n, k, c);
    }
}

bool block_case(const struct block *b, const bool alive[UNITS_MAX], unsigned variant,
                struct test_case *c)
{
    struct layout l = {.b = b, .alive = alive};

    memset(c, 0, sizeof(*c));
    if (!find_layout(&l))
        return false;
    /* Somewhere in the first page, or from there into the second. */
    c->code_offset = (u16)((b->place & 3) ? 0x100 + (b->place >> 2) % (PAGE - 0x100)
                                          : PAGE - 1 - (b->place >> 2) % l.size);
    put_units(&l, false, c);
    c->starts[c->ncode++] = c->code_len;
    c->code[c->code_len++] = INT3;
    put_units(&l, true, c);
    c->image = b->image;
    c->before = b->before[variant];
    c->before.rip = CODE + c->code_offset;
    return true;
}
