/*
 * Taking instructions apart for the translator. Zydis decodes; the interpreter's decoder says what the
 * CPUID model offers; what isn't understood here becomes BT_INTERP, which is always right.
 */
#include "engine/soft/bt/insn.h"

#include "engine/soft/bt/bt.h"
#include "engine/soft/flags.h"
#include "engine/soft/host_exec.h"

/* What Zydis calls the arithmetic flags: their bits are those of EFLAGS. */
#define FLAGS_ALL ((u32)EFLAGS_ARITH)

static bool is_gpr(ZydisRegister reg)
{
    ZydisRegisterClass class = ZydisRegisterGetClass(reg);

    return class == ZYDIS_REGCLASS_GPR8 || class == ZYDIS_REGCLASS_GPR16 ||
           class == ZYDIS_REGCLASS_GPR32 || class == ZYDIS_REGCLASS_GPR64;
}

static bool is_vector(ZydisRegister reg)
{
    ZydisRegisterClass class = ZydisRegisterGetClass(reg);

    return class == ZYDIS_REGCLASS_XMM || class == ZYDIS_REGCLASS_YMM ||
           class == ZYDIS_REGCLASS_MMX || class == ZYDIS_REGCLASS_X87;
}

static bool is_high_byte(ZydisRegister reg)
{
    return reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH;
}

static u8 gpr_number(ZydisRegister reg)
{
    if (is_high_byte(reg))
        return (u8)(reg - ZYDIS_REGISTER_AH);
    if (reg >= ZYDIS_REGISTER_SPL && reg <= ZYDIS_REGISTER_R15B)
        return (u8)(reg - ZYDIS_REGISTER_SPL + 4);
    if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_BL)
        return (u8)(reg - ZYDIS_REGISTER_AL);
    return (u8)ZydisRegisterGetId(reg);
}

/* --- Encoding --- */

static void take_prefixes(struct bt_insn *i, const ZydisDecodedInstruction *zi)
{
    for (unsigned n = 0; n < zi->raw.prefix_count; n++) {
        u8 value = zi->raw.prefixes[n].value;

        if ((value == 0x66 || value == 0xf2 || value == 0xf3 || value == 0xf0) &&
            i->nprefixes < sizeof(i->prefixes))
            i->prefixes[i->nprefixes++] = value;
    }
}

/* Opcodes that 64-bit mode has not: by those that do the same there. */
static void take_encoding32(struct bt_insn *i)
{
    static const u8 moves[] = {0x8a, 0x8b, 0x88, 0x89};

    if ((i->opcode & 0xf0) == 0x40) { /* INC and DEC */
        i->rm = i->opcode & 7;
        i->reg = i->opcode >> 3 & 1;
        i->opcode = 0xff;
        i->has_modrm = true;
    } else if ((i->opcode & 0xfc) == 0xa0) { /* MOV of the accumulator and an absolute address */
        i->reg = 0;
        i->opcode = moves[i->opcode & 3];
        i->has_modrm = true;
    } else if (i->opcode == 0x82) {
        i->opcode = 0x80;
    }
}

