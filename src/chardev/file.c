/*
 * Output into a file. The name may also be of a FIFO or a terminal: whatever can be opened for writing.
 */
#include "chardev/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct file_chardev {
    struct chardev chr;
    struct chardev_writer writer;
    int fd;
    char *path;
};

static struct file_chardev *file_of(struct chardev *chr)
{
    return container_of(chr, struct file_chardev, chr);
}

static void file_rings_changed(struct chardev *chr)
{
    pthread_cond_signal(&chr->changed);
}

static void file_close(struct chardev *chr)
{
    struct file_chardev *file = file_of(chr);

    chardev_writer_stop(&file->writer);
    close(file->fd);
    free(file->path);
}

static const struct chardev_backend file_backend = {
    .rings_changed = file_rings_changed,
    .close = file_close,
};

struct chardev *chardev_file_open(struct event_loop *loop, const char *path, struct error *err)
{
    /* Non-blocking to open, as a FIFO that nobody reads would hang us; the writer wants it blocking. */
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0644);
    struct file_chardev *file;
    struct chardev *chr;

    if (fd < 0) {
        error_input(err, "can't write to %s: %s", path, strerror(errno));
        return NULL;
    }
    chr = chardev_new(sizeof(*file), &file_backend, loop);
    if (!chr) {
        error_host(err, ENOMEM, "%s", path);
        close(fd);
        return NULL;
    }
    file = file_of(chr);
    file->fd = fd;
    file->path = strdup(path);
    if (!file->path || fcntl(fd, F_SETFL, 0) < 0) {
        error_host(err, errno, "%s", path);
    } else if (chardev_writer_start(&file->writer, chr, fd, file->path, err) == 0) {
        return chr;
    }
    close(fd);
    free(file->path);
    chardev_free(chr);
    return NULL;
}
