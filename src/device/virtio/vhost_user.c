/*
 * Where things happen: the driver's doings come on any thread with the lock held, and only ask the loop to look
 * (virtio_kick and look_soon). The loop hands chains on, takes them back, and sends what the backend
 * need not answer. What waits for an answer, connecting and stopping, is done by a thread of the pool; the loop
 * leaves the connection alone meanwhile.
 *
 *     AWAY -> CONNECTING -> READY <-> RUNNING
 *      ^          |           ^          |
 *      +----------+           +- STOPPING
 *      +-- the backend is gone: from any of them
 */
#define _GNU_SOURCE /* memfd_create */

#include "device/virtio/vhost_user.h"

#include "block/aio.h"
#include "device/virtio/vhost_ring.h"
#include "host/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define QUEUES_MAX 16
#define RINGS_GPA BIT(52) /* no guest has memory there */
#define RECONNECT_NS NS_PER_SEC
#define DRAIN_TIMEOUT_NS (30 * NS_PER_SEC)

#define BLK_F_CONFIG_WCE BIT(11)
#define BLK_F_MQ BIT(12)
#define BLK_CONFIG_SIZE 60
#define BLK_CONFIG_WCE 32 /* offsets in it (5.2.4) */
#define BLK_CONFIG_NUM_QUEUES 34
/* Bits of 5.2.3: SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES */
#define BLK_FEATURES 0x7e76ULL

#define NET_F_MAC BIT(5)
#define NET_F_STATUS BIT(16)
#define NET_CONFIG_STATUS 6 /* offset (5.1.4) */
/* Bits of 5.1.3: CSUM, GUEST_CSUM, GUEST_TSO4/6, GUEST_ECN, HOST_TSO4/6, HOST_ECN, MRG_RXBUF */
#define NET_FEATURES 0xbb83ULL

#define FS_TAG_SIZE 36

struct vhost_kind {
    const char *name;
    enum virtio_type type;
    u16 class;
    u64 features;          /* that the backend may have */
    u64 ours;              /* and that we have for it */
    unsigned config_size;  /* of what the guest sees */
    bool asks_config;      /* which is the backend's */
    unsigned queues;       /* 0: as many as both sides want */
    bool keeps;            /* what it had is given to the next backend */
    bool waits_for_events; /* buffers stay with the backend until something comes from outside */
};

static const struct vhost_kind kinds[] = {
    [VHOST_USER_BLK] = {.name = "vhost-user-blk",
                        .type = VIRTIO_TYPE_BLOCK,
                        .class = PCI_CLASS_STORAGE_SCSI,
                        .features = BLK_FEATURES,
                        .config_size = BLK_CONFIG_SIZE,
                        .asks_config = true,
                        .keeps = true},
    [VHOST_USER_NET] = {.name = "vhost-user-net",
                        .type = VIRTIO_TYPE_NET,
                        .class = PCI_CLASS_NETWORK_ETHERNET,
                        .features = NET_FEATURES,
                        .ours = NET_F_MAC | NET_F_STATUS,
                        .config_size = 8,
                        .queues = 2,
                        .keeps = true,
                        .waits_for_events = true},
    [VHOST_USER_FS] = {.name = "vhost-user-fs",
                       .type = VIRTIO_TYPE_FS,
                       .class = PCI_CLASS_STORAGE_OTHER,
                       .config_size = FS_TAG_SIZE + 4,
                       .queues = 2},
};

enum vhost_state { VHOST_AWAY, VHOST_CONNECTING, VHOST_READY, VHOST_RUNNING, VHOST_STOPPING };

struct vhost_queue {
    struct vhost_user *dev;
    struct vhost_shadow shadow;
    bool started;
    int kick_fd;
    struct fd_watch call; /* of an eventfd */
};

struct vhost_user {
    struct virtio v;
    const struct vhost_kind *kind;
    enum vhost_state state;
    bool draining; /* the driver's wish doesn't count; the loop's thread alone */
    struct vhost_link link, next_link; /* the latter is the connecting thread's */
    struct fd_watch link_watch;
    struct aio *aio;
    struct aio_work work; /* connecting or stopping */
    struct error work_error;
    struct host_timer reconnect;
    struct host_timer look; /* look_soon's */
    int rings_fd;
    u8 *rings;
    u8 config[VHOST_CONFIG_MAX];
    struct vhost_queue queues[QUEUES_MAX];
};

