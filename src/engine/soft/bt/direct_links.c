/*
 * Links between pages of direct code: which pages of the owned address space have links from others to blocks in them, so
 * that these are undone when something else is mapped there. They are of one vCPU, as its blocks are.
 */
#include "engine/soft/bt/direct.h"

#include "host/pages.h"

/* 2 MiB of code each. Code beyond them has no links from other pages. */
#define MAX_LINKED 256
#define LINKED 1ULL

struct linked_chunk {
    u32 number;
    bool stale;             /* translations were dropped since its links were right */
    u64 pages[CHUNK_PAGES]; /* guest-physical address | LINKED of pages with links; or 0 */
};

struct direct_links {
    unsigned nchunks;
    struct linked_chunk chunks[MAX_LINKED];
};

struct direct_links *links_create(void)
{
    return pages_alloc(sizeof(struct direct_links));
}

void links_destroy(struct direct_links *l)
{
    pages_free(l, sizeof(*l));
}

static struct linked_chunk *find(struct direct_links *l, gva_t lin)
{
    for (unsigned n = 0; n < l->nchunks; n++)
        if (l->chunks[n].number == lin >> DIRECT_SHIFT)
            return &l->chunks[n];
    return NULL;
}

static struct linked_chunk *find_or_add(struct direct_links *l, gva_t lin)
{
    struct linked_chunk *c = find(l, lin);

    if (c || l->nchunks == MAX_LINKED)
        return c;
    c = &l->chunks[l->nchunks++];
    c->number = (u32)(lin >> DIRECT_SHIFT);
    return c;
}

static void cut_page(struct soft_vcpu *v, struct linked_chunk *c, unsigned n)
{
    if (c->pages[n])
        bt_cut_links(v->bt, c->pages[n] & ~(GUEST_PAGE_SIZE - 1),
                     ((gva_t)c->number << DIRECT_SHIFT) + n * GUEST_PAGE_SIZE);
    c->pages[n] = 0;
}

void links_cut(struct soft_vcpu *v, struct direct_links *l)
{
    for (unsigned k = 0; k < l->nchunks; k++) {
        for (unsigned n = 0; n < CHUNK_PAGES; n++)
            cut_page(v, &l->chunks[k], n);
        l->chunks[k].stale = false;
    }
    l->nchunks = 0;
}

void links_flush_page(struct direct_links *l, gva_t lin)
{
    struct linked_chunk *c = find(l, lin);

    if (c)
        c->stale = true;
}

void links_flush(struct direct_links *l)
{
    for (unsigned k = 0; k < l->nchunks; k++)
        l->chunks[k].stale = true;
}

/* Links stay where user code may still be fetched from the same page. */
static void check_chunk(struct soft_vcpu *v, struct linked_chunk *c)
{
    struct direct_entries e = direct_find_entries(v, c->number);

    for (unsigned n = 0; n < CHUNK_PAGES; n++) {
        gpa_t gpa = 0;
        u64 entry;

        if (!c->pages[n])
            continue;
        entry = direct_entry(v, &e, n, &gpa);
        if (!direct_may_fetch(v, &e, entry) || c->pages[n] != (gpa | LINKED))
            cut_page(v, c, n);
    }
    c->stale = false;
}

void links_check(struct soft_vcpu *v, struct direct_links *l)
{
    for (unsigned k = 0; k < l->nchunks; k++)
        if (l->chunks[k].stale)
            check_chunk(v, &l->chunks[k]);
}

bool links_add(struct soft_vcpu *v, struct direct_links *l, const struct bt_block *b)
{
    u64 page = (b->gpa & ~(GUEST_PAGE_SIZE - 1)) | LINKED;
    unsigned n = (b->page >> GUEST_PAGE_SHIFT) % CHUNK_PAGES;
    struct linked_chunk *c;

    if (b->page >> DIRECT_SHIFT >= DIRECT_CHUNKS)
        return false;
    c = find_or_add(l, b->page);
    if (!c)
        return false;
    if (c->pages[n] != page)
        cut_page(v, c, n);
    c->pages[n] = page;
    return true;
}
