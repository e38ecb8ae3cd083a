/*
 * virtio-rng, virtio-balloon, virtio-console and virtio-fs: what each does with what its driver sends, also when
 * that is nonsense, and that a pause loses nothing.
 */
#include "device/virtio/balloon.h"
#include "device/virtio/console.h"
#include "device/virtio/fs.h"
#include "device/virtio/rng.h"
#include "virtio_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <linux/fuse.h>

#include <cmocka.h>

static void rng_fills_buffers(void **state)
{
    struct driver *d = bare_driver();
    struct virtio *v = virtio_rng_create(&d->rig->env, d->host, TOY_DEVFN, &d->rig->err);
    struct buffer b[] = {{BUFFERS, 100, true}, {BUFFERS + 200, 0x5000, true}};
    u8 zero[100] = {0};
    u32 id, len;

    place(d);
    start_queue(d, 0, 0);
    add(d, b, 2, 0);
    notify_queue(d, 0);
    assert_true(take_used(d, 2, &id, &len));
    assert_int_equal(len, 4096);
    assert_memory_not_equal(memory_host(&d->rig->memory, BUFFERS, 100), zero, 100);
    b[0].write = false;
    add(d, b, 1, 0); /* nothing to write to */
    notify_queue(d, 0);
    assert_true(take_used(d, 1, &id, &len));
    assert_int_equal(len, 0);
    finish(d, v);
}

static void balloon_gives_pages_back(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_balloon *b =
        virtio_balloon_create(&d->rig->env, d->host, TOY_DEVFN, &d->rig->err);
    u32 pfns[] = {9, 10, 11, 0xffffffff, 0x10, 13}; /* some of them no memory */
    struct buffer list = {RING_INDIRECT, sizeof(pfns), false};
    u8 *page = memory_host(&d->rig->memory, 0x9000, 0x5000);
    u32 id, len;

    place(d);
    start_queue(d, 0, 0);
    memset(page, 0x55, 0x5000);
    memory_write(&d->rig->memory, RING_INDIRECT, pfns, sizeof(pfns));
    add(d, &list, 1, 0);
    notify_queue(d, 0);
    assert_true(take_used(d, 1, &id, &len));
    assert_int_equal(page[0], 0);      /* 9 */
    assert_int_equal(page[0x2fff], 0); /* 11 */
    assert_int_equal(page[0x3000], 0x55);
    assert_int_equal(page[0x4000], 0); /* 13 */
    virtio_balloon_set_target(b, 0x3000);
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE, 4), 3);
    reg_write(d, VIRTIO_BAR_DEVICE + 4, 3, 4);
    assert_int_equal(virtio_balloon_actual(b), 0x3000);
    finish(d, virtio_balloon_virtio(b));
}

static void balloon_takes_reported_pages(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_balloon *b =
        virtio_balloon_create(&d->rig->env, d->host, TOY_DEVFN, &d->rig->err);
    struct buffer free_pages[] = {{0x9000, 0x1000, true}, {0xa800, 0x1900, true}};
    u8 *page = memory_host(&d->rig->memory, 0x9000, 0x4000);
    u32 id, len;

    place(d);
    start_queue(d, BIT(5), 2); /* the third of those that it agreed on */
    memset(page, 0x55, 0x4000);
    add(d, free_pages, 2, 0);
    notify_queue(d, 2);
    assert_true(take_used(d, 2, &id, &len));
    assert_int_equal(page[0], 0);
    assert_int_equal(page[0x1800], 0x55); /* parts of pages stay */
    assert_int_equal(page[0x2000], 0);
    assert_int_equal(page[0x3000], 0x55);

    /* A guest that wants to find a pattern in free pages finds it; one that wants zeroes does so anyway. */
    for (u32 poison = 0; poison < 2; poison++) {
        start_queue(d, BIT(5) | BIT(4), 2);
        reg_write(d, VIRTIO_BAR_DEVICE + 12, poison ? 0xaaaaaaaa : 0, 4);
        memset(page, 0xaa, 0x4000);
        add(d, free_pages, 2, 0);
        notify_queue(d, 2);
        assert_true(take_used(d, 2, &id, &len));
        assert_int_equal(page[0], poison ? 0xaa : 0);
    }
    finish(d, virtio_balloon_virtio(b));
}

struct hinted {
    u64 bytes;
    gpa_t last;
    unsigned done;
};

