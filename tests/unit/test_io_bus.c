#include "bus/io.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <pthread.h>

#define MMIO_LIMIT (1ULL << 40)

/* A device that answers with its own address's bytes and notes what it was asked. */
struct device {
    struct io_range range;
    unsigned naccesses;
    struct {
        u64 offset, value;
        unsigned size;
    } access[16];
};

static struct io_bus *bus;
static struct error err;

static u64 device_read(void *opaque, u64 offset, unsigned size)
{
    struct device *d = opaque;
    u64 value = 0;

    assert_true(offset + size <= d->range.size);
    for (unsigned i = 0; i < size; i++)
        value |= ((d->range.base + offset + i) & 0xff) << (i * 8);
    d->access[d->naccesses].offset = offset;
    d->access[d->naccesses++].size = size;
    return value | (size < 8 ? UINT64_MAX << (size * 8) : 0); /* a device may leave dirt above */
}

static void device_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct device *d = opaque;

    assert_true(offset + size <= d->range.size);
    d->access[d->naccesses].offset = offset;
    d->access[d->naccesses].value = value;
    d->access[d->naccesses++].size = size;
}

static const struct io_ops ops_any = {device_read, device_write, 0};
static const struct io_ops ops_byte = {device_read, device_write, 1};
static const struct io_ops ops_long = {device_read, device_write, 4};

static void add(struct device *d, const char *name, u64 base, u64 size, const struct io_ops *ops)
{
    *d = (struct device){
        .range = {.name = name, .base = base, .size = size, .ops = ops, .opaque = d}};
    assert_int_equal(io_bus_add(bus, &d->range, &err), 0);
}

static int setup(void **state)
{
    bus = io_bus_create("test", MMIO_LIMIT, &err);
    return bus ? 0 : -1;
}

static int teardown(void **state)
{
    io_bus_destroy(bus);
    return 0;
}

static void the_access_reaches_its_range_and_no_other(void **state)
{
    struct device a, b;

    add(&b, "b", 0x2000, 0x100, &ops_any);
    add(&a, "a", 0x1000, 0x1000, &ops_any);
    assert_int_equal(io_bus_read(bus, 0x1ff8, 8), 0xfffefdfcfbfaf9f8);
    assert_int_equal(io_bus_read(bus, 0x2000, 4), 0x03020100);
    assert_int_equal(a.naccesses, 1);
    assert_int_equal(b.naccesses, 1);
    assert_int_equal(a.access[0].offset, 0xff8);
    io_bus_write(bus, 0x20ff, 0xff12, 1);
    assert_int_equal(b.access[1].offset, 0xff);
    assert_int_equal(b.access[1].value, 0x12);
}

static void unclaimed_addresses_read_all_ones(void **state)
{
    struct device a;

    add(&a, "a", 0x1000, 0x10, &ops_any);
    assert_int_equal(io_bus_read(bus, 0, 1), 0xff);
    assert_int_equal(io_bus_read(bus, 0xffe, 2), 0xffff);
    assert_int_equal(io_bus_read(bus, 0x1010, 4), 0xffffffff);
    assert_true(io_bus_read(bus, MMIO_LIMIT - 8, 8) == UINT64_MAX);
    assert_true(io_bus_read(bus, MMIO_LIMIT - 4, 8) == UINT64_MAX);
    assert_true(io_bus_read(bus, MMIO_LIMIT, 8) == UINT64_MAX);
    assert_true(io_bus_read(bus, UINT64_MAX, 8) == UINT64_MAX);
    io_bus_write(bus, UINT64_MAX, 0, 8);
    io_bus_write(bus, 0x1010, 0, 8);
    assert_int_equal(a.naccesses, 0);
}

static void wide_accesses_are_split_low_address_first(void **state)
{
    struct device d;

    add(&d, "d", 0x1000, 0x10, &ops_byte);
    assert_int_equal(io_bus_read(bus, 0x1002, 4), 0x05040302);
    assert_int_equal(d.naccesses, 4);
    for (unsigned i = 0; i < 4; i++) {
        assert_int_equal(d.access[i].offset, 2 + i);
        assert_int_equal(d.access[i].size, 1);
    }
    d.naccesses = 0;
    io_bus_write(bus, 0x1000, 0x8877665544332211, 8);
    assert_int_equal(d.naccesses, 8);
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(d.access[i].value, 0x11 * (i + 1));
}

static void a_range_gets_its_widest_access_whole(void **state)
{
    struct device d;

    add(&d, "d", 0x1000, 0x10, &ops_long);
    io_bus_write(bus, 0x1000, 0x1122334455667788, 8);
    assert_int_equal(d.naccesses, 2);
    assert_int_equal(d.access[0].value, 0x55667788);
    assert_int_equal(d.access[1].value, 0x11223344);
    assert_int_equal(d.access[1].offset, 4);
}

static void accesses_across_an_end_are_split_there(void **state)
{
    struct device a, b;

    add(&a, "a", 0x1000, 0x3, &ops_any);
    add(&b, "b", 0x1004, 0x10, &ops_any);
    /* a has the first three bytes, nobody the fourth. */
    assert_true(io_bus_read(bus, 0x1000, 8) == 0x07060504ff020100);
    assert_int_equal(a.naccesses, 2);
    assert_int_equal(a.access[0].size, 2);
    assert_int_equal(a.access[1].size, 1);
    assert_int_equal(b.naccesses, 1);
    assert_int_equal(b.access[0].size, 4);
    assert_int_equal(io_bus_read(bus, 0xfff, 2), 0x00ff);
    io_bus_write(bus, 0x1012, 0xaabbccdd, 4);
    assert_int_equal(b.access[1].value, 0xccdd);
    assert_int_equal(b.naccesses, 2);
}

