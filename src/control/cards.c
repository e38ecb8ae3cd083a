#include "control/cards.h"

#include "block/block.h"

#include <errno.h>
#include <stdio.h>

int cards_open_disk(const struct vm_disk *d, struct event_loop *loop, struct machine_disk *out,
                    struct error *err)
{
    struct disk_options options = {.format = d->format[0] ? d->format : NULL,
                                   .read_only = d->read_only};
    struct disk *disk = disk_open(d->path, &options, err);
    struct block_backend *backend;

    if (!disk)
        return -EIO;
    backend = block_create(disk, loop, false, err);
    if (!backend) {
        disk_close(disk);
        return -EIO;
    }
    *out = (struct machine_disk){
        .backend = backend,
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