static bool take_encoding(struct bt_insn *i, const ZydisDecodedInstruction *zi)
{
    u8 r = 0, b = 0;

    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
        i->encoding = ENC_LEGACY;
        take_prefixes(i, zi);
        if (zi->attributes & ZYDIS_ATTRIB_HAS_REX) {
            i->rex = i->bytes[zi->raw.rex.offset];
            r = (i->rex & 4) << 1;
            b = (u8)((i->rex & 1) << 3);
        }
        switch (zi->opcode_map) {
        case ZYDIS_OPCODE_MAP_DEFAULT:
            i->map = 0;
            break;
        case ZYDIS_OPCODE_MAP_0F:
            i->map = 1;
            break;
        case ZYDIS_OPCODE_MAP_0F38:
            i->map = 2;
            break;
        case ZYDIS_OPCODE_MAP_0F3A:
            i->map = 3;
            break;
        default:
            return false;
        }
    } else if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX) {
        const u8 *vex = i->bytes + zi->raw.vex.offset;
        u8 last = vex[0] == 0xc5 ? vex[1] : vex[2];

        i->encoding = ENC_VEX;
        i->map = vex[0] == 0xc5 ? 1 : vex[1] & 0x1f;
        i->vex_w_l_pp = vex[0] == 0xc5 ? last & 7 : last & 0x87;
        i->vvvv = (u8)(~(last >> 3) & 15);
        r = vex[1] & 0x80 ? 0 : 8;
        b = vex[0] == 0xc4 && !(vex[1] & 0x20) ? 8 : 0;
    } else {
        return false;
    }
    i->opcode = zi->opcode;
    i->has_modrm = zi->attributes & ZYDIS_ATTRIB_HAS_MODRM;
    if (i->code32 && i->encoding == ENC_VEX) { /* the bits that would name registers above 7 */
        r = b = 0;
        i->vvvv &= 7;
    }
    if (i->has_modrm) {
        i->modrm = i->bytes[zi->raw.modrm.offset];
        i->reg = (u8)(((i->modrm >> 3) & 7) | r);
        i->rm = (u8)((i->modrm & 7) | b);
    } else {
        i->rm = (u8)((i->opcode & 7) | b);
    }
    if (zi->raw.imm[0].size) {
        i->imm_at = zi->raw.imm[0].offset;
        i->imm_len = (u8)((zi->raw.imm[0].size + zi->raw.imm[1].size) / 8);
    } else if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX && i->has_modrm) {
        /* A register in the immediate byte (is4), which Zydis shows as none. */
        u8 end = i->len;
        u8 start = (u8)(zi->raw.modrm.offset + 1 + (zi->attributes & ZYDIS_ATTRIB_HAS_SIB ? 1 : 0) +
                        zi->raw.disp.size / 8);

        if (end > start) {
            i->imm_at = start;
            i->imm_len = (u8)(end - start);
        }
    }
    if (i->code32 && i->encoding == ENC_LEGACY && i->map == 0)
        take_encoding32(i);
    return true;
}

/* --- Operands --- */

static u8 action_of(const ZydisDecodedOperand *op)
{
    u8 action = 0;

    if (op->actions & ZYDIS_OPERAND_ACTION_MASK_READ)
        action |= ACTION_READ;
    if (op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) {
        action |= ACTION_WRITE;
        /* Narrow registers keep their upper part, and a condition may keep it all. */
        if (op->size < 32 || !(op->actions & ZYDIS_OPERAND_ACTION_WRITE))
            action |= ACTION_PARTIAL;
    }
    return action;
}

static bool take_memory(struct bt_insn *i, const ZydisDecodedInstruction *zi,
                        const ZydisDecodedOperand *op)
{
    const ZydisDecodedOperandMem *m = &op->mem;
    bool baseless = (zi->attributes & ZYDIS_ATTRIB_HAS_SIB) && zi->raw.modrm.mod == 0 &&
                    zi->raw.sib.base == 5; /* see is_baseless in decode.c */

    if (i->mem || !i->has_modrm ||
        (m->type != ZYDIS_MEMOP_TYPE_MEM && m->type != ZYDIS_MEMOP_TYPE_AGEN))
        return false;
    i->mem = true;
    i->mem_write = op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    i->mem_size = (u8)(op->size / 8);
    i->address32 = zi->address_width == 32;
    if (zi->address_width == 16 || (i->code32 && m->segment == ZYDIS_REGISTER_CS))
        return false;
    i->base = i->index = i->seg = NO_REG;
    if (m->base == ZYDIS_REGISTER_RIP || m->base == ZYDIS_REGISTER_EIP) {
        i->rip_relative = true;
        if (i->address32)
            return false;
    } else if (m->base != ZYDIS_REGISTER_NONE && !baseless) {
        i->base = gpr_number(m->base);
        i->read |= BIT32(i->base);
    }
    if (m->index != ZYDIS_REGISTER_NONE) {
        if (!is_gpr(m->index))
            return false;
        i->index = gpr_number(m->index);
        i->read |= BIT32(i->index);
        i->scale = (u8)__builtin_ctz(m->scale ? m->scale : 1);
    }
    if (m->disp.has_displacement)
        i->disp = (s32)m->disp.value;
    else if (baseless)
        i->disp = (s32)zi->raw.disp.value;
    if (i->rip_relative && (i->disp > INT32_MAX - 8192 || i->disp < INT32_MIN + 8192))
        return false; /* the instruction's offset in its page is added to it */
    if (m->segment == ZYDIS_REGISTER_FS || m->segment == ZYDIS_REGISTER_GS)
        i->seg = m->segment == ZYDIS_REGISTER_FS ? SEG_FS : SEG_GS;
    return true;
}

