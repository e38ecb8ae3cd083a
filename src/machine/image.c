#include "machine/image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *kind_of(mode_t mode)
{
    if (S_ISDIR(mode))
        return "a directory";
    if (S_ISCHR(mode) || S_ISBLK(mode))
        return "a device";
    if (S_ISFIFO(mode))
        return "a pipe";
    return "a socket";
}

int image_open(struct image *img, const char *path, struct error *err)
{
    struct stat st;

    *img = (struct image){.path = path};
    /* O_NONBLOCK: opening a pipe must not wait for its writer. */
    img->fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (img->fd < 0) {
        const char *hint =
            errno == EACCES ? "; make it readable for this user" : "; check the path";

        return error_input(err, "cannot open '%s': %s%s", path, strerror(errno), hint);
    }
    if (fstat(img->fd, &st) < 0) {
        int ret = error_host(err, errno, "cannot stat '%s'", path);

        image_close(img);
        return ret;
    }
    if (!S_ISREG(st.st_mode)) {
        image_close(img);
        return error_input(err, "'%s' is %s; give a regular file", path, kind_of(st.st_mode));
    }
    if (st.st_size <= 0) {
        image_close(img);
        return error_input(err, "'%s' is empty; fetch or build it again", path);
    }
    img->size = (u64)st.st_size;
    return 0;
}

void image_close(struct image *img)
{
    if (img->fd >= 0)
        close(img->fd);
    img->fd = -1;
}

int image_read(const struct image *img, u64 offset, void *buf, u64 len, struct error *err)
{
    u64 done = 0;

    if (offset > img->size || len > img->size - offset)
        return error_input(err,
                           "'%s' is damaged or truncated: it refers to %llu bytes at offset %#llx, "
                           "but has only %llu bytes; fetch or build it again",
                           img->path, (unsigned long long)len, (unsigned long long)offset,
                           (unsigned long long)img->size);
    if (img->fd < 0) {
        memcpy(buf, img->data + offset, len);
        return 0;
    }
    while (done < len) {
        ssize_t n = pread(img->fd, (u8 *)buf + done, len - done, (off_t)(offset + done));

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return error_host(err, errno, "cannot read '%s'", img->path);
        if (n == 0)
            return error_input(err, "'%s' became shorter while it was read; try again", img->path);
        done += (u64)n;
    }
    return 0;
}

int image_read_all(const struct image *img, u8 **data, struct error *err)
{
    int ret;

    *data = malloc(img->size);
    if (!*data)
        return error_host(err, ENOMEM, "cannot read '%s'", img->path);
    ret = image_read(img, 0, *data, img->size, err);
    if (ret) {
        free(*data);
        *data = NULL;
    }
    return ret;
}

/*
 * Read to where it is to be: neither by a copy, which takes longer than the reading, nor by a mapping, as a file that
 * shrinks would turn an access into SIGBUS.
 */
int image_load(const struct image *img, u64 offset, u64 len, struct guest_memory *memory, gpa_t gpa,
               struct error *err)
{
    int ret = 0;

    while (len && !ret) {
        u64 n = len;
        void *host = memory_dma(memory, gpa, &n, true);

        if (!host)
            return error_input(err,
                               "'%s' does not fit: no memory at %#llx; give more with --memory",
                               img->path, (unsigned long long)gpa);
        ret = image_read(img, offset, host, n, err);
        memory_tell_written(memory, gpa, n);
        offset += n;
        gpa += n;
        len -= n;
    }
    return ret;
}
