/*
 * Links between pages: which pages of placed code (cache.h) have links from others to blocks in them, so that these
 * are undone when something else is mapped there. Of one vCPU, as its blocks are: its kernel's code (kernel_links.c)
 * and the code of the address space that it has mapped (direct.c) have one each.
 */
#ifndef DOPPEL_ENGINE_SOFT_BT_LINKS_H
#define DOPPEL_ENGINE_SOFT_BT_LINKS_H

#include "engine/soft/vcpu.h"

struct bt_block;
struct bt_links;

/* NULL: no memory. */
struct bt_links *links_create(void);
/* NULL is nothing. */
void links_destroy(struct bt_links *l);

/* A link from another page to b is about to be made. False: there is no room for it. */
bool links_add(struct soft_vcpu *v, struct bt_links *l, const struct bt_block *b);
/* Undoes those to one page; all. */
void links_cut_page(struct soft_vcpu *v, struct bt_links *l, gva_t lin);
void links_cut(struct soft_vcpu *v, struct bt_links *l);

/* Translations were dropped, of one address; of all: links_check is to look at them. */
void links_flush_page(struct bt_links *l, gva_t lin);
void links_flush(struct bt_links *l);

/* Whether code may still be fetched at page lin, from gpa. Pages are asked for in order within 2 MiB. */
typedef bool links_is_there(const struct soft_vcpu *v, void *opaque, gva_t lin, gpa_t gpa);
/* Undoes those to pages that were flushed and aren't there any more. */
void links_check(struct soft_vcpu *v, struct bt_links *l, links_is_there *is_there, void *opaque);

#endif
