/*
 * The integer handlers, as the decoder picks them. Tables are indexed by size (0: 8 bits, 1: 16, 2: 32,
 * 3: 64) and form; NULL where an instruction has no such form.
 */
#ifndef DOPPEL_ENGINE_SOFT_INTEGER_H
#define DOPPEL_ENGINE_SOFT_INTEGER_H

#include "engine/soft/insn.h"

/* Where the operands are: the first letter is the destination. */
enum form { FORM_RR, FORM_RM, FORM_RI, FORM_MR, FORM_MI, FORM_LOCK_MR, FORM_LOCK_MI, FORMS };

/* Two operands: dst = dst op src (arith.c). */
#define BINARY_OPS(X) X(add) X(or) X(adc) X(sbb) X(and) X(sub) X(xor) X(cmp) X(test)
enum binary_op {
#define X(name) BINARY_##name,
    BINARY_OPS(X)
#undef X
        BINARY_COUNT,
};
extern insn_fn *const binary_fns[BINARY_COUNT][FORMS][4];

/* One operand (arith.c). Forms: FORM_RR: register, FORM_MR: memory, FORM_LOCK_MR. */
enum unary_op { UNARY_inc, UNARY_dec, UNARY_neg, UNARY_not, UNARY_COUNT };
extern insn_fn *const unary_fns[UNARY_COUNT][FORMS][4];

/* Shifts and rotates (shift.c). Count: FORM_RI, FORM_MI: imm; FORM_RR, FORM_MR: CL. */
#define SHIFT_OPS(X) X(rol) X(ror) X(rcl) X(rcr) X(shl) X(shr) X(sar)
enum shift_op {
#define X(name) SHIFT_##name,
    SHIFT_OPS(X)
#undef X
        SHIFT_COUNT,
};
extern insn_fn *const shift_fns[SHIFT_COUNT][FORMS][4];
/* SHLD and SHRD: imm or CL as above; dst or memory, src. */
extern insn_fn *const shld_fns[FORMS][4], *const shrd_fns[FORMS][4];

/* Bit tests (bits.c). FORM_RR, FORM_RI, FORM_MR (bit string), FORM_MI, and the LOCK forms. */
enum bit_op { BIT_bt, BIT_bts, BIT_btr, BIT_btc, BIT_COUNT };
extern insn_fn *const bit_fns[BIT_COUNT][FORMS][4];
/* dst = f(src): BSF, BSR, TZCNT, LZCNT, POPCNT (bits.c). FORM_RR, FORM_RM. */
enum scan_op { SCAN_bsf, SCAN_bsr, SCAN_tzcnt, SCAN_lzcnt, SCAN_popcnt, SCAN_COUNT };
extern insn_fn *const scan_fns[SCAN_COUNT][FORMS][4];
/* BMI1, BMI2 and ADX; [0]: 32 bits, [1]: 64. FORM_RR or FORM_RM says where the r/m operand is. */
enum bmi_op {
    BMI_andn,
    BMI_bextr,
    BMI_blsi,
    BMI_blsmsk,
    BMI_blsr,
    BMI_bzhi,
    BMI_mulx,
    BMI_pdep,
    BMI_pext,
    BMI_rorx,
    BMI_sarx,
    BMI_shlx,
    BMI_shrx,
    BMI_adcx,
    BMI_adox,
    BMI_COUNT,
};
extern insn_fn *const bmi_fns[BMI_COUNT][2][2]; /* [op][memory][64 bits] */
extern insn_fn *const crc32_fns[2][4];          /* [memory][source size] */

/* MUL, IMUL, DIV, IDIV of the accumulator (muldiv.c): [memory][size]; and IMUL with two or three operands. */
enum muldiv_op { MULDIV_mul, MULDIV_imul, MULDIV_div, MULDIV_idiv, MULDIV_COUNT };
extern insn_fn *const muldiv_fns[MULDIV_COUNT][2][4];
extern insn_fn *const imul2_fns[2][4]; /* dst *= r/m */
extern insn_fn *const imul3_fns[2][4]; /* dst = r/m * imm */

/* Moves (move.c) */
extern insn_fn *const mov_fns[FORMS][4];
extern insn_fn *const movzx_fns[2][2][4]; /* [memory][source: 8, 16][destination size] */
extern insn_fn *const movsx_fns[2][3][4]; /* [memory][source: 8, 16, 32][destination size] */
extern insn_fn *const lea_fns[4];
extern insn_fn *const xchg_fns[FORMS][4];
extern insn_fn *const cmov_fns[16][2][4]; /* [condition][memory][size] */
extern insn_fn *const setcc_fns[2];       /* [memory] */
extern insn_fn *const xadd_fns[FORMS][4], *const cmpxchg_fns[FORMS][4];
extern insn_fn *const movbe_fns[FORMS][4];
insn_fn op_bswap32, op_bswap64, op_bswap16, op_cmpxchg8b, op_cmpxchg16b, op_xlat;
insn_fn op_cbw, op_cwde, op_cdqe, op_cwd, op_cdq, op_cqo;
insn_fn op_lahf, op_sahf, op_clc, op_stc, op_cmc, op_cld, op_std, op_salc;
insn_fn op_nop, op_pause, op_fence;

/* Decimal arithmetic, not in 64-bit mode (bcd.c) */
insn_fn op_aaa, op_aas, op_aad, op_aam, op_daa, op_das;

/* Stack (stack.c): [size]; the 64-bit ones are for 64-bit mode only. */
extern insn_fn *const push_reg_fns[4], *const pop_reg_fns[4], *const push_imm_fns[4];
extern insn_fn *const push_mem_fns[4], *const pop_mem_fns[4];
insn_fn op_pusha, op_popa, op_enter, op_leave;

/* Control flow (flow.c) */
extern insn_fn *const jcc_fns[16];
insn_fn op_jmp_rel, op_jmp_reg, op_jmp_mem, op_call_rel, op_call_reg, op_call_mem, op_ret;
insn_fn op_jrcxz, op_loop, op_loope, op_loopne;

/* String instructions (string.c): [size] */
extern insn_fn *const movs_fns[4], *const stos_fns[4], *const lods_fns[4], *const scas_fns[4],
                                                                               *const cmps_fns[4];

/* Evaluates condition code cc (0 to 15, as in Jcc's opcode) on arithmetic flags. */
bool condition(u32 aflags, unsigned cc);

#endif
