/*
 * Code that one vCPU runs and another writes.
 *
 * A vCPU that makes a block of a page's code, and one that stores to the page, must not miss each other. Both
 * say first what they are about to do, and look at what the other said after that:
 *
 *  1. The storing vCPU sets its bit in `writers`, then looks at code_lines. A write tag in its TLB is such a
 *     store too, which lasts.
 *  2. The translating vCPU sets the lines in code_lines, then looks at `writers`: each of these drops its write
 *     tags for the page, when its store is over, and clears its bit (soft_post_protect). Only then the bytes that
 *     the block was made of are compared with memory.
 *
 * So either the store finds the line's bit, or the comparison finds the store.
 *
 * A store that finds it has the block dropped by every vCPU in code_users before it is done. That is stricter
 * than the manual asks for code that another processor runs (SDM vol. 3, 8.1.3), and it is what processors do:
 * who sees the store, or one after it, doesn't run the old code any more.
 *
 * Nobody waits with a lock held, and who waits answers what others ask of him, so nobody waits for ever. Having
 * answered, he may have no bit in `writers` any more, and what he saw of code_lines may be out of date: so both
 * sides begin anew.
 *
 * A line's bit is cleared when nobody has code there: at once when only one vCPU has code in the page; else by
 * who had all drop what they had in the line, if no block was made since (code_lock.blocks).
 */
#include "engine/soft/code_pages.h"

#include "engine/soft/block.h"
#include "engine/soft/bt/bt.h"
#include "engine/soft/mmu.h"
#include "engine/soft/posts.h"

#define LINE_SIZE 64

struct page_track *soft_page_track(const struct soft_engine *e, gpa_t gpa)
{
    const struct memory_slot *slot = memory_find(e->config.memory, gpa);

    return slot ? soft_track_in(e, slot, gpa) : NULL;
}

u64 soft_line_mask(gpa_t from, u64 n)
{
    unsigned first = (unsigned)(from & (GUEST_PAGE_SIZE - 1)) / LINE_SIZE;
    u64 last_byte = (from & (GUEST_PAGE_SIZE - 1)) + n - 1;
    unsigned last = (unsigned)(MIN(last_byte, GUEST_PAGE_SIZE - 1) / LINE_SIZE);

    return (UINT64_MAX >> (63 - last)) & (UINT64_MAX << first);
}

static struct code_lock *lock_of(struct soft_engine *e, gpa_t gpa)
{
    return &e->code_locks[(gpa >> GUEST_PAGE_SHIFT) % SOFT_CODE_LOCKS];
}

/* Blocks made so far, of this page and others. */
static u64 blocks_made(struct code_lock *lock)
{
    u64 blocks;

    pthread_mutex_lock(&lock->lock);
    blocks = lock->blocks;
    pthread_mutex_unlock(&lock->lock);
    return blocks;
}

/* Nobody has code in these lines, unless a block was made since there were `blocks`. */
static void clear_lines(struct page_track *t, struct code_lock *lock, u64 lines, u64 blocks)
{
    pthread_mutex_lock(&lock->lock);
    if (lock->blocks == blocks)
        atomic_fetch_and(&t->code_lines, ~lines);
    pthread_mutex_unlock(&lock->lock);
}

/* [gpa, gpa + n) within one page. */
static void written_in_page(struct soft_vcpu *v, struct page_track *t, gpa_t gpa, u64 n)
{
    struct code_lock *lock = lock_of(v->engine, gpa);
    u64 lines = soft_line_mask(gpa, n), others;

    if (!(atomic_load(&t->code_lines) & lines))
        return;
    soft_vectors_sync(v);
    while (atomic_load(&t->code_lines) & lines) {
        gpa_t first = gpa & ~(gpa_t)(LINE_SIZE - 1),
              end = (gpa + n + LINE_SIZE - 1) & ~(gpa_t)(LINE_SIZE - 1);
        u64 blocks = blocks_made(lock);

        others = atomic_load(&t->code_users) & ~soft_vcpu_bit(v);
        if (!others) {
            block_cache_drop(v, gpa, n);
            return;
        }
        block_cache_drop(v, first, end - first);
        soft_ask_written(v, others, first, end - first);
        clear_lines(t, lock, lines, blocks);
        soft_announce_store(v, t);
    }
}

void soft_code_written(struct soft_vcpu *v, gpa_t gpa, u64 n)
{
    while (n) {
        u64 here = MIN(n, GUEST_PAGE_SIZE - (gpa & (GUEST_PAGE_SIZE - 1)));
        struct page_track *t = soft_page_track(v->engine, gpa);

        if (t)
            written_in_page(v, t, gpa, here);
        gpa += here;
        n -= here;
    }
}

bool soft_code_protect(struct soft_vcpu *v, gpa_t gpa, u64 n)
{
    struct page_track *t = soft_page_track(v->engine, gpa);
    gpa_t page = gpa & ~(GUEST_PAGE_SIZE - 1);
    u64 me = soft_vcpu_bit(v), answers = v->posts_taken, writers;
    struct code_lock *lock;

    if (!t)
        return true;
    lock = lock_of(v->engine, gpa);
    pthread_mutex_lock(&lock->lock);
    lock->blocks++;
    atomic_fetch_or(&t->code_users, me);
    atomic_fetch_or(&t->code_lines, soft_line_mask(gpa, n));
    pthread_mutex_unlock(&lock->lock);
    bt_direct_protect(v, page, t);
    writers = atomic_load(&t->writers);
    if (writers & me)
        soft_tlb_protect(v, page);
    if (writers & ~me)
        soft_ask_protect(v, writers & ~me, page);
    return v->posts_taken == answers;
}

void soft_code_dropped(struct soft_vcpu *v, gpa_t page, u64 left)
{
    struct page_track *t = soft_page_track(v->engine, page);
    u64 me = soft_vcpu_bit(v);
    struct code_lock *lock;

    if (!t)
        return;
    lock = lock_of(v->engine, page);
    pthread_mutex_lock(&lock->lock);
    if (!left)
        atomic_fetch_and(&t->code_users, ~me);
    if (!(atomic_load(&t->code_users) & ~me))
        atomic_store(&t->code_lines, left);
    pthread_mutex_unlock(&lock->lock);
}
