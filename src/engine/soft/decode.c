/*
 * Decoding: Zydis says what the bytes are; here the operands are put into the interpreter's uniform form
 * and the handler is chosen.
 *
 * Three kinds of instructions: integer ones have handlers specialised by size and form (integer.h);
 * system ones and far transfers are found in a table by mnemonic and run through a common wrapper; x87
 * and SIMD go to the host's units (host_exec).
 */
#include "engine/soft/decode.h"

#include "engine/soft/exception.h"
#include "engine/soft/integer.h"
#include "engine/soft/interp.h"
#include "engine/soft/system.h"

#include <stdlib.h>

/* --- Wrappers of table-driven handlers --- */

static void run_and_continue(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    i->run(v, i);
    NEXT(v, i);
}

/* For what may change mode, mappings, interruptibility or RIP. */
static void run_and_leave(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    i->run(v, i);
    if (v->cur == i)
        soft_set_ip(v, soft_next_ip(v));
    if (v->leave || v->cpu.activity != CPU_RUNNING)
        atomic_fetch_or(&v->attention, ATTN_LEFT);
    if (v->irq_waiting && (v->cpu.rflags & EFLAGS_IF))
        atomic_fetch_or(&v->attention, ATTN_INTERRUPT);
}

static void raise_ud(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    soft_raise(v, EXC_UD);
}
static void raise_gp(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    soft_raise_error(v, EXC_GP, 0);
}

static void use_system(struct insn *out, insn_fn *run, bool ends, bool *more)
{
    out->run = run;
    out->fn = ends ? run_and_leave : run_and_continue;
    if (ends)
        *more = false;
}

/* --- Operands --- */

/* The number of an 8-bit register is its byte's place in cpu.gpr. */
static u8 register_number(ZydisRegister reg)
{
    u8 id = (u8)ZydisRegisterGetId(reg);

    if (ZydisRegisterGetClass(reg) != ZYDIS_REGCLASS_GPR8)
        return id;
    if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH)
        return (u8)((reg - ZYDIS_REGISTER_AH) * 8 + 1);
    if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_BL)
        return (u8)((reg - ZYDIS_REGISTER_AL) * 8);
    /* SPL, BPL, SIL, DIL, R8B to R15B */
    return (u8)((reg - ZYDIS_REGISTER_SPL + 4) * 8);
}

static u8 segment_number(ZydisRegister reg)
{
    return (u8)ZydisRegisterGetId(reg);
}

static unsigned size_index(unsigned bytes)
{
    return bytes == 1 ? 0 : bytes == 2 ? 1 : bytes == 4 ? 2 : 3;
}

/*
 * SIB.base 5 with ModRM.mod 0 is a 32-bit displacement and no base, whatever REX.B says. Zydis 4.0 sees
 * R13D there when the address size is 32 bits in 64-bit mode.
 */
static bool is_baseless(const ZydisDecodedInstruction *zi)
{
    return (zi->attributes & ZYDIS_ATTRIB_HAS_SIB) && zi->raw.modrm.mod == 0 &&
           zi->raw.sib.base == 5;
}

static void fill_memory(const struct decode_context *ctx, const ZydisDecodedOperand *op,
                        struct insn *out)
{
    const ZydisDecodedOperandMem *m = &op->mem;

    out->flags |= INSN_MEM;
    out->base = out->index = GPR_ZERO;
    if (m->base == ZYDIS_REGISTER_RIP || m->base == ZYDIS_REGISTER_EIP) {
        out->base = GPR_RIP;
        /* Relative to the next instruction; gpr[GPR_RIP] is the block's start. */
        out->disp = out->offset + out->len;
    } else if (m->base != ZYDIS_REGISTER_NONE && !is_baseless(ctx->zi)) {
        out->base = register_number(m->base);
    }
    if (m->index != ZYDIS_REGISTER_NONE && ZydisRegisterGetClass(m->index) <= ZYDIS_REGCLASS_GPR64)
        out->index = register_number(m->index);
    out->scale = (u8)__builtin_ctz(m->scale ? m->scale : 1);
    if (m->disp.has_displacement)
        out->disp += m->disp.value;
    else if (is_baseless(ctx->zi))
        out->disp += ctx->zi->raw.disp.value;
    if (m->segment != ZYDIS_REGISTER_NONE)
        out->seg = segment_number(m->segment);
    out->address = (ctx->mode & MODE_CODE_MASK) == MODE_CODE64 && out->asize == 8 ? ADDRESS_FLAT
                                                                                  : ADDRESS_CHECKED;
}

