/*
 * Direct mappings: the host's MMU as the shadow page table of user address spaces.
 *
 * Translated user code spends much of its time on TLB lookups. For the process that runs longest on a vCPU, its pages are
 * mapped at the addresses that it uses itself, so that its instructions can use these. It is found by looking, every few
 * milliseconds, what runs (bt_direct_tick); another one takes over when it has run for some time in which the vCPU's own
 * hasn't. What is mapped is a space (direct_space.c): vCPUs that run the same one, as threads do, share it, and others are
 * mapped beside it as far as their addresses differ, which Linux's randomization sees to.
 *
 * A chunk is 2 MiB of addresses. Code looks up a byte by chunk, v->direct_map, before it uses an address, or
 * others nearby (emit_direct.c). Invariants:
 *  1. While a chunk's byte is 1, it and the chunks before and behind it are reserved by the vCPU's space: mapped to
 *     nothing (PROT_NONE) or to the guest's pages. What is reserved stays so while anybody has joined the space.
 *  2. A page is mapped for reading while the space's page tables, as of the last flush of any vCPU that has joined, allow
 *     user code that and A is set; for writing, if they allow that, D is set, it is RAM that holds no translated code, and
 *     there is no dirty log. That holds for every chunk that something is mapped in, whatever its byte says: the byte of
 *     the chunk beside is enough for code to get there. So a chunk whose mappings can't be made right before user
 *     code is entered loses all of them. Others may run by a mapping while it is taken away: they meet the host's
 *     page fault.
 *  3. Direct code runs only in the space's address space: with its CR3 and the PCID that it had when it took over. When
 *     translations are dropped, all bytes of the vCPU's (or one page's chunk's) become 0, until the page tables are read
 *     anew, when user code is entered next: that is cheap if little has changed.
 *  4. A link from one page's code to another's (links.c) is there while the page tables, as of the vCPU's last
 *     flush, let user code be fetched from the page that the link's target was made of.
 *
 * A host's page fault of direct code costs some 4 us, a mapping 5 us or more. So there is a budget for both, from one
 * tick to the next; when it is spent, chunks that aren't mapped are left to the TLB. A chunk with a fault gets its
 * byte back when it's wanted next, with the pages that are there by then.
 */
#include "engine/soft/bt/direct.h"
#include "engine/soft/bt/links.h"

#include "host/pages.h"

#include <errno.h>
#include <x86intrin.h>

/* Changes of mappings that may be made at once. */
#define MAPS_AT_ONCE 256
/* What may be spent between two ticks on chunks that code wants: a mapping costs 1. */
#define BUDGET 256
#define LOOK_COST 1  /* reading a chunk's page tables */
#define FAULT_COST 4 /* a host's page fault */
/* How many ticks in a row the vCPU's own isn't seen before another may take its place. */
#define IDLE_TICKS 8
#define CANDIDATES 4

/* A chunk, as the vCPU sees it. */
struct view {
    bool active;          /* its byte is 1 */
    bool was_active;      /* and would be, had no translations been dropped */
    u16 stale, stale_end; /* pages whose translations were dropped since they were looked at */
};

/* An address space, by its tables, and how many ticks have seen it. */
struct candidate {
    gpa_t tables;
    unsigned seen;
};

struct direct {
    struct direct_space *space; /* NULL: none */
    unsigned pcid;              /* that it has on this vCPU */
    bool current;               /* it's the current address space */
    bool stale;                 /* translations were dropped */
    bool off;                   /* user code runs whose stack can't be mapped */
    struct view *views;         /* by a chunk's place in the space */
    struct bt_links *links;
    unsigned idle; /* ticks since the space was seen */
    struct candidate candidates[CANDIDATES];
    gpa_t switched_to; /* the tables of the last write of CR3 */
    u64 last_tick;     /* TSC */
    unsigned budget;
};

/* What follows is libc's, which may use vector registers. */
static void lock(struct soft_vcpu *v)
{
    soft_vectors_sync(v);
    pthread_mutex_lock(&v->engine->direct->lock);
}

