/*
 * Direct mappings: the host's MMU as the shadow page table of one user address space.
 *
 * Translated user code spends much of its time on TLB lookups. For the process that runs longest, its pages are
 * mapped at the addresses that it uses itself, so that its instructions can use these. One address space of the
 * guest's is the owner of that at a time. It is found by looking, every few milliseconds, what runs
 * (bt_direct_tick); another one takes over when it has run for some time in which the owner hasn't.
 *
 * A chunk is 2 MiB of addresses. Code looks up a byte by chunk, v->direct_map, before it uses an address, or
 * others nearby (emit_direct.c). Invariants:
 *  1. While a chunk's byte is 1, it and the chunks before and behind it are reserved: mapped by this file, to
 *     nothing (PROT_NONE) or to the guest's pages. What is reserved once stays so until the end. Addresses that
 *     belong to somebody else in this process can't be reserved (MAP_FIXED_NOREPLACE); accesses there, like all to
 *     chunks that aren't mapped, go by the TLB.
 *     So is the first chunk, from the start: an address near the end of the address space may wrap round to it.
 *  2. A page is mapped for reading while the page tables of the owner, as of its last flush, allow user code that
 *     and A is set; for writing, if they allow that, D is set, it is RAM that holds no translated code
 *     (bt_direct_protect), and there is no dirty log. That holds for every chunk that something is mapped in, active or
 *     not: the byte of the chunk beside is enough for code to get there. So a chunk whose mappings can't be made right
 *     before user code is entered loses all of them.
 *     When the host refuses a change of a mapping, all ends (give_up).
 *  3. Direct code runs only in the owner's address space: CR3 and PCID are the owner's. When translations are
 *     dropped, all bytes (or one page's chunk's) become 0, until the page tables are read anew, when user code is
 *     entered next: that is cheap if little has changed.
 *  4. A link from one page's code to another's (bt_direct_link) is there while the page tables of the owner, as of
 *     its last flush, let user code be fetched from the page that the link's target was made of.
 *
 * A host's page fault of direct code costs some 4 us, a mapping 5 us or more. So there is a budget for both, from one
 * tick to the next; when it is spent, chunks that aren't mapped are left to the TLB. A chunk with a fault gets its
 * byte back when it's wanted next, with the pages that are there by then.
 *
 * This is done for machines with one vCPU: two would need two places for one address.
 */
#define _GNU_SOURCE
#include "engine/soft/bt/bt.h"

#include "engine/soft/code_pages.h"
#include "engine/soft/lapic.h"
#include "engine/soft/mmu.h"
#include "host/pages.h"

#include <errno.h>
#include <sys/mman.h>
#include <x86intrin.h>

#define CHUNK_SIZE BIT(DIRECT_SHIFT)
#define CHUNK_PAGES (CHUNK_SIZE >> GUEST_PAGE_SHIFT)
#define MAX_CHUNKS 4096
/* Below is not for programs to map (vm.mmap_min_addr); the last page of the user's half isn't either. */
#define LOWEST KIB(64)
#define HIGHEST (BIT(47) - GUEST_PAGE_SIZE)
/*
 * Changes of mappings that may be made at once, and before all begin anew: each leaves two mappings more at most, and
 * the kernel has a limit of 65,530.
 */
#define MAPS_AT_ONCE 256
#define MAPS_MAX 24000
/* What may be spent between two ticks on chunks that code wants: a mapping costs 1. */
#define BUDGET 256
#define LOOK_COST 1  /* reading a chunk's page tables */
#define FAULT_COST 4 /* a host's page fault */
/* How many ticks in a row an owner is not seen before another may take its place. */
#define IDLE_TICKS 8

#define PAGE_MAPPED 1ULL
#define PAGE_WRITE 2ULL

enum chunk_state {
    CHUNK_EMPTY,   /* reserved, nothing is mapped */
    CHUNK_ACTIVE,  /* its byte is 1 */
    CHUNK_RESTING, /* its byte is 0; what is mapped is right, but pages may be missing */
    CHUNK_STALE,   /* it was active when translations were dropped */
    CHUNK_FOREIGN  /* it can't be reserved, or can't be used any more */
};

