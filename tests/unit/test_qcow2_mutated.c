/*
 * 10,000 damaged qcow2 images, of every kind that there is: bytes changed in the header, in tables, anywhere; entries
 * that lead to other clusters. Each is opened, used, checked and mended. It must never crash, grow without bounds, or
 * change another file; and what a repair calls whole is whole when it is looked at again.
 *
 * The images lie in memory, where syncing costs nothing.
 */
#define _GNU_SOURCE /* memfd_create */

#include "block/convert.h"
#include "block/disk.h"
#include "device_rig.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#define IMAGES 10000
#define DISK_SIZE KIB(256)
#define BASE_SIZE KIB(128)
#define USED_MAX MIB(64)  /* larger disks are opened and checked, but not used */
#define GROWTH_MAX MIB(4) /* what the uses below may allocate */

static const struct kind {
    u32 cluster;
    unsigned version;
    bool backing, compressed, zstd;
} kinds[] = {
    {.cluster = 512, .version = 3},
    {.cluster = 512, .version = 2},
    {.cluster = 4096, .version = 3},
    {.cluster = 65536, .version = 3},
    {.cluster = 4096, .version = 3, .backing = true},
    {.cluster = 512, .version = 2, .backing = true},
    {.cluster = 4096, .version = 3, .compressed = true},
    {.cluster = 512, .version = 2, .compressed = true},
    {.cluster = 4096, .version = 3, .compressed = true, .zstd = true},
};

struct image {
    u8 *bytes;
    size_t size;
};

static u8 pattern[DISK_SIZE];
static char base_path[64];
static int base_fd;

/* A file in memory, and the path by which it can be opened. */
static int memory_file(const void *bytes, size_t size, char path[64])
{
    int fd = memfd_create("image", MFD_CLOEXEC);

    assert_true(fd >= 0);
    assert_int_equal(write(fd, bytes, size), size);
    snprintf(path, 64, "/proc/self/fd/%d", fd);
    return fd;
}

static void no_progress(void *opaque, u64 done, u64 total)
{
}

/* Data with holes, which half of the compressed ones make smaller. */
static void make_pattern(void)
{
    u64 seed = 5;

    for (u64 i = 0; i < DISK_SIZE; i += 8) {
        u64 word = i / KIB(8) % 3 == 1 ? 0 : i / KIB(16) % 2 ? i / 64 : rig_random(&seed);

        memcpy(pattern + i, &word, 8);
    }
}

static struct disk *open_image(const char *path, const char *format, struct error *err)
{
    struct disk_options options = {.format = format};

    return disk_open(path, &options, err);
}

static void fill_image(struct disk *im, const struct kind *kind)
{
    char path[64];
    int fd = memory_file(pattern, sizeof(pattern), path);
    struct error err = {0};
    struct disk *from = open_image(path, "raw", &err);

    assert_int_equal(disk_copy(from, im, kind->backing, kind->compressed, no_progress, NULL, &err),
                     0);
    disk_close(from);
    close(fd);
    /* Entries of the other kinds: zero with and without a cluster, absent. */
    assert_int_equal(im->ops->zero(im, KIB(64), KIB(8), false), 0);
    assert_int_equal(im->ops->zero(im, KIB(80), KIB(8), true), 0);
    assert_int_equal(im->ops->discard(im, KIB(96), KIB(8)), 0);
}

static struct image make_image(const struct kind *kind)
{
    struct disk_create create = {
        .format = "qcow2",
        .size = DISK_SIZE,
        .size_given = true,
        .cluster_size = kind->cluster,
        .version = kind->version,
        .zstd = kind->zstd,
        .backing = kind->backing ? base_path : NULL,
        .backing_format = "raw",
        .replace = true,
    };
    struct image image;
    struct error err = {0};
    struct disk *im;
    struct stat st;
    char path[64];
    int fd = memory_file("", 0, path);

    if (disk_create(path, &create, &err))
        fail_msg("%s", err.text);
    im = open_image(path, "qcow2", &err);
    if (!im)
        fail_msg("%s", err.text);
    fill_image(im, kind);
    assert_int_equal(disk_close(im), 0);
    assert_int_equal(fstat(fd, &st), 0);
    image.size = (size_t)st.st_size;
    image.bytes = malloc(image.size);
    assert_int_equal(pread(fd, image.bytes, image.size, 0), image.size);
    close(fd);
    return image;
}

/* An entry of a table, as it could be: flags, and a place in the file or just outside. */
static void put_entry(u8 *at, size_t size, u64 *seed)
{
    static const u64 flags[] = {0,      BIT(63),          BIT(62),
                                BIT(0), BIT(63) | BIT(0), BIT(62) | 5ULL << 54};
    u64 r = rig_random(seed);
    u64 entry = (r >> 8) % (size + KIB(64)) / (r & 1 ? 1 : 512) * (r & 1 ? 1 : 512) |
                flags[(r >> 40) % ARRAY_SIZE(flags)];

    for (unsigned i = 0; i < 8; i++)
        at[i] = (u8)(entry >> (56 - 8 * i));
}

