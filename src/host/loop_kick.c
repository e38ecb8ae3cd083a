#include "host/loop_kick.h"

#include "host/log.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

static void kicked(void *opaque, u32 events)
{
    struct loop_kick *k = opaque;
    u64 count;

    if (read(k->watch.fd, &count, sizeof(count)) == (ssize_t)sizeof(count))
        k->ready(k->opaque);
}

int loop_kick_open(struct loop_kick *k, struct event_loop *loop, void (*ready)(void *opaque),
                   void *opaque, const char *name, struct error *err)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), ret;

    if (fd < 0)
        return error_host(err, errno, "%s: cannot create an eventfd", name);
    k->ready = ready;
    k->opaque = opaque;
    k->watch = (struct fd_watch){.fd = fd, .events = EPOLLIN, .ready = kicked, .opaque = k};
    ret = event_loop_watch(loop, &k->watch);
    if (ret) {
        close(fd);
        return error_host(err, -ret, "%s: cannot watch an eventfd", name);
    }
    k->loop = loop;
    return 0;
}

void loop_kick_close(struct loop_kick *k)
{
    if (!k->loop)
        return;
    event_loop_unwatch(k->loop, &k->watch);
    close(k->watch.fd);
    k->loop = NULL;
}

void loop_kick_send(struct loop_kick *k)
{
    u64 one = 1;

    /* It fails only when the count is full: the loop is awake then. */
    if (write(k->watch.fd, &one, sizeof(one)) < 0)
        log_debug("the event loop has been kicked already");
}
