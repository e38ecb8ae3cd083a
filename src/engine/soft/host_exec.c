/*
 * x87 and SIMD on the host's own units: which instructions, how each is re-encoded, and how it is
 * run.
 *
 * At decode time an instruction becomes a thunk_spec: the same instruction for the host's 64-bit
 * mode, its vector, mask, MMX and x87 registers unchanged, its general registers renamed to RAX
 * (ModRM.reg) and RCX (ModRM.rm), its memory operand at [RSI]; with the registers that it reads
 * and writes. Equal specs share one thunk (thunk.c). At run time the handler checks that the class
 * of registers is enabled, finds the memory operand, and calls the thunk.
 *
 * Memory operands
 *  1. A TLB hit: the thunk works on guest memory itself. The alignment check is the host's: RAM is
 *     mapped by whole pages, so a guest address and its host address agree in the bits that count.
 *  2. Masked operands (AVX-512, VMASKMOV) that miss: element by element, simd_mem.c.
 *  3. All else: on a pointer from soft_pointer, or on a copy with the same alignment.
 *
 * Faults of the host inside a thunk come back as its return value (trap.c). MXCSR then has the
 * flags that the processor set, and nothing else is changed.
 *
 * Legacy SSE leaves the upper part of its destination alone: thunks load and store 128 bits, and
 * always load the destination, as some write a part of it. VEX and EVEX zero it: the host's
 * register is stored whole.
 *
 * References: Intel SDM vol. 2A, 2.3 to 2.7 (encodings, exception classes); vol. 1, 11.5 and 15.6.
 */
#include "engine/soft/host_exec.h"

#include <errno.h>
#include <stdlib.h>

#define ARENA_SIZE MIB(8)
#define MXCSR_DEFAULT_MASK 0xffbfu
#define MXCSR_MM BIT(17)

enum { SLOT_REG = 0, SLOT_RM = 1, SLOTS = 3 };

/* --- Running --- */

_Noreturn void thunk_raise(struct soft_vcpu *v, u32 vector)
{
    if (vector == EXC_GP)
        soft_raise_error(v, EXC_GP, 0);
    if (vector == EXC_XM && !(v->cpu.cr4 & CR4_OSXMMEXCPT))
        soft_raise(v, EXC_UD);
    soft_raise(v, (enum exception)vector);
}

static bool mm_lifts_alignment(const struct soft_vcpu *v, const struct thunk_spec *s)
{
    return (s->flags & THUNK_MM_ALIGN) && (v->cpu.mxcsr & MXCSR_MM);
}

void thunk_run_at(struct soft_vcpu *v, const struct insn *i, const struct thunk *t, void *memory)
{
    u32 trap = t->code(v, memory);

    if (likely(!trap))
        return;
    v->cur = i;
    if (trap == EXC_GP && mm_lifts_alignment(v, &t->spec)) {
        _Alignas(64) u8 copy[64];

        memcpy(copy, memory, t->spec.mem_size);
        trap = t->code(v, copy);
        if (!trap)
            return;
    }
    thunk_raise(v, trap);
}

/* Whether an x87 store was held back by an unmasked exception (SDM vol. 1, 8.5): all but
 * precision. */
static bool x87_store_suppressed(struct soft_vcpu *v)
{
    u16 fsw, fcw;

    __asm__ volatile("fnstsw %0; fnstcw %1" : "=m"(fsw), "=m"(fcw));
    return fsw & ~fcw & 0x1f;
}

/* FNSTCW and FNSTSW, which don't wait. */
static bool is_fnst(const struct thunk_spec *s)
{
    return s->fpu_class == FPU_X87 && s->mem_access == ACCESS_WRITE && !(s->flags & THUNK_POINTERS);
}

/* The operand of a masked instruction outside 64-bit mode: limits are for the accessed elements. */
static bool limits_by_element(const struct insn *i, const struct thunk_spec *s)
{
    return s->masking != MASKING_NONE && i->address == ADDRESS_CHECKED;
}

static __attribute__((noinline)) void run_slow(struct soft_vcpu *v, const struct insn *i,
                                               const struct thunk *t, gva_t lin)
{
    const struct thunk_spec *s = &t->spec;
    unsigned access = s->mem_access | (i->seg == SEG_SS ? ACCESS_STACK : 0);
    _Alignas(64) u8 bounce[192] = {0}; /* never the host's stack for a guest to read */
    u8 *copy = bounce + (lin & 63);
    void *p;

    v->cur = i;
    if ((s->flags & THUNK_X87) && !is_fnst(s))
        fpu_check_pending(v, i);
    if (s->mem_align && (lin & (s->mem_align - 1u)) && !mm_lifts_alignment(v, s) &&
        !simd_masked_out(v, s))
        soft_raise_error(v, EXC_GP, 0);
    if (s->masking != MASKING_NONE) {
        simd_run_masked(v, i, t, lin);
        return;
    }
    p = soft_pointer(v, lin, s->mem_size, access);
    if (p) {
        thunk_run_at(v, i, t, p);
        return;
    }
    if (!(access & ACCESS_WRITE)) {
        soft_load_bytes(v, lin, copy, s->mem_size, access);
        thunk_run_at(v, i, t, copy);
        return;
    }
    soft_probe(v, lin, s->mem_size, access);
    if (s->flags & THUNK_MERGES)
        soft_load_bytes(v, lin, copy, s->mem_size, access & ~ACCESS_WRITE);
    thunk_run_at(v, i, t, copy);
    if (!(s->flags & THUNK_POINTERS) || !x87_store_suppressed(v))
        soft_store_bytes(v, lin, copy, s->mem_size, access);
}

