/*
 * User networking: libslirp speaks TCP/IP with the guest, and sockets with the host. No root.
 *
 * libslirp wants to be asked which descriptors to poll and to be told which are ready, as a program
 * with a loop around poll() would. Our loop has watches, so each descriptor gets one, and:
 *
 *  1. Whatever may change what libslirp wants (a packet from the guest, a timer, its own work) arms
 *     `work`, which runs in the loop's next round: once for many packets.
 *  2. `work` tells libslirp of what the watches collected, then asks it anew and sets watches and
 *     the timer accordingly.
 *  3. While the guest has no room for packets, `work` lets libslirp rest, and the watches: what the
 *     host's sockets have for the guest stays there.
 *  4. Segments for a guest that takes large ones are merged until libslirp is done for now
 *     (merge.h).
 */
#include "host/library.h"
#include "host/log.h"
#include "net/backend.h"
#include "net/merge.h"
#include "net/offload.h"

#include <arpa/inet.h>
#include <errno.h>
#include <slirp/libslirp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/stat.h>

#define NS_PER_MS 1000000ULL

#define SLIRP_SYMBOLS(X)                                                                           \
    X(slirp_add_hostfwd)                                                                           \
    X(slirp_cleanup)                                                                               \
    X(slirp_handle_timer)                                                                          \
    X(slirp_input)                                                                                 \
    X(slirp_new)                                                                                   \
    X(slirp_pollfds_fill)                                                                          \
    X(slirp_pollfds_poll)

static struct {
#define MEMBER(name) __typeof__(name) *name;
    SLIRP_SYMBOLS(MEMBER)
#undef MEMBER
} library;

static const struct library_symbol symbols[] = {
#define SYMBOL(name) {#name, (void **)&library.name},
    SLIRP_SYMBOLS(SYMBOL)
#undef SYMBOL
};

struct user_fd {
    struct user_net *net;
    struct fd_watch watch;
    u32 wanted, ready; /* EPOLL* */
};

struct user_net {
    struct net_backend b;
    Slirp *slirp;
    struct user_fd **fds; /* by number; NULL: not watched */
    size_t nfds;
    struct host_timer work, timeout;
    bool closing;
    u8 packet[NET_PACKET_MAX]; /* of the guest's, on its way */
    struct net_merge merge;    /* for the guest */
    _Atomic u32 takes;         /* NET_TAKES_* */
};

struct user_timer {
    struct user_net *net;
    struct host_timer timer;
    SlirpTimerId id;
    void *opaque;
};

static struct user_net *user_of(struct net_backend *b)
{
    return container_of(b, struct user_net, b);
}

static void work_soon(struct user_net *n)
{
    if (!n->closing)
        event_loop_timer_arm(n->b.loop, &n->work, 0);
}

static void flush_merge(struct user_net *n)
{
    struct net_offload offload;

    if (!n->merge.segments)
        return;
    net_merge_finish(&n->merge, &offload);
    net_deliver(&n->b, 0, &offload, n->merge.packet, n->merge.len);
}

/* ---- descriptors ---- */

static void fd_ready(void *opaque, u32 events)
{
    struct user_fd *f = opaque;

    f->ready |= events;
    work_soon(f->net);
}

static void fd_forget(struct user_net *n, int fd)
{
    if (fd < 0 || (size_t)fd >= n->nfds || !n->fds[fd])
        return;
    event_loop_unwatch(n->b.loop, &n->fds[fd]->watch);
    free(n->fds[fd]);
    n->fds[fd] = NULL;
}

static bool fds_reserve(struct user_net *n, int fd)
{
    size_t wanted = MAX((size_t)fd + 1, 2 * n->nfds);
    struct user_fd **fds;

    if ((size_t)fd < n->nfds)
        return true;
    fds = realloc(n->fds, wanted * sizeof(*fds));
    if (!fds)
        return false;
    memset(fds + n->nfds, 0, (wanted - n->nfds) * sizeof(*fds));
    n->fds = fds;
    n->nfds = wanted;
    return true;
}

static struct user_fd *fd_find(struct user_net *n, int fd)
{
    struct user_fd *f;

