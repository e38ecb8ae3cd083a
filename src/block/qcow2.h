/*
 * qcow2, versions 2 and 3: what the files of the format share. The format is described by QEMU's
 * docs/interop/qcow2.txt, whose names are used here.
 *
 * An image is clusters. The L1 table points at L2 tables, which point at the data's clusters; the refcount
 * table points at refcount blocks, which count for each cluster who points at it.
 *
 * What a crash at any time must leave is an image in which every pointer leads to what was meant, and no
 * cluster is used that counts as free; space may be lost. All tables are changed in memory and go out by
 * qcow2_write_tables, in this order, with the medium's agreement (fdatasync) between the steps:
 *
 *   1. refcount blocks, then the refcount table, then the header if that table has moved;
 *   2. L2 tables, whose new clusters hold data and are counted by now;
 *   3. the L1 table, then the header if it has moved;
 *   4. only now clusters that lost their user count as free, for the next time around (`freed`).
 *
 * A guest's flush is that, so what it didn't flush may be missing after a crash, as on a disk with a cache.
 *
 * An image may be hostile. Sizes are bounded before anything is allocated; an L2 table's entries are checked when
 * it is loaded: whatever leaves the file or points at a table makes the image corrupt, which is written down,
 * and nothing is written to it any more. `tables` is the map of clusters that hold tables.
 *
 * The lock is held where a function says "locked".
 */
#ifndef DOPPEL_BLOCK_QCOW2_H
#define DOPPEL_BLOCK_QCOW2_H

#include "block/disk.h"

#include <pthread.h>

#define QCOW2_MAGIC 0x514649fbU
#define QCOW2_MIN_CLUSTER_BITS 9
#define QCOW2_MAX_CLUSTER_BITS 21
#define QCOW2_L1_MAX (MIB(32) / 8) /* entries */
#define QCOW2_REFTABLE_MAX (MIB(8) / 8)
#define QCOW2_SNAPSHOTS_MAX 65536

/* Offsets in the header. */
#define QCOW2_HEADER_L1_SIZE 36 /* 32 bits, then the table's offset */
#define QCOW2_HEADER_SIZE 24
#define QCOW2_HEADER_REFTABLE 48 /* 64 bits, then the number of its clusters */
#define QCOW2_HEADER_INCOMPATIBLE 72
#define QCOW2_HEADER_AUTOCLEAR 88
#define QCOW2_HEADER_COMPRESSION 104 /* a byte, if the header is longer */
#define QCOW2_V2_HEADER_LENGTH 72
#define QCOW2_V3_HEADER_LENGTH 104

#define QCOW2_INCOMPAT_DIRTY BIT(0)
#define QCOW2_INCOMPAT_CORRUPT BIT(1)
#define QCOW2_INCOMPAT_DATA_FILE BIT(2)
#define QCOW2_INCOMPAT_COMPRESSION BIT(3)
#define QCOW2_INCOMPAT_EXTENDED_L2 BIT(4)
#define QCOW2_AUTOCLEAR_BITMAPS BIT(0)

#define QCOW2_OFFSET_MASK 0x00fffffffffffe00ULL
#define QCOW2_COPIED BIT(63)
#define QCOW2_COMPRESSED BIT(62)
#define QCOW2_ZERO BIT(0)

enum qcow2_compression { QCOW2_ZLIB, QCOW2_ZSTD };

/* A table of one cluster in memory: L2 entries, or a refcount block. */
struct qcow2_table {
    u64 offset; /* in the file */
    u32 index;  /* in the table above it */
    bool dirty;
    struct qcow2_table *next, *prev; /* the least recently used last */
    u8 *data;
};

struct qcow2_cache {
    struct qcow2_table **by_index;
    u32 size;
    unsigned count, max;
    struct qcow2_table *first, *last;
};

struct qcow2 {
    struct disk im;
    pthread_mutex_t lock;

    unsigned version, cluster_bits, refcount_order;
    u64 cluster_size;
    u32 l2_entries; /* of a table */
    u32 refs;       /* of a refcount block */
    u64 incompatible, autoclear;
    u32 header_length;
    enum qcow2_compression compression;
    char *backing_name, *backing_format;
    u32 snapshots;
    u64 snapshots_offset;

    u64 *l1; /* host byte order */
    u32 l1_size;
    u64 l1_offset;
    u32 l1_dirty_first, l1_dirty_end; /* entries that changed */
    bool l1_moved;                    /* or grew: the header is to be told */

    u64 *reftable;
    u32 reftable_size; /* entries */
    u64 reftable_offset;
    bool reftable_dirty, reftable_moved;

    struct qcow2_cache l2, blocks;

    u64 end;         /* clusters of the file */
    u64 hint;        /* no cluster before it is free */
    u8 *tables;      /* a bit each cluster: it holds a table */
    u64 tables_size; /* clusters that it is for */
    u64 *freed;      /* clusters, one entry for each reference that goes */
    size_t nfreed, freed_capacity;
    bool corrupt;

    const u32 *in_use; /* during a repair: references to each of in_use_size clusters */
    u64 in_use_size;
    u8 *cluster_buffer, *packed_buffer; /* locked */
    u64 packed_end;                     /* where the next compressed cluster may go; 0: nowhere */
};

