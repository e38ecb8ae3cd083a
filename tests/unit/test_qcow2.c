/*
 * qcow2 against a model, a plain array: random reads, writes, zeroes, discards and flushes over all cluster
 * sizes that make it interesting, with and without a backing image; what is there after closing and opening
 * again; what is there when the process dies between two system calls; and that qemu-img (Debian's qemu-utils)
 * finds the same contents and nothing to complain about.
 */
#include "block/disk.h"

#include "folder.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define DISK_SIZE (MIB(4) + 512 * 7)

static bool have_qemu_img;

static u64 random_next(u64 *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    return *s * 0x2545f4914f6cdd1dULL;
}

static const char *in_dir(const char *name)
{
    static char paths[4][128];
    static unsigned n;
    char *path = paths[n++ % 4];

    snprintf(path, sizeof(paths[0]), "%s/%s", folder, name);
    return path;
}

static void shell(const char *fmt, ...)
{
    char command[512], whole[600];
    va_list ap;

    if (!have_qemu_img)
        return;
    va_start(ap, fmt);
    vsnprintf(command, sizeof(command), fmt, ap);
    va_end(ap);
    snprintf(whole, sizeof(whole), "cd %s && { %s; } >log 2>&1 || { cat log >&2; false; }", folder,
             command);
    if (system(whole))
        fail_msg("%s", command);
}

static struct disk *open_image(const char *name, bool read_only)
{
    struct disk_options options = {.read_only = read_only};
    struct error err = {0};
    struct disk *im = disk_open(in_dir(name), &options, &err);

    if (!im)
        fail_msg("%s", err.text);
    return im;
}

static void create(const char *name, u32 cluster, unsigned version, const char *backing)
{
    struct disk_create c = {.format = "qcow2",
                            .size = DISK_SIZE,
                            .size_given = true,
                            .cluster_size = cluster,
                            .version = version,
                            .backing = backing,
                            .replace = true};
    struct error err = {0};

    if (disk_create(in_dir(name), &c, &err))
        fail_msg("%s", err.text);
}

static void write_file(const char *name, const u8 *data, size_t len)
{
    FILE *f = fopen(in_dir(name), "wb");

    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    fclose(f);
}

static void compare(struct disk *im, const u8 *model)
{
    u8 *buf = malloc(DISK_SIZE);

    assert_int_equal(disk_read(im, 0, buf, DISK_SIZE), 0);
    for (size_t i = 0; i < DISK_SIZE; i++)
        if (buf[i] != model[i])
            fail_msg("byte %zu is %02x, not %02x", i, buf[i], model[i]);
    free(buf);
}

static void check_clean(const char *name)
{
    struct disk *im = open_image(name, true);
    struct disk_check result;
    struct error err = {0};

    assert_int_equal(im->ops->check(im, false, &result, &err), 0);
    assert_int_equal(result.corruptions, 0);
    assert_int_equal(result.leaks, 0);
    assert_int_equal(disk_close(im), 0);
    shell("qemu-img check %s", name);
}

/* One random operation, on the image and on the model. `discarded` bytes may be anything until written. */
static void step(struct disk *im, u8 *model, u64 *seed, bool exact)
{
    u64 r = random_next(seed);
    u64 offset = r % (DISK_SIZE / 512) * 512, len = (1 + (r >> 32) % 400) * 512;
    static u8 data[400 * 512 + 512];

    len = MIN(len, DISK_SIZE - offset);
    switch (random_next(seed) % 10) {
    case 0 ... 4:
        for (size_t i = 0; i < len; i += 8)
            memcpy(data + i, &(u64){random_next(seed)}, 8);
        assert_int_equal(disk_write(im, offset, data, len), 0);
        memcpy(model + offset, data, len);
        break;
    case 5:
    case 6:
        assert_int_equal(im->ops->zero(im, offset, len, r >> 60 & 1), 0);
        memset(model + offset, 0, len);
        break;
    case 7:
        if (exact) {
            assert_int_equal(disk_read(im, offset, data, len), 0);
            assert_memory_equal(data, model + offset, len);
            break;
        }
        assert_int_equal(im->ops->discard(im, offset, len), 0);
        assert_int_equal(disk_read(im, offset, model + offset, len), 0);
        break;
    case 8:
        assert_int_equal(im->ops->flush(im), 0);
        break;
    default:
        assert_int_equal(disk_read(im, offset, data, len), 0);
        assert_memory_equal(data, model + offset, len);
        break;
    }
}

