/*
 * A vhost-user backend that a test plays: a thread answers the front-end's messages, the test does the work of a device
 * on the rings, by the addresses that it was given. It can be told to misbehave.
 */
#ifndef DOPPEL_TESTS_VHOST_RIG_H
#define DOPPEL_TESTS_VHOST_RIG_H

#include "vhost/vhost.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PEER_QUEUES 2
#define PEER_CONFIG 60

struct peer_ring {
    u32 num, base;
    u64 desc, driver, device;
    int kick, call;
    bool started;
    u16 next_avail, next_used;
};

struct peer {
    char path[64];
    int listener, fd;
    pthread_t thread;
    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    unsigned connections;
    u64 set_features;
    struct vhost_region regions[VHOST_REGIONS_MAX];
    u8 *hosts[VHOST_REGIONS_MAX];
    unsigned nregions;
    struct peer_ring rings[PEER_QUEUES];
    unsigned stops;
    u8 written_config;
    /* What it says; set before it is asked. */
    u64 features, protocol_features;
    u8 config[PEER_CONFIG];
    u32 wrong_request, wrong_size; /* of the answer to GET_FEATURES */
    bool hangs_up;
};

struct peer_message {
    u32 request, flags, size;
    union {
        u64 number;
        struct {
            u32 index, num;
        } state;
        struct {
            u32 index, flags;
            u64 desc, used, avail, log;
        } addr;
        struct {
            u32 count, padding;
            struct {
                u64 gpa, size, user, offset;
            } region[VHOST_REGIONS_MAX];
        } table;
        struct {
            u32 offset, size, flags;
            u8 data[VHOST_CONFIG_MAX];
        } config;
    } u;
} __attribute__((packed));
#define PEER_HEADER offsetof(struct peer_message, u)

static inline bool peer_receive(struct peer *p, struct peer_message *m, int fds[VHOST_REGIONS_MAX])
{
    struct iovec iov = {m, PEER_HEADER};
    char control[CMSG_SPACE(VHOST_REGIONS_MAX * sizeof(int))] __attribute__((aligned(8)));
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = control,
                         .msg_controllen = sizeof(control)};
    struct cmsghdr *c;

    if (recvmsg(p->fd, &msg, MSG_CMSG_CLOEXEC | MSG_WAITALL) != PEER_HEADER)
        return false;
    c = CMSG_FIRSTHDR(&msg);
    if (c)
        memcpy(fds, CMSG_DATA(c), c->cmsg_len - CMSG_LEN(0));
    return m->size <= sizeof(m->u) &&
           (!m->size || recv(p->fd, &m->u, m->size, MSG_WAITALL) == (ssize_t)m->size);
}

static inline void peer_answer(struct peer *p, struct peer_message *m, u32 size)
{
    m->flags = 1 | 4;
    m->size = size;
    if (send(p->fd, m, PEER_HEADER + size, MSG_NOSIGNAL) < 0)
        perror("send");
}

static inline void peer_unmap(struct peer *p)
{
    for (unsigned i = 0; i < p->nregions; i++)
        munmap(p->hosts[i], p->regions[i].size);
    p->nregions = 0;
}

static inline void peer_set_table(struct peer *p, const struct peer_message *m, const int *fds)
{
    peer_unmap(p);
    for (unsigned i = 0; i < m->u.table.count; i++) {
        p->regions[i] = (struct vhost_region){.gpa = m->u.table.region[i].gpa,
                                              .size = m->u.table.region[i].size};
        p->hosts[i] = mmap(NULL, p->regions[i].size, PROT_READ | PROT_WRITE, MAP_SHARED, fds[i],
                           (off_t)m->u.table.region[i].offset);
        if (p->hosts[i] == MAP_FAILED || ftruncate(fds[i], 0) == 0)
            abort(); /* the front-end's memory must not be ours to take away */
        close(fds[i]);
    }
    p->nregions = m->u.table.count;
}

/* The lock is held. */
static inline void peer_handle(struct peer *p, struct peer_message *m, int *fds)
{
    struct peer_ring *r = &p->rings[m->u.state.index % PEER_QUEUES];

    switch (m->request) {
    case 1: /* GET_FEATURES */
        m->u.number = p->features;
        m->request += p->wrong_request;
        peer_answer(p, m, 8 + p->wrong_size);
        break;
    case 2: /* SET_FEATURES */
        p->set_features = m->u.number;
        break;
    case 5: /* SET_MEM_TABLE */
        peer_set_table(p, m, fds);
        break;
    case 8: /* SET_VRING_NUM */
        r->num = m->u.state.num;
        break;
    case 9: /* SET_VRING_ADDR */
        r->desc = m->u.addr.desc;
        r->driver = m->u.addr.avail;
        r->device = m->u.addr.used;
        break;
    case 10: /* SET_VRING_BASE */
        r->next_avail = r->next_used = (u16)m->u.state.num;
        break;
    case 11: /* GET_VRING_BASE */
        r->started = false;
        p->stops++;
        m->u.state.num = r->next_avail;
        close(r->kick);
        close(r->call);
        peer_answer(p, m, 8);
        break;
    case 12: /* SET_VRING_KICK */
        r->kick = fds[0];
        break;
    case 13: /* SET_VRING_CALL */
        r->call = fds[0];
        break;
    case 15: /* GET_PROTOCOL_FEATURES */
        m->u.number = p->protocol_features;
        peer_answer(p, m, 8);
        break;
    case 17: /* GET_QUEUE_NUM */
        m->u.number = PEER_QUEUES;
        peer_answer(p, m, 8);
        break;
    case 18: /* SET_VRING_ENABLE */
        r->started = m->u.state.num;
        break;
    case 24: /* GET_CONFIG */
        memcpy(m->u.config.data, p->config, MIN(m->u.config.size, PEER_CONFIG));
        peer_answer(p, m, 12 + m->u.config.size);
        break;
    case 25: /* SET_CONFIG */
        p->written_config = m->u.config.data[0];
        break;
    }
}

