#include "device/virtio/vsock.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define VSOCK_F_STREAM BIT(0)

enum { QUEUE_RX, QUEUE_TX, QUEUE_EVENT, QUEUES };

#define EVENT_TRANSPORT_RESET 0
#define PACKETS_A_TURN 256

struct virtio_vsock {
    struct virtio v;
    struct vsock *side;
    /* The driver was reset, on whatever thread: the host's side hears of it on the loop's. */
    _Atomic bool forget;
    bool loaded; /* from elsewhere, where the connections are: tell the guest */
    u8 payload[VSOCK_PAYLOAD_MAX];
    u64 cid; /* the configuration (5.10.4) */
};

static struct virtio_vsock *vsock_of(struct virtio *v)
{
    return container_of(v, struct virtio_vsock, v);
}

static void forget_if_reset(struct virtio_vsock *s)
{
    if (atomic_exchange(&s->forget, false))
        vsock_reset(s->side);
}

/* True when a packet went out; the lock is held. */
static bool receive_one(struct virtio_vsock *s)
{
    struct virtq_chain *chain;
    struct vsock_header h;

    if (!virtio_pop(&s->v, QUEUE_RX, &chain))
        return false;
    if (chain->write_len <= sizeof(h)) {
        virtio_unpop(&s->v, QUEUE_RX, chain);
        virtio_needs_reset(&s->v, "a receive buffer without room for data");
        return false;
    }
    if (!vsock_to_guest(s->side, &h, s->payload,
                        MIN(chain->write_len - sizeof(h), sizeof(s->payload)))) {
        virtio_unpop(&s->v, QUEUE_RX, chain);
        return false;
    }
    virtq_chain_write(chain, 0, &h, sizeof(h));
    virtq_chain_write(chain, sizeof(h), s->payload, h.len);
    virtio_complete(&s->v, QUEUE_RX, chain, (u32)sizeof(h) + h.len);
    return true;
}

static void receive(struct virtio_vsock *s)
{
    unsigned left = PACKETS_A_TURN;

    while (left && receive_one(s))
        left--;
    virtio_signal(&s->v, QUEUE_RX);
    if (!left)
        virtio_kick(&s->v, QUEUE_RX);
}

static void transmit_one(struct virtio_vsock *s, const struct virtq_chain *chain)
{
    struct vsock_header h;

    if (virtq_chain_read(chain, 0, &h, sizeof(h)) < sizeof(h) || h.len > sizeof(s->payload) ||
        h.len > chain->read_len - sizeof(h)) {
        virtio_needs_reset(&s->v, "a packet that is shorter than it says");
        return;
    }
    virtq_chain_read(chain, sizeof(h), s->payload, h.len);
    vsock_from_guest(s->side, &h, s->payload);
}

static void transmit(struct virtio_vsock *s)
{
    unsigned left = PACKETS_A_TURN;
    struct virtq_chain *chain;

    while (left && virtio_pop(&s->v, QUEUE_TX, &chain)) {
        transmit_one(s, chain);
        virtio_complete(&s->v, QUEUE_TX, chain, 0);
        left--;
    }
    virtio_signal(&s->v, QUEUE_TX);
    if (!left)
        virtio_kick(&s->v, QUEUE_TX);
}

/* 5.10.6.7: all connections are gone. */
static void send_event(struct virtio_vsock *s)
{
    u32 event = EVENT_TRANSPORT_RESET;
    struct virtq_chain *chain;

    if (!virtio_pop(&s->v, QUEUE_EVENT, &chain))
        return;
    virtio_complete(&s->v, QUEUE_EVENT, chain,
                    (u32)virtq_chain_write(chain, 0, &event, sizeof(event)));
    virtio_signal(&s->v, QUEUE_EVENT);
}

static void vsock_queue_ready(struct virtio *v, unsigned q)
{
    struct virtio_vsock *s = vsock_of(v);

    forget_if_reset(s);
    if (q == QUEUE_TX)
        transmit(s);
    /* Whatever the guest sent may have an answer. */
    if (q != QUEUE_EVENT)
        receive(s);
}

static void side_ready(void *opaque)
{
    struct virtio_vsock *s = opaque;

    device_lock(&s->v.pci.dev);
    forget_if_reset(s);
    if (virtio_is_live(&s->v))
        receive(s);
    device_unlock(&s->v.pci.dev);
}

static void vsock_was_reset(struct virtio *v)
{
    atomic_store(&vsock_of(v)->forget, true);
}

static void vsock_start(struct virtio *v)
{
    struct virtio_vsock *s = vsock_of(v);

    device_lock(&v->pci.dev);
    if (s->loaded) {
        s->loaded = false;
        vsock_reset(s->side);
        send_event(s);
    }
    device_unlock(&v->pci.dev);
}

static void vsock_destroy(struct virtio *v)
{
    vsock_attach(vsock_of(v)->side, NULL, NULL);
    free(vsock_of(v));
}

static const struct virtio_ops vsock_ops = {
    .queue_ready = vsock_queue_ready,
    .reset = vsock_was_reset,
    .start = vsock_start,
    .destroy = vsock_destroy,
};

static int vsock_loaded(void *obj, struct error *err)
{
    struct virtio_vsock *s = obj;

    if (s->cid != vsock_cid(s->side))
        return error_input(err, "virtio-vsock: the saved guest has another CID");
    s->loaded = true;
    return 0;
}

static const struct state_field vsock_fields[] = {
    STATE_STRUCTS(struct virtio_vsock, v, &virtio_state),
    STATE_HOST(struct virtio_vsock, side),
    STATE_HOST(struct virtio_vsock, forget),
    STATE_HOST(struct virtio_vsock, loaded),
    STATE_HOST(struct virtio_vsock, payload),
    STATE_FIELD(struct virtio_vsock, cid),
};
static const struct state_desc vsock_state = {
    .name = "virtio_vsock",
    .version = 1,
    .struct_size = sizeof(struct virtio_vsock),
    .fields = vsock_fields,
    .nfields = ARRAY_SIZE(vsock_fields),
    .loaded = vsock_loaded,
};

struct virtio *virtio_vsock_create(const struct device_env *env, struct vsock *host_side,
                                   struct pci_host *host, u8 devfn, struct error *err)
{
    struct virtio_vsock *s = calloc(1, sizeof(*s));
    struct virtio_config config = {
        .name = "virtio-vsock",
        .type = VIRTIO_TYPE_VSOCK,
        .class = PCI_CLASS_COMMUNICATION_OTHER,
        .features = VSOCK_F_STREAM,
        .queues = QUEUES,
        .config_size = sizeof(s->cid),
    };

    if (!s) {
        error_host(err, ENOMEM, "virtio-vsock");
        return NULL;
    }
    s->side = host_side;
    s->cid = vsock_cid(host_side);
    config.config = (u8 *)&s->cid;
    if (virtio_init(&s->v, &vsock_ops, &config, &vsock_state, env, err)) {
        free(s);
        return NULL;
    }
    if (virtio_add(&s->v, host, devfn, err)) {
        virtio_device(&s->v)->ops->destroy(virtio_device(&s->v));
        return NULL;
    }
    vsock_attach(host_side, side_ready, s);
    return &s->v;
}