static void unlock(const struct soft_vcpu *v)
{
    pthread_mutex_unlock(&v->engine->direct->lock);
}

/* The vCPU's direct mappings; NULL: it has none. */
static struct direct *in_use(const struct soft_vcpu *v)
{
    struct direct *d = v->bt ? v->bt->direct : NULL;

    return d && d->space ? d : NULL;
}

/* --- Chunks; under the lock --- */

static struct view *view_of(const struct direct *d, const struct chunk *c)
{
    return &d->views[space_place(d->space, c)];
}

static void set_active(struct soft_vcpu *v, const struct chunk *c, bool active)
{
    view_of(v->bt->direct, c)->active = active;
    v->direct_map[c->number] = active;
}

/* Of its pages from `first` to `end`. */
static void make_stale(struct soft_vcpu *v, const struct chunk *c, unsigned first, unsigned end)
{
    struct view *view = view_of(v->bt->direct, c);
    bool again = view->stale_end;

    if (!c->mapped)
        return;
    view->was_active |= view->active;
    set_active(v, c, false);
    view->stale = (u16)(again ? MIN(view->stale, first) : first);
    view->stale_end = (u16)MAX(view->stale_end, end);
}

static void activate(struct soft_vcpu *v, struct chunk *c, unsigned *maps)
{
    if (space_sync(v, v->bt->direct->space, c, 0, CHUNK_PAGES, false, maps))
        set_active(v, c, true);
}

/*
 * Looks at the pages whose translations were dropped. A chunk at rest stays so, for code that wants it pays for that;
 * but what it has must be right.
 */
static void refresh(struct soft_vcpu *v, struct chunk *c, unsigned *maps)
{
    struct direct *d = v->bt->direct;
    struct view *view = view_of(d, c);
    unsigned end = view->stale_end;
    bool active = view->was_active;

    view->was_active = false;
    view->stale_end = 0;
    if (!space_sync(v, d->space, c, view->stale, end, !active, maps))
        space_clear_chunk(v, d->space, c);
    else if (active)
        set_active(v, c, true);
}

static void rest(struct soft_vcpu *v, gva_t lin)
{
    const struct chunk *c = space_find(v->bt->direct->space, lin);

    if (c && view_of(v->bt->direct, c)->active)
        set_active(v, c, false);
}

/* --- What the rest of the processor tells --- */

static gpa_t tables_of(const struct soft_vcpu *v)
{
    return v->cpu.cr3 & PTE_ADDR_MASK;
}

static void flush(struct soft_vcpu *v, struct direct *d)
{
    lock(v);
    for (unsigned n = 0; n < d->space->nchunks; n++)
        make_stale(v, &d->space->chunks[n], 0, CHUNK_PAGES);
    unlock(v);
    links_flush(d->links);
    d->stale = true;
}

void bt_direct_flush(struct soft_vcpu *v)
{
    struct direct *d = in_use(v);

    if (d)
        flush(v, d);
}

void bt_direct_flush_page(struct soft_vcpu *v, gva_t lin)
{
    unsigned n = (lin >> GUEST_PAGE_SHIFT) % CHUNK_PAGES;
    struct direct *d = in_use(v);
    const struct chunk *c;

    if (!d)
        return;
    lock(v);
    c = space_find(d->space, lin);
    if (c)
        make_stale(v, c, c->large ? 0 : n, c->large ? CHUNK_PAGES : n + 1);
    unlock(v);
    links_flush_page(d->links, lin);
    d->stale = true;
}

/*
 * Pages that held tables are tables of others soon. A guest has no translations to keep when it switches to a new
 * address space, and, with PCIDs, hardly ever when it switches back to one.
 */
static void forget_if_new(const struct soft_vcpu *v, struct direct *d, bool keep)
{
    gpa_t tables = tables_of(v);

    for (unsigned n = 0; !keep && tables != d->switched_to && n < CANDIDATES; n++)
        if (d->candidates[n].tables == tables)
            d->candidates[n].seen = 0;
    d->switched_to = tables;
}