static void hinted_free(void *opaque, gpa_t gpa, u64 len)
{
    struct hinted *h = opaque;

    h->bytes += len;
    h->last = gpa;
}
static void hinted_done(void *opaque)
{
    ((struct hinted *)opaque)->done++;
}

static void send_command(struct driver *d, u32 id)
{
    struct buffer command = {BUFFERS, sizeof(id), false};
    u32 used, len;

    memory_write(&d->rig->memory, BUFFERS, &id, sizeof(id));
    add(d, &command, 1, 0);
    notify_queue(d, 3);
    assert_true(take_used(d, 1, &used, &len));
}

static void send_hint(struct driver *d, gpa_t gpa, u32 size)
{
    struct buffer page = {gpa, size, true};
    u32 used, len;

    add(d, &page, 1, 0);
    notify_queue(d, 3);
    assert_true(take_used(d, 1, &used, &len));
}

static void balloon_is_told_hints(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_balloon *b =
        virtio_balloon_create(&d->rig->env, d->host, TOY_DEVFN, &d->rig->err);
    struct hinted h = {0};
    struct balloon_hints hints = {hinted_free, hinted_done, &h};
    u8 *page = memory_host(&d->rig->memory, 0x9000, 0x1000), generation;
    u32 id;

    place(d);
    assert_false(virtio_balloon_hint(b, &hints)); /* no driver */
    start_queue(d, BIT(1) | BIT(3), 3);
    generation = (u8)reg_read(d, GENERATION, 1);
    assert_true(virtio_balloon_hint(b, &hints));
    assert_false(virtio_balloon_hint(b, &hints)); /* one at a time */
    assert_int_not_equal(reg_read(d, GENERATION, 1), generation);
    id = (u32)reg_read(d, VIRTIO_BAR_DEVICE + 8, 4);
    assert_true(id > 1);
    page[0] = 0x55;
    send_hint(d, 0x9000, 0x1000); /* before it begins */
    send_command(d, id + 1);      /* another round */
    send_hint(d, 0x9000, 0x1000);
    assert_int_equal(h.bytes, 0);
    send_command(d, id);
    send_hint(d, 0x9000, 0x1000);
    send_hint(d, 0xb000, 0x2000);
    assert_int_equal(h.bytes, 0x3000);
    assert_int_equal(h.last, 0xb000);
    assert_int_equal(page[0], 0x55); /* it stays: the guest may have it in use again */
    send_command(d, 0);
    assert_int_equal(h.done, 1);
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE + 8, 4),
                     1); /* done: the pages are the guest's */
    send_hint(d, 0x9000, 0x1000);
    assert_int_equal(h.bytes, 0x3000);

    assert_true(virtio_balloon_hint(b, &hints));
    assert_int_not_equal(reg_read(d, VIRTIO_BAR_DEVICE + 8, 4), id);
    reg_write(d, STATUS, 0, 1);
    assert_int_equal(h.done, 2);
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE + 8, 4), 0);
    finish(d, virtio_balloon_virtio(b));
}

static void balloon_keeps_statistics(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_balloon *b =
        virtio_balloon_create(&d->rig->env, d->host, TOY_DEVFN, &d->rig->err);
    struct device *dev = virtio_device(virtio_balloon_virtio(b));
    u8 stats[] = {4,  0, 0, 0, 1, 0, 0, 0, 0, 0, /* free memory: 64 KiB */
                  77, 0, 1, 1, 1, 1, 1, 1, 1, 1, 5, 0};
    struct buffer buffer = {BUFFERS, sizeof(stats), false};
    struct balloon_stats got;
    u32 id, len;

    place(d);
    start_queue(d, BIT(1), 2);
    memory_write(&d->rig->memory, BUFFERS, stats, sizeof(stats));
    add(d, &buffer, 1, 0);
    notify_queue(d, 2);
    assert_false(take_used(d, 1, &id, &len)); /* kept until news are wanted */
    dev->ops->stop(dev);                      /* a pause leaves it the driver's */
    assert_int_equal(virtio_balloon_virtio(b)->in_flight, 0);
    assert_false(take_used(d, 1, &id, &len));
    dev->ops->start(dev);
    run_loop(d);
    virtio_balloon_stats(b, &got);
    assert_int_equal(got.known, 1 << 4);
    assert_int_equal(got.value[4], 0x10000);
    assert_true(take_used(d, 1, &id, &len));
    add(d, &buffer, 1, 0);
    notify_queue(d, 2);
    reg_write(d, STATUS, 0, 1); /* a reset doesn't wait for it */
    assert_int_equal(reg_read(d, STATUS, 1), 0);
    finish(d, virtio_balloon_virtio(b));
}

