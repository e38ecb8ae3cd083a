/*
 * Direct mappings, between their files: the guest's page tables as they see them (direct_tables.c), address spaces of
 * the guest that are mapped in this process, which vCPUs share (direct_space.c), and what a vCPU has of one (direct.c,
 * which tells what it is all about).
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_DIRECT_H
#define DOPPEL_ENGINE_SOFT_BT_DIRECT_H

#include "engine/soft/bt/bt.h"
#include "engine/soft/mmu.h"

#define CHUNK_SIZE BIT(DIRECT_SHIFT)
#define MAX_CHUNKS 4096 /* of a space */

/* --- direct_tables.c: on the vCPU's thread, of its CR3 --- */

/* The entries of one chunk's pages, and what those above say. */
struct direct_entries {
    bool there;               /* else user code has nothing in the chunk */
    const _Atomic u64 *table; /* by page; NULL: `large` is the entry of all of them */
    u64 large;
    bool writable, executable;
};
struct direct_entries direct_find_entries(const struct soft_vcpu *v, u32 number);
/* The n-th page's entry, and where that leads; 0: there is none. */
u64 direct_entry(const struct soft_vcpu *v, const struct direct_entries *e, unsigned n, gpa_t *gpa);
/* Whether user code may read from a page with this entry, as far as the entry says; and be fetched. */
bool direct_may_read(const struct soft_vcpu *v, u64 entry);
bool direct_may_fetch(const struct soft_vcpu *v, const struct direct_entries *e, u64 entry);
/* The slot, if it is RAM or ROM that can be mapped by its file; else NULL. */
const struct memory_slot *direct_ram_at(const struct soft_vcpu *v, gpa_t gpa);

/* --- direct_space.c: under the machine's lock but for what is said otherwise --- */

/* What makes two vCPUs translate user addresses alike. */
struct space_key {
    gpa_t tables; /* CR3, without PCID and flags */
    gpa_t apic;   /* the local APIC's base and mode */
    gpa_t a20_mask;
    bool keys, no_execute; /* CR4.PKE, EFER.NXE */
};

struct chunk {
    u32 number;
    bool foreign; /* it can't be reserved */
    bool mapped;  /* something may be mapped in it */
    bool large;   /* what is mapped was one page, or may have been */
};

struct direct_space {
    struct space_key key;
    unsigned users; /* vCPUs that have joined; 0: not in use */
    unsigned nmaps; /* changes of mappings since nothing was mapped */
    u16 *index;     /* by chunk number: its place in chunks, and 1; 0: none */
    struct chunk *chunks;
    unsigned nchunks;
    /* Of each chunk: what is mapped, guest-physical address | PAGE_* (direct_space.c); 0: nothing. */
    u64 (*pages)[CHUNK_PAGES];
};

/* An engine's. */
struct direct_spaces {
    pthread_mutex_t lock;
    bool possible;                    /* the first chunk is reserved; never changes */
    const struct direct_space *first; /* that has it; NULL: none */
    _Atomic bool failed;              /* the host refused something: nothing more is mapped */
    unsigned nmaps;                   /* of all spaces */
    struct direct_space *all[SOFT_MAX_CPUS];
};

/* Takes no lock. */
bool space_is_of(const struct soft_vcpu *v, const struct direct_space *s);
/* For v's current address space. NULL: no memory. */
struct direct_space *space_join(struct soft_vcpu *v);
void space_leave(struct soft_vcpu *v, struct direct_space *s);
/* NULL: it isn't known. */
struct chunk *space_find(const struct direct_space *s, gva_t lin);
static inline unsigned space_place(const struct direct_space *s, const struct chunk *c)
{
    return (unsigned)(c - s->chunks);
}
/* Has the chunk's addresses, and the neighbours', for the guest. NULL: somebody else has some, or there are too many. */
struct chunk *space_reserve(const struct soft_vcpu *v, struct direct_space *s, u64 number);
/*
 * Makes the mappings of pages from `first` to `end` what v's page tables say now, by at most *maps changes, which are
 * taken off. prune: what is wrong is only taken away. False: that wasn't enough, or the host refused one.
 */
bool space_sync(struct soft_vcpu *v, struct direct_space *s, struct chunk *c, unsigned first,
                unsigned end, bool prune, unsigned *maps);
/* Maps nothing in the chunk; in any. */
void space_clear_chunk(struct soft_vcpu *v, struct direct_space *s, struct chunk *c);
void space_clear(struct soft_vcpu *v, struct direct_space *s);
/* Whether so much was changed that it's time for space_clear. */
bool space_is_worn(const struct soft_vcpu *v);

#endif
