/*
 * Random cases.
 *
 * What can be encoded is found by asking the decoder about every combination of map, opcode, mandatory
 * prefix, W, vector length and the fields that select an instruction: a `form` each, some thousands.
 * A case picks a group (integer, x87, SSE, ...) by weight, a mnemonic of it, and a form of that, all
 * evenly, so that rare instructions are met as often as common ones. The form's free bits are random.
 *
 * Registers hold values of several flavours: random bits, small numbers, addresses in the window,
 * floating-point numbers with all their special cases. For the first instruction of a case the base
 * register, displacement or vector index is then set such that its memory operand lies at a chosen
 * place: in the middle, across a page's end, in a page that is read-only or absent, or nowhere.
 *
 * Some cases are single-stepped (EFLAGS.TF), the others run into INT3, and those may have several
 * instructions in a row. A few percent are bytes at random, valid or not.
 */
#define _GNU_SOURCE
#include "generate.h"

#include "x86/regs.h"

#include <stdlib.h>
#include <string.h>

#define FLAG_TF BIT(8)
#define FLAG_DF BIT(10)
#define FLAG_NT BIT(14)
#define FLAG_AC BIT(18)
#define FLAG_ID BIT(21)
#define FLAGS_ARITH 0x8d5u
#define MXCSR_MM (1u << 17) /* AMD's: operands needn't be aligned */

/* Key 0 is that of all pages, and Linux needs it to deliver signals. */
#define PKRU_ALL_BUT_0 0xfffffffcu

/* Valid XSAVE images lie here in every other image: standard format, and compacted. */
#define XSAVE_STANDARD 0x400u
#define XSAVE_COMPACT (PAGE + 0x240u)

enum group {
    GROUP_INTEGER,
    GROUP_X87,
    GROUP_SSE,
    GROUP_AVX,
    GROUP_AVX512,
    GROUP_XSAVE,
    GROUP_PRIVILEGED,
    GROUPS,
};
/* Of 100 cases. */
static const u8 group_weights[GROUPS] = {38, 9, 17, 15, 15, 4, 2};

enum encoding_kind { ENCODING_LEGACY, ENCODING_VEX, ENCODING_EVEX };

struct form {
    u16 mnemonic;
    u8 kind, map, opcode;
    u8 pp; /* 0: none, 1: 66, 2: F3, 3: F2 */
    u8 w, l;
    s8 reg, rm; /* fixed ModRM fields, or -1 */
    u8 memory;  /* ModRM.mod is not 3 */
    u8 broadcast;
};

struct mnemonic_forms {
    u16 mnemonic;
    u8 group;
    u32 first, count; /* in generator.forms */
};

struct generator {
    bool mode64;
    struct host host;
    ZydisDecoder decoder;
    struct form *forms;
    u32 nforms, room;
    struct mnemonic_forms *mnemonics; /* sorted by group */
    u32 nmnemonics;
    u32 group_first[GROUPS + 1];
    bool *lacking; /* one a form: the processor hasn't got it */
    const struct mnemonic_forms **choices[CHOICES];
    u32 nchoices[CHOICES];
};

/*
 * What can't be compared: it enters the host's kernel, shows what differs from moment to moment, or
 * is emulated by the kernel.
 */
static const struct {
    ZydisMnemonic mnemonic;
    const char *why;
} left_out[] = {
    {ZYDIS_MNEMONIC_SYSCALL, "enters the host's kernel"},
    {ZYDIS_MNEMONIC_SYSENTER, "enters the host's kernel"},
    {ZYDIS_MNEMONIC_VMCALL, "enters the host's hypervisor"},
    {ZYDIS_MNEMONIC_VMMCALL, "enters the host's hypervisor"},
    {ZYDIS_MNEMONIC_RDTSC, "time"},
    {ZYDIS_MNEMONIC_RDTSCP, "time"},
    {ZYDIS_MNEMONIC_RDPMC, "counts"},
    {ZYDIS_MNEMONIC_RDPRU, "counts"},
    {ZYDIS_MNEMONIC_RDRAND, "random"},
    {ZYDIS_MNEMONIC_RDSEED, "random"},
    {ZYDIS_MNEMONIC_RDPID, "the processor's number"},
    {ZYDIS_MNEMONIC_CPUID, "the model is the guest's own"},
    {ZYDIS_MNEMONIC_SGDT, "Linux emulates what UMIP forbids"},
    {ZYDIS_MNEMONIC_SIDT, "Linux emulates what UMIP forbids"},
    {ZYDIS_MNEMONIC_SLDT, "Linux emulates what UMIP forbids"},
    {ZYDIS_MNEMONIC_SMSW, "Linux emulates what UMIP forbids"},
    {ZYDIS_MNEMONIC_STR, "Linux emulates what UMIP forbids"},
    {ZYDIS_MNEMONIC_SYSEXIT, "KVM emulates it"},
    {ZYDIS_MNEMONIC_INT1, "KVM on AMD reports it before the instruction"},
    {ZYDIS_MNEMONIC_CLUI, "without user interrupts, RDPKRU with a prefix that AMD's ignore"},
    {ZYDIS_MNEMONIC_STUI, "without user interrupts, WRPKRU with a prefix that AMD's ignore"},
    {ZYDIS_MNEMONIC_PVALIDATE, "the host's hypervisor has SEV-SNP on"},
    {ZYDIS_MNEMONIC_CLZERO, "not offered to guests"},
    {ZYDIS_MNEMONIC_MONITORX, "not offered to guests"},
    {ZYDIS_MNEMONIC_MWAITX, "not offered to guests"},
    {ZYDIS_MNEMONIC_VMRUN, "EFER.SVME is set when the host is a guest under SVM"},
    {ZYDIS_MNEMONIC_VMLOAD, "EFER.SVME is set when the host is a guest under SVM"},
    {ZYDIS_MNEMONIC_VMSAVE, "EFER.SVME is set when the host is a guest under SVM"},
    {ZYDIS_MNEMONIC_STGI, "EFER.SVME is set when the host is a guest under SVM"},
    {ZYDIS_MNEMONIC_CLGI, "EFER.SVME is set when the host is a guest under SVM"},
    {ZYDIS_MNEMONIC_SKINIT, "EFER.SVME is set when the host is a guest under SVM"},
    {ZYDIS_MNEMONIC_INVLPGA, "EFER.SVME is set when the host is a guest under SVM"},
};

static bool is_left_out(ZydisMnemonic mnemonic)
{
    for (unsigned n = 0; n < ARRAY_SIZE(left_out); n++) {
        if (left_out[n].mnemonic == mnemonic)
            return true;
    }
    return false;
}

/* --- Forms --- */

static unsigned put_vex(const struct form *f, struct random *r, bool mode64, u8 *p)
{
    bool used = r && random_percent(r, 50); /* VEX.vvvv */
    u8 vvvv = used ? (u8)random_below(r, 16) : 15;
    u8 high = r && mode64 ? (u8)(random_next(r) & 0xe0) : 0xe0; /* R, X, B */
    u8 last = (u8)(f->w << 7 | vvvv << 3 | f->l << 2 | f->pp);

    if (f->map == 1 && !f->w && (high & 0x60) == 0x60 && r && random_percent(r, 50)) {
        p[0] = 0xc5;
        p[1] = (u8)((high & 0x80) | (last & 0x7f));
        return 2;
    }
    p[0] = 0xc4;
    p[1] = (u8)(high | f->map);
    p[2] = last;
    return 3;
}

