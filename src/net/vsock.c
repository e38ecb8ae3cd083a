/*
 * Streams of vsock.
 *
 * 1. What a stream has to tell the guest is a set of flags (`pending`); streams with any are in the
 *    list `ready_first`, in the order in which they got there. Packets are made from the flags when
 *    the guest has a buffer for one, so the guest can't make us keep packets. Answers to packets of
 *    no stream are kept, up to a number.
 * 2. Data for the guest stays in the Unix socket until the guest has both a buffer and credit
 *    (5.10.6.3). Data from the guest waits in `out`, which is as large as the credit that we give:
 *    more breaks the rules.
 * 3. A stream that ends is freed at once when the guest knows, else when the guest was told (RST).
 */
#define _GNU_SOURCE /* accept4 */
#include "net/vsock.h"

#include "host/log.h"
#include "host/unix_socket.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define TYPE_STREAM 1
enum {
    OP_REQUEST = 1,
    OP_RESPONSE = 2,
    OP_RST = 3,
    OP_SHUTDOWN = 4,
    OP_RW = 5,
    OP_CREDIT_UPDATE = 6,
    OP_CREDIT_REQUEST = 7,
};
#define SHUTDOWN_RCV 1
#define SHUTDOWN_SEND 2

#define STREAMS_MAX 1024
#define BUF_ALLOC KIB(128)
#define HOST_PORT_FIRST 0x40000000U
#define ANSWERS_MAX 64
#define COMMAND_MAX 32 /* "CONNECT 4294967295\n" */

enum state {
    STATE_COMMAND,   /* a client that hasn't said CONNECT yet */
    STATE_REQUESTED, /* the guest was asked, or will be */
    STATE_CONNECTED,
    STATE_ENDED, /* no socket any more; the guest is to be told */
};

struct stream {
    struct vsock *v;
    struct stream *next, *prev; /* all of them */
    struct stream *next_ready;
    bool is_ready; /* in the list */
    enum state state;
    struct fd_watch watch; /* fd is -1 when it is closed */
    char command[COMMAND_MAX + 1];
    unsigned command_len;
    u32 guest_port, host_port;
    u32 pending;                    /* BIT32(op) for what the guest is to be sent */
    bool readable;                  /* pending data or end in the socket; not watched then */
    bool input_ended, output_ended; /* by the host's program, by the guest */
    u32 shutdown_flags;             /* of a pending SHUTDOWN */

    /* The guest's credit for us: bytes sent, and what it said of its buffer. */
    u32 sent, peer_alloc, peer_forwarded;
    /* And ours for it: bytes passed on, and what it last heard of that. */
    u32 forwarded, told_forwarded;
    size_t out_head, out_len;
    u8 out[BUF_ALLOC];
};

struct vsock {
    struct event_loop *loop;
    char *path;
    u32 cid;
    struct fd_watch listener;
    void (*ready)(void *opaque);
    void *opaque;
    bool in_guest; /* within a call of the device's */
    struct stream *streams;
    unsigned nstreams;
    struct stream *ready_first, **ready_end;
    struct vsock_header answers[ANSWERS_MAX];
    unsigned nanswers;
    u32 next_port;
};

/* ---- what the guest is to be told ---- */

static void wake(struct vsock *v)
{
    if (!v->in_guest && v->ready && (v->ready_first || v->nanswers))
        v->ready(v->opaque);
}

static void make_ready(struct stream *s)
{
    if (s->is_ready)
        return;
    s->is_ready = true;
    s->next_ready = NULL;
    *s->v->ready_end = s;
    s->v->ready_end = &s->next_ready;
}

static void tell(struct stream *s, unsigned op)
{
    s->pending |= BIT32(op);
    make_ready(s);
}

static void unready(struct stream *s)
{
    struct stream **p = &s->v->ready_first;

    if (!s->is_ready)
        return;
    while (*p != s)
        p = &(*p)->next_ready;
    *p = s->next_ready;
    if (!*p)
        s->v->ready_end = p;
    s->is_ready = false;
}