static struct vhost_user *dev_of(struct virtio *v)
{
    return container_of(v, struct vhost_user, v);
}

static void look_soon(struct vhost_user *d)
{
    event_loop_timer_arm(d->v.env.loop, &d->look, 0);
}

/* ---- chains; the lock is held ---- */

/* The answer to a file system's request that nobody serves (struct fuse_out_header of linux/fuse.h). */
static u32 refuse_fs(const struct virtq_chain *chain)
{
    struct {
        u32 len;
        s32 error;
        u64 unique;
    } answer = {sizeof(answer), -ENOTCONN, 0};

    /* Behind the request's length and opcode. */
    virtq_chain_read(chain, 8, &answer.unique, sizeof(answer.unique));
    return (u32)virtq_chain_write(chain, 0, &answer, sizeof(answer));
}

/* What a backend that has stopped or is gone still had. Buffers for packets are the guest's as if never taken. */
static void give_back(struct vhost_user *d, unsigned q)
{
    struct virtio *v = &d->v;
    bool drop = v->resetting || (v->status & VIRTIO_STATUS_NEEDS_RESET), last;
    struct virtq_chain *chain;

    while ((chain = vhost_shadow_take_back(&d->queues[q].shadow, &last))) {
        if (!drop && last && d->kind->waits_for_events)
            virtio_unpop(v, q, chain);
        else
            virtio_complete(v, q, chain,
                            !drop && d->kind->type == VIRTIO_TYPE_FS ? refuse_fs(chain) : 0);
    }
    virtio_signal(v, q);
}

static void give_back_all(struct vhost_user *d)
{
    for (unsigned q = 0; q < d->v.config.queues; q++)
        give_back(d, q);
}

static void lost(struct vhost_user *d, const char *why);

/* What the backend is done with. False: it isn't to be trusted any more. */
static bool take_used(struct vhost_user *d, unsigned q)
{
    struct virtq_chain *chain;
    u32 written;
    int ret;

    while ((ret = vhost_shadow_take(&d->queues[q].shadow, &chain, &written)) > 0)
        virtio_complete(&d->v, q, chain, written);
    virtio_signal(&d->v, q);
    return ret == 0;
}

/* All of a chain's buffers are where the backend sees them, too: in RAM, and not in a ROM that shows in its place. */
static bool is_shared(const struct guest_memory *m, const struct virtq_chain *chain)
{
    for (unsigned i = 0; i < chain->nread + chain->nwrite; i++) {
        const struct memory_slot *slot = memory_find(m, chain->segments[i].gpa);

        if (!slot || slot->host != slot->backing || (slot->flags & MEMORY_FILE))
            return false;
    }
    return true;
}

static void ring_bell(const struct vhost_queue *q)
{
    if (vhost_shadow_wants_kick(&q->shadow) && eventfd_write(q->kick_fd, 1) < 0)
        log_once(LOG_WARN, "vhost-user: cannot wake a backend");
}

/* Hands on what the guest has put into a queue, as long as there is room. */
static void hand_on(struct vhost_user *d, unsigned q)
{
    struct virtio *v = &d->v;
    struct vhost_queue *queue = &d->queues[q];
    struct virtq_chain *chain;
    bool full = false, any;

    do {
        any = false;
        virtio_set_notify(v, q, false);
        while (!full && virtio_pop(v, q, &chain)) {
            if (!(chain->nread + chain->nwrite)) {
                virtio_complete(v, q, chain, 0);
            } else if (!is_shared(v->env.memory, chain) ||
                       vhost_shadow_is_too_long(&queue->shadow, chain)) {
                virtio_complete(v, q, chain, 0);
                virtio_needs_reset(v, "buffers that the backend can't have");
            } else if (vhost_shadow_push(&queue->shadow, chain)) {
                any = true;
            } else {
                virtio_unpop(v, q, chain);
                full = true;
            }
        }
        /* When it is full, the backend's next answer brings us here again. */
        if (!full)
            virtio_set_notify(v, q, true);
    } while (any && !full);
    ring_bell(queue);
}

/* Nobody is there: answered for those who can't wait. */
static void refuse(struct vhost_user *d, unsigned q)
{
    struct virtq_chain *chain;

    while (virtio_pop(&d->v, q, &chain))
        virtio_complete(&d->v, q, chain, refuse_fs(chain));
    virtio_signal(&d->v, q);
}

