/*
 * The controller: registers (NVM Express 1.4, 3.1), resets (7.3), the device's life and state.
 */
#include "device/nvme/nvme.h"

#include "device/nvme/internal.h"
#include "host/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The PCI ID that virtual machines give an NVMe controller; drivers go by the class. */
#define NVME_PCI_VENDOR 0x1b36
#define NVME_PCI_DEVICE 0x0010
#define NVME_PCI_INTERFACE 0x02 /* NVM Express */

#define BAR_REGISTERS 0
#define BAR_MSIX 4
#define BAR_SIZE 0x2000
#define READY_TIMEOUT 40 /* CAP.TO: 20 s */

struct nvme_namespace *nvme_namespace(struct nvme *n, u32 nsid)
{
    return nsid >= 1 && nsid <= n->cfg.count ? &n->ns[nsid - 1] : NULL;
}

void nvme_fatal(struct nvme *n, const char *why)
{
    log_once(LOG_WARN,
             "nvme: the guest's driver broke the rules (%s); it must reset the controller", why);
    n->csts |= NVME_CSTS_CFS;
}

/* ---- enabling and resets ---- */

static void reset_queues(struct nvme *n)
{
    for (unsigned i = 0; i < NVME_QUEUES; i++) {
        n->sq[i] = (struct nvme_sq){0};
        n->cq[i] = (struct nvme_cq){0};
    }
    n->async_count = 0;
    n->events = 0;
    n->events_masked = false;
    nvme_update_intx(n);
}

/* All but the admin queues' registers and what the guest wrote to CC (3.1.5). */
static void finish_reset(struct nvme *n)
{
    n->resetting = false;
    n->shutdown_wanted = false;
    n->csts = 0;
    n->int_mask = 0;
    reset_queues(n);
    nvme_reset_features(n);
}

static void begin_reset(struct nvme *n)
{
    n->resetting = true;
    if (!n->in_flight)
        finish_reset(n);
}

void nvme_request_returned(struct nvme *n, struct nvme_sq *sq)
{
    n->in_flight--;
    if (sq && --sq->in_flight == 0 && sq->deleting) {
        nvme_sq_delete(n, sq);
        nvme_complete(n, &n->sq[0], sq->delete_cid, NVME_OK, 0);
    }
    if (n->resetting && !n->in_flight)
        finish_reset(n);
}

static u16 admin_sq_size(const struct nvme *n)
{
    return (u16)((n->aqa & 0xfff) + 1);
}

static u16 admin_cq_size(const struct nvme *n)
{
    return (u16)((n->aqa >> 16 & 0xfff) + 1);
}

static bool can_be_enabled(const struct nvme *n)
{
    return !(n->cc & (NVME_CC_CSS | NVME_CC_MPS | NVME_CC_AMS)) && admin_sq_size(n) >= 2 &&
           admin_cq_size(n) >= 2 && n->asq % NVME_PAGE_SIZE == 0 && n->acq % NVME_PAGE_SIZE == 0;
}

static void enable(struct nvme *n)
{
    if (!can_be_enabled(n)) {
        nvme_fatal(n, "it can't be enabled so");
        return;
    }
    nvme_cq_init(n, 0, n->acq, admin_cq_size(n), 0, true);
    nvme_sq_init(n, 0, n->asq, admin_sq_size(n), 0);
    n->csts |= NVME_CSTS_RDY;
}

static void write_cc(struct nvme *n, u32 value)
{
    u32 old = n->cc;

    /* The guest waits for the end of a reset before it enables the controller again (7.3.2). */
    if (n->resetting)
        value &= ~NVME_CC_EN;
    n->cc = value & NVME_CC_WRITABLE;
    if ((old & NVME_CC_EN) && !(value & NVME_CC_EN))
        begin_reset(n);
    else if (!(old & NVME_CC_EN) && (value & NVME_CC_EN))
        enable(n);
    if ((value & NVME_CC_SHN) && !(n->csts & NVME_CSTS_SHST) && !n->resetting) {
        n->csts |= NVME_CSTS_SHST_OCCURRING;
        n->shutdown_wanted = true;
        nvme_kick(n, BIT(0));
    }
}

/* ---- registers ---- */

static u64 capabilities(void)
{
    return (NVME_QUEUE_SIZE_MAX - 1) | NVME_CAP_CQR | (u64)READY_TIMEOUT << NVME_CAP_TO_SHIFT |
           NVME_CAP_CSS_NVM;
}

