/*
 * The life of a virtio device: negotiation, queues, resets, interrupts, state. See virtio.h.
 */
#include "device/virtio/virtio.h"

#include "device/virtio/internal.h"
#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define VIRTIO_PCI_VENDOR 0x1af4
#define VIRTIO_PCI_SUBSYSTEM 0x1100

/* How long an interrupt may wait for more to tell; and how many don't, after one has waited in vain. */
#define HOLD_NS 100000
#define PROMPT_SIGNALS 100

#define ISR_QUEUE 1
#define ISR_CONFIG 2

#define COMMON_FEATURES                                                                            \
    (VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM | \
     VIRTIO_F_RING_PACKED | VIRTIO_F_RING_RESET)

/* ---- interrupts ---- */

static void interrupt(struct virtio *v, u8 cause, u16 vector)
{
    if (pci_msix_enabled(&v->pci)) {
        pci_msix_notify(&v->pci, vector);
        return;
    }
    v->isr |= cause;
    pci_intx_set(&v->pci, true);
}

void virtio_signal(struct virtio *v, unsigned q)
{
    if (virtq_should_signal(&v->queues[q], v->env.memory))
        interrupt(v, ISR_QUEUE, v->queues[q].vector);
}

void virtio_signal_soon(struct virtio *v, unsigned q)
{
    if (v->held & BIT(q))
        return;
    if (v->stopped || v->prompt[q]) {
        v->prompt[q] -= !!v->prompt[q];
        virtio_signal(v, q);
        return;
    }
    if (!v->held)
        event_loop_timer_arm(v->env.loop, &v->hold, host_clock_ns() + HOLD_NS);
    v->held |= BIT(q);
    v->came &= ~BIT(q);
}

/* The lock is held. */
static void signal_held(struct virtio *v)
{
    for (; v->held; v->held &= v->held - 1) {
        unsigned q = (unsigned)__builtin_ctzll(v->held);

        virtio_signal(v, q);
        if (!(v->came & BIT(q)))
            v->prompt[q] = PROMPT_SIGNALS;
    }
}

static void hold_ended(void *opaque)
{
    struct virtio *v = opaque;

    device_lock(&v->pci.dev);
    signal_held(v);
    device_unlock(&v->pci.dev);
}

void virtio_config_changed(struct virtio *v)
{
    v->generation++;
    if (v->status & VIRTIO_STATUS_DRIVER_OK)
        interrupt(v, ISR_CONFIG, v->config_vector);
}

void virtio_needs_reset(struct virtio *v, const char *why)
{
    if (v->status & VIRTIO_STATUS_NEEDS_RESET)
        return;
    log_once(LOG_WARN, "%s: the guest's driver broke the rules (%s); it must reset the device",
             v->config.name, why);
    v->status |= VIRTIO_STATUS_NEEDS_RESET;
    if (v->status & VIRTIO_STATUS_DRIVER_OK)
        interrupt(v, ISR_CONFIG, v->config_vector);
}

/* ---- notifications ---- */

void virtio_kick(struct virtio *v, unsigned q)
{
    if (!(atomic_fetch_or(&v->kicked, BIT(q)) & BIT(q)))
        loop_kick_send(&v->notifiers[q].kick);
}

/* By virtio_kick, or by an engine that rang the doorbell. */
static void notified(void *opaque)
{
    struct virtio_notifier *n = opaque;
    struct virtio *v = n->v;
    unsigned q = (unsigned)(n - v->notifiers);

    device_lock(&v->pci.dev);
    /* Before the queue is looked at: what comes from now on signals again. */
    atomic_fetch_and(&v->kicked, ~BIT(q));
    if (virtio_is_live(v) && v->queues[q].enabled)
        v->ops->queue_ready(v, q);
    device_unlock(&v->pci.dev);
}

static void kick_all(struct virtio *v)
{
    for (unsigned q = 0; q < v->config.queues; q++) {
        if (v->queues[q].enabled)
            virtio_kick(v, q);
    }
}

/* ---- chains ---- */