struct chunk {
    u32 number;
    u8 state;             /* enum chunk_state */
    bool large;           /* what is mapped was one page, or may have been */
    bool linked;          /* some page has links */
    bool links_stale;     /* translations were dropped since they were right */
    u16 stale, stale_end; /* pages whose translations were dropped since what is mapped was right */
};

struct direct {
    bool owned, current; /* there is an owner; it's the current address space */
    bool stale;          /* some chunk is, or its links */
    bool off;            /* user code runs whose stack can't be mapped */
    bool possible; /* the first chunk is reserved, and the host always did what it was asked */
    u64 base;      /* the owner's CR3, without PCID */
    unsigned pcid;
    unsigned idle; /* ticks since the owner was seen */
    u64 candidate; /* the address space seen last, by CR3; how often in a row; and when (TSC) */
    unsigned seen;
    u64 last_tick;
    unsigned budget;
    unsigned nmaps; /* changes of mappings since nothing was mapped */
    u16 *index;     /* by chunk number: its place in chunks, and 1; 0: none */
    struct chunk *chunks;
    u64 (*pages)
        [CHUNK_PAGES]; /* of each: what is mapped, guest-physical address | PAGE_*; 0: nothing */
    u64 (*links)
        [CHUNK_PAGES]; /* pages with links from others: guest-physical address | PAGE_MAPPED; or 0 */
    unsigned nchunks;
};

/* --- Reserving --- */

static void *chunk_start(u32 number)
{
    return (void *)(uintptr_t)MAX((u64)number << DIRECT_SHIFT, LOWEST);
}
static size_t chunk_size(u32 number)
{
    return MIN((u64)(number + 1) << DIRECT_SHIFT, HIGHEST) - (u64)(uintptr_t)chunk_start(number);
}

static struct chunk *find_chunk(const struct direct *d, gva_t lin)
{
    u64 number = lin >> DIRECT_SHIFT;

    if (number >= DIRECT_CHUNKS || !d->index[number])
        return NULL;
    return &d->chunks[d->index[number] - 1];
}

/* Has the chunk's addresses for the guest. NULL: somebody else has them, or there are too many chunks. */
static struct chunk *reserve(struct direct *d, u32 number)
{
    struct chunk *c = find_chunk(d, (gva_t)number << DIRECT_SHIFT);
    void *start = chunk_start(number), *got;

