#include "block/qcow2.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int qcow2_corrupt(struct qcow2 *q, const char *what)
{
    u8 bits[8];

    if (q->corrupt)
        return -EIO;
    q->corrupt = true;
    log_error(
        "%s: the image is corrupt: %s; it takes no more writes: run doppel image check --repair",
        q->im.file.path, what);
    q->incompatible |= QCOW2_INCOMPAT_CORRUPT;
    if (!q->im.read_only && q->version >= 3) {
        put_be64(bits, q->incompatible);
        if (file_write(&q->im.file, QCOW2_HEADER_INCOMPATIBLE, bits, sizeof(bits)))
            log_error("%s: cannot mark it as corrupt", q->im.file.path);
    }
    return -EIO;
}

/* ---- the map of tables ---- */

int qcow2_grow_map(struct qcow2 *q, u64 clusters)
{
    u64 size = MAX(clusters, q->tables_size * 2);
    u8 *grown;

    if (clusters <= q->tables_size)
        return 0;
    grown = realloc(q->tables, (size + 7) / 8);
    if (!grown)
        return -ENOMEM;
    memset(grown + (q->tables_size + 7) / 8, 0, (size + 7) / 8 - (q->tables_size + 7) / 8);
    q->tables = grown;
    q->tables_size = size;
    return 0;
}

int qcow2_mark_tables(struct qcow2 *q, u64 offset, u64 len)
{
    u64 first = offset >> q->cluster_bits,
        end = (offset + len + q->cluster_size - 1) >> q->cluster_bits;
    int ret = qcow2_grow_map(q, end);

    for (u64 c = first; c < end && !ret; c++)
        q->tables[c / 8] |= 1U << c % 8;
    return ret;
}

bool qcow2_is_table(const struct qcow2 *q, u64 cluster)
{
    return cluster < q->tables_size && (q->tables[cluster / 8] >> cluster % 8 & 1);
}

/* ---- reference counts ---- */

u64 qcow2_block_ref(const struct qcow2 *q, const u8 *data, u32 i)
{
    unsigned bits = 1U << q->refcount_order;
    u64 value = 0;

    if (bits < 8) /* the first is in the low bits */
        return data[i * bits / 8] >> i * bits % 8 & ((1U << bits) - 1);
    for (unsigned b = 0; b < bits / 8; b++)
        value = value << 8 | data[i * (bits / 8) + b];
    return value;
}

void qcow2_block_set_ref(const struct qcow2 *q, u8 *data, u32 i, u64 count)
{
    unsigned bits = 1U << q->refcount_order;

    if (bits < 8) {
        u8 *byte = &data[i * bits / 8];
        unsigned shift = i * bits % 8;

        *byte = (u8)((*byte & ~(((1U << bits) - 1) << shift)) | count << shift);
        return;
    }
    for (unsigned b = bits / 8; b-- > 0; count >>= 8)
        data[i * (bits / 8) + b] = (u8)count;
}

static u64 refcount_max(const struct qcow2 *q)
{
    return q->refcount_order == 6 ? UINT64_MAX : BIT(1U << q->refcount_order) - 1;
}

int qcow2_refcount_get(struct qcow2 *q, u64 cluster, u64 *count)
{
    struct qcow2_table *t;
    int ret;

    *count = 0;
    if (cluster / q->refs >= q->reftable_size)
        return 0;
    ret = qcow2_block_get(q, (u32)(cluster / q->refs), &t);
    if (!ret && t)
        *count = qcow2_block_ref(q, t->data, (u32)(cluster % q->refs));
    return ret;
}

int qcow2_refcount_set(struct qcow2 *q, u64 cluster, u64 count)
{
    struct qcow2_table *t;
    int ret;

    if (count > refcount_max(q) || cluster / q->refs >= QCOW2_REFTABLE_MAX)
        return -EFBIG;
    ret = qcow2_block_get(q, (u32)(cluster / q->refs), &t);
    if (!ret && !t) {
        ret = qcow2_block_create(q, (u32)(cluster / q->refs));
        if (!ret)
            ret = qcow2_block_get(q, (u32)(cluster / q->refs), &t);
    }
    if (ret)
        return ret;
    qcow2_block_set_ref(q, t->data, (u32)(cluster % q->refs), count);
    t->dirty = true;
    if (!count)
        q->hint = MIN(q->hint, cluster);
    return 0;
}

/* ---- allocation ---- */