void bt_direct_switch(struct soft_vcpu *v, unsigned pcid, bool keep)
{
    struct direct *d = v->bt ? v->bt->direct : NULL;

    if (!d)
        return;
    forget_if_new(v, d, keep);
    if (!d->space)
        return;
    if (!keep && pcid == d->pcid)
        flush(v, d);
    d->current = pcid == d->pcid && space_is_of(v, d->space);
}

static void leave(struct soft_vcpu *v, struct direct *d)
{
    lock(v);
    for (unsigned n = 0; n < d->space->nchunks; n++) {
        set_active(v, &d->space->chunks[n], false);
        d->views[n] = (struct view){0};
    }
    space_leave(v, d->space);
    unlock(v);
    links_cut(v, d->links);
    d->space = NULL;
    d->current = d->stale = false;
    bt_mode_changed(v);
}

void bt_direct_drop(struct soft_vcpu *v)
{
    struct direct *d = in_use(v);

    if (d)
        leave(v, d);
}

static void spend(struct direct *d, unsigned cost)
{
    d->budget -= MIN(d->budget, cost);
}

bool bt_direct_want(struct soft_vcpu *v, u64 number)
{
    struct direct *d = v->bt->direct;
    unsigned maps = d->budget;
    bool active = false;
    struct chunk *c;

    if (!maps || !bt_direct_enter(v, true))
        return false;
    lock(v);
    c = space_reserve(v, d->space, number);
    if (c) {
        activate(v, c, &maps);
        spend(d, LOOK_COST + d->budget - maps);
        active = view_of(d, c)->active;
    }
    unlock(v);
    return active;
}

/* The check may have been of an address in a chunk beside. */
void bt_direct_fault(struct soft_vcpu *v, gva_t lin)
{
    spend(v->bt->direct, FAULT_COST);
    v->stats.direct_faults++;
    lock(v);
    rest(v, lin - CHUNK_SIZE);
    rest(v, lin);
    rest(v, lin + CHUNK_SIZE);
    unlock(v);
}

bool bt_direct_link(struct soft_vcpu *v, const struct bt_block *b)
{
    struct direct *d = v->bt->direct;

    return d->current && b->page >> DIRECT_SHIFT < DIRECT_CHUNKS && links_add(v, d->links, b);
}

/* --- Whose turn it is --- */

static bool is_eligible(const struct soft_vcpu *v)
{
    const struct soft_engine *e = v->engine;

    return e->direct->possible && !atomic_load(&e->direct->failed) && e->config.memory->in_file &&
           !e->dirty_logging && (v->bt_mode & BT_MODE_USER) && soft_code64(v) &&
           !(v->cpu.cr4 & CR4_LA57);
}

/* Has the current address space mapped. What is mapped of it already was read before the vCPU, or its PCID, came. */
static void take_over(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    if (d->space && !space_is_of(v, d->space))
        leave(v, d);
    if (!d->space) {
        lock(v);
        d->space = space_join(v);
        unlock(v);
    }
    if (!d->space)
        return;
    d->pcid = v->cpu.cr4 & CR4_PCIDE ? (unsigned)(v->cpu.cr3 & CR3_PCID_MASK) : 0;
    d->current = true;
    d->idle = 0;
    d->budget = BUDGET;
    flush(v, d);
    bt_mode_changed(v);
}

static void renew(struct soft_vcpu *v, struct direct *d)
{
    d->idle = 0;
    d->budget = BUDGET;
    lock(v);
    if (space_is_worn(v))
        space_clear(v, d->space);
    unlock(v);
}

/* The candidate with the current tables, in the place of the one that was seen least if it is new. */
static struct candidate *current_candidate(const struct soft_vcpu *v, struct direct *d)
{
    struct candidate *least = d->candidates;

