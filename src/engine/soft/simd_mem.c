/*
 * SIMD accesses to memory that are not one piece: masked loads and stores that reach pages which
 * are not there, gathers and scatters, MASKMOVDQU, and the MXCSR and upper-half instructions.
 *
 * A masked-out element is not accessed: no fault comes from it (Intel SDM vol. 1, 15.6.1). Where
 * the whole operand lies in memory that may be accessed the thunk runs on it directly and the host
 * does the masking; only the rest comes here.
 */
#include "engine/soft/host_exec.h"

#define GATHER_EVEX 0x01u /* the mask is a mask register, not a vector */

/* What a gather or scatter needs, in insn.imm. */
union gather {
    u64 word;
    struct {
        u8 data, index, mask; /* registers */
        u8 data_size, index_size, count;
        u8 flags;
    };
};

static u64 low_bits(unsigned n)
{
    return n >= 64 ? ~0ULL : BIT(n) - 1;
}

/* Which elements of the memory operand are accessed; *elements: how many it has. */
static u64 element_mask(const struct soft_vcpu *v, const struct thunk_spec *s, unsigned *elements)
{
    u64 mask = 0;

    *elements = s->mem_size / s->elem_size;
    if (s->masking == MASKING_SIGN) {
        for (unsigned n = 0; n < *elements; n++) {
            if (v->cpu.vec[s->mask_reg][(n + 1) * s->elem_size - 1] & 0x80)
                mask |= BIT(n);
        }
        return mask;
    }
    /* K0 in its place means no mask: all elements. */
    mask = (s->mask_reg ? v->cpu.k[s->mask_reg] : UINT64_MAX) & low_bits(s->mask_bits);
    if (s->masking == MASKING_K_PACKED)
        return low_bits((unsigned)__builtin_popcountll(mask)) & (mask ? ~0ULL : 0);
    if (s->masking == MASKING_K_REPEAT) {
        for (unsigned n = *elements; n < s->mask_bits; n += *elements)
            mask |= mask >> n & low_bits(*elements);
    }
    return mask & low_bits(*elements);
}

bool simd_masked_out(const struct soft_vcpu *v, const struct thunk_spec *s)
{
    unsigned elements;

    return s->masking != MASKING_NONE && element_mask(v, s, &elements) == 0;
}

/*
 * The linear address of the element `at` bytes into the operand. Past the last address VMASKMOV begins
 * anew; the others fault.
 */
static gva_t element_linear(struct soft_vcpu *v, const struct insn *i, const struct thunk_spec *s,
                            gva_t lin, unsigned at, unsigned access)
{
    u64 last = i->asize == 2 ? 0xffff : 0xffffffff, offset;

    if (i->address == ADDRESS_FLAT)
        return lin + at;
    offset = insn_offset(v, i) + at;
    if (offset > last && s->masking != MASKING_SIGN)
        soft_raise_error(v, i->seg == SEG_SS ? EXC_SS : EXC_GP, 0);
    return soft_linear(v, i->seg, offset & last, s->elem_size, access);
}

void simd_run_masked(struct soft_vcpu *v, const struct insn *i, const struct thunk *t, gva_t lin)
{
    const struct thunk_spec *s = &t->spec;
    _Alignas(64) u8 bounce[192] = {0};
    u8 *copy = bounce + (lin & 63);
    unsigned elements, size = s->elem_size;
    u64 mask = element_mask(v, s, &elements);
    unsigned access = s->mem_access | (i->seg == SEG_SS ? ACCESS_STACK : 0);

    if (s->masking == MASKING_SIGN)
        access |= ACCESS_UNALIGNED;
    v->cur = i;
    for (u64 m = mask; m; m &= m - 1) {
        unsigned at = (unsigned)__builtin_ctzll(m) * size;
        gva_t element = element_linear(v, i, s, lin, at, access);

        if (access & ACCESS_WRITE)
            soft_probe(v, element, size, access);
        else
            soft_load_bytes(v, element, copy + at, size, access);
    }
    thunk_run_at(v, i, t, copy);
    if (!(access & ACCESS_WRITE))
        return;
    for (u64 m = mask; m; m &= m - 1) {
        unsigned at = (unsigned)__builtin_ctzll(m) * size;

        soft_store_bytes(v, element_linear(v, i, s, lin, at, access), copy + at, size, access);
    }
}

