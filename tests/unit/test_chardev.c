#define _GNU_SOURCE /* posix_openpt, pipe2 */
#include "chardev/chardev.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static struct event_loop *loop;
static pthread_t loop_thread;
static struct chardev *chr;
static struct error err;
static char dir[32], path[64], spec[80];

/* A serial port of sorts: a small FIFO whose contents it sends back. */
static struct {
    pthread_mutex_t lock;
    u8 fifo[16];
    size_t used;
    atomic_uint writable_calls, quit_calls;
} echo;

static void echo_flush(void)
{
    size_t n = chardev_write(chr, echo.fifo, echo.used);

    memmove(echo.fifo, echo.fifo + n, echo.used - n);
    echo.used -= n;
}

static size_t echo_can_receive(void *opaque)
{
    size_t room;

    pthread_mutex_lock(&echo.lock);
    room = sizeof(echo.fifo) - echo.used;
    pthread_mutex_unlock(&echo.lock);
    return room;
}

/* It never takes all that it asked for, unless that is one character. */
static size_t echo_receive(void *opaque, const u8 *buf, size_t len)
{
    pthread_mutex_lock(&echo.lock);
    assert_true(len <= sizeof(echo.fifo) - echo.used);
    len = (len + 1) / 2;
    memcpy(echo.fifo + echo.used, buf, len);
    echo.used += len;
    echo_flush();
    pthread_mutex_unlock(&echo.lock);
    return len;
}

static void echo_writable(void *opaque)
{
    echo.writable_calls++;
    pthread_mutex_lock(&echo.lock);
    echo_flush();
    chardev_accept_input(chr);
    pthread_mutex_unlock(&echo.lock);
}

static void echo_break(void *opaque)
{
    chardev_write(chr, (const u8 *)"<break>", 7);
}

static void echo_quit(void *opaque)
{
    echo.quit_calls++;
}

static const struct chardev_handlers echo_handlers = {
    .can_receive = echo_can_receive,
    .receive = echo_receive,
    .writable = echo_writable,
    .receive_break = echo_break,
};
static const struct chardev_owner owner = {.quit = echo_quit};

static void *run(void *opaque)
{
    event_loop_run(loop);
    return NULL;
}

static int setup(void **state)
{
    memset(&echo, 0, sizeof(echo));
    pthread_mutex_init(&echo.lock, NULL);
    snprintf(dir, sizeof(dir), "/tmp/doppel-test-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(path, sizeof(path), "%s/x", dir);
    chr = NULL;
    loop = event_loop_create(&err);
    return loop ? pthread_create(&loop_thread, NULL, run, NULL) : -1;
}

static int teardown(void **state)
{
    chardev_close(chr);
    event_loop_stop(loop);
    pthread_join(loop_thread, NULL);
    event_loop_destroy(loop);
    unlink(path);
    return rmdir(dir);
}

static void open_chardev(const char *wanted)
{
    chr = chardev_open(wanted, loop, &owner, &err);
    if (!chr)
        fail_msg("%s", err.text);
}

static u8 pattern(size_t i)
{
    return (u8)(i * 2654435761u >> 13);
}

#define MANY_BYTES (1u << 20)

/* ---- none, file ---- */

static void none_swallows_everything(void **state)
{
    open_chardev("none");
    for (unsigned i = 0; i < 100; i++)
        assert_int_equal(chardev_write(chr, (const u8 *)dir, sizeof(dir)), sizeof(dir));
}

static void a_file_gets_every_character(void **state)
{
    u8 *all = malloc(MANY_BYTES);
    FILE *f;

    open_chardev(path);
    for (size_t i = 0; i < MANY_BYTES; i++)
        all[i] = pattern(i);
    for (size_t done = 0; done < MANY_BYTES;)
        done += chardev_write(chr, all + done, MIN(MANY_BYTES - done, 1000));
    chardev_close(chr);
    chr = NULL;
    memset(all, 0, MANY_BYTES);
    f = fopen(path, "r");
    assert_int_equal(fread(all, 1, MANY_BYTES, f), MANY_BYTES);
    assert_int_equal(fgetc(f), EOF);
    fclose(f);
    for (size_t i = 0; i < MANY_BYTES; i++)
        assert_int_equal(all[i], pattern(i));
    free(all);
}

static void what_cannot_be_opened_is_the_users_error(void **state)
{
    static const char *const bad[] = {
        "/nonexistent/file", "/", "", "socket=", "socket=/nonexistent/socket", "socket=/"};
    char longer[300] = "socket=/tmp/";

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        assert_null(chardev_open(bad[i], loop, NULL, &err));
        assert_int_equal(err.class, ERROR_INPUT);
    }
    memset(longer + 12, 'x', sizeof(longer) - 13);
    assert_null(chardev_open(longer, loop, NULL, &err));
    assert_int_equal(err.class, ERROR_INPUT);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_null(chardev_open(path, loop, NULL, &err)); /* nobody reads it */
    assert_int_equal(err.class, ERROR_INPUT);
}

