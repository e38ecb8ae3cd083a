/*
 * The raw format: the file is the disk.
 */
#define _GNU_SOURCE /* SEEK_DATA */

#include "block/disk.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct raw {
    struct disk im;
    bool guessed; /* that it is raw */
};

static int raw_read(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len)
{
    return file_readv(&im->file, offset, iov, n);
}

/*
 * A guest must not be able to turn a disk whose format was guessed into an image of another format, which
 * names files of the host: next time it would be opened as that.
 */
static bool makes_it_another_format(struct raw *r, u64 offset, const struct iovec *iov)
{
    static const u8 magic[] = {'Q', 'F', 'I', 0xfb};

    return r->guessed && offset < sizeof(magic) && iov[0].iov_len >= sizeof(magic) - offset &&
           !memcmp(iov[0].iov_base, magic + offset, sizeof(magic) - offset);
}

static int raw_write(struct disk *im, u64 offset, const struct iovec *iov, unsigned n, u64 len)
{
    if (makes_it_another_format(container_of(im, struct raw, im), offset, iov)) {
        log_once(LOG_WARN,
                 "%s: the guest writes a qcow2 header to it: give format=raw to allow that",
                 im->file.path);
        return -EPERM;
    }
    return file_writev(&im->file, offset, iov, n);
}

static int raw_zero(struct disk *im, u64 offset, u64 len, bool unmap)
{
    return file_zero(&im->file, offset, len, unmap);
}

static int raw_discard(struct disk *im, u64 offset, u64 len)
{
    return file_discard(&im->file, offset, len);
}

static int raw_flush(struct disk *im)
{
    return im->read_only ? 0 : file_sync(&im->file);
}

/* The first sector of a guessed one goes by raw_write. */
static bool raw_map(struct disk *im, u64 offset, u64 len, bool write, u64 *file_offset)
{
    if (write && offset < DISK_SECTOR && container_of(im, struct raw, im)->guessed)
        return false;
    *file_offset = offset;
    return true;
}

static int raw_status(struct disk *im, u64 offset, u64 *end, enum disk_status *status)
{
    off_t data = lseek(im->file.fd, (off_t)offset, SEEK_DATA), hole;

    *status = DISK_DATA;
    if (data < 0 && errno == ENXIO) {
        *status = DISK_ZERO;
    } else if (data > 0 && (u64)data > offset) {
        *status = DISK_ZERO;
        *end = MIN(*end, (u64)data);
    } else if (data >= 0) {
        hole = lseek(im->file.fd, (off_t)offset, SEEK_HOLE);
        if (hole > 0 && (u64)hole > offset)
            *end = MIN(*end, (u64)hole);
    }
    return 0;
}

static int raw_resize(struct disk *im, u64 size, struct error *err)
{
    if (ftruncate(im->file.fd, (off_t)size) < 0)
        return error_host(err, errno, "%s: cannot make it %llu bytes long", im->file.path,
                          (unsigned long long)size);
    im->size = size;
    return 0;
}

static int raw_check(struct disk *im, bool repair, struct disk_check *result, struct error *err)
{
    return error_input(err, "%s: a raw image has nothing to check", im->file.path);
}

static int raw_empty(struct disk *im)
{
    return -EOPNOTSUPP;
}

static void raw_info(struct disk *im, FILE *out)
{
}

static int raw_close(struct disk *im)
{
    file_close(&im->file);
    free(container_of(im, struct raw, im));
    return 0;
}

static const struct disk_ops raw_ops = {
    .format = "raw",
    .read = raw_read,
    .write = raw_write,
    .zero = raw_zero,
    .discard = raw_discard,
    .flush = raw_flush,
    .map = raw_map,
    .status = raw_status,
    .resize = raw_resize,
    .check = raw_check,
    .empty = raw_empty,
    .info = raw_info,
    .close = raw_close,
};

struct disk *raw_open(struct block_file *file, const struct disk_options *options,
                      struct error *err)
{
    struct raw *r = calloc(1, sizeof(*r));
    int ret;

    if (!r) {
        error_host(err, ENOMEM, "%s", file->path);
        return NULL;
    }
    ret = file_size(file, &r->im.size);
    if (ret) {
        error_host(err, -ret, "%s", file->path);
        free(r);
        return NULL;
    }
    r->im.ops = &raw_ops;
    r->im.file = *file;
    r->im.read_only = options->read_only;
    r->guessed = !options->format;
    return &r->im;
}
