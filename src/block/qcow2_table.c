#include "block/qcow2.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- the caches ---- */

int qcow2_cache_init(struct qcow2_cache *c, u32 size, unsigned max)
{
    *c = (struct qcow2_cache){.size = size, .max = max};
    c->by_index = calloc(size ? size : 1, sizeof(c->by_index[0]));
    return c->by_index ? 0 : -ENOMEM;
}

int qcow2_cache_grow(struct qcow2_cache *c, u32 size)
{
    struct qcow2_table **grown = realloc(c->by_index, size * sizeof(grown[0]));

    if (!grown)
        return -ENOMEM;
    memset(grown + c->size, 0, (size - c->size) * sizeof(grown[0]));
    c->by_index = grown;
    c->size = size;
    return 0;
}

static void unlink_table(struct qcow2_cache *c, struct qcow2_table *t)
{
    *(t->prev ? &t->prev->next : &c->first) = t->next;
    *(t->next ? &t->next->prev : &c->last) = t->prev;
}

static void link_first(struct qcow2_cache *c, struct qcow2_table *t)
{
    t->prev = NULL;
    t->next = c->first;
    *(c->first ? &c->first->prev : &c->last) = t;
    c->first = t;
}

static void drop(struct qcow2_cache *c, struct qcow2_table *t)
{
    unlink_table(c, t);
    c->by_index[t->index] = NULL;
    c->count--;
    free(t->data);
    free(t);
}

void qcow2_cache_free(struct qcow2_cache *c)
{
    while (c->first)
        drop(c, c->first);
    free(c->by_index);
    c->by_index = NULL;
}

static struct qcow2_table *last_clean(struct qcow2_cache *c)
{
    struct qcow2_table *t = c->last;

    while (t && t->dirty)
        t = t->prev;
    return t;
}

/* A table with undefined contents, first in its cache. Callers hold no other table of this cache. */
static int new_table(struct qcow2 *q, struct qcow2_cache *c, u32 index, u64 offset,
                     struct qcow2_table **out)
{
    struct qcow2_table *t;

    /* Where all are dirty the cache grows: writing them in order is the flush's business. */
    if (c->count >= c->max && last_clean(c))
        drop(c, last_clean(c));
    t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->data = malloc(q->cluster_size);
    if (!t->data) {
        free(t);
        return -ENOMEM;
    }
    t->index = index;
    t->offset = offset;
    link_first(c, t);
    c->by_index[index] = t;
    c->count++;
    *out = t;
    return 0;
}

static int load(struct qcow2 *q, struct qcow2_cache *c, u32 index, u64 offset,
                struct qcow2_table **out)
{
    struct qcow2_table *t = c->by_index[index];
    int ret;

    if (t) {
        unlink_table(c, t);
        link_first(c, t);
        *out = t;
        return 0;
    }
    ret = new_table(q, c, index, offset, &t);
    if (ret)
        return ret;
    ret = file_read(&q->im.file, offset, t->data, q->cluster_size);
    if (ret) {
        drop(c, t);
        return ret;
    }
    *out = t;
    return 0;
}

/* ---- L2 tables ---- */

u64 qcow2_l2_entry(const struct qcow2_table *t, u32 i)
{
    return get_be64(t->data + 8ULL * i);
}

void qcow2_l2_set(struct qcow2_table *t, u32 i, u64 entry)
{
    put_be64(t->data + 8ULL * i, entry);
    t->dirty = true;
}

void qcow2_compressed_range(const struct qcow2 *q, u64 entry, u64 *offset, u64 *len)
{
    unsigned bits = 62 - (q->cluster_bits - 8);
    u64 sectors = (entry & (QCOW2_COMPRESSED - 1)) >> bits;

    *offset = entry & (BIT(bits) - 1);
    *len = (sectors + 1) * DISK_SECTOR - *offset % DISK_SECTOR;
}

static bool compressed_is_valid(const struct qcow2 *q, u64 entry)
{
    u64 offset, len, last;

    qcow2_compressed_range(q, entry, &offset, &len);
    last = (offset + len - 1) >> q->cluster_bits;
    if ((entry & QCOW2_COPIED) || !offset || last > q->end || offset >> q->cluster_bits >= q->end)
        return false;
    for (u64 c = offset >> q->cluster_bits; c <= last; c++) {
        if (qcow2_is_table(q, c))
            return false;
    }
    return true;
}

bool qcow2_entry_is_valid(const struct qcow2 *q, u64 entry)
{
    u64 flags = QCOW2_COPIED | (q->version >= 3 ? QCOW2_ZERO : 0);
    u64 offset = entry & QCOW2_OFFSET_MASK;

    if (!entry)
        return true;
    if (entry & QCOW2_COMPRESSED)
        return compressed_is_valid(q, entry);
    if ((entry & ~(QCOW2_OFFSET_MASK | flags)) || offset % q->cluster_size)
        return false;
    if (!offset)
        return entry == QCOW2_ZERO;
    return offset >> q->cluster_bits < q->end && !qcow2_is_table(q, offset >> q->cluster_bits);
}