    if (c)
        return c->state == CHUNK_FOREIGN ? NULL : c;
    if (d->nchunks == MAX_CHUNKS)
        return NULL;
    c = &d->chunks[d->nchunks++];
    d->index[number] = (u16)d->nchunks;
    c->number = number;
    got = mmap(start, chunk_size(number), PROT_NONE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (got == start)
        return c;
    if (got != MAP_FAILED) /* a kernel that takes the address for a hint */
        munmap(got, chunk_size(number));
    c->state = CHUNK_FOREIGN;
    return NULL;
}

/* The chunk, with its neighbours reserved too. */
static struct chunk *reserve_around(struct direct *d, u32 number)
{
    if ((number > 0 && !reserve(d, number - 1)) ||
        (number + 1 < DIRECT_CHUNKS && !reserve(d, number + 1)))
        return NULL;
    return reserve(d, number);
}

static u64 *pages_of(const struct direct *d, const struct chunk *c)
{
    return d->pages[c - d->chunks];
}

static void set_state(struct soft_vcpu *v, struct chunk *c, enum chunk_state state)
{
    c->state = (u8)state;
    v->direct_map[c->number] = state == CHUNK_ACTIVE;
}

/* --- The guest's page tables --- */

/* What the entries above the last level say of a chunk. */
struct upper {
    gpa_t table; /* of entries for pages */
    u64 large;   /* or the entry of a page of 2 MiB; 0: none */
    bool writable, executable;
};

static const struct memory_slot *ram_at(const struct soft_vcpu *v, gpa_t gpa)
{
    const struct memory_slot *s = memory_find(v->engine->config.memory, gpa);

    return s && s->host == s->backing && s->fd >= 0 ? s : NULL;
}

static const _Atomic u64 *table_at(const struct soft_vcpu *v, gpa_t gpa)
{
    const struct memory_slot *s;

    gpa &= v->a20_mask;
    s = ram_at(v, gpa);
    return s ? (const _Atomic u64 *)(const void *)(s->host + (gpa - s->gpa)) : NULL;
}

static u64 reserved_bits(const struct soft_vcpu *v)
{
    return (PTE_ADDR_MASK & ~(BIT(v->phys_bits) - 1)) | (v->cpu.msr.efer & EFER_NXE ? 0 : PTE_NX);
}

/* 4-level paging (SDM vol. 3, 4.5), down to the directory of pages. False: user code has nothing there. */
static bool walk_upper(const struct soft_vcpu *v, gva_t lin, struct upper *u)
{
    const u64 used = PTE_P | PTE_U | PTE_A;
    u64 address = PTE_ADDR_MASK & (BIT(v->phys_bits) - 1);

    *u = (struct upper){.table = v->cpu.cr3 & address, .writable = true, .executable = true};
    for (unsigned shift = 39; shift >= DIRECT_SHIFT; shift -= 9) {
        const _Atomic u64 *table = table_at(v, u->table);
        u64 entry;

        if (!table)
            return false;
        entry = atomic_load_explicit(&table[(lin >> shift) & 0x1ff], memory_order_relaxed);
        if ((entry & used) != used || (entry & reserved_bits(v)))
            return false;
        u->writable &= !!(entry & PTE_W);
        u->executable &= !(entry & PTE_NX);
        u->table = entry & address;
        if (entry & PTE_PS) {
            u->large = entry;
            return shift == DIRECT_SHIFT && !(entry & address & (CHUNK_SIZE - 1) & ~BIT(12));
        }
    }
    return true;
}

static bool key_allows(const struct soft_vcpu *v, u64 entry)
{
    return !(v->cpu.cr4 & CR4_PKE) ||
           !((v->cpu.pkru >> (2 * ((entry >> PTE_PKEY_SHIFT) & 15))) & 3);
}

/* What the mapping of a page is to be, whose entry is `entry` and is at gpa. */
static u64 wanted(struct soft_vcpu *v, const struct upper *u, u64 entry, gpa_t gpa)
{
    const u64 used = PTE_P | PTE_U | PTE_A;
    struct soft_engine *e = v->engine;
    const struct memory_slot *s;
    struct page_track *track;
    u64 want;

    if ((entry & used) != used || (entry & reserved_bits(v)) || !key_allows(v, entry))
        return 0;
    s = ram_at(v, gpa);
    if (!s || lapic_claims(v->lapic, gpa))
        return 0;
    want = gpa | PAGE_MAPPED;
    if (!u->writable || !(entry & PTE_W) || !(entry & PTE_D) || (s->flags & MEMORY_ROM))
        return want;
    track = &e->pages[s - e->config.memory->slots][(gpa - s->gpa) >> GUEST_PAGE_SHIFT];
    soft_announce_store(v, track);
    if (!atomic_load(&track->code_lines)) {
        track->direct_write = true;
        want |= PAGE_WRITE;
    }
    return want;
}

static bool can_map(gva_t lin)
{
    return lin >= LOWEST && lin < HIGHEST;
}

/* The entries of a chunk's pages. */
struct entries {
    struct upper upper;
    const _Atomic u64 *table; /* NULL: upper.large is all of them */
    bool there;
};

static struct entries find_entries(const struct soft_vcpu *v, const struct chunk *c)
{
    struct entries e = {.there = false};