/* ---- the backend's life; the lock is held, on the loop's thread ---- */

static void set_link(struct vhost_user *d, bool up)
{
    if (d->kind->type != VIRTIO_TYPE_NET || d->config[NET_CONFIG_STATUS] == up)
        return;
    d->config[NET_CONFIG_STATUS] = up;
    virtio_config_changed(&d->v);
}

static void lost(struct vhost_user *d, const char *why)
{
    log_error("%s: the vhost-user backend is gone (%s)", d->link.path, why);
    if (d->link_watch.active)
        event_loop_unwatch(d->v.env.loop, &d->link_watch);
    vhost_disconnect(&d->link);
    d->state = VHOST_AWAY;
    for (unsigned q = 0; q < d->v.config.queues; q++)
        d->queues[q].started = false;
    if (!d->kind->keeps || d->v.resetting)
        give_back_all(d);
    set_link(d, false);
    event_loop_timer_arm(d->v.env.loop, &d->reconnect, host_clock_ns() + RECONNECT_NS);
}

static u64 backend_features(const struct vhost_user *d)
{
    const u64 always = VIRTIO_F_INDIRECT_DESC | VHOST_F_PROTOCOL_FEATURES;

    return ((d->v.features & d->kind->features) | always) & d->link.features;
}

/* What is in a ring already goes to the backend once more: it is another one, or was stopped. */
static void refill(struct vhost_user *d, struct vhost_shadow *s)
{
    struct virtq_chain *chains[VHOST_RING_SIZE + 1];
    unsigned n = 0;
    bool last;

    while ((chains[n] = vhost_shadow_take_back(s, &last)))
        n++;
    vhost_shadow_reset(s, d->link.features & VIRTIO_F_INDIRECT_DESC);
    while (n)
        vhost_shadow_push(s, chains[--n]);
}

static int start_queue(struct vhost_user *d, unsigned q)
{
    struct vhost_queue *queue = &d->queues[q];
    struct vhost_ring r = {.kick_fd = queue->kick_fd, .call_fd = queue->call.fd};
    int ret;

    refill(d, &queue->shadow);
    vhost_shadow_describe(&queue->shadow, &r);
    ret = vhost_start_ring(&d->link, q, &r);
    queue->started = !ret;
    return ret;
}

static int set_memory(struct vhost_user *d)
{
    struct vhost_region regions[VHOST_REGIONS_MAX];
    unsigned n = vhost_memory_regions(d->v.env.memory, regions, VHOST_REGIONS_MAX - 1);

    regions[n++] = (struct vhost_region){
        .gpa = RINGS_GPA, .size = (u64)VHOST_RING_BYTES * d->v.config.queues, .fd = d->rings_fd};
    return vhost_set_memory(&d->link, regions, n);
}

static void begin(struct vhost_user *d)
{
    struct virtio *v = &d->v;
    int ret = vhost_set_features(&d->link, backend_features(d) | VIRTIO_F_VERSION_1);

    if (!ret)
        ret = set_memory(d);
    if (!ret && virtio_has(v, d->kind->features & BLK_F_CONFIG_WCE))
        ret = vhost_write_config(&d->link, BLK_CONFIG_WCE, &d->config[BLK_CONFIG_WCE], 1);
    for (unsigned q = 0; !ret && q < v->config.queues; q++) {
        if (v->queues[q].enabled)
            ret = start_queue(d, q);
    }
    if (ret) {
        lost(d, strerror(-ret));
        return;
    }
    d->state = VHOST_RUNNING;
    for (unsigned q = 0; q < v->config.queues; q++) {
        if (d->queues[q].started)
            hand_on(d, q);
    }
}

static int run_stop(struct aio_work *w)
{
    struct vhost_user *d = container_of(w, struct vhost_user, work);
    int ret = 0;

    for (unsigned q = 0; !ret && q < d->v.config.queues; q++) {
        if (d->queues[q].started)
            ret = vhost_stop_ring(&d->link, q);
    }
    return ret;
}

static void look(struct vhost_user *d);

