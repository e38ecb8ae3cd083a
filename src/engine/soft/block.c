/*
 * The cache of decoded blocks: lookup, decoding by page, and dropping what is overwritten.
 *
 * Invariants
 *  1. Before a block can run, the lines that hold its bytes have their bits set in code_lines, and no
 *     TLB entry of any vCPU allows a store to its pages by the fast path. So each store to such a page
 *     comes to soft_code_written first (code_pages.c). A block that couldn't be protected before others
 *     may have written there is run once and not kept.
 *  2. A dropped block stays in memory until the next flush of the whole cache, which happens between
 *     blocks only. Its mode matches nothing, and its handlers leave the block at once.
 *  3. Lookup entries are valid for one map_generation. A block whose bytes lie in two pages is found by
 *     linear address only after both translations were checked in the same generation.
 *
 * A link tells of a linear address and nothing of the block that holds it, so it may be copied at will; it
 * is checked like a lookup entry.
 *
 * Memory comes from one arena that is handed out in order; when it is full, everything in it is dropped.
 */
#include "engine/soft/block.h"

#include "engine/soft/bt/bt.h"
#include "engine/soft/code_pages.h"
#include "engine/soft/decode.h"
#include "engine/soft/exception.h"
#include "engine/soft/interp.h"
#include "engine/soft/mmu.h"
#include "host/pages.h"

#include <errno.h>

#define ARENA_SIZE MIB(64)
#define LOOKUP_BITS 15
#define HASH_BITS 18
#define PAGE_HASH_BITS 13
#define MAX_INSN_BYTES 15

/* The blocks that have bytes in a page. */
struct code_page {
    gpa_t page;
    struct block *blocks; /* by page_next or page2_next, whichever is this page's */
    struct code_page *hash_next;
};

struct block_cache {
    struct block_link lookup[1u << LOOKUP_BITS];
    struct block *hash[1u << HASH_BITS];
    struct code_page *pages[1u << PAGE_HASH_BITS];
    u8 *arena;
    size_t used;
};

struct block_cache *block_cache_create(struct error *err)
{
    struct block_cache *c = pages_alloc_huge(sizeof(*c));

    if (!c) {
        error_host(err, ENOMEM, "can't make the cache of decoded code");
        return NULL;
    }
    c->arena = pages_alloc_huge(ARENA_SIZE);
    if (!c->arena) {
        error_host(err, errno, "can't map the cache of decoded code");
        pages_free(c, sizeof(*c));
        return NULL;
    }
    return c;
}

void block_cache_destroy(struct block_cache *c)
{
    if (!c)
        return;
    pages_free(c->arena, ARENA_SIZE);
    pages_free(c, sizeof(*c));
}

u64 block_cache_bytes(const struct block_cache *c)
{
    return c->used;
}

static void *arena_alloc(struct block_cache *c, size_t n)
{
    void *p = c->arena + c->used;

    c->used += (n + 7) & ~7UL;
    return p;
}

static struct block_link *lookup_slot(struct block_cache *c, gva_t lin)
{
    return &c->lookup[(lin ^ (lin >> LOOKUP_BITS)) & ((1u << LOOKUP_BITS) - 1)];
}

static struct block **hash_slot(struct block_cache *c, gpa_t gpa, u32 mode)
{
    u64 key = (gpa ^ ((u64)mode << 40)) * 0x9e3779b97f4a7c15ULL;

    return &c->hash[key >> (64 - HASH_BITS)];
}

static struct code_page **page_slot(struct block_cache *c, gpa_t page)
{
    return &c->pages[((page >> GUEST_PAGE_SHIFT) * 0x9e3779b97f4a7c15ULL) >> (64 - PAGE_HASH_BITS)];
}

static struct code_page *page_find(struct block_cache *c, gpa_t page)
{
    struct code_page *p = *page_slot(c, page);

    while (p && p->page != page)
        p = p->hash_next;
    return p;
}

static struct code_page *page_get(struct block_cache *c, gpa_t page)
{
    struct code_page *p = page_find(c, page);

    if (!p) {
        struct code_page **slot = page_slot(c, page);

        p = arena_alloc(c, sizeof(*p));
        *p = (struct code_page){.page = page, .hash_next = *slot};
        *slot = p;
    }
    return p;
}

/* --- Dropping --- */

static struct block **next_in_page(struct block *b, gpa_t page)
{
    return (b->gpa & ~(GUEST_PAGE_SIZE - 1)) == page ? &b->page_next : &b->page2_next;
}

