/*
 * Links between pages of kernel code.
 *
 * A kernel calls from page to page all the time, and what is mapped where its code is hardly ever changes. So blocks
 * of kernel code are placed, and their exits are linked to other pages where the translation of these is global: then
 * no write of CR3 has a part in it. What is left are CR4, INVLPG and the like. When all translations are dropped, the
 * page tables are asked at once whether each page with links is still there; the links to one that isn't are undone.
 */
#include "engine/soft/bt/bt.h"
#include "engine/soft/bt/links.h"

#include "engine/soft/mmu.h"

static bool is_there(const struct soft_vcpu *v, void *opaque, gva_t lin, gpa_t gpa)
{
    return bt_kernel_code_is_at(v, lin, gpa);
}

bool bt_kernel_link(struct soft_vcpu *v, const struct bt_block *b)
{
    return soft_fetch_is_global(v, b->page) && links_add(v, v->bt->kernel_links, b);
}

void bt_kernel_links_check(struct soft_vcpu *v)
{
    links_flush(v->bt->kernel_links);
    links_check(v, v->bt->kernel_links, is_there, NULL);
}

void bt_kernel_links_cut(struct soft_vcpu *v, gva_t lin)
{
    links_cut_page(v, v->bt->kernel_links, lin);
}
