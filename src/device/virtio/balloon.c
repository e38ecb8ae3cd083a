#include "device/virtio/balloon.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BALLOON_F_STATS_VQ BIT(1)
#define BALLOON_F_DEFLATE_ON_OOM BIT(2)
#define BALLOON_F_PAGE_REPORTING BIT(5)

/* Without free page hinting the reporting queue is the fourth: drivers number those that there are. */
enum { QUEUE_INFLATE, QUEUE_DEFLATE, QUEUE_STATS, QUEUE_REPORTING, QUEUES };

struct balloon_config { /* 5.5.4 */
    u32 num_pages;
    u32 actual;
};

struct balloon_stat { /* 5.5.6.3 */
    u16 tag;
    u64 value;
} __attribute__((packed));

struct virtio_balloon {
    struct virtio v;
    struct balloon_config config;
    struct balloon_stats stats;
    struct virtq_chain *stats_chain; /* the guest's, until news are wanted */
};

static struct virtio_balloon *balloon_of(struct virtio *v)
{
    return container_of(v, struct virtio_balloon, v);
}

/* Gives a range of RAM back to the host. Its contents are the guest's loss, and so a write. */
static void give_back(struct virtio *v, gpa_t gpa, u64 len)
{
    while (len) {
        u64 here = len;
        u8 *host = memory_dma(v->env.memory, gpa, &here, true);

        if (!host) {
            log_once(LOG_WARN, "virtio-balloon: the guest gives memory that it doesn't have");
            return;
        }
        if (memory_discard(v->env.memory, host, here))
            memory_tell_written(v->env.memory, gpa, here);
        gpa += here;
        len -= here;
    }
}

/* Page numbers, one after another; runs of them go at once. */
static void inflate(struct virtio *v, const struct virtq_chain *chain)
{
    gpa_t start = 0;
    u64 len = 0;
    u32 pfn;

    for (u64 at = 0; virtq_chain_read(chain, at, &pfn, sizeof(pfn)) == sizeof(pfn);
         at += sizeof(pfn)) {
        gpa_t gpa = (u64)pfn << GUEST_PAGE_SHIFT;

        if (len && gpa == start + len) {
            len += GUEST_PAGE_SIZE;
            continue;
        }
        give_back(v, start, len);
        start = gpa;
        len = GUEST_PAGE_SIZE;
    }
    give_back(v, start, len);
}

/* Free pages are the buffers themselves (5.5.6.7). Parts of pages stay. */
static void report(struct virtio *v, const struct virtq_chain *chain)
{
    const u64 mask = GUEST_PAGE_SIZE - 1;

    for (unsigned i = chain->nread; i < chain->nread + chain->nwrite; i++) {
        gpa_t start = (chain->segments[i].gpa + mask) & ~mask;
        gpa_t end = (chain->segments[i].gpa + chain->segments[i].len) & ~mask;

        if (start < end)
            give_back(v, start, end - start);
    }
}

static void take_stats(struct virtio_balloon *b, struct virtq_chain *chain)
{
    struct balloon_stat s;

    b->stats.known = 0;
    for (u64 at = 0; virtq_chain_read(chain, at, &s, sizeof(s)) == sizeof(s); at += sizeof(s)) {
        if (s.tag >= BALLOON_STATS)
            continue;
        b->stats.value[s.tag] = s.value;
        b->stats.known |= 1U << s.tag;
    }
}

/* The lock is held. A driver has one such buffer; it fills it again when it comes back. */
static void return_stats(struct virtio_balloon *b)
{
    struct virtq_chain *chain = b->stats_chain;

    b->stats_chain = NULL;
    if (!chain)
        return;
    virtio_complete(&b->v, QUEUE_STATS, chain, 0);
    virtio_signal(&b->v, QUEUE_STATS);
}

static void serve(struct virtio *v, unsigned q, struct virtq_chain *chain)
{
    struct virtio_balloon *b = balloon_of(v);

    if (q == QUEUE_STATS) {
        take_stats(b, chain);
        return_stats(b);
        b->stats_chain = chain;
        return;
    }
    if (q == QUEUE_INFLATE)
        inflate(v, chain);
    else if (q == QUEUE_REPORTING)
        report(v, chain);
    /* Deflated pages are there as soon as they are touched. */
    virtio_complete(v, q, chain, 0);
    virtio_signal(v, q);
}

