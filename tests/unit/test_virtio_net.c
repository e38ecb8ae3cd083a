/*
 * virtio-net: packets both ways with and without room for them, control commands, filters, link,
 * reset, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "net_rig.h"

#define F_CSUM BIT(0)
#define F_GUEST_CSUM BIT(1)
#define F_CTRL_GUEST_OFFLOADS BIT(2)
#define F_MTU BIT(3)
#define F_MAC BIT(5)
#define F_GUEST_TSO4 BIT(7)
#define F_HOST_TSO4 BIT(11)
#define F_MRG_RXBUF BIT(15)
#define F_STATUS BIT(16)
#define F_CTRL_VQ BIT(17)
#define F_CTRL_RX BIT(18)
#define F_CTRL_VLAN BIT(19)
#define F_GUEST_ANNOUNCE BIT(21)
#define F_MQ BIT(22)
#define F_CTRL_MAC_ADDR BIT(23)
#define F_CONTROL                                                                                  \
    (F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_MQ | F_CTRL_MAC_ADDR | F_STATUS | F_GUEST_ANNOUNCE)

#define HEADER 12
/* Offsets in the configuration (VIRTIO 1.2, 5.1.4). */
#define CONFIG_STATUS 6
#define CONFIG_PAIRS 8
#define CONFIG_MTU 10

static u64 config(struct net_rig *n, unsigned offset, unsigned size)
{
    return reg_read(&n->d, VIRTIO_BAR_DEVICE + offset, size);
}

/* A packet to a MAC address whose last byte is `to`, of the kind that the card has. */
static void make_packet(u8 *p, size_t len, u8 to)
{
    memset(p, 0xee, len);
    memcpy(p, (u8[]){0x52, 0x54, 0, 1, 2, to}, 6);
    p[12] = 0x88;
    p[13] = 0xb5;
}

static void deliver(struct net_rig *n, const u8 *p, size_t len)
{
    static const struct net_offload plain;

    net_deliver(&n->player->b, 0, &plain, p, len);
}

static void add_receive_buffers(struct net_rig *n, unsigned count, u32 len)
{
    for (unsigned i = 0; i < count; i++) {
        gpa_t at = NET_BUFFERS + 0x800 * (n->rings[0].next_avail % NET_RING_SIZE);

        net_add(n, 0, &(struct buffer){at, len, true}, 1);
    }
}

/* Sends a packet in one buffer behind its header. */
static void send_packet(struct net_rig *n, const struct net_offload *o, u8 mark)
{
    gpa_t at = NET_BUFFERS + 0x100 * (n->rings[1].next_avail % NET_RING_SIZE);
    u8 bytes[HEADER + 60] = {0};

    memcpy(bytes, o, sizeof(*o));
    memset(bytes + HEADER, mark, 60);
    memory_write(&n->d.rig->memory, at, bytes, sizeof(bytes));
    net_add(n, 1, &(struct buffer){at, sizeof(bytes), false}, 1);
}

static void test_what_it_offers(void **state)
{
    struct net_rig *n = net_rig_create();
    u64 all = F_CSUM | F_GUEST_CSUM | F_CTRL_GUEST_OFFLOADS | F_MTU | F_MAC | F_GUEST_TSO4 |
              F_HOST_TSO4 | F_MRG_RXBUF | F_CONTROL;

    assert_int_equal(offered_features(&n->d) & all, all);
    assert_int_equal(config(n, 0, 4), 0x01005452);
    assert_int_equal(config(n, 4, 2), 0x0302);
    assert_int_equal(config(n, CONFIG_STATUS, 2), 1);
    assert_int_equal(config(n, CONFIG_PAIRS, 2), NET_PAIRS);
    assert_int_equal(config(n, CONFIG_MTU, 2), 1500);
    assert_int_equal(reg_read(&n->d, NUM_QUEUES, 2), NET_QUEUES);
    net_rig_destroy(n);
}

