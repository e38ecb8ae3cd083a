/*
 * virtio-net. Numbers in parentheses are sections of VIRTIO 1.2.
 *
 * No chain outlives the call that popped it: what can't go on now is put back into its queue, the
 * packet that the guest has no room for stays with the backend, and whoever has room again tells.
 * So there is nothing to bring in at a reset or a pause, and nothing to save but what the guest
 * chose.
 */
#include "device/virtio/net.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NET_F_CSUM BIT(0)
#define NET_F_GUEST_CSUM BIT(1)
#define NET_F_CTRL_GUEST_OFFLOADS BIT(2)
#define NET_F_MTU BIT(3)
#define NET_F_MAC BIT(5)
#define NET_F_GUEST_TSO4 BIT(7)
#define NET_F_GUEST_TSO6 BIT(8)
#define NET_F_GUEST_ECN BIT(9)
#define NET_F_HOST_TSO4 BIT(11)
#define NET_F_HOST_TSO6 BIT(12)
#define NET_F_HOST_ECN BIT(13)
#define NET_F_MRG_RXBUF BIT(15)
#define NET_F_STATUS BIT(16)
#define NET_F_CTRL_VQ BIT(17)
#define NET_F_CTRL_RX BIT(18)
#define NET_F_CTRL_VLAN BIT(19)
#define NET_F_CTRL_RX_EXTRA BIT(20)
#define NET_F_GUEST_ANNOUNCE BIT(21)
#define NET_F_MQ BIT(22)
#define NET_F_CTRL_MAC_ADDR BIT(23)

#define GUEST_OFFLOADS (NET_F_GUEST_CSUM | NET_F_GUEST_TSO4 | NET_F_GUEST_TSO6 | NET_F_GUEST_ECN)

#define NET_S_LINK_UP 1
#define NET_S_ANNOUNCE 2

enum { /* 5.1.6.5 */
       CTRL_RX = 0,
       CTRL_MAC = 1,
       CTRL_VLAN = 2,
       CTRL_ANNOUNCE = 3,
       CTRL_MQ = 4,
       CTRL_GUEST_OFFLOADS = 5,
};
enum { CTRL_MAC_TABLE_SET = 0, CTRL_MAC_ADDR_SET = 1 };
enum { CTRL_VLAN_ADD = 0, CTRL_VLAN_DEL = 1 };
enum { CTRL_OK = 0, CTRL_ERR = 1 };

/* Rules of CTRL_RX, by their numbers. */
enum { RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST, RX_RULES };

#define MAC_TABLE_MAX 64 /* of each kind; with more, all are taken */
#define CTRL_DATA_MAX 4096
#define VLANS 4096
#define PACKETS_A_TURN 256 /* then the loop looks at others */
#define BUFFERS_A_PACKET 64

#define RX_QUEUE(pair) (2 * (pair))
#define TX_QUEUE(pair) (2 * (pair) + 1)

struct net_header { /* 5.1.6 */
    struct net_offload offload;
    u16 num_buffers;
};
_Static_assert(sizeof(struct net_header) == 12, "VIRTIO 1.2, 5.1.6");

struct net_config { /* 5.1.4 */
    u8 mac[NET_MAC_SIZE];
    u16 status;
    u16 max_pairs;
    u16 mtu;
} __attribute__((packed));

/* Addresses whose packets the guest wants, besides its own. */
struct mac_table {
    u16 count;
    bool overflow; /* there were more: take all of this kind */
    u8 mac[MAC_TABLE_MAX][NET_MAC_SIZE];
};

struct virtio_net {
    struct virtio v;
    struct net_backend *backend;
    bool announce; /* loaded from elsewhere: tell the network when the machine goes on */
    struct net_config config;
    u16 pairs; /* that the guest uses */
    u64 guest_offloads;
    bool rules[RX_RULES];
    struct mac_table unicast, multicast;
    u64 vlans[VLANS / 64];
};

static struct virtio_net *net_of(struct virtio *v)
{
    return container_of(v, struct virtio_net, v);
}

/* ---- to the network ---- */

