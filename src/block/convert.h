/*
 * Copying whole disks from image to image.
 */
#ifndef DOPPEL_BLOCK_CONVERT_H
#define DOPPEL_BLOCK_CONVERT_H

#include "block/disk.h"

/* Called now and then; bytes of the disk. */
typedef void disk_progress(void *opaque, u64 done, u64 total);

/*
 * All of `from`, its backing images included, to `to`, which is new, empty and at least as large; what is zero
 * stays unwritten, unless `to` has a backing image of its own (has_backing) that would show there. pack: compressed,
 * which `to` must be able to do (write_packed). 0 or -errno.
 */
int disk_copy(struct disk *from, struct disk *to, bool has_backing, bool pack,
              disk_progress *progress, void *opaque, struct error *err);

/* Moves what an image has of its own into its backing file, and empties it. */
int disk_commit(const char *path, const char *format, disk_progress *progress, void *opaque,
                struct error *err);

#endif
