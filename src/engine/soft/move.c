/*
 * Moves: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, XADD, CMPXCHG, MOVBE, sign extensions, and the
 * instructions on single flags.
 */
#include "engine/soft/exception.h"
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"
#include "engine/soft/posts.h"
#include "engine/soft/wait.h"

#define SIZES(prefix)                                                                              \
    {                                                                                              \
        prefix##8, prefix##16, prefix##32, prefix##64                                              \
    }
#define WIDE_SIZES(prefix)                                                                         \
    {                                                                                              \
        NULL, prefix##16, prefix##32, prefix##64                                                   \
    }
#define ALL(M) M(8) M(16) M(32) M(64)
#define WIDE(M) M(16) M(32) M(64)

/* --- MOV --- */

#define MOV(bits)                                                                                  \
    static void mov_rr##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        reg_set##bits(v, i->dst, reg_get##bits(v, i->src));                                        \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void mov_ri##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        reg_set##bits(v, i->dst, (u##bits)i->imm);                                                 \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void mov_rm##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        reg_set##bits(v, i->dst, MEM_READ(bits));                                                  \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void mov_mr##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        MEM_WRITE(bits, reg_get##bits(v, i->src));                                                 \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void mov_mi##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        MEM_WRITE(bits, (u##bits)i->imm);                                                          \
        NEXT(v, i);                                                                                \
    }
ALL(MOV)

insn_fn *const mov_fns[FORMS][4] = {
    [FORM_RR] = SIZES(mov_rr), [FORM_RI] = SIZES(mov_ri), [FORM_RM] = SIZES(mov_rm),
    [FORM_MR] = SIZES(mov_mr), [FORM_MI] = SIZES(mov_mi),
};

/* --- MOVZX, MOVSX, MOVSXD --- */

