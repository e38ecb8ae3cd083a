/*
 * The binary translator: what the rest of the software processor knows of it.
 *
 * Guest code of 64-bit mode, and of 32 bits with flat segments, that is run often is translated, block by block, to host code that runs on
 * the host's own registers (translate.c tells how); all else is the interpreter's. The two run one
 * struct soft_vcpu and alternate at block boundaries.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_BT_H
#define DOPPEL_ENGINE_SOFT_BT_BT_H

#include "engine/soft/bt/cache.h"
#include "engine/soft/vcpu.h"

#define BT_MODE_USER 0x01u
#define BT_MODE_AC 0x02u     /* supervisor accesses under EFLAGS.AC: TLB_KERNEL_AC */
#define BT_MODE_NO_SSE 0x04u /* SSE instructions raise an exception now */
#define BT_MODE_NO_AVX 0x08u
#define BT_MODE_NARROW 0x80000000u /* of blocks only: each access has a check of its own */
#define BT_MODE_NO_X87 0x10u       /* x87 and MMX */
#define BT_MODE_CODE32 0x20u
/* Of 32-bit code: the segment reaches all addresses, from its base around, for reading and writing. */
#define BT_MODE_FS 0x40u
#define BT_MODE_GS 0x80u
#define BT_MODE_DIRECT                                                                             \
    0x100u /* user addresses are the host's, where direct_map says so: direct.c */

/* Pages of a chunk: the addresses that one byte of direct_map is for. */
#define CHUNK_PAGES (BIT(DIRECT_SHIFT) >> GUEST_PAGE_SHIFT)

/* Kernel code of 64-bit mode: its links between pages are in kernel_links.c. */
static inline bool bt_is_kernel(u32 mode)
{
    return !(mode & (BT_MODE_USER | BT_MODE_CODE32));
}
/* Whether blocks of the mode know their linear address (cache.h). */
static inline bool bt_is_placed(u32 mode)
{
    return (mode & BT_MODE_DIRECT) || bt_is_kernel(mode);
}

/* 0, or an error that names what this host's processor lacks. */
int bt_probe(struct error *err);

/* Makes v->bt. 0 or -errno, err set. */
int bt_create(struct soft_vcpu *v, struct error *err);
void bt_destroy(struct soft_vcpu *v);

/* Bytes of host memory that translated code takes. */
u64 bt_bytes(const struct soft_vcpu *v);

/* Round vcpu_run: sets up this thread for translated code, and undoes it. */
void bt_thread_begin(struct soft_vcpu *v);
void bt_thread_end(struct soft_vcpu *v);

/* Runs translated and interpreted blocks until something calls for attention. */
void bt_run(struct soft_vcpu *v);

/* What the vCPUs of an engine share of direct mappings. NULL: err is set. */
struct direct_spaces *bt_direct_spaces_create(struct error *err);
void bt_direct_spaces_destroy(struct direct_spaces *all);

/*
 * Direct mappings, as of the TLB: all translations of the current address space were dropped; of one page, in
 * any; CR3 was written. No vCPU may write to the page at gpa, whose track has code_lines now, by one; v may have none at
 * all (the dirty log).
 */
void bt_direct_flush(struct soft_vcpu *v);
void bt_direct_flush_page(struct soft_vcpu *v, gva_t lin);
void bt_direct_switch(struct soft_vcpu *v, unsigned pcid, bool keep);
void bt_direct_protect(struct soft_vcpu *v, gpa_t gpa, struct page_track *track);
void bt_direct_drop(struct soft_vcpu *v);

/* Makes a vCPU that runs translated code leave it soon: attention was set. Any thread. */
void bt_kick(struct soft_vcpu *v);
/* Has the vCPU's thread look at the APIC timer at VM time `deadline` (ns). On the vCPU's thread. */
void bt_set_deadline(struct soft_vcpu *v, u64 deadline);

/* Brings the vector registers and MXCSR home to v->cpu, and the host's MXCSR back. */
void bt_vectors_save(struct soft_vcpu *v);
static inline void soft_vectors_sync(struct soft_vcpu *v)
{
    if (v->vectors_live)
        bt_vectors_save(v);
}

/*
 * bt,verify, while v->journaling: n bytes at host are about to be written; something can't be undone, and
 * must not be done. Both may unwind.
 */
void bt_journal_write(struct soft_vcpu *v, void *host, size_t n);
_Noreturn void bt_journal_stop(struct soft_vcpu *v);

