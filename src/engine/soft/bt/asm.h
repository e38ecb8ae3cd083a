/*
 * The emitter's alphabet: host instructions as bytes.
 *
 * What is here writes single host instructions at a cursor; what they are for is decided elsewhere. The
 * vCPU is addressed through GS, whose base is the struct soft_vcpu while its thread runs (GS_OFFSET).
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_ASM_H
#define DOPPEL_ENGINE_SOFT_BT_ASM_H

#include "engine/soft/vcpu.h"

#include <stddef.h>
#include <string.h>

#define GS_OFFSET(member) ((u32)offsetof(struct soft_vcpu, member))
#define GS_GPR(r) (GS_OFFSET(cpu.gpr) + 8u * (u32)(r))

/* The scratch registers: the guest's own R14 and R15 live in memory. */
#define S1 R14
#define S2 R15

/* Opcodes of the two-operand group with a register destination. */
enum { OP_ADD = 0x03, OP_AND = 0x23, OP_SUB = 0x2b, OP_XOR = 0x33, OP_CMP = 0x3b, OP_MOV = 0x8b };
enum { EXT_ADD = 0, EXT_OR = 1, EXT_AND = 4, EXT_SUB = 5, EXT_CMP = 7 };
enum { CC_B = 2, CC_E = 4, CC_NE = 5, CC_A = 7 };

static inline void put8(u8 **p, unsigned b)
{
    *(*p)++ = (u8)b;
}
static inline void put32(u8 **p, u32 n)
{
    memcpy(*p, &n, 4);
    *p += 4;
}
static inline void put64(u8 **p, u64 n)
{
    memcpy(*p, &n, 8);
    *p += 8;
}

static inline void put_rex(u8 **p, bool w, unsigned reg, unsigned index, unsigned base)
{
    put8(p, 0x40u | (unsigned)w << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3);
}
static inline void put_modrm(u8 **p, unsigned mod, unsigned reg, unsigned rm)
{
    put8(p, mod << 6 | (reg & 7) << 3 | (rm & 7));
}

/* ModRM, SIB and displacement of [base + disp]; base may be any register. */
static inline void put_base_disp(u8 **p, unsigned reg, unsigned base, s32 disp)
{
    unsigned mod = disp == 0 && (base & 7) != RBP ? 0 : disp == (s8)disp ? 1 : 2;

    put_modrm(p, mod, reg, base);
    if ((base & 7) == RSP)
        put8(p, 0x24);
    if (mod == 1)
        put8(p, (u8)disp);
    else if (mod == 2)
        put32(p, (u32)disp);
}

/* op reg, gs:[offset] (or its store form, by the opcode) */
static inline void put_op_gs(u8 **p, bool w, unsigned op, unsigned reg, u32 offset)
{
    put8(p, 0x65);
    if (w || reg >= 8)
        put_rex(p, w, reg, 0, 0);
    put8(p, op);
    put_modrm(p, 0, reg, 4);
    put8(p, 0x25);
    put32(p, offset);
}
static inline void put_load_gs(u8 **p, unsigned reg, u32 offset)
{
    put_op_gs(p, true, OP_MOV, reg, offset);
}
static inline void put_store_gs(u8 **p, u32 offset, unsigned reg)
{
    put_op_gs(p, true, 0x89, reg, offset);
}
/* mov dword gs:[offset], imm */
static inline void put_store_gs_imm32(u8 **p, u32 offset, u32 imm)
{
    put8(p, 0x65);
    put8(p, 0xc7);
    put_modrm(p, 0, 0, 4);
    put8(p, 0x25);
    put32(p, offset);
    put32(p, imm);
}
/* mov qword gs:[offset], imm (sign-extended) */
static inline void put_store_gs_simm32(u8 **p, u32 offset, s32 imm)
{
    put8(p, 0x65);
    put8(p, 0x48);
    put8(p, 0xc7);
    put_modrm(p, 0, 0, 4);
    put8(p, 0x25);
    put32(p, offset);
    put32(p, (u32)imm);
}
/* The groups with an immediate byte: OP_GROUP_BYTE (80) and OP_TEST_BYTE (f6) of a byte, 83 of more. */
enum { OP_GROUP_BYTE = 0x80, OP_GROUP = 0x83, OP_TEST_BYTE = 0xf6 };
static inline void put_op_gs_imm8(u8 **p, unsigned op, unsigned ext, u32 offset, u8 imm)
{
    put8(p, 0x65);
    put8(p, op);
    put_modrm(p, 0, ext, 4);
    put8(p, 0x25);
    put32(p, offset);
    put8(p, imm);
}
/* prefetcht0 gs:[offset] */
static inline void put_prefetch_gs(u8 **p, u32 offset)
{
    put8(p, 0x65);
    put8(p, 0x0f);
    put8(p, 0x18);
    put_modrm(p, 0, 1, 4);
    put8(p, 0x25);
    put32(p, offset);
}
/* op reg, gs:[base + disp] */
static inline void put_op_gs_base(u8 **p, unsigned op, unsigned reg, unsigned base, u32 disp)
{
    put8(p, 0x65);
    put_rex(p, true, reg, 0, base);
    put8(p, op);
    put_modrm(p, 2, reg, base);
    put32(p, disp);
}
/* op reg, gs:[index * 4 + disp]; op 0xff with reg 4 is JMP */
static inline void put_op_gs_index4(u8 **p, bool w, unsigned op, unsigned reg, unsigned index,
                                    u32 disp)
{
    put8(p, 0x65);
    put_rex(p, w, reg, index, 0);
    put8(p, op);
    put_modrm(p, 0, reg, 4);
    put8(p, 2u << 6 | (index & 7) << 3 | 5);
    put32(p, disp);
}

