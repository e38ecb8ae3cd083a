/*
 * Submission and completion queues (NVM Express 1.4, chapter 4), and what tells the guest about them: interrupts
 * (7.5) and asynchronous events (5.2).
 */
#include "device/nvme/internal.h"

#include "host/log.h"

#include <string.h>

#define SERVE_MAX 64 /* commands of a queue before others get their turn */
#define ALL_QUEUES (BIT(NVME_QUEUES) - 1)

static void raise_event(struct nvme *n, unsigned event)
{
    n->events |= (u8)BIT(event);
    nvme_kick(n, BIT(0));
}

/* ---- where the guest is ---- */

/* A value beyond the queue's end changes nothing, but is told. */
static u16 sq_tail(struct nvme *n, struct nvme_sq *sq)
{
    u32 tail = atomic_load(&sq->tail);

    if (tail < sq->size)
        return (u16)tail;
    if (atomic_compare_exchange_strong(&sq->tail, &tail, sq->head))
        raise_event(n, NVME_EVENT_INVALID_VALUE);
    return sq->head;
}

static u16 cq_head(struct nvme *n, struct nvme_cq *cq)
{
    u32 head = atomic_load(&cq->head);

    if (head < cq->size)
        cq->last_head = (u16)head;
    else if (atomic_compare_exchange_strong(&cq->head, &head, cq->last_head))
        raise_event(n, NVME_EVENT_INVALID_VALUE);
    return cq->last_head;
}

static bool cq_is_empty(struct nvme *n, struct nvme_cq *cq)
{
    return cq_head(n, cq) == cq->tail;
}

static bool cq_has_room(struct nvme *n, struct nvme_cq *cq)
{
    unsigned used = (cq->tail + cq->size - cq_head(n, cq)) % cq->size;

    return used + cq->reserved < cq->size - 1U;
}

/* A place for a completion. Where there is none, the guest's next word about this queue wakes the loop. */
static bool cq_reserve(struct nvme *n, struct nvme_cq *cq)
{
    if (!cq_has_room(n, cq)) {
        atomic_store(&cq->starved, true);
        /* The guest may have made room before it could see that. */
        if (!cq_has_room(n, cq))
            return false;
    }
    cq->reserved++;
    return true;
}

void nvme_kick(struct nvme *n, u64 queues)
{
    /* Whoever sets the first bit wakes the loop; it takes all that are set by then. */
    if (atomic_fetch_or(&n->kicked, queues) == 0)
        loop_kick_send(&n->kick);
}

void nvme_doorbell(struct nvme *n, unsigned index, u32 value)
{
    unsigned id = index / 2;

    if (id >= NVME_QUEUES)
        return;
    if (index % 2 == 0) {
        atomic_store(&n->sq[id].tail, value);
        nvme_kick(n, BIT(id));
        return;
    }
    atomic_store(&n->cq[id].head, value);
    if (atomic_exchange(&n->cq[id].starved, false))
        nvme_kick(n, ALL_QUEUES);
    if (atomic_load(&n->intx)) {
        device_lock(&n->pci.dev);
        nvme_update_intx(n);
        device_unlock(&n->pci.dev);
    }
}

/* ---- completions ---- */

void nvme_update_intx(struct nvme *n)
{
    bool level = false;

    for (unsigned i = 0; i < NVME_QUEUES; i++) {
        struct nvme_cq *cq = &n->cq[i];

        level |=
            cq->size && cq->interrupts && !(n->int_mask >> cq->vector & 1) && !cq_is_empty(n, cq);
    }
    level &= !pci_msix_enabled(&n->pci);
    if (level == atomic_load(&n->intx))
        return;
    atomic_store(&n->intx, level);
    pci_intx_set(&n->pci, level);
}

static void interrupt(struct nvme *n, struct nvme_cq *cq)
{
    if (!cq->interrupts)
        return;
    if (pci_msix_enabled(&n->pci))
        pci_msix_notify(&n->pci, cq->vector);
    else
        nvme_update_intx(n);
}

static void post(struct nvme *n, struct nvme_cq *cq, const struct nvme_completion *entry)
{
    gpa_t at = cq->base + ((u64)cq->tail << NVME_CQE_LOG2);
    u64 len = sizeof(*entry);
    u8 *host = memory_dma(n->env.memory, at, &len, true);
    u32 last = entry->cid | (u32)(entry->status | cq->phase) << 16;

    if (!host || len < sizeof(*entry)) {
        nvme_fatal(n, "a completion queue that is no memory");
        return;
    }
    /* The phase tag makes the entry the guest's: it comes last. */
    memcpy(host, entry, sizeof(*entry) - sizeof(last));
    __atomic_store_n((u32 *)(host + sizeof(*entry) - sizeof(last)), last, __ATOMIC_RELEASE);
    memory_tell_written(n->env.memory, at, sizeof(*entry));
    if (++cq->tail == cq->size) {
        cq->tail = 0;
        cq->phase = !cq->phase;
    }
    interrupt(n, cq);
}