/* ---- the console ---- */

struct stream {
    u8 got[8192];
    size_t len, room;
    unsigned accepts;
};

static size_t put(void *opaque, const u8 *buf, size_t len)
{
    struct stream *s = opaque;
    size_t n = MIN(len, s->room);

    memcpy(s->got + s->len, buf, n);
    s->len += n;
    s->room -= n;
    return n;
}

static void accept_input(void *opaque)
{
    ((struct stream *)opaque)->accepts++;
}

static struct stream streams[2];

static struct virtio_console *create_console(struct driver *d)
{
    struct console_port ports[] = {{NULL, put, accept_input, &streams[0]},
                                   {"agent", put, accept_input, &streams[1]}};
    struct virtio_console *c;

    memset(streams, 0, sizeof(streams));
    c = virtio_console_create(&d->rig->env, ports, 2, d->host, TOY_DEVFN, &d->rig->err);
    place(d);
    return c;
}

static void console_output_waits_for_its_stream(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_console *c = create_console(d);
    struct device *dev = virtio_device(virtio_console_virtio(c));
    struct buffer b[] = {{BUFFERS, 5, false}, {BUFFERS + 5, 6, false}};
    u32 id, len;

    start_queue(d, 0, 1);
    memory_write(&d->rig->memory, BUFFERS, "hello world", 11);
    streams[0].room = 3;
    add(d, b, 2, 0);
    notify_queue(d, 1);
    assert_int_equal(streams[0].len, 3);
    assert_false(take_used(d, 2, &id, &len));
    dev->ops->stop(dev); /* a pause in the midst of it */
    assert_int_equal(virtio_console_virtio(c)->in_flight, 0);
    streams[0].room = 5;
    dev->ops->start(dev);
    run_loop(d);
    assert_int_equal(streams[0].len, 8);
    streams[0].room = 100;
    virtio_console_writable(c, 0);
    assert_int_equal(streams[0].len, 11);
    assert_memory_equal(streams[0].got, "hello world", 11);
    assert_true(take_used(d, 2, &id, &len));
    reg_write(d, VIRTIO_BAR_DEVICE + 8, '!', 4); /* emergency write */
    assert_int_equal(streams[0].got[11], '!');
    finish(d, virtio_console_virtio(c));
}

static void console_input_waits_for_buffers(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_console *c = create_console(d);
    struct buffer b = {BUFFERS, 4, true};
    u32 id, len;

    start_queue(d, 0, 0);
    assert_int_equal(virtio_console_can_receive(c, 0), 0);
    add(d, &b, 1, 0);
    notify_queue(d, 0);
    assert_true(streams[0].accepts > 0);
    assert_int_equal(virtio_console_can_receive(c, 0), 4);
    assert_int_equal(virtio_console_receive(c, 0, (const u8 *)"input", 4), 4);
    assert_true(take_used(d, 1, &id, &len));
    assert_int_equal(len, 4);
    assert_memory_equal(memory_host(&d->rig->memory, BUFFERS, 4), "inpu", 4);
    assert_int_equal(virtio_console_receive(c, 0, (const u8 *)"t", 1), 0);
    finish(d, virtio_console_virtio(c));
}

