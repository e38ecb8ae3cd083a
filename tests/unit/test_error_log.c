#include "host/error.h"
#include "host/log.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <unistd.h>

static void an_errors_class_and_text_say_whose_it_is(void **state)
{
    struct error err;

    assert_int_equal(error_input(&err, "no %s", "way"), -EINVAL);
    assert_int_equal(err.class, ERROR_INPUT);
    assert_string_equal(err.text, "no way");
    assert_int_equal(error_host(&err, ENOENT, "file %d", 7), -ENOENT);
    assert_int_equal(err.class, ERROR_HOST);
    assert_string_equal(err.text, "file 7: No such file or directory");
    error_prefix(&err, "disk %d", 1);
    assert_string_equal(err.text, "disk 1: file 7: No such file or directory");
}

static void an_error_is_one_line_whatever_names_hold(void **state)
{
    struct error err = {0};

    error_input(&err, "%s: is no disk", "a\nb\x1b[2J\x7f\xc3\xa4");
    assert_string_equal(err.text, "a?b?[2J?\xc3\xa4: is no disk");
    error_prefix(&err, "%s", "x\ty");
    assert_string_equal(err.text, "x?y: a?b?[2J?\xc3\xa4: is no disk");
}

static void long_errors_are_cut(void **state)
{
    struct error err;
    char text[2 * sizeof(err.text)];

    memset(text, 'x', sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    error_host(&err, ENOENT, "%s", text);
    assert_int_equal(strlen(err.text), sizeof(err.text) - 1);
    error_prefix(&err, "%s", text);
    error_prefix(&err, "first");
    assert_int_equal(strlen(err.text), sizeof(err.text) - 1);
    assert_memory_equal(err.text, "first: xxx", 10);
}

/* What a log_message writes on stderr, in a static buffer. */
static const char *logged(enum log_level level, const char *text)
{
    static char buf[4096];
    int pipe_fds[2], saved = dup(STDERR_FILENO);
    ssize_t n;

    assert_int_equal(pipe(pipe_fds), 0);
    dup2(pipe_fds[1], STDERR_FILENO);
    log_message(level, "%s", text);
    dup2(saved, STDERR_FILENO);
    close(pipe_fds[1]);
    close(saved);
    n = read(pipe_fds[0], buf, sizeof(buf) - 1);
    close(pipe_fds[0]);
    assert_true(n >= 0);
    buf[n] = '\0';
    return buf;
}

static void levels_decide_what_is_written(void **state)
{
    assert_string_equal(logged(LOG_INFO, "hello"), "doppel: info: hello\n");
    assert_string_equal(logged(LOG_DEBUG, "hello"), "");
    log_set_level(LOG_ERROR);
    assert_false(log_enabled(LOG_INFO));
    assert_string_equal(logged(LOG_INFO, "hello"), "");
    assert_string_equal(logged(LOG_WARN, "hello"), "doppel: warning: hello\n");
    log_set_level(LOG_DEBUG);
    assert_string_equal(logged(LOG_DEBUG, "hello"), "doppel: debug: hello\n");
    log_set_level(LOG_INFO);
}

static void a_long_line_is_cut_and_still_a_line(void **state)
{
    char text[3000];
    const char *line;

    memset(text, 'x', sizeof(text) - 1);
    text[sizeof(text) - 1] = '\0';
    line = logged(LOG_ERROR, text);
    assert_in_range(strlen(line), 500, 1024);
    assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
}

static void a_key_is_new_once_and_keys_are_bounded(void **state)
{
    unsigned news = 0;

    for (u64 key = 0; key < 100; key++) {
        assert_true(log_first_time(key << 32));
        assert_false(log_first_time(key << 32));
    }
    for (u64 key = 1; key < 100000; key++)
        news += log_first_time(key);
    assert_int_equal(news, 1024 - 100);
    assert_false(log_first_time(50ULL << 32));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(an_errors_class_and_text_say_whose_it_is),
        cmocka_unit_test(an_error_is_one_line_whatever_names_hold),
        cmocka_unit_test(long_errors_are_cut),
        cmocka_unit_test(levels_decide_what_is_written),
        cmocka_unit_test(a_long_line_is_cut_and_still_a_line),
        cmocka_unit_test(a_key_is_new_once_and_keys_are_bounded),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
