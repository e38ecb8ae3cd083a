/*
 * A virtio device on a PCI bus, and a driver for it that knows both kinds of rings. The device sends what it
 * reads back to where it may write, and can be told to keep chains for later. See pci_rig.h.
 */
#ifndef DOPPEL_TESTS_VIRTIO_RIG_H
#define DOPPEL_TESTS_VIRTIO_RIG_H

#include "device/virtio/virtio.h"
#include "host/event_loop.h"
#include "pci_rig.h"

#define TOY_DEVFN PCI_DEVFN(2, 0)
#define TOY_BAR 0xc0000000ULL
#define TOY_MSIX 0xc0100000ULL
#define TOY_QUEUES 2
#define TOY_FEATURE BIT(3)
#define TOY_KEPT_MAX 64

#define RING_DESC 0x1000
#define RING_DRIVER 0x2000
#define RING_DEVICE 0x3000
#define RING_INDIRECT 0x4000
#define BUFFERS 0x8000

struct toy {
    struct virtio v;
    u8 config[16];
    bool keep, soon; /* soon: interrupts may wait */
    struct virtq_chain *kept[TOY_KEPT_MAX];
    unsigned nkept, resets;
};

static inline struct toy *toy_of(struct virtio *v)
{
    return container_of(v, struct toy, v);
}

static inline void toy_answer(struct virtio *v, unsigned q, struct virtq_chain *chain)
{
    static u8 bytes[RIG_MEMORY * 2];
    size_t n = virtq_chain_read(chain, 0, bytes, sizeof(bytes));

    n = virtq_chain_write(chain, 0, bytes, n);
    virtio_complete(v, q, chain, (u32)n);
    if (toy_of(v)->soon)
        virtio_signal_soon(v, q);
    else
        virtio_signal(v, q);
}

static void toy_ready(struct virtio *v, unsigned q)
{
    struct toy *t = toy_of(v);
    struct virtq_chain *chain;

    while (virtio_pop(v, q, &chain)) {
        if (t->keep && t->nkept < TOY_KEPT_MAX)
            t->kept[t->nkept++] = chain;
        else
            toy_answer(v, q, chain);
    }
    virtio_set_notify(v, q, true);
}

/* Answers all that was kept (of queue 0). */
static inline void toy_answer_kept(struct toy *t)
{
    device_lock(&t->v.pci.dev);
    while (t->nkept)
        toy_answer(&t->v, 0, t->kept[--t->nkept]);
    device_unlock(&t->v.pci.dev);
}

static void toy_drain(struct virtio *v)
{
    toy_answer_kept(toy_of(v));
}
static void toy_was_reset(struct virtio *v)
{
    toy_of(v)->resets++;
}
static void toy_destroy(struct virtio *v)
{
    free(toy_of(v));
}

static const struct virtio_ops toy_ops = {
    .queue_ready = toy_ready, .reset = toy_was_reset, .drain = toy_drain, .destroy = toy_destroy};
static const struct state_field toy_fields[] = {
    STATE_STRUCTS(struct toy, v, &virtio_state),
    STATE_FIELD(struct toy, config),
    STATE_HOST(struct toy, keep),
    STATE_HOST(struct toy, soon),
    STATE_HOST(struct toy, kept),
    STATE_HOST(struct toy, nkept),
    STATE_HOST(struct toy, resets),
};
static const struct state_desc toy_state = STATE_DESC("toy", 1, struct toy, toy_fields);

struct driver {
    struct rig *rig;
    struct pci_host *host;
    struct toy *toy;
    bool packed;
    u16 size;
    u16 next_avail, next_used;
    bool avail_wrap, used_wrap;
};

static inline struct toy *toy_create(struct rig *r, struct pci_host *host, u8 devfn)
{
    static const u8 writable[16] = {0xff, 0x0f};
    struct toy *t = calloc(1, sizeof(*t));
    struct virtio_config config = {.name = "toy",
                                   .type = VIRTIO_TYPE_ENTROPY,
                                   .class = PCI_CLASS_OTHERS,
                                   .features = TOY_FEATURE,
                                   .queues = TOY_QUEUES,
                                   .config = t->config,
                                   .config_size = sizeof(t->config),
                                   .config_writable = writable};

    if (virtio_init(&t->v, &toy_ops, &config, &toy_state, &r->env, &r->err) ||
        virtio_add(&t->v, host, devfn, &r->err))
        abort();
    return t;
}

static inline u64 reg_read(struct driver *d, unsigned offset, unsigned size)
{
    return io_bus_read(d->rig->env.mmio, TOY_BAR + offset, size);
}
static inline void reg_write(struct driver *d, unsigned offset, u64 value, unsigned size)
{
    io_bus_write(d->rig->env.mmio, TOY_BAR + offset, value, size);
}

