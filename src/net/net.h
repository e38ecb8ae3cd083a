/*
 * Networks: what a card's packets go to and come from. A backend is user networking, a tap
 * interface or a socket to another VM; a card (virtio-net) is attached to it.
 *
 * Packets are Ethernet frames without FCS, each with a struct net_offload that says what is left to
 * be done: a checksum to fill in, segments to cut. A backend with raw_offloads hands that on; the
 * others do it in software (net/offload.h), which costs the host a fraction of what it would cost
 * the guest.
 *
 * Threads: all of it runs on the event loop's thread, but for net_set_offloads and net_set_queues,
 * which come from any thread under the card's lock. Nothing blocks.
 *
 * The card may hold its lock when it calls net_send and net_resume: so a backend never calls the
 * card from within these two. net_deliver takes care of that by a queue, which the loop empties
 * later.
 */
#ifndef DOPPEL_NET_NET_H
#define DOPPEL_NET_NET_H

#include "host/error.h"
#include "host/event_loop.h"
#include "host/types.h"

#include <sys/uio.h>

#define NET_MAC_SIZE 6
#define NET_HEADER_SIZE 14 /* Ethernet */
#define NET_MTU_DEFAULT 1500
#define NET_MTU_MIN 68 /* RFC 791 */
#define NET_MTU_MAX 65521
/* A packet's most: 64 KiB of IP behind an Ethernet header with a VLAN tag or two. */
#define NET_PACKET_MAX (65535 + NET_HEADER_SIZE + 8)
#define NET_QUEUES_MAX 8

/* As in VIRTIO 1.2, 5.1.6: struct virtio_net_hdr without num_buffers. Little-endian. */
struct net_offload {
    u8 flags; /* NET_NEEDS_CSUM, NET_DATA_VALID */
    u8 gso_type;
    u16 hdr_len;  /* a hint */
    u16 gso_size; /* payload of a segment */
    u16 csum_start, csum_offset;
};
#define NET_NEEDS_CSUM 1
#define NET_DATA_VALID 2 /* the checksums were verified */
#define NET_GSO_NONE 0
#define NET_GSO_TCPV4 1
#define NET_GSO_TCPV6 4
#define NET_GSO_ECN 0x80 /* beside a type */

/* What a guest takes beyond plain packets (net_set_offloads). */
enum {
    NET_TAKES_CSUM = BIT32(0), /* NET_NEEDS_CSUM */
    NET_TAKES_TSO4 = BIT32(1),
    NET_TAKES_TSO6 = BIT32(2),
    NET_TAKES_ECN = BIT32(3),
};

/* ---- for cards ---- */

struct net_backend;

/* A card's side; called on the loop's thread without its lock. */
struct net_card {
    /* A packet for the guest. False: no room now, keep it; the card calls net_resume. */
    bool (*receive)(void *opaque, unsigned queue, const struct net_offload *o, const u8 *packet,
                    size_t len);
    /* After net_send returned -EAGAIN: try again. */
    void (*sendable)(void *opaque, unsigned queue);
    void (*link_changed)(void *opaque, bool up);
    void *opaque;
};

/* What the user chose, and what the backend can do: constant, but for link_up. */
struct net_info {
    u8 mac[NET_MAC_SIZE];
    u16 mtu;
    unsigned queues;   /* pairs; 1 to NET_QUEUES_MAX */
    bool raw_offloads; /* it delivers what net_set_offloads allows, and knows NET_GSO_ECN */
    bool valid_data;   /* what it delivers has right checksums, and says so */
    bool merges;       /* and it merges segments (NET_GSO_TCPV4) for a guest that takes them */
    bool link_up;
};

/*
 * Opens what `--net SPEC` describes (`doppel run --help` tells what that may be). `seed` is what a
 * MAC address is made from when the user gives none. NULL with err set: ERROR_INPUT when the user
 * can mend it.
 */
struct net_backend *net_open(const char *spec, const char *seed, struct event_loop *loop,
                             struct error *err);
/*
 * The socket of the process that serves the card instead (`vhost-user=PATH`): then there is a net_info, and no card is
 * attached. NULL for all others.
 */
const char *net_vhost_user_path(const struct net_backend *b);
/* No card may be attached. NULL is fine. */
void net_close(struct net_backend *b);

const struct net_info *net_info(const struct net_backend *b);
/* One card; NULL detaches it: after that none of its functions is called. */
void net_attach(struct net_backend *b, const struct net_card *card);
/*
 * Sends a packet of the guest's, whose memory iov may be: it is read once. 0 when it was taken (or
 * lost, as networks do), -EAGAIN when it must be kept until `sendable`.
 */
int net_send(struct net_backend *b, unsigned queue, const struct net_offload *o,
             const struct iovec *iov, unsigned n);
/* The card has room again. */
void net_resume(struct net_backend *b, unsigned queue);
/* NET_TAKES_*. */
void net_set_offloads(struct net_backend *b, u32 takes);
/* Pairs of queues that the guest uses. */
void net_set_queues(struct net_backend *b, unsigned pairs);

#endif
