/*
 * The host's side of vsock: what programs say and hear, and what the guest is sent, packet by
 * packet.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "host/event_loop.h"
#include "net/vsock.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CID 7
#define GUEST_BUFFER 4096

enum { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

struct fixture {
    struct event_loop *loop;
    struct vsock *v;
    char folder[64], path[80];
    unsigned ready;
    /* The last packet for the guest. */
    struct vsock_header h;
    u8 payload[VSOCK_PAYLOAD_MAX];
};

static void ready(void *opaque)
{
    struct fixture *f = opaque;

    f->ready++;
}

static void stop(void *opaque)
{
    event_loop_stop(opaque);
}

static void run(struct fixture *f)
{
    for (unsigned i = 0; i < 3; i++) {
        event_loop_post(f->loop, stop, f->loop);
        event_loop_run(f->loop);
    }
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct error err = {0};
    char spec[128];

    strcpy(f->folder, "/tmp/doppel-vsock.XXXXXX");
    assert_non_null(mkdtemp(f->folder));
    snprintf(f->path, sizeof(f->path), "%s/v", f->folder);
    f->loop = event_loop_create(&err);
    snprintf(spec, sizeof(spec), "cid=%d,path=%s", CID, f->path);
    f->v = vsock_open(spec, f->loop, &err);
    if (!f->v)
        fail_msg("%s", err.text);
    vsock_attach(f->v, ready, f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    int ret;

    vsock_close(f->v);
    event_loop_destroy(f->loop);
    ret = rmdir(f->folder); /* the socket is gone */
    free(f);
    return ret;
}

/* The next packet for the guest: its operation, or 0. */
static unsigned next(struct fixture *f)
{
    run(f);
    if (!vsock_to_guest(f->v, &f->h, f->payload, sizeof(f->payload)))
        return 0;
    assert_int_equal(f->h.src_cid, VSOCK_CID_HOST);
    assert_int_equal(f->h.dst_cid, CID);
    return f->h.op;
}

static void say(struct fixture *f, u32 guest_port, u32 host_port, u16 op, u32 flags, u32 fwd_cnt,
                const void *data, u32 len)
{
    struct vsock_header h = {
        .src_cid = CID,
        .dst_cid = VSOCK_CID_HOST,
        .src_port = guest_port,
        .dst_port = host_port,
        .len = len,
        .type = 1,
        .op = op,
        .flags = flags,
        .buf_alloc = GUEST_BUFFER,
        .fwd_cnt = fwd_cnt,
    };

    vsock_from_guest(f->v, &h, data);
    run(f);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, path);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    return fd;
}

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strcpy(address.sun_path, path);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(fd, 4), 0);
    return fd;
}

static void put(int fd, const char *text)
{
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
}

static void expect(int fd, const char *text)
{
    char buf[256] = "";

    assert_int_equal(recv(fd, buf, sizeof(buf) - 1, MSG_DONTWAIT), strlen(text));
    assert_string_equal(buf, text);
}

static void expect_end(int fd)
{
    char byte;

    assert_int_equal(recv(fd, &byte, 1, MSG_DONTWAIT), 0);
}

/* A program that is connected to the guest's port 52; *port is the host's side. */
static int connected(struct fixture *f, u32 *port)
{
    int fd = connect_to(f->path);
    char ok[32];

    put(fd, "CONNECT 52\n");
    assert_int_equal(next(f), REQUEST);
    assert_int_equal(f->h.dst_port, 52);
    assert_int_equal(f->h.type, 1);
    *port = f->h.src_port;
    say(f, 52, *port, RESPONSE, 0, 0, NULL, 0);
    snprintf(ok, sizeof(ok), "OK %u\n", *port);
    expect(fd, ok);
    return fd;
}