    if (fd < 0 || !fds_reserve(n, fd))
        return NULL;
    if (n->fds[fd])
        return n->fds[fd];
    f = calloc(1, sizeof(*f));
    if (!f)
        return NULL;
    f->net = n;
    f->watch = (struct fd_watch){.fd = fd, .ready = fd_ready, .opaque = f};
    if (event_loop_watch(n->b.loop, &f->watch) < 0) {
        free(f);
        return NULL;
    }
    n->fds[fd] = f;
    return f;
}

/* The watches' events have the values of poll()'s, and so do libslirp's by other numbers. */
static const struct {
    int slirp;
    u32 epoll;
} poll_bits[] = {
    {SLIRP_POLL_IN, EPOLLIN},   {SLIRP_POLL_OUT, EPOLLOUT}, {SLIRP_POLL_PRI, EPOLLPRI},
    {SLIRP_POLL_ERR, EPOLLERR}, {SLIRP_POLL_HUP, EPOLLHUP},
};

static int add_poll(int fd, int events, void *opaque)
{
    struct user_fd *f = fd_find(opaque, fd);

    if (!f)
        return -1;
    for (size_t i = 0; i < ARRAY_SIZE(poll_bits); i++)
        f->wanted |= events & poll_bits[i].slirp ? poll_bits[i].epoll : 0;
    return fd;
}

static int get_revents(int fd, void *opaque)
{
    struct user_net *n = opaque;
    int events = 0;

    if (fd < 0 || (size_t)fd >= n->nfds || !n->fds[fd])
        return 0;
    for (size_t i = 0; i < ARRAY_SIZE(poll_bits); i++)
        events |= n->fds[fd]->ready & poll_bits[i].epoll ? poll_bits[i].slirp : 0;
    return events;
}

/* Asks libslirp what to wait for. */
static void fill(struct user_net *n)
{
    u32 timeout = UINT32_MAX;

    for (size_t i = 0; i < n->nfds; i++) {
        if (n->fds[i])
            n->fds[i]->wanted = n->fds[i]->ready = 0;
    }
    library.slirp_pollfds_fill(n->slirp, &timeout, add_poll, n);
    for (size_t i = 0; i < n->nfds; i++) {
        if (n->fds[i] &&
            event_loop_watch_events(n->b.loop, &n->fds[i]->watch, n->fds[i]->wanted) < 0)
            log_once(LOG_WARN, "user network: cannot watch a socket");
    }
    if (timeout == UINT32_MAX)
        event_loop_timer_cancel(n->b.loop, &n->timeout);
    else
        event_loop_timer_arm(n->b.loop, &n->timeout, host_clock_ns() + timeout * NS_PER_MS);
}

static void rest(struct user_net *n)
{
    event_loop_timer_cancel(n->b.loop, &n->timeout);
    for (size_t i = 0; i < n->nfds; i++) {
        if (n->fds[i])
            event_loop_watch_events(n->b.loop, &n->fds[i]->watch, 0);
    }
}

static void work(void *opaque)
{
    struct user_net *n = opaque;

    if (!net_may_deliver(&n->b, 0)) {
        rest(n);
        return;
    }
    library.slirp_pollfds_poll(n->slirp, 0, get_revents, n);
    flush_merge(n);
    fill(n);
}

/* ---- what libslirp calls ---- */

static ssize_t send_packet(const void *buf, size_t len, void *opaque)
{
    static const struct net_offload offload = {.flags = NET_DATA_VALID};
    struct user_net *n = opaque;

    if (n->takes & NET_TAKES_TSO4) {
        if (net_merge_add(&n->merge, buf, len))
            return (ssize_t)len;
        flush_merge(n);
        if (net_merge_add(&n->merge, buf, len))
            return (ssize_t)len;
    }
    net_deliver(&n->b, 0, &offload, buf, len);
    return (ssize_t)len;
}

static void guest_error(const char *msg, void *opaque)
{
    log_debug("user network: %s", msg);
}

static int64_t clock_get_ns(void *opaque)
{
    return (int64_t)host_clock_ns();
}

static void timer_fire(void *opaque)
{
    struct user_timer *t = opaque;
    struct user_net *n = t->net;

    library.slirp_handle_timer(n->slirp, t->id, t->opaque);
    flush_merge(n);
    work_soon(n);
}

