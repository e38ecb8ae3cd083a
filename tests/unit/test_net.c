/*
 * Network backends, by a card that speaks for a guest: user networking (ARP, DHCP, ICMP, TCP with
 * and without segments to cut, port forwarding), the socket between two VMs, the queue before a
 * card, captures, options.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "host/event_loop.h"
#include "host/log.h"
#include "net/net.h"
#include "net/offload.h"
#include "net/protocols.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FRAMES 64

struct frame {
    size_t len;
    struct net_offload o;
    u8 data[NET_PACKET_MAX];
};

/* A guest's card that keeps what it gets. */
struct card {
    struct net_backend *net;
    struct frame *frames;
    unsigned n, limit; /* frames that it has room for */
    unsigned sendable, link_changes;
    bool link;
};

static struct event_loop *loop;
static char folder[64];

static bool card_receive(void *opaque, unsigned queue, const struct net_offload *o,
                         const u8 *packet, size_t len)
{
    struct card *c = opaque;

    if (c->n >= c->limit)
        return false;
    c->frames[c->n].len = len;
    c->frames[c->n].o = *o;
    memcpy(c->frames[c->n++].data, packet, len);
    return true;
}

static void card_sendable(void *opaque, unsigned queue)
{
    struct card *c = opaque;

    c->sendable++;
}

static void card_link_changed(void *opaque, bool up)
{
    struct card *c = opaque;

    c->link = up;
    c->link_changes++;
}

static struct card *card_create(const char *spec)
{
    struct error err = {0};
    struct card *c = calloc(1, sizeof(*c));
    struct net_card card = {card_receive, card_sendable, card_link_changed, c};

    c->frames = calloc(FRAMES, sizeof(*c->frames));
    c->limit = FRAMES;
    c->net = net_open(spec, "test", loop, &err);
    if (!c->net)
        fail_msg("%s", err.text);
    c->link = net_info(c->net)->link_up;
    net_attach(c->net, &card);
    return c;
}

static void card_destroy(struct card *c)
{
    net_attach(c->net, NULL);
    net_close(c->net);
    free(c->frames);
    free(c);
}

/* ---- the loop ---- */

static void stop(void *opaque)
{
    event_loop_stop(loop);
}

static void run_for(u64 ms)
{
    struct host_timer t = {.fire = stop};

    event_loop_timer_arm(loop, &t, host_clock_ns() + ms * 1000000);
    event_loop_run(loop);
    event_loop_timer_remove(loop, &t);
}

/* Runs the loop until `e` holds; 10 seconds are enough for anything here. */
#define WAIT_FOR(e)                                                                                \
    do {                                                                                           \
        for (unsigned tries_ = 0; !(e) && tries_ < 2000; tries_++)                                 \
            run_for(5);                                                                            \
        assert_true(e);                                                                            \
    } while (0)

static int send_as(struct card *c, const struct net_offload *o, const void *packet, size_t len)
{
    /* In two pieces, as a guest's may come. */
    struct iovec iov[] = {
        {(void *)packet, 10},
        {(u8 *)packet + 10, len - 10},
    };

    return net_send(c->net, 0, o, iov, 2);
}

static int send_plain(struct card *c, const void *packet, size_t len)
{
    static const struct net_offload plain;

    return send_as(c, &plain, packet, len);
}

/* ---- what a guest says ---- */

static const u8 guest_mac[6] = {0x52, 0x54, 0, 1, 2, 3};
static const u8 host_mac[6] = {0x52, 0x55, 10, 0, 2, 2}; /* libslirp's for 10.0.2.2 */
#define GUEST_IP 0x0a00020f
#define HOST_IP 0x0a000202

#define IP NET_HEADER_SIZE
#define L4 (IP + IP4_HEADER)

static void put_ethernet(u8 *p, const u8 *to, u16 type)
{
    memcpy(p, to, 6);
    memcpy(p + 6, guest_mac, 6);
    net_put16(p + 12, type);
}