static void note_error(struct nvme *n, const struct nvme_completion *entry)
{
    n->stats.errors++;
    n->last_error = (struct nvme_error_entry){
        .count = n->stats.errors,
        .sq_id = entry->sq_id,
        .cid = entry->cid,
        .status = entry->status,
        .location = 0xffff,
    };
}

void nvme_complete(struct nvme *n, struct nvme_sq *sq, u16 cid, enum nvme_status status, u32 result)
{
    struct nvme_cq *cq = &n->cq[sq->cq];
    struct nvme_completion entry = {
        .result = result,
        .sq_head = sq->head,
        .sq_id = (u16)(sq - n->sq),
        .cid = cid,
        .status = (u16)(status << 1),
    };

    cq->reserved--;
    if (n->resetting)
        return;
    if (status != NVME_OK) {
        entry.status |= NVME_DO_NOT_RETRY << 1;
        note_error(n, &entry);
    }
    post(n, cq, &entry);
}

/* ---- commands ---- */

static bool is_live(const struct nvme *n)
{
    return (n->csts & NVME_CSTS_RDY) && !(n->csts & NVME_CSTS_CFS) && !n->resetting &&
           !n->stopped && pci_is_bus_master(&n->pci);
}

/* Takes one command and starts it. False: there is none that can be taken now. */
static bool take_command(struct nvme *n, struct nvme_sq *sq)
{
    struct nvme_context c = {.n = n, .sq = sq};
    enum nvme_status status;

    if (!is_live(n) || !sq->size || sq->deleting || sq_tail(n, sq) == sq->head ||
        !cq_reserve(n, &n->cq[sq->cq]))
        return false;
    if (memory_read(n->env.memory, sq->base + ((u64)sq->head << NVME_SQE_LOG2), &c.cmd,
                    sizeof(c.cmd))) {
        n->cq[sq->cq].reserved--;
        nvme_fatal(n, "a submission queue that is no memory");
        return false;
    }
    sq->head = (u16)((sq->head + 1) % sq->size);
    if (c.cmd.flags & NVME_CMD_FUSE)
        status = NVME_INVALID_FIELD;
    else
        status = sq == n->sq ? nvme_admin_command(&c) : nvme_io_command(&c);
    if (status != NVME_PENDING)
        nvme_complete(n, sq, c.cmd.cid, status, c.result);
    return true;
}

void nvme_serve(struct nvme *n, unsigned sqid)
{
    unsigned count = 0;

    nvme_tell_events(n);
    while (count < SERVE_MAX && take_command(n, &n->sq[sqid]))
        count++;
    if (count == SERVE_MAX)
        nvme_kick(n, BIT(sqid));
}

/* ---- asynchronous events ---- */

bool nvme_wait_for_event(struct nvme *n, u16 cid)
{
    if (n->async_count == NVME_ASYNC_MAX)
        return false;
    n->async_cid[n->async_count++] = cid;
    /* Its completion gets a place when there is something to tell: it may wait for ever. */
    n->cq[0].reserved--;
    nvme_tell_events(n);
    return true;
}

void nvme_tell_events(struct nvme *n)
{
    unsigned event;

    if (!n->events || n->events_masked || !n->async_count || !is_live(n) ||
        !cq_reserve(n, &n->cq[0]))
        return;
    event = (unsigned)__builtin_ctz(n->events);
    n->events &= (u8)~BIT(event);
    n->events_masked = true;
    nvme_complete(n, &n->sq[0], n->async_cid[--n->async_count], NVME_OK,
                  event << 8 | (u32)NVME_LOG_ERRORS << 16);
}

bool nvme_abort_event_request(struct nvme *n, u16 cid)
{
    for (unsigned i = 0; i < n->async_count; i++) {
        if (n->async_cid[i] != cid)
            continue;
        if (!cq_reserve(n, &n->cq[0]))
            return false;
        n->async_cid[i] = n->async_cid[--n->async_count];
        nvme_complete(n, &n->sq[0], cid, NVME_ABORTED, 0);
        return true;
    }
    return false;
}

/* ---- the queues' life ---- */

void nvme_sq_init(struct nvme *n, unsigned sqid, gpa_t base, u16 size, u16 cqid)
{
    struct nvme_sq *sq = &n->sq[sqid];

    sq->base = base;
    sq->size = size;
    sq->head = 0;
    sq->cq = cqid;
    atomic_store(&sq->tail, 0);
    n->cq[cqid].users++;
}

void nvme_cq_init(struct nvme *n, unsigned cqid, gpa_t base, u16 size, u16 vector, bool interrupts)
{
    struct nvme_cq *cq = &n->cq[cqid];

    cq->base = base;
    cq->size = size;
    cq->tail = 0;
    cq->vector = vector;
    cq->interrupts = interrupts;
    cq->phase = true;
    cq->users = 0;
    atomic_store(&cq->head, 0);
    cq->last_head = 0;
    cq->reserved = 0;
}

void nvme_sq_delete(struct nvme *n, struct nvme_sq *sq)
{
    n->cq[sq->cq].users--;
    sq->size = 0;
    sq->deleting = false;
}

void nvme_cq_delete(struct nvme *n, struct nvme_cq *cq)
{
    cq->size = 0;
    nvme_update_intx(n);
}
