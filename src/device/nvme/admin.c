/*
 * Admin commands: queues, features, events (NVM Express 1.4, chapter 5). What the controller tells of itself is in
 * identify.c.
 */
#include "device/nvme/internal.h"

#define IO_QUEUES (NVME_QUEUES - 1)
#define TEMPERATURE_HIGH 343 /* kelvin; there is no sensor, and it is never reached */

/* ---- queues ---- */

static bool is_new_queue(u16 qid)
{
    return qid >= 1 && qid < NVME_QUEUES;
}

static bool sq_exists(const struct nvme *n, u16 qid)
{
    return is_new_queue(qid) && n->sq[qid].size && !n->sq[qid].deleting;
}

static bool cq_exists(const struct nvme *n, u16 qid)
{
    return is_new_queue(qid) && n->cq[qid].size;
}

/* What is asked of queues of both kinds (5.3, 5.4). */
static enum nvme_status check_new_queue(const struct nvme_command *cmd)
{
    u32 size = (cmd->cdw10 >> 16) + 1;

    if (size < 2 || size > NVME_QUEUE_SIZE_MAX)
        return NVME_INVALID_QUEUE_SIZE;
    if (!(cmd->cdw11 & NVME_QUEUE_CONTIGUOUS))
        return NVME_INVALID_FIELD;
    return cmd->prp1 % NVME_PAGE_SIZE ? NVME_INVALID_PRP_OFFSET : NVME_OK;
}

static enum nvme_status create_cq(struct nvme_context *c)
{
    struct nvme *n = c->n;
    u16 qid = (u16)c->cmd.cdw10, vector = (u16)(c->cmd.cdw11 >> 16);
    enum nvme_status status;

    if (!is_new_queue(qid) || cq_exists(n, qid))
        return NVME_INVALID_QUEUE_ID;
    if (vector >= n->pci.msix_vectors)
        return NVME_INVALID_VECTOR;
    if ((n->cc >> NVME_CC_IOCQES_SHIFT & 15) != NVME_CQE_LOG2)
        return NVME_INVALID_FIELD;
    status = check_new_queue(&c->cmd);
    if (!status)
        nvme_cq_init(n, qid, c->cmd.prp1, (u16)((c->cmd.cdw10 >> 16) + 1), vector,
                     c->cmd.cdw11 & NVME_QUEUE_INTERRUPTS);
    return status;
}

static enum nvme_status create_sq(struct nvme_context *c)
{
    struct nvme *n = c->n;
    u16 qid = (u16)c->cmd.cdw10, cqid = (u16)(c->cmd.cdw11 >> 16);
    enum nvme_status status;

    if (!is_new_queue(qid) || n->sq[qid].size)
        return NVME_INVALID_QUEUE_ID;
    if (!cq_exists(n, cqid))
        return NVME_INVALID_COMPLETION_QUEUE;
    if ((n->cc >> NVME_CC_IOSQES_SHIFT & 15) != NVME_SQE_LOG2)
        return NVME_INVALID_FIELD;
    status = check_new_queue(&c->cmd);
    if (!status)
        nvme_sq_init(n, qid, c->cmd.prp1, (u16)((c->cmd.cdw10 >> 16) + 1), cqid);
    return status;
}

/* Done when its commands are (5.6): nvme_request_returned. */
static enum nvme_status delete_sq(struct nvme_context *c)
{
    u16 qid = (u16)c->cmd.cdw10;
    struct nvme_sq *sq;

    if (!sq_exists(c->n, qid))
        return NVME_INVALID_QUEUE_ID;
    sq = &c->n->sq[qid];
    if (sq->in_flight) {
        sq->deleting = true;
        sq->delete_cid = c->cmd.cid;
        return NVME_PENDING;
    }
    nvme_sq_delete(c->n, sq);
    return NVME_OK;
}

static enum nvme_status delete_cq(struct nvme_context *c)
{
    u16 qid = (u16)c->cmd.cdw10;

    if (!cq_exists(c->n, qid))
        return NVME_INVALID_QUEUE_ID;
    if (c->n->cq[qid].users)
        return NVME_INVALID_QUEUE_DELETION;
    nvme_cq_delete(c->n, &c->n->cq[qid]);
    return NVME_OK;
}

/* Only those that wait for events can be aborted: what a disk has can't be taken back (5.1). */
static enum nvme_status abort_command(struct nvme_context *c)
{
    u16 sqid = (u16)c->cmd.cdw10, cid = (u16)(c->cmd.cdw10 >> 16);

    c->result = sqid == 0 && nvme_abort_event_request(c->n, cid) ? 0 : 1;
    return NVME_OK;
}

static enum nvme_status async_event(struct nvme_context *c)
{
    return nvme_wait_for_event(c->n, c->cmd.cid) ? NVME_PENDING : NVME_ASYNC_LIMIT_EXCEEDED;
}

