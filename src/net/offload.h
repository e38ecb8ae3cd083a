/*
 * What a card's hardware would do to a guest's packet: fill in its checksum, cut it into segments.
 * For backends that have no kernel behind them to do it.
 */
#ifndef DOPPEL_NET_OFFLOAD_H
#define DOPPEL_NET_OFFLOAD_H

#include "net/net.h"

/*
 * The packet and its offload as the guest wants them are consistent: checksum field and headers lie
 * within it, it is TCP where segments are to be cut. What isn't must be dropped.
 */
bool net_offload_is_sane(const struct net_offload *o, const u8 *packet, size_t len);

/* Fills in the checksum that NET_NEEDS_CSUM asks for. The offload is sane. */
void net_fill_checksum(const struct net_offload *o, u8 *packet, size_t len);

/*
 * A packet to be cut, as one whole packet of IP instead: lengths and all checksums right. For a
 * network stack that takes packets of any length. The offload is sane and has a gso_type. False:
 * longer than IP allows.
 */
bool net_join_segments(const struct net_offload *o, u8 *packet, size_t len);

#define NET_SEGMENTS_MAX 1024
/* How many segments there will be: 1 when nothing is to be cut, 0 when it would be too many. */
unsigned net_segments(const struct net_offload *o, const u8 *packet, size_t len);
/* The bytes of all of them. */
size_t net_segments_size(const struct net_offload *o, const u8 *packet, size_t len);
/* The nth of them into buf, of NET_PACKET_MAX bytes, checksums filled in. Returns its length. */
size_t net_segment(const struct net_offload *o, const u8 *packet, size_t len, unsigned n, u8 *buf);

#endif
