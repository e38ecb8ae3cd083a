/*
 * Opening, creating, resizing and closing qcow2 images.
 */
#define _GNU_SOURCE /* asprintf */

#include "block/qcow2.h"

#include "host/log.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BACKING_NAME_MAX 1023
#define BACKING_DEPTH_MAX 32
#define EXTENSION_END 0
#define EXTENSION_BACKING_FORMAT 0xe2792acaU

#define L2_CACHE_BYTES MIB(16)
#define BLOCK_CACHE_BYTES MIB(4)
#define CACHE_MIN 8

struct header { /* in host byte order */
    u32 version, backing_size, cluster_bits, crypt_method, l1_size, reftable_clusters, snapshots;
    u64 backing_offset, size, l1_offset, reftable_offset, snapshots_offset;
    u64 incompatible, compatible, autoclear;
    u32 refcount_order, length;
    u8 compression;
};

bool qcow2_probe(const u8 *header, size_t len)
{
    return len >= 4 && get_be32(header) == QCOW2_MAGIC;
}

static void parse_header(const u8 *b, struct header *h)
{
    *h = (struct header){
        .version = get_be32(b + 4),
        .backing_offset = get_be64(b + 8),
        .backing_size = get_be32(b + 16),
        .cluster_bits = get_be32(b + 20),
        .size = get_be64(b + 24),
        .crypt_method = get_be32(b + 32),
        .l1_size = get_be32(b + 36),
        .l1_offset = get_be64(b + 40),
        .reftable_offset = get_be64(b + 48),
        .reftable_clusters = get_be32(b + 56),
        .snapshots = get_be32(b + 60),
        .snapshots_offset = get_be64(b + 64),
        .refcount_order = 4,
        .length = QCOW2_V2_HEADER_LENGTH,
    };
    if (h->version < 3)
        return;
    h->incompatible = get_be64(b + 72);
    h->compatible = get_be64(b + 80);
    h->autoclear = get_be64(b + 88);
    h->refcount_order = get_be32(b + 96);
    h->length = get_be32(b + 100);
    if (h->length > QCOW2_V3_HEADER_LENGTH)
        h->compression = b[QCOW2_HEADER_COMPRESSION];
}

static int check_features(const struct header *h, const char *path,
                          const struct disk_options *options, struct error *err)
{
    u64 known = QCOW2_INCOMPAT_DIRTY | QCOW2_INCOMPAT_CORRUPT | QCOW2_INCOMPAT_COMPRESSION;
    bool writes = !options->read_only && !options->repair;

    if (h->incompatible & QCOW2_INCOMPAT_EXTENDED_L2)
        return error_input(err,
                           "%s: has extended L2 entries, which this build can't read: convert it "
                           "with qemu-img convert",
                           path);
    if (h->incompatible & QCOW2_INCOMPAT_DATA_FILE)
        return error_input(err,
                           "%s: has its data in another file, which this build can't read: "
                           "convert it with qemu-img convert",
                           path);
    if (h->incompatible & ~known)
        return error_input(err, "%s: has unknown features (%#" PRIx64 "): use a newer program",
                           path, h->incompatible & ~known);
    if (h->crypt_method)
        return error_input(err,
                           "%s: is encrypted, which this build can't read: convert it with "
                           "qemu-img convert",
                           path);
    if (((h->incompatible & QCOW2_INCOMPAT_COMPRESSION) != 0) != (h->compression != 0) ||
        h->compression > QCOW2_ZSTD)
        return error_input(err, "%s: has an unknown compression (%u)", path, h->compression);
    if (writes && (h->incompatible & QCOW2_INCOMPAT_CORRUPT))
        return error_input(err,
                           "%s: is marked as corrupt: run doppel image check --repair, or add "
                           "readonly=on",
                           path);
    if (writes && (h->incompatible & QCOW2_INCOMPAT_DIRTY))
        return error_input(err, "%s: was not closed properly: run doppel image check --repair",
                           path);
    if (writes && (h->autoclear & QCOW2_AUTOCLEAR_BITMAPS))
        return error_input(err,
                           "%s: has bitmaps, which this build can't keep up to date: remove them "
                           "with qemu-img bitmap --remove, or add readonly=on",
                           path);
    return 0;
}