static void stopped(struct aio_work *w, int result)
{
    struct vhost_user *d = container_of(w, struct vhost_user, work);
    bool sane = true;

    device_lock(&d->v.pci.dev);
    for (unsigned q = 0; q < d->v.config.queues; q++) {
        if (d->queues[q].started)
            sane &= take_used(d, q);
    }
    if (result || !sane) {
        lost(d, result ? strerror(-result) : "it gave back what it didn't have");
    } else {
        d->state = VHOST_READY;
        for (unsigned q = 0; q < d->v.config.queues; q++)
            d->queues[q].started = false;
        give_back_all(d);
        event_loop_watch_events(d->v.env.loop, &d->link_watch, EPOLLIN | EPOLLRDHUP);
        look(d);
    }
    device_unlock(&d->v.pci.dev);
}

static void stop(struct vhost_user *d)
{
    d->state = VHOST_STOPPING;
    event_loop_watch_events(d->v.env.loop, &d->link_watch, 0);
    d->work = (struct aio_work){.run = run_stop, .done = stopped};
    aio_run(d->aio, &d->work);
}

/* Goes on to where the driver wants it. Requests are waited for; only buffers for events are taken away. */
static void look(struct vhost_user *d)
{
    bool live = virtio_is_live(&d->v) && !d->draining;
    bool idle = d->state != VHOST_RUNNING && d->state != VHOST_STOPPING;

    if (d->state == VHOST_READY && live)
        begin(d);
    else if (d->state == VHOST_RUNNING && !live && (!d->v.in_flight || d->kind->waits_for_events))
        stop(d);
    else if (idle && !live && (d->v.resetting || d->kind->waits_for_events))
        give_back_all(d);
}

static void look_now(void *opaque)
{
    struct vhost_user *d = opaque;

    device_lock(&d->v.pci.dev);
    look(d);
    device_unlock(&d->v.pci.dev);
}

/* A backend that was told nothing has nothing to say: what comes is its end. */
static void link_ready(void *opaque, u32 events)
{
    struct vhost_user *d = opaque;

    device_lock(&d->v.pci.dev);
    lost(d, events & EPOLLRDHUP ? "it closed the connection" : "it speaks unasked");
    device_unlock(&d->v.pci.dev);
}

/* The eventfd is never read, for the backend could make that wait: each signal is an edge. */
static void call_ready(void *opaque, u32 events)
{
    struct vhost_queue *queue = opaque;
    struct vhost_user *d = queue->dev;
    unsigned q = (unsigned)(queue - d->queues);

    device_lock(&d->v.pci.dev);
    if (d->state == VHOST_RUNNING && queue->started) {
        if (!take_used(d, q))
            lost(d, "it gave back what it didn't have");
        else if (virtio_is_live(&d->v))
            hand_on(d, q);
        look(d);
    }
    device_unlock(&d->v.pci.dev);
}

/* ---- connecting again ---- */

static int run_connect(struct aio_work *w)
{
    struct vhost_user *d = container_of(w, struct vhost_user, work);

    return vhost_connect(&d->next_link, d->kind->asks_config ? d->kind->config_size : 0,
                         &d->work_error);
}

/* Whether a disk's configuration begins with the capacity that the guest was told. */
static bool has_capacity(const struct vhost_user *d, const u8 *config)
{
    return !memcmp(config, d->config, sizeof(u64));
}

/* The same device as before, and it can do what the guest was promised. */
static bool is_same(const struct vhost_user *d, const struct vhost_link *next)
{
    u64 offered = d->v.offered & d->kind->features & ~d->kind->ours;

    return !(offered & ~next->features) && (next->features & VIRTIO_F_VERSION_1) &&
           (d->kind->type != VIRTIO_TYPE_BLOCK || has_capacity(d, next->config));
}

static int watch_link(struct vhost_user *d)
{
    d->link_watch = (struct fd_watch){
        .fd = d->link.fd, .events = EPOLLIN | EPOLLRDHUP, .ready = link_ready, .opaque = d};
    return event_loop_watch(d->v.env.loop, &d->link_watch);
}