static u32 register_read(const struct nvme *n, unsigned offset)
{
    switch (offset) {
    case NVME_REG_CAP:
        return (u32)capabilities();
    case NVME_REG_CAP + 4:
        return (u32)(capabilities() >> 32);
    case NVME_REG_VS:
        return NVME_VERSION;
    case NVME_REG_INTMS:
    case NVME_REG_INTMC:
        return n->int_mask;
    case NVME_REG_CC:
        return n->cc;
    case NVME_REG_CSTS:
        return n->csts;
    case NVME_REG_AQA:
        return n->aqa;
    case NVME_REG_ASQ:
        return (u32)n->asq;
    case NVME_REG_ASQ + 4:
        return (u32)(n->asq >> 32);
    case NVME_REG_ACQ:
        return (u32)n->acq;
    case NVME_REG_ACQ + 4:
        return (u32)(n->acq >> 32);
    default:
        return 0;
    }
}

static void set_half(u64 *reg, unsigned shift, u32 value)
{
    *reg = (*reg & ~(0xffffffffULL << shift)) | (u64)value << shift;
}

static void register_write(struct nvme *n, unsigned offset, u32 value)
{
    switch (offset) {
    case NVME_REG_INTMS:
        n->int_mask |= value;
        nvme_update_intx(n);
        break;
    case NVME_REG_INTMC:
        n->int_mask &= ~value;
        nvme_update_intx(n);
        break;
    case NVME_REG_CC:
        write_cc(n, value);
        break;
    case NVME_REG_AQA:
        n->aqa = value & 0x0fff0fff;
        break;
    case NVME_REG_ASQ:
    case NVME_REG_ASQ + 4:
        set_half(&n->asq, 8 * (offset & 4), value);
        break;
    case NVME_REG_ACQ:
    case NVME_REG_ACQ + 4:
        set_half(&n->acq, 8 * (offset & 4), value);
        break;
    }
}

static u64 bar_read(void *opaque, u64 offset, unsigned size)
{
    struct nvme *n = opaque;
    u32 value;

    device_lock(&n->pci.dev);
    value = register_read(n, (unsigned)offset & ~3U);
    device_unlock(&n->pci.dev);
    return value >> 8 * (offset & 3);
}

/* Registers are written as a whole (3.1.1); anything less is dropped. */
static void bar_write(void *opaque, u64 offset, u64 value, unsigned size)
{
    struct nvme *n = opaque;

    if (size != 4 || offset % 4)
        return;
    /* The busy way takes no lock: the loop may hold it for long. */
    if (offset >= NVME_REG_DOORBELLS) {
        nvme_doorbell(n, (unsigned)(offset - NVME_REG_DOORBELLS) / 4, (u32)value);
        return;
    }
    device_lock(&n->pci.dev);
    register_write(n, (unsigned)offset, (u32)value);
    device_unlock(&n->pci.dev);
}

static const struct io_ops bar_ops = {bar_read, bar_write, 4};

/* ---- life ---- */

static void serve_kicked(void *opaque)
{
    struct nvme *n = opaque;
    u64 queues;

    device_lock(&n->pci.dev);
    if (n->shutdown_wanted && !n->stopped)
        nvme_start_shutdown(n);
    for (queues = atomic_exchange(&n->kicked, 0); queues; queues &= queues - 1)
        nvme_serve(n, (unsigned)__builtin_ctzll(queues));
    device_unlock(&n->pci.dev);
}

static void nvme_start(struct device *dev)
{
    struct nvme *n = container_of(dev, struct nvme, pci.dev);

    device_lock(dev);
    n->stopped = false;
    nvme_kick(n, BIT(NVME_QUEUES) - 1);
    device_unlock(dev);
}

static void drain(struct nvme *n)
{
    for (unsigned i = 0; i < n->cfg.count; i++)
        block_drain(n->ns[i].backend);
}

static void nvme_stop(struct device *dev)
{
    struct nvme *n = container_of(dev, struct nvme, pci.dev);

    device_lock(dev);
    n->stopped = true;
    device_unlock(dev);
    drain(n);
}

static bool nvme_busy(struct device *dev)
{
    struct nvme *n = container_of(dev, struct nvme, pci.dev);
    bool busy;

    device_lock(dev);
    busy = n->in_flight > 0;
    device_unlock(dev);
    return busy;
}

/* All commands come back: what is under way is finished, what was kept for later is given up. */
static void bring_in(struct nvme *n)
{
    drain(n);
    for (unsigned i = 0; i < n->cfg.count; i++)
        block_give_up(n->ns[i].backend);
}

