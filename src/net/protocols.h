/*
 * Offsets in the headers of Ethernet's payloads, and big-endian fields. RFC 791 (IPv4), RFC 8200
 * (IPv6), RFC 9293 (TCP), RFC 768 (UDP), RFC 826 (ARP), RFC 792 (ICMP).
 */
#ifndef DOPPEL_NET_PROTOCOLS_H
#define DOPPEL_NET_PROTOCOLS_H

#include "host/types.h"

#define ETHERTYPE_IP4 0x0800
#define ETHERTYPE_ARP 0x0806
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_IP6 0x86dd
#define ETHERTYPE_QINQ 0x88a8

#define IP4_HEADER 20
#define IP4_LENGTH 2
#define IP4_ID 4
#define IP4_FRAGMENT 6
#define IP4_FRAGMENT_MASK 0xbfff /* all but DF */
#define IP4_TTL 8
#define IP4_PROTOCOL 9
#define IP4_CHECKSUM 10
#define IP4_SOURCE 12
#define IP4_DESTINATION 16

#define IP6_HEADER 40
#define IP6_LENGTH 4
#define IP6_NEXT 6
#define IP6_SOURCE 8

#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17

#define TCP_HEADER 20
#define TCP_SEQUENCE 4
#define TCP_ACK_NUMBER 8
#define TCP_OFFSET 12
#define TCP_FLAGS 13
#define TCP_WINDOW 14
#define TCP_CHECKSUM 16
#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10
#define TCP_CWR 0x80

static inline u16 net_get16(const u8 *p)
{
    return (u16)(p[0] << 8 | p[1]);
}
static inline u32 net_get32(const u8 *p)
{
    return (u32)p[0] << 24 | (u32)p[1] << 16 | (u32)p[2] << 8 | p[3];
}
static inline void net_put16(u8 *p, u16 value)
{
    p[0] = (u8)(value >> 8);
    p[1] = (u8)value;
}
static inline void net_put32(u8 *p, u32 value)
{
    net_put16(p, (u16)(value >> 16));
    net_put16(p + 2, (u16)value);
}

/* RFC 1071 over data, begun with `sum`. */
u16 net_checksum(u32 sum, const u8 *data, size_t len);
/* The sum of TCP's or UDP's pseudo header. */
u32 net_pseudo_sum(const u8 *ip, bool v6, u8 protocol, size_t len);

#endif