/* Linear address of element n of a gather or scatter. */
static gva_t gather_address(struct soft_vcpu *v, const struct insn *i, union gather g, unsigned n,
                            unsigned access)
{
    const u8 *at = v->cpu.vec[g.index] + n * g.index_size;
    s64 index;
    u64 offset;

    if (g.index_size == 4) {
        s32 index32;

        memcpy(&index32, at, sizeof(index32));
        index = index32;
    } else {
        memcpy(&index, at, sizeof(index));
    }
    offset = v->cpu.gpr[i->base] + ((u64)index << i->scale) + (u64)i->disp;
    if (i->address == ADDRESS_FLAT)
        return offset + v->seg_base[i->seg];
    offset = i->asize == 8 ? offset : i->asize == 4 ? (u32)offset : (u16)offset;
    return soft_linear(v, i->seg, offset, g.data_size, access);
}

static bool gather_wanted(const struct soft_vcpu *v, union gather g, unsigned n)
{
    if (g.flags & GATHER_EVEX)
        return v->cpu.k[g.mask] & BIT(n);
    return v->cpu.vec[g.mask][(n + 1) * g.data_size - 1] & 0x80;
}

/* Element n is done: a fault at a later one restarts behind it. */
static void gather_done(struct soft_vcpu *v, union gather g, unsigned n)
{
    if (g.flags & GATHER_EVEX)
        v->cpu.k[g.mask] &= ~BIT(n);
    else
        memset(v->cpu.vec[g.mask] + n * g.data_size, 0, g.data_size);
}

static void run_gather(struct soft_vcpu *v, const struct insn *i)
{
    union gather g = {.word = i->imm};
    unsigned access = ACCESS_UNALIGNED | (i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ);
    u8 *data = v->cpu.vec[g.data];

    fpu_class_check(v, i, g.flags & GATHER_EVEX ? FPU_AVX512 : FPU_AVX);
    v->cur = i;
    for (unsigned n = 0; n < g.count; n++) {
        if (gather_wanted(v, g, n)) {
            u64 value = soft_load(v, gather_address(v, i, g, n, ACCESS_READ), g.data_size, access);

            memcpy(data + n * g.data_size, &value, g.data_size);
        }
        gather_done(v, g, n);
    }
    memset(data + g.count * g.data_size, 0, 64u - g.count * g.data_size);
    if (g.flags & GATHER_EVEX)
        v->cpu.k[g.mask] = 0;
    else
        memset(v->cpu.vec[g.mask], 0, 64);
    NEXT(v, i);
}

static void run_scatter(struct soft_vcpu *v, const struct insn *i)
{
    union gather g = {.word = i->imm};
    unsigned access = ACCESS_WRITE | ACCESS_UNALIGNED | (i->seg == SEG_SS ? ACCESS_STACK : 0);

    fpu_class_check(v, i, FPU_AVX512);
    v->cur = i;
    for (unsigned n = 0; n < g.count; n++) {
        u64 value = 0;

        if (gather_wanted(v, g, n)) {
            memcpy(&value, v->cpu.vec[g.data] + n * g.data_size, g.data_size);
            soft_store(v, gather_address(v, i, g, n, ACCESS_WRITE), value, g.data_size, access);
        }
        gather_done(v, g, n);
    }
    v->cpu.k[g.mask] = 0;
    NEXT(v, i);
}

/*
 * MASKMOVDQU and MASKMOVQ: bytes of `data` whose mask byte has its sign bit, to [rDI]. Whether bytes that
 * the mask leaves out can fault is the implementation's (vol. 2B, MASKMOVDQU): as on AMD's they do.
 */