    e.there = walk_upper(v, (gva_t)c->number << DIRECT_SHIFT, &e.upper);
    if (e.there && !e.upper.large) {
        e.table = table_at(v, e.upper.table);
        e.there = e.table;
    }
    return e;
}

/* The n'th page's entry, and where that leads; 0: there is none. */
static u64 entry_of(const struct soft_vcpu *v, const struct entries *e, unsigned n, gpa_t *gpa)
{
    u64 address = PTE_ADDR_MASK & (BIT(v->phys_bits) - 1), entry = e->upper.large;

    if (!e->there)
        return 0;
    *gpa = (entry & address & ~(CHUNK_SIZE - 1)) + n * GUEST_PAGE_SIZE;
    if (e->table) {
        entry = atomic_load_explicit(&e->table[n], memory_order_relaxed);
        *gpa = entry & address;
    }
    *gpa &= v->a20_mask;
    return entry;
}

/* What is to be mapped at the pages from `first` to `end`. */
static void read_tables(struct soft_vcpu *v, struct chunk *c, unsigned first, unsigned end,
                        u64 want[CHUNK_PAGES])
{
    gva_t lin = (gva_t)c->number << DIRECT_SHIFT;
    struct entries e = find_entries(v, c);

    c->large = e.there && e.upper.large;
    for (unsigned n = first; n < end; n++) {
        gpa_t gpa = 0;
        u64 entry = entry_of(v, &e, n, &gpa);

        want[n] = entry && can_map(lin + n * GUEST_PAGE_SIZE) ? wanted(v, &e.upper, entry, gpa) : 0;
    }
}

/* --- Links between pages --- */

static u64 *links_of(const struct direct *d, const struct chunk *c)
{
    return d->links[c - d->chunks];
}

static void cut_link(struct soft_vcpu *v, const struct chunk *c, unsigned n)
{
    u64 *link = &links_of(v->bt->direct, c)[n];

    if (*link)
        bt_cut_links(v->bt, *link & ~(GUEST_PAGE_SIZE - 1),
                     ((gva_t)c->number << DIRECT_SHIFT) + n * GUEST_PAGE_SIZE);
    *link = 0;
}

static void cut_all_links(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    for (unsigned k = 0; k < d->nchunks; k++) {
        struct chunk *c = &d->chunks[k];

        for (unsigned n = 0; c->linked && n < CHUNK_PAGES; n++)
            cut_link(v, c, n);
        c->linked = c->links_stale = false;
    }
}

/* Links stay where user code may still be fetched from the same page. */
static void check_links(struct soft_vcpu *v, struct chunk *c)
{
    const u64 *links = links_of(v->bt->direct, c), used = PTE_P | PTE_U | PTE_A;
    struct entries e = find_entries(v, c);

    for (unsigned n = 0; n < CHUNK_PAGES; n++) {
        gpa_t gpa = 0;
        u64 entry;

        if (!links[n])
            continue;
        entry = entry_of(v, &e, n, &gpa);
        if ((entry & used) != used || (entry & (PTE_NX | reserved_bits(v))) ||
            !e.upper.executable || links[n] != (gpa | PAGE_MAPPED))
            cut_link(v, c, n);
    }
    c->links_stale = false;
}

bool bt_direct_link(struct soft_vcpu *v, const struct bt_block *b)
{
    struct direct *d = v->bt->direct;
    u64 number = b->page >> DIRECT_SHIFT, link = (b->gpa & ~(GUEST_PAGE_SIZE - 1)) | PAGE_MAPPED;
    unsigned n = (b->page >> GUEST_PAGE_SHIFT) % CHUNK_PAGES;
    struct chunk *c;

    if (!d->current || number >= DIRECT_CHUNKS)
        return false;
    reserve(d, (u32)number); /* code may be where data can't be mapped */
    c = find_chunk(d, b->page);
    if (!c)
        return false;
    if (links_of(d, c)[n] != link)
        cut_link(v, c, n);
    links_of(d, c)[n] = link;
    c->linked = true;
    return true;
}

/* --- Mapping --- */

/*
 * The host didn't do what it was asked, so nobody knows what is mapped where: nothing is used any more, nor given
 * back, for what was reserved must not become anybody else's.
 */
static void give_up(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    for (unsigned n = 0; n < d->nchunks; n++)
        set_state(v, &d->chunks[n], CHUNK_FOREIGN);
    cut_all_links(v);
    d->possible = d->owned = d->current = false;
    bt_mode_changed(v);
}

/* Maps n pages as `want` says of the first; the others follow it in guest-physical memory. False: it gave up. */
static bool map_run(struct soft_vcpu *v, void *at, u64 n, u64 want, bool rights_only)
{
    int prot = PROT_READ | (want & PAGE_WRITE ? PROT_WRITE : 0);
    gpa_t gpa = want & ~(GUEST_PAGE_SIZE - 1);
    u64 size = n << GUEST_PAGE_SHIFT;
    const struct memory_slot *s;
    bool done;

    v->bt->direct->nmaps++;
    v->stats.direct_mappings++;
    if (!want) {
        done = mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                    -1, 0) != MAP_FAILED;
    } else if (rights_only) {
        done = !mprotect(at, size, prot);
    } else {
        s = ram_at(v, gpa);
        done = mmap(at, size, prot, MAP_SHARED | MAP_FIXED | MAP_POPULATE, s->fd,
                    (off_t)(s->fd_offset + (gpa - s->gpa))) != MAP_FAILED;
    }
    if (!done)
        give_up(v);
    return done;
}