static void answer_rst(struct vsock *v, const struct vsock_header *h)
{
    if (v->nanswers == ANSWERS_MAX)
        return;
    v->answers[v->nanswers++] = (struct vsock_header){
        .src_cid = VSOCK_CID_HOST,
        .dst_cid = v->cid,
        .src_port = h->dst_port,
        .dst_port = h->src_port,
        .type = h->type,
        .op = OP_RST,
    };
}

/* ---- the life of a stream ---- */

static void stream_ready(void *opaque, u32 events);

static struct stream *stream_create(struct vsock *v, int fd, enum state state)
{
    struct stream *s = v->nstreams < STREAMS_MAX ? calloc(1, sizeof(*s)) : NULL;

    if (!s) {
        log_once(LOG_WARN, "vsock: more than %d connections", STREAMS_MAX);
        close(fd);
        return NULL;
    }
    s->v = v;
    s->state = state;
    s->watch = (struct fd_watch){.fd = fd, .events = EPOLLIN, .ready = stream_ready, .opaque = s};
    if (event_loop_watch(v->loop, &s->watch) < 0) {
        close(fd);
        free(s);
        return NULL;
    }
    s->next = v->streams;
    if (s->next)
        s->next->prev = s;
    v->streams = s;
    v->nstreams++;
    return s;
}

static void close_socket(struct stream *s)
{
    if (s->watch.fd < 0)
        return;
    event_loop_unwatch(s->v->loop, &s->watch);
    close(s->watch.fd);
    s->watch.fd = -1;
    s->readable = false;
}

static void stream_free(struct stream *s)
{
    unready(s);
    close_socket(s);
    if (s->prev)
        s->prev->next = s->next;
    else
        s->v->streams = s->next;
    if (s->next)
        s->next->prev = s->prev;
    s->v->nstreams--;
    free(s);
}

/* The host's side is over; the guest hears it, if it knows the stream. */
static void stream_end(struct stream *s)
{
    if (s->state == STATE_COMMAND || (s->pending & BIT32(OP_REQUEST))) {
        stream_free(s);
        return;
    }
    close_socket(s);
    s->state = STATE_ENDED;
    s->pending = 0;
    tell(s, OP_RST);
}

static void update_watch(struct stream *s)
{
    u32 events = s->out_len ? EPOLLOUT : 0;

    if (s->watch.fd < 0)
        return;
    if (s->state == STATE_COMMAND ||
        (s->state == STATE_CONNECTED && !s->readable && !s->input_ended))
        events |= EPOLLIN;
    event_loop_watch_events(s->v->loop, &s->watch, events);
}

/* ---- to the host's program ---- */

/* Free credit that the guest knows of is running out. */
static bool should_update_credit(const struct stream *s)
{
    return s->forwarded - s->told_forwarded >= BUF_ALLOC / 2;
}

/* Passes on what waits. False: the program is gone, and so is the stream's socket. */
static bool flush_out(struct stream *s)
{
    while (s->out_len) {
        ssize_t n = send(s->watch.fd, s->out + s->out_head,
                         MIN(s->out_len, BUF_ALLOC - s->out_head), MSG_DONTWAIT | MSG_NOSIGNAL);

        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n < 0) {
            stream_end(s);
            return false;
        }
        s->out_head = (s->out_head + (size_t)n) % BUF_ALLOC;
        s->out_len -= (size_t)n;
        s->forwarded += (u32)n;
    }
    if (should_update_credit(s))
        tell(s, OP_CREDIT_UPDATE);
    if (!s->out_len && s->output_ended) {
        if (s->input_ended) {
            stream_end(s);
            return false;
        }
        shutdown(s->watch.fd, SHUT_WR);
    }
    update_watch(s);
    return true;
}

/* Into the ring; false: more than there is credit for. */
static bool put_out(struct stream *s, const u8 *data, size_t len)
{
    size_t at = (s->out_head + s->out_len) % BUF_ALLOC, first = MIN(len, BUF_ALLOC - at);

    if (len > BUF_ALLOC - s->out_len)
        return false;
    memcpy(s->out + at, data, first);
    memcpy(s->out, data + first, len - first);
    s->out_len += len;
    return true;
}