static void connected(struct aio_work *w, int result)
{
    struct vhost_user *d = container_of(w, struct vhost_user, work);
    struct event_loop *loop = d->v.env.loop;

    device_lock(&d->v.pci.dev);
    d->state = VHOST_AWAY;
    if (!result && !is_same(d, &d->next_link)) {
        log_error("%s: this is another backend than before", d->link.path);
        vhost_disconnect(&d->next_link);
        result = -EINVAL;
    }
    if (!result) {
        d->link = d->next_link;
        result = watch_link(d);
        if (result)
            vhost_disconnect(&d->link);
    }
    if (!result) {
        log_info("%s: the vhost-user backend is back", d->link.path);
        d->state = VHOST_READY;
        set_link(d, true);
        look(d);
    } else {
        event_loop_timer_arm(loop, &d->reconnect, host_clock_ns() + RECONNECT_NS);
    }
    device_unlock(&d->v.pci.dev);
}

static void reconnect(void *opaque)
{
    struct vhost_user *d = opaque;

    device_lock(&d->v.pci.dev);
    if (d->state == VHOST_AWAY) {
        d->state = VHOST_CONNECTING;
        d->next_link.path = d->link.path;
        d->work = (struct aio_work){.run = run_connect, .done = connected};
        aio_run(d->aio, &d->work);
    }
    device_unlock(&d->v.pci.dev);
}

/* ---- struct virtio_ops ---- */

static void queue_ready(struct virtio *v, unsigned q)
{
    struct vhost_user *d = dev_of(v);
    bool away = d->state == VHOST_AWAY || d->state == VHOST_CONNECTING;
    int ret = 0;

    if (away && !d->kind->keeps)
        refuse(d, q);
    if (d->state != VHOST_RUNNING)
        return;
    if (!d->queues[q].started)
        ret = start_queue(d, q);
    if (ret)
        lost(d, strerror(-ret));
    else
        hand_on(d, q);
}

static void asks_to_look(struct virtio *v)
{
    look_soon(dev_of(v));
}

static void config_written(struct virtio *v, unsigned offset, unsigned size)
{
    struct vhost_user *d = dev_of(v);

    /* A send doesn't wait. One that isn't at work hears of it when it begins. */
    if (d->state == VHOST_RUNNING)
        vhost_write_config(&d->link, BLK_CONFIG_WCE, &d->config[BLK_CONFIG_WCE], 1);
}

/* Whether something is under way that only this thread's waiting brings in. */
static bool is_settling(struct vhost_user *d)
{
    bool settling;

    device_lock(&d->v.pci.dev);
    for (unsigned q = 0; d->state == VHOST_RUNNING && q < d->v.config.queues; q++) {
        if (d->queues[q].started && !take_used(d, q))
            lost(d, "it gave back what it didn't have");
    }
    look(d);
    settling = d->state == VHOST_RUNNING || d->state == VHOST_STOPPING;
    device_unlock(&d->v.pci.dev);
    return settling;
}

/* Requests are done or the backend is given up; it is idle then. */
static void vhost_drain(struct virtio *v)
{
    struct vhost_user *d = dev_of(v);
    u64 deadline = host_clock_ns() + DRAIN_TIMEOUT_NS;

    d->draining = true;
    while (is_settling(d)) {
        if (d->state == VHOST_STOPPING) {
            aio_wait(d->aio);
        } else if (host_clock_ns() < deadline) {
            usleep(100);
        } else {
            device_lock(&v->pci.dev);
            lost(d, "it doesn't answer");
            device_unlock(&v->pci.dev);
        }
    }
    d->draining = false;
}

static void vhost_start(struct virtio *v)
{
    look_now(dev_of(v));
}

/* For a reset of the machine: what waits for a backend waits no longer. */
static void vhost_give_up(struct virtio *v)
{
    device_lock(&v->pci.dev);
    give_back_all(dev_of(v));
    device_unlock(&v->pci.dev);
}

static bool vhost_busy(struct virtio *v)
{
    /* A file system's state is with its backend. */
    return v->config.type == VIRTIO_TYPE_FS && (v->status & VIRTIO_STATUS_DRIVER_OK);
}

