/*
 * A file that the user wants in guest memory: a kernel, an initrd, a module. Every read is bounded
 * by the file's size, and nothing is read but what is asked for. The bytes may also lie in host
 * memory, so that an unpacked kernel goes the same way as one on disk.
 */
#ifndef DOPPEL_MACHINE_IMAGE_H
#define DOPPEL_MACHINE_IMAGE_H

#include "bus/memory.h"
#include "host/error.h"

struct image {
    const char *path; /* for messages; borrowed */
    int fd;           /* -1: the bytes are in data */
    const u8 *data;   /* borrowed */
    u64 size;
};

/* Opens a regular file that is not empty, else ERROR_INPUT. Close it with image_close. */
int image_open(struct image *img, const char *path, struct error *err);
void image_close(struct image *img);

static inline struct image image_of_bytes(const char *path, const void *data, u64 size)
{
    return (struct image){.path = path, .fd = -1, .data = data, .size = size};
}

/* Copies [offset, offset + len); ERROR_INPUT when that reaches beyond the file's end. */
int image_read(const struct image *img, u64 offset, void *buf, u64 len, struct error *err);

/* All of it: *data is to be freed. */
int image_read_all(const struct image *img, u8 **data, struct error *err);

/* As image_read, but into guest memory at gpa; ERROR_INPUT as well when there is no memory. */
int image_load(const struct image *img, u64 offset, u64 len, struct guest_memory *memory, gpa_t gpa,
               struct error *err);

#endif