static inline struct qcow2 *qcow2_of(struct disk *im)
{
    return container_of(im, struct qcow2, im);
}
static inline u64 qcow2_round_up(const struct qcow2 *q, u64 bytes)
{
    return (bytes + q->cluster_size - 1) & ~(q->cluster_size - 1);
}
static inline u64 qcow2_in_cluster(const struct qcow2 *q, u64 offset)
{
    return offset & (q->cluster_size - 1);
}
static inline u32 qcow2_l1_index(const struct qcow2 *q, u64 offset)
{
    return (u32)(offset >> q->cluster_bits >> (q->cluster_bits - 3));
}
static inline u32 qcow2_l2_index(const struct qcow2 *q, u64 offset)
{
    return (u32)(offset >> q->cluster_bits & (q->l2_entries - 1));
}
static inline u64 get_be64(const void *p)
{
    u64 value;

    __builtin_memcpy(&value, p, sizeof(value));
    return __builtin_bswap64(value);
}
static inline u32 get_be32(const void *p)
{
    u32 value;

    __builtin_memcpy(&value, p, sizeof(value));
    return __builtin_bswap32(value);
}
static inline void put_be64(void *p, u64 value)
{
    value = __builtin_bswap64(value);
    __builtin_memcpy(p, &value, sizeof(value));
}
static inline void put_be32(void *p, u32 value)
{
    value = __builtin_bswap32(value);
    __builtin_memcpy(p, &value, sizeof(value));
}

/* ---- qcow2_table.c: tables in memory; locked ---- */

int qcow2_cache_init(struct qcow2_cache *c, u32 size, unsigned max);
int qcow2_cache_grow(struct qcow2_cache *c, u32 size);
void qcow2_cache_free(struct qcow2_cache *c);
/* The L2 table of an L1 index, NULL in *t when there is none. 0 or -errno. */
int qcow2_l2_get(struct qcow2 *q, u32 l1_index, struct qcow2_table **t);
/* The same when it is in memory; never reads. */
struct qcow2_table *qcow2_l2_peek(struct qcow2 *q, u32 l1_index);
/* For changing: makes one, or a copy of one that a snapshot shares. */
int qcow2_l2_get_writable(struct qcow2 *q, u32 l1_index, struct qcow2_table **t);
int qcow2_block_get(struct qcow2 *q, u32 index, struct qcow2_table **t);
/* A larger refcount table, with `wanted` entries or more. */
int qcow2_reftable_grow(struct qcow2 *q, u32 wanted);
/* A block that is missing, all zeroes but for itself; at a given cluster, which isn't counted yet. */
int qcow2_block_create(struct qcow2 *q, u32 index);
int qcow2_block_create_at(struct qcow2 *q, u32 index, u64 cluster);
u64 qcow2_l2_entry(const struct qcow2_table *t, u32 i);
void qcow2_l2_set(struct qcow2_table *t, u32 i, u64 entry);
/* All that changed, to the medium, in the order that the head of this file tells. */
int qcow2_write_tables(struct qcow2 *q);
/* Whether an L2 entry is possible in this image. */
bool qcow2_entry_is_valid(const struct qcow2 *q, u64 entry);
void qcow2_compressed_range(const struct qcow2 *q, u64 entry, u64 *offset, u64 *len);

/* ---- qcow2_alloc.c: clusters; locked ---- */

int qcow2_refcount_get(struct qcow2 *q, u64 cluster, u64 *count);
int qcow2_refcount_set(struct qcow2 *q, u64 cluster, u64 count);
u64 qcow2_block_ref(const struct qcow2 *q, const u8 *data, u32 i);
void qcow2_block_set_ref(const struct qcow2 *q, u8 *data, u32 i, u64 count);
/*
 * n clusters one after another, each with one reference: *offset. Nothing points at them yet. At most
 * qcow2_alloc_max: a refcount block in new space takes a cluster of it, so that longer runs are rare.
 */
int qcow2_alloc(struct qcow2 *q, u64 n, u64 *offset);
static inline u64 qcow2_alloc_max(const struct qcow2 *q)
{
    return q->refs / 2;
}
/* Any number, at the end of the file: for tables. */
int qcow2_alloc_run(struct qcow2 *q, u64 n, u64 *offset);
/* Takes an allocation back that nothing ever pointed at. */
void qcow2_unalloc(struct qcow2 *q, u64 offset, u64 n);
/* One reference less to each cluster of [offset, offset + len), once nothing on the medium points there. */
int qcow2_free_later(struct qcow2 *q, u64 offset, u64 len);
/* What an L2 entry pointed at. */
int qcow2_free_entry(struct qcow2 *q, u64 entry);
int qcow2_apply_freed(struct qcow2 *q);
/* The map of tables. */
int qcow2_mark_tables(struct qcow2 *q, u64 offset, u64 len);
bool qcow2_is_table(const struct qcow2 *q, u64 cluster);
int qcow2_grow_map(struct qcow2 *q, u64 clusters);
/* Notes that the image makes no sense; returns -EIO. */
int qcow2_corrupt(struct qcow2 *q, const char *what);

/* ---- qcow2_pack.c: compressed clusters; locked ---- */

/* The cluster of an L2 entry, into q->cluster_buffer. */
int qcow2_unpack(struct qcow2 *q, u64 entry);
/* Writes a whole cluster, compressed. *packed false: it doesn't get smaller, and was left alone. */
int qcow2_pack(struct qcow2 *q, u64 offset, const u8 *data, bool *packed);

/* ---- qcow2_io.c ---- */

int qcow2_read(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len);
int qcow2_write(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len);
int qcow2_write_packed(struct disk *im, u64 offset, const u8 *data);
int qcow2_zero(struct disk *im, u64 offset, u64 len, bool unmap);
int qcow2_discard(struct disk *im, u64 offset, u64 len);
int qcow2_flush(struct disk *im);
bool qcow2_map(struct disk *im, u64 offset, u64 len, bool write, u64 *file_offset);
int qcow2_status(struct disk *im, u64 offset, u64 *end, enum disk_status *status);
int qcow2_empty(struct disk *im);

/* ---- qcow2_check.c ---- */

int qcow2_check(struct disk *im, bool repair, struct disk_check *result, struct error *err);

#endif