/* Opens a FIFO whose reader is the test; returns its descriptor. */
static int open_fifo(void)
{
    int fd;

    assert_int_equal(mkfifo(path, 0600), 0);
    fd = open(path, O_RDONLY | O_NONBLOCK);
    assert_true(fd >= 0);
    open_chardev(path);
    chardev_attach(chr, &echo_handlers);
    return fd;
}

/* Writes until the stream is full for good; returns how many characters it took. */
static size_t write_until_full(void)
{
    size_t total = 0, quiet = 0;

    while (quiet < 20) {
        u8 c = pattern(total);

        if (chardev_write(chr, &c, 1) == 1) {
            total++;
            quiet = 0;
        } else {
            quiet++;
            usleep(2000);
        }
    }
    return total;
}

static void a_blocked_sink_loses_nothing_and_says_when_it_goes_on(void **state)
{
    int fd = open_fifo();
    size_t total = write_until_full();
    unsigned calls = echo.writable_calls;
    struct pollfd wait = {.fd = fd, .events = POLLIN};

    for (size_t i = 0; i < total;) {
        u8 buf[4096];
        ssize_t n;

        assert_int_equal(poll(&wait, 1, 5000), 1);
        n = read(fd, buf, sizeof(buf));
        assert_true(n > 0);
        for (ssize_t j = 0; j < n; j++, i++)
            assert_int_equal(buf[j], pattern(i));
    }
    for (unsigned i = 0; i < 2000 && echo.writable_calls == calls; i++)
        usleep(1000);
    assert_int_equal(echo.writable_calls, calls + 1);
    close(fd);
}

static void closing_does_not_wait_for_a_blocked_sink_for_ever(void **state)
{
    int fd = open_fifo();
    u64 before = host_clock_ns();

    write_until_full();
    chardev_close(chr);
    chr = NULL;
    assert_true(host_clock_ns() - before < 10 * NS_PER_SEC);
    close(fd);
}

static void a_sink_that_went_away_swallows_the_rest(void **state)
{
    close(open_fifo());
    for (unsigned i = 0; i < 200; i++) {
        assert_int_equal(chardev_write(chr, (const u8 *)dir, sizeof(dir)), sizeof(dir));
        usleep(100);
    }
}

/* ---- socket ---- */

