/*
 * Commands that a disk works on: NVM Express 1.4, chapter 6.
 */
#include "device/nvme/internal.h"

#include "host/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A command at work. */
struct nvme_request {
    struct block_request r;
    struct nvme *n;
    struct nvme_sq *sq;
    u16 cid;
    struct nvme_namespace *ns;
    struct block_range ranges[NVME_DSM_RANGES_MAX];
    struct nvme_data data;
};

static enum nvme_status status_of(const struct block_request *r, int result)
{
    if (!result)
        return NVME_OK;
    if (result == -ENOSPC || result == -EDQUOT)
        return NVME_CAPACITY_EXCEEDED;
    return r->op == BLOCK_READ ? NVME_READ_ERROR : NVME_WRITE_FAULT;
}

static void count(struct nvme *n, const struct block_request *r, int result)
{
    if (result) {
        n->stats.media_errors++;
    } else if (r->op == BLOCK_READ) {
        n->stats.commands_read++;
        n->stats.sectors_read += r->len / NVME_SECTOR;
    } else if (r->op == BLOCK_WRITE) {
        n->stats.commands_written++;
        n->stats.sectors_written += r->len / NVME_SECTOR;
    }
}

static void request_done(struct block_request *r, int result)
{
    struct nvme_request *q = container_of(r, struct nvme_request, r);
    struct nvme *n = q->n;

    if (result)
        log_once(LOG_ERROR, "%s: %s failed: %s", block_path(q->ns->backend),
                 r->op == BLOCK_READ ? "a read" : "a write", strerror(-result));
    device_lock(&n->pci.dev);
    count(n, r, result);
    if (r->op == BLOCK_READ)
        nvme_data_written(n, &q->data);
    nvme_complete(n, q->sq, q->cid, status_of(r, result), 0);
    nvme_request_returned(n, q->sq);
    device_unlock(&n->pci.dev);
    free(q);
}

static enum nvme_status submit(struct nvme_context *c, struct nvme_request *q)
{
    q->n = c->n;
    q->sq = c->sq;
    q->cid = c->cmd.cid;
    q->r.done = request_done;
    c->n->in_flight++;
    c->sq->in_flight++;
    block_submit(q->ns->backend, &q->r);
    return NVME_PENDING;
}

static enum nvme_status check_range(const struct nvme_namespace *ns, u64 lba, u64 blocks)
{
    return lba <= ns->blocks && blocks <= ns->blocks - lba ? NVME_OK : NVME_LBA_OUT_OF_RANGE;
}

static u64 first_block(const struct nvme_command *cmd)
{
    return (u64)cmd->cdw11 << 32 | cmd->cdw10;
}

static u64 block_count(const struct nvme_command *cmd)
{
    return (cmd->cdw12 & 0xffff) + 1;
}

static bool is_write_through(const struct nvme_context *c)
{
    return (c->cmd.cdw12 & NVME_RW_FUA) || !c->n->features[NVME_FEATURE_WRITE_CACHE];
}

static enum nvme_status transfer(struct nvme_context *c, struct nvme_request *q, bool write)
{
    u64 lba = first_block(&c->cmd), len = block_count(&c->cmd) * NVME_SECTOR;
    enum nvme_status status = check_range(q->ns, lba, block_count(&c->cmd));

    if (!status && len > NVME_TRANSFER_MAX)
        status = NVME_INVALID_FIELD;
    if (!status)
        status = nvme_map_data(c->n, &c->cmd, len, !write, &q->data);
    if (status)
        return status;
    q->r = (struct block_request){
        .op = write ? BLOCK_WRITE : BLOCK_READ,
        .offset = lba * NVME_SECTOR,
        .len = len,
        .iov = q->data.iov,
        .n = q->data.pieces,
        .fua = write && is_write_through(c),
    };
    return submit(c, q);
}

static enum nvme_status write_zeroes(struct nvme_context *c, struct nvme_request *q)
{
    enum nvme_status status = check_range(q->ns, first_block(&c->cmd), block_count(&c->cmd));

