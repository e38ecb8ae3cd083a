/*
 * Bytes as a driver of a network card and as the network it is on: rings, headers, control
 * commands, packets that find no room, offloads in software; and packets of vsock. The sanitizers
 * and the rig's slots are the judges.
 */
#include "../unit/net_rig.h"
#include "fuzz_device.h"
#include "host/log.h"
#include "net/merge.h"
#include "net/offload.h"
#include "net/vsock.h"

#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static struct net_offload take_offload(struct input *in)
{
    struct net_offload o = {
        .flags = (u8)take(in, 1),
        .gso_type = (u8)take(in, 1),
        .gso_size = (u16)take(in, 2),
        .csum_start = (u16)take(in, 1),
        .csum_offset = (u16)take(in, 1),
    };

    return o;
}

/* What the backends in software do with a packet of the guest's. */
static void offload(struct input *in)
{
    static u8 packet[NET_PACKET_MAX], out[NET_PACKET_MAX];
    struct net_offload o = take_offload(in);
    size_t len = NET_HEADER_SIZE + take(in, 2) % (NET_PACKET_MAX - NET_HEADER_SIZE), total = 0;
    unsigned n;

    memset(packet, 0, sizeof(packet));
    take_bytes(in, packet, 80);
    if (!net_offload_is_sane(&o, packet, len))
        return;
    n = net_segments(&o, packet, len);
    for (unsigned i = 0; i < n; i++)
        total += net_segment(&o, packet, len, i, out);
    if (n && total != net_segments_size(&o, packet, len))
        __builtin_trap();
    if (o.gso_type)
        net_join_segments(&o, packet, len);
    else
        net_fill_checksum(&o, packet, len);
}

/* Segments as a network stack hands them on: what was merged is sane, and cut again as long. */
static void merge(struct input *in)
{
    static struct net_merge m;
    static u8 packet[NET_PACKET_MAX];
    struct net_offload o;
    size_t len = 54 + take(in, 2) % 1600, total = 0;

    m = (struct net_merge){0};
    memset(packet, 0, sizeof(packet));
    take_bytes(in, packet, 54);
    if (take(in, 1) & 1) { /* most bytes make no TCP */
        memcpy(packet + 12, "\x08\0\x45", 3);
        packet[16] = (u8)((len - 14) >> 8);
        packet[17] = (u8)(len - 14);
        memcpy(packet + 20, "\x40\0\x40\x06", 4);
        packet[46] = 0x50;
        packet[47] = 0x10;
    }
    for (unsigned i = 0; i < 100 && net_merge_add(&m, packet, len); i++) {
        u32 sequence;

        memcpy(&sequence, packet + 38, 4);
        sequence = __builtin_bswap32(sequence) + (u32)(len - 54);
        total += len - 54;
        if (take(in, 1) == 1)
            packet[take(in, 1) % 54] = (u8)take(in, 1);
        sequence = __builtin_bswap32(sequence);
        memcpy(packet + 38, &sequence, 4);
    }
    if (!m.segments)
        return;
    net_merge_finish(&m, &o);
    if (m.len != 54 + total || !net_offload_is_sane(&o, m.packet, m.len))
        __builtin_trap();
}

static void add_chain(struct net_rig *n, struct input *in)
{
    struct buffer b[4];
    unsigned q = take(in, 1) % NET_QUEUES, count = 1 + take(in, 1) % 4;

    for (unsigned i = 0; i < count; i++) {
        b[i] = (struct buffer){NET_BUFFERS + take(in, 2) % 0x7000, (u32)take(in, 2) % 0x900,
                               q == NET_CONTROL ? i + 1 == count : q % 2 == 0};
        if (take(in, 1) == 0)
            b[i].at = take(in, 8);
    }
    if (take(in, 1) & 1) {
        u8 bytes[64];
        size_t len = take_bytes(in, bytes, sizeof(bytes));

        memory_write(&n->d.rig->memory, b[0].at, bytes, len);
    }
    net_add(n, q, b, count);
    net_notify(n, q);
}

