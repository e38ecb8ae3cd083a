/*
 * x87 and SIMD on the host's own units.
 *
 * host_exec_decode (decode.h) gives an instruction its handler; here is the life of the state
 * behind. The x87 and MMX registers of the guest stay in the host's while it runs: whoever looks
 * at cpu.fpr, fcw, fsw, ftw calls soft_fpu_sync first, and C code on the vCPU's thread uses no x87
 * before that.
 */
#ifndef DOPPEL_ENGINE_SOFT_HOST_EXEC_H
#define DOPPEL_ENGINE_SOFT_HOST_EXEC_H

#include "engine/soft/decode.h"
#include "engine/soft/exception.h"
#include "engine/soft/interp.h"
#include "engine/soft/thunk.h"

struct host_exec {
    u32 mxcsr_mask;
    struct thunk_arena *arena;
    struct {
        u32 size, offset;
        bool aligned;
    } xsave[10]; /* components, standard format: CPUID leaf 0xD */
};

/* Makes v->host_exec; v->cpuid is set. 0 or -errno, err set. */
int host_exec_create(struct soft_vcpu *v, struct error *err);
void host_exec_destroy(struct soft_vcpu *v);

/* Brings the x87 state home to v->cpu. On the vCPU's thread, before vcpu_run returns. */
void soft_fpu_sync(struct soft_vcpu *v);
/* v->cpu was replaced (reset, restore): what is live in the host is forgotten. */
void soft_fpu_drop(struct soft_vcpu *v);

/*
 * No room is left for more instructions: run block_cache_flush, then host_exec_restart, before the
 * next block. Until then an instruction that needs room leaves its block.
 */
bool host_exec_full(const struct soft_vcpu *v);
void host_exec_restart(struct soft_vcpu *v);

/* How an x87 or SIMD instruction runs in one piece; NULL: another kind of instruction, or one that doesn't. */
const struct thunk_spec *host_exec_spec(const struct insn *i);

/* --- between the files of this module --- */

/* #UD or #NM when i's class of registers is not to be had. */
static inline void fpu_class_check(struct soft_vcpu *v, const struct insn *i, enum fpu_class class)
{
    if (unlikely(v->class_fault[class])) {
        v->cur = i;
        soft_raise(v, v->class_fault[class]);
    }
}

/* Raises what the host raised in a thunk. */
_Noreturn void thunk_raise(struct soft_vcpu *v, u32 vector);
/* Runs t with its operand at memory, a host address of guest memory or of a copy. Sets v->cur. */
void thunk_run_at(struct soft_vcpu *v, const struct insn *i, const struct thunk *t, void *memory);

/* x87.c: puts the guest's x87 state into the host's registers. */
void fpu_load(struct soft_vcpu *v);
static inline void fpu_make_live(struct soft_vcpu *v)
{
    if (unlikely(!v->fpu_live))
        fpu_load(v);
}
/* Makes the tags what the contents say, where they only told empty from used (vol. 1, 8.1.7). */
void fpu_refresh_tags(struct cpu *cpu);
/* #MF when an unmasked x87 exception is pending. */
void fpu_check_pending(struct soft_vcpu *v, const struct insn *i);

/* x87.c, xsave.c, simd_mem.c: their instructions, by mnemonic; NULL: not theirs. A handler that is
 * found may have changed operand fields of *out for its own use. */
insn_fn *x87_decode(const struct decode_context *ctx, struct insn *out);
insn_fn *xsave_decode(const struct decode_context *ctx, struct insn *out);
insn_fn *simd_mem_decode(const struct decode_context *ctx, struct insn *out);
/* simd_mem.c: runs t on its masked memory operand at lin, element by element. */
/* Whether its mask leaves out every element, so that memory is not accessed at all. */
bool simd_masked_out(const struct soft_vcpu *v, const struct thunk_spec *s);
void simd_run_masked(struct soft_vcpu *v, const struct insn *i, const struct thunk *t, gva_t lin);

#endif
