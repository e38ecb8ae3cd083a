/*
 * Bits: tests, scans and counts, BMI1, BMI2, ADX, CRC32.
 */
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"

/* --- BT, BTS, BTR, BTC --- */

/* Only CF is defined; the others are as the host leaves them. */
#define BIT_UPDATE(name, bits)                                                                     \
    static inline u##bits alu_##name##bits(struct soft_vcpu *v, u##bits a, u##bits n)              \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS #name " %[n], %[a]" ASM_SAVE_FLAGS                                  \
                : [a] "+r"(a), "+a"(f)                                                             \
                : [n] "r"(n)                                                                       \
                : "cc");                                                                           \
        v->aflags = (u16)f;                                                                        \
        return a;                                                                                  \
    }                                                                                              \
    static inline void locked_##name##bits(struct soft_vcpu *v, mem_u##bits *p, u##bits n)         \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__ volatile(ASM_LOAD_FLAGS "lock " #name " %[n], %[p]" ASM_SAVE_FLAGS                 \
                         : [p] "+m"(*p), "+a"(f)                                                   \
                         : [n] "r"((u##bits)(n & ((bits)-1)))                                      \
                         : "cc", "memory");                                                        \
        v->aflags = (u16)f;                                                                        \
    }                                                                                              \
    static u64 name##_slow##bits(struct soft_vcpu *v, const struct insn *i, u64 old, u64 n)        \
    {                                                                                              \
        return alu_##name##bits(v, (u##bits)old, (u##bits)n);                                      \
    }                                                                                              \
    static void name##_rr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      alu_##name##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src)));    \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_ri##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        reg_set##bits(v, i->dst, alu_##name##bits(v, reg_get##bits(v, i->dst), (u##bits)i->imm));  \
        NEXT(v, i);                                                                                \
    }

/*
 * With a register as bit index, memory is a bit string: the index is signed and selects the unit too
 * (SDM vol. 1, 3.1.1.9). The displaced address is cut to the address size again.
 */
static inline gva_t bit_string_linear(struct soft_vcpu *v, const struct insn *i, s64 index,
                                      unsigned size, unsigned access)
{
    u64 offset = insn_offset(v, i) + (u64)((index >> (size == 8 ? 6 : size == 4 ? 5 : 4)) * size);

    if (i->address == ADDRESS_FLAT)
        return offset + v->seg_base[i->seg];
    offset = i->asize == 8 ? offset : i->asize == 4 ? (u32)offset : (u16)offset;
    v->cur = i;
    return soft_linear(v, i->seg, offset, size, access);
}