/* False: an operand of a kind that isn't known here. */
static bool take_operands(struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedInstruction *zi = &raw->zi;

    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &raw->ops[n];
        bool hidden = n >= zi->operand_count_visible;
        u8 action = action_of(op), number;

        switch (op->type) {
        case ZYDIS_OPERAND_TYPE_MEMORY:
            if (!take_memory(i, zi, op))
                return false;
            break;
        case ZYDIS_OPERAND_TYPE_IMMEDIATE:
            i->imm = op->imm.is_signed ? op->imm.value.s : (s64)op->imm.value.u;
            break;
        case ZYDIS_OPERAND_TYPE_REGISTER:
            if (op->encoding == ZYDIS_OPERAND_ENCODING_IS4 && i->code32 &&
                (i->bytes[i->imm_at] & 0x80))
                return false; /* ignored here, and a register above 7 for the host */
            if (!is_gpr(op->reg.value)) {
                if (is_vector(op->reg.value) || hidden)
                    break;
                return false;
            }
            number = gpr_number(op->reg.value);
            if (is_high_byte(op->reg.value)) {
                i->high_byte = true;
                i->high_reg |= op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG;
                i->fixed |= BIT32(number);
            }
            if (action & ACTION_READ || action & ACTION_PARTIAL)
                i->read |= BIT32(number);
            if (action & ACTION_WRITE)
                i->written |= BIT32(number);
            if (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG) {
                i->reg_gpr = true;
                i->reg_action |= action;
            } else if (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
                i->rm_gpr = true;
                i->rm_action |= action;
            } else if (op->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD) {
                i->vvvv_gpr = true;
                i->vvvv_action |= action;
            } else if (op->encoding == ZYDIS_OPERAND_ENCODING_OPCODE) {
                i->opcode_reg = !i->has_modrm;
                i->rm_gpr = true;
                i->rm_action |= action;
            } else {
                i->fixed |= BIT32(number);
            }
            break;
        default:
            return false;
        }
    }
    return true;
}

/* --- Flags --- */

static u8 shift_count(const struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedOperand *last = &raw->ops[raw->zi.operand_count_visible - 1];

    if (last->type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return 0;
    return (u8)last->imm.value.u & (raw->ops[0].size == 64 ? 63 : 31);
}

static void take_flags(struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedInstruction *zi = &raw->zi;
    const ZydisAccessedFlags *f = zi->cpu_flags;
    u32 tested, out;

    if (!f)
        return;
    tested = f->tested & FLAGS_ALL;
    out = (f->modified | f->set_0 | f->set_1 | f->undefined) & FLAGS_ALL;
    i->flags_out = out;
    i->flags_in = tested;
    i->flags_partial = out && out != FLAGS_ALL;
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD:
        /* A count of zero leaves all flags alone. */
        i->flags_out = true;
        i->flags_partial = !shift_count(i, raw);
        break;
    case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL:
    case ZYDIS_MNEMONIC_RCR:
    /* The manual leaves some of their flags undefined; processors leave them alone. */
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_BSF:
    case ZYDIS_MNEMONIC_BSR:
    case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_TZCNT:
    case ZYDIS_MNEMONIC_MUL:
    case ZYDIS_MNEMONIC_IMUL:
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
        i->flags_out = i->flags_partial = true;
        break;
    default:
        break;
    }
}

