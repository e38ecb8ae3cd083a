/*
 * An NVMe controller on a PCI bus, and a driver for it: the admin queues and two pairs for input and output. See
 * pci_rig.h.
 */
#ifndef DOPPEL_TESTS_NVME_RIG_H
#define DOPPEL_TESTS_NVME_RIG_H

#include "device/nvme/nvme.h"
#include "device/nvme/regs.h"
#include "host/event_loop.h"
#include "pci_rig.h"

#include <poll.h>

#define NVME_DEVFN PCI_DEVFN(3, 0)
#define NVME_BAR 0xc0000000ULL
#define NVME_MSIX 0xc0100000ULL
#define NVME_MSIX_BAR 4
#define NVME_RIG_QUEUES 3
#define NVME_RIG_ENTRIES 16

/* Where things are in guest memory: the rig's 64 KiB at 0, and a mebibyte more. */
#define NVME_SQ(q) (0x1000 + 0x2000ULL * (q))
#define NVME_CQ(q) (0x2000 + 0x2000ULL * (q))
#define NVME_LIST 0x8000ULL /* two pages */
#define NVME_DATA MIB(1)
#define NVME_DATA_SIZE MIB(1)

struct nvme_rig {
    struct rig *r;
    struct pci_host *host;
    struct nvme *nvme;
    u16 tail[NVME_RIG_QUEUES], head[NVME_RIG_QUEUES];
    u16 size[NVME_RIG_QUEUES];
    bool phase[NVME_RIG_QUEUES];
    u16 cid;
};

static inline u32 nvme_reg(struct nvme_rig *t, unsigned offset)
{
    return (u32)io_bus_read(t->r->env.mmio, NVME_BAR + offset, 4);
}
static inline void nvme_set_reg(struct nvme_rig *t, unsigned offset, u64 value)
{
    io_bus_write(t->r->env.mmio, NVME_BAR + offset, (u32)value, 4);
}
static inline void nvme_set_reg64(struct nvme_rig *t, unsigned offset, u64 value)
{
    nvme_set_reg(t, offset, value);
    nvme_set_reg(t, offset + 4, value >> 32);
}

/* SQ q's doorbell, and CQ q's. */
static inline void nvme_ring(struct nvme_rig *t, unsigned q)
{
    nvme_set_reg(t, NVME_REG_DOORBELLS + 8 * q, t->tail[q]);
}
static inline void nvme_ring_cq(struct nvme_rig *t, unsigned q)
{
    nvme_set_reg(t, NVME_REG_DOORBELLS + 8 * q + 4, t->head[q]);
}

static inline void nvme_clear_queue(struct nvme_rig *t, unsigned q, u16 entries)
{
    memset(memory_host(&t->r->memory, NVME_CQ(q), 0x1000), 0, 0x1000);
    t->tail[q] = t->head[q] = 0;
    t->size[q] = entries;
    t->phase[q] = true;
}

static inline void nvme_disable(struct nvme_rig *t)
{
    nvme_set_reg(t, NVME_REG_CC, 0);
    for (unsigned i = 0; nvme_reg(t, NVME_REG_CSTS) & NVME_CSTS_RDY; i++) {
        assert(i < 5000);
        rig_run_loop(t->r);
        poll(NULL, 0, 1);
    }
}

/* Returns CSTS. */
static inline u32 nvme_enable(struct nvme_rig *t)
{
    nvme_clear_queue(t, 0, NVME_RIG_ENTRIES);
    nvme_set_reg(t, NVME_REG_AQA, (NVME_RIG_ENTRIES - 1) << 16 | (NVME_RIG_ENTRIES - 1));
    nvme_set_reg64(t, NVME_REG_ASQ, NVME_SQ(0));
    nvme_set_reg64(t, NVME_REG_ACQ, NVME_CQ(0));
    nvme_set_reg(t, NVME_REG_CC,
                 NVME_SQE_LOG2 << NVME_CC_IOSQES_SHIFT | NVME_CQE_LOG2 << NVME_CC_IOCQES_SHIFT |
                     NVME_CC_EN);
    return nvme_reg(t, NVME_REG_CSTS);
}

/* Puts a command into a queue, with an ID, which is returned; nvme_ring makes it the controller's. */
static inline u16 nvme_queue_command(struct nvme_rig *t, unsigned q, const struct nvme_command *cmd)
{
    struct nvme_command c = *cmd;

    c.cid = t->cid++;
    memory_write(&t->r->memory, NVME_SQ(q) + 64ULL * t->tail[q], &c, sizeof(c));
    t->tail[q] = (u16)((t->tail[q] + 1) % t->size[q]);
    return c.cid;
}

