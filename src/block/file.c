#define _GNU_SOURCE /* F_OFD_SETLK, fallocate */

#include "block/file.h"

#include "host/log.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define IOV_CHUNK 256 /* below IOV_MAX */

/*
 * Who reads an image holds the bytes that QEMU's programs hold then, and looks at those that would be held against it,
 * so that any number of both can read one (QEMU, block/file-posix.c: 100 and on, what one does; 200 and on, what one
 * lets nobody else do). Who writes holds every byte.
 */
enum { QEMU_READS = 100, QEMU_WRITES = 101, QEMU_RESIZES = 103 };
enum { QEMU_BARS_READING = 200, QEMU_BARS_WRITING = 201, QEMU_BARS_RESIZING = 203 };

/* A lock of `type` on len bytes from `start` on (0: all that follow). 0, or -1 and errno. */
static int set_lock(const struct block_file *f, short type, off_t start, off_t len)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = len};

    return fcntl(f->fd, F_OFD_SETLK, &lock);
}

/* Whether somebody else holds the byte. */
static bool is_held(const struct block_file *f, off_t byte)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};

    return fcntl(f->fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

static int lock_for_reading(const struct block_file *f)
{
    static const off_t held[] = {QEMU_READS, QEMU_BARS_WRITING, QEMU_BARS_RESIZING};
    static const off_t against[] = {QEMU_WRITES, QEMU_RESIZES, QEMU_BARS_READING};

    for (unsigned n = 0; n < ARRAY_SIZE(held); n++)
        if (set_lock(f, F_RDLCK, held[n], 1))
            return -1;
    for (unsigned n = 0; n < ARRAY_SIZE(against); n++)
        if (is_held(f, against[n])) {
            errno = EAGAIN;
            return -1;
        }
    return 0;
}

static int lock_file(struct block_file *f, struct error *err)
{
    if ((f->writable ? set_lock(f, F_WRLCK, 0, 0) : lock_for_reading(f)) == 0)
        return 0;
    if (errno == EAGAIN || errno == EACCES)
        return error_input(err, "%s: in use by another process: end that one first", f->path);
    /* A file system without locks: nothing guards the image there. */
    log_warn("%s: cannot lock it (%s): see to it yourself that nobody else writes to it", f->path,
             strerror(errno));
    return 0;
}

static int open_fd(struct block_file *f, const char *path, int flags, struct error *err)
{
    int ret;

    *f = (struct block_file){.fd = -1};
    f->path = strdup(path);
    if (!f->path)
        return error_host(err, ENOMEM, "%s", path);
    f->fd = open(path, flags | O_CLOEXEC | O_NONBLOCK, 0666);
    if (f->fd < 0) {
        ret = -errno;
        error_input(err, "%s: %s", path, strerror(errno));
        file_close(f);
        return ret;
    }
    f->writable = (flags & O_ACCMODE) == O_RDWR;
    return 0;
}

/*
 * Opened without blocking, for a FIFO would wait for ever; from then on with it, or io_uring gives up on what is
 * not in the page cache.
 */
static int set_blocking(struct block_file *f)
{
    int flags = fcntl(f->fd, F_GETFL);

    return flags < 0 || fcntl(f->fd, F_SETFL, flags & ~O_NONBLOCK) < 0 ? -errno : 0;
}

static int check_kind(struct block_file *f, struct error *err)
{
    struct stat st;

    if (fstat(f->fd, &st) < 0)
        return error_host(err, errno, "%s", f->path);
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return error_input(err, "%s: neither a file nor a block device", f->path);
    if (set_blocking(f) < 0)
        return error_host(err, errno, "%s", f->path);
    return 0;
}

int file_open(struct block_file *f, const char *path, bool writable, struct error *err)
{
    int ret = open_fd(f, path, writable ? O_RDWR : O_RDONLY, err);

    if (ret == -EACCES || ret == -EROFS) {
        if (writable)
            error_input(err, "%s: no permission to write: change that, or add readonly=on", path);
        return ret;
    }
    if (!ret)
        ret = check_kind(f, err);
    if (!ret)
        ret = lock_file(f, err);
    if (ret)
        file_close(f);
    return ret;
}

int file_create(struct block_file *f, const char *path, bool replace, struct error *err)
{
    int ret = open_fd(f, path, O_RDWR | O_CREAT | (replace ? 0 : O_EXCL), err);

    if (ret == -EEXIST)
        error_input(err, "%s: exists already: give another name, or --force to replace it", path);
    if (!ret)
        ret = check_kind(f, err);
    if (!ret)
        ret = lock_file(f, err);
    /* Only now, with the lock: it may be another's. A block device keeps its size. */
    if (!ret && ftruncate(f->fd, 0) < 0 && errno != EINVAL)
        ret = error_host(err, errno, "%s", path);
    if (ret)
        file_close(f);
    return ret;
}

void file_close(struct block_file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    free(f->path);
    *f = (struct block_file){.fd = -1};
}

int file_size(const struct block_file *f, u64 *size)
{
    struct stat st;

    if (fstat(f->fd, &st) < 0)
        return -errno;
    if (S_ISBLK(st.st_mode))
        return ioctl(f->fd, BLKGETSIZE64, size) < 0 ? -errno : 0;
    *size = (u64)st.st_size;
    return 0;
}

/* ---- whole transfers ---- */

/* Moves on by `done` bytes in a copy of a vector. */
static void iov_advance(struct iovec **iov, unsigned *n, size_t done)
{
    while (*n && done >= (*iov)->iov_len) {
        done -= (*iov)->iov_len;
        (*iov)++;
        (*n)--;
    }
    if (*n) {
        (*iov)->iov_base = (u8 *)(*iov)->iov_base + done;
        (*iov)->iov_len -= done;
    }
}

static void iov_zero(const struct iovec *iov, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        memset(iov[i].iov_base, 0, iov[i].iov_len);
}

static int transfer_chunk(const struct block_file *f, u64 *offset, const struct iovec *from,
                          unsigned n, bool write)
{
    struct iovec copy[IOV_CHUNK], *iov = copy;

    memcpy(copy, from, n * sizeof(copy[0]));
    iov_advance(&iov, &n, 0); /* empty ones at the start */
    while (n) {
        ssize_t done = write ? pwritev(f->fd, iov, (int)n, (off_t)*offset)
                             : preadv(f->fd, iov, (int)n, (off_t)*offset);

        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -errno;
        if (done == 0 && write)
            return -EIO;
        if (done == 0) {
            for (unsigned i = 0; i < n; i++)
                *offset += iov[i].iov_len;
            iov_zero(iov, n);
            return 0;
        }
        *offset += (u64)done;
        iov_advance(&iov, &n, (size_t)done);
    }
    return 0;
}

static int transfer(const struct block_file *f, u64 offset, const struct iovec *iov, unsigned n,
                    bool write)
{
    int ret = 0;

    while (n && !ret) {
        unsigned here = MIN(n, (unsigned)IOV_CHUNK);

        ret = transfer_chunk(f, &offset, iov, here, write);
        iov += here;
        n -= here;
    }
    return ret;
}

int file_readv(const struct block_file *f, u64 offset, const struct iovec *iov, unsigned n)
{
    return transfer(f, offset, iov, n, false);
}

int file_writev(const struct block_file *f, u64 offset, const struct iovec *iov, unsigned n)
{
    return transfer(f, offset, iov, n, true);
}

int file_read(const struct block_file *f, u64 offset, void *buf, u64 len)
{
    struct iovec iov = {buf, len};

    return transfer(f, offset, &iov, 1, false);
}

int file_write(const struct block_file *f, u64 offset, const void *buf, u64 len)
{
    struct iovec iov = {(void *)buf, len};

    return transfer(f, offset, &iov, 1, true);
}

static int write_zeroes(const struct block_file *f, u64 offset, u64 len)
{
    static const u8 zeroes[KIB(64)];

    while (len) {
        u64 here = MIN(len, sizeof(zeroes));
        int ret = file_write(f, offset, zeroes, here);

        if (ret)
            return ret;
        offset += here;
        len -= here;
    }
    return 0;
}

static int punch(const struct block_file *f, u64 offset, u64 len)
{
    return fallocate(f->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len)
               ? -errno
               : 0;
}

int file_zero(const struct block_file *f, u64 offset, u64 len, bool unmap)
{
    u64 size;
    int ret = file_size(f, &size);

    if (ret || !len)
        return ret;
    /* A hole can't make a file longer. */
    if (offset + len <= size && unmap && punch(f, offset, len) == 0)
        return 0;
    if (offset + len <= size && fallocate(f->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
                                          (off_t)offset, (off_t)len) == 0)
        return 0;
    return write_zeroes(f, offset, len);
}

int file_discard(const struct block_file *f, u64 offset, u64 len)
{
    int ret = len ? punch(f, offset, len) : 0;

    return ret == -EOPNOTSUPP || ret == -ENODEV ? 0 : ret;
}

int file_sync(const struct block_file *f)
{
    return fdatasync(f->fd) < 0 ? -errno : 0;
}
