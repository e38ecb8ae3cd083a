/*
 * Address spaces of the guest's that are mapped in this process. See direct.c.
 *
 * A space is mapped for all vCPUs that have joined it. Its chunks are reserved by it, and what isn't reserved it
 * can't use: so no two spaces come near each other's, and addresses that somebody else in this process has stay his
 * (MAP_FIXED_NOREPLACE). The first chunk is the engine's for good, for an address near the end of the address space may
 * wrap round to it; one space at a time has it.
 *
 * Reading the page tables and making the mappings what they say is one step under the lock. So a mapping is never
 * older than the last flush after which a vCPU looked at it: what another vCPU read meanwhile is newer. That it may
 * be newer than what a vCPU has in its TLB is what the manual allows (SDM vol. 3, 4.10.2.3 and 4.10.4.4).
 *
 * A page is mapped for writing only while it holds no code. Who maps it so says so (page_track.direct_write) and then
 * looks at code_lines; who makes code of it sets these and then looks there (bt_direct_protect), as in code_pages.c.
 */
#define _GNU_SOURCE
#include "engine/soft/bt/direct.h"

#include "engine/soft/code_pages.h"
#include "engine/soft/lapic.h"
#include "host/log.h"
#include "host/pages.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

/* Below is not for programs to map (vm.mmap_min_addr); the last page of the user's half isn't either. */
#define LOWEST KIB(64)
#define HIGHEST (BIT(47) - GUEST_PAGE_SIZE)
/* Changes of mappings before all begin anew: each leaves two mappings more at most; the kernel has a limit of 65,530. */
#define MAPS_MAX 24000

#define PAGE_MAPPED 1ULL
#define PAGE_WRITE 2ULL

static struct direct_spaces *spaces_of(const struct soft_vcpu *v)
{
    return v->engine->direct;
}

/* --- Which one --- */

static struct space_key key_of(const struct soft_vcpu *v)
{
    return (struct space_key){.tables = v->cpu.cr3 & PTE_ADDR_MASK,
                              .apic = lapic_base(v->lapic),
                              .a20_mask = v->a20_mask,
                              .keys = v->cpu.cr4 & CR4_PKE,
                              .no_execute = v->cpu.msr.efer & EFER_NXE};
}

bool space_is_of(const struct soft_vcpu *v, const struct direct_space *s)
{
    struct space_key key = key_of(v);

    return s->key.tables == key.tables && s->key.apic == key.apic &&
           s->key.a20_mask == key.a20_mask && s->key.keys == key.keys &&
           s->key.no_execute == key.no_execute;
}

/* --- Reserving --- */

static void *chunk_start(u32 number)
{
    return (void *)(uintptr_t)MAX((u64)number << DIRECT_SHIFT, LOWEST);
}

static size_t chunk_size(u32 number)
{
    return MIN((u64)(number + 1) << DIRECT_SHIFT, HIGHEST) - (u64)(uintptr_t)chunk_start(number);
}

struct chunk *space_find(const struct direct_space *s, gva_t lin)
{
    u64 number = lin >> DIRECT_SHIFT;

    if (number >= DIRECT_CHUNKS || !s->index[number])
        return NULL;
    return &s->chunks[s->index[number] - 1];
}

static bool map_nothing(void *at, u64 size)
{
    return mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
                0) != MAP_FAILED;
}