/* 0 when the packet has gone (or makes no sense), -EAGAIN when it must wait. */
static int transmit(struct virtio_net *n, unsigned pair, const struct virtq_chain *chain)
{
    struct iovec iov[VIRTQ_SEGMENTS_MAX];
    struct net_header h;
    unsigned count;

    if (virtq_chain_read(chain, 0, &h, sizeof(h)) < sizeof(h))
        return 0;
    count = virtq_chain_iov(chain, false, sizeof(h), chain->read_len - sizeof(h), iov);
    /* What wasn't agreed on isn't looked at (5.1.6.2.2); DATA_VALID is the device's to say. */
    h.offload.flags &= virtio_has(&n->v, NET_F_CSUM) ? NET_NEEDS_CSUM : 0;
    if (!virtio_has(&n->v, NET_F_HOST_TSO4 | NET_F_HOST_TSO6))
        h.offload.gso_type = NET_GSO_NONE;
    return net_send(n->backend, pair, &h.offload, iov, count);
}

/* False when the backend has enough for now. *left counts down. */
static bool transmit_all(struct virtio_net *n, unsigned pair, unsigned *left)
{
    struct virtq_chain *chain;

    while (*left && virtio_pop(&n->v, TX_QUEUE(pair), &chain)) {
        if (transmit(n, pair, chain) == -EAGAIN) {
            virtio_unpop(&n->v, TX_QUEUE(pair), chain);
            return false;
        }
        virtio_complete(&n->v, TX_QUEUE(pair), chain, 0);
        --*left;
    }
    return true;
}

static void tx_ready(struct virtio_net *n, unsigned pair)
{
    unsigned q = TX_QUEUE(pair), left = PACKETS_A_TURN, before;
    bool room;

    virtio_set_notify(&n->v, q, false);
    room = transmit_all(n, pair, &left);
    while (room && left) {
        /* What came before the driver saw that it is to notify again. */
        virtio_set_notify(&n->v, q, true);
        before = left;
        room = transmit_all(n, pair, &left);
        if (left == before)
            break;
        virtio_set_notify(&n->v, q, false);
    }
    virtio_signal(&n->v, q);
    if (room && !left)
        virtio_kick(&n->v, q);
}

static void net_card_sendable(void *opaque, unsigned pair)
{
    struct virtio_net *n = opaque;

    virtio_kick(&n->v, TX_QUEUE(pair));
}

/* ---- which packets the guest wants (5.1.6.5.1 to 5.1.6.5.3) ---- */

static bool table_has(const struct mac_table *t, const u8 *mac)
{
    if (t->overflow)
        return true;
    for (unsigned i = 0; i < t->count; i++) {
        if (!memcmp(t->mac[i], mac, NET_MAC_SIZE))
            return true;
    }
    return false;
}

static bool vlan_is_wanted(const struct virtio_net *n, const u8 *packet, size_t len)
{
    unsigned vlan;

    if (!virtio_has(&n->v, NET_F_CTRL_VLAN) || packet[12] != 0x81 || packet[13] != 0 || len < 16)
        return true;
    vlan = (packet[14] << 8 | packet[15]) & (VLANS - 1);
    return n->vlans[vlan / 64] >> vlan % 64 & 1;
}

static bool is_wanted(const struct virtio_net *n, const u8 *packet, size_t len)
{
    static const u8 broadcast[NET_MAC_SIZE] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

    if (n->rules[RX_PROMISC])
        return true;
    if (!vlan_is_wanted(n, packet, len))
        return false;
    if (!memcmp(packet, broadcast, NET_MAC_SIZE))
        return !n->rules[RX_NOBCAST];
    if (packet[0] & 1)
        return !n->rules[RX_NOMULTI] && (n->rules[RX_ALLMULTI] || table_has(&n->multicast, packet));
    return !n->rules[RX_NOUNI] &&
           (n->rules[RX_ALLUNI] || !memcmp(packet, n->config.mac, NET_MAC_SIZE) ||
            table_has(&n->unicast, packet));
}

/* ---- to the guest ---- */

/*
 * Chains with room for `need` bytes. Their number, or 0: there are too few, or -1: a packet of this
 * size never finds room in the guest's kind of buffers. None is taken then.
 */
static int take_buffers(struct virtio_net *n, unsigned q, u64 need, struct virtq_chain **chains)
{
    unsigned max = virtio_has(&n->v, NET_F_MRG_RXBUF) ? BUFFERS_A_PACKET : 1, count = 0;
    u64 room = 0;

    while (room < need && count < max && virtio_pop(&n->v, q, &chains[count]))
        room += chains[count++]->write_len;
    if (room >= need)
        return (int)count;
    room = count == max;
    while (count)
        virtio_unpop(&n->v, q, chains[--count]);
    return room ? -1 : 0;
}