static void *timer_new(SlirpTimerId id, void *timer_opaque, void *opaque)
{
    struct user_timer *t = calloc(1, sizeof(*t));

    if (!t)
        return NULL;
    t->net = opaque;
    t->id = id;
    t->opaque = timer_opaque;
    t->timer = (struct host_timer){.fire = timer_fire, .opaque = t};
    return t;
}

static void timer_free(void *timer, void *opaque)
{
    struct user_net *n = opaque;
    struct user_timer *t = timer;

    if (!t)
        return;
    event_loop_timer_remove(n->b.loop, &t->timer);
    free(t);
}

static void timer_mod(void *timer, int64_t expire_ms, void *opaque)
{
    struct user_net *n = opaque;
    struct user_timer *t = timer;

    if (t)
        event_loop_timer_arm(n->b.loop, &t->timer, expire_ms > 0 ? (u64)expire_ms * NS_PER_MS : 0);
}

static void register_poll_fd(int fd, void *opaque)
{
    work_soon(opaque);
}

/* Before it is closed: its number may be another's soon. */
static void unregister_poll_fd(int fd, void *opaque)
{
    fd_forget(opaque, fd);
}

static void notify(void *opaque)
{
    work_soon(opaque);
}

static const SlirpCb callbacks = {
    .send_packet = send_packet,
    .guest_error = guest_error,
    .clock_get_ns = clock_get_ns,
    .timer_new_opaque = timer_new,
    .timer_free = timer_free,
    .timer_mod = timer_mod,
    .register_poll_fd = register_poll_fd,
    .unregister_poll_fd = unregister_poll_fd,
    .notify = notify,
};

/* ---- the backend ---- */

static int user_send(struct net_backend *b, unsigned queue, const struct net_offload *o,
                     const struct iovec *iov, unsigned n, size_t len)
{
    struct user_net *u = user_of(b);

    net_gather(iov, n, u->packet, len);
    if (!net_offload_is_sane(o, u->packet, len))
        return 0;
    /* libslirp takes segments of any length. */
    if (o->gso_type == NET_GSO_NONE)
        net_fill_checksum(o, u->packet, len);
    else if (!net_join_segments(o, u->packet, len))
        return 0;
    library.slirp_input(u->slirp, u->packet, (int)len);
    flush_merge(u);
    work_soon(u);
    return 0;
}

static void user_resume(struct net_backend *b, unsigned queue)
{
    work_soon(user_of(b));
}

static void user_set_offloads(struct net_backend *b, u32 takes)
{
    user_of(b)->takes = takes;
}

static void user_close(struct net_backend *b)
{
    struct user_net *n = user_of(b);

    n->closing = true;
    if (n->slirp)
        library.slirp_cleanup(n->slirp);
    for (size_t i = 0; i < n->nfds; i++)
        fd_forget(n, (int)i);
    event_loop_timer_remove(b->loop, &n->work);
    event_loop_timer_remove(b->loop, &n->timeout);
    net_backend_fini(b);
    free(n->fds);
    free(n);
}

static const struct net_backend_ops user_ops = {
    .send = user_send,
    .resume = user_resume,
    .set_offloads = user_set_offloads,
    .close = user_close,
};

/* ---- options ---- */

/* "ADDRESS:PORT" up to `end`; an empty address leaves *address as it is. */
static bool parse_endpoint(const char *text, const char *end, struct in_addr *address, int *port)
{
    const char *colon = memchr(text, ':', (size_t)(end - text));
    char host[INET_ADDRSTRLEN] = "", number[6] = "", *rest_of_it;
    long value;

    if (!colon || colon - text >= (long)sizeof(host) || end - colon - 1 >= (long)sizeof(number))
        return false;
    memcpy(host, text, (size_t)(colon - text));
    memcpy(number, colon + 1, (size_t)(end - colon - 1));
    value = strtol(number, &rest_of_it, 10);
    if (number[0] < '0' || number[0] > '9' || *rest_of_it || value < 1 || value > 65535)
        return false;
    *port = (int)value;
    return !host[0] || inet_pton(AF_INET, host, address) == 1;
}