static void leave_block(struct soft_vcpu *v, const struct insn *i)
{
    v->cpu.gpr[GPR_RIP] = soft_ip_mask(v, v->cpu.gpr[GPR_RIP] + i->offset);
}

static bool block_overlaps(const struct block *b, gpa_t gpa, u64 n)
{
    u64 first = GUEST_PAGE_SIZE - (b->gpa & (GUEST_PAGE_SIZE - 1));

    if (b->bytes <= first)
        return gpa < b->gpa + b->bytes && b->gpa < gpa + n;
    return (gpa < b->gpa + first && b->gpa < gpa + n) ||
           (gpa < b->gpa2 + (b->bytes - first) && b->gpa2 < gpa + n);
}

static void block_drop(struct block_cache *c, struct block *b)
{
    struct block **link = hash_slot(c, b->gpa, b->mode);

    while (*link != b)
        link = &(*link)->hash_next;
    *link = b->hash_next;
    b->mode = MODE_DROPPED;
    /* The one that leaves the block is behind the last. */
    for (unsigned n = 0; n <= b->count; n++)
        b->insns[n].fn = leave_block;
}

bool block_cache_uses(struct block_cache *c, gpa_t page)
{
    const struct code_page *p = page_find(c, page);

    return p && p->blocks;
}

/* Of [gpa, gpa + n), within one page. */
static void drop_in_page(struct soft_vcpu *v, gpa_t gpa, u64 n)
{
    gpa_t page = gpa & ~(GUEST_PAGE_SIZE - 1);
    struct code_page *p = page_find(v->blocks, page);
    struct block **link, *none = NULL;
    u64 left = bt_written(v, gpa, n);

    v->stats.smc_invalidations++;
    for (link = p ? &p->blocks : &none; *link;) {
        struct block *b = *link;

        if (b->mode != MODE_DROPPED && block_overlaps(b, gpa, n))
            block_drop(v->blocks, b);
        if (b->mode == MODE_DROPPED) {
            *link = *next_in_page(b, page);
            continue;
        }
        if ((b->gpa & ~(GUEST_PAGE_SIZE - 1)) == page)
            left |= soft_line_mask(b->gpa, b->bytes);
        else
            left |= soft_line_mask(page, b->bytes);
        link = next_in_page(b, page);
    }
    soft_code_dropped(v, page, left);
}

void block_cache_drop(struct soft_vcpu *v, gpa_t gpa, u64 n)
{
    while (n) {
        u64 here = MIN(n, GUEST_PAGE_SIZE - (gpa & (GUEST_PAGE_SIZE - 1)));
        const struct page_track *t = soft_page_track(v->engine, gpa);

        if (!t || (atomic_load(&t->code_users) & soft_vcpu_bit(v)))
            drop_in_page(v, gpa, here);
        gpa += here;
        n -= here;
    }
}

void block_cache_drop_all(struct soft_vcpu *v)
{
    const struct block_cache *c = v->blocks;

    for (size_t n = 0; n < ARRAY_SIZE(c->pages); n++)
        for (const struct code_page *p = c->pages[n]; p; p = p->hash_next)
            block_cache_drop(v, p->page, GUEST_PAGE_SIZE);
    bt_drop_all(v);
}

/* The arena is full: drops what is in it, and keeps translations. Between blocks. */
static void recycle(struct soft_vcpu *v)
{
    struct block_cache *c = v->blocks;

    for (size_t n = 0; n < ARRAY_SIZE(c->pages); n++) {
        for (struct code_page *p = c->pages[n]; p; p = p->hash_next)
            soft_code_dropped(v, p->page, bt_lines(v, p->page));
        c->pages[n] = NULL;
    }
    memset(c->lookup, 0, sizeof(c->lookup));
    memset(c->hash, 0, sizeof(c->hash));
    c->used = 0;
    v->block = NULL;
}

void block_cache_flush(struct soft_vcpu *v)
{
    bt_flush(v);
    recycle(v);
}

/* --- Decoding --- */

/* Fetches up to n bytes for one instruction from lin on, which may be MMIO. Returns how many. */
static unsigned fetch_bytes(struct soft_vcpu *v, gva_t lin, u8 *buf, unsigned n)
{
    unsigned done = 0;

    while (done < n) {
        gpa_t gpa;
        const u8 *host = soft_fetch(v, lin + done, &gpa);
        unsigned in_page = GUEST_PAGE_SIZE - (gpa & (GUEST_PAGE_SIZE - 1));
        unsigned here = MIN(n - done, in_page);

        for (unsigned k = 0; k < here; k++)
            buf[done + k] = host ? host[k] : (u8)io_bus_read(v->engine->config.mmio, gpa + k, 1);
        done += here;
    }
    return done;
}