/* A stretch of the packet with its header, into one chain. */
static u32 fill_buffer(const struct virtq_chain *chain, u64 at, const struct net_header *h,
                       const u8 *packet, size_t len)
{
    u32 done = 0;

    if (at < sizeof(*h))
        done = (u32)virtq_chain_write(chain, 0, (const u8 *)h + at, sizeof(*h) - at);
    at += done;
    if (at >= sizeof(*h))
        done += (u32)virtq_chain_write(chain, done, packet + (at - sizeof(*h)),
                                       len - (at - sizeof(*h)));
    return done;
}

static bool put_packet(struct virtio_net *n, unsigned q, struct net_header *h, const u8 *packet,
                       size_t len)
{
    struct virtq_chain *chains[BUFFERS_A_PACKET];
    int count = take_buffers(n, q, sizeof(*h) + len, chains);
    u64 at = 0;

    if (count <= 0)
        return count < 0; /* lost */
    h->num_buffers = (u16)count;
    for (int i = 0; i < count; i++) {
        u32 here = fill_buffer(chains[i], at, h, packet, len);

        /* A driver that saw the first alone would miss the others. */
        if (i < count - 1)
            virtio_complete_held(&n->v, q, chains[i], here);
        else
            virtio_complete(&n->v, q, chains[i], here);
        at += here;
    }
    virtio_signal(&n->v, q);
    return true;
}

/* The header as the guest may see it. False: it doesn't take such a packet. */
static bool adapt_offload(const struct virtio_net *n, struct net_offload *o)
{
    u64 type = (o->gso_type & ~NET_GSO_ECN) == NET_GSO_TCPV4 ? NET_F_GUEST_TSO4 : NET_F_GUEST_TSO6;

    if (o->gso_type != NET_GSO_NONE && !(n->guest_offloads & type))
        return false;
    if (n->guest_offloads & NET_F_GUEST_CSUM)
        return true;
    if (o->flags & NET_NEEDS_CSUM)
        return false;
    o->flags = 0;
    return true;
}

/* The lock is held. False: no room. */
static bool receive(struct virtio_net *n, unsigned pair, const struct net_offload *o,
                    const u8 *packet, size_t len)
{
    struct net_header h = {.offload = *o};
    unsigned q = RX_QUEUE(pair % n->pairs);

    /* A guest that is stopped goes on some time; one without a driver hears nothing. */
    if (n->v.stopped)
        return false;
    if (!virtio_is_live(&n->v) || !is_wanted(n, packet, len) || !adapt_offload(n, &h.offload))
        return true;
    if (put_packet(n, q, &h, packet, len))
        return true;
    /* It is to tell about new buffers. One may have come before it saw that. */
    virtio_set_notify(&n->v, q, true);
    return put_packet(n, q, &h, packet, len);
}

static bool net_card_receive(void *opaque, unsigned pair, const struct net_offload *o,
                             const u8 *packet, size_t len)
{
    struct virtio_net *n = opaque;
    bool taken;

    device_lock(&n->v.pci.dev);
    taken = receive(n, pair, o, packet, len);
    device_unlock(&n->v.pci.dev);
    return taken;
}

static void rx_ready(struct virtio_net *n, unsigned pair)
{
    virtio_set_notify(&n->v, RX_QUEUE(pair), false);
    for (unsigned i = pair; i < net_info(n->backend)->queues; i += n->pairs)
        net_resume(n->backend, i);
}

/* ---- control (5.1.6.5) ---- */

static void apply_offloads(struct virtio_net *n)
{
    static const struct {
        u64 feature;
        u32 takes;
    } map[] = {
        {NET_F_GUEST_CSUM, NET_TAKES_CSUM},
        {NET_F_GUEST_TSO4, NET_TAKES_TSO4},
        {NET_F_GUEST_TSO6, NET_TAKES_TSO6},
        {NET_F_GUEST_ECN, NET_TAKES_ECN},
    };
    u32 takes = 0;

    for (size_t i = 0; i < ARRAY_SIZE(map); i++)
        takes |= n->guest_offloads & map[i].feature ? map[i].takes : 0;
    net_set_offloads(n->backend, takes);
}

