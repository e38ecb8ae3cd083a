#include "device/virtio/blk.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BLK_F_SEG_MAX BIT(2)
#define BLK_F_RO BIT(5)
#define BLK_F_BLK_SIZE BIT(6)
#define BLK_F_FLUSH BIT(9)
#define BLK_F_TOPOLOGY BIT(10)
#define BLK_F_CONFIG_WCE BIT(11)
#define BLK_F_MQ BIT(12)
#define BLK_F_DISCARD BIT(13)
#define BLK_F_WRITE_ZEROES BIT(14)

enum blk_type { /* 5.2.6 */
                BLK_T_IN = 0,
                BLK_T_OUT = 1,
                BLK_T_FLUSH = 4,
                BLK_T_GET_ID = 8,
                BLK_T_DISCARD = 11,
                BLK_T_WRITE_ZEROES = 13,
};

enum blk_status { BLK_S_OK = 0, BLK_S_IOERR = 1, BLK_S_UNSUPP = 2 };

#define BLK_WRITE_ZEROES_FLAG_UNMAP BIT(0)

#define SECTOR 512
#define SEG_MAX (VIRTQ_SIZE_MAX - 2) /* with header and status */
#define RANGES_MAX 32                /* of a discard or write-zeroes */
#define RANGE_SECTORS_MAX (GIB(1) / SECTOR)

struct blk_config { /* 5.2.4 */
    u64 capacity;
    u32 size_max;
    u32 seg_max;
    u16 cylinders;
    u8 heads, sectors;
    u32 blk_size;
    u8 physical_block_exp, alignment_offset;
    u16 min_io_size;
    u32 opt_io_size;
    u8 writeback;
    u8 unused0;
    u16 num_queues;
    u32 max_discard_sectors, max_discard_seg, discard_sector_alignment;
    u32 max_write_zeroes_sectors, max_write_zeroes_seg;
    u8 write_zeroes_may_unmap;
    u8 unused1[3];
} __attribute__((packed));

struct blk_header {
    u32 type;
    u32 reserved;
    u64 sector;
};

struct blk_range { /* 5.2.6: discard and write-zeroes */
    u64 sector;
    u32 sectors;
    u32 flags;
};

struct virtio_blk {
    struct virtio v;
    struct virtio_blk_config cfg;
    struct blk_config config;
};

/* A request of the guest's. */
struct blk_request {
    struct block_request r;
    struct virtio_blk *blk;
    unsigned queue;
    struct virtq_chain *chain;
    struct block_range ranges[RANGES_MAX];
    struct iovec iov[VIRTQ_SEGMENTS_MAX];
};

static struct virtio_blk *blk_of(struct virtio *v)
{
    return container_of(v, struct virtio_blk, v);
}

/* The lock is held. The status is the last byte that the guest can be given. */
static void finish(struct blk_request *q, enum blk_status status)
{
    struct virtio *v = &q->blk->v;
    u64 last = q->chain->write_len - 1;
    u8 byte = status;

    virtq_chain_write(q->chain, last, &byte, 1);
    virtio_complete(v, q->queue, q->chain, (u32)(last + 1));
    virtio_signal_soon(v, q->queue);
    free(q);
}

static void request_done(struct block_request *r, int result)
{
    struct blk_request *q = container_of(r, struct blk_request, r);
    struct virtio_blk *blk = q->blk;

    if (result)
        log_once(LOG_ERROR, "%s: %s failed: %s", block_path(blk->cfg.backend),
                 r->op == BLOCK_READ ? "a read" : "a write", strerror(-result));
    device_lock(&blk->v.pci.dev);
    finish(q, result ? BLK_S_IOERR : BLK_S_OK);
    device_unlock(&blk->v.pci.dev);
}

static void submit(struct blk_request *q)
{
    q->r.done = request_done;
    block_submit(q->blk->cfg.backend, &q->r);
}

/* Whether a range lies on the disk, in whole sectors. */
static bool on_disk(const struct virtio_blk *blk, u64 sector, u64 len)
{
    return len % SECTOR == 0 && sector <= blk->config.capacity &&
           len / SECTOR <= blk->config.capacity - sector;
}

/* Writes wait for the medium when the guest can't flush, or chose so (5.2.5.2, 5.2.6.2). */
static bool is_write_through(const struct virtio_blk *blk)
{
    return !virtio_has(&blk->v, BLK_F_FLUSH) ||
           (virtio_has(&blk->v, BLK_F_CONFIG_WCE) && !blk->config.writeback);
}