static int connect_client(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    memcpy(address.sun_path, path, strlen(path));
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static void open_socket(void)
{
    snprintf(spec, sizeof(spec), "socket=%s", path);
    open_chardev(spec);
    chardev_attach(chr, &echo_handlers);
}

static void *send_many(void *opaque)
{
    int fd = *(int *)opaque;
    u8 buf[700];

    for (size_t i = 0; i < MANY_BYTES;) {
        size_t n = MIN(sizeof(buf), MANY_BYTES - i);

        for (size_t j = 0; j < n; j++)
            buf[j] = pattern(i + j);
        assert_int_equal(send(fd, buf, n, 0), n);
        i += n;
    }
    return NULL;
}

static void expect(int fd, const char *wanted)
{
    char buf[256] = {0};
    size_t got = 0;
    struct pollfd wait = {.fd = fd, .events = POLLIN};

    while (got < strlen(wanted)) {
        ssize_t n;

        assert_int_equal(poll(&wait, 1, 5000), 1);
        n = read(fd, buf + got, strlen(wanted) - got);
        assert_true(n > 0);
        got += (size_t)n;
    }
    assert_string_equal(buf, wanted);
}

static void a_megabyte_goes_through_a_small_fifo_and_back(void **state)
{
    pthread_t sender;
    int fd;

    open_socket();
    fd = connect_client();
    pthread_create(&sender, NULL, send_many, &fd);
    for (size_t i = 0; i < MANY_BYTES;) {
        u8 buf[3000];
        ssize_t n = read(fd, buf, sizeof(buf));

        assert_true(n > 0);
        for (ssize_t j = 0; j < n; j++, i++)
            assert_int_equal(buf[j], pattern(i));
    }
    pthread_join(sender, NULL);
    close(fd);
}

static void the_next_client_is_served_when_the_last_has_gone(void **state)
{
    int first, second;

    open_socket();
    first = connect_client();
    second = connect_client();
    assert_int_equal(send(second, "two", 3, 0), 3);
    assert_int_equal(send(first, "one", 3, 0), 3);
    expect(first, "one");
    close(first);
    expect(second, "two");
    close(second);
    for (unsigned i = 0; i < 5; i++) {
        first = connect_client();
        assert_int_equal(send(first, "again", 5, 0), 5);
        expect(first, "again");
        close(first);
    }
}

static void a_client_that_only_stopped_sending_still_gets_output(void **state)
{
    int fd;

    open_socket();
    fd = connect_client();
    assert_int_equal(send(fd, "hello", 5, 0), 5);
    shutdown(fd, SHUT_WR);
    expect(fd, "hello");
    usleep(20000);
    assert_int_equal(chardev_write(chr, (const u8 *)"more", 4), 4);
    expect(fd, "more");
    close(fd);
}

static void a_detached_stream_keeps_input_for_the_next_device(void **state)
{
    int fd;

    open_socket();
    chardev_attach(chr, NULL);
    fd = connect_client();
    assert_int_equal(send(fd, "early", 5, 0), 5);
    usleep(20000);
    chardev_attach(chr, &echo_handlers);
    expect(fd, "early");
    close(fd);
}

static void a_stale_socket_is_replaced_but_a_live_one_is_not(void **state)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    memcpy(address.sun_path, path, strlen(path));
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    close(fd);
    open_socket();
    assert_null(chardev_open(spec, loop, NULL, &err));
    assert_int_equal(err.class, ERROR_INPUT);
    fd = connect_client();
    assert_int_equal(send(fd, "x", 1, 0), 1);
    expect(fd, "x");
    close(fd);
}

/* ---- stdio: in a child, whose stdin and stdout are ours ---- */

static int terminal, terminal_slave; /* the test's end, and the child's */