static int control_rx(struct virtio_net *n, u8 command, const u8 *data, size_t len)
{
    if (command >= RX_RULES || len != 1)
        return CTRL_ERR;
    n->rules[command] = data[0] != 0;
    return CTRL_OK;
}

/* One of the two tables, at data: moves on past it. */
static bool parse_table(struct mac_table *t, const u8 **data, size_t *len)
{
    u32 entries;

    if (*len < sizeof(entries))
        return false;
    memcpy(&entries, *data, sizeof(entries));
    *data += sizeof(entries);
    *len -= sizeof(entries);
    if (entries > *len / NET_MAC_SIZE)
        return false;
    t->overflow = entries > MAC_TABLE_MAX;
    t->count = t->overflow ? 0 : (u16)entries;
    memcpy(t->mac, *data, (size_t)t->count * NET_MAC_SIZE);
    *data += (size_t)entries * NET_MAC_SIZE;
    *len -= (size_t)entries * NET_MAC_SIZE;
    return true;
}

static int control_mac(struct virtio_net *n, u8 command, const u8 *data, size_t len)
{
    struct mac_table unicast = {0}, multicast = {0};

    if (command == CTRL_MAC_ADDR_SET && len == NET_MAC_SIZE) {
        memcpy(n->config.mac, data, NET_MAC_SIZE);
        return CTRL_OK;
    }
    if (command != CTRL_MAC_TABLE_SET || !parse_table(&unicast, &data, &len) ||
        !parse_table(&multicast, &data, &len) || len)
        return CTRL_ERR;
    n->unicast = unicast;
    n->multicast = multicast;
    return CTRL_OK;
}

static int control_vlan(struct virtio_net *n, u8 command, const u8 *data, size_t len)
{
    unsigned vlan;

    if (command > CTRL_VLAN_DEL || len != 2)
        return CTRL_ERR;
    vlan = data[0] | data[1] << 8;
    if (vlan >= VLANS)
        return CTRL_ERR;
    if (command == CTRL_VLAN_ADD)
        n->vlans[vlan / 64] |= BIT(vlan % 64);
    else
        n->vlans[vlan / 64] &= ~BIT(vlan % 64);
    return CTRL_OK;
}

static int control_announce(struct virtio_net *n, u8 command, const u8 *data, size_t len)
{
    if (command || len)
        return CTRL_ERR;
    n->config.status &= (u16)~NET_S_ANNOUNCE;
    return CTRL_OK;
}

static int control_mq(struct virtio_net *n, u8 command, const u8 *data, size_t len)
{
    unsigned pairs;

    if (command || len != 2)
        return CTRL_ERR;
    pairs = data[0] | data[1] << 8;
    if (!pairs || pairs > n->config.max_pairs)
        return CTRL_ERR;
    n->pairs = (u16)pairs;
    net_set_queues(n->backend, pairs);
    return CTRL_OK;
}

static int control_offloads(struct virtio_net *n, u8 command, const u8 *data, size_t len)
{
    u64 offloads;

    if (command || len != sizeof(offloads))
        return CTRL_ERR;
    memcpy(&offloads, data, sizeof(offloads));
    if (offloads & ~(n->v.features & GUEST_OFFLOADS))
        return CTRL_ERR;
    n->guest_offloads = offloads;
    apply_offloads(n);
    return CTRL_OK;
}

static const struct {
    u64 feature;
    int (*run)(struct virtio_net *n, u8 command, const u8 *data, size_t len);
} controls[] = {
    [CTRL_RX] = {NET_F_CTRL_RX, control_rx},
    [CTRL_MAC] = {NET_F_CTRL_MAC_ADDR | NET_F_CTRL_RX, control_mac},
    [CTRL_VLAN] = {NET_F_CTRL_VLAN, control_vlan},
    [CTRL_ANNOUNCE] = {NET_F_GUEST_ANNOUNCE, control_announce},
    [CTRL_MQ] = {NET_F_MQ, control_mq},
    [CTRL_GUEST_OFFLOADS] = {NET_F_CTRL_GUEST_OFFLOADS, control_offloads},
};

