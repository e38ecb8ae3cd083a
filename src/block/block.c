/*
 * A request takes one of two ways. Where the format can say at once where in the file it lies, in one piece,
 * the file is read or written there (aio_transfer). All else may block: to find or allocate clusters, to unpack
 * them, to flush; a thread of the pool does it by the format's own operation.
 *
 * A discard may give a cluster away that a transfer of the first kind still writes to. So, where the format says
 * so, it waits until nothing is under way, and what comes after it waits for it.
 *
 * A request of several ranges, or with a flush behind it, takes one such step after another, and waits its turn for
 * each.
 */
#include "block/block.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct block_backend {
    struct disk *disk;
    struct aio *aio;
    unsigned in_flight;
    bool exclusive; /* one that must be alone is under way */
    struct block_request *waiting, **waiting_end;
    void (*stop)(void *opaque, const char *path, int error); /* NULL: failures are told */
    void *stop_opaque;
    struct block_request *kept; /* failed ones, since a stop */
};

/* What the present step of a request does. */
static enum block_op step_op(const struct block_request *r)
{
    return r->flushing ? BLOCK_FLUSH : r->op;
}

static int run_request(struct aio_work *w)
{
    struct block_request *r = container_of(w, struct block_request, work);
    struct disk *d = r->backend->disk;

    switch (step_op(r)) {
    case BLOCK_READ:
        return d->ops->read(d, r->offset, r->iov, r->n, r->len);
    case BLOCK_WRITE:
        return d->ops->write(d, r->offset, r->iov, r->n, r->len);
    case BLOCK_FLUSH:
        return d->ops->flush(d);
    case BLOCK_DISCARD:
        return d->ops->discard(d, r->offset, r->len);
    case BLOCK_ZERO:
        return d->ops->zero(d, r->offset, r->len, r->unmap);
    }
    return -EINVAL;
}

static bool must_be_alone(const struct block_backend *b, const struct block_request *r)
{
    enum block_op op = step_op(r);

    return b->disk->ops->discard_is_exclusive && (op == BLOCK_DISCARD || op == BLOCK_ZERO);
}

static void pump(struct block_backend *b);

static void enqueue(struct block_backend *b, struct block_request *r)
{
    r->next = NULL;
    *b->waiting_end = r;
    b->waiting_end = &r->next;
}

static void take_range(struct block_request *r)
{
    r->offset = r->ranges[r->range].offset;
    r->len = r->ranges[r->range].len;
    r->unmap = r->ranges[r->range].unmap;
}

/* Whether there is more to do: the next range, or the flush at the end. */
static bool next_step(struct block_request *r)
{
    if (r->flushing)
        return false;
    if (r->ranges && r->range + 1 < r->nranges) {
        r->range++;
        take_range(r);
        return true;
    }
    r->flushing = r->fua;
    return r->fua;
}

static bool is_host_failure(int error)
{
    return error == -ENOSPC || error == -EDQUOT || error == -EIO;
}

static void keep(struct block_backend *b, struct block_request *r, int error)
{
    r->next = b->kept;
    b->kept = r;
    b->stop(b->stop_opaque, b->disk->file.path, -error);
}

static void step_done(struct aio_work *w, int result)
{
    struct block_request *r = container_of(w, struct block_request, work);
    struct block_backend *b = r->backend;

    b->in_flight--;
    b->exclusive = false;
    if (!result && next_step(r))
        enqueue(b, r);
    else if (b->stop && r->op != BLOCK_READ && is_host_failure(result))
        keep(b, r, result);
    else
        r->done(r, result);
    pump(b);
}

static void start(struct block_backend *b, struct block_request *r)
{
    struct disk *d = b->disk;
    enum block_op op = step_op(r);
    bool write = op == BLOCK_WRITE;
    u64 at;

    b->in_flight++;
    b->exclusive = must_be_alone(b, r);
    r->work = (struct aio_work){.done = step_done, .run = run_request};
    if ((op != BLOCK_READ && !write) || !r->n || !d->ops->map(d, r->offset, r->len, write, &at)) {
        aio_run(b->aio, &r->work);
        return;
    }
    r->work.file = &d->file;
    r->work.iov = r->iov;
    r->work.n = r->n;
    r->work.offset = at;
    r->work.len = r->len;
    r->work.write = write;
    aio_transfer(b->aio, &r->work);
}

static void pump(struct block_backend *b)
{
    while (b->waiting && !b->exclusive && !(b->in_flight && must_be_alone(b, b->waiting))) {
        struct block_request *r = b->waiting;

        b->waiting = r->next;
        if (!b->waiting)
            b->waiting_end = &b->waiting;
        start(b, r);
    }
}

void block_submit(struct block_backend *b, struct block_request *r)
{
    r->backend = b;
    r->range = 0;
    r->flushing = false;
    if (r->ranges)
        take_range(r);
    enqueue(b, r);
    pump(b);
}

void block_drain(struct block_backend *b)
{
    while (b->in_flight)
        aio_wait(b->aio);
}

void block_stop_on_error(struct block_backend *b,
                         void (*stop)(void *opaque, const char *path, int error), void *opaque)
{
    b->stop = stop;
    b->stop_opaque = opaque;
}

static struct block_request *take_kept(struct block_backend *b)
{
    struct block_request *r = b->kept;

    if (r)
        b->kept = r->next;
    return r;
}

void block_resume(struct block_backend *b)
{
    struct block_request *r;

    while ((r = take_kept(b)))
        enqueue(b, r);
    pump(b);
}

void block_give_up(struct block_backend *b)
{
    struct block_request *r;

    while ((r = take_kept(b)))
        r->done(r, -EIO);
}

struct block_backend *block_create(struct disk *disk, struct event_loop *loop, bool pool_only,
                                   struct error *err)
{
    struct block_backend *b = calloc(1, sizeof(*b));

    if (!b) {
        error_host(err, ENOMEM, "%s", disk->file.path);
        return NULL;
    }
    b->waiting_end = &b->waiting;
    b->aio = aio_create(loop, pool_only, err);
    if (!b->aio) {
        free(b);
        return NULL;
    }
    b->disk = disk;
    return b;
}

void block_destroy(struct block_backend *b)
{
    char *path;
    int ret;

    if (!b)
        return;
    block_drain(b);
    aio_destroy(b->aio);
    path = strdup(b->disk->file.path);
    ret = disk_close(b->disk);
    if (ret)
        log_error("%s: cannot write the rest of it: %s", path ? path : "disk", strerror(-ret));
    free(path);
    free(b);
}

u64 block_size(const struct block_backend *b)
{
    return b->disk->size;
}

bool block_is_read_only(const struct block_backend *b)
{
    return b->disk->read_only;
}

int block_fd(const struct block_backend *b)
{
    return b->disk->file.fd;
}

const char *block_path(const struct block_backend *b)
{
    return b->disk->file.path;
}