static unsigned put_evex(const struct form *f, struct random *r, bool mode64, u8 *p)
{
    u8 vvvv = r && random_percent(r, 55) ? (u8)random_below(r, 16) : 15;
    u8 high = r && mode64 ? (u8)(random_next(r) & 0xf0) : 0xf0; /* R, X, B, R' */
    u8 mask = r && random_percent(r, 65) ? (u8)(1 + random_below(r, 7)) : 0;
    bool zero = r && mask && random_percent(r, 35);
    bool vhigh = r && mode64 && random_percent(r, 30); /* V' */

    p[0] = 0x62;
    p[1] = (u8)(high | f->map);
    p[2] = (u8)(f->w << 7 | vvvv << 3 | 4 | f->pp);
    p[3] = (u8)(zero << 7 | f->l << 5 | f->broadcast << 4 | !vhigh << 3 | mask);
    return 4;
}

/* LOCK and stray prefixes, then what the form asks for. */
static unsigned put_legacy(const struct form *f, struct random *r, bool mode64, u8 *p)
{
    static const u8 mandatory[] = {0, 0x66, 0xf3, 0xf2};
    static const u8 stray[] = {0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf2, 0xf3};
    unsigned n = 0;

    if (r) {
        if (f->memory ? random_percent(r, 8) : random_below(r, 256) == 0)
            p[n++] = 0xf0;
        if (random_percent(r, 6))
            p[n++] = stray[random_below(r, sizeof(stray))];
    }
    if (f->pp)
        p[n++] = mandatory[f->pp];
    if (mode64) {
        u8 rex = (u8)(f->w << 3);

        if (r && random_percent(r, 55))
            rex |= (u8)(0x40 | random_below(r, 8));
        if (rex)
            p[n++] = rex | 0x40;
    }
    if (f->map > 0)
        p[n++] = 0x0f;
    if (f->map > 1)
        p[n++] = f->map == 2 ? 0x38 : 0x3a;
    return n;
}

/* ModRM and SIB at p for a memory operand like *a, as far as REX, VEX or EVEX agree. */
static void put_address(const struct address *a, struct random *r, u8 reg, u8 *p)
{
    bool has_base = a->base != NO_REGISTER, has_index = a->index != NO_REGISTER;
    bool sib = has_index || (has_base && (a->base & 7) == 4) || random_percent(r, 15);
    u8 mod = has_base ? (u8)random_below(r, 3) : 0, base = has_base ? a->base & 7 : 5;

    if (has_base && base == 5 && mod == 0)
        mod = 1;
    /* Without a base it is [disp32], or [RIP + disp32]. */
    p[0] = (u8)(mod << 6 | reg << 3 | (sib ? 4 : base));
    if (sib)
        p[1] = (u8)(a->scale << 6 | (has_index ? a->index & 7 : 4) << 3 | base);
}

/*
 * The bytes of a form; r: free bits at random, else plain. a: what its memory operand should be like, or
 * NULL. Returns where ModRM is; all behind ModRM, or SIB when there is an address, is the caller's.
 */
static unsigned put_form(const struct form *f, struct random *r, bool mode64,
                         const struct address *a, u8 *p)
{
    unsigned n = f->kind == ENCODING_VEX    ? put_vex(f, r, mode64, p)
                 : f->kind == ENCODING_EVEX ? put_evex(f, r, mode64, p)
                                            : put_legacy(f, r, mode64, p);
    u8 mod = 3, reg = 0, rm = 0;

    p[n++] = f->opcode;
    if (r) {
        reg = (u8)random_below(r, 8);
        rm = (u8)random_below(r, 8);
        if (f->memory)
            mod = (u8)random_below(r, 3);
        if (f->memory && mod == 0 && rm == 5 && random_percent(r, 70))
            mod = 1;
    } else if (f->memory) {
        mod = 0;
        rm = f->kind == ENCODING_LEGACY ? 0 : 4;
    }
    if (f->reg >= 0)
        reg = (u8)f->reg;
    if (f->rm >= 0)
        rm = (u8)f->rm;
    p[n] = (u8)(mod << 6 | reg << 3 | rm);
    if (f->memory && a)
        put_address(a, r, reg, p + n);
    return n;
}

static bool decode(const struct generator *g, const u8 *p, unsigned len,
                   ZydisDecodedInstruction *zi, ZydisDecodedOperand *ops)
{
    return ZYAN_SUCCESS(ZydisDecoderDecodeFull(&g->decoder, p, len, zi, ops));
}

static enum group group_of(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
    switch (zi->meta.category) {
    case ZYDIS_CATEGORY_XSAVE:
    case ZYDIS_CATEGORY_XSAVEOPT:
        return GROUP_XSAVE;
    default:
        break;
    }
    if (zi->mnemonic == ZYDIS_MNEMONIC_FXSAVE || zi->mnemonic == ZYDIS_MNEMONIC_FXSAVE64 ||
        zi->mnemonic == ZYDIS_MNEMONIC_FXRSTOR || zi->mnemonic == ZYDIS_MNEMONIC_FXRSTOR64)
        return GROUP_XSAVE;
    if (zi->attributes & ZYDIS_ATTRIB_IS_PRIVILEGED)
        return GROUP_PRIVILEGED;
    if (zi->meta.isa_ext == ZYDIS_ISA_EXT_X87)
        return GROUP_X87;
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX)
        return GROUP_AVX512;
    for (unsigned n = 0; n < zi->operand_count_visible; n++) {
        ZydisRegisterClass class = ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER
                                       ? ZydisRegisterGetClass(ops[n].reg.value)
                                       : ZYDIS_REGCLASS_INVALID;

        if (class == ZYDIS_REGCLASS_MASK)
            return GROUP_AVX512;
        if (class >= ZYDIS_REGCLASS_MMX && class <= ZYDIS_REGCLASS_ZMM)
            return zi->encoding == ZYDIS_INSTRUCTION_ENCODING_VEX ? GROUP_AVX : GROUP_SSE;
    }
    return GROUP_INTEGER;
}

static void add_form(struct generator *g, const struct form *f)
{
    if (g->nforms == g->room) {
        g->room = g->room ? 2 * g->room : 4096;
        g->forms = realloc(g->forms, g->room * sizeof(*g->forms));
        if (!g->forms)
            abort();
    }
    g->forms[g->nforms++] = *f;
}

/* The mnemonic of a form's plain encoding, or 0. */
static u16 probe(const struct generator *g, const struct form *f, ZydisDecodedInstruction *zi,
                 ZydisDecodedOperand *ops)
{
    u8 code[32] = {0};
    unsigned n = put_form(f, NULL, g->mode64, NULL, code);

    if (f->kind != ENCODING_LEGACY && f->memory)
        code[n + 1] = 0x20; /* SIB: with an index, for gathers */
    if (decode(g, code, 15, zi, ops))
        return zi->mnemonic;
    /* Gathers want a mask; and most VEX and EVEX instructions a register in vvvv or none: try both. */
    if (f->kind == ENCODING_EVEX) {
        code[3] |= 1;
        if (decode(g, code, 15, zi, ops))
            return zi->mnemonic;
    }
    return 0;
}

/* Whether a mandatory prefix means nothing here: the form without it is the same. */
static bool is_idle_prefix(const struct generator *g, const struct form *f, u16 mnemonic)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;
    struct form plain = *f;

    if (f->kind != ENCODING_LEGACY || f->pp < 2)
        return false;
    plain.pp = 0;
    return probe(g, &plain, &zi, ops) == mnemonic && zi.meta.category != ZYDIS_CATEGORY_STRINGOP;
}