static void transmit(u64 features)
{
    struct net_rig *n = net_rig_create();
    struct net_offload o = {.flags = NET_NEEDS_CSUM,
                            .gso_type = NET_GSO_TCPV4,
                            .gso_size = 1000,
                            .csum_start = 34,
                            .csum_offset = 16};

    net_start_driver(n, features | F_CSUM | F_HOST_TSO4);
    send_packet(n, &o, 1);
    net_notify(n, 1);
    assert_int_equal(n->player->sent, 1);
    assert_int_equal(n->player->len, 60);
    assert_int_equal(n->player->packet[59], 1);
    assert_memory_equal(&n->player->offload, &o, sizeof(o));
    assert_int_equal(net_used(n, 1), 0);

    /* What can't be sent now stays in the guest's queue, in order. */
    n->player->busy = true;
    for (unsigned i = 0; i < 20; i++) {
        if (i < NET_RING_SIZE)
            send_packet(n, &o, (u8)(10 + i));
        net_notify(n, 1);
        assert_int_equal(net_used(n, 1), -1);
    }
    assert_int_equal(n->card->in_flight, 0);
    n->player->busy = false;
    net_sendable(&n->player->b, 0);
    run_loop(&n->d);
    assert_int_equal(n->player->sent, 1 + NET_RING_SIZE);
    assert_int_equal(n->player->packet[0], 10 + NET_RING_SIZE - 1);
    for (unsigned i = 0; i < NET_RING_SIZE; i++)
        assert_int_equal(net_used(n, 1), 0);

    /* Without the features the header's wishes don't count. */
    net_start_driver(n, features);
    send_packet(n, &o, 1);
    net_notify(n, 1);
    assert_int_equal(n->player->offload.flags, 0);
    assert_int_equal(n->player->offload.gso_type, 0);
    net_rig_destroy(n);
}

static void test_packets_to_the_network(void **state)
{
    transmit(0);
    transmit(VIRTIO_F_RING_PACKED);
    transmit(VIRTIO_F_RING_PACKED | VIRTIO_F_EVENT_IDX);
}

static void receive(u64 features)
{
    struct net_rig *n = net_rig_create();
    u8 p[4000], got[HEADER + 4000];

    net_start_driver(n, features | F_MRG_RXBUF);
    make_packet(p, sizeof(p), 3);
    add_receive_buffers(n, 2, 0x600);
    deliver(n, p, 100);
    assert_int_equal(net_used(n, 0), HEADER + 100);
    memory_read(&n->d.rig->memory, NET_BUFFERS, got, HEADER + 100);
    assert_memory_equal(got, "\0\0\0\0\0\0\0\0\0\0\1\0", HEADER);
    assert_memory_equal(got + HEADER, p, 100);

    /* Three buffers are needed and one is there: none is taken before the others come. */
    deliver(n, p, sizeof(p));
    assert_int_equal(net_used(n, 0), -1);
    assert_int_equal(n->card->in_flight, 0);
    add_receive_buffers(n, 1, 0x600);
    net_notify(n, 0);
    assert_int_equal(net_used(n, 0), -1);
    add_receive_buffers(n, 1, 0x600);
    net_notify(n, 0);
    assert_int_equal(net_used(n, 0), 0x600);
    assert_int_equal(net_used(n, 0), 0x600);
    assert_int_equal(net_used(n, 0), HEADER + 4000 - 2 * 0x600);
    for (unsigned i = 0; i < 3; i++)
        memory_read(&n->d.rig->memory, NET_BUFFERS + 0x800 * (1 + i), got + 0x600 * i,
                    i < 2 ? 0x600 : HEADER + 4000 - 2 * 0x600);
    assert_int_equal(got[10], 3);
    assert_memory_equal(got + HEADER, p, sizeof(p));

    /* A backend that goes on is told to stop, and then to go on. */
    for (unsigned i = 0; net_may_deliver(&n->player->b, 0); i++) {
        assert_true(i < 2000);
        deliver(n, p, 1000);
    }
    for (unsigned i = 0; i < 400; i++) {
        add_receive_buffers(n, NET_RING_SIZE, 0x600);
        net_notify(n, 0);
        while (net_used(n, 0) >= 0)
            ;
    }
    assert_int_equal(n->player->resumed, 1);
    assert_true(net_may_deliver(&n->player->b, 0));

    /* One buffer for each packet: what is larger is lost, and no harm done. */
    net_start_driver(n, features);
    add_receive_buffers(n, 1, 0x200);
    deliver(n, p, 1000);
    deliver(n, p, 100);
    assert_int_equal(net_used(n, 0), HEADER + 100);
    assert_int_equal(reg_read(&n->d, STATUS, 1), 15);
    net_rig_destroy(n);
}

static void test_packets_to_the_guest(void **state)
{
    receive(0);
    receive(VIRTIO_F_EVENT_IDX);
    receive(VIRTIO_F_RING_PACKED);
    receive(VIRTIO_F_RING_PACKED | VIRTIO_F_EVENT_IDX);
}

