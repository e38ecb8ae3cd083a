/*
 * A cable between two VMs: a Unix stream socket, at which each frame has its length before it, 4
 * bytes, big-endian (as QEMU's `-netdev stream` has it). Who comes first listens, who comes second
 * connects; when the other goes, the link is down until one is there again.
 *
 * The peer is hostile: a length that no frame can have ends the connection.
 */
#define _GNU_SOURCE /* accept4 */
#include "host/log.h"
#include "host/unix_socket.h"
#include "net/backend.h"
#include "net/offload.h"
#include "net/protocols.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define LENGTH_SIZE 4
/* What waits for the peer; above the first number the guest keeps its packets. */
#define OUT_HOLD KIB(512)
#define OUT_SIZE (OUT_HOLD + NET_SEGMENTS_MAX * (LENGTH_SIZE + 256) + 2 * NET_PACKET_MAX)
#define IN_SIZE (2 * (LENGTH_SIZE + NET_PACKET_MAX))
#define RETRY_NS (NS_PER_SEC / 4)

struct socket_net {
    struct net_backend b;
    char *path;
    struct fd_watch listener, peer; /* fd is -1: none */
    struct host_timer retry;
    bool held;                /* the card has no room */
    bool blocked;             /* the card waits to send */
    size_t out_head, out_len; /* bytes in `out` from out_head on */
    size_t in_len;
    u8 out[OUT_SIZE];
    u8 in[IN_SIZE];
    u8 packet[NET_PACKET_MAX];
};

static struct socket_net *socket_of(struct net_backend *b)
{
    return container_of(b, struct socket_net, b);
}

static void update_watches(struct socket_net *s)
{
    if (s->listener.fd >= 0)
        event_loop_watch_events(s->b.loop, &s->listener, s->peer.fd < 0 ? EPOLLIN : 0);
    if (s->peer.fd >= 0)
        event_loop_watch_events(s->b.loop, &s->peer,
                                (s->held ? 0 : EPOLLIN) | (s->out_len ? EPOLLOUT : 0));
}

static void retry_later(struct socket_net *s)
{
    event_loop_timer_arm(s->b.loop, &s->retry, host_clock_ns() + RETRY_NS);
}

/* Not from within send. */
static void disconnect(struct socket_net *s)
{
    if (s->peer.fd < 0)
        return;
    event_loop_unwatch(s->b.loop, &s->peer);
    close(s->peer.fd);
    s->peer.fd = -1;
    s->out_head = s->out_len = s->in_len = 0;
    net_link_changed(&s->b, false);
    if (s->blocked) {
        s->blocked = false;
        net_sendable(&s->b, 0); /* what it sends is lost */
    }
    if (s->listener.fd < 0)
        retry_later(s);
    update_watches(s);
}

/* ---- frames ---- */