/* Which of the fields reg and rm select the instruction is seen by trying them all. */
static void find_forms_of(struct generator *g, struct form f)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;
    bool by_rm = !f.memory && f.kind == ENCODING_LEGACY &&
                 ((f.map == 0 && f.opcode >= 0xd8 && f.opcode <= 0xdf) ||
                  (f.map == 1 && (f.opcode == 0x01 || f.opcode == 0xae || f.opcode == 0x1e)));
    u16 found[8];
    bool same = true;

    for (unsigned rm = 0; rm < (by_rm ? 8u : 1u); rm++) {
        f.rm = by_rm ? (s8)rm : -1;
        for (unsigned reg = 0; reg < 8; reg++) {
            f.reg = (s8)reg;
            found[reg] = probe(g, &f, &zi, ops);
            if (found[reg] &&
                (is_left_out((ZydisMnemonic)found[reg]) || is_idle_prefix(g, &f, found[reg])))
                found[reg] = 0;
            same &= found[reg] == found[0];
        }
        if (same && !by_rm) {
            f.reg = -1;
            f.mnemonic = found[0];
            if (found[0])
                add_form(g, &f);
            return;
        }
        for (unsigned reg = 0; reg < 8; reg++) {
            f.reg = (s8)reg;
            f.mnemonic = found[reg];
            if (found[reg])
                add_form(g, &f);
        }
    }
}

static bool is_prefix_or_escape(u8 opcode, bool mode64)
{
    switch (opcode) {
    case 0x0f:
    case 0x26:
    case 0x2e:
    case 0x36:
    case 0x3e:
    case 0x64:
    case 0x65:
    case 0x66:
    case 0x67:
    case 0xf0:
    case 0xf2:
    case 0xf3:
        return true;
    case 0x62:
    case 0xc4:
    case 0xc5:
        return mode64;
    default:
        return mode64 && opcode >= 0x40 && opcode <= 0x4f;
    }
}

static void find_legacy(struct generator *g)
{
    for (unsigned map = 0; map < 4; map++) {
        for (unsigned opcode = 0; opcode < 256; opcode++) {
            if (map == 0 && is_prefix_or_escape((u8)opcode, g->mode64))
                continue;
            if (map == 1 && (opcode == 0x38 || opcode == 0x3a))
                continue;
            for (unsigned bits = 0; bits < 16; bits++) {
                struct form f = {.kind = ENCODING_LEGACY,
                                 .map = (u8)map,
                                 .opcode = (u8)opcode,
                                 .pp = bits & 3,
                                 .w = bits >> 2 & 1,
                                 .memory = bits >> 3 & 1};

                if (!f.w || g->mode64)
                    find_forms_of(g, f);
            }
        }
    }
}

static void find_vector(struct generator *g)
{
    for (unsigned map = 1; map < 4; map++) {
        for (unsigned opcode = 0; opcode < 256; opcode++) {
            for (unsigned bits = 0; bits < 128; bits++) {
                struct form f = {.map = (u8)map,
                                 .opcode = (u8)opcode,
                                 .pp = bits & 3,
                                 .w = bits >> 2 & 1,
                                 .l = bits >> 3 & 3,
                                 .memory = bits >> 5 & 1,
                                 .broadcast = bits >> 6};

                f.kind = ENCODING_EVEX;
                find_forms_of(g, f);
                f.kind = ENCODING_VEX;
                if (f.l < 2 && !f.broadcast)
                    find_forms_of(g, f);
            }
        }
    }
}

static int by_mnemonic(const void *a, const void *b)
{
    const struct form *x = a, *y = b;

    return x->mnemonic - y->mnemonic;
}

static int by_group(const void *a, const void *b)
{
    const struct mnemonic_forms *x = a, *y = b;

    return x->group != y->group ? x->group - y->group : x->mnemonic - y->mnemonic;
}

static void index_forms(struct generator *g, const char *only)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;

    qsort(g->forms, g->nforms, sizeof(*g->forms), by_mnemonic);
    g->mnemonics = calloc(ZYDIS_MNEMONIC_MAX_VALUE + 1, sizeof(*g->mnemonics));
    if (!g->mnemonics)
        abort();
    for (u32 n = 0; n < g->nforms;) {
        struct mnemonic_forms *m = &g->mnemonics[g->nmnemonics];
        u32 end = n;

        while (end < g->nforms && g->forms[end].mnemonic == g->forms[n].mnemonic)
            end++;
        if (!only ||
            !strcasecmp(only, ZydisMnemonicGetString((ZydisMnemonic)g->forms[n].mnemonic))) {
            probe(g, &g->forms[n], &zi, ops);
            *m = (struct mnemonic_forms){g->forms[n].mnemonic, (u8)group_of(&zi, ops), n, end - n};
            g->nmnemonics++;
        }
        n = end;
    }
    qsort(g->mnemonics, g->nmnemonics, sizeof(*g->mnemonics), by_group);
    for (u32 n = 0; n < g->nmnemonics; n++)
        g->group_first[g->mnemonics[n].group + 1] = n + 1;
    for (unsigned n = 0; n < GROUPS; n++)
        g->group_first[n + 1] = MAX(g->group_first[n + 1], g->group_first[n]);
}

/* --- What blocks choose from --- */

