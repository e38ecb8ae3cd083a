/*
 * virtio over PCI: negotiation, both kinds of rings, direct and indirect, interrupts and their suppression,
 * resets with requests under way, state, and drivers that break the rules.
 */
#include "virtio_rig.h"

#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

static int setup(void **state)
{
    *state = driver_create();
    return 0;
}
static int teardown(void **state)
{
    driver_destroy(*state);
    return 0;
}

static void offers_what_the_standard_wants(void **state)
{
    struct driver *d = *state;
    u64 wanted = VIRTIO_F_VERSION_1 | VIRTIO_F_RING_PACKED | VIRTIO_F_INDIRECT_DESC |
                 VIRTIO_F_EVENT_IDX | VIRTIO_F_ACCESS_PLATFORM | VIRTIO_F_RING_RESET | TOY_FEATURE;

    assert_int_equal(config_read(d->rig, TOY_DEVFN, 0, 4),
                     (0x1040 + VIRTIO_TYPE_ENTROPY) << 16 | 0x1af4);
    assert_true(config_read(d->rig, TOY_DEVFN, PCI_REVISION_ID, 1) >= 1);
    assert_int_equal(offered_features(d), wanted);
    assert_int_equal(reg_read(d, NUM_QUEUES, 2), TOY_QUEUES);
    assert_int_equal(negotiate(d, VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM), 11);
    assert_int_equal(negotiate(d, TOY_FEATURE), 3);                  /* a legacy driver */
    assert_int_equal(negotiate(d, VIRTIO_F_VERSION_1 | BIT(50)), 3); /* not offered */
    assert_int_equal(negotiate(d, VIRTIO_F_VERSION_1 | TOY_FEATURE), 11);
    reg_write(d, DRIVER_FEATURE, 0, 4); /* too late */
    assert_int_equal(reg_read(d, DRIVER_FEATURE, 4), VIRTIO_F_VERSION_1 >> 32);
    reg_write(d, QUEUE_SELECT, TOY_QUEUES, 2); /* no such queue */
    assert_int_equal(reg_read(d, QUEUE_SIZE, 2), 0);
    reg_write(d, CONFIG_VECTOR, 77, 2); /* no such vector */
    assert_int_equal(reg_read(d, CONFIG_VECTOR, 2), 0xffff);
}

static void configuration_is_read_and_written_by_mask(void **state)
{
    struct driver *d = *state;
    u8 generation = (u8)reg_read(d, GENERATION, 1);

    d->toy->config[4] = 0x5a;
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE + 4, 1), 0x5a);
    reg_write(d, VIRTIO_BAR_DEVICE, 0xffffffff, 4);
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE, 4), 0x00000fff);
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE + 14, 4), 0);
    device_lock(&d->toy->v.pci.dev);
    virtio_config_changed(&d->toy->v);
    device_unlock(&d->toy->v.pci.dev);
    assert_int_not_equal(reg_read(d, GENERATION, 1), generation);
}

/* The fifth capability reaches the same registers through configuration space. */
static void registers_are_reached_by_configuration_space(void **state)
{
    struct driver *d = *state;
    unsigned cap = find_capability(d->rig, TOY_DEVFN, PCI_CAP_ID_VNDR, 4);

    assert_int_equal(config_read(d->rig, TOY_DEVFN, cap + 3, 1), 5);
    config_write(d->rig, TOY_DEVFN, cap + 4, VIRTIO_BAR, 1);
    config_write(d->rig, TOY_DEVFN, cap + 8, NUM_QUEUES, 4);
    config_write(d->rig, TOY_DEVFN, cap + 12, 2, 4);
    assert_int_equal(config_read(d->rig, TOY_DEVFN, cap + 16, 4), TOY_QUEUES);
    config_write(d->rig, TOY_DEVFN, cap + 8, STATUS, 4);
    config_write(d->rig, TOY_DEVFN, cap + 12, 1, 4);
    config_write(d->rig, TOY_DEVFN, cap + 16, 1, 4);
    assert_int_equal(reg_read(d, STATUS, 1), 1);
    config_write(d->rig, TOY_DEVFN, cap + 8, 0xfffffff0, 4);
    config_read(d->rig, TOY_DEVFN, cap + 16, 4);
}