static int check_header(const struct header *h, const char *path, u64 file_bytes,
                        const struct disk_options *options, struct error *err)
{
    u64 cluster, per_l1, tables_end;

    if (h->version != 2 && h->version != 3)
        return error_input(err, "%s: qcow2 version %u is unknown", path, h->version);
    if (h->cluster_bits < QCOW2_MIN_CLUSTER_BITS || h->cluster_bits > QCOW2_MAX_CLUSTER_BITS)
        return error_input(err, "%s: impossible cluster size (2^%u)", path, h->cluster_bits);
    cluster = BIT(h->cluster_bits);
    per_l1 = cluster * (cluster / 8);
    if (h->version == 3 && (h->length < QCOW2_V3_HEADER_LENGTH || h->length > cluster ||
                            h->length % 8 || h->refcount_order > 6))
        return error_input(err, "%s: impossible header", path);
    if (check_features(h, path, options, err))
        return -EINVAL;
    if (h->size > DISK_SIZE_MAX || h->l1_size > QCOW2_L1_MAX ||
        h->l1_size < (h->size + per_l1 - 1) / per_l1)
        return error_input(err, "%s: its L1 table doesn't fit its size", path);
    tables_end = (file_bytes + cluster - 1) & ~(cluster - 1);
    if (h->l1_offset % cluster || h->reftable_offset % cluster || !h->reftable_offset ||
        !h->reftable_clusters || h->reftable_clusters > QCOW2_REFTABLE_MAX * 8 / cluster ||
        h->reftable_offset >= tables_end ||
        h->reftable_clusters * cluster > tables_end - h->reftable_offset ||
        (h->l1_size && (!h->l1_offset || h->l1_offset >= tables_end ||
                        8ULL * h->l1_size > tables_end - h->l1_offset)))
        return error_input(err, "%s: its tables lie outside of the file", path);
    if (h->snapshots > QCOW2_SNAPSHOTS_MAX || h->snapshots_offset % cluster)
        return error_input(err, "%s: impossible snapshots", path);
    if (h->backing_size > BACKING_NAME_MAX ||
        (h->backing_offset &&
         (h->backing_offset > cluster || h->backing_size > cluster - h->backing_offset)))
        return error_input(err, "%s: impossible name of a backing file", path);
    return 0;
}

/* ---- tables ---- */

static int read_table(struct qcow2 *q, u64 offset, u64 n, u64 **out)
{
    u64 *table = calloc(n ? n : 1, 8);
    int ret = table ? file_read(&q->im.file, offset, table, 8 * n) : -ENOMEM;

    if (ret) {
        free(table);
        return ret;
    }
    for (u64 i = 0; i < n; i++)
        table[i] = __builtin_bswap64(table[i]);
    *out = table;
    return 0;
}

/* Entries of the L1 or refcount table: aligned, in the file, and no two of them at one place. */
static int claim_tables(struct qcow2 *q, const u64 *entries, u32 n, u64 mask)
{
    for (u32 i = 0; i < n; i++) {
        u64 offset = entries[i] & mask;
        int ret;

        if (!offset && !(entries[i] & ~QCOW2_COPIED))
            continue;
        if (!offset || offset % q->cluster_size || offset >> q->cluster_bits >= q->end ||
            (entries[i] & ~(mask | (mask == QCOW2_OFFSET_MASK ? QCOW2_COPIED : 0))) ||
            qcow2_is_table(q, offset >> q->cluster_bits))
            return -EINVAL;
        ret = qcow2_mark_tables(q, offset, q->cluster_size);
        if (ret)
            return ret;
    }
    return 0;
}