static void run_model(u32 cluster, unsigned version, bool backing, u64 seed)
{
    u8 *model = calloc(1, DISK_SIZE);
    struct disk *im;

    if (backing) {
        for (size_t i = 0; i < MIB(3); i++)
            model[i] = (u8)(random_next(&seed) >> 33);
        write_file("base.raw", model, MIB(3));
    }
    create("a.qcow2", cluster, version, backing ? "base.raw" : NULL);
    im = open_image("a.qcow2", false);
    for (unsigned round = 0; round < 4; round++) {
        for (unsigned i = 0; i < 60; i++)
            step(im, model, &seed, false);
        compare(im, model);
        assert_int_equal(disk_close(im), 0);
        check_clean("a.qcow2");
        im = open_image("a.qcow2", false);
        compare(im, model);
    }
    assert_int_equal(disk_close(im), 0);
    write_file("model.raw", model, DISK_SIZE);
    shell("qemu-img compare -f qcow2 -F raw a.qcow2 model.raw");
    free(model);
}

static void random_operations_agree_with_a_model(void **state)
{
    static const u32 clusters[] = {512, 4096, 65536, 2097152};
    u64 seed = 77;

    for (unsigned i = 0; i < ARRAY_SIZE(clusters); i++) {
        run_model(clusters[i], 3, false, random_next(&seed));
        run_model(clusters[i], 3, true, random_next(&seed));
    }
    run_model(65536, 2, false, random_next(&seed));
    run_model(4096, 2, true, random_next(&seed));
}

/*
 * A process that is killed at a random point of its work: the image must be whole, but for leaks, and hold
 * what was flushed last. The child tells by a pipe what it flushed.
 */
static void what_was_flushed_survives_a_kill(void **state)
{
    u64 seed = 4242;

    for (unsigned round = 0; round < 20; round++) {
        u64 child_seed = random_next(&seed);
        struct disk_check result;
        struct error err = {0};
        struct disk *im;
        u32 flushed = 0, n;
        u8 *model = calloc(1, DISK_SIZE), *buf = malloc(DISK_SIZE);
        int fds[2], status;
        pid_t pid;

        create("k.qcow2", round % 2 ? 4096 : 65536, 3, NULL);
        assert_int_equal(pipe(fds), 0);
        pid = fork();
        if (!pid) {
            im = open_image("k.qcow2", false);
            /* Blocks of 4096 in order, so that what is there tells how far it came. */
            for (u32 i = 0;; i++) {
                u8 block[4096];

                memset(block, (int)(1 + i % 255), sizeof(block));
                disk_write(im, (child_seed + i * 7919ULL) % (DISK_SIZE / 4096) * 4096, block,
                           sizeof(block));
                if (i % 16 == 15) {
                    im->ops->flush(im);
                    if (write(fds[1], &i, sizeof(i)) != sizeof(i))
                        _exit(1);
                }
            }
        }
        close(fds[1]);
        usleep((useconds_t)(1000 + random_next(&seed) % 20000));
        kill(pid, SIGKILL);
        waitpid(pid, &status, 0);
        while (read(fds[0], &n, sizeof(n)) == sizeof(n))
            flushed = n + 1;
        close(fds[0]);

        im = open_image("k.qcow2", true);
        assert_int_equal(im->ops->check(im, false, &result, &err), 0);
        assert_int_equal(result.corruptions, 0);
        assert_int_equal(disk_read(im, 0, buf, DISK_SIZE), 0);
        for (u32 i = flushed > 1000 ? flushed - 1000 : 0; i < flushed; i++) {
            u64 at = (child_seed + i * 7919ULL) % (DISK_SIZE / 4096) * 4096;
            u8 want = (u8)(1 + i % 255);

            /* A later write, flushed or not, may be there in its place. */
            if (buf[at] != want && buf[at] != (u8)(1 + (i + DISK_SIZE / 4096) % 255))
                fail_msg("round %u: block %u is lost (%u flushed)", round, i, flushed);
        }
        assert_int_equal(disk_close(im), 0);
        free(model);
        free(buf);
        im = open_image("k.qcow2", false);
        assert_int_equal(im->ops->check(im, true, &result, &err), 0);
        assert_int_equal(disk_close(im), 0);
        check_clean("k.qcow2");
    }
}

