#include "vhost/vhost.h"

#include "host/unix_socket.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define ANSWER_TIMEOUT_MS 5000

/* Message types. */
#define GET_FEATURES 1
#define SET_FEATURES 2
#define SET_OWNER 3
#define SET_MEM_TABLE 5
#define SET_VRING_NUM 8
#define SET_VRING_ADDR 9
#define SET_VRING_BASE 10
#define GET_VRING_BASE 11
#define SET_VRING_KICK 12
#define SET_VRING_CALL 13
#define GET_PROTOCOL_FEATURES 15
#define SET_PROTOCOL_FEATURES 16
#define GET_QUEUE_NUM 17
#define SET_VRING_ENABLE 18
#define GET_CONFIG 24
#define SET_CONFIG 25

#define FLAG_VERSION 1
#define FLAG_VERSION_MASK 3
#define FLAG_REPLY 4

#define PROTOCOL_F_MQ BIT(0)
#define PROTOCOL_F_CONFIG BIT(9)

struct header {
    u32 request, flags, size;
} __attribute__((packed));

struct vring_state {
    u32 index, num;
};

struct vring_addr {
    u32 index, flags;
    u64 desc, used, avail, log;
};

struct mem_region {
    u64 gpa, size, user_address, mmap_offset;
};

struct mem_table {
    u32 count, padding;
    struct mem_region regions[VHOST_REGIONS_MAX];
};

struct config_space {
    u32 offset, size, flags;
    u8 data[VHOST_CONFIG_MAX];
};
#define CONFIG_HEADER offsetof(struct config_space, data)

union payload {
    u64 number;
    struct vring_state state;
    struct vring_addr addr;
    struct mem_table table;
    struct config_space config;
};

/* ---- messages ---- */

