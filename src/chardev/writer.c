#include "chardev/internal.h"
#include "host/log.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/*
 * One write of at most len bytes. The thread can be cancelled only in here, where it holds nothing.
 * Another process may have made the descriptor non-blocking: then this waits.
 */
static ssize_t write_some(int fd, const u8 *buf, size_t len)
{
    ssize_t n;

    pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL);
    n = write(fd, buf, len);
    if (n < 0 && errno == EAGAIN) {
        struct pollfd wait = {.fd = fd, .events = POLLOUT};

        poll(&wait, 1, -1);
        n = 0;
    } else if (n < 0) {
        n = errno == EINTR ? 0 : -errno;
    }
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    return n;
}

static void *writer_thread(void *opaque)
{
    struct chardev_writer *w = opaque;
    struct chardev *chr = w->chr;

    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL);
    pthread_mutex_lock(&chr->lock);
    while (chr->out.used || !chr->closing) {
        const u8 *first;
        size_t len = ring_peek(&chr->out, &first);
        ssize_t n;

        if (!len) {
            pthread_cond_wait(&chr->changed, &chr->lock);
            continue;
        }
        /* Nobody else drops from the ring, so these bytes stay where they are. */
        pthread_mutex_unlock(&chr->lock);
        n = write_some(w->fd, first, len);
        if (n < 0)
            log_warn("%s: %s; further output is dropped", w->name, strerror((int)-n));
        pthread_mutex_lock(&chr->lock);
        if (n < 0)
            chardev_drop_output(chr, true);
        else
            chardev_output_done(chr, (size_t)n);
    }
    w->done = true;
    pthread_cond_broadcast(&chr->changed);
    pthread_mutex_unlock(&chr->lock);
    return NULL;
}

int chardev_writer_start(struct chardev_writer *w, struct chardev *chr, int fd, const char *name,
                         struct error *err)
{
    int ret;

    *w = (struct chardev_writer){.chr = chr, .fd = fd, .name = name};
    ret = chardev_thread_start(&w->thread, writer_thread, w);
    return ret < 0 ? error_host(err, -ret, "a thread for %s", name) : 0;
}

void chardev_writer_stop(struct chardev_writer *w)
{
    struct chardev *chr = w->chr;
    struct timespec deadline;
    int ret = 0;

    clock_gettime(CLOCK_MONOTONIC, &deadline);
    deadline.tv_sec += CHARDEV_FLUSH_SECONDS;
    pthread_mutex_lock(&chr->lock);
    chr->closing = true;
    pthread_cond_broadcast(&chr->changed);
    while (!w->done && ret == 0)
        ret = pthread_cond_timedwait(&chr->changed, &chr->lock, &deadline);
    pthread_mutex_unlock(&chr->lock);
    if (ret != 0)
        pthread_cancel(w->thread);
    pthread_join(w->thread, NULL);
}
