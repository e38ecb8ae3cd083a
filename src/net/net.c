#include "net/net.h"

#include "net/backend.h"
#include "net/pcap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/*
 * Packets that wait in a queue: from the first number on the backend is to stop, at the second they
 * are lost.
 */
#define QUEUE_HOLD_BYTES KIB(256)
#define QUEUE_MAX_BYTES MIB(1)
#define QUEUE_MAX_PACKETS 1024

struct net_waiting {
    struct net_waiting *next;
    struct net_offload offload;
    size_t len;
    u8 packet[];
};

size_t net_gather(const struct iovec *iov, unsigned n, u8 *buf, size_t size)
{
    size_t done = 0;

    for (unsigned i = 0; i < n && done < size; i++) {
        size_t here = MIN(iov[i].iov_len, size - done);

        memcpy(buf + done, iov[i].iov_base, here);
        done += here;
    }
    return done;
}

/* ---- to the card ---- */

static void queue_clear(struct net_queue *q)
{
    while (q->first) {
        struct net_waiting *w = q->first;

        q->first = w->next;
        free(w);
    }
    q->end = &q->first;
    q->packets = 0;
    q->bytes = 0;
}

static void queue_put(struct net_queue *q, const struct net_offload *o, const u8 *packet,
                      size_t len)
{
    struct net_waiting *w;

    if (q->packets == QUEUE_MAX_PACKETS || q->bytes + len > QUEUE_MAX_BYTES)
        return;
    w = malloc(sizeof(*w) + len);
    if (!w)
        return;
    w->next = NULL;
    w->offload = *o;
    w->len = len;
    memcpy(w->packet, packet, len);
    *q->end = w;
    q->end = &w->next;
    q->packets++;
    q->bytes += len;
}

/* True when nothing waits any more. */
static bool queue_flush(struct net_backend *b, unsigned queue)
{
    struct net_queue *q = &b->queues[queue];

    while (q->first) {
        struct net_waiting *w = q->first;

        if (!b->card.receive(b->card.opaque, queue, &w->offload, w->packet, w->len))
            return false;
        q->first = w->next;
        if (!q->first)
            q->end = &q->first;
        q->packets--;
        q->bytes -= w->len;
        free(w);
    }
    return true;
}

static void flush(void *opaque)
{
    struct net_backend *b = opaque;

    for (unsigned i = 0; i < b->info.queues && b->card.receive; i++) {
        struct net_queue *q = &b->queues[i];

        if (!queue_flush(b, i) || !q->held)
            continue;
        q->held = false;
        if (b->ops->resume)
            b->ops->resume(b, i);
    }
}

static void flush_soon(struct net_backend *b)
{
    event_loop_timer_arm(b->loop, &b->flush, 0);
}

void net_deliver(struct net_backend *b, unsigned queue, const struct net_offload *o,
                 const u8 *packet, size_t len)
{
    struct net_queue *q = &b->queues[queue];

    if (len < NET_HEADER_SIZE || len > NET_PACKET_MAX || !b->card.receive)
        return;
    if (b->pcap)
        pcap_packet(b->pcap, packet, len);
    if (!b->in_card && !q->first && b->card.receive(b->card.opaque, queue, o, packet, len))
        return;
    queue_put(q, o, packet, len);
    if (b->in_card)
        flush_soon(b);
}

bool net_may_deliver(struct net_backend *b, unsigned queue)
{
    struct net_queue *q = &b->queues[queue];

    if (q->bytes >= QUEUE_HOLD_BYTES || q->packets >= QUEUE_MAX_PACKETS / 4)
        q->held = true;
    return !q->held;
}

void net_resume(struct net_backend *b, unsigned queue)
{
    if (b->queues[queue].first || b->queues[queue].held)
        flush_soon(b);
}

void net_sendable(struct net_backend *b, unsigned queue)
{
    if (b->card.sendable)
        b->card.sendable(b->card.opaque, queue);
}

void net_link_changed(struct net_backend *b, bool up)
{
    if (b->info.link_up == up)
        return;
    b->info.link_up = up;
    if (b->card.link_changed)
        b->card.link_changed(b->card.opaque, up);
}

/* ---- from the card ---- */

