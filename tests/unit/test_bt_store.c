/*
 * The store of translations: what is got was put, whole and under that key, whoever puts at the same time; memory is
 * bounded, and the oldest goes first.
 */
#include "engine/soft/bt/store.h"

#include "bus/memory.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SIZE MIB(1)
#define ROOM 8192
#define THREADS 4
#define TURNS 20000
#define KEYS 256 /* of four pages */
#define BROKEN SIZE_MAX

static int setup(void **state)
{
    struct error err;

    *state = bt_store_create(SIZE, &err);
    return *state ? 0 : -1;
}

static int teardown(void **state)
{
    bt_store_destroy(*state);
    return 0;
}

static struct bt_store_key key(u64 n)
{
    return (struct bt_store_key){.gpa = n * 64, .mode = 1};
}

/* A record of two parts that is `size` bytes of `fill`. */
static void put(struct bt_store *s, const struct bt_store_key *k, u8 fill, size_t size)
{
    u8 bytes[ROOM];

    memset(bytes, fill, size);
    bt_store_put(s, k, (const struct iovec[]){{bytes, size / 2}, {bytes, size - size / 2}}, 2);
}

/* What is there: its size and what it is filled with; 0: nothing; BROKEN: not the same from end to end. */
static size_t get(struct bt_store *s, const struct bt_store_key *k, u8 *fill)
{
    u8 bytes[ROOM] = {0};
    size_t size = bt_store_get(s, k, bytes, sizeof(bytes));

    *fill = bytes[0];
    for (size_t n = 1; n < size; n++)
        if (bytes[n] != *fill)
            return BROKEN;
    return size;
}

static void what_was_put_is_got(void **state)
{
    struct bt_store_key a = key(1), b = a, c = a, d = a;
    u8 fill;

    b.page = 0x7000;
    c.mode = 2;
    d.gpa2 = 0x2000;
    assert_int_equal(get(*state, &a, &fill), 0);
    put(*state, &a, 'a', 100);
    put(*state, &b, 'b', 1000);
    put(*state, &c, 'c', 1);
    put(*state, &d, 'd', 64);
    assert_int_equal(get(*state, &a, &fill), 100);
    assert_int_equal(fill, 'a');
    assert_int_equal(get(*state, &b, &fill), 1000);
    assert_int_equal(fill, 'b');
    assert_int_equal(get(*state, &c, &fill), 1);
    assert_int_equal(fill, 'c');
    assert_int_equal(get(*state, &d, &fill), 64);
    assert_int_equal(fill, 'd');
}

static void the_last_one_counts(void **state)
{
    struct bt_store_key k = key(1);
    u8 fill;

    put(*state, &k, 1, 500);
    put(*state, &k, 2, 10);
    assert_int_equal(get(*state, &k, &fill), 10);
    assert_int_equal(fill, 2);
}

static void what_does_not_fit_is_not_there(void **state)
{
    struct bt_store_key k = key(1);
    u8 *large = calloc(1, SIZE), small[99];

    put(*state, &k, 1, 100);
    assert_int_equal(bt_store_get(*state, &k, small, sizeof(small)), 0);
    bt_store_put(*state, &k, &(const struct iovec){large, SIZE}, 1);
    free(large);
}

/* Of one page, so of one shard, which is a sixteenth of all. */
static void the_oldest_make_room(void **state)
{
    unsigned there = 0;
    u8 fill;

    for (unsigned n = 0; n < 64; n++) {
        struct bt_store_key k = key(n);

        put(*state, &k, (u8)n, 4000 + n); /* of varying size: what is left at the end is, too */
    }
    for (unsigned n = 0; n < 64; n++) {
        struct bt_store_key k = key(n);
        size_t size = get(*state, &k, &fill);

        if (size) {
            assert_int_equal(size, 4000 + n);
            assert_int_equal(fill, n);
            there++;
        } else {
            assert_int_equal(there, 0); /* those behind the first that is there are there */
        }
    }
    assert_in_range(there, 10, SIZE / 16 / 4000);
    assert_in_range(bt_store_bytes(*state), there * 4000, SIZE / 16);
}

/* Returns NULL if each record is as it was put, by whomever. */
static void *put_and_get(void *opaque)
{
    struct bt_store *s = opaque;
    u32 random = 1;

    for (unsigned turn = 0; turn < TURNS; turn++) {
        unsigned n = (random = random * 1664525 + 1013904223) >> 16;
        struct bt_store_key k = key(n % KEYS);
        size_t size = 0;
        u8 fill;

        if (n & 0x8000)
            put(s, &k, (u8)(n % KEYS), n % 999 + 1);
        else
            size = get(s, &k, &fill);
        if (size == BROKEN || (size && fill != (u8)(n % KEYS)))
            return opaque;
    }
    return NULL;
}

static void many_at_once(void **state)
{
    pthread_t threads[THREADS];
    void *wrong;

    for (unsigned n = 0; n < THREADS; n++)
        assert_int_equal(pthread_create(&threads[n], NULL, put_and_get, *state), 0);
    for (unsigned n = 0; n < THREADS; n++) {
        assert_int_equal(pthread_join(threads[n], &wrong), 0);
        assert_null(wrong);
    }
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(what_was_put_is_got),  TEST(the_last_one_counts), TEST(what_does_not_fit_is_not_there),
        TEST(the_oldest_make_room), TEST(many_at_once),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