static void free_parts(struct vhost_user *d)
{
    struct event_loop *loop = d->v.env.loop;

    d->draining = true;
    event_loop_timer_remove(loop, &d->reconnect);
    event_loop_timer_remove(loop, &d->look);
    while (d->state == VHOST_CONNECTING || d->state == VHOST_STOPPING)
        aio_wait(d->aio);
    event_loop_timer_remove(loop, &d->reconnect);
    if (d->link_watch.active)
        event_loop_unwatch(loop, &d->link_watch);
    vhost_disconnect(&d->link);
    for (unsigned q = 0; q < QUEUES_MAX; q++) {
        if (d->queues[q].call.active)
            event_loop_unwatch(loop, &d->queues[q].call);
        if (d->queues[q].call.fd >= 0)
            close(d->queues[q].call.fd);
        if (d->queues[q].kick_fd >= 0)
            close(d->queues[q].kick_fd);
    }
    aio_destroy(d->aio);
    if (d->rings)
        munmap(d->rings, (size_t)VHOST_RING_BYTES * QUEUES_MAX);
    if (d->rings_fd >= 0)
        close(d->rings_fd);
    free(d);
}

static void vhost_destroy(struct virtio *v)
{
    free_parts(dev_of(v));
}

static const struct virtio_ops vhost_ops = {
    .queue_ready = queue_ready,
    .config_written = config_written,
    .resetting = asks_to_look,
    .reset = asks_to_look,
    .driver_ok = asks_to_look,
    .drain = vhost_drain,
    .start = vhost_start,
    .give_up = vhost_give_up,
    .busy = vhost_busy,
    .destroy = vhost_destroy,
};

static const struct state_field vhost_fields[] = {
    STATE_STRUCTS(struct vhost_user, v, &virtio_state),
    STATE_HOST(struct vhost_user, kind),
    STATE_HOST(struct vhost_user, state),
    STATE_HOST(struct vhost_user, draining),
    STATE_HOST(struct vhost_user, link),
    STATE_HOST(struct vhost_user, next_link),
    STATE_HOST(struct vhost_user, link_watch),
    STATE_HOST(struct vhost_user, aio),
    STATE_HOST(struct vhost_user, work),
    STATE_HOST(struct vhost_user, work_error),
    STATE_HOST(struct vhost_user, reconnect),
    STATE_HOST(struct vhost_user, look),
    STATE_HOST(struct vhost_user, rings_fd),
    STATE_HOST(struct vhost_user, rings),
    STATE_BYTES(struct vhost_user, config),
    STATE_HOST(struct vhost_user, queues),
};

static int vhost_loaded(void *obj, struct error *err)
{
    const struct vhost_user *d = obj;

    if (d->kind->type == VIRTIO_TYPE_BLOCK && !has_capacity(d, d->link.config))
        return error_input(err, "%s: the saved disk has another size", d->link.path);
    return 0;
}

static const struct state_desc vhost_state = {
    .name = "vhost_user",
    .version = 1,
    .struct_size = sizeof(struct vhost_user),
    .fields = vhost_fields,
    .nfields = ARRAY_SIZE(vhost_fields),
    .loaded = vhost_loaded,
};

/* ---- creation ---- */