static void resizes_both_ways(void **state)
{
    u8 *model = calloc(1, DISK_SIZE), *buf = malloc(MIB(64));
    struct error err = {0};
    struct disk *im;
    u64 seed = 9;

    memset(model, 0x5a, MIB(3));
    write_file("base.raw", model, MIB(3));
    create("r.qcow2", 4096, 3, "base.raw");
    im = open_image("r.qcow2", false);
    for (unsigned i = 0; i < 50; i++)
        step(im, model, &seed, true);
    assert_int_equal(im->ops->resize(im, MIB(2) + 512, &err), 0);
    assert_int_equal(im->ops->resize(im, MIB(64), &err), 0);
    assert_int_equal(disk_read(im, 0, buf, MIB(64)), 0);
    assert_memory_equal(buf, model, MIB(2) + 512);
    for (size_t i = MIB(2) + 512; i < MIB(64); i++)
        if (buf[i])
            fail_msg("byte %zu came back", i);
    assert_int_equal(disk_write(im, MIB(64) - 512, model, 512), 0);
    assert_int_equal(disk_close(im), 0);
    check_clean("r.qcow2");
    free(model);
    free(buf);
}

/* More clusters than the first refcount table counts. */
static void the_refcount_table_grows(void **state)
{
    struct disk_create c = {.format = "qcow2",
                            .size = MIB(64),
                            .size_given = true,
                            .cluster_size = 512,
                            .replace = true};
    u8 *data = malloc(MIB(1));
    struct error err = {0};
    struct disk *im;

    memset(data, 0x33, MIB(1));
    assert_int_equal(disk_create(in_dir("g.qcow2"), &c, &err), 0);
    im = open_image("g.qcow2", false);
    for (unsigned i = 0; i < 64; i += 2)
        assert_int_equal(disk_write(im, MIB(i), data, MIB(1)), 0);
    assert_int_equal(disk_close(im), 0);
    check_clean("g.qcow2");
    im = open_image("g.qcow2", false);
    for (unsigned i = 0; i < 64; i++) {
        u8 byte;

        assert_int_equal(disk_read(im, MIB(i) + 77, &byte, 1), 0);
        assert_int_equal(byte, i % 2 ? 0 : 0x33);
    }
    assert_int_equal(im->ops->empty(im), 0);
    assert_int_equal(disk_close(im), 0);
    check_clean("g.qcow2");
    free(data);
}

/* What qemu-img writes: compressed by both ways, snapshots, narrow and wide refcounts. */
static void reads_and_writes_what_qemu_img_made(void **state)
{
    static const char *const makers[] = {
        "qemu-img convert -c -O qcow2 model.raw q.qcow2",
        "qemu-img convert -c -O qcow2 -o compression_type=zstd model.raw q.qcow2",
        "qemu-img convert -O qcow2 model.raw q.qcow2 && qemu-img snapshot -c s q.qcow2",
        "qemu-img convert -O qcow2 -o refcount_bits=1 model.raw q.qcow2",
        "qemu-img convert -O qcow2 -o refcount_bits=64,cluster_size=1k model.raw q.qcow2",
        "qemu-img convert -O qcow2 -o compat=0.10 model.raw q.qcow2",
    };
    u8 *model = calloc(1, DISK_SIZE);
    u64 seed = 31;

    if (!have_qemu_img)
        skip();
    for (unsigned m = 0; m < ARRAY_SIZE(makers); m++) {
        struct disk *im;

        for (size_t i = 0; i < MIB(2); i++)
            model[i] = (u8)(i / 999);
        memset(model + MIB(2), 0, DISK_SIZE - MIB(2));
        write_file("model.raw", model, DISK_SIZE);
        unlink(in_dir("q.qcow2"));
        shell("%s", makers[m]);
        im = open_image("q.qcow2", false);
        compare(im, model);
        for (unsigned i = 0; i < 80; i++)
            step(im, model, &seed, m == 2);
        assert_int_equal(disk_close(im), 0);
        check_clean("q.qcow2");
        write_file("model.raw", model, DISK_SIZE);
        shell("qemu-img compare -f qcow2 -F raw q.qcow2 model.raw");
        if (m == 2) { /* the snapshot is as it was */
            shell("qemu-img snapshot -a s q.qcow2");
            for (size_t i = 0; i < MIB(2); i++)
                model[i] = (u8)(i / 999);
            memset(model + MIB(2), 0, DISK_SIZE - MIB(2));
            im = open_image("q.qcow2", true);
            compare(im, model);
            assert_int_equal(disk_close(im), 0);
        }
    }
    free(model);
}

