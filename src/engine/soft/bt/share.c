/*
 * Sharing translations among vCPUs.
 *
 * Each vCPU has its own cache of translated code, so that none waits for another and none runs what another is
 * patching. But the vCPUs of a machine run the same kernel and, as the guest's scheduler moves its processes, the same
 * programs; where there are more of them than processors, each piece of code would be interpreted, decoded and translated once
 * for each vCPU by the same processors. So who has translated a block puts a copy into the machine's store, and the
 * others adopt it: at the first sight of code that somebody found hot.
 *
 * A copy costs a tenth of a translation, for nearly all of a block is the same in every cache: the vCPU is addressed
 * by GS, the ways out are at the same offsets, and a placed block's linear address is part of its key. What isn't is
 * listed while the block is emitted (struct bt_reloc):
 *  - displacements between its hot and its cold half, and to the ways out;
 *  - the numbers of its exits, sites and recipes.
 * Beside the code, its exits, sites, points and x87 instructions hold code offsets. All that is moved by how far the
 * half that it lies in was. Exits come as they were made: linked to nothing.
 *
 * A copy is right where its guest bytes are what memory holds. That is asked as for a translation: after
 * soft_code_protect, by bt_block_protect. So nobody has to tell the store of a store to code.
 */
#include "engine/soft/bt/store.h"
#include "engine/soft/bt/translate.h"

#define RECORD_ROOM KIB(32)

/*
 * A record of the store begins with this. Behind it come, as they are at the maker's: the instruction of BT_QUICK, if there is
 * one; exits, sites, points, x87 instructions; the relocations, and the recipe of each that is of one; the code's hot half
 * and its cold one; the bytes of guest code.
 */
struct record_head {
    struct bt_block block;
    u32 first_site, nsites;
    u32 first_x87, nx87s;
    u32 nrelocs, nrecipes;
    u32 quick_site; /* number, or NO_SITE */
};

struct record {
    const struct record_head *head;
    const struct insn *quick;
    const struct bt_exit *exits;
    const struct bt_site *sites;
    const struct bt_point *points;
    const struct bt_x87 *x87s;
    const struct bt_reloc *relocs;
    const struct bt_recipe *recipes;
    const u8 *hot, *cold, *code;
};

static struct bt_store_key key_of(gpa_t gpa, gpa_t gpa2, gva_t page, u32 mode)
{
    return (struct bt_store_key){.gpa = gpa, .gpa2 = gpa2, .page = page, .mode = mode};
}

/* --- Publishing --- */

static struct iovec part(const void *base, size_t size)
{
    return (struct iovec){.iov_base = (void *)(uintptr_t)base, .iov_len = size};
}

/* The recipes that the code names, in order of the relocations. */
static u32 gather_recipes(const struct translation *t, struct bt_recipe *to)
{
    u32 n = 0, imm;

    for (unsigned k = 0; k < t->nrelocs; k++) {
        if (t->relocs[k].kind != RELOC_RECIPE)
            continue;
        memcpy(&imm, bt_write_at(t->bt, t->relocs[k].at), 4);
        to[n++] = t->bt->recipes[imm >> 16];
    }
    return n;
}