static void test_host_connects(void **state)
{
    struct fixture *f = *state;
    u32 port, other;
    int fd = connected(f, &port), second = connected(f, &other);

    assert_int_not_equal(port, other);
    put(fd, "to the guest");
    assert_int_equal(next(f), RW);
    assert_int_equal(f->h.len, 12);
    assert_memory_equal(f->payload, "to the guest", 12);
    assert_true(f->ready > 0);
    say(f, 52, port, RW, 0, 12, "and back", 8);
    expect(fd, "and back");
    /* The program says no more, but listens. */
    shutdown(fd, SHUT_WR);
    assert_int_equal(next(f), SHUTDOWN);
    assert_int_equal(f->h.flags, 2);
    assert_int_equal(next(f), 0);
    say(f, 52, port, RW, 0, 12, "last words", 10);
    expect(fd, "last words");
    say(f, 52, port, SHUTDOWN, 3, 12, NULL, 0);
    expect_end(fd);
    assert_int_equal(next(f), RST);
    close(fd);
    close(second);
}

static void test_commands(void **state)
{
    static const char *const bad[] = {
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT -1\n",
        "connect 52\n",
        "\n",
        "CONNECT 52 \n",
        "CONNECT 1111111111111111111111111111111111111111",
    };
    struct fixture *f = *state;
    int fd;

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char byte;
        ssize_t n;

        fd = connect_to(f->path);
        put(fd, bad[i]);
        assert_int_equal(next(f), 0);
        n = recv(fd, &byte, 1, MSG_DONTWAIT); /* with bytes left unread the end is a reset */
        assert_true(n == 0 || (n < 0 && errno == ECONNRESET));
        close(fd);
    }
    /* In pieces, and with the guest's first bytes right behind. */
    fd = connect_to(f->path);
    put(fd, "CONN");
    assert_int_equal(next(f), 0);
    put(fd, "ECT 4294967295\nfirst");
    assert_int_equal(next(f), REQUEST);
    assert_int_equal(f->h.dst_port, 4294967295U);
    assert_int_equal(next(f), 0);
    say(f, 4294967295U, f->h.src_port, RESPONSE, 0, 0, NULL, 0);
    assert_int_equal(next(f), RW);
    assert_memory_equal(f->payload, "first", 5);
    close(fd);
}

static void test_a_refusal_closes(void **state)
{
    struct fixture *f = *state;
    int fd = connect_to(f->path);

    put(fd, "CONNECT 9\n");
    assert_int_equal(next(f), REQUEST);
    say(f, 9, f->h.src_port, RST, 0, 0, NULL, 0);
    expect_end(fd);
    close(fd);
}

static void test_guest_connects(void **state)
{
    struct fixture *f = *state;
    char path[128];
    int listener, fd;

    /* Nobody listens. */
    say(f, 1000, 81, REQUEST, 0, 0, NULL, 0);
    assert_int_equal(next(f), RST);
    assert_int_equal(f->h.src_port, 81);
    assert_int_equal(f->h.dst_port, 1000);

    snprintf(path, sizeof(path), "%s_80", f->path);
    listener = listen_at(path);
    say(f, 1000, 80, REQUEST, 0, 0, NULL, 0);
    assert_int_equal(next(f), RESPONSE);
    fd = accept(listener, NULL, NULL);
    say(f, 1000, 80, RW, 0, 0, "GET", 3);
    expect(fd, "GET");
    close(fd);
    assert_int_equal(next(f), SHUTDOWN);
    say(f, 1000, 80, SHUTDOWN, 3, 0, NULL, 0);
    assert_int_equal(next(f), RST);
    close(listener);
    unlink(path);
}

static void test_credit_of_the_guest(void **state)
{
    struct fixture *f = *state;
    static u8 data[3 * GUEST_BUFFER];
    size_t total = 0;
    u32 port;
    int fd = connected(f, &port);

    assert_int_equal(write(fd, data, sizeof(data)), sizeof(data));
    while (next(f) == RW)
        total += f->h.len;
    assert_int_equal(total, GUEST_BUFFER);
    say(f, 52, port, CREDIT_UPDATE, 0, 100, NULL, 0);
    assert_int_equal(next(f), RW);
    assert_int_equal(f->h.len, 100);
    assert_int_equal(next(f), 0);
    /* What can't be: it has taken more than it was sent. */
    say(f, 52, port, CREDIT_UPDATE, 0, 0xffff0000, NULL, 0);
    assert_int_equal(next(f), 0);
    close(fd);
}