#define M(name) ZYDIS_MNEMONIC_##name
#define BY_CONDITION(prefix)                                                                       \
    M(prefix##O), M(prefix##NO), M(prefix##B), M(prefix##NB), M(prefix##Z), M(prefix##NZ),         \
        M(prefix##BE), M(prefix##NBE), M(prefix##S), M(prefix##NS), M(prefix##P), M(prefix##NP),   \
        M(prefix##L), M(prefix##NL), M(prefix##LE), M(prefix##NLE)

/* What compilers emit, and their like. What stands here more often is chosen more often. */
static const u16 common[] = {
    M(MOV),
    M(MOV),
    M(MOV),
    M(MOV),
    M(MOV),
    M(MOV),
    M(LEA),
    M(LEA),
    M(LEA),
    M(ADD),
    M(ADD),
    M(ADD),
    M(SUB),
    M(SUB),
    M(AND),
    M(OR),
    M(XOR),
    M(CMP),
    M(CMP),
    M(TEST),
    M(TEST),
    M(ADC),
    M(SBB),
    M(INC),
    M(DEC),
    M(NEG),
    M(NOT),
    M(SHL),
    M(SHR),
    M(SAR),
    M(SHL),
    M(SHR),
    M(ROL),
    M(ROR),
    M(RCL),
    M(RCR),
    M(IMUL),
    M(IMUL),
    M(MUL),
    M(MOVZX),
    M(MOVZX),
    M(MOVSX),
    M(MOVSX),
    M(MOVSXD),
    M(PUSH),
    M(PUSH),
    M(POP),
    M(POP),
    M(XCHG),
    M(BT),
    M(BTS),
    M(BTR),
    M(BTC),
    M(BSWAP),
    M(CBW),
    M(CWDE),
    M(CDQE),
    M(CWD),
    M(CDQ),
    M(CQO),
    M(SHLD),
    M(SHRD),
    M(XADD),
    M(CMPXCHG),
    M(BSF),
    M(BSR),
    M(POPCNT),
    M(LZCNT),
    M(TZCNT),
    M(ANDN),
    M(BLSR),
    M(RORX),
    M(SHLX),
    M(SHRX),
    M(SARX),
    M(MULX),
    M(LAHF),
    M(SAHF),
    M(NOP),
    M(MOVBE),
    M(MOVDQU),
    M(MOVUPS),
    M(MOVD),
    M(MOVQ),
    M(PXOR),
    M(PMOVMSKB),
    M(MOVSD),
    M(UCOMISD),
    BY_CONDITION(SET),
    BY_CONDITION(CMOV),
};
static const u16 producers[] = {
    M(ADD), M(SUB), M(CMP), M(TEST), M(AND), M(OR),  M(XOR),  M(INC),  M(DEC), M(NEG), M(ADC),
    M(SBB), M(SHL), M(SHR), M(SAR),  M(ROL), M(RCR), M(IMUL), M(SHLD), M(BT),  M(BSF), M(UCOMISD),
};
/* They leave flags alone. */
static const u16 moves[] = {
    M(MOV),   M(MOV),  M(MOV), M(MOV),  M(MOVZX), M(MOVSX), M(LEA),    M(XCHG),  M(NOT),
    M(BSWAP), M(PUSH), M(POP), M(SHLX), M(RORX),  M(MULX),  M(MOVDQU), M(MOVBE), M(MOVQ),
};
static const u16 consumers[] = {
    BY_CONDITION(SET),
    BY_CONDITION(CMOV),
    M(ADC),
    M(ADC),
    M(SBB),
    M(SBB),
    M(RCL),
    M(RCR),
    M(LAHF),
    M(CMC),
    M(ADCX),
    M(ADOX),
    M(SALC),
    M(INC),
    M(DEC),
    M(STC),
    M(CLC),
};
#undef M

static const struct {
    const u16 *mnemonics;
    size_t count;
} choice_lists[CHOICES] = {
    [CHOICE_COMMON] = {common, ARRAY_SIZE(common)},
    [CHOICE_PRODUCER] = {producers, ARRAY_SIZE(producers)},
    [CHOICE_MOVE] = {moves, ARRAY_SIZE(moves)},
    [CHOICE_CONSUMER] = {consumers, ARRAY_SIZE(consumers)},
};

static void find_choices(struct generator *g)
{
    for (unsigned n = 0; n < CHOICES; n++) {
        g->choices[n] = calloc(choice_lists[n].count + 1, sizeof(g->choices[n][0]));
        if (!g->choices[n])
            abort();
        for (size_t at = 0; at < choice_lists[n].count; at++) {
            for (u32 m = 0; m < g->nmnemonics; m++) {
                if (g->mnemonics[m].mnemonic == choice_lists[n].mnemonics[at])
                    g->choices[n][g->nchoices[n]++] = &g->mnemonics[m];
            }
        }
    }
}

struct generator *generator_create(bool mode64, const char *only, const struct host *host)
{
    struct generator *g = calloc(1, sizeof(*g));

    if (!g)
        return NULL;
    g->mode64 = mode64;
    g->host = *host;
    if (mode64)
        ZydisDecoderInit(&g->decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    else
        ZydisDecoderInit(&g->decoder, ZYDIS_MACHINE_MODE_LONG_COMPAT_32, ZYDIS_STACK_WIDTH_32);
    ZydisDecoderEnableMode(&g->decoder, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(&g->decoder, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
    ZydisDecoderEnableMode(&g->decoder, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    find_legacy(g);
    find_vector(g);
    index_forms(g, only);
    find_choices(g);
    g->lacking = calloc(g->nforms, sizeof(*g->lacking));
    if (g->nmnemonics && g->lacking)
        return g;
    generator_destroy(g);
    return NULL;
}

void generator_destroy(struct generator *g)
{
    for (unsigned n = 0; n < CHOICES; n++)
        free(g->choices[n]);
    free(g->lacking);
    free(g->forms);
    free(g->mnemonics);
    free(g);
}

void generator_size(const struct generator *g, unsigned *mnemonics, unsigned *forms)
{
    *mnemonics = g->nmnemonics;
    *forms = g->nforms;
}

const ZydisDecoder *generator_decoder(const struct generator *g)
{
    return &g->decoder;
}

/* --- Values --- */

static u32 random_float(struct random *r)
{
    static const u32 special[] = {0,          0x80000000, 0x7f800000, 0xff800000,
                                  0x7fc00000, 0x7fa00001, 1,          0x807fffff,
                                  0x00800000, 0x7f7fffff, 0x3f800000, 0xbf800000,
                                  0x4f000000, 0xcf000000, 0x5f000000, 0x3f000000};

    switch (random_below(r, 4)) {
    case 0:
        return special[random_below(r, ARRAY_SIZE(special))];
    case 1:
        return (u32)random_next(r);
    default: /* moderate exponents, some with few significant bits */
        return (u32)(random_below(r, 2) << 31 | (100 + random_below(r, 60)) << 23 |
                     (random_below(r, 1 << 23) & (random_percent(r, 50) ? ~0u : 0x780000u)));
    }
}

static u64 random_double(struct random *r)
{
    static const u64 special[] = {0,
                                  BIT(63),
                                  0x7ffULL << 52,
                                  0xfffULL << 52,
                                  0x7ff8000000000000,
                                  0x7ff4000000000001,
                                  1,
                                  0x800fffffffffffff,
                                  0x0010000000000000,
                                  0x7fefffffffffffff,
                                  0x3ff0000000000000,
                                  0xbff0000000000000,
                                  0x41e0000000000000,
                                  0xc1e0000000000000,
                                  0x43e0000000000000,
                                  0x47efffffe0000001,
                                  0x380fffffffffffff};

    switch (random_below(r, 4)) {
    case 0:
        return special[random_below(r, ARRAY_SIZE(special))];
    case 1:
        return random_next(r);
    default:
        return (u64)random_below(r, 2) << 63 | (u64)(960 + random_below(r, 120)) << 52 |
               (random_next(r) >> 12 & (random_percent(r, 50) ? ~0ULL : 0xff00000000000));
    }
}

static u64 random_small(struct random *r)
{
    return (u64)(s64)(s32)(random_below(r, 256) - 128);
}

static u64 random_integer(struct random *r)
{
    switch (random_below(r, 8)) {
    case 0:
        return random_small(r);
    case 1:
        return BIT(random_below(r, 64)) - random_below(r, 2);
    case 2:
        return (u64)(s64)(s32)random_next(r);
    case 3:
        return random_percent(r, 50) ? 0 : ~0ULL;
    default:
        return random_next(r);
    }
}

/* Fills `size` bytes (a multiple of 8) with values of one flavour. */
static void fill(struct random *r, u8 *p, size_t size)
{
    unsigned flavour = random_below(r, 6);

    for (size_t n = 0; n < size; n += 8) {
        u64 v;

        switch (flavour) {
        case 0:
        case 1:
            v = (u64)random_float(r) << 32 | random_float(r);
            break;
        case 2:
        case 3:
            v = random_double(r);
            break;
        case 4:
            v = random_integer(r);
            break;
        default:
            v = random_next(r);
            break;
        }
        memcpy(p + n, &v, 8);
    }
}

static void random_extended(struct random *r, u8 *p)
{
    u64 significand = random_next(r);
    u16 exponent = (u16)random_next(r);

    switch (random_below(r, 8)) {
    case 0:
        exponent &= 0x8000;
        significand = random_percent(r, 50) ? 0 : significand;
        break;
    case 1:
        exponent |= 0x7fff;
        significand = random_percent(r, 40) ? BIT(63) : significand | BIT(63);
        break;
    case 2:
        break; /* unnormal, more often than not */
    case 3:    /* an integer */
        exponent = (u16)((exponent & 0x8000) | (0x3fff + random_below(r, 66)));
        significand = (significand | BIT(63)) & ~(~0ULL >> random_below(r, 63));
        significand |= BIT(63);
        break;
    default:
        exponent = (u16)((exponent & 0x8000) | (0x3fff - 40 + random_below(r, 80)));
        significand |= BIT(63);
        break;
    }
    memset(p, 0, 16);
    memcpy(p, &significand, 8);
    memcpy(p + 8, &exponent, 2);
}

static u64 random_window_address(struct random *r)
{
    return WINDOW + random_below(r, 3 * PAGE);
}

static u64 random_register(struct random *r, bool mode64)
{
    u64 v = random_percent(r, 40) ? random_window_address(r) : random_integer(r);

    return mode64 ? v : (u32)v;
}

static u32 random_mxcsr(struct random *r, u32 mask)
{
    u32 v = 0x1f80;

    if (random_percent(r, 40))
        v |= (u32)random_next(r) & 0xe040; /* RC, FZ, DAZ */
    if (random_percent(r, 25))
        v |= (u32)random_next(r) & 0x3f; /* flags */
    if (random_percent(r, 12))
        v &= ~((u32)random_next(r) & 0x1f80); /* unmasked */
    if (random_percent(r, 4))
        v |= MXCSR_MM;
    return v & mask;
}

static void random_x87(struct random *r, struct user_state *s)
{
    s->fcw = 0x37f;
    if (random_percent(r, 50))
        s->fcw = (u16)((s->fcw & ~0xf00) | (random_next(r) & 0xf00));
    if (random_percent(r, 12))
        s->fcw &= (u16) ~(random_next(r) & 0x3f);
    s->fsw = (u16)(random_next(r) & 0x7f00);
    if (random_percent(r, 20))
        s->fsw |= (u16)(random_next(r) & 0x7f);
    if (random_percent(r, 80)) /* usually nothing is pending */
        s->fsw &= (u16)(s->fcw | 0xff00) | 0x40;
    if (s->fsw & ~s->fcw & 0x3f)
        s->fsw |= 0x8080;
    s->ftw = random_percent(r, 60) ? 0xff : (u8)random_next(r);
    /* AMD's processors keep the pointers only while an exception is pending. */
    if (s->fsw & 0x80) {
        s->fop = (u16)(random_next(r) & 0x7ff);
        s->fip = random_next(r) >> 17;
        s->fdp = random_next(r) >> 17;
    }
    for (unsigned n = 0; n < 8; n++)
        random_extended(r, s->st[n]);
}

/* Bytes of a vector register. */
static unsigned vector_size(const struct host *host)
{
    return host->xcr0 & XCR0_ZMM_HI256 ? 64 : host->xcr0 & XCR0_AVX ? 32 : 16;
}

static void random_vectors(struct random *r, const struct host *host, struct user_state *s)
{
    bool avx512 = host->xcr0 & XCR0_ZMM_HI256;

    for (unsigned n = 0; n < (avx512 ? 32u : 16u); n++)
        fill(r, s->vec[n], vector_size(host));
    for (unsigned n = 0; avx512 && n < 8; n++)
        s->k[n] = random_percent(r, 70) ? random_next(r) : random_integer(r);
}

void generate_state(const struct generator *g, struct random *r, struct user_state *s)
{
    memset(s, 0, sizeof(*s));
    for (unsigned n = 0; n < (g->mode64 ? 16u : 8u); n++)
        s->gpr[n] = random_register(r, g->mode64);
    s->gpr[4] = WINDOW + PAGE + (random_below(r, PAGE / 8) * 8); /* RSP */
    if (random_percent(r, 10))
        s->gpr[4] += random_below(r, 8);
    s->rflags = 0x202 | (random_next(r) & FLAGS_ARITH);
    if (random_percent(r, 20))
        s->rflags |= FLAG_DF;
    if (random_percent(r, 8))
        s->rflags |= FLAG_AC;
    if (random_percent(r, 10))
        s->rflags |= FLAG_ID;
    if (random_percent(r, 3))
        s->rflags |= FLAG_NT;
    s->cs = g->mode64 ? USER_CS64 : USER_CS32;
    s->ss = s->ds = s->es = USER_DS;
    if (random_percent(r, 50)) {
        s->fs_base = WINDOW + random_below(r, PAGE);
        s->gs_base = random_below(r, PAGE);
    }
    random_x87(r, s);
    s->mxcsr = random_mxcsr(r, g->host.mxcsr_mask);
    if (g->host.xcr0 & XCR0_PKRU)
        s->pkru = (u32)random_next(r) & PKRU_ALL_BUT_0;
    random_vectors(r, &g->host, s);
}

/* --- Memory --- */

static void put_xsave_image(struct random *r, u8 *p, const struct host *host, bool compact)
{
    u32 mxcsr = random_mxcsr(r, host->mxcsr_mask);
    u64 components = host->xcr0 & (XCR0_X87 | XCR0_SSE | XCR0_AVX | XCR0_AVX512);
    u64 present = random_next(r) & components, comp = 0;
    struct user_state s;

    random_x87(r, &s);
    fill(r, p + 576, 2696 - 576);
    memcpy(p, &s.fcw, 2);
    memcpy(p + 2, &s.fsw, 2);
    p[4] = s.ftw;
    p[5] = 0;
    memcpy(p + 6, &s.fop, 2);
    memcpy(p + 24, &mxcsr, 4);
    memcpy(p + 32, s.st, sizeof(s.st));
    memset(p + 512, 0, 64);
    if (compact) {
        comp = BIT(63) | (random_percent(r, 50) ? components : random_next(r) & components);
        present &= comp;
    }
    memcpy(p + 512, &present, 8);
    memcpy(p + 520, &comp, 8);
}

void generate_images(struct random *r, const struct host *host,
                     u8 images[IMAGES][WRITABLE_PAGES * PAGE])
{
    for (unsigned n = 0; n < IMAGES; n++) {
        for (unsigned at = 0; at < WRITABLE_PAGES * PAGE; at += 256)
            fill(r, images[n] + at, 256);
        if (n & 1) {
            put_xsave_image(r, images[n] + XSAVE_STANDARD, host, false);
            put_xsave_image(r, images[n] + XSAVE_COMPACT, host, true);
        }
    }
}

void generate_read_only(struct random *r, u8 page[PAGE])
{
    for (unsigned at = 0; at < PAGE; at += 256)
        fill(r, page + at, 256);
}

static void poke(struct test_case *c, u64 address, u64 value)
{
    u64 offset = address - WINDOW;

    if (offset + 8 <= 2 * PAGE && c->npokes < POKES)
        c->pokes[c->npokes++] = (struct poke){(u16)offset, value};
}

/* A place for an operand of `size` bytes. */
static u64 random_target(struct random *r, bool mode64, unsigned size)
{
    unsigned choice = random_below(r, 100);
    u64 at;

    if (choice < 62) {
        at = WINDOW + random_below(r, 2 * PAGE - MIN(size, PAGE));
        return random_percent(r, 60) ? at & ~63ULL : random_percent(r, 50) ? at & ~7ULL : at;
    }
    if (choice < 70)
        return WINDOW + 2 * PAGE + (random_below(r, PAGE - MIN(size, PAGE / 2)) & ~15u);
    if (choice < 86) /* across a page's end, or just short of it */
        return WINDOW + random_below(r, 6) * PAGE - random_below(r, size + 2);
    if (choice < 90)
        return WINDOW + 4 * PAGE + random_below(r, PAGE);
    if (choice < 94)
        return WINDOW + 3 * PAGE + random_below(r, 3) * 2 * PAGE + random_below(r, PAGE);
    if (!mode64)
        return (u32)random_next(r) & 0x7fffffff;
    if (choice < 97)
        return 0x0000800000000000 - random_below(r, 64);
    return choice < 99 ? random_next(r) | BIT(62) : 0xffff800000000000 + random_below(r, 1 << 20);
}

/* --- Fitting the state to an instruction --- */

int gpr_number(ZydisRegister reg)
{
    ZydisRegisterClass class = ZydisRegisterGetClass(reg);

    if (class != ZYDIS_REGCLASS_GPR16 && class != ZYDIS_REGCLASS_GPR32 &&
        class != ZYDIS_REGCLASS_GPR64)
        return -1;
    return ZydisRegisterGetId(reg);
}

static bool is_dword_indexed(const ZydisDecodedInstruction *zi)
{
    const char *name = ZydisMnemonicGetString(zi->mnemonic);

    return strstr(name, "gatherd") || strstr(name, "scatterd");
}

/* Makes the elements of an index register small. */
static void set_vector_index(const struct generator *g, struct random *r,
                             const ZydisDecodedInstruction *zi, struct user_state *s,
                             ZydisRegister reg)
{
    unsigned number = (unsigned)ZydisRegisterGetId(reg);
    u8 *v = s->vec[number];

    if (number >= 16 && !(g->host.xcr0 & XCR0_HI16_ZMM))
        return;
    for (unsigned n = 0; n < vector_size(&g->host); n += is_dword_indexed(zi) ? 4 : 8) {
        s64 index = (s64)random_below(r, 480) - 240;

        memcpy(v + n, &index, is_dword_indexed(zi) ? 4 : 8);
    }
}

static u64 index_value(const struct user_state *s, const ZydisDecodedOperandMem *m)
{
    int number = gpr_number(m->index);

    if (m->index == ZYDIS_REGISTER_AL)
        return s->gpr[0] & 0xff;
    if (number < 0)
        return 0;
    return s->gpr[number] * m->scale;
}

static u64 segment_base(const struct user_state *s, ZydisRegister seg)
{
    return seg == ZYDIS_REGISTER_FS ? s->fs_base : seg == ZYDIS_REGISTER_GS ? s->gs_base : 0;
}

/* Changes registers, or the displacement in the code, such that operand m is at `target`. */
static void aim(const struct generator *g, struct test_case *c, const ZydisDecodedInstruction *zi,
                const ZydisDecodedOperandMem *m, u64 target)
{
    struct user_state *s = &c->before;
    int base = gpr_number(m->base);
    u64 offset = target - segment_base(s, m->segment);

    if (base >= 0) {
        u64 value = offset - index_value(s, m) - (u64)m->disp.value;

        if (base == gpr_number(m->index))
            value = (offset - (u64)m->disp.value) / (1u + m->scale);
        s->gpr[base] = g->mode64 ? value : (u32)value;
    } else if (zi->raw.disp.size == 32) {
        u64 from = m->base == ZYDIS_REGISTER_RIP || m->base == ZYDIS_REGISTER_EIP
                       ? s->rip + zi->length
                       : index_value(s, m);
        u32 disp = (u32)(offset - from);

        memcpy(c->code + zi->raw.disp.offset, &disp, 4);
    }
}

static bool wants_xsave_image(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64:
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
        return true;
    default:
        return false;
    }
}

/* Values in memory that make an instruction more likely to succeed. */
static void prepare_memory(const struct generator *g, struct random *r, struct test_case *c,
                           const ZydisDecodedInstruction *zi, u64 target)
{
    static const u16 selectors[] = {USER_CS32, USER_CS64, USER_DS, 0, 8, 0x10, 0x18, 0x40, 0x63};
    u16 selector = selectors[random_below(r, ARRAY_SIZE(selectors))];
    unsigned size = zi->operand_width / 8;
    u64 rip = CODE + random_below(r, CODE_SIZE);
    u64 frame[5] = {rip, selector, random_next(r) & 0x254dd5, WINDOW + random_below(r, 2 * PAGE),
                    USER_DS};

    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_VLDMXCSR:
        if (random_percent(r, 80))
            poke(c, target, random_mxcsr(r, g->host.mxcsr_mask));
        break;
    case ZYDIS_MNEMONIC_IRET:
    case ZYDIS_MNEMONIC_IRETD:
    case ZYDIS_MNEMONIC_IRETQ:
        if (selector == USER_CS64 || selector == USER_CS32 || random_percent(r, 50))
            frame[1] = g->mode64 ? USER_CS64 : USER_CS32;
        if (size < 4 || random_percent(r, 20))
            break;
        for (unsigned n = 0; n < 5; n++)
            poke(c, target + n * size, size == 8 ? frame[n] : (u32)frame[n]);
        break;
    case ZYDIS_MNEMONIC_RET:
    case ZYDIS_MNEMONIC_JMP:
    case ZYDIS_MNEMONIC_CALL:
        poke(c, target, rip);
        if (zi->meta.branch_type == ZYDIS_BRANCH_TYPE_FAR && size >= 4)
            poke(c, target + size, selector);
        break;
    case ZYDIS_MNEMONIC_LDS:
    case ZYDIS_MNEMONIC_LES:
    case ZYDIS_MNEMONIC_LFS:
    case ZYDIS_MNEMONIC_LGS:
    case ZYDIS_MNEMONIC_LSS:
        poke(c, target + size, selector);
        break;
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_POP:
    case ZYDIS_MNEMONIC_LAR:
    case ZYDIS_MNEMONIC_LSL:
    case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW:
        if (random_percent(r, 60) || zi->mnemonic == ZYDIS_MNEMONIC_LSL)
            poke(c, target, selector);
        break;
    default:
        break;
    }
}

/* What registers should hold for an instruction to do more than fault. */
static void prepare_registers(struct random *r, struct test_case *c,
                              const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
    static const u16 selectors[] = {USER_CS32, USER_CS64, USER_DS, 0, 3, 8, 0x10, 0x18, 0x40, 0x63};
    struct user_state *s = &c->before;

    if ((zi->attributes &
         (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE)) ||
        zi->meta.category == ZYDIS_CATEGORY_STRINGOP)
        s->gpr[1] = random_below(r, 40);
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_LOOP:
    case ZYDIS_MNEMONIC_LOOPE:
    case ZYDIS_MNEMONIC_LOOPNE:
    case ZYDIS_MNEMONIC_JCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
    case ZYDIS_MNEMONIC_JRCXZ:
        s->gpr[1] = random_below(r, 3) | (random_percent(r, 20) ? random_next(r) << 32 : 0);
        if (s->cs == USER_CS32)
            s->gpr[1] = (u32)s->gpr[1];
        break;
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
        if (random_percent(r, 70))
            s->gpr[2] = zi->mnemonic == ZYDIS_MNEMONIC_IDIV && (s64)s->gpr[0] < 0 ? ~0ULL : 0;
        if (s->cs == USER_CS32)
            s->gpr[2] = (u32)s->gpr[2];
        if (random_percent(r, 30))
            s->gpr[0] = random_below(r, 1 << 15);
        break;
    case ZYDIS_MNEMONIC_XGETBV:
        s->gpr[1] = 0;
        break;
    case ZYDIS_MNEMONIC_WRPKRU:
        s->gpr[0] &= PKRU_ALL_BUT_0;
        if (random_percent(r, 80))
            s->gpr[1] = s->gpr[2] = 0;
        break;
    case ZYDIS_MNEMONIC_RDPKRU:
        if (random_percent(r, 80))
            s->gpr[1] = 0;
        break;
    case ZYDIS_MNEMONIC_XSAVE:
    case ZYDIS_MNEMONIC_XSAVE64:
    case ZYDIS_MNEMONIC_XSAVEC:
    case ZYDIS_MNEMONIC_XSAVEC64:
    case ZYDIS_MNEMONIC_XSAVEOPT:
    case ZYDIS_MNEMONIC_XSAVEOPT64:
    case ZYDIS_MNEMONIC_XRSTOR:
    case ZYDIS_MNEMONIC_XRSTOR64:
        s->gpr[0] = (u32)random_next(r);
        break;
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
        if (ops[1].type == ZYDIS_OPERAND_TYPE_REGISTER && random_percent(r, 80)) {
            u64 bit = (u64)((s64)random_below(r, 20000) - 10000);

            s->gpr[ZydisRegisterGetId(ops[1].reg.value)] = s->cs == USER_CS32 ? (u32)bit : bit;
        }
        break;
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_LAR:
    case ZYDIS_MNEMONIC_LSL:
    case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW:
        for (unsigned n = 0; n < zi->operand_count_visible; n++) {
            int number =
                ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER ? gpr_number(ops[n].reg.value) : -1;

            if (number >= 0 && number != 4 && zi->opcode < 0xa0 &&
                (random_percent(r, 50) || zi->mnemonic == ZYDIS_MNEMONIC_LSL))
                s->gpr[number] = selectors[random_below(r, ARRAY_SIZE(selectors))];
        }
        break;
    default:
        break;
    }
}

/* Freed of their alignment by MXCSR.MM, these read only the half of the operand that they use. */
static bool reads_half_under_mm(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_UNPCKLPS:
    case ZYDIS_MNEMONIC_UNPCKLPD:
    case ZYDIS_MNEMONIC_UNPCKHPS:
    case ZYDIS_MNEMONIC_UNPCKHPD:
    case ZYDIS_MNEMONIC_PUNPCKLBW:
    case ZYDIS_MNEMONIC_PUNPCKLWD:
    case ZYDIS_MNEMONIC_PUNPCKLDQ:
    case ZYDIS_MNEMONIC_PUNPCKLQDQ:
    case ZYDIS_MNEMONIC_PUNPCKHBW:
    case ZYDIS_MNEMONIC_PUNPCKHWD:
    case ZYDIS_MNEMONIC_PUNPCKHDQ:
    case ZYDIS_MNEMONIC_PUNPCKHQDQ:
    case ZYDIS_MNEMONIC_PSLLW:
    case ZYDIS_MNEMONIC_PSLLD:
    case ZYDIS_MNEMONIC_PSLLQ:
    case ZYDIS_MNEMONIC_PSRLW:
    case ZYDIS_MNEMONIC_PSRLD:
    case ZYDIS_MNEMONIC_PSRLQ:
    case ZYDIS_MNEMONIC_PSRAW:
    case ZYDIS_MNEMONIC_PSRAD:
        return true;
    default:
        return false;
    }
}

static void fit_state(const struct generator *g, struct random *r, struct test_case *c,
                      const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
    prepare_registers(r, c, zi, ops);
    if (reads_half_under_mm(zi->mnemonic))
        c->before.mxcsr &= ~MXCSR_MM;
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const ZydisDecodedOperandMem *m = &ops[n].mem;
        u64 target;

        if (ops[n].type != ZYDIS_OPERAND_TYPE_MEMORY || m->type == ZYDIS_MEMOP_TYPE_AGEN)
            continue;
        target = random_target(r, g->mode64, ops[n].size / 8);
        /* AMD's processors want the sum before FS's or GS's base to be canonical, too. */
        if (segment_base(&c->before, m->segment) && target >> 32)
            target = WINDOW;
        if (gpr_number(m->base) == 4 && ops[n].visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN &&
            random_percent(r, 85))
            target = c->before.gpr[4];
        if (m->type == ZYDIS_MEMOP_TYPE_VSIB) {
            target = WINDOW + PAGE + random_below(r, 256) * 8;
            set_vector_index(g, r, zi, &c->before, m->index);
        }
        if (wants_xsave_image(zi->mnemonic) && random_percent(r, 85)) {
            c->image |= 1;
            target = WINDOW + (random_percent(r, 60) ? XSAVE_STANDARD : XSAVE_COMPACT);
        } else if (zi->meta.category == ZYDIS_CATEGORY_XSAVE && random_percent(r, 80)) {
            target = WINDOW + (random_below(r, PAGE) & ~63u);
        }
        aim(g, c, zi, m, target);
        prepare_memory(g, r, c, zi, target);
    }
}

/* --- Cases --- */

static void place_code(const struct generator *g, struct random *r, struct test_case *c)
{
    c->code_offset = (u16)(0x100 + random_below(r, 0xc00));
    /* Across the pages' border, or at their end: whole, or cut short by it. */
    if (random_percent(r, 6))
        c->code_offset =
            (u16)((1 + random_below(r, CODE_PAGES)) * PAGE - 1 - random_below(r, c->code_len + 1u));
    c->before.rip = CODE + c->code_offset;
}

/* Bytes that would leave for the kernel if the decoder is wrong about them. */
static bool may_call_kernel(const u8 *p, unsigned len)
{
    for (unsigned n = 0; n + 1 < len; n++) {
        if ((p[n] == 0x0f && (p[n + 1] == 0x05 || p[n + 1] == 0x34 || p[n + 1] == 0x01)) ||
            (p[n] == 0xcd && p[n + 1] == 0x80))
            return true;
    }
    return false;
}

/*
 * Bytes that AMD's processors take and that are invalid by the manuals: they ignore the bits of VEX that
 * would make a mask register's number 8 or more, and LOCK before 0F 00.
 */
static bool is_taken_by_amd(const u8 *p)
{
    u8 opcode = p[0] == 0xc5 ? p[2] : p[3];
    bool extended = !(p[1] & 0x80) || !((p[0] == 0xc5 ? p[1] : p[2]) & 0x40);
    u8 map = p[0] == 0xc5 ? 1 : p[1] & 31;
    const u8 *lock = memchr(p, 0xf0, 4);

    if (lock && memmem(lock, 8, "\x0f\0", 2))
        return true;
    if ((p[0] != 0xc4 && p[0] != 0xc5) || !extended)
        return false;
    return map == 1   ? (opcode >= 0x41 && opcode <= 0x4b) || (opcode >= 0x90 && opcode <= 0x99)
           : map == 3 ? opcode >= 0x30 && opcode <= 0x33
                      : false;
}

static bool has_repeat_prefix(const ZydisDecodedInstruction *zi)
{
    for (unsigned n = 0; n < zi->raw.prefix_count; n++) {
        if ((zi->raw.prefixes[n].value | 1) == 0xf3)
            return true;
    }
    return false;
}

/* Loads CS, from an operand or the stack. */
static bool is_far(const ZydisDecodedInstruction *zi)
{
    if (zi->opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
        return false;
    switch (zi->opcode) {
    case 0x9a:
    case 0xca:
    case 0xcb:
    case 0xcf:
    case 0xea:
        return true;
    default:
        return zi->opcode == 0xff && (zi->raw.modrm.reg == 3 || zi->raw.modrm.reg == 5);
    }
}

/* Whether the name is one of a list's, which commas separate. */
static bool is_listed(const char *list, const char *name)
{
    size_t len = strlen(name);

    for (; *list; list += strcspn(list, ",") + 1) {
        size_t n = strcspn(list, ",");

        if (n == len && !strncasecmp(list, name, len))
            return true;
        if (!list[n])
            break;
    }
    return false;
}

static bool has_mmx_register(const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *ops)
{
    for (unsigned n = 0; n < zi->operand_count_visible; n++) {
        if (ops[n].type == ZYDIS_OPERAND_TYPE_REGISTER &&
            ZydisRegisterGetClass(ops[n].reg.value) == ZYDIS_REGCLASS_MMX)
            return true;
    }
    return false;
}

static bool is_without(const char *list, const ZydisDecodedInstruction *zi,
                       const ZydisDecodedOperand *ops)
{
    return is_listed(list, ZydisMnemonicGetString(zi->mnemonic)) ||
           (is_far(zi) && is_listed(list, "far")) ||
           (has_mmx_register(zi, ops) && is_listed(list, "mmx"));
}

static bool is_usable(const struct generator *g, const ZydisDecodedInstruction *zi,
                      const ZydisDecodedOperand *ops)
{
    if (g->host.without && is_without(g->host.without, zi, ops))
        return false;
    /* AMD's FXRSTOR raises #GP when base and index overflow a 32-bit address. */
    if (wants_xsave_image(zi->mnemonic) && zi->address_width == 32 &&
        zi->machine_mode == ZYDIS_MACHINE_MODE_LONG_64)
        return false;
    /* On AMD's processors a REP prefix changes the condition of LOOPE and LOOPNE. */
    if ((zi->mnemonic == ZYDIS_MNEMONIC_LOOPE || zi->mnemonic == ZYDIS_MNEMONIC_LOOPNE) &&
        has_repeat_prefix(zi))
        return false;
    if (zi->mnemonic == ZYDIS_MNEMONIC_INT && zi->raw.imm[0].value.u == 0x80)
        return false;
    return !is_left_out(zi->mnemonic);
}

static const struct mnemonic_forms *pick_mnemonic(const struct generator *g, struct random *r)
{
    for (;;) {
        unsigned choice = random_below(r, 100), group = 0;

        while (choice >= group_weights[group])
            choice -= group_weights[group++];
        if (g->group_first[group] < g->group_first[group + 1])
            return &g->mnemonics[g->group_first[group] +
                                 random_below(r,
                                              g->group_first[group + 1] - g->group_first[group])];
    }
}

/* One instruction of a random form. Returns its length; *valid: as the decoder sees it. */
static unsigned random_instruction(const struct generator *g, struct random *r, u8 *code,
                                   ZydisDecodedInstruction *zi, ZydisDecodedOperand *ops,
                                   bool *valid)
{
    /* A processor that takes what it should not might take it for what is left out. */
    bool keep_invalid = random_below(r, 24) == 0 && !g->host.without;

    for (;;) {
        const struct mnemonic_forms *m = pick_mnemonic(g, r);
        const struct form *f = &g->forms[m->first + random_below(r, m->count)];

        for (unsigned attempt = 0; attempt < 24; attempt++) {
            unsigned n = put_form(f, r, g->mode64, NULL, code);

            for (unsigned at = n + 1; at < 32; at++)
                code[at] = (u8)random_next(r);
            *valid = decode(g, code, 15, zi, ops);
            if (*valid && is_usable(g, zi, ops))
                return zi->length;
            if (!*valid && keep_invalid && !may_call_kernel(code, 15) && !is_taken_by_amd(code))
                return 15;
        }
    }
}

/* May follow, and be followed by, others: goes on with the next one, if it does not fault. */
static bool goes_on(const ZydisDecodedInstruction *zi)
{
    if (zi->meta.branch_type != ZYDIS_BRANCH_TYPE_NONE)
        return false;
    if (wants_xsave_image(zi->mnemonic)) /* pointers of more bits than some processors keep */
        return false;
    if (zi->mnemonic == ZYDIS_MNEMONIC_LSL) /* of selector 0x78: the processor's number */
        return false;
    if (zi->mnemonic == ZYDIS_MNEMONIC_WRPKRU) /* of what else than PKRU_ALL_BUT_0? */
        return false;
    switch (zi->meta.category) {
    case ZYDIS_CATEGORY_DECIMAL: /* undefined flags would spread */
    case ZYDIS_CATEGORY_STRINGOP:
    case ZYDIS_CATEGORY_INTERRUPT:
    case ZYDIS_CATEGORY_RET:
    case ZYDIS_CATEGORY_SYSTEM:
    case ZYDIS_CATEGORY_XSAVE: /* what is in its initial state may count as in use, or not */
    case ZYDIS_CATEGORY_XSAVEOPT:
        return false;
    default:
        return true;
    }
}

static void add_followers(const struct generator *g, struct random *r, struct test_case *c)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;
    unsigned more = 1 + random_below(r, 6);
    u8 code[32];

    while (more--) {
        bool valid;
        unsigned len = random_instruction(g, r, code, &zi, ops, &valid);

        if (!valid || !goes_on(&zi))
            continue;
        if (reads_half_under_mm(zi.mnemonic))
            c->before.mxcsr &= ~MXCSR_MM;
        memcpy(c->code + c->code_len, code, len);
        c->starts[c->ncode++] = c->code_len;
        c->code_len = (u16)(c->code_len + len);
    }
}

static void start_case(const struct generator *g, struct random *r, struct test_case *c)
{
    memset(c, 0, sizeof(*c));
    generate_state(g, r, &c->before);
    c->image = (u8)random_below(r, IMAGES);
    c->ncode = 1;
}

static void finish_case(const struct generator *g, struct random *r, struct test_case *c,
                        unsigned len, bool valid)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;
    bool step = !valid || random_percent(r, 35);

    c->code_len = (u16)len;
    place_code(g, r, c);
    if (valid && decode(g, c->code, len, &zi, ops)) {
        fit_state(g, r, c, &zi, ops);
        if (!goes_on(&zi))
            step |= zi.meta.category != ZYDIS_CATEGORY_STRINGOP;
        else if (!step && random_percent(r, 45))
            add_followers(g, r, c);
    }
    if (step)
        c->before.rflags |= FLAG_TF;
}

void generate_case_of(const struct generator *g, struct random *r, const u8 *code, unsigned len,
                      struct test_case *c)
{
    start_case(g, r, c);
    memcpy(c->code, code, len);
    finish_case(g, r, c, len, true);
}

void generate_case(const struct generator *g, struct random *r, struct test_case *c)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;
    unsigned len = 15;
    bool valid = false;

    start_case(g, r, c);
    if (g->nmnemonics > 1 && random_percent(r, 4)) {
        do {
            for (unsigned n = 0; n < len; n++)
                c->code[n] = (u8)random_next(r);
            valid = decode(g, c->code, len, &zi, ops);
        } while (valid ? !is_usable(g, &zi, ops)
                       : g->host.without || may_call_kernel(c->code, len) ||
                             is_taken_by_amd(c->code));
        if (valid)
            len = zi.length;
    } else {
        len = random_instruction(g, r, c->code, &zi, ops, &valid);
    }
    finish_case(g, r, c, len, valid);
}