void bt_publish(const struct translation *t, u32 first_site, u32 first_x87)
{
    static _Thread_local struct bt_recipe recipes[BT_MAX_RELOCS];
    const struct bt *bt = t->bt;
    const struct bt_block *b = t->block;
    struct bt_store_key key = key_of(b->gpa, b->gpa2, b->page, b->mode);
    struct record_head head = {.block = *b,
                               .first_site = first_site,
                               .nsites = bt->next.sites - first_site,
                               .first_x87 = first_x87,
                               .nx87s = bt->next.x87s - first_x87,
                               .nrelocs = t->nrelocs,
                               .quick_site = t->quick_site};
    const struct insn *quick = &bt->kept[0][0];

    if (!t->v->engine->store || t->nrelocs > BT_MAX_RELOCS)
        return;
    head.nrecipes = gather_recipes(t, recipes);
    if (t->quick_site != NO_SITE)
        quick = &bt->kept[bt->sites[t->quick_site].resume][0];
    bt_store_put(t->v->engine->store, &key,
                 (const struct iovec[]){
                     part(&head, sizeof(head)),
                     part(quick, t->quick_site != NO_SITE ? sizeof(*quick) : 0),
                     part(&bt->exits[b->start.exits], b->nexits * sizeof(*bt->exits)),
                     part(&bt->sites[first_site], head.nsites * sizeof(*bt->sites)),
                     part(&bt->points[b->start.points], b->npoints * sizeof(*bt->points)),
                     part(&bt->x87s[first_x87], head.nx87s * sizeof(*bt->x87s)),
                     part(t->relocs, head.nrelocs * sizeof(*t->relocs)),
                     part(recipes, head.nrecipes * sizeof(*recipes)),
                     part(bt_write_at(bt, b->start.hot), b->hot_end - b->start.hot),
                     part(bt_write_at(bt, b->start.cold), b->cold_end - b->start.cold),
                     part(t->code, b->bytes),
                 },
                 11);
}

/* --- Adopting --- */

static const void *next_part(const u8 **at, size_t size)
{
    const u8 *this = *at;

    *at += size;
    return this;
}

static struct record open_record(const void *bytes)
{
    const u8 *at = bytes;
    const struct record_head *head = next_part(&at, sizeof(*head));
    const struct bt_block *b = &head->block;
    struct record r = {.head = head};

    r.quick = next_part(&at, head->quick_site != NO_SITE ? sizeof(*r.quick) : 0);
    r.exits = next_part(&at, b->nexits * sizeof(*r.exits));
    r.sites = next_part(&at, head->nsites * sizeof(*r.sites));
    r.points = next_part(&at, b->npoints * sizeof(*r.points));
    r.x87s = next_part(&at, head->nx87s * sizeof(*r.x87s));
    r.relocs = next_part(&at, head->nrelocs * sizeof(*r.relocs));
    r.recipes = next_part(&at, head->nrecipes * sizeof(*r.recipes));
    r.hot = next_part(&at, b->hot_end - b->start.hot);
    r.cold = next_part(&at, b->cold_end - b->start.cold);
    r.code = next_part(&at, b->bytes);
    return r;
}

/* Where a code offset at the maker's is in the copy. What isn't in the block, as the ways out, is where it was. */
static u32 moved(const struct record *r, const struct bt *bt, u32 offset)
{
    const struct bt_block *b = &r->head->block;

    if (offset >= b->start.hot && offset < b->hot_end)
        return offset - b->start.hot + bt->next.hot;
    if (offset >= b->start.cold && offset < b->cold_end)
        return offset - b->start.cold + bt->next.cold;
    return offset;
}

static u32 moved_x87(const struct record *r, const struct bt *bt, u32 number)
{
    return number ? number - r->head->first_x87 + bt->next.x87s : 0;
}

/* What stands at a relocation in the copy; before it is moved, *imm. False: there are too many recipes. */
static bool relocate(const struct record *r, struct bt *bt, const struct bt_reloc *reloc,
                     const struct bt_recipe **recipe, u32 *imm)
{
    u32 number;

    switch (reloc->kind) {
    case RELOC_CODE:
        *imm = moved(r, bt, reloc->at + 4 + *imm) - (moved(r, bt, reloc->at) + 4);
        return true;
    case RELOC_SITE:
        *imm += bt->next.sites - r->head->first_site;
        return true;
    case RELOC_EXIT:
        *imm += bt->next.exits - r->head->block.start.exits;
        return true;
    default: /* RELOC_RECIPE */
        number = bt_recipe_number(bt, (*recipe)++);
        *imm = number << 16;
        return number;
    }
}