/* op reg, rm: both registers, 32 or 64 bits */
static inline void put_op_rr(u8 **p, bool w, unsigned op, unsigned reg, unsigned rm)
{
    if (w || reg >= 8 || rm >= 8)
        put_rex(p, w, reg, 0, rm);
    put8(p, op);
    put_modrm(p, 3, reg, rm);
}
static inline void put_mov_rr(u8 **p, unsigned to, unsigned from)
{
    put_op_rr(p, true, OP_MOV, to, from);
}
/* mov reg, imm */
static inline void put_mov_imm(u8 **p, unsigned reg, u64 imm)
{
    bool wide = imm > UINT32_MAX;

    if (wide && imm == (u64)(s64)(s32)imm) { /* mov reg, imm (sign-extended) */
        put_rex(p, true, 0, 0, reg);
        put8(p, 0xc7);
        put_modrm(p, 3, 0, reg);
        put32(p, (u32)imm);
        return;
    }
    if (wide || reg >= 8)
        put_rex(p, wide, 0, 0, reg);
    put8(p, 0xb8 | (reg & 7));
    if (wide)
        put64(p, imm);
    else
        put32(p, (u32)imm);
}
/* op rm, imm (sign-extended) */
static inline void put_op_ri(u8 **p, bool w, unsigned ext, unsigned rm, s32 imm)
{
    bool byte = imm == (s8)imm;

    if (w || rm >= 8)
        put_rex(p, w, 0, 0, rm);
    put8(p, byte ? 0x83 : 0x81);
    put_modrm(p, 3, ext, rm);
    if (byte)
        put8(p, (u8)imm);
    else
        put32(p, (u32)imm);
}
/* The unary group F7 (3: NEG), and shifts by an immediate (4 SHL, 5 SHR, 7 SAR). */
static inline void put_unary(u8 **p, bool w, unsigned ext, unsigned rm)
{
    put_rex(p, w, 0, 0, rm);
    put8(p, 0xf7);
    put_modrm(p, 3, ext, rm);
}
static inline void put_shift(u8 **p, bool w, unsigned ext, unsigned rm, unsigned count)
{
    put_rex(p, w, 0, 0, rm);
    put8(p, 0xc1);
    put_modrm(p, 3, ext, rm);
    put8(p, count);
}
/* lea reg, [base + disp], cut to `size` bytes: 4 or 8 */
static inline void put_lea_word(u8 **p, unsigned size, unsigned reg, unsigned base, s32 disp)
{
    put_rex(p, size == 8, reg, 0, base);
    put8(p, 0x8d);
    put_base_disp(p, reg, base, disp);
}
static inline void put_lea(u8 **p, unsigned reg, unsigned base, s32 disp)
{
    put_lea_word(p, 8, reg, base, disp);
}
/* mov reg, [base + disp] and back, of `size` bytes: 4 or 8 */
static inline void put_load_word(u8 **p, unsigned size, unsigned reg, unsigned base, s32 disp)
{
    put_rex(p, size == 8, reg, 0, base);
    put8(p, 0x8b);
    put_base_disp(p, reg, base, disp);
}
static inline void put_store_word(u8 **p, unsigned size, unsigned base, s32 disp, unsigned reg)
{
    put_rex(p, size == 8, reg, 0, base);
    put8(p, 0x89);
    put_base_disp(p, reg, base, disp);
}
/* rorx reg, rm, imm */
static inline void put_rorx(u8 **p, unsigned reg, unsigned rm, unsigned imm)
{
    put8(p, 0xc4);
    put8(p, (reg < 8 ? 0x80u : 0) | 0x40u | (rm < 8 ? 0x20u : 0) | 3);
    put8(p, 0xfb);
    put8(p, 0xf0);
    put_modrm(p, 3, reg, rm);
    put8(p, imm);
}
/* Jumps with a 32-bit displacement, which is patched later; they return where it is. */
static inline u8 *put_jcc(u8 **p, unsigned cc)
{
    put8(p, 0x0f);
    put8(p, 0x80 | cc);
    put32(p, 0);
    return *p - 4;
}
static inline u8 *put_jmp(u8 **p)
{
    put8(p, 0xe9);
    put32(p, 0);
    return *p - 4;
}
/* Makes the displacement at `at` lead to `to`: pointers into one mapping. */
static inline void patch_rel32(u8 *at, const u8 *to)
{
    s32 rel = (s32)(to - (at + 4));

    memcpy(at, &rel, 4);
}

#endif
