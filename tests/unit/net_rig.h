/*
 * A virtio-net card between a backend that a test plays and a driver with a ring of either kind for
 * each queue. See virtio_rig.h, whose registers and packed flags it takes.
 */
#ifndef DOPPEL_TESTS_NET_RIG_H
#define DOPPEL_TESTS_NET_RIG_H

#include "device/virtio/net.h"
#include "net/backend.h"
#include "virtio_rig.h"

#include <errno.h>

#define NET_PAIRS 2
#define NET_QUEUES (2 * NET_PAIRS + 1)
#define NET_CONTROL (2 * NET_PAIRS)
#define NET_RING(q) (0x1000 + 0x1000 * (gpa_t)(q))
#define NET_RING_DRIVER 0x400
#define NET_RING_DEVICE 0x800
#define NET_RING_SIZE 16
#define NET_BUFFERS 0x8000

struct player {
    struct net_backend b;
    bool busy; /* send says -EAGAIN */
    unsigned sent, resumed, pairs;
    u32 takes;
    /* The last packet that was sent. */
    unsigned queue;
    struct net_offload offload;
    size_t len;
    u8 packet[NET_PACKET_MAX];
};

static inline int player_send(struct net_backend *b, unsigned queue, const struct net_offload *o,
                              const struct iovec *iov, unsigned n, size_t len)
{
    struct player *p = container_of(b, struct player, b);

    if (p->busy)
        return -EAGAIN;
    p->sent++;
    p->queue = queue;
    p->offload = *o;
    p->len = net_gather(iov, n, p->packet, sizeof(p->packet));
    return 0;
}
static inline void player_resume(struct net_backend *b, unsigned queue)
{
    container_of(b, struct player, b)->resumed++;
}
static inline void player_set_offloads(struct net_backend *b, u32 takes)
{
    container_of(b, struct player, b)->takes = takes;
}
static inline void player_set_queues(struct net_backend *b, unsigned pairs)
{
    container_of(b, struct player, b)->pairs = pairs;
}
static inline void player_close(struct net_backend *b)
{
    net_backend_fini(b);
    free(container_of(b, struct player, b));
}
static const struct net_backend_ops player_ops = {
    .send = player_send,
    .resume = player_resume,
    .set_offloads = player_set_offloads,
    .set_queues = player_set_queues,
    .close = player_close,
};

struct net_ring {
    u16 next_avail, next_used;
    bool avail_wrap, used_wrap;
};

struct net_rig {
    struct driver d; /* for the registers' helpers: no toy, no ring of its own */
    struct player *player;
    struct virtio *card;
    struct net_ring rings[NET_QUEUES];
};

static inline struct player *player_create(struct event_loop *loop)
{
    static const u8 mac[NET_MAC_SIZE] = {0x52, 0x54, 0, 1, 2, 3};
    struct player *p = calloc(1, sizeof(*p));

    net_backend_init(&p->b, &player_ops, loop);
    memcpy(p->b.info.mac, mac, sizeof(mac));
    p->b.info.queues = NET_PAIRS;
    p->b.info.raw_offloads = true;
    p->b.info.link_up = true;
    return p;
}

