/*
 * Integer arithmetic and logic with two operands or one.
 *
 * Each operation is the host's own instruction, so result and flags are the real processor's. One list of
 * operations is expanded to a handler for each size and each form of operands.
 */
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"

/* --- The operations, on values and on memory under LOCK --- */

#define PLAIN(name, bits)                                                                          \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a, u##bits b)              \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__(#name " %[b], %[a]" ASM_SAVE_FLAGS : [a] "+q"(a), "=&a"(f) : [b] "q"(b) : "cc");   \
        v->aflags = f;                                                                             \
        return a;                                                                                  \
    }                                                                                              \
    static inline void locked_##name##bits(struct soft_vcpu *v, mem_u##bits *p, u##bits b)         \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__ volatile("lock " #name " %[b], %[p]" ASM_SAVE_FLAGS                                \
                         : [p] "+m"(*p), "=&a"(f)                                                  \
                         : [b] "q"(b)                                                              \
                         : "cc", "memory");                                                        \
        v->aflags = f;                                                                             \
    }

#define WITH_CARRY(name, bits)                                                                     \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a, u##bits b)              \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__("bt $8, %[carry]\n\t" #name " %[b], %[a]" ASM_SAVE_FLAGS                           \
                : [a] "+q"(a), "=&a"(f)                                                            \
                : [b] "q"(b), [carry] "r"(v->aflags)                                               \
                : "cc");                                                                           \
        v->aflags = f;                                                                             \
        return a;                                                                                  \
    }                                                                                              \
    static inline void locked_##name##bits(struct soft_vcpu *v, mem_u##bits *p, u##bits b)         \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__ volatile("bt $8, %[carry]\n\tlock " #name " %[b], %[p]" ASM_SAVE_FLAGS             \
                         : [p] "+m"(*p), "=&a"(f)                                                  \
                         : [b] "q"(b), [carry] "r"(v->aflags)                                      \
                         : "cc", "memory");                                                        \
        v->aflags = f;                                                                             \
    }

#define ALL_SIZES(M, name) M(name, 8) M(name, 16) M(name, 32) M(name, 64)

ALL_SIZES(PLAIN, add)
ALL_SIZES(PLAIN, or)
ALL_SIZES(PLAIN, and)
ALL_SIZES(PLAIN, sub)
ALL_SIZES(PLAIN, xor)
ALL_SIZES(WITH_CARRY, adc)
ALL_SIZES(WITH_CARRY, sbb)

/* Two that only set flags. */
#define COMPARE(name, bits)                                                                        \
    static inline void alu_##name##bits(struct soft_vcpu *v, u##bits a, u##bits b)                 \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__(#name " %[b], %[a]" ASM_SAVE_FLAGS : "=&a"(f) : [a] "q"(a), [b] "q"(b) : "cc");    \
        v->aflags = f;                                                                             \
    }
ALL_SIZES(COMPARE, cmp)
ALL_SIZES(COMPARE, test)

/* --- Forms --- */

#define UPDATE_FORMS(name, bits)                                                                   \
    static void name##_rr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      alu_##name##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src)));    \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_rm##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        u##bits b = MEM_READ(bits);                                                                \
                                                                                                   \
        reg_set##bits(v, i->dst, alu_##name##bits(v, reg_get##bits(v, i->dst), b));                \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_ri##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        reg_set##bits(v, i->dst, alu_##name##bits(v, reg_get##bits(v, i->dst), (u##bits)i->imm));  \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 name##_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 b)        \
    {                                                                                              \
        return alu_##name##bits(v, (u##bits)old, (u##bits)b);                                      \
    }                                                                                              \
    static inline void name##_memory##bits(struct soft_vcpu *v, const struct insn *i, u##bits b)   \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            *p = alu_##name##bits(v, *p, b);                                                       \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, b);                            \
    }                                                                                              \
    static void name##_mr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        name##_memory##bits(v, i, reg_get##bits(v, i->src));                                       \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_mi##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        name##_memory##bits(v, i, (u##bits)i->imm);                                                \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static inline void name##_atomic##bits(struct soft_vcpu *v, const struct insn *i, u##bits b)   \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            locked_##name##bits(v, p, b);                                                          \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, b);                            \
    }                                                                                              \
    static void name##_lock_mr##bits(struct soft_vcpu *v, const struct insn *i)                    \
    {                                                                                              \
        name##_atomic##bits(v, i, reg_get##bits(v, i->src));                                       \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_lock_mi##bits(struct soft_vcpu *v, const struct insn *i)                    \
    {                                                                                              \
        name##_atomic##bits(v, i, (u##bits)i->imm);                                                \
        NEXT(v, i);                                                                                \
    }

#define COMPARE_FORMS(name, bits)                                                                  \
    static void name##_rr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        alu_##name##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src));                   \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_rm##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        u##bits b = MEM_READ(bits);                                                                \
                                                                                                   \
        alu_##name##bits(v, reg_get##bits(v, i->dst), b);                                          \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_ri##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        alu_##name##bits(v, reg_get##bits(v, i->dst), (u##bits)i->imm);                            \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_mr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        u##bits a = MEM_READ(bits);                                                                \
                                                                                                   \
        alu_##name##bits(v, a, reg_get##bits(v, i->src));                                          \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_mi##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        u##bits a = MEM_READ(bits);                                                                \
                                                                                                   \
        alu_##name##bits(v, a, (u##bits)i->imm);                                                   \
        NEXT(v, i);                                                                                \
    }