/* 0, or -errno when the peer is gone. */
static int transmit(struct socket_net *s)
{
    while (s->out_len) {
        ssize_t n = send(s->peer.fd, s->out + s->out_head, s->out_len, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        s->out_head += (size_t)n;
        s->out_len -= (size_t)n;
    }
    s->out_head = 0;
    return 0;
}

/* Hands on whole frames. -EPROTO when the peer talks nonsense. */
static int deliver(struct socket_net *s)
{
    static const struct net_offload plain;
    size_t at = 0;
    int ret = 0;

    while (s->in_len - at >= LENGTH_SIZE) {
        u32 len = net_get32(s->in + at);

        if (len < NET_HEADER_SIZE || len > NET_PACKET_MAX) {
            ret = -EPROTO;
            break;
        }
        if (s->in_len - at - LENGTH_SIZE < len)
            break;
        s->held = !net_may_deliver(&s->b, 0);
        if (s->held)
            break;
        net_deliver(&s->b, 0, &plain, s->in + at + LENGTH_SIZE, len);
        at += LENGTH_SIZE + len;
    }
    memmove(s->in, s->in + at, s->in_len - at);
    s->in_len -= at;
    return ret;
}

/* 0, or -errno when the peer is gone or must go. */
static int receive(struct socket_net *s)
{
    ssize_t n = recv(s->peer.fd, s->in + s->in_len, IN_SIZE - s->in_len, MSG_DONTWAIT);

    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    if (n == 0)
        return -ECONNRESET;
    s->in_len += (size_t)n;
    return deliver(s);
}

static void peer_ready(void *opaque, u32 events)
{
    struct socket_net *s = opaque;
    int ret = 0;

    if (events & EPOLLOUT)
        ret = transmit(s);
    if (!ret && !s->held && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        ret = receive(s);
    if (ret) {
        if (ret == -EPROTO)
            log_warn("%s: the peer sent no frame; disconnected", s->path);
        disconnect(s);
        return;
    }
    if (s->blocked && s->out_len < OUT_HOLD) {
        s->blocked = false;
        net_sendable(&s->b, 0);
    }
    update_watches(s);
}

static void put_frame(struct socket_net *s, const struct net_offload *o, size_t len, unsigned i)
{
    u8 *at = s->out + s->out_head + s->out_len;
    size_t frame = net_segment(o, s->packet, len, i, at + LENGTH_SIZE);

    net_put32(at, (u32)frame);
    s->out_len += LENGTH_SIZE + frame;
}

static int socket_send(struct net_backend *b, unsigned queue, const struct net_offload *o,
                       const struct iovec *iov, unsigned n, size_t len)
{
    struct socket_net *s = socket_of(b);
    unsigned segments;

    if (s->peer.fd < 0)
        return 0;
    if (s->out_len >= OUT_HOLD) {
        s->blocked = true;
        return -EAGAIN;
    }
    net_gather(iov, n, s->packet, len);
    if (!net_offload_is_sane(o, s->packet, len))
        return 0;
    segments = net_segments(o, s->packet, len);
    /* With the headers that TCP may have, all segments fit behind OUT_HOLD; nonsense may not. */
    if (segments * LENGTH_SIZE + net_segments_size(o, s->packet, len) + NET_PACKET_MAX >
        OUT_SIZE - OUT_HOLD)
        return 0;
    if (s->out_head) {
        memmove(s->out, s->out + s->out_head, s->out_len);
        s->out_head = 0;
    }
    for (unsigned i = 0; i < segments; i++)
        put_frame(s, o, len, i);
    /* A peer that is gone is noticed by the watch. */
    if (transmit(s) < 0)
        s->out_len = 0;
    update_watches(s);
    return 0;
}

static void socket_resume(struct net_backend *b, unsigned queue)
{
    struct socket_net *s = socket_of(b);

    s->held = false;
    if (s->peer.fd >= 0 && deliver(s) < 0)
        disconnect(s);
    update_watches(s);
}

/* ---- connections ---- */

static int connected(struct socket_net *s, int fd)
{
    int ret;

    s->peer = (struct fd_watch){.fd = fd, .events = EPOLLIN, .ready = peer_ready, .opaque = s};
    s->held = false;
    ret = event_loop_watch(s->b.loop, &s->peer);
    if (ret < 0) {
        log_warn("%s: cannot watch a socket: %s", s->path, strerror(-ret));
        close(fd);
        s->peer.fd = -1;
        return ret;
    }
    update_watches(s);
    net_link_changed(&s->b, true);
    return 0;
}

static void listener_ready(void *opaque, u32 events)
{
    struct socket_net *s = opaque;
    int fd =
        s->peer.fd < 0 ? accept4(s->listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK) : -1;

    if (fd >= 0)
        connected(s, fd);
}

/* Connects, or listens where nobody does. 0 or -errno with err set. */
static int find_peer(struct socket_net *s, struct error *err)
{
    int fd = unix_socket_connect(s->path, err);

    if (fd >= 0)
        return connected(s, fd);
    if (fd != -ENOENT && fd != -ECONNREFUSED)
        return fd;
    fd = unix_socket_listen(s->path, 1, err);
    if (fd < 0)
        return fd;
    s->listener =
        (struct fd_watch){.fd = fd, .events = EPOLLIN, .ready = listener_ready, .opaque = s};
    return event_loop_watch(s->b.loop, &s->listener);
}

static void retry(void *opaque)
{
    struct socket_net *s = opaque;
    struct error err = {0};

    if (s->peer.fd < 0 && s->listener.fd < 0 && find_peer(s, &err) < 0)
        retry_later(s);
}

static void socket_close(struct net_backend *b)
{
    struct socket_net *s = socket_of(b);

    event_loop_timer_remove(b->loop, &s->retry);
    if (s->listener.fd >= 0) {
        event_loop_unwatch(b->loop, &s->listener);
        unlink(s->path);
        close(s->listener.fd);
    }
    if (s->peer.fd >= 0) {
        event_loop_unwatch(b->loop, &s->peer);
        close(s->peer.fd);
    }
    net_backend_fini(b);
    free(s->path);
    free(s);
}

static const struct net_backend_ops socket_ops = {
    .send = socket_send,
    .resume = socket_resume,
    .close = socket_close,
};

struct net_backend *net_socket_open(const struct net_options *o, struct event_loop *loop,
                                    struct error *err)
{
    struct socket_net *s;

    if (!o->argument) {
        error_input(err, "give a socket's path: socket=PATH");
        return NULL;
    }
    s = calloc(1, sizeof(*s));
    if (!s) {
        error_host(err, ENOMEM, "socket=%s", o->argument);
        return NULL;
    }
    net_backend_init(&s->b, &socket_ops, loop);
    s->listener.fd = s->peer.fd = -1;
    s->retry = (struct host_timer){.fire = retry, .opaque = s};
    s->path = strdup(o->argument);
    if (!s->path) {
        error_host(err, ENOMEM, "socket");
        goto fail;
    }
    if (find_peer(s, err) < 0)
        goto fail;
    return &s->b;
fail:
    socket_close(&s->b);
    return NULL;
}