/* ---- the data's way ---- */

static void echo_once(struct driver *d, u64 *seed, bool indirect)
{
    struct buffer b[5];
    u64 r = rig_random(seed);
    unsigned n = 2 + r % 3, split = 1 + (r >> 8) % (n - 1);
    u16 id = indirect || d->packed ? (u16)(r >> 16) % d->size : (u16)((r >> 16) % d->size);
    u32 want = 0, room = 0, got_id, got_len;
    gpa_t at = BUFFERS;
    u8 sent[2048], got[2048];

    for (unsigned i = 0; i < n; i++) {
        b[i] = (struct buffer){at, 1 + (u32)(rig_random(seed) % 300), i >= split};
        at += 512;
        *(b[i].write ? &room : &want) += b[i].len;
    }
    for (unsigned i = 0, done = 0; i < split; done += b[i++].len) {
        for (u32 k = 0; k < b[i].len; k++)
            sent[done + k] = (u8)rig_random(seed);
        memory_write(&d->rig->memory, b[i].at, sent + done, b[i].len);
    }
    indirect ? add_indirect(d, b, n, id) : add(d, b, n, id);
    notify(d);
    assert_true(take_used(d, indirect ? 1 : n, &got_id, &got_len));
    assert_int_equal(got_id, id);
    assert_int_equal(got_len, MIN(want, room));
    for (unsigned i = split, done = 0; i < n; done += b[i++].len)
        memory_read(&d->rig->memory, b[i].at, got + done, b[i].len);
    assert_memory_equal(got, sent, got_len);
    assert_false(take_used(d, 1, &got_id, &got_len));
}

static void echo_many(struct driver *d, u64 features, u16 size)
{
    u64 seed = 11;

    start_driver(d, features, size);
    for (unsigned i = 0; i < 300; i++)
        echo_once(d, &seed, (features & VIRTIO_F_INDIRECT_DESC) && i % 2);
    assert_int_equal(reg_read(d, STATUS, 1), 15);
}

static void buffers_come_back_by_split_rings(void **state)
{
    echo_many(*state, 0, 8);
    echo_many(*state, VIRTIO_F_INDIRECT_DESC, 4);
    echo_many(*state, VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX, 256);
}

static void buffers_come_back_by_packed_rings(void **state)
{
    echo_many(*state, VIRTIO_F_RING_PACKED, 7);
    echo_many(*state, VIRTIO_F_RING_PACKED | VIRTIO_F_INDIRECT_DESC, 5);
    echo_many(*state, VIRTIO_F_RING_PACKED | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX, 256);
}

static const struct buffer one[] = {{BUFFERS, 16, false}, {BUFFERS + 512, 16, true}};

static u64 told_gpa[16], told;
static void written(void *opaque, gpa_t gpa, u64 len)
{
    told_gpa[told++ % 16] = gpa;
}

static void writes_to_memory_are_told(void **state)
{
    struct driver *d = *state;
    bool data = false, used = false;

    start_driver(d, 0, 8);
    d->rig->memory.listener = (struct memory_listener){written, NULL};
    told = 0;
    add(d, one, 2, 0);
    notify(d);
    for (unsigned i = 0; i < MIN(told, 16); i++) {
        data |= told_gpa[i] == BUFFERS + 512;
        used |= told_gpa[i] >= RING_DEVICE && told_gpa[i] < RING_DEVICE + 0x1000;
    }
    assert_true(data && used);
    d->rig->memory.listener = (struct memory_listener){0};
}

static void nothing_is_read_without_bus_mastering(void **state)
{
    struct driver *d = *state;
    u32 id, len;

    start_driver(d, 0, 8);
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    add(d, one, 2, 0);
    notify(d);
    assert_false(take_used(d, 2, &id, &len));
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    notify(d);
    assert_true(take_used(d, 2, &id, &len));
}

/* ---- interrupts ---- */