/* FIP, FCS, FOP, and FDP, FDS when it has a memory operand (SDM vol. 1, 8.1.8 and 8.1.9). */
static inline void set_x87_pointers(struct soft_vcpu *v, const struct insn *i,
                                    const struct thunk_spec *s)
{
    v->cpu.fip = soft_ip_mask(v, v->cpu.gpr[GPR_RIP] + i->offset);
    v->cpu.fcs = v->cpu.seg[SEG_CS].selector;
    v->cpu.fop = s->fop;
    if (s->mem_size) {
        v->cpu.fdp = insn_offset(v, i);
        v->cpu.fds = v->cpu.seg[i->seg].selector;
    }
}

/* The body of all handlers; the constants make each its own. */
static inline __attribute__((always_inline)) void run(struct soft_vcpu *v, const struct insn *i,
                                                      bool memory, bool write, bool x87)
{
    const struct thunk *t = i->ext;
    const struct thunk_spec *s = &t->spec;

    fpu_class_check(v, i, s->fpu_class);
    if (x87)
        fpu_make_live(v);
    if (memory && unlikely(limits_by_element(i, s))) {
        run_slow(v, i, t, (u32)(v->seg_base[i->seg] + insn_offset(v, i)));
    } else if (memory) {
        gva_t lin = insn_linear(v, i, s->mem_size, write ? ACCESS_WRITE : ACCESS_READ);
        const struct tlb_entry *e = tlb_slot(v->tlb, lin);
        u64 tag = write ? e->write_tag : e->read_tag;

        if (likely((lin ^ tag) <= GUEST_PAGE_SIZE - s->mem_size))
            thunk_run_at(v, i, t, (void *)(uintptr_t)((lin ^ tag) + e->host));
        else
            run_slow(v, i, t, lin);
    } else {
        thunk_run_at(v, i, t, NULL);
    }
    if (x87 && (s->flags & THUNK_POINTERS))
        set_x87_pointers(v, i, s);
}

static void run_register(struct soft_vcpu *v, const struct insn *i)
{
    run(v, i, false, false, false);
    NEXT(v, i);
}

static void run_load(struct soft_vcpu *v, const struct insn *i)
{
    run(v, i, true, false, false);
    NEXT(v, i);
}

static void run_store(struct soft_vcpu *v, const struct insn *i)
{
    run(v, i, true, true, false);
    NEXT(v, i);
}

static void run_x87_register(struct soft_vcpu *v, const struct insn *i)
{
    run(v, i, false, false, true);
    NEXT(v, i);
}

static void run_x87_load(struct soft_vcpu *v, const struct insn *i)
{
    run(v, i, true, false, true);
    NEXT(v, i);
}

static void run_x87_store(struct soft_vcpu *v, const struct insn *i)
{
    run(v, i, true, true, true);
    NEXT(v, i);
}

/* MOVNTI: neither CR0 nor CR4 hides it. */
static void run_movnti(struct soft_vcpu *v, const struct insn *i)
{
    unsigned size = (unsigned)i->imm;
    gva_t lin = insn_linear(v, i, size, ACCESS_WRITE);

    if (size == 8)
        mem_store64(v, i, lin, v->cpu.gpr[i->dst]);
    else
        mem_store32(v, i, lin, (u32)v->cpu.gpr[i->dst]);
    NEXT(v, i);
}

/* The arena is full: leaves the block before this instruction; the run loop makes room. */
static void run_no_room(struct soft_vcpu *v, const struct insn *i)
{
    v->cur = i;
    soft_set_ip(v, soft_ip(v));
}

const struct thunk_spec *host_exec_spec(const struct insn *i)
{
    const struct thunk *t = i->ext;

    return i->fn == run_register || i->fn == run_load || i->fn == run_store ||
                   i->fn == run_x87_register || i->fn == run_x87_load || i->fn == run_x87_store
               ? &t->spec
               : NULL;
}

/* --- Which instructions the model offers --- */

