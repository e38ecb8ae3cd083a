/*
 * The state stream: what is written is read back, and whatever else comes is refused by name.
 */
#include "state/stream.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>

#define HEADER_SIZE 40
#define AT_INSTANCE 24
#define AT_VERSION 28
#define AT_LENGTH 32

struct lamp {
    u32 colour;
    bool lit;
};

static int lamp_loaded(void *obj, struct error *err)
{
    const struct lamp *lamp = obj;

    return lamp->colour > 0xffffff ? error_input(err, "lamp: no such colour") : 0;
}

static const struct state_field lamp_fields[] = {
    STATE_FIELD(struct lamp, colour),
    STATE_FIELD(struct lamp, lit),
};
static const struct state_desc lamp_state = {
    .name = "lamp",
    .version = 3,
    .struct_size = sizeof(struct lamp),
    .fields = lamp_fields,
    .nfields = ARRAY_SIZE(lamp_fields),
    .loaded = lamp_loaded,
};

static const struct lamp red = {0xff0000, true}, dark = {0x00ff00, false};

/* Two lamps, and a section of bytes. */
static struct state_writer write_three(void)
{
    struct state_writer w = {0};
    struct error err;

    state_write_section(&w, &lamp_state, 0, &red);
    state_write_section(&w, &lamp_state, 1, &dark);
    state_write_begin(&w, "bytes", 0, 1);
    state_write_bytes(&w, "one", 3);
    state_write_bytes(&w, NULL, 0);
    state_write_bytes(&w, "two", 3);
    state_write_end(&w);
    assert_int_equal(state_writer_finish(&w, &err), 0);
    return w;
}

/* Reads them; the number of sections that were right. */
static unsigned read_three(const u8 *data, size_t len, struct lamp lamps[2], struct error *err)
{
    struct state_reader r = {.data = data, .len = len};
    struct state_section bytes;

    for (u32 i = 0; i < 2; i++)
        if (state_read_section(&r, &lamp_state, i, &lamps[i], err) < 0)
            return i;
    if (state_read_begin(&r, "bytes", 0, 1, &bytes, err) < 0)
        return 2;
    assert_true(bytes.len <= len);
    return state_read_end(&r, err) < 0 ? 3 : 4;
}

/* What the reader says of the three sections once the byte at `at` is `value`. */
static void expect_refusal(size_t at, u8 value, unsigned right, const char *text)
{
    struct state_writer w = write_three();
    struct lamp lamps[2] = {{1, true}, {2, true}};
    struct error err = {0};

    w.data[at] = value;
    assert_int_equal(read_three(w.data, w.len, lamps, &err), right);
    assert_int_equal(err.class, ERROR_INPUT);
    if (!strstr(err.text, text))
        fail_msg("'%s' doesn't tell of '%s'", err.text, text);
    assert_null(strchr(err.text, '\n'));
    /* What was refused was not stored. */
    if (right < 2)
        assert_int_equal(lamps[right].colour, right + 1);
    state_writer_free(&w);
}

static void test_round_trip(void **state)
{
    struct state_writer w = write_three();
    struct lamp lamps[2] = {{0}};
    struct error err = {0};

    assert_int_equal(w.len, 3 * HEADER_SIZE + 5 + 5 + 6);
    assert_int_equal(read_three(w.data, w.len, lamps, &err), 4);
    assert_int_equal(lamps[0].colour, red.colour);
    assert_true(lamps[0].lit);
    assert_int_equal(lamps[1].colour, dark.colour);
    assert_false(lamps[1].lit);
    assert_memory_equal(w.data + w.len - 6, "onetwo", 6);
    state_writer_free(&w);
    assert_null(w.data);
}

static void test_many_sections_grow_the_stream(void **state)
{
    struct state_writer w = {0};
    struct state_reader r;
    struct error err = {0};

    for (u32 i = 0; i < 10000; i++)
        state_write_section(&w, &lamp_state, i, &(struct lamp){i, i & 1});
    assert_int_equal(state_writer_finish(&w, &err), 0);
    r = (struct state_reader){.data = w.data, .len = w.len};
    for (u32 i = 0; i < 10000; i++) {
        struct lamp lamp = {0};

        assert_int_equal(state_read_section(&r, &lamp_state, i, &lamp, &err), 0);
        assert_int_equal(lamp.colour, i);
    }
    assert_int_equal(state_read_end(&r, &err), 0);
    state_writer_free(&w);
}

static void test_other_section_is_named(void **state)
{
    expect_refusal(0, 'd', 0, "section damp.0 where lamp.0");
    expect_refusal(4, 's', 0, "section lamps.0 where lamp.0");
    expect_refusal(AT_INSTANCE, 7, 0, "section lamp.7 where lamp.0");
    /* The second is gone: out of order. */
    expect_refusal(HEADER_SIZE + 5 + AT_INSTANCE, 0, 1, "section lamp.0 where lamp.1");
}

static void test_unprintable_name_is_not_shown(void **state)
{
    expect_refusal(1, '\n', 0, "damaged where section lamp.0");
    expect_refusal(1, 0x9b, 0, "damaged where section lamp.0");
}

static void test_other_version_is_refused(void **state)
{
    expect_refusal(AT_VERSION, 4, 0, "lamp.0 is of version 4, and this doppel reads 3");
}

static void test_wrong_lengths_are_refused(void **state)
{
    expect_refusal(AT_LENGTH, 4, 0, "lamp.0");
    expect_refusal(AT_LENGTH, 6, 0, "lamp.0");
    expect_refusal(AT_LENGTH + 7, 0xff, 0, "lamp.0 is cut short");
    expect_refusal(2 * (HEADER_SIZE + 5) + AT_LENGTH, 7, 2, "bytes.0 is cut short");
}

static void test_wrong_values_are_refused(void **state)
{
    expect_refusal(HEADER_SIZE + 4, 2, 0, "state section lamp.0: ");
    expect_refusal(HEADER_SIZE + 3, 1, 0, "state section lamp.0: lamp: no such colour");
}

static void test_every_cut_is_refused(void **state)
{
    struct state_writer w = write_three();

    for (size_t len = 0; len < w.len; len++) {
        /* A block of its own, so that AddressSanitizer sees its end. */
        u8 *data = malloc(len ? len : 1);
        struct lamp lamps[2];
        struct error err = {0};

        memcpy(data, w.data, len);
        assert_true(read_three(data, len, lamps, &err) < 3);
        assert_int_equal(err.class, ERROR_INPUT);
        free(data);
    }
    state_writer_free(&w);
}

static void test_more_at_the_end_is_refused(void **state)
{
    struct state_writer w = write_three();
    struct lamp lamps[2];
    struct error err = {0};

    state_write_bytes(&w, "x", 1);
    assert_int_equal(read_three(w.data, w.len, lamps, &err), 3);
    assert_non_null(strstr(err.text, "after its last section"));
    w.len--;
    state_write_section(&w, &lamp_state, 9, &red);
    assert_int_equal(read_three(w.data, w.len, lamps, &err), 3);
    assert_non_null(strstr(err.text, "lamp.9"));
    state_writer_free(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_many_sections_grow_the_stream),
        cmocka_unit_test(test_other_section_is_named),
        cmocka_unit_test(test_unprintable_name_is_not_shown),
        cmocka_unit_test(test_other_version_is_refused),
        cmocka_unit_test(test_wrong_lengths_are_refused),
        cmocka_unit_test(test_wrong_values_are_refused),
        cmocka_unit_test(test_every_cut_is_refused),
        cmocka_unit_test(test_more_at_the_end_is_refused),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
