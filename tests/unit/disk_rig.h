/* For the tests of drives: a rig with an event loop, and a disk of a pattern in a file that is gone already. */
#ifndef DOPPEL_TESTS_DISK_RIG_H
#define DOPPEL_TESTS_DISK_RIG_H

#include "block/block.h"
#include "pci_rig.h"

#include <stdio.h>
#include <unistd.h>

/* What is at an offset of the disk at first. */
static inline u8 disk_pattern(u64 offset)
{
    return (u8)(offset ^ offset >> 9 ^ offset >> 17);
}

static inline struct rig *disk_rig_create(void)
{
    struct rig *r = rig_create();

    r->env.loop = event_loop_create(&r->err);
    if (!r->env.loop)
        abort();
    return r;
}

static inline void disk_rig_destroy(struct rig *r)
{
    event_loop_destroy(r->env.loop);
    rig_destroy(r);
}

static inline struct block_backend *rig_disk(struct rig *r, u64 size, bool read_only)
{
    struct disk_options options = {.format = "raw", .read_only = read_only};
    char path[] = "/tmp/doppel-test.XXXXXX";
    int fd = mkstemp(path);
    u8 *bytes = malloc(size);
    struct block_backend *backend;
    struct disk *disk;

    if (fd < 0 || !bytes)
        abort();
    for (u64 i = 0; i < size; i++)
        bytes[i] = disk_pattern(i);
    if (write(fd, bytes, size) != (ssize_t)size)
        abort();
    free(bytes);
    close(fd);
    disk = disk_open(path, &options, &r->err);
    unlink(path);
    backend = disk ? block_create(disk, r->env.loop, true, &r->err) : NULL;
    if (!backend)
        abort();
    return backend;
}

#endif