static void put_ip(u8 *p, u8 protocol, u32 from, u32 to, size_t payload)
{
    u8 *ip = p + IP;

    memset(ip, 0, IP4_HEADER);
    ip[0] = 0x45;
    net_put16(ip + IP4_LENGTH, (u16)(IP4_HEADER + payload));
    net_put16(ip + IP4_ID, 7);
    ip[8] = 64;
    ip[IP4_PROTOCOL] = protocol;
    net_put32(ip + IP4_SOURCE, from);
    net_put32(ip + IP4_DESTINATION, to);
    net_put16(ip + IP4_CHECKSUM, net_checksum(0, ip, IP4_HEADER));
}

/* A TCP segment to 10.0.2.2; the checksum is left to the card. Returns its length. */
static size_t put_tcp(u8 *p, u16 from, u16 to, u32 seq, u32 ack, u8 flags, const void *data,
                      size_t len)
{
    u8 *tcp = p + L4;

    put_ethernet(p, host_mac, ETHERTYPE_IP4);
    put_ip(p, PROTOCOL_TCP, GUEST_IP, HOST_IP, TCP_HEADER + len);
    memset(tcp, 0, TCP_HEADER);
    net_put16(tcp, from);
    net_put16(tcp + 2, to);
    net_put32(tcp + TCP_SEQUENCE, seq);
    net_put32(tcp + TCP_ACK_NUMBER, ack);
    tcp[TCP_OFFSET] = TCP_HEADER / 4 << 4;
    tcp[TCP_FLAGS] = flags;
    net_put16(tcp + TCP_WINDOW, 65535);
    memcpy(tcp + TCP_HEADER, data, len);
    net_put16(
        tcp + TCP_CHECKSUM,
        (u16)~net_checksum(net_pseudo_sum(p + IP, false, PROTOCOL_TCP, TCP_HEADER + len), p, 0));
    return L4 + TCP_HEADER + len;
}

static const struct net_offload tcp_checksum = {
    .flags = NET_NEEDS_CSUM, .csum_start = L4, .csum_offset = TCP_CHECKSUM};

/* The nth frame from the end that is TCP, or NULL. */
static struct frame *last_tcp(struct card *c)
{
    for (unsigned i = c->n; i--;) {
        if (net_get16(c->frames[i].data + 12) == ETHERTYPE_IP4 &&
            c->frames[i].data[IP + IP4_PROTOCOL] == PROTOCOL_TCP)
            return &c->frames[i];
    }
    return NULL;
}

static bool tcp_is_right(const struct frame *f)
{
    size_t len = net_get16(f->data + IP + IP4_LENGTH) - IP4_HEADER;

    return net_checksum(0, f->data + IP, IP4_HEADER) == 0 &&
           net_checksum(net_pseudo_sum(f->data + IP, false, PROTOCOL_TCP, len), f->data + L4,
                        len) == 0;
}

static int listen_on_loopback(u16 *port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t len = sizeof(a);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof(a)), 0);
    assert_int_equal(listen(fd, 1), 0);
    getsockname(fd, (struct sockaddr *)&a, &len);
    *port = ntohs(a.sin_port);
    return fd;
}

static bool readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};

    return poll(&p, 1, 0) == 1;
}

/* ---- user networking ---- */

/* Asks who has 10.0.2.2, and so tells who has 10.0.2.15. */
static void send_arp(struct card *c)
{
    u8 p[42] = {0};

    memset(p, 0xff, 6);
    put_ethernet(p, p, ETHERTYPE_ARP);
    net_put16(p + 14, 1);
    net_put16(p + 16, ETHERTYPE_IP4);
    p[18] = 6;
    p[19] = 4;
    net_put16(p + 20, 1);
    memcpy(p + 22, guest_mac, 6);
    net_put32(p + 28, GUEST_IP);
    net_put32(p + 38, HOST_IP);
    assert_int_equal(send_plain(c, p, sizeof(p)), 0);
}

