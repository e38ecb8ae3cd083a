/*
 * Room for translated code. See cache.h.
 *
 * Blocks, and each of the things that they are made of (enum bt_part), are handed out in order; at the end of the
 * memory it begins anew at its start. So the oldest block is the next in the way everywhere, and the memory between
 * it and the youngest one is free:
 *
 *      begin        next       oldest                end
 *        | younger    |          | older              |      gone round; nothing may get to `oldest`
 *
 *      begin       oldest                  next      end
 *        |           | older     younger    |         |      not gone round; behind `end` there is nothing
 *
 * A block's things lie together, so it isn't begun where the most that it could need (block_room) isn't free: there
 * the next begins anew, if the oldest is out of the way.
 *
 * Evicting the oldest few whenever there is no room takes some 0.4 ms, whatever the size of the cache, and
 * what is evicted and still in use comes back at its next run: the interpreter's blocks stay, and know that they were
 * hot. The price is that what is used all the time goes, too; that is one translation each time round.
 *
 * bt_evict is called where the interpreter is about to run a block. Nothing holds an offset, number or block of the
 * code that was left by then but bt->from; nor has the signal handler left anything to be mended (bt_relink).
 */
#include "engine/soft/bt/translate.h"

#include "engine/soft/block.h"
#include "engine/soft/code_pages.h"

/* The most that are evicted at a time. */
#define EVICTED_MAX 1024u

/* What a block needs at most. */
static const union bt_position block_room = {{.hot = KIB(64),
                                              .cold = KIB(64),
                                              .exits = BT_MAX_STUBS,
                                              .sites = BT_MAX_STUBS,
                                              .points = 2 * BT_MAX_STUBS,
                                              .x87s = 256,
                                              .kept = 1}};

/* --- Going round --- */

/* Where that begins which is in use. */
static u32 oldest_of(const struct bt *bt, unsigned part)
{
    return bt->nblocks ? bt_block_nth(bt, 0)->start.of[part] : bt->next.of[part];
}

static bool fits(const struct bt *bt, unsigned part)
{
    return bt->next.of[part] + block_room.of[part] <= bt->bound.of[part];
}

/* The oldest block changed: how far is it to the next one, and may what doesn't fit before the end begin anew? */
static void find_bounds(struct bt *bt)
{
    if (!bt->nblocks)
        bt->next = bt->begin;
    for (unsigned part = 0; part < BT_PARTS; part++) {
        u32 next = bt->next.of[part], oldest = oldest_of(bt, part);

        bt->bound.of[part] = next < oldest ? oldest - 1 : bt->end.of[part];
        if (next < oldest || fits(bt, part))
            continue;
        if (bt->begin.of[part] + block_room.of[part] < oldest) {
            bt->next.of[part] = bt->begin.of[part];
            bt->bound.of[part] = oldest - 1;
        }
    }
}

bool bt_has_room(const struct bt *bt)
{
    for (unsigned part = 0; part < BT_PARTS; part++)
        if (!fits(bt, part))
            return false;
    return bt->nblocks < bt->max_blocks;
}

static void empty(struct bt *bt)
{
    bt->oldest = bt->nblocks = 0;
    find_bounds(bt);
}

void bt_room_create(struct bt *bt)
{
    const union bt_position most = {{.exits = BT_EXITS_MAX,
                                     .sites = BT_SITES_MAX,
                                     .points = BT_POINTS_MAX,
                                     .x87s = BT_X87S_MAX,
                                     .kept = BT_KEPT_MAX}};

    for (unsigned part = BT_EXITS; part < BT_PARTS; part++)
        bt->end.of[part] = MAX(most.of[part] >> bt->choices.array_shift, 4 * block_room.of[part]);
    bt->end.hot = bt->choices.code_size;
    bt->begin.cold = BT_COLD_START;
    bt->end.cold = BT_COLD_START + bt->choices.code_size;
    bt->begin.x87s = 1;
    bt->max_blocks = BT_BLOCKS_MAX >> bt->choices.array_shift;
    empty(bt);
}

/* --- Evicting --- */

/*
 * Blocks of its pages were evicted. Where the interpreter has code, too, which is of the same lines, they stay marked
 * until it drops that.
 */
static void settle_pages(struct soft_vcpu *v, const struct bt_block *b)
{
    for (unsigned part = 0; part < 2; part++) {
        gpa_t page = (part ? b->gpa2 : b->gpa) & ~(GUEST_PAGE_SIZE - 1);
        u64 lines;

        if (!b->listed[part])
            continue;
        lines = bt_lines(v, page);
        if (!block_cache_uses(v->blocks, page))
            soft_code_dropped(v, page, lines);
    }
}

/* The jump cache has nothing for hot code from there on to the oldest block that is left. */
static void forget_jumps(struct soft_vcpu *v, u32 from)
{
    struct bt *bt = v->bt;
    u32 end = oldest_of(bt, BT_HOT);

    if (from < end) {
        bt_jump_forget(v, from, end);
    } else {
        bt_jump_forget(v, from, bt->end.hot);
        bt_jump_forget(v, bt->begin.hot, end);
    }
}

void bt_evict(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;
    u32 count = MIN(bt->nblocks, MIN(bt->nblocks / 8 + 1, EVICTED_MAX)),
        from = oldest_of(bt, BT_HOT);

    for (u32 n = 0; n < count; n++)
        bt_block_forget(v, bt_block_nth(bt, n));
    for (u32 n = 0; n < count; n++)
        settle_pages(v, bt_block_nth(bt, n));
    bt->oldest = (bt->oldest + count) % bt->max_blocks;
    bt->nblocks -= count;
    forget_jumps(v, from);
    find_bounds(bt);
}

void bt_flush(struct soft_vcpu *v)
{
    struct bt *bt = v->bt;

    if (!bt)
        return;
    for (u32 n = 0; n < bt->nblocks; n++)
        bt_leave_pages(v, bt_block_nth(bt, n));
    bt->nunlinked = 0;
    bt->from = NULL;
    memset(bt->hash, 0, sizeof(bt->hash));
    memset(bt->pages, 0, sizeof(bt->pages));
    bt_jump_clear(v);
    empty(bt);
}

u64 bt_bytes(const struct soft_vcpu *v)
{
    static const union bt_position sizes = {{.hot = 1,
                                             .cold = 1,
                                             .exits = sizeof(struct bt_exit),
                                             .sites = sizeof(struct bt_site),
                                             .points = sizeof(struct bt_point),
                                             .x87s = sizeof(struct bt_x87),
                                             .kept = 2 * sizeof(struct insn)}};
    const struct bt *bt = v->bt;
    u64 bytes;

    if (!bt)
        return 0;
    bytes = bt->nblocks * sizeof(*bt->blocks);
    for (unsigned part = 0; part < BT_PARTS; part++)
        bytes +=
            (u64)bt_distance(bt, part, oldest_of(bt, part), bt->next.of[part]) * sizes.of[part];
    return bytes;
}