static void msix_tells_about_used_buffers(void **state)
{
    struct driver *d = *state;

    enable_msix(d);
    start_driver(d, 0, 8);
    add(d, one, 2, 0);
    notify(d);
    assert_int_equal(d->rig->messages, 1);
    assert_int_equal(d->rig->msi_data, 0x41);
    put16(d, RING_DRIVER, 1); /* NO_INTERRUPT */
    add(d, one, 2, 2);
    notify(d);
    assert_int_equal(d->rig->messages, 1);
}

/* A device that has `n` chains more, and answers them when asked to. */
static void give_kept(struct driver *d, unsigned n)
{
    d->toy->keep = d->toy->soon = true;
    for (unsigned i = 0; i < n; i++) {
        add(d, one, 2, (u16)(2 * i));
        notify(d);
    }
}

static void wait_for_messages(struct driver *d, unsigned n)
{
    for (unsigned i = 0; d->rig->messages < n; i++) {
        if (i > 5000)
            fail_msg("no interrupt");
        run_loop(d);
        poll(NULL, 0, 1);
    }
    assert_int_equal(d->rig->messages, n);
}

/* With interrupts that may wait, n of them asked for. */
static void start_with_kept(struct driver *d, unsigned n)
{
    enable_msix(d);
    start_driver(d, 0, 8);
    give_kept(d, n);
}

static void interrupts_that_may_wait_are_one(void **state)
{
    struct driver *d = *state;

    start_with_kept(d, 2);
    toy_answer_kept(d->toy);
    assert_int_equal(d->rig->messages, 0);
    give_kept(d, 1); /* waiting is of use: the next waits, too */
    wait_for_messages(d, 1);
    toy_answer_kept(d->toy);
    assert_int_equal(d->rig->messages, 1);
    wait_for_messages(d, 2);
}

static void interrupts_wait_in_vain_once(void **state)
{
    struct driver *d = *state;

    start_with_kept(d, 1);
    toy_answer_kept(d->toy);
    wait_for_messages(d, 1);
    give_kept(d, 1);
    toy_answer_kept(d->toy);
    assert_int_equal(d->rig->messages, 2);
}

static void a_stopped_machine_has_no_interrupt_waiting(void **state)
{
    struct driver *d = *state;
    struct device *dev = &d->toy->v.pci.dev;

    start_with_kept(d, 2);
    toy_answer(&d->toy->v, 0, d->toy->kept[--d->toy->nkept]);
    assert_int_equal(d->rig->messages, 0);
    dev->ops->stop(dev); /* which brings in the other */
    assert_int_equal(d->rig->messages, 2);
    dev->ops->start(dev);
    run_loop(d);
    assert_int_equal(d->rig->messages, 2);
}

static void the_event_index_suppresses_interrupts(void **state)
{
    struct driver *d = *state;

    enable_msix(d);
    start_driver(d, VIRTIO_F_EVENT_IDX, 8);
    put16(d, RING_DRIVER + 4 + 2 * 8, 2); /* after the third */
    for (unsigned i = 0; i < 4; i++) {
        add(d, one, 2, 0);
        notify(d);
        assert_int_equal(d->rig->messages, i >= 2);
    }
    assert_int_equal(get16(d, RING_DEVICE + 4 + 8 * 8), 4); /* ours: tell about the next */
}

static void packed_events_suppress_interrupts(void **state)
{
    struct driver *d = *state;

    enable_msix(d);
    start_driver(d, VIRTIO_F_RING_PACKED | VIRTIO_F_EVENT_IDX, 8);
    put16(d, RING_DRIVER + 2, 1); /* disabled */
    add(d, one, 2, 0);
    notify(d);
    assert_int_equal(d->rig->messages, 0);
    put16(d, RING_DRIVER, 4 | 1 << 15); /* when entry 4 of this lap is used */
    put16(d, RING_DRIVER + 2, 2);
    add(d, one, 2, 0); /* entries 2 and 3 */
    notify(d);
    assert_int_equal(d->rig->messages, 0);
    add(d, one, 2, 0);
    notify(d);
    assert_int_equal(d->rig->messages, 1);
    put16(d, RING_DRIVER, 1); /* entry 1 of the next lap, whose wrap counter is 0 */
    add(d, one, 2, 0);
    notify(d);
    assert_int_equal(d->rig->messages, 1);
    add(d, one, 2, 0);
    notify(d);
    assert_int_equal(d->rig->messages, 2);
}