static int start_transfer(struct blk_request *q, const struct blk_header *h, bool write)
{
    struct virtq_chain *chain = q->chain;
    u64 len = write ? chain->read_len - sizeof(*h) : chain->write_len - 1;

    if (!on_disk(q->blk, h->sector, len) || (write && block_is_read_only(q->blk->cfg.backend)))
        return BLK_S_IOERR;
    q->r.op = write ? BLOCK_WRITE : BLOCK_READ;
    q->r.offset = h->sector * SECTOR;
    q->r.len = len;
    q->r.iov = q->iov;
    q->r.n = virtq_chain_iov(chain, !write, write ? sizeof(*h) : 0, len, q->iov);
    q->r.fua = write && is_write_through(q->blk);
    submit(q);
    return -1;
}

static int start_ranges(struct blk_request *q, enum block_op op)
{
    u64 len = q->chain->read_len - sizeof(struct blk_header);
    struct blk_range ranges[RANGES_MAX];

    if (block_is_read_only(q->blk->cfg.backend))
        return BLK_S_IOERR;
    if (len % sizeof(ranges[0]) || !len || len > sizeof(ranges))
        return BLK_S_UNSUPP;
    virtq_chain_read(q->chain, sizeof(struct blk_header), ranges, len);
    q->r.nranges = (unsigned)(len / sizeof(ranges[0]));
    for (unsigned i = 0; i < q->r.nranges; i++) {
        const struct blk_range *r = &ranges[i];
        u32 known = op == BLOCK_ZERO ? BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

        if (r->flags & ~known)
            return BLK_S_UNSUPP;
        if (r->sectors > RANGE_SECTORS_MAX || !on_disk(q->blk, r->sector, (u64)r->sectors * SECTOR))
            return BLK_S_IOERR;
        q->ranges[i] = (struct block_range){r->sector * SECTOR, (u64)r->sectors * SECTOR,
                                            r->flags & BLK_WRITE_ZEROES_FLAG_UNMAP};
    }
    q->r.op = op;
    q->r.ranges = q->ranges;
    q->r.fua = op == BLOCK_ZERO && is_write_through(q->blk);
    submit(q);
    return -1;
}

static int get_id(struct blk_request *q)
{
    char id[VIRTIO_BLK_SERIAL_SIZE] = "";

    if (q->blk->cfg.serial)
        memcpy(id, q->blk->cfg.serial, strnlen(q->blk->cfg.serial, sizeof(id)));
    /* A buffer that is too short gets what fits; the status has its place behind. */
    virtq_chain_write(q->chain, 0, id, MIN(sizeof(id), q->chain->write_len - 1));
    q->r.op = BLOCK_READ;
    return BLK_S_OK;
}

/* The status to finish with at once, or -1 when the disk has the request. */
static int start(struct blk_request *q)
{
    struct blk_header h;

    if (virtq_chain_read(q->chain, 0, &h, sizeof(h)) < sizeof(h))
        return BLK_S_IOERR;
    switch (h.type) {
    case BLK_T_IN:
        return start_transfer(q, &h, false);
    case BLK_T_OUT:
        return start_transfer(q, &h, true);
    case BLK_T_FLUSH:
        q->r.op = BLOCK_FLUSH;
        submit(q);
        return -1;
    case BLK_T_GET_ID:
        return get_id(q);
    case BLK_T_DISCARD:
        return start_ranges(q, BLOCK_DISCARD);
    case BLK_T_WRITE_ZEROES:
        return start_ranges(q, BLOCK_ZERO);
    default:
        return BLK_S_UNSUPP;
    }
}

static void serve(struct virtio *v, unsigned queue, struct virtq_chain *chain)
{
    struct virtio_blk *blk = blk_of(v);
    struct blk_request *q;
    int status;

    /* Without room for the status there is no way to answer. */
    if (!chain->write_len) {
        virtio_complete(&blk->v, queue, chain, 0);
        virtio_needs_reset(&blk->v, "a request without a status byte");
        return;
    }
    q = malloc(sizeof(*q));
    if (!q) {
        log_once(LOG_ERROR, "%s: out of memory", block_path(blk->cfg.backend));
        virtio_complete(&blk->v, queue, chain, 0);
        virtio_signal(&blk->v, queue);
        return;
    }
    q->r = (struct block_request){.op = BLOCK_WRITE};
    q->blk = blk;
    q->queue = queue;
    q->chain = chain;
    status = start(q);
    if (status >= 0)
        finish(q, (enum blk_status)status);
}

static void queue_ready(struct virtio *v, unsigned queue)
{
    virtio_serve(v, queue, serve);
}

static void blk_drain(struct virtio *v)
{
    block_drain(blk_of(v)->cfg.backend);
}

static void blk_give_up(struct virtio *v)
{
    block_give_up(blk_of(v)->cfg.backend);
}

static void blk_reset(struct virtio *v)
{
    blk_of(v)->config.writeback = 1;
}

static void blk_destroy(struct virtio *v)
{
    free(blk_of(v));
}

static const struct virtio_ops blk_ops = {
    .queue_ready = queue_ready,
    .reset = blk_reset,
    .drain = blk_drain,
    .give_up = blk_give_up,
    .destroy = blk_destroy,
};

