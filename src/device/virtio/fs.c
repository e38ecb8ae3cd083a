#include "device/virtio/fs.h"

#include "block/aio.h"
#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* 5.11.2: forgetting has a queue of its own, so that it doesn't wait for room. One queue of requests. */
enum { QUEUE_HIPRIO, QUEUE_REQUEST, QUEUES };

struct fs_config { /* 5.11.4 */
    char tag[VIRTIO_FS_TAG_SIZE];
    u32 num_request_queues;
};

struct virtio_fs {
    struct virtio v;
    struct share *share;
    struct aio *aio;
    unsigned under_way;
    struct fs_config config;
};

struct fs_request {
    struct aio_work work;
    struct virtio_fs *fs;
    unsigned queue;
    struct virtq_chain *chain;
    u32 written;
};

static struct virtio_fs *fs_of(struct virtio *v)
{
    return container_of(v, struct virtio_fs, v);
}

/* On a thread of the pool. The chain is this request's until it is given back. */
static int run(struct aio_work *w)
{
    struct fs_request *q = container_of(w, struct fs_request, work);
    struct iovec in[VIRTQ_SEGMENTS_MAX], out[VIRTQ_SEGMENTS_MAX];
    struct share_request r = {
        .in = in,
        .nin = virtq_chain_iov(q->chain, false, 0, q->chain->read_len, in),
        .out = out,
        .nout = virtq_chain_iov(q->chain, true, 0, q->chain->write_len, out),
    };

    q->written = (u32)share_serve(q->fs->share, &r);
    return 0;
}

static void done(struct aio_work *w, int result)
{
    struct fs_request *q = container_of(w, struct fs_request, work);
    struct virtio *v = &q->fs->v;

    device_lock(&v->pci.dev);
    q->fs->under_way--;
    virtio_complete(v, q->queue, q->chain, q->written);
    virtio_signal(v, q->queue);
    device_unlock(&v->pci.dev);
    free(q);
}

static void serve(struct virtio *v, unsigned queue, struct virtq_chain *chain)
{
    struct virtio_fs *fs = fs_of(v);
    struct fs_request *q = malloc(sizeof(*q));

    if (!q) {
        log_once(LOG_ERROR, "virtio-fs: out of memory");
        virtio_complete(v, queue, chain, 0);
        virtio_signal(v, queue);
        return;
    }
    *q = (struct fs_request){
        .work = {.run = run, .done = done}, .fs = fs, .queue = queue, .chain = chain};
    fs->under_way++;
    aio_run(fs->aio, &q->work);
}

static void queue_ready(struct virtio *v, unsigned queue)
{
    virtio_serve(v, queue, serve);
}

static void fs_drain(struct virtio *v)
{
    struct virtio_fs *fs = fs_of(v);

    while (fs->under_way)
        aio_wait(fs->aio);
}

static bool fs_busy(struct virtio *v)
{
    return share_is_mounted(fs_of(v)->share);
}

static void fs_destroy(struct virtio *v)
{
    struct virtio_fs *fs = fs_of(v);

    aio_destroy(fs->aio);
    free(fs);
}

static const struct virtio_ops fs_ops = {
    .queue_ready = queue_ready,
    .drain = fs_drain,
    .busy = fs_busy,
    .destroy = fs_destroy,
};

static const struct state_field config_fields[] = {
    STATE_BYTES(struct fs_config, tag),
    STATE_HOST(struct fs_config, num_request_queues),
};
static const struct state_desc config_state =
    STATE_DESC("virtio_fs_config", 1, struct fs_config, config_fields);

static const struct state_field fs_fields[] = {
    STATE_STRUCTS(struct virtio_fs, v, &virtio_state),
    STATE_HOST(struct virtio_fs, share),
    STATE_HOST(struct virtio_fs, aio),
    STATE_HOST(struct virtio_fs, under_way),
    STATE_STRUCTS(struct virtio_fs, config, &config_state),
};
static const struct state_desc fs_state = STATE_DESC("virtio_fs", 1, struct virtio_fs, fs_fields);

static u64 ram_size(const struct guest_memory *m)
{
    u64 size = 0;

    for (unsigned i = 0; i < m->nslots; i++)
        size += m->slots[i].flags & MEMORY_FILE ? 0 : m->slots[i].size;
    return size;
}

struct virtio *virtio_fs_create(const struct device_env *env, struct share *share, const char *tag,
                                struct pci_host *host, u8 devfn, struct error *err)
{
    struct virtio_fs *fs = calloc(1, sizeof(*fs));
    struct virtio_config config = {
        .name = "virtio-fs",
        .type = VIRTIO_TYPE_FS,
        .class = PCI_CLASS_STORAGE_OTHER,
        .queues = QUEUES,
        .config_size = sizeof(struct fs_config),
    };

    if (!fs) {
        error_host(err, ENOMEM, "virtio-fs");
        return NULL;
    }
    fs->share = share;
    share_set_inodes_max(share, ram_size(env->memory) >> 10);
    memcpy(fs->config.tag, tag, strnlen(tag, sizeof(fs->config.tag)));
    fs->config.num_request_queues = QUEUES - QUEUE_REQUEST;
    config.config = (u8 *)&fs->config;
    fs->aio = aio_create(env->loop, true, err);
    if (!fs->aio || virtio_init(&fs->v, &fs_ops, &config, &fs_state, env, err)) {
        aio_destroy(fs->aio);
        free(fs);
        return NULL;
    }
    if (virtio_add(&fs->v, host, devfn, err)) {
        virtio_device(&fs->v)->ops->destroy(virtio_device(&fs->v));
        return NULL;
    }
    return &fs->v;
}