static void test_offloads_that_the_guest_takes(void **state)
{
    struct net_rig *n = net_rig_create();
    struct net_offload o = {.flags = NET_NEEDS_CSUM, .gso_type = NET_GSO_TCPV4, .gso_size = 100};
    u8 p[500], got[HEADER];

    make_packet(p, sizeof(p), 3);
    net_start_driver(n, F_GUEST_CSUM | F_GUEST_TSO4);
    assert_int_equal(n->player->takes, NET_TAKES_CSUM | NET_TAKES_TSO4);
    add_receive_buffers(n, 1, 0x600);
    net_deliver(&n->player->b, 0, &o, p, sizeof(p));
    memory_read(&n->d.rig->memory, NET_BUFFERS, got, HEADER);
    assert_memory_equal(got, &o, sizeof(o));

    /* One that it doesn't take is on its way still when the card starts anew. */
    net_start_driver(n, 0);
    assert_int_equal(n->player->takes, 0);
    add_receive_buffers(n, 1, 0x600);
    net_deliver(&n->player->b, 0, &o, p, sizeof(p));
    o = (struct net_offload){.flags = NET_DATA_VALID};
    net_deliver(&n->player->b, 0, &o, p, 77);
    assert_int_equal(net_used(n, 0), HEADER + 77);
    memory_read(&n->d.rig->memory, NET_BUFFERS, got, HEADER);
    assert_int_equal(got[0], 0);
    net_rig_destroy(n);
}

/* A control command; returns its status, or -1 when it didn't come back. */
static int command(struct net_rig *n, u8 class, u8 number, const void *data, u32 len)
{
    struct buffer b[] = {{NET_BUFFERS + 0x7000, 2 + len, false}, {NET_BUFFERS + 0x7f00, 1, true}};
    u8 bytes[1024] = {class, number};
    u8 status = 0xff;

    memcpy(bytes + 2, data, len);
    memory_write(&n->d.rig->memory, b[0].at, bytes, 2 + len);
    memory_write(&n->d.rig->memory, b[1].at, &status, 1);
    /* The rings of this queue are begun anew each time, as chains have two entries. */
    reg_write(&n->d, QUEUE_SELECT, NET_CONTROL, 2);
    reg_write(&n->d, QUEUE_RESET, 1, 2);
    memset(memory_host(&n->d.rig->memory, NET_RING(NET_CONTROL), 0x1000), 0, 0x1000);
    reg_write(&n->d, QUEUE_SIZE, NET_RING_SIZE, 2);
    reg_write(&n->d, QUEUE_DESC, NET_RING(NET_CONTROL), 8);
    reg_write(&n->d, QUEUE_DRIVER, NET_RING(NET_CONTROL) + NET_RING_DRIVER, 8);
    reg_write(&n->d, QUEUE_DEVICE, NET_RING(NET_CONTROL) + NET_RING_DEVICE, 8);
    reg_write(&n->d, QUEUE_ENABLE, 1, 2);
    n->rings[NET_CONTROL] = (struct net_ring){.avail_wrap = true, .used_wrap = true};
    net_add(n, NET_CONTROL, b, 2);
    net_notify(n, NET_CONTROL);
    memory_read(&n->d.rig->memory, b[1].at, &status, 1);
    return status == 0xff ? -1 : status;
}

/* Whether a packet reaches the guest. */
static bool arrives(struct net_rig *n, const u8 *p)
{
    bool any = false;

    add_receive_buffers(n, 1, 0x600);
    net_notify(n, 0);
    deliver(n, p, 60);
    while (net_used(n, 0) >= 0)
        any = true;
    return any;
}