ALL_SIZES(UPDATE_FORMS, add)
ALL_SIZES(UPDATE_FORMS, or)
ALL_SIZES(UPDATE_FORMS, adc)
ALL_SIZES(UPDATE_FORMS, sbb)
ALL_SIZES(UPDATE_FORMS, and)
ALL_SIZES(UPDATE_FORMS, sub)
ALL_SIZES(UPDATE_FORMS, xor)
ALL_SIZES(COMPARE_FORMS, cmp)
ALL_SIZES(COMPARE_FORMS, test)

#define SIZES(prefix)                                                                              \
    {                                                                                              \
        prefix##8, prefix##16, prefix##32, prefix##64                                              \
    }
#define UPDATE_ENTRY(name)                                                                         \
    [BINARY_##name] = {                                                                            \
        [FORM_RR] = SIZES(name##_rr),           [FORM_RM] = SIZES(name##_rm),                      \
        [FORM_RI] = SIZES(name##_ri),           [FORM_MR] = SIZES(name##_mr),                      \
        [FORM_MI] = SIZES(name##_mi),           [FORM_LOCK_MR] = SIZES(name##_lock_mr),            \
        [FORM_LOCK_MI] = SIZES(name##_lock_mi),                                                    \
    }
#define COMPARE_ENTRY(name)                                                                        \
    [BINARY_##name] = {                                                                            \
        [FORM_RR] = SIZES(name##_rr), [FORM_RM] = SIZES(name##_rm), [FORM_RI] = SIZES(name##_ri),  \
        [FORM_MR] = SIZES(name##_mr), [FORM_MI] = SIZES(name##_mi),                                \
    }

insn_fn *const binary_fns[BINARY_COUNT][FORMS][4] = {
    UPDATE_ENTRY(add), UPDATE_ENTRY(or),   UPDATE_ENTRY(adc),
    UPDATE_ENTRY(sbb), UPDATE_ENTRY(and),  UPDATE_ENTRY(sub),
    UPDATE_ENTRY(xor), COMPARE_ENTRY(cmp), COMPARE_ENTRY(test),
};

/* --- One operand --- */

/* INC and DEC leave CF alone. suffix: the operand's size, which a memory operand doesn't tell. */
#define STEP(name, bits, suffix)                                                                   \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a)                         \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__(#name " %[a]" ASM_SAVE_FLAGS : [a] "+q"(a), "=&a"(f) : : "cc");                    \
        v->aflags = (f & ~AFLAG_CF) | (v->aflags & AFLAG_CF);                                      \
        return a;                                                                                  \
    }                                                                                              \
    static inline void locked_##name##bits(struct soft_vcpu *v, mem_u##bits *p)                    \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__ volatile("lock " #name #suffix " %[p]" ASM_SAVE_FLAGS                              \
                         : [p] "+m"(*p), "=&a"(f)                                                  \
                         :                                                                         \
                         : "cc", "memory");                                                        \
        v->aflags = (f & ~AFLAG_CF) | (v->aflags & AFLAG_CF);                                      \
    }

#define NEGATE(name, bits, suffix)                                                                 \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a)                         \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__(#name " %[a]" ASM_SAVE_FLAGS : [a] "+q"(a), "=&a"(f) : : "cc");                    \
        v->aflags = f;                                                                             \
        return a;                                                                                  \
    }                                                                                              \
    static inline void locked_##name##bits(struct soft_vcpu *v, mem_u##bits *p)                    \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__ volatile("lock " #name #suffix " %[p]" ASM_SAVE_FLAGS                              \
                         : [p] "+m"(*p), "=&a"(f)                                                  \
                         :                                                                         \
                         : "cc", "memory");                                                        \
        v->aflags = f;                                                                             \
    }

#define COMPLEMENT(name, bits, suffix)                                                             \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a)                         \
    {                                                                                              \
        return (u##bits) ~a;                                                                       \
    }                                                                                              \
    static inline void locked_##name##bits(struct soft_vcpu *v, mem_u##bits *p)                    \
    {                                                                                              \
        __asm__ volatile("lock " #name #suffix " %[p]" : [p] "+m"(*p) : : "memory");               \
    }

#define UNARY_FORMS(name, bits)                                                                    \
    static void name##_r##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        reg_set##bits(v, i->dst, alu_##name##bits(v, reg_get##bits(v, i->dst)));                   \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 name##_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 unused)   \
    {                                                                                              \
        return alu_##name##bits(v, (u##bits)old);                                                  \
    }                                                                                              \
    static void name##_m##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            *p = alu_##name##bits(v, *p);                                                          \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, 0);                            \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_lock_m##bits(struct soft_vcpu *v, const struct insn *i)                     \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            locked_##name##bits(v, p);                                                             \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, 0);                            \
        NEXT(v, i);                                                                                \
    }

#define UNARY_SIZES(M, name) M(name, 8, b) M(name, 16, w) M(name, 32, l) M(name, 64, q)

UNARY_SIZES(STEP, inc)
UNARY_SIZES(STEP, dec)
UNARY_SIZES(NEGATE, neg)
UNARY_SIZES(COMPLEMENT, not )
ALL_SIZES(UNARY_FORMS, inc)
ALL_SIZES(UNARY_FORMS, dec)
ALL_SIZES(UNARY_FORMS, neg)
ALL_SIZES(UNARY_FORMS, not )

#define UNARY_ENTRY(name)                                                                          \
    [UNARY_##name] = {                                                                             \
        [FORM_RR] = SIZES(name##_r),                                                               \
        [FORM_MR] = SIZES(name##_m),                                                               \
        [FORM_LOCK_MR] = SIZES(name##_lock_m),                                                     \
    }

insn_fn *const unary_fns[UNARY_COUNT][FORMS][4] = {
    UNARY_ENTRY(inc),
    UNARY_ENTRY(dec),
    UNARY_ENTRY(neg),
    UNARY_ENTRY(not ),
};