static int load_tables(struct qcow2 *q, const struct header *h, struct error *err)
{
    const char *path = q->im.file.path;
    int ret = qcow2_grow_map(q, q->end + 1);

    if (!ret)
        ret = read_table(q, h->l1_offset, h->l1_size, &q->l1);
    if (!ret)
        ret = read_table(q, h->reftable_offset, q->reftable_size, &q->reftable);
    if (!ret)
        ret = qcow2_cache_init(&q->l2, h->l1_size,
                               MAX(CACHE_MIN, (unsigned)(L2_CACHE_BYTES >> q->cluster_bits)));
    if (!ret)
        ret = qcow2_cache_init(&q->blocks, q->reftable_size,
                               MAX(CACHE_MIN, (unsigned)(BLOCK_CACHE_BYTES >> q->cluster_bits)));
    q->cluster_buffer = malloc(q->cluster_size);
    q->packed_buffer = malloc(q->cluster_size + DISK_SECTOR);
    if (!q->cluster_buffer || !q->packed_buffer)
        ret = -ENOMEM;
    if (!ret)
        ret = qcow2_mark_tables(q, 0, q->cluster_size);
    if (!ret)
        ret = qcow2_mark_tables(q, h->l1_offset, 8ULL * h->l1_size);
    if (!ret)
        ret = qcow2_mark_tables(q, h->reftable_offset, 8ULL * q->reftable_size);
    if (ret)
        return error_host(err, -ret, "%s", path);
    ret = claim_tables(q, q->reftable, q->reftable_size, ~0x1ffULL);
    if (!ret)
        ret = claim_tables(q, q->l1, q->l1_size, QCOW2_OFFSET_MASK);
    if (ret == -EINVAL)
        return error_input(err, "%s: is corrupt: a table lies where none can be", path);
    return ret ? error_host(err, -ret, "%s", path) : 0;
}

/* ---- the backing image ---- */

/* The extension that names the backing image's format. */
static int read_extensions(struct qcow2 *q, const struct header *h, const u8 *cluster)
{
    u64 at = h->length, end = h->backing_offset ? h->backing_offset : q->cluster_size;

    while (at + 8 <= end) {
        u32 type = get_be32(cluster + at), len = get_be32(cluster + at + 4);

        at += 8;
        if (type == EXTENSION_END || len > end - at)
            return 0;
        if (type == EXTENSION_BACKING_FORMAT && !q->backing_format) {
            q->backing_format = strndup((const char *)cluster + at, len);
            if (!q->backing_format)
                return -ENOMEM;
        }
        at += (len + 7) & ~7ULL;
    }
    return 0;
}

static int read_names(struct qcow2 *q, const struct header *h, struct error *err)
{
    u8 *cluster = calloc(1, q->cluster_size);
    int ret = cluster ? file_read(&q->im.file, 0, cluster, q->cluster_size) : -ENOMEM;

    if (!ret)
        ret = read_extensions(q, h, cluster);
    if (!ret && h->backing_offset && h->backing_size) {
        q->backing_name = strndup((const char *)cluster + h->backing_offset, h->backing_size);
        ret = q->backing_name ? 0 : -ENOMEM;
    }
    free(cluster);
    return ret ? error_host(err, -ret, "%s", q->im.file.path) : 0;
}

static char *path_beside(const char *image, const char *name)
{
    const char *slash = strrchr(image, '/');
    char *path;

    if (name[0] == '/' || !slash)
        return strdup(name);
    return asprintf(&path, "%.*s/%s", (int)(slash - image), image, name) < 0 ? NULL : path;
}

static int open_backing(struct qcow2 *q, const struct disk_options *options, struct error *err)
{
    struct disk_options o = {
        .format = q->backing_format, .read_only = true, .depth = options->depth + 1};
    const char *name = q->backing_name;
    char *path;

    if (!name || options->no_backing)
        return 0;
    if (o.depth > BACKING_DEPTH_MAX)
        return error_input(err, "%s: more than %d backing files, or a circle of them",
                           q->im.file.path, BACKING_DEPTH_MAX);
    if (!strncmp(name, "file:", 5))
        name += 5;
    path = path_beside(q->im.file.path, name);
    if (!path)
        return error_host(err, ENOMEM, "%s", q->im.file.path);
    q->im.backing = disk_open(path, &o, err);
    free(path);
    if (!q->im.backing && !options->depth)
        error_prefix(err, "%s: backing file", q->im.file.path);
    return q->im.backing ? 0 : -EINVAL;
}

/* ---- opening and closing ---- */

static void free_all(struct qcow2 *q)
{
    disk_close(q->im.backing);
    qcow2_cache_free(&q->l2);
    qcow2_cache_free(&q->blocks);
    free(q->l1);
    free(q->reftable);
    free(q->tables);
    free(q->freed);
    free(q->cluster_buffer);
    free(q->packed_buffer);
    free(q->backing_name);
    free(q->backing_format);
    pthread_mutex_destroy(&q->lock);
    free(q);
}