static void intx_is_for_drivers_without_msix(void **state)
{
    struct driver *d = *state;
    unsigned line = pci_host_pirq(2, 0);

    start_driver(d, 0, 8);
    add(d, one, 2, 0);
    notify(d);
    assert_true(d->rig->levels[line]);
    assert_int_equal(reg_read(d, VIRTIO_BAR_ISR, 1), 1);
    assert_false(d->rig->levels[line]);
    device_lock(&d->toy->v.pci.dev);
    virtio_config_changed(&d->toy->v);
    device_unlock(&d->toy->v.pci.dev);
    assert_int_equal(reg_read(d, VIRTIO_BAR_ISR, 1), 2);
    assert_int_equal(reg_read(d, VIRTIO_BAR_ISR, 1), 0);
}

/* ---- several at once ---- */

/* The driver sees none of the chains before the last of them. */
static void seen_together(struct driver *d, u64 features)
{
    struct toy *t = d->toy;
    u32 id, len;

    start_driver(d, features, 8);
    t->keep = true;
    for (u16 n = 0; n < 3; n++)
        add(d, one, 2, (u16)(2 * n));
    notify(d);
    assert_int_equal(t->nkept, 3);
    device_lock(&t->v.pci.dev);
    for (u32 n = 0; n < 2; n++) {
        virtio_complete_held(&t->v, 0, t->kept[n], n);
        assert_false(take_used(d, 2, &id, &len));
    }
    virtio_complete(&t->v, 0, t->kept[2], 2);
    device_unlock(&t->v.pci.dev);
    t->nkept = 0;
    for (u32 n = 0; n < 3; n++) {
        assert_true(take_used(d, 2, &id, &len));
        assert_int_equal(id, 2 * n);
        assert_int_equal(len, n);
    }
    assert_false(take_used(d, 2, &id, &len));
}

static void several_are_seen_at_once_split(void **state)
{
    seen_together(*state, 0);
}

static void several_are_seen_at_once_packed(void **state)
{
    seen_together(*state, VIRTIO_F_RING_PACKED);
}

/* ---- resets ---- */

static void a_reset_waits_for_what_is_under_way(void **state)
{
    struct driver *d = *state;

    start_driver(d, 0, 8);
    d->toy->keep = true;
    add(d, one, 2, 0);
    notify(d);
    assert_int_equal(d->toy->nkept, 1);
    d->toy->resets = 0;
    reg_write(d, STATUS, 0, 1);
    assert_int_not_equal(reg_read(d, STATUS, 1), 0);
    assert_int_equal(d->toy->resets, 0);
    toy_answer_kept(d->toy);
    assert_int_equal(reg_read(d, STATUS, 1), 0);
    assert_int_equal(d->toy->resets, 1);
    assert_int_equal(get16(d, RING_DEVICE + 2), 0); /* the ring was the driver's again */
    reg_write(d, QUEUE_SELECT, 0, 2);
    assert_int_equal(reg_read(d, QUEUE_ENABLE, 2), 0);
}

static void a_queue_can_be_reset_alone(void **state)
{
    struct driver *d = *state;
    u64 seed = 3;

    start_driver(d, VIRTIO_F_RING_RESET, 8);
    d->toy->keep = true;
    add(d, one, 2, 0);
    notify(d);
    reg_write(d, QUEUE_RESET, 1, 2);
    assert_int_equal(reg_read(d, QUEUE_RESET, 2), 1);
    reg_write(d, QUEUE_ENABLE, 1, 2); /* not now */
    toy_answer_kept(d->toy);
    assert_int_equal(reg_read(d, QUEUE_RESET, 2), 0);
    assert_int_equal(reg_read(d, QUEUE_ENABLE, 2), 0);
    assert_int_equal(reg_read(d, STATUS, 1), 15);
    d->toy->keep = false;
    set_queue(d, 0, 4);
    run_loop(d);
    echo_once(d, &seed, false);
}

