/* For the tests of drives: a rig with an event loop, and a disk of a pattern in a file that is gone already. */
#ifndef DOPPEL_TESTS_DISK_RIG_H
#define DOPPEL_TESTS_DISK_RIG_H

#include "block/block.h"
#include "faulty_disk.h"
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

/* A file with the pattern; `path` is a template for mkstemp, and becomes its name. */
static inline void rig_pattern_file(char *path, u64 size)
{
    int fd = mkstemp(path);
    u8 *bytes = malloc(size);

    if (fd < 0 || !bytes)
        abort();
    for (u64 i = 0; i < size; i++)
        bytes[i] = disk_pattern(i);
    if (write(fd, bytes, size) != (ssize_t)size)
        abort();
    free(bytes);
    close(fd);
}

static inline struct block_backend *rig_backend(struct rig *r, struct disk *disk)
{
    struct block_backend *backend = disk ? block_create(disk, r->env.loop, true, &r->err) : NULL;

    if (!backend)
        abort();
    return backend;
}

static inline struct block_backend *rig_disk(struct rig *r, u64 size, bool read_only)
{
    struct disk_options options = {.format = "raw", .read_only = read_only};
    char path[] = "/tmp/doppel-test.XXXXXX";
    struct disk *disk;

    rig_pattern_file(path, size);
    disk = disk_open(path, &options, &r->err);
    unlink(path);
    return rig_backend(r, disk);
}

/* The same, whose writes fail when a test says so. */
static inline struct block_backend *rig_faulty_disk(struct rig *r, u64 size, struct faulty **faulty)
{
    struct disk_options options = {.format = "raw"};
    char path[] = "/tmp/doppel-test.XXXXXX";

    rig_pattern_file(path, size);
    *faulty = faulty_open(path, &options, &r->err);
    unlink(path);
    return rig_backend(r, *faulty ? &(*faulty)->d : NULL);
}

#endif