static int qcow2_close(struct disk *im)
{
    struct qcow2 *q = qcow2_of(im);
    int ret = 0;

    /* Twice: the second time for the clusters that the first one freed. */
    if (!im->read_only && !q->corrupt) {
        ret = qcow2_flush(im);
        if (!ret)
            ret = qcow2_flush(im);
    }
    file_close(&im->file);
    free_all(q);
    return ret;
}

static int qcow2_resize(struct disk *im, u64 size, struct error *err);

static void qcow2_info(struct disk *im, FILE *out)
{
    struct qcow2 *q = qcow2_of(im);

    fprintf(out, "version: %u\ncluster size: %" PRIu64 "\n", q->version, q->cluster_size);
    fprintf(out, "compression: %s\n", q->compression == QCOW2_ZSTD ? "zstd" : "zlib");
    if (q->backing_name)
        fprintf(out, "backing file: %s%s%s%s\n", q->backing_name, q->backing_format ? " (" : "",
                q->backing_format ? q->backing_format : "", q->backing_format ? ")" : "");
    if (q->snapshots)
        fprintf(out, "internal snapshots: %u\n", q->snapshots);
    if (q->incompatible & QCOW2_INCOMPAT_DIRTY)
        fprintf(out, "dirty: yes\n");
    if (q->incompatible & QCOW2_INCOMPAT_CORRUPT)
        fprintf(out, "corrupt: yes\n");
}

static const struct disk_ops qcow2_ops = {
    .format = "qcow2",
    .read = qcow2_read,
    .write = qcow2_write,
    .write_packed = qcow2_write_packed,
    .zero = qcow2_zero,
    .discard = qcow2_discard,
    .flush = qcow2_flush,
    .map = qcow2_map,
    .status = qcow2_status,
    .resize = qcow2_resize,
    .check = qcow2_check,
    .empty = qcow2_empty,
    .info = qcow2_info,
    .close = qcow2_close,
    .discard_is_exclusive = true,
};

/* Features that a writer who doesn't know them must clear. */
static int clear_autoclear(struct qcow2 *q, struct error *err)
{
    u8 bits[8] = {0};
    int ret;

    if (q->im.read_only || !q->autoclear)
        return 0;
    ret = file_write(&q->im.file, QCOW2_HEADER_AUTOCLEAR, bits, sizeof(bits));
    q->autoclear = 0;
    return ret ? error_host(err, -ret, "%s", q->im.file.path) : 0;
}

static void init_geometry(struct qcow2 *q, const struct header *h, u64 file_bytes)
{
    q->version = h->version;
    q->cluster_bits = h->cluster_bits;
    q->cluster_size = BIT(h->cluster_bits);
    q->refcount_order = h->refcount_order;
    q->l2_entries = (u32)(q->cluster_size / 8);
    q->refs = (u32)(q->cluster_size * 8 >> h->refcount_order);
    q->incompatible = h->incompatible;
    q->autoclear = h->autoclear;
    q->header_length = h->length;
    q->compression = h->compression;
    q->snapshots = h->snapshots;
    q->snapshots_offset = h->snapshots_offset;
    q->l1_size = h->l1_size;
    q->l1_offset = h->l1_offset;
    q->reftable_size = (u32)(h->reftable_clusters * q->cluster_size / 8);
    q->reftable_offset = h->reftable_offset;
    q->end = qcow2_round_up(q, file_bytes) >> q->cluster_bits;
    q->corrupt = h->incompatible & QCOW2_INCOMPAT_CORRUPT;
    q->im.size = h->size;
    q->im.cluster_size = (u32)q->cluster_size;
}

struct disk *qcow2_open(struct block_file *file, const struct disk_options *options,
                        struct error *err)
{
    u8 bytes[DISK_SECTOR];
    struct header h;
    struct qcow2 *q;
    u64 file_bytes;
    int ret = file_read(file, 0, bytes, sizeof(bytes));

