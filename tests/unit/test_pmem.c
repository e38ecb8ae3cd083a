/*
 * Files as memory: a slot whose bytes are a file's, and the virtio-pmem device that tells where it is and has it
 * flushed, also when that fails, is asked for wrongly, or is under way at a reset.
 */
#include "device/virtio/pmem.h"
#include "faulty_disk.h"
#include "virtio_rig.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#define SIZE MIB(2)
#define START 0x40000000ULL
#define REQUEST BUFFERS
#define RESPONSE (BUFFERS + 0x100)

struct fixture {
    struct driver d;
    struct virtio *v;
    struct faulty *disk;
    struct block_backend *backend;
    char path[32];
};

static struct fixture *create(u64 size)
{
    struct disk_options options = {.format = "raw"};
    struct fixture *f = calloc(1, sizeof(*f));
    struct rig *r = rig_create();
    struct virtio_pmem_config cfg = {.start = START, .size = size};
    struct error err = {0};
    int fd;

    strcpy(f->path, "/tmp/doppel-pmem.XXXXXX");
    fd = mkstemp(f->path);
    assert_true(fd >= 0 && ftruncate(fd, SIZE) == 0);
    close(fd);
    f->d.rig = r;
    r->env.loop = event_loop_create(&err);
    f->disk = faulty_open(f->path, &options, &err);
    if (!f->disk)
        fail_msg("%s", err.text);
    f->backend = cfg.backend = block_create(&f->disk->d, r->env.loop, true, &err);
    assert_int_equal(memory_add_file(&r->memory, START, SIZE, block_fd(f->backend), 0, &err), 0);
    f->d.host = rig_pci_host(r);
    f->v = virtio_pmem_create(&r->env, &cfg, f->d.host, TOY_DEVFN, &err);
    assert_non_null(f->v);
    config_write(r, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(r, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    return f;
}

static int setup(void **state)
{
    struct fixture *f = create(SIZE);

    start_driver(&f->d, 0, 16);
    *state = f;
    return 0;
}

static void destroy(struct fixture *f)
{
    struct device *host = pci_host_device(f->d.host);

    virtio_device(f->v)->ops->destroy(virtio_device(f->v));
    host->ops->destroy(host);
    block_destroy(f->backend);
    event_loop_destroy(f->d.rig->env.loop);
    rig_destroy(f->d.rig);
    unlink(f->path);
    free(f);
}

static int teardown(void **state)
{
    destroy(*state);
    return 0;
}

static void submit(struct fixture *f, u32 type, u32 request_len, u32 response_len)
{
    struct buffer b[2] = {{REQUEST, request_len, false}, {RESPONSE, response_len, true}};
    u32 nothing = 0xeeeeeeee;

    memory_write(&f->d.rig->memory, REQUEST, &type, sizeof(type));
    memory_write(&f->d.rig->memory, RESPONSE, &nothing, sizeof(nothing));
    add(&f->d, b, response_len ? 2 : 1, 0);
    notify(&f->d);
}

static u32 wait_response(struct fixture *f, u32 *written)
{
    u32 id, response;

    for (unsigned i = 0; !take_used(&f->d, 1, &id, written); i++) {
        if (i > 5000)
            fail_msg("no answer");
        run_loop(&f->d);
        poll(NULL, 0, 1);
    }
    memory_read(&f->d.rig->memory, RESPONSE, &response, sizeof(response));
    return response;
}

static void its_bytes_are_the_files(void **state)
{
    struct fixture *f = *state;
    struct guest_memory *m = &f->d.rig->memory;
    int fd = open(f->path, O_RDWR | O_CLOEXEC);
    char buf[6] = "";

    assert_int_equal(memory_write(m, START + 0x1234, "guest", 5), 0);
    assert_int_equal(pread(fd, buf, 5, 0x1234), 5);
    assert_string_equal(buf, "guest");
    assert_int_equal(pwrite(fd, "host!", 5, SIZE - 5), 5);
    assert_int_equal(memory_read(m, START + SIZE - 5, buf, 5), 0);
    assert_string_equal(buf, "host!");
    assert_int_equal(memory_read(m, START + SIZE, buf, 1), -EFAULT);
    assert_true(memory_find(m, START)->flags & MEMORY_FILE);
    assert_int_equal(memory_find(m, 0)->fd, -1);
    close(fd);
}

static void a_readonly_file_stays_as_it_is(void **state)
{
    struct fixture *f = *state;
    struct guest_memory *m = &f->d.rig->memory;
    int fd = open(f->path, O_RDONLY | O_CLOEXEC);
    const gpa_t at = START + GIB(1);
    struct error err;
    u64 len = 8;
    char byte = 1;

    assert_int_equal(memory_add_file(m, at, SIZE, fd, MEMORY_ROM, &err), 0);
    assert_null(memory_dma(m, at, &len, true));
    assert_int_equal(memory_write(m, at, "x", 1), 0); /* a loader may; it is not in the file */
    assert_int_equal(pread(fd, &byte, 1, 0), 1);
    assert_int_equal(byte, 0);
    assert_int_equal(memory_add_file(m, at + SIZE, SIZE, fd, 0, &err), -EACCES);
    assert_int_equal(memory_add_file(m, at, SIZE, fd, MEMORY_ROM, &err), -EINVAL);
    close(fd);
}

static void tells_where_the_memory_is(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(reg_read(&f->d, VIRTIO_BAR_DEVICE, 4), START);
    assert_int_equal(reg_read(&f->d, VIRTIO_BAR_DEVICE + 4, 4), 0);
    assert_int_equal(reg_read(&f->d, VIRTIO_BAR_DEVICE + 8, 4), SIZE);
    reg_write(&f->d, VIRTIO_BAR_DEVICE, 0, 4);
    assert_int_equal(reg_read(&f->d, VIRTIO_BAR_DEVICE, 4), START);
}

static void a_flush_is_answered_when_it_is_done(void **state)
{
    struct fixture *f = *state;
    u32 written, id;

    __atomic_store_n(&f->disk->held, 1, __ATOMIC_SEQ_CST);
    submit(f, 0, 4, 4);
    assert_false(take_used(&f->d, 1, &id, &written));
    assert_int_equal(f->disk->flushes, 0);
    __atomic_store_n(&f->disk->held, 0, __ATOMIC_SEQ_CST);
    assert_int_equal(wait_response(f, &written), 0);
    assert_int_equal(written, 4);
    assert_int_equal(f->disk->flushes, 1);

    __atomic_store_n(&f->disk->flush_error, -EIO, __ATOMIC_SEQ_CST);
    submit(f, 0, 4, 4);
    assert_int_equal(wait_response(f, &written), 1);
}

static void nonsense_is_an_error(void **state)
{
    struct fixture *f = *state;
    u32 written;

    submit(f, 1, 4, 4); /* no such request */
    assert_int_equal(wait_response(f, &written), 1);
    submit(f, 0, 3, 4); /* half of one */
    assert_int_equal(wait_response(f, &written), 1);
    submit(f, 0, 4, 2); /* what fits is written */
    assert_int_equal(wait_response(f, &written), 0xeeee0000);
    assert_int_equal(written, 2);
    submit(f, 0, 4, 0);
    assert_int_equal(wait_response(f, &written), 0xeeeeeeee);
    assert_int_equal(written, 0);
    assert_int_equal(f->disk->flushes, 2);
}

static void a_reset_waits_for_the_flush(void **state)
{
    struct fixture *f = *state;

    __atomic_store_n(&f->disk->held, 1, __ATOMIC_SEQ_CST);
    submit(f, 0, 4, 4);
    reg_write(&f->d, STATUS, 0, 1);
    assert_int_not_equal(reg_read(&f->d, STATUS, 1), 0);
    __atomic_store_n(&f->disk->held, 0, __ATOMIC_SEQ_CST);
    virtio_device(f->v)->ops->stop(virtio_device(f->v));
    assert_int_equal(reg_read(&f->d, STATUS, 1), 0);
    assert_int_equal(f->disk->flushes, 1);
}

static void state_is_of_this_memory(void **state)
{
    struct fixture *f = *state, *fresh = create(SIZE), *smaller = create(SIZE / 2);
    const struct state_desc *desc = virtio_device(f->v)->state;
    size_t len = state_size(desc);
    u8 *bytes = malloc(len);
    char buf[128];
    struct error err;
    const char *wrong = rig_round_trip(fresh->d.rig, virtio_device(f->v), virtio_device(fresh->v),
                                       buf, sizeof(buf));

    if (wrong)
        fail_msg("%s", wrong);
    state_save(desc, f->v, bytes);
    assert_int_equal(state_load(desc, smaller->v, bytes, len, &err), -EINVAL);
    assert_non_null(strstr(err.text, "of another size or place"));
    free(bytes);
    destroy(fresh);
    destroy(smaller);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(its_bytes_are_the_files),   TEST(a_readonly_file_stays_as_it_is),
        TEST(tells_where_the_memory_is), TEST(a_flush_is_answered_when_it_is_done),
        TEST(nonsense_is_an_error),      TEST(a_reset_waits_for_the_flush),
        TEST(state_is_of_this_memory),
    };
    return cmocka_run_group_tests_name("pmem", tests, NULL, NULL);
}