static void test_arp_is_answered(void **state)
{
    struct card *c = card_create("user");

    send_arp(c);
    /* Never from within net_send: the card may hold its lock. */
    assert_int_equal(c->n, 0);
    WAIT_FOR(c->n);
    assert_int_equal(net_get16(c->frames[0].data + 12), ETHERTYPE_ARP);
    assert_int_equal(net_get16(c->frames[0].data + 20), 2);
    assert_memory_equal(c->frames[0].data + 22, host_mac, 6);
    assert_int_equal(net_get32(c->frames[0].data + 28), HOST_IP);
    card_destroy(c);
}

static void test_dhcp_gives_an_address(void **state)
{
    struct card *c = card_create("user,mac=52:54:00:01:02:03");
    u8 p[L4 + 8 + 300] = {0}, *dhcp = p + L4 + 8;

    assert_memory_equal(net_info(c->net)->mac, guest_mac, 6);
    memset(p, 0xff, 6);
    put_ethernet(p, p, ETHERTYPE_IP4);
    put_ip(p, PROTOCOL_UDP, 0, 0xffffffff, 308);
    net_put16(p + L4, 68);
    net_put16(p + L4 + 2, 67);
    net_put16(p + L4 + 4, 308);
    dhcp[0] = 1; /* BOOTREQUEST, Ethernet: RFC 2131, 2 */
    dhcp[1] = 1;
    dhcp[2] = 6;
    net_put32(dhcp + 4, 0x12345678);
    memcpy(dhcp + 28, guest_mac, 6);
    net_put32(dhcp + 236, 0x63825363);
    memcpy(dhcp + 240, "\x35\x01\x01\xff", 4); /* DHCPDISCOVER */
    send_plain(c, p, sizeof(p));
    WAIT_FOR(c->n);
    dhcp = c->frames[0].data + L4 + 8;
    assert_int_equal(dhcp[0], 2);
    assert_int_equal(net_get32(dhcp + 4), 0x12345678);
    assert_int_equal(net_get32(dhcp + 16), GUEST_IP);
    card_destroy(c);
}

static void test_ping_is_answered(void **state)
{
    struct card *c = card_create("user");
    u8 p[L4 + 8 + 32];

    put_ethernet(p, host_mac, ETHERTYPE_IP4);
    put_ip(p, PROTOCOL_ICMP, GUEST_IP, HOST_IP, 40);
    memset(p + L4, 0x5a, 40);
    p[L4] = 8; /* echo */
    p[L4 + 1] = 0;
    net_put16(p + L4 + 2, 0);
    net_put16(p + L4 + 2, net_checksum(0, p + L4, 40));
    send_arp(c);
    send_plain(c, p, sizeof(p));
    WAIT_FOR(c->n == 2);
    assert_int_equal(c->frames[1].data[IP + IP4_PROTOCOL], PROTOCOL_ICMP);
    assert_int_equal(c->frames[1].data[L4], 0); /* echo reply */
    assert_memory_equal(c->frames[c->n - 1].data + L4 + 8, p + L4 + 8, 32);
    card_destroy(c);
}