static void take_recipe(struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedOperand *a = &raw->ops[0], *b = &raw->ops[1];
    struct bt_recipe r = {.b = NO_REG};

    if (i->high_byte || raw->zi.operand_count_visible < 1)
        return;
    r.size = (u8)(a->size / 8);
    if (a->type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(a->reg.value) && !i->mem)
        r.a = gpr_number(a->reg.value);
    else if (a->type == ZYDIS_OPERAND_TYPE_MEMORY && !i->mem_write)
        r.a = NO_REG;
    else
        return;
    if (raw->zi.mnemonic == ZYDIS_MNEMONIC_NEG && r.size >= 4) {
        r.kind = RECIPE_NEG;
        i->recipe = r;
        return;
    }
    if (raw->zi.operand_count_visible != 2)
        return;
    if (b->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        if (i->imm != (s32)i->imm && r.size == 8)
            return;
        r.imm = (s32)i->imm;
    } else if (b->type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(b->reg.value)) {
        r.b = gpr_number(b->reg.value);
    } else {
        return;
    }
    switch (raw->zi.mnemonic) {
    case ZYDIS_MNEMONIC_CMP:
        r.kind = RECIPE_CMP;
        break;
    case ZYDIS_MNEMONIC_TEST:
        r.kind = RECIPE_TEST;
        break;
    case ZYDIS_MNEMONIC_ADD:
        r.kind = r.a == r.b ? RECIPE_NONE : RECIPE_ADD;
        break;
    case ZYDIS_MNEMONIC_SUB:
        r.kind = r.a == r.b ? RECIPE_LOGIC : RECIPE_SUB;
        break;
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_XOR:
        r.kind = RECIPE_LOGIC;
        break;
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
        if (!shift_count(i, raw))
            return;
        r.kind = raw->zi.mnemonic == ZYDIS_MNEMONIC_SHL   ? RECIPE_SHL
                 : raw->zi.mnemonic == ZYDIS_MNEMONIC_SHR ? RECIPE_SHR
                                                          : RECIPE_SAR;
        r.a = NO_REG;
        r.imm &= r.size == 8 ? 63 : 31;
        break;
    default:
        break;
    }
    if (r.kind >= RECIPE_ADD && r.size < 4)
        return;
    if (r.kind == RECIPE_LOGIC)
        r.b = NO_REG;
    i->recipe = r;
}

/* --- Which are the translator's --- */

static bool is_plain_integer(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_MOVZX:
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_MOVBE:
    case ZYDIS_MNEMONIC_MOVNTI:
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_ADC:
    case ZYDIS_MNEMONIC_SBB:
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_SUB:
    case ZYDIS_MNEMONIC_XOR:
    case ZYDIS_MNEMONIC_CMP:
    case ZYDIS_MNEMONIC_TEST:
    case ZYDIS_MNEMONIC_INC:
    case ZYDIS_MNEMONIC_DEC:
    case ZYDIS_MNEMONIC_NEG:
    case ZYDIS_MNEMONIC_NOT:
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL:
    case ZYDIS_MNEMONIC_RCR:
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD:
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_BSF:
    case ZYDIS_MNEMONIC_BSR:
    case ZYDIS_MNEMONIC_TZCNT:
    case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_POPCNT:
    case ZYDIS_MNEMONIC_ANDN:
    case ZYDIS_MNEMONIC_BEXTR:
    case ZYDIS_MNEMONIC_BLSI:
    case ZYDIS_MNEMONIC_BLSMSK:
    case ZYDIS_MNEMONIC_BLSR:
    case ZYDIS_MNEMONIC_BZHI:
    case ZYDIS_MNEMONIC_MULX:
    case ZYDIS_MNEMONIC_PDEP:
    case ZYDIS_MNEMONIC_PEXT:
    case ZYDIS_MNEMONIC_RORX:
    case ZYDIS_MNEMONIC_SARX:
    case ZYDIS_MNEMONIC_SHLX:
    case ZYDIS_MNEMONIC_SHRX:
    case ZYDIS_MNEMONIC_ADCX:
    case ZYDIS_MNEMONIC_ADOX:
    case ZYDIS_MNEMONIC_CRC32:
    case ZYDIS_MNEMONIC_MUL:
    case ZYDIS_MNEMONIC_IMUL:
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
    case ZYDIS_MNEMONIC_CBW:
    case ZYDIS_MNEMONIC_CWDE:
    case ZYDIS_MNEMONIC_CDQE:
    case ZYDIS_MNEMONIC_CWD:
    case ZYDIS_MNEMONIC_CDQ:
    case ZYDIS_MNEMONIC_CQO:
    case ZYDIS_MNEMONIC_XCHG:
    case ZYDIS_MNEMONIC_XADD:
    case ZYDIS_MNEMONIC_CMPXCHG:
    case ZYDIS_MNEMONIC_CMPXCHG8B:
    case ZYDIS_MNEMONIC_CMPXCHG16B:
    case ZYDIS_MNEMONIC_BSWAP:
    case ZYDIS_MNEMONIC_LAHF:
    case ZYDIS_MNEMONIC_SAHF:
    case ZYDIS_MNEMONIC_CLC:
    case ZYDIS_MNEMONIC_STC:
    case ZYDIS_MNEMONIC_CMC:
    case ZYDIS_MNEMONIC_LFENCE:
    case ZYDIS_MNEMONIC_MFENCE:
    case ZYDIS_MNEMONIC_SFENCE:
        return true;
    default:
        return false;
    }
}