/* ---- clients of the host ---- */

static struct stream *find_stream(struct vsock *v, u32 guest_port, u32 host_port)
{
    for (struct stream *s = v->streams; s; s = s->next) {
        if (s->guest_port == guest_port && s->host_port == host_port && s->state != STATE_COMMAND)
            return s;
    }
    return NULL;
}

static bool parse_command(const char *text, u32 *port)
{
    unsigned long long value;
    char *end;

    if (strncmp(text, "CONNECT ", 8) != 0 || text[8] < '0' || text[8] > '9')
        return false;
    value = strtoull(text + 8, &end, 10);
    if (*end == '\r')
        end++;
    *port = (u32)value;
    return *end == '\n' && value <= UINT32_MAX;
}

/* Takes no byte beyond the line: those are the guest's. */
static void read_command(struct stream *s)
{
    while (!s->command_len || s->command[s->command_len - 1] != '\n') {
        ssize_t n;

        if (s->command_len == COMMAND_MAX) {
            stream_free(s);
            return;
        }
        n = recv(s->watch.fd, s->command + s->command_len, 1, MSG_DONTWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n <= 0) {
            stream_free(s);
            return;
        }
        s->command_len++;
    }
    if (!parse_command(s->command, &s->guest_port)) {
        stream_free(s);
        return;
    }
    do
        s->host_port = HOST_PORT_FIRST + s->v->next_port++ % HOST_PORT_FIRST;
    while (find_stream(s->v, s->guest_port, s->host_port));
    s->state = STATE_REQUESTED;
    tell(s, OP_REQUEST);
    update_watch(s);
}

static void stream_ready(void *opaque, u32 events)
{
    struct stream *s = opaque;
    struct vsock *v = s->v;

    if (s->state == STATE_COMMAND) {
        read_command(s);
    } else {
        bool there = !(events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) || !s->out_len || flush_out(s);

        if (there && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) && !s->input_ended &&
            s->state == STATE_CONNECTED) {
            s->readable = true;
            make_ready(s);
            update_watch(s);
        }
    }
    wake(v);
}

static void listener_ready(void *opaque, u32 events)
{
    struct vsock *v = opaque;
    int fd = accept4(v->listener.fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd >= 0)
        stream_create(v, fd, STATE_COMMAND);
}

/* ---- from the guest ---- */

static void request(struct vsock *v, const struct vsock_header *h)
{
    char path[sizeof(((struct sockaddr_un *)0)->sun_path) + 16];
    struct error err = {0};
    struct stream *s;
    int fd;

    snprintf(path, sizeof(path), "%s_%u", v->path, h->dst_port);
    fd = unix_socket_connect(path, &err);
    s = fd < 0 ? NULL : stream_create(v, fd, STATE_CONNECTED);
    if (!s) {
        answer_rst(v, h);
        return;
    }
    s->guest_port = h->src_port;
    s->host_port = h->dst_port;
    s->peer_alloc = h->buf_alloc;
    s->peer_forwarded = h->fwd_cnt;
    tell(s, OP_RESPONSE);
}

static void response(struct stream *s)
{
    char text[32];
    int len;

    /* Also when it answers what it wasn't asked yet. */
    if (s->state != STATE_REQUESTED || (s->pending & BIT32(OP_REQUEST))) {
        if (s->state != STATE_ENDED)
            stream_end(s);
        return;
    }
    s->state = STATE_CONNECTED;
    len = snprintf(text, sizeof(text), "OK %u\n", s->host_port);
    /* It isn't of the guest's data, whose credit counts. A socket that is new has room for it. */
    if (send(s->watch.fd, text, (size_t)len, MSG_DONTWAIT | MSG_NOSIGNAL) != len)
        stream_end(s);
    else
        update_watch(s);
}

static void data(struct stream *s, const struct vsock_header *h, const u8 *payload)
{
    if (s->state != STATE_CONNECTED || s->output_ended || !put_out(s, payload, h->len)) {
        if (s->state != STATE_ENDED)
            stream_end(s);
        return;
    }
    flush_out(s);
}