static void test_tcp_both_ways(void **state)
{
    struct card *c = card_create("user");
    struct net_offload tso = tcp_checksum;
    u16 port;
    int listener = listen_on_loopback(&port), peer;
    static u8 p[NET_PACKET_MAX], big[40000], got[40000];
    size_t len, done = 0, largest = 0;
    struct frame *f;
    u32 theirs;

    send_arp(c);
    len = put_tcp(p, 1024, port, 1000, 0, TCP_SYN, "", 0);
    send_as(c, &tcp_checksum, p, len);
    WAIT_FOR((f = last_tcp(c)));
    assert_true(tcp_is_right(f));
    assert_int_equal(f->o.flags, NET_DATA_VALID);
    assert_int_equal(f->data[L4 + TCP_FLAGS] & (TCP_SYN | TCP_ACK), TCP_SYN | TCP_ACK);
    assert_int_equal(net_get32(f->data + L4 + TCP_ACK_NUMBER), 1001);
    theirs = net_get32(f->data + L4 + TCP_SEQUENCE) + 1;

    /* 40000 bytes at once, for the card to cut: they arrive as they are. */
    for (size_t i = 0; i < sizeof(big); i++)
        big[i] = (u8)(i * 7 + i / 256);
    len = put_tcp(p, 1024, port, 1001, theirs, TCP_ACK | TCP_PSH, big, sizeof(big));
    tso.gso_type = NET_GSO_TCPV4;
    tso.gso_size = 1460;
    tso.hdr_len = L4 + TCP_HEADER;
    send_as(c, &tso, p, len);
    WAIT_FOR(readable(listener));
    peer = accept(listener, NULL, NULL);
    while (done < sizeof(big)) {
        ssize_t n;

        WAIT_FOR(readable(peer));
        n = read(peer, got + done, sizeof(got) - done);
        assert_true(n > 0);
        done += (size_t)n;
    }
    assert_memory_equal(got, big, sizeof(big));

    /* And back. */
    c->n = 0;
    assert_int_equal(write(peer, "hello", 5), 5);
    WAIT_FOR((f = last_tcp(c)) && f->len == L4 + TCP_HEADER + 5);
    assert_true(tcp_is_right(f));
    assert_memory_equal(f->data + L4 + TCP_HEADER, "hello", 5);

    /* Merged for a guest that wants it so; cut again, it is what it was. */
    net_set_offloads(c->net, NET_TAKES_CSUM | NET_TAKES_TSO4);
    len = put_tcp(p, 1024, port, 1001 + sizeof(big), theirs + 5, TCP_ACK, "", 0);
    send_as(c, &tcp_checksum, p, len);
    run_for(5);
    c->n = 0;
    done = 0;
    assert_int_equal(write(peer, big, sizeof(big)), sizeof(big));
    for (unsigned i = 0; done < sizeof(big); i++) {
        static struct frame cut;
        unsigned segments;

        WAIT_FOR(i < c->n);
        f = &c->frames[i];
        if (f->len <= L4 + TCP_HEADER)
            continue;
        assert_true(net_offload_is_sane(&f->o, f->data, f->len));
        segments = net_segments(&f->o, f->data, f->len);
        for (unsigned j = 0; j < segments; j++) {
            cut.len = net_segment(&f->o, f->data, f->len, j, cut.data);
            assert_true(cut.len <= 1514);
            assert_true(tcp_is_right(&cut));
            assert_int_equal(net_get32(cut.data + L4 + TCP_SEQUENCE), theirs + 5 + done);
            assert_memory_equal(cut.data + L4 + TCP_HEADER, big + done, cut.len - L4 - TCP_HEADER);
            done += cut.len - L4 - TCP_HEADER;
        }
        largest = f->len > largest ? f->len : largest;
        len = put_tcp(p, 1024, port, 1001 + sizeof(big), theirs + 5 + done, TCP_ACK, "", 0);
        send_as(c, &tcp_checksum, p, len);
    }
    assert_true(largest > 4000);
    close(peer);
    close(listener);
    card_destroy(c);
}

static void test_a_bad_checksum_field_is_refused(void **state)
{
    struct card *c = card_create("user");
    struct net_offload o = {.flags = NET_NEEDS_CSUM, .csum_start = 60000, .csum_offset = 60000};
    u8 p[128] = {0};

    send_as(c, &o, p, sizeof(p));
    o.gso_type = NET_GSO_TCPV6;
    o.csum_start = L4;
    send_as(c, &o, p, sizeof(p));
    run_for(20);
    assert_int_equal(c->n, 0);
    card_destroy(c);
}