    for (unsigned n = 0; n < CANDIDATES; n++) {
        struct candidate *c = &d->candidates[n];

        if (c->tables == tables_of(v))
            return c;
        if (c->seen < least->seen)
            least = c;
    }
    *least = (struct candidate){.tables = tables_of(v)};
    return least;
}

void bt_direct_tick(struct soft_vcpu *v)
{
    const struct bt_choices *choices = &v->bt->choices;
    struct direct *d = v->bt->direct;
    u64 now;

    if (!is_eligible(v))
        return;
    now = __rdtsc();
    if (now - d->last_tick < choices->direct_period)
        return;
    d->last_tick = now;
    if (d->current) {
        renew(v, d);
        return;
    }
    d->idle++;
    if (current_candidate(v, d)->seen++ >= choices->direct_ticks &&
        (!d->space || d->idle > IDLE_TICKS || space_is_of(v, d->space)))
        take_over(v);
}

bool bt_direct_stack(struct soft_vcpu *v)
{
    u64 number = v->cpu.gpr[RSP] >> DIRECT_SHIFT;

    if (likely(number < DIRECT_CHUNKS && v->direct_map[number]) || bt_direct_want(v, number))
        return true;
    v->bt->direct->off = true;
    bt_mode_changed(v);
    return false;
}

/* Whether pages with key 0 are forbidden to user code. */
static bool denies_key_0(const struct soft_vcpu *v)
{
    return (v->cpu.cr4 & CR4_PKE) && (v->cpu.pkru & 3);
}

/* The entries of the chunk that was asked for last. */
struct fetched {
    bool any;
    u32 number;
    struct direct_entries entries;
};

/* Links stay where user code may still be fetched from the same page. */
static bool may_still_fetch(const struct soft_vcpu *v, void *opaque, gva_t lin, gpa_t gpa)
{
    struct fetched *f = opaque;
    u32 number = (u32)(lin >> DIRECT_SHIFT);
    gpa_t now = 0;
    u64 entry;

    if (!f->any || f->number != number)
        *f = (struct fetched){true, number, direct_find_entries(v, number)};
    entry = direct_entry(v, &f->entries, (lin >> GUEST_PAGE_SHIFT) % CHUNK_PAGES, &now);
    return direct_may_fetch(v, &f->entries, entry) && now == gpa;
}

/* Has all that was dropped looked at. False: the space isn't the current one after all. */
static bool look_again(struct soft_vcpu *v, struct direct *d)
{
    unsigned maps = MAPS_AT_ONCE;
    struct fetched fetched = {0};

    if (!space_is_of(v, d->space)) {
        d->current = false;
        return false;
    }
    if (denies_key_0(v))
        return false;
    links_check(v, d->links, may_still_fetch, &fetched);
    lock(v);
    for (unsigned n = 0; n < d->space->nchunks; n++)
        if (d->views[n].stale_end)
            refresh(v, &d->space->chunks[n], &maps);
    unlock(v);
    d->stale = false;
    return true;
}

bool bt_direct_enter(struct soft_vcpu *v, bool user)
{
    struct direct *d = v->bt->direct;

    if (!d || !d->current)
        return false;
    d->off &= user;
    if (!user || d->off)
        return false;
    return likely(!d->stale) || look_again(v, d);
}

/* --- Life --- */

int bt_direct_create(struct soft_vcpu *v, struct error *err)
{
    struct direct *d = pages_alloc(sizeof(*d));

    if (d) {
        d->views = pages_alloc(MAX_CHUNKS * sizeof(*d->views));
        d->links = links_create();
        v->bt->direct = d;
    }
    if (d && d->views && d->links)
        return 0;
    bt_direct_destroy(v);
    return error_host(err, ENOMEM, "no memory to map the guest's at its own addresses");
}

void bt_direct_destroy(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    if (!d)
        return;
    bt_direct_drop(v);
    pages_free(d->views, MAX_CHUNKS * sizeof(*d->views));
    links_destroy(d->links);
    pages_free(d, sizeof(*d));
    v->bt->direct = NULL;
}