int virtio_pop(struct virtio *v, unsigned q, struct virtq_chain **out)
{
    struct virtq_chain *chain;
    int ret;

    if (!virtio_is_live(v) || !pci_is_bus_master(&v->pci) || (v->queue_resetting & BIT(q)))
        return 0;
    chain = malloc(sizeof(*chain));
    if (!chain) {
        log_once(LOG_ERROR, "%s: out of memory", v->config.name);
        return 0;
    }
    ret = virtq_pop(&v->queues[q], v->env.memory, chain);
    if (ret == 1) {
        v->in_flight++;
        v->queue_in_flight[q]++;
        v->came |= BIT(q);
        *out = chain;
        return 1;
    }
    free(chain);
    if (ret < 0)
        virtio_needs_reset(v, "a malformed queue");
    return 0;
}

static void finish_reset(struct virtio *v)
{
    for (unsigned q = 0; q < VIRTIO_QUEUES_MAX; q++)
        virtq_reset(&v->queues[q]);
    v->features = 0;
    v->device_feature_select = v->driver_feature_select = 0;
    v->config_vector = 0xffff;
    v->queue_select = 0;
    v->status = 0;
    v->isr = 0;
    v->resetting = false;
    v->queue_resetting = 0;
    v->held = 0;
    pci_intx_set(&v->pci, false);
    if (v->ops->reset)
        v->ops->reset(v);
}

static void finish_queue_reset(struct virtio *v, unsigned q)
{
    virtq_reset(&v->queues[q]);
    v->queue_resetting &= ~BIT(q);
}

void virtio_unpop(struct virtio *v, unsigned q, struct virtq_chain *chain)
{
    virtq_unpop(&v->queues[q], chain);
    free(chain);
    v->in_flight--;
    v->queue_in_flight[q]--;
}

typedef int push_fn(struct virtq *q, const struct guest_memory *m, const struct virtq_chain *chain,
                    u32 written);

static void give_back(struct virtio *v, unsigned q, struct virtq_chain *chain, u32 written,
                      push_fn *push)
{
    bool wanted =
        !v->resetting && !(v->queue_resetting & BIT(q)) && !(v->status & VIRTIO_STATUS_NEEDS_RESET);

    if (wanted && push(&v->queues[q], v->env.memory, chain, written) < 0)
        virtio_needs_reset(v, "a queue that is no memory");
    free(chain);
    v->in_flight--;
    v->queue_in_flight[q]--;
    if ((v->queue_resetting & BIT(q)) && !v->queue_in_flight[q])
        finish_queue_reset(v, q);
    if (v->resetting && !v->in_flight)
        finish_reset(v);
}

void virtio_complete(struct virtio *v, unsigned q, struct virtq_chain *chain, u32 written)
{
    give_back(v, q, chain, written, virtq_push);
}

void virtio_complete_held(struct virtio *v, unsigned q, struct virtq_chain *chain, u32 written)
{
    give_back(v, q, chain, written, virtq_push_held);
}

void virtio_set_notify(struct virtio *v, unsigned q, bool on)
{
    virtq_set_notify(&v->queues[q], v->env.memory, on);
}

#define SERVE_MAX (2 * VIRTQ_SIZE_MAX)

void virtio_serve(struct virtio *v, unsigned q,
                  void (*serve)(struct virtio *v, unsigned q, struct virtq_chain *chain))
{
    struct virtq_chain *chain;
    unsigned n = 0, before;

    do {
        before = n;
        virtio_set_notify(v, q, false);
        for (; n < SERVE_MAX && virtio_pop(v, q, &chain); n++)
            serve(v, q, chain);
        virtio_set_notify(v, q, true);
        /* Chains that came before the driver saw that it is to notify again are found once more. */
    } while (n != before && n < SERVE_MAX);
    if (n == SERVE_MAX)
        virtio_kick(v, q);
}

/* ---- what the driver asks for ---- */

void virtio_set_status(struct virtio *v, u8 value)
{
    u8 new = value & ~v->status;

    if (v->resetting)
        return;
    if (!value) {
        v->resetting = true;
        if (v->in_flight && v->ops->resetting)
            v->ops->resetting(v);
        if (v->resetting && !v->in_flight)
            finish_reset(v);
        return;
    }
    /* A driver takes what was offered, VERSION_1 among it: else it is a legacy one (3.1.1, 6.2). */
    if ((new &VIRTIO_STATUS_FEATURES_OK) &&
        (!virtio_has(v, VIRTIO_F_VERSION_1) || (v->features & ~v->offered)))
        value &= ~VIRTIO_STATUS_FEATURES_OK;
    v->status = value | (v->status & VIRTIO_STATUS_NEEDS_RESET);
    if (new &VIRTIO_STATUS_DRIVER_OK) {
        if (v->ops->driver_ok)
            v->ops->driver_ok(v);
        kick_all(v);
    }
}

