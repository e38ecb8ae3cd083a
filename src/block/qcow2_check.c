/*
 * Counts who points at each cluster, and compares that with the refcounts: fewer references than counted is
 * lost space (a leak), more is a corruption, for the cluster may be given away while in use. The pointers
 * themselves are taken as they are; those that can't be right are told and not followed.
 */
#include "block/qcow2.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct check {
    struct qcow2 *q;
    u32 *counts;
    u64 clusters; /* that counts[] has */
    struct disk_check *result;
    bool repair;
};

static void count_range(struct check *c, u64 offset, u64 len)
{
    u64 first = offset >> c->q->cluster_bits;
    u64 last = len ? (offset + len - 1) >> c->q->cluster_bits : first;

    if (!len)
        return;
    if (last >= c->clusters || last < first) {
        c->result->corruptions++;
        return;
    }
    for (u64 i = first; i <= last; i++)
        c->counts[i]++;
}

static void count_entry(struct check *c, u64 entry)
{
    u64 offset = entry & QCOW2_OFFSET_MASK, len = c->q->cluster_size;

    if (!entry)
        return;
    if (entry & QCOW2_COMPRESSED) {
        qcow2_compressed_range(c->q, entry, &offset, &len);
        count_range(c, offset,
                    MIN(len, (c->clusters << c->q->cluster_bits) -
                                 MIN(offset, c->clusters << c->q->cluster_bits)));
        c->result->clusters++;
        return;
    }
    if (!offset)
        return;
    if (offset % c->q->cluster_size || qcow2_is_table(c->q, offset >> c->q->cluster_bits)) {
        c->result->corruptions++;
        return;
    }
    count_range(c, offset, len);
    c->result->clusters++;
}

static int count_l2(struct check *c, u64 offset, u8 *table)
{
    int ret;

    if (offset % c->q->cluster_size || offset >> c->q->cluster_bits >= c->clusters) {
        c->result->corruptions++;
        return 0;
    }
    count_range(c, offset, c->q->cluster_size);
    ret = file_read(&c->q->im.file, offset, table, c->q->cluster_size);
    for (u32 i = 0; i < c->q->l2_entries && !ret; i++)
        count_entry(c, get_be64(table + 8ULL * i));
    return ret;
}

/* An L1 table, the active one or a snapshot's, with all below it. */
static int count_l1(struct check *c, u64 offset, u64 size)
{
    u8 *l1 = malloc(8 * size + 1), *l2 = malloc(c->q->cluster_size);
    int ret = l1 && l2 ? file_read(&c->q->im.file, offset, l1, 8 * size) : -ENOMEM;

    if (!ret)
        count_range(c, offset, 8 * size);
    for (u64 i = 0; i < size && !ret; i++) {
        u64 entry = get_be64(l1 + 8 * i) & QCOW2_OFFSET_MASK;

        if (entry)
            ret = count_l2(c, entry, l2);
    }
    free(l1);
    free(l2);
    return ret;
}

#define SNAPSHOT_FIXED 40

static int count_snapshots(struct check *c)
{
    u64 at = c->q->snapshots_offset;

    for (u32 i = 0; i < c->q->snapshots; i++) {
        u8 s[SNAPSHOT_FIXED];
        u64 len;
        int ret = file_read(&c->q->im.file, at, s, sizeof(s));

        if (ret)
            return ret;
        len = SNAPSHOT_FIXED + get_be32(s + 36) + (get_be32(s + 12) >> 16) +
              (get_be32(s + 12) & 0xffff);
        if (get_be32(s + 8) > QCOW2_L1_MAX || len > KIB(256)) {
            c->result->corruptions++;
            return 0;
        }
        ret = count_l1(c, get_be64(s), get_be32(s + 8));
        if (ret)
            return ret;
        at += (len + 7) & ~7ULL;
    }
    count_range(c, c->q->snapshots_offset, at - c->q->snapshots_offset);
    return 0;
}

static int count_all(struct check *c)
{
    struct qcow2 *q = c->q;
    int ret;

    count_range(c, 0, q->cluster_size);
    count_range(c, q->reftable_offset, 8ULL * q->reftable_size);
    for (u32 i = 0; i < q->reftable_size; i++) {
        if (q->reftable[i])
            count_range(c, q->reftable[i], q->cluster_size);
    }
    ret = count_l1(c, q->l1_offset, q->l1_size);
    return ret ? ret : count_snapshots(c);
}

