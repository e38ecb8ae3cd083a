/*
 * Bytes as a driver of an NVMe controller: registers, doorbells, commands with lists for their data, queues that come
 * and go, resets in between, a damaged state. The sanitizers and the rig's slots are the judges.
 */
#include "../unit/disk_rig.h"
#include "../unit/nvme_rig.h"
#include "fuzz_device.h"
#include "host/log.h"

#define DISK_SIZE KIB(64)

struct machine {
    struct rig *rig;
    struct nvme_rig *t;
    struct block_backend *disks[2];
};

static void build(struct machine *m)
{
    struct nvme_config cfg = {.serial = "fuzz", .count = 2};

    m->rig = disk_rig_create();
    m->disks[0] = rig_disk(m->rig, DISK_SIZE, false);
    m->disks[1] = rig_disk(m->rig, DISK_SIZE, true);
    memcpy(cfg.namespaces, m->disks, sizeof(m->disks));
    m->t = nvme_rig_create(m->rig, &cfg);
}

static void destroy(struct machine *m)
{
    nvme_rig_destroy(m->t);
    block_destroy(m->disks[0]);
    block_destroy(m->disks[1]);
    disk_rig_destroy(m->rig);
}

/* Mostly in the memory that there is. */
static gpa_t take_address(struct input *in)
{
    u8 kind = (u8)take(in, 1);

    switch (kind % 4) {
    case 0:
        return NVME_DATA + take(in, 1) * 4096;
    case 1:
        return NVME_LIST + take(in, 2) % 0x2000;
    case 2:
        return NVME_DATA + take(in, 3) % NVME_DATA_SIZE;
    default:
        return take(in, 8);
    }
}

static void command(struct machine *m, struct input *in)
{
    unsigned q = take(in, 1) % NVME_RIG_QUEUES;
    struct nvme_command cmd = {
        .opcode = (u8)take(in, 1) % 16,
        .flags = (u8)take(in, 1) & 0xc1,
        .nsid = (u32)take(in, 1) % 4,
        .prp1 = take_address(in),
        .prp2 = take_address(in),
        .cdw10 = (u32)take(in, 4),
        .cdw11 = (u32)take(in, 4),
        .cdw12 = (u32)take(in, 4),
    };

    if (q) {
        cmd.cdw10 %= DISK_SIZE / 512 + 1;
        cmd.cdw11 &= take(in, 1) & 5;
        cmd.cdw12 &= 0x420000ff;
    } else if (cmd.opcode == NVME_ADMIN_CREATE_CQ || cmd.opcode == NVME_ADMIN_CREATE_SQ) {
        cmd.cdw10 &= 0x001f0003;
        cmd.cdw11 &= 0x00030003;
    }
    if (!m->t->size[q])
        return;
    nvme_queue_command(m->t, q, &cmd);
    nvme_ring(m->t, q);
}

static void list_entry(struct machine *m, struct input *in)
{
    u64 entry[2] = {take_address(in), take(in, 8)};

    memory_write(&m->rig->memory, NVME_LIST + 8 * (take(in, 2) % 0x3f0), entry, sizeof(entry));
}

/* The guest takes what was completed, or doesn't. */
static void take_completions(struct machine *m)
{
    struct nvme_completion e;

    for (unsigned q = 0; q < NVME_RIG_QUEUES; q++) {
        for (unsigned i = 0; m->t->size[q] && i < NVME_RIG_ENTRIES; i++)
            if (!nvme_take(m->t, q, &e))
                break;
    }
}

/* Queues as a driver makes them, as far as the controller lets it. */
static void start_driver(struct machine *m)
{
    struct nvme_command cmd = {.cdw11 = NVME_QUEUE_INTERRUPTS | NVME_QUEUE_CONTIGUOUS};

    nvme_set_reg(m->t, NVME_REG_CC, 0);
    rig_run_loop(m->rig);
    if (nvme_enable(m->t) != NVME_CSTS_RDY)
        return;
    for (u32 q = 1; q < NVME_RIG_QUEUES; q++) {
        nvme_clear_queue(m->t, q, NVME_RIG_ENTRIES);
        cmd.cdw10 = (NVME_RIG_ENTRIES - 1) << 16 | q;
        cmd.opcode = NVME_ADMIN_CREATE_CQ;
        cmd.prp1 = NVME_CQ(q);
        nvme_queue_command(m->t, 0, &cmd);
        cmd.opcode = NVME_ADMIN_CREATE_SQ;
        cmd.prp1 = NVME_SQ(q);
        cmd.cdw11 |= q << 16;
        nvme_queue_command(m->t, 0, &cmd);
    }
    nvme_ring(m->t, 0);
    rig_run_loop(m->rig);
    take_completions(m);
}

static void step(struct machine *m, struct input *in)
{
    struct device *dev = nvme_device(m->t->nvme);
    u8 op = (u8)take(in, 1);

    switch (op % 16) {
    case 0:
        access_bus(m->rig->env.mmio, NVME_BAR + take(in, 2) % 0x2000, 1U << (op >> 4 & 3),
                   op & 0x40, in);
        break;
    case 1:
        access_bus(m->rig->env.mmio, NVME_BAR + take(in, 1) % 0x40, 4, op & 0x40, in);
        break;
    case 2:
        nvme_set_reg(m->t, NVME_REG_DOORBELLS + 4 * (take(in, 1) % 8), take(in, 1));
        break;
    case 3:
        config_write(m->rig, NVME_DEVFN, take(in, 1), take(in, 4), 4);
        break;
    case 4:
        start_driver(m);
        break;
    case 5:
        load_damaged_state(dev, in);
        pci_host_loaded(m->t->host);
        break;
    case 6:
        dev->ops->stop(dev);
        dev->ops->start(dev);
        break;
    case 7:
        dev->ops->reset(dev);
        break;
    case 8:
        nvme_enable_msix(m->t);
        break;
    case 9:
    case 10:
        list_entry(m, in);
        break;
    case 11:
        take_completions(m);
        break;
    default:
        command(m, in);
        break;
    }
    rig_run_loop(m->rig);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, size};
    struct machine m;

    log_set_level(LOG_ERROR);
    build(&m);
    start_driver(&m);
    while (in.left)
        step(&m, &in);
    destroy(&m);
    return 0;
}
