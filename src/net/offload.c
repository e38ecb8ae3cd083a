/*
 * Checksums are those of RFC 1071; what changes from segment to segment is in RFC 9293 (sequence
 * numbers, FIN and PSH), RFC 791 (identification, length), RFC 3168 (6.1.2: CWR is the first
 * segment's).
 */
#include "net/offload.h"

#include "net/protocols.h"

#include <string.h>

/* Where the headers of a packet to be cut lie. */
struct headers {
    size_t ip;      /* offset */
    size_t tcp;     /* offset */
    size_t payload; /* offset */
    bool v6;
};

static u32 sum_add(u32 sum, const u8 *data, size_t len)
{
    u64 total = sum;

    for (; len >= 4; len -= 4, data += 4)
        total += net_get32(data);
    if (len >= 2)
        total += net_get16(data), data += 2, len -= 2;
    if (len)
        total += (u32)data[0] << 8;
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return (u32)total;
}

u16 net_checksum(u32 sum, const u8 *data, size_t len)
{
    return (u16)~sum_add(sum, data, len);
}

u32 net_pseudo_sum(const u8 *ip, bool v6, u8 protocol, size_t len)
{
    u32 sum = v6 ? sum_add(0, ip + IP6_SOURCE, 32) : sum_add(0, ip + IP4_SOURCE, 8);

    return sum + protocol + (u32)(len >> 16) + (u32)(len & 0xffff);
}

/* Behind the VLAN tags: the offset of what follows, and its type. */
static size_t network_header(const u8 *packet, size_t len, u16 *type)
{
    size_t at = NET_HEADER_SIZE;

    *type = net_get16(packet + 12);
    for (unsigned i = 0; i < 2 && (*type == ETHERTYPE_VLAN || *type == ETHERTYPE_QINQ); i++) {
        if (len < at + 4)
            break;
        *type = net_get16(packet + at + 2);
        at += 4;
    }
    return at;
}

static bool find_headers(const struct net_offload *o, const u8 *packet, size_t len,
                         struct headers *h)
{
    u8 gso = o->gso_type & (u8)~NET_GSO_ECN;
    size_t ip_length;
    u16 type;

    if (len < NET_HEADER_SIZE)
        return false;
    h->ip = network_header(packet, len, &type);
    h->v6 = gso == NET_GSO_TCPV6;
    if (type != (h->v6 ? ETHERTYPE_IP6 : ETHERTYPE_IP4) || len < h->ip + IP6_HEADER)
        return false;
    if (h->v6) {
        /* With extension headers csum_start says where TCP is. */
        ip_length = o->csum_start > h->ip ? o->csum_start - h->ip : 0;
        if (ip_length < IP6_HEADER ||
            (ip_length == IP6_HEADER && packet[h->ip + IP6_NEXT] != PROTOCOL_TCP))
            return false;
    } else {
        ip_length = 4U * (packet[h->ip] & 15);
        if (ip_length < IP4_HEADER || packet[h->ip + IP4_PROTOCOL] != PROTOCOL_TCP)
            return false;
    }
    h->tcp = h->ip + ip_length;
    if (len < h->tcp + TCP_HEADER)
        return false;
    h->payload = h->tcp + 4U * (packet[h->tcp + TCP_OFFSET] >> 4);
    return h->payload >= h->tcp + TCP_HEADER && h->payload < len;
}

bool net_offload_is_sane(const struct net_offload *o, const u8 *packet, size_t len)
{
    u8 gso = o->gso_type & (u8)~NET_GSO_ECN;
    struct headers h;

    if ((o->flags & NET_NEEDS_CSUM) &&
        (o->csum_start < NET_HEADER_SIZE || (size_t)o->csum_start + o->csum_offset + 2 > len))
        return false;
    if (gso == NET_GSO_NONE)
        return true;
    return (gso == NET_GSO_TCPV4 || gso == NET_GSO_TCPV6) && o->gso_size &&
           (o->flags & NET_NEEDS_CSUM) && find_headers(o, packet, len, &h) &&
           o->csum_start == h.tcp && o->csum_offset == TCP_CHECKSUM;
}