static void overlaps_are_refused_by_name(void **state)
{
    static const struct {
        u64 base, size;
    } bad[] = {{0x1000, 0x10}, {0xfff, 2},      {0x100f, 1},
               {0x1008, 2},    {0, MMIO_LIMIT}, {0x1010, 0x1000}};
    struct device a, b, c;

    add(&a, "first", 0x1000, 0x10, &ops_any);
    add(&b, "second", 0x1800, 0x10, &ops_any);
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        c = (struct device){.range = {"third", bad[i].base, bad[i].size, &ops_any, &c}};
        assert_int_equal(io_bus_add(bus, &c.range, &err), -EEXIST);
        assert_non_null(strstr(err.text, "third"));
    }
    assert_non_null(strstr(err.text, "second"));
}

static void ranges_outside_of_the_bus_are_refused(void **state)
{
    static const struct {
        u64 base, size;
    } bad[] = {{0, 0}, {MMIO_LIMIT, 1}, {MMIO_LIMIT - 1, 2}, {1, UINT64_MAX}, {UINT64_MAX, 1}};
    struct device d;

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        d = (struct device){.range = {"d", bad[i].base, bad[i].size, &ops_any, &d}};
        assert_int_equal(io_bus_add(bus, &d.range, &err), -EINVAL);
    }
    add(&d, "d", 0, MMIO_LIMIT, &ops_any);
}

static void a_removed_range_is_gone_and_its_place_free(void **state)
{
    struct device a, b;

    add(&a, "a", 0x1000, 0x10, &ops_any);
    io_bus_remove(bus, &a.range);
    io_bus_remove(bus, &a.range);
    assert_int_equal(io_bus_read(bus, 0x1000, 1), 0xff);
    assert_int_equal(a.naccesses, 0);
    add(&b, "b", 0x1000, 0x10, &ops_any);
    assert_int_equal(io_bus_read(bus, 0x1001, 1), 0x01);
}

#define MANY 500

static void many_ranges_are_all_found(void **state)
{
    static struct device many[MANY];

    for (unsigned i = 0; i < MANY; i++) {
        unsigned at = i * 7 % MANY; /* in no order */

        add(&many[at], "one of many", 0x10000 + at * 0x20ULL, 0x10, &ops_any);
    }
    for (unsigned i = 0; i < MANY; i++) {
        assert_int_equal(io_bus_read(bus, 0x1000f + i * 0x20ULL, 1), (0xf + i * 0x20) & 0xff);
        assert_int_equal(io_bus_read(bus, 0x10010 + i * 0x20ULL, 1), 0xff);
        assert_int_equal(many[i].naccesses, 1);
    }
}

/* ---- threads ---- */

static atomic_bool done;

static u64 constant_read(void *opaque, u64 offset, unsigned size)
{
    return *(u8 *)opaque;
}

static void constant_write(void *opaque, u64 offset, u64 value, unsigned size)
{
}

static const struct io_ops ops_constant = {constant_read, constant_write, 0};

/* The range at 0x8000 stays; others come and go around it. */
static void *look_up(void *opaque)
{
    uintptr_t wrong = 0;

    while (!done) {
        u64 moving = io_bus_read(bus, 0x4000, 1);

        wrong += io_bus_read(bus, 0x8000, 1) != 0x42;
        wrong += moving != 0x17 && moving != 0xff;
    }
    return (void *)wrong;
}

static void lookups_are_right_while_ranges_come_and_go(void **state)
{
    u8 fixed_value = 0x42, moving_value = 0x17;
    struct io_range fixed = {"fixed", 0x8000, 1, &ops_constant, &fixed_value};
    struct io_range moving[80];
    pthread_t readers[2];
    void *wrong;

    assert_int_equal(io_bus_add(bus, &fixed, &err), 0);
    done = false;
    for (unsigned i = 0; i < ARRAY_SIZE(readers); i++)
        pthread_create(&readers[i], NULL, look_up, NULL);
    for (unsigned round = 0; round < 30; round++) {
        for (unsigned i = 0; i < ARRAY_SIZE(moving); i++) {
            moving[i] =
                (struct io_range){"moving", 0x4000 + i * 2, 1, &ops_constant, &moving_value};
            assert_int_equal(io_bus_add(bus, &moving[i], &err), 0);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(moving); i++)
            io_bus_remove(bus, &moving[i]);
    }
    done = true;
    for (unsigned i = 0; i < ARRAY_SIZE(readers); i++) {
        pthread_join(readers[i], &wrong);
        assert_null(wrong);
    }
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(the_access_reaches_its_range_and_no_other),
        TEST(unclaimed_addresses_read_all_ones),
        TEST(wide_accesses_are_split_low_address_first),
        TEST(a_range_gets_its_widest_access_whole),
        TEST(accesses_across_an_end_are_split_there),
        TEST(overlaps_are_refused_by_name),
        TEST(ranges_outside_of_the_bus_are_refused),
        TEST(a_removed_range_is_gone_and_its_place_free),
        TEST(many_ranges_are_all_found),
        TEST(lookups_are_right_while_ranges_come_and_go),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
