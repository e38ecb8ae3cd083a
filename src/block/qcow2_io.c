/*
 * Reading, writing, zeroing and discarding in a qcow2 image.
 *
 * The lock is held for all that changes tables, with the data's transfer in it: what is slow is the first write
 * to a cluster, and its data must be in the file before another thread finds it by the table. Data that lies
 * in the file already is read without the lock: its cluster can't be given away meanwhile, as discards are
 * exclusive (struct disk_ops) and whoever replaces a cluster frees it by qcow2_free_later.
 */
#include "block/qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum extent_kind { EXTENT_ABSENT, EXTENT_ZERO, EXTENT_DATA, EXTENT_COMPRESSED };

struct extent {
    enum extent_kind kind;
    bool copied; /* nobody else has the cluster: it may be written in place */
    u64 host;    /* DATA: where in the file */
    u64 entry;   /* COMPRESSED */
    u64 len;     /* of the guest's bytes */
};

static enum extent_kind entry_kind(u64 entry)
{
    if (entry & QCOW2_COMPRESSED)
        return EXTENT_COMPRESSED;
    if (entry & QCOW2_ZERO)
        return EXTENT_ZERO;
    return entry & QCOW2_OFFSET_MASK ? EXTENT_DATA : EXTENT_ABSENT;
}

/* What lies at `offset`, as far as it is the same and in one table, at most `len`. t may be NULL. */
static void find_extent(const struct qcow2 *q, const struct qcow2_table *t, u64 offset, u64 len,
                        struct extent *e)
{
    u32 first = qcow2_l2_index(q, offset), i = first;
    u64 entry = t ? qcow2_l2_entry(t, i) : 0, room, next;

    *e = (struct extent){.kind = entry_kind(entry), .entry = entry};
    e->copied = entry & QCOW2_COPIED;
    e->host = (entry & QCOW2_OFFSET_MASK) + qcow2_in_cluster(q, offset);
    room = q->cluster_size - qcow2_in_cluster(q, offset);
    while (room < len && e->kind != EXTENT_COMPRESSED && ++i < q->l2_entries) {
        next = t ? qcow2_l2_entry(t, i) : 0;
        if (entry_kind(next) != e->kind || !(next & QCOW2_COPIED) != !e->copied)
            break;
        if (e->kind == EXTENT_DATA &&
            (next & QCOW2_OFFSET_MASK) !=
                (entry & QCOW2_OFFSET_MASK) + (i - first) * q->cluster_size)
            break;
        room += q->cluster_size;
    }
    e->len = MIN(room, len);
}

/* Locked. */
static int get_extent(struct qcow2 *q, u64 offset, u64 len, struct extent *e)
{
    struct qcow2_table *t;
    int ret = qcow2_l2_get(q, qcow2_l1_index(q, offset), &t);

    if (!ret)
        find_extent(q, t, offset, len, e);
    return ret;
}

/* A piece [skip, skip + len) of a vector; returns the number of its iovecs. `out` has room for n. */
static unsigned iov_slice(const struct iovec *iov, unsigned n, u64 skip, u64 len, struct iovec *out)
{
    unsigned count = 0;

    for (unsigned i = 0; i < n && len; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        out[count].iov_base = (u8 *)iov[i].iov_base + skip;
        out[count].iov_len = MIN(len, iov[i].iov_len - skip);
        len -= out[count++].iov_len;
        skip = 0;
    }
    return count;
}

static void iov_fill_zero(const struct iovec *iov, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        memset(iov[i].iov_base, 0, iov[i].iov_len);
}

static void iov_fill(const struct iovec *iov, unsigned n, const u8 *from)
{
    for (unsigned i = 0; i < n; i++) {
        memcpy(iov[i].iov_base, from, iov[i].iov_len);
        from += iov[i].iov_len;
    }
}

/* ---- reading ---- */

static int read_backing(struct qcow2 *q, u64 offset, struct iovec *iov, unsigned n, u64 len)
{
    struct disk *backing = q->im.backing;
    u64 there = backing && offset < backing->size ? MIN(len, backing->size - offset) : 0;
    struct iovec *part;
    unsigned count;
    int ret;

    if (there == len)
        return backing->ops->read(backing, offset, iov, n, len);
    iov_fill_zero(iov, n);
    if (!there)
        return 0;
    part = calloc(n, sizeof(*part));
    if (!part)
        return -ENOMEM;
    count = iov_slice(iov, n, 0, there, part);
    ret = backing->ops->read(backing, offset, part, count, there);
    free(part);
    return ret;
}