#define NONE INSN_NO_FEATURE
#define ISA_512(set, f)                                                                            \
    {ZYDIS_ISA_SET_##set##_128, f, FEATURE_AVX512VL},                                              \
        {ZYDIS_ISA_SET_##set##_256, f, FEATURE_AVX512VL},                                          \
    {                                                                                              \
        ZYDIS_ISA_SET_##set##_512, f, FEATURE_AVX512F                                              \
    }
static const struct {
    u16 isa_set;
    u8 feature, second;
} isa_features[] = {
    {ZYDIS_ISA_SET_X87, FEATURE_FPU, NONE},
    {ZYDIS_ISA_SET_PPRO, FEATURE_FPU, FEATURE_CMOV}, /* FCOMI and its family */
    {ZYDIS_ISA_SET_FCMOV, FEATURE_FPU, FEATURE_CMOV},
    {ZYDIS_ISA_SET_PENTIUMMMX, FEATURE_MMX, NONE},
    {ZYDIS_ISA_SET_FXSAVE, FEATURE_FXSR, NONE},
    {ZYDIS_ISA_SET_FXSAVE64, FEATURE_FXSR, NONE},
    {ZYDIS_ISA_SET_SSE, FEATURE_SSE, NONE},
    {ZYDIS_ISA_SET_SSEMXCSR, FEATURE_SSE, NONE},
    {ZYDIS_ISA_SET_SSE2, FEATURE_SSE2, NONE},
    {ZYDIS_ISA_SET_SSE2MMX, FEATURE_SSE2, NONE},
    {ZYDIS_ISA_SET_SSE3, FEATURE_SSE3, NONE},
    {ZYDIS_ISA_SET_SSE3X87, FEATURE_SSE3, FEATURE_FPU},
    {ZYDIS_ISA_SET_SSSE3, FEATURE_SSSE3, NONE},
    {ZYDIS_ISA_SET_SSSE3MMX, FEATURE_SSSE3, NONE},
    {ZYDIS_ISA_SET_SSE4, FEATURE_SSE41, NONE},
    {ZYDIS_ISA_SET_SSE42, FEATURE_SSE42, NONE},
    {ZYDIS_ISA_SET_SSE4A, FEATURE_SSE4A, NONE},
    {ZYDIS_ISA_SET_AES, FEATURE_AES, NONE},
    {ZYDIS_ISA_SET_PCLMULQDQ, FEATURE_PCLMUL, NONE},
    {ZYDIS_ISA_SET_SHA, FEATURE_SHA, NONE},
    {ZYDIS_ISA_SET_GFNI, FEATURE_GFNI, NONE},
    {ZYDIS_ISA_SET_AVX, FEATURE_AVX, NONE},
    {ZYDIS_ISA_SET_AVXAES, FEATURE_AVX, FEATURE_AES},
    {ZYDIS_ISA_SET_AVX_GFNI, FEATURE_AVX, FEATURE_GFNI},
    {ZYDIS_ISA_SET_AVX_VNNI, FEATURE_AVX_VNNI, NONE},
    {ZYDIS_ISA_SET_F16C, FEATURE_F16C, NONE},
    {ZYDIS_ISA_SET_FMA, FEATURE_FMA, NONE},
    {ZYDIS_ISA_SET_AVX2, FEATURE_AVX2, NONE},
    {ZYDIS_ISA_SET_AVX2GATHER, FEATURE_AVX2, NONE},
    {ZYDIS_ISA_SET_VAES, FEATURE_VAES, NONE},
    {ZYDIS_ISA_SET_VPCLMULQDQ, FEATURE_VPCLMULQDQ, NONE},
    ISA_512(AVX512F, FEATURE_AVX512F),
    {ZYDIS_ISA_SET_AVX512F_128N, FEATURE_AVX512F, NONE},
    {ZYDIS_ISA_SET_AVX512F_SCALAR, FEATURE_AVX512F, NONE},
    {ZYDIS_ISA_SET_AVX512F_KOP, FEATURE_AVX512F, NONE},
    ISA_512(AVX512BW, FEATURE_AVX512BW),
    {ZYDIS_ISA_SET_AVX512BW_128N, FEATURE_AVX512BW, NONE},
    {ZYDIS_ISA_SET_AVX512BW_KOP, FEATURE_AVX512BW, NONE},
    ISA_512(AVX512DQ, FEATURE_AVX512DQ),
    {ZYDIS_ISA_SET_AVX512DQ_128N, FEATURE_AVX512DQ, NONE},
    {ZYDIS_ISA_SET_AVX512DQ_SCALAR, FEATURE_AVX512DQ, NONE},
    {ZYDIS_ISA_SET_AVX512DQ_KOP, FEATURE_AVX512DQ, NONE},
    ISA_512(AVX512CD, FEATURE_AVX512CD),
    ISA_512(AVX512_IFMA, FEATURE_AVX512IFMA),
    ISA_512(AVX512_VBMI, FEATURE_AVX512VBMI),
    ISA_512(AVX512_VBMI2, FEATURE_AVX512VBMI2),
    ISA_512(AVX512_VNNI, FEATURE_AVX512VNNI),
    ISA_512(AVX512_BITALG, FEATURE_AVX512BITALG),
    ISA_512(AVX512_VPOPCNTDQ, FEATURE_AVX512VPOPCNTDQ),
    ISA_512(AVX512_BF16, FEATURE_AVX512BF16),
    ISA_512(AVX512_GFNI, FEATURE_GFNI),
    ISA_512(AVX512_VAES, FEATURE_VAES),
    ISA_512(AVX512_VPCLMULQDQ, FEATURE_VPCLMULQDQ),
    {ZYDIS_ISA_SET_XSAVE, FEATURE_XSAVE, NONE},
    {ZYDIS_ISA_SET_XSAVEOPT, FEATURE_XSAVEOPT, NONE},
    {ZYDIS_ISA_SET_XSAVEC, FEATURE_XSAVEC, NONE},
    {ZYDIS_ISA_SET_XSAVES, FEATURE_XSAVES, NONE},
};

static bool has(const struct soft_vcpu *v, unsigned feature)
{
    return feature == NONE || soft_has(v, (enum cpuid_feature)feature);
}

static bool offered(const struct soft_vcpu *v, const ZydisDecodedInstruction *zi)
{
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && !soft_has(v, FEATURE_AVX512F))
        return false;
    /* Outside 64-bit mode Intel's processors ignore W here. */
    if ((zi->mnemonic == ZYDIS_MNEMONIC_VPINSRD || zi->mnemonic == ZYDIS_MNEMONIC_VPEXTRD) &&
        zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX && zi->raw.vex.W &&
        zi->machine_mode != ZYDIS_MACHINE_MODE_LONG_64 && cpuid_model_is_amd(v->cpuid))
        return false;
    if (zi->mnemonic == ZYDIS_MNEMONIC_VPCLMULQDQ && zi->meta.isa_set == ZYDIS_ISA_SET_AVX)
        return soft_has(v, FEATURE_AVX) && soft_has(v, FEATURE_PCLMUL);
    for (unsigned n = 0; n < ARRAY_SIZE(isa_features); n++) {
        if (isa_features[n].isa_set == zi->meta.isa_set)
            return has(v, isa_features[n].feature) && has(v, isa_features[n].second);
    }
    return false;
}

/* In the extensions above, but integer instructions: decode.c's own. */
static bool is_integer(const ZydisDecodedInstruction *zi)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_CRC32:
    case ZYDIS_MNEMONIC_POPCNT:
    case ZYDIS_MNEMONIC_CLFLUSH:
    case ZYDIS_MNEMONIC_PAUSE:
    case ZYDIS_MNEMONIC_XGETBV:
    case ZYDIS_MNEMONIC_XSETBV:
        return true;
    default:
        return zi->meta.isa_set == ZYDIS_ISA_SET_PPRO && zi->meta.isa_ext != ZYDIS_ISA_EXT_X87;
    }
}