static int compare_counts(struct check *c, u64 *unrepaired)
{
    int ret = 0;

    for (u64 i = 0; i < c->clusters && !ret; i++) {
        u64 counted;

        ret = qcow2_refcount_get(c->q, i, &counted);
        if (ret || counted == c->counts[i])
            continue;
        if (counted > c->counts[i])
            c->result->leaks++;
        else
            c->result->corruptions++;
        if (!c->repair)
            continue;
        ret = qcow2_refcount_set(c->q, i, c->counts[i]);
        if (!ret)
            c->result->repaired++;
        else if (ret == -EFBIG || ret == -EIO) {
            ret = 0;
            ++*unrepaired;
        }
    }
    return ret;
}

/* COPIED says that the refcount is 1. */
static bool copied_is_wrong(const struct check *c, u64 entry)
{
    u64 cluster = (entry & QCOW2_OFFSET_MASK) >> c->q->cluster_bits;

    if (!(entry & QCOW2_OFFSET_MASK) || (entry & QCOW2_COMPRESSED) || cluster >= c->clusters)
        return false;
    return !(entry & QCOW2_COPIED) != (c->counts[cluster] != 1);
}

static int check_copied(struct check *c)
{
    struct qcow2 *q = c->q;
    struct qcow2_table *t;

    for (u32 i = 0; i < q->l1_size; i++) {
        int ret;

        if (copied_is_wrong(c, q->l1[i])) {
            c->result->corruptions++;
            if (c->repair) {
                q->l1[i] ^= QCOW2_COPIED;
                q->l1_dirty_first = 0;
                q->l1_dirty_end = q->l1_size;
                c->result->repaired++;
            }
        }
        ret = qcow2_l2_get(q, i, &t);
        if (ret == -EIO || !t)
            continue;
        if (ret)
            return ret;
        for (u32 k = 0; k < q->l2_entries; k++) {
            u64 entry = qcow2_l2_entry(t, k);

            if (!copied_is_wrong(c, entry))
                continue;
            c->result->corruptions++;
            if (!c->repair)
                continue;
            qcow2_l2_set(t, k, entry ^ QCOW2_COPIED);
            c->result->repaired++;
        }
    }
    return 0;
}

static int clear_marks(struct qcow2 *q)
{
    u8 bits[8];

    if (q->version < 3)
        return 0;
    q->incompatible &= ~(u64)(QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT);
    put_be64(bits, q->incompatible);
    return file_write(&q->im.file, QCOW2_HEADER_INCOMPATIBLE, bits, sizeof(bits));
}

static int run(struct check *c)
{
    struct qcow2 *q = c->q;
    bool was_corrupt = q->corrupt;
    u64 unrepaired = 0;
    int ret = count_all(c);

    q->in_use = c->counts;
    q->in_use_size = c->clusters;
    q->corrupt = false; /* so that tables can be written */
    if (!ret)
        ret = compare_counts(c, &unrepaired);
    if (!ret)
        ret = check_copied(c);
    if (!ret && c->repair)
        ret = qcow2_write_tables(q);
    if (!ret && c->repair && !unrepaired &&
        c->result->repaired >= c->result->corruptions + c->result->leaks)
        ret = clear_marks(q);
    else
        q->corrupt |= was_corrupt;
    q->in_use = NULL;
    q->in_use_size = 0;
    return ret;
}

int qcow2_check(struct disk *im, bool repair, struct disk_check *result, struct error *err)
{
    struct qcow2 *q = qcow2_of(im);
    struct check c = {.q = q, .clusters = q->end, .result = result, .repair = repair};
    int ret;

    *result = (struct disk_check){0};
    c.counts = calloc(c.clusters, sizeof(c.counts[0]));
    if (!c.counts)
        return error_host(err, ENOMEM, "%s", im->file.path);
    pthread_mutex_lock(&q->lock);
    ret = run(&c);
    pthread_mutex_unlock(&q->lock);
    free(c.counts);
    return ret ? error_host(err, -ret, "%s", im->file.path) : 0;
}