static void a_stopped_machine_has_nothing_under_way(void **state)
{
    struct driver *d = *state;
    struct device *dev = virtio_device(&d->toy->v);
    u32 id, len;

    start_driver(d, 0, 8);
    d->toy->keep = true;
    add(d, one, 2, 0);
    notify(d);
    dev->ops->stop(dev);
    assert_int_equal(d->toy->v.in_flight, 0);
    assert_true(take_used(d, 2, &id, &len));
    d->toy->keep = false;
    add(d, one, 2, 2);
    notify(d);
    assert_false(take_used(d, 2, &id, &len));
    dev->ops->start(dev);
    run_loop(d);
    assert_true(take_used(d, 2, &id, &len));
}

static void state_survives_the_round_trip(void **state)
{
    struct driver *d = *state;
    struct toy *fresh = toy_create(d->rig, d->host, PCI_DEVFN(5, 0));
    u64 seed = 8;
    char buf[128];
    const char *wrong;

    enable_msix(d);
    start_driver(d, VIRTIO_F_RING_PACKED, 7);
    for (unsigned i = 0; i < 10; i++)
        echo_once(d, &seed, false);
    wrong = rig_round_trip(d->rig, virtio_device(&d->toy->v), virtio_device(&fresh->v), buf,
                           sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    virtio_device(&fresh->v)->ops->destroy(virtio_device(&fresh->v));
}

/* ---- drivers that break the rules ---- */

static void expect_needs_reset(struct driver *d, const char *what)
{
    unsigned messages = d->rig->messages;
    u32 id, len;
    u64 seed = 1;

    notify(d);
    if (!(reg_read(d, STATUS, 1) & VIRTIO_STATUS_NEEDS_RESET))
        fail_msg("%s: no DEVICE_NEEDS_RESET", what);
    assert_int_equal(d->rig->messages, messages + 1);
    assert_int_equal(d->rig->msi_data, 0x40); /* the configuration's vector */
    assert_false(take_used(d, 1, &id, &len));
    /* After a reset all is well. */
    reg_write(d, STATUS, 0, 1);
    enable_msix(d);
    start_driver(d, d->packed ? VIRTIO_F_RING_PACKED : 0, 8);
    echo_once(d, &seed, false);
}

static void malformed_split_rings_need_a_reset(void **state)
{
    struct driver *d = *state;
    struct buffer table = {RING_INDIRECT, 32, false}, far = {0xfffffffffffff000, 16, false};
    struct buffer across = {RIG_MEMORY - 8, 16, true}, none = {0x10000000, 1, false};
    struct buffer wrong_order[] = {{BUFFERS, 8, true}, {BUFFERS, 8, false}};

    enable_msix(d);
    start_driver(d, 0, 8);
    make_available(d, 8);
    expect_needs_reset(d, "a head beyond the ring");
    put16(d, RING_DRIVER + 2, 9 + d->next_avail);
    expect_needs_reset(d, "more heads than entries");
    put_desc(d, RING_DESC + 16 * 3, one, 1, 3);
    make_available(d, 3);
    expect_needs_reset(d, "a loop");
    put_desc(d, RING_DESC + 16 * 3, one, 1, 9);
    make_available(d, 3);
    expect_needs_reset(d, "a next beyond the ring");
    add(d, &far, 1, 3);
    expect_needs_reset(d, "a buffer at the end of the address space");
    add(d, &across, 1, 3);
    expect_needs_reset(d, "a buffer that leaves memory");
    add(d, &none, 1, 3);
    expect_needs_reset(d, "a buffer that is no memory");
    add(d, wrong_order, 2, 3);
    expect_needs_reset(d, "readable after writable");
    put_desc(d, RING_DESC, &table, 4 | 1, 1);
    make_available(d, 0);
    expect_needs_reset(d, "an indirect descriptor with more to follow");
    table.len = 33;
    put_desc(d, RING_DESC, &table, 4, 0);
    make_available(d, 0);
    expect_needs_reset(d, "a table of odd length");
    table.len = 0;
    put_desc(d, RING_DESC, &table, 4, 0);
    make_available(d, 0);
    expect_needs_reset(d, "an empty table");
    table.len = 32;
    put_desc(d, RING_INDIRECT, &table, 4, 0);
    put_desc(d, RING_DESC, &table, 4, 0);
    make_available(d, 0);
    expect_needs_reset(d, "a table in a table");
    table.at = 0x7fffffff0000;
    put_desc(d, RING_DESC, &table, 4, 0);
    make_available(d, 0);
    expect_needs_reset(d, "a table that is no memory");
}

static void malformed_packed_rings_need_a_reset(void **state)
{
    struct driver *d = *state;
    struct buffer table = {RING_INDIRECT, 24, false}, none = {0x10000000, 1, false};

    enable_msix(d);
    start_driver(d, VIRTIO_F_RING_PACKED, 8);
    for (unsigned i = 0; i < 8; i++)
        put_desc(d, RING_DESC + 16 * i, one, packed_flags(true) | 1, 0);
    expect_needs_reset(d, "a chain without an end");
    add(d, &none, 1, 3);
    expect_needs_reset(d, "a buffer that is no memory");
    put_desc(d, RING_DESC, &table, packed_flags(true) | 4, 0);
    /* expect_needs_reset used some entries of the ring: begin anew. */
    start_driver(d, VIRTIO_F_RING_PACKED, 8);
    put_desc(d, RING_DESC, &table, packed_flags(true) | 4, 0);
    expect_needs_reset(d, "a table of odd length");
}

static void impossible_queues_need_a_reset(void **state)
{
    static const struct {
        u64 desc, driver, device;
        u16 size;
    } cases[] = {
        {RING_DESC + 8, RING_DRIVER, RING_DEVICE, 8},
        {RING_DESC, RING_DRIVER + 1, RING_DEVICE, 8},
        {RING_DESC, RING_DRIVER, RING_DEVICE + 2, 8},
        {RING_DESC, RING_DRIVER, RING_DEVICE, 7},
        {RIG_MEMORY - 64, RING_DRIVER, RING_DEVICE, 8},
        {RING_DESC, ~15ULL, RING_DEVICE, 8},
        {RING_DESC, RING_DRIVER, 1ULL << 50, 8},
    };
    struct driver *d = *state;

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        negotiate(d, VIRTIO_F_VERSION_1);
        reg_write(d, QUEUE_SELECT, 0, 2);
        reg_write(d, QUEUE_SIZE, cases[i].size, 2);
        reg_write(d, QUEUE_DESC, cases[i].desc, 8);
        reg_write(d, QUEUE_DRIVER, cases[i].driver, 8);
        reg_write(d, QUEUE_DEVICE, cases[i].device, 8);
        reg_write(d, QUEUE_ENABLE, 1, 2);
        if (!(reg_read(d, STATUS, 1) & VIRTIO_STATUS_NEEDS_RESET))
            fail_msg("case %u was taken", i);
    }
}