/* Memory that the backend can't make smaller beneath us. */
static int make_rings(struct vhost_user *d, struct error *err)
{
    const size_t size = (size_t)VHOST_RING_BYTES * QUEUES_MAX;
    void *at;

    d->rings_fd = memfd_create("doppel-rings", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (d->rings_fd < 0 || ftruncate(d->rings_fd, (off_t)size) < 0 ||
        fcntl(d->rings_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
        return error_host(err, errno, "%s: memory for rings", d->link.path);
    at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, d->rings_fd, 0);
    if (at == MAP_FAILED)
        return error_host(err, errno, "%s: memory for rings", d->link.path);
    d->rings = at;
    return 0;
}

static int make_queue(struct vhost_user *d, unsigned q, struct error *err)
{
    struct vhost_queue *queue = &d->queues[q];
    int ret = 0;

    queue->dev = d;
    queue->shadow.host = d->rings + (size_t)VHOST_RING_BYTES * q;
    queue->shadow.gpa = RINGS_GPA + (u64)VHOST_RING_BYTES * q;
    vhost_shadow_reset(&queue->shadow, false);
    queue->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->call = (struct fd_watch){.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                                    .events = EPOLLIN | EPOLLET,
                                    .ready = call_ready,
                                    .opaque = queue};
    if (queue->kick_fd < 0 || queue->call.fd < 0)
        ret = -errno;
    else
        ret = event_loop_watch(d->v.env.loop, &queue->call);
    return ret ? error_host(err, -ret, "%s: eventfds", d->link.path) : 0;
}

/* What the guest sees of the device: the backend's words, and ours. */
static unsigned fill_config(struct vhost_user *d, const struct vhost_user_config *cfg)
{
    u32 queues = 1;

    switch (cfg->kind) {
    case VHOST_USER_BLK:
        memcpy(d->config, d->link.config, d->link.config_size);
        if (d->link.features & BLK_F_MQ)
            queues = d->config[BLK_CONFIG_NUM_QUEUES] | d->config[BLK_CONFIG_NUM_QUEUES + 1] << 8;
        queues = MAX(1, MIN(MIN(queues, cfg->queues), QUEUES_MAX));
        d->config[BLK_CONFIG_NUM_QUEUES] = (u8)queues;
        d->config[BLK_CONFIG_NUM_QUEUES + 1] = 0;
        return queues;
    case VHOST_USER_NET:
        memcpy(d->config, cfg->mac, NET_CONFIG_STATUS);
        d->config[NET_CONFIG_STATUS] = 1;
        break;
    case VHOST_USER_FS:
        memcpy(d->config, cfg->tag, strnlen(cfg->tag, FS_TAG_SIZE));
        memcpy(d->config + FS_TAG_SIZE, &queues, sizeof(queues));
        break;
    }
    return d->kind->queues;
}

static int meet_backend(struct vhost_user *d, struct error *err)
{
    int ret = vhost_connect(&d->link, d->kind->asks_config ? d->kind->config_size : 0, err);

    if (ret)
        return ret;
    if (!(d->link.features & VIRTIO_F_VERSION_1))
        return error_input(err, "%s: the backend knows virtio of before 1.0 only", d->link.path);
    ret = watch_link(d);
    return ret ? error_host(err, -ret, "%s: cannot watch the connection", d->link.path) : 0;
}

static int make_parts(struct vhost_user *d, struct error *err)
{
    int ret = make_rings(d, err);

    for (unsigned q = 0; !ret && q < QUEUES_MAX; q++)
        ret = make_queue(d, q, err);
    if (ret)
        return ret;
    d->aio = aio_create(d->v.env.loop, true, err);
    return d->aio ? meet_backend(d, err) : -EIO;
}

static struct vhost_user *allocate(const struct device_env *env,
                                   const struct vhost_user_config *cfg)
{
    struct vhost_user *d = calloc(1, sizeof(*d));

    if (!d)
        return NULL;
    d->kind = &kinds[cfg->kind];
    d->v.env = *env;
    d->link = (struct vhost_link){.path = cfg->path, .fd = -1};
    d->state = VHOST_READY;
    d->rings_fd = -1;
    d->reconnect = (struct host_timer){.fire = reconnect, .opaque = d};
    d->look = (struct host_timer){.fire = look_now, .opaque = d};
    for (unsigned q = 0; q < QUEUES_MAX; q++)
        d->queues[q].kick_fd = d->queues[q].call.fd = -1;
    return d;
}

struct virtio *vhost_user_create(const struct device_env *env, const struct vhost_user_config *cfg,
                                 struct pci_host *host, u16 place, struct error *err)
{
    static const u8 writable[BLK_CONFIG_SIZE] = {[BLK_CONFIG_WCE] = 1};
    struct vhost_user *d = allocate(env, cfg);
    struct virtio_config config;

    if (!d) {
        error_host(err, ENOMEM, "%s", cfg->path);
        return NULL;
    }
    if (memory_share(env->memory, err) || make_parts(d, err)) {
        free_parts(d);
        return NULL;
    }
    config = (struct virtio_config){
        .name = d->kind->name,
        .type = d->kind->type,
        .class = d->kind->class,
        .features = (d->link.features & d->kind->features) | d->kind->ours,
        .queues = fill_config(d, cfg),
        .config = d->config,
        .config_size = d->kind->config_size,
        .config_writable = cfg->kind == VHOST_USER_BLK ? writable : NULL,
    };
    if (virtio_init(&d->v, &vhost_ops, &config, &vhost_state, env, err)) {
        free_parts(d);
        return NULL;
    }
    /* A queue alone isn't reset: the backend stops as a whole. */
    d->v.offered &= ~VIRTIO_F_RING_RESET;
    if (virtio_add(&d->v, host, place, err)) {
        virtio_device(&d->v)->ops->destroy(virtio_device(&d->v));
        return NULL;
    }
    return &d->v;
}