#define EXTEND(name, sign, from, to)                                                               \
    static void name##_r##from##_##to(struct soft_vcpu *v, const struct insn *i)                   \
    {                                                                                              \
        reg_set##to(v, i->dst, (u##to)(sign##from)reg_get##from(v, i->src));                       \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m##from##_##to(struct soft_vcpu *v, const struct insn *i)                   \
    {                                                                                              \
        reg_set##to(v, i->dst, (u##to)(sign##from)MEM_READ(from));                                 \
        NEXT(v, i);                                                                                \
    }
EXTEND(movzx, u, 8, 16)
EXTEND(movzx, u, 8, 32)
EXTEND(movzx, u, 8, 64)
EXTEND(movzx, u, 16, 16)
EXTEND(movzx, u, 16, 32)
EXTEND(movzx, u, 16, 64)
EXTEND(movsx, s, 8, 16)
EXTEND(movsx, s, 8, 32)
EXTEND(movsx, s, 8, 64)
EXTEND(movsx, s, 16, 16)
EXTEND(movsx, s, 16, 32)
EXTEND(movsx, s, 16, 64)
EXTEND(movsx, s, 32, 16)
EXTEND(movsx, s, 32, 32)
EXTEND(movsx, s, 32, 64)

insn_fn *const movzx_fns[2][2][4] = {
    {WIDE_SIZES(movzx_r8_), WIDE_SIZES(movzx_r16_)},
    {WIDE_SIZES(movzx_m8_), WIDE_SIZES(movzx_m16_)},
};
insn_fn *const movsx_fns[2][3][4] = {
    {WIDE_SIZES(movsx_r8_), WIDE_SIZES(movsx_r16_), WIDE_SIZES(movsx_r32_)},
    {WIDE_SIZES(movsx_m8_), WIDE_SIZES(movsx_m16_), WIDE_SIZES(movsx_m32_)},
};

/* --- LEA --- */

#define LEA(bits)                                                                                  \
    static void lea##bits(struct soft_vcpu *v, const struct insn *i)                               \
    {                                                                                              \
        reg_set##bits(v, i->dst, (u##bits)insn_offset(v, i));                                      \
        NEXT(v, i);                                                                                \
    }
WIDE(LEA)
insn_fn *const lea_fns[4] = WIDE_SIZES(lea);

/* --- XCHG: with memory it is always locked --- */

#define XCHG(bits)                                                                                 \
    static void xchg_rr##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        u##bits a = reg_get##bits(v, i->dst), b = reg_get##bits(v, i->src);                        \
                                                                                                   \
        reg_set##bits(v, i->src, a);                                                               \
        reg_set##bits(v, i->dst, b);                                                               \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 xchg_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 unused)     \
    {                                                                                              \
        u##bits b = reg_get##bits(v, i->src);                                                      \
                                                                                                   \
        reg_set##bits(v, i->src, (u##bits)old);                                                    \
        return b;                                                                                  \
    }                                                                                              \
    static void xchg_mr##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
        u##bits b = reg_get##bits(v, i->src);                                                      \
                                                                                                   \
        if (likely(p)) {                                                                           \
            __asm__ volatile("xchg %[b], %[p]" : [p] "+m"(*p), [b] "+q"(b) : : "memory");          \
            reg_set##bits(v, i->src, b);                                                           \
        } else {                                                                                   \
            soft_rmw_slow(v, i, lin, (bits) / 8, xchg_slow##bits, 0);                              \
        }                                                                                          \
        NEXT(v, i);                                                                                \
    }
ALL(XCHG)
insn_fn *const xchg_fns[FORMS][4] = {
    [FORM_RR] = SIZES(xchg_rr), [FORM_MR] = SIZES(xchg_mr), [FORM_LOCK_MR] = SIZES(xchg_mr)};

/* --- XADD --- */

#define XADD(bits)                                                                                 \
    static inline u##bits sum##bits(struct soft_vcpu *v, u##bits a, u##bits b)                     \
    {                                                                                              \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__("add %[b], %[a]" ASM_SAVE_FLAGS : [a] "+q"(a), "=&a"(f) : [b] "q"(b) : "cc");      \
        v->aflags = f;                                                                             \
        return a;                                                                                  \
    }                                                                                              \
    static void xadd_rr##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        u##bits a = reg_get##bits(v, i->dst), b = reg_get##bits(v, i->src);                        \
                                                                                                   \
        reg_set##bits(v, i->src, a);                                                               \
        reg_set##bits(v, i->dst, sum##bits(v, a, b));                                              \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 xadd_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 unused)     \
    {                                                                                              \
        u##bits b = reg_get##bits(v, i->src);                                                      \
                                                                                                   \
        reg_set##bits(v, i->src, (u##bits)old);                                                    \
        return sum##bits(v, (u##bits)old, b);                                                      \
    }                                                                                              \
    static void xadd_mr##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
        u##bits b = reg_get##bits(v, i->src);                                                      \
        u16 f;                                                                                     \
                                                                                                   \
        if (likely(p)) {                                                                           \
            __asm__ volatile("lock xadd %[b], %[p]" ASM_SAVE_FLAGS                                 \
                             : [p] "+m"(*p), [b] "+q"(b), "=&a"(f)                                 \
                             :                                                                     \
                             : "cc", "memory");                                                    \
            v->aflags = f;                                                                         \
            reg_set##bits(v, i->src, b);                                                           \
        } else {                                                                                   \
            soft_rmw_slow(v, i, lin, (bits) / 8, xadd_slow##bits, 0);                              \
        }                                                                                          \
        NEXT(v, i);                                                                                \
    }
ALL(XADD)
insn_fn *const xadd_fns[FORMS][4] = {
    [FORM_RR] = SIZES(xadd_rr), [FORM_MR] = SIZES(xadd_mr), [FORM_LOCK_MR] = SIZES(xadd_mr)};

/* --- CMPXCHG --- */

/* What a 32-bit destination becomes when the comparison fails: some processors clear its upper half. */
static inline u64 unchanged32(u64 dst)
{
    u64 other = (u32)~dst;

    __asm__("cmpxchg %k[dst], %k[dst]" : [dst] "+r"(dst), "+a"(other) : : "cc");
    return dst;
}

#define CMPXCHG(bits)                                                                              \
    static inline bool equals##bits(struct soft_vcpu *v, u##bits old)                              \
    {                                                                                              \
        u##bits expected = reg_get##bits(v, RAX);                                                  \
        u16 f;                                                                                     \
                                                                                                   \
        __asm__("cmp %[b], %[a]" ASM_SAVE_FLAGS                                                    \
                : "=&a"(f)                                                                         \
                : [a] "q"(expected), [b] "q"(old)                                                  \
                : "cc");                                                                           \
        v->aflags = f;                                                                             \
        return expected == old;                                                                    \
    }                                                                                              \
    static void cmpxchg_rr##bits(struct soft_vcpu *v, const struct insn *i)                        \
    {                                                                                              \
        u##bits old = reg_get##bits(v, i->dst);                                                    \
                                                                                                   \
        if (equals##bits(v, old)) {                                                                \
            reg_set##bits(v, i->dst, reg_get##bits(v, i->src));                                    \
        } else {                                                                                   \
            if ((bits) == 32)                                                                      \
                v->cpu.gpr[i->dst] = unchanged32(v->cpu.gpr[i->dst]);                              \
            reg_set##bits(v, RAX, old);                                                            \
        }                                                                                          \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static u64 cmpxchg_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 unused)  \
    {                                                                                              \
        if (equals##bits(v, (u##bits)old))                                                         \
            return reg_get##bits(v, i->src);                                                       \
        reg_set##bits(v, RAX, (u##bits)old);                                                       \
        return old;                                                                                \
    }                                                                                              \
    static void cmpxchg_mr##bits(struct soft_vcpu *v, const struct insn *i)                        \
    {                                                                                              \
        gva_t lin = insn_linear(v, i, (bits) / 8, ACCESS_WRITE);                                   \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
        u##bits old = reg_get##bits(v, RAX);                                                       \
                                                                                                   \
        if (likely(p)) {                                                                           \
            __asm__ volatile("lock cmpxchg %[b], %[p]"                                             \
                             : [p] "+m"(*p), "+a"(old)                                             \
                             : [b] "q"(reg_get##bits(v, i->src))                                   \
                             : "cc", "memory");                                                    \
            if (!equals##bits(v, old))                                                             \
                reg_set##bits(v, RAX, old);                                                        \
        } else {                                                                                   \
            soft_rmw_slow(v, i, lin, (bits) / 8, cmpxchg_slow##bits, 0);                           \
        }                                                                                          \
        NEXT(v, i);                                                                                \
    }
ALL(CMPXCHG)
insn_fn *const cmpxchg_fns[FORMS][4] = {[FORM_RR] = SIZES(cmpxchg_rr),
                                        [FORM_MR] = SIZES(cmpxchg_mr),
                                        [FORM_LOCK_MR] = SIZES(cmpxchg_mr)};

static u64 cmpxchg8b_slow(struct soft_vcpu *v, const struct insn *i, u64 old, u64 unused)
{
    u64 expected = (u64)reg_get32(v, RDX) << 32 | reg_get32(v, RAX);

    if (old == expected) {
        v->aflags |= AFLAG_ZF;
        return (u64)reg_get32(v, RCX) << 32 | reg_get32(v, RBX);
    }
    v->aflags &= ~AFLAG_ZF;
    reg_set32(v, RAX, (u32)old);
    reg_set32(v, RDX, (u32)(old >> 32));
    return old;
}

void op_cmpxchg8b(struct soft_vcpu *v, const struct insn *i)
{
    gva_t lin = insn_linear(v, i, 8, ACCESS_WRITE);
    mem_u64 *p = mem_rmw(v, i, lin, 8);

    if (likely(p)) {
        u32 low = reg_get32(v, RAX), high = reg_get32(v, RDX);
        bool equal;

        __asm__ volatile("lock cmpxchg8b %[p]"
                         : [p] "+m"(*p), "+a"(low), "+d"(high), "=@ccz"(equal)
                         : "b"(reg_get32(v, RBX)), "c"(reg_get32(v, RCX))
                         : "memory");
        if (equal) {
            v->aflags |= AFLAG_ZF;
        } else {
            v->aflags &= ~AFLAG_ZF;
            reg_set32(v, RAX, low);
            reg_set32(v, RDX, high);
        }
    } else {
        soft_rmw_slow(v, i, lin, 8, cmpxchg8b_slow, 0);
    }
    NEXT(v, i);
}

/* On MMIO and watched pages; being aligned it never crosses one. */
static void cmpxchg16b_slow(struct soft_vcpu *v, gva_t lin, unsigned stack)
{
    u64 old[2], new[2] = {v->cpu.gpr[RBX], v->cpu.gpr[RCX]};
    bool equal;

    soft_probe(v, lin, 16, ACCESS_WRITE | stack);
    soft_exclusive_begin(v);
    soft_load_bytes(v, lin, old, 16, ACCESS_READ);
    equal = old[0] == v->cpu.gpr[RAX] && old[1] == v->cpu.gpr[RDX];
    soft_store_bytes(v, lin, equal ? new : old, 16, ACCESS_WRITE);
    soft_exclusive_end(v);
    if (equal) {
        v->aflags |= AFLAG_ZF;
        return;
    }
    v->aflags &= ~AFLAG_ZF;
    v->cpu.gpr[RAX] = old[0];
    v->cpu.gpr[RDX] = old[1];
}

void op_cmpxchg16b(struct soft_vcpu *v, const struct insn *i)
{
    gva_t lin = insn_linear(v, i, 16, ACCESS_WRITE);
    u64 *p, low = v->cpu.gpr[RAX], high = v->cpu.gpr[RDX];
    unsigned stack = i->seg == SEG_SS ? ACCESS_STACK : 0;
    bool equal;

    v->cur = i;
    if (lin & 15)
        soft_raise_error(v, stack && !soft_canonical(v, lin) ? EXC_SS : EXC_GP, 0);
    p = mem_rmw(v, i, lin, 16);
    if (unlikely(!p)) {
        cmpxchg16b_slow(v, lin, stack);
        NEXT(v, i);
    }
    __asm__ volatile("lock cmpxchg16b %[p]"
                     : [p] "+m"(*(u64(*)[2])p), "+a"(low), "+d"(high), "=@ccz"(equal)
                     : "b"(v->cpu.gpr[RBX]), "c"(v->cpu.gpr[RCX])
                     : "memory");
    if (equal) {
        v->aflags |= AFLAG_ZF;
    } else {
        v->aflags &= ~AFLAG_ZF;
        v->cpu.gpr[RAX] = low;
        v->cpu.gpr[RDX] = high;
    }
    NEXT(v, i);
}

/* --- MOVBE, BSWAP --- */

#define MOVBE(bits)                                                                                \
    static void movbe_rm##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        reg_set##bits(v, i->dst, __builtin_bswap##bits(MEM_READ(bits)));                           \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void movbe_mr##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        MEM_WRITE(bits, __builtin_bswap##bits(reg_get##bits(v, i->src)));                          \
        NEXT(v, i);                                                                                \
    }
WIDE(MOVBE)
insn_fn *const movbe_fns[FORMS][4] = {
    [FORM_RM] = WIDE_SIZES(movbe_rm), [FORM_MR] = WIDE_SIZES(movbe_mr)};

/* Undefined by the manual; processors clear the register's low half. */
void op_bswap16(struct soft_vcpu *v, const struct insn *i)
{
    reg_set16(v, i->dst, 0);
    NEXT(v, i);
}
void op_bswap32(struct soft_vcpu *v, const struct insn *i)
{
    reg_set32(v, i->dst, __builtin_bswap32(reg_get32(v, i->dst)));
    NEXT(v, i);
}
void op_bswap64(struct soft_vcpu *v, const struct insn *i)
{
    reg_set64(v, i->dst, __builtin_bswap64(reg_get64(v, i->dst)));
    NEXT(v, i);
}

/* --- Conditions --- */

bool condition(u32 f, unsigned cc)
{
    bool c;

    switch (cc >> 1) {
    case 0:
        c = CONDITION_0(f);
        break;
    case 1:
        c = CONDITION_2(f);
        break;
    case 2:
        c = CONDITION_4(f);
        break;
    case 3:
        c = CONDITION_6(f);
        break;
    case 4:
        c = CONDITION_8(f);
        break;
    case 5:
        c = CONDITION_10(f);
        break;
    case 6:
        c = CONDITION_12(f);
        break;
    default:
        c = CONDITION_14(f);
        break;
    }
    return c ^ (cc & 1);
}

/* A false CMOVcc still reads its memory, and a 32-bit one still clears the upper half. */
#define CMOV(even, negate, number, bits)                                                           \
    static void cmov##number##_r##bits(struct soft_vcpu *v, const struct insn *i)                  \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        reg_set##bits(v, i->dst,                                                                   \
                      reg_get##bits(v, CONDITION_##even(f) != (negate) ? i->src : i->dst));        \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void cmov##number##_m##bits(struct soft_vcpu *v, const struct insn *i)                  \
    {                                                                                              \
        u##bits value = MEM_READ(bits);                                                            \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        reg_set##bits(v, i->dst,                                                                   \
                      CONDITION_##even(f) != (negate) ? value : reg_get##bits(v, i->dst));         \
        NEXT(v, i);                                                                                \
    }
#define CMOV_PAIR(even, odd)                                                                       \
    CMOV(even, false, even, 16)                                                                    \
    CMOV(even, false, even, 32)                                                                    \
    CMOV(even, false, even, 64)                                                                    \
    CMOV(even, true, odd, 16)                                                                      \
    CMOV(even, true, odd, 32)                                                                      \
    CMOV(even, true, odd, 64)
CMOV_PAIR(0, 1)
CMOV_PAIR(2, 3)
CMOV_PAIR(4, 5)
CMOV_PAIR(6, 7)
CMOV_PAIR(8, 9)
CMOV_PAIR(10, 11)
CMOV_PAIR(12, 13)
CMOV_PAIR(14, 15)
#define CMOV_ENTRY(n)                                                                              \
    {                                                                                              \
        WIDE_SIZES(cmov##n##_r), WIDE_SIZES(cmov##n##_m)                                           \
    }
insn_fn *const cmov_fns[16][2][4] = {
    CMOV_ENTRY(0),  CMOV_ENTRY(1),  CMOV_ENTRY(2),  CMOV_ENTRY(3),  CMOV_ENTRY(4),  CMOV_ENTRY(5),
    CMOV_ENTRY(6),  CMOV_ENTRY(7),  CMOV_ENTRY(8),  CMOV_ENTRY(9),  CMOV_ENTRY(10), CMOV_ENTRY(11),
    CMOV_ENTRY(12), CMOV_ENTRY(13), CMOV_ENTRY(14), CMOV_ENTRY(15),
};

static void setcc_r(struct soft_vcpu *v, const struct insn *i)
{
    reg_set8(v, i->dst, condition(v->aflags, i->imm2));
    NEXT(v, i);
}
static void setcc_m(struct soft_vcpu *v, const struct insn *i)
{
    MEM_WRITE(8, condition(v->aflags, i->imm2));
    NEXT(v, i);
}
insn_fn *const setcc_fns[2] = {setcc_r, setcc_m};

/* --- Sign extension of the accumulator --- */

void op_cbw(struct soft_vcpu *v, const struct insn *i)
{
    reg_set16(v, RAX, (u16)(s8)v->cpu.gpr[RAX]);
    NEXT(v, i);
}
void op_cwde(struct soft_vcpu *v, const struct insn *i)
{
    reg_set32(v, RAX, (u32)(s16)v->cpu.gpr[RAX]);
    NEXT(v, i);
}
void op_cdqe(struct soft_vcpu *v, const struct insn *i)
{
    reg_set64(v, RAX, (u64)(s32)v->cpu.gpr[RAX]);
    NEXT(v, i);
}
void op_cwd(struct soft_vcpu *v, const struct insn *i)
{
    reg_set16(v, RDX, (s16)v->cpu.gpr[RAX] < 0 ? 0xffff : 0);
    NEXT(v, i);
}
void op_cdq(struct soft_vcpu *v, const struct insn *i)
{
    reg_set32(v, RDX, (s32)v->cpu.gpr[RAX] < 0 ? 0xffffffff : 0);
    NEXT(v, i);
}
void op_cqo(struct soft_vcpu *v, const struct insn *i)
{
    reg_set64(v, RDX, (s64)v->cpu.gpr[RAX] < 0 ? UINT64_MAX : 0);
    NEXT(v, i);
}

/* --- Flags --- */

void op_lahf(struct soft_vcpu *v, const struct insn *i)
{
    reg_set8(v, 1, (u8)(aflags_to_eflags(v->aflags) | EFLAGS_FIXED));
    NEXT(v, i);
}
void op_sahf(struct soft_vcpu *v, const struct insn *i)
{
    v->aflags = aflags_from_eflags(reg_get8(v, 1)) | (v->aflags & AFLAG_OF);
    NEXT(v, i);
}
void op_clc(struct soft_vcpu *v, const struct insn *i)
{
    v->aflags &= ~AFLAG_CF;
    NEXT(v, i);
}
void op_stc(struct soft_vcpu *v, const struct insn *i)
{
    v->aflags |= AFLAG_CF;
    NEXT(v, i);
}
void op_cmc(struct soft_vcpu *v, const struct insn *i)
{
    v->aflags ^= AFLAG_CF;
    NEXT(v, i);
}
void op_cld(struct soft_vcpu *v, const struct insn *i)
{
    v->cpu.rflags &= ~EFLAGS_DF;
    NEXT(v, i);
}
void op_std(struct soft_vcpu *v, const struct insn *i)
{
    v->cpu.rflags |= EFLAGS_DF;
    NEXT(v, i);
}
/* Undocumented and everywhere: AL = CF ? -1 : 0. */
void op_salc(struct soft_vcpu *v, const struct insn *i)
{
    reg_set8(v, 0, v->aflags & AFLAG_CF ? 0xff : 0);
    NEXT(v, i);
}

void op_xlat(struct soft_vcpu *v, const struct insn *i)
{
    u64 offset = v->cpu.gpr[RBX] + reg_get8(v, 0);
    gva_t lin;

    if (i->address == ADDRESS_FLAT) {
        lin = offset + v->seg_base[i->seg];
    } else {
        v->cur = i;
        offset = i->asize == 8 ? offset : i->asize == 4 ? (u32)offset : (u16)offset;
        lin = soft_linear(v, i->seg, offset, 1, ACCESS_READ);
    }
    reg_set8(v, 0, mem_load8(v, i, lin));
    NEXT(v, i);
}

void op_nop(struct soft_vcpu *v, const struct insn *i)
{
    NEXT(v, i);
}
void op_pause(struct soft_vcpu *v, const struct insn *i)
{
    soft_pause(v);
    NEXT(v, i);
}
void op_fence(struct soft_vcpu *v, const struct insn *i)
{
    atomic_thread_fence(memory_order_seq_cst);
    NEXT(v, i);
}