/* The control queues share the rings' page by halves: receive at its usual place, transmit above. */
static void console_ports_are_announced(void **state)
{
    struct driver *d = bare_driver();
    struct virtio_console *c = create_console(d);
    struct {
        u32 id;
        u16 event, value;
    } sent[] = {{0, 0, 1}, {1, 3, 1}, {99, 3, 1}, {1, 6, 1}, {0, 0xffff, 1}}, got;
    u32 id, len;
    u16 wants[][2] = {{0, 1}, {1, 1}, {1, 7}, {1, 6}}; /* id, event: two adds, a name, an open */

    start_queue(d, BIT(1), 3);
    memory_write(&d->rig->memory, BUFFERS, sent, sizeof(sent));
    for (unsigned i = 0; i < ARRAY_SIZE(sent); i++) {
        struct buffer b = {BUFFERS + 8 * i, 8, false};

        add(d, &b, 1, (u16)i);
    }
    notify_queue(d, 3);
    for (unsigned i = 0; i < ARRAY_SIZE(sent); i++)
        assert_true(take_used(d, 1, &id, &len));
    set_queue(d, 2, 16);
    for (unsigned i = 0; i < 8; i++) {
        struct buffer b = {BUFFERS + 64 * i, 64, true};

        add(d, &b, 1, (u16)i);
    }
    notify_queue(d, 2);
    for (unsigned i = 0; i < ARRAY_SIZE(wants); i++) {
        assert_true(take_used(d, 1, &id, &len));
        memory_read(&d->rig->memory, BUFFERS + 64 * i, &got, sizeof(got));
        assert_int_equal(got.id, wants[i][0]);
        assert_int_equal(got.event, wants[i][1]);
        if (got.event == 7)
            assert_memory_equal(memory_host(&d->rig->memory, BUFFERS + 64 * i + 8, 5), "agent", 5);
    }
    assert_false(take_used(d, 1, &id, &len));
    finish(d, virtio_console_virtio(c));
}

/* Requests are served by other threads: a stop of the machine waits for them. */
static void serve_all(struct driver *d, struct virtio *v, unsigned q)
{
    notify_queue(d, q);
    virtio_device(v)->ops->stop(virtio_device(v));
}

static void fs_serves_a_directory(void **state)
{
    struct driver *d = bare_driver();
    char dir[] = "/tmp/doppel-fs.XXXXXX";
    struct share_config config = {.path = mkdtemp(dir)};
    struct share *share = share_open(&config, &d->rig->err);
    struct virtio *v =
        virtio_fs_create(&d->rig->env, share, "a tag", d->host, TOY_DEVFN, &d->rig->err);
    struct {
        struct fuse_in_header header;
        struct fuse_init_in init;
    } in = {{.len = sizeof(in), .opcode = FUSE_INIT, .unique = 7},
            {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION}};
    struct buffer b[] = {
        {BUFFERS, sizeof(in), false}, {BUFFERS + 0x1000, 10, true}, {BUFFERS + 0x2000, 200, true}};
    struct fuse_out_header out;
    char tag[VIRTIO_FS_TAG_SIZE];
    u32 id, len;

    place(d);
    start_queue(d, 0, 1);
    for (unsigned i = 0; i < sizeof(tag); i++)
        tag[i] = (char)reg_read(d, VIRTIO_BAR_DEVICE + i, 1);
    assert_memory_equal(tag, "a tag\0\0", 7);
    assert_int_equal(reg_read(d, VIRTIO_BAR_DEVICE + sizeof(tag), 4), 1);
    assert_false(virtio_device(v)->ops->busy(virtio_device(v)));

    memory_write(&d->rig->memory, BUFFERS, &in, sizeof(in));
    add(d, b, 3, 0);
    serve_all(d, v, 1);
    assert_true(take_used(d, 3, &id, &len));
    assert_int_equal(len, sizeof(out) + sizeof(struct fuse_init_out));
    memory_read(&d->rig->memory, b[1].at, &out, 10);
    memory_read(&d->rig->memory, b[2].at, (u8 *)&out + 10, sizeof(out) - 10);
    assert_int_equal(out.error, 0);
    assert_int_equal(out.len, len);
    assert_int_equal(out.unique, 7);
    /* Mounted: what the guest knows can't be saved. */
    assert_true(virtio_device(v)->ops->busy(virtio_device(v)));
    virtio_device(v)->ops->start(virtio_device(v));

    /* What makes no sense comes back, too. */
    b[0].len = 5;
    add(d, b, 1, 3);
    serve_all(d, v, 1);
    assert_true(take_used(d, 1, &id, &len));
    assert_int_equal(id, 3);
    assert_int_equal(len, 0);
    finish(d, v);
    share_close(share);
    rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rng_fills_buffers),
        cmocka_unit_test(balloon_gives_pages_back),
        cmocka_unit_test(balloon_takes_reported_pages),
        cmocka_unit_test(balloon_is_told_hints),
        cmocka_unit_test(balloon_keeps_statistics),
        cmocka_unit_test(console_output_waits_for_its_stream),
        cmocka_unit_test(console_input_waits_for_buffers),
        cmocka_unit_test(console_ports_are_announced),
        cmocka_unit_test(fs_serves_a_directory),
    };
    return cmocka_run_group_tests_name("virtio_devices", tests, NULL, NULL);
}