/* --- Operands --- */

static bool uses_mxcsr(const ZydisDecodedInstruction *zi)
{
    switch (zi->meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_SSE2:
    case ZYDIS_EXCEPTION_CLASS_SSE3:
    case ZYDIS_EXCEPTION_CLASS_AVX2:
    case ZYDIS_EXCEPTION_CLASS_AVX3:
    case ZYDIS_EXCEPTION_CLASS_AVX11:
    case ZYDIS_EXCEPTION_CLASS_E2:
    case ZYDIS_EXCEPTION_CLASS_E2NF:
    case ZYDIS_EXCEPTION_CLASS_E3:
    case ZYDIS_EXCEPTION_CLASS_E3NF:
    case ZYDIS_EXCEPTION_CLASS_E11:
    case ZYDIS_EXCEPTION_CLASS_E11NF:
        return true;
    default:
        break;
    }
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_RCPPS:
    case ZYDIS_MNEMONIC_RCPSS:
    case ZYDIS_MNEMONIC_RSQRTPS:
    case ZYDIS_MNEMONIC_RSQRTSS:
    case ZYDIS_MNEMONIC_VRCPPS:
    case ZYDIS_MNEMONIC_VRCPSS:
    case ZYDIS_MNEMONIC_VRSQRTPS:
    case ZYDIS_MNEMONIC_VRSQRTSS:
    case ZYDIS_MNEMONIC_VRCP14PS:
    case ZYDIS_MNEMONIC_VRCP14PD:
    case ZYDIS_MNEMONIC_VRCP14SS:
    case ZYDIS_MNEMONIC_VRCP14SD:
    case ZYDIS_MNEMONIC_VRSQRT14PS:
    case ZYDIS_MNEMONIC_VRSQRT14PD:
    case ZYDIS_MNEMONIC_VRSQRT14SS:
    case ZYDIS_MNEMONIC_VRSQRT14SD:
    case ZYDIS_MNEMONIC_VFPCLASSPS:
    case ZYDIS_MNEMONIC_VFPCLASSPD:
    case ZYDIS_MNEMONIC_VFPCLASSSS:
    case ZYDIS_MNEMONIC_VFPCLASSSD:
        return true;
    default:
        return zi->meta.category == ZYDIS_CATEGORY_CONVERT ||
               zi->meta.category == ZYDIS_CATEGORY_VFMA;
    }
}

/* x87 instructions that leave FIP, FDP and FOP alone (SDM vol. 1, 8.1.8). */
static bool is_x87_control(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_FNCLEX:
    case ZYDIS_MNEMONIC_FLDCW:
    case ZYDIS_MNEMONIC_FNSTCW:
    case ZYDIS_MNEMONIC_FNSTSW:
    case ZYDIS_MNEMONIC_FWAIT:
    case ZYDIS_MNEMONIC_FDISI8087_NOP:
    case ZYDIS_MNEMONIC_FENI8087_NOP:
    case ZYDIS_MNEMONIC_FSETPM287_NOP:
        return true;
    default:
        return false;
    }
}

static bool is_vector(ZydisRegisterClass class)
{
    return class == ZYDIS_REGCLASS_XMM || class == ZYDIS_REGCLASS_YMM ||
           class == ZYDIS_REGCLASS_ZMM;
}

static bool is_gpr(ZydisRegisterClass class)
{
    return class == ZYDIS_REGCLASS_GPR8 || class == ZYDIS_REGCLASS_GPR16 ||
           class == ZYDIS_REGCLASS_GPR32 || class == ZYDIS_REGCLASS_GPR64;
}

