#define _GNU_SOURCE /* fallocate */

#include "control/cards.h"

#include "block/block.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>

static struct block_backend *open_backend(const char *path, const struct disk_options *options,
                                          struct event_loop *loop, struct error *err)
{
    struct disk *disk = disk_open(path, options, err);
    struct block_backend *backend = disk ? block_create(disk, loop, false, err) : NULL;

    if (disk && !backend)
        disk_close(disk);
    return backend;
}

struct block_backend *cards_open_pmem(const struct vm_pmem *p, struct event_loop *loop,
                                      struct error *err)
{
    struct disk_options options = {.format = "raw", .read_only = p->read_only};
    struct block_backend *b = open_backend(p->path, &options, loop, err);

    /* A store to a hole that can't be filled would be the end of this process (SIGBUS). */
    if (!b || p->read_only || fallocate(block_fd(b), 0, 0, (off_t)block_size(b)) == 0 ||
        errno == EOPNOTSUPP)
        return b;
    error_host(err, errno, "%s: no space for all of it", p->path);
    block_destroy(b);
    return NULL;
}

int cards_open_disk(const struct vm_disk *d, struct event_loop *loop, struct machine_disk *out,
                    struct error *err)
{
    struct disk_options options = {.format = d->format[0] ? d->format : NULL,
                                   .read_only = d->read_only};
    struct block_backend *backend =
        d->vhost_user ? NULL : open_backend(d->path, &options, loop, err);

    if (!backend && !d->vhost_user)
        return -EIO;
    *out = (struct machine_disk){
        .backend = backend,
        .vhost_user = d->vhost_user ? d->path : NULL,
        .serial = d->serial[0] ? d->serial : NULL,
        .stop_on_error = d->stop_on_error,
        .bus = d->bus,
        .cdrom = d->cdrom,
    };
    return 0;
}

struct net_backend *cards_open_net(const char *spec, const char *name, unsigned n,
                                   struct event_loop *loop, struct error *err)
{
    char seed[128];

    snprintf(seed, sizeof(seed), "%s.%u", name, n);
    return net_open(spec, seed, loop, err);
}
