/*
 * Decoding: from instruction bytes (by Zydis) to struct insn with its handler.
 */
#ifndef DOPPEL_ENGINE_SOFT_DECODE_H
#define DOPPEL_ENGINE_SOFT_DECODE_H

#include "engine/soft/insn.h"
#include "x86/cpuid.h"

#include <Zydis/Zydis.h>

#define INSN_ENDS_BLOCK 0x1u /* may change mode, RIP, mappings or interruptibility */
#define INSN_NO_FEATURE FEATURE_COUNT

/*
 * How a table-driven instruction is run. The decoder has filled every operand field of struct insn that
 * ModRM, the prefixes and the immediates give; the handler is called with v->cur set. When
 * INSN_ENDS_BLOCK is not set, the instruction falls through to the next by itself. When it is set, the
 * handler either leaves RIP alone (execution continues behind the instruction) or calls soft_set_ip.
 */
struct insn_def {
    ZydisMnemonic mnemonic;
    void (*run)(struct soft_vcpu *v, const struct insn *i);
    unsigned flags;
    enum cpuid_feature feature; /* #UD without it; INSN_NO_FEATURE: always there */
};

/* The tables: system instructions and far transfers (system.c and its neighbours). */
extern const struct insn_def system_insns[];
extern const size_t system_insns_count;

struct decode_context {
    const ZydisDecodedInstruction *zi;
    const ZydisDecodedOperand *ops; /* zi->operand_count of them */
    const u8 *bytes;
    u32 mode; /* MODE_* */
};

enum decode_result { DECODE_OK, DECODE_SHORT /* more bytes are needed to tell */ };

/*
 * Decodes the instruction at bytes[0..n) into *out, for the current mode. offset: its distance from the
 * block's start. *more is cleared when it ends its block. Bytes that are no instruction, or one that
 * the CPUID model doesn't offer, decode to one that raises #UD (or #GP, beyond 15 bytes).
 */
enum decode_result decode_insn(struct soft_vcpu *v, const u8 *bytes, unsigned n, unsigned offset,
                               struct insn *out, bool *more);

/* The same, with what Zydis said of it, for the translator; *raw is filled only when the bytes are an
 * instruction. */
struct decoded {
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand ops[ZYDIS_MAX_OPERAND_COUNT];
};
enum decode_result decode_insn_raw(struct soft_vcpu *v, const u8 *bytes, unsigned n,
                                   unsigned offset, struct insn *out, bool *more,
                                   struct decoded *raw);

/* What decoding keeps of a vCPU (v->decoder). NULL: no memory. */
struct insn_decoder *insn_decoder_create(void);
void insn_decoder_destroy(struct insn_decoder *d);

/* Whether it decoded to nothing but an exception: no instruction, or not offered. */
bool decode_is_invalid(const struct insn *i);

/*
 * x87, MMX, SSE, AVX, AVX-512 and the rest that runs on the host's units (host_exec.c). Fills out->fn
 * (a handler that tail-calls the next one: see interp.h) and out->ext. False: not one of its
 * instructions, or not offered by the model: #UD.
 */
bool host_exec_decode(struct soft_vcpu *v, const struct decode_context *ctx, struct insn *out);

#endif