/* --- For blocks --- */

u32 generator_forms(const struct generator *g)
{
    return g->nforms;
}

void generator_set_lacking(struct generator *g, u32 form, bool lacking)
{
    g->lacking[form] = lacking;
}

bool generate_probe(const struct generator *g, struct random *r, u32 form, struct test_case *c)
{
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecodedInstruction zi;

    for (unsigned attempt = 0; attempt < 24; attempt++) {
        start_case(g, r, c);
        for (unsigned n = 0; n < 32; n++)
            c->code[n] = (u8)random_next(r);
        put_form(&g->forms[form], r, g->mode64, NULL, c->code);
        if (!decode(g, c->code, 15, &zi, ops) || !is_usable(g, &zi, ops))
            continue;
        finish_case(g, r, c, zi.length, true);
        c->code_offset = 0x100; /* all of it is there */
        c->before.rip = CODE + c->code_offset;
        c->before.rflags |= FLAG_TF;
        c->code_len = zi.length;
        c->ncode = 1;
        return true;
    }
    return false;
}

bool generate_candidate(const struct generator *g, struct random *r, enum choice choice,
                        const struct address *a, struct candidate *out)
{
    const struct mnemonic_forms *m = g->nchoices[choice]
                                         ? g->choices[choice][random_below(r, g->nchoices[choice])]
                                         : pick_mnemonic(g, r);
    u32 form = m->first + random_below(r, m->count);

    if (g->lacking[form] && random_below(r, 2000))
        return false;
    for (unsigned n = 0; n < sizeof(out->code); n++)
        out->code[n] = (u8)random_next(r);
    put_form(&g->forms[form], r, g->mode64, a, out->code);
    return decode(g, out->code, 15, &out->zi, out->ops) && is_usable(g, &out->zi, out->ops) &&
           goes_on(&out->zi);
}
