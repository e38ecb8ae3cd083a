/*
 * File work beside the event loop: reads and writes by io_uring, whatever else blocks in a small pool of
 * threads, which also does the reads and writes where the kernel has no io_uring.
 *
 * All functions, and all completions, are on the loop's thread; a completion never comes from within the
 * function that started the work.
 */
#ifndef DOPPEL_BLOCK_AIO_H
#define DOPPEL_BLOCK_AIO_H

#include "block/file.h"
#include "host/event_loop.h"

struct aio;

/* A piece of work. It belongs to the caller and stays where it is until `done` is called. */
struct aio_work {
    void (*done)(struct aio_work *w, int result); /* 0 or -errno */
    int (*run)(struct aio_work *w);               /* on a thread of the pool; returns the result */
    /* aio_transfer's */
    const struct block_file *file;
    const struct iovec *iov;
    unsigned n;
    u64 offset, len;
    bool write;
    /* aio's own */
    struct aio_work *next;
    int result;
};

/* pool_only: without io_uring. NULL with err set. */
struct aio *aio_create(struct event_loop *loop, bool pool_only, struct error *err);
/* Nothing may be under way. NULL is fine. */
void aio_destroy(struct aio *a);
bool aio_has_uring(const struct aio *a);

/* Runs w->run. */
void aio_run(struct aio *a, struct aio_work *w);
/* Reads or writes w->len bytes, which iov[0..n) hold. */
void aio_transfer(struct aio *a, struct aio_work *w);
/* Waits until something is done, and calls its `done`. Something must be under way. */
void aio_wait(struct aio *a);

#endif