static int check_l2(struct qcow2 *q, struct qcow2_table *t)
{
    for (u32 i = 0; i < q->l2_entries; i++) {
        if (!qcow2_entry_is_valid(q, qcow2_l2_entry(t, i))) {
            drop(&q->l2, t);
            return qcow2_corrupt(q, "an L2 table's entry leads to where no data can be");
        }
    }
    return 0;
}

int qcow2_l2_get(struct qcow2 *q, u32 l1_index, struct qcow2_table **t)
{
    u64 offset = q->l1[l1_index] & QCOW2_OFFSET_MASK;
    bool cached = q->l2.by_index[l1_index];
    int ret;

    *t = NULL;
    if (!offset)
        return 0;
    ret = load(q, &q->l2, l1_index, offset, t);
    if (!ret && !cached) {
        ret = check_l2(q, *t);
        if (ret)
            *t = NULL;
    }
    return ret;
}

struct qcow2_table *qcow2_l2_peek(struct qcow2 *q, u32 l1_index)
{
    return q->l2.by_index[l1_index];
}

static void l1_set(struct qcow2 *q, u32 i, u64 entry)
{
    q->l1[i] = entry;
    if (q->l1_dirty_first == q->l1_dirty_end)
        q->l1_dirty_first = i, q->l1_dirty_end = i + 1;
    q->l1_dirty_first = MIN(q->l1_dirty_first, i);
    q->l1_dirty_end = MAX(q->l1_dirty_end, i + 1);
}

int qcow2_l2_get_writable(struct qcow2 *q, u32 l1_index, struct qcow2_table **out)
{
    u64 old = q->l1[l1_index], offset;
    struct qcow2_table *t;
    int ret = qcow2_l2_get(q, l1_index, &t);

    if (ret)
        return ret;
    *out = t;
    if (t && (old & QCOW2_COPIED))
        return 0;
    ret = qcow2_alloc(q, 1, &offset);
    if (ret)
        return ret;
    if (t) { /* a snapshot has it, too */
        t->offset = offset;
        ret = qcow2_free_later(q, old & QCOW2_OFFSET_MASK, q->cluster_size);
    } else {
        ret = new_table(q, &q->l2, l1_index, offset, &t);
        if (!ret)
            memset(t->data, 0, q->cluster_size);
    }
    if (!ret)
        ret = qcow2_mark_tables(q, offset, q->cluster_size);
    if (ret)
        return ret;
    t->dirty = true;
    l1_set(q, l1_index, offset | QCOW2_COPIED);
    *out = t;
    return 0;
}

/* ---- refcount blocks ---- */

int qcow2_block_get(struct qcow2 *q, u32 index, struct qcow2_table **t)
{
    *t = NULL;
    if (index >= q->reftable_size || !q->reftable[index])
        return 0;
    return load(q, &q->blocks, index, q->reftable[index], t);
}

/* A larger refcount table, elsewhere. Its clusters are counted like all others. */
int qcow2_reftable_grow(struct qcow2 *q, u32 wanted)
{
    u64 old_offset = q->reftable_offset, old_len = 8ULL * q->reftable_size, offset;
    u64 bytes = qcow2_round_up(q, 8ULL * MAX(wanted + 16ULL, q->reftable_size * 2ULL));
    u32 size = (u32)(bytes / 8);
    u64 *grown;
    int ret;

    if (size > QCOW2_REFTABLE_MAX)
        return -EFBIG;
    grown = realloc(q->reftable, bytes);
    if (!grown)
        return -ENOMEM;
    memset(grown + q->reftable_size, 0, bytes - old_len);
    q->reftable = grown;
    ret = qcow2_cache_grow(&q->blocks, size);
    if (ret)
        return ret;
    q->reftable_size = size;
    ret = qcow2_alloc_run(q, bytes >> q->cluster_bits, &offset);
    if (!ret)
        ret = qcow2_mark_tables(q, offset, bytes);
    if (ret)
        return ret;
    q->reftable_offset = offset;
    q->reftable_dirty = q->reftable_moved = true;
    return qcow2_free_later(q, old_offset, old_len);
}

/* A cluster for a new block among those that it counts: all of them are free, for it isn't there yet. */
static int place_block(struct qcow2 *q, u32 index, u64 *cluster)
{
    for (u64 c = (u64)index * q->refs, end = c + q->refs; c < end; c++) {
        if (qcow2_is_table(q, c) || (c < q->in_use_size && q->in_use[c]))
            continue;
        *cluster = c;
        return 0;
    }
    return qcow2_corrupt(q, "a refcount block is missing, and there is no room for it");
}