/* Offsets in the common configuration (VIRTIO 1.2, 4.1.4.3). */
enum {
    DEVICE_FEATURE_SELECT = 0x00,
    DEVICE_FEATURE = 0x04,
    DRIVER_FEATURE_SELECT = 0x08,
    DRIVER_FEATURE = 0x0c,
    CONFIG_VECTOR = 0x10,
    NUM_QUEUES = 0x12,
    STATUS = 0x14,
    GENERATION = 0x15,
    QUEUE_SELECT = 0x16,
    QUEUE_SIZE = 0x18,
    QUEUE_VECTOR = 0x1a,
    QUEUE_ENABLE = 0x1c,
    QUEUE_DESC = 0x20,
    QUEUE_DRIVER = 0x28,
    QUEUE_DEVICE = 0x30,
    QUEUE_RESET = 0x3a,
};

static inline void put16(struct driver *d, gpa_t at, u16 value)
{
    memory_write(&d->rig->memory, at, &value, 2);
}
static inline u16 get16(struct driver *d, gpa_t at)
{
    u16 value = 0;

    memory_read(&d->rig->memory, at, &value, 2);
    return value;
}

static inline void run_loop(struct driver *d)
{
    rig_run_loop(d->rig);
}

static inline u64 offered_features(struct driver *d)
{
    u64 low;

    reg_write(d, DEVICE_FEATURE_SELECT, 0, 4);
    low = reg_read(d, DEVICE_FEATURE, 4);
    reg_write(d, DEVICE_FEATURE_SELECT, 1, 4);
    return reg_read(d, DEVICE_FEATURE, 4) << 32 | low;
}

/* Up to FEATURES_OK; returns the status. */
static inline u8 negotiate(struct driver *d, u64 features)
{
    reg_write(d, STATUS, 0, 1);
    reg_write(d, STATUS, 1, 1);
    reg_write(d, STATUS, 3, 1);
    for (unsigned i = 0; i < 2; i++) {
        reg_write(d, DRIVER_FEATURE_SELECT, i, 4);
        reg_write(d, DRIVER_FEATURE, features >> 32 * i & 0xffffffff, 4);
    }
    reg_write(d, STATUS, 11, 1);
    d->packed = features & VIRTIO_F_RING_PACKED;
    return (u8)reg_read(d, STATUS, 1);
}

static inline void set_queue(struct driver *d, unsigned q, u16 size)
{
    reg_write(d, QUEUE_SELECT, q, 2);
    reg_write(d, QUEUE_SIZE, size, 2);
    reg_write(d, CONFIG_VECTOR, 0, 2);
    reg_write(d, QUEUE_VECTOR, q + 1, 2);
    reg_write(d, QUEUE_DESC, RING_DESC, 8);
    reg_write(d, QUEUE_DRIVER, RING_DRIVER, 8);
    reg_write(d, QUEUE_DEVICE, RING_DEVICE, 8);
    memset(memory_host(&d->rig->memory, RING_DESC, 0x3000), 0, 0x3000);
    d->size = size;
    d->next_avail = d->next_used = 0;
    d->avail_wrap = d->used_wrap = true;
    reg_write(d, QUEUE_ENABLE, 1, 2);
}

static inline void start_driver(struct driver *d, u64 features, u16 size)
{
    negotiate(d, features | VIRTIO_F_VERSION_1);
    set_queue(d, 0, size);
    reg_write(d, STATUS, 15, 1);
    run_loop(d);
}

static inline void notify(struct driver *d)
{
    reg_write(d, VIRTIO_BAR_NOTIFY, 0, 2);
    run_loop(d);
}

struct buffer {
    gpa_t at;
    u32 len;
    bool write;
};

static inline void put_desc(struct driver *d, gpa_t at, const struct buffer *b, u16 flags,
                            u16 third)
{
    struct {
        u64 addr;
        u32 len;
        u16 a, b;
    } desc = {b->at, b->len, 0, 0};

    flags |= b->write ? 2 : 0;
    desc.a = d->packed ? third : flags; /* split: flags, next; packed: id, flags */
    desc.b = d->packed ? flags : third;
    memory_write(&d->rig->memory, at, &desc, sizeof(desc));
}

/* Flags that make a packed descriptor available. */
static inline u16 packed_flags(bool wrap)
{
    return wrap ? 1 << 7 : 1 << 15;
}

static inline void add_packed(struct driver *d, const struct buffer *b, unsigned n, u16 id)
{
    u16 first = d->next_avail, first_flags = 0;

    for (unsigned i = 0; i < n; i++) {
        u16 flags = packed_flags(d->avail_wrap) | (i + 1 < n ? 1 : 0);

        if (!i)
            first_flags = flags | (b[i].write ? 2 : 0);
        /* The first becomes available last. */
        put_desc(d, RING_DESC + 16 * d->next_avail, &b[i], i ? flags : 0, id);
        if (++d->next_avail == d->size) {
            d->next_avail = 0;
            d->avail_wrap = !d->avail_wrap;
        }
    }
    put16(d, RING_DESC + 16 * first + 14, first_flags);
}

static inline void make_available(struct driver *d, u16 head)
{
    put16(d, RING_DRIVER + 4 + 2 * (d->next_avail % d->size), head);
    put16(d, RING_DRIVER + 2, ++d->next_avail);
}