/* ---- state: the guest's choice of a cache ---- */

static const struct state_field config_fields[] = {
    STATE_FIELD(struct blk_config, capacity),
    STATE_HOST(struct blk_config, size_max),
    STATE_HOST(struct blk_config, seg_max),
    STATE_HOST(struct blk_config, cylinders),
    STATE_HOST(struct blk_config, heads),
    STATE_HOST(struct blk_config, sectors),
    STATE_HOST(struct blk_config, blk_size),
    STATE_HOST(struct blk_config, physical_block_exp),
    STATE_HOST(struct blk_config, alignment_offset),
    STATE_HOST(struct blk_config, min_io_size),
    STATE_HOST(struct blk_config, opt_io_size),
    STATE_FIELD(struct blk_config, writeback),
    STATE_HOST(struct blk_config, unused0),
    STATE_HOST(struct blk_config, num_queues),
    STATE_HOST(struct blk_config, max_discard_sectors),
    STATE_HOST(struct blk_config, max_discard_seg),
    STATE_HOST(struct blk_config, discard_sector_alignment),
    STATE_HOST(struct blk_config, max_write_zeroes_sectors),
    STATE_HOST(struct blk_config, max_write_zeroes_seg),
    STATE_HOST(struct blk_config, write_zeroes_may_unmap),
    STATE_HOST(struct blk_config, unused1),
};
static const struct state_desc config_state =
    STATE_DESC("virtio_blk_config", 1, struct blk_config, config_fields);

static int blk_loaded(void *obj, struct error *err)
{
    const struct virtio_blk *blk = obj;

    if (blk->config.capacity != block_size(blk->cfg.backend) / SECTOR)
        return error_input(err, "%s: the saved disk has another size",
                           block_path(blk->cfg.backend));
    if (blk->config.writeback > 1)
        return error_input(err, "%s: saved cache mode is impossible", block_path(blk->cfg.backend));
    return 0;
}

static const struct state_field blk_fields[] = {
    STATE_STRUCTS(struct virtio_blk, v, &virtio_state),
    STATE_HOST(struct virtio_blk, cfg),
    STATE_STRUCTS(struct virtio_blk, config, &config_state),
};
static const struct state_desc blk_state = {
    .name = "virtio_blk",
    .version = 1,
    .struct_size = sizeof(struct virtio_blk),
    .fields = blk_fields,
    .nfields = ARRAY_SIZE(blk_fields),
    .loaded = blk_loaded,
};

static const u8 writable[sizeof(struct blk_config)] = {[offsetof(struct blk_config, writeback)] =
                                                           1};

static void fill_config(struct virtio_blk *blk)
{
    blk->config = (struct blk_config){
        .capacity = block_size(blk->cfg.backend) / SECTOR,
        .seg_max = SEG_MAX,
        .blk_size = SECTOR,
        .physical_block_exp = 3, /* 4096 bytes: what files are made of */
        .min_io_size = 8,
        .writeback = 1,
        .num_queues = (u16)blk->cfg.queues,
        .max_discard_sectors = RANGE_SECTORS_MAX,
        .max_discard_seg = RANGES_MAX,
        .discard_sector_alignment = 8,
        .max_write_zeroes_sectors = RANGE_SECTORS_MAX,
        .max_write_zeroes_seg = RANGES_MAX,
        .write_zeroes_may_unmap = 1,
    };
}

struct virtio *virtio_blk_create(const struct device_env *env, const struct virtio_blk_config *cfg,
                                 struct pci_host *host, u16 place, struct error *err)
{
    struct virtio_blk *blk = calloc(1, sizeof(*blk));
    struct virtio_config config = {
        .name = "virtio-blk",
        .type = VIRTIO_TYPE_BLOCK,
        .class = PCI_CLASS_STORAGE_SCSI,
        .features = BLK_F_SEG_MAX | BLK_F_BLK_SIZE | BLK_F_TOPOLOGY | BLK_F_FLUSH |
                    BLK_F_CONFIG_WCE | BLK_F_MQ,
        .queues = cfg->queues,
        .config_size = sizeof(struct blk_config),
        .config_writable = writable,
    };

    if (!blk) {
        error_host(err, ENOMEM, "virtio-blk");
        return NULL;
    }
    blk->cfg = *cfg;
    fill_config(blk);
    config.config = (u8 *)&blk->config;
    config.features |=
        block_is_read_only(cfg->backend) ? BLK_F_RO : BLK_F_DISCARD | BLK_F_WRITE_ZEROES;
    if (virtio_init(&blk->v, &blk_ops, &config, &blk_state, env, err)) {
        free(blk);
        return NULL;
    }
    if (virtio_add(&blk->v, host, place, err)) {
        virtio_device(&blk->v)->ops->destroy(virtio_device(&blk->v));
        return NULL;
    }
    return &blk->v;
}