/* All but compressed data, which wants the lock. */
static int read_extent(struct qcow2 *q, const struct extent *e, u64 offset, struct iovec *iov,
                       unsigned n)
{
    switch (e->kind) {
    case EXTENT_ABSENT:
        return read_backing(q, offset, iov, n, e->len);
    case EXTENT_ZERO:
        iov_fill_zero(iov, n);
        return 0;
    case EXTENT_DATA:
        return file_readv(&q->im.file, e->host, iov, n);
    case EXTENT_COMPRESSED:
        break;
    }
    return -EIO;
}

static int read_compressed(struct qcow2 *q, const struct extent *e, u64 offset,
                           const struct iovec *iov, unsigned n)
{
    int ret = qcow2_unpack(q, e->entry);

    if (!ret)
        iov_fill(iov, n, q->cluster_buffer + qcow2_in_cluster(q, offset));
    return ret;
}

int qcow2_read(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len)
{
    struct qcow2 *q = qcow2_of(im);
    struct iovec *part = calloc(n ? n : 1, sizeof(*part));
    u64 done = 0;
    int ret = part ? 0 : -ENOMEM;

    while (done < len && !ret) {
        struct extent e;
        unsigned count;

        pthread_mutex_lock(&q->lock);
        ret = get_extent(q, offset + done, len - done, &e);
        count = ret ? 0 : iov_slice(iov, n, done, e.len, part);
        if (!ret && e.kind == EXTENT_COMPRESSED)
            ret = read_compressed(q, &e, offset + done, part, count);
        pthread_mutex_unlock(&q->lock);
        if (!ret && e.kind != EXTENT_COMPRESSED)
            ret = read_extent(q, &e, offset + done, part, count);
        if (!ret)
            done += e.len;
    }
    free(part);
    return ret;
}

/* As it was, within one cluster; zeroes behind the disk's end. Locked. */
static int read_old(struct qcow2 *q, u64 offset, u8 *buf, u64 len)
{
    struct extent e;
    struct iovec iov = {buf, len};
    int ret;

    if (!len)
        return 0;
    ret = get_extent(q, offset, len, &e);
    if (ret)
        return ret;
    if (e.kind == EXTENT_COMPRESSED)
        return read_compressed(q, &e, offset, &iov, 1);
    return read_extent(q, &e, offset, &iov, 1);
}

/* ---- writing ---- */

/* How many clusters from `offset` on, within [offset, end) and one table, must be allocated to be written. */
static u64 count_new(const struct qcow2 *q, const struct qcow2_table *t, u64 offset, u64 end)
{
    u64 n = 0;

    for (u32 i = qcow2_l2_index(q, offset); i < q->l2_entries && offset < end; i++, n++) {
        u64 entry = qcow2_l2_entry(t, i);

        if (entry_kind(entry) == EXTENT_DATA && (entry & QCOW2_COPIED))
            break;
        offset = (offset | (q->cluster_size - 1)) + 1;
    }
    return n;
}

/* [offset, offset + len) to `n` new clusters at `host`, with what they had before at either side. */
static int write_new(struct qcow2 *q, u64 host, u64 n, u64 offset, u64 len, const struct iovec *iov,
                     unsigned niov)
{
    u64 head = qcow2_in_cluster(q, offset), tail = (n << q->cluster_bits) - head - len;
    struct iovec *all = calloc(niov + 2, sizeof(*all));
    u8 *sides = malloc(head + tail + 1);
    int ret = all && sides ? 0 : -ENOMEM;

    if (!ret)
        ret = read_old(q, offset - head, sides, head);
    if (!ret)
        ret = read_old(q, offset + len, sides + head, tail);
    if (!ret) {
        all[0] = (struct iovec){sides, head};
        memcpy(all + 1, iov, niov * sizeof(*all));
        all[niov + 1] = (struct iovec){sides + head, tail};
        ret = file_writev(&q->im.file, host, all, niov + 2);
    }
    free(sides);
    free(all);
    return ret;
}

/* The first write to clusters: as many as lie in one table. Locked. */
static int write_allocating(struct qcow2 *q, u64 offset, u64 *len, const struct iovec *iov,
                            unsigned n, struct iovec *part, u64 skip)
{
    struct qcow2_table *t;
    u64 host, count, first = qcow2_l2_index(q, offset);
    int ret = qcow2_l2_get_writable(q, qcow2_l1_index(q, offset), &t);

    if (ret)
        return ret;
    count = MIN(count_new(q, t, offset, offset + *len), qcow2_alloc_max(q));
    *len = MIN(*len, (count << q->cluster_bits) - qcow2_in_cluster(q, offset));
    ret = qcow2_alloc(q, count, &host);
    if (ret)
        return ret;
    ret = write_new(q, host, count, offset, *len, part, iov_slice(iov, n, skip, *len, part));
    if (ret) {
        qcow2_unalloc(q, host, count);
        return ret;
    }
    for (u64 i = 0; i < count && !ret; i++) {
        ret = qcow2_free_entry(q, qcow2_l2_entry(t, (u32)(first + i)));
        qcow2_l2_set(t, (u32)(first + i), (host + (i << q->cluster_bits)) | QCOW2_COPIED);
    }
    return ret;
}

