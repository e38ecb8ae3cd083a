/*
 * virtio-blk over a real raw or qcow2 image, by io_uring and by threads alone: every request of the standard's,
 * those that no disk can do, a device that is reset with requests under way, and a host that has no space left.
 */
#include "device/virtio/blk.h"
#include "faulty_disk.h"
#include "folder.h"
#include "virtio_rig.h"

#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#define DISK MIB(1)
#define HEADER BUFFERS
#define RANGES (BUFFERS + 16)
#define STATUS_BYTE (BUFFERS + 0x1ff)
#define DATA (BUFFERS + 0x1000)

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_ZEROES = 13 };
#define F_RO BIT(5)
#define F_FLUSH BIT(9)
#define F_CONFIG_WCE BIT(11)

/* ---- the machine around it ---- */

struct fixture {
    struct driver d;
    struct virtio *v;
    struct faulty *disk;
    struct block_backend *backend;
    unsigned stops;
};

static void stopped(void *opaque, const char *disk, int error)
{
    struct fixture *f = opaque;

    f->stops++;
    assert_int_equal(error, ENOSPC);
}

static struct fixture *create(const char *format, bool read_only, bool pool_only, bool werror_stop)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct disk_create c = {.format = format, .size = DISK, .size_given = true, .replace = true};
    struct disk_options options = {.format = format, .read_only = read_only};
    struct virtio_blk_config cfg = {.serial = "a serial of 20 chars", .queues = 2};
    struct rig *r = rig_create();
    struct error err = {0};
    char path[64];

    snprintf(path, sizeof(path), "%s/%s", folder, format);
    if (access(path, F_OK) && disk_create(path, &c, &err))
        fail_msg("%s", err.text);
    f->d.rig = r;
    r->env.loop = event_loop_create(&err);
    f->disk = faulty_open(path, &options, &err);
    if (!f->disk)
        fail_msg("%s", err.text);
    f->backend = block_create(&f->disk->d, r->env.loop, pool_only, &err);
    assert_non_null(f->backend);
    if (werror_stop)
        block_stop_on_error(f->backend, stopped, f);
    f->d.host = rig_pci_host(r);
    cfg.backend = f->backend;
    f->v = virtio_blk_create(&r->env, &cfg, f->d.host, TOY_DEVFN, &err);
    assert_non_null(f->v);
    config_write(r, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(r, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    return f;
}

static void destroy(struct fixture *f)
{
    struct device *host = pci_host_device(f->d.host);

    virtio_device(f->v)->ops->destroy(virtio_device(f->v));
    host->ops->destroy(host);
    block_destroy(f->backend);
    event_loop_destroy(f->d.rig->env.loop);
    rig_destroy(f->d.rig);
    free(f);
}

static void put_header(struct fixture *f, u32 type, u64 sector)
{
    u64 words[2] = {type, sector};
    u8 status = 0xee;

    memory_write(&f->d.rig->memory, HEADER, words, sizeof(words));
    memory_write(&f->d.rig->memory, STATUS_BYTE, &status, 1);
}

static void submit(struct fixture *f, u32 type, u64 sector, const struct buffer *data)
{
    struct buffer b[3] = {{HEADER, 16, false}, {0}, {STATUS_BYTE, 1, true}};

    put_header(f, type, sector);
    if (data)
        b[1] = *data;
    else
        b[1] = b[2];
    add(&f->d, b, data ? 3 : 2, 0);
    notify(&f->d);
}

/* Waits for the answer: its status. */
static u8 wait_status(struct fixture *f, unsigned ndesc)
{
    u32 id, len;
    u8 status;

    for (unsigned i = 0; !take_used(&f->d, ndesc, &id, &len); i++) {
        if (i > 5000)
            fail_msg("no answer");
        run_loop(&f->d);
        poll(NULL, 0, 1);
    }
    memory_read(&f->d.rig->memory, STATUS_BYTE, &status, 1);
    return status;
}

static u8 request(struct fixture *f, u32 type, u64 sector, gpa_t at, u32 len, bool write)
{
    struct buffer data = {at, len, write};

    submit(f, type, sector, len ? &data : NULL);
    return wait_status(f, len ? 3 : 2);
}

static u8 range_request(struct fixture *f, u32 type, u64 sector, u32 sectors, u32 flags)
{
    struct {
        u64 sector;
        u32 sectors, flags;
    } range = {sector, sectors, flags};

    memory_write(&f->d.rig->memory, RANGES, &range, sizeof(range));
    return request(f, type, 0, RANGES, sizeof(range), false);
}

static void fill(struct fixture *f, u8 byte, u32 len)
{
    memset(memory_host(&f->d.rig->memory, DATA, len), byte, len);
}

static void expect(struct fixture *f, u64 sector, u32 len, u8 byte)
{
    const u8 *data = memory_host(&f->d.rig->memory, DATA, len);

    fill(f, 0xcc, len);
    assert_int_equal(request(f, T_IN, sector, DATA, len, true), 0);
    for (u32 i = 0; i < len; i++)
        if (data[i] != byte)
            fail_msg("sector %llu, byte %u is %02x, not %02x", (unsigned long long)sector, i,
                     data[i], byte);
}

static void do_all_requests(const char *format, bool pool_only, u64 features)
{
    struct fixture *f = create(format, false, pool_only, false);
    char id[21] = "";

    start_driver(&f->d, features | F_FLUSH, 16);
    assert_int_equal(reg_read(&f->d, VIRTIO_BAR_DEVICE, 4), DISK / 512);
    fill(f, 0x5a, 0x6000);
    assert_int_equal(request(f, T_OUT, 100, DATA, 0x6000, false), 0);
    expect(f, 100, 0x6000, 0x5a);
    expect(f, 110, 512, 0x5a);
    expect(f, 99, 512, 0);
    assert_int_equal(f->disk->flushes, 0);
    assert_int_equal(request(f, T_FLUSH, 0, 0, 0, false), 0);
    assert_int_equal(f->disk->flushes, 1);
    assert_int_equal(request(f, T_GET_ID, 0, DATA, 20, true), 0);
    memory_read(&f->d.rig->memory, DATA, id, 20);
    assert_string_equal(id, "a serial of 20 chars");
    assert_int_equal(range_request(f, T_ZEROES, 101, 3, 0), 0);
    expect(f, 101, 3 * 512, 0);
    expect(f, 104, 512, 0x5a);
    assert_int_equal(range_request(f, T_ZEROES, 0, DISK / 512, 1), 0);
    expect(f, 120, 512, 0);
    assert_int_equal(range_request(f, T_DISCARD, 128, 256, 0), 0);

    /* What no disk can do. */
    assert_int_equal(request(f, T_IN, DISK / 512, DATA, 512, true), 1);
    assert_int_equal(request(f, T_OUT, DISK / 512 - 1, DATA, 1024, false), 1);
    assert_int_equal(request(f, T_IN, ~0ULL, DATA, 512, true), 1);
    assert_int_equal(request(f, T_OUT, 0, DATA, 511, false), 1);
    assert_int_equal(request(f, 77, 0, DATA, 512, true), 2);
    assert_int_equal(range_request(f, T_ZEROES, DISK / 512 - 1, 2, 0), 1);
    assert_int_equal(range_request(f, T_DISCARD, 0, 8, 1), 2);
    assert_int_equal(range_request(f, T_ZEROES, 0, 8, 2), 2);
    assert_int_equal(request(f, T_DISCARD, 0, DATA, 15, false), 2);
    assert_int_equal(reg_read(&f->d, STATUS, 1), 15);
    destroy(f);
}

static void every_request_is_answered(void **state)
{
    static const char *const formats[] = {"raw", "qcow2"};

    for (unsigned i = 0; i < 8; i++)
        do_all_requests(formats[i & 1], i & 2, i & 4 ? VIRTIO_F_RING_PACKED : 0);
}

static void a_readonly_disk_takes_no_writes(void **state)
{
    struct fixture *f = create("raw", true, false, false);

    assert_true(offered_features(&f->d) & F_RO);
    start_driver(&f->d, F_RO, 16);
    assert_int_equal(request(f, T_OUT, 0, DATA, 512, false), 1);
    assert_int_equal(range_request(f, T_ZEROES, 0, 8, 0), 1);
    assert_int_equal(request(f, T_IN, 0, DATA, 512, true), 0);
    assert_int_equal(request(f, T_FLUSH, 0, 0, 0, false), 0);
    destroy(f);
}

static void writes_go_through_where_the_driver_cannot_flush(void **state)
{
    struct fixture *f = create("raw", false, false, false);

    start_driver(&f->d, 0, 16);
    assert_int_equal(request(f, T_OUT, 0, DATA, 512, false), 0);
    assert_int_equal(f->disk->flushes, 1);
    start_driver(&f->d, F_FLUSH | F_CONFIG_WCE, 16);
    assert_int_equal(request(f, T_OUT, 0, DATA, 512, false), 0);
    assert_int_equal(f->disk->flushes, 1);
    reg_write(&f->d, VIRTIO_BAR_DEVICE + 32, 0, 1); /* writeback off */
    assert_int_equal(request(f, T_OUT, 0, DATA, 512, false), 0);
    assert_int_equal(f->disk->flushes, 2);
    destroy(f);
}

static void a_failed_write_is_told(void **state)
{
    struct fixture *f = create("raw", false, false, false);

    start_driver(&f->d, F_FLUSH, 16);
    __atomic_store_n(&f->disk->error, -ENOSPC, __ATOMIC_SEQ_CST);
    assert_int_equal(request(f, T_OUT, 8, DATA, 512, false), 1);
    __atomic_store_n(&f->disk->error, 0, __ATOMIC_SEQ_CST);
    assert_int_equal(request(f, T_OUT, 8, DATA, 512, false), 0);
    destroy(f);
}

static void werror_stop_keeps_the_write_until_there_is_space(void **state)
{
    struct fixture *f = create("raw", false, false, true);
    struct device *dev = virtio_device(f->v);
    struct buffer data = {DATA, 512, false};
    u32 id, len;

    start_driver(&f->d, F_FLUSH, 16);
    fill(f, 0x77, 512);
    __atomic_store_n(&f->disk->error, -ENOSPC, __ATOMIC_SEQ_CST);
    submit(f, T_OUT, 9, &data);
    for (unsigned i = 0; i < 2000 && !f->stops; i++) {
        run_loop(&f->d);
        poll(NULL, 0, 1);
    }
    assert_int_equal(f->stops, 1);
    dev->ops->stop(dev);
    assert_true(dev->ops->busy(dev));
    assert_false(take_used(&f->d, 3, &id, &len));
    __atomic_store_n(&f->disk->error, 0, __ATOMIC_SEQ_CST);
    dev->ops->start(dev);
    block_resume(f->backend);
    assert_int_equal(wait_status(f, 3), 0);
    expect(f, 9, 512, 0x77);
    /* A machine that ends with one kept. */
    __atomic_store_n(&f->disk->error, -ENOSPC, __ATOMIC_SEQ_CST);
    submit(f, T_OUT, 9, &data);
    destroy(f);
}

/* A reset waits for the requests under way, and their data doesn't come afterwards. */
static void a_reset_waits_for_the_disk(void **state)
{
    struct fixture *f = create("qcow2", false, false, false);

    for (unsigned round = 0; round < 20; round++) {
        struct buffer b[3] = {
            {HEADER, 16, false}, {DATA, 0x4000, round % 2}, {STATUS_BYTE, 1, true}};

        start_driver(&f->d, F_FLUSH, 16);
        put_header(f, round % 2 ? T_IN : T_OUT, round * 32);
        add(&f->d, b, 3, 0);
        reg_write(&f->d, VIRTIO_BAR_NOTIFY, 0, 2);
        event_loop_post(f->d.rig->env.loop, rig_stop_loop, f->d.rig->env.loop);
        event_loop_run(f->d.rig->env.loop);
        reg_write(&f->d, STATUS, 0, 1);
        for (unsigned i = 0; reg_read(&f->d, STATUS, 1); i++) {
            assert_true(i < 5000);
            run_loop(&f->d);
            poll(NULL, 0, 1);
        }
        assert_int_equal(f->v->in_flight, 0);
    }
    destroy(f);
}

static void a_request_without_a_status_needs_a_reset(void **state)
{
    struct fixture *f = create("raw", false, false, false);
    struct buffer b[2] = {{HEADER, 16, false}, {DATA, 512, false}};

    start_driver(&f->d, F_FLUSH, 16);
    put_header(f, T_OUT, 0);
    add(&f->d, b, 2, 0);
    notify(&f->d);
    assert_true(reg_read(&f->d, STATUS, 1) & VIRTIO_STATUS_NEEDS_RESET);
    destroy(f);
}

/* Many at once, over each other's places, discards among them: all come back. */
static void many_requests_at_once_come_back(void **state)
{
    struct fixture *f = create("qcow2", false, *state != NULL, false);
    u64 seed = 6;

    start_driver(&f->d, F_FLUSH, 64);
    for (unsigned round = 0; round < 30; round++) {
        unsigned count = 16, back = 0;
        u32 id, len;

        for (unsigned i = 0; i < count; i++) {
            static const u32 types[] = {T_OUT, T_OUT, T_IN, T_FLUSH, T_DISCARD, T_ZEROES};
            u32 type = types[rig_random(&seed) % ARRAY_SIZE(types)];
            u64 sector = rig_random(&seed) % (DISK / 512 - 64);
            gpa_t at = BUFFERS + i * 0x700;
            u64 header[2] = {type, sector}, range[2] = {sector, 48};
            struct buffer b[3] = {
                {at, 16, false}, {at + 0x100, 0x600, type == T_IN}, {at + 0xff, 1, true}};

            memory_write(&f->d.rig->memory, at, header, sizeof(header));
            if (type == T_DISCARD || type == T_ZEROES) {
                memory_write(&f->d.rig->memory, at + 0x100, range, sizeof(range));
                b[1].len = 16;
            }
            if (type == T_FLUSH)
                b[1] = b[2];
            add(&f->d, b, type == T_FLUSH ? 2 : 3, (u16)(i * 4));
        }
        notify(&f->d);
        for (unsigned i = 0; back < count; i++) {
            assert_true(i < 5000);
            while (take_used(&f->d, 1, &id, &len))
                back++;
            run_loop(&f->d);
            poll(NULL, 0, 1);
        }
    }
    destroy(f);
}

static void state_survives_the_round_trip(void **state)
{
    struct fixture *f = create("raw", false, false, false);
    struct virtio_blk_config cfg = {.backend = f->backend, .queues = 2};
    struct virtio *fresh =
        virtio_blk_create(&f->d.rig->env, &cfg, f->d.host, PCI_DEVFN(7, 0), &f->d.rig->err);
    char buf[128];
    const char *wrong;

    start_driver(&f->d, F_FLUSH | F_CONFIG_WCE, 16);
    reg_write(&f->d, VIRTIO_BAR_DEVICE + 32, 0, 1);
    assert_int_equal(request(f, T_OUT, 0, DATA, 512, false), 0);
    wrong = rig_round_trip(f->d.rig, virtio_device(f->v), virtio_device(fresh), buf, sizeof(buf));
    if (wrong)
        fail_msg("%s", wrong);
    virtio_device(fresh)->ops->destroy(virtio_device(fresh));
    destroy(f);
}

int main(void)
{
    static int pool_only;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_request_is_answered),
        cmocka_unit_test(a_readonly_disk_takes_no_writes),
        cmocka_unit_test(writes_go_through_where_the_driver_cannot_flush),
        cmocka_unit_test(a_failed_write_is_told),
        cmocka_unit_test(werror_stop_keeps_the_write_until_there_is_space),
        cmocka_unit_test(a_reset_waits_for_the_disk),
        cmocka_unit_test(a_request_without_a_status_needs_a_reset),
        cmocka_unit_test(many_requests_at_once_come_back),
        cmocka_unit_test_prestate(many_requests_at_once_come_back, &pool_only),
        cmocka_unit_test(state_survives_the_round_trip),
    };
    return cmocka_run_group_tests_name("virtio_blk", tests, folder_make, folder_remove);
}