static void store_masked_bytes(struct soft_vcpu *v, const struct insn *i, const u8 *data,
                               const u8 *mask, unsigned size)
{
    unsigned access = ACCESS_WRITE | (i->seg == SEG_SS ? ACCESS_STACK : 0);
    gva_t lin = insn_linear(v, i, size, ACCESS_WRITE);

    v->cur = i;
    for (unsigned n = 0; n < size; n += 8)
        soft_probe(v, lin + n, 8, access);
    for (unsigned n = 0; n < size; n++) {
        if (mask[n] & 0x80)
            soft_store(v, lin + n, data[n], 1, access);
    }
}

static void run_maskmovdqu(struct soft_vcpu *v, const struct insn *i)
{
    fpu_class_check(v, i, i->imm ? FPU_AVX : FPU_SSE);
    store_masked_bytes(v, i, v->cpu.vec[i->dst], v->cpu.vec[i->src], 16);
    NEXT(v, i);
}

static void run_maskmovq(struct soft_vcpu *v, const struct insn *i)
{
    fpu_class_check(v, i, FPU_MMX);
    v->cur = i;
    fpu_check_pending(v, i);
    soft_fpu_sync(v);
    store_masked_bytes(v, i, v->cpu.fpr[i->dst], v->cpu.fpr[i->src], 8);
    /* As every MMX instruction but EMMS: TOP 0, all registers valid. */
    v->cpu.fsw &= (u16) ~(7u << 11);
    v->cpu.ftw = 0;
    fpu_refresh_tags(&v->cpu);
    NEXT(v, i);
}

static enum fpu_class control_class(const struct insn *i)
{
    return i->imm ? FPU_AVX : FPU_SSE;
}

static void run_ldmxcsr(struct soft_vcpu *v, const struct insn *i)
{
    gva_t lin;
    u32 value;

    fpu_class_check(v, i, control_class(i));
    lin = insn_linear(v, i, sizeof(value), ACCESS_READ);
    value = mem_load32(v, i, lin);
    if (value & ~v->host_exec->mxcsr_mask) {
        v->cur = i;
        soft_raise_error(v, EXC_GP, 0);
    }
    v->cpu.mxcsr = value;
    NEXT(v, i);
}

static void run_stmxcsr(struct soft_vcpu *v, const struct insn *i)
{
    fpu_class_check(v, i, control_class(i));
    mem_store32(v, i, insn_linear(v, i, sizeof(u32), ACCESS_WRITE), v->cpu.mxcsr);
    NEXT(v, i);
}

/* imm: bytes of each register that stay; dst: registers. */
static void run_vzero(struct soft_vcpu *v, const struct insn *i)
{
    fpu_class_check(v, i, FPU_AVX);
    for (unsigned n = 0; n < i->dst; n++)
        memset(v->cpu.vec[n] + i->imm, 0, 64 - i->imm);
    NEXT(v, i);
}

static void run_fence(struct soft_vcpu *v, const struct insn *i)
{
    atomic_thread_fence(memory_order_seq_cst);
    NEXT(v, i);
}

