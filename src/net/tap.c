/*
 * A tap interface of the host's: Linux's Documentation/networking/tuntap.rst, and linux/if_tun.h.
 * Each pair of queues is a descriptor. Packets carry a struct virtio_net_hdr without num_buffers,
 * so that checksums and segments are the kernel's affair, both ways.
 */
#include "host/log.h"
#include "net/backend.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define PACKETS_A_TURN 64 /* then the loop looks at others */

struct tap_queue {
    struct tap_net *net;
    unsigned n;
    struct fd_watch watch;   /* fd is -1 when it isn't open */
    bool receiving, sending; /* what the watch waits for */
};

struct tap_net {
    struct net_backend b;
    struct tap_queue queues[NET_QUEUES_MAX];
    u8 packet[NET_PACKET_MAX];
};

static struct tap_net *tap_of(struct net_backend *b)
{
    return container_of(b, struct tap_net, b);
}

static void update_watch(struct tap_queue *q)
{
    event_loop_watch_events(q->net->b.loop, &q->watch,
                            (q->receiving ? EPOLLIN : 0) | (q->sending ? EPOLLOUT : 0));
}

static void receive(struct tap_queue *q)
{
    struct tap_net *t = q->net;
    struct net_offload offload;
    struct iovec iov[] = {
        {.iov_base = &offload, .iov_len = sizeof(offload)},
        {.iov_base = t->packet, .iov_len = sizeof(t->packet)},
    };

    for (unsigned i = 0; i < PACKETS_A_TURN; i++) {
        ssize_t n;

        if (!net_may_deliver(&t->b, q->n)) {
            q->receiving = false;
            update_watch(q);
            return;
        }
        n = readv(q->watch.fd, iov, ARRAY_SIZE(iov));
        if (n < (ssize_t)sizeof(offload))
            return;
        net_deliver(&t->b, q->n, &offload, t->packet, (size_t)n - sizeof(offload));
    }
}

static void ready(void *opaque, u32 events)
{
    struct tap_queue *q = opaque;

    if ((events & (EPOLLERR | EPOLLHUP)) && !(events & EPOLLIN)) {
        log_warn("tap: the interface is gone");
        event_loop_unwatch(q->net->b.loop, &q->watch);
        net_link_changed(&q->net->b, false);
        return;
    }
    if (events & EPOLLOUT) {
        q->sending = false;
        update_watch(q);
        net_sendable(&q->net->b, q->n);
    }
    if (events & EPOLLIN)
        receive(q);
}

static int tap_send(struct net_backend *b, unsigned queue, const struct net_offload *o,
                    const struct iovec *iov, unsigned n, size_t len)
{
    struct tap_queue *q = &tap_of(b)->queues[queue];
    struct iovec all[n + 1];

    all[0] = (struct iovec){.iov_base = (void *)o, .iov_len = sizeof(*o)};
    memcpy(all + 1, iov, n * sizeof(*iov));
    while (writev(q->watch.fd, all, (int)n + 1) < 0) {
        if (errno == EINTR)
            continue;
        if (errno != EAGAIN)
            break; /* the interface is down, or the packet makes no sense: lost */
        q->sending = true;
        update_watch(q);
        return -EAGAIN;
    }
    return 0;
}

static void tap_resume(struct net_backend *b, unsigned queue)
{
    struct tap_queue *q = &tap_of(b)->queues[queue];

    q->receiving = true;
    update_watch(q);
}

static void tap_set_offloads(struct net_backend *b, u32 takes)
{
    unsigned flags = 0;

    if (takes & NET_TAKES_CSUM) {
        flags |= TUN_F_CSUM;
        flags |= takes & NET_TAKES_TSO4 ? TUN_F_TSO4 : 0;
        flags |= takes & NET_TAKES_TSO6 ? TUN_F_TSO6 : 0;
        flags |= (takes & NET_TAKES_ECN) && (flags & (TUN_F_TSO4 | TUN_F_TSO6)) ? TUN_F_TSO_ECN : 0;
    }
    if (ioctl(tap_of(b)->queues[0].watch.fd, TUNSETOFFLOAD, flags) < 0)
        log_once(LOG_WARN, "tap: cannot set offloads: %s", strerror(errno));
}

/* Packets come from those queues only that are attached. */
static void tap_set_queues(struct net_backend *b, unsigned pairs)
{
    for (unsigned i = 0; i < b->info.queues && b->info.queues > 1; i++) {
        struct ifreq request = {.ifr_flags = i < pairs ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE};

        /* Those that are as they should be already fail. */
        if (ioctl(tap_of(b)->queues[i].watch.fd, TUNSETQUEUE, &request) < 0 && errno != EINVAL)
            log_once(LOG_WARN, "tap: cannot set the number of queues: %s", strerror(errno));
    }
}