/* Too many tables wait to be written: do it now. Locked. */
static int bound_memory(struct qcow2 *q)
{
    return q->l2.count > 2 * q->l2.max || q->blocks.count > 2 * q->blocks.max
               ? qcow2_write_tables(q)
               : 0;
}

/* Locked. */
static int write_locked(struct qcow2 *q, u64 offset, const struct iovec *iov, unsigned n, u64 len,
                        struct iovec *part)
{
    u64 done = 0;
    int ret = q->corrupt ? -EIO : 0;

    while (done < len && !ret) {
        struct extent e;
        u64 here = len - done;

        ret = get_extent(q, offset + done, here, &e);
        if (ret)
            return ret;
        if (e.kind == EXTENT_DATA && e.copied) {
            here = e.len;
            ret = file_writev(&q->im.file, e.host, part, iov_slice(iov, n, done, here, part));
        } else {
            ret = write_allocating(q, offset + done, &here, iov, n, part, done);
        }
        if (!ret)
            ret = bound_memory(q);
        done += here;
    }
    return ret;
}

int qcow2_write_packed(struct disk *im, u64 offset, const u8 *data)
{
    struct qcow2 *q = qcow2_of(im);
    struct iovec iov = {(void *)data, MIN(q->cluster_size, im->size - offset)}, part;
    bool packed = false;
    int ret;

    pthread_mutex_lock(&q->lock);
    ret = q->corrupt ? -EIO : qcow2_pack(q, offset, data, &packed);
    if (!ret && !packed)
        ret = write_locked(q, offset, &iov, 1, iov.iov_len, &part);
    if (!ret)
        ret = bound_memory(q);
    pthread_mutex_unlock(&q->lock);
    return ret;
}

int qcow2_write(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len)
{
    struct qcow2 *q = qcow2_of(im);
    struct iovec *part = calloc(n ? n : 1, sizeof(*part));
    int ret;

    if (!part)
        return -ENOMEM;
    pthread_mutex_lock(&q->lock);
    ret = write_locked(q, offset, iov, n, len, part);
    pthread_mutex_unlock(&q->lock);
    free(part);
    return ret;
}

/* ---- zeroes and discards ---- */

static int write_zero_bytes(struct qcow2 *q, u64 offset, u64 len)
{
    u8 *zeroes;
    int ret = 0;

    while (len && !ret) {
        u64 here = MIN(len, q->cluster_size - qcow2_in_cluster(q, offset));
        struct iovec iov, part;

        zeroes = calloc(1, here);
        if (!zeroes)
            return -ENOMEM;
        iov = (struct iovec){zeroes, here};
        ret = write_locked(q, offset, &iov, 1, here, &part);
        free(zeroes);
        offset += here;
        len -= here;
    }
    return ret;
}

/* Whether a range reads as zeroes without being written, because nothing is there. */
static bool is_empty(const struct qcow2 *q, const struct extent *e, u64 offset)
{
    return e->kind == EXTENT_ZERO ||
           (e->kind == EXTENT_ABSENT && (!q->im.backing || offset >= q->im.backing->size));
}

/* What an entry becomes when its cluster is to read as zeroes. False: it must be written. */
static bool zero_entry(const struct qcow2 *q, u64 old, bool unmap, u64 *new)
{
    bool keep = !unmap && entry_kind(old) == EXTENT_DATA && (old & QCOW2_COPIED);

    if (q->version < 3) {
        *new = 0;
        return unmap && !q->im.backing;
    }
    *new = QCOW2_ZERO;
    if (keep)
        *new |= old &(QCOW2_OFFSET_MASK | QCOW2_COPIED);
    return true;
}

static int replace_entry(struct qcow2 *q, u64 offset, u64 new)
{
    struct qcow2_table *t;
    int ret = qcow2_l2_get_writable(q, qcow2_l1_index(q, offset), &t);
    u64 old;

    if (ret)
        return ret;
    old = qcow2_l2_entry(t, qcow2_l2_index(q, offset));
    if (!((old ^ new) & QCOW2_OFFSET_MASK) && !(old & QCOW2_COMPRESSED)) {
        qcow2_l2_set(t, qcow2_l2_index(q, offset), new);
        return 0;
    }
    ret = qcow2_free_entry(q, old);
    if (!ret)
        qcow2_l2_set(t, qcow2_l2_index(q, offset), new);
    return ret;
}