static const ZydisDecodedOperand *memory_operand(const struct decode_context *ctx)
{
    for (unsigned n = 0; n < ctx->zi->operand_count; n++) {
        if (ctx->ops[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            return &ctx->ops[n];
    }
    return NULL;
}

static insn_fn *decode_gather(const struct decode_context *ctx, struct insn *out, bool scatter,
                              unsigned index_size)
{
    const ZydisDecodedInstruction *zi = ctx->zi;
    const ZydisDecodedOperand *memory = memory_operand(ctx);
    bool evex = zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
    union gather g = {.word = 0};
    u8 elem_size;

    if (!memory)
        return NULL;
    g.index = (u8)ZydisRegisterGetId(memory->mem.index);
    g.index_size = (u8)index_size;
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &ctx->ops[n];

        if (op->type != ZYDIS_OPERAND_TYPE_REGISTER)
            continue;
        if (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG) {
            g.data = (u8)ZydisRegisterGetId(op->reg.value);
            g.data_size = (u8)(op->element_size / 8);
        } else if (op->encoding == ZYDIS_OPERAND_ENCODING_MASK ||
                   op->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD) {
            g.mask = (u8)ZydisRegisterGetId(op->reg.value);
        }
    }
    g.flags = evex ? GATHER_EVEX : 0;
    elem_size = MAX(g.data_size, g.index_size);
    g.count = (u8)(zi->avx.vector_length / 8 / elem_size);
    out->index = GPR_ZERO;
    out->imm = g.word;
    return scatter ? run_scatter : run_gather;
}

/* The implicit operand DS:rDI. */
static void decode_implicit_rdi(const struct decode_context *ctx, struct insn *out)
{
    static const u8 segments[] = {SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS};
    const ZydisDecodedOperand *memory = memory_operand(ctx);

    out->base = RDI;
    out->index = GPR_ZERO;
    out->scale = 0;
    out->disp = 0;
    out->seg = SEG_DS;
    if (memory && memory->mem.segment >= ZYDIS_REGISTER_ES &&
        memory->mem.segment <= ZYDIS_REGISTER_GS)
        out->seg = segments[memory->mem.segment - ZYDIS_REGISTER_ES];
    out->dst = (u8)ZydisRegisterGetId(ctx->ops[0].reg.value);
    out->src = (u8)ZydisRegisterGetId(ctx->ops[1].reg.value);
}

insn_fn *simd_mem_decode(const struct decode_context *ctx, struct insn *out)
{
    bool vex = ctx->zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;

    switch (ctx->zi->mnemonic) {
    case ZYDIS_MNEMONIC_VGATHERDPS:
    case ZYDIS_MNEMONIC_VGATHERDPD:
    case ZYDIS_MNEMONIC_VPGATHERDD:
    case ZYDIS_MNEMONIC_VPGATHERDQ:
        return decode_gather(ctx, out, false, 4);
    case ZYDIS_MNEMONIC_VGATHERQPS:
    case ZYDIS_MNEMONIC_VGATHERQPD:
    case ZYDIS_MNEMONIC_VPGATHERQD:
    case ZYDIS_MNEMONIC_VPGATHERQQ:
        return decode_gather(ctx, out, false, 8);
    case ZYDIS_MNEMONIC_VSCATTERDPS:
    case ZYDIS_MNEMONIC_VSCATTERDPD:
    case ZYDIS_MNEMONIC_VPSCATTERDD:
    case ZYDIS_MNEMONIC_VPSCATTERDQ:
        return decode_gather(ctx, out, true, 4);
    case ZYDIS_MNEMONIC_VSCATTERQPS:
    case ZYDIS_MNEMONIC_VSCATTERQPD:
    case ZYDIS_MNEMONIC_VPSCATTERQD:
    case ZYDIS_MNEMONIC_VPSCATTERQQ:
        return decode_gather(ctx, out, true, 8);
    case ZYDIS_MNEMONIC_MASKMOVQ:
        decode_implicit_rdi(ctx, out);
        return run_maskmovq;
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU:
        decode_implicit_rdi(ctx, out);
        out->imm = vex;
        return run_maskmovdqu;
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_VLDMXCSR:
        out->imm = vex;
        return run_ldmxcsr;
    case ZYDIS_MNEMONIC_STMXCSR:
    case ZYDIS_MNEMONIC_VSTMXCSR:
        out->imm = vex;
        return run_stmxcsr;
    case ZYDIS_MNEMONIC_VZEROUPPER:
    case ZYDIS_MNEMONIC_VZEROALL:
        out->imm = ctx->zi->mnemonic == ZYDIS_MNEMONIC_VZEROUPPER ? 16 : 0;
        out->dst = (ctx->mode & MODE_CODE_MASK) == MODE_CODE64 ? 16 : 8;
        return run_vzero;
    case ZYDIS_MNEMONIC_LFENCE:
    case ZYDIS_MNEMONIC_MFENCE:
    case ZYDIS_MNEMONIC_SFENCE:
        return run_fence;
    default:
        return NULL;
    }
}