/* Bytes left in the code segment from ip on; in 64-bit mode there is no limit. */
static u64 segment_left(const struct soft_vcpu *v, u64 ip)
{
    const struct segment *cs = &v->cpu.seg[SEG_CS];

    if (soft_code64(v))
        return UINT64_MAX;
    return ip > cs->limit ? 0 : (u64)cs->limit - ip + 1;
}

/*
 * Decodes the block at the exact RIP, whose first byte is at lin (gpa; host NULL: MMIO). Others may write to memory
 * meanwhile, so instructions are decoded from copies, which `code` collects.
 */
static struct block *decode_block(struct soft_vcpu *v, gva_t lin, gpa_t gpa, const u8 *host,
                                  u8 *code)
{
    struct block_cache *c = v->blocks;
    struct block *b = (struct block *)(c->arena + c->used);
    unsigned max = host && !(v->mode & MODE_SINGLE) ? BLOCK_MAX_INSNS : 1;
    u64 in_page = GUEST_PAGE_SIZE - (gpa & (GUEST_PAGE_SIZE - 1));
    u64 ip = soft_ip(v), left = segment_left(v, ip);
    unsigned offset = 0;
    bool more = true;

    *b = (struct block){.mode = v->mode, .gpa = gpa};
    while (more && b->count < max) {
        struct insn *i = &b->insns[b->count];
        u64 page_left = in_page - MIN((u64)offset, in_page);
        u64 limit_left = left - MIN((u64)offset, left);
        u8 *bytes = code + offset;
        unsigned n = (unsigned)MIN(MIN(page_left, limit_left), (u64)MAX_INSN_BYTES);
        enum decode_result result = DECODE_SHORT;

        for (unsigned k = 0; host && k < n; k++)
            bytes[k] = host[offset + k];
        if (host && n)
            result = decode_insn(v, bytes, n, offset, i, &more);
        if (result == DECODE_SHORT) {
            if (b->count)
                break; /* let it be the first of its own block */
            if (limit_left < MAX_INSN_BYTES && limit_left <= n && (host || !limit_left))
                soft_raise_error(v, EXC_GP, 0);
            /* Into the next page, or from MMIO: fetch byte by byte as far as needed, so that the
             * fault of a page that the instruction doesn't reach is not taken. */
            n = host ? n : 0;
            do {
                if (n == MAX_INSN_BYTES || n == limit_left)
                    soft_raise_error(v, EXC_GP, 0);
                n++;
                fetch_bytes(v, lin, bytes, n);
                result = decode_insn(v, bytes, n, offset, i, &more);
            } while (result == DECODE_SHORT);
            if (n > page_left) {
                gpa_t gpa2;

                soft_fetch(v, lin + page_left, &gpa2);
                b->gpa2 = gpa2 & ~(GUEST_PAGE_SIZE - 1);
            }
            more = false;
        }
        b->count++;
        offset += i->len;
    }
    /* Behind the last: leaves the block. */
    b->insns[b->count] = (struct insn){.fn = leave_block, .offset = (u16)offset};
    b->bytes = (u16)offset;
    v->stats.blocks_decoded++;
    return b;
}

/* n bytes of code at gpa, within one page: from now on a store there is noticed. False: one may have come
 * before that. */
static bool protect(struct soft_vcpu *v, gpa_t gpa, const u8 *code, u64 n)
{
    const u8 *host = memory_host(v->engine->config.memory, gpa, n);

    return host && soft_code_protect(v, gpa, n) && !memcmp(host, code, n);
}

static bool protect_block(struct soft_vcpu *v, const struct block *b, const u8 *code)
{
    u64 first = GUEST_PAGE_SIZE - (b->gpa & (GUEST_PAGE_SIZE - 1));

    return protect(v, b->gpa, code, MIN((u64)b->bytes, first)) &&
           (!b->gpa2 || protect(v, b->gpa2, code + first, b->bytes - first));
}

static void block_insert(struct soft_vcpu *v, struct block *b)
{
    struct block_cache *c = v->blocks;
    struct block **slot = hash_slot(c, b->gpa, b->mode);
    gpa_t page = b->gpa & ~(GUEST_PAGE_SIZE - 1);
    struct code_page *p;

    c->used += sizeof(*b) + (b->count + 1u) * sizeof(b->insns[0]);
    c->used = (c->used + 7) & ~7UL;
    b->hash_next = *slot;
    *slot = b;
    p = page_get(c, page);
    b->page_next = p->blocks;
    p->blocks = b;
    if (b->gpa2 && b->gpa2 != page) {
        p = page_get(c, b->gpa2);
        b->page2_next = p->blocks;
        p->blocks = b;
    }
}

