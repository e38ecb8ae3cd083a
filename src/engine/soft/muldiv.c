/*
 * Multiplication and division. The host's instructions make results and flags; a quotient that does not
 * fit is found beforehand and raises #DE.
 */
#include "engine/soft/exception.h"
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"

/*
 * The one-operand forms need the accumulator in AX, EDX:EAX or RDX:RAX and the flags through AX too, so
 * flags are moved by way of another register.
 */
#define FLAGS_IN "movl %k[f], %%eax\n\t" ASM_LOAD_FLAGS
#define FLAGS_OUT "\n\tmov %%rax, %[low]\n\tlahf\n\tseto %%al\n\tmovzwl %%ax, %k[f]"

#define WIDE_OP(name, bits, suffix)                                                                \
    static inline void run_##name##bits(struct soft_vcpu *v, u##bits rm)                           \
    {                                                                                              \
        u64 low = v->cpu.gpr[RAX], high = v->cpu.gpr[RDX], f = v->aflags;                          \
                                                                                                   \
        __asm__ volatile(FLAGS_IN "mov %[low], %%rax\n\t" #name #suffix " %[rm]" FLAGS_OUT         \
                         : [low] "+r"(low), "+d"(high), [f] "+r"(f)                                \
                         : [rm] "r"(rm)                                                            \
                         : "cc", "rax");                                                           \
        v->aflags = (u32)f;                                                                        \
        reg_set##bits(v, RAX, (u##bits)low);                                                       \
        reg_set##bits(v, RDX, (u##bits)high);                                                      \
    }
#define BYTE_OP(name)                                                                              \
    static inline void run_##name##8(struct soft_vcpu * v, u8 rm)                                  \
    {                                                                                              \
        u64 low = v->cpu.gpr[RAX], f = v->aflags;                                                  \
                                                                                                   \
        __asm__ volatile(FLAGS_IN "mov %[low], %%rax\n\t" #name "b %[rm]" FLAGS_OUT                \
                         : [low] "+r"(low), [f] "+r"(f)                                            \
                         : [rm] "r"(rm)                                                            \
                         : "cc", "rax");                                                           \
        v->aflags = (u32)f;                                                                        \
        reg_set16(v, RAX, (u16)low);                                                               \
    }
#define ALL_OPS(name) BYTE_OP(name) WIDE_OP(name, 16, w) WIDE_OP(name, 32, l) WIDE_OP(name, 64, q)

ALL_OPS(mul)
ALL_OPS(imul)
ALL_OPS(div)
ALL_OPS(idiv)

/* --- When a division does not fit --- */

static bool mul_faults8(const struct soft_vcpu *v, u8 d)
{
    return false;
}
#define mul_faults16 mul_faults8
#define mul_faults32 mul_faults8
#define mul_faults64 mul_faults8
#define imul_faults8 mul_faults8
#define imul_faults16 mul_faults8
#define imul_faults32 mul_faults8
#define imul_faults64 mul_faults8

static bool div_faults8(const struct soft_vcpu *v, u8 d)
{
    return reg_get8(v, 1) >= d;
}
static bool div_faults16(const struct soft_vcpu *v, u16 d)
{
    return reg_get16(v, RDX) >= d;
}
static bool div_faults32(const struct soft_vcpu *v, u32 d)
{
    return reg_get32(v, RDX) >= d;
}
static bool div_faults64(const struct soft_vcpu *v, u64 d)
{
    return reg_get64(v, RDX) >= d;
}
static bool idiv_faults8(const struct soft_vcpu *v, u8 d)
{
    s16 n = (s16)reg_get16(v, RAX);

    return d == 0 || n / (s8)d != (s8)(n / (s8)d);
}
static bool idiv_faults16(const struct soft_vcpu *v, u16 d)
{
    s32 n = (s32)((u32)reg_get16(v, RDX) << 16 | reg_get16(v, RAX));

    return d == 0 || (n == INT32_MIN && d == 0xffff) || n / (s16)d != (s16)(n / (s16)d);
}
static bool idiv_faults32(const struct soft_vcpu *v, u32 d)
{
    s64 n = (s64)((u64)reg_get32(v, RDX) << 32 | reg_get32(v, RAX));

    return d == 0 || (n == INT64_MIN && d == 0xffffffff) || n / (s32)d != (s32)(n / (s32)d);
}
static bool idiv_faults64(const struct soft_vcpu *v, u64 d)
{
    s128 n = (s128)((u128)v->cpu.gpr[RDX] << 64 | v->cpu.gpr[RAX]);
    u128 magnitude = n < 0 ? -(u128)n : (u128)n;
    u64 divisor = (s64)d < 0 ? -d : d;
    bool negative = (n < 0) != ((s64)d < 0);

    if (d == 0)
        return true;
    return magnitude / divisor > (u128)INT64_MAX + negative;
}