static bool is_bit_test(ZydisMnemonic mnemonic)
{
    return mnemonic == ZYDIS_MNEMONIC_BT || mnemonic == ZYDIS_MNEMONIC_BTS ||
           mnemonic == ZYDIS_MNEMONIC_BTR || mnemonic == ZYDIS_MNEMONIC_BTC;
}

/* x87, MMX, and SIMD on vector registers, if it runs as it is. */
static bool take_vector(struct bt_insn *i)
{
    const struct thunk_spec *s = host_exec_spec(&i->insn);

    if (!s || s->masking != MASKING_NONE || s->k_in || s->k_out || s->vec_size > 32 ||
        s->fpu_class == FPU_AVX512 || (i->mem && i->mem_size != s->mem_size))
        return false;
    if (i->code32 && i->encoding == ENC_VEX && ((s->insn[2] ^ i->vex_w_l_pp) & 0x80))
        return false; /* W, which is ignored here and not by the host */
    i->fpu_class = s->fpu_class;
    i->x87 = s->flags & THUNK_X87;
    i->x87_points = s->flags & THUNK_POINTERS;
    i->fop = s->fop;
    i->faults = (s->flags & (THUNK_MXCSR | THUNK_X87)) || s->mem_align;
    return true;
}

static bool is_wide(const ZydisDecodedInstruction *zi)
{
    return !(zi->attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE) || zi->raw.rex.W;
}

static enum bt_op push_or_pop(struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedOperand *op = &raw->ops[0];
    bool push = raw->zi.mnemonic == ZYDIS_MNEMONIC_PUSH;
    bool reg = op->type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(op->reg.value);

    if (!is_wide(&raw->zi) || op->size < 8 || i->insn.osize != i->word)
        return BT_INTERP;
    i->imm = op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? op->imm.value.s : 0;
    i->rm = reg ? gpr_number(op->reg.value) : NO_REG;
    if (reg)
        return push ? BT_PUSH : BT_POP;
    if (push && op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return BT_PUSH;
    /* The stack's own operand is a second memory operand to Zydis. */
    if (push && op->type == ZYDIS_OPERAND_TYPE_MEMORY && take_memory(i, &raw->zi, op))
        return BT_PUSH;
    return BT_INTERP;
}

static enum bt_op branch_op(struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedInstruction *zi = &raw->zi;
    const ZydisDecodedOperand *op = &raw->ops[0];
    bool call = zi->mnemonic == ZYDIS_MNEMONIC_CALL;

    if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || i->insn.osize != i->word || !is_wide(zi))
        return BT_INTERP;
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_RET:
        i->imm = op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (s64)(u16)op->imm.value.u : 0;
        return BT_RET;
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_JMP:
        if (op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
            i->imm = op->imm.value.s;
            return call ? BT_CALL : BT_JMP;
        }
        if (op->type == ZYDIS_OPERAND_TYPE_MEMORY) {
            if (!take_memory(i, zi, op))
                return BT_INTERP;
        } else {
            i->rm = gpr_number(op->reg.value);
            i->read |= BIT32(i->rm);
        }
        return call ? BT_CALL_INDIRECT : BT_JMP_INDIRECT;
    default:
        break;
    }
    if (zi->meta.category == ZYDIS_CATEGORY_COND_BR &&
        ((i->map == 0 && (i->opcode & 0xf0) == 0x70) ||
         (i->map == 1 && (i->opcode & 0xf0) == 0x80))) {
        i->imm = op->imm.value.s;
        i->cc = i->opcode & 15;
        i->flags_in = true;
        return BT_JCC;
    }
    return BT_INTERP;
}

