#include "net/merge.h"

#include "net/protocols.h"

#include <string.h>

#define IP NET_HEADER_SIZE
#define TCP (IP + IP4_HEADER)
#define PAYLOAD (TCP + TCP_HEADER)

/* Plain data: no options, no fragments, no flags but ACK and PSH, no padding behind it. */
static bool is_plain_data(const u8 *p, size_t len)
{
    return len > PAYLOAD && net_get16(p + 12) == ETHERTYPE_IP4 && p[IP] == 0x45 &&
           net_get16(p + IP + IP4_LENGTH) == len - IP && p[IP + IP4_PROTOCOL] == PROTOCOL_TCP &&
           !(net_get16(p + IP + IP4_FRAGMENT) & IP4_FRAGMENT_MASK) &&
           p[TCP + TCP_OFFSET] == TCP_HEADER / 4 << 4 &&
           (p[TCP + TCP_FLAGS] | TCP_PSH) == (TCP_ACK | TCP_PSH);
}

static bool same(const u8 *a, const u8 *b, size_t from, size_t len)
{
    return !memcmp(a + from, b + from, len);
}

/* The next segment of the same stream. */
static bool follows(const struct net_merge *m, const u8 *p, size_t len)
{
    return !m->closed && same(m->packet, p, 0, NET_HEADER_SIZE) && same(m->packet, p, IP, 2) &&
           same(m->packet, p, IP + IP4_TTL, 1) && same(m->packet, p, IP + IP4_SOURCE, 8) &&
           same(m->packet, p, TCP, TCP_SEQUENCE) && same(m->packet, p, TCP + TCP_ACK_NUMBER, 4) &&
           net_get32(p + TCP + TCP_SEQUENCE) == m->next_sequence && len - PAYLOAD <= m->payload &&
           m->len + (len - PAYLOAD) - IP <= 65535;
}

bool net_merge_add(struct net_merge *m, const u8 *packet, size_t len)
{
    size_t payload = len - PAYLOAD;

    if (!is_plain_data(packet, len))
        return false;
    if (!m->segments) {
        memcpy(m->packet, packet, len);
        m->len = len;
        m->payload = (u16)payload;
        m->closed = false;
    } else if (follows(m, packet, len)) {
        memcpy(m->packet + m->len, packet + PAYLOAD, payload);
        m->len += payload;
        m->packet[TCP + TCP_FLAGS] |= packet[TCP + TCP_FLAGS];
        memcpy(m->packet + TCP + TCP_WINDOW, packet + TCP + TCP_WINDOW, 2);
    } else {
        return false;
    }
    m->segments++;
    m->next_sequence = net_get32(packet + TCP + TCP_SEQUENCE) + (u32)payload;
    m->closed = payload < m->payload || (packet[TCP + TCP_FLAGS] & TCP_PSH);
    return true;
}

void net_merge_finish(struct net_merge *m, struct net_offload *o)
{
    u8 *ip = m->packet + IP, *tcp = m->packet + TCP;

    *o = (struct net_offload){.flags = NET_DATA_VALID};
    if (m->segments > 1) {
        *o = (struct net_offload){
            .flags = NET_NEEDS_CSUM,
            .gso_type = NET_GSO_TCPV4,
            .hdr_len = PAYLOAD,
            .gso_size = m->payload,
            .csum_start = TCP,
            .csum_offset = TCP_CHECKSUM,
        };
        net_put16(ip + IP4_LENGTH, (u16)(m->len - IP));
        net_put16(ip + IP4_CHECKSUM, 0);
        net_put16(ip + IP4_CHECKSUM, net_checksum(0, ip, IP4_HEADER));
        /* The sum of the pseudo header, as a guest leaves it to a card. */
        net_put16(
            tcp + TCP_CHECKSUM,
            (u16)~net_checksum(net_pseudo_sum(ip, false, PROTOCOL_TCP, m->len - TCP), tcp, 0));
    }
    m->segments = 0;
}