void virtio_enable_queue(struct virtio *v, unsigned q)
{
    struct virtq *vq = &v->queues[q];

    if (vq->enabled || (v->queue_resetting & BIT(q)))
        return;
    vq->packed = virtio_has(v, VIRTIO_F_RING_PACKED);
    vq->event_idx = virtio_has(v, VIRTIO_F_EVENT_IDX);
    if (virtq_enable(vq, v->env.memory) < 0)
        virtio_needs_reset(v, "a queue at an impossible place");
    else if (virtio_is_live(v))
        virtio_kick(v, q);
}

void virtio_reset_queue(struct virtio *v, unsigned q)
{
    v->queue_resetting |= BIT(q);
    if (v->queue_in_flight[q] && v->ops->resetting)
        v->ops->resetting(v);
    if ((v->queue_resetting & BIT(q)) && !v->queue_in_flight[q])
        finish_queue_reset(v, q);
}

/* ---- life ---- */

static void virtio_stop(struct device *dev)
{
    struct virtio *v = container_of(dev, struct virtio, pci.dev);

    device_lock(dev);
    v->stopped = true;
    signal_held(v);
    device_unlock(dev);
    if (v->ops->drain)
        v->ops->drain(v);
}

static bool virtio_busy(struct device *dev)
{
    struct virtio *v = container_of(dev, struct virtio, pci.dev);
    bool busy;

    device_lock(dev);
    busy = v->in_flight > 0 || (v->ops->busy && v->ops->busy(v));
    device_unlock(dev);
    return busy;
}

static void virtio_start(struct device *dev)
{
    struct virtio *v = container_of(dev, struct virtio, pci.dev);

    device_lock(dev);
    v->stopped = false;
    kick_all(v);
    device_unlock(dev);
    if (v->ops->start)
        v->ops->start(v);
}

/* All chains come back: what is under way is finished, what was kept for later is given up. */
static void bring_in(struct virtio *v)
{
    if (v->ops->drain)
        v->ops->drain(v);
    if (v->ops->give_up)
        v->ops->give_up(v);
}

static void virtio_device_reset(struct device *dev)
{
    struct virtio *v = container_of(dev, struct virtio, pci.dev);

    bring_in(v);
    device_lock(dev);
    finish_reset(v);
    v->generation = 0;
    device_unlock(dev);
    pci_device_reset(&v->pci);
}

/* The first `count` notifiers. */
static void close_notifiers(struct virtio *v, unsigned count)
{
    while (count-- > 0)
        loop_kick_close(&v->notifiers[count].kick);
}

static int open_notifier(struct virtio *v, unsigned q, struct error *err)
{
    struct virtio_notifier *n = &v->notifiers[q];
    int ret;

    n->v = v;
    ret = loop_kick_open(&n->kick, v->env.loop, notified, n, v->config.name, err);
    if (!ret)
        v->doorbells[q] =
            (struct pci_doorbell){virtio_pci_notify_offset(q), loop_kick_fd(&n->kick)};
    return ret;
}

static int open_notifiers(struct virtio *v, struct error *err)
{
    for (unsigned q = 0; q < v->config.queues; q++) {
        int ret = open_notifier(v, q, err);

        if (ret) {
            close_notifiers(v, q);
            return ret;
        }
    }
    return 0;
}

static void virtio_destroy(struct device *dev)
{
    struct virtio *v = container_of(dev, struct virtio, pci.dev);

    bring_in(v);
    event_loop_timer_remove(v->env.loop, &v->hold);
    pci_device_fini(&v->pci);
    close_notifiers(v, v->config.queues);
    v->ops->destroy(v);
}

static const struct pci_device_ops virtio_pci_ops = {
    .dev = {.reset = virtio_device_reset,
            .destroy = virtio_destroy,
            .start = virtio_start,
            .stop = virtio_stop,
            .busy = virtio_busy},
    .config_read = virtio_pci_config_read,
    .config_written = virtio_pci_config_written,
};