/* Whether a cluster is free; makes the block that counts it, which may take the cluster. */
static int is_free(struct qcow2 *q, u64 cluster, bool *free_)
{
    struct qcow2_table *t;
    u64 index = cluster / q->refs;
    int ret;

    if (index >= QCOW2_REFTABLE_MAX)
        return -EFBIG;
    ret = qcow2_block_get(q, (u32)index, &t);
    if (!ret && !t) {
        ret = qcow2_block_create(q, (u32)index);
        if (!ret)
            ret = qcow2_block_get(q, (u32)index, &t);
    }
    if (ret)
        return ret;
    *free_ = qcow2_block_ref(q, t->data, (u32)(cluster % q->refs)) == 0;
    if (*free_ && qcow2_is_table(q, cluster))
        return qcow2_corrupt(q, "a table's cluster counts as free");
    return 0;
}

/*
 * The blocks that are missing for the run go before it, one after another. They make it end further on,
 * which may need another block, and so on until that settles.
 */
int qcow2_alloc_run(struct qcow2 *q, u64 n, u64 *offset)
{
    u64 start = q->end, blocks = 0, missing, next, last;
    int ret = 0;

    do {
        missing = blocks;
        blocks = 0;
        last = (start + missing + n - 1) / q->refs;
        for (u64 i = start / q->refs; i <= last; i++)
            blocks += i >= q->reftable_size || !q->reftable[i];
    } while (blocks != missing);
    if (last >= QCOW2_REFTABLE_MAX)
        return -EFBIG;
    if (last >= q->reftable_size) {
        ret = qcow2_reftable_grow(q, (u32)last + 1);
        return ret ? ret : qcow2_alloc_run(q, n, offset);
    }
    next = start;
    for (u64 i = start / q->refs; i <= last && !ret; i++) {
        if (!q->reftable[i])
            ret = qcow2_block_create_at(q, (u32)i, next++);
    }
    for (u64 c = start; c < start + missing + n && !ret; c++)
        ret = qcow2_refcount_set(q, c, 1);
    if (!ret)
        ret = qcow2_grow_map(q, start + missing + n);
    if (ret)
        return ret;
    q->end = start + missing + n;
    *offset = (start + missing) << q->cluster_bits;
    return 0;
}

int qcow2_alloc(struct qcow2 *q, u64 n, u64 *offset)
{
    u64 at = q->hint, run = 0;
    int ret = 0;

    while (run < n && !ret) {
        bool free_ = false;

        ret = is_free(q, at, &free_);
        run = free_ ? run + 1 : 0;
        at++;
        /* Nothing before it was free: the next search begins here. */
        if (!free_ && !run && n == 1)
            q->hint = at;
    }
    for (u64 i = 0; i < n && !ret; i++)
        ret = qcow2_refcount_set(q, at - n + i, 1);
    if (!ret)
        ret = qcow2_grow_map(q, at);
    if (ret)
        return ret;
    if (n == 1)
        q->hint = at;
    q->end = MAX(q->end, at);
    *offset = (at - n) << q->cluster_bits;
    return 0;
}

void qcow2_unalloc(struct qcow2 *q, u64 offset, u64 n)
{
    for (u64 i = 0; i < n; i++) {
        if (qcow2_refcount_set(q, (offset >> q->cluster_bits) + i, 0))
            return; /* leaked */
    }
}

int qcow2_free_later(struct qcow2 *q, u64 offset, u64 len)
{
    u64 first = offset >> q->cluster_bits,
        end = (offset + len + q->cluster_size - 1) >> q->cluster_bits;

    if (q->nfreed + (end - first) > q->freed_capacity) {
        size_t capacity = MAX(2 * q->freed_capacity, q->nfreed + (end - first) + 64);
        u64 *grown = realloc(q->freed, capacity * sizeof(grown[0]));

        if (!grown)
            return -ENOMEM;
        q->freed = grown;
        q->freed_capacity = capacity;
    }
    for (u64 c = first; c < end; c++)
        q->freed[q->nfreed++] = c;
    q->packed_end = 0; /* it may lie in one of them */
    return 0;
}

int qcow2_free_entry(struct qcow2 *q, u64 entry)
{
    u64 offset = entry & QCOW2_OFFSET_MASK, len = q->cluster_size;

    if (entry & QCOW2_COMPRESSED)
        qcow2_compressed_range(q, entry, &offset, &len);
    return offset ? qcow2_free_later(q, offset, len) : 0;
}

int qcow2_apply_freed(struct qcow2 *q)
{
    for (size_t i = 0; i < q->nfreed; i++) {
        u64 cluster = q->freed[i], count;
        int ret = qcow2_refcount_get(q, cluster, &count);

        if (!ret && !count)
            ret = qcow2_corrupt(q, "a cluster in use counts as free");
        if (!ret)
            ret = qcow2_refcount_set(q, cluster, count - 1);
        if (ret) {
            q->nfreed = 0; /* leaked */
            return ret;
        }
        if (count == 1 && cluster < q->tables_size)
            q->tables[cluster / 8] &= ~(1U << cluster % 8);
    }
    q->nfreed = 0;
    return 0;
}
