/*
 * Links between pages of kernel code.
 *
 * A kernel calls from page to page all the time, and what is mapped where its code is hardly ever changes. So blocks
 * of kernel code are placed, and their exits are linked to other pages where the translation of these is global: then
 * no write of CR3 has a part in it. What is left are CR4, INVLPG and the like. When all translations are dropped, the
 * page tables are asked at once whether each page with links is still there; the links to one that isn't are undone.
 *
 * Such an exit stores the page it leads to (v->bt_shared.ip_page) before it jumps, for code that is entered by a link
 * expects it to be right.
 */
#include "engine/soft/bt/bt.h"

#include "engine/soft/mmu.h"

/* A page is within PROBES of its place. An entry is never taken out, but by forgetting all: gpa is LINKS_NONE then. */
#define PROBES 8
#define LINKS_NONE UINT64_MAX

static struct bt_linked_page *place_of(struct bt *bt, gva_t page)
{
    unsigned hash = (unsigned)((page >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ULL >> 48);

    for (unsigned n = 0; n < PROBES; n++) {
        struct bt_linked_page *l = &bt->linked_pages[(hash + n) % BT_LINKED_PAGES];

        if (l->page == page || !l->page)
            return l;
    }
    return NULL;
}

static void cut(struct bt *bt, struct bt_linked_page *l)
{
    if (l->gpa != LINKS_NONE)
        bt_cut_links(bt, l->gpa, l->page);
    l->gpa = LINKS_NONE;
}

bool bt_kernel_link(struct soft_vcpu *v, const struct bt_block *b)
{
    gpa_t gpa = b->gpa & ~(GUEST_PAGE_SIZE - 1);
    struct bt_linked_page *l = place_of(v->bt, b->page);

    if (!l || !b->page || !soft_fetch_is_global(v, b->page))
        return false;
    if (l->page && l->gpa != gpa)
        cut(v->bt, l);
    l->page = b->page;
    l->gpa = gpa;
    return true;
}

void bt_kernel_links_check(struct soft_vcpu *v)
{
    for (unsigned n = 0; n < BT_LINKED_PAGES; n++) {
        struct bt_linked_page *l = &v->bt->linked_pages[n];

        if (l->page && l->gpa != LINKS_NONE && !bt_kernel_code_is_at(v, l->page, l->gpa))
            cut(v->bt, l);
    }
}

void bt_kernel_links_cut(struct soft_vcpu *v, gva_t lin)
{
    gva_t page = lin & ~(GUEST_PAGE_SIZE - 1);
    struct bt_linked_page *l = place_of(v->bt, page);

    if (l && l->page == page)
        cut(v->bt, l);
}

void bt_kernel_links_forget(struct bt *bt)
{
    memset(bt->linked_pages, 0, sizeof(bt->linked_pages));
}