#define FORMS_OF(name, bits)                                                                       \
    static void name##_r##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        u##bits rm = reg_get##bits(v, i->dst);                                                     \
                                                                                                   \
        if (unlikely(name##_faults##bits(v, (u##bits)rm))) {                                       \
            v->cur = i;                                                                            \
            soft_raise(v, EXC_DE);                                                                 \
        }                                                                                          \
        run_##name##bits(v, rm);                                                                   \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        if (unlikely(name##_faults##bits(v, rm))) {                                                \
            v->cur = i;                                                                            \
            soft_raise(v, EXC_DE);                                                                 \
        }                                                                                          \
        run_##name##bits(v, rm);                                                                   \
        NEXT(v, i);                                                                                \
    }
#define ALL_FORMS(name) FORMS_OF(name, 8) FORMS_OF(name, 16) FORMS_OF(name, 32) FORMS_OF(name, 64)

ALL_FORMS(mul)
ALL_FORMS(imul)
ALL_FORMS(div)
ALL_FORMS(idiv)

#define ENTRY(name)                                                                                \
    [MULDIV_##name] = {{name##_r8, name##_r16, name##_r32, name##_r64},                            \
                       {name##_m8, name##_m16, name##_m32, name##_m64}}

insn_fn *const muldiv_fns[MULDIV_COUNT][2][4] = {ENTRY(mul), ENTRY(imul), ENTRY(div), ENTRY(idiv)};

/* --- IMUL with two and three operands --- */

/* Flags go in as well: some processors leave the undefined ones as they were. */
#define IMUL(bits)                                                                                 \
    static inline u##bits product##bits(struct soft_vcpu *v, u##bits a, u##bits b)                 \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS "imul %[b], %[a]" ASM_SAVE_FLAGS                                    \
                : [a] "+r"(a), "+a"(f)                                                             \
                : [b] "r"(b)                                                                       \
                : "cc");                                                                           \
        v->aflags = f & 0xffff;                                                                    \
        return a;                                                                                  \
    }                                                                                              \
    static void imul2_r##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      product##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src)));       \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void imul2_m##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        reg_set##bits(v, i->dst, product##bits(v, reg_get##bits(v, i->dst), rm));                  \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void imul3_r##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        reg_set##bits(v, i->dst, product##bits(v, reg_get##bits(v, i->src), (u##bits)i->imm));     \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void imul3_m##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        reg_set##bits(v, i->dst, product##bits(v, rm, (u##bits)i->imm));                           \
        NEXT(v, i);                                                                                \
    }
IMUL(16)
IMUL(32)
IMUL(64)

insn_fn *const imul2_fns[2][4] = {{NULL, imul2_r16, imul2_r32, imul2_r64},
                                  {NULL, imul2_m16, imul2_m32, imul2_m64}};
insn_fn *const imul3_fns[2][4] = {{NULL, imul3_r16, imul3_r32, imul3_r64},
                                  {NULL, imul3_m16, imul3_m32, imul3_m64}};
