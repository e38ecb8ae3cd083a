/*
 * A listening Unix socket that serves one client at a time. The next one is accepted when the last has
 * gone. Without a client, output is dropped: a machine must not stop because nobody looks.
 *
 * All of it is driven by the event loop, under the stream's lock. Invariant: the watches' events are
 * always those that `update_watches` computes from the rings and the client; who changes either calls it.
 */
#define _GNU_SOURCE /* accept4 */
#include "chardev/internal.h"
#include "host/log.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

struct socket_chardev {
    struct chardev chr;
    struct fd_watch listener;
    struct fd_watch client; /* fd is -1 while there is none */
    bool input_ended;       /* the client has shut down its sending side */
    struct sockaddr_un address;
};

static struct socket_chardev *socket_of(struct chardev *chr)
{
    return container_of(chr, struct socket_chardev, chr);
}

static void update_watches(struct socket_chardev *s)
{
    struct event_loop *loop = s->chr.loop;
    u32 events = 0;

    if (s->client.fd < 0) {
        event_loop_watch_events(loop, &s->listener, EPOLLIN);
        return;
    }
    event_loop_watch_events(loop, &s->listener, 0);
    if (s->chr.out.used)
        events |= EPOLLOUT;
    if (s->input_ended)
        events |= EPOLLHUP;
    else if (ring_room(&s->chr.in))
        events |= EPOLLIN;
    event_loop_watch_events(loop, &s->client, events);
}

static void disconnect(struct socket_chardev *s)
{
    event_loop_unwatch(s->chr.loop, &s->client);
    close(s->client.fd);
    s->client.fd = -1;
    chardev_drop_output(&s->chr, true);
    update_watches(s);
}

/* 0, or -errno when the client has gone. */
static int receive(struct socket_chardev *s)
{
    u8 buf[4096];
    size_t room = MIN(ring_room(&s->chr.in), sizeof(buf));
    ssize_t n;

    if (!room || s->input_ended)
        return 0;
    n = recv(s->client.fd, buf, room, MSG_DONTWAIT);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        s->input_ended = true;
    ring_put(&s->chr.in, buf, (size_t)n);
    chardev_schedule_work(&s->chr);
    return 0;
}

/* 0, or -errno when the client has gone. */
static int transmit(struct socket_chardev *s)
{
    const u8 *first;
    size_t len = ring_peek(&s->chr.out, &first);
    ssize_t n;

    if (!len)
        return 0;
    n = send(s->client.fd, first, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    chardev_output_done(&s->chr, (size_t)n);
    return 0;
}

static void client_ready(void *opaque, u32 events)
{
    struct socket_chardev *s = opaque;
    bool gone;

    pthread_mutex_lock(&s->chr.lock);
    if (s->client.fd >= 0) {
        /* What a client sent before it went is still to be read. */
        gone = receive(s) < 0 || transmit(s) < 0;
        if (gone || ((events & (EPOLLHUP | EPOLLERR)) && s->input_ended))
            disconnect(s);
        else if ((events & (EPOLLHUP | EPOLLERR)) && !ring_room(&s->chr.in))
            event_loop_watch_events(s->chr.loop, &s->client, 0); /* until there is room */
        else
            update_watches(s);
    }
    pthread_mutex_unlock(&s->chr.lock);
}

static void listener_ready(void *opaque, u32 events)
{
    struct socket_chardev *s = opaque;
    int fd, ret;

    pthread_mutex_lock(&s->chr.lock);
    fd = s->client.fd < 0 ? accept4(s->listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;
    if (fd >= 0) {
        s->client =
            (struct fd_watch){.fd = fd, .events = EPOLLIN, .ready = client_ready, .opaque = s};
        s->input_ended = false;
        chardev_drop_output(&s->chr, false);
        ret = event_loop_watch(s->chr.loop, &s->client);
        if (ret < 0) {
            log_warn("%s: can't serve a client: %s", s->address.sun_path, strerror(-ret));
            disconnect(s);
        } else {
            update_watches(s);
        }
    }
    pthread_mutex_unlock(&s->chr.lock);
}

/* Writes `out` to the client, for CHARDEV_FLUSH_SECONDS at most. The watches are gone already. */
static void flush(struct socket_chardev *s)
{
    u64 deadline = host_clock_ns() + CHARDEV_FLUSH_SECONDS * NS_PER_SEC;

    while (s->chr.out.used) {
        struct pollfd wait = {.fd = s->client.fd, .events = POLLOUT};
        u64 now = host_clock_ns();

        if (now >= deadline)
            return;
        poll(&wait, 1, (int)((deadline - now) / 1000000 + 1));
        if (transmit(s) < 0)
            return;
    }
}

static void socket_close(struct chardev *chr)
{
    struct socket_chardev *s = socket_of(chr);

    /* First the listener, whose callback starts the client's watch. */
    event_loop_unwatch(chr->loop, &s->listener);
    event_loop_unwatch(chr->loop, &s->client);
    if (s->client.fd >= 0) {
        flush(s);
        close(s->client.fd);
    }
    unlink(s->address.sun_path);
    close(s->listener.fd);
}

static void socket_rings_changed(struct chardev *chr)
{
    struct socket_chardev *s = socket_of(chr);

    if (s->client.fd >= 0)
        update_watches(s);
}

static const struct chardev_backend socket_backend = {
    .rings_changed = socket_rings_changed,
    .close = socket_close,
};

/* Whether the address is a socket that a process left behind: nobody listens there. */
static bool is_stale(const struct sockaddr_un *address)
{
    struct stat st;
    bool refused;
    int fd;

    if (lstat(address->sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return false;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return false;
    refused = connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 &&
              errno == ECONNREFUSED;
    close(fd);
    return refused;
}

/* Returns a listening descriptor, or a negative errno with err set. */
static int listen_at(const struct sockaddr_un *address, struct error *err)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd < 0)
        return error_host(err, errno, "socket");
    if (is_stale(address))
        unlink(address->sun_path);
    if (bind(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 && listen(fd, 1) == 0)
        return fd;
    error_input(err, "can't listen at %s: %s", address->sun_path, strerror(errno));
    close(fd);
    return -EINVAL;
}

struct chardev *chardev_socket_open(struct event_loop *loop, const char *path, struct error *err)
{
    struct socket_chardev *s;
    struct chardev *chr;
    int ret;

    chr = chardev_new(sizeof(*s), &socket_backend, loop);
    if (!chr) {
        error_host(err, ENOMEM, "%s", path);
        return NULL;
    }
    s = socket_of(chr);
    chr->drop_output = true;
    s->client.fd = -1;
    s->address.sun_family = AF_UNIX;
    if (!*path || strlen(path) >= sizeof(s->address.sun_path)) {
        error_input(err, "a socket's path has 1 to %zu characters, unlike '%s'",
                    sizeof(s->address.sun_path) - 1, path);
        goto out_free;
    }
    memcpy(s->address.sun_path, path, strlen(path));
    ret = listen_at(&s->address, err);
    if (ret < 0)
        goto out_free;
    s->listener =
        (struct fd_watch){.fd = ret, .events = EPOLLIN, .ready = listener_ready, .opaque = s};
    ret = event_loop_watch(loop, &s->listener);
    if (ret == 0)
        return chr;
    error_host(err, -ret, "%s", path);
    unlink(path);
    close(s->listener.fd);
out_free:
    chardev_free(chr);
    return NULL;
}