static void tap_close(struct net_backend *b)
{
    struct tap_net *t = tap_of(b);

    for (unsigned i = 0; i < NET_QUEUES_MAX; i++) {
        if (t->queues[i].watch.fd < 0)
            continue;
        event_loop_unwatch(b->loop, &t->queues[i].watch);
        close(t->queues[i].watch.fd);
    }
    net_backend_fini(b);
    free(t);
}

static const struct net_backend_ops tap_ops = {
    .send = tap_send,
    .resume = tap_resume,
    .set_offloads = tap_set_offloads,
    .set_queues = tap_set_queues,
    .close = tap_close,
};

static int explain(const char *name, unsigned queues, struct error *err)
{
    switch (errno) {
    case EPERM:
    case EACCES:
        return error_input(
            err,
            "tap=%s: not permitted: let root make it with 'ip tuntap add %s mode tap "
            "user NAME%s', and open /dev/net/tun to that user",
            name, name, queues > 1 ? " multi_queue" : "");
    case EBUSY:
        return error_input(err, "tap=%s: another program uses it", name);
    case EINVAL:
        return error_input(err,
                           "tap=%s: it isn't a tap interface %s multi_queue, as queues=%u needs",
                           name, queues > 1 ? "with" : "without", queues);
    case ENOENT:
    case ENODEV:
        return error_input(err, "tap=%s: the host has no /dev/net/tun (modprobe tun)", name);
    default:
        return error_host(err, errno, "tap=%s", name);
    }
}

static int open_queue(struct tap_net *t, unsigned i, const char *name, struct error *err)
{
    struct tap_queue *q = &t->queues[i];
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int header = sizeof(struct net_offload), little_endian = 1;

    if (t->b.info.queues > 1)
        request.ifr_flags |= IFF_MULTI_QUEUE;
    memcpy(request.ifr_name, name, strlen(name));
    q->net = t;
    q->n = i;
    q->receiving = true;
    q->watch.fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (q->watch.fd < 0 || ioctl(q->watch.fd, TUNSETIFF, &request) < 0)
        return explain(name, t->b.info.queues, err);
    if (ioctl(q->watch.fd, TUNSETVNETHDRSZ, &header) < 0 ||
        ioctl(q->watch.fd, TUNSETVNETLE, &little_endian) < 0 ||
        ioctl(q->watch.fd, TUNSETOFFLOAD, 0) < 0)
        return error_host(err, errno, "tap=%s: virtio headers", name);
    q->watch.events = EPOLLIN;
    q->watch.ready = ready;
    q->watch.opaque = q;
    return 0;
}

/* The interface's own MTU is the guest's, unless the user chose one. */
static u16 interface_mtu(const char *name)
{
    struct ifreq request = {0};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    u16 mtu = NET_MTU_DEFAULT;

    memcpy(request.ifr_name, name, strlen(name));
    if (fd >= 0 && ioctl(fd, SIOCGIFMTU, &request) == 0 && request.ifr_mtu >= NET_MTU_MIN &&
        request.ifr_mtu <= NET_MTU_MAX)
        mtu = (u16)request.ifr_mtu;
    if (fd >= 0)
        close(fd);
    return mtu;
}

struct net_backend *net_tap_open(const struct net_options *o, struct event_loop *loop,
                                 struct error *err)
{
    const char *name = o->argument;
    struct tap_net *t;

    if (!name || !*name || strlen(name) >= IFNAMSIZ) {
        error_input(err, "give an interface of up to %d characters: tap=IF", IFNAMSIZ - 1);
        return NULL;
    }
    t = calloc(1, sizeof(*t));
    if (!t) {
        error_host(err, ENOMEM, "tap=%s", name);
        return NULL;
    }
    net_backend_init(&t->b, &tap_ops, loop);
    t->b.info.queues = o->queues;
    t->b.info.raw_offloads = true;
    t->b.info.link_up = true;
    for (unsigned i = 0; i < NET_QUEUES_MAX; i++)
        t->queues[i].watch.fd = -1;
    for (unsigned i = 0; i < o->queues; i++) {
        int ret = open_queue(t, i, name, err);

        if (ret == 0) {
            ret = event_loop_watch(loop, &t->queues[i].watch);
            if (ret)
                error_host(err, -ret, "tap=%s: cannot watch it", name);
        }
        if (ret) {
            tap_close(&t->b);
            return NULL;
        }
    }
    t->b.info.mtu = interface_mtu(name);
    tap_set_queues(&t->b, 1);
    return &t->b;
}