/* The numbers that go into the encoding. */
struct encoding {
    u8 reg, rm, vvvv;
    bool memory;
    u8 imm_reg; /* the register in imm8[7:4], + 1, or 0 */
};

static bool add_gpr(struct thunk_spec *s, const ZydisDecodedOperand *op, unsigned id, bool read,
                    bool write)
{
    unsigned slot = op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG  ? SLOT_REG
                    : op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ? SLOT_RM
                                                                      : id;

    if (slot >= SLOTS || id >= GPR_COUNT)
        return false;
    /* A 16-bit destination leaves the rest of its register. */
    if (read || op->size < 32)
        s->gpr_in[slot] = (u8)(id + 1);
    if (write)
        s->gpr_out[slot] = (u8)(id + 1);
    return true;
}

static bool add_register(struct thunk_spec *s, struct encoding *e, const ZydisDecodedOperand *op,
                         bool legacy)
{
    ZydisRegisterClass class = ZydisRegisterGetClass(op->reg.value);
    unsigned id = (unsigned)ZydisRegisterGetId(op->reg.value);
    bool read = op->actions & (ZYDIS_OPERAND_ACTION_READ | ZYDIS_OPERAND_ACTION_CONDREAD |
                               ZYDIS_OPERAND_ACTION_CONDWRITE);
    bool write = op->actions & (ZYDIS_OPERAND_ACTION_WRITE | ZYDIS_OPERAND_ACTION_CONDWRITE);
    u8 number = (u8)id;

    if (is_vector(class)) {
        if (read || legacy)
            s->vec_in |= (u32)BIT(id);
        if (write)
            s->vec_out |= (u32)BIT(id);
        if (class != ZYDIS_REGCLASS_XMM && s->vec_size < 64)
            s->vec_size = class == ZYDIS_REGCLASS_YMM ? 32 : 64;
    } else if (class == ZYDIS_REGCLASS_MASK) {
        if (read && !(op->encoding == ZYDIS_OPERAND_ENCODING_MASK && id == 0))
            s->k_in |= (u8)BIT(id);
        if (write)
            s->k_out |= (u8)BIT(id);
    } else if (class == ZYDIS_REGCLASS_FLAGS) {
        s->flags |= (read ? THUNK_FLAGS_IN : 0) | (write ? THUNK_FLAGS_OUT : 0);
    } else if (class == ZYDIS_REGCLASS_MMX || class == ZYDIS_REGCLASS_X87) {
        s->flags |= THUNK_X87;
    } else if (is_gpr(class)) {
        if (!add_gpr(s, op, id, read, write))
            return false;
        number = op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG ? SLOT_REG : SLOT_RM;
    }

    switch (op->encoding) {
    case ZYDIS_OPERAND_ENCODING_MODRM_REG:
        e->reg = number;
        break;
    case ZYDIS_OPERAND_ENCODING_MODRM_RM:
        e->rm = number;
        break;
    case ZYDIS_OPERAND_ENCODING_NDSNDD:
        e->vvvv = number;
        break;
    case ZYDIS_OPERAND_ENCODING_IS4:
        e->imm_reg = (u8)(number + 1);
        break;
    default:
        break;
    }
    return true;
}

/* Aligned moves of VEX and EVEX check alignment, and no other of their instructions. */
static bool is_aligned_vex_move(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_VMOVAPS:
    case ZYDIS_MNEMONIC_VMOVAPD:
    case ZYDIS_MNEMONIC_VMOVDQA:
    case ZYDIS_MNEMONIC_VMOVDQA32:
    case ZYDIS_MNEMONIC_VMOVDQA64:
    case ZYDIS_MNEMONIC_VMOVNTPS:
    case ZYDIS_MNEMONIC_VMOVNTPD:
    case ZYDIS_MNEMONIC_VMOVNTDQ:
    case ZYDIS_MNEMONIC_VMOVNTDQA:
        return true;
    default:
        return false;
    }
}

static bool is_unaligned_legacy(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_MOVUPS:
    case ZYDIS_MNEMONIC_MOVUPD:
    case ZYDIS_MNEMONIC_MOVDQU:
    case ZYDIS_MNEMONIC_LDDQU:
    case ZYDIS_MNEMONIC_PCMPESTRI:
    case ZYDIS_MNEMONIC_PCMPESTRM:
    case ZYDIS_MNEMONIC_PCMPISTRI:
    case ZYDIS_MNEMONIC_PCMPISTRM:
        return true;
    default:
        return false;
    }
}

static void add_alignment(struct thunk_spec *s, const ZydisDecodedInstruction *zi)
{
    if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
        if (is_aligned_vex_move(zi->mnemonic))
            s->mem_align = (u8)s->mem_size;
        return;
    }
    /* SHA: whether it checks is the processor's choice, and only the host knows. */
    if (s->mem_size != 16 || is_unaligned_legacy(zi->mnemonic) ||
        zi->meta.isa_set == ZYDIS_ISA_SET_SHA)
        return;
    s->mem_align = 16;
    if (zi->meta.exception_class != ZYDIS_EXCEPTION_CLASS_SSE1)
        s->flags |= THUNK_MM_ALIGN;
}