/* False: there are too many recipes. */
static bool copy_code(const struct record *r, struct bt *bt)
{
    const struct bt_block *b = &r->head->block;
    const struct bt_recipe *recipe = r->recipes;

    memcpy(bt_write_at(bt, bt->next.hot), r->hot, b->hot_end - b->start.hot);
    memcpy(bt_write_at(bt, bt->next.cold), r->cold, b->cold_end - b->start.cold);
    for (u32 n = 0; n < r->head->nrelocs; n++) {
        u8 *at = bt_write_at(bt, moved(r, bt, r->relocs[n].at));
        u32 imm;

        memcpy(&imm, at, sizeof(imm));
        if (!relocate(r, bt, &r->relocs[n], &recipe, &imm))
            return false;
        memcpy(at, &imm, sizeof(imm));
    }
    return true;
}

static void copy_exits(const struct record *r, struct bt *bt)
{
    for (u32 n = 0; n < r->head->block.nexits; n++) {
        struct bt_exit *e = &bt->exits[bt->next.exits + n];

        *e = r->exits[n];
        e->at = moved(r, bt, e->at);
        e->bridge = moved(r, bt, e->bridge);
        e->at2 = moved(r, bt, e->at2);
        e->stub = moved(r, bt, e->stub);
        e->resume = moved(r, bt, e->resume);
    }
}

static void copy_sites(const struct record *r, struct bt *bt)
{
    for (u32 n = 0; n < r->head->nsites; n++) {
        struct bt_site *s = &bt->sites[bt->next.sites + n];

        *s = r->sites[n];
        s->x87 = moved_x87(r, bt, s->x87);
        s->resume = r->head->first_site + n == r->head->quick_site ? bt_keep_insn(bt, r->quick)
                                                                   : moved(r, bt, s->resume);
    }
}

static void copy_points(const struct record *r, struct bt *bt)
{
    for (u32 n = 0; n < r->head->block.npoints; n++) {
        struct bt_point *p = &bt->points[bt->next.points + n];

        *p = r->points[n];
        p->at = moved(r, bt, p->at);
        p->x87 = moved_x87(r, bt, p->x87);
    }
}

static struct bt_block moved_block(const struct record *r, const struct bt *bt)
{
    struct bt_block b = r->head->block;

    b.jump_entry = moved(r, bt, b.jump_entry);
    b.memory_entry = moved(r, bt, b.memory_entry);
    b.host_entry = moved(r, bt, b.host_entry);
    b.memory_native = moved(r, bt, b.memory_native);
    b.host_native = moved(r, bt, b.host_native);
    b.fault = moved(r, bt, b.fault);
    b.hot_end += bt->next.hot - b.start.hot;
    b.cold_end += bt->next.cold - b.start.cold;
    b.start = bt->next;
    b.hash_next = b.page_next[0] = b.page_next[1] = NULL;
    return b;
}

struct bt_block *bt_adopt(struct soft_vcpu *v, const struct bt_source *source, u32 mode)
{
    static _Thread_local _Alignas(struct bt_block) u8 bytes[RECORD_ROOM];
    struct bt *bt = v->bt;
    struct bt_store_key key = key_of(source->gpa, source->host2 ? source->gpa2 : 0,
                                     bt_place(v->cpu.gpr[GPR_RIP], mode), mode);
    u32 first_site = bt->next.sites;
    struct bt_block *b;
    struct record r;

    if (!v->engine->store || !bt_has_room(bt) ||
        !bt_store_get(v->engine->store, &key, bytes, sizeof(bytes)))
        return NULL;
    r = open_record(bytes);
    b = bt_block_nth(bt, bt->nblocks);
    if (!bt_source_is(source, r.code, r.head->block.bytes) ||
        !bt_block_protect(v, &r.head->block, source, r.code) || !copy_code(&r, bt))
        return NULL;
    *b = moved_block(&r, bt);
    copy_exits(&r, bt);
    copy_sites(&r, bt);
    copy_points(&r, bt);
    memcpy(&bt->x87s[bt->next.x87s], r.x87s, r.head->nx87s * sizeof(*r.x87s));
    bt->next.exits += b->nexits;
    bt->next.sites += r.head->nsites;
    bt->next.points += b->npoints;
    bt->next.x87s += r.head->nx87s;
    bt_block_finish(v, b, first_site, r.code);
    v->stats.blocks_adopted++;
    return b;
}