static void test_credit_of_ours(void **state)
{
    struct fixture *f = *state;
    static u8 data[16384];
    u32 port, alloc, sent = 0;
    int fd = connected(f, &port), size = 4096;

    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    say(f, 52, port, CREDIT_REQUEST, 0, 0, NULL, 0);
    assert_int_equal(next(f), CREDIT_UPDATE);
    alloc = f->h.buf_alloc;
    /* The program reads nothing: all that we gave credit for is taken, */
    for (;;) {
        say(f, 52, port, CREDIT_REQUEST, 0, 0, NULL, 0);
        assert_int_equal(next(f), CREDIT_UPDATE);
        if (alloc - (sent - f->h.fwd_cnt) < sizeof(data))
            break;
        say(f, 52, port, RW, 0, 0, data, sizeof(data));
        sent += sizeof(data);
    }
    assert_true(sent >= alloc);
    /* reading makes room, of which the guest hears by itself, */
    for (unsigned i = 0; i < 64; i++) {
        ssize_t n = recv(fd, data, sizeof(data), MSG_DONTWAIT);

        assert_true(n > 0 || errno == EAGAIN);
        run(f);
    }
    assert_int_equal(next(f), CREDIT_UPDATE);
    assert_int_equal(f->h.fwd_cnt, sent);
    /* and more than was given ends the stream. */
    for (unsigned i = 0; next(f) != RST; i++) {
        assert_true(i < 100);
        say(f, 52, port, RW, 0, 0, data, sizeof(data));
    }
    close(fd);
}

static void test_a_hostile_guest(void **state)
{
    struct fixture *f = *state;
    struct vsock_header h = {.src_cid = CID + 1, .dst_cid = 2, .type = 1, .op = RW};
    u32 port;
    int fd;

    vsock_from_guest(f->v, &h, NULL); /* in another's name */
    assert_int_equal(next(f), 0);
    for (u16 op = 0; op < 20; op++) {
        say(f, 1, 2, op, 3, 0, "x", 1);
        if (op != RST)
            assert_int_equal(next(f), RST);
        assert_int_equal(next(f), 0);
    }
    /* Answers to many are not kept for all of them. */
    for (unsigned i = 0; i < 10000; i++) {
        h = (struct vsock_header){.src_cid = CID, .dst_cid = 2, .src_port = i, .type = 2, .op = RW};
        vsock_from_guest(f->v, &h, NULL);
    }
    for (unsigned i = 0; next(f); i++)
        assert_true(i < 1000);
    /* An answer before the question. */
    fd = connect_to(f->path);
    put(fd, "CONNECT 5\n");
    run(f);
    say(f, 5, 0x40000000, RESPONSE, 0, 0, NULL, 0);
    expect_end(fd);
    assert_int_equal(next(f), 0);
    close(fd);
    /* Each operation on a stream that is there, and once more when it isn't. */
    for (u16 op = 0; op < 20; op++) {
        fd = connected(f, &port);
        say(f, 52, port, op, 3, 0, "x", 1);
        say(f, 52, port, op, 3, 0, "x", 1);
        close(fd);
        for (unsigned i = 0; next(f); i++)
            assert_true(i < 10);
        say(f, 52, port, RST, 0, 0, NULL, 0);
        assert_int_equal(next(f), 0);
    }
    fd = connected(f, &port);
    vsock_reset(f->v);
    expect_end(fd);
    assert_int_equal(next(f), 0);
    close(fd);
}

static void test_options(void **state)
{
    static const char *const bad[] = {
        "",
        "cid=3",
        "path=x",
        "cid=2,path=x",
        "cid=4294967295,path=x",
        "cid=3x,path=x",
        "cid=3,path=",
        "cid=3,path=x,path=y",
        "cid=3,path=x,port=1",
        "cid=3,path=/nowhere/x",
    };

    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        struct fixture *f = *state;
        struct error err = {0};

        if (vsock_open(bad[i], f->loop, &err))
            fail_msg("'%s' was taken", bad[i]);
        assert_int_equal(err.class, ERROR_INPUT);
    }
}

int main(void)
{
#define TEST(t) cmocka_unit_test_setup_teardown(t, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_host_connects),   TEST(test_commands),       TEST(test_a_refusal_closes),
        TEST(test_guest_connects),  TEST(test_credit_of_ours), TEST(test_credit_of_the_guest),
        TEST(test_a_hostile_guest), TEST(test_options),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