/* EVEX classes without fault suppression access the whole operand whatever the mask. */
static bool suppresses_faults(ZydisExceptionClass class)
{
    switch (class) {
    case ZYDIS_EXCEPTION_CLASS_E2:
    case ZYDIS_EXCEPTION_CLASS_E3:
    case ZYDIS_EXCEPTION_CLASS_E4:
    case ZYDIS_EXCEPTION_CLASS_E5:
    case ZYDIS_EXCEPTION_CLASS_E1:
    case ZYDIS_EXCEPTION_CLASS_E6:
    case ZYDIS_EXCEPTION_CLASS_E10:
    case ZYDIS_EXCEPTION_CLASS_E11:
        return true;
    default:
        return false;
    }
}

static void add_masking(struct thunk_spec *s, const struct decode_context *ctx,
                        const ZydisDecodedOperand *memory)
{
    const ZydisDecodedInstruction *zi = ctx->zi;
    unsigned widest = memory->element_size, narrow_size;
    bool packed =
        zi->meta.category == ZYDIS_CATEGORY_COMPRESS || zi->meta.category == ZYDIS_CATEGORY_EXPAND;

    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ:
        s->masking = MASKING_SIGN;
        s->elem_size =
            zi->mnemonic == ZYDIS_MNEMONIC_VMASKMOVPS || zi->mnemonic == ZYDIS_MNEMONIC_VPMASKMOVD
                ? 4
                : 8;
        for (unsigned n = 0; n < zi->operand_count; n++) {
            if (ctx->ops[n].encoding == ZYDIS_OPERAND_ENCODING_NDSNDD)
                s->mask_reg = (u8)ZydisRegisterGetId(ctx->ops[n].reg.value);
        }
        return;
    default:
        break;
    }
    /* The mask of these is not of the memory operand's elements: they suppress no faults. */
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_VDBPSADBW:
    case ZYDIS_MNEMONIC_VGF2P8AFFINEQB:
    case ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB:
    case ZYDIS_MNEMONIC_VCVTNE2PS2BF16:
        return;
    default:
        break;
    }
    if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX ||
        (zi->raw.evex.aaa == 0 && zi->meta.category != ZYDIS_CATEGORY_COMPRESS) ||
        !(packed || suppresses_faults(zi->meta.exception_class))) {
        if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && zi->raw.evex.aaa != 0)
            s->flags |= THUNK_MERGES;
        return;
    }
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &ctx->ops[n];

        if (op->type == ZYDIS_OPERAND_TYPE_REGISTER &&
            is_vector(ZydisRegisterGetClass(op->reg.value)))
            widest = MAX(widest, op->element_size);
    }
    if (widest == 0 || s->mem_size == 0)
        return;
    s->mask_reg = zi->raw.evex.aaa;
    if (zi->mnemonic == ZYDIS_MNEMONIC_VPSHUFBITQMB)
        widest = 8; /* a mask bit a byte of the result */
    s->mask_bits = (u8)(zi->avx.vector_length / widest);
    narrow_size = s->mem_size / s->mask_bits;
    if (zi->meta.isa_set == ZYDIS_ISA_SET_AVX512F_SCALAR ||
        zi->meta.isa_set == ZYDIS_ISA_SET_AVX512DQ_SCALAR) {
        s->masking = MASKING_K;
        s->mask_bits = 1;
        s->elem_size = (u8)s->mem_size;
    } else if (packed) {
        s->masking = MASKING_K_PACKED;
        s->elem_size = (u8)narrow_size;
    } else if (zi->avx.broadcast.mode != ZYDIS_BROADCAST_MODE_INVALID ||
               zi->meta.category == ZYDIS_CATEGORY_BROADCAST) {
        s->masking = MASKING_K_REPEAT;
        s->elem_size = (u8)MIN(widest / 8, s->mem_size);
    } else {
        s->masking = MASKING_K;
        s->elem_size = (u8)MAX(narrow_size, 1);
    }
}

static bool add_operands(struct thunk_spec *s, struct encoding *e, const struct decode_context *ctx)
{
    bool legacy = ctx->zi->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY;
    const ZydisDecodedOperand *memory = NULL;

    for (unsigned n = 0; n < ctx->zi->operand_count; n++) {
        const ZydisDecodedOperand *op = &ctx->ops[n];

        if (op->type == ZYDIS_OPERAND_TYPE_MEMORY) {
            if (memory || op->size == 0 || op->size > 512)
                return false;
            memory = op;
            e->memory = true;
            s->mem_size = op->size / 8;
            s->mem_access =
                op->actions & (ZYDIS_OPERAND_ACTION_WRITE | ZYDIS_OPERAND_ACTION_CONDWRITE)
                    ? ACCESS_WRITE
                    : ACCESS_READ;
        } else if (op->type == ZYDIS_OPERAND_TYPE_REGISTER && !add_register(s, e, op, legacy)) {
            return false;
        }
    }
    if (memory) {
        add_alignment(s, ctx->zi);
        add_masking(s, ctx, memory);
    }
    return true;
}