static void shut_down(struct stream *s, u32 flags)
{
    if (s->state != STATE_CONNECTED) {
        if (s->state != STATE_ENDED)
            stream_end(s);
        return;
    }
    if (flags & SHUTDOWN_RCV) {
        s->input_ended = true; /* nobody reads any more what the program says */
        s->readable = false;
    }
    if (flags & SHUTDOWN_SEND)
        s->output_ended = true;
    flush_out(s);
}

/* The guest forgot it. What it had sent still goes out, as far as the socket takes it. */
static void reset_by_guest(struct stream *s)
{
    if (s->state == STATE_CONNECTED && s->out_len) {
        s->output_ended = false;
        flush_out(s);
    }
    stream_free(s);
}

void vsock_from_guest(struct vsock *v, const struct vsock_header *h, const u8 *payload)
{
    struct stream *s;

    if (h->src_cid != v->cid || h->dst_cid != VSOCK_CID_HOST)
        return;
    v->in_guest = true;
    s = find_stream(v, h->src_port, h->dst_port);
    if (h->type != TYPE_STREAM || (!s && h->op != OP_REQUEST) || (s && h->op == OP_REQUEST)) {
        if (h->op != OP_RST)
            answer_rst(v, h);
        goto out;
    }
    if (s) {
        s->peer_alloc = h->buf_alloc;
        s->peer_forwarded = h->fwd_cnt;
        if (s->readable)
            make_ready(s); /* it may have waited for credit */
    }
    switch (h->op) {
    case OP_REQUEST:
        request(v, h);
        break;
    case OP_RESPONSE:
        response(s);
        break;
    case OP_RST:
        reset_by_guest(s);
        break;
    case OP_SHUTDOWN:
        shut_down(s, h->flags);
        break;
    case OP_RW:
        data(s, h, payload);
        break;
    case OP_CREDIT_REQUEST:
        tell(s, OP_CREDIT_UPDATE);
        break;
    case OP_CREDIT_UPDATE:
        break;
    default:
        if (s->state != STATE_ENDED)
            stream_end(s);
        break;
    }
out:
    v->in_guest = false;
}

/* ---- to the guest ---- */

static void fill_header(struct stream *s, struct vsock_header *h, u16 op)
{
    *h = (struct vsock_header){
        .src_cid = VSOCK_CID_HOST,
        .dst_cid = s->v->cid,
        .src_port = s->host_port,
        .dst_port = s->guest_port,
        .type = TYPE_STREAM,
        .op = op,
        .buf_alloc = BUF_ALLOC,
        .fwd_cnt = s->forwarded,
    };
    s->told_forwarded = s->forwarded;
    s->pending &= ~(BIT32(op) | BIT32(OP_CREDIT_UPDATE));
}

/* Data from the socket, as far as the guest has credit. False: there is none now. */
static bool take_data(struct stream *s, struct vsock_header *h, u8 *payload, size_t room)
{
    u32 used = s->sent - s->peer_forwarded;
    size_t credit = used < s->peer_alloc ? s->peer_alloc - used : 0;
    ssize_t n;

    if (!credit || !room)
        return false; /* the guest will say when it has more */
    n = recv(s->watch.fd, payload, MIN(MIN(credit, room), VSOCK_PAYLOAD_MAX), MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        s->readable = false;
        update_watch(s);
        return false;
    }
    if (n > 0) {
        fill_header(s, h, OP_RW);
        h->len = (u32)n;
        s->sent += (u32)n;
        return true;
    }
    /* The program sends no more; it may still listen. */
    s->readable = false;
    s->input_ended = true;
    update_watch(s);
    if (n < 0 || s->output_ended) {
        stream_end(s);
        return false;
    }
    fill_header(s, h, OP_SHUTDOWN);
    h->flags = SHUTDOWN_SEND;
    return true;
}