/* The next completion of a queue. False: there is none. */
static inline bool nvme_take(struct nvme_rig *t, unsigned q, struct nvme_completion *e)
{
    memory_read(&t->r->memory, NVME_CQ(q) + 16ULL * t->head[q], e, sizeof(*e));
    if ((e->status & 1) != t->phase[q])
        return false;
    if (++t->head[q] == t->size[q]) {
        t->head[q] = 0;
        t->phase[q] = !t->phase[q];
    }
    nvme_ring_cq(t, q);
    return true;
}

static inline struct nvme_completion nvme_wait(struct nvme_rig *t, unsigned q)
{
    struct nvme_completion e;

    for (unsigned i = 0; !nvme_take(t, q, &e); i++) {
        assert(i < 5000);
        rig_run_loop(t->r);
        poll(NULL, 0, 1);
    }
    return e;
}

static inline unsigned nvme_status_of(const struct nvme_completion *e)
{
    return e->status >> 1 & 0x7ff;
}

/* One command, to its end: its status, and its result when that is asked for. */
static inline unsigned nvme_do(struct nvme_rig *t, unsigned q, const struct nvme_command *cmd,
                               u32 *result)
{
    u16 cid = nvme_queue_command(t, q, cmd);
    struct nvme_completion e;

    nvme_ring(t, q);
    e = nvme_wait(t, q);
    assert(e.cid == cid && e.sq_id == q && e.sq_head == t->tail[q]);
    if (result)
        *result = e.result;
    return nvme_status_of(&e);
}

static inline unsigned nvme_create_cq(struct nvme_rig *t, u16 q, u32 entries, u16 vector)
{
    struct nvme_command cmd = {
        .opcode = NVME_ADMIN_CREATE_CQ,
        .prp1 = NVME_CQ(q),
        .cdw10 = (entries - 1) << 16 | q,
        .cdw11 = (u32)vector << 16 | NVME_QUEUE_INTERRUPTS | NVME_QUEUE_CONTIGUOUS,
    };

    return nvme_do(t, 0, &cmd, NULL);
}

static inline unsigned nvme_create_sq(struct nvme_rig *t, u16 q, u32 entries, u16 cq)
{
    struct nvme_command cmd = {
        .opcode = NVME_ADMIN_CREATE_SQ,
        .prp1 = NVME_SQ(q),
        .cdw10 = (entries - 1) << 16 | q,
        .cdw11 = (u32)cq << 16 | NVME_QUEUE_CONTIGUOUS,
    };

    return nvme_do(t, 0, &cmd, NULL);
}

/* A pair of queues for input and output, 1 or 2; its interrupts by that vector. */
static inline void nvme_create_pair(struct nvme_rig *t, u16 q)
{
    unsigned status = nvme_create_cq(t, q, NVME_RIG_ENTRIES, q);

    nvme_clear_queue(t, q, NVME_RIG_ENTRIES);
    if (!status)
        status = nvme_create_sq(t, q, NVME_RIG_ENTRIES, q);
    assert(!status);
}

/* MSI-X on: vector i sends data 0x40 + i. */
static inline void nvme_enable_msix(struct nvme_rig *t)
{
    unsigned cap = find_capability(t->r, NVME_DEVFN, PCI_CAP_ID_MSIX, 0);

    config_write(t->r, NVME_DEVFN, cap + PCI_MSIX_FLAGS, PCI_MSIX_FLAGS_ENABLE, 2);
    for (unsigned i = 0; i < NVME_RIG_QUEUES; i++) {
        u64 entry = NVME_MSIX + i * PCI_MSIX_ENTRY_SIZE;

        io_bus_write(t->r->env.mmio, entry, 0xfee00000, 8);
        io_bus_write(t->r->env.mmio, entry + 8, 0x40 + i, 4);
        io_bus_write(t->r->env.mmio, entry + 12, 0, 4);
    }
}

/* In a rig with a loop: the controller, its BARs in place. */
static inline struct nvme_rig *nvme_rig_create(struct rig *r, const struct nvme_config *cfg)
{
    struct nvme_rig *t = calloc(1, sizeof(*t));

    t->r = r;
    if (memory_add_slot(&r->memory, NVME_DATA, NVME_DATA_SIZE, 0, &r->err))
        abort();
    t->host = rig_pci_host(r);
    t->nvme = nvme_create(&r->env, cfg, t->host, NVME_DEVFN, &r->err);
    if (!t->nvme)
        abort();
    config_write(r, NVME_DEVFN, PCI_BASE_ADDRESS_0, NVME_BAR, 4);
    config_write(r, NVME_DEVFN, PCI_BASE_ADDRESS_0 + 4 * NVME_MSIX_BAR, NVME_MSIX, 4);
    config_write(r, NVME_DEVFN, PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER, 2);
    return t;
}

/* All but the rig. */
static inline void nvme_rig_destroy(struct nvme_rig *t)
{
    struct device *host = pci_host_device(t->host);

    nvme_device(t->nvme)->ops->destroy(nvme_device(t->nvme));
    host->ops->destroy(host);
    free(t);
}

#endif
