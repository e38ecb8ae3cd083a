/*
 * Shifts and rotates, single and double. A count of zero changes no flag, and rotates change CF and OF
 * only: so the guest's flags are put into the host's before the host's instruction runs.
 */
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"

#define SHIFT(name, bits)                                                                          \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a, u8 count)               \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS #name " %%cl, %[a]" ASM_SAVE_FLAGS                                  \
                : [a] "+q"(a), "+a"(f)                                                             \
                : "c"(count)                                                                       \
                : "cc");                                                                           \
        v->aflags = (u16)f;                                                                        \
        return a;                                                                                  \
    }                                                                                              \
    static void name##_r_imm##bits(struct soft_vcpu *v, const struct insn *i)                      \
    {                                                                                              \
        reg_set##bits(v, i->dst, alu_##name##bits(v, reg_get##bits(v, i->dst), (u8)i->imm));       \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_r_cl##bits(struct soft_vcpu *v, const struct insn *i)                       \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      alu_##name##bits(v, reg_get##bits(v, i->dst), (u8)v->cpu.gpr[RCX]));         \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 name##_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 count)    \
    {                                                                                              \
        return alu_##name##bits(v, (u##bits)old, (u8)count);                                       \
    }                                                                                              \
    static inline void name##_memory##bits(struct soft_vcpu *v, const struct insn *i, u8 count)    \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            *p = alu_##name##bits(v, *p, count);                                                   \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, count);                        \
    }                                                                                              \
    static void name##_m_imm##bits(struct soft_vcpu *v, const struct insn *i)                      \
    {                                                                                              \
        name##_memory##bits(v, i, (u8)i->imm);                                                     \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m_cl##bits(struct soft_vcpu *v, const struct insn *i)                       \
    {                                                                                              \
        name##_memory##bits(v, i, (u8)v->cpu.gpr[RCX]);                                            \
        NEXT(v, i);                                                                                \
    }

#define ALL_SIZES(name) SHIFT(name, 8) SHIFT(name, 16) SHIFT(name, 32) SHIFT(name, 64)

SHIFT_OPS(ALL_SIZES)

#define SIZES(prefix)                                                                              \
    {                                                                                              \
        prefix##8, prefix##16, prefix##32, prefix##64                                              \
    }
#define ENTRY(name)                                                                                \
    [SHIFT_##name] = {[FORM_RI] = SIZES(name##_r_imm),                                             \
                      [FORM_RR] = SIZES(name##_r_cl),                                              \
                      [FORM_MI] = SIZES(name##_m_imm),                                             \
                      [FORM_MR] = SIZES(name##_m_cl)},

insn_fn *const shift_fns[SHIFT_COUNT][FORMS][4] = {SHIFT_OPS(ENTRY)};

/* --- SHLD and SHRD --- */

#define DOUBLE(name, bits)                                                                         \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a, u##bits b, u8 count)    \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS #name " %%cl, %[b], %[a]" ASM_SAVE_FLAGS                            \
                : [a] "+r"(a), "+a"(f)                                                             \
                : [b] "r"(b), "c"(count)                                                           \
                : "cc");                                                                           \
        v->aflags = (u16)f;                                                                        \
        return a;                                                                                  \
    }                                                                                              \
    static void name##_r_imm##bits(struct soft_vcpu *v, const struct insn *i)                      \
    {                                                                                              \
        reg_set##bits(                                                                             \
            v, i->dst,                                                                             \
            alu_##name##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src), (u8)i->imm));  \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_r_cl##bits(struct soft_vcpu *v, const struct insn *i)                       \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      alu_##name##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src),      \
                                       (u8)v->cpu.gpr[RCX]));                                      \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 name##_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 count)    \
    {                                                                                              \
        return alu_##name##bits(v, (u##bits)old, reg_get##bits(v, i->src), (u8)count);             \
    }                                                                                              \
    static inline void name##_memory##bits(struct soft_vcpu *v, const struct insn *i, u8 count)    \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            *p = alu_##name##bits(v, *p, reg_get##bits(v, i->src), count);                         \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, count);                        \
    }                                                                                              \
    static void name##_m_imm##bits(struct soft_vcpu *v, const struct insn *i)                      \
    {                                                                                              \
        name##_memory##bits(v, i, (u8)i->imm);                                                     \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m_cl##bits(struct soft_vcpu *v, const struct insn *i)                       \
    {                                                                                              \
        name##_memory##bits(v, i, (u8)v->cpu.gpr[RCX]);                                            \
        NEXT(v, i);                                                                                \
    }

DOUBLE(shld, 16)
DOUBLE(shld, 32)
DOUBLE(shld, 64)
DOUBLE(shrd, 16)
DOUBLE(shrd, 32)
DOUBLE(shrd, 64)

#define WIDE_SIZES(prefix)                                                                         \
    {                                                                                              \
        NULL, prefix##16, prefix##32, prefix##64                                                   \
    }
#define DOUBLE_TABLE(name)                                                                         \
    insn_fn *const name##_fns[FORMS][4] = {                                                        \
        [FORM_RI] = WIDE_SIZES(name##_r_imm),                                                      \
        [FORM_RR] = WIDE_SIZES(name##_r_cl),                                                       \
        [FORM_MI] = WIDE_SIZES(name##_m_imm),                                                      \
        [FORM_MR] = WIDE_SIZES(name##_m_cl),                                                       \
    }

DOUBLE_TABLE(shld);
DOUBLE_TABLE(shrd);
