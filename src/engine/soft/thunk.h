/*
 * Thunks: pieces of host code that run one guest instruction on the host's own units.
 *
 * A thunk is called as code(v, memory): it loads the guest registers that the instruction uses from
 * v->cpu into the host registers of the same number, executes it with its memory operand at
 * `memory`, stores what it wrote, and returns 0; or, when the host raised an exception, that
 * exception's vector, with nothing stored but MXCSR's flags (#XM).
 */
#ifndef DOPPEL_ENGINE_SOFT_THUNK_H
#define DOPPEL_ENGINE_SOFT_THUNK_H

#include "engine/soft/vcpu.h"

typedef u32 thunk_fn(struct soft_vcpu *v, void *memory);

#define THUNK_INSN_MAX 15
#define THUNK_MXCSR 0x01u      /* reads and writes MXCSR */
#define THUNK_FLAGS_IN 0x02u   /* reads arithmetic flags */
#define THUNK_FLAGS_OUT 0x04u  /* writes them, all six */
#define THUNK_X87 0x08u        /* uses the x87 and MMX registers */
#define THUNK_POINTERS 0x10u   /* sets the x87 instruction and data pointers */
#define THUNK_MM_ALIGN 0x20u   /* MXCSR.MM (AMD) lifts its alignment check */
#define THUNK_ZERO_UPPER 0x40u /* VEX, EVEX: it zeroes the rest of its destination */
#define THUNK_MERGES 0x80u     /* masked, but accesses its whole memory operand */

/* How a memory operand depends on a mask, for accesses that can't be done in one piece. */
enum thunk_masking {
    MASKING_NONE,
    MASKING_K,        /* element n is accessed when bit n of a mask register is set */
    MASKING_K_REPEAT, /* as K, but element n serves bits n, n + elements, ... (broadcasts) */
    MASKING_K_PACKED, /* as many elements as the mask has bits set (VPCOMPRESS, VPEXPAND) */
    MASKING_SIGN,     /* element n of a vector register has its sign bit set (VMASKMOV) */
};

/* Everything that decides a thunk's code and how it is run: equal specs share a thunk. Zeroed
 * first. */
struct thunk_spec {
    u8 insn[THUNK_INSN_MAX + 1]; /* the instruction for the host, memory operand at [RSI] */
    u32 vec_in, vec_out;         /* one bit a vector register */
    u8 k_in, k_out;
    u8 insn_len;
    u8 flags;                 /* THUNK_* */
    u8 vec_size;              /* 16: legacy SSE or VEX.128; 32; 64 */
    u8 fpu_class;             /* enum fpu_class */
    u8 gpr_in[3], gpr_out[3]; /* for the host's RAX, RCX, RDX: guest register + 1, or 0 */
    u8 mem_access;            /* ACCESS_READ or ACCESS_WRITE */
    u8 mem_align;             /* the manual's alignment check in bytes, or 0 */
    u8 masking;               /* enum thunk_masking */
    u8 mask_reg;              /* the mask register, or MASKING_SIGN's vector register */
    u8 mask_bits;             /* elements that the mask selects from */
    u8 elem_size;             /* of the memory operand's elements, in bytes */
    u16 mem_size;
    u16 fop;  /* x87: the opcode as FOP shows it */
    u16 zero; /* no padding: specs are compared as bytes */
};

struct thunk {
    thunk_fn *code;
    struct thunk_spec spec;
    struct thunk *next; /* in its hash chain */
};

struct thunk_arena;

/* code_size: of the arena in bytes. avx, avx512, avx512bw: what the host has and the guest may
 * use. */
struct thunk_arena *thunk_arena_create(size_t code_size, bool avx, bool avx512, bool avx512bw,
                                       struct error *err);
void thunk_arena_destroy(struct thunk_arena *a);

/* The thunk of spec, made if need be. NULL: the arena is full. */
const struct thunk *thunk_get(struct thunk_arena *a, const struct thunk_spec *spec);

bool thunk_arena_full(const struct thunk_arena *a);
/* Forgets all thunks: nobody may hold one. */
void thunk_arena_reset(struct thunk_arena *a);

#endif