static enum fpu_class class_of(const struct thunk_spec *s, const ZydisDecodedInstruction *zi)
{
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX ||
        zi->meta.isa_ext == ZYDIS_ISA_EXT_AVX512VEX)
        return FPU_AVX512;
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX)
        return FPU_AVX;
    if (zi->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT)
        return FPU_X87; /* the one-byte opcodes here are D8 to DF */
    if ((s->flags & THUNK_X87) && !s->vec_in)
        return FPU_MMX;
    return FPU_SSE;
}

/* --- Encoding for the host --- */

static void put(struct thunk_spec *s, unsigned byte)
{
    s->insn[s->insn_len++] = (u8)byte;
}

/* Those whose memory operand stands for a general register. */
static bool has_gpr_in_memory(const ZydisDecodedInstruction *zi)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_VMOVD:
    case ZYDIS_MNEMONIC_VPEXTRD:
    case ZYDIS_MNEMONIC_VPINSRD:
    case ZYDIS_MNEMONIC_VCVTSI2SS:
    case ZYDIS_MNEMONIC_VCVTSI2SD:
    case ZYDIS_MNEMONIC_VCVTUSI2SS:
    case ZYDIS_MNEMONIC_VCVTUSI2SD:
        return true;
    default:
        return false;
    }
}

/*
 * The W that the host's 64-bit mode needs. Where an instruction has a general register, W is that
 * register's width, and outside 64-bit mode it is ignored (SDM vol. 2A, 2.3.5.1): no guest register
 * is wider than 32 bits there.
 */
static unsigned host_w(const struct decode_context *ctx, unsigned w)
{
    const ZydisDecodedInstruction *zi = ctx->zi;

    if ((ctx->mode & MODE_CODE_MASK) == MODE_CODE64)
        return w;
    for (unsigned n = 0; n < zi->operand_count; n++) {
        if (ctx->ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
            is_gpr(ZydisRegisterGetClass(ctx->ops[n].reg.value)))
            return 0;
    }
    return has_gpr_in_memory(zi) ? 0 : w;
}