/* How many pages from `first` on, before `end`, one mapping makes right. */
static unsigned run_length(const struct soft_vcpu *v, const u64 have[CHUNK_PAGES],
                           const u64 want[CHUNK_PAGES], unsigned first, unsigned end,
                           bool rights_only)
{
    const struct memory_slot *s = want[first] ? ram_at(v, want[first]) : NULL;
    unsigned n = first + 1;

    for (; n < end && want[n] != have[n]; n++) {
        u64 next = want[first] ? want[first] + (u64)(n - first) * GUEST_PAGE_SIZE : 0;

        if (want[n] != next || (s && next - s->gpa >= s->size) ||
            (rights_only && ((want[n] ^ have[n]) & ~PAGE_WRITE)))
            break;
    }
    return n - first;
}

/*
 * Makes the mappings of pages from `first` to `end` what the page tables say, by at most *maps mappings. prune: what is
 * wrong is only taken away. False: more are needed.
 */
static bool sync_pages(struct soft_vcpu *v, struct chunk *c, unsigned first, unsigned end,
                       bool prune, unsigned *maps)
{
    struct direct *d = v->bt->direct;
    u64 *have = pages_of(d, c), want[CHUNK_PAGES];

    read_tables(v, c, first, end, want);
    for (unsigned n = first; prune && n < end; n++)
        if (want[n] != have[n])
            want[n] = 0;
    for (unsigned n = first; n < end;) {
        bool rights_only = want[n] && !((want[n] ^ have[n]) & ~PAGE_WRITE);
        u8 *at = (u8 *)(uintptr_t)(((u64)c->number << DIRECT_SHIFT) + n * GUEST_PAGE_SIZE);
        unsigned run;

        if (want[n] == have[n]) {
            n++;
            continue;
        }
        if (!*maps || d->nmaps >= MAPS_MAX)
            return false;
        run = run_length(v, have, want, n, end, rights_only);
        --*maps;
        if (!map_run(v, at, run, want[n], rights_only))
            return false;
        for (unsigned k = n; k < n + run; k++)
            have[k] = want[k];
        n += run;
    }
    return true;
}

static void clear_chunk(struct soft_vcpu *v, struct chunk *c)
{
    u64 *have = pages_of(v->bt->direct, c);
    bool any = false;

    set_state(v, c, CHUNK_EMPTY);
    c->stale_end = 0;
    for (unsigned k = 0; k < CHUNK_PAGES; k++) {
        any |= !!have[k];
        have[k] = 0;
    }
    if (any)
        map_run(v, chunk_start(c->number), chunk_size(c->number) >> GUEST_PAGE_SHIFT, 0, false);
}

static void activate(struct soft_vcpu *v, struct chunk *c, unsigned *maps)
{
    if (sync_pages(v, c, 0, CHUNK_PAGES, false, maps))
        set_state(v, c, CHUNK_ACTIVE);
    else if (c->state != CHUNK_FOREIGN)
        set_state(v, c, CHUNK_RESTING);
}

/*
 * Looks at the pages whose translations were dropped. A chunk at rest stays so, for code that wants it pays for that;
 * but what it has must be right.
 */
static void refresh(struct soft_vcpu *v, struct chunk *c, unsigned *maps)
{
    unsigned end = c->stale_end;

    c->stale_end = 0;
    if (!sync_pages(v, c, c->stale, end, c->state == CHUNK_RESTING, maps)) {
        if (c->state != CHUNK_FOREIGN)
            clear_chunk(v, c);
    } else if (c->state == CHUNK_STALE) {
        set_state(v, c, CHUNK_ACTIVE);
    }
}