/* String instructions through flat segments. */
static enum bt_op string_op(const struct soft_vcpu *v, struct bt_insn *i,
                            const ZydisDecodedInstruction *zi)
{
    struct bt_string s = {.size = i->opcode & 1 ? i->insn.osize : 1,
                          .len = i->len,
                          .repeated = i->insn.flags & (INSN_REP | INSN_REPNE),
                          .until_equal = i->insn.flags & INSN_REPNE};

    /* bt,verify can't compare it: its journal ends with the first element. */
    if (v->journal || i->map || i->insn.asize != i->word)
        return BT_INTERP;
    switch (i->opcode & 0xfe) {
    case 0xa4:
        s.op = STRING_MOVE;
        break;
    case 0xa6:
        s.op = STRING_COMPARE;
        break;
    case 0xaa:
        s.op = STRING_STORE;
        break;
    case 0xac:
        s.op = STRING_LOAD;
        break;
    case 0xae:
        s.op = STRING_SCAN;
        break;
    default: /* INS and OUTS */
        return BT_INTERP;
    }
    if (string_has_source(&s) &&
        (zi->attributes &
         (ZYDIS_ATTRIB_HAS_SEGMENT_FS | ZYDIS_ATTRIB_HAS_SEGMENT_GS | ZYDIS_ATTRIB_HAS_SEGMENT_CS)))
        return BT_INTERP;
    i->string = s;
    i->flags_out = string_compares(&s);
    i->written = (string_has_source(&s) ? BIT32(RSI) : 0) |
                 (string_has_destination(&s) ? BIT32(RDI) : BIT32(RAX)) |
                 (s.repeated ? BIT32(RCX) : 0);
    i->read = i->written | BIT32(RAX);
    return BT_STRING_INSN;
}

/* MOV of a segment or control register, if it concerns nothing but this processor (CR8 is the APIC's). */
static bool is_system_move(const struct bt_insn *i)
{
    switch (i->map << 8 | i->opcode) {
    case 0x08c:
        return true;
    case 0x08e: /* after SS an instruction goes undisturbed */
        return i->insn.reg != SEG_SS;
    case 0x120:
    case 0x122:
        return i->insn.reg != 8;
    default:
        return false;
    }
}

static enum bt_op classify(struct soft_vcpu *v, struct bt_insn *i, const struct decoded *raw)
{
    const ZydisDecodedInstruction *zi = &raw->zi;

    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_POP:
        return push_or_pop(i, raw);
    case ZYDIS_MNEMONIC_LEAVE:
        i->fixed = BIT32(RBP);
        return i->insn.osize == i->word && is_wide(zi) ? BT_LEAVE : BT_INTERP;
    case ZYDIS_MNEMONIC_CLI:
        return v->mode & MODE_USER ? BT_INTERP : BT_CLI;
    case ZYDIS_MNEMONIC_STI:
        return v->mode & MODE_USER ? BT_INTERP : BT_STI;
    case ZYDIS_MNEMONIC_CLD:
        return BT_CLD;
    case ZYDIS_MNEMONIC_STD:
        return BT_STD;
    case ZYDIS_MNEMONIC_PUSHFQ:
        return BT_PUSHF;
    case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_SYSCALL:
    case ZYDIS_MNEMONIC_SYSRET:
    case ZYDIS_MNEMONIC_IRETQ:
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP:
    case ZYDIS_MNEMONIC_VERW:
    case ZYDIS_MNEMONIC_INVLPG:
    case ZYDIS_MNEMONIC_INVPCID:
    case ZYDIS_MNEMONIC_RDFSBASE:
    case ZYDIS_MNEMONIC_RDGSBASE:
    case ZYDIS_MNEMONIC_WRFSBASE:
    case ZYDIS_MNEMONIC_WRGSBASE:
    case ZYDIS_MNEMONIC_RDPID:
    case ZYDIS_MNEMONIC_RDPKRU:
    case ZYDIS_MNEMONIC_XGETBV:
        return BT_FAST;
    case ZYDIS_MNEMONIC_SWAPGS:
        return i->code32 || v->mode & MODE_USER ? BT_INTERP : BT_SWAPGS;
    case ZYDIS_MNEMONIC_MOV:
        if (is_system_move(i))
            return BT_FAST;
        break;
    case ZYDIS_MNEMONIC_FWAIT:
        i->fpu_class = FPU_X87; /* more than need be: CR0.EM doesn't stop it */
        i->x87 = i->faults = true;
        return BT_PLAIN;
    case ZYDIS_MNEMONIC_PAUSE: /* with REX.B it is XCHG R8, RAX */
        if (i->rex & 1)
            return BT_INTERP;
        return v->engine->config.ncpus > 1 ? BT_FAST : BT_PLAIN; /* FAST: soft_pause sees it */
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_JMP:
    case ZYDIS_MNEMONIC_RET:
        return branch_op(i, raw);
    default:
        break;
    }
    if (zi->meta.category == ZYDIS_CATEGORY_STRINGOP)
        return string_op(v, i, zi);
    if (zi->meta.category == ZYDIS_CATEGORY_COND_BR)
        return branch_op(i, raw);
    if (!take_operands(i, raw))
        return BT_INTERP;
    if (zi->meta.category == ZYDIS_CATEGORY_NOP || zi->meta.category == ZYDIS_CATEGORY_WIDENOP ||
        zi->meta.category == ZYDIS_CATEGORY_PREFETCH)
        return BT_NOP;
    if (i->high_byte) { /* numbers 4 to 7 mean AH to BH there */
        i->fixed |= i->read | i->written;
        i->reg_gpr = i->rm_gpr = i->vvvv_gpr = false;
    }
    if (zi->mnemonic == ZYDIS_MNEMONIC_BSF || zi->mnemonic == ZYDIS_MNEMONIC_BSR) {
        i->reg_action |= ACTION_PARTIAL; /* of zero, they leave it alone */
        i->read |= i->written;
    }
    take_flags(i, raw);
    if (i->rip_relative && (i->disp > INT32_MAX - 8192 || i->disp < INT32_MIN + 8192))
        return BT_INTERP; /* the page's offset is added to it */
    if (zi->mnemonic == ZYDIS_MNEMONIC_LEA)
        return BT_LEA;
    if (i->mem && (i->high_byte != i->high_reg || !i->mem_size))
        return BT_INTERP;
    if (is_bit_test(zi->mnemonic) && i->mem && raw->ops[1].type == ZYDIS_OPERAND_TYPE_REGISTER)
        return raw->ops[1].size < 32 || (i->address32 && !i->code32) ? BT_INTERP : BT_BIT_STRING;
    if (is_plain_integer(zi->mnemonic) || zi->meta.category == ZYDIS_CATEGORY_CMOV ||
        zi->meta.category == ZYDIS_CATEGORY_SETCC) {
        take_recipe(i, raw);
        i->faults = zi->mnemonic == ZYDIS_MNEMONIC_DIV || zi->mnemonic == ZYDIS_MNEMONIC_IDIV ||
                    zi->mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B;
        return BT_PLAIN;
    }
    if (!i->code32 && /* which leaves YMM8 to YMM15 alone */
        (zi->mnemonic == ZYDIS_MNEMONIC_VZEROUPPER || zi->mnemonic == ZYDIS_MNEMONIC_VZEROALL)) {
        i->fpu_class = FPU_AVX;
        return BT_PLAIN;
    }
    return take_vector(i) ? BT_PLAIN : BT_INTERP;
}