/* Rings of random bytes, in both kinds, with the device reading and writing as it finds. */
static void any_ring_is_survived(void **state)
{
    struct driver *d = *state;
    u64 seed = 99;

    for (unsigned round = 0; round < 400; round++) {
        u64 features = round % 2 ? VIRTIO_F_RING_PACKED : 0;

        start_driver(d, features | (round % 4 < 2 ? VIRTIO_F_EVENT_IDX : 0), 16);
        for (unsigned i = 0; i < 0x4000; i += 8) {
            u64 r = rig_random(&seed);
            /* Half of the words look like addresses or lengths in memory. */
            u64 word = r & 1 ? r : (r & 0xfff8) | (r >> 32 & 7) << 48;

            memory_write(&d->rig->memory, RING_DESC + i, &word, 8);
        }
        put16(d, RING_DRIVER + 2, (u16)(rig_random(&seed) % 17));
        for (unsigned i = 0; i < 16; i++)
            put16(d, RING_DRIVER + 4 + 2 * i, (u16)(rig_random(&seed) % 17));
        notify(d);
        notify(d);
    }
}

/* ---- doorbells ---- */

/* What an engine would ring: the eventfd of each queue, by address. */
struct doorbells {
    u64 base;
    int fds[TOY_QUEUES];
    unsigned n;
};