static void test_filters(void **state)
{
    struct net_rig *n = net_rig_create();
    u8 own[60], other[60], group[60], everyone[60], tagged[60];
    u8 table[] = {1, 0, 0, 0, 0x52, 0x54, 0, 1, 2, 4, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1};

    net_start_driver(n, F_CONTROL | VIRTIO_F_RING_RESET);
    make_packet(own, 60, 3);
    make_packet(other, 60, 4);
    make_packet(group, 60, 3);
    memcpy(group, "\x01\x00\x5e\x00\x00\x01", 6);
    memcpy(everyone, group, 60);
    memset(everyone, 0xff, 6);
    memcpy(tagged, own, 60);
    memcpy(tagged + 12, "\x81\x00\x20\x05", 4);

    /* Everything, until the driver chooses. */
    assert_true(arrives(n, other));
    assert_int_equal(command(n, 0, 0, "\0", 1), 0);
    assert_true(arrives(n, own));
    assert_true(arrives(n, everyone));
    assert_false(arrives(n, other));
    assert_false(arrives(n, group));
    assert_int_equal(command(n, 0, 1, "\1", 1), 0); /* all groups */
    assert_true(arrives(n, group));
    assert_int_equal(command(n, 0, 1, "\0", 1), 0);
    assert_int_equal(command(n, 0, 5, "\1", 1), 0); /* no broadcasts */
    assert_false(arrives(n, everyone));

    assert_int_equal(command(n, 1, 0, table, sizeof(table)), 0);
    assert_true(arrives(n, other));
    assert_true(arrives(n, group));
    table[9] = 5;
    assert_int_equal(command(n, 1, 0, table, sizeof(table)), 0);
    assert_false(arrives(n, other));
    /* A table that isn't whole changes nothing. */
    for (u32 len = 0; len < sizeof(table); len++)
        assert_int_equal(command(n, 1, 0, table, len), 1);
    memset(table, 0xff, 4);
    assert_int_equal(command(n, 1, 0, table, sizeof(table)), 1);
    assert_true(arrives(n, group));

    assert_false(arrives(n, tagged));
    assert_int_equal(command(n, 2, 0, "\5\0", 2), 0);
    assert_true(arrives(n, tagged));
    assert_int_equal(command(n, 2, 1, "\5\0", 2), 0);
    assert_false(arrives(n, tagged));
    assert_int_equal(command(n, 2, 0, "\0\x10", 2), 1); /* VLAN 4096 */

    /* Another address of the card's own. */
    assert_int_equal(command(n, 1, 1, "\x52\x54\0\1\2\4", 6), 0);
    assert_true(arrives(n, other));
    assert_false(arrives(n, own));
    assert_int_equal(config(n, 4, 2), 0x0402);
    net_start_driver(n, F_CONTROL);
    assert_int_equal(config(n, 4, 2), 0x0302);
    assert_true(arrives(n, group));
    net_rig_destroy(n);
}

static void test_commands(void **state)
{
    struct net_rig *n = net_rig_create();

    net_start_driver(n, F_CONTROL | F_CTRL_GUEST_OFFLOADS | F_GUEST_CSUM | VIRTIO_F_RING_RESET);
    assert_int_equal(command(n, 4, 0, "\2\0", 2), 0);
    assert_int_equal(n->player->pairs, 2);
    assert_int_equal(command(n, 4, 0, "\0\0", 2), 1);
    assert_int_equal(command(n, 4, 0, "\3\0", 2), 1);
    assert_int_equal(n->player->pairs, 2);
    assert_int_equal(command(n, 5, 0, "\0\0\0\0\0\0\0\0", 8), 0);
    assert_int_equal(n->player->takes, 0);
    assert_int_equal(command(n, 5, 0, "\2\0\0\0\0\0\0\0", 8), 0);
    assert_int_equal(n->player->takes, NET_TAKES_CSUM);
    assert_int_equal(command(n, 5, 0, "\x82\0\0\0\0\0\0\0", 8), 1); /* TSO wasn't agreed on */
    for (unsigned class = 0; class < 256; class ++)
        assert_int_equal(command(n, (u8) class, 200, "", 0), 1);
    assert_int_equal(command(n, 0, 0, "\1\1", 2), 1);
    reg_write(&n->d, STATUS, 0, 1);
    assert_int_equal(n->player->pairs, 1);
    assert_int_equal(n->player->takes, 0);
    net_rig_destroy(n);
}

static void test_the_second_pair(void **state)
{
    struct net_rig *n = net_rig_create();
    static const struct net_offload plain;
    u8 p[60];

    net_start_driver(n, F_CONTROL | VIRTIO_F_RING_RESET);
    make_packet(p, sizeof(p), 3);
    net_add(n, 2, &(struct buffer){NET_BUFFERS, 0x600, true}, 1);
    net_add(n, 0, &(struct buffer){NET_BUFFERS + 0x600, 0x600, true}, 1);
    net_deliver(&n->player->b, 1, &plain, p, sizeof(p));
    assert_int_equal(net_used(n, 0), HEADER + 60); /* the guest uses one pair */
    assert_int_equal(command(n, 4, 0, "\2\0", 2), 0);
    net_deliver(&n->player->b, 1, &plain, p, sizeof(p));
    assert_int_equal(net_used(n, 2), HEADER + 60);
    memory_write(&n->d.rig->memory, NET_BUFFERS, (u8[HEADER + 60]){0}, HEADER + 60);
    net_add(n, 3, &(struct buffer){NET_BUFFERS, HEADER + 60, false}, 1);
    net_notify(n, 3);
    assert_int_equal(n->player->sent, 1);
    assert_int_equal(n->player->queue, 1);
    net_rig_destroy(n);
}