/* Whether 32-bit code's instruction is another for the host, or needs a segment's limit. */
static bool differs32(const struct soft_vcpu *v, const struct bt_insn *i)
{
    if (i->encoding == ENC_VEX && (i->vex_w_l_pp & 0x80) &&
        (i->reg_gpr || i->rm_gpr || i->vvvv_gpr))
        return true; /* W is ignored */
    return i->seg != NO_REG && !(v->bt_mode & (i->seg == SEG_FS ? BT_MODE_FS : BT_MODE_GS));
}

bool bt_insn_decode(struct soft_vcpu *v, const u8 *bytes, unsigned n, u16 offset,
                    struct bt_insn *out)
{
    struct decoded raw;
    bool more = true;

    memset(out, 0, sizeof(*out));
    /* A copy first: another vCPU may write there meanwhile, and what is emitted has to be what was decoded. */
    n = MIN(n, (unsigned)sizeof(out->bytes));
    memcpy(out->bytes, bytes, n);
    out->offset = offset;
    out->fpu_class = FPU_CLASSES;
    out->base = out->index = out->seg = NO_REG;
    out->code32 = v->bt_mode & BT_MODE_CODE32;
    out->word = out->code32 ? 4 : 8;
    if (decode_insn_raw(v, out->bytes, n, 0, &out->insn, &more, &raw) == DECODE_SHORT)
        return false;
    out->len = out->insn.len;
    if (decode_is_invalid(&out->insn)) {
        out->op = BT_INTERP;
        return true;
    }
    if (!take_encoding(out, &raw.zi))
        out->op = BT_INTERP;
    else
        out->op = (u8)classify(v, out, &raw);
    if (out->code32 && differs32(v, out))
        out->op = BT_INTERP;
    return true;
}