static void nvme_reset(struct device *dev)
{
    struct nvme *n = container_of(dev, struct nvme, pci.dev);

    bring_in(n);
    device_lock(dev);
    finish_reset(n);
    n->cc = n->aqa = 0;
    n->asq = n->acq = 0;
    device_unlock(dev);
    pci_device_reset(&n->pci);
}

static void nvme_destroy(struct device *dev)
{
    struct nvme *n = container_of(dev, struct nvme, pci.dev);

    bring_in(n);
    loop_kick_close(&n->kick);
    pci_device_fini(&n->pci);
    free(n);
}

static const struct pci_device_ops nvme_ops = {
    .dev = {.reset = nvme_reset,
            .destroy = nvme_destroy,
            .start = nvme_start,
            .stop = nvme_stop,
            .busy = nvme_busy},
};

/* ---- state ---- */

static bool sq_is_possible(const struct nvme *n, const struct nvme_sq *sq)
{
    bool admin = sq == n->sq;

    if (!sq->size)
        return true;
    return sq->size >= 2 && sq->size <= (admin ? 4096 : NVME_QUEUE_SIZE_MAX) &&
           sq->head < sq->size && sq->base % NVME_PAGE_SIZE == 0 && sq->cq < NVME_QUEUES &&
           (sq->cq == 0) == admin && n->cq[sq->cq].size;
}

static bool cq_is_possible(const struct nvme *n, const struct nvme_cq *cq)
{
    if (!cq->size)
        return true;
    return cq->size >= 2 && cq->size <= (cq == n->cq ? 4096 : NVME_QUEUE_SIZE_MAX) &&
           cq->tail < cq->size && cq->last_head < cq->size && cq->base % NVME_PAGE_SIZE == 0 &&
           cq->vector < n->pci.msix_vectors;
}

static int nvme_loaded(void *obj, struct error *err)
{
    struct nvme *n = obj;

    for (unsigned i = 0; i < n->cfg.count; i++) {
        if (n->ns[i].blocks != block_size(n->ns[i].backend) / NVME_SECTOR)
            return error_input(err, "%s: the saved disk has another size",
                               block_path(n->ns[i].backend));
    }
    for (unsigned i = 0; i < NVME_QUEUES; i++) {
        if (!sq_is_possible(n, &n->sq[i]) || !cq_is_possible(n, &n->cq[i]))
            return error_input(err, "nvme: saved queue %u is impossible", i);
        n->cq[i].users = 0;
    }
    if (n->resetting || n->async_count > NVME_ASYNC_MAX ||
        (n->csts & NVME_CSTS_RDY && (!n->sq[0].size || !n->cq[0].size)))
        return error_input(err, "nvme: the saved registers are impossible");
    for (unsigned i = 0; i < NVME_QUEUES; i++) {
        if (n->sq[i].size)
            n->cq[n->sq[i].cq].users++;
    }
    atomic_store(&n->intx, n->pci.config[PCI_STATUS] & PCI_STATUS_INTERRUPT);
    return 0;
}

static const struct state_field sq_fields[] = {
    STATE_FIELD(struct nvme_sq, base),      STATE_FIELD(struct nvme_sq, size),
    STATE_FIELD(struct nvme_sq, head),      STATE_FIELD(struct nvme_sq, cq),
    STATE_FIELD(struct nvme_sq, tail),      STATE_HOST(struct nvme_sq, deleting),
    STATE_HOST(struct nvme_sq, delete_cid), STATE_HOST(struct nvme_sq, in_flight),
};
static const struct state_desc sq_state = STATE_DESC("nvme_sq", 1, struct nvme_sq, sq_fields);

static const struct state_field cq_fields[] = {
    STATE_FIELD(struct nvme_cq, base),       STATE_FIELD(struct nvme_cq, size),
    STATE_FIELD(struct nvme_cq, tail),       STATE_FIELD(struct nvme_cq, vector),
    STATE_FIELD(struct nvme_cq, interrupts), STATE_FIELD(struct nvme_cq, phase),
    STATE_HOST(struct nvme_cq, users),       STATE_FIELD(struct nvme_cq, head),
    STATE_FIELD(struct nvme_cq, last_head),  STATE_HOST(struct nvme_cq, starved),
    STATE_HOST(struct nvme_cq, reserved),
};
static const struct state_desc cq_state = STATE_DESC("nvme_cq", 1, struct nvme_cq, cq_fields);

static const struct state_field ns_fields[] = {
    STATE_HOST(struct nvme_namespace, backend),
    STATE_FIELD(struct nvme_namespace, blocks),
    STATE_HOST(struct nvme_namespace, flush),
    STATE_HOST(struct nvme_namespace, nvme),
};
static const struct state_desc ns_state =
    STATE_DESC("nvme_namespace", 1, struct nvme_namespace, ns_fields);

