/*
 * Libraries that are loaded when they are needed: what is found, and what is said of what isn't.
 */
#include "host/library.h"
#include "host/types.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static double (*cosine)(double);
static void *nothing;

static void symbols_are_found(void **state)
{
    const struct library_symbol symbols[] = {{"cos", (void **)&cosine}};
    struct error err;

    assert_int_equal(library_load("libm.so.6", symbols, ARRAY_SIZE(symbols), &err), 0);
    assert_true(cosine(0) == 1);
}

static void what_is_missing_is_named(void **state)
{
    const struct library_symbol symbols[] = {{"cos", (void **)&cosine}, {"cosine_of", &nothing}};
    struct error err;

    assert_int_equal(library_load("libm.so.6", symbols, ARRAY_SIZE(symbols), &err), -ENOENT);
    assert_non_null(strstr(err.text, "cosine_of"));
    assert_int_equal(library_load("libmissing.so.9", symbols, 1, &err), -ENOENT);
    assert_non_null(strstr(err.text, "libmissing.so.9"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(symbols_are_found),
        cmocka_unit_test(what_is_missing_is_named),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