static bool reserve_addresses(u32 number)
{
    void *start = chunk_start(number);
    void *got = mmap(start, chunk_size(number), PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

    if (got == start)
        return true;
    if (got != MAP_FAILED) /* a kernel that takes the address for a hint */
        munmap(got, chunk_size(number));
    return false;
}

static bool reserve_for(struct direct_spaces *all, const struct direct_space *s, u32 number)
{
    if (number)
        return reserve_addresses(number);
    if (all->first)
        return false;
    all->first = s;
    return true;
}

/* What can't be given back stays reserved, by nobody. */
static void give_back(struct direct_spaces *all, const struct chunk *c)
{
    if (c->number) {
        munmap(chunk_start(c->number), chunk_size(c->number));
        return;
    }
    if (!c->mapped || map_nothing(chunk_start(0), chunk_size(0)))
        all->first = NULL;
}

static struct chunk *reserve(struct direct_spaces *all, struct direct_space *s, u32 number)
{
    struct chunk *c = space_find(s, (gva_t)number << DIRECT_SHIFT);

    if (c)
        return c->foreign ? NULL : c;
    if (s->nchunks == MAX_CHUNKS)
        return NULL;
    c = &s->chunks[s->nchunks++];
    s->index[number] = (u16)s->nchunks;
    *c = (struct chunk){.number = number, .foreign = !reserve_for(all, s, number)};
    return c->foreign ? NULL : c;
}

struct chunk *space_reserve(const struct soft_vcpu *v, struct direct_space *s, u64 number)
{
    struct direct_spaces *all = spaces_of(v);

    if (number >= DIRECT_CHUNKS || (number > 0 && !reserve(all, s, (u32)number - 1)) ||
        (number + 1 < DIRECT_CHUNKS && !reserve(all, s, (u32)number + 1)))
        return NULL;
    return reserve(all, s, (u32)number);
}

/* --- What is to be mapped --- */

/*
 * Pages with a protection key of their own are left to the TLB; others have key 0, which every vCPU that runs direct code
 * allows (bt_direct_enter).
 */
static bool has_key(const struct soft_vcpu *v, u64 entry)
{
    return (v->cpu.cr4 & CR4_PKE) && (entry >> PTE_PKEY_SHIFT & 15);
}

/* Whether the page has no code now, and who makes some will see to it that it isn't mapped for writing any more. */
static bool announce_write(const struct soft_vcpu *v, const struct memory_slot *s, gpa_t gpa)
{
    struct page_track *track = soft_track_in(v->engine, s, gpa);

    if (!atomic_load_explicit(&track->direct_write, memory_order_relaxed))
        atomic_store(&track->direct_write, true);
    return !atomic_load(&track->code_lines);
}

/* For the page whose entry is `entry` and is at gpa. */
static u64 wanted(const struct soft_vcpu *v, const struct direct_entries *e, u64 entry, gpa_t gpa)
{
    const struct memory_slot *s;

    if (!direct_may_read(v, entry) || has_key(v, entry))
        return 0;
    s = direct_ram_at(v, gpa);
    if (!s || lapic_claims(v->lapic, gpa))
        return 0;
    if (e->writable && (entry & PTE_W) && (entry & PTE_D) && !(s->flags & MEMORY_ROM) &&
        announce_write(v, s, gpa))
        return gpa | PAGE_MAPPED | PAGE_WRITE;
    return gpa | PAGE_MAPPED;
}

static bool can_map(gva_t lin)
{
    return lin >= LOWEST && lin < HIGHEST;
}

static void read_tables(const struct soft_vcpu *v, struct chunk *c, unsigned first, unsigned end,
                        u64 want[CHUNK_PAGES])
{
    gva_t lin = (gva_t)c->number << DIRECT_SHIFT;
    struct direct_entries e = direct_find_entries(v, c->number);

    c->large = e.there && e.large;
    for (unsigned n = first; n < end; n++) {
        gpa_t gpa = 0;
        u64 entry = direct_entry(v, &e, n, &gpa);

        want[n] = entry && can_map(lin + n * GUEST_PAGE_SIZE) ? wanted(v, &e, entry, gpa) : 0;
    }
}

/* --- Mapping --- */

/*
 * The host refused a change: what was there before may be there still, or a hole, which would become anybody's. If it
 * refuses to close that as well, nothing here can be trusted any more.
 */
static void close_hole(struct direct_spaces *all, void *at, u64 size)
{
    atomic_store(&all->failed, true);
    if (map_nothing(at, size))
        return;
    log_message(LOG_ERROR, "the host has no memory for mappings of its own (see vm.max_map_count)");
    abort();
}

/*
 * Maps n pages as `want` says of the first; the others follow it in guest-physical memory. False: nothing is mapped
 * there now.
 */
static bool map_run(struct soft_vcpu *v, struct direct_space *s, void *at, u64 n, u64 want,
                    bool rights_only)
{
    int prot = PROT_READ | (want & PAGE_WRITE ? PROT_WRITE : 0);
    gpa_t gpa = want & ~(GUEST_PAGE_SIZE - 1);
    u64 size = n << GUEST_PAGE_SHIFT;
    const struct memory_slot *slot;
    bool done;

    s->nmaps++;
    spaces_of(v)->nmaps++;
    v->stats.direct_mappings++;
    if (!want) {
        done = map_nothing(at, size);
    } else if (rights_only) {
        done = !mprotect(at, size, prot);
    } else {
        slot = direct_ram_at(v, gpa);
        done = mmap(at, size, prot, MAP_SHARED | MAP_FIXED | MAP_POPULATE, slot->fd,
                    (off_t)(slot->fd_offset + (gpa - slot->gpa))) != MAP_FAILED;
    }
    if (!done)
        close_hole(spaces_of(v), at, size);
    return done;
}

/* How many pages from `first` on, before `end`, one mapping makes right. */
static unsigned run_length(const struct soft_vcpu *v, const u64 have[CHUNK_PAGES],
                           const u64 want[CHUNK_PAGES], unsigned first, unsigned end,
                           bool rights_only)
{
    const struct memory_slot *s = want[first] ? direct_ram_at(v, want[first]) : NULL;
    unsigned n = first + 1;

    for (; n < end && want[n] != have[n]; n++) {
        u64 next = want[first] ? want[first] + (u64)(n - first) * GUEST_PAGE_SIZE : 0;

        if (want[n] != next || (s && next - s->gpa >= s->size) ||
            (rights_only && ((want[n] ^ have[n]) & ~PAGE_WRITE)))
            break;
    }
    return n - first;
}

bool space_is_worn(const struct soft_vcpu *v)
{
    return spaces_of(v)->nmaps >= MAPS_MAX;
}

bool space_sync(struct soft_vcpu *v, struct direct_space *s, struct chunk *c, unsigned first,
                unsigned end, bool prune, unsigned *maps)
{
    u64 *have = s->pages[space_place(s, c)], want[CHUNK_PAGES];

    read_tables(v, c, first, end, want);
    for (unsigned n = first; prune && n < end; n++)
        if (want[n] != have[n])
            want[n] = 0;
    for (unsigned n = first; n < end;) {
        bool rights_only = want[n] && !((want[n] ^ have[n]) & ~PAGE_WRITE), done;
        u8 *at = (u8 *)(uintptr_t)(((u64)c->number << DIRECT_SHIFT) + n * GUEST_PAGE_SIZE);
        unsigned run;

        if (want[n] == have[n]) {
            n++;
            continue;
        }
        if (!*maps || space_is_worn(v) || atomic_load(&spaces_of(v)->failed))
            return false;
        run = run_length(v, have, want, n, end, rights_only);
        --*maps;
        c->mapped = true;
        done = map_run(v, s, at, run, want[n], rights_only);
        for (unsigned k = n; k < n + run; k++)
            have[k] = done ? want[k] : 0;
        if (!done)
            return false;
        n += run;
    }
    return true;
}

void space_clear_chunk(struct soft_vcpu *v, struct direct_space *s, struct chunk *c)
{
    if (!c->mapped)
        return;
    c->mapped = false;
    memset(s->pages[space_place(s, c)], 0, sizeof(*s->pages));
    map_run(v, s, chunk_start(c->number), chunk_size(c->number) >> GUEST_PAGE_SHIFT, 0, false);
}

void space_clear(struct soft_vcpu *v, struct direct_space *s)
{
    for (unsigned n = 0; n < s->nchunks; n++)
        space_clear_chunk(v, s, &s->chunks[n]);
    spaces_of(v)->nmaps -= s->nmaps;
    s->nmaps = 0;
}

/* Takes away the right to write to the page at gpa. */
static void protect_in(struct soft_vcpu *v, struct direct_space *s, gpa_t gpa)
{
    for (unsigned n = 0; n < s->nchunks; n++) {
        u64 *have = s->pages[n], start = (u64)s->chunks[n].number << DIRECT_SHIFT;

        for (unsigned k = 0; s->chunks[n].mapped && k < CHUNK_PAGES; k++) {
            u8 *at = (u8 *)(uintptr_t)(start + k * GUEST_PAGE_SIZE);

            if (have[k] == (gpa | PAGE_MAPPED | PAGE_WRITE))
                have[k] = map_run(v, s, at, 1, gpa | PAGE_MAPPED, true) ? gpa | PAGE_MAPPED : 0;
        }
    }
}

void bt_direct_protect(struct soft_vcpu *v, gpa_t gpa, struct page_track *track)
{
    struct direct_spaces *all = spaces_of(v);

    if (likely(!atomic_load(&track->direct_write)))
        return;
    soft_vectors_sync(v);
    pthread_mutex_lock(&all->lock);
    for (unsigned n = 0; n < SOFT_MAX_CPUS; n++)
        if (all->all[n] && all->all[n]->users)
            protect_in(v, all->all[n], gpa);
    atomic_store(&track->direct_write, false);
    pthread_mutex_unlock(&all->lock);
}

/* --- Joining and leaving --- */

static void space_free(struct direct_space *s)
{
    if (!s)
        return;
    pages_free(s->index, DIRECT_CHUNKS * sizeof(*s->index));
    pages_free(s->chunks, MAX_CHUNKS * sizeof(*s->chunks));
    pages_free(s->pages, MAX_CHUNKS * sizeof(*s->pages));
    free(s);
}

static struct direct_space *space_create(void)
{
    struct direct_space *s = calloc(1, sizeof(*s));

    _Static_assert(MAX_CHUNKS < UINT16_MAX, "places in chunks are 16 bits wide");
    if (!s)
        return NULL;
    s->index = pages_alloc(DIRECT_CHUNKS * sizeof(*s->index));
    s->chunks = pages_alloc(MAX_CHUNKS * sizeof(*s->chunks));
    s->pages = pages_alloc(MAX_CHUNKS * sizeof(*s->pages));
    if (s->index && s->chunks && s->pages)
        return s;
    space_free(s);
    return NULL;
}

struct direct_space *space_join(struct soft_vcpu *v)
{
    struct direct_spaces *all = spaces_of(v);
    struct direct_space **unused = NULL;

    for (unsigned n = 0; n < SOFT_MAX_CPUS; n++) {
        struct direct_space *s = all->all[n];

        if (s && s->users && space_is_of(v, s)) {
            s->users++;
            return s;
        }
        if (!unused && (!s || !s->users))
            unused = &all->all[n];
    }
    if (!*unused) /* there is one: a vCPU joins one space at a time */
        *unused = space_create();
    if (*unused) {
        (*unused)->key = key_of(v);
        (*unused)->users = 1;
    }
    return *unused;
}

void space_leave(struct soft_vcpu *v, struct direct_space *s)
{
    if (--s->users)
        return;
    spaces_of(v)->nmaps -= s->nmaps;
    s->nmaps = 0;
    for (unsigned n = 0; n < s->nchunks; n++) {
        const struct chunk *c = &s->chunks[n];

        if (!c->foreign)
            give_back(spaces_of(v), c);
        if (c->mapped)
            memset(s->pages[n], 0, sizeof(*s->pages));
        s->index[c->number] = 0;
    }
    s->nchunks = 0;
}

/* --- Life --- */

struct direct_spaces *bt_direct_spaces_create(struct error *err)
{
    struct direct_spaces *all = calloc(1, sizeof(*all));

    if (!all) {
        error_host(err, errno, "no memory to map the guest's at its own addresses");
        return NULL;
    }
    pthread_mutex_init(&all->lock, NULL);
    all->possible = reserve_addresses(0);
    return all;
}

void bt_direct_spaces_destroy(struct direct_spaces *all)
{
    if (!all)
        return;
    for (unsigned n = 0; n < SOFT_MAX_CPUS; n++)
        space_free(all->all[n]);
    if (all->possible)
        munmap(chunk_start(0), chunk_size(0));
    pthread_mutex_destroy(&all->lock);
    free(all);
}