    if (!ret)
        ret = file_size(file, &file_bytes);
    if (ret) {
        error_host(err, -ret, "%s", file->path);
        return NULL;
    }
    if (!qcow2_probe(bytes, sizeof(bytes))) {
        error_input(err, "%s: is no qcow2 image", file->path);
        return NULL;
    }
    parse_header(bytes, &h);
    if (check_header(&h, file->path, file_bytes, options, err))
        return NULL;
    q = calloc(1, sizeof(*q));
    if (!q) {
        error_host(err, ENOMEM, "%s", file->path);
        return NULL;
    }
    pthread_mutex_init(&q->lock, NULL);
    q->im.ops = &qcow2_ops;
    q->im.file = *file;
    q->im.read_only = options->read_only;
    init_geometry(q, &h, file_bytes);
    if (load_tables(q, &h, err) || read_names(q, &h, err) || open_backing(q, options, err) ||
        clear_autoclear(q, err)) {
        free_all(q);
        return NULL;
    }
    return &q->im;
}

/* ---- changing the size ---- */

/* The disk's size in the header, once the L1 table has room for it. */
static int write_size(struct qcow2 *q, u64 size)
{
    u8 bytes[8];
    int ret = qcow2_write_tables(q);

    put_be64(bytes, size);
    if (!ret)
        ret = file_write(&q->im.file, QCOW2_HEADER_SIZE, bytes, sizeof(bytes));
    if (!ret)
        ret = file_sync(&q->im.file);
    if (!ret)
        q->im.size = size;
    return ret;
}

static int grow_l1(struct qcow2 *q, u32 size)
{
    u64 bytes = qcow2_round_up(q, 8ULL * size), offset, old_offset = q->l1_offset;
    u64 old_bytes = 8ULL * q->l1_size;
    u64 *grown = calloc(1, bytes);
    int ret = grown ? qcow2_cache_grow(&q->l2, size) : -ENOMEM;

    if (!ret)
        ret = qcow2_alloc_run(q, bytes >> q->cluster_bits, &offset);
    if (!ret)
        ret = qcow2_mark_tables(q, offset, bytes);
    if (ret) {
        free(grown);
        return ret;
    }
    memcpy(grown, q->l1, old_bytes);
    free(q->l1);
    q->l1 = grown;
    q->l1_size = size;
    q->l1_offset = offset;
    q->l1_moved = true;
    return old_bytes ? qcow2_free_later(q, old_offset, old_bytes) : 0;
}

/* What lies behind the new end goes, so that it is not there again when the disk grows. */
static int cut(struct qcow2 *q, u64 size)
{
    u64 end = MIN(qcow2_round_up(q, size), q->im.size);
    int ret = qcow2_zero(&q->im, size, end - size, true);

    if (!ret)
        ret = qcow2_zero(&q->im, end, q->im.size - end, true);
    return ret;
}

/* The part of the backing image that comes into sight behind the old end must read as zeroes. */
static int hide_backing(struct qcow2 *q, u64 from, u64 to)
{
    if (!q->im.backing || from >= MIN(to, q->im.backing->size))
        return 0;
    return qcow2_zero(&q->im, from, MIN(to, q->im.backing->size) - from, true);
}

static int qcow2_resize(struct disk *im, u64 size, struct error *err)
{
    struct qcow2 *q = qcow2_of(im);
    u64 per_l1 = q->cluster_size * q->l2_entries, old = im->size;
    u64 l1_size = (size + per_l1 - 1) / per_l1;
    int ret = 0;

    if (q->snapshots)
        return error_input(err, "%s: has internal snapshots of another size: remove them first",
                           im->file.path);
    if (size > DISK_SIZE_MAX || l1_size > QCOW2_L1_MAX)
        return error_input(err, "%s: clusters of %" PRIu64 " bytes don't allow that size",
                           im->file.path, q->cluster_size);
    if (size < old)
        ret = cut(q, size);
    if (!ret && l1_size > q->l1_size) {
        pthread_mutex_lock(&q->lock);
        ret = grow_l1(q, (u32)l1_size);
        pthread_mutex_unlock(&q->lock);
    }
    pthread_mutex_lock(&q->lock);
    if (!ret)
        ret = write_size(q, size);
    pthread_mutex_unlock(&q->lock);
    if (!ret && size > old)
        ret = hide_backing(q, old, size);
    return ret ? error_host(err, -ret, "%s: cannot change its size", im->file.path) : 0;
}

/* ---- creating ---- */