static void mutate(u8 *bytes, size_t size, u32 cluster, u64 *seed)
{
    for (unsigned n = 1 + rig_random(seed) % 6; n; n--) {
        u64 r = rig_random(seed);

        switch (r % 4) {
        case 0: /* the header, behind the magic number */
            bytes[4 + (r >> 8) % 108] = (u8)(r >> 50);
            break;
        case 1: /* the beginnings of the first clusters, where tables are */
            bytes[MIN((r >> 8) % 8 * cluster + (r >> 20) % 64, size - 1)] = (u8)(r >> 50);
            break;
        case 2:
            put_entry(bytes + (r >> 8) % (size - 8) / 8 * 8, size, seed);
            break;
        default:
            bytes[(r >> 8) % size] = (u8)(r >> 50);
            break;
        }
    }
}

static void use(struct disk *im, u64 *seed)
{
    static u8 buf[KIB(32)];
    struct error err = {0};

    for (unsigned i = 0; i < 8 && im->size; i++) {
        u64 r = rig_random(seed), at = (r >> 8) % im->size / 512 * 512;
        u64 len = MIN(im->size - at, (1 + (r >> 40) % 64) * 512), end = at + len;
        enum disk_status status;

        switch (r % 8) {
        case 0:
        case 1:
            disk_read(im, at, buf, len);
            break;
        case 2:
        case 3:
            disk_write(im, at, buf, len);
            break;
        case 4:
            im->ops->zero(im, at, len, r >> 60 & 1);
            break;
        case 5:
            im->ops->discard(im, at, len);
            break;
        case 6:
            im->ops->status(im, at, &end, &status);
            break;
        default:
            im->ops->flush(im);
            break;
        }
    }
    if (rig_random(seed) % 16 == 0)
        im->ops->resize(im, MIB(1) + rig_random(seed) % 64 * 512, &err);
    if (rig_random(seed) % 16 == 0)
        im->ops->empty(im);
}

/* Whether a check finds it whole; mends it first if that is wanted. */
static bool is_whole(const char *path, bool repair)
{
    struct disk_options options = {
        .format = "qcow2", .read_only = !repair, .repair = repair, .no_backing = true};
    struct disk_check result;
    struct error err = {0};
    struct disk *im = disk_open(path, &options, &err);
    bool whole;

    if (!im)
        return false;
    whole = im->ops->check(im, repair, &result, &err) == 0 &&
            result.corruptions + result.leaks <= result.repaired;
    return disk_close(im) == 0 && whole;
}

/* Returns whether the image could be opened. */
static bool try_image(const struct image *image, unsigned round, u64 *seed)
{
    struct error err = {0};
    struct disk *im;
    struct stat st;
    char path[64];
    int fd = memory_file(image->bytes, image->size, path);
    bool opened;

    im = open_image(path, "qcow2", &err);
    opened = im != NULL;
    if (opened) {
        if (im->size <= USED_MAX)
            use(im, seed);
        disk_close(im);
    } else if (err.class != ERROR_INPUT || !err.text[0] || strchr(err.text, '\n')) {
        fail_msg("image %u: %s", round, err.text);
    }
    if (is_whole(path, true) && !is_whole(path, false))
        fail_msg("image %u: what was mended is not whole", round);
    assert_int_equal(fstat(fd, &st), 0);
    if ((size_t)st.st_size > image->size + GROWTH_MAX)
        fail_msg("image %u: grew to %lld bytes", round, (long long)st.st_size);
    close(fd);
    return opened;
}

static void check_base(void)
{
    u8 *bytes = malloc(BASE_SIZE);
    struct stat st;

    assert_int_equal(fstat(base_fd, &st), 0);
    assert_int_equal(st.st_size, BASE_SIZE);
    assert_int_equal(pread(base_fd, bytes, BASE_SIZE, 0), BASE_SIZE);
    assert_memory_equal(bytes, pattern, BASE_SIZE);
    free(bytes);
}

static void damaged_images_do_no_harm(void **state)
{
    unsigned opened = 0;

    for (unsigned k = 0; k < ARRAY_SIZE(kinds); k++) {
        struct image good = make_image(&kinds[k]), bad = {malloc(good.size), good.size};
        u64 seed = 2024 + k;

        for (unsigned round = k; round < IMAGES; round += ARRAY_SIZE(kinds)) {
            memcpy(bad.bytes, good.bytes, good.size);
            mutate(bad.bytes, bad.size, kinds[k].cluster, &seed);
            opened += try_image(&bad, round, &seed);
        }
        free(good.bytes);
        free(bad.bytes);
    }
    check_base();
    /* Else the header alone would be what is tested. */
    assert_true(opened > IMAGES / 4);
}

static int setup(void **state)
{
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC);

    /* Each corrupt image is told on stderr, thousands of them; what fails here is told on stdout (TAP). */
    if (null < 0 || dup2(null, STDERR_FILENO) < 0 || close(null) < 0)
        return -1;
    make_pattern();
    base_fd = memory_file(pattern, BASE_SIZE, base_path);
    return 0;
}

static int teardown(void **state)
{
    return close(base_fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(damaged_images_do_no_harm),
    };
    return cmocka_run_group_tests_name("qcow2_mutated", tests, setup, teardown);
}