void net_fill_checksum(const struct net_offload *o, u8 *packet, size_t len)
{
    u16 sum;

    if (!(o->flags & NET_NEEDS_CSUM))
        return;
    /* The field holds the sum of the pseudo header. */
    sum = net_checksum(0, packet + o->csum_start, len - o->csum_start);
    /* 0 would mean that UDP has none; for TCP both are the same. */
    net_put16(packet + o->csum_start + o->csum_offset, sum ? sum : 0xffff);
}

/* Lengths and checksums of a packet whose payload is what follows its headers. */
static void finish_headers(const struct headers *h, u8 *packet, size_t len)
{
    u8 *ip = packet + h->ip, *tcp = packet + h->tcp;
    size_t tcp_length = len - h->tcp;

    if (h->v6) {
        net_put16(ip + IP6_LENGTH, (u16)(len - h->ip - IP6_HEADER));
    } else {
        net_put16(ip + IP4_LENGTH, (u16)(len - h->ip));
        net_put16(ip + IP4_CHECKSUM, 0);
        net_put16(ip + IP4_CHECKSUM, net_checksum(0, ip, h->tcp - h->ip));
    }
    net_put16(tcp + TCP_CHECKSUM, 0);
    net_put16(tcp + TCP_CHECKSUM,
              net_checksum(net_pseudo_sum(ip, h->v6, PROTOCOL_TCP, tcp_length), tcp, tcp_length));
}

bool net_join_segments(const struct net_offload *o, u8 *packet, size_t len)
{
    struct headers h;

    if (!find_headers(o, packet, len, &h) || len - h.ip > 65535)
        return false;
    finish_headers(&h, packet, len);
    return true;
}

unsigned net_segments(const struct net_offload *o, const u8 *packet, size_t len)
{
    struct headers h;
    size_t n;

    if ((o->gso_type & ~NET_GSO_ECN) == NET_GSO_NONE)
        return 1;
    if (!o->gso_size || !find_headers(o, packet, len, &h))
        return 0;
    n = (len - h.payload + o->gso_size - 1) / o->gso_size;
    return n <= NET_SEGMENTS_MAX ? (unsigned)n : 0;
}

size_t net_segments_size(const struct net_offload *o, const u8 *packet, size_t len)
{
    unsigned n = net_segments(o, packet, len);
    struct headers h;

    return n > 1 && find_headers(o, packet, len, &h) ? len + (n - 1) * h.payload : len;
}

size_t net_segment(const struct net_offload *o, const u8 *packet, size_t len, unsigned n, u8 *buf)
{
    struct headers h;
    size_t at, here;
    u8 *tcp;

    if ((o->gso_type & ~NET_GSO_ECN) == NET_GSO_NONE || !find_headers(o, packet, len, &h)) {
        memcpy(buf, packet, len);
        net_fill_checksum(o, buf, len);
        return len;
    }
    at = h.payload + (size_t)n * o->gso_size;
    here = MIN(o->gso_size, len - at);
    memcpy(buf, packet, h.payload);
    memcpy(buf + h.payload, packet + at, here);
    tcp = buf + h.tcp;
    net_put32(tcp + TCP_SEQUENCE, net_get32(tcp + TCP_SEQUENCE) + n * o->gso_size);
    if (n)
        tcp[TCP_FLAGS] &= (u8)~TCP_CWR;
    if (at + here < len)
        tcp[TCP_FLAGS] &= (u8) ~(TCP_FIN | TCP_PSH);
    if (!h.v6)
        net_put16(buf + h.ip + IP4_ID, (u16)(net_get16(buf + h.ip + IP4_ID) + n));
    finish_headers(&h, buf, h.payload + here);
    return h.payload + here;
}