static void put_legacy(struct thunk_spec *s, const struct decode_context *ctx,
                       const struct encoding *e)
{
    const ZydisDecodedInstruction *zi = ctx->zi;
    unsigned rex = 0;
    bool seen[3] = {false, false, false};

    for (unsigned n = 0; n < zi->raw.prefix_count; n++) {
        u8 prefix = zi->raw.prefixes[n].value;
        unsigned kind = prefix == 0x66 ? 0 : prefix == 0xf2 ? 1 : 2;

        if ((prefix != 0x66 && prefix != 0xf2 && prefix != 0xf3) ||
            zi->raw.prefixes[n].type == ZYDIS_PREFIX_TYPE_IGNORED || seen[kind])
            continue;
        seen[kind] = true;
        put(s, prefix);
    }
    if ((zi->attributes & ZYDIS_ATTRIB_HAS_REX) && zi->raw.rex.W)
        rex |= 0x48;
    if (e->reg >= 8)
        rex |= 0x44;
    if (!e->memory && e->rm >= 8)
        rex |= 0x41;
    if (rex)
        put(s, rex);
    if (zi->opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
        put(s, 0x0f);
    if (zi->opcode_map == ZYDIS_OPCODE_MAP_0F38)
        put(s, 0x38);
    if (zi->opcode_map == ZYDIS_OPCODE_MAP_0F3A)
        put(s, 0x3a);
}

static void put_vex(struct thunk_spec *s, const struct decode_context *ctx,
                    const struct encoding *e)
{
    const struct ZydisDecodedInstructionRawVex_ *vex = &ctx->zi->raw.vex;
    unsigned w = host_w(ctx, vex->W);
    /* Without a register in it, vvvv must be 1111. */
    unsigned vvvv = ~(unsigned)e->vvvv & 15;

    put(s, 0xc4);
    put(s, (e->reg < 8) << 7 | 0x40 | (e->memory || e->rm < 8) << 5 | vex->m_mmmm);
    put(s, w << 7 | vvvv << 3 | (unsigned)vex->L << 2 | vex->pp);
}

static void put_evex(struct thunk_spec *s, const struct decode_context *ctx,
                     const struct encoding *e)
{
    const struct ZydisDecodedInstructionRawEvex *evex = &ctx->zi->raw.evex;
    unsigned w = host_w(ctx, evex->W);
    unsigned rm = e->memory ? 0 : e->rm;

    put(s, 0x62);
    put(s, !(e->reg & 8) << 7 | !(rm & 16) << 6 | !(rm & 8) << 5 | !(e->reg & 16) << 4 | evex->mmm);
    put(s, w << 7 | (~(unsigned)e->vvvv & 15) << 3 | 4 | evex->pp);
    put(s, (unsigned)evex->z << 7 | (unsigned)evex->L2 << 6 | (unsigned)evex->L << 5 |
               (unsigned)evex->b << 4 | !(e->vvvv & 16) << 3 | evex->aaa);
}

static bool encode(struct thunk_spec *s, const struct decode_context *ctx, const struct encoding *e)
{
    const ZydisDecodedInstruction *zi = ctx->zi;

    switch (zi->encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_LEGACY:
        put_legacy(s, ctx, e);
        break;
    case ZYDIS_INSTRUCTION_ENCODING_VEX:
        put_vex(s, ctx, e);
        break;
    case ZYDIS_INSTRUCTION_ENCODING_EVEX:
        put_evex(s, ctx, e);
        break;
    default:
        return false;
    }
    put(s, zi->opcode);
    if (zi->attributes & ZYDIS_ATTRIB_HAS_MODRM)
        put(s, e->memory ? (e->reg & 7u) << 3 | 6u : 0xc0u | (e->reg & 7u) << 3 | (e->rm & 7u));
    for (unsigned n = 0; n < 2 && zi->raw.imm[n].size; n++)
        put(s, e->imm_reg ? (e->imm_reg - 1u) << 4 | (zi->raw.imm[n].value.u & 15)
                          : (u8)zi->raw.imm[n].value.u);
    return s->insn_len <= THUNK_INSN_MAX;
}

/* --- Decoding --- */

static insn_fn *handler_of(const struct thunk_spec *s)
{
    if (s->flags & THUNK_X87)
        return !s->mem_size                    ? run_x87_register
               : s->mem_access == ACCESS_WRITE ? run_x87_store
                                               : run_x87_load;
    return !s->mem_size ? run_register : s->mem_access == ACCESS_WRITE ? run_store : run_load;
}

bool host_exec_decode(struct soft_vcpu *v, const struct decode_context *ctx, struct insn *out)
{
    const ZydisDecodedInstruction *zi = ctx->zi;
    struct encoding e = {.reg = zi->raw.modrm.reg, .rm = zi->raw.modrm.rm};
    struct thunk_spec s;
    const u8 *modrm;

    if (is_integer(zi) || !offered(v, zi))
        return false;
    if (zi->mnemonic == ZYDIS_MNEMONIC_MOVNTI) {
        out->fn = run_movnti;
        out->dst = (u8)ZydisRegisterGetId(ctx->ops[1].reg.value);
        out->imm = ctx->ops[1].size / 8;
        return true;
    }
    out->fn = x87_decode(ctx, out);
    if (!out->fn)
        out->fn = xsave_decode(ctx, out);
    if (!out->fn)
        out->fn = simd_mem_decode(ctx, out);
    if (out->fn)
        return true;

    memset(&s, 0, sizeof(s));
    s.vec_size = 16;
    if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
        s.flags |= THUNK_ZERO_UPPER;
    if (!add_operands(&s, &e, ctx) || !encode(&s, ctx, &e))
        return false;
    s.fpu_class = (u8)class_of(&s, zi);
    if (s.fpu_class == FPU_X87 || zi->mnemonic == ZYDIS_MNEMONIC_EMMS)
        s.flags |= THUNK_X87;
    if (zi->mnemonic == ZYDIS_MNEMONIC_EMMS)
        s.fpu_class = FPU_MMX;
    if (s.fpu_class == FPU_X87 && !is_x87_control(zi->mnemonic)) {
        modrm = ctx->bytes + zi->raw.modrm.offset;
        s.flags |= THUNK_POINTERS;
        s.fop = (u16)((zi->opcode & 7) << 8 | *modrm);
    }
    if (uses_mxcsr(zi))
        s.flags |= THUNK_MXCSR;

    out->ext = thunk_get(v->host_exec->arena, &s);
    out->fn = out->ext ? handler_of(&s) : run_no_room;
    return true;
}

/* --- Life --- */

static u32 host_mxcsr_mask(void)
{
    _Alignas(16) u8 image[512];
    u32 mask;

    memset(image, 0, sizeof(image));
    __asm__ volatile("fxsave64 %0" : "=m"(image));
    memcpy(&mask, image + 28, sizeof(mask));
    return mask ? mask : MXCSR_DEFAULT_MASK;
}

int host_exec_create(struct soft_vcpu *v, struct error *err)
{
    struct host_exec *x = calloc(1, sizeof(*x));

    if (!x)
        return error_host(err, ENOMEM, "a processor's SIMD state");
    x->mxcsr_mask = host_mxcsr_mask();
    if (!soft_has(v, FEATURE_MISALIGNSSE))
        x->mxcsr_mask &= (u32)~MXCSR_MM;
    for (u32 n = 2; n < ARRAY_SIZE(x->xsave); n++) {
        struct cpuid_dynamic dynamic = {.cr4 = 0};
        struct cpuid_regs r;

        if (!(cpuid_model_xcr0(v->cpuid) & BIT(n)))
            continue;
        cpuid_model_query(v->cpuid, &dynamic, 0xd, n, &r);
        x->xsave[n].size = r.eax;
        x->xsave[n].offset = r.ebx;
        x->xsave[n].aligned = r.ecx & BIT(1);
    }
    x->arena = thunk_arena_create(ARENA_SIZE, soft_has(v, FEATURE_AVX),
                                  soft_has(v, FEATURE_AVX512F), soft_has(v, FEATURE_AVX512BW), err);
    if (!x->arena) {
        free(x);
        return -ENOMEM;
    }
    v->host_exec = x;
    return 0;
}

void host_exec_destroy(struct soft_vcpu *v)
{
    if (!v->host_exec)
        return;
    thunk_arena_destroy(v->host_exec->arena);
    free(v->host_exec);
    v->host_exec = NULL;
}

bool host_exec_full(const struct soft_vcpu *v)
{
    return thunk_arena_full(v->host_exec->arena);
}

void host_exec_restart(struct soft_vcpu *v)
{
    thunk_arena_reset(v->host_exec->arena);
}
