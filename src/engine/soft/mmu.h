/*
 * The soft MMU: guest-linear to host addresses, with every check of the manual, and the accesses built
 * on it. (Intel SDM vol. 3, chapter 4.)
 *
 * All functions that take a linear address may raise #PF, #GP, #SS or #AC (they don't return then) and
 * require v->cur to be set. Sizes are 1, 2, 4 or 8 where a u64 carries the value. Accesses may be
 * misaligned, cross a page, or hit MMIO; a write that crosses pages checks both before it writes.
 * Segmentation is not applied here: addresses are linear (see segment.h for the rest).
 */
#ifndef DOPPEL_ENGINE_SOFT_MMU_H
#define DOPPEL_ENGINE_SOFT_MMU_H

#include "engine/soft/vcpu.h"

#include <string.h>

#define ACCESS_READ 0x0u
#define ACCESS_WRITE 0x1u
#define ACCESS_EXEC 0x2u
#define ACCESS_SYSTEM 0x4u     /* implicit supervisor access, whatever CPL: GDT, LDT, IDT, TSS */
#define ACCESS_STACK 0x8u      /* non-canonical addresses give #SS(0), not #GP(0) */
#define ACCESS_UNALIGNED 0x10u /* never #AC */

/* Slow paths, and all accesses of rarely run instructions. */
u64 soft_load(struct soft_vcpu *v, gva_t lin, unsigned size, unsigned access);
void soft_store(struct soft_vcpu *v, gva_t lin, u64 value, unsigned size, unsigned access);
/* n bytes, n up to 4096 (two pages at most). A write is all or nothing. */
void soft_load_bytes(struct soft_vcpu *v, gva_t lin, void *buf, size_t n, unsigned access);
void soft_store_bytes(struct soft_vcpu *v, gva_t lin, const void *buf, size_t n, unsigned access);
/* Raises what an access of n bytes would raise (A and D bits are set as by the access). */
void soft_probe(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access);

/*
 * Host pointer for an access of n bytes within one page of RAM, all checks done (faults are raised), or
 * NULL when the access needs the slow functions: it crosses a page, is MMIO or ROM (for writing), or
 * a breakpoint or #AC watches. A pointer for ACCESS_WRITE is for one store or read-modify-write that is
 * done before anything else touches guest memory; decoded code there has been dropped already.
 */
void *soft_pointer(struct soft_vcpu *v, gva_t lin, size_t n, unsigned access);

/*
 * A read-modify-write that soft_pointer can't give a pointer for (across pages, MMIO, watched): reads
 * `size` bytes at lin, calls compute(v, i, old, arg), writes what it returns; a locked instruction has all
 * other vCPUs stand still meanwhile. All checks come first; compute must not fault.
 */
typedef u64 soft_rmw_fn(struct soft_vcpu *v, const struct insn *i, u64 old, u64 arg);
void soft_rmw_slow(struct soft_vcpu *v, const struct insn *i, gva_t lin, unsigned size,
                   soft_rmw_fn *compute, u64 arg);

/* As soft_load and soft_store with ACCESS_SYSTEM. */
static inline u64 soft_system_load(struct soft_vcpu *v, gva_t lin, unsigned size)
{
    return soft_load(v, lin, size, ACCESS_READ | ACCESS_SYSTEM);
}
static inline void soft_system_store(struct soft_vcpu *v, gva_t lin, u64 value, unsigned size)
{
    soft_store(v, lin, value, size, ACCESS_WRITE | ACCESS_SYSTEM);
}

/*
 * Translates an instruction fetch at lin. Returns the host address of that byte (NULL: not in RAM or
 * ROM, fetch bytes from *gpa through the bus) and its guest-physical address. Raises #PF or #GP.
 */
const u8 *soft_fetch(struct soft_vcpu *v, gva_t lin, gpa_t *gpa);

