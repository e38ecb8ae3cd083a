/*
 * The cache of translated code. See cache.h.
 *
 * Invariants
 *  1. A block is in the hash exactly while it isn't dropped, and in its pages' lists at least as long; no exit
 *     leads to a dropped block, and the jump entry of one leaves at once.
 *  2. Memory of a dropped block isn't used again before it is evicted (evict.c), which happens only where code
 *     that was left isn't gone on with. So the code that is being left stays whole.
 *  3. An entry of the jump cache is used only while its key is current. Keys are never given twice
 *     between two clearings of the table.
 */
#define _GNU_SOURCE
#include "engine/soft/bt/cache.h"

#include "bus/memory_file.h"
#include "engine/soft/bt/asm.h"
#include "engine/soft/bt/bt.h"
#include "engine/soft/bt/links.h"
#include "engine/soft/bt/translate.h"
#include "engine/soft/code_pages.h"
#include "engine/soft/mmu.h"
#include "host/pages.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* --- Choices --- */

/* splitmix64's output function, which makes anything of neighbouring seeds. */
static u64 scramble(u64 n)
{
    n += 0x9e3779b97f4a7c15ULL;
    n = (n ^ (n >> 30)) * 0xbf58476d1ce4e5b9ULL;
    n = (n ^ (n >> 27)) * 0x94d049bb133111ebULL;
    return n ^ (n >> 31);
}

struct bt_choices bt_choose(const struct engine_checks *checks)
{
    static const s32 spans[] = {0, 16, 64, BT_GROUP_SPAN};
    struct bt_choices c = {
        .hot_runs = BT_HOT_RUNS,
        .max_insns = BT_MAX_INSNS,
        .group_span = BT_GROUP_SPAN,
        .direct_ticks = BT_DIRECT_TICKS,
        .direct_period = BT_DIRECT_PERIOD,
        .code_size = BT_COLD_START,
        .store_size = BT_STORE_SIZE,
    };
    u64 random = scramble(checks->seed);

    if (!checks->seed)
        return c;
    c.hot_runs = random & 3 ? 0 : random >> 2 & 15;
    c.max_insns = 1 + (unsigned)(random >> 6) % (random >> 12 & 3 ? BT_MAX_INSNS : 4);
    c.group_span = spans[random >> 14 & 3];
    c.code_size = (u32)KIB(256) << (random >> 16) % 8;
    c.array_shift = (random >> 24) % 14;
    c.store_size = (u32)KIB(128) << (random >> 20) % 12;
    c.direct_ticks = checks->seed & 1 ? 0 : UINT_MAX;
    c.direct_period = 0;
    return c;
}

/* --- Life --- */

void bt_cache_destroy(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    if (!bt)
        return;
    pages_free(bt->writable, BT_CODE_SIZE);
    pages_free((void *)(uintptr_t)bt->executable, BT_CODE_SIZE);
    pages_free(bt->blocks, BT_BLOCKS_MAX * sizeof(*bt->blocks));
    pages_free(bt->exits, BT_EXITS_MAX * sizeof(*bt->exits));
    pages_free(bt->sites, BT_SITES_MAX * sizeof(*bt->sites));
    pages_free(bt->points, BT_POINTS_MAX * sizeof(*bt->points));
    pages_free(bt->x87s, BT_X87S_MAX * sizeof(*bt->x87s));
    pages_free(bt->kept, BT_KEPT_MAX * sizeof(*bt->kept));
    links_destroy(bt->kernel_links);
    pages_free(bt, sizeof(*bt));
    v->bt = NULL;
}

/* One file on huge pages, mapped twice. */
static void map_code(struct bt *bt, struct error *err)
{
    int fd = memory_file_open(false, err);

    if (fd < 0)
        return;
    if (ftruncate(fd, BT_CODE_SIZE) == 0) {
        bt->writable = memory_file_map(fd, 0, BT_CODE_SIZE, PROT_READ | PROT_WRITE);
        bt->executable = memory_file_map(fd, 0, BT_CODE_SIZE, PROT_READ | PROT_EXEC);
    }
    close(fd);
}

/*
 * For perf, which looks into its map for code in memory that has no file, or none but /dev/zero: that is what Linux
 * calls what is anonymous and shared. mremap of 0 bytes of it makes another mapping.
 */
