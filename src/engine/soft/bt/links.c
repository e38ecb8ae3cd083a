/*
 * Links between pages. See links.h. Pages are kept by 2 MiB of addresses, which have one table of the guest's.
 */
#include "engine/soft/bt/links.h"

#include "engine/soft/bt/bt.h"
#include "host/pages.h"

/* 2 MiB of code each. Code beyond them has no links from other pages. */
#define MAX_LINKED 256
#define LINKED 1ULL

struct linked_chunk {
    gva_t start;
    bool stale;             /* translations were dropped since its links were right */
    u64 pages[CHUNK_PAGES]; /* guest-physical address | LINKED of pages with links; or 0 */
};

struct bt_links {
    unsigned nchunks;
    struct linked_chunk chunks[MAX_LINKED];
};

struct bt_links *links_create(void)
{
    return pages_alloc(sizeof(struct bt_links));
}

void links_destroy(struct bt_links *l)
{
    pages_free(l, sizeof(*l));
}

static gva_t start_of(gva_t lin)
{
    return lin & ~(BIT(DIRECT_SHIFT) - 1);
}

static unsigned number_of(gva_t lin)
{
    return (lin >> GUEST_PAGE_SHIFT) % CHUNK_PAGES;
}

static struct linked_chunk *find(struct bt_links *l, gva_t lin)
{
    for (unsigned n = 0; n < l->nchunks; n++)
        if (l->chunks[n].start == start_of(lin))
            return &l->chunks[n];
    return NULL;
}

static struct linked_chunk *find_or_add(struct bt_links *l, gva_t lin)
{
    struct linked_chunk *c = find(l, lin);

    if (c || l->nchunks == MAX_LINKED)
        return c;
    c = &l->chunks[l->nchunks++];
    c->start = start_of(lin);
    return c;
}

static void cut_page(struct soft_vcpu *v, struct linked_chunk *c, unsigned n)
{
    if (c->pages[n])
        bt_cut_links(v->bt, c->pages[n] & ~(GUEST_PAGE_SIZE - 1), c->start + n * GUEST_PAGE_SIZE);
    c->pages[n] = 0;
}

bool links_add(struct soft_vcpu *v, struct bt_links *l, const struct bt_block *b)
{
    u64 page = (b->gpa & ~(GUEST_PAGE_SIZE - 1)) | LINKED;
    struct linked_chunk *c = find_or_add(l, b->page);
    unsigned n = number_of(b->page);

    if (!c)
        return false;
    if (c->pages[n] != page)
        cut_page(v, c, n);
    c->pages[n] = page;
    return true;
}

void links_cut_page(struct soft_vcpu *v, struct bt_links *l, gva_t lin)
{
    struct linked_chunk *c = find(l, lin);

    if (c)
        cut_page(v, c, number_of(lin));
}

void links_cut(struct soft_vcpu *v, struct bt_links *l)
{
    for (unsigned k = 0; k < l->nchunks; k++) {
        for (unsigned n = 0; n < CHUNK_PAGES; n++)
            cut_page(v, &l->chunks[k], n);
        l->chunks[k].stale = false;
    }
    l->nchunks = 0;
}

void links_flush_page(struct bt_links *l, gva_t lin)
{
    struct linked_chunk *c = find(l, lin);

    if (c)
        c->stale = true;
}

void links_flush(struct bt_links *l)
{
    for (unsigned k = 0; k < l->nchunks; k++)
        l->chunks[k].stale = true;
}

void links_check(struct soft_vcpu *v, struct bt_links *l, links_is_there *is_there, void *opaque)
{
    for (unsigned k = 0; k < l->nchunks; k++) {
        struct linked_chunk *c = &l->chunks[k];

        for (unsigned n = 0; c->stale && n < CHUNK_PAGES; n++)
            if (c->pages[n] && !is_there(v, opaque, c->start + n * GUEST_PAGE_SIZE,
                                         c->pages[n] & ~(GUEST_PAGE_SIZE - 1)))
                cut_page(v, c, n);
        c->stale = false;
    }
}