static void queue_ready(struct virtio *v, unsigned q)
{
    virtio_serve(v, q, serve);
}

static void balloon_drain(struct virtio *v)
{
    struct virtio_balloon *b = balloon_of(v);

    device_lock(&v->pci.dev);
    if (b->stats_chain)
        virtio_unpop(v, QUEUE_STATS, b->stats_chain);
    b->stats_chain = NULL;
    device_unlock(&v->pci.dev);
}

static void balloon_reset(struct virtio *v)
{
    balloon_of(v)->config.actual = 0;
    memset(&balloon_of(v)->stats, 0, sizeof(balloon_of(v)->stats));
}

static void balloon_destroy(struct virtio *v)
{
    free(balloon_of(v));
}

static void balloon_resetting(struct virtio *v)
{
    return_stats(balloon_of(v));
}

static const struct virtio_ops balloon_ops = {
    .queue_ready = queue_ready,
    .resetting = balloon_resetting,
    .reset = balloon_reset,
    .drain = balloon_drain,
    .destroy = balloon_destroy,
};

void virtio_balloon_set_target(struct virtio_balloon *b, u64 bytes)
{
    device_lock(&b->v.pci.dev);
    b->config.num_pages = (u32)(bytes >> GUEST_PAGE_SHIFT);
    virtio_config_changed(&b->v);
    device_unlock(&b->v.pci.dev);
}

u64 virtio_balloon_actual(struct virtio_balloon *b)
{
    u64 bytes;

    device_lock(&b->v.pci.dev);
    bytes = (u64)b->config.actual << GUEST_PAGE_SHIFT;
    device_unlock(&b->v.pci.dev);
    return bytes;
}

void virtio_balloon_stats(struct virtio_balloon *b, struct balloon_stats *out)
{
    device_lock(&b->v.pci.dev);
    *out = b->stats;
    return_stats(b);
    device_unlock(&b->v.pci.dev);
}

struct virtio *virtio_balloon_virtio(struct virtio_balloon *b)
{
    return &b->v;
}

static const struct state_field config_fields[] = {
    STATE_FIELD(struct balloon_config, num_pages),
    STATE_FIELD(struct balloon_config, actual),
};
static const struct state_desc config_state =
    STATE_DESC("balloon_config", 1, struct balloon_config, config_fields);

static const struct state_field balloon_fields[] = {
    STATE_STRUCTS(struct virtio_balloon, v, &virtio_state),
    STATE_STRUCTS(struct virtio_balloon, config, &config_state),
    STATE_HOST(struct virtio_balloon, stats),
    STATE_HOST(struct virtio_balloon, stats_chain),
};
static const struct state_desc balloon_state =
    STATE_DESC("virtio_balloon", 1, struct virtio_balloon, balloon_fields);

struct virtio_balloon *virtio_balloon_create(const struct device_env *env, struct pci_host *host,
                                             u8 devfn, struct error *err)
{
    static const u8 writable[sizeof(struct balloon_config)] = {
        [offsetof(struct balloon_config, actual)] = 0xff,
        [offsetof(struct balloon_config, actual) + 1] = 0xff,
        [offsetof(struct balloon_config, actual) + 2] = 0xff,
        [offsetof(struct balloon_config, actual) + 3] = 0xff,
    };
    struct virtio_balloon *b = calloc(1, sizeof(*b));
    struct virtio_config config = {
        .name = "virtio-balloon",
        .type = VIRTIO_TYPE_BALLOON,
        .class = PCI_CLASS_OTHERS,
        .features = BALLOON_F_STATS_VQ | BALLOON_F_DEFLATE_ON_OOM | BALLOON_F_PAGE_REPORTING,
        .queues = QUEUES,
        .config_size = sizeof(struct balloon_config),
        .config_writable = writable,
    };

    if (!b) {
        error_host(err, ENOMEM, "virtio-balloon");
        return NULL;
    }
    config.config = (u8 *)&b->config;
    if (virtio_init(&b->v, &balloon_ops, &config, &balloon_state, env, err)) {
        free(b);
        return NULL;
    }
    if (virtio_add(&b->v, host, devfn, err)) {
        virtio_device(&b->v)->ops->destroy(virtio_device(&b->v));
        return NULL;
    }
    return b;
}
