/*
 * A disk image whose writes fail, or whose requests take as long, as a test says, and that counts its flushes. Threads
 * of a pool call it.
 */
#ifndef DOPPEL_TESTS_FAULTY_DISK_H
#define DOPPEL_TESTS_FAULTY_DISK_H

#include "block/disk.h"

#include <poll.h>
#include <stdlib.h>

struct faulty {
    struct disk d;
    struct disk *real;
    int error;       /* of writes */
    int flush_error; /* of flushes */
    int held;        /* while it is 1, nothing is done */
    unsigned flushes;
};

static struct faulty *faulty_of(struct disk *d)
{
    return container_of(d, struct faulty, d);
}
static bool faulty_is_held(struct disk *d)
{
    return __atomic_load_n(&faulty_of(d)->held, __ATOMIC_SEQ_CST);
}
static void faulty_wait(struct disk *d)
{
    while (faulty_is_held(d))
        poll(NULL, 0, 1);
}
static int faulty_read(struct disk *d, u64 offset, const struct iovec *iov, unsigned n, u64 len)
{
    faulty_wait(d);
    return faulty_of(d)->real->ops->read(faulty_of(d)->real, offset, iov, n, len);
}
static int faulty_write(struct disk *d, u64 offset, const struct iovec *iov, unsigned n, u64 len)
{
    int error;

    faulty_wait(d);
    error = __atomic_load_n(&faulty_of(d)->error, __ATOMIC_SEQ_CST);
    return error ? error : faulty_of(d)->real->ops->write(faulty_of(d)->real, offset, iov, n, len);
}
static int faulty_zero(struct disk *d, u64 offset, u64 len, bool unmap)
{
    return faulty_of(d)->real->ops->zero(faulty_of(d)->real, offset, len, unmap);
}
static int faulty_discard(struct disk *d, u64 offset, u64 len)
{
    return faulty_of(d)->real->ops->discard(faulty_of(d)->real, offset, len);
}
static int faulty_flush(struct disk *d)
{
    int error;

    faulty_wait(d);
    __atomic_add_fetch(&faulty_of(d)->flushes, 1, __ATOMIC_SEQ_CST);
    error = __atomic_load_n(&faulty_of(d)->flush_error, __ATOMIC_SEQ_CST);
    return error ? error : faulty_of(d)->real->ops->flush(faulty_of(d)->real);
}
static bool faulty_map(struct disk *d, u64 offset, u64 len, bool write, u64 *at)
{
    return !faulty_is_held(d) &&
           !(write && __atomic_load_n(&faulty_of(d)->error, __ATOMIC_SEQ_CST)) &&
           faulty_of(d)->real->ops->map(faulty_of(d)->real, offset, len, write, at);
}
static int faulty_close(struct disk *d)
{
    int ret = disk_close(faulty_of(d)->real);

    free(faulty_of(d));
    return ret;
}

static const struct disk_ops faulty_ops = {
    .format = "faulty",
    .read = faulty_read,
    .write = faulty_write,
    .zero = faulty_zero,
    .discard = faulty_discard,
    .flush = faulty_flush,
    .map = faulty_map,
    .close = faulty_close,
    .discard_is_exclusive = true,
};

/* The image at `path`; what it fails with is `error`, at first nothing. NULL with err set. */
static inline struct faulty *faulty_open(const char *path, const struct disk_options *options,
                                         struct error *err)
{
    struct disk *real = disk_open(path, options, err);
    struct faulty *f = real ? calloc(1, sizeof(*f)) : NULL;

    if (!f)
        return NULL;
    f->real = real;
    f->d = (struct disk){.ops = &faulty_ops,
                         .file = real->file,
                         .size = real->size,
                         .read_only = options->read_only};
    return f;
}

#endif