/* The child: echoes until Ctrl-A x. */
static void stdio_child(int in, int out)
{
    dup2(in, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    loop = event_loop_create(&err);
    chr = chardev_open("stdio", loop, &owner, &err);
    if (!chr || chardev_open("stdio", loop, &owner, &err))
        _exit(1);
    chardev_attach(chr, &echo_handlers);
    pthread_create(&loop_thread, NULL, run, NULL);
    while (!echo.quit_calls)
        usleep(1000);
    chardev_close(chr);
    _exit(42);
}

static pid_t start_on_terminal(struct termios *before)
{
    pid_t pid;

    terminal = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    assert_true(terminal >= 0);
    assert_int_equal(grantpt(terminal), 0);
    assert_int_equal(unlockpt(terminal), 0);
    terminal_slave = open(ptsname(terminal), O_RDWR | O_NOCTTY | O_CLOEXEC);
    assert_true(terminal_slave >= 0);
    assert_int_equal(tcgetattr(terminal_slave, before), 0);
    pid = fork();
    if (pid == 0)
        stdio_child(terminal_slave, terminal_slave);
    for (unsigned i = 0; i < 5000; i++) {
        struct termios now;

        tcgetattr(terminal_slave, &now);
        if (!(now.c_lflag & ICANON))
            return pid;
        usleep(1000);
    }
    fail_msg("the terminal did not become raw");
    return pid;
}

static int end_on_terminal(pid_t pid, const struct termios *before)
{
    struct termios now;
    int status;

    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(tcgetattr(terminal_slave, &now), 0);
    assert_int_equal(now.c_lflag, before->c_lflag);
    assert_int_equal(now.c_iflag, before->c_iflag);
    assert_int_equal(now.c_oflag, before->c_oflag);
    close(terminal);
    close(terminal_slave);
    return status;
}

static void type(const char *keys, size_t n)
{
    assert_int_equal(write(terminal, keys, n), n);
}

static void keys_reach_the_guest_but_for_the_escape(void **state)
{
    struct termios before;
    pid_t pid = start_on_terminal(&before);
    int status;

    type("ls\r\003\004", 5);
    expect(terminal, "ls\r\003\004");
    type("\001a\001\001\001zb", 7);
    expect(terminal, "\001\001b");
    type("\001bh", 3);
    expect(terminal, "<break>h");
    type("\001h", 2);
    expect(terminal, "\r\nCtrl-A x  end the VM\r\n");
    type("\001x", 2);
    status = end_on_terminal(pid, &before);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 42);
}

static void a_fatal_signal_restores_the_terminal(void **state)
{
    struct termios before;
    pid_t pid = start_on_terminal(&before);
    int status;

    kill(pid, SIGTERM);
    status = end_on_terminal(pid, &before);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGTERM);
}

static void pipes_carry_every_byte_and_end_quietly(void **state)
{
    int to[2], from[2];
    pid_t pid;

    assert_int_equal(pipe2(to, O_CLOEXEC), 0);
    assert_int_equal(pipe2(from, O_CLOEXEC), 0);
    pid = fork();
    if (pid == 0)
        stdio_child(to[0], from[1]);
    close(to[0]);
    close(from[1]);
    assert_int_equal(write(to[1], "a\001x\001h\n", 6), 6);
    close(to[1]);
    expect(from[0], "a\001x\001h\n");
    assert_int_equal(fcntl(from[0], F_GETFL) & O_NONBLOCK, 0);
    assert_int_equal(waitpid(pid, NULL, WNOHANG), 0);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(from[0]);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        /* These fork: no thread is there yet. */
        cmocka_unit_test(keys_reach_the_guest_but_for_the_escape),
        cmocka_unit_test(a_fatal_signal_restores_the_terminal),
        cmocka_unit_test(pipes_carry_every_byte_and_end_quietly),
        TEST(none_swallows_everything),
        TEST(a_file_gets_every_character),
        TEST(what_cannot_be_opened_is_the_users_error),
        TEST(a_blocked_sink_loses_nothing_and_says_when_it_goes_on),
        TEST(closing_does_not_wait_for_a_blocked_sink_for_ever),
        TEST(a_sink_that_went_away_swallows_the_rest),
        TEST(a_megabyte_goes_through_a_small_fifo_and_back),
        TEST(the_next_client_is_served_when_the_last_has_gone),
        TEST(a_client_that_only_stopped_sending_still_gets_output),
        TEST(a_detached_stream_keeps_input_for_the_next_device),
        TEST(a_stale_socket_is_replaced_but_a_live_one_is_not),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