static void test_link(void **state)
{
    struct net_rig *n = net_rig_create();
    u8 p[60];

    net_start_driver(n, F_STATUS);
    assert_int_equal(config(n, CONFIG_STATUS, 2), 1);
    net_link_changed(&n->player->b, false);
    assert_int_equal(config(n, CONFIG_STATUS, 2), 0);
    assert_int_equal(reg_read(&n->d, VIRTIO_BAR_ISR, 1), 2);
    send_packet(n, &(struct net_offload){0}, 1);
    net_notify(n, 1);
    assert_int_equal(net_used(n, 1), 0); /* lost, not kept */
    assert_int_equal(n->player->sent, 0);
    net_link_changed(&n->player->b, true);
    assert_int_equal(config(n, CONFIG_STATUS, 2), 1);
    /* A card without a driver swallows what comes. */
    reg_write(&n->d, STATUS, 0, 1);
    make_packet(p, sizeof(p), 3);
    for (unsigned i = 0; i < 5000; i++)
        deliver(n, p, sizeof(p));
    assert_true(net_may_deliver(&n->player->b, 0));
    net_rig_destroy(n);
}

static void test_malformed_packets(void **state)
{
    struct net_rig *n = net_rig_create();

    net_start_driver(n, 0);
    for (u32 len = 1; len < HEADER + 14; len++) {
        net_add(n, 1, &(struct buffer){NET_BUFFERS, len, false}, 1);
        net_notify(n, 1);
        assert_int_equal(net_used(n, 1), 0);
    }
    assert_int_equal(n->player->sent, 0);
    net_rig_destroy(n);
}

static void test_state(void **state)
{
    struct net_rig *n = net_rig_create(), *m = net_rig_create();
    char buf[128];
    const char *wrong;

    net_start_driver(n, F_CONTROL | F_GUEST_CSUM | VIRTIO_F_RING_RESET);
    assert_int_equal(command(n, 4, 0, "\2\0", 2), 0);
    assert_int_equal(command(n, 0, 0, "\0", 1), 0);
    assert_int_equal(command(n, 2, 0, "\5\0", 2), 0);
    assert_int_equal(command(n, 1, 1, "\x52\x54\0\1\2\7", 6), 0);
    memcpy(memory_host(&m->d.rig->memory, 0, RIG_MEMORY),
           memory_host(&n->d.rig->memory, 0, RIG_MEMORY), RIG_MEMORY);
    virtio_device(m->card)->ops->stop(virtio_device(m->card));
    wrong =
        rig_round_trip(n->d.rig, virtio_device(n->card), virtio_device(m->card), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    assert_int_equal(m->player->pairs, 1);
    /* When it goes on, the backend is as the guest left it, and the guest tells where it is now. */
    virtio_device(m->card)->ops->start(virtio_device(m->card));
    pci_host_loaded(m->d.host);
    run_loop(&m->d);
    assert_int_equal(m->player->pairs, 2);
    assert_int_equal(m->player->takes, NET_TAKES_CSUM);
    assert_int_equal(config(m, CONFIG_STATUS, 2), 3);
    assert_int_equal(config(m, 4, 2), 0x0702);
    m->d.packed = n->d.packed;
    assert_int_equal(command(m, 3, 0, "", 0), 0);
    assert_int_equal(config(m, CONFIG_STATUS, 2), 1);
    net_rig_destroy(n);
    net_rig_destroy(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_what_it_offers),
        cmocka_unit_test(test_packets_to_the_network),
        cmocka_unit_test(test_packets_to_the_guest),
        cmocka_unit_test(test_offloads_that_the_guest_takes),
        cmocka_unit_test(test_filters),
        cmocka_unit_test(test_commands),
        cmocka_unit_test(test_the_second_pair),
        cmocka_unit_test(test_link),
        cmocka_unit_test(test_malformed_packets),
        cmocka_unit_test(test_state),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