static u8 control(struct virtio_net *n, const struct virtq_chain *chain)
{
    u8 request[2 + CTRL_DATA_MAX];
    size_t len = virtq_chain_read(chain, 0, request, sizeof(request));
    u8 class = request[0];

    if (len < 2 || chain->read_len > sizeof(request) || class >= ARRAY_SIZE(controls) ||
        !virtio_has(&n->v, controls[class].feature))
        return CTRL_ERR;
    return (u8)controls[class].run(n, request[1], request + 2, len - 2);
}

static void control_ready(struct virtio_net *n, unsigned q)
{
    unsigned left = PACKETS_A_TURN;
    struct virtq_chain *chain;

    while (left && virtio_pop(&n->v, q, &chain)) {
        u8 status = control(n, chain);

        virtio_complete(&n->v, q, chain, (u32)virtq_chain_write(chain, 0, &status, 1));
        virtio_signal(&n->v, q);
        if (--left == 0)
            virtio_kick(&n->v, q);
    }
}

/* ---- the device ---- */

/* Behind the pairs that the driver can use (5.1.2). */
static unsigned control_queue(const struct virtio_net *n)
{
    return virtio_has(&n->v, NET_F_MQ) ? 2U * n->config.max_pairs : 2;
}

static void net_queue_ready(struct virtio *v, unsigned q)
{
    struct virtio_net *n = net_of(v);

    if (virtio_has(v, NET_F_CTRL_VQ) && q == control_queue(n))
        control_ready(n, q);
    else if (q / 2 >= n->pairs)
        return;
    else if (q % 2)
        tx_ready(n, q / 2);
    else
        rx_ready(n, q / 2);
}

static void net_card_link_changed(void *opaque, bool up)
{
    struct virtio_net *n = opaque;

    device_lock(&n->v.pci.dev);
    n->config.status = (u16)((n->config.status & ~NET_S_LINK_UP) | (up ? NET_S_LINK_UP : 0));
    virtio_config_changed(&n->v);
    device_unlock(&n->v.pci.dev);
}

static void net_reset(struct virtio *v)
{
    struct virtio_net *n = net_of(v);

    memcpy(n->config.mac, net_info(n->backend)->mac, NET_MAC_SIZE);
    n->config.status &= (u16)~NET_S_ANNOUNCE;
    n->pairs = 1;
    n->guest_offloads = 0;
    memset(n->rules, 0, sizeof(n->rules));
    n->rules[RX_PROMISC] = true; /* until the driver chooses */
    n->unicast = n->multicast = (struct mac_table){0};
    memset(n->vlans, 0, sizeof(n->vlans));
    net_set_queues(n->backend, 1);
    net_set_offloads(n->backend, 0);
}

static void net_driver_ok(struct virtio *v)
{
    struct virtio_net *n = net_of(v);

    n->guest_offloads = v->features & GUEST_OFFLOADS;
    apply_offloads(n);
}

static void net_start(struct virtio *v)
{
    struct virtio_net *n = net_of(v);

    device_lock(&v->pci.dev);
    if (n->announce) {
        n->announce = false;
        net_set_queues(n->backend, n->pairs);
        apply_offloads(n);
        if (virtio_has(v, NET_F_GUEST_ANNOUNCE)) {
            n->config.status |= NET_S_ANNOUNCE;
            virtio_config_changed(v);
        }
    }
    device_unlock(&v->pci.dev);
}

static void net_destroy(struct virtio *v)
{
    net_attach(net_of(v)->backend, NULL);
    free(net_of(v));
}

static const struct virtio_ops net_ops = {
    .queue_ready = net_queue_ready,
    .reset = net_reset,
    .driver_ok = net_driver_ok,
    .start = net_start,
    .destroy = net_destroy,
};

/* ---- state ---- */

static const struct state_field net_config_fields[] = {
    STATE_FIELD(struct net_config, mac),
    STATE_FIELD(struct net_config, status),
    STATE_FIELD(struct net_config, max_pairs),
    STATE_FIELD(struct net_config, mtu),
};
static const struct state_desc net_config_state =
    STATE_DESC("virtio_net_config", 1, struct net_config, net_config_fields);

static const struct state_field mac_table_fields[] = {
    STATE_FIELD(struct mac_table, count),
    STATE_FIELD(struct mac_table, overflow),
    STATE_FIELD(struct mac_table, mac),
};
static const struct state_desc mac_table_state =
    STATE_DESC("mac_table", 1, struct mac_table, mac_table_fields);

