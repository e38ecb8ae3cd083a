/* Parallel flash: reading, programming, erasing, what reaches the file, state. */
#include "device_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#include "device/pflash.h"

#define BASE 0xffc00000ULL
#define SIZE (4 * PFLASH_BLOCK)

static FILE *file;

static struct device *create(struct rig *r)
{
    static u8 data[SIZE];
    struct pflash_config config = {.base = BASE, .data = data, .size = SIZE, .fd = fileno(file)};

    memset(data, 0xff, sizeof(data));
    data[0] = 0x5a;
    return pflash_device(pflash_create(&r->env, &config, &r->err));
}

static struct rig *rig;
static struct device *dev;

static int setup(void **state)
{
    file = tmpfile();
    rig = rig_create();
    dev = create(rig);
    return file && dev ? 0 : -1;
}

static int teardown(void **state)
{
    dev->ops->destroy(dev);
    rig_destroy(rig);
    fclose(file);
    return 0;
}

static u64 rd(u32 offset, unsigned size)
{
    return io_bus_read(rig->env.mmio, BASE + offset, size);
}

static void wr(u32 offset, u8 value)
{
    io_bus_write(rig->env.mmio, BASE + offset, value, 1);
}

static int in_file(long offset)
{
    u8 byte;

    return pread(fileno(file), &byte, 1, offset) == 1 ? byte : -1;
}

static void reads_as_memory(void **state)
{
    assert_int_equal(rd(0, 1), 0x5a);
    assert_int_equal(rd(0, 8), 0xffffffffffffff5aULL);
}

static void firmware_finds_a_flash_chip(void **state)
{
    wr(0, 0x50);
    assert_int_equal(rd(0, 1), 0x5a);
    wr(0, 0x70);
    assert_int_equal(rd(0, 1), 0x00);
    wr(0, 0xff);
    assert_int_equal(rd(0, 1), 0x5a);
    wr(0, 0x98);
    assert_int_equal(rd(0x10, 1), 'Q');
    assert_int_equal(rd(0x2d, 1), SIZE / PFLASH_BLOCK - 1);
    wr(0, 0x90);
    assert_int_equal(rd(0, 1), 0x89);
}

static void programming_clears_bits_and_erasing_sets_them(void **state)
{
    wr(100, 0x10);
    wr(100, 0x3c);
    assert_int_equal(rd(100, 1), 0x80);
    wr(100, 0x40);
    wr(100, 0xf0);
    wr(0, 0xff);
    assert_int_equal(rd(100, 1), 0x30);
    assert_int_equal(in_file(100), 0x30);
    wr(100, 0x20);
    wr(100, 0xd0);
    wr(0, 0xff);
    assert_int_equal(rd(100, 1), 0xff);
    assert_int_equal(rd(0, 1), 0xff); /* the same block */
    assert_int_equal(in_file(100), 0xff);
}

static void an_erase_that_is_not_confirmed_fails(void **state)
{
    wr(0, 0x20);
    wr(0, 0x00);
    assert_int_equal(rd(0, 1), 0xb0);
    wr(0, 0xff);
    assert_int_equal(rd(0, 1), 0x5a);
}

static void buffers_are_programmed_at_once(void **state)
{
    wr(4096, 0xe8);
    assert_int_equal(rd(4096, 1) & 0x80, 0x80);
    wr(4096, 1);
    wr(4100, 0x12);
    wr(4101, 0x34);
    wr(0, 0xff);
    assert_int_equal(rd(4100, 1) & 0x30, 0x30); /* status: that was no confirmation */
    wr(4096, 0x50);
    assert_int_equal(rd(4100, 1), 0xff);
    wr(4096, 0xe8);
    wr(4096, 1);
    wr(4100, 0x12);
    wr(4101, 0x34);
    wr(4096, 0xd0);
    wr(0, 0xff);
    assert_int_equal(rd(4100, 2), 0x3412);
    assert_int_equal(in_file(4101), 0x34);
}

static void state_moves(void **state)
{
    static const u8 commands[] = {0x10, 0x20, 0x40, 0x50, 0x60, 0x70,
                                  0x90, 0x98, 0xd0, 0xe8, 0xff, 3};
    u64 seed = 3;
    char where[128];

    for (unsigned round = 0; round < 40; round++) {
        struct rig *other = rig_create();
        struct device *to;

        for (unsigned i = 0; i < 200; i++) {
            u64 x = rig_random(&seed);

            wr(x >> 20 & (SIZE - 1), commands[x % ARRAY_SIZE(commands)]);
        }
        to = create(other);
        const char *wrong = rig_round_trip(rig, dev, to, where, sizeof(where));

        if (wrong)
            fail_msg("%s", wrong);
        to->ops->destroy(to);
        rig_destroy(other);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(reads_as_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(firmware_finds_a_flash_chip, setup, teardown),
        cmocka_unit_test_setup_teardown(programming_clears_bits_and_erasing_sets_them, setup,
                                        teardown),
        cmocka_unit_test_setup_teardown(an_erase_that_is_not_confirmed_fails, setup, teardown),
        cmocka_unit_test_setup_teardown(buffers_are_programmed_at_once, setup, teardown),
        cmocka_unit_test_setup_teardown(state_moves, setup, teardown),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
