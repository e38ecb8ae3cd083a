/*
 * An instruction as the translator sees it: its encoding taken apart so that it can be put together again
 * with other registers and another memory operand, and what it does to registers, memory and flags.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_INSN_H
#define DOPPEL_ENGINE_SOFT_BT_INSN_H

#include "engine/soft/decode.h"
#include "engine/soft/vcpu.h"

enum bt_op {
    BT_INTERP, /* the interpreter's: ends the block before it */
    BT_PLAIN,  /* runs as it is, with its operands substituted */
    BT_NOP,
    BT_LEA,
    BT_PUSH, /* of a register, an immediate or memory */
    BT_POP,  /* to a register */
    BT_LEAVE,
    BT_BIT_STRING, /* BT and its family with a memory operand and a register offset */
    BT_PUSHF,
    BT_CLI,
    BT_STI,
    BT_CLD,
    BT_STD,
    BT_SWAPGS,
    BT_STRING_INSN, /* MOVS, STOS, LODS, SCAS, CMPS: in C, by string.c */
    BT_FAST, /* ends the block: the interpreter does it, and leaves the vector registers alone */
    /* These end the block, but for a conditional branch that isn't taken. */
    BT_JCC,
    BT_JMP,
    BT_CALL,
    BT_JMP_INDIRECT,
    BT_CALL_INDIRECT,
    BT_RET,
};

enum bt_encoding { ENC_LEGACY, ENC_VEX };

#define NO_REG 0xff

/* How arithmetic flags can be had again from registers, after the host's own are gone. */
enum recipe_kind {
    RECIPE_NONE,
    RECIPE_CMP,
    RECIPE_TEST,
    RECIPE_ADD,
    RECIPE_SUB,
    RECIPE_LOGIC,
    RECIPE_NEG,
    /* By an immediate count that isn't 0. */
    RECIPE_SHL,
    RECIPE_SHR,
    RECIPE_SAR,
};
struct bt_recipe {
    u8 kind; /* enum recipe_kind */
    u8 size; /* of its operands in bytes */
    u8 a; /* register: the first operand, or the result (ADD, SUB, LOGIC, NEG); NO_REG: the operand as
              * it was, in v->bt_shared.flag_source */
    u8 b; /* register, or NO_REG: imm */
    s32 imm;
};

/* A string instruction that runs in C. */
enum bt_string_op { STRING_MOVE, STRING_STORE, STRING_LOAD, STRING_COMPARE, STRING_SCAN };
struct bt_string {
    u8 op;   /* enum bt_string_op */
    u8 size; /* of an element */
    u8 len;  /* of the instruction */
    bool repeated;
    bool until_equal; /* by REPNE */
};

/* Whether it uses memory at RSI, and at RDI; and whether it makes flags. */
static inline bool string_has_source(const struct bt_string *s)
{
    return s->op == STRING_MOVE || s->op == STRING_LOAD || s->op == STRING_COMPARE;
}
static inline bool string_has_destination(const struct bt_string *s)
{
    return s->op != STRING_LOAD;
}
static inline bool string_compares(const struct bt_string *s)
{
    return s->op == STRING_COMPARE || s->op == STRING_SCAN;
}

struct bt_insn {
    u8 bytes[15], len;
    u16 offset;  /* in its page */
    u8 op;       /* enum bt_op */
    bool code32; /* it is 32-bit code */
    u8 word;     /* bytes that the stack and branch targets have: 4 or 8 */

    /* Encoding */
    u8 encoding; /* enum bt_encoding */
    u8 map;      /* opcode map: 0 one byte, 1 0F, 2 0F38, 3 0F3A */
    u8 opcode;
    u8 prefixes[4], nprefixes; /* those to keep: 66, F2, F3, F0, in order */
    u8 rex;                    /* as it was; 0: none */
    u8 vex_w_l_pp;             /* the last VEX byte without vvvv */
    u8 modrm;
    bool has_modrm;
    u8 imm_at, imm_len; /* immediate bytes in `bytes` */

    /* Operands */
    u8 reg, rm, vvvv;               /* numbers in the encoding */
    bool reg_gpr, rm_gpr, vvvv_gpr; /* whether they are general registers */
    bool opcode_reg;                /* the register is in the opcode: `rm` */
    bool high_byte;                 /* AH, CH, DH or BH is an operand */
    bool high_reg;                  /* it is that of the encoding's reg */
    u8 mem_size;                    /* 0: no memory access */
    bool mem, mem_write;            /* memory operand (LEA has one with no access) */
    bool rip_relative, address32;
    u8 base, index, scale; /* NO_REG: absent; scale as a shift */
    u8 seg;                /* SEG_FS, SEG_GS, or NO_REG */
    s32 disp;
    s64 imm;                               /* immediate, or displacement of a branch */
    u8 cc;                                 /* condition of BT_JCC */
    u32 read, written;                     /* general registers, one bit each, implicit ones too */
    u32 fixed;                             /* those that can't be substituted */
    u8 reg_action, rm_action, vvvv_action; /* ACTION_* of the general registers above */

    /* Flags */
    bool flags_in;      /* reads some; or writes not all, and somebody may ask for the others */
    bool flags_out;     /* writes some */
    bool flags_partial; /* but not all */
    struct bt_recipe recipe;

    struct bt_string string;
    u8 fpu_class;    /* enum fpu_class; FPU_CLASSES: none */
    bool faults;     /* may fault on the host by itself: #DE, #MF, #XM, alignment */
    bool x87;        /* uses the x87 or MMX registers */
    bool x87_points; /* sets FIP, FOP, and FDP if there is a memory operand */
    u16 fop;
    struct insn insn; /* the interpreter's */
};

#define ACTION_READ 1
#define ACTION_WRITE 2
#define ACTION_PARTIAL 4 /* written, but not all of it */

/*
 * Takes apart the instruction at bytes[0..n) at `offset` in its page, in the vCPU's current mode. False:
 * it doesn't end within n bytes.
 */
bool bt_insn_decode(struct soft_vcpu *v, const u8 *bytes, unsigned n, u16 offset,
                    struct bt_insn *out);

#endif