/* Whether the page that soft_fetch found last for lin is global. */
bool soft_fetch_is_global(const struct soft_vcpu *v, gva_t lin);
/* Makes every entry of every TLB one that nothing matches: once, before the first access. */
void soft_tlb_init(struct soft_vcpu *v);
/* Forgets translations: everything; all but global pages; one page (global or not, every PCID's). */
void soft_tlb_flush(struct soft_vcpu *v);
void soft_tlb_flush_nonglobal(struct soft_vcpu *v);
/* CR3 was written: another address space, by its PCID. keep: what is known of it still holds. */
void soft_tlb_switch(struct soft_vcpu *v, unsigned pcid, bool keep);
void soft_tlb_flush_page(struct soft_vcpu *v, gva_t lin);
/* This vCPU's stores to this guest-physical page must take the slow path from now on (it holds decoded code),
 * or all (they are logged). */
void soft_tlb_protect(struct soft_vcpu *v, gpa_t page);
void soft_tlb_protect_all(struct soft_vcpu *v);

/*
 * Loads the four PDPTEs from cr3 (PAE paging: vol. 3, 4.4.1). False: a reserved bit is set in a present
 * one, nothing is changed, and the instruction gets #GP(0).
 */
bool soft_load_pdptes(struct soft_vcpu *v, u64 cr3);

static inline bool soft_canonical(const struct soft_vcpu *v, gva_t lin)
{
    return (gva_t)((s64)(lin << v->canonical_shift) >> v->canonical_shift) == lin;
}

static inline struct tlb_entry *tlb_slot(struct tlb *tlb, gva_t lin)
{
    return &tlb->entries[(lin >> GUEST_PAGE_SHIFT) & (TLB_SIZE - 1)];
}

/* Entry n was filled: flushes have to know. */
static inline void soft_tlb_note(struct tlb *tlb, u64 n)
{
    tlb->used[n / 64] |= BIT(n % 64);
    if (tlb->entries[n].info & TLB_INFO_GLOBAL)
        tlb->nonglobal[n / 64] &= ~BIT(n % 64);
    else
        tlb->nonglobal[n / 64] |= BIT(n % 64);
}

/* Fast accesses of the integer handlers: a hit is a handful of instructions, a miss is soft_load. */
#define DEFINE_FAST_ACCESS(bits)                                                                   \
    static inline __attribute__((always_inline))                                                   \
    u##bits mem_load##bits(struct soft_vcpu *v, const struct insn *i, gva_t lin)                   \
    {                                                                                              \
        const struct tlb_entry *e = tlb_slot(v->tlb, lin);                                         \
        u64 in_page = lin ^ e->read_tag;                                                           \
        u##bits value;                                                                             \
                                                                                                   \
        if (likely(in_page <= GUEST_PAGE_SIZE - sizeof(value))) {                                  \
            memcpy(&value, (const void *)(in_page + e->host), sizeof(value));                      \
            return value;                                                                          \
        }                                                                                          \
        v->cur = i;                                                                                \
        return (u##bits)soft_load(v, lin, sizeof(value),                                           \
                                  i->seg == SEG_SS ? ACCESS_STACK : ACCESS_READ);                  \
    }                                                                                              \
    static inline __attribute__((always_inline)) void mem_store##bits(                             \
        struct soft_vcpu *v, const struct insn *i, gva_t lin, u##bits value)                       \
    {                                                                                              \
        const struct tlb_entry *e = tlb_slot(v->tlb, lin);                                         \
        u64 in_page = lin ^ e->write_tag;                                                          \
                                                                                                   \
        if (likely(in_page <= GUEST_PAGE_SIZE - sizeof(value))) {                                  \
            memcpy((void *)(in_page + e->host), &value, sizeof(value));                            \
            return;                                                                                \
        }                                                                                          \
        v->cur = i;                                                                                \
        soft_store(v, lin, value, sizeof(value),                                                   \
                   ACCESS_WRITE | (i->seg == SEG_SS ? ACCESS_STACK : 0));                          \
    }
DEFINE_FAST_ACCESS(8)
DEFINE_FAST_ACCESS(16)
DEFINE_FAST_ACCESS(32)
DEFINE_FAST_ACCESS(64)
#undef DEFINE_FAST_ACCESS

#endif