static void put_extension(u8 *header, u64 *at, u32 type, const void *data, u32 len)
{
    put_be32(header + *at, type);
    put_be32(header + *at + 4, len);
    memcpy(header + *at + 8, data, len);
    *at += 8 + ((len + 7) & ~7ULL);
}

/* Cluster 0: header; 1: refcount table; 2: refcount block; from 3 on: the L1 table. */
enum { CREATE_REFTABLE = 1, CREATE_BLOCK = 2, CREATE_L1 = 3 };

static void fill_header(u8 *b, const struct disk_create *o, unsigned cluster_bits, u64 l1_size)
{
    u64 cluster = BIT(cluster_bits), at = QCOW2_V2_HEADER_LENGTH;
    unsigned version = o->version ? o->version : 3;

    put_be32(b, QCOW2_MAGIC);
    put_be32(b + 4, version);
    put_be32(b + 20, cluster_bits);
    put_be64(b + 24, o->size);
    put_be32(b + 36, (u32)l1_size);
    put_be64(b + 40, l1_size ? CREATE_L1 * cluster : 0);
    put_be64(b + 48, CREATE_REFTABLE * cluster);
    put_be32(b + 56, 1);
    if (version >= 3) {
        put_be32(b + 96, 4); /* refcounts of 16 bits */
        at = o->zstd ? QCOW2_V3_HEADER_LENGTH + 8 : QCOW2_V3_HEADER_LENGTH;
        put_be32(b + 100, (u32)at);
    }
    if (o->zstd) {
        put_be64(b + QCOW2_HEADER_INCOMPATIBLE, QCOW2_INCOMPAT_COMPRESSION);
        b[QCOW2_HEADER_COMPRESSION] = QCOW2_ZSTD;
    }
    if (!o->backing)
        return;
    put_extension(b, &at, EXTENSION_BACKING_FORMAT, o->backing_format,
                  (u32)strlen(o->backing_format));
    put_be32(b + at, EXTENSION_END);
    at += 8;
    put_be64(b + 8, at);
    put_be32(b + 16, (u32)strlen(o->backing));
    memcpy(b + at, o->backing, strlen(o->backing));
}

static int write_new_image(struct block_file *file, const struct disk_create *o,
                           unsigned cluster_bits, u64 l1_size)
{
    u64 cluster = BIT(cluster_bits), l1_clusters = (8 * l1_size + cluster - 1) >> cluster_bits;
    u8 *b = calloc(CREATE_L1, cluster);
    int ret;

    if (!b)
        return -ENOMEM;
    fill_header(b, o, cluster_bits, l1_size);
    put_be64(b + CREATE_REFTABLE * cluster, CREATE_BLOCK * cluster);
    for (u64 i = 0; i < CREATE_L1 + l1_clusters; i++)
        b[CREATE_BLOCK * cluster + 2 * i + 1] = 1;
    ret = file_write(file, 0, b, CREATE_L1 * cluster);
    if (!ret)
        ret = file_zero(file, CREATE_L1 * cluster, l1_clusters * cluster, false);
    if (!ret)
        ret = file_sync(file);
    free(b);
    return ret;
}

int qcow2_create(struct block_file *file, const struct disk_create *o, struct error *err)
{
    u32 cluster = o->cluster_size ? o->cluster_size : KIB(64);
    unsigned bits = (unsigned)__builtin_ctz(cluster);
    u64 per_l1 = (u64)cluster * (cluster / 8), l1_size = (o->size + per_l1 - 1) / per_l1;
    int ret;

    if ((cluster & (cluster - 1)) || bits < QCOW2_MIN_CLUSTER_BITS || bits > QCOW2_MAX_CLUSTER_BITS)
        return error_input(err, "%s: the cluster size must be a power of two from 512 to 2M",
                           file->path);
    if (o->backing && strlen(o->backing) + 256 > MIN(cluster, BACKING_NAME_MAX))
        return error_input(err, "%s: the backing file's name is too long", file->path);
    /* What is there before the first refcount block is full must be counted by one. */
    if (l1_size > QCOW2_L1_MAX || CREATE_L1 + (8 * l1_size + cluster - 1) / cluster > cluster / 2)
        return error_input(err, "%s: clusters of %u bytes don't allow that size", file->path,
                           cluster);
    ret = write_new_image(file, o, bits, l1_size);
    return ret ? error_host(err, -ret, "%s", file->path) : 0;
}