static inline struct net_rig *net_rig_create(void)
{
    struct net_rig *n = calloc(1, sizeof(*n));
    struct rig *r = rig_create();

    n->d.rig = r;
    r->env.loop = event_loop_create(&r->err);
    n->d.host = rig_pci_host(r);
    n->player = player_create(r->env.loop);
    n->card = virtio_net_create(&r->env, &(struct virtio_net_config){.backend = &n->player->b},
                                n->d.host, TOY_DEVFN, &r->err);
    if (!n->card)
        abort();
    config_write(r, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_MSIX_BAR, TOY_MSIX, 4);
    config_write(r, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(r, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    return n;
}

static inline void net_rig_destroy(struct net_rig *n)
{
    struct rig *r = n->d.rig;

    virtio_device(n->card)->ops->destroy(virtio_device(n->card));
    net_close(&n->player->b);
    pci_host_device(n->d.host)->ops->destroy(pci_host_device(n->d.host));
    event_loop_destroy(r->env.loop);
    rig_destroy(r);
    free(n);
}

/* Resets the card and starts it with these features and all its queues. */
static inline void net_start_driver(struct net_rig *n, u64 features)
{
    negotiate(&n->d, features | VIRTIO_F_VERSION_1);
    for (unsigned q = 0; q < NET_QUEUES; q++) {
        memset(memory_host(&n->d.rig->memory, NET_RING(q), 0x1000), 0, 0x1000);
        reg_write(&n->d, QUEUE_SELECT, q, 2);
        reg_write(&n->d, QUEUE_SIZE, NET_RING_SIZE, 2);
        reg_write(&n->d, QUEUE_DESC, NET_RING(q), 8);
        reg_write(&n->d, QUEUE_DRIVER, NET_RING(q) + NET_RING_DRIVER, 8);
        reg_write(&n->d, QUEUE_DEVICE, NET_RING(q) + NET_RING_DEVICE, 8);
        reg_write(&n->d, QUEUE_ENABLE, 1, 2);
        n->rings[q] = (struct net_ring){.avail_wrap = true, .used_wrap = true};
    }
    reg_write(&n->d, STATUS, 15, 1);
    run_loop(&n->d);
}

static inline void net_notify(struct net_rig *n, unsigned q)
{
    reg_write(&n->d, VIRTIO_BAR_NOTIFY + VIRTIO_NOTIFY_MULTIPLIER * q, q, 2);
    run_loop(&n->d);
}

/* A chain of up to 4 buffers; the entry it begins at is its id. */
static inline u16 net_add(struct net_rig *n, unsigned q, const struct buffer *b, unsigned count)
{
    struct net_ring *ring = &n->rings[q];
    u16 first = ring->next_avail % NET_RING_SIZE, first_flags = 0;

    for (unsigned i = 0; i < count; i++) {
        u16 at = (first + i) % NET_RING_SIZE, flags = i + 1 < count ? 1 : 0;

        if (n->d.packed) {
            flags |= packed_flags(ring->avail_wrap) | (b[i].write ? 2 : 0);
            if (!i)
                first_flags = flags;
            put_desc(&n->d, NET_RING(q) + 16 * at, &b[i], i ? flags : 0, first);
            if (at + 1 == NET_RING_SIZE)
                ring->avail_wrap = !ring->avail_wrap;
        } else {
            put_desc(&n->d, NET_RING(q) + 16 * at, &b[i], flags, (at + 1) % NET_RING_SIZE);
        }
    }
    if (n->d.packed) {
        put16(&n->d, NET_RING(q) + 16 * first + 14, first_flags);
        ring->next_avail = (first + count) % NET_RING_SIZE;
        return first;
    }
    /* Entries and descriptors go in step: a test uses chains of one length in a queue. */
    put16(&n->d, NET_RING(q) + NET_RING_DRIVER + 4 + 2 * first, first);
    put16(&n->d, NET_RING(q) + NET_RING_DRIVER + 2, ++ring->next_avail);
    return first;
}

/* The next chain of one descriptor that came back: the bytes written, or -1. */
static inline int net_used(struct net_rig *n, unsigned q)
{
    struct net_ring *ring = &n->rings[q];
    u16 at = ring->next_used % NET_RING_SIZE, flags;
    u32 len = 0;

    if (n->d.packed) {
        flags = get16(&n->d, NET_RING(q) + 16 * at + 14);
        if (!!(flags & 1 << 7) != ring->used_wrap || !!(flags & 1 << 15) != ring->used_wrap)
            return -1;
        memory_read(&n->d.rig->memory, NET_RING(q) + 16 * at + 8, &len, 4);
        ring->next_used = (at + 1) % NET_RING_SIZE;
        if (!ring->next_used)
            ring->used_wrap = !ring->used_wrap;
        return (int)len;
    }
    if (get16(&n->d, NET_RING(q) + NET_RING_DEVICE + 2) == ring->next_used)
        return -1;
    memory_read(&n->d.rig->memory, NET_RING(q) + NET_RING_DEVICE + 4 + 8 * at + 4, &len, 4);
    ring->next_used++;
    return (int)len;
}

#endif
