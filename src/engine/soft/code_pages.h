/*
 * Pages of guest memory that hold code, as all vCPUs see them.
 *
 * Each vCPU keeps what it made of guest code to itself (block.c, bt/cache.c). What they have to know of
 * each other stands in struct page_track: in which lines of the page there is code, which vCPUs have it,
 * and which may store there without anybody being asked.
 */
#ifndef DOPPEL_ENGINE_SOFT_CODE_PAGES_H
#define DOPPEL_ENGINE_SOFT_CODE_PAGES_H

#include "engine/soft/vcpu.h"

/* The track of the page at gpa, which is in the slot. */
static inline struct page_track *soft_track_in(const struct soft_engine *e,
                                               const struct memory_slot *slot, gpa_t gpa)
{
    return &e->pages[slot - e->config.memory->slots][(gpa - slot->gpa) >> GUEST_PAGE_SHIFT];
}
/* The track of the page at gpa, or NULL: neither RAM nor ROM. */
struct page_track *soft_page_track(const struct soft_engine *e, gpa_t gpa);

/* The lines of a page that [from, from + n) touches, cut at the page's end: one bit a line. */
u64 soft_line_mask(gpa_t from, u64 n);

static inline u64 soft_vcpu_bit(const struct soft_vcpu *v)
{
    return BIT(v->index);
}

/*
 * v is about to store to the page, or to give itself a write tag for it. Comes before the look at
 * code_lines. It holds until v answers somebody's protect request.
 */
static inline void soft_announce_store(const struct soft_vcpu *v, struct page_track *t)
{
    u64 me = soft_vcpu_bit(v);

    if (!(atomic_load_explicit(&t->writers, memory_order_relaxed) & me))
        atomic_fetch_or(&t->writers, me);
}

/*
 * v, which has announced it, is about to write [gpa, gpa + n): what any vCPU made of the code there is
 * dropped. A dropped block that is running is left after the current instruction.
 */
void soft_code_written(struct soft_vcpu *v, gpa_t gpa, u64 n);

/*
 * v makes a block of the code at [gpa, gpa + n), within one page: from now on no vCPU stores there without
 * having it dropped. False: v had to answer others meanwhile, who may have wanted it dropped already.
 */
bool soft_code_protect(struct soft_vcpu *v, gpa_t gpa, u64 n);

/* v has dropped blocks of the page; `left`: the lines that it still has code of. */
void soft_code_dropped(struct soft_vcpu *v, gpa_t page, u64 left);

#endif