static void unmap_all(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    for (unsigned n = 0; n < d->nchunks; n++) {
        if (d->chunks[n].state != CHUNK_FOREIGN)
            clear_chunk(v, &d->chunks[n]);
    }
    d->nmaps = 0;
}

/* --- What the rest of the processor tells --- */

/* Of its pages from `first` to `end`. */
static void make_stale(struct soft_vcpu *v, struct chunk *c, unsigned first, unsigned end)
{
    bool again = c->stale_end;

    if (c->state == CHUNK_ACTIVE)
        set_state(v, c, CHUNK_STALE);
    if (c->state == CHUNK_STALE || c->state == CHUNK_RESTING) {
        c->stale = (u16)(again ? MIN(c->stale, first) : first);
        c->stale_end = (u16)MAX(c->stale_end, end);
    }
    c->links_stale = c->linked;
    v->bt->direct->stale |= c->linked || c->stale_end;
}

/* The vCPU's direct mappings; NULL: it has none. */
static struct direct *in_use(const struct soft_vcpu *v)
{
    struct direct *d = v->bt ? v->bt->direct : NULL;

    return d && d->owned ? d : NULL;
}

void bt_direct_flush(struct soft_vcpu *v)
{
    struct direct *d = in_use(v);

    for (unsigned n = 0; d && n < d->nchunks; n++)
        make_stale(v, &d->chunks[n], 0, CHUNK_PAGES);
}

void bt_direct_flush_page(struct soft_vcpu *v, gva_t lin)
{
    struct direct *d = in_use(v);
    struct chunk *c = d ? find_chunk(d, lin) : NULL;
    unsigned n = (lin >> GUEST_PAGE_SHIFT) % CHUNK_PAGES;

    if (c)
        make_stale(v, c, c->large ? 0 : n, c->large ? CHUNK_PAGES : n + 1);
}

static u64 table_base(const struct soft_vcpu *v)
{
    return v->cpu.cr3 & PTE_ADDR_MASK;
}

void bt_direct_switch(struct soft_vcpu *v, unsigned pcid, bool keep)
{
    struct direct *d = in_use(v);

    if (!d)
        return;
    if (!keep && pcid == d->pcid)
        bt_direct_flush(v);
    d->current = pcid == d->pcid && table_base(v) == d->base;
}

void bt_direct_protect(struct soft_vcpu *v, gpa_t gpa)
{
    struct direct *d = in_use(v);

    for (unsigned n = 0; d && n < d->nchunks; n++) {
        u64 *have = d->pages[n], start = (u64)d->chunks[n].number << DIRECT_SHIFT;

        for (unsigned k = 0; k < CHUNK_PAGES; k++)
            if (have[k] == (gpa | PAGE_MAPPED | PAGE_WRITE)) {
                have[k] &= ~PAGE_WRITE;
                map_run(v, (void *)(uintptr_t)(start + k * GUEST_PAGE_SIZE), 1, have[k], true);
            }
    }
}

void bt_direct_drop(struct soft_vcpu *v)
{
    struct direct *d = in_use(v);

    if (!d)
        return;
    unmap_all(v);
    cut_all_links(v);
    d->owned = d->current = false;
    bt_mode_changed(v);
}

static void rest(struct soft_vcpu *v, gva_t lin)
{
    struct chunk *c = find_chunk(v->bt->direct, lin);

    if (c && c->state == CHUNK_ACTIVE)
        set_state(v, c, CHUNK_RESTING);
}

static void spend(struct direct *d, unsigned cost)
{
    d->budget -= MIN(d->budget, cost);
}

bool bt_direct_want(struct soft_vcpu *v, u64 number)
{
    struct direct *d = v->bt->direct;
    unsigned maps = d->budget;
    struct chunk *c;

    if (!maps || number >= DIRECT_CHUNKS || !bt_direct_enter(v, true))
        return false;
    c = reserve_around(d, (u32)number);
    if (!c)
        return false;
    activate(v, c, &maps);
    spend(d, LOOK_COST + d->budget - maps);
    return c->state == CHUNK_ACTIVE;
}

