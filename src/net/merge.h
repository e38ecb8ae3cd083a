/*
 * Segments of TCP over IPv4, one behind the other, become one large packet with NET_GSO_TCPV4: a
 * guest takes that for a fraction of the work. For a backend whose stack cuts data into segments
 * though nobody downstream needs them.
 */
#ifndef DOPPEL_NET_MERGE_H
#define DOPPEL_NET_MERGE_H

#include "net/net.h"

struct net_merge {
    unsigned segments; /* 0: empty */
    bool closed;       /* the last was short, or is to be handed on at once (PSH) */
    u16 payload;       /* of the first */
    u32 next_sequence;
    size_t len;
    u8 packet[NET_PACKET_MAX];
};

/*
 * Adds a packet of good checksums. False: it doesn't go with what is there, or is none that is
 * merged.
 */
bool net_merge_add(struct net_merge *m, const u8 *packet, size_t len);
/*
 * The packet in m->packet (m->len bytes) is ready to go, as *o says. m is empty when the next is
 * added.
 */
void net_merge_finish(struct net_merge *m, struct net_offload *o);

#endif