/* The last of F2 and F3 counts. */
static u8 repeat_flags(const ZydisDecodedInstruction *zi)
{
    u8 flags = 0;

    for (unsigned n = 0; n < zi->raw.prefix_count; n++) {
        if (zi->raw.prefixes[n].value == 0xf3)
            flags = INSN_REP;
        else if (zi->raw.prefixes[n].value == 0xf2)
            flags = INSN_REPNE;
    }
    return flags;
}

/* The source segment of string instructions and XLAT, whose operands are implied. */
static u8 implied_segment(const struct decode_context *ctx)
{
    static const struct {
        ZydisInstructionAttributes attribute;
        u8 seg;
    } overrides[] = {
        {ZYDIS_ATTRIB_HAS_SEGMENT_FS, SEG_FS}, {ZYDIS_ATTRIB_HAS_SEGMENT_GS, SEG_GS},
        {ZYDIS_ATTRIB_HAS_SEGMENT_ES, SEG_ES}, {ZYDIS_ATTRIB_HAS_SEGMENT_CS, SEG_CS},
        {ZYDIS_ATTRIB_HAS_SEGMENT_SS, SEG_SS},
    };

    for (size_t n = 0; n < ARRAY_SIZE(overrides); n++)
        if (ctx->zi->attributes & overrides[n].attribute)
            return overrides[n].seg;
    return SEG_DS;
}