static inline void *peer_thread(void *opaque)
{
    struct peer *p = opaque;
    int fds[VHOST_REGIONS_MAX];
    struct peer_message m;
    int fd;

    while ((fd = accept(p->listener, NULL, NULL)) >= 0) {
        pthread_mutex_lock(&p->lock);
        p->fd = fd;
        p->connections++;
        pthread_mutex_unlock(&p->lock);
        while (!p->hangs_up && peer_receive(p, &m, fds)) {
            pthread_mutex_lock(&p->lock);
            peer_handle(p, &m, fds);
            pthread_cond_broadcast(&p->changed);
            pthread_mutex_unlock(&p->lock);
        }
        pthread_mutex_lock(&p->lock);
        for (unsigned q = 0; q < PEER_QUEUES; q++) {
            if (p->rings[q].started) {
                close(p->rings[q].kick);
                close(p->rings[q].call);
            }
            p->rings[q] = (struct peer_ring){0};
        }
        peer_unmap(p);
        close(p->fd);
        p->fd = -1;
        pthread_cond_broadcast(&p->changed);
        pthread_mutex_unlock(&p->lock);
    }
    return NULL;
}

static inline struct peer *peer_create(void)
{
    struct peer *p = calloc(1, sizeof(*p));
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    static _Atomic unsigned count;

    snprintf(p->path, sizeof(p->path), "/tmp/doppel-vhost.%d.%u", (int)getpid(), count++);
    strcpy(address.sun_path, p->path);
    p->fd = -1;
    p->features = BIT(30) | BIT(32) | BIT(28);
    p->protocol_features = BIT(0) | BIT(3) | BIT(9);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->changed, NULL);
    p->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(p->listener, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        listen(p->listener, 4) < 0 || pthread_create(&p->thread, NULL, peer_thread, p) != 0)
        abort();
    return p;
}

/* It dies; its socket stays, for the front-end to come back. */
static inline void peer_hang_up(struct peer *p)
{
    pthread_mutex_lock(&p->lock);
    shutdown(p->fd, SHUT_RDWR);
    while (p->fd >= 0)
        pthread_cond_wait(&p->changed, &p->lock);
    pthread_mutex_unlock(&p->lock);
}

static inline void peer_destroy(struct peer *p)
{
    shutdown(p->listener, SHUT_RDWR);
    pthread_mutex_lock(&p->lock);
    if (p->fd >= 0)
        shutdown(p->fd, SHUT_RDWR);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    close(p->listener);
    unlink(p->path);
    free(p);
}

/* ---- the device's work ---- */

static inline void *peer_at(struct peer *p, u64 gpa)
{
    for (unsigned i = 0; i < p->nregions; i++) {
        if (gpa - p->regions[i].gpa < p->regions[i].size)
            return p->hosts[i] + (gpa - p->regions[i].gpa);
    }
    abort();
}

struct peer_desc {
    u64 addr;
    u32 len;
    u16 flags, next;
};

#define PEER_DESCS 300

/* The next chain's head, its descriptors in d[0..*n), or -1. The lock is held. */
static inline int peer_pop(struct peer *p, unsigned q, struct peer_desc *d, unsigned *n)
{
    struct peer_ring *r = &p->rings[q];
    _Atomic u16 *avail = peer_at(p, r->driver);
    struct peer_desc *table = peer_at(p, r->desc);
    u16 head, at;

    if (atomic_load(&avail[1]) == r->next_avail)
        return -1;
    head = at = avail[2 + r->next_avail++ % r->num];
    if (table[at].flags & 4) {
        table = peer_at(p, table[at].addr);
        at = 0;
    }
    *n = 0;
    do {
        d[*n] = table[at];
        at = table[at].next;
    } while (d[(*n)++].flags & 1);
    return head;
}

static inline void peer_push(struct peer *p, unsigned q, u32 id, u32 len)
{
    struct peer_ring *r = &p->rings[q];
    u8 *used = peer_at(p, r->device);

    memcpy(used + 4 + 8 * (r->next_used % r->num), &id, 4);
    memcpy(used + 8 + 8 * (r->next_used % r->num), &len, 4);
    atomic_store((_Atomic u16 *)(used + 2), ++r->next_used);
    eventfd_write(r->call, 1);
}

#endif