static void test_a_port_is_forwarded(void **state)
{
    char spec[64];
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct error err = {0};
    struct card *c;
    struct frame *f;
    u8 p[42];
    u16 port;
    int fd;

    close(listen_on_loopback(&port));
    snprintf(spec, sizeof(spec), "user,hostfwd=tcp::%u-:80", port);
    c = card_create(spec);
    assert_null(net_open(spec, "test", loop, &err));
    assert_int_equal(err.class, ERROR_INPUT);
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    a.sin_port = htons(port);
    assert_true(connect(fd, (struct sockaddr *)&a, sizeof(a)) == 0 || errno == EINPROGRESS);
    /* libslirp looks for the guest by ARP. */
    WAIT_FOR(c->n && net_get16(c->frames[c->n - 1].data + 12) == ETHERTYPE_ARP);
    memcpy(p, c->frames[c->n - 1].data, sizeof(p));
    assert_int_equal(net_get32(p + 38), GUEST_IP);
    net_put16(p + 20, 2);
    memcpy(p + 32, p + 22, 10);
    memcpy(p + 22, guest_mac, 6);
    net_put32(p + 28, GUEST_IP);
    put_ethernet(p, host_mac, ETHERTYPE_ARP);
    send_plain(c, p, sizeof(p));
    WAIT_FOR((f = last_tcp(c)));
    assert_int_equal(net_get16(f->data + L4 + 2), 80);
    assert_int_equal(f->data[L4 + TCP_FLAGS] & TCP_SYN, TCP_SYN);
    close(fd);
    card_destroy(c);
}

/* ---- the socket ---- */

static char *socket_spec(const char *name)
{
    static char spec[128];

    snprintf(spec, sizeof(spec), "socket=%s/%s", folder, name);
    return spec;
}

static void fill_frame(u8 *p, size_t len, u8 with)
{
    memset(p, with, len);
    put_ethernet(p, host_mac, 0x88b5);
}

static void test_two_vms_talk(void **state)
{
    struct card *a = card_create(socket_spec("pair")), *b;
    u8 p[1514], q[60];

    assert_false(a->link);
    b = card_create(socket_spec("pair"));
    assert_memory_not_equal(net_info(a->net)->mac, net_info(b->net)->mac, 6);
    assert_true(b->link);
    WAIT_FOR(a->link);
    fill_frame(p, sizeof(p), 1);
    fill_frame(q, sizeof(q), 2);
    for (unsigned i = 0; i < 5; i++) {
        send_plain(a, p, sizeof(p));
        send_plain(b, q, sizeof(q));
    }
    WAIT_FOR(a->n == 5 && b->n == 5);
    assert_int_equal(b->frames[4].len, sizeof(p));
    assert_memory_equal(b->frames[4].data, p, sizeof(p));
    assert_memory_equal(a->frames[4].data, q, sizeof(q));

    /* The listener stays for whoever comes next. */
    card_destroy(b);
    WAIT_FOR(!a->link);
    send_plain(a, p, sizeof(p));
    b = card_create(socket_spec("pair"));
    WAIT_FOR(a->link);
    send_plain(a, q, sizeof(q));
    WAIT_FOR(b->n);
    assert_memory_equal(b->frames[0].data, q, sizeof(q));

    /* When the listener goes, the other takes its place. */
    card_destroy(a);
    WAIT_FOR(!b->link);
    run_for(400);
    a = card_create(socket_spec("pair"));
    WAIT_FOR(a->link && b->link);
    card_destroy(a);
    card_destroy(b);
}

static void test_a_slow_peer_holds_the_guest(void **state)
{
    struct card *a = card_create(socket_spec("slow")), *b = card_create(socket_spec("slow"));
    u8 p[1514];
    unsigned sent = 0, got;

    WAIT_FOR(a->link);
    b->limit = 0;
    fill_frame(p, sizeof(p), 1);
    while (send_plain(a, p, sizeof(p)) == 0) {
        assert_true(++sent < 100000);
        if (sent % 100 == 0)
            run_for(1);
    }
    assert_int_equal(a->sendable, 0);
    /* Then all of it arrives. */
    b->limit = FRAMES;
    for (got = 0; got < sent;) {
        net_resume(b->net, 0);
        run_for(1);
        got += b->n;
        b->n = 0;
    }
    assert_int_equal(got, sent);
    assert_int_equal(a->sendable, 1);
    card_destroy(a);
    card_destroy(b);
}

