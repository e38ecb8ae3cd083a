/*
 * A disk as a device sees it: requests that are done some time later, one after another or at once.
 *
 * All on the event loop's thread. A request's `done` is called from the loop (or from block_drain), never
 * from block_submit, with no lock held. Requests that are under way together are done in any order; a flush
 * covers those that were done before it was submitted.
 */
#ifndef DOPPEL_BLOCK_BLOCK_H
#define DOPPEL_BLOCK_BLOCK_H

#include "block/aio.h"
#include "block/disk.h"

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH, BLOCK_DISCARD, BLOCK_ZERO };

struct block_backend;

struct block_request {
    enum block_op op;
    u64 offset, len; /* within the disk; of whole sectors */
    const struct iovec *iov;
    unsigned n;
    bool unmap;                                        /* BLOCK_ZERO: the space may be given back */
    void (*done)(struct block_request *r, int result); /* 0 or -errno */
    /* the backend's own */
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

void block_submit(struct block_backend *b, struct block_request *r);
/* Waits until all of it is done. */
void block_drain(struct block_backend *b);

#endif
