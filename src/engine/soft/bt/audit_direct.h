/*
 * The audit's part for direct code: which addresses were looked up in direct_map. See audit_direct.c.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_AUDIT_DIRECT_H
#define DOPPEL_ENGINE_SOFT_BT_AUDIT_DIRECT_H

#include "engine/soft/bt/translate.h"

#include <Zydis/Zydis.h>

/*
 * A value: base + index * scale + disp. Each is NO_VALUE, a register's number, SLOT_VALUE(offset in the vCPU), or
 * S2_VALUE: what S2 keeps of a register (s2_copy) that is something else for a while. Off NUMBER_VALUE, disp is the
 * address itself; of one that was looked up, the first one of its chunk.
 */
#define NO_VALUE UINT32_MAX
#define NUMBER_VALUE 0x20000000u
#define S2_VALUE 0x40000000u
#define SLOT_VALUE(offset) (0x80000000u | (offset))
struct direct_value {
    u32 base, index;
    u8 scale;
    s64 disp;
};

enum direct_step {
    DIRECT_NOTHING,
    DIRECT_ADDRESS,
    DIRECT_CHUNK,
    DIRECT_COMPARED,
    DIRECT_COUNTED, /* RCX was compared */
};

/* Those that are known, the latest: more than the emitter uses at once. */
#define DIRECT_CHECKED (4 * BT_DIRECT_GROUPS)

/* What is known at a point of the code. `checked` are values whose chunks are mapped. */
struct direct_known {
    u8 step; /* enum direct_step: how far a look into the map has come, of the address in `s2` */
    struct direct_value s2;
    u32 s1_slot; /* S1 holds what is there in the vCPU; 0: nobody knows */
    bool s1_is_number;
    s64 s1_number;
    u32 s2_copy;  /* the register that S2 is, or was, a copy of; NO_VALUE: of none */
    bool s2_away; /* the register is something else now */
    struct direct_value checked[DIRECT_CHECKED];
    unsigned next;            /* of these */
    struct stack_state stack; /* of placed blocks */
    u64 rcx_most;             /* RCX is at most that; UINT64_MAX: nobody knows */
    u64 compared;             /* DIRECT_COUNTED: what it was compared with */
};

/* Whether an operand is gs:[disp]. */
static inline bool is_gs(const ZydisDecodedOperand *op)
{
    return op->type == ZYDIS_OPERAND_TYPE_MEMORY && op->mem.segment == ZYDIS_REGISTER_GS &&
           op->mem.base == ZYDIS_REGISTER_NONE && op->mem.index == ZYDIS_REGISTER_NONE;
}

/* Nothing is known. */
void direct_known_clear(struct direct_known *k);
/* Whether a memory operand is within reach of RSP, which isn't looked up. */
bool direct_allows_stack(const struct direct_known *k, const ZydisDecodedOperandMem *m);
/* Whether another block may follow here. */
bool direct_stack_is_settled(const struct direct_known *k);
/* Leaves in *k what both know. */
void direct_known_meet(struct direct_known *k, const struct direct_known *other);
bool direct_known_same(const struct direct_known *k, const struct direct_known *other);

/* Whether a memory operand without a segment is within reach of a checked address. */
bool direct_allows(const struct direct_known *k, const ZydisDecodedOperandMem *m);
/* Whether LEAVE's is. */
bool direct_allows_leave(const struct direct_known *k);
/* Whether it is MOVS or STOS, of no more elements than are within reach of where it begins. */
bool direct_allows_string(const struct direct_known *k, const ZydisDecodedInstruction *zi);
/* Whether it is the look into direct_map, by a chunk's number. */
bool direct_is_look(const struct direct_known *k, const ZydisDecodedInstruction *zi,
                    const ZydisDecodedOperandMem *m);
/* And whether it is at RSP: what goes by the TLB in direct code has no other. */
bool direct_is_stack_look(const struct direct_known *k, const ZydisDecodedInstruction *zi,
                          const ZydisDecodedOperandMem *m);
/* The instruction comes next. A branch is not taken. */
void direct_known_after(struct direct_known *k, const ZydisDecodedInstruction *zi,
                        const ZydisDecodedOperand *ops);

#endif