/* --- between the files of this module --- */

/*
 * translate.c: the block whose first byte is at gpa, and at host, for v->bt_mode, maybe with
 * BT_MODE_NARROW; NULL: none can be made. With host2, one
 * instruction that goes on at gpa2, the start of a page.
 */
struct bt_source {
    gpa_t gpa, gpa2;
    const u8 *host, *host2;
};
struct bt_block *bt_translate(struct soft_vcpu *v, const struct bt_source *source, u32 mode);
/*
 * share.c: the same block from what another vCPU made of the same bytes; NULL: nobody did. To be tried before
 * bt_translate. Vector registers are at home.
 */
struct bt_block *bt_adopt(struct soft_vcpu *v, const struct bt_source *source, u32 mode);
/* Whether the instruction at gpa goes on in the next page. */
bool bt_goes_across(struct soft_vcpu *v, gpa_t gpa, const u8 *host);
/* verify.c: round the run of one block. */
int bt_verify_create(struct soft_vcpu *v, struct error *err);
void bt_verify_begin(struct soft_vcpu *v, const struct bt_block *b);
/* faulted: it ended by an exception of the host. */
void bt_verify_end(struct soft_vcpu *v, const struct bt_block *b, bool faulted);
/* glue.c */
void bt_glue_emit(struct bt *bt);
void bt_vectors_load(struct soft_vcpu *v);
/* fill.c: fills the TLB for an access of the current privilege if that needs no change to the page
 * tables; false: the interpreter must see to it. */
bool bt_tlb_fill(struct soft_vcpu *v, gva_t lin, bool write);
/* fill.c: whether the kernel's code at page lin is fetched from gpa, by a global translation. */
bool bt_kernel_code_is_at(const struct soft_vcpu *v, gva_t lin, gpa_t gpa);
/* string.c: runs a string instruction; false: the interpreter must go on with it. */
bool bt_string(struct soft_vcpu *v, const struct bt_string *s);
/* x87.c: an instruction of the interpreter's comes next: makes the x87 pointers what the one numbered
 * `number` makes them (0: what they are). */
void bt_x87_point(struct soft_vcpu *v, u32 number);
/* flags.c: the arithmetic flags that a recipe makes of the registers as they are. */
u32 bt_recipe_flags(const struct soft_vcpu *v, const struct bt_recipe *r);
/*
 * direct.c. The mode may have BT_MODE_DIRECT now; if so, what was dropped is looked at anew. user: it is that of user
 * code in 64-bit mode.
 */
bool bt_direct_enter(struct soft_vcpu *v, bool user);
/* Whether direct code may be entered: RSP is where that needs it. Else the mode has BT_MODE_DIRECT no longer, until user
 * code is entered anew. */
bool bt_direct_stack(struct soft_vcpu *v);
/* User code runs, and C has a moment: is its address space one to be mapped? */
void bt_direct_tick(struct soft_vcpu *v);
/* Direct code wants a chunk that isn't mapped. True: now it is. */
bool bt_direct_want(struct soft_vcpu *v, u64 number);
/* An access of direct code to lin met the host's page fault. */
void bt_direct_fault(struct soft_vcpu *v, gva_t lin);
/*
 * A link from another page to placed block b is about to be made. False: it must not. Such links are undone
 * (bt_cut_links) when the page tables have something else there, or when another address space is mapped.
 */
bool bt_direct_link(struct soft_vcpu *v, const struct bt_block *b);
/*
 * kernel_links.c: the same for kernel code, whose RIP, where the link leads, is exact. Such links are undone when what
 * is mapped there may have changed: all translations were dropped; those of one page.
 */
bool bt_kernel_link(struct soft_vcpu *v, const struct bt_block *b);
void bt_kernel_links_check(struct soft_vcpu *v);
void bt_kernel_links_cut(struct soft_vcpu *v, gva_t lin);
int bt_direct_create(struct soft_vcpu *v, struct error *err);
void bt_direct_destroy(struct soft_vcpu *v);
/* kick.c: undoes what the signal handler did to make the vCPU leave. */
void bt_relink(struct soft_vcpu *v);
/* cache.c: jump_key for the current mode and address space. */
void bt_update_key(struct soft_vcpu *v);
int bt_kick_create(struct soft_vcpu *v, struct error *err);
void bt_kick_destroy(struct soft_vcpu *v);

#endif