/* A block over two pages is this one only if its second page is still where it was. */
static bool second_page_matches(struct soft_vcpu *v, const struct block *b, gva_t lin)
{
    gpa_t gpa2;

    if (!b->gpa2)
        return true;
    soft_fetch(v, (lin | (GUEST_PAGE_SIZE - 1)) + 1, &gpa2);
    return (gpa2 & ~(GUEST_PAGE_SIZE - 1)) == b->gpa2;
}

static bool fits_limit(const struct soft_vcpu *v, const struct block *b)
{
    return segment_left(v, soft_ip(v)) >= b->bytes;
}

/* The block at lin, where gpa is, if it is kept. */
static struct block *find_kept(struct soft_vcpu *v, gva_t lin, gpa_t gpa)
{
    struct block *b = *hash_slot(v->blocks, gpa, v->mode);

    while (b && !(b->gpa == gpa && b->mode == v->mode && fits_limit(v, b) &&
                  second_page_matches(v, b, lin)))
        b = b->hash_next;
    return b;
}

static inline bool link_matches(const struct soft_vcpu *v, const struct block_link *l, gva_t lin)
{
    return l->lin == lin && l->generation == v->map_generation && l->block->mode == v->mode &&
           (soft_code64(v) || fits_limit(v, l->block));
}

/* The block that l tells of follows the last one. */
static void remember(const struct soft_vcpu *v, const struct block_link *l)
{
    struct block *last = v->block;

    if (!last)
        return;
    last->links[1] = last->links[0];
    last->links[0] = *l;
}

/*
 * First among those that followed the last block, for these are close at hand in the host's caches, then
 * in the lookup table.
 */
static inline struct block *find_known(const struct soft_vcpu *v, gva_t lin)
{
    const struct block_link *l = lookup_slot(v->blocks, lin);
    const struct block *last = v->block;

    if (likely(last)) {
        for (unsigned n = 0; n < BLOCK_LINKS; n++)
            if (likely(link_matches(v, &last->links[n], lin)))
                return last->links[n].block;
    }
    if (!likely(link_matches(v, l, lin)))
        return NULL;
    remember(v, l);
    return l->block;
}

/* From now on find_known does. */
static void make_known(const struct soft_vcpu *v, gva_t lin, struct block *b)
{
    struct block_link *l = lookup_slot(v->blocks, lin);

    *l = (struct block_link){lin, v->map_generation, b};
    remember(v, l);
}

static __attribute__((noinline)) struct block *find_by_gpa(struct soft_vcpu *v, gva_t lin)
{
    struct block *b;
    gpa_t gpa;

    v->cur = &insn_none;
    soft_fetch(v, lin, &gpa);
    b = find_kept(v, lin, gpa);
    if (b)
        make_known(v, lin, b);
    return b;
}

struct block *block_cache_make(struct soft_vcpu *v)
{
    gva_t lin = v->cpu.gpr[GPR_RIP] + v->seg_base[SEG_CS];
    struct block_cache *c = v->blocks;
    u8 code[BLOCK_MAX_INSNS * MAX_INSN_BYTES];
    const u8 *host;
    struct block *b;
    gpa_t gpa;

    v->cur = &insn_none;
    host = soft_fetch(v, lin, &gpa);
    if (c->used + sizeof(*b) + (BLOCK_MAX_INSNS + 1) * sizeof(b->insns[0]) + 4096 > ARENA_SIZE)
        recycle(v);
    b = decode_block(v, lin, gpa, host, code);
    /* Code in MMIO is never kept, nor what somebody writes just now. No link leads to it. */
    if (!host || !protect_block(v, b, code))
        return b;
    block_insert(v, b);
    make_known(v, lin, b);
    return b;
}

struct block *block_cache_kept(struct soft_vcpu *v)
{
    gva_t lin = v->cpu.gpr[GPR_RIP] + v->seg_base[SEG_CS];
    struct block *b = find_known(v, lin);

    return likely(b) ? b : find_by_gpa(v, lin);
}

struct block *block_cache_find(struct soft_vcpu *v)
{
    struct block *b = block_cache_kept(v);

    return likely(b) ? b : block_cache_make(v);
}