static int connect_to(const char *name)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof(address.sun_path), "%s/%s", folder, name);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void test_segments_are_cut_for_the_peer(void **state)
{
    struct card *c = card_create(socket_spec("cut"));
    struct net_offload tso = tcp_checksum;
    static u8 p[NET_PACKET_MAX], data[3000], in[8192];
    size_t len, at = 0, total = 0;
    int fd = connect_to("cut");

    WAIT_FOR(c->link);
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (u8)(i * 13);
    len = put_tcp(p, 1, 2, 5000, 6000, TCP_ACK | TCP_PSH | TCP_FIN | TCP_CWR, data, sizeof(data));
    tso.gso_type = NET_GSO_TCPV4 | NET_GSO_ECN;
    tso.gso_size = 1400;
    send_as(c, &tso, p, len);
    WAIT_FOR(readable(fd));
    total = (size_t)read(fd, in, sizeof(in));
    for (unsigned i = 0; i < 3; i++) {
        struct frame f = {.len = net_get32(in + at)};
        size_t payload = i < 2 ? 1400 : 200;
        u8 flags = i == 0 ? TCP_ACK | TCP_CWR : i == 1 ? TCP_ACK : TCP_ACK | TCP_PSH | TCP_FIN;

        assert_int_equal(f.len, L4 + TCP_HEADER + payload);
        memcpy(f.data, in + at + 4, f.len);
        assert_true(tcp_is_right(&f));
        assert_int_equal(net_get32(f.data + L4 + TCP_SEQUENCE), 5000 + 1400 * i);
        assert_int_equal(net_get16(f.data + IP + IP4_ID), 7 + i);
        assert_int_equal(f.data[L4 + TCP_FLAGS], flags);
        assert_memory_equal(f.data + L4 + TCP_HEADER, data + 1400 * i, payload);
        at += 4 + f.len;
    }
    assert_int_equal(at, total);
    close(fd);
    card_destroy(c);
}

static void test_nonsense_from_the_peer_ends_it(void **state)
{
    static const u32 lengths[] = {0, 13, NET_PACKET_MAX + 1, 0xffffffff};
    struct card *c = card_create(socket_spec("bad"));

    log_set_level(LOG_ERROR);
    for (size_t i = 0; i < ARRAY_SIZE(lengths); i++) {
        u8 bytes[64] = {0};
        int fd = connect_to("bad");

        WAIT_FOR(c->link);
        net_put32(bytes, lengths[i]);
        assert_int_equal(write(fd, bytes, sizeof(bytes)), sizeof(bytes));
        WAIT_FOR(!c->link);
        close(fd);
    }
    /* A frame that comes a byte at a time is one. */
    u8 bytes[4 + 60];
    int fd = connect_to("bad");

    fill_frame(bytes + 4, 60, 3);
    net_put32(bytes, 60);
    for (size_t i = 0; i < sizeof(bytes); i++) {
        assert_int_equal(write(fd, bytes + i, 1), 1);
        run_for(1);
    }
    WAIT_FOR(c->n == 1);
    assert_memory_equal(c->frames[0].data, bytes + 4, 60);
    close(fd);
    log_set_level(LOG_INFO);
    card_destroy(c);
}

/* ---- captures and options ---- */