static inline void add_split(struct driver *d, const struct buffer *b, unsigned n, u16 head)
{
    for (unsigned i = 0; i < n; i++)
        put_desc(d, RING_DESC + 16 * ((head + i) % d->size), &b[i], i + 1 < n ? 1 : 0,
                 (head + i + 1) % d->size);
    make_available(d, head);
}

static inline void add(struct driver *d, const struct buffer *b, unsigned n, u16 id)
{
    d->packed ? add_packed(d, b, n, id) : add_split(d, b, n, id);
}

static inline void add_indirect(struct driver *d, const struct buffer *b, unsigned n, u16 id)
{
    struct buffer table = {RING_INDIRECT, 16 * n, false};

    for (unsigned i = 0; i < n; i++)
        put_desc(d, RING_INDIRECT + 16 * i, &b[i], d->packed ? 0 : i + 1 < n ? 1 : 0, i + 1);
    if (d->packed) {
        u16 at = d->next_avail;

        add_packed(d, &table, 1, id);
        put16(d, RING_DESC + 16 * at + 14, get16(d, RING_DESC + 16 * at + 14) | 4);
    } else {
        put_desc(d, RING_DESC + 16 * id, &table, 4, 0);
        make_available(d, id);
    }
}

/* The next used chain; `ndesc` is how many entries it took. False: there is none. */
static inline bool take_used(struct driver *d, unsigned ndesc, u32 *id, u32 *len)
{
    gpa_t at;

    if (!d->packed) {
        if (get16(d, RING_DEVICE + 2) == d->next_used)
            return false;
        at = RING_DEVICE + 4 + 8 * (d->next_used++ % d->size);
        memory_read(&d->rig->memory, at, id, 4);
        memory_read(&d->rig->memory, at + 4, len, 4);
        return true;
    }
    at = RING_DESC + 16 * d->next_used;
    u16 flags = get16(d, at + 14);
    if (!!(flags & 1 << 7) != d->used_wrap || !!(flags & 1 << 15) != d->used_wrap)
        return false;
    memory_read(&d->rig->memory, at + 8, len, 4);
    *id = get16(d, at + 12);
    d->next_used += ndesc;
    if (d->next_used >= d->size) {
        d->next_used -= d->size;
        d->used_wrap = !d->used_wrap;
    }
    return true;
}

static inline struct driver *driver_create(void)
{
    struct driver *d = calloc(1, sizeof(*d));

    d->rig = rig_create();
    d->rig->env.loop = event_loop_create(&d->rig->err);
    d->host = rig_pci_host(d->rig);
    d->toy = toy_create(d->rig, d->host, TOY_DEVFN);
    config_write(d->rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_MSIX_BAR, TOY_MSIX, 4);
    config_write(d->rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    return d;
}
static inline void driver_destroy(struct driver *d)
{
    virtio_device(&d->toy->v)->ops->destroy(virtio_device(&d->toy->v));
    pci_host_device(d->host)->ops->destroy(pci_host_device(d->host));
    event_loop_destroy(d->rig->env.loop);
    rig_destroy(d->rig);
    free(d);
}

/* MSI-X on: vector i sends data 0x40 + i. */
static inline void enable_msix(struct driver *d)
{
    unsigned cap = find_capability(d->rig, TOY_DEVFN, PCI_CAP_ID_MSIX, 0);

    config_write(d->rig, TOY_DEVFN, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE, 2);
    for (unsigned i = 0; i <= TOY_QUEUES; i++) {
        u64 entry = TOY_MSIX + i * PCI_MSIX_ENTRY_SIZE;

        io_bus_write(d->rig->env.mmio, entry, 0xfee00000, 8);
        io_bus_write(d->rig->env.mmio, entry + 8, 0x40 + i, 4);
        io_bus_write(d->rig->env.mmio, entry + 12, 0, 4);
    }
}

/* ---- any other device, at the toy's place ---- */

static inline struct driver *bare_driver(void)
{
    struct driver *d = calloc(1, sizeof(*d));

    d->rig = rig_create();
    d->rig->env.loop = event_loop_create(&d->rig->err);
    d->host = rig_pci_host(d->rig);
    return d;
}

static inline void place(struct driver *d)
{
    config_write(d->rig, TOY_DEVFN, PCI_BASE_ADDRESS_0 + 4 * VIRTIO_BAR, TOY_BAR, 4);
    config_write(d->rig, TOY_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
}

static inline void finish(struct driver *d, struct virtio *v)
{
    struct device *host = pci_host_device(d->host);

    virtio_device(v)->ops->destroy(virtio_device(v));
    host->ops->destroy(host);
    event_loop_destroy(d->rig->env.loop);
    rig_destroy(d->rig);
    free(d);
}

/* The driver's rings belong to queue q from now on. */
static inline void start_queue(struct driver *d, u64 features, unsigned q)
{
    negotiate(d, features | VIRTIO_F_VERSION_1);
    set_queue(d, q, 16);
    reg_write(d, STATUS, 15, 1);
    run_loop(d);
}

static inline void notify_queue(struct driver *d, unsigned q)
{
    reg_write(d, VIRTIO_BAR_NOTIFY + VIRTIO_NOTIFY_MULTIPLIER * q, q, 2);
    run_loop(d);
}

#endif
