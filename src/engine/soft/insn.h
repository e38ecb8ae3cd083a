/*
 * A decoded instruction, as the interpreter's block cache keeps it.
 *
 * The decoder (decode.c) fills the operands in one uniform way, whatever the instruction, and picks the
 * handler. Handlers run one after another by tail call within a block: see interp.h.
 */
#ifndef DOPPEL_ENGINE_SOFT_INSN_H
#define DOPPEL_ENGINE_SOFT_INSN_H

#include "host/types.h"

struct soft_vcpu;
struct insn;

typedef void insn_fn(struct soft_vcpu *v, const struct insn *i);

enum insn_address {
    ADDRESS_FLAT,   /* 64-bit mode, 64-bit address size: offset + segment base, no limit */
    ADDRESS_CHECKED /* everything else: mask to the address size, check limits (segment.h) */
};

#define INSN_LOCK 0x01
#define INSN_REP 0x02   /* F3 */
#define INSN_REPNE 0x04 /* F2 */
#define INSN_MEM 0x08   /* the r/m operand (or the only explicit one) is memory */

struct insn {
    insn_fn *fn;
    u64 imm;  /* immediate, sign-extended to 64 bits; of a relative branch: the displacement */
    s64 disp; /* of the memory operand; with GPR_RIP as base it counts from the block's start */
    u8 base, index; /* indexes into cpu.gpr; GPR_ZERO when absent */
    u8 scale;       /* shift: 0 to 3 */
    u8 seg;         /* enum segreg, overrides applied */
    u8 address;     /* enum insn_address */
    u8 asize;       /* address size in bytes: 2, 4, 8 */
    u8 osize;       /* operand size in bytes: 1, 2, 4, 8 */
    u8 len;         /* of the instruction, in bytes: 1 to 15 */
    u16 offset;     /* of its first byte from the block's start */
    u8 flags;       /* INSN_* */
    u8 dst,
        src; /* integer handlers: register numbers; of 8-bit registers: byte offset in cpu.gpr */
    u8 reg;  /* ModRM.reg, extended by REX/VEX; or the register number in the opcode */
    u8 rm;   /* ModRM.rm as a register (no INSN_MEM), extended */
    u8 vvvv; /* VEX/EVEX.vvvv */
    u8 imm2; /* a second immediate (ENTER); condition code of Jcc, SETcc, CMOVcc */
    u16 selector; /* of a far pointer in the instruction */
    union {
        const void *ext; /* what the handler needs besides (host_exec: its thunk) */
        insn_fn *run;    /* table-driven instructions: what the wrapper runs */
    };
};

#endif