static void test_a_capture_byte_by_byte(void **state)
{
    char spec[512], path[128];
    static u8 file[4096];
    u8 p[60];
    struct card *a, *b;
    size_t len;
    FILE *f;

    snprintf(path, sizeof(path), "%s/out.pcap", folder);
    snprintf(spec, sizeof(spec), "%s,pcap=%s", socket_spec("capture"), path);
    a = card_create(spec);
    b = card_create(socket_spec("capture"));
    WAIT_FOR(a->link);
    fill_frame(p, sizeof(p), 1);
    send_plain(a, p, sizeof(p));
    WAIT_FOR(b->n);
    fill_frame(p, 42, 2);
    send_plain(b, p, 42);
    WAIT_FOR(a->n);
    card_destroy(a);
    card_destroy(b);

    f = fopen(path, "re");
    len = fread(file, 1, sizeof(file), f);
    fclose(f);
    assert_int_equal(len, 24 + 16 + 60 + 16 + 42);
    assert_memory_equal(file, "\x4d\x3c\xb2\xa1\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\x04\0\x01\0\0\0",
                        24);
    assert_memory_equal(file + 24 + 8, "\x3c\0\0\0\x3c\0\0\0", 8);
    assert_memory_equal(file + 24 + 16 + 14, "\1\1\1\1", 4);
    assert_memory_equal(file + 24 + 16 + 60 + 8, "\x2a\0\0\0\x2a\0\0\0", 8);
    assert_memory_equal(file + 24 + 16 + 60 + 16, p, 42);
    /* The times are now's, and in order. */
    u32 first[2], second[2];
    memcpy(first, file + 24, 8);
    memcpy(second, file + 24 + 16 + 60, 8);
    assert_true(first[1] < NS_PER_SEC && second[1] < NS_PER_SEC);
    assert_true(first[0] * NS_PER_SEC + first[1] <= second[0] * NS_PER_SEC + second[1]);
}