static void deliver(struct net_rig *n, struct input *in)
{
    static u8 packet[NET_PACKET_MAX];
    struct net_offload o = take_offload(in);
    size_t len = take(in, 2);

    take_bytes(in, packet, 20);
    net_deliver(&n->player->b, take(in, 1) % NET_PAIRS, &o, packet, len);
}

static void step(struct net_rig *n, struct input *in)
{
    unsigned size = 1U << take(in, 1) % 4;

    switch (take(in, 1) % 12) {
    case 0:
        reg_write(&n->d, take(in, 1) % 64, take(in, size), size);
        break;
    case 1:
        reg_read(&n->d, take(in, 2) % VIRTIO_BAR_SIZE, size);
        break;
    case 2:
        put16(&n->d, NET_RING(take(in, 1) % NET_QUEUES) + take(in, 2) % 0x1000, take(in, 2));
        break;
    case 3:
        net_start_driver(n, take(in, 8));
        break;
    case 4:
        n->player->busy = take(in, 1) & 1;
        if (!n->player->busy)
            net_sendable(&n->player->b, 0);
        break;
    case 5:
        net_link_changed(&n->player->b, take(in, 1) & 1);
        break;
    case 6:
        load_damaged_state(virtio_device(n->card), in);
        pci_host_loaded(n->d.host);
        break;
    case 7:
    case 8:
        deliver(n, in);
        break;
    case 9:
        take(in, 1) & 1 ? offload(in) : merge(in);
        break;
    default:
        add_chain(n, in);
        break;
    }
    run_loop(&n->d);
}

/* Packets of a guest with one program that is connected, and what it makes of them. */
static void vsock(struct input *in)
{
    static u8 payload[VSOCK_PAYLOAD_MAX];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct driver d = {.rig = rig_create()};
    struct vsock_header h, out;
    struct error err = {0};
    char spec[64];
    struct vsock *v;
    int fd;

    d.rig->env.loop = event_loop_create(&err);
    snprintf(address.sun_path, sizeof(address.sun_path), "/tmp/fuzz-vsock.%d", (int)getpid());
    snprintf(spec, sizeof(spec), "cid=3,path=%s", address.sun_path);
    v = vsock_open(spec, d.rig->env.loop, &err);
    if (!v)
        abort();
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        write(fd, "CONNECT 52\n", 11) != 11)
        abort();
    run_loop(&d);
    while (in->left) {
        u8 what = (u8)take(in, 1);

        h = (struct vsock_header){
            .src_cid = 3,
            .dst_cid = VSOCK_CID_HOST,
            .src_port = what & 1 ? 52 : (u32)take(in, 1),
            .dst_port = what & 2 ? 0x40000000 : (u32)take(in, 1),
            .type = what & 4 ? 1 : (u16)take(in, 1),
            .op = (u16)take(in, 1) % 9,
            .flags = (u32)take(in, 1),
            .len = (u32)take(in, 2),
            .buf_alloc = (u32)take(in, 3),
            .fwd_cnt = (u32)take(in, 3),
        };
        vsock_from_guest(v, &h, payload);
        if (what & 8 && send(fd, payload, 100, MSG_NOSIGNAL) < 0)
            what = 0;
        if (what & 16)
            run_loop(&d);
        for (unsigned i = 0; what & 32 && i < 4; i++) {
            if (vsock_to_guest(v, &out, payload, 1 + take(in, 1) * 256) && out.len > 65536)
                __builtin_trap();
        }
        if (what == 0xff)
            vsock_reset(v);
        if (what == 0xfe && recv(fd, payload, sizeof(payload), MSG_DONTWAIT) == 0)
            break;
    }
    close(fd);
    run_loop(&d);
    vsock_close(v);
    event_loop_destroy(d.rig->env.loop);
    rig_destroy(d.rig);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct net_rig *n;

    log_set_level(LOG_ERROR);
    if (take(&in, 1) % 4 == 0) {
        vsock(&in);
        return 0;
    }
    n = net_rig_create();
    net_start_driver(n, take(&in, 8));
    while (in.left)
        step(n, &in);
    net_rig_destroy(n);
    return 0;
}