static void expect_refusal(const char *name, const char *part)
{
    struct disk_options options = {.read_only = false};
    struct error err = {0};
    struct disk *im = disk_open(in_dir(name), &options, &err);

    assert_null(im);
    if (!strstr(err.text, part) || strchr(err.text, '\n'))
        fail_msg("'%s' doesn't say '%s'", err.text, part);
    assert_int_equal(err.class, ERROR_INPUT);
}

static void patch(const char *name, off_t offset, const void *bytes, size_t len)
{
    FILE *f = fopen(in_dir(name), "r+b");

    assert_non_null(f);
    fseek(f, offset, SEEK_SET);
    fwrite(bytes, 1, len, f);
    fclose(f);
}

static void refuses_what_it_cannot_do(void **state)
{
    static const struct {
        off_t offset;
        u8 byte;
        const char *says;
    } cases[] = {
        {79, 0x10, "extended L2"},
        {79, 0x04, "data in another file"},
        {79, 0x40, "unknown features"},
        {79, 0x01, "not closed properly"},
        {79, 0x02, "marked as corrupt"},
        {95, 0x01, "bitmaps"},
        {35, 2, "encrypted"},
        {23, 7, "cluster size"},
        {7, 9, "version 9"},
        {36, 0xff, "L1 table"},
        {48, 0x7f, "outside of the file"},
        {40, 0x7f, "outside of the file"},
        {103, 3, "impossible header"},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        create("x.qcow2", 65536, 3, NULL);
        patch("x.qcow2", cases[i].offset, &cases[i].byte, 1);
        expect_refusal("x.qcow2", cases[i].says);
    }
    create("x.qcow2", 65536, 3, NULL);
    struct disk *im = open_image("x.qcow2", false);
    expect_refusal("x.qcow2", "in use by another process");
    assert_int_equal(disk_close(im), 0);
}

/* An entry that leads to a table: the write fails, the table stays, the image says so from then on. */
static void a_corrupt_entry_stops_writes(void **state)
{
    u8 data[512], entry[8] = {0x80, 0, 0, 0, 0, 1, 0, 0}; /* cluster 1: the refcount table */
    struct disk_check result;
    struct error err = {0};
    struct disk *im;

    create("c.qcow2", 65536, 3, NULL);
    im = open_image("c.qcow2", false);
    memset(data, 1, sizeof(data));
    assert_int_equal(disk_write(im, 0, data, sizeof(data)), 0);
    assert_int_equal(disk_close(im), 0);
    patch("c.qcow2", 4 * 65536, entry,
          sizeof(entry)); /* the first L2 table is behind the L1's cluster */
    im = open_image("c.qcow2", false);
    assert_int_equal(disk_write(im, 0, data, sizeof(data)), -EIO);
    assert_int_equal(disk_write(im, MIB(1), data, sizeof(data)), -EIO);
    assert_int_equal(disk_close(im), 0);
    expect_refusal("c.qcow2", "marked as corrupt");
    im = open_image("c.qcow2", true);
    assert_int_equal(im->ops->check(im, false, &result, &err), 0);
    assert_true(result.corruptions > 0);
    assert_int_equal(disk_close(im), 0);
}

static int setup(void **state)
{
    have_qemu_img = system("command -v qemu-img >/dev/null") == 0;
    return folder_make(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_operations_agree_with_a_model),
        cmocka_unit_test(what_was_flushed_survives_a_kill),
        cmocka_unit_test(resizes_both_ways),
        cmocka_unit_test(the_refcount_table_grows),
        cmocka_unit_test(reads_and_writes_what_qemu_img_made),
        cmocka_unit_test(refuses_what_it_cannot_do),
        cmocka_unit_test(a_corrupt_entry_stops_writes),
    };
    return cmocka_run_group_tests_name("qcow2", tests, setup, folder_remove);
}
