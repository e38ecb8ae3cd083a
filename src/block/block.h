/*
 * A disk as a device sees it: requests that are done some time later, one after another or at once.
 *
 * All on the event loop's thread. A request's `done` is called from the loop (or from block_drain and
 * block_give_up), never from block_submit, with no lock held. Requests that are under way together are done in
 * any order; a flush covers those that were done before it was submitted.
 *
 * What the host can't do for want of space, or by an I/O error, may be kept instead of told: see
 * block_stop_on_error.
 */
#ifndef DOPPEL_BLOCK_BLOCK_H
#define DOPPEL_BLOCK_BLOCK_H

#include "block/aio.h"
#include "block/disk.h"

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH, BLOCK_DISCARD, BLOCK_ZERO };

struct block_backend;

struct block_range {
    u64 offset, len;
    bool unmap;
};

struct block_request {
    enum block_op op;
    u64 offset, len; /* within the disk; of whole sectors */
    const struct iovec *iov;
    unsigned n;
    bool unmap; /* BLOCK_ZERO: the space may be given back */
    bool fua;   /* done only when it is on the medium: a flush follows it */
    /* BLOCK_DISCARD and BLOCK_ZERO: these, one after another, in place of offset, len and unmap. NULL: none. */
    const struct block_range *ranges;
    unsigned nranges;
    void (*done)(struct block_request *r, int result); /* 0 or -errno */
    /* the backend's own */
    unsigned range;
    bool flushing;
    struct block_backend *backend;
    struct block_request *next;
    struct aio_work work;
};

/* Takes the disk over, and closes it at the end. NULL with err set (the disk is the caller's then). */
struct block_backend *block_create(struct disk *disk, struct event_loop *loop, bool pool_only,
                                   struct error *err);
/* Finishes what is under way, and writes what the format still has in memory. NULL is fine. */
void block_destroy(struct block_backend *b);

u64 block_size(const struct block_backend *b);
bool block_is_read_only(const struct block_backend *b);
const char *block_path(const struct block_backend *b);
/* The file; of a raw disk its bytes are the disk's. The backend's to close. */
int block_fd(const struct block_backend *b);

void block_submit(struct block_backend *b, struct block_request *r);
/* Waits until all of it is done, or kept. */
void block_drain(struct block_backend *b);

/*
 * From now on, what would change the disk and fails with ENOSPC, EDQUOT or EIO is not told: stop(opaque, path, errno)
 * is called, with no lock held, and the request kept until block_resume or block_give_up.
 */
void block_stop_on_error(struct block_backend *b,
                         void (*stop)(void *opaque, const char *path, int error), void *opaque);
/* Tries again what was kept. */
void block_resume(struct block_backend *b);
/* Tells it to be failed after all: nothing is kept afterwards. */
void block_give_up(struct block_backend *b);

#endif