static void map_code_for_perf(struct bt *bt)
{
    u8 *first = mmap(NULL, BT_CODE_SIZE, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    u8 *second;

    if (first == MAP_FAILED)
        return;
    bt->writable = first;
    second = mremap(first, 0, BT_CODE_SIZE, MREMAP_MAYMOVE);
    if (second == MAP_FAILED)
        return;
    if (mprotect(second, BT_CODE_SIZE, PROT_READ | PROT_EXEC) == 0)
        bt->executable = second;
    else
        munmap(second, BT_CODE_SIZE);
}

int bt_cache_create(struct soft_vcpu *v, struct error *err)
{
    struct bt *bt = pages_alloc_huge(sizeof(*bt));

    if (!bt)
        return error_host(err, ENOMEM, "can't make the cache of translated code");
    v->bt = bt;
    bt->choices = bt_choose(&v->engine->config.checks);
    bt->blocks = pages_alloc_huge(BT_BLOCKS_MAX * sizeof(*bt->blocks));
    bt->exits = pages_alloc_huge(BT_EXITS_MAX * sizeof(*bt->exits));
    bt->sites = pages_alloc_huge(BT_SITES_MAX * sizeof(*bt->sites));
    bt->points = pages_alloc_huge(BT_POINTS_MAX * sizeof(*bt->points));
    bt->x87s = pages_alloc_huge(BT_X87S_MAX * sizeof(*bt->x87s));
    bt->kept = pages_alloc_huge(BT_KEPT_MAX * sizeof(*bt->kept));
    bt->kernel_links = links_create();
    if (!bt->kernel_links || !bt->kept || !bt->x87s || !bt->blocks || !bt->exits || !bt->sites ||
        !bt->points)
        goto fail;
    if (v->engine->config.perf_map)
        map_code_for_perf(bt);
    else
        map_code(bt, err);
    if (!bt->writable || !bt->executable)
        goto fail;
    bt->next_context = JUMP_CONTEXT_STEP;
    return 0;

fail:
    error_host(err, errno, "mapping memory for translated code");
    bt_cache_destroy(v);
    return -1;
}

/* --- Finding --- */

gva_t bt_place(gva_t lin, u32 mode)
{
    return bt_is_placed(mode) ? lin & ~(GUEST_PAGE_SIZE - 1) : 0;
}

static struct bt_block **hash_slot(const struct bt *bt, gpa_t gpa, gva_t page, u32 mode)
{
    u64 key = (gpa ^ page << 3 ^ ((u64)mode << 44)) * 0x9e3779b97f4a7c15ULL;

    return (struct bt_block **)&bt->hash[key >> (64 - BT_HASH_BITS)];
}

static unsigned page_hash(gpa_t gpa)
{
    return (unsigned)(((gpa >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ULL) >> (64 - BT_PAGES_BITS));
}

/* The list of blocks that begin in the page of gpa, and others; or of those whose second page it is. */
static struct bt_block **page_slot(struct bt *bt, gpa_t gpa, unsigned part)
{
    return &bt->pages[part][page_hash(gpa)];
}

struct bt_block *bt_block_find(const struct soft_vcpu *v, gpa_t gpa, gva_t lin, u32 mode)
{
    gva_t page = bt_place(lin, mode);

    for (struct bt_block *b = *hash_slot(v->bt, gpa, page, mode); b; b = b->hash_next)
        if (b->gpa == gpa && b->mode == mode && b->page == page)
            return b;
    return NULL;
}

void bt_block_insert(struct soft_vcpu *v, struct bt_block *b)
{
    struct bt_block **slot = hash_slot(v->bt, b->gpa, b->page, b->mode);

    b->hash_next = *slot;
    *slot = b;
    for (unsigned part = 0; part < (b->gpa2 ? 2 : 1); part++) {
        slot = page_slot(v->bt, part ? b->gpa2 : b->gpa, part);
        b->page_next[part] = *slot;
        b->listed[part] = true;
        *slot = b;
    }
    v->bt->nblocks++;
}

/* Blocks are the farther from the oldest, the younger they are. */
struct bt_block *bt_block_at(const struct bt *bt, const u8 *pc)
{
    u32 offset, low = 0, high = bt->nblocks;
    const union bt_position *start = &bt_block_nth(bt, 0)->start;
    enum bt_part half;

    if (pc < bt->executable || pc >= bt->executable + BT_CODE_SIZE)
        return NULL;
    offset = (u32)(pc - bt->executable);
    half = offset >= BT_COLD_START ? BT_COLD : BT_HOT;
    if (offset < bt->begin.of[half] || offset >= bt->end.of[half])
        return NULL;
    offset = bt_distance(bt, half, start->of[half], offset);
    while (low < high) {
        u32 middle = (low + high) / 2;
        struct bt_block *b = bt_block_nth(bt, middle);
        u32 from = bt_distance(bt, half, start->of[half], b->start.of[half]);
        u32 size = (half == BT_COLD ? b->cold_end : b->hot_end) - b->start.of[half];

        if (offset < from)
            high = middle;
        else if (offset - from >= size)
            low = middle + 1;
        else
            return b;
    }
    return NULL;
}

/* --- Links --- */

void bt_exit_detach(struct bt *bt, const struct bt_exit *e)
{
    patch_rel32(bt_write_at(bt, e->at), bt_write_at(bt, e->bridge));
    if (e->at2)
        patch_rel32(bt_write_at(bt, e->at2), bt_write_at(bt, e->stub));
}

void bt_exit_attach(struct bt *bt, const struct bt_exit *e)
{
    const struct bt_block *to = e->to;
    bool takes = e->recipe_regs == RECIPE_NO_REGS
                     ? to->first_use == FLAGS_CLOBBERED
                     : to->takes_recipe && !(e->recipe_regs & to->kept_regs);
    bool memory = e->flags == EXIT_MEMORY || (e->flags == EXIT_RECIPE && takes);

    if (!memcmp(to->perm, e->perm, sizeof(to->perm)))
        patch_rel32(bt_write_at(bt, e->at),
                    bt_write_at(bt, memory ? to->memory_native : to->host_native));
    else /* by the bridge, if there is one */
        patch_rel32(bt_write_at(bt, e->at2 ? e->at2 : e->at),
                    bt_write_at(bt, memory ? to->memory_entry : to->host_entry));
}

void bt_exit_link(struct bt *bt, struct bt_exit *e, struct bt_block *to)
{
    e->to = to;
    e->next_in = to->incoming;
    e->link_in = &to->incoming;
    if (e->next_in)
        e->next_in->link_in = &e->next_in;
    to->incoming = e;
    bt_exit_attach(bt, e);
}

/* The exit is nobody's incoming one any more. */
static void exit_unlink(struct bt_exit *e)
{
    *e->link_in = e->next_in;
    if (e->next_in)
        e->next_in->link_in = e->link_in;
    e->to = NULL;
}

void bt_cut_links(struct bt *bt, gpa_t gpa, gva_t lin)
{
    for (struct bt_block *b = *page_slot(bt, gpa, 0); b; b = b->page_next[0]) {
        struct bt_exit *next;

        if (b->dropped || b->page != lin || ((b->gpa ^ gpa) & ~(GUEST_PAGE_SIZE - 1)))
            continue;
        for (struct bt_exit *e = b->incoming; e; e = next) {
            next = e->next_in;
            if (!bt_exit_is_across(e))
                continue;
            exit_unlink(e);
            bt_exit_detach(bt, e);
        }
    }
}

/* --- The jump cache --- */

static unsigned filter_bit(gva_t lin)
{
    return (unsigned)(((lin >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ULL) >> (64 - BT_FILTER_BITS));
}

void bt_jump_insert(struct soft_vcpu *v, gva_t lin, const struct bt_block *b)
{
    unsigned slot = bt_jump_slot(lin), bit = filter_bit(lin);

    v->bt_shared.jump[slot] =
        (struct jump_entry){lin ^ v->bt_shared.jump_key, bt_run_at(v->bt, b->jump_entry)};
    v->bt->filter[bit / 64] |= BIT(bit % 64);
    if (!(v->bt_mode & BT_MODE_USER) &&
        (!soft_fetch_is_global(v, lin) ||
         (b->gpa2 && !soft_fetch_is_global(v, lin + GUEST_PAGE_SIZE))))
        v->bt->kernel_nonglobal = true;
}

static void jump_empty(struct soft_vcpu *v, unsigned slot)
{
    v->bt_shared.jump[slot].tag = bt_jump_no_tag(slot);
}

void bt_jump_missed(struct soft_vcpu *v, gva_t lin)
{
    jump_empty(v, bt_jump_slot(lin));
}

void bt_jump_clear(struct soft_vcpu *v)
{
    for (unsigned slot = 0; slot < JUMP_SIZE; slot++)
        jump_empty(v, slot);
    memset(v->bt->filter, 0, sizeof(v->bt->filter));
}

void bt_jump_forget(struct soft_vcpu *v, u32 from, u32 end)
{
    uintptr_t first = (uintptr_t)bt_run_at(v->bt, from);

    for (unsigned slot = 0; slot < JUMP_SIZE; slot++)
        if ((uintptr_t)v->bt_shared.jump[slot].code - first < end - from)
            jump_empty(v, slot);
}

/*
 * The block's entries in the jump cache, which may be many, lead to its jump entry: from now on that leaves. A
 * placed block has one at most.
 */
static void jump_forget(struct soft_vcpu *v, const struct bt_block *b)
{
    struct bt *bt = v->bt;
    u8 *p = bt_write_at(bt, b->jump_entry);

    if (bt_is_placed(b->mode))
        jump_empty(v, bt_jump_slot(b->page | (b->gpa & (GUEST_PAGE_SIZE - 1))));
    else
        patch_rel32(put_jmp(&p), bt_write_at(bt, bt->glue[BT_JUMP]));
}

static u16 *context_of(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    return v->bt_mode & BT_MODE_USER ? &bt->spaces[bt->space].contexts[v->bt_mode]
                                     : &bt->contexts[v->bt_mode];
}

static void forget_user(struct bt *bt)
{
    for (unsigned n = 0; n < BT_SPACES; n++)
        memset(bt->spaces[n].contexts, 0, sizeof(bt->spaces[n].contexts));
}

void bt_update_key(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;
    u16 *context;

    if (!v->bt_possible)
        return;
    context = context_of(v);
    if (!*context) {
        if (bt->next_context > JUMP_CONTEXT_LAST) {
            memset(bt->contexts, 0, sizeof(bt->contexts));
            forget_user(bt);
            bt_jump_clear(v);
            bt->next_context = JUMP_CONTEXT_STEP;
        }
        *context = (u16)bt->next_context;
        bt->next_context += JUMP_CONTEXT_STEP;
    }
    v->bt_shared.jump_key = JUMP_KEY(*context);
}

/* Whether a segment lets every address through, for reading and writing. */
static bool is_unlimited(const struct segment *s)
{
    return !(s->attr & SEG_ATTR_UNUSABLE) && s->limit == UINT32_MAX &&
           (s->attr & (SEG_ATTR_CODE | SEG_ATTR_DOWN | SEG_ATTR_WRITABLE)) == SEG_ATTR_WRITABLE;
}

static bool is_flat(const struct segment *s)
{
    return s->base == 0 && is_unlimited(s);
}

/* 32-bit protected-mode code whose addresses are linear addresses. */
static bool is_flat32(const struct soft_vcpu *v)
{
    const struct segment *seg = v->cpu.seg;

    return (v->mode & (MODE_CODE_MASK | MODE_STACK32 | MODE_PROTECTED)) ==
               (MODE_CODE32 | MODE_STACK32 | MODE_PROTECTED) &&
           seg[SEG_CS].base == 0 && seg[SEG_CS].limit == UINT32_MAX && is_flat(&seg[SEG_DS]) &&
           is_flat(&seg[SEG_ES]) && is_flat(&seg[SEG_SS]);
}

/* CPL 1 and 2 aren't translated, nor is code whose accesses are watched. */
static bool privilege_is_possible(const struct soft_vcpu *v)
{
    unsigned cpl = soft_cpl(v);

    return (cpl == 0 || cpl == 3) && v->tlb != &v->tlb_none;
}

static u32 privilege_mode(const struct soft_vcpu *v)
{
    return v->tlb_kind == TLB_USER ? BT_MODE_USER : v->tlb_kind == TLB_KERNEL_AC ? BT_MODE_AC : 0;
}

void bt_privilege_changed(struct soft_vcpu *v)
{
    const u32 kept = BT_MODE_NO_SSE | BT_MODE_NO_AVX | BT_MODE_NO_X87;

    if (!v->bt)
        return;
    v->bt_possible = privilege_is_possible(v);
    v->bt_mode = (v->bt_mode & kept) | privilege_mode(v);
    if (bt_direct_enter(v, v->bt_mode & BT_MODE_USER))
        v->bt_mode |= BT_MODE_DIRECT;
    bt_update_key(v);
}

void bt_mode_changed(struct soft_vcpu *v)
{
    bool code64 = soft_code64(v);

    if (!v->bt)
        return;
    v->bt_possible = (code64 || is_flat32(v)) && privilege_is_possible(v);
    v->bt_mode = privilege_mode(v) | (v->class_fault[FPU_SSE] ? BT_MODE_NO_SSE : 0) |
                 (v->class_fault[FPU_AVX] ? BT_MODE_NO_AVX : 0) |
                 (v->class_fault[FPU_X87] ? BT_MODE_NO_X87 : 0);
    if (bt_direct_enter(v, code64 && (v->bt_mode & BT_MODE_USER)))
        v->bt_mode |= BT_MODE_DIRECT;
    if (!code64)
        v->bt_mode |= BT_MODE_CODE32 | (is_unlimited(&v->cpu.seg[SEG_FS]) ? BT_MODE_FS : 0) |
                      (is_unlimited(&v->cpu.seg[SEG_GS]) ? BT_MODE_GS : 0);
    bt_update_key(v);
}

void bt_mappings_dropped(struct soft_vcpu *v)
{
    if (!v->bt)
        return;
    memset(v->bt->contexts, 0, sizeof(v->bt->contexts));
    forget_user(v->bt);
    v->bt->kernel_nonglobal = false;
    bt_kernel_links_check(v);
    bt_update_key(v);
}

static void forget_kernel_nonglobal(struct bt *bt)
{
    if (bt->kernel_nonglobal)
        memset(bt->contexts, 0, sizeof(bt->contexts));
    bt->kernel_nonglobal = false;
}

void bt_nonglobal_dropped(struct soft_vcpu *v)
{
    if (!v->bt)
        return;
    forget_kernel_nonglobal(v->bt);
    forget_user(v->bt);
    bt_update_key(v);
}

void bt_space_switched(struct soft_vcpu *v, unsigned pcid, bool keep)
{
    struct bt *bt = v->bt;
    unsigned n = 0;

    if (!bt)
        return;
    forget_kernel_nonglobal(bt);
    while (n < BT_SPACES && bt->spaces[n].pcid != pcid)
        n++;
    if (n == BT_SPACES) {
        n = bt->next_space++ % BT_SPACES;
        keep = false;
    }
    bt->space = n;
    bt->spaces[n].pcid = pcid;
    if (!keep)
        memset(bt->spaces[n].contexts, 0, sizeof(bt->spaces[n].contexts));
    bt_update_key(v);
}

void bt_page_dropped(struct soft_vcpu *v, gva_t lin)
{
    gva_t page = lin & ~(GUEST_PAGE_SIZE - 1);
    unsigned bit = filter_bit(lin), first;
    const unsigned n_slots = GUEST_PAGE_SIZE >> JUMP_ALIGN;

    if (!v->bt)
        return;
    bt_kernel_links_cut(v, lin);
    /* An instruction that goes on in this page begins in the last bytes of the one before. */
    for (unsigned n = 1; n < 15; n++)
        jump_empty(v, bt_jump_slot(page - n));
    if (!(v->bt->filter[bit / 64] & BIT(bit % 64)))
        return;
    /* The addresses in a page have the slots of one aligned group, in some order. */
    first = bt_jump_slot(page) & ~(n_slots - 1);
    for (unsigned slot = first; slot < first + n_slots; slot++)
        jump_empty(v, slot);
}

/* --- Dropping --- */

/* Nobody finds the block any more, nor is led to it by an exit. */
static void block_hide(struct bt *bt, const struct bt_block *b)
{
    struct bt_block **link = hash_slot(bt, b->gpa, b->page, b->mode);

    while (*link != b)
        link = &(*link)->hash_next;
    *link = b->hash_next;
    while (b->incoming) {
        struct bt_exit *e = b->incoming;

        exit_unlink(e);
        bt_exit_detach(bt, e);
    }
}

/* Its memory stays: it may be running, or just have been left. */
static void block_drop(struct soft_vcpu *v, struct bt_block *b)
{
    struct bt *bt = v->bt;

    block_hide(bt, b);
    for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++) {
        if (bt->exits[n].to) {
            exit_unlink(&bt->exits[n]);
            bt_exit_detach(bt, &bt->exits[n]);
        }
    }
    jump_forget(v, b);
    b->dropped = true;
}

void bt_block_forget(struct soft_vcpu *v, struct bt_block *b)
{
    struct bt *bt = v->bt;

    if (!b->dropped) {
        block_hide(bt, b);
        v->stats.blocks_evicted++;
    }
    /* One that was dropped while it was left by an exit may have had that linked after. */
    for (u32 n = b->start.exits; n < b->start.exits + b->nexits; n++)
        if (bt->exits[n].to)
            exit_unlink(&bt->exits[n]);
    if (bt->from == b)
        bt->from = NULL;
    b->dropped = true;
}

/* Bytes of a block in its first page. */
static u64 first_bytes(const struct bt_block *b)
{
    return MIN((u64)b->bytes, GUEST_PAGE_SIZE - (b->gpa & (GUEST_PAGE_SIZE - 1)));
}

/* Where a block's part in its first page (0) or second page (1) begins, and how many bytes it has. */
static gpa_t part_start(const struct bt_block *b, unsigned part)
{
    return part ? b->gpa2 : b->gpa;
}
static u64 part_size(const struct bt_block *b, unsigned part)
{
    return part ? b->bytes - first_bytes(b) : first_bytes(b);
}

static bool is_in_page(const struct bt_block *b, unsigned part, gpa_t gpa)
{
    return !((part_start(b, part) ^ gpa) & ~(GUEST_PAGE_SIZE - 1));
}

u64 bt_lines(struct soft_vcpu *v, gpa_t page)
{
    u64 lines = 0;

    for (unsigned part = 0; v->bt && part < 2; part++) {
        for (struct bt_block **link = page_slot(v->bt, page, part); *link;) {
            struct bt_block *b = *link;

            if (b->dropped && is_in_page(b, part, page)) {
                *link = b->page_next[part];
                b->listed[part] = false;
                continue;
            }
            if (is_in_page(b, part, page))
                lines |= soft_line_mask(part_start(b, part), part_size(b, part));
            link = &b->page_next[part];
        }
    }
    return lines;
}

u64 bt_written(struct soft_vcpu *v, gpa_t gpa, u64 n)
{
    for (unsigned part = 0; v->bt && part < 2; part++) {
        for (struct bt_block *b = *page_slot(v->bt, gpa, part); b; b = b->page_next[part]) {
            gpa_t start = part_start(b, part);

            if (!b->dropped && is_in_page(b, part, gpa) && start < gpa + n &&
                gpa < start + part_size(b, part))
                block_drop(v, b);
        }
    }
    return bt_lines(v, gpa);
}

void bt_leave_pages(struct soft_vcpu *v, const struct bt_block *b)
{
    for (unsigned part = 0; part < 2; part++)
        if (b->listed[part])
            soft_code_dropped(v, part_start(b, part) & ~(GUEST_PAGE_SIZE - 1), 0);
}

void bt_drop_all(struct soft_vcpu *v)
{
    for (u32 n = 0; v->bt && n < v->bt->nblocks; n++) {
        struct bt_block *b = bt_block_nth(v->bt, n);

        if (!b->dropped)
            block_drop(v, b);
        bt_leave_pages(v, b);
    }
}

u16 bt_recipe_number(struct bt *bt, const struct bt_recipe *r)
{
    u64 key;
    u16 *slot;

    _Static_assert(sizeof(*r) == sizeof(key), "recipes are compared as numbers");
    memcpy(&key, r, sizeof(key));
    key *= 0x9e3779b97f4a7c15ULL;
    for (u32 n = 0; n < 64; n++) {
        slot = &bt->recipe_hash[((key >> 48) + n) % BT_RECIPES];
        if (!*slot) {
            if (bt->nrecipes + 1 >= BT_RECIPES)
                return 0;
            *slot = (u16)++bt->nrecipes;
            bt->recipes[*slot] = *r;
            return *slot;
        }
        if (!memcmp(&bt->recipes[*slot], r, sizeof(*r)))
            return *slot;
    }
    return 0;
}

static void leave_kept(struct soft_vcpu *v, const struct insn *i)
{
    soft_set_ip(v, v->cpu.gpr[GPR_RIP] + i->offset);
}

u32 bt_keep_insn(struct bt *bt, const struct insn *i)
{
    bt->kept[bt->next.kept][0] = *i;
    bt->kept[bt->next.kept][1] = (struct insn){.fn = leave_kept, .offset = i->len};
    return bt->next.kept++;
}
