/*
 * The cache of decoded blocks.
 *
 * A block is a run of instructions decoded from consecutive bytes, up to the first that may change the
 * flow or the mode. Blocks are keyed by guest-physical address and mode, so every mapping of a page and
 * every address space share them; a small table in front is keyed by linear address.
 */
#ifndef DOPPEL_ENGINE_SOFT_BLOCK_H
#define DOPPEL_ENGINE_SOFT_BLOCK_H

#include "engine/soft/vcpu.h"

#define BLOCK_MAX_INSNS 48
#define MODE_DROPPED 0xffffffffu /* the mode of a block that was dropped: matches none */

/* Where a block at a linear address is; true for one map_generation (0: for none). */
struct block_link {
    gva_t lin;
    u64 generation;
    struct block *block;
};

#define BLOCK_LINKS 2

struct block {
    u32 mode;
    u16 count;  /* instructions, not counting the one that leaves the block */
    u16 bytes;  /* of guest code */
    u16 heat;   /* runs so far, for the translator */
    gpa_t gpa;  /* of the first byte */
    gpa_t gpa2; /* page of the bytes beyond gpa's page; 0: none */
    struct block *hash_next;
    struct block *page_next, *page2_next;
    struct block_link links[BLOCK_LINKS]; /* blocks that came next, the last found first */
    struct insn insns[];
};

struct block_cache *block_cache_create(struct error *err);
void block_cache_destroy(struct block_cache *c);

/* The block at the exact RIP in the current mode, decoded if need be. Raises what the fetch raises. */
struct block *block_cache_find(struct soft_vcpu *v);
/* The same, or NULL if it would have to be decoded. */
struct block *block_cache_kept(struct soft_vcpu *v);
/* Decodes it: block_cache_kept has none. */
struct block *block_cache_make(struct soft_vcpu *v);

/*
 * Drops this vCPU's blocks of [gpa, gpa + n), or all, and translations of them. A dropped block that is
 * running is left after the current instruction.
 */
void block_cache_drop(struct soft_vcpu *v, gpa_t gpa, u64 n);
void block_cache_drop_all(struct soft_vcpu *v);

/* Whether there may be decoded blocks of a page. */
bool block_cache_uses(struct block_cache *c, gpa_t page);

/* Drops everything, translations too. Only between blocks. */
void block_cache_flush(struct soft_vcpu *v);

/* Bytes of host memory in use. */
u64 block_cache_bytes(const struct block_cache *c);

#endif