/* ---- features ---- */

/* Those that are a value that the guest may change. 0: not one of them. */
static const struct {
    u32 initial, writable;
} features[NVME_FEATURES] = {
    [NVME_FEATURE_ARBITRATION] = {7, 0xffffff07}, /* no limit to a burst */
    [NVME_FEATURE_POWER] = {0, 0xe0},             /* the one power state */
    [NVME_FEATURE_TEMPERATURE] = {TEMPERATURE_HIGH, 0xffff},
    [NVME_FEATURE_ERROR_RECOVERY] = {0, 0xffff},
    [NVME_FEATURE_WRITE_CACHE] = {1, 1},
    [NVME_FEATURE_COALESCING] = {0, 0xffff},
    [NVME_FEATURE_ATOMICITY] = {0, 1},
    [NVME_FEATURE_ASYNC_EVENTS] = {0, 0xff},
};

void nvme_reset_features(struct nvme *n)
{
    for (unsigned i = 0; i < NVME_FEATURES; i++)
        n->features[i] = features[i].initial;
    n->uncoalesced = 0;
}

/* Both directions allocate all there are (5.21.1.7). */
static enum nvme_status queue_count(struct nvme_context *c, bool set)
{
    if (set) {
        if ((u16)c->cmd.cdw11 == 0xffff || c->cmd.cdw11 >> 16 == 0xffff)
            return NVME_INVALID_FIELD;
        for (u16 i = 1; i < NVME_QUEUES; i++) {
            if (c->n->sq[i].size || c->n->cq[i].size)
                return NVME_COMMAND_SEQUENCE_ERROR;
        }
    }
    c->result = (IO_QUEUES - 1) | (IO_QUEUES - 1) << 16;
    return NVME_OK;
}

/* Whether a vector's interrupts may be held back for a while, which none ever is (5.21.1.9). */
static enum nvme_status vector_configuration(struct nvme_context *c, bool set)
{
    u16 vector = (u16)c->cmd.cdw11;
    u32 bit;

    if (vector >= c->n->pci.msix_vectors)
        return NVME_INVALID_FIELD;
    bit = BIT32(vector);
    if (set)
        c->n->uncoalesced = (c->n->uncoalesced & ~bit) | (c->cmd.cdw11 >> 16 & 1 ? bit : 0);
    c->result = vector | (c->n->uncoalesced & bit ? BIT32(16) : 0);
    return NVME_OK;
}

static enum nvme_status simple_feature(struct nvme_context *c, unsigned id, bool set)
{
    if (id >= NVME_FEATURES || !features[id].writable)
        return NVME_INVALID_FIELD;
    /* Thresholds of other sensors, and those from below (5.21.1.4). */
    if (id == NVME_FEATURE_TEMPERATURE && c->cmd.cdw11 >> 16)
        return NVME_INVALID_FIELD;
    if (id == NVME_FEATURE_POWER && set && (c->cmd.cdw11 & 0x1f))
        return NVME_INVALID_FIELD;
    if (set)
        c->n->features[id] = c->cmd.cdw11 & features[id].writable;
    else
        c->result = c->n->features[id];
    return NVME_OK;
}

static enum nvme_status feature(struct nvme_context *c, bool set)
{
    u8 id = (u8)c->cmd.cdw10;

    if (set && (c->cmd.cdw10 & NVME_FEATURE_SAVE))
        return NVME_FEATURE_NOT_SAVEABLE;
    switch (id) {
    case NVME_FEATURE_QUEUES:
        return queue_count(c, set);
    case NVME_FEATURE_VECTOR:
        return vector_configuration(c, set);
    default:
        return simple_feature(c, id, set);
    }
}

enum nvme_status nvme_admin_command(struct nvme_context *c)
{
    /* By PCIe, admin commands have their data by PRP only (4.2, figure 104). */
    if (c->cmd.flags & NVME_CMD_PSDT)
        return NVME_INVALID_FIELD;
    switch (c->cmd.opcode) {
    case NVME_ADMIN_DELETE_SQ:
        return delete_sq(c);
    case NVME_ADMIN_CREATE_SQ:
        return create_sq(c);
    case NVME_ADMIN_GET_LOG_PAGE:
        return nvme_get_log_page(c);
    case NVME_ADMIN_DELETE_CQ:
        return delete_cq(c);
    case NVME_ADMIN_CREATE_CQ:
        return create_cq(c);
    case NVME_ADMIN_IDENTIFY:
        return nvme_identify(c);
    case NVME_ADMIN_ABORT:
        return abort_command(c);
    case NVME_ADMIN_SET_FEATURES:
        return feature(c, true);
    case NVME_ADMIN_GET_FEATURES:
        return feature(c, false);
    case NVME_ADMIN_ASYNC_EVENT:
        return async_event(c);
    default:
        return NVME_INVALID_OPCODE;
    }
}