int net_send(struct net_backend *b, unsigned queue, const struct net_offload *o,
             const struct iovec *iov, unsigned n)
{
    size_t len = 0;
    int ret;

    for (unsigned i = 0; i < n; i++)
        len += iov[i].iov_len;
    if (len < NET_HEADER_SIZE || len > NET_PACKET_MAX || !b->info.link_up)
        return 0;
    /* Before what it brings about, and once, though it may be sent again. */
    if (b->pcap && !b->queues[queue].captured)
        pcap_packet_iov(b->pcap, iov, n, len);
    b->in_card = true;
    ret = b->ops->send(b, queue, o, iov, n, len);
    b->in_card = false;
    b->queues[queue].captured = ret == -EAGAIN;
    return ret;
}

void net_set_offloads(struct net_backend *b, u32 takes)
{
    if (b->ops->set_offloads)
        b->ops->set_offloads(b, takes);
}

void net_set_queues(struct net_backend *b, unsigned pairs)
{
    if (b->ops->set_queues)
        b->ops->set_queues(b, pairs);
}

const struct net_info *net_info(const struct net_backend *b)
{
    return &b->info;
}

void net_attach(struct net_backend *b, const struct net_card *card)
{
    b->card = card ? *card : (struct net_card){0};
    for (unsigned i = 0; i < NET_QUEUES_MAX && !card; i++)
        queue_clear(&b->queues[i]);
    /* What was held for want of a card goes on. */
    flush_soon(b);
}

/* ---- life ---- */

void net_backend_init(struct net_backend *b, const struct net_backend_ops *ops,
                      struct event_loop *loop)
{
    b->ops = ops;
    b->loop = loop;
    b->info.queues = 1;
    b->info.mtu = NET_MTU_DEFAULT;
    b->flush = (struct host_timer){.fire = flush, .opaque = b};
    for (unsigned i = 0; i < NET_QUEUES_MAX; i++)
        b->queues[i].end = &b->queues[i].first;
}

void net_backend_fini(struct net_backend *b)
{
    event_loop_timer_remove(b->loop, &b->flush);
    for (unsigned i = 0; i < NET_QUEUES_MAX; i++)
        queue_clear(&b->queues[i]);
    if (b->pcap)
        pcap_close(b->pcap);
}

/*
 * The same for the same machine every time, as guests remember it: from a hash (FNV-1a) of the
 * seed, behind the prefix that virtual machines have.
 */
static void derive_mac(u8 mac[NET_MAC_SIZE], const char *seed, const struct net_backend *b,
                       const char *kind)
{
    u64 hash = 0xcbf29ce484222325ULL;

    for (const char *p = seed; *p; p++)
        hash = (hash ^ (u8)*p) * 0x100000001b3ULL;
    /* Two VMs at the ends of one socket often have one name. */
    if (!strcmp(kind, "socket"))
        hash = (hash ^ b->info.link_up) * 0x100000001b3ULL;
    mac[0] = 0x52;
    mac[1] = 0x54;
    mac[2] = 0x00;
    for (unsigned i = 3; i < NET_MAC_SIZE; i++)
        mac[i] = (u8)(hash >> (8 * i));
}

static const struct {
    const char *kind;
    struct net_backend *(*open)(const struct net_options *o, struct event_loop *loop,
                                struct error *err);
} kinds[] = {
    {"user", net_user_open},
    {"tap", net_tap_open},
    {"socket", net_socket_open},
    {"vhost-user", net_vhost_user_open},
};

static struct net_backend *open_kind(const struct net_options *o, struct event_loop *loop,
                                     struct error *err)
{
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        if (!strcmp(o->kind, kinds[i].kind))
            return kinds[i].open(o, loop, err);
    }
    error_input(err,
                "'%s' is no kind of network: give user, tap=IF, socket=PATH or "
                "vhost-user=PATH",
                o->kind);
    return NULL;
}

struct net_backend *net_open(const char *spec, const char *seed, struct event_loop *loop,
                             struct error *err)
{
    struct net_options o;
    struct net_backend *b = NULL;

    if (net_options_parse(&o, spec, err))
        goto out;
    b = open_kind(&o, loop, err);
    if (!b)
        goto out;
    if (o.have_mac)
        memcpy(b->info.mac, o.mac, NET_MAC_SIZE);
    else
        derive_mac(b->info.mac, seed, b, o.kind);
    if (o.have_mtu)
        b->info.mtu = o.mtu;
    if (o.pcap) {
        b->pcap = pcap_open(o.pcap, err);
        if (!b->pcap) {
            net_close(b);
            b = NULL;
        }
    }
out:
    net_options_free(&o);
    return b;
}

void net_close(struct net_backend *b)
{
    if (b)
        b->ops->close(b);
}