int qcow2_block_create_at(struct qcow2 *q, u32 index, u64 cluster)
{
    struct qcow2_table *t;
    u64 offset = cluster << q->cluster_bits;
    int ret = index < q->reftable_size ? qcow2_mark_tables(q, offset, q->cluster_size) : -EFBIG;

    if (!ret)
        ret = new_table(q, &q->blocks, index, offset, &t);
    if (ret)
        return ret;
    memset(t->data, 0, q->cluster_size);
    t->dirty = true;
    q->reftable[index] = offset;
    q->reftable_dirty = true;
    q->end = MAX(q->end, cluster + 1);
    return 0;
}

int qcow2_block_create(struct qcow2 *q, u32 index)
{
    u64 cluster = 0;
    int ret;

    if (index >= q->reftable_size) {
        ret = qcow2_reftable_grow(q, index + 1);
        if (ret || q->reftable[index])
            return ret;
    }
    ret = place_block(q, index, &cluster);
    if (!ret)
        ret = qcow2_block_create_at(q, index, cluster);
    return ret ? ret : qcow2_refcount_set(q, cluster, 1);
}

/* ---- writing them ---- */

static int write_cache(struct qcow2 *q, struct qcow2_cache *c, bool *any)
{
    for (struct qcow2_table *t = c->first; t; t = t->next) {
        int ret;

        if (!t->dirty)
            continue;
        *any = true;
        ret = file_write(&q->im.file, t->offset, t->data, q->cluster_size);
        if (ret)
            return ret;
        t->dirty = false;
    }
    return 0;
}

static bool any_dirty(const struct qcow2_cache *c)
{
    for (const struct qcow2_table *t = c->first; t; t = t->next) {
        if (t->dirty)
            return true;
    }
    return false;
}

/* n entries of a table, to the file. */
static int write_entries(struct qcow2 *q, u64 offset, const u64 *entries, u64 n)
{
    u8 *bytes = malloc(8 * n);
    int ret;

    if (!bytes)
        return -ENOMEM;
    for (u64 i = 0; i < n; i++)
        put_be64(bytes + 8 * i, entries[i]);
    ret = file_write(&q->im.file, offset, bytes, 8 * n);
    free(bytes);
    return ret;
}

static int write_reftable(struct qcow2 *q)
{
    u8 header[12];
    int ret = file_sync(&q->im.file);

    if (!ret)
        ret = write_entries(q, q->reftable_offset, q->reftable, q->reftable_size);
    if (!ret && q->reftable_moved) {
        put_be64(header, q->reftable_offset);
        put_be32(header + 8, (u32)(8ULL * q->reftable_size >> q->cluster_bits));
        ret = file_sync(&q->im.file);
        if (!ret)
            ret = file_write(&q->im.file, QCOW2_HEADER_REFTABLE, header, sizeof(header));
    }
    if (!ret)
        q->reftable_dirty = q->reftable_moved = false;
    return ret;
}

static int write_l1(struct qcow2 *q)
{
    u32 first = q->l1_moved ? 0 : q->l1_dirty_first,
        end = q->l1_moved ? q->l1_size : q->l1_dirty_end;
    u8 header[12];
    int ret = file_sync(&q->im.file);

    if (!ret && first < end)
        ret = write_entries(q, q->l1_offset + 8ULL * first, q->l1 + first, end - first);
    if (!ret && q->l1_moved) {
        put_be32(header, q->l1_size);
        put_be64(header + 4, q->l1_offset);
        ret = file_sync(&q->im.file);
        if (!ret)
            ret = file_write(&q->im.file, QCOW2_HEADER_L1_SIZE, header, sizeof(header));
    }
    if (!ret) {
        q->l1_dirty_first = q->l1_dirty_end = 0;
        q->l1_moved = false;
    }
    return ret;
}

int qcow2_write_tables(struct qcow2 *q)
{
    bool l1_dirty = q->l1_moved || q->l1_dirty_first < q->l1_dirty_end, any = false;
    int ret;

    if (q->corrupt)
        return -EIO;
    ret = write_cache(q, &q->blocks, &any);
    if (!ret && q->reftable_dirty)
        ret = write_reftable(q);
    if (!ret && (l1_dirty || any_dirty(&q->l2))) {
        ret = file_sync(&q->im.file);
        if (!ret)
            ret = write_cache(q, &q->l2, &any);
    }
    if (!ret && l1_dirty)
        ret = write_l1(q);
    if (!ret)
        ret = file_sync(&q->im.file);
    if (!ret)
        ret = qcow2_apply_freed(q);
    return ret;
}