/*
 * tcp|udp:[HOST]:PORT-[GUEST]:PORT. The host's side is loopback only, unless an address says
 * otherwise.
 */
static int add_forward(struct user_net *n, const char *text, struct error *err)
{
    struct in_addr host = {htonl(INADDR_LOOPBACK)}, guest = {0};
    bool udp = !strncmp(text, "udp:", 4);
    const char *dash = strchr(text, '-');
    int host_port, guest_port;

    if ((!udp && strncmp(text, "tcp:", 4) != 0) || !dash ||
        !parse_endpoint(text + 4, dash, &host, &host_port) ||
        !parse_endpoint(dash + 1, text + strlen(text), &guest, &guest_port))
        return error_input(err, "hostfwd=%s: give tcp:[HOST]:PORT-[GUEST]:PORT, or udp:", text);
    if (library.slirp_add_hostfwd(n->slirp, udp, host, host_port, guest, guest_port) < 0)
        return error_input(err, "hostfwd=%s: cannot listen there: %s", text, strerror(errno));
    return 0;
}

/* DHCP has a field of this size for the file's name. */
#define BOOTFILE_MAX 127

static int check_boot(const struct net_options *o, struct error *err)
{
    struct stat st;

    if (o->tftp && stat(o->tftp, &st) < 0)
        return error_input(err, "tftp=%s: %s", o->tftp, strerror(errno));
    if (o->tftp && !S_ISDIR(st.st_mode))
        return error_input(err, "tftp=%s: give a directory", o->tftp);
    if (o->bootfile && strlen(o->bootfile) > BOOTFILE_MAX)
        return error_input(err, "bootfile= has %zu characters: give up to %d", strlen(o->bootfile),
                           BOOTFILE_MAX);
    return 0;
}

static bool make_slirp(struct user_net *n, const struct net_options *o)
{
    SlirpConfig config = {
        .version = 4,
        .in_enabled = true,
        .vnetwork = {htonl(0x0a000200)},
        .vnetmask = {htonl(0xffffff00)},
        .vhost = {htonl(0x0a000202)},
        .vnameserver = {htonl(0x0a000203)},
        .vdhcp_start = {htonl(0x0a00020f)},
        .in6_enabled = true,
        .vprefix_len = 64,
        .vhostname = "doppel",
        .tftp_path = o->tftp,
        .bootfile = o->bootfile,
        .if_mtu = o->have_mtu ? o->mtu : NET_MTU_DEFAULT,
        .if_mru = o->have_mtu ? o->mtu : NET_MTU_DEFAULT,
    };

    inet_pton(AF_INET6, "fec0::", &config.vprefix_addr6);
    inet_pton(AF_INET6, "fec0::2", &config.vhost6);
    inet_pton(AF_INET6, "fec0::3", &config.vnameserver6);
    n->slirp = library.slirp_new(&config, &callbacks, n);
    return n->slirp;
}

struct net_backend *net_user_open(const struct net_options *o, struct event_loop *loop,
                                  struct error *err)
{
    struct user_net *n;

    if (o->argument) {
        error_input(err, "user takes no '=%s': options follow a comma", o->argument);
        return NULL;
    }
    if (check_boot(o, err) || library_load("libslirp.so.0", symbols, ARRAY_SIZE(symbols), err))
        return NULL;
    n = calloc(1, sizeof(*n));
    if (!n) {
        error_host(err, ENOMEM, "user network");
        return NULL;
    }
    net_backend_init(&n->b, &user_ops, loop);
    n->b.info.link_up = true;
    n->b.info.valid_data = true;
    n->b.info.merges = true;
    n->work = (struct host_timer){.fire = work, .opaque = n};
    n->timeout = (struct host_timer){.fire = work, .opaque = n};
    if (!make_slirp(n, o)) {
        error_host(err, EIO, "libslirp");
        goto fail;
    }
    for (unsigned i = 0; i < o->nforwards; i++) {
        if (add_forward(n, o->forwards[i], err))
            goto fail;
    }
    work_soon(n);
    return &n->b;
fail:
    user_close(&n->b);
    return NULL;
}