/* The check may have been of an address in a chunk beside. */
void bt_direct_fault(struct soft_vcpu *v, gva_t lin)
{
    spend(v->bt->direct, FAULT_COST);
    v->stats.direct_faults++;
    rest(v, lin - CHUNK_SIZE);
    rest(v, lin);
    rest(v, lin + CHUNK_SIZE);
}

/* --- Whose turn it is --- */

static bool is_eligible(const struct soft_vcpu *v)
{
    const struct soft_engine *e = v->engine;
    const struct cpu *cpu = &v->cpu;

    return v->bt->direct->possible && e->config.ncpus == 1 && e->config.memory->in_file &&
           !e->dirty_logging && !v->journal && (v->bt_mode & BT_MODE_USER) && soft_code64(v) &&
           !(cpu->cr4 & CR4_LA57);
}

static void take_over(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    unmap_all(v);
    cut_all_links(v);
    d->owned = d->current = d->possible;
    d->base = table_base(v);
    d->pcid = v->cpu.cr4 & CR4_PCIDE ? (unsigned)(v->cpu.cr3 & CR3_PCID_MASK) : 0;
    d->idle = 0;
    d->budget = BUDGET;
    bt_mode_changed(v);
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
        d->idle = 0;
        d->budget = BUDGET;
        if (d->nmaps >= MAPS_MAX)
            unmap_all(v);
        return;
    }
    d->idle++;
    if (d->candidate != v->cpu.cr3)
        d->seen = 0;
    d->candidate = v->cpu.cr3;
    if (d->seen++ >= choices->direct_ticks && (!d->owned || d->idle > IDLE_TICKS))
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

bool bt_direct_enter(struct soft_vcpu *v, bool user)
{
    struct direct *d = v->bt->direct;
    unsigned maps = MAPS_AT_ONCE;

    if (!d || !d->current)
        return false;
    d->off &= user;
    if (!user || d->off)
        return false;
    if (likely(!d->stale))
        return true;
    for (unsigned n = 0; n < d->nchunks; n++) {
        struct chunk *c = &d->chunks[n];

        if (c->links_stale)
            check_links(v, c);
        if (c->stale_end)
            refresh(v, c, &maps);
    }
    d->stale = false;
    return d->current;
}

/* --- Life --- */

int bt_direct_create(struct soft_vcpu *v, struct error *err)
{
    struct direct *d = pages_alloc(sizeof(*d));

    _Static_assert(MAX_CHUNKS < UINT16_MAX, "places in chunks are 16 bits wide");
    if (d) {
        d->index = pages_alloc(DIRECT_CHUNKS * sizeof(*d->index));
        d->chunks = pages_alloc(MAX_CHUNKS * sizeof(*d->chunks));
        d->pages = pages_alloc(MAX_CHUNKS * sizeof(*d->pages));
        d->links = pages_alloc(MAX_CHUNKS * sizeof(*d->links));
        v->bt->direct = d;
    }
    if (d && d->index && d->chunks && d->pages && d->links) {
        d->possible = reserve(d, 0);
        return 0;
    }
    bt_direct_destroy(v);
    return error_host(err, ENOMEM, "no memory to map the guest's at its own addresses");
}

void bt_direct_destroy(struct soft_vcpu *v)
{
    struct direct *d = v->bt->direct;

    if (!d)
        return;
    for (unsigned n = 0; n < d->nchunks; n++)
        if (d->chunks[n].state != CHUNK_FOREIGN)
            munmap(chunk_start(d->chunks[n].number), chunk_size(d->chunks[n].number));
    pages_free(d->index, DIRECT_CHUNKS * sizeof(*d->index));
    pages_free(d->chunks, MAX_CHUNKS * sizeof(*d->chunks));
    pages_free(d->pages, MAX_CHUNKS * sizeof(*d->pages));
    pages_free(d->links, MAX_CHUNKS * sizeof(*d->links));
    pages_free(d, sizeof(*d));
    v->bt->direct = NULL;
}