/* A message is small; a socket whose buffer has no room for it belongs to a backend that doesn't read. */
static int send_message(struct vhost_link *l, u32 request, const void *payload, u32 size,
                        const int *fds, unsigned nfds)
{
    struct header h = {.request = request, .flags = FLAG_VERSION, .size = size};
    struct iovec iov[] = {{&h, sizeof(h)}, {(void *)payload, size}};
    struct msghdr msg = {.msg_iov = iov, .msg_iovlen = size ? 2 : 1};
    union {
        char bytes[CMSG_SPACE(VHOST_REGIONS_MAX * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    ssize_t sent;

    if (nfds) {
        msg.msg_control = &control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        *CMSG_FIRSTHDR(&msg) = (struct cmsghdr){.cmsg_len = CMSG_LEN(nfds * sizeof(int)),
                                                .cmsg_level = SOL_SOCKET,
                                                .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&msg)), fds, nfds * sizeof(int));
    }
    sent = sendmsg(l->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0)
        return -errno;
    return sent == (ssize_t)(sizeof(h) + size) ? 0 : -EIO;
}

/* All of len bytes, within the time that an answer has. Descriptors that come with them are dropped by the kernel. */
static int receive(struct vhost_link *l, void *buf, size_t len)
{
    struct pollfd p = {.fd = l->fd, .events = POLLIN};
    u8 *to = buf;

    while (len) {
        ssize_t n = recv(l->fd, to, len, MSG_DONTWAIT);

        if (n > 0) {
            to += n;
            len -= (size_t)n;
        } else if (n == 0) {
            return -ECONNRESET;
        } else if (errno != EAGAIN && errno != EINTR) {
            return -errno;
        } else if (poll(&p, 1, ANSWER_TIMEOUT_MS) == 0) {
            return -ETIMEDOUT;
        }
    }
    return 0;
}

/* Asks, and takes an answer of exactly `size` bytes into *payload. */
static int ask(struct vhost_link *l, u32 request, union payload *payload, u32 send_size, u32 size)
{
    struct header h;
    int ret = send_message(l, request, payload, send_size, NULL, 0);

    if (!ret)
        ret = receive(l, &h, sizeof(h));
    if (ret)
        return ret;
    if (h.request != request ||
        (h.flags & (FLAG_VERSION_MASK | FLAG_REPLY)) != (FLAG_VERSION | FLAG_REPLY) ||
        h.size != size)
        return -EPROTO;
    return receive(l, payload, size);
}

static int ask_number(struct vhost_link *l, u32 request, u64 *out)
{
    union payload p = {.number = 0};
    int ret = ask(l, request, &p, 0, sizeof(p.number));

    if (!ret)
        *out = p.number;
    return ret;
}

static int send_number(struct vhost_link *l, u32 request, u64 number)
{
    return send_message(l, request, &number, sizeof(number), NULL, 0);
}

/* ---- getting to know ---- */

static int read_config(struct vhost_link *l, unsigned size)
{
    union payload p = {.config = {.size = size}};
    int ret = ask(l, GET_CONFIG, &p, CONFIG_HEADER + size, CONFIG_HEADER + size);

    if (ret)
        return ret;
    memcpy(l->config, p.config.data, size);
    l->config_size = size;
    return 0;
}

static int greet(struct vhost_link *l, unsigned config_size)
{
    u64 number;
    int ret = send_message(l, SET_OWNER, NULL, 0, NULL, 0);

    if (!ret)
        ret = ask_number(l, GET_FEATURES, &l->features);
    if (!ret && !(l->features & VHOST_F_PROTOCOL_FEATURES))
        return config_size ? -ENOTSUP : 0;
    if (!ret)
        ret = ask_number(l, GET_PROTOCOL_FEATURES, &l->protocol_features);
    l->protocol_features &= PROTOCOL_F_MQ | PROTOCOL_F_CONFIG;
    if (!ret)
        ret = send_number(l, SET_PROTOCOL_FEATURES, l->protocol_features);
    if (!ret && (l->protocol_features & PROTOCOL_F_MQ)) {
        ret = ask_number(l, GET_QUEUE_NUM, &number);
        l->queues = ret || !number ? 1 : (unsigned)MIN(number, 0xffff);
    }
    if (ret || !config_size)
        return ret;
    return l->protocol_features & PROTOCOL_F_CONFIG ? read_config(l, config_size) : -ENOTSUP;
}

int vhost_connect(struct vhost_link *l, unsigned config_size, struct error *err)
{
    int ret;

    l->features = l->protocol_features = 0;
    l->queues = 1;
    l->config_size = 0;
    l->fd = unix_socket_connect(l->path, err);
    if (l->fd < 0)
        return l->fd;
    ret = greet(l, config_size);
    if (!ret)
        return 0;
    vhost_disconnect(l);
    return error_input(err, "%s: this is no vhost-user backend for such a device: %s", l->path,
                       strerror(-ret));
}

void vhost_disconnect(struct vhost_link *l)
{
    if (l->fd >= 0)
        close(l->fd);
    l->fd = -1;
}

/* ---- at work ---- */

int vhost_set_features(struct vhost_link *l, u64 features)
{
    return send_number(l, SET_FEATURES, features);
}

int vhost_set_memory(struct vhost_link *l, const struct vhost_region *regions, unsigned n)
{
    struct mem_table t = {.count = n};
    int fds[VHOST_REGIONS_MAX];

    for (unsigned i = 0; i < n; i++) {
        /* The user address is what rings are named by. It tells a backend nothing of this process. */
        t.regions[i] = (struct mem_region){.gpa = regions[i].gpa,
                                           .size = regions[i].size,
                                           .user_address = regions[i].gpa,
                                           .mmap_offset = regions[i].fd_offset};
        fds[i] = regions[i].fd;
    }
    return send_message(l, SET_MEM_TABLE, &t,
                        (u32)(offsetof(struct mem_table, regions) + n * sizeof(t.regions[0])), fds,
                        n);
}

static int send_state(struct vhost_link *l, u32 request, unsigned index, u32 num)
{
    struct vring_state s = {.index = index, .num = num};

    return send_message(l, request, &s, sizeof(s), NULL, 0);
}

static int send_eventfd(struct vhost_link *l, u32 request, unsigned index, int fd)
{
    u64 number = index;

    return send_message(l, request, &number, sizeof(number), &fd, 1);
}

int vhost_start_ring(struct vhost_link *l, unsigned index, const struct vhost_ring *r)
{
    struct vring_addr addr = {
        .index = index, .desc = r->desc, .used = r->device, .avail = r->driver};
    int ret = send_state(l, SET_VRING_NUM, index, r->size);

    if (!ret)
        ret = send_state(l, SET_VRING_BASE, index, r->base);
    if (!ret)
        ret = send_message(l, SET_VRING_ADDR, &addr, sizeof(addr), NULL, 0);
    if (!ret)
        ret = send_eventfd(l, SET_VRING_CALL, index, r->call_fd);
    /* The kick's descriptor starts the ring; with protocol features it is disabled until it is enabled. */
    if (!ret)
        ret = send_eventfd(l, SET_VRING_KICK, index, r->kick_fd);
    if (!ret && (l->features & VHOST_F_PROTOCOL_FEATURES))
        ret = send_state(l, SET_VRING_ENABLE, index, 1);
    return ret;
}

int vhost_stop_ring(struct vhost_link *l, unsigned index)
{
    union payload p = {.state = {.index = index}};

    return ask(l, GET_VRING_BASE, &p, sizeof(p.state), sizeof(p.state));
}

int vhost_write_config(struct vhost_link *l, u32 offset, const void *data, u32 len)
{
    struct config_space c = {.offset = offset, .size = len};

    if (len > sizeof(c.data) || !(l->protocol_features & PROTOCOL_F_CONFIG))
        return -EINVAL;
    memcpy(c.data, data, len);
    return send_message(l, SET_CONFIG, &c, (u32)CONFIG_HEADER + len, NULL, 0);
}

/* ---- memory ---- */

static int by_size(const void *a, const void *b)
{
    const struct vhost_region *x = a, *y = b;

    return x->size < y->size ? 1 : x->size > y->size ? -1 : 0;
}

unsigned vhost_memory_regions(const struct guest_memory *m, struct vhost_region *regions,
                              unsigned max)
{
    struct vhost_region all[MEMORY_MAX_SLOTS] = {0};
    unsigned n = 0;

    for (unsigned i = 0; i < m->nslots; i++) {
        const struct memory_slot *slot = &m->slots[i];
        struct vhost_region *last = n ? &all[n - 1] : NULL;

        if (slot->flags & MEMORY_FILE)
            continue;
        /* A gap between both has its place in the file as well, and nobody uses it. */
        if (last && slot->fd_offset >= last->fd_offset &&
            slot->fd_offset - last->fd_offset == slot->gpa - last->gpa)
            last->size = slot->gpa + slot->size - last->gpa;
        else
            all[n++] = (struct vhost_region){slot->gpa, slot->size, slot->fd, slot->fd_offset};
    }
    qsort(all, n, sizeof(all[0]), by_size);
    n = MIN(n, max);
    memcpy(regions, all, n * sizeof(all[0]));
    return n;
}