/* One packet of a stream that is not in the list now. */
static bool next_packet(struct stream *s, struct vsock_header *h, u8 *payload, size_t room)
{
    static const u16 order[] = {OP_RST, OP_REQUEST, OP_RESPONSE};
    bool any;

    for (size_t i = 0; i < ARRAY_SIZE(order); i++) {
        if (!(s->pending & BIT32(order[i])))
            continue;
        fill_header(s, h, order[i]);
        if (order[i] == OP_RST)
            stream_free(s);
        else if (s->pending || s->readable)
            make_ready(s);
        return true;
    }
    if (s->readable && take_data(s, h, payload, room)) {
        if (s->readable || s->pending)
            make_ready(s);
        return true;
    }
    any = s->pending & BIT32(OP_CREDIT_UPDATE);
    if (any)
        fill_header(s, h, OP_CREDIT_UPDATE);
    return any;
}

bool vsock_to_guest(struct vsock *v, struct vsock_header *h, u8 *payload, size_t room)
{
    bool any = false;

    v->in_guest = true;
    if (v->nanswers) {
        *h = v->answers[0];
        memmove(v->answers, v->answers + 1, --v->nanswers * sizeof(*h));
        any = true;
    }
    while (!any && v->ready_first) {
        struct stream *s = v->ready_first;

        unready(s);
        any = next_packet(s, h, payload, room);
    }
    v->in_guest = false;
    return any;
}

void vsock_reset(struct vsock *v)
{
    struct stream *next;

    for (struct stream *s = v->streams; s; s = next) {
        next = s->next;
        stream_free(s);
    }
    v->nanswers = 0;
}

/* ---- life ---- */

void vsock_attach(struct vsock *v, void (*ready)(void *opaque), void *opaque)
{
    v->ready = ready;
    v->opaque = opaque;
}

u32 vsock_cid(const struct vsock *v)
{
    return v->cid;
}

/* "cid=N,path=SOCKET", in this order or the other. */
static int parse_spec(struct vsock *v, const char *spec, struct error *err)
{
    char *text = strdup(spec), *next = text;
    int ret = 0;

    while (next && !ret) {
        char *item = strsep(&next, ","), *end;

        if (!strncmp(item, "cid=", 4)) {
            unsigned long long cid = strtoull(item + 4, &end, 10);

            if (item[4] < '0' || item[4] > '9' || *end || cid < VSOCK_CID_MIN ||
                cid > VSOCK_CID_MAX)
                ret = error_input(err, "%s: a guest's CID is a number from %u to %u", item,
                                  VSOCK_CID_MIN, VSOCK_CID_MAX);
            v->cid = (u32)cid;
        } else if (!strncmp(item, "path=", 5) && item[5] && !v->path) {
            v->path = strdup(item + 5);
        } else {
            ret = error_input(err, "'%s': give cid=N,path=SOCKET", spec);
        }
    }
    free(text);
    if (!ret && (!v->cid || !v->path))
        ret = error_input(err, "'%s': give cid=N,path=SOCKET", spec);
    return ret;
}

struct vsock *vsock_open(const char *spec, struct event_loop *loop, struct error *err)
{
    struct vsock *v = calloc(1, sizeof(*v));
    int fd, ret;

    if (!v) {
        error_host(err, ENOMEM, "vsock");
        return NULL;
    }
    v->loop = loop;
    v->listener.fd = -1;
    v->ready_end = &v->ready_first;
    if (parse_spec(v, spec, err))
        goto fail;
    fd = unix_socket_listen(v->path, 16, err);
    if (fd < 0)
        goto fail;
    v->listener =
        (struct fd_watch){.fd = fd, .events = EPOLLIN, .ready = listener_ready, .opaque = v};
    ret = event_loop_watch(loop, &v->listener);
    if (ret == 0)
        return v;
    error_host(err, -ret, "%s: cannot watch a socket", v->path);
fail:
    vsock_close(v);
    return NULL;
}

void vsock_close(struct vsock *v)
{
    if (!v)
        return;
    vsock_reset(v);
    if (v->listener.fd >= 0) {
        event_loop_unwatch(v->loop, &v->listener);
        unlink(v->path);
        close(v->listener.fd);
    }
    free(v->path);
    free(v);
}