#define BIT_MEMORY(name, bits)                                                                     \
    static inline void name##_plain##bits(struct soft_vcpu *v, const struct insn *i, gva_t lin,    \
                                          u##bits n)                                               \
    {                                                                                              \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            *p = alu_##name##bits(v, *p, n);                                                       \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, n);                            \
    }                                                                                              \
    static inline void name##_atomic##bits(struct soft_vcpu *v, const struct insn *i, gva_t lin,   \
                                           u##bits n)                                              \
    {                                                                                              \
        mem_u##bits *p = mem_rmw(v, i, lin, (bits) / 8);                                           \
                                                                                                   \
        if (likely(p))                                                                             \
            locked_##name##bits(v, p, n);                                                          \
        else                                                                                       \
            soft_rmw_slow(v, i, lin, (bits) / 8, name##_slow##bits, n);                            \
    }                                                                                              \
    static void name##_mr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        s##bits n = (s##bits)reg_get##bits(v, i->src);                                             \
                                                                                                   \
        name##_plain##bits(v, i, bit_string_linear(v, i, n, (bits) / 8, ACCESS_WRITE),             \
                           (u##bits)n);                                                            \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_lock_mr##bits(struct soft_vcpu *v, const struct insn *i)                    \
    {                                                                                              \
        s##bits n = (s##bits)reg_get##bits(v, i->src);                                             \
                                                                                                   \
        name##_atomic##bits(v, i, bit_string_linear(v, i, n, (bits) / 8, ACCESS_WRITE),            \
                            (u##bits)n);                                                           \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_mi##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        name##_plain##bits(v, i, insn_linear(v, i, (bits) / 8, ACCESS_WRITE), (u##bits)i->imm);    \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_lock_mi##bits(struct soft_vcpu *v, const struct insn *i)                    \
    {                                                                                              \
        name##_atomic##bits(v, i, insn_linear(v, i, (bits) / 8, ACCESS_WRITE), (u##bits)i->imm);   \
        NEXT(v, i);                                                                                \
    }

#define BIT_TEST(bits)                                                                             \
    static inline void alu_bt##bits(struct soft_vcpu *v, u##bits a, u##bits n)                     \
    {                                                                                              \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS "bt %[n], %[a]" ASM_SAVE_FLAGS                                      \
                : "+a"(f)                                                                          \
                : [a] "r"(a), [n] "r"(n)                                                           \
                : "cc");                                                                           \
        v->aflags = (u16)f;                                                                        \
    }                                                                                              \
    static void bt_rr##bits(struct soft_vcpu *v, const struct insn *i)                             \
    {                                                                                              \
        alu_bt##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src));                       \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void bt_ri##bits(struct soft_vcpu *v, const struct insn *i)                             \
    {                                                                                              \
        alu_bt##bits(v, reg_get##bits(v, i->dst), (u##bits)i->imm);                                \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void bt_mr##bits(struct soft_vcpu *v, const struct insn *i)                             \
    {                                                                                              \
        s##bits n = (s##bits)reg_get##bits(v, i->src);                                             \
        gva_t lin = bit_string_linear(v, i, n, (bits) / 8, ACCESS_READ);                           \
                                                                                                   \
        alu_bt##bits(v, mem_load##bits(v, i, lin), (u##bits)n);                                    \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void bt_mi##bits(struct soft_vcpu *v, const struct insn *i)                             \
    {                                                                                              \
        u##bits a = MEM_READ(bits);                                                                \
                                                                                                   \
        alu_bt##bits(v, a, (u##bits)i->imm);                                                       \
        NEXT(v, i);                                                                                \
    }

#define WIDE(M, name) M(name, 16) M(name, 32) M(name, 64)
WIDE(BIT_UPDATE, bts)
WIDE(BIT_UPDATE, btr)
WIDE(BIT_UPDATE, btc)
WIDE(BIT_MEMORY, bts)
WIDE(BIT_MEMORY, btr)
WIDE(BIT_MEMORY, btc)
BIT_TEST(16)
BIT_TEST(32)
BIT_TEST(64)

#define SIZES(prefix)                                                                              \
    {                                                                                              \
        NULL, prefix##16, prefix##32, prefix##64                                                   \
    }
#define BIT_ENTRY(name)                                                                            \
    [BIT_##name] = {                                                                               \
        [FORM_RR] = SIZES(name##_rr),           [FORM_RI] = SIZES(name##_ri),                      \
        [FORM_MR] = SIZES(name##_mr),           [FORM_MI] = SIZES(name##_mi),                      \
        [FORM_LOCK_MR] = SIZES(name##_lock_mr), [FORM_LOCK_MI] = SIZES(name##_lock_mi),            \
    }

insn_fn *const bit_fns[BIT_COUNT][FORMS][4] = {
    [BIT_bt] = {[FORM_RR] = SIZES(bt_rr),
                [FORM_RI] = SIZES(bt_ri),
                [FORM_MR] = SIZES(bt_mr),
                [FORM_MI] = SIZES(bt_mi)},
    BIT_ENTRY(bts),
    BIT_ENTRY(btr),
    BIT_ENTRY(btc),
};

/* --- Scans and counts --- */

/* BSF and BSR of zero leave the destination alone, as the hosts do: so it goes in as well. */
#define SCAN(name, bits)                                                                           \
    static inline void scan_##name##bits(struct soft_vcpu *v, const struct insn *i, u##bits b)     \
    {                                                                                              \
        u##bits a = reg_get##bits(v, i->dst);                                                      \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS #name " %[b], %[a]" ASM_SAVE_FLAGS                                  \
                : [a] "+r"(a), "+a"(f)                                                             \
                : [b] "r"(b)                                                                       \
                : "cc");                                                                           \
        if (SCAN_KEEPS_##name && b == 0) {                                                         \
            v->aflags = (u16)f;                                                                    \
            return;                                                                                \
        }                                                                                          \
        v->aflags = (u16)f;                                                                        \
        reg_set##bits(v, i->dst, a);                                                               \
    }                                                                                              \
    static void name##_rr##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        scan_##name##bits(v, i, reg_get##bits(v, i->src));                                         \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_rm##bits(struct soft_vcpu *v, const struct insn *i)                         \
    {                                                                                              \
        scan_##name##bits(v, i, MEM_READ(bits));                                                   \
        NEXT(v, i);                                                                                \
    }

#define SCAN_KEEPS_bsf true
#define SCAN_KEEPS_bsr true
#define SCAN_KEEPS_tzcnt false
#define SCAN_KEEPS_lzcnt false
#define SCAN_KEEPS_popcnt false
WIDE(SCAN, bsf)
WIDE(SCAN, bsr)
WIDE(SCAN, tzcnt)
WIDE(SCAN, lzcnt)
WIDE(SCAN, popcnt)

#define SCAN_ENTRY(name)                                                                           \
    [SCAN_##name] = {[FORM_RR] = SIZES(name##_rr), [FORM_RM] = SIZES(name##_rm)}

insn_fn *const scan_fns[SCAN_COUNT][FORMS][4] = {
    SCAN_ENTRY(bsf), SCAN_ENTRY(bsr), SCAN_ENTRY(tzcnt), SCAN_ENTRY(lzcnt), SCAN_ENTRY(popcnt),
};

/* --- BMI1, BMI2, ADX --- */

/* dst = op(a, b), flags in and out. Which operand is r/m is told by the forms below. */
#define BMI_3(name, bits, text)                                                                    \
    static inline u##bits bmi_##name##bits(struct soft_vcpu *v, u##bits rm, u##bits other)         \
    {                                                                                              \
        u##bits d = 0;                                                                             \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS text ASM_SAVE_FLAGS                                                 \
                : [d] "+r"(d), "+a"(f)                                                             \
                : [rm] "r"(rm), [o] "r"(other)                                                     \
                : "cc");                                                                           \
        v->aflags = (u16)f;                                                                        \
        return d;                                                                                  \
    }                                                                                              \
    static void name##_r##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      bmi_##name##bits(v, reg_get##bits(v, i->src), reg_get##bits(v, i->vvvv)));   \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        reg_set##bits(v, i->dst, bmi_##name##bits(v, rm, reg_get##bits(v, i->vvvv)));              \
        NEXT(v, i);                                                                                \
    }
#define BMI_3_BOTH(name, text) BMI_3(name, 32, text) BMI_3(name, 64, text)

BMI_3_BOTH(andn, "andn %[rm], %[o], %[d]")
BMI_3_BOTH(bextr, "bextr %[o], %[rm], %[d]")
BMI_3_BOTH(bzhi, "bzhi %[o], %[rm], %[d]")
BMI_3_BOTH(pdep, "pdep %[rm], %[o], %[d]")
BMI_3_BOTH(pext, "pext %[rm], %[o], %[d]")
BMI_3_BOTH(sarx, "sarx %[o], %[rm], %[d]")
BMI_3_BOTH(shlx, "shlx %[o], %[rm], %[d]")
BMI_3_BOTH(shrx, "shrx %[o], %[rm], %[d]")

/* The destination is in VEX.vvvv. */
#define BMI_2(name, bits)                                                                          \
    static inline u##bits bmi_##name##bits(struct soft_vcpu *v, u##bits rm)                        \
    {                                                                                              \
        u##bits d;                                                                                 \
        u32 f = v->aflags;                                                                         \
                                                                                                   \
        __asm__(ASM_LOAD_FLAGS #name " %[rm], %[d]" ASM_SAVE_FLAGS                                 \
                : [d] "=&r"(d), "+a"(f)                                                            \
                : [rm] "r"(rm)                                                                     \
                : "cc");                                                                           \
        v->aflags = (u16)f;                                                                        \
        return d;                                                                                  \
    }                                                                                              \
    static void name##_r##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        reg_set##bits(v, i->dst, bmi_##name##bits(v, reg_get##bits(v, i->src)));                   \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        reg_set##bits(v, i->dst, bmi_##name##bits(v, rm));                                         \
        NEXT(v, i);                                                                                \
    }
#define BMI_2_BOTH(name) BMI_2(name, 32) BMI_2(name, 64)

BMI_2_BOTH(blsi)
BMI_2_BOTH(blsmsk)
BMI_2_BOTH(blsr)

#define BMI_MULX(bits, double)                                                                     \
    static inline void bmi_mulx##bits(struct soft_vcpu *v, const struct insn *i, u##bits rm)       \
    {                                                                                              \
        double product = (double)reg_get##bits(v, RDX) * rm;                                       \
                                                                                                   \
        /* The high half wins when both destinations are one register. */                          \
        reg_set##bits(v, i->vvvv, (u##bits)product);                                               \
        reg_set##bits(v, i->dst, (u##bits)(product >> (bits)));                                    \
    }                                                                                              \
    static void mulx_r##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        bmi_mulx##bits(v, i, reg_get##bits(v, i->src));                                            \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void mulx_m##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        bmi_mulx##bits(v, i, MEM_READ(bits));                                                      \
        NEXT(v, i);                                                                                \
    }
BMI_MULX(32, u64)
BMI_MULX(64, u128)

#define BMI_RORX(bits)                                                                             \
    static inline u##bits bmi_rorx##bits(u##bits a, u8 count)                                      \
    {                                                                                              \
        count &= (bits)-1;                                                                         \
        return count ? a >> count | a << ((bits)-count) : a;                                       \
    }                                                                                              \
    static void rorx_r##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        reg_set##bits(v, i->dst, bmi_rorx##bits(reg_get##bits(v, i->src), (u8)i->imm));            \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void rorx_m##bits(struct soft_vcpu *v, const struct insn *i)                            \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        reg_set##bits(v, i->dst, bmi_rorx##bits(rm, (u8)i->imm));                                  \
        NEXT(v, i);                                                                                \
    }
BMI_RORX(32)
BMI_RORX(64)

/* ADCX and ADOX add with one flag for carry and leave all others. */
#define ADD_CHAIN(name, bits, flag)                                                                \
    static inline u##bits bmi_##name##bits(struct soft_vcpu *v, u##bits a, u##bits b)              \
    {                                                                                              \
        u##bits with_carry;                                                                        \
        bool carry = __builtin_add_overflow(b, (u##bits) !!(v->aflags & (flag)), &with_carry);     \
                                                                                                   \
        carry |= __builtin_add_overflow(a, with_carry, &a);                                        \
        v->aflags = (v->aflags & ~(flag)) | (carry ? (flag) : 0);                                  \
        return a;                                                                                  \
    }                                                                                              \
    static void name##_r##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        reg_set##bits(v, i->dst,                                                                   \
                      bmi_##name##bits(v, reg_get##bits(v, i->dst), reg_get##bits(v, i->src)));    \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void name##_m##bits(struct soft_vcpu *v, const struct insn *i)                          \
    {                                                                                              \
        u##bits rm = MEM_READ(bits);                                                               \
                                                                                                   \
        reg_set##bits(v, i->dst, bmi_##name##bits(v, reg_get##bits(v, i->dst), rm));               \
        NEXT(v, i);                                                                                \
    }
ADD_CHAIN(adcx, 32, AFLAG_CF)
ADD_CHAIN(adcx, 64, AFLAG_CF)
ADD_CHAIN(adox, 32, AFLAG_OF)
ADD_CHAIN(adox, 64, AFLAG_OF)

#define BMI_ENTRY(name) [BMI_##name] = {{name##_r32, name##_r64}, {name##_m32, name##_m64}}

insn_fn *const bmi_fns[BMI_COUNT][2][2] = {
    BMI_ENTRY(andn), BMI_ENTRY(bextr), BMI_ENTRY(blsi), BMI_ENTRY(blsmsk), BMI_ENTRY(blsr),
    BMI_ENTRY(bzhi), BMI_ENTRY(mulx),  BMI_ENTRY(pdep), BMI_ENTRY(pext),   BMI_ENTRY(rorx),
    BMI_ENTRY(sarx), BMI_ENTRY(shlx),  BMI_ENTRY(shrx), BMI_ENTRY(adcx),   BMI_ENTRY(adox),
};

/* --- CRC32 (SSE4.2): the destination is 32 bits, or 64 with the upper half cleared. --- */

#define CRC(bits, suffix, wide)                                                                    \
    static inline void crc_step##bits(struct soft_vcpu *v, const struct insn *i, u##bits b)        \
    {                                                                                              \
        wide crc = (wide)v->cpu.gpr[i->dst];                                                       \
                                                                                                   \
        __asm__("crc32" #suffix " %[b], %[crc]" : [crc] "+r"(crc) : [b] "q"(b));                   \
        v->cpu.gpr[i->dst] = (u32)crc;                                                             \
    }                                                                                              \
    static void crc32_r##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        crc_step##bits(v, i, reg_get##bits(v, i->src));                                            \
        NEXT(v, i);                                                                                \
    }                                                                                              \
    static void crc32_m##bits(struct soft_vcpu *v, const struct insn *i)                           \
    {                                                                                              \
        crc_step##bits(v, i, MEM_READ(bits));                                                      \
        NEXT(v, i);                                                                                \
    }
CRC(8, b, u32)
CRC(16, w, u32)
CRC(32, l, u32)
CRC(64, q, u64)

insn_fn *const crc32_fns[2][4] = {
    {crc32_r8, crc32_r16, crc32_r32, crc32_r64},
    {crc32_m8, crc32_m16, crc32_m32, crc32_m64},
};