static void doorbell_changed(void *opaque, u64 addr, int fd, bool there)
{
    struct doorbells *d = opaque;
    unsigned q = (unsigned)(addr - d->base - VIRTIO_BAR_NOTIFY) / VIRTIO_NOTIFY_MULTIPLIER;

    assert_true(q < TOY_QUEUES);
    if (there) {
        d->fds[q] = fd;
        d->n++;
    } else {
        assert_int_equal(d->fds[q], fd);
        d->n--;
    }
}

static void move_bar(struct driver *d, u64 to)
{
    config_write(d->rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, to, 4);
}

static void a_rung_doorbell_notifies(void **state)
{
    const struct buffer b[2] = {{BUFFERS, 8, false}, {BUFFERS + 512, 8, true}};
    struct driver *d = *state;
    struct doorbells bells = {.base = TOY_BAR};
    const u64 ring = 1;
    u32 id, len;

    start_driver(d, 0, 16);
    move_bar(d, 0);
    io_bus_listen(d->rig->env.mmio, (struct io_listener){doorbell_changed, &bells});
    move_bar(d, TOY_BAR);
    assert_int_equal(bells.n, TOY_QUEUES);
    assert_int_not_equal(bells.fds[0], bells.fds[1]);
    add(d, b, 2, 3);
    assert_int_equal(write(bells.fds[0], &ring, sizeof(ring)), sizeof(ring));
    run_loop(d);
    assert_true(take_used(d, 2, &id, &len));
    assert_int_equal(id, 3);
    assert_int_equal(len, 8);
    io_bus_listen(d->rig->env.mmio, (struct io_listener){0});
}

static void doorbells_move_with_their_bar(void **state)
{
    struct driver *d = *state;
    struct doorbells bells = {.base = TOY_BAR};

    move_bar(d, 0);
    io_bus_listen(d->rig->env.mmio, (struct io_listener){doorbell_changed, &bells});
    move_bar(d, TOY_BAR);
    assert_int_equal(bells.n, TOY_QUEUES);
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, 0, 2);
    assert_int_equal(bells.n, 0);
    bells.base = TOY_BAR + MIB(2);
    move_bar(d, bells.base);
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY, 2);
    assert_int_equal(bells.n, TOY_QUEUES);
    io_bus_listen(d->rig->env.mmio, (struct io_listener){0});
    move_bar(d, TOY_BAR);
    assert_int_equal(bells.n, TOY_QUEUES);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(offers_what_the_standard_wants),
        TEST(configuration_is_read_and_written_by_mask),
        TEST(registers_are_reached_by_configuration_space),
        TEST(buffers_come_back_by_split_rings),
        TEST(buffers_come_back_by_packed_rings),
        TEST(writes_to_memory_are_told),
        TEST(nothing_is_read_without_bus_mastering),
        TEST(msix_tells_about_used_buffers),
        TEST(interrupts_that_may_wait_are_one),
        TEST(interrupts_wait_in_vain_once),
        TEST(a_stopped_machine_has_no_interrupt_waiting),
        TEST(the_event_index_suppresses_interrupts),
        TEST(packed_events_suppress_interrupts),
        TEST(intx_is_for_drivers_without_msix),
        TEST(several_are_seen_at_once_split),
        TEST(several_are_seen_at_once_packed),
        TEST(a_reset_waits_for_what_is_under_way),
        TEST(a_queue_can_be_reset_alone),
        TEST(a_stopped_machine_has_nothing_under_way),
        TEST(state_survives_the_round_trip),
        TEST(a_rung_doorbell_notifies),
        TEST(doorbells_move_with_their_bar),
        TEST(malformed_split_rings_need_a_reset),
        TEST(malformed_packed_rings_need_a_reset),
        TEST(impossible_queues_need_a_reset),
        TEST(any_ring_is_survived),
    };
    return cmocka_run_group_tests_name("virtio", tests, NULL, NULL);
}