static int zero_piece(struct qcow2 *q, u64 offset, u64 len, bool unmap)
{
    struct extent e;
    u64 new;
    int ret = get_extent(q, offset, len, &e);

    if (ret || is_empty(q, &e, offset))
        return ret;
    /* The last cluster may reach beyond the disk's end. */
    if (len < q->cluster_size && (qcow2_in_cluster(q, offset) || offset + len < q->im.size))
        return write_zero_bytes(q, offset, len);
    if (!zero_entry(q, e.entry, unmap, &new))
        return write_zero_bytes(q, offset, len);
    return replace_entry(q, offset, new);
}

/* A cluster's part, or a whole cluster, each. */
static int for_each_piece(struct qcow2 *q, u64 offset, u64 len, bool unmap,
                          int (*fn)(struct qcow2 *q, u64 offset, u64 len, bool unmap))
{
    int ret;

    pthread_mutex_lock(&q->lock);
    ret = q->corrupt ? -EIO : 0;
    while (len && !ret) {
        u64 here = MIN(len, q->cluster_size - qcow2_in_cluster(q, offset));

        ret = fn(q, offset, here, unmap);
        if (!ret)
            ret = bound_memory(q);
        offset += here;
        len -= here;
    }
    pthread_mutex_unlock(&q->lock);
    return ret;
}

int qcow2_zero(struct disk *im, u64 offset, u64 len, bool unmap)
{
    return for_each_piece(qcow2_of(im), offset, len, unmap, zero_piece);
}

static int discard_piece(struct qcow2 *q, u64 offset, u64 len, bool unmap)
{
    struct extent e;
    u64 new = 0;
    int ret;

    if (len < q->cluster_size)
        return 0;
    ret = get_extent(q, offset, len, &e);
    if (ret || e.kind == EXTENT_ABSENT || !(e.entry & ~QCOW2_ZERO))
        return ret;
    /* What a backing image has behind it must not come up again. */
    if (q->im.backing && !zero_entry(q, e.entry, true, &new))
        return 0;
    return replace_entry(q, offset, new);
}

int qcow2_discard(struct disk *im, u64 offset, u64 len)
{
    return for_each_piece(qcow2_of(im), offset, len, true, discard_piece);
}

static int empty_piece(struct qcow2 *q, u64 offset, u64 len, bool unmap)
{
    struct extent e;
    int ret = get_extent(q, offset, len, &e);

    return ret || !e.entry ? ret : replace_entry(q, offset, 0);
}

int qcow2_empty(struct disk *im)
{
    struct qcow2 *q = qcow2_of(im);
    int ret = for_each_piece(q, 0, im->size, true, empty_piece);

    return ret ? ret : qcow2_flush(im);
}

/* ---- the rest ---- */

int qcow2_flush(struct disk *im)
{
    struct qcow2 *q = qcow2_of(im);
    int ret;

    if (im->read_only)
        return 0;
    pthread_mutex_lock(&q->lock);
    ret = qcow2_write_tables(q);
    pthread_mutex_unlock(&q->lock);
    return ret;
}

bool qcow2_map(struct disk *im, u64 offset, u64 len, bool write, u64 *file_offset)
{
    struct qcow2 *q = qcow2_of(im);
    const struct qcow2_table *t;
    struct extent e;
    bool found = false;

    if (qcow2_l1_index(q, offset) >= q->l1_size || pthread_mutex_trylock(&q->lock))
        return false;
    t = qcow2_l2_peek(q, qcow2_l1_index(q, offset));
    if (t && !(write && q->corrupt)) {
        find_extent(q, t, offset, len, &e);
        found = e.kind == EXTENT_DATA && e.len == len && (e.copied || !write);
        *file_offset = e.host;
    }
    pthread_mutex_unlock(&q->lock);
    return found;
}

int qcow2_status(struct disk *im, u64 offset, u64 *end, enum disk_status *status)
{
    static const enum disk_status of_kind[] = {
        [EXTENT_ABSENT] = DISK_ABSENT,
        [EXTENT_ZERO] = DISK_ZERO,
        [EXTENT_DATA] = DISK_DATA,
        [EXTENT_COMPRESSED] = DISK_DATA,
    };
    struct qcow2 *q = qcow2_of(im);
    struct extent e;
    int ret;

    pthread_mutex_lock(&q->lock);
    ret = get_extent(q, offset, *end - offset, &e);
    pthread_mutex_unlock(&q->lock);
    if (ret)
        return ret;
    *status = of_kind[e.kind];
    *end = offset + e.len;
    return 0;
}
