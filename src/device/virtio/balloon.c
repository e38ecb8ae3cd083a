#include "device/virtio/balloon.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BALLOON_F_STATS_VQ BIT(1)
#define BALLOON_F_DEFLATE_ON_OOM BIT(2)
#define BALLOON_F_FREE_PAGE_HINT BIT(3)
#define BALLOON_F_PAGE_POISON BIT(4)
#define BALLOON_F_PAGE_REPORTING BIT(5)

/* Numbers of queues, if all of them are there: queue_kind. */
enum balloon_queue {
    QUEUE_INFLATE,
    QUEUE_DEFLATE,
    QUEUE_STATS,
    QUEUE_HINTS,
    QUEUE_REPORTING,
    QUEUES,
};

/* free_page_hint_cmd_id (5.5.6.6): these, or the number of a round of hints. */
enum { HINT_STOP, HINT_DONE, HINT_FIRST_ID };

struct balloon_config { /* 5.5.4 */
    u32 num_pages;
    u32 actual;
    u32 free_page_hint_cmd_id;
    u32 poison_val;
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
    u32 last_hint_id;
    bool hinting; /* the guest has begun with the round that free_page_hint_cmd_id names */
    struct balloon_hints hints; /* who asked for it; no functions: nobody */
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

/* Drivers number the queues that they agreed on, one after another. QUEUES: none of ours. */
static enum balloon_queue queue_kind(const struct virtio *v, unsigned q)
{
    static const struct {
        enum balloon_queue kind;
        u64 feature;
    } optional[] = {
        {QUEUE_STATS, BALLOON_F_STATS_VQ},
        {QUEUE_HINTS, BALLOON_F_FREE_PAGE_HINT},
        {QUEUE_REPORTING, BALLOON_F_PAGE_REPORTING},
    };
    unsigned next = QUEUE_STATS;

    if (q < QUEUE_STATS)
        return q;
    for (unsigned i = 0; i < ARRAY_SIZE(optional); i++) {
        if (virtio_has(v, optional[i].feature) && next++ == q)
            return optional[i].kind;
    }
    return QUEUES;
}

/*
 * Free pages are the buffers themselves (5.5.6.7). Parts of pages stay, and all of them where a guest wants to find
 * its own pattern in free memory.
 */
static void report(struct virtio *v, const struct virtq_chain *chain)
{
    const u64 mask = GUEST_PAGE_SIZE - 1;

    if (virtio_has(v, BALLOON_F_PAGE_POISON) && balloon_of(v)->config.poison_val)
        return;
    for (unsigned i = chain->nread; i < chain->nread + chain->nwrite; i++) {
        gpa_t start = (chain->segments[i].gpa + mask) & ~mask;
        gpa_t end = (chain->segments[i].gpa + chain->segments[i].len) & ~mask;

        if (start < end)
            give_back(v, start, end - start);
    }
}

/* ---- hints ---- */

/* A round is over, or won't come to its end. The lock is held. */
static void end_hints(struct virtio_balloon *b)
{
    struct balloon_hints hints = b->hints;

    b->hinting = false;
    b->hints = (struct balloon_hints){0};
    if (hints.done)
        hints.done(hints.opaque);
}

static void take_hints(struct virtio_balloon *b, const struct virtq_chain *chain)
{
    u32 id;

    /* A command of the driver's: it begins a round, or stops. */
    if (virtq_chain_read(chain, 0, &id, sizeof(id)) == sizeof(id)) {
        bool was_hinting = b->hinting;

        b->hinting = id >= HINT_FIRST_ID && id == b->config.free_page_hint_cmd_id;
        if (was_hinting && !b->hinting) {
            /* The pages are its own again. */
            b->config.free_page_hint_cmd_id = HINT_DONE;
            virtio_config_changed(&b->v);
            end_hints(b);
        }
    }
    for (unsigned i = chain->nread; i < chain->nread + chain->nwrite; i++) {
        if (b->hinting && b->hints.free)
            b->hints.free(b->hints.opaque, chain->segments[i].gpa, chain->segments[i].len);
    }
}

bool virtio_balloon_hint(struct virtio_balloon *b, const struct balloon_hints *hints)
{
    bool asked;

    device_lock(&b->v.pci.dev);
    asked = (b->v.status & VIRTIO_STATUS_DRIVER_OK) &&
            virtio_has(&b->v, BALLOON_F_FREE_PAGE_HINT) &&
            b->config.free_page_hint_cmd_id < HINT_FIRST_ID;
    if (asked) {
        b->last_hint_id = MAX(HINT_FIRST_ID, b->last_hint_id + 1);
        b->config.free_page_hint_cmd_id = b->last_hint_id;
        b->hints = *hints;
        virtio_config_changed(&b->v);
    }
    device_unlock(&b->v.pci.dev);
    return asked;
}

/* ---- statistics ---- */

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

    switch (queue_kind(v, q)) {
    case QUEUE_STATS:
        take_stats(b, chain);
        return_stats(b);
        b->stats_chain = chain;
        return;
    case QUEUE_INFLATE:
        inflate(v, chain);
        break;
    case QUEUE_REPORTING:
        report(v, chain);
        break;
    case QUEUE_HINTS:
        take_hints(b, chain);
        break;
    case QUEUE_DEFLATE: /* the pages are there as soon as they are touched */
    case QUEUES:
        break;
    }
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
    struct virtio_balloon *b = balloon_of(v);

    b->config.actual = 0;
    b->config.poison_val = 0;
    b->config.free_page_hint_cmd_id = HINT_STOP;
    memset(&b->stats, 0, sizeof(b->stats));
    end_hints(b);
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
    STATE_FIELD(struct balloon_config, free_page_hint_cmd_id),
    STATE_FIELD(struct balloon_config, poison_val),
};
static const struct state_desc config_state =
    STATE_DESC("balloon_config", 2, struct balloon_config, config_fields);

static const struct state_field balloon_fields[] = {
    STATE_STRUCTS(struct virtio_balloon, v, &virtio_state),
    STATE_STRUCTS(struct virtio_balloon, config, &config_state),
    STATE_HOST(struct virtio_balloon, stats),
    STATE_HOST(struct virtio_balloon, stats_chain),
    STATE_FIELD(struct virtio_balloon, last_hint_id),
    STATE_FIELD(struct virtio_balloon, hinting),
    STATE_HOST(struct virtio_balloon, hints),
};
static const struct state_desc balloon_state =
    STATE_DESC("virtio_balloon", 2, struct virtio_balloon, balloon_fields);

struct virtio_balloon *virtio_balloon_create(const struct device_env *env, struct pci_host *host,
                                             u8 devfn, struct error *err)
{
    static const struct balloon_config writable = {.actual = ~0U, .poison_val = ~0U};
    struct virtio_balloon *b = calloc(1, sizeof(*b));
    struct virtio_config config = {
        .name = "virtio-balloon",
        .type = VIRTIO_TYPE_BALLOON,
        .class = PCI_CLASS_OTHERS,
        .features = BALLOON_F_STATS_VQ | BALLOON_F_DEFLATE_ON_OOM | BALLOON_F_FREE_PAGE_HINT |
                    BALLOON_F_PAGE_POISON | BALLOON_F_PAGE_REPORTING,
        .queues = QUEUES,
        .config_size = sizeof(struct balloon_config),
        .config_writable = (const u8 *)&writable,
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
