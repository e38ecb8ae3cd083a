#define _GNU_SOURCE /* asprintf */

#include "block/disk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROBE_SIZE 512

static int probe(const struct block_file *file, bool *qcow2, struct error *err)
{
    u8 header[PROBE_SIZE];
    int ret = file_read(file, 0, header, sizeof(header));

    if (ret)
        return error_host(err, -ret, "%s", file->path);
    *qcow2 = qcow2_probe(header, sizeof(header));
    return 0;
}

struct disk *disk_open(const char *path, const struct disk_options *options, struct error *err)
{
    struct block_file file;
    struct disk *im;
    bool qcow2 = false;

    if (options->format && strcmp(options->format, "raw") && strcmp(options->format, "qcow2")) {
        error_input(err, "%s: unknown image format '%s': give raw or qcow2", path, options->format);
        return NULL;
    }
    if (file_open(&file, path, !options->read_only, err))
        return NULL;
    if (options->format)
        qcow2 = !strcmp(options->format, "qcow2");
    else if (probe(&file, &qcow2, err)) {
        file_close(&file);
        return NULL;
    }
    im = qcow2 ? qcow2_open(&file, options, err) : raw_open(&file, options, err);
    if (!im)
        file_close(&file);
    return im;
}

int disk_close(struct disk *im)
{
    return im ? im->ops->close(im) : 0;
}

int disk_read(struct disk *im, u64 offset, void *buf, u64 len)
{
    struct iovec iov = {buf, len};

    return im->ops->read(im, offset, &iov, 1, len);
}

int disk_write(struct disk *im, u64 offset, const void *buf, u64 len)
{
    struct iovec iov = {(void *)buf, len};

    return im->ops->write(im, offset, &iov, 1, len);
}

/* The backing image must be there and of use; its size is the default. */
static int take_backing(struct disk_create *o, const char *path, struct error *err)
{
    struct disk_options options = {.format = o->backing_format, .read_only = true};
    struct disk *backing = NULL;
    const char *slash = strrchr(path, '/');
    char *near = NULL;

    if (strcmp(o->format, "qcow2"))
        return error_input(err, "%s: only a qcow2 image can have a backing file", path);
    /* Relative names are relative to the image. */
    if (o->backing[0] != '/' && slash) {
        if (asprintf(&near, "%.*s/%s", (int)(slash - path), path, o->backing) < 0)
            return error_host(err, ENOMEM, "%s", path);
    }
    backing = disk_open(near ? near : o->backing, &options, err);
    free(near);
    if (!backing)
        return -EINVAL;
    o->backing_format = backing->ops->format;
    if (!o->size_given)
        o->size = backing->size;
    disk_close(backing);
    return 0;
}

static int create_raw(struct block_file *file, u64 size, struct error *err)
{
    u64 there = 0;

    if (ftruncate(file->fd, (off_t)size) == 0)
        return 0;
    if (errno == EINVAL && file_size(file, &there) == 0 && there >= size)
        return 0; /* a block device */
    return error_host(err, errno, "%s: cannot make it %llu bytes long", file->path,
                      (unsigned long long)size);
}

int disk_create(const char *path, const struct disk_create *options, struct error *err)
{
    struct disk_create o = *options;
    struct block_file file;
    int ret;

    if (o.backing) {
        ret = take_backing(&o, path, err);
        if (ret)
            return ret;
    }
    if (o.size > DISK_SIZE_MAX)
        return error_input(err, "%s: a disk can't be larger than 1024P", path);
    ret = file_create(&file, path, o.replace, err);
    if (ret)
        return ret;
    ret = strcmp(o.format, "qcow2") ? create_raw(&file, o.size, err) : qcow2_create(&file, &o, err);
    if (ret)
        unlink(path);
    file_close(&file);
    return ret;
}