static void fill_operands(const struct decode_context *ctx, struct insn *out)
{
    const ZydisDecodedInstruction *zi = ctx->zi;
    unsigned immediates = 0;

    out->base = out->index = GPR_ZERO;
    out->seg = implied_segment(ctx);
    out->asize = zi->address_width / 8;
    out->osize = (u8)(zi->operand_width / 8);
    out->flags = repeat_flags(zi);
    if ((zi->attributes & ZYDIS_ATTRIB_HAS_LOCK) || zi->mnemonic == ZYDIS_MNEMONIC_XCHG)
        out->flags |= INSN_LOCK;
    out->address = (ctx->mode & MODE_CODE_MASK) == MODE_CODE64 && out->asize == 8 ? ADDRESS_FLAT
                                                                                  : ADDRESS_CHECKED;
    for (unsigned n = 0; n < zi->operand_count_visible; n++) {
        const ZydisDecodedOperand *op = &ctx->ops[n];
        u8 number;

        switch (op->type) {
        case ZYDIS_OPERAND_TYPE_REGISTER:
            number = register_number(op->reg.value);
            if (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
                out->rm = number;
            else if (op->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD)
                out->vvvv = number;
            else
                out->reg = number;
            if (n == 0)
                out->dst = number;
            else if (n == 1)
                out->src = number;
            break;
        case ZYDIS_OPERAND_TYPE_MEMORY:
            fill_memory(ctx, op, out);
            break;
        case ZYDIS_OPERAND_TYPE_IMMEDIATE:
            if (immediates++ == 0)
                out->imm = op->imm.value.u;
            else
                out->imm2 = (u8)op->imm.value.u;
            break;
        case ZYDIS_OPERAND_TYPE_POINTER:
            out->imm = op->ptr.offset;
            out->selector = op->ptr.segment;
            break;
        default:
            break;
        }
    }
}

/* --- Choosing the handler of an integer instruction --- */

static bool is_mem(const ZydisDecodedOperand *op)
{
    return op->type == ZYDIS_OPERAND_TYPE_MEMORY;
}
static bool is_imm(const ZydisDecodedOperand *op)
{
    return op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
}

/* The form of operands 0 and 1. */
static enum form form_of(const struct decode_context *ctx, const struct insn *out)
{
    const ZydisDecodedOperand *ops = ctx->ops;
    bool lock = out->flags & INSN_LOCK;

    if (is_mem(&ops[0])) {
        if (ctx->zi->operand_count_visible > 1 && is_imm(&ops[1]))
            return lock ? FORM_LOCK_MI : FORM_MI;
        return lock ? FORM_LOCK_MR : FORM_MR;
    }
    if (ctx->zi->operand_count_visible < 2)
        return FORM_RR;
    return is_mem(&ops[1]) ? FORM_RM : is_imm(&ops[1]) ? FORM_RI : FORM_RR;
}

/* The last operand of a shift: an immediate, 1 or CL. */
static enum form shift_form(const struct decode_context *ctx)
{
    const ZydisDecodedOperand *count = &ctx->ops[ctx->zi->operand_count_visible - 1];

    if (is_mem(&ctx->ops[0]))
        return is_imm(count) ? FORM_MI : FORM_MR;
    return is_imm(count) ? FORM_RI : FORM_RR;
}

static bool needs(const struct soft_vcpu *v, enum cpuid_feature f)
{
    return soft_has(v, f);
}

/* ANDN and MULX keep r/m last; BEXTR, BZHI and the shifts keep it second. */
static insn_fn *choose_bmi(const struct decode_context *ctx, struct insn *out, enum bmi_op op)
{
    bool mem = out->flags & INSN_MEM;

    if (!mem) {
        for (unsigned n = 0; n < ctx->zi->operand_count_visible; n++)
            if (ctx->ops[n].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
                out->src = register_number(ctx->ops[n].reg.value);
    }
    return bmi_fns[op][mem][ctx->ops[0].size == 64];
}

/*
 * AMD's processors in 64-bit mode: 66 makes near branches 16-bit, and far pointers in memory have no
 * 64-bit offset (APM vol. 3, 1.2.7 and appendix B).
 */
static void use_amd_widths(struct insn *out, const ZydisDecodedInstruction *zi)
{
    bool narrow = (zi->attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE) && !zi->raw.rex.W;

    switch (zi->meta.branch_type) {
    case ZYDIS_BRANCH_TYPE_SHORT:
    case ZYDIS_BRANCH_TYPE_NEAR:
        if (narrow)
            out->osize = 2;
        return;
    case ZYDIS_BRANCH_TYPE_FAR:
        if (zi->mnemonic == ZYDIS_MNEMONIC_JMP || zi->mnemonic == ZYDIS_MNEMONIC_CALL)
            break;
        return;
    default:
        if (zi->mnemonic == ZYDIS_MNEMONIC_LFS || zi->mnemonic == ZYDIS_MNEMONIC_LGS ||
            zi->mnemonic == ZYDIS_MNEMONIC_LSS)
            break;
        return;
    }
    out->osize = narrow ? 2 : 4;
}

/* Condition code of Jcc, SETcc or CMOVcc: the low bits of the opcode. */
static u8 condition_code(const ZydisDecodedInstruction *zi)
{
    return zi->opcode & 15;
}

/* Instructions of other processors that share categories or mnemonics with ours. */
static bool is_never_offered(const ZydisDecodedInstruction *zi)
{
    switch (zi->meta.isa_ext) {
    case ZYDIS_ISA_EXT_KNC:
    case ZYDIS_ISA_EXT_KNCE:
    case ZYDIS_ISA_EXT_KNCV:
    case ZYDIS_ISA_EXT_RTM:
        return true;
    default:
        return false;
    }
}

static insn_fn *choose_integer(struct soft_vcpu *v, const struct decode_context *ctx,
                               struct insn *out, bool *more)
{
    const ZydisDecodedInstruction *zi = ctx->zi;
    const ZydisDecodedOperand *ops = ctx->ops;
    unsigned size = zi->operand_count_visible ? size_index(ops[0].size / 8u) : 0;
    unsigned osize = size_index(out->osize);
    bool mem = out->flags & INSN_MEM;

#define BINARY(mn, op)                                                                             \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return binary_fns[BINARY_##op][form_of(ctx, out)][size];
#define UNARY(mn, op)                                                                              \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return unary_fns[UNARY_##op][form_of(ctx, out)][size];
#define SHIFT(mn, op)                                                                              \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return shift_fns[SHIFT_##op][shift_form(ctx)][size];
#define BITS(mn, op)                                                                               \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return bit_fns[BIT_##op][form_of(ctx, out)][size];
#define SCAN(mn, op)                                                                               \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return scan_fns[SCAN_##op][form_of(ctx, out)][size];
#define BMI(mn, op, feature)                                                                       \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return needs(v, FEATURE_##feature) ? choose_bmi(ctx, out, BMI_##op) : raise_ud;
#define SIMPLE(mn, fn)                                                                             \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        return fn;
#define BRANCH(mn, fn)                                                                             \
    case ZYDIS_MNEMONIC_##mn:                                                                      \
        *more = false;                                                                             \
        return fn;
#define SYSTEM(run, ends)                                                                          \
    do {                                                                                           \
        use_system(out, run, ends, more);                                                          \
        return out->fn;                                                                            \
    } while (0)

    switch (zi->mnemonic) {
        BINARY(ADD, add)
        BINARY(OR, or)
        BINARY(ADC, adc)
        BINARY(SBB, sbb)
        BINARY(AND, and)
        BINARY(SUB, sub)
        BINARY(XOR, xor)
        BINARY(CMP, cmp)
        BINARY(TEST, test)
        UNARY(INC, inc)
        UNARY(DEC, dec)
        UNARY(NEG, neg)
        UNARY(NOT, not )
        SHIFT(ROL, rol)
        SHIFT(ROR, ror)
        SHIFT(RCL, rcl)
        SHIFT(RCR, rcr)
        SHIFT(SHL, shl)
        SHIFT(SHR, shr)
        SHIFT(SAR, sar)
        BITS(BT, bt)
        BITS(BTS, bts)
        BITS(BTR, btr)
        BITS(BTC, btc)
        SCAN(BSF, bsf)
        SCAN(BSR, bsr)
    case ZYDIS_MNEMONIC_SHLD:
        return shld_fns[shift_form(ctx)][size];
    case ZYDIS_MNEMONIC_SHRD:
        return shrd_fns[shift_form(ctx)][size];
    case ZYDIS_MNEMONIC_TZCNT:
        return scan_fns[SCAN_tzcnt][form_of(ctx, out)][size];
    case ZYDIS_MNEMONIC_LZCNT:
        return scan_fns[SCAN_lzcnt][form_of(ctx, out)][size];
    case ZYDIS_MNEMONIC_POPCNT:
        return needs(v, FEATURE_POPCNT) ? scan_fns[SCAN_popcnt][form_of(ctx, out)][size] : raise_ud;
        BMI(ANDN, andn, BMI1)
        BMI(BEXTR, bextr, BMI1)
        BMI(BLSI, blsi, BMI1)
        BMI(BLSMSK, blsmsk, BMI1)
        BMI(BLSR, blsr, BMI1)
        BMI(BZHI, bzhi, BMI2)
        BMI(MULX, mulx, BMI2)
        BMI(PDEP, pdep, BMI2)
        BMI(PEXT, pext, BMI2)
        BMI(RORX, rorx, BMI2)
        BMI(SARX, sarx, BMI2)
        BMI(SHLX, shlx, BMI2)
        BMI(SHRX, shrx, BMI2)
        BMI(ADCX, adcx, ADX)
        BMI(ADOX, adox, ADX)
    case ZYDIS_MNEMONIC_CRC32:
        return needs(v, FEATURE_SSE42) ? crc32_fns[mem][size_index(ops[1].size / 8u)] : raise_ud;
    case ZYDIS_MNEMONIC_MUL:
        return muldiv_fns[MULDIV_mul][mem][size];
    case ZYDIS_MNEMONIC_DIV:
        return muldiv_fns[MULDIV_div][mem][size];
    case ZYDIS_MNEMONIC_IDIV:
        return muldiv_fns[MULDIV_idiv][mem][size];
    case ZYDIS_MNEMONIC_IMUL:
        if (zi->operand_count_visible == 1)
            return muldiv_fns[MULDIV_imul][mem][size];
        return zi->operand_count_visible == 2 ? imul2_fns[mem][size] : imul3_fns[mem][size];

    case ZYDIS_MNEMONIC_MOV:
        for (unsigned n = 0; n < 2; n++) {
            const ZydisDecodedOperand *other = &ops[1 - n];

            if (ops[n].type != ZYDIS_OPERAND_TYPE_REGISTER)
                continue;
            if (other->type == ZYDIS_OPERAND_TYPE_REGISTER)
                out->rm = register_number(other->reg.value);
            switch (ZydisRegisterGetClass(ops[n].reg.value)) {
            case ZYDIS_REGCLASS_SEGMENT:
                out->reg = register_number(ops[n].reg.value);
                SYSTEM(n == 0 ? op_mov_to_sreg : op_mov_from_sreg, n == 0);
            case ZYDIS_REGCLASS_CONTROL:
                out->reg = register_number(ops[n].reg.value);
                SYSTEM(n == 0 ? op_mov_to_cr : op_mov_from_cr, n == 0);
            case ZYDIS_REGCLASS_DEBUG:
                out->reg = register_number(ops[n].reg.value);
                SYSTEM(n == 0 ? op_mov_to_dr : op_mov_from_dr, n == 0);
            default:
                break;
            }
        }
        return mov_fns[form_of(ctx, out)][size];
    case ZYDIS_MNEMONIC_MOVZX:
        return movzx_fns[mem][ops[1].size == 16][size];
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD:
        /* MOVSXD with a 16-bit operand size moves 16 bits; AMD's processors read 32. */
        if (size == 1 && ops[1].size != 8 &&
            !(zi->mnemonic == ZYDIS_MNEMONIC_MOVSXD && cpuid_model_is_amd(v->cpuid)))
            return mov_fns[mem ? FORM_RM : FORM_RR][1];
        return movsx_fns[mem][ops[1].size == 8 ? 0 : ops[1].size == 16 ? 1 : 2][size];
    case ZYDIS_MNEMONIC_LEA:
        return lea_fns[size];
    case ZYDIS_MNEMONIC_XCHG:
        if (mem && is_mem(&ops[1]))
            out->src = register_number(ops[0].reg.value);
        return xchg_fns[mem ? FORM_MR : FORM_RR][size];
    case ZYDIS_MNEMONIC_XADD:
        return xadd_fns[form_of(ctx, out)][size];
    case ZYDIS_MNEMONIC_CMPXCHG:
        return cmpxchg_fns[form_of(ctx, out)][size];
        SIMPLE(CMPXCHG8B, op_cmpxchg8b)
    case ZYDIS_MNEMONIC_CMPXCHG16B:
        return needs(v, FEATURE_CX16) ? op_cmpxchg16b : raise_ud;
    case ZYDIS_MNEMONIC_MOVBE:
        return needs(v, FEATURE_MOVBE) ? movbe_fns[form_of(ctx, out)][size] : raise_ud;
    case ZYDIS_MNEMONIC_BSWAP:
        return size == 3 ? op_bswap64 : size == 2 ? op_bswap32 : op_bswap16;
    case ZYDIS_MNEMONIC_MOVNTI:
        return needs(v, FEATURE_SSE2) ? mov_fns[FORM_MR][size] : raise_ud;
        SIMPLE(CBW, op_cbw)
        SIMPLE(CWDE, op_cwde)
        SIMPLE(CDQE, op_cdqe)
        SIMPLE(CWD, op_cwd)
        SIMPLE(CDQ, op_cdq)
        SIMPLE(CQO, op_cqo)
        SIMPLE(LAHF, op_lahf)
        SIMPLE(SAHF, op_sahf)
        SIMPLE(CLC, op_clc)
        SIMPLE(STC, op_stc)
        SIMPLE(CMC, op_cmc)
        SIMPLE(CLD, op_cld)
        SIMPLE(STD, op_std)
        SIMPLE(SALC, op_salc)
        SIMPLE(XLAT, op_xlat)
    case ZYDIS_MNEMONIC_NOP:
        /* PREFETCHW's opcode with a register. */
        if (zi->opcode_map == ZYDIS_OPCODE_MAP_0F && zi->opcode == 0x0d &&
            cpuid_model_is_amd(v->cpuid))
            return raise_ud;
        return op_nop;
    case ZYDIS_MNEMONIC_PAUSE:
        if (!zi->raw.rex.B)
            return op_pause;
        /* F3 REX.B 90: XCHG with R8, and the prefix means nothing. */
        out->dst = register_number(ZYDIS_REGISTER_RAX);
        out->src = register_number(ZYDIS_REGISTER_R8);
        return xchg_fns[FORM_RR][osize];
        SIMPLE(LFENCE, op_fence)
        SIMPLE(MFENCE, op_fence)
        SIMPLE(SFENCE, op_fence)
        SIMPLE(PREFETCH, op_nop)
        SIMPLE(PREFETCHNTA, op_nop)
        SIMPLE(PREFETCHT0, op_nop)
        SIMPLE(PREFETCHT1, op_nop)
        SIMPLE(PREFETCHT2, op_nop)
        SIMPLE(PREFETCHW, op_nop)
        SIMPLE(PREFETCHWT1, op_nop)
        SIMPLE(AAA, op_aaa)
        SIMPLE(AAS, op_aas)
        SIMPLE(AAD, op_aad)
        SIMPLE(AAM, op_aam)
        SIMPLE(DAA, op_daa)
        SIMPLE(DAS, op_das)

    case ZYDIS_MNEMONIC_PUSH:
        if (is_imm(&ops[0]))
            return push_imm_fns[osize];
        if (mem)
            return push_mem_fns[osize];
        if (ZydisRegisterGetClass(ops[0].reg.value) == ZYDIS_REGCLASS_SEGMENT)
            SYSTEM(op_push_sreg, false);
        return push_reg_fns[osize];
    case ZYDIS_MNEMONIC_POP:
        if (mem)
            return pop_mem_fns[osize];
        if (ZydisRegisterGetClass(ops[0].reg.value) == ZYDIS_REGCLASS_SEGMENT)
            SYSTEM(op_pop_sreg, true);
        return pop_reg_fns[osize];
        SIMPLE(PUSHA, op_pusha)
        SIMPLE(PUSHAD, op_pusha)
        SIMPLE(POPA, op_popa)
        SIMPLE(POPAD, op_popa)
        SIMPLE(ENTER, op_enter)
        SIMPLE(LEAVE, op_leave)

    case ZYDIS_MNEMONIC_JMP:
        *more = false;
        if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
            SYSTEM(op_jmp_far, true);
        return is_imm(&ops[0]) ? op_jmp_rel : mem ? op_jmp_mem : op_jmp_reg;
    case ZYDIS_MNEMONIC_CALL:
        *more = false;
        if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
            SYSTEM(op_call_far, true);
        return is_imm(&ops[0]) ? op_call_rel : mem ? op_call_mem : op_call_reg;
    case ZYDIS_MNEMONIC_RET:
        *more = false;
        if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
            SYSTEM(op_ret_far, true);
        return op_ret;
        BRANCH(JCXZ, op_jrcxz)
        BRANCH(JECXZ, op_jrcxz)
        BRANCH(JRCXZ, op_jrcxz)
        BRANCH(LOOP, op_loop)
        BRANCH(LOOPE, op_loope)
        BRANCH(LOOPNE, op_loopne)

        SIMPLE(MOVSB, movs_fns[0])
        SIMPLE(MOVSW, movs_fns[1])
        SIMPLE(MOVSQ, movs_fns[3])
        SIMPLE(STOSB, stos_fns[0])
        SIMPLE(STOSW, stos_fns[1])
        SIMPLE(STOSD, stos_fns[2])
        SIMPLE(STOSQ, stos_fns[3])
        SIMPLE(LODSB, lods_fns[0])
        SIMPLE(LODSW, lods_fns[1])
        SIMPLE(LODSD, lods_fns[2])
        SIMPLE(LODSQ, lods_fns[3])
        SIMPLE(SCASB, scas_fns[0])
        SIMPLE(SCASW, scas_fns[1])
        SIMPLE(SCASD, scas_fns[2])
        SIMPLE(SCASQ, scas_fns[3])
        SIMPLE(CMPSB, cmps_fns[0])
        SIMPLE(CMPSW, cmps_fns[1])
        SIMPLE(CMPSQ, cmps_fns[3])
    case ZYDIS_MNEMONIC_MOVSD: /* also an SSE2 instruction */
        return zi->meta.category == ZYDIS_CATEGORY_STRINGOP ? movs_fns[2] : NULL;
    case ZYDIS_MNEMONIC_CMPSD:
        return zi->meta.category == ZYDIS_CATEGORY_STRINGOP ? cmps_fns[2] : NULL;
    default:
        break;
    }
#undef BINARY
#undef UNARY
#undef SHIFT
#undef BITS
#undef SCAN
#undef BMI
#undef SIMPLE
#undef BRANCH
#undef SYSTEM

    switch (zi->meta.category) {
    case ZYDIS_CATEGORY_COND_BR:
        *more = false;
        return jcc_fns[condition_code(zi)];
    case ZYDIS_CATEGORY_CMOV:
        out->imm2 = condition_code(zi);
        return cmov_fns[condition_code(zi)][mem][size];
    case ZYDIS_CATEGORY_SETCC:
        out->imm2 = condition_code(zi);
        return setcc_fns[mem];
    case ZYDIS_CATEGORY_NOP:
    case ZYDIS_CATEGORY_WIDENOP:
        return op_nop;
    default:
        return NULL;
    }
}

static bool choose_system(struct soft_vcpu *v, const struct decode_context *ctx, struct insn *out,
                          bool *more)
{
    const struct insn_def *def = NULL;

    for (size_t n = 0; n < system_insns_count && !def; n++)
        if (system_insns[n].mnemonic == ctx->zi->mnemonic)
            def = &system_insns[n];
    if (!def)
        return false;
    if (def->feature != INSN_NO_FEATURE && !soft_has(v, def->feature))
        return false;
    use_system(out, def->run, def->flags & INSN_ENDS_BLOCK, more);
    return true;
}

/* --- Zydis --- */

/* Set up for what the vCPU decoded last: setting it up takes a third of the time of decoding. */
struct insn_decoder {
    ZydisDecoder zydis;
    bool used, protected;
    u32 code; /* MODE_CODE_* */
};

struct insn_decoder *insn_decoder_create(void)
{
    return calloc(1, sizeof(struct insn_decoder));
}

void insn_decoder_destroy(struct insn_decoder *d)
{
    free(d);
}

static void init_decoder(const struct soft_vcpu *v, u32 code, ZydisDecoder *d)
{
    if (code == MODE_CODE64)
        ZydisDecoderInit(d, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    else if (!soft_protected(v))
        ZydisDecoderInit(
            d, code == MODE_CODE32 ? ZYDIS_MACHINE_MODE_LEGACY_32 : ZYDIS_MACHINE_MODE_REAL_16,
            code == MODE_CODE32 ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_16);
    else if (code == MODE_CODE32)
        ZydisDecoderInit(d, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
    else
        ZydisDecoderInit(d, ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16);
    /* Encodings of features that are never offered are NOPs or other instructions. */
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_WBNOINVD, soft_has(v, FEATURE_WBNOINVD));
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_LZCNT, soft_has(v, FEATURE_LZCNT));
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_TZCNT, soft_has(v, FEATURE_BMI1));
    ZydisDecoderEnableMode(d, ZYDIS_DECODER_MODE_AMD_BRANCHES, cpuid_model_is_amd(v->cpuid));
}

static const ZydisDecoder *decoder_for(const struct soft_vcpu *v)
{
    struct insn_decoder *d = v->decoder;
    u32 code = v->mode & MODE_CODE_MASK;

    if (unlikely(!d->used || d->code != code || d->protected != soft_protected(v))) {
        *d = (struct insn_decoder){.used = true, .code = code, .protected = soft_protected(v)};
        init_decoder(v, code, &d->zydis);
    }
    return &d->zydis;
}

enum decode_result decode_insn(struct soft_vcpu *v, const u8 *bytes, unsigned n, unsigned offset,
                               struct insn *out, bool *more)
{
    struct decoded raw;

    return decode_insn_raw(v, bytes, n, offset, out, more, &raw);
}

enum decode_result decode_insn_raw(struct soft_vcpu *v, const u8 *bytes, unsigned n,
                                   unsigned offset, struct insn *out, bool *more,
                                   struct decoded *raw)
{
    struct decode_context ctx = {&raw->zi, raw->ops, bytes, v->mode};
    ZyanStatus status = ZydisDecoderDecodeFull(decoder_for(v), bytes, n, &raw->zi, raw->ops);

    if (status == ZYDIS_STATUS_NO_MORE_DATA && n < 15)
        return DECODE_SHORT;
    *out = (struct insn){.base = GPR_ZERO, .index = GPR_ZERO, .offset = (u16)offset};
    if (!ZYAN_SUCCESS(status)) {
        bool too_long =
            status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG || status == ZYDIS_STATUS_NO_MORE_DATA;

        out->fn = too_long ? raise_gp : raise_ud;
        out->len = 1;
        *more = false;
        return DECODE_OK;
    }
    out->len = raw->zi.length;
    fill_operands(&ctx, out);
    if ((v->mode & MODE_CODE_MASK) == MODE_CODE64 && cpuid_model_is_amd(v->cpuid))
        use_amd_widths(out, &raw->zi);
    out->fn = is_never_offered(&raw->zi) ? raise_ud : choose_integer(v, &ctx, out, more);
    if (!out->fn && !choose_system(v, &ctx, out, more) && !host_exec_decode(v, &ctx, out)) {
        out->fn = raise_ud;
        *more = false;
    }
    return DECODE_OK;
}

bool decode_is_invalid(const struct insn *i)
{
    return i->fn == raise_ud || i->fn == raise_gp;
}