int virtio_init(struct virtio *v, const struct virtio_ops *ops, const struct virtio_config *config,
                const struct state_desc *state, const struct device_env *env, struct error *err)
{
    struct pci_identity id = {
        .vendor = VIRTIO_PCI_VENDOR,
        .device = VIRTIO_PCI_DEVICE + config->type,
        .class = config->class,
        .revision = 1,
        .subsystem_vendor = VIRTIO_PCI_VENDOR,
        .subsystem = VIRTIO_PCI_SUBSYSTEM,
        .pin = 1,
    };
    int ret;

    v->ops = ops;
    v->config = *config;
    v->env = *env;
    v->offered = config->features | COMMON_FEATURES;
    v->hold = (struct host_timer){.fire = hold_ended, .opaque = v};
    ret = open_notifiers(v, err);
    if (ret)
        return ret;
    pci_device_init(&v->pci, config->name, &virtio_pci_ops, state, &id);
    virtio_pci_setup(v);
    finish_reset(v);
    return 0;
}

int virtio_add(struct virtio *v, struct pci_host *host, u16 place, struct error *err)
{
    int ret = pci_host_add(host, &v->pci, place, err);

    if (!ret)
        virtio_device_reset(&v->pci.dev);
    return ret;
}

/* ---- state ---- */

static int check_queue(struct virtio *v, unsigned i, struct error *err)
{
    struct virtq saved = v->queues[i];
    struct virtq *q = &v->queues[i];

    if (!saved.enabled) {
        if (saved.size && saved.size <= VIRTQ_SIZE_MAX)
            return 0;
    } else if (virtq_enable(q, v->env.memory) == 0) {
        *q = saved;
        if (saved.unsignalled <= saved.size &&
            saved.packed == virtio_has(v, VIRTIO_F_RING_PACKED) &&
            (!saved.packed || (saved.next_avail < saved.size && saved.next_used < saved.size)))
            return 0;
    }
    return error_input(err, "%s: saved queue %u is impossible", v->config.name, i);
}

static int virtio_loaded(void *obj, struct error *err)
{
    struct virtio *v = obj;

    if (((v->status & VIRTIO_STATUS_FEATURES_OK) && (v->features & ~v->offered)) || v->resetting ||
        v->queue_resetting || v->isr > 3)
        return error_input(err, "%s: the saved state can't be of this device", v->config.name);
    for (unsigned i = 0; i < VIRTIO_QUEUES_MAX; i++) {
        if (check_queue(v, i, err) < 0)
            return -EINVAL;
    }
    return 0;
}

static const struct state_field virtio_fields[] = {
    STATE_STRUCTS(struct virtio, pci, &pci_device_state),
    STATE_HOST(struct virtio, ops),
    STATE_HOST(struct virtio, config),
    STATE_HOST(struct virtio, env),
    STATE_HOST(struct virtio, offered),
    STATE_HOST(struct virtio, notifiers),
    STATE_HOST(struct virtio, doorbells),
    STATE_HOST(struct virtio, kicked),
    STATE_HOST(struct virtio, stopped),
    STATE_HOST(struct virtio, held),
    STATE_HOST(struct virtio, came),
    STATE_HOST(struct virtio, hold),
    STATE_HOST(struct virtio, prompt),
    STATE_HOST(struct virtio, in_flight),
    STATE_HOST(struct virtio, queue_in_flight),
    STATE_HOST(struct virtio, cfg_cap),
    STATE_FIELD(struct virtio, features),
    STATE_FIELD(struct virtio, device_feature_select),
    STATE_FIELD(struct virtio, driver_feature_select),
    STATE_FIELD(struct virtio, config_vector),
    STATE_FIELD(struct virtio, queue_select),
    STATE_FIELD(struct virtio, status),
    STATE_FIELD(struct virtio, generation),
    STATE_FIELD(struct virtio, isr),
    STATE_FIELD(struct virtio, resetting),
    STATE_FIELD(struct virtio, queue_resetting),
    STATE_STRUCTS(struct virtio, queues, &virtq_state),
};
const struct state_desc virtio_state = {
    .name = "virtio",
    .version = 1,
    .struct_size = sizeof(struct virtio),
    .fields = virtio_fields,
    .nfields = ARRAY_SIZE(virtio_fields),
    .loaded = virtio_loaded,
};
