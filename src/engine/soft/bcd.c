/*
 * Decimal arithmetic (Intel SDM vol. 2A: AAA, AAD, AAM, AAS, DAA, DAS). 64-bit hosts no longer have
 * these, so they are computed; the flags that the manual leaves undefined follow what processors do.
 */
#include "engine/soft/exception.h"
#include "engine/soft/integer.h"
#include "engine/soft/operand.h"

/* SF, ZF and PF of a byte. */
static u32 result_flags(u8 value)
{
    return (value & 0x80 ? AFLAG_SF : 0) | (value ? 0 : AFLAG_ZF) |
           (__builtin_parity(value) ? 0 : AFLAG_PF) | 0x200;
}

static void adjust_ascii(struct soft_vcpu *v, bool subtract)
{
    u16 ax = (u16)v->cpu.gpr[RAX];
    bool adjust = (ax & 0xf) > 9 || (v->aflags & AFLAG_AF);

    if (adjust)
        ax = subtract ? (u16)(ax - 0x106) : (u16)(ax + 0x106);
    ax &= 0xff0f;
    reg_set16(v, RAX, ax);
    v->aflags = result_flags((u8)ax) | (adjust ? AFLAG_AF | AFLAG_CF : 0);
}

void op_aaa(struct soft_vcpu *v, const struct insn *i)
{
    adjust_ascii(v, false);
    NEXT(v, i);
}
void op_aas(struct soft_vcpu *v, const struct insn *i)
{
    adjust_ascii(v, true);
    NEXT(v, i);
}

void op_aad(struct soft_vcpu *v, const struct insn *i)
{
    u8 al = (u8)(reg_get8(v, 0) + reg_get8(v, 1) * (u8)i->imm);

    reg_set16(v, RAX, al);
    v->aflags = result_flags(al);
    NEXT(v, i);
}

void op_aam(struct soft_vcpu *v, const struct insn *i)
{
    u8 al = reg_get8(v, 0), base = (u8)i->imm;

    if (base == 0) {
        v->cur = i;
        soft_raise(v, EXC_DE);
    }
    /* cppcheck-suppress zerodivcond ; soft_raise does not return */
    reg_set16(v, RAX, (u16)((al / base) << 8 | al % base));
    /* cppcheck-suppress zerodivcond */
    v->aflags = result_flags(al % base);
    NEXT(v, i);
}

static void adjust_decimal(struct soft_vcpu *v, bool subtract)
{
    u8 old = reg_get8(v, 0), al = old;
    bool carry = v->aflags & AFLAG_CF, low = (old & 0xf) > 9 || (v->aflags & AFLAG_AF);
    bool high = old > 0x99 || carry;
    u8 step = (low ? 6 : 0) + (high ? 0x60 : 0);

    al = subtract ? (u8)(al - step) : (u8)(al + step);
    if (subtract && low && old < 6)
        high = true;
    reg_set8(v, 0, al);
    v->aflags = result_flags(al) | (low ? AFLAG_AF : 0) | (high ? AFLAG_CF : 0);
}

void op_daa(struct soft_vcpu *v, const struct insn *i)
{
    adjust_decimal(v, false);
    NEXT(v, i);
}
void op_das(struct soft_vcpu *v, const struct insn *i)
{
    adjust_decimal(v, true);
    NEXT(v, i);
}
