#include "device/virtio/rng.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#define REQUEST_MAX 4096 /* bytes; a driver that wants more asks again */

struct virtio_rng {
    struct virtio v;
};

static void serve(struct virtio *v, unsigned q, struct virtq_chain *chain)
{
    u8 bytes[REQUEST_MAX];
    u32 len = (u32)MIN(chain->write_len, sizeof(bytes));
    /* Doesn't wait: a host that runs guests has collected enough long since. */
    ssize_t got = getrandom(bytes, len, GRND_NONBLOCK);

    if (got > 0)
        virtq_chain_write(chain, 0, bytes, (size_t)got);
    virtio_complete(v, q, chain, got > 0 ? (u32)got : 0);
    virtio_signal(v, q);
}

static void queue_ready(struct virtio *v, unsigned q)
{
    virtio_serve(v, q, serve);
}

static void rng_destroy(struct virtio *v)
{
    free(container_of(v, struct virtio_rng, v));
}

static const struct virtio_ops rng_ops = {.queue_ready = queue_ready, .destroy = rng_destroy};

static const struct state_field rng_fields[] = {
    STATE_STRUCTS(struct virtio_rng, v, &virtio_state),
};
static const struct state_desc rng_state =
    STATE_DESC("virtio_rng", 1, struct virtio_rng, rng_fields);

struct virtio *virtio_rng_create(const struct device_env *env, struct pci_host *host, u8 devfn,
                                 struct error *err)
{
    static const struct virtio_config config = {
        .name = "virtio-rng",
        .type = VIRTIO_TYPE_ENTROPY,
        .class = PCI_CLASS_OTHERS,
        .queues = 1,
    };
    struct virtio_rng *rng = calloc(1, sizeof(*rng));

    if (!rng) {
        error_host(err, ENOMEM, "virtio-rng");
        return NULL;
    }
    if (virtio_init(&rng->v, &rng_ops, &config, &rng_state, env, err)) {
        free(rng);
        return NULL;
    }
    if (virtio_add(&rng->v, host, devfn, err)) {
        virtio_device(&rng->v)->ops->destroy(virtio_device(&rng->v));
        return NULL;
    }
    return &rng->v;
}