    if (status)
        return status;
    q->r = (struct block_request){
        .op = BLOCK_ZERO,
        .offset = first_block(&c->cmd) * NVME_SECTOR,
        .len = block_count(&c->cmd) * NVME_SECTOR,
        .unmap = c->cmd.cdw12 & NVME_ZEROES_DEAC,
        .fua = is_write_through(c),
    };
    return submit(c, q);
}

/* Everything but "deallocate" is advice that we don't take. */
static enum nvme_status dataset_management(struct nvme_context *c, struct nvme_request *q)
{
    struct nvme_range ranges[NVME_DSM_RANGES_MAX];
    unsigned n = (c->cmd.cdw10 & 0xff) + 1;
    enum nvme_status status = nvme_data_from_guest(c->n, &c->cmd, ranges, n * sizeof(ranges[0]));

    q->r = (struct block_request){.op = BLOCK_DISCARD, .ranges = q->ranges};
    for (unsigned i = 0; i < n && !status; i++) {
        status = check_range(q->ns, ranges[i].lba, ranges[i].blocks);
        if (!status && ranges[i].blocks)
            q->ranges[q->r.nranges++] = (struct block_range){
                .offset = ranges[i].lba * NVME_SECTOR, .len = (u64)ranges[i].blocks * NVME_SECTOR};
    }
    if (status || !(c->cmd.cdw11 & NVME_DSM_DEALLOCATE) || !q->r.nranges)
        return status;
    return submit(c, q);
}

static enum nvme_status flush(struct nvme_context *c, struct nvme_request *q)
{
    q->r = (struct block_request){.op = BLOCK_FLUSH};
    return submit(c, q);
}

static enum nvme_status start(struct nvme_context *c, struct nvme_request *q)
{
    switch (c->cmd.opcode) {
    case NVME_FLUSH:
        return flush(c, q);
    case NVME_WRITE:
        return transfer(c, q, true);
    case NVME_READ:
        return transfer(c, q, false);
    case NVME_WRITE_ZEROES:
        return write_zeroes(c, q);
    case NVME_DATASET_MANAGEMENT:
        return dataset_management(c, q);
    default:
        return NVME_INVALID_OPCODE;
    }
}

static bool changes_data(u8 opcode)
{
    return opcode == NVME_WRITE || opcode == NVME_WRITE_ZEROES || opcode == NVME_DATASET_MANAGEMENT;
}

enum nvme_status nvme_io_command(struct nvme_context *c)
{
    struct nvme_namespace *ns = nvme_namespace(c->n, c->cmd.nsid);
    struct nvme_request *q;
    enum nvme_status status;

    if (!ns)
        return NVME_INVALID_NAMESPACE;
    if (changes_data(c->cmd.opcode) && block_is_read_only(ns->backend))
        return NVME_WRITE_PROTECTED;
    q = malloc(sizeof(*q));
    if (!q)
        return NVME_INTERNAL_ERROR;
    q->ns = ns;
    status = start(c, q);
    if (status != NVME_PENDING)
        free(q);
    return status;
}

/* ---- shutdown (7.6.2) ---- */

static void shutdown_flushed(struct block_request *r, int result)
{
    struct nvme_namespace *ns = container_of(r, struct nvme_namespace, flush);
    struct nvme *n = ns->nvme;

    if (result)
        log_once(LOG_ERROR, "%s: a flush failed: %s", block_path(ns->backend), strerror(-result));
    device_lock(&n->pci.dev);
    if (--n->shutdown_flushes == 0)
        n->csts = (n->csts & ~NVME_CSTS_SHST) | NVME_CSTS_SHST_COMPLETE;
    nvme_request_returned(n, NULL);
    device_unlock(&n->pci.dev);
}

void nvme_start_shutdown(struct nvme *n)
{
    n->shutdown_wanted = false;
    for (unsigned i = 0; i < n->cfg.count; i++) {
        struct nvme_namespace *ns = &n->ns[i];

        n->in_flight++;
        n->shutdown_flushes++;
        ns->flush = (struct block_request){.op = BLOCK_FLUSH, .done = shutdown_flushed};
        block_submit(ns->backend, &ns->flush);
    }
}
