/*
 * A disk image: a format's way of keeping a disk in a file. All operations block; block/block.h runs them
 * beside the guest, and `doppel image` calls them directly.
 *
 * Unless said otherwise operations may run on several threads at once, return 0 or -errno, and take ranges that
 * lie within [0, size), whole or not. A write or discard that a read overlaps in time may or may not be seen by it.
 */
#ifndef DOPPEL_BLOCK_DISK_H
#define DOPPEL_BLOCK_DISK_H

#include "block/file.h"
#include "host/error.h"
#include "host/types.h"

#include <stdio.h>

struct disk;

enum disk_status {
    DISK_DATA,
    DISK_ZERO,
    DISK_ABSENT, /* the backing image's business; zeroes where that has nothing */
};

struct disk_check {
    u64 corruptions; /* what may lose data */
    u64 leaks;       /* clusters that nobody uses: lost space */
    u64 repaired;    /* of both */
    u64 clusters;    /* of data, in use */
};

struct disk_ops {
    const char *format;
    int (*read)(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len);
    int (*write)(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len);
    /*
     * Optional: im->cluster_size bytes at a multiple of that, compressed if that makes them smaller; behind the
     * disk's end they are zeroes.
     */
    int (*write_packed)(struct disk *im, u64 offset, const u8 *data);
    /* unmap: the space may be given back. */
    int (*zero)(struct disk *im, u64 offset, u64 len, bool unmap);
    /* What was there may be lost; nothing else may. */
    int (*discard)(struct disk *im, u64 offset, u64 len);
    /* What was written before is on the medium, and found there. */
    int (*flush)(struct disk *im);
    /*
     * Without blocking: where in the file [offset, offset + len) lies, for reading or overwriting in place.
     * False: it doesn't lie there in one piece, or to find it takes time.
     */
    bool (*map)(struct disk *im, u64 offset, u64 len, bool write, u64 *file_offset);
    /* What [offset, *end) is, all the same; *end is at most the `end` given. */
    int (*status)(struct disk *im, u64 offset, u64 *end, enum disk_status *status);
    /* Not while anything else runs: */
    int (*resize)(struct disk *im, u64 size, struct error *err);
    int (*check)(struct disk *im, bool repair, struct disk_check *result, struct error *err);
    /* Forgets all that the image has of its own, so that the backing image shows. */
    int (*empty)(struct disk *im);
    void (*info)(struct disk *im, FILE *out);
    int (*close)(struct disk *im); /* frees it; what couldn't be written at the end is told */
    /* Whether a discard or zeroing must not overlap with mapped transfers. */
    bool discard_is_exclusive;
};

struct disk {
    const struct disk_ops *ops;
    struct block_file file;
    u64 size;
    bool read_only;
    u32 cluster_size;     /* for write_packed */
    struct disk *backing; /* NULL: none */
};

struct disk_options {
    const char *format; /* "raw", "qcow2", or NULL: as the file looks */
    bool read_only;
    bool repair;     /* open an image that needs repair, for that */
    bool no_backing; /* leave the backing image closed: for metadata only */
    unsigned depth;  /* of backing images above; the formats' own */
};

/* NULL with err set: what, where, how to mend it. */
struct disk *disk_open(const char *path, const struct disk_options *options, struct error *err);
/* 0 or -errno. NULL is fine. */
int disk_close(struct disk *im);

int disk_read(struct disk *im, u64 offset, void *buf, u64 len);
int disk_write(struct disk *im, u64 offset, const void *buf, u64 len);

/* The formats' own openers and creators. */
struct disk *raw_open(struct block_file *file, const struct disk_options *options,
                      struct error *err);
struct disk *qcow2_open(struct block_file *file, const struct disk_options *options,
                        struct error *err);
bool qcow2_probe(const u8 *header, size_t len);

struct disk_create {
    const char *format;
    u64 size;
    bool size_given;            /* else it is the backing image's */
    const char *backing;        /* NULL: none */
    const char *backing_format; /* NULL: probed, and written down */
    u32 cluster_size;           /* 0: 64 KiB */
    unsigned version;           /* of qcow2: 2 or 3; 0: 3 */
    bool zstd;                  /* what is compressed is so by zstd, not zlib: version 3 */
    bool replace;               /* an existing file */
};

int disk_create(const char *path, const struct disk_create *options, struct error *err);
int qcow2_create(struct block_file *file, const struct disk_create *options, struct error *err);

#define DISK_SIZE_MAX BIT(60)
#define DISK_SECTOR 512

#endif