static void test_bad_options_are_named(void **state)
{
    static const struct {
        const char *spec, *says;
    } bad[] = {
        {"", "no kind of network"},
        {"bridge", "no kind of network"},
        {"user=x", "takes no"},
        {"user,", "KEY=VALUE"},
        {"user,mac", "KEY=VALUE"},
        {"user,color=red", "no option 'color'"},
        {"user,queues=2", "no option 'queues'"},
        {"socket=x,hostfwd=tcp::1-:2", "no option 'hostfwd'"},
        {"user,mac=1:2:3", "no MAC address"},
        {"user,mac=52:54:00:12:34:5g", "no MAC address"},
        {"user,mac=53:54:00:12:34:56", "group"},
        {"user,mtu=67", "mtu is a number"},
        {"user,mtu=1500x", "mtu is a number"},
        {"user,hostfwd=tcp::1", "hostfwd=tcp::1"},
        {"user,hostfwd=sctp::1-:2", "give tcp:"},
        {"user,hostfwd=tcp::0-:2", "give tcp:"},
        {"user,hostfwd=tcp::1-:65536", "give tcp:"},
        {"user,hostfwd=tcp:localhost:1-:2", "give tcp:"},
        {"user,hostfwd=tcp::1-x:2", "give tcp:"},
        {"user,pcap=/nowhere/x", "/nowhere/x"},
        {"socket", "socket=PATH"},
        {"socket=", "1 to "},
        {"socket=/nowhere/x", "/nowhere/x"},
        {"tap", "tap=IF"},
        {"tap=a-name-that-is-too-long", "tap=IF"},
        {"tap=x,queues=9", "queues is a number"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        struct error err = {0};

        if (net_open(bad[i].spec, "test", loop, &err))
            fail_msg("'%s' was taken", bad[i].spec);
        assert_int_equal(err.class, ERROR_INPUT);
        if (!strstr(err.text, bad[i].says))
            fail_msg("'%s': %s", bad[i].spec, err.text);
    }
}

/* ---- cutting ---- */

static void test_offloads_are_judged(void **state)
{
    static u8 p[NET_PACKET_MAX], out[NET_PACKET_MAX];
    size_t len = put_tcp(p, 1, 2, 3, 4, TCP_ACK, out, 1000);
    struct net_offload good = tcp_checksum, o;

    good.gso_type = NET_GSO_TCPV4;
    good.gso_size = 100;
    assert_true(net_offload_is_sane(&good, p, len));
    assert_int_equal(net_segments(&good, p, len), 10);
    assert_int_equal(net_segments_size(&good, p, len), 10 * (L4 + TCP_HEADER) + 1000);

    o = good;
    o.gso_size = 0;
    assert_false(net_offload_is_sane(&o, p, len));
    o = good;
    o.gso_type = 3; /* UDP fragments: never offered */
    assert_false(net_offload_is_sane(&o, p, len));
    o = good;
    o.gso_type = NET_GSO_TCPV6;
    assert_false(net_offload_is_sane(&o, p, len));
    o = good;
    o.flags = 0;
    assert_false(net_offload_is_sane(&o, p, len));
    o = good;
    o.csum_start++;
    assert_false(net_offload_is_sane(&o, p, len));
    /* Too many segments: none at all. */
    len = put_tcp(p, 1, 2, 3, 4, TCP_ACK, out, 60000);
    o = good;
    o.gso_size = 1;
    assert_int_equal(net_segments(&o, p, len), 0);
    /* Headers that aren't there. */
    for (size_t cut = NET_HEADER_SIZE; cut <= L4 + TCP_HEADER; cut++)
        assert_false(net_offload_is_sane(&good, p, cut));
    p[L4 + TCP_OFFSET] = 0x40;
    assert_false(net_offload_is_sane(&good, p, len));
    p[L4 + TCP_OFFSET] = 0xf0;
    assert_false(net_offload_is_sane(&good, p, L4 + 60));
}

static void test_ip6_is_cut(void **state)
{
    static u8 p[NET_PACKET_MAX], out[NET_PACKET_MAX];
    struct net_offload o = {.flags = NET_NEEDS_CSUM,
                            .gso_type = NET_GSO_TCPV6,
                            .gso_size = 1000,
                            .csum_start = NET_HEADER_SIZE + IP6_HEADER,
                            .csum_offset = TCP_CHECKSUM};
    u8 *ip = p + NET_HEADER_SIZE, *tcp = ip + IP6_HEADER;
    size_t len = NET_HEADER_SIZE + IP6_HEADER + TCP_HEADER + 2500, n;

    put_ethernet(p, host_mac, ETHERTYPE_IP6);
    ip[0] = 0x60;
    ip[IP6_NEXT] = PROTOCOL_TCP;
    memset(ip + IP6_SOURCE, 0xab, 32);
    tcp[TCP_OFFSET] = 0x50;
    assert_int_equal(net_segments(&o, p, len), 3);
    for (unsigned i = 0; i < 3; i++) {
        n = net_segment(&o, p, len, i, out);
        assert_int_equal(n, NET_HEADER_SIZE + IP6_HEADER + TCP_HEADER + (i < 2 ? 1000 : 500));
        n -= NET_HEADER_SIZE + IP6_HEADER;
        assert_int_equal(net_get16(out + NET_HEADER_SIZE + IP6_LENGTH), n);
        assert_int_equal(net_checksum(net_pseudo_sum(out + NET_HEADER_SIZE, true, PROTOCOL_TCP, n),
                                      out + NET_HEADER_SIZE + IP6_HEADER, n),
                         0);
    }
}

static int setup(void **state)
{
    struct error err = {0};

    snprintf(folder, sizeof(folder), "/tmp/doppel-net.XXXXXX");
    loop = event_loop_create(&err);
    return !loop || !mkdtemp(folder);
}

static int teardown(void **state)
{
    char path[128];

    event_loop_destroy(loop);
    snprintf(path, sizeof(path), "%s/out.pcap", folder);
    unlink(path);
    return rmdir(folder);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arp_is_answered),
        cmocka_unit_test(test_dhcp_gives_an_address),
        cmocka_unit_test(test_ping_is_answered),
        cmocka_unit_test(test_tcp_both_ways),
        cmocka_unit_test(test_a_bad_checksum_field_is_refused),
        cmocka_unit_test(test_a_port_is_forwarded),
        cmocka_unit_test(test_two_vms_talk),
        cmocka_unit_test(test_a_slow_peer_holds_the_guest),
        cmocka_unit_test(test_segments_are_cut_for_the_peer),
        cmocka_unit_test(test_nonsense_from_the_peer_ends_it),
        cmocka_unit_test(test_a_capture_byte_by_byte),
        cmocka_unit_test(test_bad_options_are_named),
        cmocka_unit_test(test_offloads_are_judged),
        cmocka_unit_test(test_ip6_is_cut),
    };

    return cmocka_run_group_tests(tests, setup, teardown);
}
