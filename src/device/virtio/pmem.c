#include "device/virtio/pmem.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PMEM_REQ_FLUSH 0 /* 5.19.6 */
#define PMEM_RESP_OK 0
#define PMEM_RESP_EIO 1

struct pmem_config { /* 5.19.4 */
    u64 start;
    u64 size;
};

struct virtio_pmem {
    struct virtio v;
    struct block_backend *backend;
    struct pmem_config slot;   /* what config must be */
    struct pmem_config config; /* as the guest reads it */
};

struct pmem_request {
    struct block_request r;
    struct virtio_pmem *pmem;
    struct virtq_chain *chain;
};

static struct virtio_pmem *pmem_of(struct virtio *v)
{
    return container_of(v, struct virtio_pmem, v);
}

/* The lock is held. */
static void answer(struct virtio_pmem *p, struct virtq_chain *chain, u32 response)
{
    size_t n = virtq_chain_write(chain, 0, &response, sizeof(response));

    virtio_complete(&p->v, 0, chain, (u32)n);
    virtio_signal(&p->v, 0);
}

static void flushed(struct block_request *r, int result)
{
    struct pmem_request *q = container_of(r, struct pmem_request, r);
    struct virtio_pmem *p = q->pmem;

    if (result)
        log_once(LOG_ERROR, "%s: a flush failed: %s", block_path(p->backend), strerror(-result));
    device_lock(&p->v.pci.dev);
    answer(p, q->chain, result ? PMEM_RESP_EIO : PMEM_RESP_OK);
    device_unlock(&p->v.pci.dev);
    free(q);
}

static void serve(struct virtio *v, unsigned queue, struct virtq_chain *chain)
{
    struct virtio_pmem *p = pmem_of(v);
    struct pmem_request *q;
    u32 type;

    if (virtq_chain_read(chain, 0, &type, sizeof(type)) < sizeof(type) || type != PMEM_REQ_FLUSH) {
        answer(p, chain, PMEM_RESP_EIO);
        return;
    }
    q = malloc(sizeof(*q));
    if (!q) {
        log_once(LOG_ERROR, "%s: out of memory", block_path(p->backend));
        answer(p, chain, PMEM_RESP_EIO);
        return;
    }
    *q =
        (struct pmem_request){.r = {.op = BLOCK_FLUSH, .done = flushed}, .pmem = p, .chain = chain};
    block_submit(p->backend, &q->r);
}

static void queue_ready(struct virtio *v, unsigned queue)
{
    virtio_serve(v, queue, serve);
}

static void pmem_drain(struct virtio *v)
{
    block_drain(pmem_of(v)->backend);
}

static void pmem_destroy(struct virtio *v)
{
    free(pmem_of(v));
}

static const struct virtio_ops pmem_ops = {
    .queue_ready = queue_ready, .drain = pmem_drain, .destroy = pmem_destroy};

static const struct state_field config_fields[] = {
    STATE_FIELD(struct pmem_config, start),
    STATE_FIELD(struct pmem_config, size),
};
static const struct state_desc config_state =
    STATE_DESC("virtio_pmem_config", 1, struct pmem_config, config_fields);

/* The file's bytes are no state, as a disk's aren't; but where they are is. */
static int pmem_loaded(void *obj, struct error *err)
{
    const struct virtio_pmem *p = obj;

    if (p->config.start != p->slot.start || p->config.size != p->slot.size)
        return error_input(err, "%s: the saved memory is of another size or place",
                           block_path(p->backend));
    return 0;
}

static const struct state_field pmem_fields[] = {
    STATE_STRUCTS(struct virtio_pmem, v, &virtio_state),
    STATE_HOST(struct virtio_pmem, backend),
    STATE_HOST(struct virtio_pmem, slot),
    STATE_STRUCTS(struct virtio_pmem, config, &config_state),
};
static const struct state_desc pmem_state = {
    .name = "virtio_pmem",
    .version = 1,
    .struct_size = sizeof(struct virtio_pmem),
    .fields = pmem_fields,
    .nfields = ARRAY_SIZE(pmem_fields),
    .loaded = pmem_loaded,
};

struct virtio *virtio_pmem_create(const struct device_env *env,
                                  const struct virtio_pmem_config *cfg, struct pci_host *host,
                                  u16 place, struct error *err)
{
    struct virtio_config config = {
        .name = "virtio-pmem",
        .type = VIRTIO_TYPE_PMEM,
        .class = PCI_CLASS_OTHERS,
        .queues = 1,
        .config_size = sizeof(struct pmem_config),
    };
    struct virtio_pmem *p = calloc(1, sizeof(*p));

    if (!p) {
        error_host(err, ENOMEM, "virtio-pmem");
        return NULL;
    }
    p->backend = cfg->backend;
    p->slot = p->config = (struct pmem_config){cfg->start, cfg->size};
    config.config = (u8 *)&p->config;
    if (virtio_init(&p->v, &pmem_ops, &config, &pmem_state, env, err)) {
        free(p);
        return NULL;
    }
    if (virtio_add(&p->v, host, place, err)) {
        virtio_device(&p->v)->ops->destroy(virtio_device(&p->v));
        return NULL;
    }
    return &p->v;
}