static const struct state_field statistics_fields[] = {
    STATE_FIELD(struct nvme_statistics, sectors_read),
    STATE_FIELD(struct nvme_statistics, sectors_written),
    STATE_FIELD(struct nvme_statistics, commands_read),
    STATE_FIELD(struct nvme_statistics, commands_written),
    STATE_FIELD(struct nvme_statistics, media_errors),
    STATE_FIELD(struct nvme_statistics, errors),
};
static const struct state_desc statistics_state =
    STATE_DESC("nvme_statistics", 1, struct nvme_statistics, statistics_fields);

static const struct state_field nvme_fields[] = {
    STATE_STRUCTS(struct nvme, pci, &pci_device_state),
    STATE_HOST(struct nvme, cfg),
    STATE_HOST(struct nvme, env),
    STATE_HOST(struct nvme, serial),
    STATE_HOST(struct nvme, kick),
    STATE_HOST(struct nvme, kicked),
    STATE_HOST(struct nvme, stopped),
    STATE_HOST(struct nvme, in_flight),
    STATE_HOST(struct nvme, shutdown_flushes),
    STATE_FIELD(struct nvme, cc),
    STATE_FIELD(struct nvme, csts),
    STATE_FIELD(struct nvme, aqa),
    STATE_FIELD(struct nvme, int_mask),
    STATE_HOST(struct nvme, intx),
    STATE_FIELD(struct nvme, asq),
    STATE_FIELD(struct nvme, acq),
    STATE_FIELD(struct nvme, resetting),
    STATE_FIELD(struct nvme, shutdown_wanted),
    STATE_STRUCTS(struct nvme, sq, &sq_state),
    STATE_STRUCTS(struct nvme, cq, &cq_state),
    STATE_FIELD(struct nvme, features),
    STATE_FIELD(struct nvme, uncoalesced),
    STATE_FIELD(struct nvme, async_cid),
    STATE_FIELD(struct nvme, async_count),
    STATE_FIELD(struct nvme, events),
    STATE_FIELD(struct nvme, events_masked),
    STATE_STRUCTS(struct nvme, stats, &statistics_state),
    STATE_BYTES(struct nvme, last_error),
    STATE_STRUCTS(struct nvme, ns, &ns_state),
};
static const struct state_desc nvme_state = {
    .name = "nvme",
    .version = 1,
    .struct_size = sizeof(struct nvme),
    .fields = nvme_fields,
    .nfields = ARRAY_SIZE(nvme_fields),
    .loaded = nvme_loaded,
};

/* ---- setting up ---- */

static void set_up_namespaces(struct nvme *n)
{
    for (unsigned i = 0; i < n->cfg.count; i++) {
        struct nvme_namespace *ns = &n->ns[i];

        ns->backend = n->cfg.namespaces[i];
        ns->blocks = block_size(ns->backend) / NVME_SECTOR;
        ns->nvme = n;
    }
}

struct nvme *nvme_create(const struct device_env *env, const struct nvme_config *cfg,
                         struct pci_host *host, u16 place, struct error *err)
{
    static const struct pci_identity identity = {
        .vendor = NVME_PCI_VENDOR,
        .device = NVME_PCI_DEVICE,
        .class = PCI_CLASS_STORAGE_EXPRESS,
        .interface = NVME_PCI_INTERFACE,
        .subsystem_vendor = PCI_HOST_SUBSYSTEM_VENDOR,
        .subsystem = PCI_HOST_SUBSYSTEM,
        .pin = 1,
    };
    struct nvme *n = calloc(1, sizeof(*n));

    if (!n) {
        error_host(err, ENOMEM, "nvme");
        return NULL;
    }
    n->cfg = *cfg;
    n->env = *env;
    snprintf(n->serial, sizeof(n->serial), "%s", cfg->serial);
    set_up_namespaces(n);
    pci_device_init(&n->pci, "nvme", &nvme_ops, &nvme_state, &identity);
    pci_add_bar(&n->pci, BAR_REGISTERS, PCI_BAR_MEM64, BAR_SIZE, &bar_ops, n);
    pci_add_msix(&n->pci, NVME_QUEUES, BAR_MSIX);
    if (loop_kick_open(&n->kick, env->loop, serve_kicked, n, "nvme", err) ||
        pci_host_add(host, &n->pci, place, err)) {
        nvme_destroy(&n->pci.dev);
        return NULL;
    }
    nvme_reset(&n->pci.dev);
    return n;
}

struct device *nvme_device(struct nvme *n)
{
    return &n->pci.dev;
}