static int net_loaded(void *obj, struct error *err)
{
    struct virtio_net *n = obj;
    const struct net_info *info = net_info(n->backend);

    if (n->config.max_pairs != info->queues || n->config.mtu != info->mtu)
        return error_input(err, "virtio-net: the saved card has %u queues and an MTU of %u",
                           n->config.max_pairs, n->config.mtu);
    if (!n->pairs || n->pairs > n->config.max_pairs ||
        (n->guest_offloads & ~(n->v.features & GUEST_OFFLOADS)) ||
        n->unicast.count > MAC_TABLE_MAX || n->multicast.count > MAC_TABLE_MAX)
        return error_input(err, "virtio-net: the saved state is impossible");
    n->config.status &= NET_S_ANNOUNCE;
    n->config.status |= info->link_up ? NET_S_LINK_UP : 0;
    n->announce = true;
    return 0;
}

static const struct state_field net_fields[] = {
    STATE_STRUCTS(struct virtio_net, v, &virtio_state),
    STATE_HOST(struct virtio_net, backend),
    STATE_HOST(struct virtio_net, announce),
    STATE_STRUCTS(struct virtio_net, config, &net_config_state),
    STATE_FIELD(struct virtio_net, pairs),
    STATE_FIELD(struct virtio_net, guest_offloads),
    STATE_FIELD(struct virtio_net, rules),
    STATE_STRUCTS(struct virtio_net, unicast, &mac_table_state),
    STATE_STRUCTS(struct virtio_net, multicast, &mac_table_state),
    STATE_FIELD(struct virtio_net, vlans),
};
static const struct state_desc net_state = {
    .name = "virtio_net",
    .version = 1,
    .struct_size = sizeof(struct virtio_net),
    .fields = net_fields,
    .nfields = ARRAY_SIZE(net_fields),
    .loaded = net_loaded,
};

static u64 features_of(const struct net_info *info)
{
    u64 features = NET_F_CSUM | NET_F_HOST_TSO4 | NET_F_HOST_TSO6 | NET_F_HOST_ECN | NET_F_MTU |
                   NET_F_MAC | NET_F_MRG_RXBUF | NET_F_STATUS | NET_F_CTRL_VQ | NET_F_CTRL_RX |
                   NET_F_CTRL_RX_EXTRA | NET_F_CTRL_VLAN | NET_F_GUEST_ANNOUNCE |
                   NET_F_CTRL_MAC_ADDR;

    if (info->queues > 1)
        features |= NET_F_MQ;
    if (info->raw_offloads)
        features |= GUEST_OFFLOADS;
    if (info->valid_data)
        features |= NET_F_GUEST_CSUM;
    if (info->merges)
        features |= NET_F_GUEST_TSO4;
    if (features & NET_F_GUEST_CSUM)
        features |= NET_F_CTRL_GUEST_OFFLOADS;
    return features;
}

struct virtio *virtio_net_create(const struct device_env *env, const struct virtio_net_config *cfg,
                                 struct pci_host *host, u16 place, struct error *err)
{
    const struct net_info *info = net_info(cfg->backend);
    struct virtio_net *n = calloc(1, sizeof(*n));
    struct net_card card = {net_card_receive, net_card_sendable, net_card_link_changed, n};
    struct virtio_config config = {
        .name = "virtio-net",
        .type = VIRTIO_TYPE_NET,
        .class = PCI_CLASS_NETWORK_ETHERNET,
        .features = features_of(info),
        .queues = 2 * info->queues + 1,
        .config_size = sizeof(struct net_config),
    };

    if (!n) {
        error_host(err, ENOMEM, "virtio-net");
        return NULL;
    }
    n->backend = cfg->backend;
    n->config.status = info->link_up ? NET_S_LINK_UP : 0;
    n->config.max_pairs = (u16)info->queues;
    n->config.mtu = info->mtu;
    config.config = (u8 *)&n->config;
    if (virtio_init(&n->v, &net_ops, &config, &net_state, env, err)) {
        free(n);
        return NULL;
    }
    if (cfg->rom)
        pci_add_rom(&n->v.pci, cfg->rom, cfg->rom_size);
    if (virtio_add(&n->v, host, place, err)) {
        virtio_device(&n->v)->ops->destroy(virtio_device(&n->v));
        return NULL;
    }
    net_attach(cfg->backend, &card);
    return &n->v;
}
